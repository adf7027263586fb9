"""PiSSA, OLoRA and KaSA by hand: what is taken out of a weight whose factorisation can be seen."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from lora_deploy.errors import MergeError, UnmergeableAdapterError
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.kasa import Kasa
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.residual import Residual, WithoutComponent
from tests.unit.adapters.apply import evaluate

TWICE = Scale(factor=Fraction(2), source="test")
DIAGONAL = torch.diag(torch.tensor([2.0, 7.0, 5.0], dtype=torch.float64))


def nothing(n_rows: int = 3, n_cols: int = 3, rank: int = 1) -> LowRank:
    return LowRank(down=torch.zeros(rank, n_cols), up=torch.zeros(n_rows, rank), scale=TWICE)


@pytest.mark.parametrize(
    ("update", "left"),
    [
        (Residual(low_rank=nothing(), method="pissa"), [2, 0, 5]),
        (Residual(low_rank=nothing(rank=2), method="pissa"), [2, 0, 0]),
        (Kasa(low_rank=nothing()), [0, 7, 5]),
        (Kasa(low_rank=nothing(rank=2)), [0, 7, 0]),
        # QR of a diagonal: the first column and row; OLoRA takes it out s times: 2 - 2 * 2.
        (Residual(low_rank=nothing(), method="olora"), [-2, 7, 5]),
    ],
    ids=["PiSSA 1", "PiSSA 2", "KaSA 1", "KaSA 2", "OLoRA"],
)
def test_the_component_of_a_diagonal_weight_is_taken_out(update: WithoutComponent, left: list[float]) -> None:
    expected = torch.diag(torch.tensor(left, dtype=torch.float64))
    torch.testing.assert_close(evaluate(update, DIAGONAL, block_rows=1), expected)


def test_the_delta_is_added_to_what_is_left() -> None:
    delta = LowRank(down=torch.tensor([[1.0, 2.0, 3.0]]), up=torch.tensor([[1.0], [0.0], [0.0]]), scale=TWICE)
    update = Residual(low_rank=delta, method="pissa")
    torch.testing.assert_close(
        evaluate(update, DIAGONAL), torch.tensor([[4.0, 4.0, 6.0], [0.0, 0.0, 0.0], [0.0, 0.0, 5.0]]).double()
    )


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
@pytest.mark.parametrize("kind", ["pissa", "kasa"])
def test_singular_components_do_not_depend_on_how_the_weight_is_stored(shape: tuple[int, int], kind: str) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    delta = LowRank(down=torch.randn(2, shape[1]), up=torch.randn(shape[0], 2), scale=TWICE)
    update: WithoutComponent = Kasa(low_rank=delta) if kind == "kasa" else Residual(low_rank=delta, method="pissa")
    turned = evaluate(update.transposed(), weight.T.contiguous())
    torch.testing.assert_close(turned.T, evaluate(update, weight))


def test_pissa_at_its_start_gives_the_weight_back() -> None:
    """The factors that PiSSA starts from hold what it takes out."""
    weight = torch.randn(6, 4, dtype=torch.float64)
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    root = (sizes[:2] / 2).sqrt()
    delta = LowRank(down=root[:, None] * right[:2], up=left[:, :2] * root, scale=TWICE)
    torch.testing.assert_close(evaluate(Residual(low_rank=delta, method="pissa"), weight), weight)


def test_olora_at_its_start_gives_the_weight_back() -> None:
    weight = torch.randn(6, 4, dtype=torch.float64)
    left, right = torch.linalg.qr(weight)
    delta = LowRank(down=right[:2], up=left[:, :2], scale=TWICE)
    torch.testing.assert_close(evaluate(Residual(low_rank=delta, method="olora"), weight), weight)


def test_a_rank_that_the_weight_does_not_have_is_an_error() -> None:
    with pytest.raises(MergeError, match=r"residual: rank 4, a \(3, 3\) weight allows at most 3"):
        evaluate(Residual(low_rank=nothing(rank=4), method="pissa"), DIAGONAL)
    with pytest.raises(MergeError, match=r"kasa: rank 3, a \(3, 3\) weight allows at most 2"):
        evaluate(Kasa(low_rank=nothing(rank=3)), DIAGONAL)


@pytest.mark.parametrize("update", [Kasa(low_rank=nothing()), Residual(low_rank=nothing(), method="olora")])
def test_a_weight_other_than_one_is_refused(update: WithoutComponent) -> None:
    assert update.weighted(1) is update
    with pytest.raises(UnmergeableAdapterError, match="cannot be weighted"):
        update.weighted(0.5)
    assert update.needs_whole
    assert update.n_bytes == update.low_rank.n_bytes
