"""Graphs are made once, whole, from two sets of weights; what the weights cannot explain is refused."""

from __future__ import annotations

import fcntl
import importlib
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from lora_deploy.artifact import cache_root
from lora_deploy.errors import ExportError, Finding, Severity
from lora_deploy.export.binding_table import Taken
from lora_deploy.export.blueprint import write_synthetic
from lora_deploy.export.canonical import load_graph
from lora_deploy.export.graphs import graph_of, is_cached
from tests.unit.export.hand_made import HandMaker, checkpoint, model_of, plain, planned, weights


class CountingMaker(HandMaker):
    """Counts how often it is asked."""

    n_drawn = 0

    def draw(self, task: Any) -> Any:
        type(self).n_drawn += 1
        return super().draw(task)


def test_the_table_says_where_every_initializer_comes_from(tmp_path: Path) -> None:
    plan = planned(checkpoint(tmp_path / "m"))
    table = graph_of(plan.blueprint, plan.maker).table
    component = table.components["model"]
    origins = {name: table.slots[position].origin for name, position in component.slots.items()}
    assert origins == {
        "val_1": Taken(tensor="a.weight", permutation=(1, 0), shape=(8, 6)),
        "norm.weight": Taken(tensor="norm.weight", shape=(6,)),
        "val_2": Taken(tensor="b.weight", permutation=(1, 0), shape=(6, 8)),
    }
    assert set(component.constants) == {"one"}
    assert table.unused == ()


def test_a_graph_is_made_once_for_a_base_and_all_that_is_merged_into_it(tmp_path: Path) -> None:
    CountingMaker.n_drawn = 0
    for seed in range(3):
        plan = planned(checkpoint(tmp_path / f"m{seed}", weights(seed), _name_or_path=f"run {seed}"), CountingMaker())
        assert is_cached(plan.blueprint) == (seed > 0)
        assert graph_of(plan.blueprint, plan.maker).was_cached == (seed > 0)
    assert CountingMaker.n_drawn == 1


def _wider(seed: int) -> dict[str, Tensor]:
    return weights(seed) | {"extra.weight": torch.randn(3, 3)}


@pytest.mark.parametrize(
    ("tensors", "config", "options"),
    [
        (_wider(0), {}, {}),
        (weights(), {"tie_word_embeddings": False}, {}),
        (weights(dtype=torch.float16), {}, {}),
        (weights(), {}, {"provider": "cuda"}),
        (weights(), {}, {"dtype": "float16"}),
        (weights() | {"ids": torch.arange(4)}, {}, {}),
    ],
    ids=["a tensor more", "another configuration", "another dtype", "another provider", "wanted dtype", "integers"],
)
def test_what_changes_the_graph_gives_another(
    tmp_path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    one, other = planned(checkpoint(tmp_path / "a")), planned(checkpoint(tmp_path / "b", tensors, **config), **options)
    assert one.blueprint.digest != other.blueprint.digest


def test_integers_are_part_of_the_blueprint_by_value(tmp_path: Path) -> None:
    plans = [planned(checkpoint(tmp_path / str(n), weights() | {"ids": torch.arange(n, n + 4)})) for n in (0, 0 + 1)]
    assert plans[0].blueprint.digest != plans[1].blueprint.digest


def test_the_dtype_that_a_configuration_names_does_not_matter_but_the_one_that_is_asked_for(tmp_path: Path) -> None:
    one = planned(checkpoint(tmp_path / "a", dtype="bfloat16"))
    other = planned(checkpoint(tmp_path / "b", torch_dtype="float16"))
    assert one.blueprint.digest == other.blueprint.digest


def test_synthetic_weights_differ_everywhere_and_ties_stay_ties(tmp_path: Path) -> None:
    tied = weights() | {"embed_tokens.weight": torch.randn(5, 4)}
    tied["lm_head.weight"] = tied["embed_tokens.weight"].clone()
    blueprint = planned(checkpoint(tmp_path / "m", tied, tie_word_embeddings=True)).blueprint
    assert blueprint.equal == (("embed_tokens.weight", "lm_head.weight"),)
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        write_synthetic(blueprint, folder, seed)
    from safetensors.torch import load_file

    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert torch.equal(first["embed_tokens.weight"], first["lm_head.weight"])
    for name in tied:
        assert not (first[name] == second[name]).any(), name
        assert not torch.equal(first[name], tied[name])


def _scaled(tensors: Mapping[str, Tensor]) -> Any:
    return plain(tensors, val_2=tensors["b.weight"].T * 2)


def _summed(tensors: Mapping[str, Tensor]) -> Any:
    return plain(tensors, one=tensors["norm.weight"].sum())


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (_scaled, r"model: 1 initializers depend on the weights .*: val_2 float32\[6, 8\]"),
        (_summed, r"model: 1 initializers depend on the weights .*: one float32\[\]"),
    ],
)
def test_an_initializer_that_no_tensor_explains_is_refused_by_name(tmp_path: Path, draw: Any, named: str) -> None:
    plan = planned(checkpoint(tmp_path / "m"), HandMaker(draw))
    with pytest.raises(ExportError, match=named) as caught:
        graph_of(plan.blueprint, plan.maker)
    assert caught.value.code == "unexplained-initializer"
    assert not is_cached(plan.blueprint)
    assert list((cache_root() / "graphs").iterdir()) == []


