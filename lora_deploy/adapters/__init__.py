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
        path="lora_deploy.adapters.peft.reader:READER",
    ),
    Entry(
        name="kohya",
        summary="sd-scripts (kohya), LyCORIS, OneTrainer: lora_unet_… and lora_te_…, an algorithm for each module",
        path="lora_deploy.adapters.kohya:READER",
    ),
    Entry(
        name="diffusers",
        summary="diffusers, ai-toolkit: pytorch_lora_weights.safetensors of all generations, a file for a pipeline",
        path="lora_deploy.adapters.diffusers:READER",
    ),
    Entry(
        name="xlabs",
        summary="XLabs' Flux: double_blocks.0.processor.qkv_lora1.down.weight",
        path="lora_deploy.adapters.xlabs:READER",
    ),
    Entry(
        name="bfl",
        summary="Black Forest Labs' Flux: double_blocks.0.img_attn.qkv.lora_A.weight",
        path="lora_deploy.adapters.bfl:READER",
    ),
    Entry(
        name="mlx",
        summary="mlx-lm: adapters.safetensors or .npz with <m>.lora_a and <m>.lora_b, and adapter_config.json",
        path="lora_deploy.adapters.mlx:READER",
    ),
    Entry(
        name="torchtune",
        summary="torchtune: adapter_model.pt or adapter_N.pt, and its exports under PEFT's names",
        path="lora_deploy.adapters.torchtune:READER",
    ),
    Entry(
        name="litgpt",
        summary="litgpt: lit_model.pth.lora with hyperparameters.yaml and model_config.yaml",
        path="lora_deploy.adapters.litgpt:READER",
    ),
    Entry(
        name="cloneofsimo",
        summary="cloneofsimo/lora: a .pt list or numbered .safetensors, without names",
        path="lora_deploy.adapters.cloneofsimo:READER",
    ),
    Entry(
        name="gguf",
        summary="llama.cpp: a .gguf file of type adapter, from convert_lora_to_gguf.py",
        path="lora_deploy.adapters.gguf:READER",
    ),
    Entry(
        name="onnx",
        summary="ONNX Runtime: .onnx_adapter (Olive, lora-deploy export --multi-lora) or ONNX Runtime GenAI's .npz",
        path="lora_deploy.adapters.onnx:READER",
    ),
    Entry(
        name="state-dict",
        summary="one state dict with <m>.lora_A and <m>.lora_B: loralib or a hand-written module",
        path="lora_deploy.adapters.state_dict:READER",
    ),
)
