"""The graph maker of transformers: its exporters trace a model once; the result is optimised with two sets of weights.

Tracing never reads a weight, optimising does (it folds transpositions and sums into weights). So the traced graph is
kept, and the second set of weights takes the same way from there: two drawings for the price of one tracing.
Source: transformers 5.23 ``exporters/exporter_onnx.py``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from lora_deploy.errors import ExportError, Finding, Severity
from lora_deploy.export.extras import require_transformers_exporters
from lora_deploy.export.interface import Drawing, GraphTask
from lora_deploy.export.loading import about, load_model, quiet
from lora_deploy.export.stages import Stage, stages_of, varying
from lora_deploy.export.trial import expected_outputs, fault_of


class TransformersMaker:
    """Graphs by ``transformers.exporters.OnnxExporter``, fused for the provider where the fused graph runs."""

    name = "transformers"
    packages = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxruntime-gpu")

    def draw(self, task: GraphTask) -> Iterator[Drawing]:
        """Draw every stage of the model twice; see the protocol."""
        require_transformers_exporters()
        with quiet():
            model = load_model(task.checkpoints[0], task.dtype)
            for stage in self._stages(model):
                with about(stage.component):
                    yield from self.draw_stage(task, model, stage)

    def companions(self, task: GraphTask) -> Mapping[str, bytes]:
        """Nothing but graphs."""
        return {}

    def settled(
        self, companions: Mapping[str, bytes], config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> Mapping[str, bytes]:
        """Nothing depends on the model."""
        return companions

    def _stages(self, model: Any) -> list[Stage]:  # noqa: ANN401
        with about(type(model).__name__):
            return list(stages_of(model))

    def draw_stage(self, task: GraphTask, model: Any, stage: Stage) -> Iterator[Drawing]:  # noqa: ANN401
        """Draw one stage of a model twice; the model's weights are replaced by those of the task's checkpoints.

        Raises:
            ExportError: The graph is not the model.
        """
        from transformers.exporters.configs import OnnxConfig
        from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model
        from transformers.exporters.exporter_onnx import OnnxExporter

        _refill(model, task, 0)
        register_cache_pytrees_for_model(stage.module)
        config = OnnxConfig(dynamic=True, dynamic_shapes=varying(stage.inputs, stage.others))
        expected = expected_outputs(stage.module, stage.others)
        with _kept_trace(is_stored=task.is_stored) as trace:
            drawn, metadata = OnnxExporter().export_program(stage.module, dict(stage.inputs), config)
        metadata.export_config = {"dynamic": True, "ort_fusions": None}
        fault = fault_of(drawn, stage.others, expected, task.dtype) if task.provider == "cpu" else None
        if fault:
            raise ExportError(f"{stage.component}: the graph is not the model: {fault}")
        drawn, is_fused, findings = _fused(task, stage, drawn, expected)
        metadata.export_config["ort_fusions"] = task.provider if is_fused else None
        about = json.loads(json.dumps(dataclasses.asdict(metadata)))
        names = [value.name for value in drawn.graph.inputs], [value.name for value in drawn.graph.outputs]
        yield Drawing(component=stage.component, seed=0, model=drawn, metadata=about, findings=findings)
        del drawn
        _refill(model, task, 1)
        again = trace.optimised(*names)
        if is_fused:
            again = again.clone()  # as the first was, since new names are counted from the copy on
            _fuse(again, task.provider)
        yield Drawing(component=stage.component, seed=1, model=again, metadata=about)


MAKER = TransformersMaker()


class _Trace:
    """A traced graph before anything was done to it, and how to do it."""

    def __init__(self, optimise: Callable[[Any], None]) -> None:
        self.model: Any = None
        self._optimise = optimise

    def optimised(self, input_names: list[str], output_names: list[str]) -> Any:  # noqa: ANN401 - an onnx_ir.Model
        """Do what the exporter does after tracing, with the weights that the traced model has now."""
        from transformers.exporters.exporter_onnx import _name_graph_outputs, apply_onnx_ir_fixes
        from transformers.exporters.utils import apply_patches

        program: Any = SimpleNamespace(model=self.model.clone())
        with apply_patches("onnx"):
            self._optimise(program)
        for value, name in zip(program.model.graph.inputs, input_names, strict=True):
            value.name = name
        _name_graph_outputs(program.model.graph, output_names)
        apply_onnx_ir_fixes(program)
        return program.model


@contextmanager
def _kept_trace(*, is_stored: bool) -> Iterator[_Trace]:
    """Keep a copy of the graph that ``torch.onnx`` is about to optimise."""
    import torch.onnx

    program_class: Any = torch.onnx.ONNXProgram
    original = program_class.optimize

    def optimise(program: Any) -> None:  # noqa: ANN401
        with _unfolded() if is_stored else _nothing():
            original(program)

    trace = _Trace(optimise)

    def keep(program: Any) -> None:  # noqa: ANN401
        trace.model, program.model = program.model, program.model.clone()  # new names are counted from the copy on
        optimise(program)

    program_class.optimize = keep
    try:
        yield trace
    finally:
        program_class.optimize = original


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _unfolded() -> Iterator[None]:
    """Leave weights in the layout that the checkpoint has: what reads one is not folded."""
    from onnxscript import optimizer

    original = optimizer.optimize_ir

    def reads_weight(node: Any) -> bool:  # noqa: ANN401
        return any(
            value is not None and value.is_initializer() and value.const_value.dtype.is_floating_point()
            for value in node.inputs
        )

    def optimize_ir(model: Any, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        options["should_fold"] = lambda node: False if node.op_type == "Resize" or reads_weight(node) else None
        return original(model, *args, **options)

    optimizer.optimize_ir = optimize_ir
    try:
        yield
    finally:
        optimizer.optimize_ir = original


def _fused(
    task: GraphTask,
    stage: Stage,
    drawn: Any,  # noqa: ANN401
    expected: Mapping[str, torch.Tensor],
) -> tuple[Any, bool, tuple[Finding, ...]]:
    """Fuse a graph for its provider, and keep the unfused one where that fails."""
    if task.is_stored:
        return drawn, False, ()
    fused = drawn.clone()
    try:
        _fuse(fused, task.provider)
        fault = fault_of(fused, stage.others, expected, task.dtype) if task.provider == "cpu" else None
    except Exception as error:  # noqa: BLE001 - a fusion that fails is the reason to go without
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if fault:
        message = f"the graph fused for {task.provider} fails ({fault}); the unfused one is used, which is slower"
        return drawn, False, (_finding("unfused", Severity.WARN, stage.component, message),)
    if task.provider != "cpu":
        message = f"the graph was not run: only --provider cpu is tried here, not {task.provider}"
        return fused, True, (_finding("untried", Severity.WARN, stage.component, message),)
    return fused, True, ()


def _fuse(model: Any, provider: str) -> None:  # noqa: ANN401
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    fuse_for_onnxruntime(model, provider)


def _refill(model: Any, task: GraphTask, seed: int) -> None:  # noqa: ANN401
    """Give the model another set of weights, in place: the traced graph refers to its tensors."""
    other = load_model(task.checkpoints[seed], task.dtype)
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            model.state_dict()[name].copy_(tensor)


def _finding(code: str, severity: Severity, component: str, message: str) -> Finding:
    return Finding(code=code, severity=severity, target=component, message=message)
