"""Is this the base that the adapter was trained on? Names and revisions only: shapes are compared elsewhere."""

from __future__ import annotations

import re

from lora_deploy.adapter import Adapter
from lora_deploy.bases.quantised import sixteen_bit_original
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.validate.findings import Findings

_FILE_SUFFIX = re.compile(r"\.safetensors$|(?:[.-](?:i?q\d\w*|b?f16|f32))?\.gguf$")
"""GGUF files carry their quantisation in the name."""


def check_identity(adapter: Adapter, checkpoint: Checkpoint, findings: Findings) -> None:
    """Note where the adapter names another base, another revision, or a quantised form of this one."""
    named = adapter.base_hint.name
    if not named:
        return
    known = _known_names(checkpoint)
    if _short(named) in known:
        _check_revision(adapter, checkpoint, findings)
        return
    original = sixteen_bit_original(named)
    if original is not None and (_short(original) in known or any(_short(original) in name for name in known)):
        findings.warn(
            "trained-on-quantised-base",
            adapter.name,
            f"was trained on {named}; {checkpoint.ref.name} is its 16-bit original: "
            "outputs are to be compared with the 16-bit base",
        )
        return
    message = f"names base {named}, this one is {checkpoint.ref.name}"
    findings.warn("other-base", adapter.name, message)


def _known_names(checkpoint: Checkpoint) -> set[str]:
    names = {checkpoint.ref.name, checkpoint.ref.pipeline, str(checkpoint.config.get("_name_or_path") or "")}
    return {_short(name) for name in names if name}


def _short(name: str) -> str:
    """Reduce a hub id or a path to what both keep: its last component, without case and file suffix."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()
    return _FILE_SUFFIX.sub("", last)


def _check_revision(adapter: Adapter, checkpoint: Checkpoint, findings: Findings) -> None:
    wanted, found = adapter.base_hint.revision, checkpoint.ref.revision
    if wanted and found and not found.startswith(wanted) and wanted != "main":
        findings.warn("other-revision", adapter.name, f"was trained on revision {wanted}, this base is {found}")
