"""Inputs for adapters in hand-made graphs: every form that a product has, and every use that is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import Tensor

from lora_deploy.adapter import Adapter, Orientation
from lora_deploy.errors import ExportError, IncompatibleAdapterError, InputError, OutputExistsError, RecipeError
from lora_deploy.export.adapter_file import read_ports
from lora_deploy.export.adding import add_adapters
from lora_deploy.export.binding_table import BindingTable
from lora_deploy.export.execute import Exported, execute_export
from lora_deploy.export.multi_lora import NamedAdapter, execute_multi_lora, plan_multi_lora
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.validate import bind
from tests.builders import adapter_of, low_rank, module_update
from tests.merging import digests
from tests.unit.export.hand_made import Draw, HandMaker, checkpoint, model_of, plain, planned, stored, weights

MICROSOFT = "com.microsoft"


def _after(tensors: Mapping[str, Tensor], first: Sequence[Any], extra: Mapping[str, Tensor]) -> Any:
    """Continue a first product, whose output is h, as the others do."""
    initializers = {**extra, "norm.weight": tensors["norm.weight"], "val_2": tensors["b.weight"].T}
    rest = [helper.make_node("Mul", ["h", "norm.weight"], ["n"]), helper.make_node("MatMul", ["n", "val_2"], ["y"])]
    return model_of(initializers, [*first, *rest], tensors["a.weight"].dtype)


def transposed(tensors: Mapping[str, Tensor]) -> Any:
    first = [
        helper.make_node("Transpose", ["a.weight"], ["a"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "a"], ["h"]),
    ]
    return _after(tensors, first, {"a.weight": tensors["a.weight"]})


def fused(tensors: Mapping[str, Tensor]) -> Any:
    first = [helper.make_node("FusedMatMul", ["x", "a.weight"], ["h"], domain=MICROSOFT, transB=1)]
    return _after(tensors, first, {"a.weight": tensors["a.weight"]})


def scaled(tensors: Mapping[str, Tensor]) -> Any:
    first = [helper.make_node("FusedMatMul", ["x", "a.weight"], ["h"], domain=MICROSOFT, transB=1, alpha=2.0)]
    return _after(tensors, first, {"a.weight": tensors["a.weight"]})


def gathered(tensors: Mapping[str, Tensor]) -> Any:
    """Also look rows of a matrix up, as embeddings are: rows 0 and 1, whose sum is added."""
    first = [
        helper.make_node("MatMul", ["x", "val_1"], ["g"]),
        helper.make_node("Gather", ["a.weight", "rows"], ["found"]),
        helper.make_node("ReduceSum", ["found"], ["sum"], keepdims=0),
        helper.make_node("Add", ["g", "sum"], ["h"]),
    ]
    a = tensors["a.weight"]
    return _after(tensors, first, {"val_1": a.T, "a.weight": a, "rows": torch.tensor([0, 1])})


def twice(tensors: Mapping[str, Tensor]) -> Any:
    """Use one matrix for two products: x·Aᵀ + (x·Aᵀ)."""
    first = [
        helper.make_node("MatMul", ["x", "val_1"], ["g"]),
        helper.make_node("Gemm", ["x", "a.weight"], ["k"], transB=1),
        helper.make_node("Add", ["g", "k"], ["h"]),
    ]
    return _after(tensors, first, {"val_1": tensors["a.weight"].T, "a.weight": tensors["a.weight"]})


def packed(tensors: Mapping[str, Tensor]) -> Any:
    """Compute a, c and d (2 outputs) in one product; h = a + c + d·1."""
    whole = torch.cat([tensors[f"{name}.weight"].T for name in "acd"], dim=1)
    return _after(tensors, [helper.make_node("MatMul", ["x", "packed"], ["acd"]), *_parted()], {"packed": whole})


def packed_as_stored(tensors: Mapping[str, Tensor]) -> Any:
    whole = torch.cat([tensors[f"{name}.weight"] for name in "acd"], dim=0)
    first = helper.make_node("Gemm", ["x", "packed"], ["acd"], transB=1)
    return _after(tensors, [first, *_parted()], {"packed": whole})


def _parted() -> list[Any]:
    return [
        helper.make_node("Split", ["acd", "sizes"], ["ha", "hc", "hd"], axis=-1),
        helper.make_node("ReduceSum", ["hd", "axis"], ["sum"]),
        helper.make_node("Add", ["ha", "hc"], ["ac"]),
        helper.make_node("Add", ["ac", "sum"], ["h"]),
    ]


def _with_sizes(draw: Draw) -> Draw:
    def whole(tensors: Mapping[str, Tensor]) -> Any:
        model = draw(tensors)
        for name, values in {"sizes": [6, 6, 2], "axis": [-1]}.items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(torch.tensor(values).numpy(), name))
        return model

    return whole


def wide(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights with two more matrices that read x."""
    generator = torch.Generator().manual_seed(seed + 1)
    more = {"c.weight": (6, 8), "d.weight": (2, 8)}
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in more.items()}
    return {**weights(seed, dtype), **found}


