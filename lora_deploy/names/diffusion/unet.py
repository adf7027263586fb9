"""The UNet of Stable Diffusion 1 and 2 and of SDXL: the original release (LDM, sgm) numbers its blocks through.

With L residual blocks in each level, level i of the way down is ``input_blocks`` (L + 1)·i + 1 and following, the last
of which makes the image smaller; the way up has L + 1 residual blocks a level, the last of which makes it larger, too.
Source: diffusers 0.42, ``loaders/single_file_utils.py``, ``convert_ldm_unet_checkpoint``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from lora_deploy.names.parts import Part
from lora_deploy.tensors import TensorSpec

_WHOLE = (
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("class_embedding.linear_1", "label_emb.0.0"),
    ("class_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
_RESIDUAL = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_BLOCK = re.compile(
    r"^(?P<way>down|up)_blocks\.(?P<i>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<j>\d+)\.(?P<rest>.+)$"
)
_MIDDLE = re.compile(r"^mid_block\.(?P<kind>resnets|attentions)\.(?P<j>\d+)\.(?P<rest>.+)$")
_LDM_BLOCK = re.compile(r"^(?P<way>input|output)_blocks\.(?P<n>\d+)\.(?P<m>\d+)\.(?P<rest>.+)$")
_LDM_MIDDLE = re.compile(r"^middle_block\.(?P<m>\d+)\.(?P<rest>.+)$")
_SIGN = "conv_in.weight"
_LDM_SIGN = "input_blocks.0.0.weight"
_LAYERS_PER_BLOCK = 2
"""Of every released model; where a model of one level does not show it."""


def other_names(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """Yield LDM's names of a diffusers model, or diffusers' of an LDM model."""
    if _LDM_SIGN in specs:
        n_layers = _n_layers_of_ldm(specs)
        translated = ((_from_ldm(name, n_layers), name) for name in specs)
    elif _SIGN in specs and any(_BLOCK.match(name) for name in specs):
        n_layers = sum(bool(re.match(r"down_blocks\.0\.resnets\.\d+\.conv1\.weight$", name)) for name in specs)
        attending = {match["i"] for name in specs if (match := re.match(r"up_blocks\.(?P<i>\d+)\.attentions\.", name))}
        translated = ((_to_ldm(name, n_layers, attending), name) for name in specs)
    else:
        return
    for other, name in translated:
        if other is not None:
            yield other, (Part(tensor=name),)


def _n_layers_of_ldm(specs: Mapping[str, TensorSpec]) -> int:
    smaller = [int(n) for name in specs for n in re.findall(r"^input_blocks\.(\d+)\.0\.op\.weight$", name)]
    return min(smaller) - 1 if smaller else _LAYERS_PER_BLOCK


def _to_ldm(name: str, n_layers: int, attending: set[str]) -> str | None:
    if match := _BLOCK.match(name):
        i, j, rest = int(match["i"]), int(match["j"]), match["rest"]
        first = (n_layers + 1) * i
        if match["way"] == "down":
            if match["kind"] == "downsamplers":
                return f"input_blocks.{first + n_layers + 1}.0.op.{rest.removeprefix('conv.')}"
            stem = f"input_blocks.{first + j + 1}"
        elif match["kind"] == "upsamplers":
            return f"output_blocks.{first + n_layers}.{2 if match['i'] in attending else 1}.{rest}"
        else:
            stem = f"output_blocks.{first + j}"
        return f"{stem}.0.{_residual(rest)}" if match["kind"] == "resnets" else f"{stem}.1.{rest}"
    if match := _MIDDLE.match(name):
        j, rest = int(match["j"]), match["rest"]
        is_residual = match["kind"] == "resnets"
        return f"middle_block.{2 * j if is_residual else 2 * j + 1}.{_residual(rest) if is_residual else rest}"
    return _exchanged(name, _WHOLE)


def _from_ldm(name: str, n_layers: int) -> str | None:
    if name.startswith("input_blocks.0.0."):
        return f"conv_in.{name.removeprefix('input_blocks.0.0.')}"
    if match := _LDM_BLOCK.match(name):
        n, m, rest = int(match["n"]), int(match["m"]), match["rest"]
        if match["way"] == "input":
            i, j = divmod(n - 1, n_layers + 1)
            if j == n_layers:
                return f"down_blocks.{i}.downsamplers.0.conv.{rest.removeprefix('op.')}"
            stem = f"down_blocks.{i}"
        else:
            i, j = divmod(n, n_layers + 1)
            if m and rest.startswith("conv."):
                return f"up_blocks.{i}.upsamplers.0.{rest}"
            stem = f"up_blocks.{i}"
        return f"{stem}.attentions.{j}.{rest}" if m else f"{stem}.resnets.{j}.{_residual(rest, back=True)}"
    if match := _LDM_MIDDLE.match(name):
        j, is_attention = divmod(int(match["m"]), 2)
        rest = match["rest"]
        kind, rest = ("attentions", rest) if is_attention else ("resnets", _residual(rest, back=True))
        return f"mid_block.{kind}.{j}.{rest}"
    return _exchanged(name, [(ldm, own) for own, ldm in _WHOLE])


def _residual(rest: str, *, back: bool = False) -> str:
    pairs = [(ldm, own) for own, ldm in _RESIDUAL] if back else _RESIDUAL
    return _exchanged(rest, pairs) or rest


def _exchanged(name: str, pairs: list[tuple[str, str]] | tuple[tuple[str, str], ...]) -> str | None:
    for one, other in pairs:
        if name.startswith(f"{one}."):
            return other + name.removeprefix(one)
    return None
