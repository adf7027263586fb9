"""Which file of the output each tensor goes to, and what else is written beside the weights.

A model is cut into files of a chosen size. A diffusion pipeline keeps the files that its components have, under the
names of no variant, so that a loader finds them without being told one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.pipeline_layout import CONFIG_NAME, SEPARATOR, index_name, plain_name
from lora_deploy.tensors import TensorSpec

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def files_of_model(specs: Mapping[str, TensorSpec], max_bytes: int) -> dict[str, list[str]]:
    """Cut a model's tensors, in their order, into files of at most so many bytes; at least one tensor each."""
    groups: list[list[str]] = []
    n_bytes = 0
    for name, spec in specs.items():
        if not groups or n_bytes + spec.n_bytes > max_bytes:
            groups.append([])
            n_bytes = 0
        groups[-1].append(name)
        n_bytes += spec.n_bytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{k:05d}-of-{len(groups):05d}.safetensors": group for k, group in enumerate(groups, start=1)}


def files_of_pipeline(checkpoint: Checkpoint, sources: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Keep every tensor in the file that its base tensor lies in; what the base does not have goes to the last.

    ``sources`` gives the base tensor of each output.
    """
    files: dict[str, list[str]] = {plain_path(file): [] for file in checkpoint.files}
    for name, source in sources.items():
        component = name.partition(SEPARATOR)[0]
        own = [file for file in files if file.startswith(component + SEPARATOR)]
        files[own[-1] if source is None else plain_path(checkpoint.tensors[source].file)].append(name)
    return {file: names for file, names in files.items() if names}


def plain_path(file: str) -> str:
    """Name a component's weight file, folder included, as no variant."""
    component, _, name = file.partition(SEPARATOR)
    return f"{component}{SEPARATOR}{plain_name(name)}"


def untouched_header(checkpoint: Checkpoint, file: str, sources: list[TensorSpec]) -> bytes | None:
    """Give the base's own header of a file whose tensors are all copied: then the copy is the file itself.

    None when the copy leaves out something of it, or is of several files.
    """
    held = [spec for spec in checkpoint.tensors.values() if plain_path(spec.file) == file]
    if held != sources or len({spec.file for spec in held}) != 1 or not _is_whole(checkpoint, held):
        return None
    with (checkpoint.root / held[0].file).open("rb") as stream:
        return stream.read(checkpoint.data_starts[held[0].file])


def _is_whole(checkpoint: Checkpoint, held: list[TensorSpec]) -> bool:
    n_bytes = checkpoint.data_starts[held[0].file] + sum(spec.n_bytes for spec in held)
    return (checkpoint.root / held[0].file).stat().st_size == n_bytes


def index_files(specs: list[TensorSpec], checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the indices of all models that have several weight files: where each lies, and its JSON."""
    if not checkpoint.components:
        if len({spec.file for spec in specs}) > 1:
            yield INDEX_NAME, _index({spec.name: spec for spec in specs})
        return
    for component in checkpoint.components:
        prefix = component + SEPARATOR
        own = {spec.name.removeprefix(prefix): spec for spec in specs if spec.name.startswith(prefix)}
        files = sorted({spec.file for spec in own.values()})
        if len(files) > 1:
            yield prefix + index_name(files[0].removeprefix(prefix)), _index(own, prefix)


def _index(specs: Mapping[str, TensorSpec], prefix: str = "") -> dict[str, Any]:
    return {
        "metadata": {
            "total_parameters": sum(spec.n_elements for spec in specs.values()),
            "total_size": sum(spec.n_bytes for spec in specs.values()),
        },
        "weight_map": {name: specs[name].file.removeprefix(prefix) for name in sorted(specs)},
    }


def config_files(config: Mapping[str, Any], checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """Give the configurations as they are to be written; a component's that nobody edited is its own file."""
    if not checkpoint.components:
        if config:
            yield CONFIG_NAME, json_text(config)
        return
    for component, part in checkpoint.components.items():
        own = part.root / CONFIG_NAME
        if own.is_file():
            edited = config[component]
            content = own.read_bytes() if edited == part.config else json_text(edited)
            yield f"{component}{SEPARATOR}{CONFIG_NAME}", content


def json_text(value: Mapping[str, Any]) -> bytes:
    """Write JSON as we write all of it: sorted, indented by two, one final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
