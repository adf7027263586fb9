"""Real graphs timed for a few seconds: what is measured is there; whether it is equal is for quiet machines."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from lora_deploy.cli import main
from lora_deploy.errors import InputError
from lora_deploy.evidence.bench import bench
from lora_deploy.evidence.latency import LatencyOptions
from lora_deploy.evidence.verdict import Verdict
from tests.parity.conftest import Exported

QUICK = LatencyOptions(seconds=2.0)


def test_two_folders_are_timed_in_fresh_pairs(exported: Exported) -> None:
    report = bench(exported.merged.root, against=exported.base.root, options=QUICK)
    (found,) = report.measurements
    assert len(found.pairs) >= 1
    assert set(found.sample("merged")) == {"prefill", "decode"}
    assert all(seconds > 0 for pair in found.pairs for times in pair.medians.values() for seconds in times.values())
    assert set(report.costs) == {"base", "merged"}
    assert all(cost.peak_bytes > cost.added_bytes >= 0 for cost in report.costs.values())
    assert report.verdict in set(Verdict)


def test_the_command_prints_times_or_one_document(exported: Exported) -> None:
    arguments = ["bench", str(exported.merged.root), "--seconds", "1", "--latency-bound", "5%"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.stderr
    assert "prefill" in shown.stdout
    assert "peak memory" in shown.stdout
    document = CliRunner().invoke(main, [*arguments, "--json"])
    assert json.loads(document.stdout)["bound"] == pytest.approx(0.05)


def test_a_folder_without_graphs_is_refused(exported: Exported) -> None:
    with pytest.raises(InputError, match="holds no exported graphs"):
        bench(exported.case.merged.root)
