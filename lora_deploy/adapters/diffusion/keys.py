"""Keys of diffusion adapters: which component, module and tensor each is, whatever trainer wrote it.

    lora_unet_down_blocks_0_…_to_q.lora_down.weight          kohya, LyCORIS: dots of the module are underscores
    diffusion_model.double_blocks.0.img_attn.qkv.lora_down…  the same tensors behind dotted names (ComfyUI, OneTrainer)
    unet.down_blocks.0.….to_q.lora_A.weight                  diffusers, ai-toolkit: PEFT's factors behind the component
    unet.down_blocks.0.….processor.to_q_lora.down.weight     diffusers until 0.22, as attention processors
    text_encoder.….q_proj.lora_linear_layer.down.weight      diffusers until 0.24
    double_blocks.0.processor.qkv_lora1.down.weight          XLabs
    double_blocks.0.img_attn.qkv.lora_A.weight               Black Forest Labs

Promise: a key has one meaning, or none and its file is refused; nothing is told from the order of tests.
Source: sd-scripts 0.9, ``networks/lora.py``; LyCORIS 4.1.3; diffusers 0.42, ``loaders/lora_conversion_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from lora_deploy.adapters.header import CONFIGURATION
from lora_deploy.adapters.interface import AdapterFile

Components = tuple[str, ...]

_DENOISER: Components = ("unet", "transformer", "prior")
_CLIP_L: Components = ("text_encoder",)
_CLIP_G: Components = ("text_encoder_2",)
_T5: Components = ("text_encoder_3", "text_encoder_2")
"""Third of Stable Diffusion 3, second of Flux."""

_FLATTENED: tuple[tuple[str, Components], ...] = (
    ("lora_unet_", _DENOISER),
    ("lora_transformer_", _DENOISER),
    ("lora_prior_unet_", _DENOISER),
    ("lora_te_", _CLIP_L),
    ("lora_te1_", _CLIP_L),
    ("lora_te2_", _CLIP_G),
    ("lora_te3_", _T5),
    ("lora_prior_te_", _CLIP_L),
    ("lycoris_unet_", _DENOISER),
    ("lycoris_te_", _CLIP_L),
    ("lycoris_te1_", _CLIP_L),
    ("lycoris_te2_", _CLIP_G),
    ("lycoris_", ()),
)
_DOTTED: tuple[tuple[str, Components], ...] = (
    ("model.diffusion_model.", _DENOISER),
    ("diffusion_model.", _DENOISER),
    ("unet.", _DENOISER),
    ("transformer.", _DENOISER),
    ("text_encoder.", _CLIP_L),
    ("text_encoder_2.", _CLIP_G),
    ("text_encoder_3.", _T5),
    ("clip_l.", _CLIP_L),
    ("clip_g.", _CLIP_G),
    ("t5.", _T5),
)
_FACTORS = {
    "down": (r"lora_down\.weight", r"lora_A\.weight", r"lora\.down\.weight", r"lora_linear_layer\.down\.weight"),
    "up": (r"lora_up\.weight", r"lora_B\.weight", r"lora\.up\.weight", r"lora_linear_layer\.up\.weight"),
    "up_bias": (r"lora_up\.bias", r"lora_B\.bias"),
    "mid": (r"lora_mid\.weight",),
    "magnitude": (r"dora_scale", r"lora_magnitude_vector(?:\.weight)?"),
}
"""Slots that trainers call differently."""
_SAME = (
    *(
        "alpha",
        "scalar",
        r"hada_w[12]_[ab]",
        r"hada_t[12]",
        r"lokr_w[12](?:_[ab])?",
        "lokr_t2",
        r"oft_blocks(?:\.\d+)?",
        "rescale",
    ),
    *(r"[ab][12]\.weight", r"bm\.weight", "on_input", "diff", "diff_b", "w_norm", "b_norm"),
)
"""Slots that have one name."""
_IA3_WEIGHT = "weight"
"""LyCORIS' IA3 calls its factors as a layer its weight: they are only where ``on_input`` is beside them."""
_SLOT = re.compile(
    "|".join(
        [
            *(f"(?P<{slot}>{'|'.join(names)})" for slot, names in _FACTORS.items()),
            f"(?P<same>{'|'.join(_SAME)}|{_IA3_WEIGHT})",
        ]
    )
)
_PROCESSOR = re.compile(
    r"(?P<parent>.+?)(?:\.processor)?\.(?P<projection>to_[qkv]|to_out|add_[qkv]_proj)_lora\.(?:(?P<way>up|down)\.weight|alpha)"
)
_XLABS = re.compile(
    r"(?P<block>(?:double|single)_blocks\.\d+)\.processor"
    r"\.(?P<what>qkv|proj)_lora(?P<stream>[12]?)\.(?P<way>up|down)\.weight"
)
_BFL = re.compile(
    r"(?:double_blocks|single_blocks|img_in|txt_in|time_in|vector_in|guidance_in|final_layer)\b.*\.lora_[AB]\."
)
_OLDER = re.compile(r"(?:_lora|\.lora_linear_layer|\.lora)\.(?:up|down)\.weight$")
_PEFT_FACTOR = re.compile(r"\.lora_[AB]\.(?:weight|bias)$|\.lora_magnitude_vector$")
_OF_DENOISER = re.compile(
    r"transformer\.(?:transformer_blocks|single_transformer_blocks|layers|blocks\.\d+\.(?:attn[12]|ffn)|x_embedder|"
    r"context_embedder|time_text_embed|pos_embed|patch_embed|norm_out|proj_out|noise_refiner|context_refiner)\b"
)
"""Modules of diffusers' transformers; language models have a ``transformer``, too."""
_KOHYA_ONLY = re.compile(
    r"[._](?:lora_(?:down|up|mid)\.weight|hada_[wt][12]\w*|lokr_[wt][12]\w*|oft_blocks(?:\.\d+)?|dora_scale|diff|diff_b|w_norm|"
    r"on_input|a1\.weight)$"
)
_TEXT_PROJECTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What one key is."""

    components: Components
    module: str
    slot: str
    is_flattened: bool


@cache
def parse(key: str) -> Key | None:
    """Take a key apart; None where no trainer of diffusion adapters writes such a key."""
    for prefix, components in _FLATTENED:
        if key.startswith(prefix):
            module, _, rest = key.removeprefix(prefix).partition(".")
            slot = _slot(rest)
            if slot is None or module.endswith(("_lora_down", "_lora_up")):  # the latter by a faulty conversion
                return None
            return Key(components=components, module=module, slot=slot, is_flattened=True)
    components, name = _without_component(key)
    if match := _XLABS.fullmatch(name):
        return Key(components=components, module=_of_xlabs(match), slot=match["way"], is_flattened=False)
    if match := _PROCESSOR.fullmatch(name):
        return Key(components=components, module=_of_processor(match), slot=match["way"] or "alpha", is_flattened=False)
    module, rest = _longest_slot(name)
    slot = _slot(rest)
    return Key(components=components, module=module, slot=slot, is_flattened=False) if module and slot else None


def format_of(file: AdapterFile) -> str | None:
    """Name the format of diffusion adapters that a file has; None where it is another's."""
    keys = [*file.tensors]
    if any(_is_flattened(key) for key in keys):
        return "kohya"
    if file.config is not None:
        return None
    return next((name for name, has_sign in _SIGNS if any(has_sign(key) for key in keys)), _of_pipeline(file))


