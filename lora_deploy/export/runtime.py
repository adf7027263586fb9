"""Open graphs in onnxruntime on one provider; everything that runs graphs here goes through this.

Promise: a provider that did not load is an error, at loading and at running: onnxruntime itself would fall back to the
CPU without a word. Float32 means float32: TensorFloat-32 is off. Nodes that the provider leaves to another are known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_deploy.errors import ExportError
from lora_deploy.export.extras import require_onnxruntime

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
}
SETTINGS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""What a provider is told, by its full name."""
DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
"""Where a provider keeps tensors, as onnxruntime calls it; the others are fed from the CPU."""
MISSING, FELL_BACK = "provider-missing", "provider-not-loaded"
"""Codes of the errors that say that a provider does not run here."""
_HINTS = {"cuda": "pip install 'lora-deploy[gpu]' in place of [cpu]"}
_QUIET = 3
"""onnxruntime logs errors and nothing less."""


def open_session(graph: Path, provider: str, n_threads: int | None = None) -> Any:  # noqa: ANN401 - an InferenceSession
    """Open a graph; ``provider`` is a name in ``PROVIDERS``, ``n_threads`` None leaves that to onnxruntime.

    Raises:
        ExportError: onnxruntime is missing, does not have or load the provider, or refuses the graph.
    """
    runtime = require_onnxruntime()
    name = PROVIDERS[provider]
    available = runtime.get_available_providers()
    if name not in available:
        raise ExportError(
            f"{name} is not in this onnxruntime, which has {', '.join(available)}",
            hint=_HINTS.get(provider, "install the build of onnxruntime that has it"),
            code=MISSING,
        )
    try:
        session = runtime.InferenceSession(
            str(graph), sess_options=_options(runtime, n_threads), providers=[(name, SETTINGS.get(name, {}))]
        )
    except Exception as error:  # onnxruntime's own errors have no common class
        raise ExportError(f"{graph}: onnxruntime does not load it: {' '.join(str(error).split())[:500]}") from error
    if session.get_providers()[0] != name:
        found = session.get_providers()[0]
        raise ExportError(f"{graph}: {name} did not load, onnxruntime fell back to {found}", code=FELL_BACK)
    session.disable_fallback()  # a kernel that fails would put the whole graph on the CPU, and succeed there
    return session


def _options(runtime: Any, n_threads: int | None) -> Any:  # noqa: ANN401 - a package without types
    options = runtime.SessionOptions()
    options.log_severity_level = _QUIET
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if n_threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
