"""Fused experts: which parameter, which way round, and where each expert lies, against the formula written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_deploy.adapter import Adapter, Experts, ModuleUpdate
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import IncompatibleAdapterError, Severity
from lora_deploy.validate import BindOptions, bind
from tests.builders import adapter_of, linear_adapter, make_checkpoint, make_scale, merged_values

E, H, INNER, R = 3, 4, 5, 2
V4 = "model.layers.0.block_sparse_moe.experts"
V5 = "model.layers.0.mlp.experts"
SCALES = {"gate_up_proj": 0.5, "down_proj": 2.0}


def experts(out: int, in_: int, nesting: int, names: tuple[str, ...] = ("down_proj", "gate_up_proj")) -> Experts:
    return Experts(
        down=torch.randn(R * E, in_),
        up=torch.randn(out, R * E),
        nesting=nesting,
        scales={name: make_scale(SCALES.get(name, 1.0)) for name in names},
        ranks=dict.fromkeys(names, R),
    )


def delta(update: Experts, parameter: str, e: int) -> Tensor:
    """Delta of one expert, from the stored layout: A expert-major, B rank-major."""
    a = update.down.reshape(E, R, -1)[e].double()
    b = update.up.reshape(-1, R, E)[:, :, e].double()
    return update.scales[parameter].value * b @ a


def expert_update(update: Experts, module: str = V5) -> ModuleUpdate:
    return ModuleUpdate(target=module, update=update, keys=(f"{module}.{'base_layer.' * update.nesting}lora_A.weight",))


def both(**config: Any) -> tuple[Adapter, Experts, Experts]:
    gate_up, down = experts(2 * INNER, H, nesting=1), experts(H, INNER, nesting=0)
    return adapter_of(expert_update(down), expert_update(gate_up), config=config), gate_up, down


def separate(folder: Path) -> Checkpoint:
    tensors = {}
    for e in range(E):
        for name, shape in (("w1", (INNER, H)), ("w2", (H, INNER)), ("w3", (INNER, H))):
            tensors[f"{V4}.{e}.{name}.weight"] = torch.randn(shape)
    return make_checkpoint(folder, tensors, {"model_type": "mixtral"})


def fused(folder: Path, *, in_out: bool = False, model_type: str = "mixtral") -> Checkpoint:
    gate_up, down = torch.randn(E, 2 * INNER, H), torch.randn(E, H, INNER)
    tensors = {f"{V5}.gate_up_proj": gate_up, f"{V5}.down_proj": down}
    return make_checkpoint(folder, {n: t.mT if in_out else t for n, t in tensors.items()}, {"model_type": model_type})


def stored(checkpoint: Checkpoint, name: str) -> Tensor:
    raw = torch.frombuffer(bytearray(checkpoint.read(name)), dtype=torch.float32)
    return raw.reshape(checkpoint.tensors[name].shape).double()


def test_fused_updates_reach_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    checkpoint = separate(tmp_path)
    adapter, gate_up, down = both()
    merged = merged_values(bind([adapter], checkpoint))
    for e in range(E):
        change = delta(gate_up, "gate_up_proj", e)
        w1, w2, w3 = (f"{V4}.{e}.{name}.weight" for name in ("w1", "w2", "w3"))
        assert torch.allclose(merged[w1], stored(checkpoint, w1) + change[:INNER])
        assert torch.allclose(merged[w3], stored(checkpoint, w3) + change[INNER:])
        assert torch.allclose(merged[w2], stored(checkpoint, w2) + delta(down, "down_proj", e))


@pytest.mark.parametrize(("in_out", "model_type"), [(False, "mixtral"), (True, "gpt_oss"), (True, "qwen3_vl_moe")])
def test_fused_updates_of_fused_experts_are_laid_out_as_shapes_say(
    tmp_path: Path, in_out: bool, model_type: str
) -> None:
    checkpoint = fused(tmp_path, in_out=in_out, model_type=model_type)
    adapter, gate_up, down = both()
    merged = merged_values(bind([adapter], checkpoint))
    for name, update in (("gate_up_proj", gate_up), ("down_proj", down)):
        change = torch.stack([delta(update, name, e) for e in range(E)])
        expected = stored(checkpoint, f"{V5}.{name}") + (change.mT if in_out else change)
        assert torch.allclose(merged[f"{V5}.{name}"], expected)


def test_updates_of_single_experts_reach_rows_of_fused_ones(tmp_path: Path) -> None:
    checkpoint = fused(tmp_path)
    names = {f"{V4}.1.w1.weight": (INNER, H), f"{V4}.2.w3.weight": (INNER, H), f"{V4}.0.w2.weight": (H, INNER)}
    adapter = linear_adapter(names)
    merged = merged_values(bind([adapter], checkpoint))
    w1, w3, w2 = (update.update.delta() for update in adapter.updates)  # type: ignore[union-attr]
    gate_up, down = stored(checkpoint, f"{V5}.gate_up_proj"), stored(checkpoint, f"{V5}.down_proj")
    gate_up[1, :INNER] += w1
    gate_up[2, INNER:] += w3
    down[0] += w2
    assert torch.allclose(merged[f"{V5}.gate_up_proj"], gate_up)
    assert torch.allclose(merged[f"{V5}.down_proj"], down)


def test_two_adapters_of_whole_experts_and_of_their_parts_add_up(tmp_path: Path) -> None:
    checkpoint = fused(tmp_path)
    whole, gate_up, _ = both()
    part = linear_adapter({f"{V5}.1.up_proj.weight": (INNER, H)})
    binding = bind([whole, part], checkpoint, BindOptions(weights=(0.5, 1.0)))
    expected = stored(checkpoint, f"{V5}.gate_up_proj")
    expected += 0.5 * torch.stack([delta(gate_up, "gate_up_proj", e) for e in range(E)])
    expected[1, INNER:] += part.updates[0].update.delta()  # type: ignore[union-attr]
    assert torch.allclose(merged_values(binding)[f"{V5}.gate_up_proj"], expected)


def square(folder: Path, model_type: str | None) -> Checkpoint:
    tensors = {f"{V5}.down_proj": torch.zeros(E, H, H)}
    return make_checkpoint(folder, tensors, {"model_type": model_type} if model_type else {})


@pytest.mark.parametrize(
    ("model_type", "version", "is_transposed"),
    [
        ("mixtral", "0.21.2", False),
        ("mixtral", "0.19.1", False),
        ("mixtral", "0.19.0", True),
        ("mixtral", "0.18.1", True),
        ("mixtral", None, True),
        ("gpt_oss", "0.21.2", True),
        ("gpt_oss", "0.19.0", False),
        ("gpt_oss", "0.18.0", True),
        ("llama4", "0.21.2", False),
    ],
)
def test_square_experts_are_laid_out_by_version_and_model(
    tmp_path: Path, model_type: str, version: str | None, is_transposed: bool
) -> None:
    update = experts(H, H, nesting=0, names=("down_proj",))
    adapter = adapter_of(expert_update(update), config={"peft_version": version})
    merged = merged_values(bind([adapter], square(tmp_path, model_type)))[f"{V5}.down_proj"]
    change = torch.stack([delta(update, "down_proj", e) for e in range(E)])
    assert torch.allclose(merged, change.mT if is_transposed else change)


@pytest.mark.parametrize("model_type", [None, "qwen3_vl_moe"])
def test_square_experts_of_which_nothing_more_is_known_are_ambiguous(tmp_path: Path, model_type: str | None) -> None:
    update = experts(H, H, nesting=0, names=("down_proj",))
    adapter = adapter_of(expert_update(update), config={"peft_version": "0.21.2"})
    assert codes([adapter], square(tmp_path, model_type)) == ["ambiguous-layout"]


def test_a_matrix_is_a_stack_of_one(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {"m.router.weight": torch.zeros(H, H)}, {"model_type": "mixtral"})
    update = Experts(
        down=torch.randn(R, H),
        up=torch.randn(H, R),
        nesting=0,
        scales={"weight": make_scale(0.5)},
        ranks={"weight": R},
    )
    merged = merged_values(bind([adapter_of(expert_update(update, "m.router"))], checkpoint))
    assert torch.allclose(merged["m.router.weight"], 0.5 * update.up.double() @ update.down.double())


def test_parameters_of_unknown_names_are_told_apart_by_shape(tmp_path: Path) -> None:
    tensors = {"m.first": torch.zeros(E, INNER, H), "m.second": torch.zeros(E, H, H + 3)}
    checkpoint = make_checkpoint(tmp_path, tensors, {"model_type": "x"})
    names = ("first", "second")
    adapter = adapter_of(
        expert_update(experts(INNER, H, nesting=0, names=names), "m"),
        expert_update(experts(H, H + 3, nesting=1, names=names), "m"),
    )
    assert set(bind([adapter], checkpoint).updates) == {"m.first", "m.second"}


def test_parameters_of_unknown_names_and_one_shape_are_ambiguous(tmp_path: Path) -> None:
    tensors = {"m.first": torch.zeros(E, INNER, H), "m.second": torch.zeros(E, INNER, H)}
    checkpoint = make_checkpoint(tmp_path, tensors, {"model_type": "x"})
    adapter = adapter_of(expert_update(experts(INNER, H, nesting=0, names=("first", "second")), "m"))
    assert codes([adapter], checkpoint) == ["ambiguous-target"]


def codes(adapters: list[Adapter], checkpoint: Checkpoint, options: BindOptions | None = None) -> list[str]:
    with pytest.raises(IncompatibleAdapterError) as caught:
        bind(adapters, checkpoint, options)
    return [finding.code for finding in caught.value.findings if finding.severity is Severity.ERROR]


def test_experts_that_do_not_fit_are_told_with_what_the_base_has(tmp_path: Path) -> None:
    checkpoint = separate(tmp_path)
    too_wide = adapter_of(expert_update(experts(2 * INNER, H + 1, nesting=0, names=("gate_up_proj",))))
    assert codes([too_wide], checkpoint) == ["shape-mismatch"]
    elsewhere = adapter_of(expert_update(experts(2 * INNER, H, nesting=0), "model.layers.9.mlp.experts"))
    assert codes([elsewhere], checkpoint) == ["target-missing"]


def test_excluded_experts_need_no_place(tmp_path: Path) -> None:
    checkpoint = separate(tmp_path)
    update = experts(2 * INNER, H, nesting=0, names=("gate_up_proj",))
    adapter = adapter_of(expert_update(update, "model.layers.9.mlp.experts"), *both()[0].updates)
    options = BindOptions(exclude=("model.layers.9.*",))
    assert bind([adapter], checkpoint, options).excluded == adapter.updates[0].keys