def test_an_initializer_that_fits_one_set_of_weights_by_chance_is_refused(tmp_path: Path) -> None:
    drawn: list[Tensor] = []

    def draw(tensors: Mapping[str, Tensor]) -> Any:
        drawn.append(tensors["b.weight"])
        return plain(tensors, val_2=tensors["b.weight"].T if len(drawn) == 1 else tensors["b.weight"].T + 1)

    plan = planned(checkpoint(tmp_path / "m"), HandMaker(draw))
    with pytest.raises(ExportError, match="val_2"):
        graph_of(plan.blueprint, plan.maker)


def test_a_graph_whose_structure_the_weights_decide_is_refused(tmp_path: Path) -> None:
    seen: list[float] = []

    def draw(tensors: Mapping[str, Tensor]) -> Any:
        model = plain(tensors)
        seen.append(float(tensors["a.weight"][0, 0]))
        if seen[-1] != seen[0]:
            model.graph.node[2].op_type = "Add"
        return model

    plan = planned(checkpoint(tmp_path / "m"), HandMaker(draw))
    with pytest.raises(ExportError, match="depends on the weights' values"):
        graph_of(plan.blueprint, plan.maker)


def test_a_large_constant_is_kept_beside_the_graph(tmp_path: Path) -> None:
    table = torch.arange(40_000, dtype=torch.float32)

    def draw(tensors: Mapping[str, Tensor]) -> Any:
        model = plain(tensors)
        more = model_of({"table": table}, [], torch.float32)
        model.graph.initializer.extend(more.graph.initializer)
        model.graph.node.append(helper.make_node("Identity", ["table"], ["unused"]))
        return model

    plan = planned(checkpoint(tmp_path / "m"), HandMaker(draw))
    graphs = graph_of(plan.blueprint, plan.maker)
    assert (graphs.folder / "constants.bin").read_bytes() == table.numpy().tobytes()
    assert (graphs.folder / "model.onnx").stat().st_size < 10_000


def test_constants_are_in_the_graph_wherever_a_maker_kept_them(tmp_path: Path) -> None:
    constant = torch.arange(512, dtype=torch.float32).reshape(64, 8)

    class FileMaker(HandMaker):
        """Writes graph and weights to files and loads them, as a maker that is a program of its own must."""

        def draw(self, task: Any) -> Any:
            for drawing in super().draw(task):
                path = tmp_path / f"drawn-{drawing.seed}.onnx"
                onnx_ir.save(drawing.model, path, external_data="model.onnx.data", size_threshold_bytes=0)
                yield replace(drawing, model=onnx_ir.load(path))

    plan = planned(checkpoint(tmp_path / "m"), FileMaker(lambda tensors: plain(tensors, table=constant)))
    graphs = graph_of(plan.blueprint, plan.maker)
    stored = {tensor.name: tensor for tensor in load_graph(graphs.folder / "model.onnx").graph.initializer}
    assert {name for name, tensor in stored.items() if tensor.external_data} == set(
        graphs.table.components["model"].slots
    )
    assert numpy_helper.to_array(stored["table"]).tobytes() == constant.numpy().tobytes()


