"""``layer_replication``: a model whose layers are ranges of the base's layers, one after the other, sharing weights.

The merged model cannot share them, since each copy has its own update: the stack is written out.
Source: peft 0.21.2, ``tuners/tuners_utils.py:replicate_layers``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_deploy.adapter import Adapter
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.validate.findings import Findings

_LAYER = re.compile(r"^(?P<stack>(?:.*\.)?(?:layers|encoder\.layer|h))\.(?P<k>\d+)\.(?P<rest>.+)$")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def replicated(
    adapters: Sequence[Adapter], checkpoint: Checkpoint, findings: Findings
) -> tuple[Mapping[str, str], Mapping[str, Any]]:
    """Give the merged model's tensor names with the base tensors they start from, and the edits of its config."""
    identity = {name: name for name in checkpoint.tensors}
    wanted = {adapter.layer_replication for adapter in adapters}
    if wanted <= {()}:
        return identity, {}
    ranges = next(r for r in wanted if r)
    name = next(adapter.name for adapter in adapters if adapter.layer_replication)
    if len(wanted) > 1:
        findings.error("layer-replication", name, "the adapters were trained on different layer stacks")
        return identity, {}
    stacks = {match["stack"] for tensor in checkpoint.tensors if (match := _LAYER.match(tensor))}
    if len(stacks) != 1:
        listed = ", ".join(sorted(stacks)) or "none"
        findings.error("layer-replication", name, f"replicates layers, expected one layer stack in the base: {listed}")
        return identity, {}
    layers = [k for start, stop in ranges for k in range(start, stop)]
    n_layers = 1 + max(int(m["k"]) for tensor in checkpoint.tensors if (m := _LAYER.match(tensor)))
    if not layers or max(layers) >= n_layers or min(layers) < 0:
        found = [list(pair) for pair in ranges]
        findings.error("layer-replication", name, f"replicates layers {found}, base has {n_layers}")
        return identity, {}
    findings.note("layer-replication", name, f"{n_layers} layers become {len(layers)}")
    return _expand(identity, layers), _edits(checkpoint.config, layers, n_layers)


def _expand(names: Mapping[str, str], layers: Sequence[int]) -> dict[str, str]:
    by_layer: dict[int, list[tuple[str, str]]] = {}
    outputs: dict[str, str] = {}
    for name in names:
        if match := _LAYER.match(name):
            by_layer.setdefault(int(match["k"]), []).append((match["stack"], match["rest"]))
    for name in names:
        match = _LAYER.match(name)
        if not match:
            outputs[name] = name
        elif by_layer:
            for k, source in enumerate(layers):
                for stack, rest in by_layer[source]:
                    outputs[f"{stack}.{k}.{rest}"] = f"{stack}.{source}.{rest}"
            by_layer = {}
    return outputs


def _edits(config: Mapping[str, Any], layers: Sequence[int], n_layers: int, prefix: str = "") -> dict[str, Any]:
    """Set the number of layers, and expand every list that has one entry a layer; also in the text configuration."""
    edits: dict[str, Any] = {}
    for key, value in config.items():
        if key in _COUNTS and value == n_layers:
            edits[prefix + key] = len(layers)
        elif isinstance(value, list) and len(value) == n_layers and not key.startswith(("architectures", "eos")):
            edits[prefix + key] = [value[k] for k in layers]
        elif key == "text_config" and isinstance(value, Mapping):
            edits |= _edits(value, layers, n_layers, f"{prefix}{key}.")
    return edits
