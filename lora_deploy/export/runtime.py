"""Open exported graphs in onnxruntime, on the provider that they were made for.

Promise: a provider that did not load is an error; onnxruntime itself would fall back to the CPU without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_deploy.errors import ExportError
from lora_deploy.export.extras import require_onnxruntime

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_session(graph: Path, provider: str, n_threads: int | None = None) -> Any:  # noqa: ANN401 - an InferenceSession
    """Open a graph; ``n_threads`` None leaves that to onnxruntime.

    Raises:
        ExportError: onnxruntime is missing, does not have the provider, or refuses the graph.
    """
    runtime = require_onnxruntime()
    name = _PROVIDERS[provider]
    if name not in runtime.get_available_providers():
        raise ExportError(
            f"--provider {provider}: this onnxruntime has only {', '.join(runtime.get_available_providers())}",
            hint="pip install 'lora-deploy[gpu]' in place of [cpu]" if provider == "cuda" else None,
            code="provider-missing",
        )
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if n_threads is not None:
        options.intra_op_num_threads = n_threads
    try:
        session = runtime.InferenceSession(str(graph), options, providers=[name])
    except Exception as error:  # onnxruntime's own errors have no common class
        raise ExportError(f"{graph}: onnxruntime refuses it: {' '.join(str(error).split())[:500]}") from error
    if session.get_providers()[0] != name:
        raise ExportError(f"{graph}: onnxruntime did not load {name}, only {', '.join(session.get_providers())}")
    return session
