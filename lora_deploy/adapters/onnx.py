"""Adapters as ONNX Runtime switches them: a value for each LoRA input of a graph, and nothing else.

    <module>.lora_A…  (in, r)     <module>.lora_B…  (r, out)     delta = (A·B)^T, the scale is part of B

``.onnx_adapter`` files come from Olive and from this program's own ``export --multi-lora``, ``.npz`` files from ONNX
Runtime GenAI's model builder. Names are those of the graph's inputs: this program's are the base's; the builder says
``attn`` for every attention, and which one it is only the base can tell.
Source: onnxruntime 1.32; olive 0.9, ``passes/onnx``; onnxruntime-genai 0.18, ``models/builder.py``.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import ClassVar

from lora_deploy.adapter import Adapter, ModuleUpdate
from lora_deploy.adapters.factors import factor, low_rank
from lora_deploy.adapters.findings import untrained
from lora_deploy.adapters.interface import AdapterFile, Container, ReadOptions
from lora_deploy.errors import MalformedAdapterError, RecipeError, UnmergeableAdapterError
from lora_deploy.updates.interface import Scale

_INPUT = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?P<side>[AB])(?:\.(?P<name>(?!weight$|quant\b)\w+))?(?:\.weight)?$"
)
_QUANTISED = re.compile(r"\.lora_[AB]\..*\b(quant|qweight|scales?|zero_points?)\b")
_SCALE = Scale(factor=Fraction(1), source="1: alpha / r is part of lora_B (ONNX Runtime)")
_BUILDERS_ATTENTION = re.compile(r"(?<=\.)attn(?=\.)")


class OnnxReader:
    """Reads adapters that ONNX Runtime loads."""

    format = "onnx"
    containers: ClassVar[frozenset[Container]] = frozenset({"onnx_adapter", "npz"})

    def recognises(self, file: AdapterFile) -> bool:
        """Whether the container is ONNX Runtime's own, or its inputs' names are."""
        return file.container == "onnx_adapter" or any(_INPUT.match(key) for key in file.tensors)

    def read(self, file: AdapterFile, options: ReadOptions) -> Adapter:
        """Turn the file into updates.

        Raises:
            MalformedAdapterError: A name that is no LoRA input, one without its other, or factors that do not fit.
            UnmergeableAdapterError: Quantised factors.
            RecipeError: An alpha, which is part of the factors already.
        """
        if options.alpha is not None:
            raise RecipeError(
                f"--alpha: alpha / r is part of the factors of {file.path.name} already",
                hint="leave it out; --weight scales an adapter as a whole",
            )
        updates = tuple(_update(file, module, *sides) for module, sides in _modules(file).items())
        return Adapter(
            path=file.path,
            name=file.name,
            format=self.format,
            updates=updates,
            findings=tuple(untrained(updates)),
            sha256=file.sha256,
        )


READER = OnnxReader()


def _modules(file: AdapterFile) -> dict[str, tuple[str, str]]:
    """Keys of A and B by module."""
    found: dict[str, dict[str, str]] = {}
    for key in file.tensors:
        if _QUANTISED.search(key):
            raise UnmergeableAdapterError(
                f"{file.path}: {key}: quantised factors, which only their graph can multiply",
                hint="export the adapter without quantisation",
            )
        match = _INPUT.match(key)
        if match is None:
            raise MalformedAdapterError(f"{file.path}: {key}: is no input of a LoRA branch: ….lora_A… or ….lora_B…")
        sides = found.setdefault(match["module"], {})
        if match["side"] in sides:
            raise MalformedAdapterError(f"{file.path}: {sides[match['side']]} and {key} both are one input")
        sides[match["side"]] = key
    for module, sides in found.items():
        if sides.keys() != {"A", "B"}:
            raise MalformedAdapterError(f"{file.path}: {module}: has only lora_{next(iter(sides))}")
    return {module: (sides["A"], sides["B"]) for module, sides in found.items()}


def _update(file: AdapterFile, module: str, down_key: str, up_key: str) -> ModuleUpdate:
    down, up = (factor(file, key, n_dims=(2,)) for key in (down_key, up_key))
    target = f"{module}.weight"
    return ModuleUpdate(
        target=target,
        update=low_rank(file, module, down.T, up.T, _SCALE),
        alternatives=(other,) if (other := _BUILDERS_ATTENTION.sub("self_attn", target)) != target else (),
        keys=(down_key, up_key),
    )
