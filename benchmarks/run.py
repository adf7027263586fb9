"""Speed and memory of the merge beside a durable copy and its peers, in one run; ``make bench`` prints the table.

Rows are interleaved round by round, outputs deleted between rows, base digests known beforehand (the first merge of a
base also hashes it). Medians of the rounds; every ratio is to the durable copy of the same round.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import Run, measure
from shapes import SHAPES
from synthetic import make_adapter, make_base

_CLI = [sys.executable, "-m", "lora_deploy"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what is run, and what it leaves behind."""

    name: str
    command: list[str]
    removes: bool = True
    """Whether its output is deleted after each round."""


def main() -> None:
    """Make inputs, run the rounds, print the table."""
    options = _options()
    folder = options.folder / options.size
    shape = SHAPES[options.size]
    base, adapter = make_base(folder / "base", shape), make_adapter(folder / "adapter", shape)
    os.environ["LORA_DEPLOY_CACHE"] = str(folder / "cache")
    log = folder / "log.txt"
    out = folder / "out"
    rows = _own_rows(base, adapter, out, options.devices)
    if not options.no_peers:
        rows += _peer_rows(base, adapter, out, options)
    kept = folder / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    measure(_merge(base, adapter, kept, "base", options.devices[0]), log)  # also fills the digest cache
    replay = [*_CLI, "verify", str(kept), "--only", "replay", "-q"]
    rows.append(Row("lora-deploy verify --only replay (of --dtype base)", replay, removes=False))
    runs: dict[str, list[Run]] = {row.name: [] for row in rows}
    for number in range(options.rounds):
        for row in rows:
            shutil.rmtree(out, ignore_errors=True)
            _settle()
            runs[row.name].append(measure(row.command, log))
            print(f"round {number + 1}: {row.name}: {runs[row.name][-1].wall_s:.1f} s", file=sys.stderr, flush=True)
    shutil.rmtree(out, ignore_errors=True)
    print(_table(shape.name, base, runs))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], default=["cpu"], help="a row for each")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lora-deploy-bench")
    mergekit = Path(sys.executable).with_name("mergekit-yaml")
    parser.add_argument("--mergekit", type=Path, default=mergekit, help="mergekit-yaml of an environment that has it")
    parser.add_argument("--no-peers", action="store_true", help="only our own rows and the copy")
    return parser.parse_args()


def _merge(base: Path, adapter: Path, out: Path, dtype: str, device: str) -> list[str]:
    options = ["--dtype", dtype, "--device", device, "-q"]
    return [*_CLI, "merge", str(adapter), "--base", str(base), "-o", str(out), *options]


def _own_rows(base: Path, adapter: Path, out: Path, devices: Sequence[str]) -> list[Row]:
    copy = f"mkdir {out} && cp --reflink=never {base}/* {out}/ && sync {out}/*"
    return [
        Row("durable copy (cp --reflink=never, sync)", ["sh", "-c", copy]),
        *(
            Row(f"lora-deploy merge --dtype {dtype}{_on(device)}", _merge(base, adapter, out, dtype, device))
            for device in devices
            for dtype in ("base", "float16")
        ),
    ]


def _on(device: str) -> str:
    return "" if device == "cpu" else f" --device {device}"


def _peer_rows(base: Path, adapter: Path, out: Path, options: argparse.Namespace) -> list[Row]:
    script = str(Path(__file__).with_name("peft_merge.py"))
    name = f"PEFT {importlib.metadata.version('peft')} merge_and_unload + save_pretrained"
    rows = [
        Row(
            name if device == "cpu" else f"{name}, on {device}",
            [sys.executable, script, str(base), str(adapter), str(out), device],
        )
        for device in options.devices
    ]
    mergekit = options.mergekit
    if mergekit.exists():
        recipe = out.with_name("mergekit.yaml")
        recipe.write_text(
            f"merge_method: passthrough\ndtype: bfloat16\nmodels:\n  - model: {base}+{adapter}\n", encoding="utf-8"
        )
        version = subprocess.check_output(
            [mergekit.with_name("python"), "-c", "import importlib.metadata as m; print(m.version('mergekit'))"],
            text=True,
        ).strip()
        command = f"{mergekit} {recipe} {out} --lora-merge-cache {out}.cache && sync {out}/* && rm -rf {out}.cache"
        rows.append(Row(f"mergekit {version} base+lora", ["sh", "-c", command]))
    return rows


def _settle() -> None:
    """Let the disk finish what earlier rows left, so that no row pays for another."""
    os.sync()


def _table(shape: str, base: Path, runs: dict[str, list[Run]]) -> str:
    size = sum(path.stat().st_size for path in base.iterdir())
    copies = next(iter(runs.values()))
    lines = [
        f"{shape}, bfloat16, {size / 1e9:.2f} GB, r=16 on seven projections; {_machine()}; medians of {len(copies)}",
        "",
        "| | wall s | x copy | CPU s | peak private memory GB |",
        "|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        ratios = [run.wall_s / copy.wall_s for run, copy in zip(found, copies, strict=True)]
        lines.append(
            f"| {name} | {_median(found, lambda run: run.wall_s):.1f} | {statistics.median(ratios):.2f} "
            f"| {_median(found, lambda run: run.cpu_s):.1f} "
            f"| {_median(found, lambda run: run.peak_private_bytes) / 1e9:.2f} |"
        )
    return "\n".join(lines)


def _median(runs: list[Run], figure: Callable[[Run], float]) -> float:
    return statistics.median(figure(run) for run in runs)


def _machine() -> str:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{gpu}{cores} cores {platform.machine()}, {memory:.0f} GiB, {versions}"


if __name__ == "__main__":
    main()
