"""Optional packages: imported where they are needed, and named plainly where they are missing or in each other's way.

Promise: a missing package is an ``ExportError`` that says what to install, never an ``ImportError``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from lora_deploy.errors import ExportError

_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def require_onnx() -> ModuleType:
    """Import onnx.

    Raises:
        ExportError: It is not installed.
    """
    return _require("onnx", "export")


def require_onnx_ir() -> ModuleType:
    """Import onnx_ir, which comes with onnxscript.

    Raises:
        ExportError: It is not installed.
    """
    return _require("onnx_ir", "export")


def require_onnxruntime() -> ModuleType:
    """Import onnxruntime, installed by exactly one of its two packages.

    Raises:
        ExportError: Neither is installed, or both are: they install the same module, and which wins is chance.
    """
    installed = [name for name in _RUNTIMES if installed_version(name) is not None]
    if not installed:
        raise ExportError(
            "onnxruntime is not installed: found neither onnxruntime nor onnxruntime-gpu",
            hint="pip install 'lora-deploy[cpu]', or 'lora-deploy[gpu]' on a machine with CUDA",
            code="extra-missing",
        )
    if len(installed) > 1:
        raise ExportError(
            "onnxruntime and onnxruntime-gpu are both installed: they overwrite each other's files",
            hint="pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
            code="extra-conflict",
        )
    return _require("onnxruntime", "cpu")


def require_genai() -> ModuleType:
    """Import onnxruntime-genai.

    Raises:
        ExportError: It is not installed.
    """
    return _require("onnxruntime_genai", "genai")


def require_diffusers() -> ModuleType:
    """Import diffusers.

    Raises:
        ExportError: It is not installed.
    """
    return _require("diffusers", "diffusers")


def require_transformers_exporters() -> ModuleType:
    """Import the exporters of transformers, with all that they need.

    Raises:
        ExportError: transformers, onnx or onnxscript is missing, or transformers is too old to have exporters.
    """
    for name in ("transformers", "onnx", "onnxscript"):
        _require(name, "export")
    try:
        return import_module("transformers.exporters")
    except ImportError as error:
        raise ExportError(
            f"transformers {installed_version('transformers')} has no exporters: {error}",
            hint="pip install 'transformers>=5.23'",
            code="extra-missing",
        ) from error


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _require(name: str, extra: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ExportError(
            f"{name} cannot be imported: {error}", hint=f"pip install 'lora-deploy[{extra}]'", code="extra-missing"
        ) from error
