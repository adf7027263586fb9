"""Hand-written LoRA modules and loralib: layouts by shape, alpha never guessed, loralib's own merge as the oracle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from lora_deploy.adapter import Adapter, Orientation
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import AmbiguousAdapterFormatError, MalformedAdapterError, NonFiniteTensorError
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from tests.unit.adapters.apply import apply_adapter

A = torch.tensor([[1.0, 2.0, 3.0]])
"""(r, in) = (1, 3)"""
B = torch.tensor([[1.0], [10.0]])
"""(out, r) = (2, 1)"""
DELTA = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], dtype=torch.float64)


def read(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    alpha: float | None = 1.0,
    enable_lora: tuple[bool, ...] | None = None,
    metadata: dict[str, str] | None = None,
) -> Adapter:
    apart = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    save_file(apart, folder / "model.safetensors", metadata)
    return read_adapter(folder / "model.safetensors", ReadOptions(alpha=alpha, enable_lora=enable_lora))


def low_rank(adapter: Adapter, target: str = "q.weight") -> LowRank:
    update = next(found.update for found in adapter.updates if found.target == target)
    assert isinstance(update, LowRank)
    return update


# -------------------------------------------------------------------------------------------------------------- layouts


def test_factors_alone_are_laid_out_as_documented_and_the_base_decides_the_rest(tmp_path: Path) -> None:
    adapter = read(tmp_path, {"q.lora_A": A, "q.lora_B": B})
    assert adapter.format == "state-dict"
    assert adapter.updates[0].orientation is Orientation.UNKNOWN
    assert adapter.updates[0].keys == ("q.lora_A", "q.lora_B")
    assert torch.equal(low_rank(adapter).delta(), DELTA)
    assert adapter.base_names == frozenset()


@pytest.mark.parametrize(
    ("weight", "factors", "expected"),
    [
        ((2, 3), (A, B), DELTA),
        ((3, 2), (A, B), DELTA.T),
        ((2, 3), (A.T, B.T), DELTA),
        ((3, 2), (A.T, B.T), DELTA.T),
    ],
    ids=["linear", "stored as (in, out)", "(in, r) and (r, out)", "both"],
)
def test_the_weight_beside_the_factors_decides_the_layout(
    tmp_path: Path, weight: tuple[int, int], factors: tuple[Tensor, Tensor], expected: Tensor
) -> None:
    adapter = read(tmp_path, {"q.weight": torch.zeros(weight), "q.lora_A": factors[0], "q.lora_B": factors[1]})
    assert adapter.updates[0].orientation is Orientation.STORED
    assert torch.equal(low_rank(adapter).delta(), expected)
    assert adapter.base_names == {"q.weight"}


def test_a_square_weight_keeps_the_documented_layout_and_leaves_the_rest_to_the_base(tmp_path: Path) -> None:
    down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [10.0]])
    adapter = read(tmp_path, {"q.weight": torch.zeros(2, 2), "q.lora_A": down, "q.lora_B": up})
    assert adapter.updates[0].orientation is Orientation.UNKNOWN
    assert low_rank(adapter).delta().tolist() == [[1, 2], [10, 20]]


def test_square_factors_are_ambiguous_with_or_without_a_weight(tmp_path: Path) -> None:
    factors = {"q.lora_A": torch.ones(2, 2), "q.lora_B": torch.ones(2, 2)}
    for extra in ({}, {"q.weight": torch.zeros(2, 2)}):
        with pytest.raises(AmbiguousAdapterFormatError, match="square factors give an update of 2×2 or 2×2"):
            read(tmp_path, {**factors, **extra})


@pytest.mark.parametrize("weight", [(4, 3), (2, 2)])
def test_a_weight_that_no_layout_fits_is_an_error(tmp_path: Path, weight: tuple[int, int]) -> None:
    with pytest.raises(MalformedAdapterError, match="do not fit the weight"):
        read(tmp_path, {"q.weight": torch.zeros(weight), "q.lora_A": A, "q.lora_B": B})


def test_factors_that_share_no_rank_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(MalformedAdapterError, match="share no rank"):
        read(tmp_path, {"q.lora_A": torch.ones(2, 3), "q.lora_B": torch.ones(5, 4)})


def test_one_factor_alone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MalformedAdapterError, match="q: has no lora_B beside its other factor"):
        read(tmp_path, {"q.lora_A": A})


def test_wrappers_are_removed_from_names(tmp_path: Path) -> None:
    adapter = read(tmp_path, {"module.h.q._orig_mod.lora_A": A, "module.h.q._orig_mod.lora_B": B})
    assert adapter.updates[0].target == "h.q.weight"


# ---------------------------------------------------------------------------------------------------------------- alpha


def test_alpha_is_never_guessed(tmp_path: Path) -> None:
    with pytest.raises(MalformedAdapterError, match="the scale alpha / r is unknown, r is 1"):
        read(tmp_path, {"q.lora_A": A, "q.lora_B": B}, alpha=None)


@pytest.mark.parametrize(
    ("alpha", "metadata", "tensors", "scale", "source"),
    [
        (3.0, {}, {}, 1.5, "--alpha 3 / r 2"),
        (None, {"lora_alpha": "5"}, {}, 2.5, "alpha 5 (metadata lora_alpha) / r 2"),
        (None, {"lora_alpha": "5"}, {"q.lora_alpha": torch.tensor(8)}, 4.0, "alpha 8 (tensor q.lora_alpha) / r 2"),
        (None, {}, {"q.alpha": torch.tensor(7.0)}, 3.5, "alpha 7 (tensor q.alpha) / r 2"),
        (None, {}, {"q.scaling": torch.tensor([0.25])}, 0.25, "0.25 (tensor q.scaling)"),
        (3.0, {}, {"q.scaling": torch.tensor([0.25])}, 1.5, "--alpha 3 / r 2"),
    ],
    ids=["user", "header", "lora_alpha", "alpha", "scaling", "user before tensor"],
)
def test_the_scale_says_where_it_came_from(
    tmp_path: Path,
    alpha: float | None,
    metadata: dict[str, str],
    tensors: dict[str, Tensor],
    scale: float,
    source: str,
) -> None:
    factors = {"q.lora_A": torch.ones(2, 3), "q.lora_B": torch.ones(4, 2)}
    adapter = read(tmp_path, {**factors, **tensors}, alpha=alpha, metadata=metadata)
    found = low_rank(adapter)
    assert (found.scale.value, found.scale.source) == (scale, source)
    assert set(adapter.updates[0].keys) == {*factors, *tensors}
    overridden = alpha is not None and bool(tensors)
    assert ("alpha-overridden" in {finding.code for finding in adapter.findings}) is overridden


def test_a_scale_of_several_values_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MalformedAdapterError, match=r"q\.scaling: found shape \(3,\), expected a number"):
        read(tmp_path, {"q.lora_A": A, "q.lora_B": B, "q.scaling": torch.ones(3)}, alpha=None)


# -------------------------------------------------------------------------------------------------------- other tensors


def test_what_is_not_lora_replaces_the_bases_own(tmp_path: Path) -> None:
    head = torch.tensor([[5.0, 6.0]])
    tensors = {
        "q.weight": torch.zeros(2, 3),
        "q.bias": torch.ones(2),
        "q.lora_A": A,
        "q.lora_B": B,
        "head.weight": head,
        "rotary_emb.inv_freq": torch.ones(2),
    }
    adapter = read(tmp_path, tensors)
    replaced = {found.target for found in adapter.updates if isinstance(found.update, Replacement)}
    assert replaced == {"q.bias", "head.weight"}
    assert [found.target for found in adapter.base_copies] == ["q.weight"]
    used = [key for found in (*adapter.updates, *adapter.base_copies) for key in found.keys]
    assert sorted(used) == sorted(set(tensors) - {"rotary_emb.inv_freq"})
    codes = {finding.code for finding in adapter.findings}
    assert codes == {"base-copies", "saved-unlisted", "unused-tensors"}


def test_a_head_that_holds_a_nan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteTensorError, match=r"head\.weight: 1 of 1 values"):
        read(tmp_path, {"q.lora_A": A, "q.lora_B": B, "head.weight": torch.tensor([math.nan])})


def test_untrained_modules_are_counted(tmp_path: Path) -> None:
    adapter = read(tmp_path, {"q.lora_A": A, "q.lora_B": 0 * B, "k.lora_A": A, "k.lora_B": B})
    assert [finding.message for finding in adapter.findings] == [
        "1 of 2 modules have a factor that is all zero: they change nothing"
    ]


def test_a_peft_configuration_beside_bare_factors_is_read_as_peft_and_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(MalformedAdapterError, match=r"q\.lora_A: no tensor that peft"):
        read(tmp_path, {"q.lora_A": A, "q.lora_B": B})


# -------------------------------------------------------------------------------------------------------------- loralib


def loralib_linear(weight: Tensor, down: Tensor, up: Tensor, scaling: float, *, fan_in_fan_out: bool) -> Tensor:
    """As loralib 0.1.2 merges: ``weight += T(B @ A) * scaling``."""
    delta = up @ down
    return weight + (delta.T if fan_in_fan_out else delta) * scaling


def loralib_merged_linear(
    weight: Tensor, down: Tensor, up: Tensor, scaling: float, enable_lora: tuple[bool, ...], *, fan_in_fan_out: bool
) -> Tensor:
    """As loralib 0.1.2's ``MergedLinear.merge_AB``: a grouped convolution, then zero padding by an index."""
    n_out = weight.shape[1] if fan_in_fan_out else weight.shape[0]
    delta = functional.conv1d(down.unsqueeze(0), up.unsqueeze(-1), groups=sum(enable_lora)).squeeze(0)
    index = torch.zeros(len(enable_lora), n_out // len(enable_lora), dtype=torch.bool)
    index[list(enable_lora), :] = True
    padded = torch.zeros(n_out, delta.shape[1], dtype=delta.dtype)
    padded[index.reshape(-1)] = delta
    return weight + (padded.T if fan_in_fan_out else padded) * scaling


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_loralib_linear_and_embedding(tmp_path: Path, fan_in_fan_out: bool) -> None:
    down, up = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    weight = torch.randn((5, 4) if fan_in_fan_out else (4, 5), dtype=torch.float64)
    adapter = read(tmp_path, {"q.weight": weight, "q.lora_A": down, "q.lora_B": up}, alpha=6)
    merged = apply_adapter(adapter, {"q.weight": weight})
    expected = loralib_linear(weight, down, up, 3.0, fan_in_fan_out=fan_in_fan_out)
    torch.testing.assert_close(merged["q.weight"], expected)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("enable_lora", [(True, False, True), (True, True, True), (False, True, False), (True, False)])
@pytest.mark.parametrize("with_weight", [False, True])
def test_loralib_merged_linear(
    tmp_path: Path, enable_lora: tuple[bool, ...], fan_in_fan_out: bool, with_weight: bool
) -> None:
    n_out, n_enabled = 12, sum(enable_lora)
    down = torch.randn(2 * n_enabled, 5, dtype=torch.float64)
    up = torch.randn(n_out // len(enable_lora) * n_enabled, 2, dtype=torch.float64)
    weight = torch.randn((5, n_out) if fan_in_fan_out else (n_out, 5), dtype=torch.float64)
    tensors = {"q.lora_A": down, "q.lora_B": up} | ({"q.weight": weight} if with_weight else {})
    adapter = read(tmp_path, tensors, alpha=6, enable_lora=enable_lora)
    stored = frozenset({"q.weight"} if fan_in_fan_out else ())
    merged = apply_adapter(adapter, {"q.weight": weight}, stored)
    expected = loralib_merged_linear(weight, down, up, 3.0, enable_lora, fan_in_fan_out=fan_in_fan_out)
    torch.testing.assert_close(merged["q.weight"], expected)


def test_a_merged_linear_layer_asks_which_parts(tmp_path: Path) -> None:
    tensors = {"q.lora_A": torch.ones(4, 5), "q.lora_B": torch.ones(8, 2)}
    with pytest.raises(AmbiguousAdapterFormatError, match="holds 2 factors of rank 2") as caught:
        read(tmp_path, tensors)
    assert caught.value.code == "enable-lora-needed"
    assert "--enable-lora T,F,T" in str(caught.value.hint)


def test_a_plain_layer_beside_a_merged_one_stays_plain(tmp_path: Path) -> None:
    tensors = {
        "qkv.lora_A": torch.ones(4, 5),
        "qkv.lora_B": torch.ones(8, 2),
        "proj.lora_A": torch.ones(2, 5),
        "proj.lora_B": torch.ones(4, 2),
    }
    adapter = read(tmp_path, tensors, alpha=2, enable_lora=(True, False, True))
    assert low_rank(adapter, "qkv.weight").shape == (12, 5)
    assert low_rank(adapter, "proj.weight").shape == (4, 5)
    assert low_rank(adapter, "qkv.weight").scale.value == low_rank(adapter, "proj.weight").scale.value == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_loralib_convolution(tmp_path: Path, groups: int) -> None:
    """As loralib 0.1.2 merges: ``conv.weight += (B @ A).view(conv.weight.shape) * scaling``."""
    kernel, rank = 3, 2
    conv = nn.Conv2d(4, 6, kernel, groups=groups).double()
    down = torch.randn(rank * kernel, 4 * kernel, dtype=torch.float64)
    up = torch.randn(6 // groups * kernel, rank * kernel, dtype=torch.float64)
    tensors: dict[str, Any] = {"c.conv.weight": conv.weight.detach(), "c.lora_A": down, "c.lora_B": up}
    adapter = read(tmp_path, tensors, alpha=6)
    found = adapter.updates[0]
    assert (found.target, found.orientation) == ("c.conv.weight", Orientation.STORED)
    assert found.region is not None
    assert found.region.stop == conv.weight.numel()
    merged = apply_adapter(adapter, {"c.conv.weight": conv.weight.detach()})
    expected = conv.weight.detach() + (up @ down).view(conv.weight.shape) * 3
    torch.testing.assert_close(merged["c.conv.weight"], expected)


def test_a_convolution_that_the_factors_do_not_unroll_to_is_an_error(tmp_path: Path) -> None:
    tensors = {"c.conv.weight": torch.ones(6, 4, 3, 3), "c.lora_A": torch.ones(6, 12), "c.lora_B": torch.ones(6, 6)}
    with pytest.raises(MalformedAdapterError, match="of the convolution"):
        read(tmp_path, tensors)
