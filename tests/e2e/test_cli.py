"""The command line from end to end: a tiny Llama, an adapter by PEFT, every command, every way to fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_deploy.artifact import sha256_of
from lora_deploy.cli import main
from tests.builders import save_peft
from tests.peer.models import llama, token_ids
from tests.peer.trained import Trained, assert_rounded_once, forward, reload, tensors_of, train

ADAPTED = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Give a base and an adapter of all its linear layers, whose configuration names the base."""
    folder = tmp_path_factory.mktemp("trained")
    made = train(llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), folder)
    set_config(made.adapter, base_model_name_or_path=str(made.base))
    return made


@pytest.fixture
def merged(trained: Trained, tmp_path: Path) -> Path:
    """Give a finished float32 merge."""
    out = tmp_path / "merged"
    succeed("merge", trained.adapter, "--base", trained.base, "-o", out, "--dtype", "float32")
    return out


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a fresh folder the current one."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def document(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    """Run with ``--json``; stdout must be one document and nothing else."""
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.stderr
    return json.loads(result.stdout)


def error_of(*arguments: object, exit_code: int) -> dict[str, Any]:
    return document(*arguments, exit_code=exit_code)["error"]


def set_config(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def copy_of(folder: Path, to: Path, **values: Any) -> Path:
    shutil.copytree(folder, to)
    if values:
        set_config(to, **values)
    return to


def edit(folder: Path, changes: Mapping[str, Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **changes}, path, {"format": "pt"})


# ------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_shows_every_module_with_its_norms(trained: Trained) -> None:
    lines = succeed("inspect", trained.adapter).splitlines()
    rows = [line.split() for line in lines if line.startswith("model.layers.")]
    assert len(rows) == 14
    assert [line.split() for line in lines if line.startswith("  scale")] == [
        ["scale", "2", "=", "lora_alpha", "8", "/", "r", "4", "(adapter_config.json)"]
    ]
    found = document("inspect", trained.adapter)
    by_name = {module["target"]: module for module in found["modules"]}
    assert {row[0] for row in rows} == set(by_name)
    exact = trained.merged()[ADAPTED] - trained.bare.state_dict()[ADAPTED]
    assert by_name[ADAPTED]["delta_norm"] == pytest.approx(float(exact.norm()), rel=1e-9)
    assert (by_name[ADAPTED]["rank"], by_name[ADAPTED]["scale"], by_name[ADAPTED]["dtype"]) == (4, 2.0, "float32")
    assert found["base"]["name"] == str(trained.base)
    assert found["findings"] == []


def test_inspect_of_an_untrained_adapter_says_so(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.fc.lora_A.weight": torch.ones(2, 3),
        "base_model.model.fc.lora_B.weight": torch.zeros(4, 2),
    }
    assert "untrained" in succeed("inspect", save_peft(tmp_path / "a", tensors, {}))


def test_inspect_in_a_pipe_never_cuts_a_name(tmp_path: Path) -> None:
    module = "base_model.model." + ".".join(["a_rather_long_part_of_a_name"] * 9)
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 3), f"{module}.lora_B.weight": torch.ones(4, 2)}
    output = succeed("inspect", save_peft(tmp_path / "a", tensors, {}))
    assert f"{module.removeprefix('base_model.model.')}.weight " in output


def test_every_real_file_is_inspected_or_refused_in_one_line(corpus: Path) -> None:
    suffixes = {".safetensors", ".bin", ".pt", ".pth", ".npz"}
    files = sorted(path for path in (corpus / "adapters").rglob("*") if path.suffix in suffixes)
    outcomes = {path: run("inspect", path, "--json") for path in files}
    assert {result.exit_code for result in outcomes.values()} == {0, 3}
    for path, result in outcomes.items():
        found = json.loads(result.stdout)
        if result.exit_code:
            assert "\n" not in found["error"]["message"], path
            assert str(path) in found["error"]["message"]
        else:
            low_rank = [module for module in found["modules"] if module["kind"] == "low-rank"]
            others = {module["method"] for module in found["modules"]} | {found["tuner"]}
            assert low_rank or others & {"IA3", "UNILORA", "LoKr"}, path
            assert all(0 <= module["effective_rank"] <= module["rank"] + 1e-9 for module in low_rank), path


# ------------------------------------------------------------------------------------------------------------ validate


def test_validate_says_which_base_this_is(trained: Trained) -> None:
    output = succeed("validate", trained.adapter, "--base", trained.base)
    assert sha256_of(trained.base / "model.safetensors") in output
    assert "fits: 14 updates of 14 tensors" in output
    found = document("validate", trained.adapter, "--base", trained.base)
    assert found["base"]["n_tensors"] == len(found["base"]["shapes"]) == len(tensors_of(trained.base))
    assert set(found["updates"]) == {name for name in tensors_of(trained.base) if "_proj" in name}


def test_validate_finds_the_base_that_the_adapter_names(trained: Trained) -> None:
    assert document("validate", trained.adapter)["base"]["name"] == str(trained.base)


def test_a_base_that_does_not_fit_lists_every_misfit_at_once(trained: Trained, tmp_path: Path) -> None:
    other = tmp_path / "other"
    llama(hidden_size=32, num_hidden_layers=1).save_pretrained(other)
    result = run("validate", trained.adapter, "--base", other)
    assert result.exit_code == 4
    assert result.stdout == ""
    first, *lines = result.stderr.splitlines()
    assert first == f"error: adapter {trained.adapter} (peft) does not fit base {other}: 14 errors, 1 warning"
    assert sum("shape-mismatch" in line for line in lines) == 7
    assert sum("target-missing" in line for line in lines) == 7
    assert "update is (16, 16), base is (32, 32)" in result.stderr
    assert lines[-1] == f"hint: the adapter names base {trained.base}; pass --base {trained.base}"
    error = error_of("merge", trained.adapter, "--base", other, exit_code=4)
    assert len([finding for finding in error["findings"] if finding["severity"] == "error"]) == 14


# --------------------------------------------------------------------------------------------------------------- merge


def test_a_merge_is_what_peft_merges_and_runs_as_trained(trained: Trained, merged: Path) -> None:
    loaded = reload(trained.bare, merged)
    assert_rounded_once({name: t.float() for name, t in loaded.state_dict().items()}, trained.merged())
    found, expected = forward(loaded, token_ids()), trained.output(token_ids())
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (forward(trained.bare, token_ids()) - expected).abs().max() > 0.02 * expected.abs().max()


def test_a_merge_goes_beside_the_user_in_float16_unless_told_otherwise(trained: Trained, here: Path) -> None:
    output = succeed("merge", trained.adapter)
    assert "next: lora-deploy verify adapter-merged" in output
    assert {t.dtype for t in tensors_of(here / "adapter-merged").values()} == {torch.float16}
    assert "14 merged, 0 replaced, 0 added, 7 cast, 0 untouched" in output


def test_the_tables_of_a_merge_agree_with_its_record(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = document("merge", trained.adapter, "-o", out)
    record = json.loads((out / "merge.json").read_text())
    survivals = sorted((tensor["survival"], name) for name, tensor in record["tensors"].items() if tensor["survival"])
    assert [(entry["survival"], entry["tensor"]) for entry in found["worst_survivals"]] == survivals[:5]
    assert found["largest_ratios"][0]["ratio"] == max(
        tensor["delta_norm"] / tensor["weight_norm"] for tensor in record["tensors"].values() if tensor["weight_norm"]
    )
    assert found["n_bytes"] == sum(path.stat().st_size for path in out.iterdir() if path.name != "merge.json")
    assert found["cost"]["seconds"] > 0


def test_the_same_command_again_is_done_at_once(trained: Trained, merged: Path) -> None:
    before = sha256_of(merged / "model.safetensors")
    command = ["merge", trained.adapter, "--base", trained.base, "-o", merged, "--dtype", "float32"]
    assert "was merged before" in succeed(*command)
    assert document(*command)["was_done"] is True
    assert sha256_of(merged / "model.safetensors") == before


def test_another_merge_in_the_way_is_replaced_only_when_asked(trained: Trained, merged: Path) -> None:
    command = ["merge", trained.adapter, "--base", trained.base, "-o", merged, "--dtype", "bfloat16"]
    error = error_of(*command, exit_code=5)
    assert error["code"] == "output-exists"
    assert "--fresh" in error["hint"]
    assert {t.dtype for t in tensors_of(merged).values()} == {torch.float32}
    succeed(*command, "--fresh")
    assert {t.dtype for t in tensors_of(merged).values()} == {torch.bfloat16}


def test_a_dry_run_writes_nothing_and_foretells_the_merge(trained: Trained, here: Path) -> None:
    foretold = document("merge", trained.adapter, "--dry-run")
    assert list(here.iterdir()) == []
    done = document("merge", trained.adapter)
    assert foretold["output"] == done["output"] == "adapter-merged"
    assert foretold["counts"] == done["counts"]
    assert foretold["files"] == {"model.safetensors": (here / "adapter-merged" / "model.safetensors").stat().st_size}
    assert foretold["estimate"]["peak_bytes"] > 0
    assert set(foretold["tensors"]["merged"]) == {name for name in tensors_of(trained.base) if "_proj" in name}


def test_a_dry_run_foretells_what_is_in_the_way(trained: Trained, merged: Path, tmp_path: Path) -> None:
    command = ["merge", trained.adapter, "--base", trained.base, "--dry-run", "-o"]
    assert error_of(*command, merged, "--dtype", "bfloat16", exit_code=5)["code"] == "output-exists"
    assert "holds this merge already" in succeed(*command, merged, "--dtype", "float32")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert error_of(*command, tmp_path / "mine", exit_code=5)["code"] == "output-exists"


def test_a_dry_run_reads_well(trained: Trained) -> None:
    output = succeed("merge", trained.adapter, "--dry-run", "-o", "there")
    assert output.startswith("would write there: 1 file of weights, ")
    assert "merged: 14 tensors\n" in output
    assert "  2  model.layers.*.self_attn.q_proj.weight\n" in output
    assert " free\n" in output


def test_too_little_memory_is_an_error_before_the_first_byte(trained: Trained, here: Path) -> None:
    result = run("merge", trained.adapter, "--memory", "1MB")
    assert result.exit_code == 5
    assert "hint: --memory " in result.stderr
    assert list(here.iterdir()) == []


def test_adapters_add_up_with_their_weights(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pair = [trained.adapter, copy_of(trained.adapter, tmp_path / "second")]
    succeed("merge", *pair, "--weight", "0.25", "--weight", "-1.5", "--dtype", "float32", "-o", out)
    bare, once = trained.bare.state_dict(), trained.merged()
    expected = {name: tensor + (0.25 - 1.5) * (once[name] - tensor) for name, tensor in bare.items()}
    assert_rounded_once(tensors_of(out), expected)


def test_one_weight_for_two_adapters_is_a_usage_error(trained: Trained, tmp_path: Path) -> None:
    second = copy_of(trained.adapter, tmp_path / "second")
    error = error_of("merge", trained.adapter, second, "--weight", "2", "-o", tmp_path / "out", exit_code=2)
    assert "1 weights for 2 adapters" in error["message"]


def test_excluded_tensors_stay_the_bases(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("merge", trained.adapter, "-o", out, "--dtype", "base", "--exclude", "*.mlp.*")
    found, base = tensors_of(out), tensors_of(trained.base)
    unequal = {name for name in base if not torch.equal(base[name], found[name])}
    assert unequal == {name for name in base if "self_attn" in name}


def test_quiet_prints_nothing_and_does_the_work(trained: Trained, tmp_path: Path) -> None:
    result = run("merge", trained.adapter, "-o", tmp_path / "out", "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "out" / "merge.json").is_file()


# ------------------------------------------------------------------------------------------- which base, which adapter


def lone_file(trained: Trained, folder: Path, metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir()
    save_file(load_file(trained.adapter / "adapter_model.safetensors"), folder / "style.safetensors", metadata)
    return folder / "style.safetensors"


def test_a_lone_file_without_alpha_is_refused_and_the_choices_shown(trained: Trained, tmp_path: Path) -> None:
    result = run("inspect", lone_file(trained, tmp_path / "lone"))
    assert result.exit_code == 3
    assert result.stderr.startswith("error: ")
    assert "--alpha" in result.stderr


def test_alpha_from_the_command_line_completes_a_lone_file(trained: Trained, merged: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", lone_file(trained, tmp_path / "lone")
    succeed("merge", file, "--alpha", "8", "--base", trained.base, "-o", out, "--dtype", "float32")
    assert sha256_of(out / "model.safetensors") == sha256_of(merged / "model.safetensors")
    succeed("verify", out)


def test_no_base_named_anywhere_is_an_error_that_says_so(trained: Trained, tmp_path: Path) -> None:
    error = error_of("merge", lone_file(trained, tmp_path / "lone"), "--alpha", "8", exit_code=2)
    assert error == {"code": "no-base", "message": error["message"], "hint": "pass --base"}
    assert "names no base" in error["message"]


def test_adapters_of_different_bases_are_an_error_that_names_both(trained: Trained, tmp_path: Path) -> None:
    other = copy_of(trained.adapter, tmp_path / "other", base_model_name_or_path="somebody/else")
    error = error_of("merge", trained.adapter, other, exit_code=2)
    assert f"adapter names {trained.base}" in error["message"]
    assert "other names somebody/else" in error["message"]
    assert "--base" in error["hint"]


def test_an_adapter_of_a_quantised_base_is_sent_to_the_original(trained: Trained, tmp_path: Path) -> None:
    adapter = copy_of(trained.adapter, tmp_path / "q", base_model_name_or_path="unsloth/llama-3-8b-bnb-4bit")
    error = error_of("merge", adapter, exit_code=3)
    assert error["code"] == "quantised-base"
    assert "--base unsloth/llama-3-8b" in error["hint"]


def test_an_adapter_that_is_not_there_is_one_line(here: Path) -> None:
    result = run("merge", "./nowhere", "--base", "b")
    assert (result.exit_code, result.stderr) == (3, "error: adapter nowhere: no such file or folder\n")


def test_a_hub_id_is_found_in_the_cache(trained: Trained, tmp_path: Path, here: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = Path(os.environ["HF_HOME"]) / "hub"
    for name, folder in (("tiny-base", trained.base), ("tiny-lora", trained.adapter)):
        cached = hub / f"models--someone--{name}"
        shutil.copytree(folder, cached / "snapshots" / commit)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
    set_config(hub / "models--someone--tiny-lora" / "snapshots" / commit, base_model_name_or_path="someone/tiny-base")
    found = document("validate", "someone/tiny-lora")
    assert (found["base"]["name"], found["base"]["revision"]) == ("someone/tiny-base", commit)
    assert document("merge", "someone/tiny-lora")["output"] == "tiny-lora-merged"
    succeed("verify", here / "tiny-lora-merged", "--only", "replay")
    assert error_of("validate", "someone/absent", exit_code=9)["code"] == "hub-unavailable"


# -------------------------------------------------------------------------------------------------------------- verify


def test_a_merge_verifies_from_inside_its_folder_wherever_it_was_made(
    trained: Trained, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(trained.adapter, here / "a")
    shutil.copytree(trained.base, here / "b")
    succeed("merge", "a", "--base", "b")
    monkeypatch.chdir(here / "a-merged")
    assert ": pass\n" in succeed("verify")
    assert json.loads(Path("evidence.json").read_text())["parity"]["verdict"] == "pass"
    found = document("verify", "--only", "replay")
    assert (found["replay"]["verdict"], found["replay"]["counts"], found["replay"]["tensors"]) == (
        "pass",
        {"exact": 21},
        [],
    )


def test_one_wrong_bit_fails_with_exit_7_and_names_the_tensor(merged: Path) -> None:
    tensor = tensors_of(merged)[ADAPTED]
    tensor.view(torch.int32)[3, 5] ^= 1
    edit(merged, {ADAPTED: tensor})
    result = run("verify", merged, "--only", "replay")
    assert result.exit_code == 7
    assert ": fail\n" in result.stdout
    assert ADAPTED in result.stdout
    assert result.stderr.splitlines()[-1].startswith(f"error: {merged}: is not the merge of its base and adapters: 1 ")
    found = document("verify", merged, "--only", "replay", exit_code=7)
    assert found["verdict"] == "fail"
    assert [entry["name"] for entry in found["replay"]["tensors"]] == [ADAPTED]
    assert found["error"]["code"] == "replay"


def test_verify_where_nothing_was_merged_asks_for_a_folder(here: Path) -> None:
    assert error_of("verify", exit_code=2)["hint"] == "name the merged folder"


def test_a_folder_without_record_needs_the_adapter(trained: Trained) -> None:
    assert error_of("verify", trained.base, exit_code=2)["hint"] == "pass --adapter"


def test_a_recorded_adapter_that_changed_is_not_the_one_that_was_merged(trained: Trained, tmp_path: Path) -> None:
    adapter, out = copy_of(trained.adapter, tmp_path / "a"), tmp_path / "out"
    succeed("merge", adapter, "-o", out)
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    error = error_of("verify", out, exit_code=3)
    assert error["code"] == "input-changed"
    assert "not the adapter that was merged" in error["message"]
    assert ": pass\n" in succeed("verify", out, "--adapter", trained.adapter, "--only", "replay")


def test_a_recorded_base_that_moved_is_found_with_an_option(trained: Trained, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(trained.base, base)
    succeed("merge", trained.adapter, "--base", base, "-o", out)
    base.rename(tmp_path / "moved")
    assert run("verify", out).exit_code in {3, 9}
    assert ": pass\n" in succeed("verify", out, "--base", tmp_path / "moved", "--only", "replay")


def test_options_that_contradict_the_record_are_refused(merged: Path) -> None:
    assert "merge.json" in error_of("verify", merged, "--alpha", "3", exit_code=2)["message"]


def test_pefts_own_merge_passes(trained: Trained, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    trained.merged_model().float().save_pretrained(theirs)
    assert ": pass\n" in succeed("verify", theirs, "--adapter", trained.adapter, "--base", trained.base)


def test_a_base_passed_off_as_merged_fails(trained: Trained) -> None:
    found = document("verify", trained.base, "--adapter", trained.adapter, exit_code=7)
    assert found["replay"]["counts"]["not-applied"] == 14


def test_an_update_too_small_to_show_is_inconclusive(trained: Trained, tmp_path: Path) -> None:
    """A delta far below half a unit of bfloat16 leaves the base's bytes, which then prove nothing."""
    theirs = tmp_path / "theirs"
    trained.bare.to(torch.bfloat16).save_pretrained(theirs)
    trained.bare.double()
    arguments = [
        "verify",
        theirs,
        "--adapter",
        trained.adapter,
        "--base",
        theirs,
        "--weight",
        "1e-9",
        "--only",
        "replay",
    ]
    result = run(*arguments)
    assert result.exit_code == 10, result.stderr
    assert ": inconclusive\n" in result.stdout
    found = document(*arguments, exit_code=10)
    assert (found["verdict"], found["error"]["code"]) == ("inconclusive", "inconclusive")


