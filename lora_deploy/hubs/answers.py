"""What a hub's answers mean, as our errors.

Promise: no credential is in any message, nor in the exception behind it; 401, 403, 404, 409, 412, 429 and 5xx each have
a code of their own. Exceptions are told apart by status, not by class: the HTTP library under the client differs
between its versions, its xet path raises built-in ones, and object stores have libraries of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lora_deploy.errors import (
    HubUnavailableError,
    LoraDeployError,
    NotAuthorisedError,
    PushError,
    RateLimitedError,
    RevisionConflictError,
)

Secrets = Callable[[], Iterable[str]]
_STATUS = re.compile(r"\b(401|403|404|409|412|429|5\d\d)\b")
_MAX_SHOWN = 300
_SHORT = 4
"""Characters of a secret too short to be looked for in texts: it would be found everywhere."""
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that the same call may not get a little later."""
_SERVER_ERROR = 500
MAX_WAIT_SECONDS = 330.0
"""Longest pause that a hub is granted: its windows are of five minutes."""


def status_of(error: BaseException) -> int | None:
    """Find the HTTP status behind an exception or its causes; in the xet path only the text holds it."""
    for current in _chain(error):
        found = _status_of_one(current)
        if found is not None:
            return found
    if isinstance(error, ConnectionError | RuntimeError) and (match := _STATUS.search(str(error))):
        return int(match[1])
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _status_of_one(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None)
    found = found or getattr(error, "status_code", None)  # azure
    if isinstance(found, int):
        return found
    if "credential" in type(error).__name__.lower():
        return 401
    # What fsspec makes of answers; the hub's client has classes below these that mean other things.
    of_answers: dict[type[BaseException], int] = {PermissionError: 403, FileNotFoundError: 404}
    return of_answers.get(type(error))


def is_passing(error: BaseException) -> bool:
    """Whether the hub said that the call may do better later."""
    return status_of(error) in _PASSING


def asked_wait(error: BaseException) -> float | None:
    """Give the seconds after which the hub wants to be asked again, None where it did not say."""
    for current in _chain(error):
        headers = getattr(getattr(current, "response", None), "headers", None) or {}
        if match := re.search(r"r=0;\s*t=(\d+)", headers.get("ratelimit", "")):
            return float(match[1]) + 1  # the window ends within that second
        if (said := headers.get("retry-after", "")).isdigit():
            return float(said) + 1
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Meaning:
    error: type[PushError]
    said: str
    code: str
    hint: str | None
    """None: how to sign in at this hub."""


_RESUMES = "the same command resumes"
_MEANINGS = {
    401: _Meaning(error=NotAuthorisedError, said="the credentials are not accepted", code="unauthorised", hint=None),
    403: _Meaning(
        error=NotAuthorisedError,
        said="these credentials may not do this",
        code="forbidden",
        hint="they need the right to write there (to read, for a pull)",
    ),
    404: _Meaning(error=PushError, said="not found", code="not-found", hint="check the name and the revision"),
    409: _Meaning(error=RevisionConflictError, said="is taken or locked", code="conflict", hint=_RESUMES),
    412: _Meaning(
        error=RevisionConflictError,
        said="somebody else wrote there meanwhile",
        code="moved",
        hint="look at what is there, then push again",
    ),
    429: _Meaning(error=RateLimitedError, said="too many requests", code="rate-limited", hint=f"wait, then {_RESUMES}"),
}
_FAILED = _Meaning(error=HubUnavailableError, said="the hub failed", code="hub-failed", hint=_RESUMES)
SIGN_IN = "set HF_TOKEN, log in with hf auth login, or pass --token; what is private looks as if it were not there"


def meaning_of(error: Exception, what: str, secrets: Secrets = tuple, sign_in: str = SIGN_IN) -> PushError:
    """Say which of our errors an exception of a client is; ``what`` was asked of which place."""
    status = status_of(error)
    text = _said(error, secrets)
    if status is not None:
        known = _MEANINGS.get(status) or (_FAILED if status >= _SERVER_ERROR else None)
        if known is not None:
            said = "no credentials were given" if status == 401 and not any(secrets()) else known.said
            message = f"{what}: {said} ({status})"
            return known.error(f"{message}: {text}", hint=known.hint or sign_in, code=known.code)
        return PushError(f"{what}: refused ({status}): {text}", code="refused")
    if any("timeout" in type(e).__name__.lower() or isinstance(e, TimeoutError) for e in _chain(error)):
        return HubUnavailableError(f"{what}: did not answer in time", hint=_RESUMES, code="timeout")
    if type(error).__name__ == "OfflineModeIsEnabled":
        return HubUnavailableError(f"{what}: offline mode is on", hint="unset HF_HUB_OFFLINE", code="offline")
    if isinstance(error, KeyError | TypeError | ValueError):
        return PushError(f"{what}: the answer is not understood: {type(error).__name__}: {text}", code="not-understood")
    return HubUnavailableError(f"{what}: {text}", hint=f"is the address right, and can it be reached? then {_RESUMES}")


@contextmanager
def asking(what: str, secrets: Secrets = tuple, sign_in: str = SIGN_IN) -> Iterator[None]:
    """Turn whatever a client raises into one of our errors; where a cause holds a secret, it is dropped."""
    try:
        yield
    except LoraDeployError:
        raise
    except Exception as error:
        meaning = meaning_of(error, what, secrets, sign_in)
        if any(_holds_secret(current, secrets) for current in _chain(error)):
            raise meaning from None
        raise meaning from error


def _holds_secret(error: BaseException, secrets: Secrets) -> bool:
    text = f"{error!r}{error}"
    return any(secret in text for secret in _worth_hiding(secrets))


def _worth_hiding(secrets: Secrets) -> list[str]:
    return [secret for secret in secrets() if len(secret) > _SHORT]


def _said(error: Exception, secrets: Secrets) -> str:
    server = getattr(error, "server_message", None) or _in_body(getattr(error, "response", None))
    cause = f": {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else ""
    text = " ".join(f"{server or error}{cause}".split())
    for secret in _worth_hiding(secrets):
        text = text.replace(secret, "…")
    return (text[:_MAX_SHOWN] + "…" if len(text) > _MAX_SHOWN else text) or type(error).__name__


def _in_body(response: Any) -> str | None:  # noqa: ANN401 - of whatever library
    """What a registry says of its refusal, else the status in words: better than what the HTTP library makes of it."""
    try:
        said = response.json()["errors"][0]
        return f"{said['code']}: {said['message']}"
    except Exception:  # noqa: BLE001 - any other body, or one that was not read
        found = getattr(response, "reason_phrase", None)
        return found if isinstance(found, str) else None


def patiently(call: Callable[[], Any], pause: Callable[[float], None], n_tries: int = 3) -> Any:  # noqa: ANN401 - the call's
    """Make a call that may be repeated, again where the hub says that it failed for now."""
    for attempt in range(1, n_tries):
        try:
            return call()
        except Exception as error:
            wait = asked_wait(error) or 2.0**attempt
            if not is_passing(error) or wait > MAX_WAIT_SECONDS:
                raise
            pause(wait)
    return call()
