"""The unmerged graph: the base's, with the adapter computed beside every product, as a merge spares the user.

It is the contrast of the latency measurement: known to be slower, so that it shows what a difference would look like.
Promise: it is the base's own export with the adapter's factors as constants of fixed rank, and nothing else; its
weights are the base's files, linked. Where an adapter is more than low-rank updates of matrices, there is no such
graph, and the reason is given.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_deploy.artifact import cache_root
from lora_deploy.errors import ExportError, LoraDeployError
from lora_deploy.evidence.exported_base import edited_tensors
from lora_deploy.evidence.graphs import GraphFolder, find_graphs
from lora_deploy.export.binding_table import BindingTable
from lora_deploy.export.branches import add_branches, add_constants, input_names
from lora_deploy.export.drawn import onnx_type, without_metadata
from lora_deploy.export.extras import require_onnx_ir
from lora_deploy.export.factors import factors_of, no_factors
from lora_deploy.export.graphs import TABLE_NAME
from lora_deploy.export.products import Factor, agreed, products_of
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.shard import bytes_of
from lora_deploy.updates.low_rank import LowRank

_FILE = "factors.onnx.data"
_ALIGNED_BYTES = 64
_MAX_NAMED = 3


@contextmanager
def unmerged_graph(plan: MergePlan, base: GraphFolder) -> Iterator[GraphFolder | str]:
    """Make the unmerged graph of a merge beside the base's exported graph; give a reason where that cannot be."""
    cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unmerged-", dir=cache_root()) as made:
        folder = Path(made) / "onnx"
        try:
            _write(plan, base, folder)
        except (LoraDeployError, OSError, ValidationError) as error:
            yield str(error)
            return
        found = find_graphs(folder)
        assert found is not None  # noqa: S101 - a copy of the base's
        yield found


def _write(plan: MergePlan, base: GraphFolder, folder: Path) -> None:
    _require_factors(plan)
    if not (base.root / TABLE_NAME).is_file():
        raise ExportError(f"{base.root}: was not exported by lora-deploy: nothing says where its weights come from")
    table = BindingTable.model_validate_json((base.root / TABLE_NAME).read_bytes())
    shutil.copytree(base.root, folder, copy_function=_link)
    specs = {tensor.spec.name: tensor.spec for tensor in plan.tensors}
    ir = require_onnx_ir()
    models = {name: ir.load(str(base.root / part.file)) for name, part in table.components.items()}
    products = {name: products_of(models[name], part, table, specs) for name, part in table.components.items()}
    constants = _write_factors(plan, *agreed(products.values()), folder)
    for name, part in table.components.items():
        used = {factor.tensor for product in products[name].found for factor in product.factors}
        pairs = {tensor: add_constants(models[name], *both) for tensor, both in constants.items() if tensor in used}
        add_branches(models[name], products[name].found, pairs)
        path = folder / part.file
        path.unlink()  # it is the base's own file
        path.write_bytes(without_metadata(models[name]))


def _require_factors(plan: MergePlan) -> None:
    found = list(no_factors(plan.binding, edited=edited_tensors(plan.binding)))
    if found:
        named = "; ".join(f"{finding.target}: {finding.message}" for finding in found[:_MAX_NAMED])
        more = f"; and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
        raise ExportError(f"{named}{more}")


def _write_factors(
    plan: MergePlan, factors: Mapping[str, Factor], obstacles: Mapping[str, str], folder: Path
) -> dict[str, tuple[Any, Any]]:
    """Write the adapters' factors into one file; give them as external tensors, A and B by tensor name."""
    ir = require_onnx_ir()
    content = bytearray()
    constants = {}
    for tensor, entries in plan.binding.updates.items():
        low_rank = [entry for entry in entries if isinstance(entry.update, LowRank)]
        if not low_rank:
            continue
        if tensor not in factors:
            raise ExportError(f"{tensor}: {obstacles.get(tensor, 'no graph multiplies by it')}")
        found, kind = factors_of(low_rank, factors[tensor]), onnx_type(factors[tensor].dtype)
        pair = []
        for name, values in zip(input_names(tensor), (found.down, found.up), strict=True):
            shape = ir.Shape(tuple(values.shape))
            pair.append(ir.ExternalTensor(_FILE, len(content), values.nbytes, kind, shape=shape, name=name))
            content += bytes_of(values)
            content += bytes(-len(content) % _ALIGNED_BYTES)
        constants[tensor] = (pair[0], pair[1])
    (folder / _FILE).write_bytes(content)
    return constants


def _link(source: str, destination: str) -> str:
    with suppress(OSError):
        os.link(source, destination)
        return destination
    return str(shutil.copyfile(source, destination))
