"""Load a checkpoint as its library does, and say in our words what it cannot do.

Promise: every tensor of the model comes from the checkpoint; nothing runs on weights that were never stored.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from lora_deploy.errors import ExportError, LoraDeployError
from lora_deploy.export.extras import require_diffusers
from lora_deploy.tensors import DType

_MAX_CAUSE = 500


def load_model(folder: Path, dtype: DType) -> Any:  # noqa: ANN401 - a model of transformers or diffusers
    """Load the model that a folder's configuration names: by ``architectures``, or by ``_class_name`` (diffusers).

    Raises:
        ExportError: The library has no such class, or the weights lack some of its tensors.
    """
    from lora_deploy.rounding import torch_dtype

    config = json.loads((folder / "config.json").read_text())
    cls, key = _diffusers_class(config) if "_class_name" in config else _transformers_class(config)
    with about(cls.__name__):
        model, loading = cls.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, **{key: torch_dtype(dtype)}
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ExportError(
            f"{cls.__name__}: the weights lack {len(missing)} of its tensors, first {missing[0]}: "
            "the graph would run on random ones",
            hint="architectures in config.json may name a head that the weights do not have",
            code="weights-missing",
        )
    return model.eval()


def _transformers_class(config: Mapping[str, Any]) -> tuple[Any, str]:
    """Give the model's class, and what it calls the dtype to load in."""
    import transformers

    names = config.get("architectures") or []
    cls = getattr(transformers, str(names[0]), None) if names else None
    if cls is None:
        raise ExportError(
            f"config.json: architectures is {names or 'missing'}: no class of transformers {transformers.__version__}",
            hint="write the model's class into config.json, such as LlamaForCausalLM" if not names else None,
            code="unknown-architecture",
        )
    return cls, "dtype"


def _diffusers_class(config: Mapping[str, Any]) -> tuple[Any, str]:
    diffusers = require_diffusers()
    name = str(config["_class_name"])
    cls = getattr(diffusers, name, None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise ExportError(
            f"config.json: _class_name is {name}: no model of diffusers {diffusers.__version__}",
            code="unknown-architecture",
        )
    return cls, "torch_dtype"


@contextmanager
def about(what: str) -> Iterator[None]:
    """Turn whatever a library raises into our error, which names the component and the cause."""
    try:
        yield
    except LoraDeployError:
        raise
    except Exception as error:
        cause = " ".join(str(error.__cause__ or error).split())[:_MAX_CAUSE]
        raise ExportError(f"{what}: cannot be exported: {type(error).__name__}: {cause}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress off stdout, and their advice to developers to themselves."""
    from transformers.utils import logging as transformers_logging

    disabled, shows_bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.disable(disabled)
            if shows_bars:
                transformers_logging.enable_progress_bar()
