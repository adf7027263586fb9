"""Provenance and bill of materials say what the content says, in forms that their own validators accept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf.json_format import ParseDict
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage

from lora_deploy.merge.record import RecordedFile
from lora_deploy.release.manifest import Content, ReleasedAdapter, ReleasedBase
from lora_deploy.release.provenance import bill_of_materials, provenance

FILE = RecordedFile(path="model.safetensors", n_bytes=3, sha256="a" * 64)
CONTENT = Content(
    files=(FILE, RecordedFile(path="onnx/model.onnx", n_bytes=3, sha256="b" * 64)),
    base=ReleasedBase(name="owner/base", revision="c" * 40, files=(FILE,)),
    adapters=(
        ReleasedAdapter(
            name="seven",
            format="peft",
            sha256="d" * 64,
            config_sha256=None,
            weight=1.0,
            base_name="owner/base",
            base_revision=None,
        ),
    ),
    recipe=None,
    options={"merge": {"dtype": "float16"}},
    versions={"lora-deploy": "0.1.0", "torch": "2.13.0"},
)


@pytest.mark.parametrize("licence", [None, "apache-2.0", "a licence of their own"])
def test_the_bill_of_materials_is_strictly_valid(licence: str | None) -> None:
    bom = bill_of_materials("seven-release", CONTENT, CONTENT.digest, licence)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom)) is None
    assert {entry["name"] for entry in bom["components"]} == {"model.safetensors", "onnx/model.onnx"}


def test_the_validator_can_say_no() -> None:
    bom = bill_of_materials("seven-release", CONTENT, CONTENT.digest, None) | {"specVersion": 16}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom)) is not None


def test_the_statement_names_every_file_and_everything_it_was_made_from() -> None:
    statement = provenance(CONTENT)
    parsed = ParseDict(statement, StatementMessage())
    Statement.copy_from_pb(parsed).validate()
    assert [entry["name"] for entry in statement["subject"]] == ["model.safetensors", "onnx/model.onnx"]
    resolved = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert [entry["digest"]["sha256"] for entry in resolved] == ["a" * 64, "d" * 64]


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    again = Content.model_validate(CONTENT.model_dump())
    assert provenance(again) == provenance(CONTENT)
    assert bill_of_materials("x", again, again.digest, None) == bill_of_materials("x", CONTENT, CONTENT.digest, None)
