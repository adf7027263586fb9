"""Who may push to a container registry, and who is shown what is shown for it."""

from __future__ import annotations

import base64
import json
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest

from lora_deploy.errors import NotAuthorisedError, PushError
from lora_deploy.hubs.options import PushOptions
from lora_deploy.hubs.registry_client import http_library
from lora_deploy.push import pull, push
from lora_deploy.release.manifest import check
from tests.hubs.registries import Running, TokenService, running_registry, serving, token_service, with_passwords
from tests.hubs.releases import FILES, make_release

OPTIONS = PushOptions()
WRONG = "me:wrong-secret"


@pytest.fixture
def locked_registry(tmp_path: Path) -> Iterator[Running]:
    with running_registry(tmp_path / "registry", with_passwords(tmp_path)) as found:
        yield found


@pytest.fixture
def service() -> Iterator[TokenService]:
    with token_service() as found:
        yield found


@pytest.fixture
def token_registry(tmp_path: Path, service: TokenService) -> Iterator[Running]:
    with running_registry(tmp_path / "registry", service.settings(tmp_path)) as found:
        yield found


@pytest.fixture
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ``docker login`` would keep what it was told; nothing yet."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path / "config.json"


def log_in(docker_config: Path, host: str, who: bytes = b"me:secret") -> None:
    docker_config.write_text(json.dumps({"auths": {host: {"auth": base64.b64encode(who).decode()}}}))


def text_of(error: PushError) -> str:
    return "".join(traceback.format_exception(error))


def test_passwords(locked_registry: Running, release: Path, tmp_path: Path, docker_config: Path) -> None:
    with pytest.raises(NotAuthorisedError) as caught:
        push(release, locked_registry.target, OPTIONS)
    assert caught.value.message.endswith("no credentials were given (401): UNAUTHORIZED: authentication required")
    assert f"docker login {locked_registry.host}" in str(caught.value.hint)
    with pytest.raises(NotAuthorisedError) as caught:
        push(release, locked_registry.target, PushOptions(token=WRONG))
    assert caught.value.code == "unauthorised"
    assert WRONG.partition(":")[2] not in text_of(caught.value)
    assert base64.b64encode(WRONG.encode()).decode() not in text_of(caught.value)
    push(release, locked_registry.target, PushOptions(token="me:secret"))
    log_in(docker_config, locked_registry.host)
    assert pull(locked_registry.target, tmp_path / "back", OPTIONS) == check(release)


def test_tokens_of_a_service(
    token_registry: Running, service: TokenService, release: Path, tmp_path: Path, docker_config: Path
) -> None:
    log_in(docker_config, token_registry.host)
    assert push(release, token_registry.target, OPTIONS).n_sent_bytes > 0
    assert pull(token_registry.target, tmp_path / "back", OPTIONS) == check(release)
    assert "repository:team/model:pull" in service.scopes
    assert any("push" in scope for scope in service.scopes)
    by_option = PushOptions(token="me:secret")
    assert push(release, token_registry.target, by_option).n_sent_bytes == 0
    with pytest.raises(NotAuthorisedError) as caught:
        push(release, token_registry.target, PushOptions(token=WRONG))
    assert caught.value.code == "unauthorised"
    assert WRONG.partition(":")[2] not in text_of(caught.value)


def test_a_bearer_token_from_elsewhere(token_registry: Running, service: TokenService, release: Path) -> None:
    token = service.token(["repository:team/model:pull,push"])
    push(release, token_registry.target, PushOptions(token=token))
    assert service.scopes == []
    reader = service.token(["repository:team/model:pull"])
    other = make_release(release.parent / "other", {"config.json": b"{}"})
    with pytest.raises(NotAuthorisedError) as caught:
        push(other, token_registry.target.replace("v1", "v2"), PushOptions(token=reader))
    assert reader not in text_of(caught.value)


