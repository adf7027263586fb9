"""Which models a single file of Stable Diffusion or Flux holds, and under which prefix each.

Autoencoders are not among them: no adapter changes one.
Source: diffusers 0.42, ``loaders/single_file_utils.py``.
"""

from __future__ import annotations

from collections.abc import Container

_CLIP = "text_model.encoder.layers.0.self_attn.q_proj.weight"
_OPEN_CLIP = "transformer.resblocks.0.attn.in_proj_weight"
_T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
_LAYOUT = (
    ("unet", "model.diffusion_model.", "input_blocks.0.0.weight"),
    ("transformer", "model.diffusion_model.", "double_blocks.0.img_attn.qkv.weight"),
    ("transformer", "model.diffusion_model.", "joint_blocks.0.x_block.attn.qkv.weight"),
    ("text_encoder", "cond_stage_model.transformer.", _CLIP),
    ("text_encoder", "cond_stage_model.model.", _OPEN_CLIP),
    ("text_encoder", "conditioner.embedders.0.transformer.", _CLIP),
    ("text_encoder_2", "conditioner.embedders.0.model.", _OPEN_CLIP),
    ("text_encoder_2", "conditioner.embedders.1.model.", _OPEN_CLIP),
    ("text_encoder", "text_encoders.clip_l.transformer.", _CLIP),
    ("text_encoder_2", "text_encoders.clip_g.transformer.", _CLIP),
    ("text_encoder_3", "text_encoders.t5xxl.transformer.", _T5),
)
"""Component of a pipeline, prefix, and a tensor by which it is known."""


def prefixes_of(names: Container[str]) -> dict[str, str]:
    """Give the prefix of each model in a file with these tensors; empty where it holds one model, without a prefix."""
    return {component: prefix for component, prefix, sign in _LAYOUT if prefix + sign in names}
