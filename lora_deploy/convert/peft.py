"""Write a PEFT folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

Promise: PEFT loads it, and computes the scale that was read: alpha and rank of every module stand in the patterns where
they are not the most common ones.
Source: peft 0.21.2, ``tuners/lora/config.py`` and ``utils/other.py:get_pattern_key``.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_deploy.adapter import BaseHint
from lora_deploy.artifact import Artifact
from lora_deploy.convert.modules import Module, padded
from lora_deploy.convert.scale import Alpha, exact_alpha, needs_root
from lora_deploy.convert.write import require_free, write_tensors
from lora_deploy.errors import RecipeError
from lora_deploy.safetensors_file import write_file, writing_error

_RULES = "0.21.2"
"""The release by whose rules the patterns are to be matched; those before 0.15 match other modules."""
_ROOT = "base_model.model."


def write(out: Path, modules: Sequence[Module], base: BaseHint) -> tuple[Artifact, ...]:
    """Write the folder, whole or not at all.

    Raises:
        RecipeError: Modules of several components, of which some are DoRA's, or a scale that PEFT cannot hold.
        OutputExistsError: Something is in the way.
        DiskSpaceError, MergeError: A file cannot be written.
    """
    require_free(out)
    components = {module.component for module in modules}
    if len(components) > 1:
        raise RecipeError(
            f"--to peft: one folder is one component's, found {', '.join(sorted(map(str, components)))}",
            hint=f"convert one after the other: --adapter-name {min(map(str, components))}, or --include",
        )
    is_rank_stabilised = any(needs_root(module.scale) for module in modules)
    scales = {module.name: _alpha(module, is_rank_stabilised=is_rank_stabilised) for module in modules}
    config = _config(modules, scales, base) | {"use_rslora": is_rank_stabilised}
    tensors = _tensors(modules, scales)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise writing_error(out, error) from error
    try:
        partial.chmod(0o755)
        weights = write_tensors(partial / "adapter_model.safetensors", tensors, {"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
        written = write_file(partial / "adapter_config.json", b"", [memoryview(text)], root=partial)
        partial.rename(out)
    except OSError as error:
        raise writing_error(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return written, weights


def _alpha(module: Module, *, is_rank_stabilised: bool) -> Alpha:
    found = exact_alpha(module.scale, int(module.down.shape[0]), is_rank_stabilised=is_rank_stabilised)
    if found is None:
        raise RecipeError(
            f"--to peft: {module.name}: no alpha over a rank is exactly its scale, {module.scale.source}",
            code="not-convertible",
        )
    return found


def _config(modules: Sequence[Module], scales: Mapping[str, Alpha], base: BaseHint) -> dict[str, Any]:
    is_dora = {module.magnitude is not None for module in modules}
    if len(is_dora) > 1:
        raise RecipeError("--to peft: some modules are DoRA's and some are not: PEFT's use_dora is for all")
    rank = Counter(alpha.rank for alpha in scales.values()).most_common(1)[0][0]
    common = Counter(alpha.alpha for alpha in scales.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "peft_version": _RULES,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "r": rank,
        "lora_alpha": common,
        "rank_pattern": {re.escape(name): alpha.rank for name, alpha in sorted(scales.items()) if alpha.rank != rank},
        "alpha_pattern": {
            re.escape(name): alpha.alpha for name, alpha in sorted(scales.items()) if alpha.alpha != common
        },
        "use_dora": is_dora == {True},
        "fan_in_fan_out": any(module.is_in_out for module in modules),
        "target_modules": sorted(scales),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _tensors(modules: Sequence[Module], scales: Mapping[str, Alpha]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module in modules:
        down, up = padded(module, scales[module.name].rank)
        name = _ROOT + module.name
        if module.is_embedding:
            tensors |= {f"{name}.lora_embedding_A": down, f"{name}.lora_embedding_B": up}
        else:
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        if module.magnitude is not None:
            shape = (1, -1, *(1 for _ in module.down.shape[2:])) if module.down.ndim > 2 else (-1,)
            tensors[f"{name}.lora_magnitude_vector"] = module.magnitude.reshape(shape)
    return tensors
