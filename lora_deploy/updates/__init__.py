"""Kinds of updates; a kind is one module here and one line in ``KINDS``.

Promise: importing this package imports no tensor library.
"""

from __future__ import annotations

from lora_deploy.registry import Entry

KINDS: tuple[Entry, ...] = (
    Entry(
        name="low-rank",
        summary="W + s·B·A, exact, rounded once",
        path="lora_deploy.updates.low_rank:LowRank",
    ),
    Entry(
        name="replacement",
        summary="the adapter's own tensor in place of the base's",
        path="lora_deploy.updates.replacement:Replacement",
    ),
    Entry(
        name="token-rows",
        summary="some rows of an embedding replaced",
        path="lora_deploy.updates.token_rows:TokenRows",
    ),
    Entry(
        name="addition",
        summary="W + s·d for a dense d (trained bias differences)",
        path="lora_deploy.updates.addition:Addition",
    ),
    Entry(
        name="dora",
        summary="m ⊙ (W + s·B·A) / ‖W + s·B·A‖ by rows or columns",
        path="lora_deploy.updates.dora:Dora",
    ),
    Entry(
        name="residual",
        summary="W minus its PiSSA or OLoRA component, plus s·B·A",
        path="lora_deploy.updates.residual:Residual",
    ),
    Entry(
        name="kasa",
        summary="W without its r smallest singular components, plus s·B·diag·A",
        path="lora_deploy.updates.kasa:Kasa",
    ),
)
