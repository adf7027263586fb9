"""A transformers model without its weights, and the weights of any of its parts: for models larger than memory.

A *part* is what runs at one go: a block of the model's layer list (what transformers says is not to be split), or a
layer outside of the blocks (embedding, last norm, head). Promise: parts are loaded by transformers' own loader, which
renames, stacks and transposes as it does for a whole model, in float32; of the model only one part is ever in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import EvidenceError
from lora_deploy.evidence.forward import quiet_peers
from lora_deploy.evidence.loading import as_folder
from lora_deploy.export.sources import mapped

_FLOAT32_BYTES = 4


def empty_model(checkpoint: Checkpoint, architecture: str) -> nn.Module:
    """Build a checkpoint's model on the meta device; only buffers that it computes itself have values.

    Raises:
        EvidenceError: transformers does not build it.
    """
    import transformers

    cls: Any = getattr(transformers, architecture)
    try:
        with quiet_peers(), as_folder(checkpoint) as folder:
            config = cls.config_class.from_pretrained(str(folder), local_files_only=True)
            with ExitStack() as stack:
                for context in cls.get_init_context(torch.float32, False, False, None):  # noqa: FBT003 - not ours
                    stack.enter_context(context)
                model = cls(copy.deepcopy(config))
            # As transformers does after loading: buffers that no checkpoint holds (rotary frequencies) are computed.
            model._move_missing_keys_from_meta_to_device(set(), None, None, None)
            model._initialize_missing_keys(False)  # noqa: FBT003 - as above
            model.tie_weights()
            if hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("eager")  # the same sums whatever the batch
    except Exception as error:
        raise EvidenceError(f"{architecture} cannot be built in parts: {type(error).__name__}: {error}") from error
    return model.eval()  # type: ignore[no-any-return]


def parts_of(model: nn.Module) -> tuple[str, ...]:
    """Name the parts of a model, outermost first; what a parent of parts owns itself belongs to none."""
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    return tuple(_parts(model, "", unsplit))


def _parts(module: nn.Module, name: str, unsplit: set[str]) -> Iterator[str]:
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        is_block = type(child).__name__ in unsplit or isinstance(module, nn.ModuleList)
        if is_block or not any(True for _ in child.children()):
            if any(True for _ in child.parameters()):
                yield path
        else:
            yield from _parts(child, path, unsplit)


class Skeleton:
    """A model on the meta device with the checkpoint that its parts are read from."""

    def __init__(self, checkpoint: Checkpoint, architecture: str) -> None:
        """Build the model and find which tensors make which part.

        Raises:
            EvidenceError: transformers does not build it.
        """
        self.model = empty_model(checkpoint, architecture)
        self.parts = parts_of(self.model)
        self._checkpoint = checkpoint
        self._tied: Mapping[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping

            self._mapping = get_model_conversion_mapping(self.model)  # type: ignore[arg-type]
            self._targets = self._find_targets()
        except (ImportError, TypeError) as error:
            raise EvidenceError(f"transformers does not load {architecture} in parts: {error}") from error

    def _find_targets(self) -> dict[str, str]:
        """Name the first parameter that each stored tensor goes into, as transformers' loader does."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        known, prefix = self.model.state_dict(), str(getattr(self.model, "base_model_prefix", ""))
        found = {}
        for name in self._checkpoint.tensors:
            target, _ = rename_source_key(name, renamings, converters, prefix, known)
            if target not in known and name in known:
                target = name
            found[name] = target
        return found

    def part_of(self, tensor: str) -> str | None:
        """Name the part that a stored tensor belongs to; None for what no part owns, or the model does not have."""
        target = f"{self._targets.get(tensor, '')}."
        return next((part for part in self.parts if target.startswith(f"{part}.")), None)

    @property
    def head(self) -> str | None:
        """Name the part whose output is the model's logits; None where there is none."""
        found = getattr(self.model, "get_output_embeddings", lambda: None)()
        return next((part for part in self.parts if self.model.get_submodule(part) is found), None)

    @property
    def largest_bytes(self) -> int:
        """Size of the largest part in float32."""
        sizes = (sum(p.numel() for p in self.model.get_submodule(part).parameters()) for part in self.parts)
        return _FLOAT32_BYTES * max(sizes, default=0)

    def read(self, part: str) -> dict[str, Tensor]:
        """Read a part's parameters, by their names in the model, float32, each in memory of its own.

        Raises:
            EvidenceError: The checkpoint lacks one, or has it in another shape.
        """
        module = self.model.get_submodule(part)
        return self._read({f"{part}.{name}" for name in module.state_dict()})

    def read_rest(self) -> dict[str, Tensor]:
        """Read what no part owns: parameters of the parents of parts, such as a class token.

        Raises:
            EvidenceError: As ``read``.
        """
        owned = tuple(f"{part}." for part in self.parts)
        return self._read({name for name in self.model.state_dict() if not name.startswith(owned)})

    def _read(self, wanted: set[str]) -> dict[str, Tensor]:
        stored = set(self._targets.values())
        sources = {name: name if name in stored else self._tied.get(name, name) for name in wanted}
        owners = {name.rpartition(".")[0] for name in sources.values()}
        before = {name: tensor for name, tensor in _owned(self.model) if name.rpartition(".")[0] in owners}
        state = {
            name: self._floats(name)
            for name, target in self._targets.items()
            if target.rpartition(".")[0] in owners and target in before
        }
        try:
            self._load(state)
            loaded = dict(_owned(self.model))
            values = {name: loaded[source].detach() for name, source in sources.items()}
        finally:
            for name, tensor in before.items():
                _put(self.model, name, tensor)
        lost = sorted(name for name, value in values.items() if value.is_meta)
        if lost:
            raise EvidenceError(f"{self._checkpoint.root}: lacks {len(lost)} parameters, first {lost[0]}")
        return values

    def _load(self, state: dict[str, Tensor]) -> None:
        """Have transformers put stored tensors where they belong."""
        try:
            from transformers.core_model_loading import convert_and_load_state_dict_in_model
            from transformers.modeling_utils import LoadStateDictConfig

            mapping: Any = copy.deepcopy(self._mapping)
            config = LoadStateDictConfig(dtype=torch.float32, weight_mapping=mapping)
            with quiet_peers(), _no_bars():
                found, _ = convert_and_load_state_dict_in_model(self.model, state, config)  # type: ignore[arg-type]
        except Exception as error:  # what transformers' code raises has no common class
            problem = f"{type(error).__name__}: {error}"
            raise EvidenceError(f"{self._checkpoint.root}: cannot be loaded in parts: {problem}") from error
        if found.mismatched_keys or found.conversion_errors:
            problem = [*found.mismatched_keys, *found.conversion_errors][0]
            raise EvidenceError(f"{self._checkpoint.root}: cannot be loaded: {problem}")

    def _floats(self, name: str) -> Tensor:
        """A stored tensor in memory of its own: kernels may depend on how a mapped file is aligned."""
        values = mapped(self._checkpoint, name)
        return values.to(torch.float32, copy=True) if values.is_floating_point() else values.clone()


def _owned(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, one that is shared under each of its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, attribute, tensor)


@contextmanager
def placed(module: nn.Module, tensors: Mapping[str, Tensor], name_of: Callable[[str], str] = str) -> Iterator[None]:
    """Let a module have these values while the block runs; ``name_of`` says what its own names are in ``tensors``.

    What the module has and ``tensors`` lack stays.
    """
    before = [(name, tensor) for name, tensor in _owned(module) if name_of(name) in tensors]
    try:
        for name, tensor in before:
            value = tensors[name_of(name)]
            is_parameter = isinstance(tensor, nn.Parameter)
            _put(module, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)
        yield
    finally:
        for name, tensor in before:
            _put(module, name, tensor)


@contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
