"""FROD: trained coefficients in a basis that all layers of a role share.

The role of a layer is made of the last two names of its path. Without the saved bases the adapter is refused: they come
from a joint decomposition of all layers' weights, whose eigenvectors no other machine need find.
Source: peft 0.21.2, ``tuners/frod/model.py``, ``_category_from_key``, and ``layer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.joint import Joint


def read_module(module: Adapted) -> ModuleUpdate:
    """Make the update of one module; its outputs only the base tells.

    Raises:
        MalformedAdapterError: Coefficients and basis do not fit each other.
    """
    diagonal = module.factor("frod_lambda_l", None)
    n_in = len(diagonal)
    role = role_of(module.path)
    basis = module.factor(f"frod_V.{role}", n_in, n_in)
    entries = module.file.tensors[module.slots["frod_lambda_s_values"]]
    n_entries = entries.shape[0]
    if n_entries:
        entries = module.factor("frod_lambda_s_values", None)
    places = module.integers(f"frod_s_indices.{role}", 2, n_entries, below=n_in)
    make = partial(_joint, basis, diagonal, places, entries)
    return module.update(Shapeless(kind=Joint.kind, known=(None, n_in), make=make, tensors=(diagonal, entries)))


def role_of(path: str) -> str:
    """Name the group of layers that share a basis, as PEFT does."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    role = f"{parts[-2]}_{parts[-1]}"
    return "attention_output" if role == "output_dense" and parts[-3:-2] == ["attention"] else role


def _joint(basis: Tensor, diagonal: Tensor, places: Tensor, entries: Tensor, n_out: int, n_in: int) -> Joint:
    assert n_in == len(diagonal)  # noqa: S101 - known from the file
    return Joint(basis=basis, diagonal=diagonal, row=places[0], column=places[1], entries=entries, n_out=n_out)


class FrodConfig(TunerConfig):
    """Configuration of FROD; the tensors say all."""

    projection_prng_key: int | None = None
    save_projection: bool = True
    sparse_rate: float | None = None
    regularization_alpha: float | None = None
    progressbar: bool = True
    runtime_offload_base_weight: bool = False


def _read(modules: Sequence[Adapted], config: FrodConfig) -> Reading:
    del config
    if not any(name.startswith("frod_V.") for name in modules[0].shared):
        raise UnmergeableAdapterError(
            f"{modules[0].file.path}: the shared bases are not in the file: they come from a joint decomposition of "
            "all layers' weights, whose eigenvectors another machine need not find",
            hint="load it where it was trained and save it with save_projection=True",
        )
    return Reading(updates=[read_module(module) for module in modules])


TUNER = Tuner(
    peft_type="FROD",
    config=FrodConfig,
    slots=(("frod_lambda_(l|s_values)", ""),),
    shared=(("frod_(V|s_indices|s_size)", r"\.[^.]+"),),
    read=_read,
)
