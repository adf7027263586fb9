"""A licence is the base's, or somebody says which."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_deploy.errors import ReleaseError
from lora_deploy.release.licence import licence_of


def card(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{text}\n---\n# card\n")
    return folder


def test_the_bases_licence_and_its_files_travel(tmp_path: Path) -> None:
    base = card(tmp_path / "base", "license: llama3.2\nlicense_link: LICENSE.txt")
    for name in ("LICENSE.txt", "USE_POLICY.md", "Notice", "other.txt"):
        (base / name).write_text(name)
    found = licence_of(base, [], None)
    assert found.card == {"license": "llama3.2", "license_link": "LICENSE.txt"}
    assert set(found.files) == {"LICENSE.txt", "USE_POLICY.md", "Notice"}
    assert not found.findings


@pytest.mark.parametrize(
    ("base", "adapter", "code"),
    [
        ("license: mit", "license: apache-2.0", "license-conflict"),
        ("tags: [x]", "license: apache-2.0", "license-conflict"),
        ("license: other\nlicense_name: theirs", "license: other", "license-other"),
        ("license: mit\nextra_gated_prompt: agree", "license: mit", "license-gated"),
    ],
)
def test_what_is_unclear_asks(tmp_path: Path, base: str, adapter: str, code: str) -> None:
    folders = card(tmp_path / "base", base), [card(tmp_path / "adapter", adapter)]
    with pytest.raises(ReleaseError) as caught:
        licence_of(*folders, None)
    assert caught.value.code == code
    assert licence_of(*folders, "cc0-1.0").card == {"license": "cc0-1.0"}


def test_a_stated_licence_that_is_the_bases_keeps_its_link(tmp_path: Path) -> None:
    base = card(tmp_path / "base", "license: other\nlicense_name: theirs")
    assert licence_of(base, [], "other").card == {"license": "other", "license_name": "theirs"}


@pytest.mark.parametrize("text", ["", "license: [", "- a\n- b"])
def test_a_card_that_says_nothing_is_a_warning(tmp_path: Path, text: str) -> None:
    found = licence_of(card(tmp_path / "base", text), [], None)
    assert found.card == {}
    assert [finding.code for finding in found.findings] == ["license-unknown"]


def test_a_base_that_is_gone_is_a_warning(tmp_path: Path) -> None:
    assert licence_of(tmp_path / "gone", [tmp_path], None).findings
