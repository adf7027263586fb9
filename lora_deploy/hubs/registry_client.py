"""HTTP to a container registry: authorisation as it asks for it, and what its refusals mean.

Promise: no call waits for ever; credentials are never in a message, and go nowhere but to the registry and to the token
service that it names, over TLS unless the host is this machine.
Source: OCI distribution 1.1, the registry token authentication of its reference implementation.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lora_deploy.errors import NotAuthorisedError, PushError
from lora_deploy.hubs.answers import asking

_CONNECT_SECONDS, _READ_SECONDS = 10.0, 120.0
_LOCAL = re.compile(r"^(localhost|127\.\d+\.\d+\.\d+)(:\d+)?$")
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')

Content = bytes | Callable[[], Iterator[bytes]] | None


class RegistryClient:
    """Calls to one repository of one registry."""

    def __init__(self, host: str, name: str, token: str | None) -> None:
        """Ask nothing yet."""
        self._host = host
        self._root = f"{'http' if _LOCAL.match(host) else 'https'}://{host}/v2/{name}/"
        self._basic = _basic(token) or _from_docker(host)
        self._bearer = token if token and ":" not in token else None
        self._authorization: str | None = None
        library = http_library()
        timeout = library.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
        self._client = library.Client(timeout=timeout, follow_redirects=False)

    def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, content: Content = None
    ) -> Any:  # noqa: ANN401 - a response of the HTTP library
        """Call, authorise if asked to, and give a good answer.

        Raises:
            PushError: By what the registry says.
        """
        url = path if "://" in path else self._root + path
        with self._asking(f"{method} {urlsplit(url).path}"):
            answer = self._call(method, url, headers, content)
            if answer.status_code == 401 and self._authorise(answer):
                answer = self._call(method, url, headers, content)
            if not (method == "HEAD" and answer.is_redirect):  # it is there, in a storage of its own
                answer.raise_for_status()
            return answer

    @contextmanager
    def stream(self, path: str) -> Iterator[Any]:
        """Read an answer in pieces; a redirect to storage is followed without credentials.

        Raises:
            PushError: By what the registry says.
        """
        url = self._root + path
        what = f"GET {urlsplit(url).path}"
        self.request("HEAD", path)  # authorises
        with self._asking(what):
            request = self._client.build_request("GET", url, headers=self._headers(url, None))
            answer = self._client.send(request, stream=True)
            for _ in range(3):
                if not answer.is_redirect:
                    break
                place = str(answer.next_request.url)
                answer.close()
                request = self._client.build_request("GET", place, headers=self._headers(place, None))
                answer = self._client.send(request, stream=True)
            answer.raise_for_status()
        try:
            with self._asking(what):
                yield answer
        finally:
            answer.close()

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    def _asking(self, what: str) -> AbstractContextManager[None]:
        sign_in = f"docker login {self._host}, or pass --token user:password, or a bearer token"
        return asking(f"{self._host}: {what}", self._secrets, sign_in)

    def _secrets(self) -> Iterator[str]:
        """Give what must be in no message: what was given, and what a token service gave for it."""
        if self._bearer:
            yield self._bearer
        if self._basic:
            yield self._basic
            given = base64.b64decode(self._basic).decode(errors="replace")
            yield from (given, given.partition(":")[2])
        if self._authorization:
            yield self._authorization.partition(" ")[2]

    def _headers(self, url: str, more: Mapping[str, str] | None) -> dict[str, str]:
        """Credentials go to the registry alone."""
        own = {"authorization": self._authorization} if self._authorization and self._is_ours(url) else {}
        return {**own, **(more or {})}

    def _is_ours(self, url: str) -> bool:
        return urlsplit(url).netloc == self._host

    def _call(self, method: str, url: str, headers: Mapping[str, str] | None, content: Content) -> Any:  # noqa: ANN401
        body = content() if callable(content) else content
        return self._client.request(method, url, headers=self._headers(url, headers), content=body)

    def _authorise(self, answer: Any) -> bool:  # noqa: ANN401
        """Do what the challenge asks for; False where there is nothing to show."""
        challenge = answer.headers.get("www-authenticate", "")
        scheme = challenge.partition(" ")[0].lower()
        if scheme == "basic" and self._basic:
            self._authorization = f"Basic {self._basic}"
            return True
        if scheme == "bearer" and self._bearer:
            self._authorization = f"Bearer {self._bearer}"
            return True
        if scheme == "bearer":
            self._authorization = f"Bearer {self._asked_for(dict(_CHALLENGE.findall(challenge)))}"
            return True
        return False

    def _asked_for(self, challenge: Mapping[str, str]) -> str:
        realm = challenge.get("realm", "")
        is_safe = realm.startswith("https://") or _LOCAL.match(urlsplit(realm).netloc)
        if not is_safe:
            raise NotAuthorisedError(f"{self._host}: wants credentials sent to {realm}, which is not encrypted")
        wanted = {key: challenge[key] for key in ("service", "scope") if key in challenge}
        headers = {"authorization": f"Basic {self._basic}"} if self._basic else {}
        answer = self._client.get(realm, params=wanted, headers=headers)
        answer.raise_for_status()
        found = answer.json()
        token = found.get("token") or found.get("access_token")
        if not token:
            raise NotAuthorisedError(f"{self._host}: its token service {realm} gave no token", code="unauthorised")
        return str(token)


def http_library() -> Any:  # noqa: ANN401 - a module: httpx2, or httpx beside an older huggingface_hub
    """Give the HTTP library that huggingface_hub brings along."""
    for name in ("httpx2", "httpx"):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise PushError("no HTTP library is installed", hint="pip install huggingface-hub", code="missing-package")


def _basic(token: str | None) -> str | None:
    return base64.b64encode(token.encode()).decode() if token and ":" in token else None


def _from_docker(host: str) -> str | None:
    """What ``docker login`` keeps for a host; its credential helpers are programs, which are not run."""
    folder = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    try:
        found = json.loads((folder / "config.json").read_text())["auths"][host]["auth"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(found) or None
