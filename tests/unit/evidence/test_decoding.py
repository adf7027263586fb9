"""Cutting probes: what is read at once, what is fed token by token, and which positions of the reference that is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_deploy.evidence.decoding import Decoding, cut, cut_by_row
from lora_deploy.evidence.probe import Probe, positions


def probe_of(mask: Tensor, **others: Tensor) -> Probe:
    """Tokens 10, 11, … in the first row, 20, 21, … in the second, wherever the mask is."""
    ids = (positions(mask) + 10 * torch.arange(1, len(mask) + 1)[:, None]) * mask
    return Probe(name="p", inputs={"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask), **others})


def fed(decoding: Decoding) -> list[int]:
    """The tokens whose logits are compared, row by row."""
    return torch.cat([step["input_ids"] for step in decoding.steps], dim=1)[decoding.is_fed].tolist()


LEFT = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("slices", "mask", "tokens"),
    [
        (cut, LEFT, [10, 11, 22, 23, 24]),
        (cut, RIGHT, [11, 21, 22, 23, 24]),
        (cut_by_row, RIGHT, [11, 24]),
        (cut_by_row, torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]), [11, 12, 13, 23, 24, 25]),
    ],
    ids=["left", "right", "by row, a short one", "by row"],
)
def test_the_positions_compared_are_those_of_the_tokens_fed(
    slices: Callable[[Probe], Decoding | None], mask: Tensor, tokens: list[int]
) -> None:
    probe = probe_of(mask)
    decoding = slices(probe)
    assert decoding is not None
    assert fed(decoding) == tokens
    rows = probe.inputs["input_ids"][mask.bool()][:, None]  # as if a token were its logits
    assert rows[decoding.is_decoded].flatten().tolist() == tokens


def test_rows_with_lengths_of_their_own_continue_where_they_end() -> None:
    probe = probe_of(torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]))
    decoding = cut_by_row(probe)
    assert decoding is not None
    assert decoding.first["input_ids"].tolist() == [[10, 0, 0], [20, 21, 22]]
    assert [step["attention_mask"].tolist() for step in decoding.steps] == [
        [[1, 1, 0, 0], [1, 1, 1, 1]],
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]],
    ]
    assert decoding.steps[1]["position_ids"].tolist() == [[2], [4]]


def test_an_answer_is_cut_and_its_question_is_whole() -> None:
    question = torch.arange(12).reshape(2, 6)
    answer, mask = torch.tensor([[0, 1, 2, 3, 4], [0, 5, 6, 7, 9]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    inputs = {"input_ids": question, "decoder_input_ids": answer, "decoder_attention_mask": mask}
    decoding = cut(Probe(name="p", inputs=inputs))
    assert decoding is not None
    assert decoding.first["input_ids"] is question
    assert decoding.first["decoder_input_ids"].tolist() == [[0], [0]]
    assert [step["decoder_input_ids"].flatten().tolist() for step in decoding.steps] == [[1, 5], [2, 6], [3, 7], [4, 9]]
    assert decoding.is_fed.tolist() == [[True] * 4, [True, True, True, False]]


@pytest.mark.parametrize("slices", [cut, cut_by_row])
def test_a_row_of_one_token_leaves_nothing_to_continue(slices: Callable[[Probe], Decoding | None]) -> None:
    assert slices(probe_of(torch.tensor([[1, 0, 0], [1, 1, 1]]))) is None


def test_padding_moves_behind_the_text() -> None:
    probe = probe_of(LEFT)
    moved = probe.padded_right()
    assert (probe.padding, moved.padding) == ("left", "right")
    assert moved.inputs["input_ids"].tolist() == [[10, 11, 0, 0, 0], [20, 21, 22, 23, 24]]
    assert moved.inputs["position_ids"][0, :2].tolist() == [0, 1]
    for one in (probe, moved):
        assert one.mask is not None
        assert one.inputs["input_ids"][one.mask].tolist() == [10, 11, 20, 21, 22, 23, 24]