def _of_pipeline(file: AdapterFile) -> str | None:
    """Tell diffusers' files by the component that PEFT's factors are behind; language models have transformers, too."""
    told = file.metadata.get(CONFIGURATION, "")
    factors = [key for key in file.tensors if _PEFT_FACTOR.search(key)]
    is_one = any(_names_component(key, told='"transformer.' in told) for key in factors)
    return "diffusers" if is_one else None


def _names_component(key: str, *, told: bool) -> bool:
    if key.startswith("transformer."):
        return told or _OF_DENOISER.match(key) is not None
    return any(key.startswith(prefix) for prefix, _ in _DOTTED)


def _is_flattened(key: str) -> bool:
    return any(key.startswith(prefix) for prefix, _ in _FLATTENED)


def _without_component(key: str) -> tuple[Components, str]:
    for prefix, components in _DOTTED:
        if key.startswith(prefix):
            return components, key.removeprefix(prefix)
    return (), key


def _longest_slot(name: str) -> tuple[str, str]:
    """Part a dotted name where what follows is a slot, of as many words as can be."""
    words = name.split(".")
    for k in range(max(len(words) - 3, 0), len(words)):
        rest = ".".join(words[k:])
        if k and _SLOT.fullmatch(rest):
            return ".".join(words[:k]), rest
    return "", ""


def _slot(rest: str) -> str | None:
    match = _SLOT.fullmatch(rest)
    if match is None:
        return None
    return rest if match.lastgroup == "same" else match.lastgroup


def _of_processor(match: re.Match[str]) -> str:
    parent, projection = match["parent"], match["projection"]
    if parent.endswith("self_attn"):
        return f"{parent}.{_TEXT_PROJECTION.get(projection, projection)}"
    return f"{parent}.{'to_out.0' if projection == 'to_out' else projection}"


def _of_xlabs(match: re.Match[str]) -> str:
    """Name the module as Black Forest Labs do; ``linear1.qkv`` are the first rows of ``linear1``."""
    if match["block"].startswith("single"):
        return f"{match['block']}.{'linear1.qkv' if match['what'] == 'qkv' else 'linear2'}"
    return f"{match['block']}.{'txt' if match['stream'] == '2' else 'img'}_attn.{match['what']}"


_SIGNS: tuple[tuple[str, Callable[[str], object]], ...] = (
    ("xlabs", lambda key: _XLABS.fullmatch(_without_component(key)[1])),
    ("bfl", _BFL.match),
    ("kohya", _KOHYA_ONLY.search),
    ("diffusers", _OLDER.search),
)
"""Formats, and what a key of each has; the first that any key shows counts."""
