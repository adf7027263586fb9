"""Black Forest Labs' own adapters of Flux (Canny, Depth): PEFT's factors behind the original names of modules.

There is no alpha, the scale is 1; norms that were trained are in the file as a whole, and replace the base's. A
control adapter's ``img_in`` takes twice the channels that the base does: it fits the base only where that was widened.
Source: diffusers 0.42, ``loaders/lora_conversion_utils.py``, ``_convert_bfl_flux_control_lora_to_diffusers``.
"""

from __future__ import annotations

from dataclasses import replace

from lora_deploy.adapter import Adapter, ModuleUpdate, Orientation
from lora_deploy.adapters.diffusion.keys import format_of
from lora_deploy.adapters.diffusion.reading import read_modules
from lora_deploy.adapters.factors import factor
from lora_deploy.adapters.interface import AdapterFile, ReadOptions
from lora_deploy.updates.replacement import Replacement

_NORM = ".scale"


class BflReader:
    """Reads Black Forest Labs' files."""

    format = "bfl"

    def recognises(self, file: AdapterFile) -> bool:
        """Whether PEFT's factors are behind Flux's original names."""
        return format_of(file) == self.format

    def read(self, file: AdapterFile, options: ReadOptions) -> Adapter:
        """Turn the file into updates.

        Raises:
            MalformedAdapterError: A key that is none of these adapters, or tensors that do not fit each other.
            RecipeError: A component that the file does not hold.
        """
        norms = [key for key in file.tensors if key.endswith(_NORM)]
        factors = {key: tensor for key, tensor in file.tensors.items() if key not in {*norms}}
        adapter = read_modules(replace(file, tensors=factors), options, self.format)
        return replace(adapter, updates=(*adapter.updates, *(_norm(file, key) for key in norms)))


def _norm(file: AdapterFile, key: str) -> ModuleUpdate:
    values = factor(file, key, n_dims=(1,))
    return ModuleUpdate(target=key, update=Replacement(values=values), orientation=Orientation.STORED, keys=(key,))


READER = BflReader()
