"""The commands that make a release's files again, from what its records say.

Promise: every option that decides a byte is in them; what is a default is left out.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from lora_deploy.bases.quantised import DEQUANTISED
from lora_deploy.export.record import ExportRecord
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.record import MergeRecord, RecordedOrigin

_SHARD_BYTES = MergeOptions().max_shard_bytes
_ONE_OF = {"--components": "--component"}
"""Options that are given once for each value, and named after one."""


def commands(record: MergeRecord | RecordedOrigin, exports: Mapping[str, ExportRecord], base: str) -> list[str]:
    """Write the commands, one for each step; ``base`` is what the base is called in public."""
    base = f"{base}@{record.base.revision}" if record.base.revision else base
    adapters = [adapter.name for adapter in record.adapters]
    if isinstance(record, MergeRecord):
        out = "merged"
        merge = ["lora-deploy", "merge", *adapters, "--base", base, "--dtype", record.options["merge"]["dtype"]]
        steps = [[*merge, *_merge_options(record), "-o", out]]
        for folder, export in exports.items():
            steps.append(["lora-deploy", "export", out, "--onnx", "-o", f"{out}/{folder}", *_export_options(export)])
    else:
        out = "exported"
        (export,) = exports.values()
        named = [word for adapter in adapters for word in ("--adapter", adapter)]
        step = ["lora-deploy", "export", "--onnx", *named, "--base", base, *_merge_options(record), "-o", out]
        steps = [[*step, *_export_options(export)]]
    return [*map(shlex.join, steps), f"lora-deploy verify {out}", f"lora-deploy release {out}"]


def _merge_options(record: MergeRecord | RecordedOrigin) -> Iterator[str]:
    """Say what was chosen; an option is called by its field's name."""
    if any(adapter.weight != 1 for adapter in record.adapters):
        for adapter in record.adapters:
            yield from ("--weight", repr(adapter.weight))
    chosen = {**record.options["read"], **record.options["bind"]}
    for name, value in chosen.items():
        if name != "weights":
            yield from _option(name, value)
    if any(finding.code == DEQUANTISED for finding in record.findings):
        yield "--dequantize"
    size = record.options["merge"].get("max_shard_bytes", _SHARD_BYTES)
    if size != _SHARD_BYTES and isinstance(record, MergeRecord):
        yield from ("--max-shard-size", str(size))


def _option(name: str, value: Any) -> Iterator[str]:  # noqa: ANN401 - JSON
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        yield flag
    elif name == "enable_lora" and value:
        yield from (flag, ",".join("T" if part else "F" for part in value))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from (_ONE_OF.get(flag, flag), str(item))
    elif value is not None and value is not False:
        yield from (flag, str(value))


def _export_options(record: ExportRecord) -> Iterator[str]:
    options = record.options
    yield from ("--dtype", options["dtype"], "--provider", options["provider"], "--layout", options["layout"])
    if options.get("storage") not in {None, "external"}:
        yield from ("--weights", options["storage"])
    yield from _quantisation(options.get("quantisation"))


def _quantisation(chosen: Mapping[str, Any] | None) -> Iterator[str]:
    if chosen is None:
        return
    yield from ("--quantize", chosen["method"])
    if chosen.get("block_size") is not None:
        yield from ("--block-size", str(chosen["block_size"]))
    if chosen.get("is_symmetric") is not None:
        yield "--symmetric" if chosen["is_symmetric"] else "--asymmetric"
