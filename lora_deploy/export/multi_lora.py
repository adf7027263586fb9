"""One base, many adapters: its graphs with inputs for low-rank factors, and a file of them for each adapter.

    lora plan ─ graphs of the base ─ products found, inputs added ─▶ graphs, adapter files, record

Promise: without an adapter the graphs give what the base's give. Every graph has all inputs, used or not, because
onnxruntime refuses a parameter that a graph does not take. What an adapter does beyond low-rank updates of matrices is
refused, all of it at once; so is a matrix that a graph uses otherwise than in a product.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from lora_deploy.artifact import Artifact
from lora_deploy.errors import Finding, IncompatibleAdapterError, RecipeError, Severity
from lora_deploy.export.adapter_file import SUFFIX, write_adapter
from lora_deploy.export.branches import add_branches, add_inputs, input_names
from lora_deploy.export.drawn import without_metadata
from lora_deploy.export.execute import Exported, find_done, put_in_place, record_of, write_files, write_record
from lora_deploy.export.extras import require_onnx_ir
from lora_deploy.export.factors import changes_of_structure, factors_of, no_factors, ranks_of, scales_of
from lora_deploy.export.graphs import GraphSet, graph_of, recorded_graph
from lora_deploy.export.plan import ExportPlan
from lora_deploy.export.products import Factor, Products, agreed, products_of
from lora_deploy.export.record import (
    ExportRecord,
    RecordedAdapter,
    RecordedFactors,
    RecordedInputs,
    RecordedMultiLora,
    digest_of,
    recorded_findings,
)
from lora_deploy.export.shared import Shared
from lora_deploy.merge.progress import Progress
from lora_deploy.names import NameIndex, vocabulary_names
from lora_deploy.validate import Binding
from lora_deploy.validate.findings import lines_of

ALL_LINEAR = "all-linear"
"""Every matrix that graphs multiply by, but those of the vocabulary."""
_EMPTY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NamedAdapter:
    """An adapter that is bound to the base by itself, under the name that it is switched on by."""

    name: str
    binding: Binding

    @property
    def file(self) -> str:
        """Its file beside the graphs."""
        return f"{self.name}{SUFFIX}"

    def recorded(self) -> RecordedAdapter:
        """What the record says of it."""
        adapter = self.binding.adapters[0]
        factors = {
            name: RecordedFactors(rank=ranks_of(entries), scales=scales_of(entries))
            for name, entries in sorted(self.binding.updates.items())
        }
        return RecordedAdapter(
            file=self.file,
            sha256=adapter.sha256,
            config_sha256=adapter.config_sha256,
            factors=factors,
            findings=recorded_findings(self.binding.findings),
        )

    def write(self, folder: Path, inputs: Mapping[str, RecordedInputs]) -> Artifact:
        """Write its file.

        Raises:
            ExportError: A value exceeds the graph's format, or onnxruntime is missing.
        """
        parameters: dict[str, Tensor] = {}
        for name, entries in self.binding.updates.items():
            ports = inputs[name]
            found = factors_of(entries, _factor(name, ports))
            parameters |= {ports.down: found.down, ports.up: found.up}
        return write_adapter(folder / self.file, parameters)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MultiLoraPlan:
    """Everything that decides such an export."""

    export: ExportPlan
    """Of the base."""
    adapters: tuple[NamedAdapter, ...]
    targets: tuple[str, ...]
    """Patterns of further matrices that get inputs, for adapters to come."""


def plan_multi_lora(export: ExportPlan, adapters: Sequence[NamedAdapter], targets: Sequence[str]) -> MultiLoraPlan:
    """Plan an export with inputs for adapters.

    Raises:
        RecipeError: Nothing says what gets inputs, two adapters have one name, or weights are to be shared.
        IncompatibleAdapterError: An adapter is more than low-rank updates of matrices; all of it is in ``findings``.
    """
    if export.options.storage == "shared":
        raise RecipeError("--multi-lora with --weights shared: its graphs are written beside weights of their own")
    if export.blueprint.components:
        raise RecipeError("--multi-lora: is for language models and other single models, not for pipelines")
    if export.quantisation is not None:
        raise RecipeError("--multi-lora with --quantize: a product of packed weights has no inputs for adapters")
    if not adapters and not targets:
        raise RecipeError(
            "--multi-lora: nothing says which matrices get inputs", hint="--adapter ADAPTER, or --targets all-linear"
        )
    require_switchable(adapters)
    return MultiLoraPlan(export=export, adapters=tuple(adapters), targets=tuple(targets))


def require_switchable(adapters: Sequence[NamedAdapter]) -> None:
    """Check that adapters are low-rank updates of matrices, and have names of their own.

    Raises:
        RecipeError: Two have one name.
        IncompatibleAdapterError: One is more; all of it is in ``findings``.
    """
    names = [adapter.name for adapter in adapters]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"several adapters are called {twice[0]}", hint="name them: --adapter NAME=PATH")
    problems = {
        adapter.name: [*changes_of_structure(adapter.binding), *no_factors(adapter.binding)] for adapter in adapters
    }
    _refuse({name: findings for name, findings in problems.items() if findings})


def execute_multi_lora(plan: MultiLoraPlan, out: Path, *, progress: Progress | None = None) -> Exported:
    """Write graphs with inputs and a file for each adapter to ``out``; a link there is followed.

    Raises:
        ExportError: The graphs cannot be made or bound, or a factor exceeds their format.
        IncompatibleAdapterError: A matrix that an adapter changes is used otherwise than in a product.
        RecipeError: A pattern matches nothing.
        OutputExistsError: Something else is at ``out``.
        MergeError: A file cannot be written.
    """
    root, out = out, out.resolve()
    graphs = graph_of(plan.export.blueprint, plan.export.maker, progress)
    edited, inputs = with_inputs(plan, graphs)
    identity = plan.export.identity(progress)
    multi_lora = RecordedMultiLora(
        digest=digest_of({**identity, "inputs": sorted(inputs)}),
        inputs=inputs,
        adapters={adapter.name: adapter.recorded() for adapter in plan.adapters},
    )
    digest = digest_with_adapters(multi_lora)
    done = find_done(out, digest, plan.export)
    if done is not None:
        return Exported(root=root, record=done, was_done=True)

    def write(folder: Path) -> ExportRecord:
        artifacts = write_files(plan.export, graphs, edited, folder, progress)
        artifacts += [adapter.write(folder, inputs) for adapter in plan.adapters]
        record = record_of(plan.export, graphs, digest, identity, artifacts)
        described = {name: recorded_graph(folder, graph.file) for name, graph in record.graphs.items()}
        record = record.model_copy(update={"graphs": described, "multi_lora": multi_lora})
        write_record(folder, record, plan.export, graphs)
        return record

    return Exported(root=root, record=put_in_place(out, write), was_cached=graphs.was_cached)


def digest_with_adapters(multi_lora: RecordedMultiLora) -> str:
    """Digest of graphs and adapters: the same whether adapters were there from the start or came later."""
    adapters = {name: adapter.model_dump(mode="json") for name, adapter in multi_lora.adapters.items()}
    return digest_of({"graphs": multi_lora.digest, "adapters": adapters})


def with_inputs(plan: MultiLoraPlan, graphs: GraphSet) -> tuple[Shared, dict[str, RecordedInputs]]:
    """Add inputs to the graphs of the base: graph files and table, and the inputs by tensor.

    Raises:
        IncompatibleAdapterError: A matrix that an adapter changes is used otherwise than in a product.
        RecipeError: A pattern matches nothing.
    """
    ir = require_onnx_ir()
    table = graphs.table
    models = {name: ir.load(str(graphs.folder / part.file)) for name, part in table.components.items()}
    products = {
        name: products_of(models[name], part, table, plan.export.source.specs)
        for name, part in table.components.items()
    }
    factors = _chosen(plan, products)
    files, components = {}, {}
    for name, part in table.components.items():
        pairs = {tensor: add_inputs(models[name], factor) for tensor, factor in factors.items()}
        add_branches(models[name], products[name].found, pairs)
        files[part.file] = without_metadata(models[name])
        new = set(models[name].graph.initializers) - part.slots.keys() - part.constants.keys()
        constants = {**part.constants, **dict.fromkeys(sorted(new), _EMPTY)}
        components[name] = part.model_copy(update={"constants": constants})
    edited = Shared(graphs=files, table=table.model_copy(update={"components": components}), share=0.0)
    return edited, {tensor: _recorded(factor) for tensor, factor in factors.items()}


def _chosen(plan: MultiLoraPlan, products: Mapping[str, Products]) -> dict[str, Factor]:
    """The matrices that get inputs, in the order of the checkpoint."""
    possible, obstacles = agreed(products.values())
    wanted = {name for adapter in plan.adapters for name in adapter.binding.updates}
    problems = {
        adapter.name: [_no_product(name, obstacles) for name in adapter.binding.updates if name not in possible]
        for adapter in plan.adapters
    }
    _refuse({name: findings for name, findings in problems.items() if findings})
    specs = plan.export.source.specs
    vocabulary = vocabulary_names(NameIndex(specs, plan.export.source.config), specs)
    for pattern in plan.targets:
        wanted |= set(_matching(pattern, possible, vocabulary))
    return {name: possible[name] for name in specs if name in wanted}


def _matching(pattern: str, possible: Iterable[str], vocabulary: Sequence[str]) -> Sequence[str]:
    found = [
        name
        for name in possible
        if (pattern == ALL_LINEAR and name not in vocabulary)
        or fnmatchcase(name, pattern)
        or fnmatchcase(name.removesuffix(".weight"), pattern)
    ]
    if not found:
        raise RecipeError(f"--targets {pattern}: matches no matrix that the graphs multiply by")
    return found


def _no_product(name: str, obstacles: Mapping[str, str]) -> Finding:
    reason = obstacles.get(name, "no graph reads it")
    message = f"{reason}; expected nothing but products with it"
    return Finding(code="no-product", severity=Severity.ERROR, target=name, message=message)


def _refuse(problems: Mapping[str, Sequence[Finding]]) -> None:
    if not problems:
        return
    n_errors = sum(map(len, problems.values()))
    lines = [f"not everything can be switched at run time: {n_errors} error{'' if n_errors == 1 else 's'}"]
    for name, findings in problems.items():
        lines += [f"  adapter {name}", *(f"  {line}" for line in lines_of(findings))]
    everything = tuple(finding for findings in problems.values() for finding in findings)
    hint = "merge such an adapter into graphs of its own: lora-deploy export --onnx --adapter ADAPTER --base BASE"
    raise IncompatibleAdapterError("\n".join(lines), findings=everything, hint=hint)


def _recorded(factor: Factor) -> RecordedInputs:
    down, up = input_names(factor.tensor)
    return RecordedInputs(
        down=down,
        up=up,
        n_in=factor.n_in,
        n_out=factor.n_out,
        is_turned=factor.is_turned,
        dtype=factor.dtype,
    )


def _factor(name: str, ports: RecordedInputs) -> Factor:
    return Factor(tensor=name, n_in=ports.n_in, n_out=ports.n_out, is_turned=ports.is_turned, dtype=ports.dtype)
