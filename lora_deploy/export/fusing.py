"""Fuse a graph into the operators of a provider of onnxruntime, in every way that may work, quickest first.

The library's fusions compute what they replace, but not every kernel of the runtime does what its contract says: on the
CPU, grouped-query attention that starts a cache rotates every row of a batch by the first row's positions, so that
batches are wrong whose rows are padded unlike (onnxruntime 1.32). With rotary embeddings left operators of their own,
the same attention is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from lora_deploy.export.folding import Rule, folding_by


def fuse(model: Any, provider: str, rule: Rule, *, rotates: bool = True) -> None:  # noqa: ANN401 - an onnx_ir.Model
    """Fuse in place; ``rotates`` says whether attention may take rotary embeddings into itself."""
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    with folding_by(rule):
        if rotates:
            fuse_for_onnxruntime(model, provider)
        else:
            with _rotating_apart():
                fuse_for_onnxruntime(model, provider)


def has_rotating_attention(model: Any) -> bool:  # noqa: ANN401
    """Whether some attention was fused with its rotary embedding, so that fusing it apart is another graph."""
    return any(
        node.op_type == "GroupQueryAttention" and node.attributes.get_int("do_rotary", 0) for node in model.graph
    )


@contextmanager
def _rotating_apart() -> Iterator[None]:
    """Have the library fuse grouped-query attention as it does for providers that cannot rotate."""
    from transformers.exporters import onnxruntime_fusions

    library: Any = onnxruntime_fusions
    steps, step = library._STEPS, library._fuse_group_query_attention  # noqa: SLF001 - there is no option for it
    apart = partial(step, rotary=False)
    library._STEPS = tuple((apart if known is step else known, providers) for known, providers in steps)  # noqa: SLF001
    try:
        yield
    finally:
        library._STEPS = steps  # noqa: SLF001
