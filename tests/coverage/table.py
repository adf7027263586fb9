"""Write the coverage table from the rows of a run: ``python -m tests.coverage.table ROWS COMMIT``."""

from __future__ import annotations

import datetime as dt
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.coverage.architectures import (
    ARCHITECTURES,
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    IMAGES_AND_SOUND,
)
from tests.coverage.cover import Row

PACKAGES = ("torch", "transformers", "peft", "onnx", "onnxscript", "onnxruntime")
GROUPS = {
    "Decoders": DECODERS,
    "Encoders and classifiers": ENCODERS,
    "Encoder-decoders": ENCODER_DECODERS,
    "Images, sound, and text with images": IMAGES_AND_SOUND,
}
_HEAD = """# What can be exported

Written by `make nightly`. Each row is a tiny model with random weights and an adapter that PEFT saved, merged, exported
and verified by the commands' own code. *Parity* is the verdict of `verify`: the merged checkpoint and every graph, in
onnxruntime on the CPU in float32, beside PEFT's unmerged model, over texts of several lengths, alone and padded in a
batch, and over a cache where there is one. *Divergence* is the largest mean of any graph, *effect* the adapter's own,
in the same measure: KL divergence in nats where there are logits, else the squared distance relative to the output's
size. *Excess* is how many times float32 arithmetic's divergence the base's own graph has from the base; 1,000 fail.
*Fused* says whether onnxruntime's own kernels are used, or the plain graph because they failed. *Seconds* are
those of one processor for the first export of a base.
"""


def read_rows(folder: Path) -> dict[str, Row]:
    """Read the rows that a run left, by name."""
    entries = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {entry["name"]: Row(**{**entry, "graphs": tuple(entry["graphs"])}) for entry in entries}


def compose(rows: dict[str, Row], about: Sequence[str]) -> str:
    """Write the document; ``about`` are lines of the run."""
    n_good = sum(row.is_good for row in rows.values())
    text = [_HEAD, *(f"- {line}" for line in about), f"- Result: {n_good} of {len(rows)} exported and proven", ""]
    for title, group in GROUPS.items():
        found = [rows[entry.name] for entry in group if entry.name in rows]
        if found:
            text += [f"## {title}", "", *_table(found), ""]
    failed = [row for row in rows.values() if not row.is_good]
    if failed:
        text += ["## What does not work, in the words of the error", ""]
        text += [f"- **{row.name}** (`{row.cls}`): `{row.error}`" for row in failed]
        text.append("")
    missing = [name for name in ARCHITECTURES if name not in rows]
    if missing:
        text += [f"Not run: {'; '.join(missing)}.", ""]
    return "\n".join(text)


def _table(rows: Sequence[Row]) -> list[str]:
    head = ["architecture", "class", "graphs", "fused", "parity", "divergence", "effect", "excess", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        is_measured = bool(row.measure)
        cells = [
            row.name,
            f"`{row.cls}`",
            ", ".join(row.graphs) or "none",
            ("yes" if row.is_fused else "no") if row.graphs else "",
            row.parity or "not measured",
            f"{row.divergence:.1e}" if is_measured else "",
            f"{row.effect:.1e}" if is_measured else "",
            f"{row.excess:.2g}" if is_measured else "",
            f"{row.seconds:.0f}" if row.seconds else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _about(commit: str) -> list[str]:
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)])
    return [f"Date: {dt.datetime.now(dt.UTC):%Y-%m-%d}", f"Commit: {commit}", f"Versions: {versions}"]


if __name__ == "__main__":
    sys.stdout.write(compose(read_rows(Path(sys.argv[1])), _about(sys.argv[2])))
