"""``merge`` into an existing export from the command line, and what ``verify`` says about the result."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import document, run
from tests.unit.export.foreign import UP, K, Q, adapter, optimum, plain_tensors, write


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", *optimum(plain_tensors()))


def test_merge_into_a_graph_verify_and_find_it_again(base: Path, tmp_path: Path) -> None:
    given, out = adapter(tmp_path / "adapter", Q, UP), tmp_path / "out"
    planned = document("merge", given, "--base", base / "model.onnx", "-o", out, "--dry-run")
    assert planned["counts"]["merged"] == 2
    assert planned["files"] == {name: (base / name).stat().st_size for name in ("model.onnx", "model.onnx.data")}
    assert not out.exists()
    shown = run("merge", given, "--base", base / "model.onnx", "-o", out)
    assert shown.exit_code == 0, shown.stderr
    assert document("merge", given, "--base", base / "model.onnx", "-o", out)["was_done"]
    found = document("verify", out, "--skip", "latency")
    assert (found["verdict"], found["replay"]["verdict"]) == ("pass", "pass")
    assert found["parity"]["verdict"] == "not applicable"
    assert "there is no torch model" in found["parity"]["reason"]
    (out / "model.onnx.data").write_bytes((base / "model.onnx.data").read_bytes())
    assert document("verify", out, "--only", "replay", exit_code=7)["replay"]["counts"] == {"not-applied": 2}


def test_equal_graphs_and_replayed_weights_prove_the_latency(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("merge", adapter(tmp_path / "adapter", Q), "--base", base, "-o", out)
    found = document("verify", out, "--only", "latency", "--seconds", "1")["latency"]
    assert (found["verdict"], found["proof"]["is_equal"]) == ("pass", True)
    assert found["reason"].startswith("not measured: "), "nobody knows what this graph wants to be given"
    (out / "model.onnx.data").write_bytes((base / "model.onnx.data").read_bytes())
    proof = document("verify", out, "--only", "latency", "--seconds", "1", exit_code=10)["latency"]["proof"]
    assert proof["is_equal"] is False
    assert "the weights are not the merged ones" in proof["reason"]


def test_a_merge_into_a_graph_is_released_with_lines_that_load_it(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "m-merged"
    run("merge", adapter(tmp_path / "adapter", Q), "--base", base / "model.onnx", "-o", out)
    assert document("release", out, exit_code=10)["error"]["code"] == "replay-missing"
    document("verify", out, "--seconds", "1")
    error = document("release", out, exit_code=10)["error"]
    assert error["code"] == "parity-missing", (
        "there is no torch model to compare with: a person says that this is enough"
    )
    made = document("release", out, "--license", "mit", "--accept", "parity-missing", "--because", "graphs only")
    root = Path(made["output"])
    assert made["manifest"]["evidence"]["verdicts"] == {"replay": "pass", "parity": "missing", "latency": "pass"}
    card = (root / "README.md").read_text()
    assert "base_model: base\n" in card
    assert "transformers" not in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for path in root.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_what_does_not_fit_exits_with_4_and_what_reaches_out_with_3(base: Path, tmp_path: Path) -> None:
    error = document("merge", adapter(tmp_path / "k", K), "--base", base, "-o", tmp_path / "o", exit_code=4)["error"]
    assert error["findings"][0]["code"] == "target-missing"
    assert run("validate", adapter(tmp_path / "k2", K), "--base", base).exit_code == 4
    assert run("validate", adapter(tmp_path / "q", Q), "--base", base).exit_code == 0
    refused = run("merge", adapter(tmp_path / "q2", Q), "--base", base, "--dtype", "bfloat16", "-o", tmp_path / "o")
    assert refused.exit_code == 2
    assert "--dtype base" in refused.stderr
    graph = (base / "model.onnx").read_bytes()
    (base / "model.onnx").write_bytes(graph.replace(b"model.onnx.data", b"../../evil.data"))
    assert run("merge", adapter(tmp_path / "q3", Q), "--base", base, "-o", tmp_path / "o").exit_code == 3
