"""The layout of a diffusion pipeline's folder: ``model_index.json``, and a sub-folder for each component.

Promise: a component's name is a plain word, never a path; a pipeline that brings code of its own is refused; of several
variants of the weights one is chosen by its name, and never by guess.
Source: diffusers 0.42.1, ``pipelines/pipeline_utils.py`` (``save_pretrained``, ``variant_compatible_siblings``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_deploy.errors import MalformedCheckpointError, RecipeError, UnsafeFileError

MODEL_INDEX = "model_index.json"
CONFIG_NAME = "config.json"
SEPARATOR = "/"
"""Between a component's name and a tensor's."""
PLAIN_WEIGHTS = tuple(
    f"{stem}{part}"
    for stem in ("model", "diffusion_pytorch_model")
    for part in (".safetensors", "-?????-of-?????.safetensors", ".safetensors.index.json")
)
"""Shell patterns of the weight files that are no variant."""
_NAME = re.compile(r"^[A-Za-z]\w*$", re.ASCII)
_WEIGHTS = re.compile(
    r"^(?P<stem>model|diffusion_pytorch_model)(?:\.(?P<variant>\w+))?(?P<shard>-\d{5}-of-\d{5})?(?:\.(?P<late>\w+))?"
    r"\.safetensors$",
    re.ASCII,
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NO_MODEL = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "FeatureExtractor")
"""How classes without weights end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentWeights:
    """Which files hold one component's weights."""

    files: tuple[str, ...]
    """In the component's folder; those that an index names are known once it was read."""
    index: str | None
    """The file that maps tensors to files, where there is one."""
    variant: str
    """Such as ``fp16``; empty for the plain weights."""


def listed_components(root: Path, model_index: Mapping[str, Any]) -> dict[str, str]:
    """Name the components that a pipeline has, in its own order, and the class of each.

    Raises:
        UnsafeFileError: A name or a link leads out of the folder, or the pipeline brings code of its own.
        MalformedCheckpointError: An entry is no pair of library and class, or its folder is missing.
    """
    if not isinstance(model_index.get("_class_name"), str):
        raise own_code_error(root, f"_class_name is {model_index.get('_class_name')!r}")
    found: dict[str, str] = {}
    for name, entry in model_index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue  # options of the pipeline, such as requires_safety_checker
        if not _NAME.match(name):
            raise UnsafeFileError(f"{root / MODEL_INDEX}: component {name!r} is no plain name")
        if entry in ([None, None], []):
            continue
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise MalformedCheckpointError(f"{root / MODEL_INDEX}: {name}: found {entry!r}, expected [library, class]")
        library, class_name = entry
        if any((folder / f"{library}.py").exists() for folder in (root, root / name)):
            raise own_code_error(root, f"{name} is made by {library}.py")
        _check_folder(root, name)
        found[name] = class_name
    return found


def weights_of(folder: Path, class_name: str, variant: str | None) -> ComponentWeights | None:
    """Choose a component's weight files; None for a component without weights, such as a tokenizer.

    Raises:
        MalformedCheckpointError: A model without safetensors weights, or with some of its shards only.
        RecipeError: There are variants only, and none of them was chosen.
    """
    variants: dict[str, list[str]] = {}
    for file in sorted(path.name for path in folder.iterdir()):
        if match := _WEIGHTS.match(file):
            variants.setdefault(match["variant"] or match["late"] or "", []).append(file)
    if not variants:
        _require_no_model(folder, class_name)
        return None
    if variant not in variants and "" not in variants and len(variants) > 1:
        raise RecipeError(f"{folder}: has the variants {', '.join(variants)}", hint=f"--variant {next(iter(variants))}")
    chosen = variant if variant in variants else "" if "" in variants else next(iter(variants))
    files = variants[chosen]
    index = index_name(plain_name(files[0])).removesuffix("json") + (f"{chosen}.json" if chosen else "json")
    if (folder / index).is_file():
        return ComponentWeights(files=tuple(files), index=index, variant=chosen)
    if len(files) > 1:
        raise MalformedCheckpointError(f"{folder}: {len(files)} weight files and no {index}")
    return ComponentWeights(files=tuple(files), index=None, variant=chosen)


def plain_name(file: str) -> str:
    """Name a weight file as the one that is no variant: what a loader opens when it is told nothing."""
    match = _WEIGHTS.match(file)
    return f"{match['stem']}{match['shard'] or ''}.safetensors" if match else file


def index_name(file: str) -> str:
    """Name the index of the files that a plainly named weight file is one of."""
    stem = file.removesuffix(".safetensors").partition("-")[0]
    return f"{stem}.safetensors.index.json"


def is_weight_file(file: str) -> bool:
    """Whether a component's file holds weights or an index of them, in whatever library's format."""
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb")
    return file.endswith(suffixes) or ".safetensors.index" in file or ".bin.index" in file


def _check_folder(root: Path, name: str) -> None:
    folder = root / name
    if not folder.is_dir():
        raise MalformedCheckpointError(
            f"{folder}: no such folder, but {MODEL_INDEX} lists it", hint="the download may be incomplete"
        )
    if not folder.resolve().is_relative_to(root.resolve()):
        raise UnsafeFileError(f"{folder}: is a link to {folder.resolve()}, outside the pipeline")


def _require_no_model(folder: Path, class_name: str) -> None:
    if class_name.endswith(_NO_MODEL):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise MalformedCheckpointError(
            f"{folder}: has only pickled weights ({pickles[0]}), expected safetensors",
            hint="save the pipeline again: save_pretrained(…, safe_serialization=True)",
            code="pickled-component",
        )
    if (folder / CONFIG_NAME).is_file():
        raise MalformedCheckpointError(f"{folder}: {class_name} has no safetensors weights")


def own_code_error(root: Path, found: str) -> UnsafeFileError:
    """Make the error that refuses a pipeline whose classes are not its libraries'."""
    return UnsafeFileError(
        f"{root / MODEL_INDEX}: {found}: the pipeline brings code of its own, which is not run",
        hint="merge its components one by one: --base PIPELINE/unet",
        code="own-code",
    )
