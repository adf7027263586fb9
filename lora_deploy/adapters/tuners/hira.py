"""HIRA: every element of the weight multiplied with 1 plus a low-rank matrix: ``W' = W ⊙ (1 + B·A)``, without a scale.

Source: HiRA, ICLR 2025; peft 0.21.2, ``tuners/hira/layer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from lora_deploy.adapter import ModuleUpdate, Orientation
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.factors import factor
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.updates.hadamard import Pair
from lora_deploy.updates.modulation import Modulation


class HiraConfig(TunerConfig):
    """Configuration of HIRA; a module's rank is that of its tensors."""

    r: int = Field(default=32, gt=0)
    rank_pattern: dict[str, int] | None = None


def read_module(module: Adapted) -> ModuleUpdate:
    """Make the update of one module.

    Raises:
        MalformedAdapterError: Its factors do not fit each other.
    """
    if "hira_embedding_A" in module.slots:
        down, up = module.factor("hira_embedding_A", None, None), module.factor("hira_embedding_B", None, None)
        update = Modulation(pair=_pair(module, down, up).transposed())
        return module.update(update, orientation=Orientation.STORED)
    if not {"hira_A", "hira_B"} <= {*module.slots}:
        raise module.malformed(f"has {', '.join(module.slots)}, expected hira_A and hira_B")
    down, up = (factor(module.file, module.slots[slot], n_dims=(2, 3, 4, 5)) for slot in ("hira_A", "hira_B"))
    if up.flatten(1).shape[1] != up.shape[1]:
        raise module.malformed(f"hira_B has shape {tuple(up.shape)}, expected (out, r, *1)")
    orientation = Orientation.STORED if down.ndim > 2 else Orientation.UNKNOWN
    update = Modulation(pair=_pair(module, down.flatten(1), up.flatten(1)))
    return module.update(update, orientation=orientation)


def _pair(module: Adapted, down: object, up: object) -> Pair:
    pair = Pair(up=up, down=down)  # type: ignore[arg-type]
    if pair.up.shape[1] != pair.down.shape[0]:
        raise module.malformed(f"A is {tuple(pair.down.shape)}, B is {tuple(pair.up.shape)}: the ranks differ")
    return pair


def _read(modules: Sequence[Adapted], config: HiraConfig) -> Reading:
    del config
    return Reading(updates=[read_module(module) for module in modules])


TUNER = Tuner(peft_type="HIRA", config=HiraConfig, slots=((r"hira_(embedding_)?[AB]", ""),), read=_read)
