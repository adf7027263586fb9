"""An initializer is found by content, whole or in parts, or not at all; applying what was found gives its bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_deploy.errors import ExportError
from lora_deploy.export.apply import materialise
from lora_deploy.export.binding_table import Joined, Taken, describe, taken_tensors
from lora_deploy.export.matching import Matcher

Make = Callable[[dict[str, Tensor]], Tensor]


def _tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    tensors = {
        "q": torch.randn(6, 4),
        "k": torch.randn(2, 4),
        "v": torch.randn(2, 4),
        "up": torch.randn(4, 4),
        "norm": torch.rand(4) + 0.5,
        "q.bias": torch.randn(6),
        "k.bias": torch.randn(2),
        "conv": torch.randn(3, 2, 5, 7),
        "experts": torch.randn(3, 4, 5),
        "e0": torch.randn(5, 4),
        "e1": torch.randn(5, 4),
        "scale": torch.randn(()),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


FOUND: dict[str, tuple[Make, str]] = {
    "as is": (lambda t: t["q"], "as is"),
    "a scalar": (lambda t: t["scale"], "as is"),
    "reshaped": (lambda t: t["q"].reshape(2, 12), "as is"),
    "transposed": (lambda t: t["q"].T, "transposed"),
    "square, transposed": (lambda t: t["up"].T, "transposed"),
    "experts, transposed": (lambda t: t["experts"].permute(0, 2, 1), "transposed"),
    "convolution": (lambda t: t["conv"].permute(2, 3, 1, 0), "transposed"),
    "packed side by side": (
        lambda t: torch.cat([t["q"].T, t["k"].T, t["v"].T], 1),
        "concatenated (transposed)",
    ),
    "packed one below the other": (lambda t: torch.cat([t["q"], t["v"]]), "concatenated (as is)"),
    "packed biases": (lambda t: torch.cat([t["q.bias"], t["k.bias"]]), "concatenated (as is)"),
    "stacked experts": (lambda t: torch.stack([t["e0"].T, t["e1"].T]), "stacked (transposed)"),
    "stacked pairs": (
        lambda t: torch.stack([torch.cat([t["q"], t["k"]]), torch.cat([t["q"], t["v"]])]),
        "stacked (concatenated (as is))",
    ),
    "one plus a norm": (lambda t: 1 + t["norm"], "as is, plus 1"),
    "wider": (lambda t: t["q"].T.to(torch.float64), "transposed"),
}


@pytest.mark.parametrize(("make", "how"), FOUND.values(), ids=FOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_made_of_tensors_is_found_and_made_again_from_others(make: Make, how: str, dtype: torch.dtype) -> None:
    tensors, others = _tensors(dtype=dtype), _tensors(seed=1, dtype=dtype)
    wanted = make(tensors)
    origin = Matcher(tensors).explain(wanted)
    assert origin is not None
    assert describe(origin) == how
    made = materialise(origin, wanted.dtype, (others[taken.tensor] for taken in taken_tensors(origin)))
    assert made.dtype == wanted.dtype
    assert made.shape == wanted.shape
    assert torch.equal(made, make(others))


NOT_FOUND: dict[str, Make] = {
    "one element off": lambda t: t["q"] + torch.eye(6, 4) * 1e-3,
    "scaled": lambda t: t["q"] * 2,
    "negated": lambda t: -t["norm"],
    "a part": lambda t: t["q"][:3],
    "rows in another order": lambda t: t["q"].flip(0),
    "a sum": lambda t: t["k"] + t["v"],
    "packed with something else": lambda t: torch.cat([t["q"], torch.ones(1, 4)]),
    "narrower by a cast of the bits": lambda t: t["norm"].view(torch.int32).float(),
    "other": lambda _: torch.full((6, 4), 0.25),
}


@pytest.mark.parametrize("make", NOT_FOUND.values(), ids=NOT_FOUND)
def test_what_is_not_made_of_whole_tensors_is_not_explained(make: Make) -> None:
    tensors = _tensors()
    assert Matcher(tensors).explain(make(tensors)) is None


def test_a_tensor_of_another_shape_than_the_table_knows_is_refused() -> None:
    origin = Taken(tensor="q", permutation=(1, 0), shape=(4, 6))
    with pytest.raises(ExportError, match=r"q: found shape \(5, 4\), the graph was made for \(4, 6\)"):
        materialise(origin, torch.float32, iter([torch.randn(5, 4)]))


def test_a_value_that_a_narrower_format_cannot_hold_is_refused_and_an_infinity_passes() -> None:
    origin = Taken(tensor="q", shape=(2,))
    with pytest.raises(ExportError, match="q: holds values that float16 cannot"):
        materialise(origin, torch.float16, iter([torch.tensor([1.0, 70000.0])]))
    made = materialise(origin, torch.float16, iter([torch.tensor([1.0, torch.inf])]))
    assert made.tolist() == [1.0, torch.inf]


def test_what_is_neither_moved_nor_cast_is_not_copied() -> None:
    tensor = torch.randn(3, 4)
    made = materialise(Taken(tensor="q", shape=(12,)), torch.float32, iter([tensor]))
    assert made.data_ptr() == tensor.data_ptr()


def test_tensors_are_asked_for_in_the_order_they_are_used() -> None:
    parts = tuple(Taken(tensor=name, shape=(2, 2)) for name in "abca")
    assert [taken.tensor for taken in taken_tensors(Joined(axis=0, parts=parts))] == list("abca")