def exported(
    folder: Path,
    draw: Draw,
    adapters: Mapping[str, Adapter],
    tensors: Mapping[str, Tensor] | None = None,
    targets: Sequence[str] = (),
    **options: Any,
) -> Exported:
    found = checkpoint(folder / "m", tensors)
    plan = planned(found, HandMaker(draw_one=draw), **options)
    return execute_multi_lora(plan_multi_lora(plan, named(found, adapters), targets), folder / "out")


def named(found: Any, adapters: Mapping[str, Adapter]) -> list[NamedAdapter]:
    return [NamedAdapter(name=name, binding=bind([adapter], found)) for name, adapter in adapters.items()]


def lora(**shapes: tuple[int, int, int]) -> Adapter:
    """An adapter of (out, in, rank) by module."""
    return adapter_of(
        *(module_update(f"{name}.weight", low_rank(out, in_, rank)) for name, (out, in_, rank) in shapes.items())
    )


def run(found: Exported, x: Tensor, adapter: str | None = None) -> Tensor:
    session = onnxruntime.InferenceSession(str(found.graphs["model"]), _options(), providers=["CPUExecutionProvider"])
    chosen = onnxruntime.RunOptions()
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(found.root / f"{adapter}.onnx_adapter"))
        chosen.add_active_adapter(loaded)
    return torch.from_numpy(session.run(["y"], {"x": x.numpy()}, chosen)[0])


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def adapted(tensors: Mapping[str, Tensor], adapter: Adapter | None) -> dict[str, Tensor]:
    """Weights with the adapter's product added, in float64."""
    found = {name: tensor.double() for name, tensor in tensors.items()}
    for entry in adapter.updates if adapter is not None else ():
        assert isinstance(entry.update, LowRank)
        delta = entry.update.delta()
        found[entry.target] += delta if delta.shape == found[entry.target].shape else delta.T
    return found


