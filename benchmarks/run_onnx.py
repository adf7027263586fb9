"""Exports and their speed beside peers, in one run; ``make bench-onnx`` prints the tables.

    fresh     the first export of a base, when nothing is cached, beside what other exporters take for it
    bind      the export of a merged checkpoint whose base is known, beside a durable copy of the weights it writes
    decode    tokens a second of exported graphs, beside onnxruntime-genai's own build and torch

Every row is a process of its own; rows are interleaved round by round, and every ratio is to a row of the same round.
Medians of the rounds. A peer that is not installed has a row that says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import Run, measure
from shapes import SHAPES, Shape
from synthetic import make_adapter, make_base, write_tokenizer

_HERE = Path(__file__).parent
_CLI = [sys.executable, "-m", "lora_deploy"]
_BUILDER = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
_PARTS = ("fresh", "bind", "decode")
_LAYOUTS = ("genai", "transformers")
_DECODERS = {
    "genai": ("onnxruntime-genai, graphs of lora-deploy export --layout genai", "genai"),
    "transformers": ("lora-deploy try, graphs of --layout transformers", "ours"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A random base of some shape, and an adapter merged into it."""

    shape: Shape
    folder: Path

    @property
    def base(self) -> Path:
        """The base."""
        return self.folder / "base"

    @property
    def merged(self) -> Path:
        """The merged checkpoint, in the base's own number format."""
        return self.folder / "merged"

    def made(self) -> Model:
        """Make what is not there yet."""
        make_base(self.base, self.shape)
        write_tokenizer(self.base)
        adapter = make_adapter(self.folder / "adapter", self.shape)
        if not (self.merged / "merge.json").exists():
            merge = [*_CLI, "merge", str(adapter), "--base", str(self.base), "-o", str(self.merged), "--dtype", "base"]
            measure([*merge, "-q"], self.folder / "log.txt")
        return self

    def export(self, source: Path, out: Path, layout: str) -> list[str]:
        """The command that exports one of the two in float32."""
        options = ["--onnx", "--layout", layout, "--dtype", "float32", "-o", str(out), "-q"]
        return [*_CLI, "export", str(source), *options]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: what is run, or why it is not."""

    name: str
    command: Sequence[str] | str


def main() -> None:
    """Run the parts that are asked for, and print their tables."""
    options = _options()
    os.environ.update(HF_HUB_OFFLINE="1", OLIVE_DISABLE_TELEMETRY="1", OMP_NUM_THREADS=str(options.threads))
    models = [_model(options, size) for size in options.sizes]
    for part in options.parts:
        for model in models if part == "bind" else models[:1]:
            os.environ["LORA_DEPLOY_CACHE"] = str(model.folder / "cache")
            print(f"\n{_RUNS[part](model.made(), options)}\n", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["135m", "1b"], help="only bind uses the second")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS)
    parser.add_argument("--layouts", nargs="+", choices=_LAYOUTS, default=_LAYOUTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of exporters; decoding always takes one")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lora-deploy-bench-onnx")
    parser.add_argument("--optimum", type=Path, help="python of an environment with optimum-onnx")
    parser.add_argument("--olive", type=Path, help="python of an environment with olive-ai")
    return parser.parse_args()


def _model(options: argparse.Namespace, size: str) -> Model:
    shape = SHAPES[size]
    if options.layers is None:
        return Model(shape=shape, folder=options.folder / size)
    shape = dataclasses.replace(shape, n_layers=options.layers, name=f"{shape.name}, {options.layers} layers")
    return Model(shape=shape, folder=options.folder / f"{size}-{options.layers}")


# --------------------------------------------------------------------------------------------------------------- fresh


def _fresh(model: Model, options: argparse.Namespace) -> str:
    """The first export of a base; once, since it takes minutes."""
    runs = {}
    for row in _fresh_rows(model, options):
        out = model.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        runs[row.name] = _run(row, model.folder / "log.txt")
    lines = [
        f"First export, {model.shape.name}, float32; {_machine()}; one run each",
        "",
        "| | wall s | CPU s | peak private memory GB |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_line(name, _fresh_figures(run)) for name, run in runs.items())])


def _fresh_rows(model: Model, options: argparse.Namespace) -> Iterable[Row]:
    out = model.folder / "out"
    shutil.rmtree(model.folder / "cache", ignore_errors=True)
    for layout in options.layouts:
        yield Row(f"lora-deploy export --layout {layout}", model.export(model.base, out, layout))
    script = str(_HERE / "transformers_export.py")
    if "transformers" in options.layouts:
        name = f"transformers {version('transformers')} exporter alone"
        yield Row(name, [sys.executable, script, str(model.base), str(out)])
    builder = [*_BUILDER, "-i", str(model.base), "-o", str(out), "-c", str(out / "cache")]
    yield Row(f"onnxruntime-genai {version('onnxruntime-genai')} builder alone", builder)
    yield _peer(options.optimum, "optimum-onnx", "--optimum", lambda python: _optimum(python, model.base, out))
    yield _peer(options.olive, "olive-ai", "--olive", lambda python: _olive(python, model.base, out))


def _optimum(python: Path, base: Path, out: Path) -> list[str]:
    options = ["--model", str(base), "--task", "text-generation-with-past", "--no-post-process", str(out)]
    return [str(python), "-m", "optimum.exporters.onnx", *options]


def _olive(python: Path, base: Path, out: Path) -> list[str]:
    options = ["--model_name_or_path", str(base), "--output_path", str(out), "--precision", "fp32"]
    return [str(python), "-m", "olive", "capture-onnx-graph", "--use_model_builder", *options]


def _peer(python: Path | None, package: str, option: str, command: Callable[[Path], list[str]]) -> Row:
    """A row of a peer that lives in an environment of its own, since it asks for older libraries."""
    if python is None:
        return Row(package, f"not run: {option} names no python that has it")
    script = f"from importlib.metadata import version as v; print(v({package!r}), 'transformers', v('transformers'))"
    try:
        found = subprocess.check_output([python, "-c", script], text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return Row(package, f"not run: {python} does not have it")
    return Row(f"{package} {found}", command(python))


def _fresh_figures(run: Run | str) -> list[str]:
    if isinstance(run, str):
        return [run, "", ""]
    return [f"{run.wall_s:.0f}", f"{run.cpu_s:.0f}", f"{run.peak_private_bytes / 1e9:.2f}"]


# ---------------------------------------------------------------------------------------------------------------- bind


def _bind(model: Model, options: argparse.Namespace) -> str:
    """The second export of a base: only weights are new."""
    layouts = options.layouts if model.folder.name.startswith(options.sizes[0]) else options.layouts[:1]
    for layout in layouts:
        _know(model, layout)
    log, runs = model.folder / "log.txt", dict[str, list[Run]]()
    pairs = [(f"lora-deploy export --layout {layout}", layout) for layout in layouts]
    n_bytes = 0
    for _ in range(options.rounds):
        for name, layout in pairs:
            exported, copied = model.folder / f"bound-{layout}", model.folder / "copied"
            shutil.rmtree(exported, ignore_errors=True)
            os.sync()
            ours = measure(model.export(model.merged, exported, layout), log)
            n_bytes = max(n_bytes, sum(path.stat().st_size for path in exported.iterdir()))
            copy = f"mkdir {copied} && cp --reflink=never {exported}/* {copied}/ && sync {copied}/*"
            os.sync()
            runs.setdefault(f"durable copy of what {name} wrote", []).append(measure(["sh", "-c", copy], log))
            runs.setdefault(name, []).append(ours)
            shutil.rmtree(copied)
            print(f"{name}: {ours.wall_s:.2f} s", file=sys.stderr, flush=True)
    stored = f"merged in {model.shape.dtype}, exported in float32, {n_bytes / 1e9:.2f} GB written"
    lines = [
        f"Second export of a known base, {model.shape.name}, {stored}; {_machine()}; medians of {options.rounds}",
        "",
        "| | wall s | x copy | CPU s | peak private memory GB |",
        "|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        copies = runs.get(f"durable copy of what {name} wrote", found)
        ratios = [run.wall_s / copy.wall_s for run, copy in zip(found, copies, strict=True)]
        figures = [_median(found, lambda run: run.wall_s), statistics.median(ratios)]
        figures += [_median(found, lambda run: run.cpu_s), _median(found, lambda run: run.peak_private_bytes) / 1e9]
        lines.append(_line(name, [f"{figure:.2f}" for figure in figures]))
    return "\n".join(lines)


def _know(model: Model, layout: str) -> None:
    """Export the base, so that its graph is in the cache."""
    out = model.folder / f"base-{layout}"
    shutil.rmtree(out, ignore_errors=True)
    print(f"exporting the base, --layout {layout}", file=sys.stderr, flush=True)
    measure(model.export(model.base, out, layout), model.folder / "log.txt")
    shutil.rmtree(out)


# -------------------------------------------------------------------------------------------------------------- decode


def _decode(model: Model, options: argparse.Namespace) -> str:
    """Tokens a second of every decoder, on one thread."""
    rows = _decode_rows(model, options)
    runs: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for _ in range(options.rounds):
        for row in rows:
            runs[row.name].append(json.loads(subprocess.check_output(row.command, stderr=subprocess.DEVNULL)))
            print(f"{row.name}: {runs[row.name][-1]['decode_tokens_per_s']:.1f}", file=sys.stderr, flush=True)
    first, last = runs[rows[0].name], runs[rows[-1].name]
    how = f"float32, one thread; {_machine()}; medians of {options.rounds}; in brackets by processor time"
    lines = [
        f"64 tokens after a prompt of 64, {model.shape.name}, {how}",
        "",
        "| | prefill tokens/s | x genai | decode tokens/s | x genai | x torch | same tokens as torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        alike = min(_alike(run["tokens"], other["tokens"]) for run, other in zip(found, last, strict=True))
        figures = [
            _rate(found, "prefill"),
            _ratio(found, first, "prefill"),
            _rate(found, "decode"),
            _ratio(found, first, "decode"),
            _ratio(found, last, "decode"),
            f"{alike} of {len(found[0]['tokens'])}",
        ]
        lines.append(_line(name, figures))
    return "\n".join(lines)


def _decode_rows(model: Model, options: argparse.Namespace) -> list[Row]:
    """Rows of decoders: genai's own build comes first and torch last, since the others are compared with them."""
    log, script = model.folder / "log.txt", str(_HERE / "decode_tokens.py")
    built = model.folder / "built"
    if not (built / "genai_config.json").exists():
        shutil.copy(model.base / "tokenizer.json", model.merged)
        shutil.copy(model.base / "tokenizer_config.json", model.merged)
        measure([*_BUILDER, "-i", str(model.merged), "-o", str(built), "-c", str(built / "cache")], log)
        shutil.copy(model.merged / "config.json", built)
    rows = [Row("onnxruntime-genai, its own build", [sys.executable, script, "genai", str(built)])]
    for layout in options.layouts:
        out = model.folder / f"bound-{layout}"
        if not (out / "export.json").exists():
            measure(model.export(model.merged, out, layout), log)
        name, runner = _DECODERS[layout]
        rows.append(Row(name, [sys.executable, script, runner, str(out)]))
    return [*rows, Row("torch, eager", [sys.executable, script, "torch", str(model.merged)])]


