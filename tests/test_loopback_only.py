"""The block in conftest.py works: what leaves this machine fails at once, loopback and Unix sockets do not."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

TEST_NET = "192.0.2.1"  # RFC 5737: belongs to nobody
TEST_NET_6 = "2001:db8::1"  # RFC 3849


@pytest.fixture(autouse=True)
def _at_once() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, TEST_NET), (socket.AF_INET6, TEST_NET_6)])
@pytest.mark.parametrize("connect", [socket.socket.connect, socket.socket.connect_ex])
def test_a_connection_to_another_machine_is_refused(family: int, host: str, connect: Callable[..., object]) -> None:
    with (
        socket.socket(family, socket.SOCK_STREAM) as sock,
        pytest.raises(RuntimeError, match=rf"socket.connect to '{host}': tests reach nothing but loopback"),
    ):
        connect(sock, (host, 443))


def test_a_datagram_to_another_machine_is_refused() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        pytest.raises(RuntimeError, match="nothing but loopback"),
    ):
        sock.sendto(b"?", (TEST_NET, 53))


def test_a_name_is_not_looked_up() -> None:
    with pytest.raises(RuntimeError, match=r"socket\.getaddrinfo to 'hub\.invalid'"):
        socket.create_connection(("hub.invalid", 443), timeout=5)


def test_a_library_that_forgives_socket_errors_cannot_hide_the_attempt() -> None:
    connection = HTTPConnection(TEST_NET, timeout=5)
    with pytest.raises(RuntimeError, match="nothing but loopback"):
        connection.request("GET", "/")


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_server_on_loopback_answers(name: str) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        connection = HTTPConnection(name, server.server_port, timeout=5)
        connection.request("GET", "/")
        assert connection.getresponse().status == 204
        connection.close()
        server.shutdown()
        thread.join()


def test_a_unix_socket_is_no_network(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(path)
        server.listen()
        client.connect(path)
