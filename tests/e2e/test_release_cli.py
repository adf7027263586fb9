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
from lora_deploy.merge.record import read_record
from lora_deploy.pipeline import merge, verify
from tests import pipelines
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
    (tmp_path / "in").symlink_to(verified.parent)
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
    error = document("verify", tmp_path / "back", "--only", "replay", exit_code=3)["error"]
    assert "--adapter" in error["hint"], "a release does not say where its inputs lie"
    inputs = ("--adapter", merged.parent / "in/adapter", "--base", merged.parent / "in/base")
    shown = document("verify", tmp_path / "back", "--only", "replay", *inputs)
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
    inputs = (merged.parent / "in").resolve()
    for path in (tmp_path / "r").rglob("*.*"):
        content = path.read_bytes()
        for place in (tmp_path, inputs, Path.home(), Path(sys.prefix)):
            assert str(place).encode() not in content, (path.name, place)
    record = read_record(tmp_path / "r")
    assert (record.base.name, record.base.root) == ("base", "")
    assert [adapter.path for adapter in record.adapters] == ["adapter"]
    assert record.digest == read_record(merged).digest


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


def test_what_cannot_be_is_said_before_anything_is_written(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    before = {path.name for path in tmp_path.iterdir()}
    assert document("release", merged, "-o", tmp_path / "theirs", exit_code=5)["error"]["code"] == "output-exists"
    assert document("release", merged, "-o", tmp_path / "r", "--sign-key", tmp_path / "no.pem", exit_code=2)["error"]
    assert document("release", merged, "-o", tmp_path / "r", "--onnx", tmp_path / "gone", exit_code=3)["error"]
    assert document("release", tmp_path / "gone", exit_code=3)["error"]
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "theirs" / "thesis.txt").read_text() == "years of work"


def test_another_release_is_replaced_only_when_asked(merged: Path, tmp_path: Path) -> None:
    document("release", merged)
    assert document("release", merged, "--license", "mit", exit_code=5)["error"]["code"] == "output-exists"
    document("release", merged, "--license", "mit", "--fresh")
    assert "license: mit" in (tmp_path / "m-release" / "README.md").read_text()


def accepted(*codes: str) -> list[str]:
    return [word for code in codes for word in ("--accept", code, "--because", "only the card is tested")]


def run_snippets(root: Path) -> list[str]:
    """Run what the card shows, in the release's folder, and give the libraries that it uses."""
    snippets = re.findall(r"With ([^:\n]*):\n\n```python\n(.*?)```", (root / "README.md").read_text(), flags=re.DOTALL)
    for _, snippet in snippets:
        command = [sys.executable, "-W", "ignore", "-c", snippet]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=os.environ)
        assert done.returncode == 0, done.stderr
    return [library for library, _ in snippets]


@pytest.mark.slow
def test_the_cards_snippets_run(merged: Path, tmp_path: Path) -> None:
    document("export", merged, "--onnx", "--layout", "genai", "--dtype", "float32")
    words = accepted("replay-missing", "parity-missing", "latency-missing")
    document("release", merged, "-o", tmp_path / "r", *words)
    assert run_snippets(tmp_path / "r") == ["transformers", "onnxruntime-genai"]


@pytest.mark.slow
def test_the_snippets_of_plain_graphs_run(merged: Path, tmp_path: Path) -> None:
    document("export", merged, "--onnx", "--dtype", "float32")
    words = accepted("replay-missing", "parity-missing", "latency-missing")
    document("release", merged, "-o", tmp_path / "r", *words)
    assert run_snippets(tmp_path / "r") == ["transformers", "onnxruntime"]


@pytest.mark.slow
def test_a_pipeline_is_released_and_diffusers_loads_it(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    base = pipelines.stable_diffusion(tmp_path / "base")
    unet = diffusers.DiffusionPipeline.from_pretrained(base).unet
    pipelines.train(unet, tmp_path / "adapter", pipelines.UNET_TARGETS)
    document("merge", tmp_path / "adapter", "--base", base, "--component", "unet", "-o", tmp_path / "merged")
    verified = document("verify", tmp_path / "merged", "--only", "replay")
    assert verified["verdict"] == "pass"
    root = Path(document("release", tmp_path / "merged", *accepted("parity-missing"))["output"])
    assert run_snippets(root) == ["diffusers"]
    assert "library_name: diffusers" in (root / "README.md").read_text()
    for path in root.rglob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
