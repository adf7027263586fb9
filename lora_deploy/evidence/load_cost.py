"""What loading a graph takes, in a process of its own: ``python -m`` this module."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lora_deploy.errors import EvidenceError, LoraDeployError
from lora_deploy.evidence.graphs import GraphFolder, find_graphs
from lora_deploy.evidence.peak import peak_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCost:
    """Loading a model's graphs."""

    load_seconds: float
    added_bytes: int
    """How much the process's peak memory grew by it."""
    peak_bytes: int
    """Largest resident memory of the process, interpreter and libraries included."""


def load_cost(folder: GraphFolder, provider: str = "cpu") -> LoadCost:
    """Load a folder's graphs in a fresh process.

    Raises:
        EvidenceError: They do not load there.
    """
    command = [sys.executable, "-m", __name__, str(folder.prefill), provider]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this very module
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise EvidenceError(f"{folder.root}: the process that loads it ended with {done.returncode}: {said}")
    return LoadCost(**json.loads(done.stdout))


def main(graph: Path, provider: str) -> int:
    """Load, print figures; give the exit status."""
    from lora_deploy.evidence.graph_model import open_model

    found = find_graphs(graph.parent) or find_graphs(graph)
    try:
        assert found is not None  # noqa: S101 - the caller found it
        before, started = peak_bytes(), time.monotonic()
        open_model(found, provider=provider)
    except LoraDeployError as error:
        print(error.message, file=sys.stderr)  # noqa: T201 - how the child answers
        return error.exit_code
    seconds, peak = time.monotonic() - started, peak_bytes()
    print(json.dumps({"load_seconds": seconds, "added_bytes": peak - before, "peak_bytes": peak}))  # noqa: T201 - as above
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
