"""Take probes through a model part by part, with the model's own forward pass deciding what each part is fed.

The model's code runs from the start again for every part, with the outputs of earlier parts known: where the first
unknown part is called, the pass stops, and the call is what that part is fed. So masks, positions and whatever else an
architecture computes between its parts are its own; nothing is assumed but that parts are called in the same order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_deploy.errors import EvidenceError
from lora_deploy.evidence.forward import quiet_peers
from lora_deploy.evidence.probe import Probe


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What a part is fed."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @torch.inference_mode()
    def of(self, module: nn.Module) -> Any:  # noqa: ANN401 - whatever the part gives
        """Feed a module: with tensors of its own, since parts may add to theirs in place."""
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, (self.args, dict(self.kwargs)))  # noqa: SLF001 - has no public name
        with quiet_peers():
            return module(*args, **kwargs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """A part, and what every probe feeds it."""

    part: str
    calls: Mapping[str, Call]
    """By probe."""
    answer: Callable[[str, Any], None]
    """Takes the part's output for a probe, which the pass goes on with."""


class _UnknownPartError(Exception):
    def __init__(self, part: str, call: Call) -> None:
        super().__init__(part)
        self.part, self.call = part, call


@dataclass(slots=True)
class _Known:
    """Outputs of parts in the order of their calls, for one probe."""

    outputs: list[Any] = field(default_factory=list)
    n_called: int = 0


class Passage:
    """A model whose parts are stood in for by what is known of them."""

    def __init__(self, model: nn.Module, parts: Sequence[str], probes: Sequence[Probe]) -> None:
        self._model, self._parts = model, parts
        self._probes = {probe.name: probe for probe in probes}
        self._known = {name: _Known() for name in self._probes}
        self._current = _Known()

    def stops(self) -> Iterator[Stop]:
        """Give every call of a part, in order; each must be answered for all its probes before the next is asked for.

        Probes that take different ways (with an image and without) wait for each other where these meet again.

        Raises:
            EvidenceError: The model does not run in parts.
        """
        while True:
            unknown = {name: self._run(name) for name in self._probes}
            found = {name: stop for name, stop in unknown.items() if isinstance(stop, _UnknownPartError)}
            if not found:
                return
            part = min((stop.part for stop in found.values()), key=self._parts.index)
            calls = {name: stop.call for name, stop in found.items() if stop.part == part}
            yield Stop(part=part, calls=calls, answer=lambda name, out: self._known[name].outputs.append(out))

    @torch.inference_mode()
    def _run(self, name: str) -> _UnknownPartError | None:
        self._current = self._known[name]
        self._current.n_called = 0
        # A part is called on several sides: a cache would have the first one's keys when the second comes.
        arguments = inspect.signature(self._model.forward).parameters
        settings = {"use_cache": False} if {"use_cache", "past_key_values"} & arguments.keys() else {}
        try:
            with self._stood_in(), quiet_peers():
                self._model(**self._probes[name].inputs, return_dict=True, **settings)
        except _UnknownPartError as stop:
            return stop
        except Exception as error:  # the model's own code may raise anything
            description = self._probes[name].description
            problem = f"{type(error).__name__}: {error}"
            raise EvidenceError(
                f"{type(self._model).__name__} does not run in parts on {description}: {problem}"
            ) from error
        return None

    @contextmanager
    def _stood_in(self) -> Iterator[None]:
        modules = [(part, self._model.get_submodule(part)) for part in self._parts]
        try:
            for part, module in modules:
                module.forward = self._stand_in(part)
            yield
        finally:
            for _, module in modules:
                del module.forward  # the class's own shows again

    def _stand_in(self, part: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the part's own
            known = self._current
            if known.n_called == len(known.outputs):
                raise _UnknownPartError(part, Call(args, kwargs))
            known.n_called += 1
            return known.outputs[known.n_called - 1]

        return forward
