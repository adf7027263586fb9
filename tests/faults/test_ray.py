"""Merges and recipes on a Ray cluster of two nodes, one of which dies in the middle: the files of one process.

The cluster lives in a network namespace of its own, so that it is no other's, and its processes end with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

from tests.e2e.commands import document, run
from tests.merging import digests
from tests.peer.models import llama
from tests.peer.trained import Trained, train

ROOT = Path(__file__).parents[2]
SHARD_BYTES = 60_000
IN_A_NAMESPACE = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
RECIPE = """\
adapters:
  - adapter
  - {name: half, path: adapter, weights: 0.5}
  - {name: gone, path: nowhere}
base: base
export: false
evidence: {only: replay}
release: {license: mit, accept: {code: parity-missing, because: it takes too long for a test}}
targets: ["./published/{cell}"]
push: {replace: true}
"""


def needs_namespaces() -> None:
    pytest.importorskip("ray", reason="extra ray")
    asked = [*IN_A_NAMESPACE, "ip", "link", "set", "lo", "up"]
    if shutil.which("unshare") is None or subprocess.run(asked, capture_output=True, check=False).returncode:
        pytest.skip("needs a network namespace, which this user cannot make")


def on_a_cluster(folder: Path, *arguments: object) -> str:
    script = f'ip link set lo up && exec "{sys.executable}" -m tests.faults.ray_cluster "$@"'
    command = [*IN_A_NAMESPACE, "bash", "-c", script, "cluster", *map(str, arguments)]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "", "LORA_DEPLOY_CACHE": str(folder / "cache")}
    environment = {name: value for name, value in (os.environ | quiet).items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed a node" in done.stdout
    return done.stdout


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return train(llama(hidden_size=64, intermediate_size=96, num_hidden_layers=4), config, tmp_path)


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_of_a_merge_changes_no_byte(trained: Trained, tmp_path: Path) -> None:
    needs_namespaces()
    small = ("--max-shard-size", SHARD_BYTES)
    document("merge", trained.adapter, "--base", trained.base, "-o", tmp_path / "alone", *small)
    kept = ("*.safetensors", "*.json")
    expected = {name: sha256 for name, sha256 in digests(tmp_path / "alone", *kept).items() if name != "merge.json"}
    assert len(expected) > 6
    said = on_a_cluster(tmp_path, "merge", trained.adapter, trained.base, tmp_path / "out", SHARD_BYTES)
    assert f"merged {tmp_path / 'out'}" in said
    found = {name: sha256 for name, sha256 in digests(tmp_path / "out", *kept).items() if name != "merge.json"}
    assert found == expected


@pytest.mark.slow
def test_a_recipes_cells_are_done_elsewhere_where_a_node_dies(trained: Trained, tmp_path: Path) -> None:
    needs_namespaces()
    (trained.base.parent / "recipe.yaml").write_text(RECIPE)
    said = on_a_cluster(tmp_path, "run", trained.base.parent / "recipe.yaml")
    assert "verdict fail" in said
    for cell in ("adapter", "half"):
        assert all(f"{cell}/{stage}:pass" in said for stage in ("merge", "evidence", "release", "push"))
        assert (trained.base.parent / f"published/{cell}/lora_deploy.json").is_file()
    assert "gone/validate:fail" in said


def test_what_ray_would_do_twice_or_cannot_keep_is_refused(trained: Trained, tmp_path: Path) -> None:
    shared = ("--executor", "ray", "--task-index", 0, "--task-count", 2)
    result = run("merge", trained.adapter, "--base", trained.base, "-o", tmp_path / "out", *shared)
    assert result.exit_code == 2
    assert "--executor ray shares the work itself" in result.stderr
    (trained.base.parent / "recipe.yaml").write_text(RECIPE)
    result = run("run", trained.base.parent / "recipe.yaml", "--executor", "ray", "--token", "hf_secret")
    assert result.exit_code == 2
    assert "--token is no argument of tasks" in result.stderr


def test_a_missing_ray_is_named_with_its_extra(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ("merge", trained.adapter, "--base", trained.base, "-o", tmp_path / "out", "--executor", "ray")
    error = document(*command, exit_code=2)["error"]
    assert (error["code"], error["hint"]) == ("extra-missing", "pip install 'lora-deploy[ray]'")
    assert not (tmp_path / "out").exists()
