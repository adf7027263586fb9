"""AWQ: integers of 4 bits in int32 words along the outputs, interleaved, with a scale and a zero point for each group.

Values are scale · (q − zero). The halves of bytes of a word hold the outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight.

Source: AutoAWQ 0.2, ``modules/linear/gemm.py`` (``WQLinear_GEMM.from_linear``) and ``utils/packing_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_deploy.bases.quantisations.interface import PackedTensor, Unpacking, expect_shape, mapped, not_known
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import MalformedCheckpointError

_BITS = 4
_PER_WORD = 8
_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of a word's eight outputs, the one that its k-th four bits hold, lowest first."""
_LAYOUTS = frozenset({"gemm", "exllama"})
"""Versions that are one layout in the file; ``exllama`` names a kernel."""


def unpack(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Unpacking:
    """Find packed linear layers by their ``qweight``."""
    bits = settings.get("bits", settings.get("w_bit"))
    if bits != _BITS:
        not_known(checkpoint, f"AWQ of {bits} bits, not {_BITS}")
    layout = str(settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm")
    if layout.casefold() not in _LAYOUTS:
        not_known(checkpoint, f"AWQ in the layout {layout!r}, not gemm")
    if settings.get("zero_point", True) is not True:
        not_known(checkpoint, "AWQ without zero points")
    modules = [name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")]
    return Unpacking(tensors=tuple(_packed(checkpoint, module, settings) for module in modules))


def _packed(checkpoint: Checkpoint, module: str, settings: Mapping[str, Any]) -> PackedTensor:
    keys = (f"{module}.qweight", f"{module}.qzeros", f"{module}.scales")
    words, zero_words, scales = (mapped(checkpoint, key) for key in keys)
    if {words.ndim, zero_words.ndim, scales.ndim} != {2} or {words.dtype, zero_words.dtype} != {torch.int32}:
        raise MalformedCheckpointError(f"{keys[0]}: a packed layer has int32 matrices, found {tuple(words.shape)} …")
    (n_in, n_words), n_groups = words.shape, scales.shape[0]
    expect_shape(keys[1], zero_words, (n_groups, n_words))
    expect_shape(keys[2], scales, (n_groups, n_words * _PER_WORD))
    size = settings.get("group_size", settings.get("q_group_size"))
    size = n_in if size in (None, -1) and n_groups == 1 else size
    if type(size) is not int or size < 1 or size * n_groups != n_in:
        raise MalformedCheckpointError(
            f"{keys[2]}: {n_groups} groups for {n_in} inputs, the configuration says {size} a group"
        )

    def rows(start: int, stop: int) -> Tensor:
        """Columns of the words are outputs; an 11-bit scale times a 5-bit integer is exact."""
        first = start // _PER_WORD
        within = slice(start - first * _PER_WORD, stop - first * _PER_WORD)
        columns = slice(first, -(-stop // _PER_WORD))
        codes, zeros = (_outputs(packed[:, columns])[:, within] for packed in (words, zero_words))
        of_groups = scales[:, start:stop].double()[:, None]
        values = (codes.reshape(n_groups, size, -1) - zeros[:, None]) * of_groups
        return values.reshape(n_in, -1).T

    return PackedTensor(name=f"{module}.weight", shape=(n_words * _PER_WORD, n_in), keys=keys, prepare=lambda: rows)


def _outputs(words: Tensor) -> Tensor:
    """Take words apart, outputs in their order: (n, words) to (n, 8 · words) int32."""
    shifts = torch.tensor([_OUTPUTS.index(output) * _BITS for output in range(_PER_WORD)], dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & 15).reshape(words.shape[0], -1)
