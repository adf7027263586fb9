"""Names of diffusion models in both dialects, against the converters that diffusers reads original releases with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils as peer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from lora_deploy.names.diffusion import other_names
from lora_deploy.tensors import DType, Region, TensorSpec

Tensors = dict[str, Tensor]
Made = tuple[Tensors, Callable[[Tensors], Tensors]]
"""A diffusers model's tensors, and the peer's converter to it."""


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(name=name, dtype=DType.F32, shape=tuple(t.shape), file="f", start=0, stop=t.nbytes)
        for name, t in tensors.items()
    }


def renamed(tensors: Mapping[str, Tensor]) -> Tensors:
    """Every tensor under its names in the other dialect, put together from its parts."""
    specs, found = specs_of(tensors), {}
    for name, parts in other_names(specs):
        pieces = []
        for part in sorted(parts, key=lambda part: part.rows.start if part.rows else 0):
            region = part.region or Region.whole(specs[part.tensor].shape)
            flat = tensors[part.tensor].flatten()[region.offset : region.stop]
            pieces.append(flat.reshape(region.n_rows, *tensors[part.tensor].shape[1:]))
        found[name] = torch.cat(pieces)
    return found


def numbered(model: torch.nn.Module) -> Tensors:
    """The model's tensors, every element of them different."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}


UNET = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL = {
    **UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 3),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
FLUX = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 6,
    "axes_dims_rope": (2, 2, 4),
    "guidance_embeds": True,
}
SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 8,
}
SAME_IN_BOTH = {"pos_embed.pos_embed", "context_embedder.weight", "context_embedder.bias"}
SD35 = {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}


def unet(config: dict[str, Any]) -> Callable[[], Made]:
    def make() -> Made:
        model = UNet2DConditionModel(**config)
        prefixed = lambda t: {f"model.diffusion_model.{name}": value for name, value in t.items()}  # noqa: E731
        return numbered(model), lambda t: peer.convert_ldm_unet_checkpoint(prefixed(t), dict(model.config))

    return make


def flux() -> Made:
    """The peer's converter has Flux's width written down: it is run as it is, but for that number."""
    source = inspect.getsource(peer.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("3072") == 1
    scope = {**vars(peer)}
    exec(source.replace("3072", "16"), scope)  # noqa: S102 - the installed library's own source
    convert = scope["convert_flux_transformer_checkpoint_to_diffusers"]
    return numbered(FluxTransformer2DModel(**FLUX)), lambda t: convert({**t})


def sd3(config: dict[str, Any]) -> Callable[[], Made]:
    def make() -> Made:
        tensors = numbered(SD3Transformer2DModel(**config))
        own = {name: tensors[name] for name in ("context_embedder.weight", "context_embedder.bias")}
        own["pos_embed"] = tensors["pos_embed.pos_embed"]
        return tensors, lambda t: peer.convert_sd3_transformer_checkpoint_to_diffusers({**t, **own})

    return make


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(unet(UNET), id="Stable Diffusion's UNet"),
        pytest.param(unet(SDXL), id="SDXL's UNet"),
        pytest.param(flux, id="Flux"),
        pytest.param(sd3(SD3), id="SD3"),
        pytest.param(sd3(SD35), id="SD3.5"),
    ],
)
def test_both_dialects_name_the_same_tensors_as_diffusers_converters(
    make: Callable[[], Made],
) -> None:
    tensors, convert = make()
    original = renamed(tensors)
    rows = {name: original.pop(name) for name in [*original] if ".linear1.qkv." in name}
    converted = convert({name: t.clone() for name, t in original.items()})
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)
    back = renamed(original)
    same_in_both = SAME_IN_BOTH if tensors.keys() >= SAME_IN_BOTH else set()
    assert back.keys() == (tensors.keys() - same_in_both) | rows.keys()
    assert all(torch.equal(back[name], t) for name, t in (tensors | rows).items() if name in back)


def test_open_clip_is_named_as_diffusers_converts_it() -> None:
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=5,
        projection_dim=8,
    )
    model = CLIPTextModel(config)
    generator = torch.Generator().manual_seed(3)
    width, prefix = 8, "cond_stage_model.model."
    shapes = {
        "token_embedding.weight": (20, width),
        "positional_embedding": (5, width),
        "text_projection": (width, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    for i in range(2):
        layer = f"transformer.resblocks.{i}"
        shapes |= {f"{layer}.{n}.{s}": (width,) for n in ("ln_1", "ln_2") for s in ("weight", "bias")}
        shapes |= {f"{layer}.attn.in_proj_weight": (3 * width, width), f"{layer}.attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{layer}.attn.out_proj.weight": (width, width), f"{layer}.attn.out_proj.bias": (width,)}
        shapes |= {f"{layer}.mlp.c_fc.weight": (16, width), f"{layer}.mlp.c_fc.bias": (16,)}
        shapes |= {f"{layer}.mlp.c_proj.weight": (width, 16), f"{layer}.mlp.c_proj.bias": (width,)}
    original = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    converted = peer.convert_open_clip_checkpoint(
        model, {prefix + name: t.clone() for name, t in original.items()}, prefix=prefix
    )
    found = renamed(original)
    named = {name if name.startswith("text_") else f"text_model.{name}": t for name, t in converted.items()}
    expected = {name: t for name, t in named.items() if not name.endswith(("position_ids", "text_projection.weight"))}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
