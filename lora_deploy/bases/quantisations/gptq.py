"""GPTQ: integers of 2, 3, 4 or 8 bits in int32 words along the inputs, with a scale and a zero point for each group.

Values are scale · (q − zero). Version 1 of the format stores zero − 1, version 2 the zero itself. Version 1 cannot say
0: where it stores all ones, kernels disagree on what is meant, so that is refused.

Source: AutoGPTQ 0.7, ``nn_modules/qlinear/qlinear_cuda_old.py`` (``pack``, ``forward``); GPTQModel,
``utils/model.py`` (``convert_gptq_v1_to_v2_format_module``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_deploy.bases.quantisations.bits import WORD_BITS, fields
from lora_deploy.bases.quantisations.interface import PackedTensor, Rows, Unpacking, expect_shape, mapped, not_known
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import MalformedCheckpointError

_BITS = (2, 3, 4, 8)


def unpack(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Unpacking:
    """Find packed linear layers by their ``qweight``."""
    form = settings.get("checkpoint_format") or ("marlin" if settings.get("is_marlin_format") else "gptq")
    if form not in ("gptq", "gptq_v2"):
        not_known(checkpoint, f"GPTQ in the layout {form!r}, not gptq or gptq_v2")
    if str(settings.get("pack_dtype") or "int32") != "int32":
        not_known(checkpoint, f"GPTQ packed in {settings['pack_dtype']}, not int32")
    modules = [name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")]
    return Unpacking(
        tensors=tuple(_packed(checkpoint, module, settings, is_first=form == "gptq") for module in modules)
    )


def _packed(checkpoint: Checkpoint, module: str, settings: Mapping[str, Any], *, is_first: bool) -> PackedTensor:
    keys = [f"{module}.qweight", f"{module}.qzeros", f"{module}.scales"]
    words, zero_words, scales = (mapped(checkpoint, key) for key in keys)
    if {words.ndim, zero_words.ndim, scales.ndim} != {2} or {words.dtype, zero_words.dtype} != {torch.int32}:
        raise MalformedCheckpointError(f"{keys[0]}: a packed layer has int32 matrices, found {tuple(words.shape)} …")
    n_groups, n_out = scales.shape
    bits = zero_words.shape[1] * WORD_BITS // n_out if n_out else 0
    declared = settings.get("bits")
    if bits not in _BITS or not (bits == declared or settings.get("dynamic")):
        not_known(checkpoint, f"{module}: GPTQ of {bits} bits by its shapes, of {declared} by its configuration")
    expect_shape(keys[1], zero_words, (n_groups, n_out * bits // WORD_BITS))
    n_in = words.shape[0] * WORD_BITS // bits
    expect_shape(keys[0], words, (n_in * bits // WORD_BITS, n_out))
    groups, index_keys = _groups(checkpoint, module, settings, n_in, n_groups)
    if is_first and (_zeros(zero_words, bits) == (1 << bits) - 1).any():
        not_known(checkpoint, f"{keys[1]}: a zero point that version 1 of GPTQ cannot say (all ones are stored)")

    def prepare() -> Rows:
        zeros = _zeros(zero_words, bits) + int(is_first)

        def rows(start: int, stop: int) -> Tensor:
            """Columns of the words are rows of the weight; an 11-bit scale times a 9-bit integer is exact."""
            codes = fields(words[:, start:stop], bits).int()
            return ((codes - zeros[groups, start:stop]) * scales[groups, start:stop].double()).T

        return rows

    return PackedTensor(name=f"{module}.weight", shape=(n_out, n_in), keys=(*keys, *index_keys), prepare=prepare)


def _zeros(words: Tensor, bits: int) -> Tensor:
    """Zero points as stored, (groups, out) int32."""
    return fields(words.T, bits).T.int()


def _groups(
    checkpoint: Checkpoint, module: str, settings: Mapping[str, Any], n_in: int, n_groups: int
) -> tuple[Tensor, list[str]]:
    """Give the group of each input, (in,), and the key that says so where there is one."""
    name = f"{module}.g_idx"
    if name in checkpoint.tensors:
        groups = expect_shape(name, mapped(checkpoint, name), (n_in,)).int()
        if n_in and not 0 <= int(groups.min()) <= int(groups.max()) < n_groups:
            raise MalformedCheckpointError(f"{name}: names a group beyond the {n_groups} that have scales")
        return groups, [name]
    if settings.get("desc_act"):
        not_known(checkpoint, f"{module}: GPTQ with act-order (desc_act) and no g_idx that says which group is whose")
    size = settings.get("group_size")
    size = n_in if size in (None, -1) and n_groups == 1 else size
    if type(size) is not int or size < 1 or -(-n_in // size) != n_groups:
        raise MalformedCheckpointError(
            f"{module}.scales: {n_groups} groups for {n_in} inputs, the configuration says {size} a group"
        )
    return torch.arange(n_in, dtype=torch.int32) // size, []
