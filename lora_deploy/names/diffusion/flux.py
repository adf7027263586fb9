"""Flux.1: Black Forest Labs' names against diffusers'.

Beside the names of its tensors, the first rows of ``linear1`` have one of their own here, ``linear1.qkv``: XLabs adapts
them alone.
Source: diffusers 0.42, ``loaders/single_file_utils.py``, ``convert_flux_transformer_checkpoint_to_diffusers``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from lora_deploy.names.diffusion import fused
from lora_deploy.names.diffusion.fused import Fused
from lora_deploy.names.parts import Part, rows_of
from lora_deploy.tensors import TensorSpec

_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_NORM = ("scale", "weight")


def _one(original: str, diffusers: str, slots: tuple[str, str] = ("", "")) -> Fused:
    return Fused(original=original, diffusers=(diffusers,), slots=slots)


_TABLE = (
    Fused(
        original="double_blocks.{i}.img_attn.qkv",
        diffusers=tuple(f"{_DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v")),
    ),
    Fused(
        original="double_blocks.{i}.txt_attn.qkv",
        diffusers=tuple(f"{_DOUBLE}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")),
    ),
    _one("double_blocks.{i}.img_attn.proj", f"{_DOUBLE}.attn.to_out.0"),
    _one("double_blocks.{i}.txt_attn.proj", f"{_DOUBLE}.attn.to_add_out"),
    _one("double_blocks.{i}.img_mlp.0", f"{_DOUBLE}.ff.net.0.proj"),
    _one("double_blocks.{i}.img_mlp.2", f"{_DOUBLE}.ff.net.2"),
    _one("double_blocks.{i}.txt_mlp.0", f"{_DOUBLE}.ff_context.net.0.proj"),
    _one("double_blocks.{i}.txt_mlp.2", f"{_DOUBLE}.ff_context.net.2"),
    _one("double_blocks.{i}.img_mod.lin", f"{_DOUBLE}.norm1.linear"),
    _one("double_blocks.{i}.txt_mod.lin", f"{_DOUBLE}.norm1_context.linear"),
    _one("double_blocks.{i}.img_attn.norm.query_norm", f"{_DOUBLE}.attn.norm_q", _NORM),
    _one("double_blocks.{i}.img_attn.norm.key_norm", f"{_DOUBLE}.attn.norm_k", _NORM),
    _one("double_blocks.{i}.txt_attn.norm.query_norm", f"{_DOUBLE}.attn.norm_added_q", _NORM),
    _one("double_blocks.{i}.txt_attn.norm.key_norm", f"{_DOUBLE}.attn.norm_added_k", _NORM),
    Fused(
        original="single_blocks.{i}.linear1",
        diffusers=tuple(f"{_SINGLE}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        has_tail=True,
    ),
    _one("single_blocks.{i}.linear2", f"{_SINGLE}.proj_out"),
    _one("single_blocks.{i}.modulation.lin", f"{_SINGLE}.norm.linear"),
    _one("single_blocks.{i}.norm.query_norm", f"{_SINGLE}.attn.norm_q", _NORM),
    _one("single_blocks.{i}.norm.key_norm", f"{_SINGLE}.attn.norm_k", _NORM),
    _one("img_in", "x_embedder"),
    _one("txt_in", "context_embedder"),
    _one("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    _one("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    _one("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    _one("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    _one("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    _one("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    _one("final_layer.linear", "proj_out"),
    Fused(original="final_layer.adaLN_modulation.1", diffusers=("norm_out.linear",), swaps_halves=True),
)
_SIGN = "single_transformer_blocks.0.proj_mlp.weight"
_ORIGINAL_SIGN = "single_blocks.0.linear1.weight"
_ATTENTION = "{stem}.linear1.qkv.{slot}"


def parts_of(module: str) -> tuple[str, ...]:
    """Name, as diffusers does, the parts of a fused module of the original release; dots stay dots, or underscores."""
    for fused_module in _TABLE if "_blocks" in module else ():
        for dot in ".", "_":
            pattern = re.escape(fused_module.original.replace(".", dot)).replace(r"\{i\}", r"(\d+)")
            match = re.fullmatch(pattern, module) if len(fused_module.diffusers) > 1 else None
            if match:
                return tuple(path.format(i=match[1]).replace(".", dot) for path in fused_module.diffusers)
    return ()


def other_names(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """Yield Black Forest Labs' names of a diffusers model, or the other way round, and ``linear1.qkv``."""
    is_original = _ORIGINAL_SIGN in specs
    if is_original or _SIGN in specs:
        yield from fused.other_names(specs, _TABLE, is_original=is_original)
        yield from _attention_rows(specs, is_original=is_original)


def _attention_rows(specs: Mapping[str, TensorSpec], *, is_original: bool) -> Iterator[tuple[str, tuple[Part, ...]]]:
    pattern = r"(single_blocks\.\d+)\.linear1\." if is_original else r"single_transformer_blocks\.(\d+)\.attn\.to_q\."
    for name, spec in specs.items():
        match = re.fullmatch(pattern + "(weight|bias)", name)
        if match is None:
            continue
        if is_original:
            width = specs[name.removesuffix(match[2]) + "weight"].region.n_cols
            parts: tuple[Part, ...] = (Part(tensor=name, region=rows_of(spec.region, 0, 3 * width)),)
            yield _ATTENTION.format(stem=match[1], slot=match[2]), parts
        else:
            height = spec.region.n_rows
            parts = tuple(
                Part(tensor=name.replace(".to_q.", f".to_{letter}."), rows=slice(k * height, (k + 1) * height))
                for k, letter in enumerate("qkv")
            )
            yield _ATTENTION.format(stem=f"single_blocks.{match[1]}", slot=match[2]), parts
