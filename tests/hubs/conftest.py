"""A release made by hand, and a hub on loopback that the real client is pointed at."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_deploy.hubs.options import PushOptions
from tests.hubs.huggingface_server import Hub, serving
from tests.hubs.registries import Running, running_registry
from tests.hubs.releases import make_release


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return make_release(tmp_path / "release")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub
    from huggingface_hub import constants

    from lora_deploy.hubs import repository

    # Read when hf_xet is first imported: what fails in a test is not tried for minutes.
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "100ms")
    monkeypatch.setenv("HF_XET_TELEMETRY_ENABLED", "false")
    with serving(tmp_path / "hub") as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"  # made when the client is imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
        monkeypatch.setattr(repository, "pause", lambda _: None)
        huggingface_hub.close_session()
        yield running
        huggingface_hub.close_session()


@pytest.fixture
def options() -> PushOptions:
    return PushOptions(token="hf_writer")


@pytest.fixture
def xet_hub(hub: Hub, tmp_path: Path) -> Hub:
    """The same hub, with xet."""
    hub.xet = tmp_path / "xet"
    hub.xet.mkdir()
    return hub


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client and we would have waited."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    from lora_deploy.hubs import repository

    waited: list[float] = []
    clock = SimpleNamespace(sleep=waited.append, time=time.time)
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    monkeypatch.setattr(repository, "pause", waited.append)
    return waited


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Running]:
    with running_registry(tmp_path / "registry") as found:
        yield found
