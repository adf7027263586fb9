"""Progress as lines and as a bar."""

import io
import re
import threading

import pytest
from rich.console import Console

from lora_deploy.cli import progress as module
from lora_deploy.cli.progress import LogProgress, TerminalProgress, progress_on_stderr
from lora_deploy.merge.progress import reporting

LINE = re.compile(r"^\d\d:\d\d:\d\d merging: ")


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, _: str) -> str:
        return "12:00:00"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_log_gets_a_line_every_few_seconds_with_bytes_rate_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = LogProgress(interval_s=5)
    progress.start("merging", 1_000_000_000)
    for _ in range(4):
        clock.now += 2
        progress.advance(100_000_000)
    progress.finish()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "12:00:00 merging: 1.00 GB",
        "12:00:00 merging: 300 MB of 1.00 GB, 50.0 MB/s, 14 s left",
        "12:00:00 merging: 400 MB in 8.0 s",
    ]


def test_what_is_not_counted_in_bytes_says_what_in(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = LogProgress(interval_s=5)
    progress.start("measuring", 24, "pairs")
    for _ in range(3):
        clock.now += 3
        progress.advance(1)
    progress.finish()
    assert capsys.readouterr().err.splitlines() == [
        "12:00:00 measuring: at most 24 pairs",
        "12:00:00 measuring: 2 of at most 24 pairs",
        "12:00:00 measuring: 3 pairs in 9.0 s",
    ]


def test_lines_carry_the_time_of_day(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(LogProgress(), "merging", 10) as advance:
        advance(10)
    assert all(LINE.match(line) for line in capsys.readouterr().err.splitlines())


def test_bytes_from_many_threads_all_count(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = LogProgress()
    progress.start("merging", 80_000)
    threads = [threading.Thread(target=lambda: [progress.advance(1) for _ in range(10_000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    progress.finish()
    assert capsys.readouterr().err.splitlines()[-1] == "12:00:00 merging: 80.0 kB in 0.0 s"


def test_a_failure_ends_the_progress_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), reporting(LogProgress(), "merging", 10) as advance:
        advance(1 // 0)
    assert "merging: 0 bytes in" in capsys.readouterr().err


def test_work_without_bytes_divides_by_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LogProgress(interval_s=0)
    progress.start("merging", 0)
    progress.advance(0)
    progress.finish()
    assert capsys.readouterr().err.count("\n") == 3


def test_where_stderr_is_no_terminal_progress_is_lines() -> None:
    assert isinstance(progress_on_stderr(), LogProgress)


def test_a_terminal_gets_a_bar_with_bytes_rate_and_time_left_in_eighty_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        module, "_console", lambda: Console(file=screen, force_terminal=True, width=80, color_system=None)
    )
    progress = TerminalProgress()
    progress.start("merging", 2_000_000_000)
    progress.advance(500_000_000)
    progress.advance(500_000_000)
    progress.finish()
    drawn = screen.getvalue()
    assert "merging" in drawn
    assert "1.0/2.0 GB" in drawn
    assert "/s" in drawn
    progress.finish()  # a second end changes nothing
