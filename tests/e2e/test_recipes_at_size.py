"""Every recipe planned over the tensor table of the real model: its names, shapes and sizes, and no weights.

The tables are those of the real configurations, built without memory; the published number of parameters says that each
is the real one. Weight files are holes of the real length, which a plan never reads.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from lora_deploy.recipe.library import library
from lora_deploy.recipe.read import read_recipe
from tests.e2e.commands import document, settings
from tests.peer.trained import peft_advice_unheard

_MISTRAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8}
_SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_PERCEIVER = {"hidden_size": 4096, "resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16}
_VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_WHISPER = {"d_model": 768, "encoder_layers": 12, "decoder_layers": 12, "encoder_ffn_dim": 3072}
_WHISPER |= {"decoder_ffn_dim": 3072, "encoder_attention_heads": 12, "decoder_attention_heads": 12}
_ATTENTION = ["q_proj", "v_proj"]


def _of(cls: str, **settings: Any) -> Callable[[], nn.Module]:
    chosen = getattr(transformers, cls)
    return lambda: chosen(chosen.config_class(**settings))


MODELS: dict[str, tuple[Callable[[], nn.Module], int, Any]] = {
    "bloom": (
        _of("BloomForCausalLM", vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16),
        559_214_592,
        ["query_key_value", "dense", "dense_h_to_4h"],
    ),
    "clip": (_of("CLIPModel"), 151_277_313, ["q_proj", "fc1"]),
    "gemma": (
        _of(
            "Gemma2ForCausalLM",
            vocab_size=256000,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
        ),
        2_614_341_888,
        "all-linear",
    ),
    "gpt-2": (_of("GPT2LMHeadModel"), 124_439_808, ["c_attn", "c_proj", "c_fc"]),
    "idefics": (
        _of(
            "Idefics2ForConditionalGeneration",
            text_config={"model_type": "mistral", "vocab_size": 32003, **_MISTRAL},
            vision_config={"image_size": 980, "patch_size": 14, **_SIGLIP},
            perceiver_config={**_PERCEIVER, "resampler_head_dim": 96, "num_key_value_heads": 4},
        ),
        8_402_768_624,
        r".*text_model.*(q_proj|v_proj|down_proj)",
    ),
    "llama-3-8b": (_of("LlamaForCausalLM", vocab_size=128256, **_MISTRAL), 8_030_261_248, "all-linear"),
    "llava": (
        _of(
            "LlavaForConditionalGeneration",
            text_config={"model_type": "llama", "vocab_size": 32064},
            vision_config={"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, **_VIT_L},
        ),
        7_063_427_072,
        r".*language_model.*(q_proj|v_proj|up_proj)",
    ),
    "mistral-7b": (_of("MistralForCausalLM", vocab_size=32000, **_MISTRAL), 7_241_732_096, "all-linear"),
    "mixtral-8x7b": (_of("MixtralForCausalLM"), 46_702_792_704, _ATTENTION),
    "phi": (_of("Phi3ForCausalLM"), 3_821_079_552, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "qwen3": (
        _of(
            "Qwen3ForCausalLM",
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            head_dim=128,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
        4_022_468_096,
        "all-linear",
    ),
    "smollm2": (
        _of(
            "LlamaForCausalLM",
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
        134_515_008,
        "all-linear",
    ),
    "t5": (_of("T5ForConditionalGeneration"), 60_506_624, ["q", "v"]),
    "vit": (_of("ViTForImageClassification", num_labels=1000), 86_567_656, _ATTENTION),
    "whisper": (_of("WhisperForConditionalGeneration", **_WHISPER), 241_734_912, ["q_proj", "fc1"]),
}
_KL_BLOCKS = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
_KL_BLOCKS |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
_XL = {"block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048}
_XL |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")}
_XL |= {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
_XL |= {"transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True}
_XL |= {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
_UNET_TARGETS = ["to_q", "to_v", "conv1", "proj_in"]

Parts = Mapping[str, Callable[[], nn.Module]]
PIPELINES: dict[str, tuple[str, Parts, int, list[str]]] = {
    "stable-diffusion-1.5": (
        "StableDiffusionPipeline",
        {
            "unet": partial(diffusers.UNet2DConditionModel, cross_attention_dim=768),
            "text_encoder": _of("CLIPTextModel", **_CLIP_L),
            "vae": partial(diffusers.AutoencoderKL, **_KL_BLOCKS),
        },
        859_520_964,
        _UNET_TARGETS,
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {
            "unet": partial(diffusers.UNet2DConditionModel, **_XL),
            "text_encoder": _of("CLIPTextModel", **_CLIP_L),
            "text_encoder_2": _of("CLIPTextModelWithProjection", projection_dim=1280, **_CLIP_G),
            "vae": partial(diffusers.AutoencoderKL, **_KL_BLOCKS),
        },
        2_567_463_684,
        _UNET_TARGETS,
    ),
    "flux": (
        "FluxPipeline",
        {
            "transformer": partial(diffusers.FluxTransformer2DModel, guidance_embeds=True),
            "text_encoder": _of("CLIPTextModel", **_CLIP_L),
            "text_encoder_2": _of("T5EncoderModel", **_T5_XXL),
            "vae": partial(diffusers.AutoencoderKL, latent_channels=16, use_quant_conv=False, **_KL_BLOCKS),
        },
        11_901_408_320,
        ["to_q", "to_k", "proj_mlp", "x_embedder"],
    ),
}
ALWAYS = {"llama-3-8b", "mixtral-8x7b", "sdxl"}


def built(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def n_parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Names and shapes as the model's library writes them: a tied matrix once."""
    if not isinstance(model, transformers.PreTrainedModel):
        return dict(model.state_dict())
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    table = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return dict(revert_weight_conversion(model, table))


