"""Files that travel with weights."""

from __future__ import annotations
from collections.abc import Sequence
from typing import Any
from lora_deploy.adapter import Adapter
from lora_deploy.checkpoint import Checkpoint


def check_companions(adapters: Sequence[Adapter], checkpoint: Checkpoint, n_tokens: int | None, findings: Any) -> None:
    """Later."""
