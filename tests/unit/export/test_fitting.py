"""Does an adapter fit a graph? Graphs of ours and of other tools; every misfit at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from lora_deploy.adapter import Adapter, Orientation
from lora_deploy.errors import IncompatibleAdapterError, InputError, MalformedAdapterError
from lora_deploy.export.adapter_file import write_adapter
from lora_deploy.export.fitting import Fit, check_file, check_fit
from lora_deploy.export.switchable import open_switchable
from lora_deploy.pipeline import check_graph_fit
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.replacement import Replacement
from tests.builders import adapter_of, low_rank, module_update, save_peft

Shapes = Mapping[str, tuple[int | str, ...]]
SHAPES: Shapes = {
    "base_model.model.q.lora_A.weight": (8, "r"),
    "base_model.model.q.lora_B.weight": ("r", 6),
    "v.lora_A": (8, 4),
    "v.lora_B": (4, 6),
}
"""As other tools name and fix them: any rank for q, rank 4 for v."""


def graph(folder: Path, shapes: Shapes = SHAPES, *, kind: int = TensorProto.FLOAT, name: str = "model.onnx") -> Path:
    """Write a graph with these inputs, each with a default."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = [helper.make_tensor_value_info(port, kind, sizes) for port, sizes in shapes.items()]
    defaults = [
        helper.make_tensor(
            port, kind, (known := [n if isinstance(n, int) else 0 for n in sizes]), [0.0] * (known[0] * known[1])
        )
        for port, sizes in shapes.items()
    ]
    x = helper.make_tensor_value_info("x", kind, ["batch", 8])
    node = helper.make_node("Identity", ["x"], ["y"])
    y = helper.make_tensor_value_info("y", kind, ["batch", 8])
    model = helper.make_model(
        helper.make_graph([node], "g", [x, *ports], [y], defaults),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, str(folder / name))
    return folder / name


def lora(**shapes: tuple[int, int, int]) -> Adapter:
    return adapter_of(*(module_update(f"{k}.weight", low_rank(*sizes)) for k, sizes in shapes.items()))


def misfits(adapter: Adapter | Path, path: Path) -> dict[str, str]:
    with pytest.raises(IncompatibleAdapterError) as caught:
        _check(adapter, path)
    assert caught.value.exit_code == 4
    return {f"{found.code} {found.target}": found.message for found in caught.value.findings}


def _check(adapter: Adapter | Path, path: Path) -> Fit:
    opened = open_switchable(path)
    return check_file(adapter, opened) if isinstance(adapter, Path) else check_fit(adapter, opened)


def test_an_adapter_of_any_rank_fits_where_the_rank_is_free_and_of_one_where_it_is_fixed(tmp_path: Path) -> None:
    path = graph(tmp_path)
    for rank in (1, 4, 7):
        assert _check(lora(q=(6, 8, rank)), path).ranks == {"q.weight": rank}
    assert _check(lora(q=(6, 8, 2), v=(6, 8, 4)), path) == Fit(
        adapter="adapter (peft)", n_ports=2, ranks={"q.weight": 2, "v.weight": 4}
    )
    found = misfits(lora(v=(6, 8, 5)), path)
    assert found == {"rank-mismatch v.weight": "adapter has rank 5, the graph is made for 4 and no other"}


def test_every_misfit_is_listed_at_once(tmp_path: Path) -> None:
    adapter = adapter_of(
        *lora(v=(6, 8, 3), k=(6, 8, 2), q=(8, 12, 2)).updates,
        module_update("o.weight", Dora(inner=low_rank(6, 8), magnitude=torch.ones(6), axis="rows")),
        module_update("head.weight", Replacement(values=torch.randn(3, 8)), Orientation.STORED),
    )
    found = misfits(adapter, graph(tmp_path))
    assert found == {
        "kind-dora o.weight": "found a dora update, expected plain low-rank factors",
        "kind-replacement head.weight": "found a replacement update, expected plain low-rank factors",
        "no-input k.weight": found["no-input k.weight"],
        "shape-mismatch q.weight": "update is (8, 12), graph takes (6, 8)",
        "rank-mismatch v.weight": "adapter has rank 3, the graph is made for 4 and no other",
    }
    assert found["no-input k.weight"].startswith("the graphs have no inputs for it")


def test_a_peft_folder_is_read_by_its_reader(tmp_path: Path) -> None:
    path = graph(tmp_path / "graph")
    tensors = {
        "base_model.model.q.lora_A.weight": torch.randn(3, 8),
        "base_model.model.q.lora_B.weight": torch.randn(6, 3),
    }
    folder = save_peft(tmp_path / "adapter", tensors, {"r": 3, "target_modules": ["q"]})
    assert check_graph_fit(folder, path) == Fit(adapter=f"{folder} (peft)", n_ports=2, ranks={"q.weight": 3})


