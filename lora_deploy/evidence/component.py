"""A component of a diffusion pipeline as a model of its own: its part of a plan, how it is loaded, and how it is run.

Promise: it is run with the inputs and outputs of its graph, so that what torch gives and what the graph gives have the
same names; within its plan, tensors have the names that the component's own files give them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_deploy.errors import EvidenceError, LoraDeployError
from lora_deploy.evidence.forward import quiet_peers, rows_of
from lora_deploy.evidence.probe import Probe
from lora_deploy.export.components import graphs_of, module_of, reads_hidden_states
from lora_deploy.export.loading import load_model, quiet
from lora_deploy.merge.plan import MergePlan, PlannedTensor, ShardPlan
from lora_deploy.pipeline_layout import SEPARATOR
from lora_deploy.tensors import DType
from lora_deploy.validate import Binding, BindOptions

MARK = "/"
"""Between the words of a spec."""
_INSIDE = "inside"


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One graph of a component."""

    name: str
    """Such as ``unet``, ``text_encoder`` or ``vae``."""
    graph: str
    """Such as ``unet`` or ``vae_decoder``."""
    gives_hidden_states: bool = False
    """Whether the pipeline reads the inner layers of this text encoder."""

    @classmethod
    def of(cls, spec: str) -> Component:
        """Read a spec."""
        name, graph, *inside = spec.split(MARK)
        return cls(name=name, graph=graph, gives_hidden_states=bool(inside))

    @property
    def spec(self) -> str:
        """Component, graph, and whether inner layers are given."""
        return MARK.join([self.name, self.graph, *([_INSIDE] if self.gives_hidden_states else [])])

    def load(self, folder: Path, **settings: object) -> tuple[nn.Module, frozenset[str]]:
        """Load the component's own folder; a tensor that is missing there is an error."""
        del settings
        try:
            with quiet():
                model: nn.Module = load_model(folder, DType.F32)
        except LoraDeployError as error:
            raise EvidenceError(f"{folder}: {error.message}") from error
        return model, frozenset()

    def run(self, model: nn.Module, probes: Sequence[Probe], *, greedy: bool = True) -> dict[str, dict[str, Tensor]]:
        """Run probes as the graph would; there is nothing to continue."""
        del greedy
        return {probe.name: self._run(model, probe) for probe in probes}

    @torch.inference_mode()
    def _run(self, model: nn.Module, probe: Probe) -> dict[str, Tensor]:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        given = {n: value.to(dtype) if value.is_floating_point() else value for n, value in probe.inputs.items()}
        options = {"output_hidden_states": True} if self.gives_hidden_states else {}
        try:
            with quiet_peers():
                output = module_of(self.graph, model)(**given, **options)
                return {name: rows_of(probe, value) for name, value in _flat(output)}
        except Exception as error:  # the model's own code may raise anything
            problem = f"{type(error).__name__}: {error}"
            raise EvidenceError(f"{self.graph} does not run on {probe.description}: {problem}") from error

    def inputs_of(self, model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """Give the graph's inputs of a call of the component, by the arguments that the pipeline gave it."""
        module = module_of(self.graph, model)
        is_text = module is model
        known = ("input_ids",) if is_text else tuple(inspect.signature(module.forward).parameters)
        flat = {**arguments, **(arguments.get("added_cond_kwargs") or {})}
        found = {name: flat[name] for name in known if isinstance(flat.get(name), Tensor | int | float)}
        found = {name: torch.as_tensor(value).detach().clone() for name, value in found.items()}
        if "timestep" in found:
            found["timestep"] = found["timestep"].float()
            if "sample" in found:  # a UNet's is one number for all rows
                found["timestep"] = found["timestep"].reshape(-1)[0]
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def components_in(plan: MergePlan) -> Iterator[Component]:
    """Give the graphs of all components that updates change."""
    config = plan.config
    adapted = {tensor.spec.name.partition(SEPARATOR)[0] for tensor in plan.tensors if tensor.updates}
    for name in plan.binding.checkpoint.components:
        if name in adapted:
            for graph in graphs_of(name):
                inside = "text" in name and reads_hidden_states(config)
                yield Component(name=name, graph=graph, gives_hidden_states=inside)


def plan_of_component(plan: MergePlan, name: str) -> MergePlan:
    """Cut out of a pipeline's plan what concerns one component, under the component's own names."""
    prefix, binding = name + SEPARATOR, plan.binding

    def own(full: str) -> str:
        return full.removeprefix(prefix)

    def tensor_of(tensor: PlannedTensor) -> PlannedTensor:
        source = tensor.source and replace(tensor.source, name=own(tensor.source.name))
        return replace(tensor, spec=replace(tensor.spec, name=own(tensor.spec.name)), source=source)

    updates = {own(full): entries for full, entries in binding.updates.items() if full.startswith(prefix)}
    used = sorted({entry.adapter_index for entries in updates.values() for entry in entries})
    shards = [
        ShardPlan(
            file=own(shard.file), tensors=tuple(tensor_of(tensor) for tensor in shard.tensors), header=shard.header
        )
        for shard in plan.shards
        if shard.file.startswith(prefix)
    ]
    options = binding.options
    weights = tuple(options.weights[k] for k in used) if options.weights else ()
    return replace(
        plan,
        binding=Binding(
            checkpoint=binding.checkpoint.components[name],
            adapters=tuple(binding.adapters[k] for k in used),
            outputs={own(n): s and own(s) for n, s in binding.outputs.items() if n.startswith(prefix)},
            updates=updates,
            shapes={own(full): shape for full, shape in binding.shapes.items() if full.startswith(prefix)},
            # Neither which component nor which variant says anything that the component's own plan leaves open.
            options=BindOptions(weights=weights, include=options.include, exclude=options.exclude),
        ),
        shards=tuple(shards),
        config=plan.config[name],
        companions={},
    )


def _flat(output: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name every tensor of an output as the graph does."""
    for name, value in output.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from ((f"{name}.{k}", part) for k, part in enumerate(value) if isinstance(part, Tensor))
