"""The graph maker of diffusers: a pipeline's components, each traced by the exporter that transformers' models take.

Every component has a folder of its own with ``model.onnx``, its weights and its configuration, as optimum's pipelines
read them; the autoencoder has two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import Finding, Severity
from lora_deploy.export.components import LEFT_OUT, graphs_of, stages_of_component
from lora_deploy.export.extras import require_diffusers, require_transformers_exporters
from lora_deploy.export.interface import Drawing, GraphTask
from lora_deploy.export.loading import about, load_model, quiet
from lora_deploy.export.stages import Stage
from lora_deploy.export.transformers import TransformersMaker
from lora_deploy.pipeline_layout import CONFIG_NAME, MODEL_INDEX


class DiffusersMaker:
    """Graphs of a pipeline's components, fused for the provider where the fused graph runs."""

    name = "diffusers"
    packages = (*TransformersMaker.packages, "diffusers")

    def draw(self, task: GraphTask) -> Iterator[Drawing]:
        """Draw every component twice; see the protocol."""
        require_transformers_exporters()
        require_diffusers()
        pipeline = read_json(task.checkpoints[0] / MODEL_INDEX)
        components = [name for name in pipeline if not name.startswith("_")]
        configs = {name: read_json(task.checkpoints[0] / name / CONFIG_NAME) for name in components}
        findings = tuple(_left_out(name) for name in components if name in LEFT_OUT)
        with quiet():
            for name in components:
                if name in LEFT_OUT:
                    continue
                for drawing in _drawn(task, name, {**configs, "_class_name": pipeline["_class_name"]}):
                    yield replace(drawing, folder=drawing.component, findings=(*findings, *drawing.findings))
                    findings = ()

    def companions(self, task: GraphTask) -> Mapping[str, bytes]:
        """Nothing but graphs."""
        return {}

    def settled(
        self, companions: Mapping[str, bytes], config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> Mapping[str, bytes]:
        """Give every graph's folder the configuration of its component."""
        return {
            f"{graph}/{CONFIG_NAME}": (json.dumps(own, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
            for component, own in config.items()
            if isinstance(own, Mapping)
            for graph in graphs_of(component)
        }


MAKER = DiffusersMaker()


def _drawn(task: GraphTask, name: str, pipeline: Mapping[str, Any]) -> Iterator[Drawing]:
    """Draw one component, as a model of its own whose folder is within the pipeline's."""
    first, second = task.checkpoints
    own = replace(task, checkpoints=(first / name, second / name))
    with about(name):
        model = load_model(own.checkpoints[0], task.dtype)
        stages: list[Stage] = list(stages_of_component(name, model, pipeline))
    yield from TransformersMaker().draw_stages(own, model, stages)


def _left_out(component: str) -> Finding:
    message = "is not exported: pipelines of graphs run without it, or with the one of the base"
    return Finding(code="left-out", severity=Severity.NOTE, target=component, message=message)
