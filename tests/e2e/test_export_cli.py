"""``export`` and ``try`` from the command line; where the graph itself does not matter, a maker by hand draws it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from lora_deploy.export import plan as export_plan
from lora_deploy.pipeline import plan_of_export
from tests.e2e.commands import document, run
from tests.peer.models import llama
from tests.peer.trained import Trained, train
from tests.unit.export.hand_made import HandMaker, checkpoint, weights


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_plan, "_maker", lambda *_, **__: HandMaker())


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "merged").root


@pytest.mark.usefixtures("by_hand")
def test_an_export_goes_beside_the_weights_and_is_found_again(merged: Path) -> None:
    shown = run("export", merged, "--onnx")
    assert shown.exit_code == 0, shown.stderr
    assert f"exported to {merged / 'onnx'}" in shown.stdout
    assert "model.onnx; made and kept in the cache" in shown.stdout
    assert (merged / "onnx" / "model.onnx.data").is_file()
    again = document("export", merged, "--onnx")
    assert (again["was_done"], again["was_cached"]) == (True, True)
    assert set(again["graphs"]) == {"model"}
    assert run("export", merged, "--onnx", "-q").stdout == ""


@pytest.mark.usefixtures("by_hand")
def test_a_dry_run_says_what_would_be_and_writes_nothing(merged: Path) -> None:
    found = document("export", merged, "--onnx", "--dry-run")
    assert found["dry_run"]
    assert not found["is_cached"]
    assert found["n_bytes"] == sum(t.nbytes for t in weights().values())
    assert not (merged / "onnx").exists()
    assert "graph    to be made, which takes minutes" in run("export", merged, "--onnx", "--dry-run").stdout


@pytest.mark.usefixtures("by_hand")
def test_a_quantised_export_goes_beside_the_other_and_says_what_became_smaller(merged: Path) -> None:
    shown = run("export", merged, "--onnx", "--quantize", "int4", "--block-size", 16, "--symmetric")
    assert shown.exit_code == 0, shown.stderr
    assert f"exported to {merged / 'onnx-int4'}" in shown.stdout
    assert "2 of 3 weights to int4: " in shown.stdout
    assert "24 bytes stay as they are; the largest is norm.weight" in shown.stdout
    again = document("export", merged, "--onnx", "--quantize", "int4", "--block-size", 16, "--symmetric")
    assert again["was_done"]
    assert again["options"]["quantisation"]["is_symmetric"]
    assert [weight["is_quantised"] for weight in again["quantised"]["weights"]].count(True) == 2
    planned = run("export", merged, "--onnx", "--quantize", "int8", "--dry-run").stdout
    assert "afterwards, int8" in planned
    assert document("export", merged, "--onnx")["output"] == str(merged / "onnx")


@pytest.mark.usefixtures("by_hand")
def test_options_of_quantisation_that_cannot_be_exit_with_6_or_2(merged: Path) -> None:
    error = document("export", merged, "--onnx", "--quantize", "int4", "--block-size", 24, exit_code=6)["error"]
    assert error["message"].startswith("--block-size: found 24, expected a power of two")
    assert run("export", merged, "--onnx", "--quantize", "int3").exit_code == 2


def test_an_export_wants_a_format(merged: Path) -> None:
    assert run("export", merged).exit_code == 2


def test_a_format_that_the_provider_cannot_run_exits_with_6(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", weights(dtype=torch.bfloat16)).root
    error = document("export", folder, "--onnx", exit_code=6)["error"]
    assert error["code"] == "provider-dtype"
    assert "only float32 and float16" in error["message"]
    assert error["hint"] == "--dtype float32, or --provider cuda"


def test_an_architecture_that_nobody_knows_exits_with_6_and_leaves_nothing(merged: Path) -> None:
    error = document("export", merged, "--onnx", exit_code=6)["error"]
    assert error["code"] == "unknown-architecture"
    assert "architectures is ['HandMade']" in error["message"]
    assert not (merged / "onnx").exists()


def test_shared_weights_need_a_merged_checkpoint(trained: Trained, tmp_path: Path) -> None:
    arguments = ["--adapter", trained.adapter, "--base", trained.base, "--weights", "shared", "-o", tmp_path / "o"]
    assert "no merged checkpoint" in document("export", "--onnx", *arguments, exit_code=6)["error"]["message"]


def test_merged_folder_and_adapter_contradict_each_other(trained: Trained, merged: Path) -> None:
    assert run("export", merged, "--onnx", "--adapter", trained.adapter).exit_code == 2
    assert run("export", "--onnx", "--base", trained.base).exit_code == 2


def test_try_wants_an_export(merged: Path) -> None:
    assert "has no export.json" in document("try", merged, "hello", exit_code=3)["error"]["message"]


# ------------------------------------------------------------------------------------ what an adapter does to a graph


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    return train(llama(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["q_proj"]), folder)


@pytest.fixture(scope="module")
def untying(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("untying")
    return train(llama(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["lm_head"]), folder)


def _blueprint(trained: Trained, **options: Any) -> Any:
    return plan_of_export(adapters=trained.adapter, base=trained.base, **options).blueprint


def test_an_adapter_that_unties_the_head_gets_a_graph_of_its_own(trained: Trained, untying: Trained) -> None:
    base = plan_of_export(trained.base).blueprint
    assert _blueprint(trained).digest == base.digest
    apart = _blueprint(untying)
    assert apart.digest != base.digest
    assert apart.config["tie_word_embeddings"] is False
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(apart.specs)
    assert apart.equal == ()


def test_a_head_that_is_stored_beside_the_embedding_it_is_tied_to_is_seen_to_be_equal(
    trained: Trained, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "both"
    shutil.copytree(trained.base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert plan_of_export(folder).blueprint.equal == (("model.embed_tokens.weight", "lm_head.weight"),)
