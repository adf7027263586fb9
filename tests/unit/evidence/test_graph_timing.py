"""Which clock times a graph."""

from __future__ import annotations

import pytest
import torch

from lora_deploy.evidence.graph_timing import watch_for


class Event:
    """An event of a device whose clock stands at what the test says."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at: float | None = None
        self.is_reached = False

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        self.is_reached = True

    def elapsed_time(self, end: Event) -> float:
        assert end.is_reached
        assert self.at is not None
        assert end.at is not None
        return end.at - self.at


@pytest.mark.parametrize(("provider", "seconds"), [("cuda", 0.0125), ("tensorrt", 0.0125), ("cpu", None)])
def test_a_cuda_device_is_timed_by_its_own_events(
    provider: str, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    stop = watch_for(provider)()
    Event.now += 12.5  # milliseconds
    found = stop()
    assert found == seconds if seconds is not None else found not in {0.0, 0.0125}


def test_without_torch_on_the_device_it_is_the_systems_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert watch_for("cuda")()() > 0
