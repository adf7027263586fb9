"""Converted adapters: read back they are the same updates, and PEFT and diffusers load what was written for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_deploy.adapters.open import read_adapter
from lora_deploy.bases import open_base
from lora_deploy.cli import main
from lora_deploy.errors import OutputExistsError, RecipeError
from lora_deploy.pipeline import convert
from lora_deploy.validate import Binding, bind
from tests.builders import make_checkpoint, merged_values, save_peft
from tests.peer.models import gpt2, llama
from tests.peer.trained import peft_advice_unheard, save_base, train

CONFIGS: dict[str, LoraConfig] = {
    "linear layers": LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=5,
        target_modules="all-linear",
        rank_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 6},
        alpha_pattern={"k_proj": 3, "layers.1.mlp.up_proj": 11},
    ),
    "rank-stabilised, several ranks": LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}
    ),
    "embedding": LoraConfig(r=3, lora_alpha=7, target_modules=["embed_tokens", "q_proj"]),
    "dora": LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=["q_proj", "up_proj"]),
    "dora of an embedding": LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=["embed_tokens", "q_proj"]),
}


def bound(adapter: Path, base: Path) -> Binding:
    return bind([read_adapter(adapter)], open_base(str(base)))


def assert_same(one: Binding, other: Binding) -> None:
    """Equal scales as exact numbers, and equal values of everything, in float64."""
    assert one.updates.keys() == other.updates.keys()
    for name, entries in one.updates.items():
        scales = [
            [
                update.scale.factor**2 / update.scale.root
                for entry in found.updates[name]
                if hasattr(update := getattr(entry.update, "inner", entry.update), "scale")
            ]
            for found in (one, other)
        ]
        assert scales[0] == scales[1], name
        assert len(entries) == 1
    expected, found = merged_values(one), merged_values(other)
    for name, values in expected.items():
        assert torch.allclose(values, found[name], rtol=1e-13, atol=1e-13), name


@pytest.mark.parametrize("with_base", [False, True], ids=["by its own names", "by the base's names"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_written_for_peft_is_what_was_read(config: LoraConfig, with_base: bool, tmp_path: Path) -> None:
    trained = train(llama(tie_word_embeddings=False), config, tmp_path)
    made = convert(trained.adapter, "peft", tmp_path / "made", base=trained.base if with_base else None)
    assert_same(bound(trained.adapter, trained.base), bound(made.path, trained.base))
    with peft_advice_unheard():
        model = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float64)
        loaded = PeftModel.from_pretrained(model, str(made.path)).double().merge_and_unload()
    expected = trained.merged()
    for name, values in loaded.state_dict().items():
        assert (values - expected[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("is_core", [False, True], ids=["with its head", "saved without its head"])
def test_layers_that_store_in_out_are_written_as_modules_compute(is_core: bool, tmp_path: Path) -> None:
    model = gpt2()
    base = save_base(model.transformer if is_core else model, tmp_path / "hub")
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    trained = train(model, config, tmp_path, base=base)
    made = convert(trained.adapter, "peft", tmp_path / "made", base=base)
    assert_same(bound(trained.adapter, base), bound(made.path, base))
    original = load_file(trained.adapter / "adapter_model.safetensors")
    written = load_file(made.path / "adapter_model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(values, written[name]) for name, values in original.items())


def mlx_folder(folder: Path, scale: float) -> Path:
    folder.mkdir()
    tensors = {
        f"model.layers.{k}.{name}.{slot}": torch.randn(*shape)
        for k in range(2)
        for name, n_in, n_out in (("self_attn.q_proj", 64, 64), ("mlp.up_proj", 64, 96))
        for slot, shape in (("lora_a", (n_in, 3)), ("lora_b", (3, n_out)))
    }
    tensors |= {"model.embed_tokens.lora_a": torch.randn(128, 3), "model.embed_tokens.lora_b": torch.randn(3, 64)}
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": scale}})
    )
    return folder


@pytest.mark.parametrize("scale", [20.0, 1.1, 0.3])
def test_an_absolute_scale_becomes_an_alpha_that_is_exactly_it(scale: float, tmp_path: Path) -> None:
    adapter = mlx_folder(tmp_path / "mlx", scale)
    made = convert(adapter, "peft", tmp_path / "made")
    config = json.loads((made.path / "adapter_config.json").read_text())
    assert Fraction(config["lora_alpha"]) / config["r"] == Fraction(scale)
    ours, theirs = read_adapter(adapter), read_adapter(made.path)
    expected: dict[str, Any] = {update.target: update.update for update in ours.updates}
    for update in theirs.updates:
        found: Any = update.update
        assert torch.allclose(found.delta(), expected[update.target].delta(), rtol=1e-14)


def test_rows_and_names_of_another_library_need_the_base(tmp_path: Path) -> None:
    pair = {"layers.0.attn.q_proj.lora_a.weight": torch.randn(2, 64), "layers.0.attn.q_proj.lora_b.weight": None}
    base = save_base(llama(tie_word_embeddings=False), tmp_path / "base")
    rows = open_base(str(base)).tensors["model.layers.0.self_attn.q_proj.weight"].shape
    pair = {
        "layers.0.attn.q_proj.lora_a.weight": torch.randn(2, rows[1]),
        "layers.0.attn.q_proj.lora_b.weight": torch.randn(rows[0], 2),
    }
    folder = tmp_path / "tune"
    folder.mkdir()
    torch.save(pair, folder / "adapter_model.pt")
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA"})
    )
    with pytest.raises(RecipeError, match="rotary pairs") as caught:
        convert(folder, "peft", tmp_path / "made")
    assert "--base" in str(caught.value.hint)
    made = convert(folder, "peft", tmp_path / "made", base=base)
    assert_same(bound(folder, base), bound(made.path, base))


UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (6, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (6, 5),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (8, 6),
}


def test_kohyas_file_means_what_was_read_and_diffusers_names_it_back(tmp_path: Path) -> None:
    tensors = {}
    for name, (out, n_in) in UNET.items():
        key = f"base_model.model.{name}"
        tensors |= {f"{key}.lora_A.weight": torch.randn(3, n_in), f"{key}.lora_B.weight": torch.randn(out, 3)}
    folder = save_peft(tmp_path / "peft", tensors, {"r": 3, "lora_alpha": 7})
    made = convert(folder, "kohya", tmp_path / "made.safetensors")
    written = load_file(made.path)
    for name in UNET:
        key = "lora_unet_" + name.replace(".", "_")
        down, up, alpha = (written[f"{key}.{slot}"] for slot in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert Fraction(alpha.item()) / len(down) == Fraction(7, 3)
        original = tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
        assert torch.equal(up @ down, original)
    named, alphas = _convert_non_diffusers_lora_to_diffusers(dict(written))
    plain = {key.removeprefix("unet.").partition("_lora.")[0].replace(".processor", "") for key in named}
    assert plain == {name.removesuffix(".0") for name in UNET}
    assert set(alphas.values()) == {7.0}


def test_a_text_encoders_prefix_depends_on_whether_there_is_a_second(tmp_path: Path) -> None:
    def pair(name: str) -> dict[str, Tensor]:
        key = f"base_model.model.{name}.text_model.encoder.layers.0.self_attn.q_proj"
        return {f"{key}.lora_A.weight": torch.randn(2, 4), f"{key}.lora_B.weight": torch.randn(4, 2)}

    one = save_peft(tmp_path / "one", pair("text_encoder"), {})
    assert any(k.startswith("lora_te_text") for k in load_file(convert(one, "kohya", tmp_path / "1.safetensors").path))
    both = save_peft(tmp_path / "both", pair("text_encoder") | pair("text_encoder_2"), {})
    names = {key.partition("_text")[0] for key in load_file(convert(both, "kohya", tmp_path / "2.safetensors").path)}
    assert names == {"lora_te1", "lora_te2"}


def _peft(**tensors: Tensor) -> Callable[[Path], Path]:
    return lambda folder: save_peft(folder, {k.replace("__", "."): t for k, t in tensors.items()}, {"bias": "all"})


PAIR = {"q__lora_A__weight": torch.ones(2, 3), "q__lora_B__weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("make", "to", "told"),
    [
        (_peft(**PAIR, q__bias=torch.ones(4)), "peft", "q.bias: a replacement update is no low-rank product"),
        (_peft(**PAIR), "kohya", "of which component is not known"),
        (lambda folder: mlx_folder(folder, 0.1), "kohya", "of which component is not known"),
    ],
    ids=["a replacement", "no diffusion model", "mlx"],
)
def test_what_the_format_cannot_hold_is_refused_by_name(
    make: Callable[[Path], Path], to: str, told: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=told):
        convert(make(tmp_path / "adapter"), to, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_scale_that_single_precision_does_not_hold_is_refused_by_kohya(tmp_path: Path) -> None:
    key = "base_model.model.unet.conv_in"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 3), f"{key}.lora_B.weight": torch.ones(4, 2)}
    with pytest.raises(RecipeError, match="no alpha / r is exactly its scale"):
        convert(save_peft(tmp_path / "a", tensors, {"lora_alpha": 0.1}), "kohya", tmp_path / "made.safetensors")


def test_parts_of_a_fused_weight_become_one_module(tmp_path: Path) -> None:
    names = [f"encoder.layers.0.self_attn.{side}_proj" for side in ("q", "v")]
    tensors = {}
    for name in names:
        key = f"base_model.model.{name}"
        tensors |= {f"{key}.lora_A.weight": torch.randn(2, 6), f"{key}.lora_B.weight": torch.randn(6, 2)}
    base = tmp_path / "base"
    make_checkpoint(base, {"encoder.layers.0.attn.Wqkv.weight": torch.randn(18, 6)}, {"model_type": "nomic_bert"})
    adapter = save_peft(tmp_path / "adapter", tensors, {})
    made = convert(adapter, "peft", tmp_path / "made", base=base)
    assert_values(bound(adapter, base), bound(made.path, base))


def assert_values(one: Binding, other: Binding) -> None:
    expected, found = merged_values(one), merged_values(other)
    assert all(torch.allclose(values, found[name], rtol=1e-13, atol=1e-13) for name, values in expected.items())


def test_the_command_writes_says_and_refuses_to_overwrite(tmp_path: Path) -> None:
    adapter = mlx_folder(tmp_path / "mlx", 2.0)
    arguments = ["convert", str(adapter), "--to", "peft", "-o", str(tmp_path / "made"), "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    document = json.loads(done.output)
    assert (document["n_modules"], document["format"]) == (5, "peft")
    assert {file["path"] for file in document["files"]} == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(OutputExistsError):
        convert(adapter, "peft", tmp_path / "made")
