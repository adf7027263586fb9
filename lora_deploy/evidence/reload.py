"""A checkpoint loaded from disk and run, in a process that has nothing else in memory: ``python -m`` this module.

Promise: the two processes exchange safetensors and JSON only; what the child computes is what any user of the folder
would, in float32. A child that ends badly is reported with what it said, and never taken for an answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_deploy.errors import EvidenceError, InconclusiveError
from lora_deploy.evidence.peak import peak_bytes
from lora_deploy.evidence.probe import Probe

_DOES_NOT_RUN = 3
_SEPARATOR = "\t"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reloaded:
    """What a checkpoint gave in a process of its own."""

    outputs: Mapping[str, Mapping[str, Tensor]]
    missing: tuple[str, ...]
    """Parameters that the architecture wants and the folder does not hold."""
    load_seconds: float
    run_seconds: float
    peak_bytes: int
    """Largest resident memory of the process, interpreter and libraries included."""


def run_reloaded(folder: Path, spec: str, probes: Sequence[Probe]) -> Reloaded:
    """Load a folder in a fresh process, as the runnable of this spec, and run the probes there.

    Raises:
        EvidenceError: Its library does not load the folder, or the model does not run.
        InconclusiveError: The process ended for another reason (memory).
    """
    with tempfile.TemporaryDirectory(prefix="lora-deploy-") as made:
        exchange = Path(made)
        write_probes(exchange / "probes.safetensors", probes)
        command = [sys.executable, "-m", __name__, str(folder), spec, made, str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this very module
        if done.returncode == _DOES_NOT_RUN:
            raise EvidenceError(done.stderr.strip().splitlines()[-1])
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise InconclusiveError(f"{folder}: the process that runs it ended with {done.returncode}: {said}")
        outputs = read_outputs(exchange / "outputs.safetensors")
        facts = json.loads((exchange / "facts.json").read_text())
    return Reloaded(outputs=outputs, **facts | {"missing": tuple(facts["missing"])})


def write_probes(path: Path, probes: Sequence[Probe]) -> None:
    """Write probes as one safetensors file."""
    tensors = {f"{k}{_SEPARATOR}{name}": t.contiguous() for k, p in enumerate(probes) for name, t in p.inputs.items()}
    facts = [{"name": probe.name, "n_new_tokens": probe.n_new_tokens} for probe in probes]
    save_file(tensors, path, {"probes": json.dumps(facts)})


def read_probes(path: Path) -> tuple[Probe, ...]:
    """Read what ``write_probes`` wrote."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["probes"])
    return tuple(
        Probe(
            inputs={
                key.partition(_SEPARATOR)[2]: t for key, t in tensors.items() if key.startswith(f"{k}{_SEPARATOR}")
            },
            **fact,
        )
        for k, fact in enumerate(facts)
    )


def write_outputs(path: Path, outputs: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write outputs as one safetensors file, each with values of its own: some are views of another."""
    save_file(
        {
            f"{probe}{_SEPARATOR}{name}": tensor.clone(memory_format=torch.contiguous_format)
            for probe, found in outputs.items()
            for name, tensor in found.items()
        },
        path,
    )


def read_outputs(path: Path) -> dict[str, dict[str, Tensor]]:
    """Read what ``write_outputs`` wrote."""
    outputs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        probe, _, name = key.partition(_SEPARATOR)
        outputs.setdefault(probe, {})[name] = tensor
    return outputs


def main(folder: Path, spec: str, exchange: Path, n_threads: int) -> int:
    """Load, run, write; give the exit status."""
    from lora_deploy.evidence.runnable import runnable_of

    torch.set_num_threads(n_threads)
    probes = read_probes(exchange / "probes.safetensors")
    started = time.monotonic()
    try:
        runnable = runnable_of(spec)
        model, missing = runnable.load(folder)
        loaded = time.monotonic()
        outputs = runnable.run(model, probes)
    except EvidenceError as error:
        print(" ".join(error.message.split()), file=sys.stderr)  # noqa: T201 - how the child answers
        return _DOES_NOT_RUN
    facts = _Facts(
        missing=sorted(missing),
        load_seconds=loaded - started,
        run_seconds=time.monotonic() - loaded,
        peak_bytes=peak_bytes(),
    )
    write_outputs(exchange / "outputs.safetensors", outputs)
    (exchange / "facts.json").write_text(json.dumps(asdict(facts)))
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    missing: list[str]
    load_seconds: float
    run_seconds: float
    peak_bytes: int


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
