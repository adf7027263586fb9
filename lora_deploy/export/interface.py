"""What a graph maker is: it draws the graph of a base twice, with two sets of weights that have nothing in common.

A maker is one module here and one line in ``GRAPH_MAKERS``. It knows nothing of adapters, caches, binding or files of
ours: it is given two folders that look like the base and differ in every floating weight, and gives graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_deploy.errors import Finding
from lora_deploy.tensors import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphTask:
    """A graph that is wanted."""

    checkpoints: tuple[Path, Path]
    """Two folders with configuration and weights of the base's names, shapes and dtypes, all values different."""
    dtype: DType
    """What the graph computes in."""
    provider: str
    """``cpu`` or ``cuda``."""
    is_stored: bool
    """Whether weights keep the layout that the checkpoint stores them in: nothing is transposed or packed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawing:
    """One graph with one set of weights in it."""

    component: str
    """Such as ``model``, ``prefill`` or ``decode``; its file is ``<component>.onnx``, or ``model.onnx`` in a folder."""
    seed: int
    """Which checkpoint its weights are of: 0 or 1."""
    model: Any
    """An ``onnx_ir.Model`` whose initializers have values."""
    metadata: Mapping[str, Any]
    """JSON that the runtime's loader wants to know about this component."""
    findings: tuple[Finding, ...] = ()
    folder: str = ""
    """Folder within the export that the graph and its weights go to; empty is the export's own."""

    @property
    def file(self) -> str:
        """Where the graph goes, relative to the export."""
        return f"{self.folder}/model.onnx" if self.folder else f"{self.component}.onnx"


class GraphMaker(Protocol):
    """Makes graphs with one library."""

    name: str
    packages: tuple[str, ...]
    """What decides the graph: their versions are part of its identity."""

    def draw(self, task: GraphTask) -> Iterator[Drawing]:
        """Draw every component, with seed 0 and then with seed 1.

        A drawing is valid until the next is asked for: its values may be changed in place.

        Raises:
            ExportError: The architecture is unknown to the library, or it cannot make the graph.
        """
        ...

    def companions(self, task: GraphTask) -> Mapping[str, bytes]:
        """Other files that belong to the graph, by name; known once everything was drawn."""
        ...

    def settled(
        self, companions: Mapping[str, bytes], config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> Mapping[str, bytes]:
        """Those files as they are for one model: ``config.json`` and ``generation_config.json`` are given."""
        ...
