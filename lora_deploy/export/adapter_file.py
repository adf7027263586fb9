"""Files that onnxruntime exchanges adapters with: ``NAME.onnx_adapter``, a value for each LoRA input.

Promise: the same factors give the same bytes (parameters are written in the order of their names).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_deploy.artifact import Artifact
from lora_deploy.errors import ExportError, MalformedAdapterError
from lora_deploy.export.drawn import onnx_type
from lora_deploy.export.extras import require_onnxruntime
from lora_deploy.merge.shard import bytes_of
from lora_deploy.rounding import dtype_of
from lora_deploy.safetensors_file import write_file
from lora_deploy.tensors import DType

SUFFIX = ".onnx_adapter"
_VERSION = 1
"""Of adapter and model, as the format wants to know; onnxruntime compares neither."""
_NUMPY_TYPES = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "uint16"}


def write_adapter(path: Path, parameters: Mapping[str, Tensor]) -> Artifact:
    """Write values by input name, whole or not at all.

    Raises:
        ExportError: onnxruntime is missing, or refuses them.
        DiskSpaceError, MergeError: The file cannot be written.
    """
    import numpy as np

    runtime = require_onnxruntime()
    # Held until the file is written: an OrtValue does not own the array that it is made of.
    arrays = {
        name: np.frombuffer(bytes_of(values), _NUMPY_TYPES[dtype_of(values)]).reshape(tuple(values.shape))
        for name, values in sorted(parameters.items())
    }
    kinds = {name: int(onnx_type(dtype_of(values))) for name, values in parameters.items()}
    make = runtime.OrtValue.ortvalue_from_numpy_with_onnx_type
    file = runtime.AdapterFormat()
    file.set_adapter_version(_VERSION)
    file.set_model_version(_VERSION)
    file.set_parameters({name: make(array, kinds[name]) for name, array in arrays.items()})
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".adapter-") as folder:
        made = Path(folder) / path.name
        try:
            file.export_adapter(str(made))
            content = made.read_bytes()
        except Exception as error:  # onnxruntime's own errors have no common class
            raise ExportError(f"{path}: onnxruntime cannot write it: {' '.join(str(error).split())}") from error
    del arrays
    return write_file(path, b"", [memoryview(content)], root=path.parent)


def read_values(path: Path) -> dict[str, Any]:
    """Read a file's parameters by name, as values of onnxruntime.

    Raises:
        MalformedAdapterError: It is no such file.
        ExportError: onnxruntime is missing.
    """
    runtime = require_onnxruntime()
    try:
        return dict(runtime.AdapterFormat.read_adapter(str(path)).get_parameters())
    except Exception as error:  # onnxruntime's own errors have no common class
        reason = " ".join(str(error).split())[:300]
        raise MalformedAdapterError(f"{path}: is no adapter of onnxruntime: {reason}") from error


def read_ports(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read type (such as ``tensor(float)``) and shape of every parameter of a file, by name.

    Raises:
        MalformedAdapterError: It is no such file.
        ExportError: onnxruntime is missing.
    """
    return {
        name: (str(value.data_type()), tuple(int(size) for size in value.shape()))
        for name, value in sorted(read_values(path).items())
    }