def _rate(found: list[dict[str, Any]], stage: str) -> str:
    rates = [statistics.median(run[f"{stage}_tokens_per_{unit}"] for run in found) for unit in ("s", "cpu_s")]
    return f"{rates[0]:.1f} ({rates[1]:.1f})"


def _ratio(found: list[dict[str, Any]], others: list[dict[str, Any]], stage: str) -> str:
    ratios = []
    for unit in ("s", "cpu_s"):
        name = f"{stage}_tokens_per_{unit}"
        ratios.append(statistics.median(run[name] / other[name] for run, other in zip(found, others, strict=True)))
    return f"{ratios[0]:.2f} ({ratios[1]:.2f})"


def _alike(left: list[int], right: list[int]) -> int:
    return next((k for k, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), len(left))


# -------------------------------------------------------------------------------------------------------------- common


def _run(row: Row, log: Path) -> Run | str:
    """Measure a row; a peer that fails has a row that says so."""
    if isinstance(row.command, str):
        return row.command
    print(f"{row.name} …", file=sys.stderr, flush=True)
    os.sync()
    try:
        return measure(row.command, log)
    except subprocess.CalledProcessError as error:
        return f"failed with status {error.returncode}: {_last_line(log)}"


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["no reason given"])[-1][:200]


def _line(name: str, figures: Sequence[str]) -> str:
    return f"| {' | '.join([name, *figures])} |"


def _median(runs: list[Run], figure: Callable[[Run], float]) -> float:
    return statistics.median(figure(run) for run in runs)


def _machine() -> str:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "onnxruntime-genai"))
    return f"{cores} cores {platform.machine()}, {memory:.0f} GiB, Python {platform.python_version()}, {packages}"


_RUNS = {"fresh": _fresh, "bind": _bind, "decode": _decode}

if __name__ == "__main__":
    main()
