"""The order in which a model's class creates its layers: no file tells it, tensors are saved by name.

Promise: the class is one of transformers' own, built from ``config.json`` on the meta device; no weight is read and no
code that a base brings along is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from lora_deploy.adapter import Layer
from lora_deploy.errors import UnmergeableAdapterError

_HINT = "the adapter's own library can merge it where the model is loaded"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayers:
    """Layers of a model, in the order of its modules."""

    linear: tuple[Layer, ...]
    """``nn.Linear`` and ``Conv1D``."""
    embeddings: tuple[Layer, ...]
    """``nn.Embedding``: (tokens, dim)."""
    order: tuple[str, ...]
    """Paths of both kinds."""


def layers_in_order(config: Mapping[str, Any]) -> ModelLayers:
    """List a model's layers in the order in which its class creates them.

    Raises:
        UnmergeableAdapterError: The order cannot be known: no class is named, or it is not one of transformers.
    """
    names = [str(name) for name in config.get("architectures") or ()]
    if not names or "model_type" not in config:
        raise UnmergeableAdapterError("the base's config.json names no architecture", hint=_HINT)
    if find_spec("transformers") is None:
        raise UnmergeableAdapterError(
            "transformers, which knows it, is not installed", hint="pip install 'lora-deploy[export]'"
        )
    import transformers
    from transformers.pytorch_utils import Conv1D

    cls: Any = getattr(transformers, names[0], None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise UnmergeableAdapterError(f"transformers {transformers.__version__} has no architecture {names[0]}")
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            known = cls.config_class
            assert known is not None  # noqa: S101 - of every class that has an architecture
            model = cls(known.from_dict(dict(config)))
    except Exception as error:
        raise UnmergeableAdapterError(f"{names[0]} cannot be built: {type(error).__name__}: {error}") from error
    linear, embeddings = [], []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            linear.append(Layer(path=path, n_out=module.out_features, n_in=module.in_features))
        elif isinstance(module, Conv1D):
            n_in, n_out = module.weight.shape
            linear.append(Layer(path=path, n_out=int(n_out), n_in=int(n_in)))
        elif isinstance(module, torch.nn.Embedding):
            embeddings.append(Layer(path=path, n_out=module.num_embeddings, n_in=module.embedding_dim))
    known_paths = {layer.path for layer in (*linear, *embeddings)}
    order = tuple(path for path, _ in model.named_modules() if path in known_paths)
    return ModelLayers(linear=tuple(linear), embeddings=tuple(embeddings), order=order)
