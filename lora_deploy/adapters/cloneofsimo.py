"""Adapters of cloneofsimo/lora: no names, only the order in which its modules were found.

    .pt            a list: up, down, up, down …                       the denoiser's or the text encoder's
    .safetensors   <part>:<i>:up and <part>:<i>:down; <part>:<i>:rank and the target classes in its header

up (out, r), down (r, in), in the order of ``named_modules`` of the attention layers (and GEGLU) of the diffusers model
it was trained with. The scale is 1: training had no other, and the file names none. A file with several parts is read
one part at a time (``--adapter-name unet``).
Source: cloneofsimo/lora 0.1.7, ``lora_diffusion/lora.py``: ``save_lora_weight``, ``save_safeloras_with_embeds``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fractions import Fraction

from lora_deploy.adapter import Adapter, ModuleUpdate, Naming
from lora_deploy.adapters.factors import factor, low_rank
from lora_deploy.adapters.findings import note, untrained
from lora_deploy.adapters.interface import AdapterFile, ReadOptions
from lora_deploy.errors import AmbiguousAdapterFormatError, MalformedAdapterError, RecipeError, UnmergeableAdapterError
from lora_deploy.updates.interface import Scale

_KEY = re.compile(r"^(?P<part>[^:]+):(?P<i>\d+):(?P<slot>up|down)$")
_EMBEDDING_FLAG = "<embed>"
_CLASSES = frozenset({"CrossAttention", "Attention", "GEGLU", "CLIPAttention"})
_SCALE = Scale(factor=Fraction(1), source="1: the format names no scale, training had none")


class CloneofsimoReader:
    """Reads positional adapters."""

    format = "cloneofsimo"

    def recognises(self, file: AdapterFile) -> bool:
        """Whether tensors are numbered instead of named."""
        return any(_KEY.match(key) for key in file.tensors)

    def read(self, file: AdapterFile, options: ReadOptions) -> Adapter:
        """Turn the file, or one part of it, into updates whose targets are positions.

        Raises:
            MalformedAdapterError: Numbers with gaps, a factor without its other, or ranks that differ.
            AmbiguousAdapterFormatError: Several parts and no choice.
            RecipeError: A choice that the file does not hold.
            UnmergeableAdapterError: Classes of modules whose order is not known here.
        """
        parts = _parts(file)
        part = _chosen(file, parts, options.adapter_name)
        _check_classes(file, part)
        updates = tuple(_update(file, part, i, slots, options) for i, slots in sorted(parts[part].items()))
        if [int(update.target.rpartition(":")[2]) for update in updates] != list(range(len(updates))):
            raise MalformedAdapterError(
                f"{file.path}: {part}: its {len(updates)} modules are not numbered without gaps"
            )
        left_out = [key for key in file.tensors if not key.startswith(f"{part}:")]
        findings = list(untrained(updates))
        if left_out:
            findings.append(note("unused-tensors", left_out[0], f"{len(left_out)} tensors are of other parts"))
        return Adapter(
            path=file.path,
            name=file.name,
            format=self.format,
            naming=Naming.POSITIONAL,
            updates=updates,
            findings=tuple(findings),
            sha256=file.sha256,
        )


READER = CloneofsimoReader()


def _parts(file: AdapterFile) -> dict[str, dict[int, dict[str, str]]]:
    parts: dict[str, dict[int, dict[str, str]]] = {}
    for key in file.tensors:
        match = _KEY.match(key)
        if match is None:
            if file.metadata.get(key) == _EMBEDDING_FLAG:
                raise UnmergeableAdapterError(
                    f"{file.path}: {key}: a trained token (textual inversion), which merged weights do not hold",
                    hint="load it beside the merged pipeline with load_textual_inversion",
                )
            raise MalformedAdapterError(f"{file.path}: {key}: expected <part>:<number>:up or :down")
        parts.setdefault(match["part"], {}).setdefault(int(match["i"]), {})[match["slot"]] = key
    return parts


def _chosen(file: AdapterFile, parts: Mapping[str, object], name: str | None) -> str:
    held = ", ".join(parts)
    if name is not None:
        if name not in parts:
            raise RecipeError(f"{file.path}: no part {name!r} in the file, it holds {held}")
        return name
    if len(parts) > 1:
        raise AmbiguousAdapterFormatError(
            f"{file.path}: holds the parts {held}",
            hint=f"merge one after the other: --adapter-name {next(iter(parts))}",
        )
    return next(iter(parts))


def _check_classes(file: AdapterFile, part: str) -> None:
    text = file.metadata.get(part)
    if text is None:
        return
    try:
        classes = {str(name) for name in json.loads(text)}
    except (ValueError, TypeError, RecursionError) as error:
        raise MalformedAdapterError(f"{file.path}: metadata {part}: found {text[:80]!r}, expected a list") from error
    others = sorted(classes - _CLASSES)
    if others:
        raise UnmergeableAdapterError(
            f"{file.path}: {part}: trained in modules of {', '.join(others)}, whose order is not known here"
        )


def _update(file: AdapterFile, part: str, i: int, slots: Mapping[str, str], options: ReadOptions) -> ModuleUpdate:
    where = f"{part}:{i}"
    if slots.keys() != {"up", "down"}:
        raise MalformedAdapterError(f"{file.path}: {where}: has only {next(iter(slots))}")
    down, up = (factor(file, slots[slot], n_dims=(2, 4)) for slot in ("down", "up"))
    rank = int(down.shape[0])
    told = file.metadata.get(f"{where}:rank")
    if told is not None and told != str(rank):
        raise MalformedAdapterError(f"{file.path}: {where}: its factors have rank {rank}, the header says {told[:20]}")
    scale = _SCALE
    if options.alpha is not None:
        scale = Scale(factor=Fraction(options.alpha) / rank, source=f"--alpha {options.alpha:g} / r {rank}")
    return ModuleUpdate(
        target=where,
        update=low_rank(file, where, down, up, scale),
        keys=(slots["up"], slots["down"]),
    )
