"""GGUF as a container of adapter tensors: read through the ``gguf`` package, unpacked where they are quantised.

Promise: values are those of the package's reference dequantisation; 16-bit and 32-bit floats keep their format.
Source: gguf 0.19, ``gguf_reader.py`` and ``quants.py``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_deploy.adapters.containers import one_line
from lora_deploy.errors import InputError, MalformedAdapterError

MAGIC = b"GGUF"
_MAX_KEPT = 32
"""Elements of a metadata array that are kept: adapters carry short ones, bases their whole vocabulary."""
_INSTALL_HINT = "pip install gguf"


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every tensor, in NumPy's order of axes, and the metadata as text.

    Raises:
        MalformedAdapterError: Damaged, or quantised in a way that the package does not know.
        InputError: The package gguf is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"{path}: reading a GGUF adapter needs gguf: not installed", hint=_INSTALL_HINT, code="extra-missing"
        )
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: _text(field.contents()) for name, field in reader.fields.items()}
        tensors = {str(tensor.name): _tensor(gguf, tensor) for tensor in reader.tensors}
    except Exception as error:
        raise MalformedAdapterError(f"{path}: not a readable GGUF file: {one_line(error)[:200]}") from error
    return tensors, metadata


def _tensor(gguf: Any, tensor: Any) -> Tensor:  # noqa: ANN401 - a package without types
    shape = tuple(int(size) for size in reversed(tensor.shape))
    kinds = gguf.GGMLQuantizationType
    if tensor.tensor_type == kinds.BF16:
        raw = np.ascontiguousarray(tensor.data).view(np.uint16).reshape(shape)
        return torch.from_numpy(raw.copy()).view(torch.bfloat16)
    if tensor.tensor_type in {kinds.F32, kinds.F16, kinds.F64}:
        return torch.from_numpy(np.array(tensor.data)).reshape(shape)
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))).reshape(shape)


def _text(value: Any) -> str:  # noqa: ANN401 - a field holds a number, a text or a list of them
    return str(value[:_MAX_KEPT]) if isinstance(value, list) else str(value)
