"""Cut a diffusion pipeline into the graphs that serve it, with the names that optimum's pipelines know.

    unet          sample, timestep, encoder_hidden_states (text_embeds, time_ids; timestep_cond)  ─▶ out_sample
    transformer   hidden_states, encoder_hidden_states, pooled_projections, timestep (…)          ─▶ out_hidden_states
    vae_encoder   sample         ─▶ latent_parameters: mean and log variance, one after the other
    vae_decoder   latent_sample  ─▶ sample
    text_encoder  input_ids      ─▶ last_hidden_state, pooler_output or text_embeds (hidden_states.0 …)

Batch, height, width and the length of the text vary; heights and widths are multiples of what the model halves them by.
Source: optimum-onnx (April 2026) ``exporters/onnx/model_configs.py``, ``onnxruntime/modeling_diffusion.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_deploy.errors import ExportError
from lora_deploy.export.stages import Stage

LEFT_OUT = frozenset({"safety_checker", "image_encoder"})
"""Components that optimum's pipelines run without, or in torch."""
_WITH_HIDDEN_STATES = ("StableDiffusionXL", "StableDiffusion3")
"""How the classes of pipelines begin that read a text encoder's inner layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    """How large a sample is; no two of its numbers are alike, nor those of two samples."""

    n_rows: int
    n_tokens: int
    height: int
    """In units of the model's smallest picture."""
    width: int


_SIZES = (_Size(n_rows=2, n_tokens=9, height=4, width=6), _Size(n_rows=3, n_tokens=12, height=8, width=5))


class _Denoiser(nn.Module):
    """A UNet with all conditions as plain inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        (predicted,) = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return {"out_sample": predicted}


class _Transformer(nn.Module):
    """A transformer of patches; what it does not take is not among its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        txt_ids: Tensor | None = None,
        img_ids: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> dict[str, Tensor]:
        others = {"txt_ids": txt_ids, "img_ids": img_ids, "guidance": guidance}
        predicted = self.model(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            return_dict=False,
            **{name: value for name, value in others.items() if value is not None},
        )
        return {"out_hidden_states": predicted[0]}


class _Encoder(nn.Module):
    """The half of an autoencoder that reads pictures."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, sample: Tensor) -> dict[str, Tensor]:
        (distribution,) = self.model.encode(sample, return_dict=False)
        return {"latent_parameters": distribution.parameters}


class _Decoder(nn.Module):
    """The half of an autoencoder that makes pictures."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, latent_sample: Tensor) -> dict[str, Tensor]:
        (picture,) = self.model.decode(latent_sample, return_dict=False)
        return {"sample": picture}


def module_of(graph: str, model: Any) -> Any:  # noqa: ANN401 - torch modules
    """Give what a component's graph is traced from: it takes and gives what the graph does, by the same names."""
    if graph in _HALVES:
        return _HALVES[graph](model)
    return _WRAPPERS.get(type(model).__name__, lambda same: same)(model)


def reads_hidden_states(pipeline: Mapping[str, Any]) -> bool:
    """Whether pipelines of this class read their text encoders' inner layers."""
    return str(pipeline.get("_class_name", "")).startswith(_WITH_HIDDEN_STATES)


def stages_of_component(component: str, model: Any, pipeline: Mapping[str, Any]) -> Iterator[Stage]:  # noqa: ANN401
    """Cut one component; ``pipeline`` holds the class of the pipeline and the configurations of all components.

    Raises:
        ExportError: No sample inputs are known for a model of this class, or of this configuration.
    """
    name = type(model).__name__
    if name in _STAGES:
        yield from _STAGES[name](component, model, pipeline)
    elif hasattr(model, "get_input_embeddings") and "encoder" in component:
        yield _text_stage(component, model, pipeline)
    else:
        raise ExportError(
            f"{component}: cannot be exported: no sample inputs are known for {name}",
            hint=f"known are {', '.join(_STAGES)} and the text encoders of transformers",
            code="unknown-component",
        )


def graphs_of(component: str) -> tuple[str, ...]:
    """Name the graphs that a component becomes, each in a folder of that name."""
    return ("vae_encoder", "vae_decoder") if component == "vae" else () if component in LEFT_OUT else (component,)


def _unet_stages(component: str, model: Any, pipeline: Mapping[str, Any]) -> Iterator[Stage]:  # noqa: ANN401
    config = model.config
    addition = getattr(config, "addition_embed_type", None)
    if addition not in {None, "text_time"} or getattr(config, "class_embed_type", None) is not None:
        raise ExportError(f"{component}: cannot be exported: conditions {addition}, {config.class_embed_type}")
    width = getattr(config, "encoder_hid_dim", None) or config.cross_attention_dim
    factor = 2 ** (len(config.block_out_channels) - 1)

    def inputs(size: _Size) -> dict[str, Tensor]:
        made = {
            "sample": _random(model, size.n_rows, config.in_channels, factor * size.height, factor * size.width),
            "timestep": torch.tensor(float(size.n_tokens)),
            "encoder_hidden_states": _random(model, size.n_rows, size.n_tokens, _first(width)),
        }
        if getattr(config, "time_cond_proj_dim", None) is not None:
            made["timestep_cond"] = _random(model, size.n_rows, config.time_cond_proj_dim)
        if addition == "text_time":
            n_ids, n_text = _added(config, pipeline)
            made["text_embeds"] = _random(model, size.n_rows, n_text)
            made["time_ids"] = 16 * _random(model, size.n_rows, n_ids)
        return made

    yield _stage(component, model, inputs)


