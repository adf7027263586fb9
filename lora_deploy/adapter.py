"""An adapter as read from its file: updates in the file's own terms, before any base is known.

Promise: every tensor of the file is in the ``keys`` of an update or copy of the base's (of one for each part, where one
tensor holds several), or of ``ModelWide``, or it is one that the updates of all modules share, or it is counted by a
finding that says why it is not.
What only the base can tell stays explicit: ``Orientation.UNKNOWN``, ``Naming``, ``RowOrder``, ``Experts``,
``Shapeless``, ``OfWeight``, ``ModelWide``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lora_deploy.errors import Finding
from lora_deploy.tensors import Region
from lora_deploy.updates.interface import Scale, Update
from lora_deploy.updates.low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor


class Naming(StrEnum):
    """How the file names modules."""

    DOTTED = "dotted"
    """Module paths of the in-memory model."""
    FLATTENED = "flattened"
    """Module paths with every dot replaced by an underscore."""
    POSITIONAL = "positional"
    """No names, only an order."""


class Orientation(StrEnum):
    """Whether an update is already laid out as the base stores the tensor."""

    STORED = "stored"
    """Layout fixed by the format (embeddings, replacements)."""
    UNKNOWN = "unknown"
    """Laid out as the module computes, (out, in); a Conv1D base stores (in, out)."""


class RowOrder(StrEnum):
    """In which order the rows of a query or key projection lie; only the base says how many heads they are."""

    STORED = "stored"
    """As the base stores them."""
    PAIRED = "paired"
    """The two rows that a rotary embedding turns together lie side by side: row 2i with 2i + 1 of each head, where
    transformers has i with i + half. llama.cpp and Meta."""
    TORCHTUNE = "torchtune"
    """Paired for the families that torchtune trains like that; Qwen2 and Phi it keeps as transformers has them."""
    TORCHTUNE_EXPORT = "torchtune-export"
    """torchtune 0.6's file under PEFT's names: the rows of B unpaired whatever the family, magnitudes as trained."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experts:
    """Low-rank factors of one parameter of a module that holds a stack of experts; only the base says which parameter.

    Source: peft 0.21.2, ``tuners/lora/layer.py``, ``ParamWrapper``.
    """

    down: Tensor
    """(rank * n_experts, in), expert-major."""
    up: Tensor
    """(out, rank * n_experts), rank-major: column r * n_experts + e."""
    nesting: int
    """How many ``base_layer`` the key carries: the first registered adapted parameter has the most, the last has 0."""
    scales: Mapping[str, Scale]
    """Scale by parameter name, for every parameter that the configuration adapts in this module, in its own order."""
    ranks: Mapping[str, int]
    """Configured rank by parameter name."""

    def n_experts(self, parameter: str) -> int:
        """Experts in the stack, given which parameter it is."""
        return int(self.down.shape[0]) // self.ranks[parameter]

    def expert(self, parameter: str, e: int) -> LowRank:
        """Low-rank update of expert ``e`` in the layout (out, in)."""
        rank, n_experts = self.ranks[parameter], self.n_experts(parameter)
        down = self.down.reshape(n_experts, rank, -1)[e]
        up = self.up.reshape(-1, rank, n_experts)[:, :, e]
        return LowRank(down=down, up=up, scale=self.scales[parameter])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shapeless:
    """An update that layers of several sizes could have: the sides that its file does not show are the base's."""

    kind: str
    """Name in ``KINDS`` of what it becomes."""
    known: tuple[int | None, int | None]
    """(out, in) as far as the file shows them."""
    make: Callable[[int, int], Update]
    """Gives the update of a layer (out, in), or raises ``UnmergeableAdapterError`` where it cannot be one's."""
    tensors: tuple[Tensor, ...]
    """Trained tensors of the file that it is made of."""
    takes_kernels: bool = False
    """Whether it may be one of a convolution, whose kernel then counts with its inputs."""
    kernel_caveat: str = ""
    """What is to be known where that kernel is larger than 1."""
    weight: float = 1.0

    def weighted(self, weight: float) -> Self:
        """Multiply what it becomes by a weight; whether its kind can be weighted is said by ``shaped``."""
        return replace(self, weight=self.weight * weight)

    def shaped(self, n_out: int, n_in: int) -> Update:
        """Give the update of a layer of this size, in the layout (out, in).

        Raises:
            UnmergeableAdapterError: It is none of such a layer, or its kind cannot have its weight.
        """
        return self.make(n_out, n_in).weighted(self.weight)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OfWeight:
    """An update of a bias that the module's weight takes part in, multiplied by a column of the file."""

    kind: str
    """Name in ``KINDS`` of what it becomes."""
    weight: str
    """Tensor name of the weight in the file's naming."""
    column: Tensor | None
    """(in,), any floating dtype; None is a column of zeros."""
    make: Callable[[Tensor], Update]
    """Gives the update for the product of weight and column, (out,) float64."""
    times: float = 1.0
    """Weight of its adapter."""

    def weighted(self, weight: float) -> Self:
        """Multiply what it becomes by a weight."""
        return replace(self, times=self.times * weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer of the base, as a module of the file's naming computes with it."""

    path: str
    n_out: int
    n_in: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelWide:
    """Updates that depend on all adapted layers of the model: on the largest of them, or on their order."""

    kind: str
    """Name in ``KINDS`` of what they become."""
    dtype: str
    """Of the trained tensors, such as ``float32``."""
    keys: tuple[str, ...]
    """Where in the adapter file they were read."""
    paths: Mapping[str, tuple[int | None, int | None]]
    """Modules that they adapt, and (out, in) of each as far as the file shows them."""
    is_target: Callable[[str], bool] | None = None
    """Says which modules they adapt where the file names none."""
    needs_order: bool
    """Whether they depend on the order in which the model's class creates its modules."""
    reason: str
    """Why, for a person: ``its indices are numbered through all layers``."""
    updates: Callable[[Sequence[Layer]], Iterable[ModuleUpdate]]
    """Gives them, for all adapted layers; in order where it matters. Raises ``UnmergeableAdapterError``."""

    def keys_of(self, path: str) -> tuple[str, ...]:
        """Give the keys that belong to one module; all where the file names none."""
        own = tuple(key for key in self.keys if f".{path}." in f".{key}")
        return own or self.keys


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModuleUpdate:
    """One update and the tensor that it is meant for."""

    target: str
    """Tensor name in the file's naming, such as ``model.layers.0.mlp.up_proj.weight`` (the module's path for
    ``Experts``); after binding, the name in the merged checkpoint."""
    update: Update | Experts | Shapeless | OfWeight
    orientation: Orientation = Orientation.UNKNOWN
    alternatives: tuple[str, ...] = ()
    """Other names that the base may have the tensor under: it has one of all, or the name is not found or ambiguous."""
    components: tuple[str, ...] = ()
    """Components of a pipeline that it may be of: the first that the pipeline has; empty where the file says none."""
    row_order: RowOrder = RowOrder.STORED
    region: Region | None = None
    """Part of the tensor; None is the whole. Filled in by binding."""
    keys: tuple[str, ...]
    """Where in the adapter file it was read."""
    adapter_index: int = 0
    """Position of its adapter on the command line, from 0."""
    method: str = ""
    """What its trainer calls it, such as LoKr; empty where one file has one method."""
    is_optional: bool = False
    """Whether it is left out where the base has no such tensor: a bias that changes with its weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseHint:
    """Which base the adapter says it was trained on."""

    name: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """Everything that one adapter changes, read and checked against its own format."""

    path: Path
    """The weights file."""
    name: str
    """For messages and for the default output folder."""
    format: str
    """Its name in ``READERS``."""
    naming: Naming = Naming.DOTTED
    base_hint: BaseHint = BaseHint()
    updates: tuple[ModuleUpdate, ...]
    model_wide: ModelWide | None = None
    """Further updates, which only the whole model tells."""
    findings: tuple[Finding, ...] = ()
    sha256: str
    """Of the weights file."""
    config_sha256: str | None = None
    """Of the configuration beside it."""
    config_name: str = "adapter_config.json"
    """What that is called."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The configuration as read, for the record and for what only the base can resolve."""
    trained_with: str | None = None
    """What the file says of its training, for a person: network, dimension, alpha, base."""
    shares_ties: bool = False
    """Whether training changed both sides of tied tensors where it names one (the head multiplies by the embedding)."""
    scales_bias: bool = False
    """Whether training multiplied the bias of a DoRA layer by m / ‖V‖, too, as PEFT does not."""
    layer_replication: tuple[tuple[int, int], ...] = ()
    """Ranges of base layers, end excluded, that the trained model concatenates."""
    base_copies: tuple[ModuleUpdate, ...] = ()
    """Copies of base tensors below a change that the file also holds, as replacements. They are the base's own values
    unless their shape says otherwise: with more rows than the base has (a resized vocabulary) they come first and the
    change goes on top."""

    @property
    def base_names(self) -> frozenset[str]:
        """Names of base tensors that the same file carries (a full state dict with LoRA parameters in it)."""
        return frozenset(copy.target for copy in self.base_copies)
