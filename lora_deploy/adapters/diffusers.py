"""Adapters as diffusers saves them, of all its generations, and as ai-toolkit does after it.

Until 0.22 attention processors (``…attn1.processor.to_q_lora.down.weight``), until 0.24 ``…lora.down.weight`` or
``…lora_linear_layer.down.weight``; since then PEFT's factors behind the name of the component. Since 0.35 the header
has each component's configuration, ``lora_adapter_metadata``: its scale counts. Without it and without ``alpha``
tensors the scale is 1.
Source: diffusers 0.42, ``loaders/lora_base.py`` and ``loaders/lora_conversion_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_deploy.adapter import Adapter
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.diffusion.keys import format_of
from lora_deploy.adapters.diffusion.reading import ScaleOfModule, by_alpha, read_modules
from lora_deploy.adapters.header import CONFIGURATION, by_component, header_configuration
from lora_deploy.adapters.interface import AdapterFile, ReadOptions
from lora_deploy.adapters.peft.config import PeftConfig, parse_config, refuse_unmergeable
from lora_deploy.adapters.peft.scale import Scales
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.interface import Scale


class DiffusersReader:
    """Reads diffusers' files."""

    format = "diffusers"

    def recognises(self, file: AdapterFile) -> bool:
        """Whether keys are those of one of diffusers' generations, without PEFT's configuration beside them."""
        return format_of(file) == self.format

    def read(self, file: AdapterFile, options: ReadOptions) -> Adapter:
        """Turn the file into updates.

        Raises:
            MalformedAdapterError: A key that diffusers does not write, or tensors that do not fit each other.
            UnmergeableAdapterError: A configuration that no weights can express.
            RecipeError: A component that the file does not hold.
        """
        return read_modules(file, options, self.format, _scales(file, options))


READER = DiffusersReader()


def _scales(file: AdapterFile, options: ReadOptions) -> ScaleOfModule:
    """Give scales by the configurations in the header, for the components that have one."""
    scales = {
        component: Scales(
            path=file.path,
            config=_config(file, component, raw),
            config_name=f"metadata {CONFIGURATION}",
            has_alpha="lora_alpha" in raw,
            alpha=options.alpha,
        )
        for component, raw in by_component(header_configuration(file) or {}).items()
    }
    plain = by_alpha(options)

    def scale_of(module: Adapted, rank: int) -> Scale:
        own = next((scales[name] for name in module.components if name in scales), None)
        return plain(module, rank) if own is None else own.of(module.path, rank)[1]

    return scale_of


def _config(file: AdapterFile, component: str, raw: Mapping[str, Any]) -> PeftConfig:
    """Check a component's configuration.

    Raises:
        UnmergeableAdapterError: A variant that its factors alone do not tell.
    """
    config = parse_config({"peft_type": "LORA", **raw}, file.path)
    refuse_unmergeable(config, file.path, base_is_residual=False)
    for field in ("kasa_config", "use_bdlora", "target_parameters", "layer_replication", "trainable_token_indices"):
        if getattr(config, field):
            raise UnmergeableAdapterError(
                f"{file.path}: {component}: {field} is set in the header: not supported in a pipeline's file",
                hint="save the component's adapter with PEFT and merge its folder with --component",
            )
    if config.residual_method:
        raise UnmergeableAdapterError(
            f"{file.path}: {component}: init_lora_weights {config.init_lora_weights!r} changed the base",
            hint="save the component's adapter with PEFT and merge its folder with --component",
        )
    return config
