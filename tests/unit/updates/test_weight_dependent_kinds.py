"""Kinds that the weight takes part in: each against its formula written out, turned round where it can be."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lora_deploy.errors import MergeError, UnmergeableAdapterError
from lora_deploy.updates.block_affine import BlockAffine
from lora_deploy.updates.interface import Scale, Update
from lora_deploy.updates.joint import Joint
from lora_deploy.updates.principal import Principal, Randomised
from lora_deploy.updates.subspace import Subspace
from lora_deploy.updates.weight_network import ACTIVATIONS, WeightNetwork
from tests.unit.adapters.apply import evaluate

HALF = Scale(factor=Fraction(1, 2), source="test")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = numbers(6, 4, seed=9)


def test_each_block_is_multiplied_and_shifted_by_its_rows_own() -> None:
    blocks = numbers(3, 2, 2)
    update = BlockAffine(blocks=blocks, n_cols=4, scale=HALF)
    expected = WEIGHT.clone()
    for a in range(3):
        for b in range(2):
            part = WEIGHT[2 * a : 2 * a + 2, 2 * b : 2 * b + 2]
            expected[2 * a : 2 * a + 2, 2 * b : 2 * b + 2] += 0.5 * (part @ blocks[a] + blocks[a])
    for block_rows in (1, 3, 4, 6):
        torch.testing.assert_close(evaluate(update, WEIGHT, block_rows), expected, rtol=1e-14, atol=1e-15)
    assert update.weighted(2).scale.factor == 1
    assert (update.shape, update.n_bytes) == ((6, 4), 12 * 8)


@pytest.mark.parametrize("method", ["relu", "qr"])
@pytest.mark.parametrize("is_injected", [True, False], ids=["DEFT", "PaRa"])
def test_a_subspace_is_replaced(method: str, is_injected: bool) -> None:
    directions, injected = numbers(6, 2), numbers(2, 4) if is_injected else None
    update = Subspace(
        directions=directions, method="qr" if method == "qr" else "relu", injected=injected, scale=HALF, n_in=4
    )
    span = torch.linalg.qr(directions).Q if method == "qr" else directions
    taken = span if method == "qr" else span.clamp(min=0)
    expected = WEIGHT - span @ (taken.T @ WEIGHT) + (0 if injected is None else 0.5 * span @ injected)
    torch.testing.assert_close(evaluate(update, WEIGHT), expected)
    turned = update.transposed()
    torch.testing.assert_close(evaluate(turned, WEIGHT.T.contiguous()).T, expected)
    assert turned.shape == (4, 6)
    assert turned.transposed().shape == (6, 4)


def test_what_a_subspace_takes_out_does_not_depend_on_the_blocks_of_the_merge() -> None:
    weight = numbers(2500, 3)
    update = Subspace(directions=numbers(2500, 2, seed=1), method="relu", injected=None, scale=HALF, n_in=3)
    read: list[slice] = []

    def rows_of(rows: slice) -> Tensor:
        read.append(rows)
        return weight[rows].clone()

    update.prepare(rows_of)
    assert read == [slice(0, 1024), slice(1024, 2048), slice(2048, 2500)]


@pytest.mark.parametrize("is_split", [False, True])
def test_principal_components_are_turned_among_themselves(is_split: bool) -> None:
    weight, rotation = WEIGHT.float(), numbers(2, 2)
    update = Principal(rotation=rotation, is_split=is_split, randomised=None, n_rows=6, n_cols=4)
    left, sizes, right = (part.double() for part in torch.linalg.svd(weight, full_matrices=False))
    change = rotation - torch.eye(2)
    if is_split:
        roots = torch.diag(sizes[:2].sqrt())
        delta = left[:, :2] @ roots @ change @ roots @ right[:2]
    else:
        delta = left[:, :2] @ torch.diag(sizes[:2]) @ change @ right[:2]
    torch.testing.assert_close(evaluate(update, weight), weight + delta)
    assert update.needs_whole


def test_the_identity_turns_nothing() -> None:
    update = Principal(rotation=torch.eye(3).double(), is_split=False, randomised=None, n_rows=6, n_cols=4)
    assert torch.equal(evaluate(update, WEIGHT), WEIGHT)


def test_a_randomised_factorisation_draws_what_its_seed_says_and_leaves_the_process_as_it_was() -> None:
    update = Principal(
        rotation=numbers(2, 2), is_split=False, randomised=Randomised(n_iterations=1, seed=3), n_rows=6, n_cols=4
    )
    before = torch.get_rng_state()
    first = evaluate(update, WEIGHT)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(evaluate(update, WEIGHT), first)
    torch.manual_seed(3)
    left, sizes, columns = (part.double() for part in torch.svd_lowrank(WEIGHT.float(), q=2, niter=1))
    torch.testing.assert_close(first - WEIGHT, (left * sizes) @ (update.rotation - torch.eye(2)) @ columns.T)


def joint(n_out: int, **changes: Tensor) -> Joint:
    parts = {
        "basis": numbers(4, 4, seed=1),
        "diagonal": numbers(4, seed=2),
        "row": torch.tensor([0, 3, 1]),
        "column": torch.tensor([2, 0, 3]),
        "entries": numbers(3, seed=3),
    }
    return Joint(n_out=n_out, **(parts | changes))


@pytest.mark.parametrize("n_out", [6, 4, 3])
def test_a_weight_is_given_anew_in_the_shared_basis(n_out: int) -> None:
    update, weight = joint(n_out), 0.01 * WEIGHT[:n_out]
    in_basis = weight @ torch.linalg.inv(update.basis).T
    coefficients = torch.diag(update.diagonal)
    coefficients[update.row, update.column] += update.entries
    expected = in_basis / in_basis.norm(dim=0) @ coefficients @ update.basis.T
    torch.testing.assert_close(evaluate(update, weight), expected)
    turned = update.transposed()
    torch.testing.assert_close(evaluate(turned, weight.T.contiguous()).T, expected)
    assert (update.needs_whole, turned.needs_whole) == (False, True)
    assert turned.shape == (4, n_out)


def test_the_weights_own_lengths_give_the_weight_back() -> None:
    basis = numbers(4, 4, seed=1)
    lengths = (WEIGHT @ torch.linalg.inv(basis).T).norm(dim=0)
    torch.testing.assert_close(evaluate(joint(6, diagonal=lengths, entries=torch.zeros(3)), WEIGHT), WEIGHT)


def test_a_column_without_length_stays_zero() -> None:
    weight = WEIGHT.clone()
    weight[:, 1] = 0
    found = evaluate(joint(6, basis=torch.eye(4), diagonal=torch.ones(4), entries=torch.zeros(3)), weight)
    torch.testing.assert_close(found, torch.nan_to_num(weight / weight.norm(dim=0)))


def test_a_singular_basis_is_an_error() -> None:
    with pytest.raises(MergeError, match=r"basis of the adapter is singular"):
        evaluate(joint(6, basis=torch.ones(4, 4)), WEIGHT)


def network(activation: str = "relu", depth: int = 2) -> WeightNetwork:
    return WeightNetwork(
        first=numbers(3, 6),
        encoders=tuple(numbers(3, 3, seed=k) for k in range(depth)),
        decoders=tuple(numbers(3, 3, seed=10 + k) for k in range(depth)),
        last=numbers(6, 3, seed=5),
        activation=activation,
        scale=HALF,
        n_cols=4,
    )


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_network_of_the_weight_is_added(activation: str) -> None:
    update = network(activation)
    f = torch.relu if activation == "relu" else torch.tanh
    x0 = f(WEIGHT.T @ update.first.T)
    x1 = f(x0 @ update.encoders[0].T)
    x2 = f(x1 @ update.encoders[1].T)
    x3 = f(x2 @ update.decoders[0].T) + x1
    x4 = f(x3 @ update.decoders[1].T) + x0
    torch.testing.assert_close(evaluate(update, WEIGHT), WEIGHT + 0.5 * update.last @ x4.T)
    doubled = evaluate(update.weighted(2), WEIGHT) - WEIGHT
    torch.testing.assert_close(doubled, 2 * (evaluate(update, WEIGHT) - WEIGHT))


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_an_activation_is_that_of_transformers_5_23(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-7, 7, 113, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "update",
    [
        BlockAffine(blocks=numbers(3, 2, 2), n_cols=4, scale=HALF),
        Principal(rotation=numbers(2, 2), is_split=False, randomised=None, n_rows=6, n_cols=4),
        network(),
    ],
    ids=lambda update: update.kind,
)
def test_what_peft_never_trains_on_a_layer_stored_as_in_out_is_refused_there(update: Update) -> None:
    with pytest.raises(UnmergeableAdapterError, match="out"):
        update.transposed()


@pytest.mark.parametrize(
    "update",
    [
        Subspace(directions=numbers(6, 2), method="relu", injected=None, scale=HALF, n_in=4),
        Principal(rotation=numbers(2, 2), is_split=False, randomised=None, n_rows=6, n_cols=4),
        joint(6),
    ],
    ids=lambda update: update.kind,
)
def test_what_is_not_linear_in_the_adapter_has_no_weight(update: Update) -> None:
    assert update.weighted(1) is update
    with pytest.raises(UnmergeableAdapterError, match="cannot be weighted"):
        update.weighted(0.5)
