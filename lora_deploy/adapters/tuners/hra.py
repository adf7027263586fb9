"""HRA: inputs reflected at planes, one after another: ``W' = W·Π(I - 2·u·u^T)``; or at all at once, made orthogonal.

Source: HRA, arXiv:2405.17484; peft 0.21.2, ``tuners/hra/layer.py``, ``get_delta_weight``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from lora_deploy.adapter import ModuleUpdate, Orientation, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.errors import NonFiniteTensorError
from lora_deploy.updates.rotation import Reflections, Rotation


class HraConfig(TunerConfig):
    """Configuration of HRA."""

    r: int | None = None
    apply_GS: bool = False  # noqa: N815 - PEFT's name


def read_module(module: Adapted, config: HraConfig) -> ModuleUpdate:
    """Make the update of one module.

    Raises:
        NonFiniteTensorError: A plane without a normal.
    """
    stored = module.factor("hra_u", None, None)
    normals = stored.to(torch.float64)
    lengths = torch.linalg.vector_norm(normals, dim=0)
    if not bool((lengths > 0).all()):
        raise NonFiniteTensorError(f"{module.file.path}: {module.path}: a column of hra_u is zero: HRA divides by it")
    normals = torch.linalg.qr(normals).Q if config.apply_GS else normals / lengths
    make = partial(_rotation, Reflections(normals=normals))
    known = (None, int(stored.shape[0]))
    shapeless = Shapeless(kind=Rotation.kind, known=known, make=make, tensors=(stored,), takes_kernels=True)
    return module.update(shapeless, orientation=Orientation.STORED)  # PEFT adapts no Conv1D


def _rotation(turn: Reflections, n_out: int, n_in: int) -> Rotation:
    del n_in
    return Rotation(turns=(turn,), axis="columns", n_other=n_out)


def _read(modules: Sequence[Adapted], config: HraConfig) -> Reading:
    return Reading(updates=[read_module(module, config) for module in modules])


TUNER = Tuner(peft_type="HRA", config=HraConfig, slots=(("hra_u", ""),), read=_read)
