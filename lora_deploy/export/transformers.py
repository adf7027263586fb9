"""The graph maker of transformers: its exporters trace a model once; the result is optimised with two sets of weights.

Tracing never reads a weight, optimising does (it folds transpositions and sums into weights). So the traced graph is
kept, and the second set of weights takes the same way from there: two drawings for the price of one tracing.
Source: transformers 5.23 ``exporters/exporter_onnx.py``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lora_deploy.errors import ExportError, Finding, Severity
from lora_deploy.export.extras import require_transformers_exporters
from lora_deploy.export.float_inputs import keep_float32
from lora_deploy.export.folding import OnlyLayouts, Rule, folding_by, nothing_of_weights
from lora_deploy.export.fusing import fuse, has_rotating_attention
from lora_deploy.export.interface import Drawing, GraphTask
from lora_deploy.export.loading import about, load_model, quiet

if TYPE_CHECKING:
    import torch

    from lora_deploy.export.stages import Stage


class TransformersMaker:
    """Graphs by ``transformers.exporters.OnnxExporter``, fused for the provider where the fused graph runs."""

    name = "transformers"
    packages = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxruntime-gpu")

    def draw(self, task: GraphTask) -> Iterator[Drawing]:
        """Draw every stage of the model twice; see the protocol."""
        require_transformers_exporters()
        with quiet():
            model = load_model(task.checkpoints[0], task.dtype)
            yield from self.draw_stages(task, model, self._stages(model))

    def companions(self, task: GraphTask) -> Mapping[str, bytes]:
        """Nothing but graphs."""
        return {}

    def settled(
        self, companions: Mapping[str, bytes], config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> Mapping[str, bytes]:
        """Nothing depends on the model."""
        return companions

    def _stages(self, model: Any) -> list[Stage]:  # noqa: ANN401
        from lora_deploy.export.stages import stages_of

        with about(type(model).__name__):
            return list(stages_of(model))

    def draw_stages(self, task: GraphTask, model: Any, stages: Sequence[Stage]) -> Iterator[Drawing]:  # noqa: ANN401
        """Draw some stages of a loaded model, each twice; the model's weights are the second drawing's afterwards."""
        for number, stage in enumerate(stages):
            with about(stage.component):
                if number:
                    _refill(model, task, 0)
                yield from self._draw(task, model, stage)

    def _draw(self, task: GraphTask, model: Any, stage: Stage) -> Iterator[Drawing]:  # noqa: ANN401
        """Draw one stage of a model twice; the model's weights are replaced by those of the task's checkpoints.

        Raises:
            ExportError: The graph is not the model.
        """
        from transformers.exporters.configs import OnnxConfig
        from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model
        from transformers.exporters.exporter_onnx import OnnxExporter

        from lora_deploy.export.stages import varying
        from lora_deploy.export.trial import expected_outputs

        register_cache_pytrees_for_model(stage.module)
        config = OnnxConfig(dynamic=True, dynamic_shapes=varying(stage.inputs, stage.others))
        expected = expected_outputs(stage.module, stage.others)
        rules = [nothing_of_weights if task.is_stored else OnlyLayouts(stage.module.state_dict()) for _ in range(2)]
        with _kept_trace(rules[0]) as trace:
            drawn, metadata = OnnxExporter().export_program(stage.module, dict(stage.inputs), config)
        keep_float32(drawn, stage.floats)
        metadata.export_config = {"dynamic": True, "ort_fusions": None}
        drawn, fusion, findings = _fused(task, stage, drawn, expected, rules[0])
        metadata.export_config["ort_fusions"] = task.provider if fusion else None
        about = json.loads(json.dumps(dataclasses.asdict(metadata)))
        names = [value.name for value in drawn.graph.inputs], [value.name for value in drawn.graph.outputs]
        yield Drawing(component=stage.component, seed=0, model=drawn, metadata=about, findings=findings)
        del drawn
        _refill(model, task, 1)
        again = trace.optimised(*names, rules[1])
        keep_float32(again, stage.floats)
        if fusion:
            again = again.clone()  # as the first was, since new names are counted from the copy on
            fuse(again, task.provider, rules[1], rotates=fusion.rotates)
        yield Drawing(component=stage.component, seed=1, model=again, metadata=about)


MAKER = TransformersMaker()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """How a graph was fused."""

    rotates: bool
    """Whether attention may do what rotary embeddings do."""


class _Trace:
    """A traced graph before anything was done to it, and how to do it."""

    def __init__(self, optimise: Callable[[Any, Rule], None]) -> None:
        self.model: Any = None
        self._optimise = optimise

    def optimised(self, input_names: list[str], output_names: list[str], rule: Rule) -> Any:  # noqa: ANN401 - an onnx_ir.Model
        """Do what the exporter does after tracing, with the weights that the traced model has now."""
        from transformers.exporters.exporter_onnx import _name_graph_outputs, apply_onnx_ir_fixes
        from transformers.exporters.utils import apply_patches

        program: Any = SimpleNamespace(model=self.model.clone())
        with apply_patches("onnx"):
            self._optimise(program, rule)
        for value, name in zip(program.model.graph.inputs, input_names, strict=True):
            value.name = name
        _name_graph_outputs(program.model.graph, output_names)
        apply_onnx_ir_fixes(program)
        return program.model


@contextmanager
def _kept_trace(rule: Rule) -> Iterator[_Trace]:
    """Keep a copy of the graph that ``torch.onnx`` is about to optimise; ``rule`` says what is folded."""
    import torch.onnx

    program_class: Any = torch.onnx.ONNXProgram
    original = program_class.optimize

    def optimise(program: Any, rule: Rule) -> None:  # noqa: ANN401
        with folding_by(rule):
            original(program)

    trace = _Trace(optimise)

    def keep(program: Any) -> None:  # noqa: ANN401
        trace.model, program.model = program.model, program.model.clone()  # new names are counted from the copy on
        optimise(program, rule)

    program_class.optimize = keep
    try:
        yield trace
    finally:
        program_class.optimize = original


def _fused(
    task: GraphTask,
    stage: Stage,
    drawn: Any,  # noqa: ANN401
    expected: Mapping[str, torch.Tensor],
    rule: Rule,
) -> tuple[Any, Fusion | None, tuple[Finding, ...]]:
    """Fuse a graph for its provider, and keep the unfused one where that fails; also say how it was fused.

    What is kept was run beside the model, where it can be; the unfused graph only where nothing was made of it.

    Raises:
        ExportError: The unfused graph does not run, or says something else than the model.
    """
    if task.is_stored:
        _require_model(task, stage, drawn, expected)
        return drawn, None, ()
    faults = []
    for fusion in (Fusion(rotates=True), Fusion(rotates=False)):
        fused = drawn.clone()
        fault = _fault_of_fusion(task, stage, fused, fusion, expected, rule)
        if fault is None:
            return fused, fusion, _untried(task, stage)
        faults.append(fault)
        if not has_rotating_attention(fused):
            break
    _require_model(task, stage, drawn, expected)
    message = f"the graph fused for {task.provider} fails ({faults[0]}); the unfused one is used, which is slower"
    return drawn, None, (_finding("unfused", Severity.WARN, stage.component, message),)


def _fault_of_fusion(
    task: GraphTask,
    stage: Stage,
    model: Any,  # noqa: ANN401
    fusion: Fusion,
    expected: Mapping[str, torch.Tensor],
    rule: Rule,
) -> str | None:
    """Fuse in place and say what is wrong with the result, as far as it can be tried."""
    from lora_deploy.export.trial import fault_of

    try:
        fuse(model, task.provider, rule, rotates=fusion.rotates)
        return fault_of(model, stage.others, expected, task.dtype) if task.provider == "cpu" else None
    except Exception as error:  # noqa: BLE001 - a fusion that fails is the reason to go without
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _untried(task: GraphTask, stage: Stage) -> tuple[Finding, ...]:
    if task.provider == "cpu":
        return ()
    message = f"the graph was not run: only --provider cpu is tried here, not {task.provider}"
    return (_finding("untried", Severity.WARN, stage.component, message),)


def _require_model(task: GraphTask, stage: Stage, drawn: Any, expected: Mapping[str, torch.Tensor]) -> None:  # noqa: ANN401
    from lora_deploy.export.trial import fault_of

    fault = fault_of(drawn, stage.others, expected, task.dtype) if task.provider == "cpu" else None
    if fault:
        raise ExportError(f"{stage.component}: the graph is not the model: {fault}")


def _refill(model: Any, task: GraphTask, seed: int) -> None:  # noqa: ANN401
    """Give the model another set of weights, in place: the traced graph refers to its tensors."""
    import torch

    other = load_model(task.checkpoints[seed], task.dtype)
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            model.state_dict()[name].copy_(tensor)


def _finding(code: str, severity: Severity, component: str, message: str) -> Finding:
    return Finding(code=code, severity=severity, target=component, message=message)
