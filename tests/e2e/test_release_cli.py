"""From a merge to a release, to a target and back, on the command line; and the card's own words, run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

from lora_deploy.merge.options import MergeOptions
from lora_deploy.pipeline import merge, verify
from lora_deploy.release.manifest import MANIFEST_NAME
from tests.e2e.commands import document, run
from tests.peer.models import llama
from tests.peer.trained import train


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged folder whose evidence says pass."""
    folder = tmp_path_factory.mktemp("release")
    trained = train(
        llama(hidden_size=64, intermediate_size=48), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), folder
    )
    (trained.base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (trained.base / "LICENSE").write_text("the licence\n")
    merge(trained.adapter, base=trained.base, output=folder / "merged", merge_options=MergeOptions(n_workers=1))
    assert verify(folder / "merged").verdict == "pass"
    return folder / "merged"


@pytest.fixture
def merged(verified: Path, tmp_path: Path) -> Path:
    shutil.copytree(verified, tmp_path / "m-merged")
    return tmp_path / "m-merged"


def test_release_push_pull_and_verify(merged: Path, tmp_path: Path) -> None:
    made = document("release", merged)
    root = Path(made["output"])
    assert root == tmp_path / "m-release"
    assert made["manifest"]["evidence"]["verdicts"] == {"replay": "pass", "parity": "pass"}
    assert document("release", merged)["was_done"]
    receipt = document("push", root, tmp_path / "hub" / "m")["receipt"]
    assert receipt["n_sent_bytes"] == receipt["n_bytes"]
    assert run("push", root, tmp_path / "hub" / "m", "--dry-run").stdout.count("0 files") == 1
    pulled = document("pull", tmp_path / "hub" / "m", tmp_path / "back")
    assert pulled["content_digest"] == made["content_digest"]
    before = (tmp_path / "back" / "evidence.json").read_bytes()
    shown = document("verify", tmp_path / "back", "--only", "replay")
    assert shown["replay"]["verdict"] == "pass"
    assert (tmp_path / "back" / "evidence.json").read_bytes() == before


def test_a_pulled_release_that_was_changed_is_no_release(merged: Path, tmp_path: Path) -> None:
    document("release", merged, "-o", tmp_path / "r")
    config = tmp_path / "r" / "config.json"
    content = config.read_text()
    config.unlink()  # it may share its content with the merged folder
    config.write_text(content.replace("{", "{ ", 1))
    assert document("verify", tmp_path / "r", exit_code=8)["error"]["code"] == "digest-mismatch"
    assert document("push", tmp_path / "r", tmp_path / "hub", exit_code=8)["error"]["code"] == "digest-mismatch"
    assert not (tmp_path / "hub").exists()


def test_the_same_inputs_give_the_same_content(merged: Path, tmp_path: Path) -> None:
    first, second = (document("release", merged, "-o", tmp_path / name) for name in ("one", "two"))
    assert first["content_digest"] == second["content_digest"]
    for name in ("bom.json", "provenance.json", "report.html", "README.md"):
        one, two = ((tmp_path / folder / name).read_text() for folder in ("one", "two"))
        assert one.replace("one", "two") == two.replace("one", "two"), name


def test_nothing_is_a_link_and_nothing_names_this_machine(merged: Path, tmp_path: Path) -> None:
    document("release", merged, "-o", tmp_path / "r")
    assert not any(path.is_symlink() for path in (tmp_path / "r").rglob("*"))
    for name in ("README.md", "report.html", MANIFEST_NAME, "bom.json", "provenance.json"):
        assert str(tmp_path) not in (tmp_path / "r" / name).read_text(), name


def test_a_weight_that_changed_after_verify_is_not_released(merged: Path, tmp_path: Path) -> None:
    weights = merged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    error = document("release", merged, exit_code=8)["error"]
    assert error["code"] == "digest-mismatch"
    assert not (tmp_path / "m-release").exists()


def test_without_evidence_there_is_no_release_unless_somebody_says_so(merged: Path, tmp_path: Path) -> None:
    (merged / "evidence.json").unlink()
    error = document("release", merged, exit_code=10)["error"]
    assert error["code"] == "replay-missing"
    words = [
        "--accept",
        "replay-missing",
        "--because",
        "a <b>test</b>",
        "--accept",
        "parity-missing",
        "--because",
        "it",
    ]
    made = document("release", merged, *words)
    assert [entry["code"] for entry in made["manifest"]["accepted"]] == ["replay-missing", "parity-missing"]
    root = Path(made["output"])
    assert "a <b>test</b>" in (root / "README.md").read_text()
    assert "a &lt;b&gt;test&lt;/b&gt;" in (root / "report.html").read_text()
    assert run("release", merged, "--accept", "replay-missing").exit_code == 2


def test_a_users_own_text_goes_into_the_card(merged: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.md"
    template.write_text("Trained on {{ adapters[0].name }} for {{ base }}.")
    document("release", merged, "-o", tmp_path / "r", "--card-template", template)
    assert "Trained on adapter for base." in (tmp_path / "r" / "README.md").read_text()
    template.write_text("{{ ''.__class__.__mro__ }}")
    assert document("release", merged, "-o", tmp_path / "x", "--card-template", template, exit_code=2)["error"]
    template.write_text("{{ nonsense }}")
    assert (
        "nonsense"
        in document("release", merged, "-o", tmp_path / "x", "--card-template", template, exit_code=2)["error"][
            "message"
        ]
    )


def test_another_release_is_replaced_only_when_asked(merged: Path, tmp_path: Path) -> None:
    document("release", merged)
    assert document("release", merged, "--license", "mit", exit_code=5)["error"]["code"] == "output-exists"
    document("release", merged, "--license", "mit", "--fresh")
    assert "license: mit" in (tmp_path / "m-release" / "README.md").read_text()


@pytest.mark.slow
def test_the_cards_snippets_run(merged: Path, tmp_path: Path) -> None:
    document("export", merged, "--onnx", "--layout", "genai", "--dtype", "float32")
    words = []
    for check in ("replay", "parity", "latency"):
        words += ["--accept", f"{check}-missing", "--because", "only the card is tested"]
    document("release", merged, "-o", tmp_path / "r", *words)
    snippets = re.findall(r"```python\n(.*?)```", (tmp_path / "r" / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        command = [sys.executable, "-W", "ignore", "-c", snippet]
        done = subprocess.run(command, cwd=tmp_path / "r", capture_output=True, text=True, check=False, env=os.environ)
        assert done.returncode == 0, done.stderr
