"""OpenCLIP's text encoder (Stable Diffusion 2, CLIP-G of SDXL) under the names of transformers.

Query, key and value are one ``in_proj_weight``. Its ``text_projection`` is the transpose of transformers' and has no
name here.
Source: diffusers 0.42, ``loaders/single_file_utils.py``, ``convert_open_clip_checkpoint``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from lora_deploy.names.parts import Part, rows_of
from lora_deploy.tensors import TensorSpec

_LAYER = re.compile(r"^transformer\.resblocks\.(?P<i>\d+)\.(?P<rest>.+)$")
_OF_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_WHOLE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_SIGN = "transformer.resblocks.0.attn.in_proj_weight"


def other_names(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """Yield transformers' names of an OpenCLIP model."""
    if _SIGN not in specs:
        return
    for name, spec in specs.items():
        if other := _WHOLE.get(name):
            yield other, (Part(tensor=name),)
        if match := _LAYER.match(name):
            yield from _of_layer(name, spec, f"text_model.encoder.layers.{match['i']}", match["rest"])


def _of_layer(name: str, spec: TensorSpec, layer: str, rest: str) -> Iterator[tuple[str, tuple[Part, ...]]]:
    module, _, slot = rest.rpartition(".")
    if own := _OF_LAYER.get(module):
        yield f"{layer}.{own}.{slot}", (Part(tensor=name),)
    if rest in {"attn.in_proj_weight", "attn.in_proj_bias"}:
        height = spec.region.n_rows // len(_PROJECTIONS)
        for k, projection in enumerate(_PROJECTIONS):
            region = rows_of(spec.region, k * height, (k + 1) * height)
            yield f"{layer}.self_attn.{projection}.{slot.removeprefix('in_proj_')}", (Part(tensor=name, region=region),)
