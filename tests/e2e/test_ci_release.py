"""``ci/release.sh`` as a CI job runs it, against a hub on loopback: a tag pushes, a pull request does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from peft import LoraConfig

from tests.hubs.huggingface_server import Hub, serving
from tests.peer.models import llama
from tests.peer.trained import train

ROOT = Path(__file__).parents[2]
TOKEN = "hf_writer"  # noqa: S105 - of a hub that runs for one test
RECIPE = """\
adapters: adapter
base: base
export: false
evidence: {only: replay}
release: {license: mit, accept: {code: parity-missing, because: it takes too long for a test}}
targets: me/{adapter}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployment")
    train(llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serving(tmp_path / "hub") as running:
        yield running


def release(hub: Hub, folder: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    world = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "REPORTS": str(tmp_path / "reports"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "page.md"),
    }
    return subprocess.run(
        [ROOT / "ci/release.sh", *arguments],
        cwd=folder,
        env={**os.environ, **world},
        capture_output=True,
        text=True,
        check=False,
    )


def assert_no_token(done: subprocess.CompletedProcess[str], reports: Path) -> None:
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in reports.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_tag_pushes_and_keeps_the_reports(hub: Hub, folder: Path, tmp_path: Path) -> None:
    done = release(hub, folder, tmp_path, "recipe.yaml", "push", "--set", "push.tag='1.0'")
    assert done.returncode == 0, done.stderr
    pushed = hub.store.repositories["me/adapter"]
    files = pushed.commits[pushed.tags["1.0"]].files
    assert {"model.safetensors", "lora_deploy.json", "README.md"} <= set(files)

    reports = tmp_path / "reports"
    assert json.loads((reports / "run.json").read_text())["verdict"] == "pass"
    (suite,) = ET.parse(reports / "junit.xml").getroot()  # noqa: S314 - our own
    assert [case.get("name") for case in suite] == ["validate", "merge", "evidence", "release", "push"]
    assert (tmp_path / "page.md").read_text() == (reports / "summary.md").read_text()
    assert "| adapter | push | pass |" in done.stdout
    for name in ("evidence.json", "lora_deploy.json", "README.md"):
        assert (reports / "adapter" / name).is_file()
    assert_no_token(done, reports)


def test_a_pull_request_does_everything_but_the_push(hub: Hub, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "elsewhere"
    done = release(hub, folder, tmp_path, "recipe.yaml", "check", "--set", f"output={output}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "reports/run.json").read_text())
    assert [outcome["stage"] for outcome in found["outcomes"]] == ["validate", "merge", "evidence", "release"]
    assert (output / "adapter/release/adapter/lora_deploy.json").is_file()
    assert (tmp_path / "reports/adapter/lora_deploy.json").is_file()
    assert not hub.store.repositories
    assert not hub.requests, "nothing was asked of the hub"
    assert_no_token(done, tmp_path / "reports")


@pytest.mark.parametrize(
    ("setting", "status", "verdict"),
    [("adapters=gone", 3, "fail"), ("release.accept=[]", 10, "inconclusive"), ("push.revision=..", 9, "fail")],
)
def test_a_failing_recipe_ends_with_its_status_and_keeps_the_report(
    hub: Hub, folder: Path, tmp_path: Path, setting: str, status: int, verdict: str
) -> None:
    done = release(hub, folder, tmp_path, "recipe.yaml", "push", "--set", setting)
    assert done.returncode == status, done.stderr
    assert json.loads((tmp_path / "reports/run.json").read_text())["verdict"] == verdict
    assert verdict in (tmp_path / "reports/summary.md").read_text()
    assert (tmp_path / "reports/junit.xml").is_file()
    assert_no_token(done, tmp_path / "reports")


def test_a_recipe_that_cannot_be_read_is_said_and_leaves_no_old_report(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/junit.xml").write_text("old")
    done = release(hub, folder, tmp_path, "gone.yaml", "push")
    assert done.returncode == 2
    assert "no such file" in done.stderr
    assert not (tmp_path / "reports/junit.xml").exists()


@pytest.mark.parametrize("arguments", [(), ("recipe.yaml",), ("recipe.yaml", "publish")])
def test_without_a_recipe_and_a_mode_there_is_only_usage(
    hub: Hub, folder: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = release(hub, folder, tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: release.sh RECIPE push|check")
    assert not (tmp_path / "reports").exists()