def write_table(model: nn.Module, folder: Path, file: str = "model.safetensors") -> int:
    """Write a weight file of 16-bit holes, and the configuration beside it; give its size."""
    n_bytes, header = 0, {}
    for name, tensor in stored(model).items():
        end = n_bytes + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [n_bytes, end]}
        n_bytes = end
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / file).open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + n_bytes)
    (model.save_config if isinstance(model, diffusers.ModelMixin) else model.config.save_pretrained)(folder)
    return n_bytes


def write_adapter(model: nn.Module, targets: Any, folder: Path) -> int:
    """Write an adapter of rank 1 for a table; give the number of its modules."""
    with torch.device("meta"), peft_advice_unheard():
        adapted = get_peft_model(model, LoraConfig(r=1, target_modules=targets))
    factors = get_peft_model_state_dict(adapted)
    folder.mkdir()
    adapted.peft_config["default"].save_pretrained(folder)
    save_file(
        {name: torch.ones(factor.shape) for name, factor in factors.items()}, folder / "adapter_model.safetensors"
    )
    return sum("lora_A" in name for name in factors)


def planned(name: str, folder: Path) -> dict[str, Any]:
    """Plan a recipe; give its one cell."""
    chosen = {"adapters": folder / "adapter", "base": folder / "base", "output": folder / "dist"}
    found = document("run", name, *settings(chosen), "--dry-run")
    assert not (folder / "dist").exists()
    [cell] = found["cells"]
    return dict(cell)


def expected_bytes(name: str, n_bytes: int) -> int:
    return n_bytes * {"float32": 2}.get(str(read_recipe(library()[name]).dtypes[0]), 1)


def sized(names: Any) -> list[Any]:
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.nightly) for name in names]


def test_every_recipe_has_a_table() -> None:
    assert sorted([*MODELS, *PIPELINES]) == sorted(library())


@pytest.mark.parametrize("name", sized(MODELS))
def test_a_recipe_is_planned_over_the_table_of_the_real_model(name: str, tmp_path: Path) -> None:
    build, n_parameters, targets = MODELS[name]
    model = built(build)
    assert n_parameters_of(model) == pytest.approx(n_parameters, rel=1e-6)
    n_bytes = write_table(model, tmp_path / "base")
    n_modules = write_adapter(model, targets, tmp_path / "adapter")
    cell = planned(name, tmp_path)
    assert cell["n_tensors"] == n_modules
    assert cell["merge"]["n_output_bytes"] == pytest.approx(expected_bytes(name, n_bytes), rel=1e-3)


@pytest.mark.parametrize("name", sized(PIPELINES))
def test_a_recipe_is_planned_over_the_tables_of_the_real_pipeline(name: str, tmp_path: Path) -> None:
    kind, parts, n_parameters, targets = PIPELINES[name]
    n_bytes, index, n_modules = 0, {"_class_name": kind}, 0
    for part, build in parts.items():
        model = built(build)
        is_text = isinstance(model, transformers.PreTrainedModel)
        file = "model.safetensors" if is_text else "diffusion_pytorch_model.safetensors"
        n_bytes += write_table(model, tmp_path / "base" / part, file)
        index[part] = ["transformers" if is_text else "diffusers", type(model).__name__]
        if part in {"unet", "transformer"}:
            assert n_parameters_of(model) == pytest.approx(n_parameters, rel=1e-6)
            n_modules = write_adapter(model, targets, tmp_path / "adapter")
    (tmp_path / "base/model_index.json").write_text(json.dumps(index))
    cell = planned(name, tmp_path)
    assert cell["n_tensors"] == n_modules
    assert cell["merge"]["n_output_bytes"] == pytest.approx(expected_bytes(name, n_bytes), rel=1e-3)
