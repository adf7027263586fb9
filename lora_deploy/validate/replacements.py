"""Whole tensors that an adapter brings: heads the base lacks, resized vocabularies, and copies of the base itself.

They come before everything else, since they decide the shapes that the other updates must fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_deploy.adapter import Adapter
from lora_deploy.names import vocabulary_names
from lora_deploy.updates.replacement import Replacement
from lora_deploy.validate.base import Base
from lora_deploy.validate.findings import Findings
from lora_deploy.validate.placement import Placed

_LABEL_HEAD = re.compile(
    r"^(score|classifier|classifier\.out_proj|classification_head\.out_proj|logits_proj|classifier\.dense_out)"
    r"\.(weight|bias)$"
)


@dataclass(slots=True)
class Replaced:
    """What replacements make of the base's shapes and configuration."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of replaced and added tensors."""
    added: list[str] = field(default_factory=list)
    config_edits: dict[str, Any] = field(default_factory=dict)


def apply_replacements(
    placed: Sequence[Placed], adapters: Sequence[Adapter], base: Base, findings: Findings
) -> tuple[list[Placed], Replaced]:
    """Check replacements against the base, and give each the base's number of axes."""
    kept: list[Placed] = []
    replaced = Replaced()
    for item in placed:
        update, part = item.module_update.update, item.part
        if not isinstance(update, Replacement) or part.region is not None or part.rows is not None:
            kept.append(item)
            continue
        squeezed = _squeezed(item, update, base)
        if _note_shape(squeezed, replaced, base, findings):
            kept.append(squeezed)
    _check_vocabulary(replaced, base, findings)
    _label_edits(replaced, base)
    if replaced.added:
        replaced.config_edits |= _architecture_edit(adapters, base.config)
    return kept, replaced


def _squeezed(item: Placed, update: Replacement, base: Base) -> Placed:
    """Give a 1x1 kernel the shape of the linear layer that the base has in its place, and the reverse."""
    spec = base.spec(item.part.tensor)
    shape = tuple(update.values.shape)
    if spec is None or shape == spec.shape or len(shape) == len(spec.shape):
        return item
    if [n for n in shape if n != 1] != [n for n in spec.shape if n != 1] or math.prod(shape) != spec.n_elements:
        return item
    reshaped = replace(update, values=update.values.reshape(spec.shape))
    return replace(item, module_update=replace(item.module_update, update=reshaped))


def _note_shape(item: Placed, replaced: Replaced, base: Base, findings: Findings) -> bool:
    """Note what a replacement does to its tensor; False if it does not fit."""
    update, name, keys = item.module_update.update, item.part.tensor, item.module_update.keys
    assert isinstance(update, Replacement)  # noqa: S101 - filtered by the caller
    shape = tuple(update.values.shape)
    spec = base.spec(name)
    if replaced.shapes.get(name, shape) != shape:
        message = f"two adapters replace it by different shapes, {replaced.shapes[name]} and {shape}"
        findings.error("replaced-twice", name, message, keys)
        return False
    if spec is not None and shape != spec.shape:
        is_row_count = shape[1:] == spec.shape[1:] and len(shape) == len(spec.shape)
        if not (is_row_count and (_LABEL_HEAD.match(base.index.canonical(name)) or _is_vocabulary(name, base))):
            findings.error("shape-mismatch", name, f"replacement is {shape}, base is {tuple(spec.shape)}", keys)
            return False
    if name not in replaced.shapes and spec is None:
        replaced.added.append(name)
        findings.note("tensor-added", name, f"not in base: the adapter brings it, {shape}", keys)
    elif name not in replaced.shapes and spec is not None and shape != spec.shape:
        findings.note("tensor-resized", name, f"{spec.shape[0]} rows become {shape[0]}", keys)
    replaced.shapes[name] = shape
    return True


def _is_vocabulary(name: str, base: Base) -> bool:
    return name in vocabulary_names(base.index, base.specs) or name not in base.specs


def _check_vocabulary(replaced: Replaced, base: Base, findings: Findings) -> None:
    """Every tensor with one row a token must be resized alike; shared ones follow the tensor they share."""
    names = vocabulary_names(base.index, base.specs)
    resized = {n: s for n, s in replaced.shapes.items() if n in names and s != base.specs[n].shape}
    for name, shape in resized.items():
        old = base.specs[name].shape[0]
        shared = {tie.member for tie in base.ties if tie.source == name and base.is_shared(tie)}
        for other in names:
            rows = max(replaced.shapes.get(other, base.specs[other].shape))
            is_sibling = old in base.specs[other].shape and other not in shared
            if is_sibling and rows != shape[0] and shape[0] not in replaced.shapes.get(other, base.specs[other].shape):
                findings.error(
                    "vocabulary-mismatch",
                    other,
                    f"the adapter resizes {name} from {old} to {shape[0]} rows and does not hold this",
                )
        replaced.config_edits |= _vocabulary_edits(base.config, old, shape[0])


def _vocabulary_edits(config: Mapping[str, Any], old: int, new: int, prefix: str = "") -> dict[str, int]:
    edits = {}
    for key, value in config.items():
        if key == "vocab_size" and value == old:
            edits[prefix + key] = new
        elif isinstance(value, Mapping):
            edits |= _vocabulary_edits(value, old, new, f"{prefix}{key}.")
    if not prefix and not edits and "vocab_size" in config:
        edits["vocab_size"] = new  # the embedding was padded: the configuration named fewer rows
    return edits


def _label_edits(replaced: Replaced, base: Base) -> None:
    for name, shape in replaced.shapes.items():
        match = _LABEL_HEAD.match(base.index.canonical(name))
        if match and match[2] == "weight" and len(shape) == 2:
            n_labels, known = shape[0], base.config.get("id2label")
            if n_labels != (len(known) if isinstance(known, Mapping) else 2):
                labels = [f"LABEL_{k}" for k in range(n_labels)]
                replaced.config_edits["id2label"] = {str(k): label for k, label in enumerate(labels)}
                replaced.config_edits["label2id"] = {label: k for k, label in enumerate(labels)}
                if "num_labels" in base.config:
                    replaced.config_edits["num_labels"] = n_labels


_TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_CLASS = re.compile(r"^(?P<model>\w+?)(?:For[A-Z]\w+|LMHeadModel|DoubleHeadsModel|Model)$")


def _architecture_edit(adapters: Iterable[Adapter], config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name the class that the added head belongs to, where adapter and base tell."""
    architectures = config.get("architectures") or [""]
    for adapter in adapters:
        mapping = adapter.config.get("auto_mapping")
        named = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
        suffix = _TASK_CLASSES.get(str(adapter.config.get("task_type")))
        match = _CLASS.match(str(architectures[0]))
        wanted = named or (match["model"] + suffix if match and suffix else None)
        if wanted and wanted not in architectures:
            return {"architectures": [str(wanted)]}
    return {}
