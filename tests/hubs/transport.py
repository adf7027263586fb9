"""HTTP as a hub on loopback speaks it: calls, answers, refusals, cut connections."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "", body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.body = body or {"error": message}


class CutError(Exception):
    """The connection ends without an answer."""


@dataclass
class Call:
    method: str
    parts: list[str]
    query: dict[str, list[str]]
    headers: dict[str, str]
    receive: Callable[[], Awaitable[dict[str, Any]]]
    abort_after: int | None = None
    fail_after: int | None = None

    async def body(self) -> bytes:
        found = bytearray()
        async for piece in self.pieces():
            found += piece
        return bytes(found)

    async def pieces(self) -> Any:
        n_bytes = 0
        while True:
            message = await self.receive()
            if message["type"] != "http.request":
                raise CutError
            piece = message.get("body", b"")
            n_bytes += len(piece)
            if self.abort_after is not None and n_bytes >= self.abort_after:
                raise CutError
            if self.fail_after is not None and n_bytes >= self.fail_after:
                raise RefusedError(500, "planted")
            yield piece
            if not message.get("more_body"):
                return

    async def json(self) -> Any:
        return json.loads(await self.body())


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    start: int = 0
    stop: int = 0

    @classmethod
    def of(cls, value: Any, status: int = 200) -> Answer:
        return cls(json.dumps(value).encode(), status, {"content-type": "application/json"})


async def receive_file(call: Call, path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    n_bytes = 0
    with path.open("wb") as stream:
        async for piece in call.pieces():
            stream.write(piece)
            digest.update(piece)
            n_bytes += len(piece)
    if n_bytes != int(call.headers["content-length"]):
        raise RefusedError(400, "IncompleteBody")
    return digest.hexdigest()


def ranged(path: Path, wanted: str | None) -> Answer:
    if not path.is_file():
        raise RefusedError(404, "NoSuchKey")
    size = path.stat().st_size
    if wanted is None:
        return Answer(file=path, stop=size)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, stop = int(first), int(last) + 1 if last else size
    return Answer(
        status=206, headers={"content-range": f"bytes {start}-{stop - 1}/{size}"}, file=path, start=start, stop=stop
    )


async def send_answer(answer: Answer, call: Call, send: Any) -> None:
    n_bytes = answer.stop - answer.start if answer.file else len(answer.body)
    headers = answer.headers | {"content-length": str(n_bytes)}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": raw})
    if call.method == "HEAD" or answer.file is None:
        await send({"type": "http.response.body", "body": b"" if call.method == "HEAD" else answer.body})
        return
    with answer.file.open("rb") as stream:
        stream.seek(answer.start)
        while n_bytes:
            piece = stream.read(min(n_bytes, 1 << 20))
            n_bytes -= len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": bool(n_bytes)})
