"""An export straight from base and adapters is released as it is: its origin stands where the merge record would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.artifact import sha256_of
from lora_deploy.errors import InconclusiveError, InputError, RecipeError
from lora_deploy.export.record import read_record as read_export
from lora_deploy.merge.record import RECORD_NAME, read_record
from lora_deploy.release.assemble import assemble
from lora_deploy.release.manifest import check
from lora_deploy.release.options import ReleaseOptions
from lora_deploy.release.parts import gather

FIXTURE = Path(__file__).parents[2] / "fixtures" / "release" / "schema-1"


def made_of(folder: Path) -> dict[str, Any]:
    """The inputs of the fixture, where a direct export would have found them."""
    record = read_record(FIXTURE).model_dump(mode="json")
    (folder / "base").mkdir()
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    base = {**record["base"], "name": str(folder / "base"), "root": str(folder / "base"), "revision": None}
    adapters = [{**a, "path": str(folder / "seven" / "a.safetensors"), "base_name": None} for a in record["adapters"]]
    return {"versions": record["versions"], "options": record["options"], "base": base, "adapters": adapters}


def direct(folder: Path, **changes: Any) -> Path:
    root = folder / "exported"
    shutil.copytree(FIXTURE / "onnx", root)
    document = json.loads((root / "export.json").read_text())
    document["lora_deploy"]["origin"] = made_of(folder) | changes
    (root / "export.json").write_text(json.dumps(document))
    evidence = {check: {"verdict": "pass"} for check in ("replay", "parity", "latency")}
    files = {file.path: sha256_of(root / file.path) for file in read_export(root).artifacts}
    (root / "evidence.json").write_text(json.dumps({**evidence, "files": files, "note": f"read {folder}/base"}))
    return root


def test_it_is_whole_and_names_no_place(tmp_path: Path) -> None:
    made = assemble(direct(tmp_path), tmp_path / "released", ReleaseOptions())
    manifest = check(made.root)
    assert {"export.json", "decode.onnx", "prefill.onnx.data"} <= {file.path for file in manifest.content.files}
    assert not (made.root / RECORD_NAME).exists()
    assert manifest.content.base.name == "base"
    assert manifest.evidence.verdicts == {"replay": "pass", "parity": "pass", "latency": "pass"}
    for path in made.root.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    origin = read_export(made.root).origin
    assert origin is not None
    assert origin.base.root == ""
    card = (made.root / "README.md").read_text()
    assert "lora-deploy export --onnx --adapter" in card
    assert "library_name: onnx" in card
    assert "license: mit" in card
    assert assemble(tmp_path / "exported", tmp_path / "released", ReleaseOptions()).was_done


def test_what_was_found_is_in_the_manifest_and_in_the_command_that_makes_it_again(tmp_path: Path) -> None:
    told = {"code": "dequantised-base", "severity": "warn", "target": "base", "message": f"{tmp_path}/base was packed"}
    made = assemble(direct(tmp_path, findings=[told]), tmp_path / "released", ReleaseOptions())
    assert "dequantised-base" in {finding.code for finding in check(made.root).findings}
    assert "--dequantize" in (made.root / "README.md").read_text()
    for path in made.root.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_latency_is_asked_for(tmp_path: Path) -> None:
    root = direct(tmp_path)
    evidence = json.loads((root / "evidence.json").read_text())
    del evidence["latency"]
    (root / "evidence.json").write_text(json.dumps(evidence))
    with pytest.raises(InconclusiveError, match="latency-missing"):
        gather(root, (), ReleaseOptions())


def test_graphs_of_a_merged_folder_are_released_with_it_and_not_alone(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE / "onnx", tmp_path / "onnx")
    with pytest.raises(InputError, match="is an export of a merged folder"):
        gather(tmp_path / "onnx", (), ReleaseOptions())


def test_graphs_without_an_adapter_merged_into_them_are_no_release(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no merged adapter"):
        gather(direct(tmp_path, adapters=[]), (), ReleaseOptions())


def test_two_folders_of_graphs_with_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(FIXTURE / "onnx", tmp_path / name / "onnx")
    with pytest.raises(RecipeError, match="released alone"):
        gather(direct(tmp_path), (tmp_path / "a" / "onnx",), ReleaseOptions())
    with pytest.raises(RecipeError, match="two folders are called onnx"):
        gather(FIXTURE, (tmp_path / "a" / "onnx", tmp_path / "b" / "onnx"), ReleaseOptions())
