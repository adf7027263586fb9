"""Our own merges are replayed byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_deploy.errors import MalformedCheckpointError
from lora_deploy.evidence.outcome import Outcome
from lora_deploy.evidence.replay import ReplayReport, replay
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.merge.execute import execute
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan, plan_merge
from lora_deploy.validate import bind
from tests.builders import linear_adapter, make_checkpoint

CONFIG = {"model_type": "llama", "dtype": "bfloat16", "hidden_size": 24}
UP, DOWN, NORM = "model.layers.0.up.weight", "model.layers.0.down.weight", "model.norm.weight"


@pytest.fixture
def plan(tmp_path: Path) -> MergePlan:
    base = make_checkpoint(
        tmp_path / "base",
        {
            UP: torch.randn(40, 24).to(torch.bfloat16),
            DOWN: torch.randn(24, 40).to(torch.bfloat16),
            NORM: torch.randn(24).to(torch.bfloat16),
            "model.counter": torch.arange(7),
        },
        CONFIG,
        n_shards=2,
    )
    return plan_merge(
        bind([linear_adapter({UP: (40, 24), DOWN: (24, 40)})], base),
        MergeOptions(dtype="float16", max_shard_bytes=3000, n_workers=2),
    )


@pytest.fixture
def merged(plan: MergePlan, tmp_path: Path) -> Path:
    return execute(plan, tmp_path / "merged").root


def outcome_of(report: ReplayReport, name: str) -> Outcome:
    return next(entry.outcome for entry in report.outcomes if entry.name == name)


def file_with(folder: Path, name: str) -> Path:
    return next(path for path in folder.glob("*.safetensors") if name in load_file(path))


def test_a_merge_of_ours_is_exact_throughout(plan: MergePlan, merged: Path) -> None:
    report = replay(plan, merged, is_ours=True)
    assert report.verdict is Verdict.PASS
    assert report.counts == {Outcome.EXACT: 4}
    assert report.n_bytes == sum(tensor.spec.n_bytes for tensor in plan.tensors)
    assert json.loads(json.dumps(report.to_json()))["verdict"] == "pass"


@pytest.mark.parametrize("name", [UP, NORM, "model.counter"])
def test_one_flipped_bit_anywhere_fails_and_names_the_element(plan: MergePlan, merged: Path, name: str) -> None:
    path = file_with(merged, name)
    tensors = load_file(path)
    tensors[name].view(-1).view(torch.uint8)[6] ^= 1
    save_file(tensors, path, {"format": "pt"})
    report = replay(plan, merged, is_ours=True)
    assert report.verdict is Verdict.FAIL
    bad = next(entry for entry in report.outcomes if entry.name == name)
    assert not bad.outcome.is_sound or bad.outcome is Outcome.ROUNDED
    assert bad.n_different == 1
    assert report.counts[Outcome.EXACT] == 3


def test_a_truncated_file_is_an_error_of_the_folder(plan: MergePlan, merged: Path) -> None:
    path = file_with(merged, UP)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(MalformedCheckpointError, match="truncated"):
        replay(plan, merged, is_ours=True)


def test_the_same_tensors_in_another_file_layout_are_not_our_merge(plan: MergePlan, merged: Path) -> None:
    path = file_with(merged, UP)
    save_file(load_file(path), path, {"format": "np"})
    report = replay(plan, merged, is_ours=True)
    assert report.verdict is Verdict.FAIL
    assert outcome_of(report, path.name) is Outcome.WRONG_LAYOUT


def test_an_edited_configuration_is_not_our_merge(plan: MergePlan, merged: Path) -> None:
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(config | {"hidden_size": 25}))
    report = replay(plan, merged, is_ours=True)
    assert report.verdict is Verdict.FAIL
    assert outcome_of(report, "config.json:hidden_size") is Outcome.WRONG_CONFIG


class Recorder:
    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.done = 0
        self.is_finished = False

    def start(self, label: str, n_bytes: int, unit: str = "") -> None:
        self.started.append((label, n_bytes))

    def advance(self, n_bytes: int) -> None:
        self.done += n_bytes

    def finish(self) -> None:
        self.is_finished = True


def test_progress_counts_every_byte_that_is_compared(plan: MergePlan, merged: Path) -> None:
    progress = Recorder()
    report = replay(plan, merged, is_ours=True, progress=progress)
    assert progress.started == [("replaying", report.n_bytes)]
    assert progress.done == report.n_bytes
    assert progress.is_finished
