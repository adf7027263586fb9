"""An adapter as read from its file: updates in the file's own terms, before any base is known.

Promise: every tensor of the file is in the ``keys`` of exactly one update or copy of the base's, or it is counted by a
finding that says why it is not.
What only the base can tell stays explicit: ``Orientation.UNKNOWN``, ``Naming``, ``Experts``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
class ModuleUpdate:
    """One update and the tensor that it is meant for."""

    target: str
    """Tensor name in the file's naming, such as ``model.layers.0.mlp.up_proj.weight`` (the module's path for
    ``Experts``); after binding, the name in the merged checkpoint."""
    update: Update | Experts
    orientation: Orientation = Orientation.UNKNOWN
    region: Region | None = None
    """Part of the tensor; None is the whole. Filled in by binding."""
    keys: tuple[str, ...]
    """Where in the adapter file it was read."""
    adapter_index: int = 0
    """Position of its adapter on the command line, from 0."""


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
    findings: tuple[Finding, ...] = ()
    sha256: str
    """Of the weights file."""
    config_sha256: str | None = None
    """Of the configuration beside it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The configuration as read, for the record and for what only the base can resolve."""
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
