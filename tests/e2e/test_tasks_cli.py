"""One merge by many jobs: the options, what an array of jobs says in its environment, the templates for clusters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig

from tests.e2e.commands import document, run
from tests.merging import digests
from tests.peer.models import llama
from tests.peer.trained import Trained, train

CLUSTER = Path(__file__).parents[2] / "ci" / "cluster"
KEPT = ("*.safetensors", "*.json")
SMALL = ("--max-shard-size", "3kB")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return train(llama(), config, tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def alone(trained: Trained) -> dict[str, str]:
    """Files of the merge that one process makes."""
    out = trained.base.parent / "alone"
    document("merge", trained.adapter, "--base", trained.base, "-o", out, *SMALL)
    return files_of(out)


def files_of(out: Path) -> dict[str, str]:
    return {name: sha256 for name, sha256 in digests(out, *KEPT).items() if name != "merge.json"}


def test_shares_and_a_finish_make_what_one_process_makes(
    trained: Trained, alone: dict[str, str], tmp_path: Path
) -> None:
    command = ("merge", trained.adapter, "--base", trained.base, "-o", tmp_path / "out", *SMALL)
    shares = [document(*command, "--task-index", index, "--task-count", 3) for index in range(3)]
    assert sum(len(share["files"]) for share in shares) == shares[0]["n_files_of_all"] > 3
    assert not (tmp_path / "out").exists()
    assert document(*command, "--finalize")["was_done"] is False
    assert files_of(tmp_path / "out") == alone
    assert document(*command, "--task-index", 0, "--task-count", 3)["is_merged"]
    assert document("verify", tmp_path / "out", "--only", "replay")["verdict"] == "pass"


def test_a_finish_too_early_names_what_is_missing(trained: Trained, tmp_path: Path) -> None:
    command = ("merge", trained.adapter, "--base", trained.base, "-o", tmp_path / "out", *SMALL)
    document(*command, "--task-index", 0, "--task-count", 2)
    error = document(*command, "--finalize", exit_code=5)["error"]
    assert error["code"] == "shards-missing"
    assert "model-00002-of-" in error["message"]


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ({"JOB_COMPLETION_INDEX": "1"}, ["--task-count", "3"], {"index": 1, "count": 3}),
        (
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "3"},
            ["--task-count", "3"],
            {"index": 2, "count": 3},
        ),
        (
            {"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_STEP": "3"},
            ["--task-count", "3"],
            {"index": 2, "count": 3},
        ),
        ({"SLURM_ARRAY_TASK_COUNT": "4"}, ["--task-index", "3"], {"index": 3, "count": 4}),
    ],
)
def test_an_array_of_jobs_says_which_share(
    environment: dict[str, str],
    options: list[str],
    expected: dict[str, int],
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = document("merge", trained.adapter, "--base", trained.base, "-o", tmp_path / "out", *SMALL, *options)
    assert found["task"] == expected


def test_a_job_of_an_array_merges_whole_unless_it_is_told_to_share(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array may be of many adapters: its environment alone never makes a merge a part of one."""
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "JOB_COMPLETION_INDEX"):
        monkeypatch.setenv(name, "3")
    document("merge", trained.adapter, "--base", trained.base, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "merge.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task-index", "1"], "--task-count: not given"),
        (["--task-count", "2"], "--task-index: not given"),
        (["--task-index", "2", "--task-count", "2"], "task 2 of 2: expected an index from 0 to 1"),
        (["--task-index", "0", "--task-count", "2", "--finalize"], "--finalize checks what all tasks wrote"),
        (["--task-count", "0"], "0 is not in the range"),
    ],
)
def test_shares_that_mean_nothing_are_refused(
    options: list[str], message: str, trained: Trained, tmp_path: Path
) -> None:
    result = run("merge", trained.adapter, "--base", trained.base, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def program_on_path(folder: Path) -> dict[str, str]:
    """An environment in which ``lora-deploy`` is this one, and ``sbatch`` writes down what it was asked for."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "lora-deploy").symlink_to(Path(sys.executable).with_name("lora-deploy"))
    (programs / "sbatch").write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {folder}/asked\n')
    (programs / "sbatch").chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "LORA_DEPLOY_CACHE": str(folder / "cache")}


@pytest.mark.slow
def test_the_template_for_slurm_merges_in_an_array_and_finishes_after_it(
    trained: Trained, alone: dict[str, str], tmp_path: Path
) -> None:
    script = CLUSTER / "slurm.sbatch"
    environment = program_on_path(tmp_path) | {"LORA_DEPLOY_ARGS": " ".join(SMALL)}
    arguments = [str(trained.adapter), str(trained.base), str(tmp_path / "out")]
    array = {"SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_JOB_ID": "77"}
    for identifier in ("5", "4"):
        job = environment | array | {"SLURM_ARRAY_TASK_ID": identifier}
        subprocess.run(["bash", script, *arguments], env=job, check=True, timeout=120)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["--dependency=afterok:77", str(script), *arguments]
    subprocess.run(["bash", *asked[1:]], env=environment, check=True, timeout=120)
    assert files_of(tmp_path / "out") == alone


@pytest.mark.slow
def test_the_template_for_kubernetes_merges_in_pods_and_finishes_in_one(
    trained: Trained, alone: dict[str, str], tmp_path: Path
) -> None:
    merge, finish = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    (tmp_path / "work").mkdir()
    for name, place in (("adapter", trained.adapter), ("base", trained.base)):
        (tmp_path / "work" / name).symlink_to(place)
    environment = program_on_path(tmp_path)

    def command(job: dict) -> list[str]:
        (container,) = job["spec"]["template"]["spec"]["containers"]
        return [part.replace("/work", str(tmp_path / "work")) for part in (*container["command"], *SMALL)]

    n_pods = merge["spec"]["completions"]
    told = command(merge)
    assert told[told.index("--task-count") + 1] == str(n_pods)
    for index in range(n_pods):
        pod = environment | {"JOB_COMPLETION_INDEX": str(index)}
        subprocess.run(told, env=pod, check=True, timeout=120)
    subprocess.run(command(finish), env=environment, check=True, timeout=120)
    assert files_of(tmp_path / "work" / "merged") == alone
