"""A fused graph that does not run, or says something else, is not used, and the export says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from torch import nn

from lora_deploy.errors import ExportError
from lora_deploy.export import transformers as maker
from lora_deploy.export import trial
from lora_deploy.export.drawn import initializers, values_of
from lora_deploy.export.folding import Rule, nothing_of_weights
from lora_deploy.export.interface import GraphTask
from lora_deploy.export.stages import Stage
from lora_deploy.export.trial import expected_outputs, fault_of, read_positions
from lora_deploy.tensors import DType
from tests.unit.export.hand_made import expected, plain, weights

TENSORS = weights()


class Model(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": expected(TENSORS, x)}


@pytest.fixture
def stage() -> Stage:
    inputs, others = {"x": torch.randn(2, 8)}, {"x": torch.randn(5, 8)}
    return Stage(component="model", module=Model(), inputs=inputs, others=others)


def _task(provider: str = "cpu", *, is_stored: bool = False) -> GraphTask:
    folders = (Path("first"), Path("second"))
    return GraphTask(checkpoints=folders, dtype=DType.F32, provider=provider, is_stored=is_stored)


def _drawn() -> Any:
    return onnx_ir.serde.deserialize_model(plain(TENSORS))


def _fused(stage: Stage, monkeypatch: pytest.MonkeyPatch, fuse: Any, task: GraphTask) -> tuple[Any, bool, list[str]]:
    monkeypatch.setattr(maker, "fuse", fuse)
    said = expected_outputs(stage.module, stage.others)
    model, fusion, findings = maker._fused(task, stage, _drawn(), said, nothing_of_weights)
    return model, fusion is not None, [finding.message for finding in findings]


def _operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph]


def _drop_one(model: Any, _: str, __: Rule, *, rotates: bool = True) -> None:
    """A sound fusion: the multiplication by one goes."""
    node = next(node for node in model.graph if node.outputs[0].name == "m")
    node.outputs[0].replace_all_uses_with(node.inputs[0])
    model.graph.remove(node)


def _unknown_operator(model: Any, _: str, __: Rule, *, rotates: bool = True) -> None:
    next(node for node in model.graph if node.op_type == "Mul").op_type = "FusedMul"


def _wrong(model: Any, _: str, __: Rule, *, rotates: bool = True) -> None:
    next(node for node in model.graph if node.op_type == "Mul").op_type = "Add"


def _raise(_model: Any, _provider: str, _rule: Rule, *, rotates: bool) -> None:
    raise TypeError("no such pattern")


def test_a_sound_fusion_is_used(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    model, is_fused, said = _fused(stage, monkeypatch, _drop_one, _task())
    assert (is_fused, said) == (True, [])
    assert _operators(model) == ["MatMul", "Mul", "MatMul"]


@pytest.mark.parametrize(
    ("fuse", "reason"),
    [
        (_unknown_operator, "onnxruntime: "),
        (_wrong, "output y differs from the model's by"),
        (_raise, "TypeError: no such pattern"),
    ],
)
def test_a_fusion_that_fails_leaves_the_graph_unfused(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, fuse: Any, reason: str
) -> None:
    model, is_fused, said = _fused(stage, monkeypatch, fuse, _task())
    assert not is_fused
    assert _operators(model) == _operators(_drawn())
    assert len(said) == 1
    assert said[0].startswith("the graph fused for cpu fails (")
    assert reason in said[0]
    assert fault_of(model, stage.others, expected_outputs(stage.module, stage.others), DType.F32) is None


def test_attention_that_rotates_wrongly_is_fused_without_rotating(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fuse(model: Any, _: str, rule: Rule, *, rotates: bool) -> None:
        asked.append(rotates)
        if not rotates:
            _drop_one(model, "cpu", rule)
            return
        node = next(node for node in model.graph if node.op_type == "Mul")
        node.op_type = "GroupQueryAttention"
        node.attributes["do_rotary"] = onnx_ir.AttrInt64("do_rotary", 1)

    model, is_fused, said = _fused(stage, monkeypatch, fuse, _task())
    assert (asked, is_fused, said) == ([True, False], True, [])
    assert _operators(model) == ["MatMul", "Mul", "MatMul"]


@pytest.mark.parametrize("is_stored", [False, True])
def test_an_unfused_graph_that_is_not_the_model_is_no_export(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, is_stored: bool
) -> None:
    monkeypatch.setattr(maker, "fuse", _raise)
    drawn = _drawn()
    _wrong(drawn, "cpu", nothing_of_weights)
    said = expected_outputs(stage.module, stage.others)
    with pytest.raises(ExportError, match="model: the graph is not the model: output y differs"):
        maker._fused(_task(is_stored=is_stored), stage, drawn, said, nothing_of_weights)


def test_weights_are_lent_to_the_runtime_and_stay_in_the_model(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_MIN_LENT_BYTES", 100)
    drawn = _drawn()
    assert fault_of(drawn, stage.others, expected_outputs(stage.module, stage.others), DType.F32) is None
    values = {name: values_of(value) for name, value in initializers(drawn).items()}
    assert torch.equal(values["val_1"], TENSORS["a.weight"].T)
    assert torch.equal(values["norm.weight"], TENSORS["norm.weight"])
    initializers(drawn)["val_1"].const_value = onnx_ir.Tensor(2 * values["val_1"].numpy(), name="val_1")
    fault = fault_of(drawn, stage.others, expected_outputs(stage.module, stage.others), DType.F32)
    assert str(fault).startswith("output y differs from the model's by")


def test_what_cannot_be_run_here_is_said_to_be_untried(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    _, is_fused, said = _fused(stage, monkeypatch, _wrong, _task("cuda"))
    assert is_fused
    assert said == ["the graph was not run: only --provider cpu is tried here, not cuda"]


def test_weights_in_the_checkpoints_own_layout_are_never_fused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    _, is_fused, said = _fused(stage, monkeypatch, _raise, _task(is_stored=True))
    assert (is_fused, said) == (False, [])


@pytest.mark.parametrize(
    ("outputs", "fault"),
    [
        ({"y": torch.zeros(5, 8)}, "output y differs from the model's by"),
        ({"y": torch.zeros(4, 8)}, "output y has shape (5, 8), the model's has (4, 8)"),
        ({"z": torch.zeros(5, 8)}, "output y is none of the model's"),
    ],
)
def test_a_graph_that_is_not_the_model_is_told_from_it(
    stage: Stage, outputs: dict[str, torch.Tensor], fault: str
) -> None:
    found = fault_of(_drawn(), stage.others, outputs, DType.F32)
    assert found is not None
    assert found.startswith(fault)


def test_what_is_said_at_padding_does_not_count() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    logits, cache = torch.arange(12.0).reshape(2, 3, 2), torch.arange(24.0).reshape(2, 2, 3, 2)
    assert read_positions(logits, mask).tolist() == [[2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert read_positions(cache, mask).shape == (5, 2, 2)
    assert 0.0 not in read_positions(cache, mask)
    assert torch.equal(read_positions(logits[:, :1], mask), logits[:, :1])
    assert torch.equal(read_positions(logits, None), logits)
