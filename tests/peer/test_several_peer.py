"""Several adapters on one base, and one adapter on a base whose layers repeat; the peer is PEFT 0.21.2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from lora_deploy.errors import IncompatibleAdapterError
from lora_deploy.validate import BindOptions
from tests.peer.models import gpt2, llama, mixtral, token_ids
from tests.peer.trained import (
    assert_merges_as_trained,
    assert_rounded_once,
    assert_same_output,
    forward,
    merge,
    peft_advice_unheard,
    reload,
    tensors_of,
    train,
)

WEIGHTS = (0.7, -1.3)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "one of them rank-stabilised"])
@pytest.mark.parametrize(
    ("model", "first", "second"),
    [(llama, ["q_proj", "down_proj"], ["q_proj", "k_proj"]), (gpt2, ["c_attn", "wpe"], ["c_attn", "c_fc", "wpe"])],
    ids=["llama", "gpt2"],
)
def test_two_adapters_with_weights_add_up_to_what_peft_0_21_2_concatenates(
    model: type[nn.Module], first: list[str], second: list[str], use_rslora: bool, tmp_path: Path
) -> None:
    """``combination_type="cat"`` is the one of PEFT's combinations that is the sum of the updates."""

    def add_second(adapted: PeftModel) -> None:
        config = LoraConfig(r=2, lora_alpha=7, target_modules=second, use_rslora=use_rslora)
        adapted.add_adapter("second", config)

    trained = train(model(), LoraConfig(r=3, lora_alpha=5, target_modules=first), tmp_path, before=add_second)
    with peft_advice_unheard():
        trained.model.add_weighted_adapter(["default", "second"], list(WEIGHTS), "sum", combination_type="cat")
        trained.model.set_adapter("sum")
    adapters = [trained.adapter, trained.adapter / "second"]
    merge(adapters, trained.base, tmp_path / "out", bind_options=BindOptions(weights=WEIGHTS))

    loaded, inputs = reload(trained.bare, tmp_path / "out"), token_ids()
    assert_same_output(forward(loaded, inputs), trained.output(inputs), forward(trained.bare, inputs))
    assert_rounded_once({name: t.float() for name, t in loaded.state_dict().items()}, trained.merged("sum"))


def test_the_same_adapter_with_weights_that_cancel_gives_the_base(tmp_path: Path) -> None:
    trained = train(llama(), LoraConfig(r=3, target_modules=["q_proj"]), tmp_path)
    adapters = [trained.adapter, trained.adapter]
    merge(adapters, trained.base, tmp_path / "out", bind_options=BindOptions(weights=(0.3, -0.3)))
    base, found = tensors_of(trained.base), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], base[name]) for name in base)


def test_two_adapters_of_fused_experts_add_up_as_peft_0_21_2_adds_them(tmp_path: Path) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

    def add_second(adapted: PeftModel) -> None:
        config = LoraConfig(r=2, lora_alpha=7, target_modules=[], target_parameters=parameters)
        adapted.add_adapter("second", config)

    config = LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=parameters)
    trained = train(mixtral(), config, tmp_path, before=add_second)
    merge([trained.adapter, trained.adapter / "second"], trained.base, tmp_path / "out")
    loaded = reload(trained.bare, tmp_path / "out")
    with peft_advice_unheard():
        merged = trained.model.merge_and_unload(adapter_names=["default", "second"])
    assert_rounded_once({n: t.float() for n, t in loaded.state_dict().items()}, merged.state_dict())


def test_a_second_adapter_with_magnitudes_is_refused(tmp_path: Path) -> None:
    trained = train(llama(), LoraConfig(r=3, target_modules=["q_proj"], use_dora=True), tmp_path)
    with pytest.raises(IncompatibleAdapterError, match=r"kinds-collide"):
        merge([trained.adapter, trained.adapter], trained.base, tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("model", "ranges"),
    [
        (llama, [[0, 2], [1, 2]]),
        (llama, [[0, 1], [0, 2], [0, 1]]),
        (lambda **options: llama(num_hidden_layers=12, **options), [[10, 12], [0, 9], [3, 4]]),
    ],
    ids=["a layer again", "layers in turn", "more than ten"],
)
def test_replicated_layers_compute_what_peft_0_21_2_was_trained_to_though_its_merge_adds_all_copies_to_one(
    model: type[nn.Module], ranges: list[list[int]], tied: bool, tmp_path: Path
) -> None:
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], layer_replication=ranges)
    trained = train(model(tie_word_embeddings=tied), config, tmp_path)
    loaded = assert_merges_as_trained(trained, token_ids(), tmp_path / "out", weights=False)
    n_layers = sum(stop - start for start, stop in ranges)
    assert loaded.config.num_hidden_layers == n_layers
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == n_layers
