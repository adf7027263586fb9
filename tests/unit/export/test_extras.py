"""A package that is missing, or that is there twice, is named with what to install."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from lora_deploy.errors import ExportError
from lora_deploy.export import extras


@pytest.mark.parametrize(
    ("require", "module", "extra"),
    [
        (extras.require_onnx, "onnx", "export"),
        (extras.require_onnx_ir, "onnx_ir", "export"),
        (extras.require_transformers_exporters, "onnxscript", "export"),
        (extras.require_genai, "onnxruntime_genai", "genai"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, require: Callable[[], ModuleType], module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExportError, match=f"{module} cannot be imported") as caught:
        require()
    assert caught.value.code == "extra-missing"
    assert caught.value.hint == f"pip install 'lora-deploy[{extra}]'"


@pytest.mark.parametrize(
    ("installed", "code"),
    [
        ({}, "extra-missing"),
        ({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"}, "extra-conflict"),
    ],
)
def test_exactly_one_onnxruntime_is_wanted(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], code: str
) -> None:
    monkeypatch.setattr(extras, "installed_version", installed.get)
    with pytest.raises(ExportError) as caught:
        extras.require_onnxruntime()
    assert caught.value.code == code
