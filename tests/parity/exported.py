"""A tiny model's ONNX export by transformers' own exporter, and the same graph with other weights in it."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lora_deploy.evidence.probe import positions


def export_decoder(model: nn.Module, out: Path, n_tokens: int) -> Path:
    """Export one graph that reads and continues texts; batch and lengths vary."""
    from transformers.exporters import OnnxExporter
    from transformers.exporters.configs import OnnxConfig

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model = model.float().eval()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 0] = 0  # an all-ones sample loses the mask as an input
    ids = torch.randint(0, n_tokens, (2, 12))
    whole = torch.cat([mask, mask.new_ones(2, 3)], dim=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        first = model(input_ids=ids[:, :9], attention_mask=mask, position_ids=positions(mask), use_cache=True)
        sample = {
            "input_ids": ids[:, 9:],
            "attention_mask": whole,
            "position_ids": positions(whole)[:, 9:],
            "past_key_values": first.past_key_values,
            "use_cache": True,
        }
        OnnxExporter().export(model, sample, config=OnnxConfig(dynamic=True)).save_pretrained(out)
    return out


def with_weights(graph: Path, old: Mapping[str, Tensor], new: Mapping[str, Tensor], out: Path) -> Path:
    """Copy an export, with the new tensor wherever an initializer holds the old one of that name, or its transpose."""
    model = onnx.load(graph)
    known = {array.tobytes(): (name, is_t) for name, t in old.items() for is_t, array in _ways(t)}
    for initializer in model.graph.initializer:
        array = numpy_helper.to_array(initializer)
        found = known.get(np.ascontiguousarray(array).tobytes())
        if found is not None:
            value = dict(_ways(new[found[0]]))[found[1]]
            initializer.CopyFrom(numpy_helper.from_array(value.reshape(array.shape), initializer.name))
    return _save(model, graph.parent, out)


def _ways(tensor: Tensor) -> list[tuple[bool, np.ndarray]]:
    array = tensor.float().numpy()
    return [(True, np.ascontiguousarray(array.T)), (False, np.ascontiguousarray(array))]


def with_swapped_outputs(graph: Path, one: str, other: str, out: Path) -> Path:
    """Copy an export in which two outputs have each other's names: a cache that continues another layer."""
    model = onnx.load(graph)
    names = {one: other, other: one}
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
        node.input[:] = [names.get(name, name) for name in node.input]
    return _save(model, graph.parent, out)


def _save(model: onnx.ModelProto, source: Path, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    onnx.save(model, out / "model.onnx")
    for name in ("config.json", "export.json"):
        shutil.copy(source / name, out / name)
    return out