# --------------------------------------------------------------------------------------------------------- the process


def start(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lora_deploy", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def test_the_real_program_merges_and_verifies(trained: Trained, here: Path) -> None:
    process = start("merge", trained.adapter, "--json", cwd=here)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["counts"]["merged"] == 14
    assert "merging" in stderr  # progress, as lines
    assert "\x1b" not in stderr
    process = start("verify", "adapter-merged", "-q", cwd=here)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_ctrl_c_leaves_a_merge_that_the_same_command_resumes(trained: Trained, here: Path) -> None:
    base = {f"model.layers.{k}.mlp.up_proj.weight": torch.randn(64, 64) for k in range(150)}
    factors = {
        f"base_model.model.model.layers.{k}.mlp.up_proj.lora_{side}.weight": torch.randn(shape)
        for k in range(150)
        for side, shape in (("A", (2, 64)), ("B", (64, 2)))
    }
    (here / "base").mkdir()
    save_file(base, here / "base" / "model.safetensors")
    adapter = save_peft(here / "many", factors, {})
    command = ["merge", adapter, "--base", "base", "-o", "out", "--max-shard-size", "20kB"]
    process = start(*command, cwd=here)
    deadline = time.monotonic() + 60
    while not list(here.glob("out.partial/*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "error: interrupted; the same command resumes out"
    assert not (here / "out").exists()
    n_done = len(list(here.glob("out.partial/*.safetensors")))
    assert 0 < n_done < 150
    resumed = start(*command, cwd=here)
    assert resumed.wait(timeout=60) == 0
    resumed.communicate()
    whole = start(*command[:-3], "whole", *command[-2:], cwd=here)
    assert whole.wait(timeout=60) == 0
    whole.communicate()
    assert not (here / "out.partial").exists()
    for path in sorted((here / "whole").glob("*.safetensors")):
        assert sha256_of(path) == sha256_of(here / "out" / path.name)
