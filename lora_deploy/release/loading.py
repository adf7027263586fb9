"""How a release is loaded: the lines of its card that a stranger copies first.

Promise: each runs in the release's own folder, and needs nothing but the library that it names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from lora_deploy.export.record import ExportRecord

_TRANSFORMERS = """from transformers import {name}

model = {name}.from_pretrained(".")  # this folder, or the id of the repository it was pushed to"""
_DIFFUSERS = """from diffusers import {name}

pipeline = {name}.from_pretrained(".")  # this folder, or the id of the repository it was pushed to"""
_GENAI = """import onnxruntime_genai

model = onnxruntime_genai.Model("{folder}")"""
_ONNXRUNTIME = """import onnxruntime

session = onnxruntime.InferenceSession("{graph}")
print([(port.name, port.shape) for port in session.get_inputs()])"""


def snippets(
    config: Mapping[str, Any], merged: Sequence[str], exports: Mapping[str, ExportRecord]
) -> Iterator[tuple[str, str]]:
    """Give library and code for the weights, if any, and for every folder of graphs.

    ``config`` is ``config.json`` or ``model_index.json``, ``merged`` the files of the merge itself.
    """
    if any(path.endswith(".safetensors") for path in merged):
        yield from _of_weights(config)
    graphs = sorted(path for path in merged if path.endswith(".onnx"))
    if graphs:
        yield "onnxruntime", _ONNXRUNTIME.format(graph=graphs[0])
    for folder, record in exports.items():
        if record.options.get("layout") == "genai":
            yield "onnxruntime-genai", _GENAI.format(folder=folder)
        elif record.graphs:
            graph = next(iter(record.graphs.values()))
            yield "onnxruntime", _ONNXRUNTIME.format(graph=PurePosixPath(folder) / graph.file)


def _of_weights(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    pipeline, architectures = config.get("_class_name"), config.get("architectures") or []
    if isinstance(pipeline, str) and "_diffusers_version" in config:
        yield "diffusers", _DIFFUSERS.format(name=pipeline)
    elif architectures:
        yield "transformers", _TRANSFORMERS.format(name=architectures[0])
