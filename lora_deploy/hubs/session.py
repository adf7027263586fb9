"""The settings that huggingface_hub keeps for the whole process, as a push needs them, and put back afterwards.

Promise: no call of the client waits for ever, which it does by default; it draws no bars beside ours; xet is off where
the hub has none, because the client neither asks nor falls back. What hf_xet itself sends has time limits of its own
(``HF_XET_CLIENT_CONNECT_TIMEOUT``, ``HF_XET_CLIENT_READ_TIMEOUT``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CONNECT_SECONDS, READ_SECONDS = 10.0, 120.0


@contextmanager
def settled_client() -> Iterator[None]:
    """Let the client have limits of time and no bars until the block ends."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    def timed() -> Any:  # noqa: ANN401 - a client of the HTTP library that this version uses
        client = _http.default_client_factory()
        hooks = client.event_hooks
        hooks["request"].append(_limit)  # a default of the client is not enough: some calls ask for no limit
        client.event_hooks = hooks
        return client

    before = _http._GLOBAL_CLIENT_FACTORY  # noqa: SLF001 - there is no way to ask for it
    had_bars, had_no_xet = not are_progress_bars_disabled(), constants.HF_HUB_DISABLE_XET
    _http.set_client_factory(timed)
    if had_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        _http.set_client_factory(before)
        constants.HF_HUB_DISABLE_XET = had_no_xet
        if had_bars:
            enable_progress_bars()


def _limit(request: Any) -> None:  # noqa: ANN401 - a request of the HTTP library
    asked = request.extensions.get("timeout", {})
    limits = {
        kind: asked.get(kind) or (CONNECT_SECONDS if kind == "connect" else READ_SECONDS)
        for kind in ("connect", "read", "write", "pool")
    }
    request.extensions = {**request.extensions, "timeout": limits}


def uses_xet() -> bool:
    """Whether the client would send large files that way."""
    from huggingface_hub.utils._runtime import is_xet_available

    return bool(is_xet_available())


def disable_xet() -> None:
    """Let large files go over LFS until the block of ``settled_client`` ends."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_XET = True
