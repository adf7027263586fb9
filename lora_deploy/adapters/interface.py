"""What a reader of one adapter format offers, and the options that any of them may need. No tensor library is imported.

A reader turns a file into updates in the file's own terms; alpha, rank patterns and file quirks end there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from lora_deploy.adapter import Adapter

Container: TypeAlias = Literal["safetensors", "pickle", "npz", "gguf", "onnx_adapter"]
"""What kind of file holds an adapter's tensors."""
STATE_DICTS: frozenset[Container] = frozenset({"safetensors", "pickle"})
"""Containers of readers that name no ``containers`` of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What the user says because the file cannot."""

    alpha: float | None = None
    """LoRA alpha of a file that carries none."""
    adapter_name: str | None = None
    """Which adapter of a file that holds several."""
    enable_lora: tuple[bool, ...] | None = None
    """Which equal parts of a merged linear layer (loralib) are adapted."""
    base_is_residual: bool = False
    """The base given is the residual that training wrote, not the original model."""
    mlx_legacy_alpha: bool = False
    """The MLX adapter was trained while mlx-lm multiplied its scale by alpha / rank (January to June 2024)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterFile:
    """One opened weights file with what lies beside it; tensors are mapped, not copied, where the format allows."""

    path: Path
    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    """What the file says about itself: the metadata of a safetensors or GGUF header."""
    config: Mapping[str, Any] | None
    """``adapter_config.json`` beside the file, or None."""
    config_path: Path | None
    sha256: str
    container: Container = "safetensors"


class AdapterReader(Protocol):
    """One adapter format."""

    format: str

    def recognises(self, file: AdapterFile) -> bool:
        """Whether names and configuration are this format's."""
        ...

    def read(self, file: AdapterFile, options: ReadOptions) -> Adapter:
        """Turn the file into updates.

        Raises:
            MalformedAdapterError: The content breaks the format's rules.
            UnmergeableAdapterError: No weights can equal what the adapter does.
        """
        ...
