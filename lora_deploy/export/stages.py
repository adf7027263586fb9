"""Cut a transformers model into the graphs that serve it, each with inputs of two sizes.

A decoder with a cache is two graphs: ``prefill`` starts the cache, ``decode`` adds one token to it (one, because only
then onnxruntime's grouped-query attention applies). An encoder-decoder has its ``encoder`` besides; where texts have
images in them, ``prefill`` reads both. Everything else is one graph, ``model``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_deploy.errors import ExportError
from lora_deploy.export.samples import SampleSize, has_image_tokens, sample_inputs

SIZES = (SampleSize(n_rows=2, n_tokens=9), SampleSize(n_rows=3, n_tokens=12))
"""Of the inputs that are traced, and of those that the graph is tried with; every axis that varies differs."""

_FLAGS = frozenset({"use_cache", "return_dict", "output_attentions", "output_hidden_states"})
"""What the exporter takes out of the inputs itself."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stage:
    """One graph to make."""

    component: str
    module: Any
    """What is traced: the model or a part of it."""
    inputs: Mapping[str, Any]
    others: Mapping[str, Any]
    """The same inputs at another size."""
    floats: frozenset[str] = frozenset()
    """Inputs that stay float32 whatever the model's format."""


def stages_of(model: Any) -> Iterator[Stage]:  # noqa: ANN401 - a transformers model
    """Cut a model.

    Raises:
        ExportError: It cannot be run on sample inputs.
    """
    if not _generates(model):
        inputs, others = (sample_inputs(model, size, is_left_padded=False) for size in SIZES)
        yield Stage(component="model", module=model, inputs=inputs, others=others)
        return
    first, second = (_generation_inputs(model, size) for size in _sizes(model))
    if not first:
        inputs, others = (sample_inputs(model, size, is_left_padded=True) for size in SIZES)
        yield Stage(component="model", module=model, inputs=inputs, others=others)
        return
    if model.config.is_encoder_decoder:
        yield _encoder(model)
    for component, (module, inputs) in first.items():
        if component not in second:
            raise ExportError(f"{component}: whether it is needed depends on the sample")
        yield Stage(component=component, module=module, inputs=inputs, others=second[component][1])


def varying(inputs: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Mark the axes that differ between two samples as dynamic, in the form that ``torch.export`` wants.

    An axis that is alike in both is fixed: symbolic shapes cost minutes on axes that never vary. The caches' classes
    are registered with torch's pytree before.
    """
    return {key: _marked(value, others[key]) for key, value in inputs.items() if key not in _FLAGS}


def _marked(one: Any, other: Any) -> Any:  # noqa: ANN401 - a tree of tensors
    if isinstance(one, torch.Tensor):
        sizes = enumerate(zip(one.shape, other.shape, strict=True))
        return {axis: torch.export.Dim.AUTO for axis, (left, right) in sizes if left != right}
    if type(one) is dict:
        return {key: _marked(value, other[key]) for key, value in one.items()}
    if type(one) in {list, tuple}:
        return type(one)(_marked(left, right) for left, right in zip(one, other, strict=True))
    node = torch.utils._pytree.SUPPORTED_NODES.get(type(one))  # noqa: SLF001 - as the exporter itself does
    if node is None:
        return None
    children, twins = node.flatten_fn(one)[0], node.flatten_fn(other)[0]
    return [_marked(left, right) for left, right in zip(children, twins, strict=True)]


def _generates(model: Any) -> bool:  # noqa: ANN401
    return bool(getattr(model, "can_generate", lambda: False)())


def _sizes(model: Any) -> Iterable[SampleSize]:  # noqa: ANN401
    """Where images have places in the text, the exporter fixes how many: one, in one text."""
    return (replace(size, n_rows=1) for size in SIZES) if has_image_tokens(model.config) else SIZES


def _generation_inputs(model: Any, size: SampleSize) -> dict[str, tuple[Any, dict[str, Any]]]:  # noqa: ANN401
    """What a model is given when it begins an answer and when it goes on; nothing where another one answers for it."""
    from transformers.exporters.utils import decompose_prefill_decode

    inputs = sample_inputs(model, size, is_left_padded=not model.config.is_encoder_decoder)
    if model.config.is_encoder_decoder:
        start = getattr(model.generation_config, "decoder_start_token_id", None) or 0
        model.generation_config.decoder_start_token_id = start  # any token will do to trace with
        # More than the one token that generation starts with, so that the length varies.
        prompt = torch.full((size.n_rows, size.n_tokens - 4), 1, dtype=torch.long)
        prompt[:, 0] = start
        inputs["decoder_input_ids"] = prompt
    inputs |= _whole_cache(model)
    model.generation_config.use_cache = True  # some configurations leave it out
    try:
        with torch.no_grad():
            found = dict(decompose_prefill_decode(model, copy.deepcopy(inputs)))
        return {component: (module, _seeing(given, inputs)) for component, (module, given) in found.items()}
    except RuntimeError as error:
        if error.__cause__ is not None:
            raise
        return {}  # its own forward pass was never called


def _seeing(given: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Give a stage the image itself where it was given what the model's encoder had made of it before."""
    ahead = "mm_encoder_outputs"
    kept = {name: value for name, value in given.items() if name != ahead}
    return kept | {"pixel_values": inputs["pixel_values"]} if given.get(ahead) else kept


def _whole_cache(model: Any) -> dict[str, Any]:  # noqa: ANN401
    """An empty cache that keeps every token, where the model's own keeps a window of them.

    The exporter traces such layers like that, because a cut to the window counts tokens in Python; masks leave out what
    is outside the window.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if not _has_windows(model.config):
        return {}
    cache = DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[number] = DynamicLayer()
    return {"past_key_values": cache}


def _has_windows(config: Any) -> bool:  # noqa: ANN401
    """Whether layers see a window of what was before."""
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    return bool(kinds & {"sliding_attention", "chunked_attention"}) or bool(getattr(text, "sliding_window", None))


def _encoder(model: Any) -> Stage:  # noqa: ANN401
    encoder = model.get_encoder()
    inputs, others = (sample_inputs(encoder, size, is_left_padded=False) for size in SIZES)
    with suppress(AttributeError):
        encoder.config.is_encoder_decoder = False  # a part of the model's own copy of its configuration
    return Stage(component="encoder", module=encoder, inputs=inputs, others=others)
