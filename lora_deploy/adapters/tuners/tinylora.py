"""TINYLORA: a frozen pair of factors around a small matrix that a shared vector v puts together: Δ = B·(Σ v_u·P_u)·A.

Groups of layers share a v; which group a layer is in depends on its number among all adapted layers, in the order of
the model's modules. A saved P tells the number: it was drawn from a seed plus that number, so drawing all of them again
shows which it is. Without P the order comes from the base's class and P is drawn again; what torch draws for a seed may
change between its releases: the release is told.

Definition: B·(Σ v_u·P_u) in float64; the product with A is then a low-rank update like any other.
Source: TinyLoRA, arXiv:2602.04118; peft 0.21.2, ``tuners/tinylora/layer.py`` and ``model.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from lora_deploy.adapter import Layer, ModelWide, ModuleUpdate
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank

_UNSCALED = Scale(factor=Fraction(1), source="TinyLoRA has no scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyLora:
    """Reads the modules of one file."""

    modules: tuple[Adapted, ...]
    n_vectors: int
    """Size u of each v."""
    weight_tying: float
    """[0..1]: 0 gives each layer a v of its own, 1 gives one to all."""
    seed: int

    def read(self) -> tuple[Iterable[ModuleUpdate], ModelWide | None]:
        """Read all modules; those whose numbers only the base tells wait for it.

        Raises:
            MalformedAdapterError: Tensors that do not fit each other or the configuration.
        """
        self._check_groups()
        numbers = self._numbers_by_projection()
        if numbers is not None:
            return [self._module(module, numbers[module.path]) for module in self.modules], None
        vector = self.modules[0].factor("tinylora_v.0", self.n_vectors)
        return (), ModelWide(
            kind=LowRank.kind,
            dtype=str(vector.dtype).removeprefix("torch."),
            keys=tuple(key for module in self.modules for key in module.slots.values()),
            paths={module.path: (module.factor("tinylora_B", None, None).shape[0], None) for module in self.modules},
            needs_order=True,
            reason="its vectors belong to layers by their number in the model",
            updates=partial(_in_order, self),
        )

    def module(self, module: Adapted, number: int) -> ModuleUpdate:
        """Make the update of the layer of this number."""
        return self._module(module, number)

    @property
    def n_groups(self) -> int:
        """How many vectors there are."""
        return max(1, round(len(self.modules) * (1.0 - self.weight_tying)))

    def _check_groups(self) -> None:
        held = sum(name.startswith("tinylora_v.") for name in self.modules[0].shared)
        if held != self._n_used:
            raise self.modules[0].malformed(
                f"the file holds {held} vectors tinylora_v, weight_tying {self.weight_tying:g} of {len(self.modules)} "
                f"layers needs {self._n_used}"
            )

    @property
    def _n_used(self) -> int:
        return 1 + max(self._group(number) for number in range(len(self.modules)))

    def _group(self, number: int) -> int:
        size = max(1, len(self.modules) // self.n_groups)
        return min(number // size, self.n_groups - 1)

    def _module(self, module: Adapted, number: int) -> ModuleUpdate:
        down = module.factor("tinylora_A", None, None)
        rank = down.shape[0]
        up = module.factor("tinylora_B", None, rank)
        slot = f"tinylora_v.{self._group(number)}"
        vector = module.factor(slot, self.n_vectors)
        projections = self._projections(module, number, rank).to(torch.float64)
        middle = torch.einsum("u,ujk->jk", vector.to(torch.float64), projections)
        update = LowRank(down=down, up=up.to(torch.float64) @ middle, scale=_UNSCALED)
        return module.update(update)

    def _projections(self, module: Adapted, number: int, rank: int) -> Tensor:
        if "tinylora_P" in module.slots:
            return module.factor("tinylora_P", self.n_vectors, rank, rank)
        return draw(self.seed + number, self.n_vectors, rank)

    def _numbers_by_projection(self) -> Mapping[str, int] | None:
        """Number layers by the P that they hold; None where it is not saved, or is none that this torch draws."""
        if self.n_groups == 1 and all("tinylora_P" in module.slots for module in self.modules):
            return {module.path: 0 for module in self.modules}  # no number matters
        drawn: dict[tuple[int, torch.dtype], dict[bytes, int]] = {}
        numbers = {}
        for module in self.modules:
            if "tinylora_P" not in module.slots:
                return None
            found = module.factor("tinylora_P", self.n_vectors, None, None)
            rank = int(found.shape[1])
            if (rank, found.dtype) not in drawn:
                drawn[rank, found.dtype] = {
                    _bytes(draw(self.seed + number, self.n_vectors, rank).to(found.dtype)): number
                    for number in range(len(self.modules))
                }
            number = drawn[rank, found.dtype].get(_bytes(found))
            if number is None:
                return None
            numbers[module.path] = number
        return numbers if len({*numbers.values()}) == len(self.modules) else None


def draw(seed: int, n_vectors: int, rank: int) -> Tensor:
    """Draw the P of a layer as PEFT does: (u, r, r) float32, from torch's generator of the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.normal(mean=0.0, std=1.0 / (rank**0.5), size=(n_vectors, rank, rank), generator=generator)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _in_order(reading: TinyLora, layers: Sequence[Layer]) -> Iterator[ModuleUpdate]:
    modules = {module.path: module for module in reading.modules}
    if len(layers) != len(modules):
        raise UnmergeableAdapterError(f"the file adapts {len(modules)} layers, the base has {len(layers)} of them")
    return (reading.module(modules[layer.path], number) for number, layer in enumerate(layers))


class TinyLoraConfig(TunerConfig):
    """Configuration of TINYLORA."""

    r: int = Field(default=2, gt=0)
    u: int = Field(default=64, gt=0)
    weight_tying: float = Field(default=0.0, ge=0, le=1)
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float | None = None


def _read(modules: Sequence[Adapted], config: TinyLoraConfig) -> Reading:
    reading = TinyLora(
        modules=tuple(modules), n_vectors=config.u, weight_tying=config.weight_tying, seed=config.projection_seed
    )
    updates, wide = reading.read()
    is_drawn = any("tinylora_P" not in module.slots for module in modules)
    told = f"projections drawn again with torch {torch.__version__}, projection_seed {config.projection_seed}"
    return Reading(updates=updates, model_wide=wide, notes=(told,) if is_drawn else ())


TUNER = Tuner(
    peft_type="TINYLORA",
    config=TinyLoraConfig,
    slots=(("tinylora_[ABP]", ""),),
    shared=(("tinylora_v", r"\.\d+"),),
    read=_read,
)
