"""Every text model that transformers 5.23 can build small: all its linear layers adapted by PEFT 0.21.2, merged by us.

Found by this sweep: names that move between disk and memory, fused and shared experts, and whatever a release adds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from tests.peer.models import token_ids, translation
from tests.peer.small import small
from tests.peer.trained import assert_merges_as_trained, forward, randomize, reload, train

MAX_PARAMETERS = 3_000_000
ODD = {
    "funnel": "its embedding changes when it is loaded",
    "jamba": "its forward pass reads dt_proj's weight past the adapter, which training can therefore not move",
    "marian": "its positions are computed again when it is loaded",
    "mobilebert": "its head has a layer of no rows at this size",
}
CLASSES = {
    (model_type, names if isinstance(names, str) else names[0])
    for mapping in (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    for model_type, names in mapping.items()
    if model_type not in ODD
}


def _build(model_type: str, cls: type[PreTrainedModel]) -> nn.Module:
    """Build a small model, or skip: that is the library's business, not ours."""
    try:
        with torch.device("meta"):
            n_parameters = sum(parameter.numel() for parameter in cls(small(model_type)).parameters())
        if n_parameters > MAX_PARAMETERS:
            pytest.skip(f"{n_parameters} parameters at the smallest")
        model = randomize(cls(small(model_type)))
        forward(model, _inputs(model))
    except Exception as error:  # noqa: BLE001 - each of the library's models has its own idea of a wrong size
        pytest.skip(f"cannot be built small: {error!r:.100}")
    return model


def _inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(translation() if model.config.is_encoder_decoder else token_ids())


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "name"), sorted(CLASSES))
def test_a_model_merges_to_what_peft_0_21_2_merges_and_computes_what_it_was_trained_to(
    model_type: str, name: str, tmp_path: Path
) -> None:
    model = _build(model_type, getattr(transformers, name))
    config = LoraConfig(r=2, lora_alpha=5, target_modules="all-linear")
    try:
        trained = train(model, config, tmp_path)
        trained.output(_inputs(model))
        reload(trained.bare, trained.base)
    except Exception as error:  # noqa: BLE001 - as above
        pytest.skip(f"cannot be adapted, run in float64 or loaded by its own libraries: {error!r:.100}")
    assert_merges_as_trained(trained, _inputs(model), tmp_path / "out")
