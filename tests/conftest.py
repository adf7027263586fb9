"""The world that every test runs in: loopback only, seeded, one thread, caches of its own, no torch unless it is used.

Markers and warning filters are in pyproject.toml. A test that imports torch or numpy for the first time in its own body
seeds them itself; those that import them at module level find them seeded.
"""

import atexit
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from ipaddress import ip_address
from itertools import count
from pathlib import Path

import pytest

SEED = 20240611
_WORLD = Path(tempfile.mkdtemp(prefix="lora-deploy-tests-"))
_CACHE_NUMBERS = count()

# Read when torch, huggingface_hub and tokenizers are first imported: set before any test module is collected.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HOME"] = str(_WORLD / "huggingface")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LORA_DEPLOY_CACHE"] = str(_WORLD / "cache")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("HF_TOKEN", None)
atexit.register(shutil.rmtree, _WORLD, ignore_errors=True)


class NetworkBlockedError(RuntimeError):
    """A test tried to leave this machine.

    Not an OSError: code that retries or forgives those must not hide it.
    """


def _stays_here(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if not name or name in {"localhost", socket.gethostname()}:
        return True
    try:
        address = ip_address(str(name).partition("%")[0])
    except ValueError:
        return False
    inner = getattr(address, "ipv4_mapped", None) or address
    return inner.is_loopback or inner.is_unspecified


def _allow_loopback_only(event: str, args: tuple[object, ...]) -> None:
    """Refuse name look-ups and connections to other machines, however they are made (this is an audit hook)."""
    if event in {"socket.connect", "socket.sendto", "socket.sendmsg"}:
        sock, address = args
        if not isinstance(sock, socket.SocketType) or sock.family not in {socket.AF_INET, socket.AF_INET6}:
            return
        host = address[0] if isinstance(address, tuple) else None
    elif event in {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}:
        host = args[0]
    else:
        return
    if not _stays_here(host):
        raise NetworkBlockedError(f"{event} to {host!r}: tests reach nothing but loopback")


sys.addaudithook(_allow_loopback_only)


@cache
def _missing_cuda() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"needs a CUDA device: torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "needs a CUDA device: torch finds none"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and (reason := _missing_cuda()) is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    random.seed(SEED)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(SEED)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(SEED)
        if torch.get_num_threads() != 1:  # the test before may have changed it
            torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    """Give each test a cache of its own; fixtures of wider scope share one of the session."""
    shared = os.environ["LORA_DEPLOY_CACHE"]
    own = _WORLD / f"cache-{next(_CACHE_NUMBERS)}"
    os.environ["LORA_DEPLOY_CACHE"] = str(own)
    yield
    os.environ["LORA_DEPLOY_CACHE"] = shared
    shutil.rmtree(own, ignore_errors=True)


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Give the folder of real adapters, or skip."""
    root = os.environ.get("LORA_DEPLOY_CORPUS")
    if not root:
        pytest.skip("needs real adapters: LORA_DEPLOY_CORPUS is not set")
    path = Path(root)
    if not (path / "adapters").is_dir():
        pytest.skip(f"needs real adapters: LORA_DEPLOY_CORPUS names {path}, which has no folder 'adapters'")
    return path
