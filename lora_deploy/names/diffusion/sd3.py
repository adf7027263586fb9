"""Stable Diffusion 3 and 3.5: Stability's names of the multimodal transformer against diffusers'.

Source: diffusers 0.42, ``loaders/single_file_utils.py``, ``convert_sd3_transformer_checkpoint_to_diffusers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lora_deploy.names.diffusion import fused
from lora_deploy.names.diffusion.fused import Fused
from lora_deploy.names.parts import Part
from lora_deploy.tensors import TensorSpec

_BLOCK = "transformer_blocks.{i}"


def _qkv(original: str, names: tuple[str, str, str]) -> Fused:
    return Fused(original=original, diffusers=tuple(f"{_BLOCK}.{name}" for name in names))


def _one(original: str, diffusers: str, *, swaps_halves: bool = False) -> Fused:
    return Fused(original=original, diffusers=(diffusers,), swaps_halves=swaps_halves)


_TABLE = (
    _qkv("joint_blocks.{i}.x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    _qkv("joint_blocks.{i}.context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    _qkv("joint_blocks.{i}.x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    _one("joint_blocks.{i}.x_block.attn.proj", f"{_BLOCK}.attn.to_out.0"),
    _one("joint_blocks.{i}.x_block.attn2.proj", f"{_BLOCK}.attn2.to_out.0"),
    _one("joint_blocks.{i}.context_block.attn.proj", f"{_BLOCK}.attn.to_add_out"),
    _one("joint_blocks.{i}.x_block.attn.ln_q", f"{_BLOCK}.attn.norm_q"),
    _one("joint_blocks.{i}.x_block.attn.ln_k", f"{_BLOCK}.attn.norm_k"),
    _one("joint_blocks.{i}.x_block.attn2.ln_q", f"{_BLOCK}.attn2.norm_q"),
    _one("joint_blocks.{i}.x_block.attn2.ln_k", f"{_BLOCK}.attn2.norm_k"),
    _one("joint_blocks.{i}.context_block.attn.ln_q", f"{_BLOCK}.attn.norm_added_q"),
    _one("joint_blocks.{i}.context_block.attn.ln_k", f"{_BLOCK}.attn.norm_added_k"),
    _one("joint_blocks.{i}.x_block.mlp.fc1", f"{_BLOCK}.ff.net.0.proj"),
    _one("joint_blocks.{i}.x_block.mlp.fc2", f"{_BLOCK}.ff.net.2"),
    _one("joint_blocks.{i}.context_block.mlp.fc1", f"{_BLOCK}.ff_context.net.0.proj"),
    _one("joint_blocks.{i}.context_block.mlp.fc2", f"{_BLOCK}.ff_context.net.2"),
    _one("joint_blocks.{i}.x_block.adaLN_modulation.1", f"{_BLOCK}.norm1.linear"),
    # Of the last block there are shift and scale only, in the order of a final layer.
    _one("joint_blocks.{i}.context_block.adaLN_modulation.1", f"{_BLOCK}.norm1_context.linear", swaps_halves=True),
    _one("x_embedder.proj", "pos_embed.proj"),
    _one("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    _one("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    _one("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    _one("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    _one("final_layer.linear", "proj_out"),
    _one("final_layer.adaLN_modulation.1", "norm_out.linear", swaps_halves=True),
)
_SIGN = "pos_embed.proj.weight"
_ORIGINAL_SIGN = "joint_blocks.0.x_block.attn.qkv.weight"


def other_names(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """Yield Stability's names of a diffusers model, or the other way round."""
    is_original = _ORIGINAL_SIGN in specs
    if is_original or (_SIGN in specs and "transformer_blocks.0.attn.add_q_proj.weight" in specs):
        yield from fused.other_names(specs, _TABLE, is_original=is_original)
