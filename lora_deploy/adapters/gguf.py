"""Adapters of llama.cpp: ``<tensor of the model>.lora_a`` and ``.lora_b`` in a GGUF file of type ``adapter``.

    weights     lora_a (r, in)      lora_b (out, r)
    embedding   lora_a (vocab, r)   lora_b (dim, r)      delta = s·lora_a·lora_b^T
    experts     lora_a (E, r, in)   lora_b (E, out, r)
    norms       the whole tensor, which llama.cpp itself does not use

s = alpha / r, or 1 where alpha is 0. The converter writes one alpha: rank-stabilised scales and patterns of the PEFT
folder it came from are lost in it. It also brings rows of query and key projections into rotary pairs where it does so
with the model's own, which the architecture tells; an architecture that is not known here is not guessed.

Names are llama.cpp's. Each may mean several names of transformers, and the base has one of them.
Source: llama.cpp of 2026, ``convert_lora_to_gguf.py``, ``conversion/`` and ``src/llama-adapter.cpp``; gguf 0.19,
``tensor_mapping.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import ClassVar

from lora_deploy.adapter import Adapter, BaseHint, ModuleUpdate, Orientation, RowOrder
from lora_deploy.adapters.factors import check_finite, factor, low_rank
from lora_deploy.adapters.findings import note, untrained, warn
from lora_deploy.adapters.interface import AdapterFile, Container, ReadOptions
from lora_deploy.errors import Finding, MalformedAdapterError, UnmergeableAdapterError
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement

_FACTOR = re.compile(r"(?P<tensor>.+)\.(?P<slot>lora_[ab])$")
_BLOCK = re.compile(r"^(?:blk|enc\.blk|dec\.blk)\.(\d+)\.")
_QUERY_OR_KEY = re.compile(r"\.attn_[qk]\.(weight|bias)$")
_EXPERTS = re.compile(r"\.experts\.(?P<projection>\w+)$")
_PAIRED = frozenset(
    {
        *("llama", "deci", "minicpm", "baichuan", "xverse", "granite", "granitemoe", "granitehybrid", "smollm3"),
        *("arcee", "mistral3", "olmo"),
    }
)
"""Architectures whose converter pairs the rows of q and k."""
_AS_TRANSFORMERS = frozenset(
    {
        *("qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "gemma3n", "phi2", "phi3"),
        *("stablelm", "starcoder2", "gpt2", "olmo2", "olmoe", "command-r", "cohere2", "bert", "t5", "t5encoder"),
        *("gpt-oss", "nemotron", "llama4"),
    }
)
"""Architectures whose converter leaves them as they are."""
_REORDERED_QKV = frozenset({"bloom", "falcon", "gptneox", "internlm2", "chatglm", "jais"})
"""Architectures whose converter takes a fused q, k, v apart and puts it together in another order."""


class GgufReader:
    """Reads what ``convert_lora_to_gguf.py`` writes."""

    format = "gguf"
    containers: ClassVar[frozenset[Container]] = frozenset({"gguf"})

    def recognises(self, file: AdapterFile) -> bool:
        """Whether the file is a GGUF file: what else such a file can be is said when it is read."""
        return file.container == "gguf"

    def read(self, file: AdapterFile, options: ReadOptions) -> Adapter:
        """Turn the file into updates.

        Raises:
            MalformedAdapterError: Not an adapter, no alpha, or factors that do not fit.
            UnmergeableAdapterError: aLoRA, or rows in an order that is not known here.
        """
        reading = _Reading(file=file, options=options)
        updates = tuple(reading.updates())
        return Adapter(
            path=file.path,
            name=file.name,
            format=self.format,
            base_hint=BaseHint(name=_base(file.metadata)),
            updates=updates,
            findings=(*untrained(updates), *reading.findings(updates)),
            sha256=file.sha256,
        )


READER = GgufReader()


def _base(metadata: Mapping[str, str]) -> str | None:
    """Name the model repository that the converter noted, if it did."""
    url = metadata.get("general.base_model.0.repo_url", "")
    found = re.match(r"https://huggingface\.co/([\w.-]+/[\w.-]+)$", url)
    return found[1] if found else None


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """One pass over one file."""

    file: AdapterFile
    options: ReadOptions

    def updates(self) -> Iterator[ModuleUpdate]:
        self._check_kind()
        pairs: dict[str, dict[str, str]] = {}
        for key in self.file.tensors:
            match = _FACTOR.match(key)
            if match is None:
                yield self._whole(key)
            else:
                pairs.setdefault(match["tensor"], {})[match["slot"]] = key
        if not pairs:
            raise MalformedAdapterError(f"{self.file.path}: holds no lora_a and lora_b")
        for tensor, slots in pairs.items():
            if slots.keys() != {"lora_a", "lora_b"}:
                raise MalformedAdapterError(f"{self.file.path}: {tensor}: has only {next(iter(slots))}")
            yield from self._pair(tensor, slots["lora_a"], slots["lora_b"])

    def _check_kind(self) -> None:
        told = self.file.metadata
        kind, adapter_kind = told.get("general.type"), told.get("adapter.type")
        if kind != "adapter" or adapter_kind != "lora":
            raise MalformedAdapterError(
                f"{self.file.path}: general.type {kind!r}, adapter.type {adapter_kind!r}: expected 'adapter', 'lora'",
                hint="a GGUF model is a base: --base with --dequantize",
            )
        if "adapter.alora.invocation_tokens" in told:
            raise UnmergeableAdapterError(f"{self.file.path}: aLoRA is active only after its invocation tokens")

    def _pair(self, tensor: str, down_key: str, up_key: str) -> Iterator[ModuleUpdate]:
        down, up = (factor(self.file, key, n_dims=(2, 3)) for key in (down_key, up_key))
        keys, scale = (down_key, up_key), self._scale(int(up.shape[-1]))
        if up.ndim == 3 or down.ndim == 3:
            if down.ndim != up.ndim or down.shape[0] != up.shape[0] or down.shape[1] != up.shape[2]:
                raise MalformedAdapterError(
                    f"{self.file.path}: {tensor}: lora_a {tuple(down.shape)} and lora_b {tuple(up.shape)} are not "
                    "(experts, r, in) and (experts, out, r)"
                )
            for e in range(len(up)):
                yield self._update(tensor, LowRank(down=down[e], up=up[e], scale=scale), keys, Orientation.STORED, e)
            return
        if tensor == "token_embd.weight":
            turned = low_rank(self.file, tensor, up.T, down, scale)
            yield self._update(tensor, turned, keys, Orientation.STORED)
            return
        yield self._update(tensor, low_rank(self.file, tensor, down, up, scale), keys, Orientation.UNKNOWN)

    def _whole(self, key: str) -> ModuleUpdate:
        values = self.file.tensors[key]
        if not values.numel() or not values.is_floating_point():
            raise MalformedAdapterError(f"{self.file.path}: {key}: is neither lora_a nor lora_b, nor a whole tensor")
        check_finite(self.file, key)
        if self._architecture.startswith("gemma") and key.endswith("_norm.weight"):
            values = values - 1  # the converter adds 1 to Gemma's norms
        return self._update(key, Replacement(values=values), (key,), Orientation.STORED)

    def _update(
        self,
        tensor: str,
        update: LowRank | Replacement,
        keys: tuple[str, ...],
        orientation: Orientation,
        expert: int | None = None,
    ) -> ModuleUpdate:
        return ModuleUpdate(
            target=tensor if expert is None else f"{tensor}[{expert}]",
            update=update,
            orientation=orientation,
            alternatives=self._names(tensor, expert),
            row_order=self._row_order(tensor),
            keys=keys,
        )

    def _row_order(self, tensor: str) -> RowOrder:
        architecture = self._architecture
        if ".attn_qkv." in tensor and architecture in _REORDERED_QKV:
            raise UnmergeableAdapterError(
                f"{self.file.path}: {tensor}: llama.cpp's converter reorders the fused q, k, v of {architecture}",
                hint="merge the adapter that it was converted from",
            )
        if not _QUERY_OR_KEY.search(tensor):
            return RowOrder.STORED
        if architecture not in _PAIRED | _AS_TRANSFORMERS:
            raise UnmergeableAdapterError(
                f"{self.file.path}: {tensor}: whether llama.cpp's converter reorders the rows of {architecture}'s "
                "q and k is not known here",
                hint="merge the adapter that it was converted from",
            )
        return RowOrder.PAIRED if architecture in _PAIRED else RowOrder.STORED

    @cached_property
    def _architecture(self) -> str:
        return self.file.metadata.get("general.architecture", "")

    @cached_property
    def _names_by_tensor(self) -> Mapping[str, tuple[str, ...]]:
        """Names of transformers (and of other libraries) by llama.cpp's, both without suffix."""
        import gguf

        architectures = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
        architecture = architectures.get(self._architecture)
        if architecture is None:
            raise MalformedAdapterError(
                f"{self.file.path}: general.architecture {self._architecture!r} is none of gguf "
                f"{getattr(gguf, '__version__', '')}".rstrip()
            )
        blocks = [int(match[1]) for key in self.file.tensors if (match := _BLOCK.match(key))]
        found: dict[str, list[str]] = {}
        for name, (_, tensor) in gguf.get_tensor_name_map(architecture, max(blocks, default=0) + 1).mapping.items():
            if name != tensor:
                found.setdefault(tensor, []).append(name)
        return {tensor: tuple(names) for tensor, names in found.items()}

    def _names(self, tensor: str, expert: int | None) -> tuple[str, ...]:
        stem, _, suffix = tensor.rpartition(".")
        names = self._names_by_tensor.get(stem)
        if names is None:
            raise MalformedAdapterError(
                f"{self.file.path}: {tensor}: is no tensor of llama.cpp's {self._architecture} models"
            )
        if expert is None:
            return tuple(f"{name}.{suffix}" for name in names)
        return tuple(
            _EXPERTS.sub(rf".experts.{expert}.\g<projection>", name) + f".{suffix}"
            for name in names
            if _EXPERTS.search(name)
        )

    def _scale(self, rank: int) -> Scale:
        if self.options.alpha is not None:
            return Scale(
                factor=Fraction(self.options.alpha) / rank, source=f"--alpha {self.options.alpha:g} / r {rank}"
            )
        alpha = self._alpha
        if alpha is None:
            raise MalformedAdapterError(f"{self.file.path}: names no adapter.lora.alpha", code="alpha-unknown")
        if not alpha:
            return Scale(factor=Fraction(1), source="1: adapter.lora.alpha is 0")
        return Scale(factor=Fraction(alpha) / rank, source=f"adapter.lora.alpha {alpha:g} / r {rank}")

    @cached_property
    def _alpha(self) -> float | None:
        text = self.file.metadata.get("adapter.lora.alpha")
        if text is None:
            return None
        try:
            alpha = float(text)
        except ValueError:
            alpha = math.nan
        if not math.isfinite(alpha):
            raise MalformedAdapterError(f"{self.file.path}: adapter.lora.alpha: found {text!r}, expected a number")
        return alpha

    def findings(self, updates: tuple[ModuleUpdate, ...]) -> Iterator[Finding]:
        if self.options.alpha is not None and self._alpha is not None:
            message = f"--alpha {self.options.alpha:g} is used instead of the file's own {self._alpha:g}"
            yield warn("alpha-overridden", self.file.path.name, message)
        config = self.file.config or {}
        lost = [name for name in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(name)]
        if lost:
            message = f"the configuration beside it has {', '.join(lost)}: the converter writes one alpha, without them"
            yield warn("scale-lost", "adapter_config.json", message)
        ranks = {update.update.rank for update in updates if isinstance(update.update, LowRank)}
        if len(ranks) > 1:
            listed = ", ".join(map(str, sorted(ranks)))
            yield warn(
                "ranks-differ", self.file.path.name, f"ranks {listed} under one alpha: patterns of alpha are lost"
            )
        whole = [update.target for update in updates if isinstance(update.update, Replacement)]
        if whole:
            yield note(
                "saved-unlisted", whole[0], f"{len(whole)} whole tensors replace the base's; llama.cpp skips them"
            )
