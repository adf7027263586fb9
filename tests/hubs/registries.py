"""The real registry of container images on loopback, open, with passwords, or with a token service of its own."""

from __future__ import annotations

import base64
import datetime as dt
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

CONFIG = """
version: 0.1
storage: {{filesystem: {{rootdirectory: {folder}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
{auth}
"""


@dataclass(frozen=True)
class Running:
    host: str
    folder: Path

    @property
    def target(self) -> str:
        return f"oci://{self.host}/team/model:v1"

    def blob(self, sha256: str) -> Path:
        return self.folder / "docker/registry/v2/blobs/sha256" / sha256[:2] / sha256 / "data"

    def remains(self) -> list[Path]:
        """Uploads that were begun and neither finished nor given up."""
        return list(self.folder.glob("docker/registry/v2/repositories/team/model/_uploads/*/data"))


@contextmanager
def running_registry(folder: Path, auth: str = "") -> Iterator[Running]:
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("needs a registry: docker-registry is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir()
    (folder / "config.yml").write_text(CONFIG.format(folder=folder, port=port, auth=auth))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield Running(f"127.0.0.1:{port}", folder)
    finally:
        process.terminate()
        process.wait(10)


def with_passwords(folder: Path) -> str:
    """Settings of a registry that knows ``me`` with the password ``secret``."""
    program = shutil.which("htpasswd")
    if program is None:
        pytest.skip("needs htpasswd: apache2-utils is not installed")
    made = subprocess.run([program, "-Bbn", "me", "secret"], capture_output=True, text=True, check=True)
    (folder / "htpasswd").write_text(made.stdout)
    return f"auth: {{htpasswd: {{realm: test, path: {folder / 'htpasswd'}}}}}"


@dataclass
class TokenService:
    """Gives signed tokens for one scope each to who brings ``me:secret``; the registry trusts its certificate."""

    key: rsa.RSAPrivateKey
    certificate: x509.Certificate
    url: str = ""
    scopes: list[str] = field(default_factory=list)
    """What was asked for."""
    seconds: int = 60
    """How long a token is good for."""

    def settings(self, folder: Path) -> str:
        """Write the certificate, and give the settings of a registry that wants this service's tokens."""
        path = folder / "root.pem"
        path.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        named = f"realm: {self.url}/token, service: registry, issuer: tests, rootcertbundle: {path}"
        return f"auth: {{token: {{{named}}}}}"

    def answer(self, authorization: str, query: dict[str, list[str]]) -> tuple[int, dict[str, Any]]:
        if authorization != "Basic " + base64.b64encode(b"me:secret").decode():
            return 401, {"details": "incorrect username or password"}
        self.scopes += query.get("scope", [])
        return 200, {"token": self.token(query.get("scope", []))}

    def token(self, scopes: list[str]) -> str:
        now = int(time.time())
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        encoded = base64.b64encode(self.certificate.public_bytes(serialization.Encoding.DER)).decode()
        claims = {"iss": "tests", "sub": "me", "aud": "registry", "nbf": now - 10, "iat": now, "jti": str(now)}
        claims |= {"exp": now + self.seconds, "access": access}
        signed = ".".join(_part(part) for part in ({"typ": "JWT", "alg": "RS256", "x5c": [encoded]}, claims))
        signature = self.key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def _part(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@contextmanager
def token_service() -> Iterator[TokenService]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    service = TokenService(key, certificate)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            status, found = service.answer(self.headers.get("authorization", ""), query)
            body = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with serving(Handler, "127.0.0.1") as url:
        service.url = url
        yield service


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], host: str) -> Iterator[str]:
    """Run a small server until the block ends; give its address."""
    server = ThreadingHTTPServer((host, 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
