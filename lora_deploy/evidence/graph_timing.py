"""Graphs as sides of a measurement: reading a text of 64 tokens, and adding one to it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_deploy.evidence.architecture import Architecture
from lora_deploy.evidence.graphs import GraphFolder
from lora_deploy.evidence.probe import SEED, Probe, make_probes, positions
from lora_deploy.evidence.session import Session, open_folder
from lora_deploy.evidence.timing import Load, Times

N_TOKENS = 64
PREFILL, DECODE, FORWARD = "prefill", "decode", "forward"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """What every side is asked to do."""

    config: Mapping[str, Any]
    provider: str
    n_threads: int

    @classmethod
    def of(cls, config: Mapping[str, Any], *, provider: str, n_threads: int) -> Workload:
        """Take sizes from a configuration."""
        return cls(config=config, provider=provider, n_threads=n_threads)

    @property
    def description(self) -> str:
        """For the report."""
        return f"batch 1, {N_TOKENS} tokens read, then one more over the cache; {self.n_threads} thread(s)"

    def inputs(self, session: Session) -> dict[str, Tensor]:
        """Make the first input of a graph: random tokens, or whatever else it takes."""
        if "input_ids" not in session.inputs:
            return dict(self._other(session).inputs)
        n_tokens = _vocabulary(self.config)
        ids = torch.randint(0, n_tokens, (1, N_TOKENS), generator=torch.Generator().manual_seed(SEED))
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}

    def _other(self, session: Session) -> Probe:
        name = next(
            (n for n in ("pixel_values", "input_features", "input_values") if n in session.inputs), "pixel_values"
        )
        fed = Architecture(name="", main_input=name, arguments=frozenset(), is_decoder=False, is_encoder_decoder=False)
        return make_probes(self.config, fed)[0]


def _vocabulary(config: Mapping[str, Any]) -> int:
    parts = (config, config.get("text_config"))
    found = next((p["vocab_size"] for p in parts if isinstance(p, Mapping) and isinstance(p.get("vocab_size"), int)), 2)
    return int(found)


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
        prefill, decode = open_folder(folder, provider=workload.provider, n_threads=workload.n_threads)
        inputs = workload.inputs(prefill)
        first = prefill.feed(inputs)
        self._runs = {PREFILL if decode.takes_cache else FORWARD: prefill.bind(first)}
        if decode.takes_cache:
            outputs = prefill.run(inputs)
            mask = torch.ones((1, N_TOKENS + 1), dtype=torch.int64)
            following = {
                "input_ids": inputs["input_ids"][:, -1:],
                "attention_mask": mask,
                "position_ids": positions(mask)[:, -1:],
            }
            self._runs[DECODE] = decode.bind(decode.feed(following, decode.next_cache(outputs)))

    @property
    def phases(self) -> tuple[str, ...]:
        """Reading and continuing, or one pass where there is no cache."""
        return tuple(self._runs)

    def run(self, phase: str) -> Times:
        """Run a phase once, by both clocks; inputs lie on the device, and what was begun there is waited for."""
        bound = self._runs[phase]
        wall, cpu = time.perf_counter_ns(), time.process_time_ns()
        bound.run()
        return Times((time.process_time_ns() - cpu) / 1e9, (time.perf_counter_ns() - wall) / 1e9)
