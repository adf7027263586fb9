"""Adapters of sd-scripts (kohya) and LyCORIS, and whoever names tensors as they do: OneTrainer, ai-toolkit, ComfyUI.

Modules have underscores for dots behind a prefix that names the component, or dots behind a component. Every module has
its own algorithm and its own ``alpha``; ``r`` is the first side of ``lora_down``.
Source: sd-scripts 0.9, ``networks/lora.py``; LyCORIS 4.1.3.
"""

from __future__ import annotations

from lora_deploy.adapter import Adapter
from lora_deploy.adapters.diffusion.keys import format_of
from lora_deploy.adapters.diffusion.reading import read_modules
from lora_deploy.adapters.interface import AdapterFile, ReadOptions


class KohyaReader:
    """Reads files of sd-scripts and LyCORIS."""

    format = "kohya"

    def recognises(self, file: AdapterFile) -> bool:
        """Whether keys are flattened, or slots are those of sd-scripts and LyCORIS."""
        return format_of(file) == self.format

    def read(self, file: AdapterFile, options: ReadOptions) -> Adapter:
        """Turn the file into updates.

        Raises:
            MalformedAdapterError: A key that no trainer writes, or tensors that do not fit each other.
            UnmergeableAdapterError: An algorithm that no weights can express.
            RecipeError: A component that the file does not hold.
        """
        return read_modules(file, options, self.format)


READER = KohyaReader()
