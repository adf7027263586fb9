"""Open a base by what the user typed: a folder (of a model or a pipeline), a weights file, a GGUF file or a hub id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lora_deploy.bases.hub import is_hub_id, local_folder
from lora_deploy.bases.quantised import dequantised_finding, quantisation_of, refuse_quantised
from lora_deploy.checkpoint import Checkpoint, CheckpointRef, has_weights, open_checkpoint, read_json
from lora_deploy.errors import InputError, MalformedCheckpointError
from lora_deploy.pipeline_layout import MODEL_INDEX, PLAIN_WEIGHTS

_COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.model", "tokenizer*", "*.tiktoken")
_SAFETENSORS = ("*.safetensors", *_COMPANIONS)
_PICKLED = ("pytorch_model*.bin", *_COMPANIONS)
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})  # as torch_file's, which imports torch


def open_base(reference: str, *, dequantize: bool = False, variant: str | None = None) -> Checkpoint:
    """Open a base as a folder of safetensors files; a local path wins over a hub id of the same name.

    GGUF files and quantised weights (with ``dequantize``) and pickled ones are converted once, below the cache folder.
    ``variant`` is which weights of a diffusion pipeline are meant where it has several, such as ``fp16``.

    Raises:
        InputError: No such base, or it is not what it claims to be, or its weights are quantised.
        HubUnavailableError: A hub id that is not in the cache while the hub cannot be asked.
        RecipeError: A GGUF file without ``dequantize``; a variant that the base does not have.
    """
    path = Path(reference).expanduser()
    revision = None
    if not path.exists():
        path, revision = _from_hub(reference, variant)
    name = reference if revision is None else reference.partition("@")[0]
    checkpoint = _open_path(path, CheckpointRef(name=name, revision=revision), dequantize=dequantize, variant=variant)
    if dequantize and not checkpoint.components and quantisation_of(checkpoint) is not None:
        from lora_deploy.bases.dequantise import dequantised

        checkpoint = dequantised(checkpoint)
    for part in (checkpoint, *checkpoint.components.values()):
        refuse_quantised(part)
    return checkpoint


def _from_hub(reference: str, variant: str | None) -> tuple[Path, str]:
    if not is_hub_id(reference):
        raise InputError(
            f"base {reference}: no such file or folder", hint="pass a folder, a weights file, or a hub id owner/name"
        )
    folder, revision = local_folder(reference, _COMPANIONS)
    if (folder / MODEL_INDEX).is_file():
        _fetch_components(folder, f"{reference.partition('@')[0]}@{revision}", variant)
        return folder, revision
    folder, revision = local_folder(reference, _SAFETENSORS)
    if not has_weights(folder):
        folder, revision = local_folder(reference, _PICKLED)
    return folder, revision


def _fetch_components(folder: Path, reference: str, variant: str | None) -> None:
    """Fetch a pipeline's components: their plain weights and the variant's; any, where there are no plain ones."""
    wanted = (*PLAIN_WEIGHTS, *_COMPANIONS, *((f"*.{variant}*safetensors",) if variant else ()))
    for name, entry in read_json(folder / MODEL_INDEX).items():
        if name.startswith("_") or not isinstance(entry, list) or not any(entry):
            continue
        local_folder(reference, wanted, within=name)
        if not has_weights(folder / name):
            local_folder(reference, _SAFETENSORS, within=name)


def _open_path(path: Path, ref: CheckpointRef, *, dequantize: bool, variant: str | None = None) -> Checkpoint:
    if path.is_dir():
        return _open_folder(path, ref, dequantize=dequantize, variant=variant)
    suffix = path.suffix.casefold()
    if suffix == ".safetensors":
        return open_checkpoint(path.parent, ref=ref, files=(path.name,))
    if suffix == ".gguf":
        from lora_deploy.bases.gguf import cached_gguf

        unpacked = open_checkpoint(cached_gguf(path, dequantize=dequantize).folder, ref=ref)
        return replace(unpacked, findings=(*unpacked.findings, dequantised_finding(ref, "weights were packed (GGUF)")))
    if suffix in _PICKLE_SUFFIXES:
        from lora_deploy.bases.torch_base import converted

        return open_checkpoint(converted(path.parent, (path.name,)), ref=ref)
    if path.name.endswith(".safetensors.index.json"):
        return open_checkpoint(path.parent, ref=ref)
    raise InputError(
        f"base {path}: a {suffix or 'nameless'} file is no base", hint="expected .safetensors, .gguf or .bin"
    )


def _open_folder(folder: Path, ref: CheckpointRef, *, dequantize: bool, variant: str | None) -> Checkpoint:
    if has_weights(folder) or variant is not None:
        return open_checkpoint(folder, ref=ref, variant=variant)
    from lora_deploy.bases.torch_base import converted, torch_files_of

    if files := torch_files_of(folder):
        return open_checkpoint(converted(folder, files), ref=ref)
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return _open_path(ggufs[0], ref, dequantize=dequantize)
    if (folder / "adapter_config.json").is_file():
        raise MalformedCheckpointError(
            f"base {folder}: is an adapter, not a base", hint="pass the model it was trained on"
        )
    return open_checkpoint(folder, ref=ref)
