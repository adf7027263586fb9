"""Graphs as sides of a measurement: reading a text of 64 tokens, and adding one to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from lora_deploy.errors import InconclusiveError
from lora_deploy.evidence.architecture import Architecture
from lora_deploy.evidence.forward import following
from lora_deploy.evidence.graph_model import GraphModel, open_model
from lora_deploy.evidence.graphs import GraphFolder
from lora_deploy.evidence.probe import Probe, make_workload
from lora_deploy.evidence.session import Bound, plain
from lora_deploy.evidence.timing import Load, Times

N_TOKENS = 64
PREFILL, DECODE, FORWARD = "prefill", "decode", "forward"
_ROWS = (1, 2, 4)
"""Batches to try: 1, unless the graph was made for another one."""
_CUDA = ("cuda", "tensorrt")
Watch: TypeAlias = "Callable[[], Callable[[], float]]"
"""Starts when called; what it gives stops it, and says how many seconds went by."""
_MAIN_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """What every side is asked to do."""

    config: Mapping[str, Any]
    provider: str
    n_threads: int
    given: Probe | None = None
    """What is fed, where it is not made after the configuration."""

    @classmethod
    def of(cls, config: Mapping[str, Any], *, provider: str, n_threads: int, given: Probe | None = None) -> Workload:
        """Take sizes from a configuration."""
        return cls(config=config, provider=provider, n_threads=n_threads, given=given)

    @property
    def description(self) -> str:
        """For the report."""
        if self.given is not None:
            return f"{self.given.name}: {self.given.description}; {self.n_threads} thread(s)"
        if self.config.get("is_encoder_decoder"):
            work = "an input read (64 tokens, where it is text) and the answer's first token found, then one more"
        else:
            work = f"{N_TOKENS} tokens read, then one more over the cache; or one image or sound"
        return f"batch 1, {work}; {self.n_threads} thread(s)"

    def probe(self, model: GraphModel) -> Probe:
        """Make what a model reads: random tokens, or whatever else its first graph takes.

        Raises:
            InconclusiveError: It takes none of the batches that are tried.
        """
        if self.given is not None:
            return self.given
        architecture = _architecture(model, self.config)
        probes = [make_workload(self.config, architecture, n_rows, N_TOKENS) for n_rows in _ROWS]
        misfits = [model.misfit(probe.inputs) for probe in probes]
        found = next((probe for probe, misfit in zip(probes, misfits, strict=True) if not misfit), None)
        if found is None:
            raise InconclusiveError(f"{model.prefill.path}: {misfits[0]}")
        return found


def _architecture(model: GraphModel, config: Mapping[str, Any]) -> Architecture:
    """Say what a model takes by its graphs, without loading anything else."""
    first = model.encoder or model.prefill
    names = frozenset(plain(name) for session in {first, model.prefill} for name in session.inputs)
    return Architecture(
        name=str(next(iter(config.get("architectures") or ()), "")),
        main_input=next((name for name in _MAIN_INPUTS if name in first.inputs), "input_ids"),
        arguments=names,
        is_decoder=model.encoder is None and model.continues,
        is_encoder_decoder=model.encoder is not None,
    )


def loader(folder: GraphFolder, workload: Workload) -> Load:
    """Give what loads a folder's graphs afresh."""
    return lambda: TimedGraphs(folder, workload)


class TimedGraphs:
    """A folder's graphs, loaded, with prepared inputs."""

    def __init__(self, folder: GraphFolder, workload: Workload) -> None:
        """Load, and run once to have a cache to continue.

        Raises:
            EvidenceError, InconclusiveError, RecipeError: As ``open_session``.
        """
        model = open_model(folder, provider=workload.provider, n_threads=workload.n_threads)
        probe = workload.probe(model)
        first = PREFILL if model.continues else FORWARD
        self._watch = watch_for(workload.provider)
        self._runs: dict[str, tuple[Bound, ...]] = {first: model.reading(probe.inputs)}
        if model.continues:
            following_inputs = following(probe.inputs, probe.tokens[:, -1:])
            self._runs[DECODE] = model.going_on(following_inputs, model.read(probe.inputs))

    @property
    def phases(self) -> tuple[str, ...]:
        """Reading and continuing, or one pass where there is no cache."""
        return tuple(self._runs)

    def run(self, phase: str) -> Times:
        """Run a phase once, by both clocks; inputs lie on the device, and what was begun there is waited for."""
        runs = self._runs[phase]
        stop, cpu = self._watch(), time.process_time_ns()
        for bound in runs:
            bound.run()
        return Times((time.process_time_ns() - cpu) / 1e9, stop())


def watch_for(provider: str) -> Watch:
    """Choose a watch: events of the device where it is CUDA's and torch sees it, else the system's clock.

    Runs are waited for, so that what lies between two events is all of a run, on whatever stream of its own.
    """
    return _event_watch if provider in _CUDA and torch.cuda.is_available() else _wall_watch


def _event_watch() -> Callable[[], float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()

    def stop() -> float:
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return stop


def _wall_watch() -> Callable[[], float]:
    begin = time.perf_counter_ns()
    return lambda: (time.perf_counter_ns() - begin) / 1e9
