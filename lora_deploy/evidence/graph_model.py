"""A folder's graphs, loaded, as one model: read an input, then go on token by token over the cache.

Promise: whatever the parts are (one graph, two, or an encoder besides), every step is given what it wants by name: the
encoder's output, its mask, and a cache that keeps what later steps do not give again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_deploy.evidence.graphs import GraphFolder
from lora_deploy.evidence.session import Bound, Session, open_session

_ENCODED = "last_hidden_state"
_GIVEN_ON = ("encoder_outputs.last_hidden_state", "encoder_hidden_states")
"""What decoders call their encoder's output: transformers' exporter, optimum."""
_MASKS = ("attention_mask", "encoder_attention_mask")
_ANSWER = "decoder_input_ids"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """What one step of a model gave."""

    outputs: Mapping[str, Tensor]
    context: Mapping[str, Tensor]
    """What every later step reads besides its token: the encoder's output and the mask of its input."""
    past: tuple[Mapping[str, Tensor], ...]
    """Outputs that the cache is taken from: the first step's, and the last one's where that is another."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GraphModel:
    """Loaded graphs."""

    encoder: Session | None
    prefill: Session
    decode: Session
    """The session of ``prefill`` where one graph does both."""

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Every graph once, in the order in which they run."""
        return tuple(dict.fromkeys(filter(None, (self.encoder, self.prefill, self.decode))))

    @property
    def continues(self) -> bool:
        """Whether a text can be continued without computing it again."""
        return self.decode.takes_cache

    @property
    def dtype(self) -> torch.dtype:
        """Format that it computes in."""
        return self.prefill.float_type

    def misfit(self, inputs: Mapping[str, Tensor]) -> str:
        """Say which input has another size than the graphs were made for; empty where all fit."""
        if self.encoder is None:
            return self.prefill.misfit(inputs)
        given = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
        return self.encoder.misfit(given) or self.prefill.misfit(_to_decoder(inputs), (*_GIVEN_ON, *_MASKS))

    def read(self, inputs: Mapping[str, Tensor]) -> Step:
        """Run a whole input from an empty cache: the encoder, where there is one, then the decoder's beginning.

        Raises:
            EvidenceError: onnxruntime does not run a graph.
            InconclusiveError: A graph wants an input that is not given.
        """
        context = self._context(inputs)
        outputs = self.prefill.run(_to_decoder(inputs) | context if self.encoder else inputs)
        return Step(outputs=outputs, context=context, past=(outputs,))

    def go_on(self, inputs: Mapping[str, Tensor], before: Step) -> Step:
        """Run one token over the cache.

        Raises:
            EvidenceError, InconclusiveError: As ``read``.
        """
        given = {**_to_decoder(inputs), **before.context} if self.encoder else inputs
        outputs = self.decode.run(given, self.decode.next_cache(*before.past))
        return Step(outputs=outputs, context=before.context, past=(before.past[0], outputs))

    def reading(self, inputs: Mapping[str, Tensor]) -> tuple[Bound, ...]:
        """Prepare what ``read`` runs, in order, inputs on the device, so that it can be timed.

        Raises:
            EvidenceError, InconclusiveError: As ``read``.
        """
        if self.encoder is None:
            return (self.prefill.bind(self.prefill.feed(inputs)),)
        given = _to_decoder(inputs) | self._context(inputs)
        return self.encoder.bind(self.encoder.feed(inputs)), self.prefill.bind(self.prefill.feed(given))

    def going_on(self, inputs: Mapping[str, Tensor], before: Step) -> tuple[Bound, ...]:
        """Prepare what ``go_on`` runs.

        Raises:
            InconclusiveError: As ``read``.
        """
        given = {**_to_decoder(inputs), **before.context} if self.encoder else inputs
        return (self.decode.bind(self.decode.feed(given, self.decode.next_cache(*before.past))),)

    def _context(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.encoder is None:
            return {}
        encoded = self.encoder.run(inputs)[_ENCODED]
        mask = inputs.get(_MASKS[0])
        masks = {} if mask is None else dict.fromkeys(_MASKS, mask)
        return dict.fromkeys(_GIVEN_ON, encoded) | masks


def open_model(folder: GraphFolder, *, provider: str = "cpu", n_threads: int = 1) -> GraphModel:
    """Load a folder's graphs.

    Raises:
        EvidenceError, InconclusiveError, RecipeError: As ``open_session``.
    """
    sessions = {path: open_session(path, provider=provider, n_threads=n_threads) for path in folder.files}
    encoder = None if folder.encoder is None else sessions[folder.encoder]
    return GraphModel(encoder=encoder, prefill=sessions[folder.prefill], decode=sessions[folder.decode])


def _to_decoder(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the decoder's inputs, its tokens under the names that makers give them."""
    given = {name: value for name, value in inputs.items() if name.startswith("decoder_")}
    return given | ({"input_ids": given[_ANSWER]} if _ANSWER in given else {})
