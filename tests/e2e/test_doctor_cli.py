"""What ``lora-deploy doctor`` says of a machine, and what it never says."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lora_deploy.pipeline import examining
from tests.e2e.commands import document, run
from tests.hubs.huggingface_server import Hub, serving

ROOT = Path(__file__).parents[2]
SECRET = "hf_verysecretverysecret"  # noqa: S105 - of nobody


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("LORA_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving(tmp_path / "hub") as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running


def test_versions_devices_and_providers_are_those_of_this_machine(hub: Hub) -> None:
    found = document("doctor")
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["kind"] == "cpu"
    assert found["devices"][0]["n_bytes"] > 1_000_000_000
    assert "CPUExecutionProvider" in found["providers"]


def test_a_cache_is_measured_and_one_that_is_not_there_is_not(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "cache/graphs").mkdir(parents=True)
    (tmp_path / "cache/graphs/one").write_bytes(bytes(1234))
    (tmp_path / "cache/linked").symlink_to(tmp_path / "cache/graphs/one")
    folders = {folder["name"]: folder for folder in document("doctor")["folders"]}
    n_link_bytes = (tmp_path / "cache/linked").lstat().st_size
    assert folders["cache"]["n_bytes"] == 1234 + n_link_bytes
    assert folders["hub cache"]["n_bytes"] is None
    assert folders["hub cache"]["free_bytes"] > 0
    assert not (tmp_path / "hub-cache").exists()


def test_a_token_is_there_or_not_and_never_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url.replace("//", f"//me:{SECRET}@"))
    result = run("doctor", "--json")
    assert '"has_token": true' in result.stdout
    assert SECRET not in result.stdout + result.stderr + run("doctor").stdout
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    assert document("doctor")["hub"]["has_token"] is False


def test_a_hub_is_reachable_silent_or_not_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert document("doctor")["hub"]["is_reachable"] is True
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert document("doctor")["hub"]["state"] == "not asked, HF_HUB_OFFLINE is set"
    assert len(hub.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    silent = document("doctor")["hub"]
    assert silent["is_reachable"] is False
    assert silent["state"].startswith("not reachable: ")


def test_an_extra_that_is_missing_says_what_it_would_bring(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = examining.installed_version
    monkeypatch.setattr(examining, "installed_version", lambda name: None if name == "jinja2" else installed(name))
    extras = {extra["name"]: extra for extra in document("doctor")["extras"]}
    assert extras["release"]["missing"] == ["jinja2"]
    assert not extras["export"]["missing"]
    assert re.search(r"release +cards and reports with plots \(lacks jinja2\)", run("doctor").stdout)


def test_one_runtime_is_enough_and_none_is_not(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "installed_version", lambda name: None if name == "onnxruntime-gpu" else "1")
    assert "extras: all installed" in run("doctor").stdout
    monkeypatch.setattr(examining, "installed_version", lambda name: None if name.startswith("onnxruntime") else "1")
    assert "hint: pip install 'lora-deploy[cpu]'" in run("doctor").stdout


def test_every_extra_for_users_is_known() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(declared) - {"dev", "demo"} == set(examining._BRINGS)
    lines = [f"{package}; extra == '{extra}'" for extra, packages in declared.items() for package in packages]
    assert examining._packages(lines, "export") == ["onnx", "onnxscript", "peft", "transformers"]
    assert examining._packages(lines, "s3") == ["s3fs"]
