"""Answers of models that are given more than text, token by token: their beginning, and then more of it over the cache.

Encoder-decoders read through a graph of their own before; texts with an image in them are read with it at once.
"""

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
    config = trained.model.config
    given, answered = (_heard(config), _after_encoding) if "encoder" in exported.graphs else (_seen(config), _at_once)
    answer = _tokens(len(next(iter(given.values()))), N_STARTS + N_STEPS)
    unmerged, base = (_told(model.float(), given, answer) for model in (trained.model, trained.bare))
    return diverge("logits", unmerged, answered(exported, given, answer)), diverge("logits", unmerged, base)


def _heard(config: Any) -> dict[str, Tensor]:
    if hasattr(config, "num_mel_bins"):
        return {"input_features": torch.randn(3, config.num_mel_bins, 2 * config.max_source_positions)}
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, -4:] = 0
    return {"input_ids": _tokens(3, 11), "attention_mask": mask}


def _seen(config: Any) -> dict[str, Tensor]:
    """One text with an image, whose tokens are as many as its patches."""
    edge = config.vision_config.image_size
    n_patches = (edge // config.vision_config.patch_size) ** 2
    image = torch.full((1, n_patches), config.image_token_id)
    return {"pixel_values": torch.randn(1, 3, edge, edge), "input_ids": torch.cat([image, _tokens(1, 4)], dim=1)}


def _tokens(n_rows: int, n_tokens: int) -> Tensor:
    return torch.randint(8, VOCABULARY, (n_rows, n_tokens))


@torch.no_grad()
def _told(model: Callable[..., Any], given: Mapping[str, Tensor], answer: Tensor) -> Tensor:
    """Logits of every position of the answer, read at once."""
    if "pixel_values" in given:
        whole = {**given, "input_ids": torch.cat([given["input_ids"], answer], dim=1)}
        logits: Tensor = model(**whole, use_cache=False).logits[:, -N_STARTS - N_STEPS :]
    else:
        logits = model(**given, decoder_input_ids=answer, use_cache=False).logits
    return logits.flatten(0, 1)


def _after_encoding(exported: Exported, heard: Mapping[str, Tensor], answer: Tensor) -> Tensor:
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


def _at_once(exported: Exported, seen: Mapping[str, Tensor], answer: Tensor) -> Tensor:
    ids = torch.cat([seen["input_ids"], answer[:, :N_STARTS]], dim=1)
    state = run(exported.graphs["prefill"], {**seen, **_placed(ids, ids.shape[1])})
    logits = [state["logits"][:, -N_STARTS:]]
    for step in range(N_STARTS, N_STARTS + N_STEPS):
        token, n_read = answer[:, step : step + 1], ids.shape[1] + step - N_STARTS + 1
        state |= run(exported.graphs["decode"], {**state, **_placed(token, n_read)})
        logits.append(state["logits"])
    return torch.cat(logits, dim=1).flatten(0, 1)


def _placed(ids: Tensor, n_read: int) -> dict[str, Tensor]:
    """Tokens with their positions, and the mask of everything that was read up to them."""
    positions = torch.arange(n_read - ids.shape[1], n_read)[None]
    return {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones(1, n_read, dtype=torch.long)}
