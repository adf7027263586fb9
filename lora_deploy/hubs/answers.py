"""What a Hugging-Face-compatible hub's answers mean, as our errors.

Promise: no token is in any message; 401, 403, 404, 409, 412, 429 and 5xx each have a code of their own. Exceptions are
told apart by status, because the HTTP library under the client differs between its versions, and the xet path raises
built-in ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lora_deploy.errors import (
    HubUnavailableError,
    LoraDeployError,
    NotAuthorisedError,
    PushError,
    RateLimitedError,
    RevisionConflictError,
)

_STATUS = re.compile(r"\b(401|403|404|409|412|429|5\d\d)\b")
_MAX_SHOWN = 300


def status_of(error: BaseException) -> int | None:
    """Find the HTTP status behind an exception or its causes; in the xet path only the text holds it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        response = getattr(current, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            return status
        current = current.__cause__ or current.__context__
    if isinstance(error, ConnectionError | RuntimeError) and (match := _STATUS.search(str(error))):
        return int(match[1])
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Meaning:
    error: type[PushError]
    said: str
    code: str
    hint: str


_RESUMES = "push again later: it resumes"
_MEANINGS = {
    401: _Meaning(
        error=NotAuthorisedError,
        said="the hub does not know this token",
        code="unauthorised",
        hint="set HF_TOKEN, log in, or pass --token; the repository may be private, or not exist",
    ),
    403: _Meaning(
        error=NotAuthorisedError,
        said="the token may not do this",
        code="forbidden",
        hint="the token needs the right to write there",
    ),
    404: _Meaning(error=PushError, said="not found", code="not-found", hint="check the name and the revision"),
    409: _Meaning(error=RevisionConflictError, said="is taken or locked", code="conflict", hint=_RESUMES),
    412: _Meaning(
        error=RevisionConflictError,
        said="the branch has moved",
        code="moved",
        hint="somebody else committed meanwhile: look at it, then push again",
    ),
    429: _Meaning(error=RateLimitedError, said="too many requests", code="rate-limited", hint=_RESUMES),
}
_FAILED = _Meaning(error=HubUnavailableError, said="the hub failed", code="hub-failed", hint=_RESUMES)
_SERVER_ERROR = 500


def meaning_of(error: Exception, what: str, secret: str | None = None) -> PushError:
    """Say which of our errors an exception of the client is; ``what`` was asked of which place."""
    status = status_of(error)
    text = _said(error, secret)
    if status is not None:
        known = _MEANINGS.get(status) or (_FAILED if status >= _SERVER_ERROR else None)
        if known is not None:
            return known.error(f"{what}: {known.said} ({status}): {text}", hint=known.hint, code=known.code)
        return PushError(f"{what}: refused ({status}): {text}", code="refused")
    if "timeout" in type(error).__name__.lower() or isinstance(error, TimeoutError):
        return HubUnavailableError(f"{what}: the hub did not answer in time", hint=_RESUMES, code="timeout")
    return HubUnavailableError(f"{what}: {text}", hint="is the endpoint right, and can it be reached?")


@contextmanager
def asking(what: str, secret: str | None = None) -> Iterator[None]:
    """Turn whatever the client raises into one of our errors."""
    try:
        yield
    except LoraDeployError:
        raise
    except Exception as error:
        raise meaning_of(error, what, secret) from error


def _said(error: Exception, secret: str | None) -> str:
    server = getattr(error, "server_message", None)
    cause = f": {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else ""
    text = " ".join(f"{server or error}{cause}".split())
    if secret:
        text = text.replace(secret, "…")
    return (text[:_MAX_SHOWN] + "…" if len(text) > _MAX_SHOWN else text) or type(error).__name__
