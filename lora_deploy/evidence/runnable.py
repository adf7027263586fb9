"""What is loaded and run to compare outputs: a model of transformers, or a component of a diffusion pipeline.

Promise: a runnable is told in one word (``spec``), so that a process of its own loads and runs the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from lora_deploy.evidence.forward import run_probes
from lora_deploy.evidence.loading import load_model
from lora_deploy.evidence.probe import Probe


class Runnable(Protocol):
    """A kind of model."""

    @property
    def spec(self) -> str:
        """Say what it is, in one word."""
        ...

    def load(self, folder: Path, **settings: object) -> tuple[nn.Module, frozenset[str]]:
        """Load a folder in float32; give the model with the names of parameters that the folder does not hold.

        Raises:
            EvidenceError: Its library does not load it.
        """
        ...

    def run(self, model: nn.Module, probes: Sequence[Probe], *, greedy: bool = True) -> dict[str, dict[str, Tensor]]:
        """Run probes; give rows (n, width) float32 by probe and output.

        Raises:
            EvidenceError: The model does not take a probe.
        """
        ...


@dataclass(frozen=True, slots=True)
class WholeModel:
    """A class of transformers by its name."""

    spec: str

    def load(self, folder: Path, **settings: object) -> tuple[nn.Module, frozenset[str]]:
        """See the protocol."""
        return load_model(folder, self.spec, **settings)

    def run(self, model: nn.Module, probes: Sequence[Probe], *, greedy: bool = True) -> dict[str, dict[str, Tensor]]:
        """See the protocol."""
        return run_probes(model, probes, greedy=greedy)


def runnable_of(spec: str) -> Runnable:
    """Give what a spec says."""
    from lora_deploy.evidence.component import MARK, Component

    return Component.of(spec) if MARK in spec else WholeModel(spec)
