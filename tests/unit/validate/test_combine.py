"""Several updates of one tensor: order, conflicts, and regions that overlap."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_deploy.adapter import Adapter, Orientation
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import IncompatibleAdapterError, Severity
from lora_deploy.tensors import Region
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.residual import Residual
from lora_deploy.updates.token_rows import TokenRows
from lora_deploy.validate import bind
from lora_deploy.validate.combine import combine
from lora_deploy.validate.findings import Findings
from tests.builders import adapter_of, low_rank, make_checkpoint, merged_values, module_update

W = "model.layers.0.mlp.up_proj.weight"
LLAMA = {"model_type": "llama", "tie_word_embeddings": False}


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return make_checkpoint(tmp_path, {W: torch.randn(4, 3)}, LLAMA)


def dora() -> Dora:
    return Dora(inner=low_rank(4, 3), magnitude=torch.rand(4) + 1, axis="rows")


def residual() -> Residual:
    return Residual(low_rank=low_rank(4, 3, rank=1), method="pissa")


def rows(*indices: int, value: float = 1.0) -> TokenRows:
    return TokenRows(indices=indices, values=torch.full((len(indices), 3), value))


def values(value: float = 1.0) -> Replacement:
    return Replacement(values=torch.full((4, 3), value))


def adapters(*updates: Any) -> list[Adapter]:
    return [
        adapter_of(replace(module_update(W, update, Orientation.STORED), keys=(f"key {k}",)), name=f"adapter {k}")
        for k, update in enumerate(updates)
    ]


def errors(given: list[Adapter], base: Checkpoint) -> list[str]:
    with pytest.raises(IncompatibleAdapterError) as caught:
        bind(given, base)
    return [finding.code for finding in caught.value.findings if finding.severity is Severity.ERROR]


def test_low_rank_updates_of_several_adapters_add_up_in_order(base: Checkpoint) -> None:
    binding = bind(adapters(low_rank(4, 3), low_rank(4, 3), low_rank(4, 3)), base)
    assert [bound.adapter_index for bound in binding.updates[W]] == [0, 1, 2]
    assert len({bound.region for bound in binding.updates[W]}) == 1


def test_one_adapter_may_change_a_tensor_once(base: Checkpoint) -> None:
    twice = adapter_of(module_update(W, low_rank(4, 3)), module_update(f"_orig_mod.{W}", low_rank(4, 3)))
    assert errors([twice], base) == ["hit-twice"]


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ((dora(), dora()), ["kinds-collide"]),
        ((dora(), residual()), ["kinds-collide"]),
        ((residual(), residual()), ["kinds-collide"]),
        ((low_rank(4, 3), residual()), ["kinds-collide"]),
        ((values(), values(2.0)), ["replaced-twice"]),
        ((rows(1), rows(2, 1, value=3.0)), ["replaced-twice"]),
    ],
)
def test_what_has_no_sum_is_refused(base: Checkpoint, updates: tuple[Any, ...], expected: list[str]) -> None:
    assert errors(adapters(*updates), base) == expected


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ((dora(), low_rank(4, 3)), ["order-matters"]),
        ((low_rank(4, 3), dora()), ["order-matters"]),
        ((residual(), low_rank(4, 3)), ["order-matters"]),
        ((values(), low_rank(4, 3)), ["replaced-and-changed"]),
        ((low_rank(4, 3), values()), ["replaced-and-changed"]),
        ((values(), values()), []),
        ((rows(1, 2), rows(2, 3)), []),
    ],
)
def test_what_depends_on_order_is_told(base: Checkpoint, updates: tuple[Any, ...], expected: list[str]) -> None:
    assert [finding.code for finding in bind(adapters(*updates), base).findings] == expected


def test_a_replacement_comes_before_every_change(base: Checkpoint) -> None:
    change = low_rank(4, 3)
    merged = merged_values(bind(adapters(change, values(7.0)), base))
    assert torch.allclose(merged[W], 7.0 + change.delta())


def test_equal_replacements_are_applied_once_with_all_their_keys(base: Checkpoint) -> None:
    (bound,) = bind(adapters(values(), values()), base).updates[W]
    assert bound.keys == ("key 0", "key 1")


def test_token_rows_of_several_adapters_are_united(base: Checkpoint) -> None:
    merged = merged_values(bind(adapters(rows(1, 2), rows(2, 3)), base))
    assert (merged[W][1:] == 1).all()


REGIONS = st.tuples(st.integers(0, 5), st.integers(1, 6)).map(
    lambda pair: Region(offset=pair[0] * 2, n_rows=pair[1], n_cols=2)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(REGIONS, min_size=1, max_size=5))
def test_overlapping_regions_are_cut_into_equal_or_disjoint_ones_with_the_same_sum(regions: list[Region]) -> None:
    given_updates = [
        replace(module_update("w", low_rank(region.n_rows, 2)), region=region, adapter_index=k)
        for k, region in enumerate(regions)
    ]
    findings = Findings()
    cut = combine("w", given_updates, [adapter_of(name=str(k)) for k in range(len(regions))], findings)
    assert not findings.all
    found = sorted({bound.region for bound in cut if bound.region is not None})
    assert all(before.stop <= after.offset for before, after in pairwise(found))
    assert torch.allclose(total(cut), total(given_updates))
    assert [bound.adapter_index for bound in cut if bound.region == found[0]] == sorted(
        bound.adapter_index for bound in cut if bound.region == found[0]
    )


def total(updates: Any) -> torch.Tensor:
    result = torch.zeros(40, dtype=torch.float64)
    for bound in updates:
        result[bound.region.offset : bound.region.stop] += bound.update.delta().reshape(-1)
    return result


def test_a_whole_replacement_is_cut_at_the_bounds_of_a_part(tmp_path: Path) -> None:
    name = "m.experts.gate_up_proj"
    checkpoint = make_checkpoint(tmp_path, {name: torch.zeros(2, 4, 3)}, {"model_type": "qwen2_moe"})
    new, part = torch.randn(2, 4, 3), low_rank(2, 3)
    adapter = adapter_of(
        module_update(name, Replacement(values=new), Orientation.STORED),
        module_update("m.experts.1.gate_proj.weight", part),
    )
    expected = new.double()
    expected[1, :2] += part.delta()
    assert torch.allclose(merged_values(bind([adapter], checkpoint))[name], expected)


def test_a_kind_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    name = "m.experts.gate_up_proj"
    checkpoint = make_checkpoint(tmp_path, {name: torch.zeros(2, 4, 3)}, {"model_type": "qwen2_moe"})
    whole = Dora(inner=low_rank(2, 12), magnitude=torch.ones(2), axis="rows")
    given = [
        adapter_of(module_update(name, whole, Orientation.STORED)),
        adapter_of(module_update("m.experts.1.gate_proj.weight", low_rank(2, 3))),
    ]
    assert errors(given, checkpoint) == ["overlapping-parts"]
