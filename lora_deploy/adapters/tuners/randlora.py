"""RANDLORA: full-rank sums of random bases that all layers share.

Without the saved bases the adapter is refused: PEFT draws them in bfloat16 or float16, whichever the machine has.
Source: RandLoRA, arXiv:2502.00987; peft 0.21.2, ``tuners/randlora/model.py`` and ``layer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from lora_deploy.updates.random_bases import RandomBases


def read_module(module: Adapted, *, rank: int, alpha: float) -> ModuleUpdate:
    """Make the update of one module; its larger side only the base tells.

    Raises:
        MalformedAdapterError: λ, γ and the bases do not fit each other.
    """
    sizes = module.factor("randlora_lambda", rank, None)
    n_bases = sizes.shape[1]
    widths = module.factor("randlora_gamma", n_bases, None)
    n_short = widths.shape[1]
    down = module.factor("randlora_A", rank, 1, None)
    up = module.factor("randlora_B", None, None, rank)
    if down.shape[2] < n_short or up.shape[1] < n_bases:
        raise module.malformed(
            f"the shared bases are {tuple(down.shape)} and {tuple(up.shape)}, its own are {n_bases} of {n_short}"
        )
    scale = Scale(factor=Fraction(alpha) / rank, source=f"randlora_alpha {alpha} / r {rank}")
    make = partial(_bases, down[:, 0, :n_short], up[:, :n_bases], sizes, widths, scale)
    return module.update(Shapeless(kind=RandomBases.kind, known=(None, None), make=make, tensors=(sizes, widths)))


def _bases(down: Tensor, up: Tensor, sizes: Tensor, widths: Tensor, scale: Scale, n_out: int, n_in: int) -> RandomBases:
    n_long, n_short = max(n_out, n_in), min(n_out, n_in)
    if n_short != down.shape[1] or n_long > len(up):
        raise UnmergeableAdapterError(
            f"update is of a layer with a smaller side of {down.shape[1]} and a larger of at most {len(up)}, "
            f"base is (out, in) = ({n_out}, {n_in})"
        )
    return RandomBases(
        shared_up=up[:n_long],
        shared_down=down,
        sizes=sizes,
        widths=widths,
        is_turned=n_short != n_in,
        scale=scale,
    )


class RandLoraConfig(TunerConfig):
    """Configuration of RANDLORA."""

    r: int = Field(default=32, gt=0)
    randlora_alpha: Number = Field(default=640, allow_inf_nan=False)
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False


def _read(modules: Sequence[Adapted], config: RandLoraConfig) -> Reading:
    if "randlora_A" not in modules[0].shared:
        raise UnmergeableAdapterError(
            f"{modules[0].file.path}: the random bases are not in the file: PEFT draws them in bfloat16 or float16, "
            "whichever the machine that trained has",
            hint="load it where it was trained and save it with save_projection=True",
        )
    return Reading(updates=[read_module(module, rank=config.r, alpha=config.randlora_alpha) for module in modules])


TUNER = Tuner(
    peft_type="RANDLORA",
    config=RandLoraConfig,
    slots=(("randlora_(lambda|gamma)", ""),),
    shared=(("randlora_[AB]", ""),),
    copies={("randlora_[AB]", ""): "a copy of the shared random bases"},
    read=_read,
)
