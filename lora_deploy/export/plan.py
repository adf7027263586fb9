"""Decide an export before anything is made or written: format, maker, blueprint, place, and which export it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from lora_deploy.artifact import cached_sha256
from lora_deploy.checkpoint import open_checkpoint
from lora_deploy.companions import companion_files
from lora_deploy.errors import ExportError, Finding
from lora_deploy.export import GRAPH_MAKERS
from lora_deploy.export.blueprint import Blueprint, blueprint_of
from lora_deploy.export.extras import installed_version
from lora_deploy.export.interface import GraphMaker
from lora_deploy.export.options import ExportOptions
from lora_deploy.export.precision import dtype_findings, graph_dtype
from lora_deploy.export.quantisation import Quantisation, quantisation_of
from lora_deploy.export.record import digest_of
from lora_deploy.export.sources import CheckpointSource, WeightSource, components_of
from lora_deploy.merge.progress import Progress
from lora_deploy.merge.record import merged_folder
from lora_deploy.tensors import DType


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportPlan:
    """Everything that decides an export's bytes."""

    source: WeightSource
    options: ExportOptions
    dtype: DType
    maker: GraphMaker
    blueprint: Blueprint
    findings: tuple[Finding, ...]
    quantisation: Quantisation | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Options as they were resolved."""
        chosen = asdict(self.options)
        for name in ("fresh", "quantize", "block_size", "is_symmetric"):
            del chosen[name]
        quantised = {"quantisation": self.quantisation.model_dump()} if self.quantisation else {}
        layout = {"layout": "diffusers"} if self.maker.name == "diffusers" else {}
        return {**chosen, "dtype": self.dtype.long_name, "maker": self.maker.name, **layout, **quantised}

    @property
    def quantisers(self) -> dict[str, str]:
        """Versions of what quantises, which decide its bytes; empty where nothing does."""
        names = ("onnxruntime", "onnxruntime-gpu") if self.quantisation else ()
        return {name: found for name in names if (found := installed_version(name)) is not None}

    @property
    def n_bytes(self) -> int:
        """Size of the weights in the graph's format, once each."""
        return sum(spec.n_bytes for spec in self.blueprint.specs.values())

    def identity(self, progress: Progress | None) -> dict[str, Any]:
        """What decides the bytes, by digests."""
        return {
            "blueprint": self.blueprint.digest,
            "source": self.source.inputs(progress),
            "options": self.settings,
            "config": _digest(self.source.config),
            **({"quantisers": self.quantisers} if self.quantisation else {}),
            "companions": {name: cached_sha256(path) for name, path in sorted(self.source.companions.items())},
        }


def plan_of_folder(folder: str | PathLike[str] | None, options: ExportOptions) -> ExportPlan:
    """Plan the export of a merged folder; without one, of the current folder if it holds our record.

    Raises:
        ExportError: As ``plan_export``.
        RecipeError, InputError: There is no such folder, or its files contradict each other.
    """
    checkpoint = open_checkpoint(merged_folder(folder))
    return plan_export(CheckpointSource(checkpoint, companion_files((), checkpoint)), options)


def plan_export(source: WeightSource, options: ExportOptions) -> ExportPlan:
    """Plan an export.

    Raises:
        ExportError: The format cannot be had, the options contradict each other, or there is no configuration.
    """
    is_merged = isinstance(source, CheckpointSource)
    if options.storage == "shared" and not is_merged:
        raise ExportError(
            "--weights shared: there is no merged checkpoint whose files could be shared",
            hint="merge first, then export the merged folder; or --weights external",
        )
    dtype = graph_dtype(source.name, source.specs, options.dtype, options.provider, is_merged=is_merged)
    components = components_of(source)
    if components and options.storage == "shared":
        raise ExportError(
            "--weights shared: a pipeline's graphs lie in folders of their own, and onnxruntime reads only from there",
            hint="--weights external",
        )
    if components and options.quantize is not None:
        raise ExportError("--quantize: is not for pipelines", hint="export without it")
    maker = _maker(options, is_pipeline=bool(components))
    blueprint = blueprint_of(
        source,
        dtype=dtype,
        provider=options.provider,
        maker=maker.name,
        packages=maker.packages,
        is_stored=options.storage == "shared",
    )
    return ExportPlan(
        source=source,
        options=options,
        dtype=dtype,
        maker=maker,
        blueprint=blueprint,
        findings=dtype_findings(dtype, options.provider),
        quantisation=quantisation_of(options, dtype),
    )


def _maker(options: ExportOptions, *, is_pipeline: bool) -> GraphMaker:
    wanted = "genai" if options.layout == "genai" else "diffusers" if is_pipeline else "transformers"
    if (is_pipeline and wanted == "genai") or (options.layout == "diffusers" and not is_pipeline):
        raise ExportError(
            f"--layout {options.layout}: is not for {'pipelines' if is_pipeline else 'single models'}",
            hint=f"--layout {'diffusers' if is_pipeline else 'transformers'}",
        )
    if options.maker not in {"auto", wanted}:
        raise ExportError(f"--maker {options.maker}: its graphs are not of --layout {options.layout}")
    for entry in GRAPH_MAKERS:
        if entry.name == wanted:
            maker: GraphMaker = entry.load()
            return maker
    raise ExportError(f"--maker: found {wanted}, known are {', '.join(entry.name for entry in GRAPH_MAKERS)}")


def _digest(config: Mapping[str, Any]) -> str:
    return digest_of(dict(config))
