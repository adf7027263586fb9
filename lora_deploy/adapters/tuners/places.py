"""SHIRA and SUPERTUNING: trained differences of a few elements of the weight, whose places are in the file.

Super-Tuning's hybrid form trains a low-rank pair besides. Without its places it is refused: they are the largest
weights of the layer, in an order that equal weights leave open, and values belong to places by that order.
Source: SHiRA, arXiv:2406.13175; Super-Tuning, arXiv:2607.09287; peft 0.21.2, ``tuners/shira/layer.py`` and
``tuners/supertuning/layer.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial

from pydantic import Field
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.configuration import Number
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.sparse import Sparse

_UNSCALED = Scale(factor=Fraction(1), source="values are added as they are")
_ANYWHERE = 2**31


def read_shira(module: Adapted) -> ModuleUpdate:
    """Make the SHiRA update of one module; its size only the base tells.

    Raises:
        MalformedAdapterError: Values and places are not as many.
    """
    values = module.factor("shira_weight", None)
    indices = module.integers("shira_indices", 2, len(values), below=_ANYWHERE)
    make = partial(_by_row_and_column, indices, values)
    return module.update(Shapeless(kind=Sparse.kind, known=(None, None), make=make, tensors=(values,)))


def read_supertuning(module: Adapted, *, rank: int | None, alpha: float | None) -> Iterator[ModuleUpdate]:
    """Make the Super-Tuning updates of one module; its size only the base tells, unless it is hybrid.

    Raises:
        MalformedAdapterError: Its tensors do not fit each other or the configuration.
    """
    values = module.factor("supertuning_values", None)
    flat = module.integers("supertuning_indices", len(values), below=_ANYWHERE)
    hybrid = {slot: key for slot, key in module.slots.items() if "_lora_" in slot}
    known: tuple[int | None, int | None] = (None, None)
    if bool(hybrid) != (rank is not None):
        raise module.malformed(f"has {', '.join(module.slots)}, the configuration's r is {rank}")
    if rank is not None:
        down = module.factor("supertuning_lora_A.weight", rank, None)
        up = module.factor("supertuning_lora_B.weight", None, rank)
        known = (up.shape[0], down.shape[1])
        if alpha is None:
            raise module.malformed("the configuration has an r but no lora_alpha")
        scale = Scale(factor=Fraction(alpha) / rank, source=f"lora_alpha {alpha} / r {rank}")
        yield module.update(LowRank(down=down, up=up, scale=scale), keys=tuple(hybrid.values()))
    make = partial(_by_position, flat, values)
    yield module.update(
        Shapeless(kind=Sparse.kind, known=known, make=make, tensors=(values,)),
        keys=[key for slot, key in module.slots.items() if slot not in hybrid],
    )


def _by_row_and_column(indices: Tensor, values: Tensor, n_out: int, n_in: int) -> Sparse:
    row, column = indices
    if int(row.max()) >= n_out or int(column.max()) >= n_in:
        last = (int(row.max()), int(column.max()))
        raise UnmergeableAdapterError(f"update has places up to {last}, base is (out, in) = ({n_out}, {n_in})")
    return Sparse.at(row, column, values, (n_out, n_in), _UNSCALED)


def _by_position(flat: Tensor, values: Tensor, n_out: int, n_in: int) -> Sparse:
    if int(flat.max()) >= n_out * n_in:
        raise UnmergeableAdapterError(f"update has places up to {int(flat.max())}, base has {n_out * n_in} elements")
    return Sparse.at(flat // n_in, flat % n_in, values, (n_out, n_in), _UNSCALED)


class ShiraConfig(TunerConfig):
    """Configuration of SHIRA; the tensors say all."""

    r: int = 32
    mask_type: str | None = None
    random_seed: int | None = None


class SupertuningConfig(TunerConfig):
    """Configuration of SUPERTUNING."""

    r: int | None = Field(default=None, gt=0)
    lora_alpha: Number | None = Field(default=None, allow_inf_nan=False)
    sparsity: float | None = None
    select_top: bool = True
    save_precomputed_indices: bool = True


def _read_shira(modules: Sequence[Adapted], config: ShiraConfig) -> Reading:
    del config
    return Reading(updates=[read_shira(module) for module in modules])


def _read_supertuning(modules: Sequence[Adapted], config: SupertuningConfig) -> Reading:
    lost = next((module for module in modules if "supertuning_indices" not in module.slots), None)
    if lost is not None:
        raise UnmergeableAdapterError(
            f"{lost.file.path}: {lost.path}: the places of its values are not in the file: they are the largest "
            "weights, in an order that equal weights leave open",
            hint="load it with its base and save it with save_precomputed_indices=True",
        )
    return Reading(
        updates=[
            update for module in modules for update in read_supertuning(module, rank=config.r, alpha=config.lora_alpha)
        ]
    )


SHIRA = Tuner(peft_type="SHIRA", config=ShiraConfig, slots=(("shira_(weight|indices)", ""),), read=_read_shira)
SUPERTUNING = Tuner(
    peft_type="SUPERTUNING",
    config=SupertuningConfig,
    slots=(("supertuning_(values|indices)", ""), ("supertuning_lora_[AB]", r"\.weight")),
    read=_read_supertuning,
)
