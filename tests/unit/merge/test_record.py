"""The merge record survives writing and reading, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.errors import InputError
from lora_deploy.merge.execute import execute
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import plan_merge
from lora_deploy.merge.record import MergeRecord, read_record
from tests.builders import low_rank, make_checkpoint
from tests.merging import binding_of, model_plan


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Path, MergeRecord]:
    done = execute(model_plan(tmp_path), tmp_path / "out")
    return done.root, done.record


def test_a_record_is_read_as_it_was_written(merged: tuple[Path, MergeRecord]) -> None:
    root, record = merged
    assert read_record(root) == record
    assert (root / "merge.json").read_text() == record.text()
    assert json.loads(record.text())["schema"] == 1
    assert {entry.treatment for entry in record.tensors.values()} == {"merged", "cast"}
    assert record.n_untouched == 1
    assert record.tensors["model.layers.0.up_proj.weight"].updates[0].scale == 0.02


def test_a_record_of_values_that_are_no_numbers_can_still_be_read(tmp_path: Path) -> None:
    tensors = {
        "cast.weight": torch.tensor([[float("inf"), 2.0, -float("inf")], [float("nan"), 1.0, 0.0]]),
        "same.weight": torch.tensor([float("nan")], dtype=torch.float16),
        "huge.weight": torch.full((2, 2), 1e200, dtype=torch.float64),
        "a.weight": torch.zeros(4, 4),
    }
    checkpoint = make_checkpoint(tmp_path / "base", tensors)
    updates = {name: low_rank(*tensors[name].shape) for name in ("a.weight", "huge.weight")}
    plan = plan_merge(binding_of(checkpoint, updates), MergeOptions(dtype="base", device="cpu"))
    record = execute(plan, tmp_path / "base-dtype").record
    assert record.tensors["huge.weight"].weight_norm is None
    assert read_record(tmp_path / "base-dtype") == record
    checkpoint = make_checkpoint(tmp_path / "small", {n: t for n, t in tensors.items() if n != "huge.weight"})
    plan = plan_merge(binding_of(checkpoint, {"a.weight": updates["a.weight"]}), MergeOptions(device="cpu"))
    execute(plan, tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert record.tensors["cast.weight"].max_abs == 2
    assert "Infinity" not in record.text()
    assert "NaN" not in record.text()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema", 2, "schema: Input should be 1"),
        ("digest", None, "digest: Input should be a valid string"),
        ("invented", 1, "invented: Extra inputs are not permitted"),
        ("artifacts", [{"path": "../x", "n_bytes": 1, "sha256": ""}], "'../x' leads out of the folder"),
        ("artifacts", [{"path": "/x", "n_bytes": 1, "sha256": ""}], "'/x' leads out of the folder"),
        ("tensors", {"w": {"treatment": "cast"}}, r"tensors\.w\.dtype: Field required"),
    ],
)
def test_a_record_that_breaks_the_schema_is_refused_where_it_does(
    merged: tuple[Path, MergeRecord], key: str, value: Any, message: str
) -> None:
    root, record = merged
    (root / "merge.json").write_text(json.dumps(json.loads(record.text()) | {key: value}))
    with pytest.raises(InputError, match=message):
        read_record(root)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"schema": 1}'])
def test_what_is_no_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "merge.json").write_text(content)
    with pytest.raises(InputError, match=r"merge\.json: "):
        read_record(tmp_path)


def test_a_folder_without_a_record_is_refused_with_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no merge\.json") as caught:
        read_record(tmp_path)
    assert "--adapter and --base" in str(caught.value.hint)
