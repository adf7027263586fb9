"""A diffusion pipeline run to its end, by one prompt and seed, in four steps; and what its components are given.

Promise: the pipeline is diffusers' own, with its scheduler, tokenizers and loop; nothing of ours stands between. Where
graphs take components' places, they are given what the pipeline gives the component.
"""

from __future__ import annotations

import base64
import inspect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_deploy.errors import EvidenceError
from lora_deploy.evidence.component import Component
from lora_deploy.evidence.forward import quiet_peers
from lora_deploy.evidence.probe import SEED
from lora_deploy.evidence.session import Session
from lora_deploy.export.loading import quiet
from lora_deploy.pipeline_layout import MODEL_INDEX

N_STEPS = 4
PROMPT = "a photograph of a red fox in the snow, early morning light"
_LATENT_EDGE = 32
"""Largest height and width of latents: pictures of 256 pixels, mostly."""


def load_pipeline(root: Path, variant: str | None = None) -> Any:  # noqa: ANN401 - a pipeline of diffusers
    """Load a pipeline in float32, from its folder alone.

    Raises:
        EvidenceError: diffusers does not load it.
    """
    import diffusers

    index = (root / MODEL_INDEX).read_text()
    left_out = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if f'"{name}"' in index}
    load: Any = diffusers.DiffusionPipeline.from_pretrained
    diffusers.utils.logging.disable_progress_bar()
    try:
        with quiet(), quiet_peers():
            pipeline = load(
                str(root),
                torch_dtype=torch.float32,
                variant=variant,
                local_files_only=True,
                use_safetensors=True,
                **left_out,
            )
    except Exception as error:  # whatever diffusers and its parts raise
        raise EvidenceError(f"{root}: diffusers does not load it: {type(error).__name__}: {error}") from error
    finally:
        diffusers.utils.logging.enable_progress_bar()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: str = PROMPT) -> Tensor:  # noqa: ANN401
    """Draw one picture, (3, height, width) in [0, 1].

    Raises:
        EvidenceError: The pipeline does not run on a prompt alone.
    """
    edge = _edge(pipeline)
    try:
        with quiet(), quiet_peers(), torch.inference_mode():
            found = pipeline(
                prompt=prompt,
                num_inference_steps=N_STEPS,
                generator=torch.Generator().manual_seed(SEED),
                height=edge,
                width=edge,
                output_type="pt",
            )
    except Exception as error:
        name = type(pipeline).__name__
        raise EvidenceError(f"{name} does not run on a prompt: {type(error).__name__}: {error}") from error
    return torch.as_tensor(found.images[0]).detach().float().cpu().clone()


def _edge(pipeline: Any) -> int:  # noqa: ANN401
    """Height and width of pictures, in pixels: the pipeline's own, if that is small."""
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    size = getattr(getattr(denoiser, "config", None), "sample_size", None)
    latent = min(size if isinstance(size, int) else _LATENT_EDGE, _LATENT_EDGE)
    return latent * int(getattr(pipeline, "vae_scale_factor", 8))


def png(picture: Tensor) -> str:
    """Encode a picture, (3, height, width) in [0, 1], as PNG in base64."""
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


@dataclass(slots=True)
class Calls:
    """What one graph's component was given, call by call."""

    component: Component
    inputs: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def spread(self) -> list[dict[str, Tensor]]:
        """The first call, one in the middle, and the last: of a denoiser early, middle and late timesteps."""
        places = dict.fromkeys((0, len(self.inputs) // 2, len(self.inputs) - 1))
        return [self.inputs[place] for place in places if 0 <= place < len(self.inputs)]


@contextmanager
def heard(pipeline: Any, components: Sequence[Component]) -> Iterator[dict[str, Calls]]:  # noqa: ANN401
    """Write down what components are given while the block runs; by graph."""
    calls = {component.graph: Calls(component) for component in components}
    with _replaced(pipeline, components, lambda component, method: _hearing(calls[component.graph], component, method)):
        yield calls


@contextmanager
def graphs_in_place(pipeline: Any, sessions: Mapping[str, Session]) -> Iterator[None]:  # noqa: ANN401
    """Have graphs compute what components of these names would, while the block runs."""
    components = [
        Component(name="vae" if graph.startswith("vae_") else graph, graph=graph)
        for graph in sessions
        if graph != "vae_encoder"  # a picture from a prompt needs none
    ]

    def by_graph(component: Component, method: Callable[..., Any]) -> Callable[..., Any]:
        return _by_graph(sessions[component.graph], component, method)

    with _replaced(pipeline, components, by_graph):
        yield


@contextmanager
def _replaced(
    pipeline: Any,  # noqa: ANN401
    components: Sequence[Component],
    replacement: Callable[[Component, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    changed: list[tuple[Any, str]] = []
    try:
        for component in components:
            model = getattr(pipeline, component.name)
            method = _METHODS.get(component.graph, "forward")
            setattr(model, method, replacement(component, getattr(model, method)))
            changed.append((model, method))
        yield
    finally:
        for model, method in changed:
            delattr(model, method)


_METHODS = {"vae_encoder": "encode", "vae_decoder": "decode"}
_FIRST_ARGUMENT = {"vae_encoder": "sample", "vae_decoder": "latent_sample"}


def _hearing(calls: Calls, component: Component, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the component's own
        calls.inputs.append(_inputs(component, method, args, kwargs))
        return method(*args, **kwargs)

    return call


def _by_graph(session: Session, component: Component, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        found = session.run(_inputs(component, method, args, kwargs))
        return _as_text_output(found) if "input_ids" in session.inputs else (next(iter(found.values())).float(),)

    return call


def _inputs(
    component: Component, method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    first = _FIRST_ARGUMENT.get(component.graph)
    if first is not None:
        value = args[0] if args else next(iter(kwargs.values()))
        return {first: value.detach().clone().float()}
    arguments = inspect.signature(method).bind(*args, **kwargs).arguments
    owner: Any = method.__self__  # type: ignore[attr-defined]
    return component.inputs_of(owner, {**arguments, **arguments.get("kwargs", {})})


def _as_text_output(found: Mapping[str, Tensor]) -> Any:  # noqa: ANN401 - an output of transformers
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.clip.modeling_clip import CLIPTextModelOutput

    values = {name: value.float() for name, value in found.items() if "." not in name}
    inner = [found[name].float() for name in sorted((n for n in found if n.startswith("hidden_states.")), key=_place)]
    kind: Any = CLIPTextModelOutput if "text_embeds" in values else BaseModelOutputWithPooling
    return kind(**values, hidden_states=tuple(inner) or None)


def _place(name: str) -> int:
    return int(name.rpartition(".")[2])
