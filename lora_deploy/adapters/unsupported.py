"""Formats that are known but not read yet: each is one line here, and goes when its reader comes.

Promise: such a file is refused by the name of its format, never read as another. Nothing else depends on this table.
Source: names of tensors as written by kohya sd-scripts, LyCORIS 4.1, diffusers 0.42, mlx-lm, torchtune, litgpt, ONNX
Runtime 1.31 and llama.cpp.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_deploy.adapters.interface import AdapterFile
from lora_deploy.adapters.keys import PEFT_SLOT
from lora_deploy.errors import MalformedAdapterError, UnknownAdapterFormatError, UnmergeableAdapterError

_BY_KEY: tuple[tuple[str, str], ...] = (
    ("LyCORIS", r"\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_blocks|dora_scale|lora_mid\.weight|diff|a1\.weight)$"),
    ("kohya", r"[._]lora_down\.weight$"),
    ("XLabs Flux", r"\.processor\.\w*lora\d?\.down\.weight$"),
    ("diffusers", r"(_lora|\.lora_linear_layer|\.lora)\.(up|down)\.weight$"),
    (
        "diffusers",
        r"^(unet|text_encoder(_\d)?|transformer\.(single_)?transformer_blocks|diffusion_model)\..*\.lora_A\b",
    ),
    ("BFL Flux", r"^(double|single)_blocks\.\d+\..*\.lora_[AB]\."),
    ("torchtune", r"^layers\.\d+\..*\.lora_a\.weight$"),
    ("MLX", r"\.lora_a$"),
    ("litgpt", r"^transformer\.h\.\d+\.(attn\.(qkv|attn)\.lora_A$|.*\.linear\.weight$)"),
)
"""Format, and a pattern that one of its keys matches; the first line that matches any key wins."""

_MLX_CONFIG_KEYS = frozenset({"lora_parameters", "fine_tune_type", "lora_layers", "adapter_path"})

PEFT_LATER = frozenset(
    {
        *("ADALORA", "BEFT", "BOFT", "BONE", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA"),
        *("HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA"),
        *("ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
    }
)
"""``peft_type`` values whose adapters can be merged, by a reader that is not here yet."""

PEFT_NEVER = {
    "ADAMSS": "its scatter indices are not in the file",
    "ADAPTION_PROMPT": "it adds attention over trained prompts",
    "CARTRIDGE": "it is a trained key-value cache",
    "CPT": "it adds virtual tokens",
    "LILY": "its routing depends on the input",
    "MULTITASK_PROMPT_TUNING": "it adds virtual tokens",
    "POLY": "its routing depends on the task",
    "PREFIX_TUNING": "it adds a trained key-value prefix",
    "PROMPT_TUNING": "it adds virtual tokens",
    "P_TUNING": "it adds virtual tokens",
    "SHADOW": "it is a network beside the model",
    "XLORA": "its gate depends on the input",
}
"""``peft_type`` values that no weights can express, and why."""


def refuse_container(path: Path) -> None:
    """Refuse a file whose container belongs to another format.

    Raises:
        UnknownAdapterFormatError: A GGUF, NumPy or ONNX Runtime adapter.
    """
    try:
        with path.open("rb") as stream:
            magic = stream.read(8)
    except OSError as error:
        raise MalformedAdapterError(f"{path}: cannot be read: {error.strerror or error}") from error
    if magic[:4] == b"GGUF":
        raise _unsupported(path, "llama.cpp GGUF adapter")
    if magic[4:8] == b"TORT":
        raise _unsupported(path, "ONNX Runtime adapter")
    if path.suffix == ".npz":
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        raise _unsupported(path, "MLX npz" if any(".lora_a" in name for name in names) else "ONNX Runtime GenAI npz")


def refuse_format(file: AdapterFile) -> None:
    """Refuse a file whose configuration or keys belong to another format.

    Raises:
        UnknownAdapterFormatError: A format that is not read yet, or a ``peft_type`` that PEFT does not have.
        UnmergeableAdapterError: A ``peft_type`` that no weights can express.
    """
    if file.config is not None:
        refuse_configuration(file.path, file.config)
        if any(PEFT_SLOT.search(key) for key in file.tensors):
            return
    for name, sign in _BY_KEY:
        key = next((key for key in file.tensors if re.search(sign, key)), None)
        if key is not None:
            raise _unsupported(file.path, name, f" ({key})")


def refuse_configuration(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse the configuration of another format, and every ``peft_type`` but LORA, with the reason.

    Raises:
        UnknownAdapterFormatError: Not read yet, or not PEFT's.
        UnmergeableAdapterError: No weights can express it.
    """
    peft_type = config.get("peft_type")
    if peft_type is None:
        if _MLX_CONFIG_KEYS & set(config):
            raise _unsupported(path, "MLX")
        return
    peft_type = str(peft_type)
    if peft_type in PEFT_NEVER:
        raise UnmergeableAdapterError(f"{path}: PEFT {peft_type} cannot be merged: {PEFT_NEVER[peft_type]}")
    if peft_type in PEFT_LATER:
        raise _unsupported(path, f"PEFT {peft_type}")
    if peft_type != "LORA":
        raise UnknownAdapterFormatError(f"{path}: peft_type {peft_type!r} is none of peft <= 0.21.2")


def _unsupported(path: Path, name: str, evidence: str = "") -> UnknownAdapterFormatError:
    return UnknownAdapterFormatError(f"{path}: {name}{evidence}: format not supported yet", code="format-not-supported")