def _added(config: Any, pipeline: Mapping[str, Any]) -> tuple[int, int]:  # noqa: ANN401
    """Count the numbers that describe the picture's size, and the width of the pooled text beside them."""
    n_inputs, each = int(config.projection_class_embeddings_input_dim), int(config.addition_time_embed_dim)
    pooled = pipeline.get("text_encoder_2") or pipeline.get("text_encoder") or {}
    n_text = int(pooled.get("projection_dim", n_inputs - 6 * each))
    return (n_inputs - n_text) // each, n_text


def _flux_stages(component: str, model: Any, _: Mapping[str, Any]) -> Iterator[Stage]:  # noqa: ANN401
    config = model.config

    def inputs(size: _Size) -> dict[str, Tensor]:
        n_patches = size.height * size.width
        rows, columns = torch.meshgrid(torch.arange(size.height), torch.arange(size.width), indexing="ij")
        places = torch.stack([torch.zeros(n_patches), rows.flatten(), columns.flatten()], dim=1)
        made = {
            "hidden_states": _random(model, size.n_rows, n_patches, config.in_channels),
            "encoder_hidden_states": _random(model, size.n_rows, size.n_tokens, config.joint_attention_dim),
            "pooled_projections": _random(model, size.n_rows, config.pooled_projection_dim),
            "timestep": torch.linspace(0.2, 0.7, size.n_rows),
            "txt_ids": torch.zeros(size.n_tokens, 3),
            "img_ids": places,
        }
        if config.guidance_embeds:
            made["guidance"] = torch.linspace(3, 4, size.n_rows)
        return made

    yield _stage(component, model, inputs)


def _sd3_stages(component: str, model: Any, _: Mapping[str, Any]) -> Iterator[Stage]:  # noqa: ANN401
    config = model.config

    def inputs(size: _Size) -> dict[str, Tensor]:
        height, width = (config.patch_size * edge for edge in (size.height, size.width))
        return {
            "hidden_states": _random(model, size.n_rows, config.in_channels, height, width),
            "encoder_hidden_states": _random(model, size.n_rows, size.n_tokens, config.joint_attention_dim),
            "pooled_projections": _random(model, size.n_rows, config.pooled_projection_dim),
            "timestep": torch.linspace(200, 700, size.n_rows),
        }

    yield _stage(component, model, inputs)


def _vae_stages(_: str, model: Any, __: Mapping[str, Any]) -> Iterator[Stage]:  # noqa: ANN401
    config = model.config
    factor = 2 ** (len(config.block_out_channels) - 1)

    def pictures(size: _Size) -> dict[str, Tensor]:
        shape = (size.n_rows, config.in_channels, factor * size.height, factor * size.width)
        return {"sample": _random(model, *shape)}

    def latents(size: _Size) -> dict[str, Tensor]:
        return {"latent_sample": _random(model, size.n_rows, config.latent_channels, size.height, size.width)}

    yield _stage("vae_encoder", model, pictures)
    yield _stage("vae_decoder", model, latents)


def _text_stage(component: str, model: Any, pipeline: Mapping[str, Any]) -> Stage:  # noqa: ANN401
    config = model.config
    end = getattr(config, "eos_token_id", None)

    def inputs(size: _Size) -> dict[str, Any]:
        ids = torch.randint(config.vocab_size // 4, config.vocab_size // 2, (size.n_rows, size.n_tokens))
        if isinstance(end, int) and end < config.vocab_size:
            for row in range(size.n_rows):  # the pooled output is read where the text ends
                ids[row, size.n_tokens - 2 - row :] = end
        return {"input_ids": ids, **({"output_hidden_states": True} if reads_hidden_states(pipeline) else {})}

    return _stage(component, model, inputs)


_STAGES: Mapping[str, Callable[[str, Any, Mapping[str, Any]], Iterator[Stage]]] = {
    "UNet2DConditionModel": _unet_stages,
    "FluxTransformer2DModel": _flux_stages,
    "SD3Transformer2DModel": _sd3_stages,
    "AutoencoderKL": _vae_stages,
}


_WRAPPERS: Mapping[str, Callable[[Any], Any]] = {
    "UNet2DConditionModel": _Denoiser,
    "FluxTransformer2DModel": _Transformer,
    "SD3Transformer2DModel": _Transformer,
}
_HALVES: Mapping[str, Callable[[Any], Any]] = {"vae_encoder": _Encoder, "vae_decoder": _Decoder}


def _stage(component: str, model: nn.Module, inputs: Callable[[_Size], dict[str, Any]]) -> Stage:
    first, second = (inputs(size) for size in _SIZES)
    module = module_of(component, model).eval()
    return Stage(component=component, module=module, inputs=first, others=second, floats=frozenset({"timestep"}))


def _random(model: Any, *shape: int) -> Tensor:  # noqa: ANN401
    return torch.randn(shape).to(model.dtype)


def _first(width: Any) -> int:  # noqa: ANN401 - a number, or one a block
    return int(width[0]) if isinstance(width, list | tuple) else int(width)
