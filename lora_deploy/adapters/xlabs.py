"""XLabs' adapters of Flux: attention processors with fused query, key and value, without alpha.

``double_blocks.i.processor.qkv_lora1`` is the image's stream, ``qkv_lora2`` the text's; ``single_blocks.i.processor.
qkv_lora`` are the first rows of ``linear1``. The scale is 1.
Source: diffusers 0.42, ``loaders/lora_conversion_utils.py``, ``_convert_xlabs_flux_lora_to_diffusers``.
"""

from __future__ import annotations

from lora_deploy.adapter import Adapter
from lora_deploy.adapters.diffusion.keys import format_of
from lora_deploy.adapters.diffusion.reading import read_modules
from lora_deploy.adapters.interface import AdapterFile, ReadOptions


class XlabsReader:
    """Reads XLabs' files."""

    format = "xlabs"

    def recognises(self, file: AdapterFile) -> bool:
        """Whether keys are those of XLabs' processors."""
        return format_of(file) == self.format

    def read(self, file: AdapterFile, options: ReadOptions) -> Adapter:
        """Turn the file into updates.

        Raises:
            MalformedAdapterError: A key that is none of XLabs' adapters (their controls are none), or misfits.
            RecipeError: A component that the file does not hold.
        """
        return read_modules(file, options, self.format)


READER = XlabsReader()
