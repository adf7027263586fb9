"""Levels 1 and 2 of the exact merge as one compiled pass over memory, for 16-bit results of large merges on a CPU.

Promise: the same bytes as without it (``exact`` is the definition's home); it only decides what its bounds prove, and
leaves everything else, true ties above all, open. Needs numba (the extra ``fast``); nothing else knows that package.

Level 1 evaluates v = Σ s·up·down + W in float32, in groups of four products, and rounds |v| - e and |v| + e. With
n = ⌈R/4⌉ groups, a product passes at most n + 3 roundings and its two factors one each, so that the sum misses less
than (n + 5)·u·‖s·up row‖·‖down column‖, u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1;
Cauchy and Schwarz bound Σ|s·up||down|). Adding W and forming the ends cost u·|v| each. So
e = (n + 6)·u·‖s·up row‖·‖down column‖ + 2.5·u·|v| has room for its own rounding and for second order; what underflows
is less than the floors of ``single`` allow for.

Level 2 evaluates what is open in float64 with the bound of ``exact`` and compares it with the boundary between the two
candidates.

The loops are written so that LLVM turns them into vector code: unsigned indices (no wrap-around), few arrays each,
integers narrowed after every operation, blocks of columns that stay in the first-level cache.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from lora_deploy.merge.single import BLOCK_COLS

BLOCK_ROWS = 64
"""Rows that share a block of columns of the down factors while it lies in the cache."""

HALF, BRAIN, SINGLE = 0, 1, 2
"""How numbers are stored: float16, bfloat16, float32."""

_UNIT = 2.0**-24
_I, _U16, _U32, _F32 = np.uint64, np.uint16, np.uint32, np.float32
_B = _I(BLOCK_COLS)

_compiled = njit(nogil=True, cache=True, boundscheck=False, error_model="numpy", fastmath={"contract"})
_inlined = njit(boundscheck=False, error_model="numpy")


@_inlined
def _half_value(bits):
    """The float32 that float16 bits of a number store."""
    size = _F32(_U32(_U32(bits & _U32(0x7FFF)) << _U32(13)).view(np.float32) * _F32(2.0**112))
    return _U32(size.view(np.uint32) | _U32(_U32(bits & _U32(0x8000)) << _U32(16))).view(np.float32)


@_compiled
def _widen_brain(stored, at, wide, n):
    bits = wide.view(np.uint32)
    for c in range(n):
        bits[_I(c)] = _U32(_U32(stored[at + _I(c)]) << _U32(16))


@_compiled
def _widen_half(stored, at, wide, n):
    for c in range(n):
        bits = _U32(stored[at + _I(c)])
        value = _half_value(bits)
        wide[_I(c)] = _F32(np.inf) if _U32(bits & _U32(0x7C00)) == _U32(0x7C00) else value


@_compiled
def _widen_single(stored, at, wide, n):
    bits = wide.view(np.uint32)
    for c in range(n):
        bits[_I(c)] = stored[at + _I(c)]


@_compiled
def _start(values, right, n, a0, a1, a2, a3):
    for c in range(n):
        u = _I(c)
        values[u] = a0 * right[u] + a1 * right[_B + u] + a2 * right[_I(2) * _B + u] + a3 * right[_I(3) * _B + u]


@_compiled
def _add(values, right, first, n, a0, a1, a2, a3):
    for c in range(n):
        u, at = _I(c), first + _I(c)
        values[u] += a0 * right[at] + a1 * right[_B + at] + a2 * right[_I(2) * _B + at] + a3 * right[_I(3) * _B + at]


@_compiled
def _round_to_brain(values, wide, sums, merged, at, n, error, col_norms):
    """Write the rounded values of one row; whether some stay open.

    Lanes of ``sums``: not 0 where open, Σ(stored - v)², ΣW², largest size as bits. What becomes 0 stays open.
    The two ends round alike when no boundary lies between them; a real value is never at an end.
    """
    found = _U32(0)
    lanes = sums.view(np.uint32)
    for c in range(n):
        u = _I(c)
        weight = wide[u]
        value = _F32(values[u] + weight)
        size = abs(value)
        reach = _F32(error * col_norms[u] + _F32(2.5 * _UNIT) * size)
        low = _U32(_F32(max(_F32(size - reach), _F32(0))).view(np.uint32) + _U32(0x7FFF))
        differing = _U32(low ^ _U32(_F32(size + reach).view(np.uint32) + _U32(0x8000)))
        bits = _U32(low >> _U32(16))
        is_open = _U32(differing >> _U32(16)) if bits != _U32(0) else _U32(1)
        lanes[u] = is_open
        found = _U32(found | is_open)
        merged[at + u] = _U16(bits | _U32(_U32(value.view(np.uint32) >> _U32(16)) & _U32(0x8000)))
        missed = _U32(bits << _U32(16)).view(np.float32) - size
        sums[_B + u] += missed * missed
        sums[_I(2) * _B + u] += weight * weight
        lanes[_I(3) * _B + u] = max(lanes[_I(3) * _B + u], bits)
    return found != _U32(0)


@_compiled
def _round_to_half(values, wide, sums, merged, at, n, error, col_norms):
    """As ``_round_to_brain``. Adding a power of two that makes the unit of the sum that of float16 rounds to it."""
    found = _U32(0)
    lanes = sums.view(np.uint32)
    for c in range(n):
        u = _I(c)
        weight = wide[u]
        value = _F32(values[u] + weight)
        size = abs(value)
        reach = _F32(error * col_norms[u] + _F32(2.5 * _UNIT) * size)
        low = _F32(max(_F32(size - reach), _F32(0)))
        exponent = _U32(_U32(max(low.view(np.uint32), _U32(0x38800000))) & _U32(0x7F800000))
        shift = _U32(exponent + _U32(13 << 23)).view(np.float32)
        moved = _F32(low + shift)
        differing = _U32(moved.view(np.uint32) ^ _F32(_F32(size + reach) + shift).view(np.uint32))
        rounded = _F32(moved - shift)
        bits = _U32(min(_U32(_F32(rounded * _F32(2.0**-112)).view(np.uint32) >> _U32(13)), _U32(0x7C00)))
        is_open = differing if bits != _U32(0) else _U32(1)
        lanes[u] = is_open
        found = _U32(found | is_open)
        merged[at + u] = _U16(bits | _U32(_U32(value.view(np.uint32) >> _U32(16)) & _U32(0x8000)))
        missed = rounded - size
        sums[_B + u] += missed * missed
        sums[_I(2) * _B + u] += weight * weight
        lanes[_I(3) * _B + u] = max(lanes[_I(3) * _B + u], bits)
    return found != _U32(0)


@_compiled
def _touch(stored):
    """Read rows once from end to end, which memory does quickly, before they are read in blocks. Gives 0."""
    found = 0
    for k in range(0, len(stored), 64 // stored.itemsize):
        found |= stored[k]
    return found & 0


@_compiled
def _settle(value, bound, merged_as):
    """Level 2: the bits of the 16-bit number that every real within ``bound`` of ``value`` rounds to, or -1.

    The candidates are the 16-bit numbers on both sides, the boundary between them is half way.
    """
    if value == 0.0 and bound == 0.0:
        return 0  # an exact sum of 0 has no sign
    size = abs(value)
    lowest, largest = (2.0**-100, 2.0**120) if merged_as == BRAIN else (2.0**-60, 65504.0)
    if not (lowest < size < largest and bound <= 2.0**-27 * size):
        return -1
    single = _F32(size)
    if merged_as == BRAIN:
        low = np.int64(_U32(single.view(np.uint32) - _U32(1)) >> _U32(16))
        below = np.float64(_U32(low << 16).view(np.float32))
        above = np.float64(_U32((low + 1) << 16).view(np.float32))
    else:
        scaled = _F32(_F32(_U32(single.view(np.uint32) - _U32(1)).view(np.float32)) * _F32(2.0**-112))
        low = np.int64(scaled.view(np.uint32) >> _U32(13))
        below, above = np.float64(_half_value(_U32(low))), np.float64(_half_value(_U32(low + 1)))
    boundary = (below + above) / 2
    sign = 0x8000 if value < 0 else 0
    if size + bound < boundary and size - bound > below:
        return low | sign
    if size - bound > boundary and size + bound < above:
        return (low + 1) | sign
    return -1


@_compiled
def _settle_row(
    i, first, n, wide, lanes, merged, merged_as, wide_left, wide_columns, unit, rests, open_at, open_values
):
    """Level 2 for one row of a block. Of ``rests``: open so far, largest settled size, settled underflows."""
    n_cols = len(wide_columns)
    pairs = lanes[:BLOCK_COLS].view(np.uint64)
    for group in range(0, n, 16):
        found = _I(0)
        for k in range(8):
            found |= pairs[_I(group >> 1) + _I(k)]
        if found == _I(0):
            continue
        for c in range(group, min(group + 16, n)):
            if lanes[c] == _U32(0):
                continue
            col = first + c
            weight = np.float64(wide[c])
            v0, v1, v2, v3 = weight, 0.0, 0.0, 0.0
            s0, s1, s2, s3 = abs(weight), 0.0, 0.0, 0.0
            for r in range(0, wide_left.shape[1], 4):
                p0, p1 = wide_left[i, r] * wide_columns[col, r], wide_left[i, r + 1] * wide_columns[col, r + 1]
                p2, p3 = wide_left[i, r + 2] * wide_columns[col, r + 2], wide_left[i, r + 3] * wide_columns[col, r + 3]
                v0, v1, v2, v3 = v0 + p0, v1 + p1, v2 + p2, v3 + p3
                s0, s1, s2, s3 = s0 + abs(p0), s1 + abs(p1), s2 + abs(p2), s3 + abs(p3)
            value, size = (v0 + v1) + (v2 + v3), (s0 + s1) + (s2 + s3)
            at = i * n_cols + col
            settled = _settle(value, unit * size, merged_as)
            if settled >= 0:
                merged[at] = settled
                rests[1] = max(rests[1], settled & 0x7FFF)
                rests[2] += (settled & 0x7FFF) == 0 and value != 0.0
            else:
                if rests[0] < len(open_at):
                    open_at[rests[0]] = at
                    open_values[rests[0]] = value
                rests[0] += 1


@_compiled
def merge_block(
    stored,
    stored_as,
    merged,
    merged_as,
    left,
    right,
    row_errors,
    col_norms,
    wide_left,
    wide_columns,
    unit,
    open_at,
    open_values,
):
    """Merge rows of a region; flat positions and float64 values of what stays open go to the last two arguments.

    Shapes: stored and merged (n·n_cols,) bits; the factors and their bounds as in ``SingleFactors``, those of rows cut
    to the n rows; open_at (k,) int64, open_values (k,) float64. ``unit`` is ``Factors.unit``.

    Returns:
        Number of open elements, also of those that there was no room for; Σ(stored - exact)²; ΣW²; bits of the largest
        settled size; number of settled elements that underflowed.
    """
    n_rows, n_cols = len(row_errors), len(col_norms)
    padded_rank = left.shape[1]
    values, wide = np.empty(BLOCK_COLS, np.float32), np.empty(BLOCK_COLS, np.float32)
    sums = np.zeros(4 * BLOCK_COLS, np.float32)
    lanes = sums.view(np.uint32)
    rests = np.zeros(3, np.int64)
    error_square, weight_square = 0.0, 0.0
    for top in range(0, n_rows, BLOCK_ROWS):
        bottom = min(top + BLOCK_ROWS, n_rows)
        rests[2] += _touch(stored[top * n_cols : bottom * n_cols])
        for first in range(0, n_cols, BLOCK_COLS):
            n = min(BLOCK_COLS, n_cols - first)
            block = right[first // BLOCK_COLS]
            norms = col_norms[first : first + n]
            for i in range(top, bottom):
                at = _I(i * n_cols + first)
                if stored_as == BRAIN:
                    _widen_brain(stored, at, wide, n)
                elif stored_as == HALF:
                    _widen_half(stored, at, wide, n)
                else:
                    _widen_single(stored, at, wide, n)
                _start(values, block, n, left[i, 0], left[i, 1], left[i, 2], left[i, 3])
                for r in range(4, padded_rank, 4):
                    _add(
                        values, block, _I(r * BLOCK_COLS), n, left[i, r], left[i, r + 1], left[i, r + 2], left[i, r + 3]
                    )
                if merged_as == BRAIN:
                    has_open = _round_to_brain(values, wide, sums, merged, at, n, row_errors[i], norms)
                else:
                    has_open = _round_to_half(values, wide, sums, merged, at, n, row_errors[i], norms)
                if has_open:
                    _settle_row(
                        i,
                        first,
                        n,
                        wide,
                        lanes,
                        merged,
                        merged_as,
                        wide_left,
                        wide_columns,
                        unit,
                        rests,
                        open_at,
                        open_values,
                    )
        for c in range(BLOCK_COLS):  # often, so that float32 sums stay short
            error_square += sums[BLOCK_COLS + c]
            weight_square += sums[2 * BLOCK_COLS + c]
            rests[1] = max(rests[1], np.int64(lanes[3 * BLOCK_COLS + c]))
        sums[BLOCK_COLS:] = 0
    return rests[0], error_square, weight_square, rests[1], rests[2]
