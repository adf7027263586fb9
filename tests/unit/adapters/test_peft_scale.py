"""Rank and scale by version, pattern and rank stabilisation; the scale says where it came from."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from peft.utils.other import get_pattern_key

from lora_deploy.adapters.peft.config import PeftConfig
from lora_deploy.adapters.peft.scale import Scales
from lora_deploy.errors import AmbiguousAdapterFormatError, MalformedAdapterError

MODULE = "model.layers.0.q_proj"


def scales(*, alpha: float | None = None, has_alpha: bool = True, has_rank: bool = True, **fields: Any) -> Scales:
    config = PeftConfig.model_validate({"r": 8, "lora_alpha": 16, **fields})
    return Scales(
        path=Path("a"),
        config=config,
        config_name="adapter_config.json",
        has_alpha=has_alpha,
        has_rank=has_rank,
        alpha=alpha,
    )


# -------------------------------------------------------------------------------------------------------------- scale


def test_the_scale_is_alpha_by_rank_exactly() -> None:
    rank, scale = scales(lora_alpha=1, r=3).of(MODULE, 3)
    assert rank == 3
    assert scale.factor == Fraction(1, 3)
    assert scale.source == "lora_alpha 1 / r 3 (adapter_config.json)"


def test_a_rank_stabilised_scale_is_alpha_by_the_root_of_the_rank() -> None:
    _, scale = scales(use_rslora=True).of(MODULE, 8)
    assert (scale.factor, scale.root) == (16, 8)
    assert scale.value == pytest.approx(16 / math.sqrt(8), rel=1e-15)
    assert scale.source == "lora_alpha 16 / sqrt(r 8), rank-stabilised (adapter_config.json)"


def test_rank_stabilisation_takes_the_rank_of_the_module() -> None:
    _, scale = scales(use_rslora=True, rank_pattern={"q_proj": 4}).of(MODULE, 4)
    assert scale.root == 4
    assert "rank_pattern 'q_proj'" in scale.source


def test_what_the_user_says_overrides_every_alpha_and_is_named() -> None:
    _, scale = scales(alpha=2.5, alpha_pattern={"q_proj": 4}).of(MODULE, 8)
    assert scale.factor == Fraction(5, 16)
    assert scale.source == "--alpha 2.5 / r 8 (instead of 4 in adapter_config.json)"


def test_a_default_says_that_it_is_one() -> None:
    _, scale = scales(lora_alpha=8, has_alpha=False).of(MODULE, 8)
    assert scale.factor == 1
    assert "PEFT's default, adapter_config.json names none" in scale.source


def test_without_a_configuration_the_tensors_say_the_rank() -> None:
    rank, scale = scales(has_rank=False, has_alpha=False, alpha=6).of(MODULE, 3)
    assert rank == 3
    assert scale.factor == 2
    assert scale.source == "--alpha 6 / r 3"


def test_tensors_of_another_rank_are_an_error() -> None:
    with pytest.raises(MalformedAdapterError, match=r"its tensors have rank 4, adapter_config\.json says 8"):
        scales().of(MODULE, 4)
    with pytest.raises(MalformedAdapterError, match=r"says 2 \(rank_pattern 'q_proj'\)"):
        scales(rank_pattern={"q_proj": 2}, peft_version="0.21.2").of(MODULE, 8)


# ------------------------------------------------------------------------------------------------------------ patterns

PATTERNS = [
    ({"q_proj": 4}, "model.q_proj"),
    ({"q_proj": 4}, "q_proj"),
    ({"q_proj": 4}, "model.xq_proj"),
    ({"q.proj": 4}, "model.qxproj"),
    ({"^model.q_proj": 4}, "model.q_proj"),
    ({"^q_proj": 4}, "model.q_proj"),
    ({"k|q_proj": 4}, "model.q_proj"),
    ({"layers.0.q_proj": 4, "q_proj": 2}, "model.layers.0.q_proj"),
    ({"q_proj": 2, "layers.0.q_proj": 4}, "model.layers.0.q_proj"),
    ({r"layers\.\d+\.q_proj": 4}, "model.layers.12.q_proj"),
    ({".*": 4}, "anything.at.all"),
    ({"q_proj.": 4}, "model.q_proj"),
]


@pytest.mark.parametrize(("pattern", "module"), PATTERNS, ids=str)
def test_patterns_match_as_in_peft_0_21(pattern: dict[str, int], module: str) -> None:
    expected = pattern.get(get_pattern_key(list(pattern), module), 8)
    rank, _ = scales(rank_pattern=pattern, peft_version="0.21.2").of(module, None)
    assert rank == expected
    _, scale = scales(alpha_pattern=pattern, peft_version="0.15.0").of(module, None)
    assert scale.factor * 8 == pattern.get(get_pattern_key(list(pattern), module), 16)


@pytest.mark.parametrize(
    ("version", "alpha"),
    [("0.13.2", 16), ("0.14.0", 16), ("0.15.0", 4)],
)
def test_before_0_15_a_key_needed_a_path_in_front(version: str, alpha: int) -> None:
    _, scale = scales(alpha_pattern={"q_proj": 4}, peft_version=version).of("q_proj", 8)
    assert scale.factor == Fraction(alpha, 8)


def test_up_to_0_13_the_first_key_of_either_pattern_decided_both() -> None:
    fields: dict[str, Any] = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.q_proj": 2}}
    _, old = scales(**fields, peft_version="0.13.0").of(MODULE, 4)
    _, new = scales(**fields, peft_version="0.14.0").of(MODULE, 4)
    assert old.factor == Fraction(16, 4)
    assert new.factor == Fraction(2, 4)


def test_up_to_0_14_an_alternation_split_the_whole_expression() -> None:
    """The second half of the expression was then matched from the start of the path."""
    fields: dict[str, Any] = {"alpha_pattern": {"k|q": 4}}
    assert scales(**fields, peft_version="0.14.0").of("model.q", 8)[1].factor == 2
    assert scales(**fields, peft_version="0.15.0").of("model.q", 8)[1].factor == Fraction(4, 8)


def test_without_a_version_the_tensors_choose_between_the_rules() -> None:
    rank, _ = scales(rank_pattern={"q_proj": 4}).of("q_proj", 4)
    assert rank == 4
    rank, _ = scales(rank_pattern={"q_proj": 4}).of("q_proj", 8)
    assert rank == 8


def test_without_a_version_rules_that_disagree_are_ambiguous_until_the_user_decides() -> None:
    with pytest.raises(AmbiguousAdapterFormatError, match="alpha 4 / r 8 or alpha 16 / r 8") as caught:
        scales(alpha_pattern={"q_proj": 4}).of("q_proj", 8)
    assert "peft_version" in str(caught.value.hint)
    assert scales(alpha_pattern={"q_proj": 4}, alpha=8).of("q_proj", 8)[1].factor == 1


def test_a_pattern_that_matches_no_module_is_listed() -> None:
    found = scales(rank_pattern={"q_proj": 4, "typo": 2}, alpha_pattern={"v_proj": 1}).unmatched([MODULE])
    assert found == ["typo", "v_proj"]
