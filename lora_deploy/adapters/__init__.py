"""Readers of adapter formats; a format is one module here and one line in ``READERS``.

Promise: importing this package imports no tensor library. Every reader is asked; two that
recognise one file are an error, so their order does not matter.
"""

from __future__ import annotations

from lora_deploy.registry import Entry

READERS: tuple[Entry, ...] = (
    Entry(
        name="peft",
        summary="PEFT folder: adapter_config.json with adapter_model.safetensors or .bin",
        path="lora_deploy.adapters.peft:READER",
    ),
    Entry(
        name="state-dict",
        summary="one state dict with <m>.lora_A and <m>.lora_B: loralib or a hand-written module",
        path="lora_deploy.adapters.state_dict:READER",
    ),
)
