"""``layer_replication``: the stack that training saw is written out, indices of adapters refer to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import IncompatibleAdapterError, Severity
from lora_deploy.validate import bind
from tests.builders import linear_adapter, make_checkpoint, merged_values

N = 3
RANGES = ((0, 3), (1, 3))
LAYERS = [0, 1, 2, 1, 2]


def name(k: int) -> str:
    return f"model.layers.{k}.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    tensors = {"model.embed_tokens.weight": torch.randn(4, 2), "model.norm.weight": torch.ones(2)}
    tensors |= {name(k): torch.randn(3, 2) for k in range(N)}
    config = {
        "model_type": "llama",
        "num_hidden_layers": N,
        "layer_types": ["a", "b", "c"],
        "tie_word_embeddings": False,
    }
    return make_checkpoint(tmp_path, tensors, config)


def codes(adapters: list[Any], checkpoint: Checkpoint) -> list[str]:
    with pytest.raises(IncompatibleAdapterError) as caught:
        bind(adapters, checkpoint)
    return [finding.code for finding in caught.value.findings if finding.severity is Severity.ERROR]


def test_the_stack_is_written_out_and_each_copy_has_its_own_update(base: Checkpoint) -> None:
    adapter = linear_adapter({name(k): (3, 2) for k in (1, 3)}, layer_replication=RANGES)
    binding = bind([adapter], base)
    assert {k: binding.outputs[name(k)] for k in range(5)} == {k: name(source) for k, source in enumerate(LAYERS)}
    assert binding.outputs["model.norm.weight"] == "model.norm.weight"
    assert len(binding.outputs) == 2 + 5
    assert binding.config_edits == {"num_hidden_layers": 5, "layer_types": ["a", "b", "c", "b", "c"]}
    merged = merged_values(binding)
    plain = torch.frombuffer(bytearray(base.read(name(1))), dtype=torch.float32).reshape(3, 2).double()
    for k, update in zip((1, 3), adapter.updates, strict=True):
        assert torch.allclose(merged[name(k)], plain + update.update.delta())  # type: ignore[union-attr]


def test_an_index_beyond_the_written_out_stack_is_missing(base: Checkpoint) -> None:
    assert codes([linear_adapter({name(5): (3, 2)}, layer_replication=RANGES)], base) == ["target-missing"]


def test_layers_that_the_base_does_not_have_cannot_be_replicated(base: Checkpoint) -> None:
    assert codes([linear_adapter({name(0): (3, 2)}, layer_replication=((0, 4),))], base) == ["layer-replication"]


def test_adapters_of_different_stacks_cannot_be_merged_together(base: Checkpoint) -> None:
    adapters = [linear_adapter({name(0): (3, 2)}, layer_replication=RANGES), linear_adapter({name(0): (3, 2)})]
    assert codes(adapters, base) == ["layer-replication"]


def test_a_base_with_two_stacks_is_not_guessed_at(tmp_path: Path) -> None:
    tensors = {f"{tower}.layers.0.w.weight": torch.zeros(2, 2) for tower in ("encoder", "decoder")}
    checkpoint = make_checkpoint(tmp_path, tensors, {"model_type": "x"})
    adapter = linear_adapter({"encoder.layers.0.w.weight": (2, 2)}, layer_replication=((0, 1), (0, 1)))
    assert codes([adapter], checkpoint) == ["layer-replication"]