class Heard:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.has_waited = threading.Event()

    def start(self, label: str, n_bytes: int, unit: str = "") -> None:
        self.labels.append(label)
        if label.startswith("waiting"):
            self.has_waited.set()

    def advance(self, n_bytes: int) -> None:
        pass

    def finish(self) -> None:
        pass


def test_of_two_that_want_the_same_graph_the_second_waits_for_the_first(tmp_path: Path) -> None:
    plan, heard = planned(checkpoint(tmp_path / "m")), Heard()
    n_drawn = []

    def draw(tensors: Mapping[str, Tensor]) -> Any:
        n_drawn.append(1)
        assert heard.has_waited.wait(timeout=30)
        return plain(tensors)

    maker, results = HandMaker(draw), []
    threads = [
        threading.Thread(target=lambda: results.append(graph_of(plan.blueprint, maker, heard))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(graphs.was_cached for graphs in results) == [False, True]
    assert results[0].table == results[1].table
    assert len(n_drawn) == 2  # the two drawings of one making
    assert heard.labels.count("waiting for another process that makes this graph") == 1
    assert [path.name for path in (cache_root() / "graphs").iterdir()] == [plan.blueprint.digest]


def test_who_waited_for_a_making_that_failed_makes_it(tmp_path: Path) -> None:
    plan, heard = planned(checkpoint(tmp_path / "m")), Heard()
    begun, outcomes = threading.Event(), []

    def draw(tensors: Mapping[str, Tensor]) -> Any:
        if not begun.is_set():
            begun.set()
            assert heard.has_waited.wait(timeout=30)
            raise ExportError("no")
        return plain(tensors)

    def make() -> None:
        try:
            outcomes.append(graph_of(plan.blueprint, HandMaker(draw), heard).was_cached)
        except ExportError as error:
            outcomes.append(error.message)

    threads = [threading.Thread(target=make) for _ in range(2)]
    threads[0].start()
    assert begun.wait(timeout=30)
    threads[1].start()
    for thread in threads:
        thread.join(timeout=60)
    assert outcomes == ["no", False]


@pytest.mark.parametrize(
    ("room", "code"), [({"free_disk_bytes": lambda _: 100}, "disk-space"), ({"available_bytes": lambda: 100}, "memory")]
)
def test_too_little_room_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: dict[str, Any], code: str
) -> None:
    CountingMaker.n_drawn = 0
    for name, function in room.items():
        monkeypatch.setattr(importlib.import_module("lora_deploy.export.room"), name, function)
    plan = planned(checkpoint(tmp_path / "m"), CountingMaker())
    with pytest.raises(ExportError, match=r"making the graph needs .* bytes of (disk|memory)") as caught:
        graph_of(plan.blueprint, plan.maker)
    assert (caught.value.code, CountingMaker.n_drawn) == (code, 0)
    assert list((cache_root() / "graphs").iterdir()) == []


def test_what_a_killed_process_left_in_the_cache_is_removed_and_what_one_works_on_stays(tmp_path: Path) -> None:
    folder = cache_root() / "graphs"
    for name in (".making-dead", ".making-alive"):
        (folder / name / "first").mkdir(parents=True)
        (folder / name / "lock").touch()
    with (folder / ".making-alive" / "lock").open("r+") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        plan = planned(checkpoint(tmp_path / "m"))
        graph_of(plan.blueprint, plan.maker)
    assert sorted(path.name for path in folder.iterdir()) == [".making-alive", plan.blueprint.digest]


@pytest.mark.parametrize("name", ["graph.json", "binding_table.json", "model.onnx"])
def test_a_broken_entry_of_the_cache_is_made_again(tmp_path: Path, name: str) -> None:
    plan = planned(checkpoint(tmp_path / "m"))
    folder = graph_of(plan.blueprint, plan.maker).folder
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    assert not graph_of(plan.blueprint, plan.maker).was_cached
    assert (folder / name).read_bytes() == whole
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_a_maker_noticed_is_remembered_with_the_graph(tmp_path: Path) -> None:
    finding = Finding(code="unfused", severity=Severity.WARN, target="model", message="slower")
    plan = planned(checkpoint(tmp_path / "m"), HandMaker(findings=(finding,)))
    assert set(graph_of(plan.blueprint, plan.maker).findings) == {finding}
    again = graph_of(plan.blueprint, plan.maker)
    assert again.was_cached
    assert set(again.findings) == {finding}
