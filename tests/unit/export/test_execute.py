"""The folder of an export: what is in it, what it says, what stays when something goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from lora_deploy.errors import ExportError, InputError, OutputExistsError
from lora_deploy.export import execute
from lora_deploy.export.execute import default_output, execute_export
from lora_deploy.export.record import read_record
from lora_deploy.export.sources import CheckpointSource
from tests.merging import digests
from tests.unit.export.hand_made import HandMaker, checkpoint, expected, loaded, planned, stored, weights


def _run(graph: Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def test_the_graph_computes_with_the_checkpoints_weights(tmp_path: Path) -> None:
    tensors = weights(seed=4)
    exported = execute_export(planned(checkpoint(tmp_path / "m", tensors)), tmp_path / "out")
    x = torch.randn(3, 8)
    assert torch.allclose(_run(exported.graphs["model"], x), expected(tensors, x), atol=1e-5)


def test_every_file_is_in_the_record_with_its_digest(tmp_path: Path) -> None:
    found = checkpoint(tmp_path / "m")
    (found.root / "tokenizer.json").write_text("{}")
    plan = planned(found, companions={"tokenizer.json": found.root / "tokenizer.json"})
    exported = execute_export(plan, tmp_path / "out")
    on_disk = digests(exported.root)
    assert {str(file.path): file.sha256 for file in exported.record.artifacts} == {
        name: digest for name, digest in on_disk.items() if name != "export.json"
    }
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "binding_table.json"} < set(on_disk)
    assert exported.record == read_record(exported.root)
    assert exported.record.source["merged"][0]["path"] == "model.safetensors"
    assert json.loads((exported.root / "config.json").read_text())["dtype"] == "float32"


def test_the_same_export_gives_the_same_bytes_wherever_the_graph_came_from(tmp_path: Path) -> None:
    found = checkpoint(tmp_path / "m")
    first = execute_export(planned(found), tmp_path / "a")
    second = execute_export(planned(found), tmp_path / "b")
    assert (first.was_cached, second.was_cached) == (False, True)
    assert digests(first.root) == digests(second.root)


def test_weights_begin_where_they_can_be_mapped(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(600, 8), "norm.weight": torch.randn(600), "b.weight": torch.randn(8, 600)}
    exported = execute_export(planned(checkpoint(tmp_path / "m", tensors)), tmp_path / "out")
    table = json.loads((exported.root / "binding_table.json").read_text())
    large = [slot for slot in table["slots"] if slot["n_bytes"] >= 4096]
    assert len(large) == 2
    assert all(slot["offset"] % 4096 == 0 for slot in large)


def test_a_second_component_shares_the_firsts_weights(tmp_path: Path) -> None:
    plan = planned(checkpoint(tmp_path / "m"), HandMaker(components=("prefill", "decode")))
    exported = execute_export(plan, tmp_path / "out")
    assert (exported.root / "decode.onnx.data").stat().st_size == 0
    x = torch.randn(2, 8)
    assert torch.equal(_run(exported.graphs["decode"], x), _run(exported.graphs["prefill"], x))


def test_sixteen_bits_become_float32_without_loss(tmp_path: Path) -> None:
    tensors = weights(dtype=torch.bfloat16)
    exported = execute_export(planned(checkpoint(tmp_path / "m", tensors), dtype="float32"), tmp_path / "out")
    x = torch.randn(2, 8)
    assert torch.allclose(_run(exported.graphs["model"], x), expected(tensors, x), atol=1e-5)


# ------------------------------------------------------------------------------------------------------- other outputs


def test_a_finished_export_is_found_again(tmp_path: Path) -> None:
    plan = planned(checkpoint(tmp_path / "m"))
    execute_export(plan, tmp_path / "out")
    assert execute_export(plan, tmp_path / "out").was_done


def test_a_damaged_export_is_not_taken_for_finished(tmp_path: Path) -> None:
    plan = planned(checkpoint(tmp_path / "m"))
    root = execute_export(plan, tmp_path / "out").root
    (root / "model.onnx.data").write_bytes(b"x")
    with pytest.raises(OutputExistsError, match=r"holds this export, but model\.onnx\.data was changed or lost"):
        execute_export(plan, tmp_path / "out")
    fresh = planned(checkpoint(tmp_path / "m"), fresh=True)
    assert not execute_export(fresh, tmp_path / "out").was_done
    assert execute_export(plan, tmp_path / "out").was_done


def test_another_export_and_another_folder_are_left_alone(tmp_path: Path) -> None:
    execute_export(planned(checkpoint(tmp_path / "a")), tmp_path / "out")
    before = digests(tmp_path / "out")
    other = checkpoint(tmp_path / "b", weights(seed=1))
    with pytest.raises(OutputExistsError, match="holds another export"):
        execute_export(planned(other), tmp_path / "out")
    assert digests(tmp_path / "out") == before
    assert not execute_export(planned(other, fresh=True), tmp_path / "out").was_done
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="no export of ours"):
        execute_export(planned(other, fresh=True), tmp_path / "mine")


def test_what_fails_half_way_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute_export(planned(checkpoint(tmp_path / "a")), tmp_path / "out")
    before = digests(tmp_path / "out")

    def fail(*_: Any) -> None:
        raise ExportError("in the middle")

    monkeypatch.setattr(execute, "_travelling", fail)
    with pytest.raises(ExportError, match="in the middle"):
        execute_export(planned(checkpoint(tmp_path / "b", weights(seed=1)), fresh=True), tmp_path / "out")
    assert digests(tmp_path / "out") == before
    monkeypatch.undo()
    execute_export(planned(checkpoint(tmp_path / "b", weights(seed=1)), fresh=True), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


# ------------------------------------------------------------------------------------------------------ shared weights


def test_shared_graphs_read_the_merged_files_where_the_layout_allows(tmp_path: Path) -> None:
    tensors = weights(seed=2)
    plan = planned(checkpoint(tmp_path / "m", tensors), HandMaker(stored), storage="shared")
    assert default_output(plan) == tmp_path / "m"
    exported = execute_export(plan, tmp_path / "m")
    n_shared = tensors["a.weight"].nbytes + tensors["norm.weight"].nbytes
    assert exported.record.shared_share == n_shared / (n_shared + tensors["b.weight"].nbytes)
    assert (exported.root / "model.onnx.data").stat().st_size == tensors["b.weight"].nbytes
    x = torch.randn(3, 8)
    assert torch.allclose(_run(exported.graphs["model"], x), expected(tensors, x), atol=1e-5)
    assert execute_export(plan, tmp_path / "m").was_done


def test_shared_graphs_lie_beside_the_weights_or_not_at_all(tmp_path: Path) -> None:
    plan = planned(checkpoint(tmp_path / "m"), HandMaker(stored), storage="shared")
    with pytest.raises(ExportError, match="reads shared weights only from the graph's own folder"):
        execute_export(plan, tmp_path / "elsewhere")


# ----------------------------------------------------------------------------------------------------------- refusals


def test_sixteen_bits_that_were_merged_are_not_rounded_again(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"weights are bfloat16 already; as float16 they would be rounded twice") as e:
        planned(checkpoint(tmp_path / "m", weights(dtype=torch.bfloat16)), dtype="float16")
    assert e.value.code == "rounded-twice"
    assert e.value.hint is not None
    assert "--adapter ADAPTER --base BASE --dtype float16" in e.value.hint


def test_a_format_that_the_provider_cannot_run_is_refused(tmp_path: Path) -> None:
    found = checkpoint(tmp_path / "m", weights(dtype=torch.bfloat16))
    with pytest.raises(ExportError, match="cannot run bfloat16 there, only float32 and float16"):
        planned(found)
    assert planned(found, provider="cuda").dtype.long_name == "bfloat16"


def test_float16_on_the_cpu_is_said_to_run_with_casts(tmp_path: Path) -> None:
    plan = planned(checkpoint(tmp_path / "m", weights(dtype=torch.float16)))
    assert [finding.code for finding in plan.findings] == ["float16-casts"]


def test_weights_without_a_configuration_are_refused(tmp_path: Path) -> None:
    found = checkpoint(tmp_path / "m")
    (found.root / "config.json").unlink()
    bare = type(found)(root=found.root, ref=found.ref, config={}, tensors=found.tensors, data_starts=found.data_starts)
    with pytest.raises(ExportError, match=r"has no config\.json"):
        planned(bare)


def test_a_checkpoint_that_lacks_a_tensor_of_the_table_is_refused(tmp_path: Path) -> None:
    plan = planned(checkpoint(tmp_path / "m"))
    source = plan.source
    assert isinstance(source, CheckpointSource)
    source.specs = {name: spec for name, spec in source.specs.items() if name != "b.weight"}
    with pytest.raises(ExportError, match=r"lacks 1 tensors that the graph needs, first b\.weight"):
        execute_export(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_of_someone_else_is_no_record_of_ours(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text('{"schema_version": 1, "components": {}}')
    with pytest.raises(InputError, match="was not written by lora-deploy"):
        read_record(tmp_path)


def test_the_weights_in_the_files_are_the_checkpoints_bytes(tmp_path: Path) -> None:
    tensors = weights(seed=9)
    exported = execute_export(planned(checkpoint(tmp_path / "m", tensors)), tmp_path / "out")
    from onnx import numpy_helper

    values = {t.name: numpy_helper.to_array(t) for t in loaded(exported.graphs["model"]).graph.initializer}
    assert (values["val_1"] == tensors["a.weight"].T.numpy()).all()
    assert (values["norm.weight"] == tensors["norm.weight"].numpy()).all()