def test_tokens_that_run_out_are_asked_for_again(
    token_registry: Running, service: TokenService, release: Path, docker_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_deploy.hubs.oci import Registry

    log_in(docker_config, token_registry.host)
    service.seconds = -3600  # out before it is used, until the first file is sent
    monkeypatch.setattr(Registry, "_require_free", lambda *_: None)
    with pytest.raises(NotAuthorisedError):
        push(release, token_registry.target, OPTIONS)
    service.seconds = 60
    send = Registry._send_file

    def later(self: Registry, *args: Any) -> None:
        self._client._authorization = "Bearer " + TokenService.token(service, ["repository:other/x:pull"])
        send(self, *args)

    monkeypatch.setattr(Registry, "_send_file", later)
    push(release, token_registry.target, OPTIONS)


def test_a_service_that_would_get_credentials_in_the_clear_gets_none(
    registry: Running, release: Path, docker_config: Path
) -> None:
    from lora_deploy.hubs.registry_client import RegistryClient

    client = RegistryClient(registry.host, "team/model", "me:secret")
    with pytest.raises(NotAuthorisedError, match="not encrypted"):
        client._asked_for({"realm": "http://203.0.113.1/token", "service": "x"})
    client.close()


class Storage(BaseHTTPRequestHandler):
    """Blobs in a storage of their own, as registries in clouds have them."""

    folder: ClassVar[Path]
    seen: ClassVar[list[str | None]]

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("authorization"))
        content = (self.folder / self.path.strip("/")).read_bytes()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_registry_that_sends_readers_to_its_storage_gives_that_no_credentials(
    locked_registry: Running, release: Path, tmp_path: Path
) -> None:
    """A proxy in front of the real registry answers every asking for a blob with an address on another origin."""
    (tmp_path / "storage").mkdir()
    Storage.folder, Storage.seen = tmp_path / "storage", []
    with http_library().Client() as client, serving(Storage, "127.0.0.2") as storage:

        class Proxy(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {k: v for k, v in self.headers.items() if k.lower() not in {"host", "connection"}}
                url = f"http://{locked_registry.host}{self.path}"
                found = client.request(self.command, url, content=body, headers=headers)
                is_blob = "/blobs/sha256" in self.path and self.command in {"GET", "HEAD"}
                if is_blob and found.status_code == 200:
                    digest = self.path.rpartition(":")[2]
                    (Storage.folder / digest).write_bytes(client.get(url, headers=headers).content)
                    self.send_response(307)
                    self.send_header("location", f"{storage}/{digest}")
                    self.send_header("content-length", "0")
                    self.end_headers()
                    return
                self.send_response(found.status_code)
                for name in ("www-authenticate", "location", "docker-content-digest", "content-type"):
                    if name in found.headers:
                        value = found.headers[name].replace(
                            locked_registry.host, f"127.0.0.1:{self.server.server_port}"
                        )
                        self.send_header(name, value)
                self.send_header("content-length", str(len(found.content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(found.content)

            do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - names of http.server

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        with serving(Proxy, "127.0.0.1") as proxy:
            target = f"oci://{urlsplit(proxy).netloc}/team/model:v1"
            options = PushOptions(token="me:secret")
            push(release, target, options)
            assert push(release, target, options).n_sent_bytes == 0
            assert pull(target, tmp_path / "back", options) == check(release)
    assert len(Storage.seen) > len(FILES)
    assert set(Storage.seen) == {None}


def test_a_registry_that_repeats_the_password_is_not_repeated(release: Path) -> None:
    class Echo(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"errors": [{"code": "DENIED", "message": f"{WRONG} has the wrong-secret"}]}).encode()
            self.send_response(403)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with serving(Echo, "127.0.0.1") as url, pytest.raises(NotAuthorisedError) as caught:
        push(release, f"oci://{urlsplit(url).netloc}/team/model:v1", PushOptions(token=WRONG))
    assert caught.value.message.endswith("DENIED: … has the …")
    assert caught.value.code == "forbidden"
