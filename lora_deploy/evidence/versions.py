"""Versions of what computes outputs and times."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("torch", "transformers", "peft", "onnxruntime", "onnxruntime-gpu")


def versions() -> dict[str, str]:
    """Versions by package, of those that are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
