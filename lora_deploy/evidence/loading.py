"""Load a checkpoint as transformers does, in float32, from its folder alone.

Promise: nothing is fetched, no code of the checkpoint is run, no pickle is opened; tensors that the architecture wants
and the folder does not hold are told, never quietly invented.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import EvidenceError
from lora_deploy.evidence.forward import quiet_peers
from lora_deploy.pipeline_layout import CONFIG_NAME, index_name, plain_name

_STANDARD = "model.safetensors"


def load_model(folder: Path, architecture: str, **settings: object) -> tuple[nn.Module, frozenset[str]]:
    """Load a model for evaluation; give it with the names of parameters that the folder does not hold.

    ``settings`` replace those of its configuration, such as ``num_labels``.

    Raises:
        EvidenceError: transformers does not load it.
    """
    import transformers

    cls = getattr(transformers, architecture)
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet_peers():
            model, report = cls.from_pretrained(
                str(folder),
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
    except Exception as error:
        raise EvidenceError(f"{folder}: {architecture} does not load: {type(error).__name__}: {error}") from error
    finally:
        transformers.utils.logging.set_verbosity(level)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the same sums whatever the batch
    return model.eval(), frozenset(report["missing_keys"])


@contextmanager
def as_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """Give a folder that a library reads as this checkpoint: its own, or one of links.

    So it is where a lone file is meant, or a variant of a pipeline's component.
    """
    root, files = checkpoint.root, checkpoint.files
    plain = tuple(plain_name(file) for file in files)
    if plain != files:
        with tempfile.TemporaryDirectory(prefix="lora-deploy-") as made:
            _link_plainly(checkpoint, plain, Path(made))
            yield Path(made)
        return
    if "_class_name" in checkpoint.config:
        yield root
        return
    others = {path.name for path in root.glob("*.safetensors")} - set(files)
    if len(files) > 1 or (files == (_STANDARD,) and not (root / f"{_STANDARD}.index.json").exists()):
        yield root
        return
    if not others and (root / f"{_STANDARD}.index.json").exists():
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="lora-deploy-") as made:
        folder = Path(made)
        for path in root.glob("*.json"):
            if not path.name.endswith(".index.json"):
                (folder / path.name).symlink_to(path.resolve())
        (folder / _STANDARD).symlink_to((root / files[0]).resolve())
        yield folder


def _link_plainly(checkpoint: Checkpoint, names: Sequence[str], folder: Path) -> None:
    """Link a variant's files under the names that loaders look for when they are told nothing."""
    (folder / CONFIG_NAME).symlink_to((checkpoint.root / CONFIG_NAME).resolve())
    for name, file in zip(names, checkpoint.files, strict=True):
        (folder / name).symlink_to((checkpoint.root / file).resolve())
    if len(names) > 1:
        weights = {name: plain_name(spec.file) for name, spec in checkpoint.tensors.items()}
        (folder / index_name(names[0])).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
