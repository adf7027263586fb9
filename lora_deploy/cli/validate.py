"""``lora-deploy validate``: do adapters fit a base? Every misfit at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.cli.numbers import format_size
from lora_deploy.cli.options import base_option, bind_options, chosen, output_options, read_options
from lora_deploy.cli.patterns import summarise_names
from lora_deploy.cli.screen import Screen

if TYPE_CHECKING:
    from lora_deploy.artifact import Artifact
    from lora_deploy.validate import Binding


@click.command(short_help="Check that adapters fit a base; list every misfit at once.")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@base_option
@click.option(
    "--onnx",
    "graph",
    type=click.Path(path_type=Path, exists=True),
    metavar="GRAPH",
    help="Check against the inputs for adapters of ONNX graphs instead: a folder of export --multi-lora, or a file. "
    "ADAPTER may then be an .onnx_adapter file, too.",
)
@bind_options
@read_options
@output_options
@click.pass_obj
def validate(
    screen: Screen,
    /,
    adapters: tuple[str, ...],
    base: str | None,
    graph: Path | None,
    dequantize: bool,
    **choices: Any,  # noqa: ANN401 - options by name
) -> None:
    """Check that every tensor of ADAPTER finds its place in the base: by name, shape and orientation.

    Prints which base this is (name, revision, digests of its weight files, remembered while the files do not change)
    and which tensors would be changed; or lists every misfit, with the nearest candidates, and exits with 4.
    """
    from lora_deploy import pipeline
    from lora_deploy.validate import BindOptions

    if graph is not None:
        if base is not None or dequantize:
            raise click.UsageError("--onnx: the adapter is compared with the graph, not with --base")
        _check_graph(screen, adapters, graph, choices)
        return
    binding = pipeline.validate(
        adapters,
        base=base,
        read_options=chosen(ReadOptions, choices),
        bind_options=chosen(BindOptions, choices),
        dequantize=dequantize,
    )
    files = pipeline.base_artifacts(binding.checkpoint, screen.progress())
    screen.publish(document(binding, files))
    _show(screen, binding, files)


def _check_graph(screen: Screen, adapters: tuple[str, ...], graph: Path, choices: Mapping[str, Any]) -> None:
    """Check adapters, each by itself, against graphs that have inputs for them."""
    from lora_deploy import pipeline
    from lora_deploy.validate import BindOptions

    fits = [
        pipeline.check_graph_fit(
            adapter, graph, read_options=chosen(ReadOptions, choices), bind_options=chosen(BindOptions, choices)
        )
        for adapter in adapters
    ]
    screen.publish({"graph": graph, "adapters": fits})
    for fit in fits:
        ranks = ", ".join(map(str, sorted(set(fit.ranks.values()))))
        screen.line(f"{fit.adapter} fits {graph}: rank {ranks}, {len(fit.ranks)} of {fit.n_ports} matrices")


def document(binding: Binding, files: tuple[Artifact, ...]) -> dict[str, object]:
    """Give what ``--json`` prints."""
    checkpoint = binding.checkpoint
    return {
        "base": {
            "name": checkpoint.ref.name,
            "revision": checkpoint.ref.revision,
            "root": checkpoint.root,
            "n_tensors": len(checkpoint.tensors),
            "n_bytes": checkpoint.n_bytes,
            "shapes": {name: spec.shape for name, spec in checkpoint.tensors.items()},
            "files": [{"path": str(file.path), "n_bytes": file.n_bytes, "sha256": file.sha256} for file in files],
        },
        "adapters": [
            {"name": adapter.name, "path": adapter.path, "format": adapter.format, "sha256": adapter.sha256}
            for adapter in binding.adapters
        ],
        "updates": {
            name: [
                {"kind": getattr(entry.update, "kind", ""), "adapter": entry.adapter_index, "keys": entry.keys}
                for entry in entries
            ]
            for name, entries in binding.updates.items()
        },
        "added": [name for name, source in binding.outputs.items() if source is None],
        "config_edits": binding.config_edits,
        "excluded": binding.excluded,
        "findings": binding.findings,
    }


def _show(screen: Screen, binding: Binding, files: tuple[Artifact, ...]) -> None:
    checkpoint = binding.checkpoint
    screen.line(f"base {checkpoint.ref.name}")
    shapes = len({spec.shape for spec in checkpoint.tensors.values()})
    screen.fields(
        [
            *([("revision", checkpoint.ref.revision)] if checkpoint.ref.revision else []),
            ("folder", str(checkpoint.root)),
            ("tensors", f"{len(checkpoint.tensors)} of {shapes} shapes, {format_size(checkpoint.n_bytes)}"),
            *((str(file.path), f"sha256 {file.sha256}") for file in files),
        ]
    )
    for adapter in binding.adapters:
        screen.line(f"adapter {adapter.path} ({adapter.format})")
    n_updates = sum(len(entries) for entries in binding.updates.values())
    screen.line(f"fits: {n_updates} updates of {len(binding.updates)} tensors")
    screen.fields((str(number), pattern) for pattern, number in summarise_names(binding.updates))
    if binding.excluded:
        screen.line(f"left out as asked: {len(binding.excluded)} keys of the adapter")
    screen.findings(binding.findings)
