"""Tiny merged models, exported, and onnxruntime beside torch: what the parity tests share."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from peft import LoraConfig
from torch import Tensor

from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.execute import Exported
from lora_deploy.export.options import ExportOptions
from lora_deploy.merge.options import MergeOptions
from lora_deploy.pipeline import export, merge, verify
from tests.peer.trained import MEMORY_BYTES, Trained, train

TOLERANCE = 2e-5
"""Relative to the largest output: float32 sums in another order."""


@dataclass(kw_only=True)
class Case:
    """A merged model and its export."""

    trained: Trained
    merged: Path
    exported: Exported
    base_export: Exported
    """Of the base: its graph is the merged model's."""
    straight: Exported
    """From base and adapter, without the merged checkpoint."""
    shared: Any = None
    """With the merged checkpoint's own files; where a fixture asks for it."""
    half: Any = None
    """In float16; where a fixture asks for it."""

    @functools.cached_property
    def model(self) -> Any:
        """The merged checkpoint, reloaded from disk in float32."""
        return reloaded(self.merged)

    @functools.cached_property
    def base(self) -> Any:
        return reloaded(self.trained.base)


def reloaded(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


def prepare(model: Any, targets: Sequence[str] | str, folder: Path, **config: Any) -> Case:
    """Train, merge and export, three times from one graph; tensors on disk are float32.

    This belongs into a fixture of a module: there the cache is shared, so that the graph is made once.
    """
    trained = train(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **config), folder)
    options = MergeOptions(dtype="float32", n_workers=1, memory_bytes=MEMORY_BYTES)
    merge(trained.adapter, base=trained.base, output=folder / "merged", merge_options=options)
    return Case(
        trained=trained,
        merged=folder / "merged",
        exported=export(folder / "merged"),
        base_export=export(trained.base, output=folder / "base-onnx"),
        straight=export(adapters=trained.adapter, base=trained.base, output=folder / "straight", merge_options=options),
    )


def merged_into_export(case: Case, out: Path) -> Path:
    """Merge the adapter into the base's own export, and let the result be replayed."""
    options = MergeOptions(dtype="base", n_workers=1, memory_bytes=MEMORY_BYTES)
    done = merge(case.trained.adapter, base=case.base_export.root, output=out, merge_options=options)
    found = verify(out, options=VerifyOptions(only=(Check.REPLAY,)), merge_options=options)
    assert found.verdict is Verdict.PASS, found.replay
    return done.root


def export_with(folder: Path, **options: Any) -> Exported:
    return export(folder, export_options=ExportOptions(**options))


def run(graph: Path, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run a graph on inputs named as the model names them; a cache as the graph names its parts."""
    session = opened(str(graph), graph.stat().st_mtime_ns)
    feed = {}
    for port in session.get_inputs():
        value = inputs[port.name.removeprefix("input.")]
        feed[port.name] = value if isinstance(value, np.ndarray) else value.numpy()
    names = [port.name for port in session.get_outputs()]
    found = session.run(None, feed)
    return {name.removeprefix("output."): torch.from_numpy(v) for name, v in zip(names, found, strict=True)}


@functools.lru_cache(maxsize=8)
def opened(graph: str, _stamp: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def assert_close(found: Tensor, expected: Tensor, *, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    deviation = float((found.double() - expected.double()).abs().max())
    assert deviation <= tolerance * float(expected.abs().max()), deviation


def tokens(n_rows: int, n_tokens: int, *, n_padded: int = 0, seed: int = 3) -> dict[str, Tensor]:
    """Token ids with a mask; the first row begins with padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 36, (n_rows, n_tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :n_padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def contents(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Files by name."""
    paths = [path for pattern in patterns or ("*",) for path in folder.glob(pattern) if path.is_file()]
    return {path.name: path.read_bytes() for path in sorted(paths)}
