"""Write one file in kohya's names: ``lora_unet_<path>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``.

Dots of a path become underscores, and the component a prefix. Two paths that become one name are refused.
Source: sd-scripts 0.9, ``networks/lora.py``; diffusers 0.42, ``loaders/lora_conversion_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_deploy.adapter import BaseHint
from lora_deploy.artifact import Artifact
from lora_deploy.convert.modules import Module, padded
from lora_deploy.convert.scale import exact_alpha
from lora_deploy.convert.write import require_free, write_tensors
from lora_deploy.errors import RecipeError
from lora_deploy.safetensors_file import writing_error

_PREFIXES = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
}
"""By component; a lone ``text_encoder`` is ``lora_te_`` where the file holds no second one."""
_DENOISER = re.compile(r"^(?:(?P<component>unet|transformer|text_encoder(?:_[23])?)\.)?(?P<path>.+)$")
_OF_UNET = re.compile(r"^(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\b")
_OF_TEXT = re.compile(r"^text_model\.")


def write(out: Path, modules: Sequence[Module], base: BaseHint) -> tuple[Artifact, ...]:
    """Write the file, whole or not at all.

    Raises:
        RecipeError: A module of no diffusion model, a kind or scale that the format cannot hold, or one name twice.
        OutputExistsError: Something is in the way.
        DiskSpaceError, MergeError: The file cannot be written.
    """
    require_free(out)
    placed = [(*_placed(module), module) for module in modules]
    has_second = any(component == "text_encoder_2" for component, _, _ in placed)
    tensors: dict[str, Tensor] = {}
    for component, path, module in placed:
        prefix = "lora_te_" if component == "text_encoder" and not has_second else _PREFIXES[component]
        name = prefix + path.replace(".", "_")
        if f"{name}.alpha" in tensors:
            raise RecipeError(f"--to kohya: two modules become {name}", code="not-convertible")
        tensors |= {f"{name}.{slot}": tensor for slot, tensor in _tensors(module).items()}
    metadata = {"ss_network_module": "networks.lora"} | ({"ss_base_model_version": base.name} if base.name else {})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_error(out, error) from error
    return (write_tensors(out, tensors, metadata),)


def _placed(module: Module) -> tuple[str, str]:
    """Component and path of a module."""
    match = _DENOISER.match(module.name)
    assert match is not None  # noqa: S101 - a path is not empty
    component = module.component or match["component"]
    path = module.name if module.component else match["path"]
    if component is None:
        component = "unet" if _OF_UNET.match(path) else "text_encoder" if _OF_TEXT.match(path) else None
    if component not in _PREFIXES:
        raise RecipeError(
            f"--to kohya: {module.name}: of which component is not known: kohya's names are for diffusion models",
            hint="give the pipeline that it was trained on: --base PIPELINE --component unet",
            code="not-convertible",
        )
    return component, path


def _tensors(module: Module) -> dict[str, Tensor]:
    if module.magnitude is not None:
        raise RecipeError(f"--to kohya: {module.name}: a dora update is no low-rank product", code="not-convertible")
    found = exact_alpha(module.scale, int(module.down.shape[0]), single=True)
    if found is None:
        raise RecipeError(
            f"--to kohya: {module.name}: no alpha / r is exactly its scale, {module.scale.source}",
            code="not-convertible",
        )
    down, up = padded(module, found.rank)
    alpha = torch.tensor(float(found.alpha), dtype=torch.float32)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}
