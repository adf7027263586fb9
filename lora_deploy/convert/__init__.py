"""Adapters written back out in another format; a format is one module here and one line in ``TARGETS``.

Promise: importing this package imports no tensor library. What is written means exactly what was read: factors keep
their bytes, and the scale that the other format computes is the one that was read, or the conversion is refused.
"""

from __future__ import annotations

from lora_deploy.registry import Entry

TARGETS: tuple[Entry, ...] = (
    Entry(
        name="peft",
        summary="PEFT folder: adapter_config.json and adapter_model.safetensors",
        path="lora_deploy.convert.peft:write",
    ),
    Entry(
        name="kohya",
        summary="one .safetensors with lora_unet_… and lora_te_… names, for diffusion models",
        path="lora_deploy.convert.kohya:write",
    ),
)
