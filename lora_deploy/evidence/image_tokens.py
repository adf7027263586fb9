"""How many tokens stand for an image in a text: asked of the model itself, which is built without weights for that."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from lora_deploy.evidence.architecture import Architecture
from lora_deploy.evidence.conventions import Conventions

_NAMES = ("image_token_id", "image_token_index")


def image_tokens(conventions: Conventions, architecture: Architecture) -> tuple[int, ...]:
    """Give the tokens that stand for one image of the configured size; none where the model wants more than pixels."""
    token = conventions.token(*_NAMES)
    return () if token is None else (token,) * _n_features(conventions, architecture)


def _n_features(conventions: Conventions, architecture: Architecture) -> int:
    with warnings.catch_warnings(), torch.device("meta"), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            import transformers

            cls: Any = getattr(transformers, architecture.name)
            model = cls(cls.config_class.from_dict(dict(conventions.config)))
            found = model.get_image_features(torch.zeros(1, *conventions.image_shape))
        except Exception:  # noqa: BLE001 - models whose images need sizes or grids besides: texts alone are probed
            return 0
    features = getattr(found, "pooler_output", found)
    parts = features if isinstance(features, list | tuple) else [features]
    return sum(part.shape[:-1].numel() for part in parts if isinstance(part, torch.Tensor))
