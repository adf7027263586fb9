"""torchtune 0.6.1: its own models with LoRA and DoRA, its own files, and its export under PEFT's names.

The oracle is torchtune's forward pass with the adapter beside the weights, on the weights that its own converter makes
of the base; ours is transformers with the merged checkpoint.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models import gemma, llama, qwen2

from lora_deploy.adapters.open import read_adapter
from lora_deploy.bases import open_base
from lora_deploy.validate import bind
from tests.peer.trained import in_double, merge, randomize, save_base

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchtune", reason="torchtune is not installed", exc_type=ImportError)
    from torchtune.models import convert_weights
    from torchtune.models.gemma import lora_gemma
    from torchtune.models.llama3 import lora_llama3
    from torchtune.models.qwen2 import lora_qwen2, qwen2_hf_to_tune
    from torchtune.modules.peft import get_adapter_params

HIDDEN, INNER, HEADS, KEYS, HEAD, VOCAB = 32, 48, 4, 2, 8, 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": HEAD,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
TUNE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "num_heads": HEADS,
    "num_kv_heads": KEYS,
    "embed_dim": HIDDEN,
    "intermediate_dim": INNER,
    "max_seq_len": 64,
    "norm_eps": 1e-5,
    "lora_rank": 3,
    "lora_alpha": 7.0,
}
MODULES = ["q_proj", "k_proj", "v_proj", "output_proj"]
TOKENS = torch.tensor([[3, 17, 4, 90, 55, 2, 31]])


@dataclass(frozen=True)
class Family:
    config: Callable[[], PretrainedConfig]
    build: Callable[..., nn.Module]
    convert: Callable[..., dict[str, Tensor]] = convert_weights.hf_to_tune
    more: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family(
        lambda: llama.LlamaConfig(**SIZES, tie_word_embeddings=False, rope_theta=500_000.0),
        lora_llama3,
        more={"apply_lora_to_output": True},
    ),
    "qwen2": Family(
        lambda: qwen2.Qwen2Config(
            **{**SIZES, "hidden_size": HIDDEN}, tie_word_embeddings=False, rope_theta=1_000_000.0
        ),
        lora_qwen2,
        qwen2_hf_to_tune,
        more={"apply_lora_to_output": True},
    ),
    "gemma": Family(
        lambda: gemma.GemmaConfig(**SIZES, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"),
        lora_gemma,
        more={"head_dim": HEAD},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Tuned:
    base: Path
    folder: Path
    """As a recipe saves it: torchtune's own file, and the export."""
    expected: Tensor


def _tune(family: Family, folder: Path, *, dora: bool) -> Tuned:
    hf = randomize(AutoModelForCausalLM.from_config(family.config()))
    for name, parameter in hf.named_parameters():
        if dora and name.endswith("proj.bias"):  # its DoRA scales them in training, and not when it merges
            parameter.data.zero_()
    base = save_base(hf, folder / "base")
    heads = {"num_heads": HEADS, "num_kv_heads": KEYS, "dim": HIDDEN, "head_dim": HEAD}
    state = dict(hf.state_dict())
    if family.config().tie_word_embeddings:
        state.pop("lm_head.weight", None)
    model = family.build(lora_attn_modules=MODULES, apply_lora_to_mlp=True, use_dora=dora, **TUNE, **family.more)
    model.load_state_dict(family.convert(state, **heads), strict=False)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    generator = torch.Generator().manual_seed(3)
    adapter = get_adapter_params(model)
    for name, parameter in adapter.items():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data = parameter.data * (1 + noise.abs()) if name.endswith("magnitude") else noise
    own = {name: parameter.detach().clone() for name, parameter in adapter.items()}
    saved = folder / "epoch_0"
    saved.mkdir(parents=True)
    torch.save(own, saved / "adapter_model.pt")
    exported = convert_weights.tune_to_peft_adapter_weights(own, **heads)
    save_file({name: tensor.contiguous() for name, tensor in exported.items()}, saved / "adapter_model.safetensors")
    config = {"r": 3, "lora_alpha": 7.0, "target_modules": MODULES, "peft_type": "LORA"}
    config = convert_weights.tune_to_peft_adapter_config(config, base_model_name_or_path=str(base))
    (saved / "adapter_config.json").write_text(json.dumps(config))
    with torch.no_grad():
        expected = model.eval()(TOKENS).double()
    return Tuned(base=base, folder=saved, expected=expected)


def _logits(folder: Path) -> Tensor:
    model = in_double(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    with torch.no_grad():
        return model(TOKENS).logits


def _assert_same(found: Tensor, tuned: Tuned) -> None:
    moved = (tuned.expected - _logits(tuned.base)).abs().max()
    assert moved > 1e-2
    assert (found - tuned.expected).abs().max() < 1e-3 * moved


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_torchtunes_own_file_and_its_export_merge_into_what_it_trained(
    family: Family, dora: bool, tmp_path: Path
) -> None:
    tuned = _tune(family, tmp_path, dora=dora)
    own = merge(tuned.folder, tuned.base, tmp_path / "own")
    _assert_same(_logits(own.root), tuned)
    exported = merge(tuned.folder / "adapter_model.safetensors", tuned.base, tmp_path / "exported")
    _assert_same(_logits(exported.root), tuned)


def test_a_bias_that_training_scaled_is_warned_of(tmp_path: Path) -> None:
    tuned = _tune(FAMILIES["qwen2"], tmp_path, dora=True)
    binding = bind([read_adapter(tuned.folder)], open_base(str(tuned.base)))
    warned = {finding.target for finding in binding.findings if finding.code == "bias-unscaled"}
    assert warned == {f"model.layers.{k}.self_attn.{side}_proj.weight" for k in range(2) for side in "qkv"}


def test_an_export_of_qwen_without_torchtunes_file_is_warned_of(tmp_path: Path) -> None:
    tuned = _tune(FAMILIES["qwen2"], tmp_path / "Qwen2-tiny", dora=False)
    (tuned.folder / "adapter_model.pt").unlink()
    adapter = read_adapter(tuned.folder)
    assert (adapter.format, [finding.code for finding in adapter.findings]) == ("peft", ["torchtune-rows"])
