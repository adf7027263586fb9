"""Small unsigned integers in a stream of bits that 32-bit words hold, lowest bit first."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def fields(words: Tensor, bits: int) -> Tensor:
    """Take the fields of a stream of bits, lowest first, that runs down the columns: (words, n) to (fields, n)."""
    stream = words.contiguous()
    if bits == 3:
        return _three_bit_fields(stream)
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32)
    values = (stream[:, None, :] >> shifts[:, None]) & ((1 << bits) - 1)
    return values.to(torch.uint8).reshape(-1, words.shape[1])


def _three_bit_fields(words: Tensor) -> Tensor:
    """Three words hold 32 fields, two of which cross from one word to the next."""
    three = (words.long() & 0xFFFFFFFF).reshape(-1, 3, 1, words.shape[1])
    starts = torch.arange(0, 3 * WORD_BITS, 3)
    word, shift = starts // WORD_BITS, starts % WORD_BITS
    beyond = torch.where(shift > WORD_BITS - 3, word + 1, word).clamp(max=2)
    low = three[:, word, 0] >> shift[:, None]
    high = torch.where((beyond != word)[:, None], three[:, beyond, 0] << (WORD_BITS - shift)[:, None], 0)
    return ((low | high) & 7).to(torch.uint8).reshape(-1, words.shape[1])
