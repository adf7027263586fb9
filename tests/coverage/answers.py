"""Encoder-decoders, token by token: the encoder's graph, the start of an answer, more of it over the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_deploy.evidence.divergence import Divergence, diverge
from lora_deploy.export.execute import Exported
from tests.coverage.architectures import VOCABULARY
from tests.parity.exports import run
from tests.peer.trained import Trained

N_STARTS, N_STEPS = 3, 3
"""Tokens of an answer that are read at once, and those that follow one by one."""


def answers_diverge(trained: Trained, exported: Exported) -> tuple[Divergence, Divergence]:
    """Compare the graphs' answers, and then the base's, with those of PEFT's unmerged model in float32.

    A batch of another size and length than the graphs were traced with; one text is padded.
    """
    heard = _heard(trained.model.config)
    answer = _tokens(len(next(iter(heard.values()))), N_STARTS + N_STEPS)
    unmerged, base = (_told(model.float(), heard, answer) for model in (trained.model, trained.bare))
    return diverge("logits", unmerged, _answered(exported, heard, answer)), diverge("logits", unmerged, base)


def _heard(config: Any) -> dict[str, Tensor]:
    if hasattr(config, "num_mel_bins"):
        return {"input_features": torch.randn(3, config.num_mel_bins, 2 * config.max_source_positions)}
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, -4:] = 0
    return {"input_ids": _tokens(3, 11), "attention_mask": mask}


def _tokens(n_rows: int, n_tokens: int) -> Tensor:
    return torch.randint(8, VOCABULARY, (n_rows, n_tokens))


@torch.no_grad()
def _told(model: Callable[..., Any], heard: Mapping[str, Tensor], answer: Tensor) -> Tensor:
    """Logits of every position, read at once."""
    logits: Tensor = model(**heard, decoder_input_ids=answer, use_cache=False).logits
    return logits.flatten(0, 1)


def _answered(exported: Exported, heard: Mapping[str, Tensor], answer: Tensor) -> Tensor:
    """The same, by the graphs."""
    graphs = exported.graphs
    given = {
        "encoder_outputs.last_hidden_state": run(graphs["encoder"], heard)["last_hidden_state"],
        "attention_mask": heard.get("attention_mask"),
    }
    state = run(graphs["prefill"], {**given, "decoder_input_ids": answer[:, :N_STARTS]})
    logits = [state["logits"]]
    for step in range(N_STARTS, N_STARTS + N_STEPS):
        state |= run(graphs["decode"], {**given, **state, "decoder_input_ids": answer[:, step : step + 1]})
        logits.append(state["logits"])
    return torch.cat(logits, dim=1).flatten(0, 1)
