"""What the user may choose about evidence. No tensor library is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_deploy.evidence.verdict import Check


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """Which checks are made, and how."""

    only: tuple[Check, ...] = ()
    """Checks to make; empty means all."""
    skip: tuple[Check, ...] = ()
    """Checks to leave out."""
    probes: Path | None = None
    """JSON lines with prompts, token ids, images or sounds, fed beside the random inputs."""
    layerwise: bool = False
    """Compare outputs layer by layer even where the whole model fits into memory."""
    base_graph: Path | None = None
    """Folder with the same export of the base, to compare the merged graphs with."""
    provider: str = "cpu"
    """Where graphs run: an execution provider of onnxruntime, by its short name."""
    latency_bound: float = 0.03
    """How far a ratio of times may be from 1 and still be called equal."""
    seconds: float = 60.0
    """How long latency may be measured."""

    def includes(self, check: Check) -> bool:
        """Whether a check is to be made."""
        return (not self.only or check in self.only) and check not in self.skip
