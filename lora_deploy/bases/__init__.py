"""BASE as given on the command line (folder, file, GGUF, hub id) brought to a folder of safetensors files."""

from __future__ import annotations

from lora_deploy.bases.open import open_base

__all__ = ["open_base"]
