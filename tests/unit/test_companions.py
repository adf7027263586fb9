"""Files that travel: whose they are, what changed between adapter and base, and token ids without a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.companions import check_companions, companion_files
from lora_deploy.errors import RecipeError, Severity
from tests.builders import adapter_of, make_checkpoint

JINJA = "{{ messages }}"


def write(folder: Path, **files: Any) -> Path:
    """Write files; a double underscore in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    write(
        tmp_path / "base",
        tokenizer__json={"model": {"vocab": {"a": 0, "b": 1}}},
        tokenizer_config__json={"eos_token": "b", "pad_token": "b"},
        special_tokens_map__json={},
        merges__txt="",
        chat_template__jinja=JINJA,
        generation_config__json={"eos_token_id": 1},
        preprocessor_config__json={},
        README__md="x",
        pytorch_model__bin="x",
    )
    return make_checkpoint(tmp_path / "base", {"w": torch.zeros(1)}, {})


def names(files: dict[str, Path], folder: str) -> set[str]:
    return {name for name, path in files.items() if path.parent.name == folder}


BASE_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
}


def adapter_in(folder: Path) -> Any:
    return adapter_of(path=folder / "adapter_model.safetensors")


def test_the_bases_files_travel_where_the_adapter_has_none(base: Checkpoint, tmp_path: Path) -> None:
    files = companion_files([adapter_in(write(tmp_path / "adapter", adapter_config__json={}))], base)
    assert files.keys() == BASE_FILES
    assert names(files, "base") == BASE_FILES


def test_an_adapter_that_brings_a_vocabulary_brings_the_whole_tokenizer(base: Checkpoint, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", vocab__txt="a", tokenizer_config__json={}, chat_template__jinja="{{ x }}")
    files = companion_files([adapter_in(folder)], base)
    assert names(files, "adapter") == {"vocab.txt", "tokenizer_config.json", "chat_template.jinja"}
    assert names(files, "base") == {"generation_config.json", "preprocessor_config.json"}


def test_a_tokenizer_without_a_template_keeps_the_bases_template(base: Checkpoint, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tokenizer__json={}, tokenizer_config__json={})
    assert companion_files([adapter_in(folder)], base)["chat_template.jinja"].parent.name == "base"


def test_a_template_inside_the_tokenizers_configuration_is_not_overruled(base: Checkpoint, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tokenizer__json={}, tokenizer_config__json={"chat_template": "x"})
    assert "chat_template.jinja" not in companion_files([adapter_in(folder)], base)


def test_single_files_of_the_adapter_replace_the_bases(base: Checkpoint, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", generation_config__json={}, chat_template__jinja="y")
    files = companion_files([adapter_in(folder)], base)
    assert names(files, "adapter") == {"generation_config.json", "chat_template.jinja"}
    assert names(files, "base") == BASE_FILES - names(files, "adapter")


def test_the_choice_decides(base: Checkpoint, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tokenizer__json={})
    assert names(companion_files([adapter_in(folder)], base, "base"), "base") == BASE_FILES
    assert "tokenizer.json" in names(companion_files([adapter_in(folder)], base, "adapter"), "adapter")
    with pytest.raises(RecipeError, match="no adapter's folder holds a tokenizer"):
        companion_files([adapter_in(write(tmp_path / "bare"))], base, "adapter")


def test_of_several_adapters_the_first_that_has_a_file_gives_it(base: Checkpoint, tmp_path: Path) -> None:
    first = write(tmp_path / "first", generation_config__json={})
    second = write(tmp_path / "second", generation_config__json={}, tokenizer__json={})
    files = companion_files([adapter_in(first), adapter_in(second)], base)
    assert files["generation_config.json"].parent.name == "first"
    assert files["tokenizer.json"].parent.name == "second"


def test_code_travels_only_from_a_base_whose_configuration_names_it(base: Checkpoint, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", modeling_evil__py="x", tokenizer__json={})
    (base.root / "modeling_mine.py").write_text("x")
    assert not any(name.endswith(".py") for name in companion_files([adapter_in(folder)], base))
    named = make_checkpoint(base.root, {"w": torch.zeros(1)}, {"auto_map": {"AutoModel": "modeling_mine.M"}})
    assert {n for n in companion_files([adapter_in(folder)], named) if n.endswith(".py")} == {"modeling_mine.py"}


def test_an_adapter_inside_the_bases_own_folder_is_no_second_source(base: Checkpoint) -> None:
    assert names(companion_files([adapter_in(base.root)], base), "base") == BASE_FILES


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"tokenizer_config__json": {"eos_token": "<eos>"}},
            ("special-token-changed", Severity.WARN, "'<eos>' in the adapter's tokenizer, 'b' in the base's"),
        ),
        (
            {"tokenizer_config__json": {"eos_token": {"content": "<eos>"}}},
            ("special-token-changed", Severity.WARN, "eos_token is '<eos>'"),
        ),
        ({"tokenizer_config__json": {"pad_token": "a"}}, ("special-token-changed", Severity.NOTE, "pad_token is 'a'")),
        ({"chat_template__jinja": "other"}, ("chat-template-changed", Severity.WARN, "rendered differently")),
        ({"tokenizer_config__json": {"chat_template": "other"}}, ("chat-template-changed", Severity.WARN, "rendered")),
        ({"chat_template__json": {"chat_template": "other"}}, ("chat-template-changed", Severity.WARN, "rendered")),
        (
            {"generation_config__json": {"eos_token_id": [0, 1]}},
            ("eos-changed", Severity.WARN, "[0, 1] in the adapter"),
        ),
        ({"tokenizer__json": "<html>"}, ("companion-unreadable", Severity.ERROR, "is not valid JSON")),
    ],
)
def test_what_changed_against_the_base_is_a_finding(
    base: Checkpoint, tmp_path: Path, files: dict[str, Any], expected: tuple[str, Severity, str]
) -> None:
    (finding,) = check_companions([adapter_in(write(tmp_path / "adapter", **files))], base, 2)
    assert (finding.code, finding.severity) == expected[:2]
    assert expected[2] in finding.message


def test_the_same_tokenizer_in_both_folders_is_no_finding(base: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in base.root.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert [*check_companions([adapter_in(folder)], base, 2)] == []


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": {"model": {"vocab": {"a": 0, "<new>": 2}}}},
        {"tokenizer__json": {"model": {"vocab": [["a", 0.0], ["b", 0.0], ["<new>", 0.0]]}}},
        {"tokenizer__json": {"model": {"vocab": {}}, "added_tokens": [{"id": 2, "content": "<new>"}]}},
        {"tokenizer__model": "x", "added_tokens__json": {"<new>": 2}},
        {"tokenizer__model": "x", "tokenizer_config__json": {"added_tokens_decoder": {"2": {"content": "<new>"}}}},
    ],
)
def test_a_token_id_without_a_row_is_an_error(base: Checkpoint, tmp_path: Path, files: dict[str, Any]) -> None:
    adapters = [adapter_in(write(tmp_path / "adapter", **files))]
    found = [finding for finding in check_companions(adapters, base, 2) if finding.severity is Severity.ERROR]
    assert [finding.code for finding in found] == ["token-outside"]
    assert "up to 2 ('<new>'), the embedding has 2 rows" in found[0].message
    assert not [f for f in check_companions(adapters, base, 3) if f.severity is Severity.ERROR]
    assert not [f for f in check_companions(adapters, base, None) if f.severity is Severity.ERROR]
    assert [*check_companions(adapters, base, 2, "base")] == []