def y_of(w: Mapping[str, Tensor], x: Tensor, h: Tensor | None = None) -> Tensor:
    first = x.double() @ w["a.weight"].T if h is None else h
    return (first * w["norm.weight"]) @ w["b.weight"].T


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float((found.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


# --------------------------------------------------------------------------------------------------- forms of products


@pytest.mark.parametrize("draw", [plain, stored, transposed, fused, twice], ids=lambda draw: draw.__name__)
def test_every_form_of_a_product_is_adapted(tmp_path: Path, draw: Draw) -> None:
    adapters = {"one": lora(a=(6, 8, 3)), "two": lora(a=(6, 8, 1), b=(8, 6, 4))}
    found, x = exported(tmp_path, draw, adapters), torch.randn(5, 8)
    n_uses = 2 if draw is twice else 1
    for name, adapter in {None: None, **adapters}.items():
        w = adapted(weights(), adapter)
        expected = y_of(w, x, n_uses * (x.double() @ w["a.weight"].T))
        assert_same(run(found, x, name), expected)
    base = execute_export(planned(checkpoint(tmp_path / "b"), HandMaker(draw_one=draw)), tmp_path / "base")
    assert torch.equal(run(found, x), run(base, x)), "without an adapter not one bit is another"


def test_a_matrix_that_is_stored_the_other_way_round_is_adapted_too(tmp_path: Path) -> None:
    """As Conv1D stores it, (in, out): the scale goes to B there as well."""

    def conv1d(tensors: Mapping[str, Tensor]) -> Any:
        first = [helper.make_node("MatMul", ["x", "a.weight"], ["h"])]
        return _after(tensors, first, {"a.weight": tensors["a.weight"]})

    tensors = weights()
    tensors["a.weight"] = tensors["a.weight"].T.contiguous()
    adapter = lora(a=(6, 8, 3))
    found, x = exported(tmp_path, conv1d, {"one": adapter}, tensors), torch.randn(5, 8)
    w = adapted(tensors, adapter)
    assert_same(run(found, x, "one"), y_of(w, x, x.double() @ w["a.weight"]))
    update = adapter.updates[0].update
    assert isinstance(update, LowRank)
    parameters = onnxruntime.AdapterFormat.read_adapter(str(found.root / "one.onnx_adapter")).get_parameters()
    down, up = (torch.from_numpy(parameters[f"a.lora_{side}.weight"].numpy().copy()) for side in "AB")
    assert torch.equal(down, update.down.T)
    assert torch.equal(up, 0.5 * update.up.T)
    assert not found.record.multi_lora.inputs["a.weight"].is_turned  # type: ignore[union-attr]


@pytest.mark.parametrize("draw", [packed, packed_as_stored], ids=lambda draw: draw.__name__)
def test_parts_of_a_packed_matrix_are_adapted_each_by_itself(tmp_path: Path, draw: Draw) -> None:
    adapters = {
        "all": lora(a=(6, 8, 3), c=(6, 8, 2), d=(2, 8, 1)),
        "last": lora(d=(2, 8, 2)),
        "middle": lora(c=(6, 8, 5)),
    }
    found, x = exported(tmp_path, _with_sizes(draw), adapters, wide()), torch.randn(5, 8)
    for name, adapter in {None: None, **adapters}.items():
        w = adapted(wide(), adapter)
        a, c, d = (x.double() @ w[f"{part}.weight"].T for part in "acd")
        assert_same(run(found, x, name), y_of(w, x, a + c + d.sum(dim=1, keepdim=True)))


def test_a_part_without_inputs_gets_zeros(tmp_path: Path) -> None:
    adapter = lora(c=(6, 8, 2))
    found, x = exported(tmp_path, _with_sizes(packed), {"c": adapter}, wide()), torch.randn(5, 8)
    w = adapted(wide(), adapter)
    a, c, d = (x.double() @ w[f"{part}.weight"].T for part in "acd")
    assert_same(run(found, x, "c"), y_of(w, x, a + c + d.sum(dim=1, keepdim=True)))
    assert set(found.record.multi_lora.inputs) == {"c.weight"}  # type: ignore[union-attr]


def test_several_updates_of_one_matrix_are_one_of_the_sum_of_their_ranks(tmp_path: Path) -> None:
    """Two of a whole matrix, one more of its rows 2 to 4."""
    one, two, rows = low_rank(6, 8, 3, 0.5), low_rank(6, 8, 1, 4.0), low_rank(2, 8, 2, 0.25)
    base = checkpoint(tmp_path / "m")
    [bound] = named(base, {"x": adapter_of(module_update("a.weight", one))})
    [entry] = bound.binding.updates["a.weight"]
    assert entry.region is not None
    region = replace(entry.region, offset=2 * 8, n_rows=2)
    entries = (entry, replace(entry, update=two), replace(entry, update=rows, region=region))
    bound = replace(bound, binding=replace(bound.binding, updates={"a.weight": entries}))
    found = execute_multi_lora(plan_multi_lora(planned(base), [bound], ()), tmp_path / "out")
    x, w = torch.randn(5, 8), adapted(weights(), None)
    w["a.weight"] += one.delta() + two.delta()
    w["a.weight"][2:4] += rows.delta()
    assert_same(run(found, x, "x"), y_of(w, x))
    [factors] = found.record.multi_lora.adapters["x"].factors.values()  # type: ignore[union-attr]
    assert (factors.rank, factors.scales) == (6, (0.5, 4.0, 0.25))


def test_the_scale_is_folded_in_float64_and_rounded_once(tmp_path: Path) -> None:
    """In float16: 1/3 of 1.0009765625 rounded once is 0.33374; the scale rounded first would give 0.33350."""
    up, down = torch.full((6, 1), 1.0009765625), torch.ones(1, 8)
    scale = Scale(factor=Fraction(1, 3), source="test")
    adapter = adapter_of(module_update("a.weight", LowRank(down=down, up=up, scale=scale)))
    found = exported(tmp_path, plain, {"x": adapter}, weights(dtype=torch.float16))
    parameters = onnxruntime.AdapterFormat.read_adapter(str(found.root / "x.onnx_adapter")).get_parameters()
    b = torch.from_numpy(parameters["a.lora_B.weight"].numpy().copy())
    once = (torch.tensor(1.0009765625, dtype=torch.float64) / 3).to(torch.float16)
    first = torch.tensor(1 / 3, dtype=torch.float16) * torch.tensor(1.0009765625, dtype=torch.float16)
    assert once != first
    assert torch.equal(b, torch.full((1, 6), once.item(), dtype=torch.float16))
    x = torch.randn(5, 8).half()
    assert_same(run(found, x, "x"), y_of(adapted(weights(dtype=torch.float16), adapter), x), tolerance=5e-3)


def test_a_factor_that_the_format_cannot_hold_is_named(tmp_path: Path) -> None:
    huge = replace(low_rank(6, 8, 2), up=torch.full((6, 2), 1e6))
    adapter = adapter_of(module_update("a.weight", huge))
    with pytest.raises(ExportError, match=r"a\.weight: its factors, times the scale, exceed float16"):
        exported(tmp_path, plain, {"x": adapter}, weights(dtype=torch.float16))
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------- what is refused


def refused(
    folder: Path, draw: Draw, adapter: Adapter, tensors: Mapping[str, Tensor] | None = None
) -> list[tuple[str, str]]:
    with pytest.raises(IncompatibleAdapterError) as caught:
        exported(folder, draw, {"x": adapter}, tensors)
    assert not (folder / "out").exists()
    assert caught.value.exit_code == 4
    assert all(f"{found.target}: {found.message}" in caught.value.message for found in caught.value.findings)
    return [(found.code, found.target) for found in caught.value.findings]


@pytest.mark.parametrize(
    ("draw", "why"), [(gathered, "Gather reads it"), (scaled, "FusedMatMul reads it with alpha 2.0")]
)
def test_a_matrix_that_is_used_otherwise_is_refused_by_name(tmp_path: Path, draw: Draw, why: str) -> None:
    with pytest.raises(IncompatibleAdapterError, match=f"no-product  a.weight: model.onnx: {why}"):
        exported(tmp_path, draw, {"x": lora(a=(6, 8, 2))})
    rest = exported(tmp_path / "rest", draw, {"x": lora(b=(8, 6, 2))})
    assert set(rest.record.multi_lora.inputs) == {"b.weight"}  # type: ignore[union-attr]


def test_a_matrix_on_the_left_is_no_product_with_it(tmp_path: Path) -> None:
    def left(tensors: Mapping[str, Tensor]) -> Any:
        first = [
            helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0]),
            helper.make_node("MatMul", ["a.weight", "xt"], ["ht"]),
            helper.make_node("Transpose", ["ht"], ["h"], perm=[1, 0]),
        ]
        return _after(tensors, first, {"a.weight": tensors["a.weight"]})

    assert refused(tmp_path, left, lora(a=(6, 8, 2))) == [("no-product", "a.weight")]


