"""Names of diffusion models: what diffusers and transformers call their tensors, and what the original releases do.

    unet        Stable Diffusion 1 and 2, SDXL: input_blocks … against down_blocks …
    flux        Flux.1: double_blocks … against transformer_blocks …, fused projections
    sd3         Stable Diffusion 3: joint_blocks … against transformer_blocks …, fused projections
    open_clip   OpenCLIP's text encoder against transformers': one fused in_proj_weight

Promise: a model stored in either dialect is found under the names of both; which one it is, its own names tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lora_deploy.names.diffusion import flux, open_clip, sd3, unet
from lora_deploy.names.parts import Part
from lora_deploy.tensors import TensorSpec

_MODELS = (unet, flux, sd3, open_clip)


def other_names(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """Yield the names of the other dialect for the tensors of a diffusion model; none for any other model."""
    for model in _MODELS:
        yield from model.other_names(specs)
