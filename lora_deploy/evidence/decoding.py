"""A probe cut in two: what is read at once, and the tokens that are then fed one by one over the cache.

Promise: nothing is padded between a row's tokens, and the cache is never empty; which positions of the probe the steps
compute is said, so that they are compared with just those of the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_deploy.evidence.probe import Probe, positions

N_STEPS = 3
"""Tokens of every row that are decoded over a cache, one by one; more of some where rows end at different places."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoding:
    """A probe, cut."""

    first: Mapping[str, Tensor]
    """Inputs that are read at once."""
    steps: tuple[Mapping[str, Tensor], ...]
    """Inputs of one token a row each."""
    is_fed: Tensor
    """(batch, steps) bool: which of the steps' tokens are real."""
    is_decoded: Tensor
    """(real positions of the probe,) bool: which of them these are; real ones come in the same order however padded."""


def cut(probe: Probe) -> Decoding | None:
    """Cut every row at one column, so that each has tokens after it; None where the shortest row has but one token."""
    mask, ids = probe.mask, probe.tokens
    assert mask is not None  # noqa: S101 - a probe with tokens has one
    ends = mask.shape[1] - mask.flip(1).int().argmax(dim=1)
    start = max(1, int(ends.min()) - N_STEPS)
    if start >= int(ends.min()):
        return None
    columns = torch.arange(mask.shape[1])
    return Decoding(
        first=probe.upto(start),
        steps=tuple(probe.at(position) for position in range(start, ids.shape[1])),
        is_fed=mask[:, start:],
        is_decoded=(columns >= start).expand_as(mask)[mask],
    )


def cut_by_row(probe: Probe) -> Decoding | None:
    """Cut every row before its own last tokens, for graphs whose rows have lengths of their own; padding follows them.

    The probe is padded on the right. None where the shortest row has but one token.
    """
    ids, mask = probe.inputs["input_ids"], probe.inputs["attention_mask"]
    lengths = mask.sum(dim=1)
    n_steps = min(N_STEPS, int(lengths.min()) - 1)
    if n_steps < 1:
        return None
    starts, columns = lengths - n_steps, torch.arange(ids.shape[1])
    width = int(starts.max())
    steps = []
    for k in range(n_steps):
        reach = (columns[: width + k + 1] <= (starts + k)[:, None]).long()
        steps.append(
            {
                "input_ids": ids.gather(1, (starts + k)[:, None]),
                "attention_mask": reach,
                "position_ids": (starts + k)[:, None],
            }
        )
    reach = (columns[:width] < starts[:, None]).long()
    return Decoding(
        first={"input_ids": ids[:, :width] * reach, "attention_mask": reach, "position_ids": positions(reach)},
        steps=tuple(steps),
        is_fed=torch.ones(len(ids), n_steps, dtype=torch.bool),
        is_decoded=(columns >= starts[:, None])[mask.bool()],
    )