def test_a_tensor_that_no_graph_reads_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, plain, lora(c=(6, 8, 2)), wide()) == [("no-product", "c.weight")]


def test_everything_that_is_no_low_rank_update_of_a_matrix_is_listed(tmp_path: Path) -> None:
    tensors = {**weights(), "conv.weight": torch.randn(4, 3, 2, 2)}
    adapter = adapter_of(
        module_update("a.weight", low_rank(6, 8)),
        module_update("b.weight", Replacement(values=torch.randn(8, 6)), Orientation.STORED),
        module_update("norm.weight", Replacement(values=torch.randn(6)), Orientation.STORED),
        module_update("conv.weight", low_rank(4, 12)),
    )
    assert refused(tmp_path, plain, adapter, tensors) == [
        ("kind-replacement", "b.weight"),
        ("no-matrix", "conv.weight"),
        ("kind-replacement", "norm.weight"),
    ]


def test_options_that_contradict_are_said(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "m")
    one = named(base, {"x": lora(a=(6, 8, 2))})
    with pytest.raises(RecipeError, match="several adapters are called x"):
        plan_multi_lora(planned(base), [*one, *one], ())
    with pytest.raises(RecipeError, match="nothing says which matrices"):
        plan_multi_lora(planned(base), [], ())
    with pytest.raises(RecipeError, match="--weights shared"):
        plan_multi_lora(planned(base, storage="shared"), one, ())
    with pytest.raises(RecipeError, match=r"--targets norm\*: matches no matrix"):
        exported(tmp_path, plain, {}, targets=["norm*"])


# ------------------------------------------------------------------------------------------------- folders and records


