"""A recipe's sections as the options of the stages."""

from __future__ import annotations

from pathlib import Path

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.export.options import ExportOptions
from lora_deploy.hubs.options import PushOptions
from lora_deploy.merge.options import MergeOptions
from lora_deploy.recipe.cells import Cell, located
from lora_deploy.recipe.model import ExportChoice, Recipe
from lora_deploy.release.options import Acceptance, ReleaseOptions
from lora_deploy.validate import BindOptions


def read_options(cell: Cell) -> ReadOptions:
    """What the adapter's files cannot say."""
    adapter = cell.adapter
    return ReadOptions(
        alpha=adapter.alpha,
        adapter_name=adapter.adapter_name,
        enable_lora=adapter.enable_lora,
        base_is_residual=adapter.base_is_residual,
        mlx_legacy_alpha=adapter.mlx_legacy_alpha,
    )


def bind_options(recipe: Recipe, cell: Cell) -> BindOptions:
    """How adapters meet the base."""
    section = recipe.validation
    return BindOptions(
        weights=cell.adapter.weights,
        include=section.include,
        exclude=section.exclude,
        tokenizer=section.tokenizer,
        components=cell.adapter.components,
        variant=recipe.base.variant if recipe.base is not None else None,
        into_language_model=section.into_language_model,
    )


def merge_options(recipe: Recipe, cell: Cell) -> MergeOptions:
    """How weights are merged; the cell's folder is the recipe's own, so an earlier merge there gives way."""
    section = recipe.merge
    return MergeOptions(
        dtype=cell.dtype,
        device=section.device,
        max_shard_bytes=int(section.max_shard_size),
        memory_bytes=int(section.memory),
        n_workers=section.workers,
        fresh=True,
    )


def export_options(choice: ExportChoice) -> ExportOptions:
    """How graphs are made; an earlier export at their place gives way."""
    return ExportOptions(
        dtype=choice.dtype,
        provider=choice.provider,
        storage=choice.weights,
        layout=choice.layout,
        maker=choice.maker,
        quantize=choice.quantize,
        block_size=choice.block_size,
        is_symmetric=choice.symmetric,
        fresh=True,
    )


def verify_options(recipe: Recipe, folder: Path) -> VerifyOptions:
    """What is proven; ``folder`` is the recipe's."""
    section = recipe.evidence
    if section is None:
        return VerifyOptions()
    return VerifyOptions(
        only=section.only,
        skip=section.skip,
        probes=located(section.probes, folder) if section.probes else None,
        layerwise=section.layerwise,
        provider=section.provider,
        latency_bound=section.latency_bound,
        seconds=section.seconds,
    )


def release_options(recipe: Recipe, folder: Path) -> ReleaseOptions:
    """How the release is made; ``folder`` is the recipe's."""
    section = recipe.release
    if section is None:
        return ReleaseOptions()
    return ReleaseOptions(
        license=section.license,
        card_template=located(section.card_template, folder) if section.card_template else None,
        sign_key=located(section.sign_key, folder) if section.sign_key else None,
        sign_certificate=located(section.sign_certificate, folder) if section.sign_certificate else None,
        accepted=tuple(Acceptance(code=gap.code, because=gap.because) for gap in section.accept),
        recipe=recipe.content,
        fresh=True,
    )


def push_options(recipe: Recipe, token: str | None) -> PushOptions:
    """How the release is published."""
    section = recipe.push
    return PushOptions(
        revision=section.revision,
        private=section.private,
        create_pr=section.create_pr,
        tag=section.tag,
        token=token,
        commit_message=section.commit_message,
        yes=section.replace,
    )
