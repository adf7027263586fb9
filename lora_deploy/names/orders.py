"""Orders in which a library finds the adapted layers of a model, for adapters that number them instead of naming them.

The order is that in which a model's modules are registered, which has been changed once: until 0.13 diffusers' blocks
had their feed-forward before their cross-attention. All known orders are given; which one an adapter has, its shapes
tell.
Source: cloneofsimo/lora 0.1.7, ``_find_modules_v2``; diffusers 0.12 and 0.42, ``attention.py`` and
``unet_2d_condition.py``; transformers 5.23, ``modeling_clip.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Key = tuple[int, ...]

_DENOISER = re.compile(
    r"^(?P<stage>down_blocks|up_blocks|mid_block)(?:\.(?P<block>\d+))?\.attentions\.(?P<attention>\d+)"
    r"\.transformer_blocks\.(?P<layer>\d+)\.(?P<part>attn1|attn2|ff)"
    r"\.(?P<projection>to_q|to_k|to_v|to_out\.0|net\.0\.proj)\.weight$"
)
_STAGES = ("down_blocks", "up_blocks", "mid_block")
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj")
_DENOISER_PARTS = (("attn1", "attn2", "ff"), ("attn1", "ff", "attn2"))
_TEXT = re.compile(
    r"^(?:.+\.)?encoder\.layers\.(?P<layer>\d+)\.self_attn\.(?P<projection>k_proj|v_proj|q_proj|out_proj)\.weight$"
)
_TEXT_PROJECTIONS = ("k_proj", "v_proj", "q_proj", "out_proj")


def orders_of(names: Iterable[str]) -> list[list[str]]:
    """Give every order that is known of the adapted layers of a model with these tensors; none if it is not known."""
    names = list(names)
    text = sorted((key, name) for name in names if (key := _text_key(name)) is not None)
    if text:
        return [[name for _, name in text]]
    orders = []
    for parts in _DENOISER_PARTS:
        found = sorted((key, name) for name in names if (key := _denoiser_key(name, parts)) is not None)
        orders += [[name for _, name in found]] if found else []
    return orders


def _text_key(name: str) -> Key | None:
    match = _TEXT.match(name)
    return None if match is None else (int(match["layer"]), _TEXT_PROJECTIONS.index(match["projection"]))


def _denoiser_key(name: str, parts: tuple[str, ...]) -> Key | None:
    match = _DENOISER.match(name)
    if match is None:
        return None
    return (
        _STAGES.index(match["stage"]),
        int(match["block"] or 0),
        int(match["attention"]),
        int(match["layer"]),
        parts.index(match["part"]),
        _PROJECTIONS.index(match["projection"]),
    )
