"""Many adapters on one base from the command line; a maker by hand draws the graph, which takes no time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from lora_deploy.export import plan as export_plan
from tests.builders import save_peft
from tests.e2e.commands import document, run
from tests.unit.export.hand_made import HandMaker, checkpoint, weights

SHAPES = {"a": (6, 8), "b": (8, 6)}


def adapter(folder: Path, rank: int, *modules: str, **config: Any) -> Path:
    tensors = {}
    for module in modules:
        out, in_ = SHAPES[module]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, in_)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank)
    return save_peft(folder, tensors, {"r": rank, "lora_alpha": 3, "target_modules": [*modules], **config})


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_plan, "_maker", lambda *_, **__: HandMaker())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base").root


def test_adapters_are_exported_checked_added_and_switched(base: Path, tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "runs" / "1", 2, "a"), adapter(tmp_path / "runs" / "2", 5, "a", "b")
    out = tmp_path / "many"
    command = ["export", "--onnx", "--multi-lora", "--base", base]
    shown = run(*command, "--adapter", one, "--targets", "all-linear", "-o", out)
    assert shown.exit_code == 0, shown.stderr
    assert "inputs  of any rank, matrices: 2" in shown.stdout
    assert "1.onnx_adapter: rank 2, matrices: 1" in shown.stdout
    assert document(*command, "--adapter", one, "--targets", "all-linear", "-o", out)["was_done"]
    fit = document("validate", two, out / "1.onnx_adapter", "--onnx", out)["adapters"]
    assert [entry["ranks"] for entry in fit] == [{"a.weight": 5, "b.weight": 5}, {"a.weight": 2}]
    assert "fits" in run("validate", two, "--onnx", out / "model.onnx").stdout
    added = document(*command, "--adapter", f"second={two}", "--into", out)
    assert set(added["multi_lora"]["adapters"]) == {"1", "second"}
    assert added["multi_lora"]["adapters"]["second"]["factors"]["b.weight"] == {"rank": 5, "scales": [0.6]}
    x = torch.randn(4, 8)
    for name, path, rank in (("1", one, 2), ("second", two, 5)):
        w, factors = weights(), load_file(path / "adapter_model.safetensors")
        for module in SHAPES:
            down = factors.get(f"base_model.model.{module}.lora_A.weight", torch.zeros(1, SHAPES[module][1]))
            up = factors.get(f"base_model.model.{module}.lora_B.weight", torch.zeros(SHAPES[module][0], 1))
            w[f"{module}.weight"] += 3 / rank * up @ down
        expected = ((x @ w["a.weight"].T) * w["norm.weight"]) @ w["b.weight"].T
        assert torch.allclose(_run(out, x, name), expected, rtol=1e-4, atol=1e-4)


def _run(folder: Path, x: torch.Tensor, name: str) -> torch.Tensor:
    options, chosen, loaded = onnxruntime.SessionOptions(), onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    loaded.Load(str(folder / f"{name}.onnx_adapter"))
    chosen.add_active_adapter(loaded)
    return torch.from_numpy(session.run(["y"], {"x": x.numpy()}, chosen)[0])


def test_what_does_not_fit_exits_with_4_and_changes_nothing(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "many"
    command = ["export", "--onnx", "--multi-lora", "--base", base]
    assert run(*command, "--adapter", adapter(tmp_path / "1", 2, "a"), "-o", out).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = adapter(tmp_path / "2", 2, "a", "b")
    for tried in (("validate", other, "--onnx", out), (*command, "--adapter", other, "--into", out)):
        error = document(*tried, exit_code=4)["error"]
        assert [(found["code"], found["target"]) for found in error["findings"]] == [("no-input", "b.weight")]
        assert error["hint"].startswith("export again with --targets all-linear")
    biased = adapter(tmp_path / "3", 2, "a", use_dora=True)
    tensors = load_file(biased / "adapter_model.safetensors")
    tensors["base_model.model.a.lora_magnitude_vector"] = torch.ones(6)
    save_peft(biased, tensors, json.loads((biased / "adapter_config.json").read_text()))
    error = document(*command, "--adapter", biased, "-o", tmp_path / "dora", exit_code=4)["error"]
    assert "error kind-dora  a.weight: found a dora update, expected plain low-rank factors" in error["message"]
    assert not (tmp_path / "dora").exists()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_name_that_another_adapter_has_exits_with_5_unless_it_may_be_replaced(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "many"
    command = ["export", "--onnx", "--multi-lora", "--base", base]
    assert run(*command, "--adapter", f"x={adapter(tmp_path / '1', 2, 'a')}", "-o", out).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = [*command, "--adapter", f"x={adapter(tmp_path / '2', 3, 'a')}", "--into", out]
    error = document(*other, exit_code=5)["error"]
    assert "x.onnx_adapter: another adapter has this name" in error["message"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    replaced = document(*other, "--fresh")["multi_lora"]["adapters"]["x"]
    assert replaced["factors"]["a.weight"]["rank"] == 3
    assert document(*other)["was_done"]


def test_another_base_and_a_folder_without_inputs_exit_with_3(base: Path, tmp_path: Path) -> None:
    one, out = adapter(tmp_path / "1", 2, "a"), tmp_path / "many"
    command = ["export", "--onnx", "--multi-lora", "--adapter", one]
    assert run(*command, "--base", base, "-o", out).exit_code == 0
    other = checkpoint(tmp_path / "other", weights(seed=9)).root
    error = document(*command, "--base", other, "--into", out, exit_code=3)["error"]
    assert error["code"] == "other-base"
    assert run("export", base, "--onnx").exit_code == 0
    assert "takes no adapters" in document("validate", one, "--onnx", base / "onnx", exit_code=3)["error"]["message"]
    error = document(*command, "--base", base, "--into", base / "onnx", exit_code=3)["error"]
    assert "no inputs for adapters" in error["message"]


def test_two_adapters_of_one_name_are_told_apart_by_the_user(base: Path, tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "1" / "best", 2, "a"), adapter(tmp_path / "2" / "best", 2, "a")
    command = ["export", "--onnx", "--multi-lora", "--base", base, "-o", tmp_path / "many"]
    error = document(*command, "--adapter", one, "--adapter", other, exit_code=2)["error"]
    assert error["hint"] == "name them: --adapter NAME=PATH"
    assert run(*command, "--adapter", f"../x={one}").exit_code == 2
    both = ("--adapter", one, "--adapter", f"2={other}")
    found = document(*command, *both, "--weight", "1", "--weight", "0.5")
    adapters = found["multi_lora"]["adapters"]
    assert {name: entry["factors"]["a.weight"]["scales"] for name, entry in adapters.items()} == {
        "best": [1.5],
        "2": [0.75],
    }
    into = [*command[:-2], "--into", tmp_path / "many", "--adapter", f"3={one}", "--adapter", f"3={other}"]
    assert "several adapters are called 3" in document(*into, exit_code=2)["error"]["message"]
    odd = tmp_path / "a=b"
    shutil.copytree(one, odd)
    assert "a=b.onnx_adapter" in run(*command, "--adapter", odd, "--fresh").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--multi-lora"],
        ["--multi-lora", "-o", "x"],
        ["--multi-lora", "-o", "x", "--into", "y"],
        ["base", "--multi-lora", "-o", "x"],
        ["--multi-lora", "--into", "x"],
        ["--multi-lora", "--into", "x", "--adapter", "y", "--layout", "genai"],
        ["--multi-lora", "--into", "x", "--adapter", "y", "--targets", "all-linear"],
        ["base", "--targets", "all-linear"],
        ["base", "--into", "x"],
    ],
    ids=" ".join,
)
def test_contradictory_options_exit_with_2(arguments: list[str]) -> None:
    assert run("export", "--onnx", *arguments).exit_code == 2


def test_a_base_is_not_compared_with_a_graph(base: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "1", 2, "a")
    assert run("validate", one, "--onnx", tmp_path, "--base", base).exit_code == 2


def test_a_dry_run_names_the_files_and_writes_none(base: Path, tmp_path: Path) -> None:
    one, out = adapter(tmp_path / "1", 2, "a"), tmp_path / "many"
    shown = run("export", "--onnx", "--multi-lora", "--base", base, "--adapter", one, "-o", out, "--dry-run")
    assert "1.onnx_adapter  matrices: 1" in shown.stdout
    assert not out.exists()
