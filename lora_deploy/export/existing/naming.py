"""What an initializer's matrix is called in the model's checkpoint.

Its readers say: a node belongs to a module, and the module's parameter is meant. The initializer's own name counts
where the graph does not tell modules, or where the reader is a module around the parameter's own. It is not believed
against a reader: exporters merge equal tensors, and call what is left after one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_deploy.export.existing.uses import Layout, Use

_PARAMETER = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")
"""A dotted path; what exporters call values of their own (``val_74``, ``onnx::MatMul_7``) is none."""
_BUILDERS = re.compile(r"\.(?:MatMul|Add)\.(?=weight$|bias$)")
"""What onnxruntime-genai's builder puts between a module and its parameter."""
_TELLING = frozenset({Layout.UPRIGHT, Layout.TURNED})
"""Readers of a module's ``weight``; others may read anything of its module."""
_ENCODER = "encoder"
_BUILDERS_ATTENTION = re.compile(r"(?<=\.)attn(?=\.)")


class Namer:
    """Names the matrices of one graph."""

    def __init__(self, initializers: Iterable[str], part: str = "") -> None:
        """Look at all names: they tell onnxruntime-genai's builder, which has names of its own for attention.

        ``part`` is the module that the graph was exported from, where that is not the whole model.
        """
        self.is_builders = any(_BUILDERS.search(name) for name in initializers)
        self._prefix = f"{part}." if part else ""

    def names(self, initializer: str, uses: Sequence[Use]) -> dict[str, None]:
        """Give the checkpoint's names of an initializer, in the order of its uses; none where nothing tells."""
        own = self._own(initializer)
        leaf = own.rpartition(".")[2] if own else "weight"
        found: dict[str, None] = {}
        for use in uses:
            if own is not None and (use.module is None or _holds(use.module, own)):
                found[self._prefix + own] = None
            elif use.module is not None and (own is not None or use.layout in _TELLING):
                found[f"{self._prefix}{self._dialect(use.module)}.{leaf}"] = None
        return found

    def _own(self, initializer: str) -> str | None:
        if not _PARAMETER.fullmatch(initializer):
            return None
        name = _BUILDERS.sub(".", initializer)
        # What the builder does to norms (adding one, for some models) its names do not tell.
        if self.is_builders and name == initializer and "norm" in name:
            return None
        return self._dialect(name)

    def _dialect(self, name: str) -> str:
        return _BUILDERS_ATTENTION.sub("self_attn", name, count=1) if self.is_builders else name


def part_of(file: str, modules: Iterable[str], config: Mapping[str, Any]) -> str:
    """Name the part of the model that a graph is: of an encoder-decoder, the encoder is exported by itself."""
    is_encoder = bool(config.get("is_encoder_decoder")) and file.startswith(_ENCODER)
    return "" if not is_encoder or any(_ENCODER in module.split(".") for module in modules) else _ENCODER


def packed_names(name: str) -> tuple[str, str, str] | None:
    """Names of what a packed projection of queries, keys and values is made of."""
    if ".qkv_proj." not in name:
        return None
    first, second, third = (name.replace(".qkv_proj.", f".{part}_proj.") for part in "qkv")
    return first, second, third


def spell(names: Mapping[str, None] | Iterable[str]) -> str:
    """Write several names."""
    return " and ".join(names)


def _holds(module: str, parameter: str) -> bool:
    """Whether a parameter belongs to a module or to one inside it."""
    return parameter.startswith(f"{module}.")
