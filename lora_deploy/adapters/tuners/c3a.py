"""C3A: block-circulant differences, divided by the number of inputs.

Source: C3A, arXiv:2407.19342; peft 0.21.2, ``tuners/c3a/layer.py``, ``get_delta_weight``.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.updates.circulant import Circulant
from lora_deploy.updates.interface import Scale


def read_module(module: Adapted) -> ModuleUpdate:
    """Make the update of one module.

    Raises:
        MalformedAdapterError: No kernel of three axes.
    """
    kernel = module.factor("c3a_kernel", None, None, None)
    n_in = kernel.shape[1] * kernel.shape[2]
    scale = Scale(factor=Fraction(1, n_in), source=f"1 / {n_in} inputs")
    return module.update(Circulant(kernel=kernel, scale=scale))


class C3aConfig(TunerConfig):
    """Configuration of C3A; the kernel's last side is its block's size, whatever the pattern says."""

    block_size: int = 256
    block_size_pattern: dict[str, int] | None = None


def _read(modules: Sequence[Adapted], config: C3aConfig) -> Reading:
    del config
    return Reading(updates=[read_module(module) for module in modules])


TUNER = Tuner(peft_type="C3A", config=C3aConfig, slots=(("c3a_kernel", ""),), read=_read)
