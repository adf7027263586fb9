"""How bare factors lie: (r, in) and (out, r), or the other way round; stacked (merged layers); unrolled (convolutions).

Promise: a layout is taken because the shapes allow no other, or because it is the documented one and the other could
not be meant; else the user is asked.
Source: loralib 0.1.2, ``layers.py`` (Linear, Embedding, MergedLinear, ConvLoRA).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lora_deploy.adapter import Orientation
from lora_deploy.adapters.interface import AdapterFile
from lora_deploy.adapters.merged_linear import dense_factors
from lora_deploy.errors import AmbiguousAdapterFormatError, MalformedAdapterError
from lora_deploy.tensors import Region

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LaidOut:
    """Factors in the layout of an update, and what is known about the tensor they change."""

    down: Tensor
    """(n, n_cols)."""
    up: Tensor
    """(n_rows, n)."""
    rank: int
    """The r that alpha is divided by: not always n."""
    orientation: Orientation
    region: Region | None = None


def lay_out(
    file: AdapterFile,
    module: str,
    first: Tensor,
    second: Tensor,
    weight: Shape | None,
    enable_lora: tuple[bool, ...] | None,
) -> LaidOut:
    """Lay out ``lora_A`` and ``lora_B`` of a linear layer or an embedding; ``weight`` is its shape if the file has it.

    Raises:
        MalformedAdapterError: They fit in no way.
        AmbiguousAdapterFormatError: They fit in several, or the parts of a merged layer are not known.
    """
    if enable_lora and _is_merged(first, second, weight, enable_lora):
        down, up = dense_factors(file, module, first, second, enable_lora)
        pairs, rank = [(down, up)], int(second.shape[1])
    else:
        pairs = _pairs(file, module, first, second)
        rank = int(pairs[0][0].shape[0])
    if weight is None:
        return _without_weight(file, module, pairs, rank)
    fitting = [pair for pair in pairs if _shape(pair) in {weight, weight[::-1]}]
    if not fitting:
        raise MalformedAdapterError(
            f"{file.path}: {module}: lora_A {tuple(first.shape)} and lora_B {tuple(second.shape)} "
            f"do not fit the weight {weight} beside them"
        )
    if len(fitting) > 1:
        raise _ambiguous(file, module, fitting)
    down, up = fitting[0]
    rank = rank if len(pairs) == 1 else int(down.shape[0])
    if _shape(fitting[0]) != weight:  # an embedding, or a layer stored as (in, out)
        return LaidOut(down=up.T, up=down.T, rank=rank, orientation=Orientation.STORED)
    is_square = weight[0] == weight[1]
    orientation = Orientation.UNKNOWN if is_square else Orientation.STORED
    return LaidOut(down=down, up=up, rank=rank, orientation=orientation)


def lay_out_convolution(file: AdapterFile, module: str, down: Tensor, up: Tensor, weight: Shape) -> LaidOut:
    """Lay out loralib's convolution: B·A has the weight's elements in their order, k rows for each output channel.

    Shapes: down (r * k, in * k), up (out / groups * k, r * k), weight (out, in / groups, k, k).

    Raises:
        MalformedAdapterError: The factors do not have as many elements as the weight, or no whole rank.
    """
    kernel = weight[-1]
    n_elements = up.shape[0] * down.shape[1]
    if down.shape[0] != up.shape[1] or n_elements != math.prod(weight) or down.shape[0] % kernel:
        raise MalformedAdapterError(
            f"{file.path}: {module}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} are not "
            f"(r * k, in * k) and (out / groups * k, r * k) of the convolution {weight} beside them"
        )
    return LaidOut(
        down=down,
        up=up,
        rank=down.shape[0] // kernel,
        orientation=Orientation.STORED,
        region=Region(offset=0, n_rows=up.shape[0], n_cols=down.shape[1]),
    )


def _is_merged(first: Tensor, second: Tensor, weight: Shape | None, enable_lora: tuple[bool, ...]) -> bool:
    """Whether factors are stacked for the enabled parts; one part alone looks like a plain layer without its weight."""
    if first.shape[0] != second.shape[1] * sum(enable_lora):
        return False
    n_out = second.shape[0] // max(sum(enable_lora), 1) * len(enable_lora)
    return weight is None or n_out in weight


def _pairs(file: AdapterFile, module: str, first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    """List (down, up) for each layout that the shapes allow: as documented first, then (in, r) and (r, out)."""
    pairs = []
    if first.shape[0] == second.shape[1]:
        pairs.append((first, second))
    if first.shape[1] == second.shape[0]:
        pairs.append((first.T, second.T))
    if pairs and not (len(pairs) == 1 and _is_swollen(pairs[0])):
        return pairs
    n_enabled, rest = divmod(first.shape[0], second.shape[1])
    if n_enabled > 1 and not rest and second.shape[0] % n_enabled == 0:
        raise AmbiguousAdapterFormatError(
            f"{file.path}: {module}: lora_A {tuple(first.shape)} holds {n_enabled} factors of rank {second.shape[1]}: "
            f"a merged linear layer (loralib), {n_enabled} parts of it adapted",
            hint="say which parts, as it was trained: --enable-lora T,F,T for query and value of a fused q, k, v",
            code="enable-lora-needed",
        )
    if pairs:
        return pairs
    raise MalformedAdapterError(
        f"{file.path}: {module}: lora_A {tuple(first.shape)} and lora_B {tuple(second.shape)} share no rank"
    )


def _without_weight(file: AdapterFile, module: str, pairs: list[tuple[Tensor, Tensor]], rank: int) -> LaidOut:
    """Choose a layout by the shapes of the factors alone: a rank larger than both sides was not meant."""
    sound = [pair for pair in pairs if not _is_swollen(pair)] or pairs
    if len(sound) > 1:
        raise _ambiguous(file, module, sound)
    down, up = sound[0]
    rank = rank if len(pairs) == 1 else int(down.shape[0])
    return LaidOut(down=down, up=up, rank=rank, orientation=Orientation.UNKNOWN)


def _is_swollen(pair: tuple[Tensor, Tensor]) -> bool:
    down, up = pair
    return int(down.shape[0]) > max(_shape((down, up)))


def _shape(pair: tuple[Tensor, Tensor]) -> Shape:
    down, up = pair
    return int(up.shape[0]), int(down.shape[1])


def _ambiguous(file: AdapterFile, module: str, pairs: list[tuple[Tensor, Tensor]]) -> AmbiguousAdapterFormatError:
    ways = " or ".join(f"{shape[0]}×{shape[1]}" for shape in map(_shape, pairs))
    return AmbiguousAdapterFormatError(
        f"{file.path}: {module}: its square factors give an update of {ways} either way round",
        hint="write an adapter_config.json and PEFT's names: X.lora_A.weight (r, in), X.lora_B.weight (out, r)",
    )