# ------------------------------------------------------------------------------------------- files of onnxruntime's own


def file(folder: Path, dtype: torch.dtype = torch.float32, **shapes: tuple[int, int]) -> Path:
    parameters = {f"{name[:-1]}.lora_{name[-1]}": torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    path = folder / "x.onnx_adapter"
    write_adapter(path, parameters)
    return path


def test_a_file_fits_by_name_shape_rank_and_format(tmp_path: Path) -> None:
    path = graph(tmp_path)
    assert _check(file(tmp_path, vA=(8, 4), vB=(4, 6)), path).ranks == {"v.weight": 4}
    assert check_graph_fit(tmp_path / "x.onnx_adapter", path).n_ports == 2
    assert misfits(file(tmp_path, vA=(8, 5), vB=(5, 7)), path) == {
        "shape-mismatch v.lora_A": "file has [8, 5], graph takes [8, 4]: its rank is fixed",
        "shape-mismatch v.lora_B": "file has [5, 7], graph takes [4, 6]: its rank is fixed",
    }
    assert misfits(file(tmp_path, torch.float16, vA=(8, 4), vB=(4, 6)), path) == {
        "dtype-mismatch v.lora_A": "file has tensor(float16), graph takes tensor(float)",
        "dtype-mismatch v.lora_B": "file has tensor(float16), graph takes tensor(float)",
    }


def test_a_file_with_half_a_product_or_unknown_names_does_not_fit(tmp_path: Path) -> None:
    free = graph(tmp_path, {"q.lora_A": (8, "r"), "q.lora_B": ("r", 6)})
    found = misfits(file(tmp_path, qA=(8, 4), kA=(8, 4)), free)
    assert found["no-input k.lora_A"] == "the graphs have no inputs for it; nearest: q.lora_A, q.lora_B"
    assert found["half-missing q.lora_B"] == "the file has only the other factor of this product"
    assert misfits(file(tmp_path, qA=(8, 4), qB=(3, 6)), free) == {
        "rank-mismatch q.weight": "A has rank 4, B has rank 3"
    }


def test_what_is_no_adapter_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx_adapter"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(MalformedAdapterError, match="is no adapter of onnxruntime"):
        check_file(path, open_switchable(graph(tmp_path)))


# -------------------------------------------------------------------------------------------------------------- graphs


def test_a_graph_without_such_inputs_takes_no_adapters(tmp_path: Path) -> None:
    for shapes in ({}, {"q.lora_A": (8, "r")}, {"alpha": (2, 2)}):
        with pytest.raises(InputError, match="takes no adapters"):
            open_switchable(graph(tmp_path, shapes))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no ONNX graph"):
        open_switchable(tmp_path / "empty")
    (tmp_path / "bad.onnx").write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not an ONNX graph"):
        open_switchable(tmp_path / "bad.onnx")


def test_weights_of_an_adapter_that_are_no_inputs_do_not_count(tmp_path: Path) -> None:
    """As onnxruntime-genai's builder writes them with ``adapter_path``: constants, which nothing can exchange."""
    path = graph(tmp_path)
    model = onnx.load(str(path))
    del model.graph.input[1:]
    onnx.save(model, str(path))
    with pytest.raises(InputError, match="takes no adapters"):
        open_switchable(path)


def test_inputs_that_must_be_given_do_not_count(tmp_path: Path) -> None:
    """An adapter replaces defaults; onnxruntime refuses it for an input that has none."""
    path = graph(tmp_path)
    model = onnx.load(str(path))
    del model.graph.initializer[:]
    onnx.save(model, str(path))
    with pytest.raises(InputError, match="takes no adapters"):
        open_switchable(path)


def test_of_several_graphs_only_inputs_that_all_have_count(tmp_path: Path) -> None:
    graph(tmp_path, name="one.onnx")
    graph(tmp_path, {name: shape for name, shape in SHAPES.items() if name.startswith("v")}, name="two.onnx")
    assert set(open_switchable(tmp_path).ports) == {"v.weight"}


def test_only_low_rank_updates_of_a_mixed_adapter_are_looked_up(tmp_path: Path) -> None:
    mixed = replace(
        lora(q=(6, 8, 2)),
        updates=(
            *lora(q=(6, 8, 2)).updates,
            module_update("q.bias", Replacement(values=torch.randn(6)), Orientation.STORED),
        ),
    )
    assert misfits(mixed, graph(tmp_path)) == {
        "kind-replacement q.bias": "found a replacement update, expected plain low-rank factors"
    }