@pytest.mark.parametrize(
    ("targets", "expected"),
    [(["all-linear"], {"a.weight", "b.weight"}), (["b"], {"b.weight"}), (["a.w*"], {"a.weight"})],
)
def test_targets_give_inputs_to_adapters_that_come_later(
    tmp_path: Path, targets: list[str], expected: set[str]
) -> None:
    found = exported(tmp_path, plain, {}, targets=targets)
    assert set(found.record.multi_lora.inputs) == expected  # type: ignore[union-attr]
    x = torch.randn(5, 8)
    assert_same(run(found, x), y_of(adapted(weights(), None), x))


def test_every_graph_has_every_input_so_that_one_file_serves_all(tmp_path: Path) -> None:
    """Onnxruntime refuses a parameter that a graph does not take."""

    def one_of_two(tensors: Mapping[str, Tensor]) -> Any:
        node = helper.make_node("MatMul", ["x", "square"], ["y"])
        return model_of({"square": tensors["square.weight"].T}, [node], tensors["a.weight"].dtype)

    class Two(HandMaker):
        def draw(self, task: Any) -> Any:
            yield from HandMaker(draw_one=plain, components=("encoder",)).draw(task)
            yield from HandMaker(draw_one=one_of_two, components=("model",)).draw(task)

    tensors = {**weights(), "square.weight": torch.randn(8, 8)}
    base = checkpoint(tmp_path / "m", tensors)
    adapters = named(base, {"x": lora(a=(6, 8, 2), square=(8, 8, 3))})
    found = execute_multi_lora(plan_multi_lora(planned(base, Two()), adapters, ()), tmp_path / "out")
    x, w = torch.randn(5, 8), adapted(tensors, adapters[0].binding.adapters[0])
    assert_same(run(found, x, "x"), x.double() @ w["square.weight"].T)
    encoder = replace(
        found, record=found.record.model_copy(update={"graphs": {"model": found.record.graphs["encoder"]}})
    )
    assert_same(run(encoder, x, "x"), y_of(w, x))


def test_files_are_the_same_each_time_and_the_table_knows_every_initializer(tmp_path: Path) -> None:
    adapter = lora(a=(6, 8, 2), b=(8, 6, 1))
    first = exported(tmp_path / "1", plain, {"x": adapter})
    second = exported(tmp_path / "2", plain, {"x": adapter})
    assert digests(first.root) == digests(second.root)
    assert {str(file.path) for file in first.record.artifacts} == set(digests(first.root)) - {"export.json"}
    graph = onnx.load(first.graphs["model"], load_external_data=False).graph
    table = BindingTable.model_validate_json((first.root / "binding_table.json").read_text())
    [component] = table.components.values()
    assert {tensor.name for tensor in graph.initializer} == component.slots.keys() | component.constants.keys()
    ports = read_ports(first.root / "x.onnx_adapter")
    assert ports == {
        "a.lora_A.weight": ("tensor(float)", (8, 2)),
        "a.lora_B.weight": ("tensor(float)", (2, 6)),
        "b.lora_A.weight": ("tensor(float)", (6, 1)),
        "b.lora_B.weight": ("tensor(float)", (1, 8)),
    }
    onnx.checker.check_model(str(first.graphs["model"]))


def test_other_factors_under_the_same_name_are_another_export(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "m")
    for rank, is_done in ((2, False), (2, True)):
        adapters = named(base, {"x": lora(a=(6, 8, rank))})
        found = execute_multi_lora(plan_multi_lora(planned(base), adapters, ()), tmp_path / "out")
        assert found.was_done is is_done
    before = digests(tmp_path / "out")
    other = plan_multi_lora(planned(base), named(base, {"x": lora(a=(6, 8, 3))}), ())
    with pytest.raises(OutputExistsError, match="holds another export"):
        execute_multi_lora(other, tmp_path / "out")
    assert digests(tmp_path / "out") == before
    (tmp_path / "out" / "x.onnx_adapter").write_bytes(b"changed")
    with pytest.raises(OutputExistsError, match=r"x\.onnx_adapter was changed or lost"):
        execute_multi_lora(plan_multi_lora(planned(base), adapters, ()), tmp_path / "out")


def test_only_folders_with_inputs_for_adapters_take_any(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "m")
    execute_export(planned(base), tmp_path / "plain")
    with pytest.raises(InputError, match="have no inputs for adapters"):
        add_adapters(tmp_path / "plain", named(base, {"x": lora(a=(6, 8, 2))}), ())
    with pytest.raises(InputError, match="no such folder"):
        add_adapters(tmp_path / "nothing", [], ())
