"""IA3: rows or columns of the weight multiplied by trained numbers; of rows, the bias too.

``W' = l ⊙ W``: a feed-forward module has l (1, in), which multiplies inputs, any other (out, 1), which multiplies
outputs. Convolutions have (1, n, 1, …) either way, and only ``feedforward_modules`` tells which is meant: names are
compared by their ends, without regard to dots, as PEFT does.
Source: IA3, arXiv:2205.05638; peft 0.21.2, ``tuners/ia3/layer.py``; ``model.py``, ``_check_target_module_feedforward``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.factors import factor
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.rescaling import Rescaling

_SLOT = "ia3_l"


class Ia3Config(TunerConfig):
    """Configuration of IA3."""

    feedforward_modules: tuple[str, ...] | str | None = None
    init_ia3_weights: bool | None = None

    def is_feedforward(self, path: str) -> bool:
        """Whether a module's inputs are multiplied."""
        names = self.feedforward_modules
        if isinstance(names, str):
            return re.fullmatch(names, path) is not None
        return any(path.endswith(name) for name in names or ())


def read_module(module: Adapted, config: Ia3Config) -> Iterator[ModuleUpdate]:
    """Make the updates of one module: of its weight, and of its bias where outputs are multiplied.

    Raises:
        MalformedAdapterError: A vector of another shape than PEFT writes.
    """
    values = factor(module.file, module.slots[_SLOT], n_dims=(2, 3, 4, 5))
    sides = [k for k, size in enumerate(values.shape) if size != 1]
    if len(sides) > 1 or (values.ndim > 2 and sides not in ([], [1])):
        raise module.malformed(f"{_SLOT} has shape {tuple(values.shape)}, expected a vector")
    is_kernel = values.ndim > 2
    multiplies_inputs = config.is_feedforward(module.path) if is_kernel or not sides else sides == [1]
    vector = values.flatten()
    make = partial(_inputs if multiplies_inputs else _outputs, vector)
    known = (None, None if is_kernel else len(vector)) if multiplies_inputs else (len(vector), None)
    shapeless = Shapeless(kind=Rescaling.kind, known=known, make=make, tensors=(vector,), takes_kernels=is_kernel)
    yield module.update(shapeless)
    if not multiplies_inputs:
        bias = module.update(Rescaling(factors=vector, axis="rows", n_other=1))
        yield replace(bias, target=f"{module.path}.bias", is_optional=True)


def _outputs(vector: Tensor, n_out: int, n_in: int) -> Rescaling:
    assert n_out == len(vector)  # noqa: S101 - known from the file
    return Rescaling(factors=vector, axis="rows", n_other=n_in)


def _inputs(vector: Tensor, n_out: int, n_in: int) -> Rescaling:
    n_kernel, rest = divmod(n_in, len(vector))
    if rest:
        raise UnmergeableAdapterError(f"{len(vector)} inputs are multiplied, base has {n_in} columns, no multiple")
    return Rescaling(factors=vector.repeat_interleave(n_kernel), axis="columns", n_other=n_out)


def _read(modules: Sequence[Adapted], config: Ia3Config) -> Reading:
    return Reading(updates=[update for module in modules for update in read_module(module, config)])


TUNER = Tuner(peft_type="IA3", config=Ia3Config, slots=((_SLOT, ""),), read=_read)
