"""Adapters of litgpt: ``lit_model.pth.lora`` with ``hyperparameters.yaml`` and ``model_config.yaml`` beside it.

    qkv      lora_A (r·n, in)   lora_B (rows of the n adapted parts, r)     in the order q, k, v of those adapted
    others   lora_A (r, in)     lora_B (out, r)

s = lora_alpha / lora_r. Which parts of the fused projection are adapted, ``hyperparameters.yaml`` says; how many rows
each has, ``model_config.yaml``. litgpt stores [q; k; v]; bases that keep them apart get an update each, those that keep
them in one weight, group by group (GPT-NeoX, Falcon), get the rows in their order.

Files of before 2025 (``attn.attn``) had another order of rows, which is refused.
Source: litgpt 0.5.13, ``lora.py`` and ``scripts/convert_lit_checkpoint.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lora_deploy.adapter import Adapter, BaseHint, ModuleUpdate
from lora_deploy.adapters.alpha import missing_alpha
from lora_deploy.adapters.factors import factor, low_rank
from lora_deploy.adapters.findings import untrained, warn
from lora_deploy.adapters.interface import AdapterFile, ReadOptions
from lora_deploy.artifact import cached_sha256
from lora_deploy.checkpoint import contained_path
from lora_deploy.errors import Finding, MalformedAdapterError, MalformedCheckpointError, UnmergeableAdapterError
from lora_deploy.updates.interface import Scale

HYPERPARAMETERS, MODEL_CONFIG = "hyperparameters.yaml", "model_config.yaml"
_MAX_YAML_BYTES = 1 << 20
_KEY = re.compile(
    r"^(?:(?P<layer>transformer\.h\.\d+)\.(?P<part>attn\.qkv|attn\.proj|mlp\.(?:experts\.\d+\.)?(?:fc|fc_1|fc_2|proj)|mlp\.gate)"
    r"|(?P<head>lm_head))\.(?P<slot>lora_[AB])$"
)
_ANY = re.compile(r"^transformer\.h\.\d+\.(?:attn\.(?:qkv|attn)\.lora_A|.*\.linear\.weight)$")
_LEGACY = ".attn.attn."
_QKV = "attn.qkv"
_NAMES: Mapping[str, tuple[str, ...]] = {
    "attn.proj": (
        "model.layers.{}.self_attn.o_proj",
        "model.layers.{}.self_attn.dense",
        "transformer.h.{}.self_attention.dense",
        "gpt_neox.layers.{}.attention.dense",
    ),
    "mlp.gate": ("model.layers.{}.mlp.gate",),
    "mlp.fc_1": ("model.layers.{}.mlp.gate_proj",),
    "mlp.fc_2": ("model.layers.{}.mlp.up_proj",),
    "mlp.fc": (
        "model.layers.{}.mlp.fc1",
        "transformer.h.{}.mlp.dense_h_to_4h",
        "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    ),
    "mlp.proj": (
        "model.layers.{}.mlp.down_proj",
        "model.layers.{}.mlp.fc2",
        "transformer.h.{}.mlp.dense_4h_to_h",
        "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    ),
}
"""Names that transformers has for litgpt's, by family."""
_EXPERTS = {"fc_1": "gate_proj", "fc_2": "up_proj", "proj": "down_proj"}
_SEPARATE = tuple(f"model.layers.{{}}.self_attn.{side}_proj" for side in "qkv")
_BY_GROUP = ("transformer.h.{}.self_attention.query_key_value", "gpt_neox.layers.{}.attention.query_key_value")


class LitgptReader:
    """Reads what ``litgpt finetune_lora`` saves."""

    format = "litgpt"

    def recognises(self, file: AdapterFile) -> bool:
        """Whether the names are litgpt's."""
        return is_litgpt(file)

    def read(self, file: AdapterFile, options: ReadOptions) -> Adapter:
        """Turn the file into updates.

        Raises:
            MalformedAdapterError: A key that is not litgpt's, one without its other, or a setting that is missing.
            UnmergeableAdapterError: The order of rows of older releases, or base weights in the same file.
            NonFiniteTensorError: A tensor holds a NaN or an infinity.
        """
        reading = _Reading(file=file, options=options)
        updates = tuple(reading.updates())
        path = file.path.parent / HYPERPARAMETERS
        return Adapter(
            path=file.path,
            name=file.path.parent.name if file.name == "lit_model.pth" else file.name,
            format=self.format,
            base_hint=BaseHint(name=reading.base),
            updates=updates,
            findings=(*untrained(updates), *reading.findings()),
            sha256=file.sha256,
            config_sha256=cached_sha256(path) if reading.hyperparameters else None,
            config_name=HYPERPARAMETERS,
            config=reading.hyperparameters,
        )


READER = LitgptReader()


def is_litgpt(file: AdapterFile) -> bool:
    """Whether a file's names are litgpt's: a hand-written module could only by chance have one of them."""
    return any(_ANY.match(key) or ((match := _KEY.match(key)) and not match["head"]) for key in file.tensors)


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """How the rows of a fused projection divide."""

    n_heads: int
    n_groups: int
    size: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v."""
        return self.n_heads * self.size, self.n_groups * self.size, self.n_groups * self.size

    def by_group(self) -> Tensor:
        """Indices of [q; k; v] in the order q…, k, v of each group: (n_rows,) int64."""
        n_query, n_key, _ = self.rows
        query, key, value = torch.arange(sum(self.rows)).split(self.rows)
        parts = [query.reshape(self.n_groups, -1), key.reshape(self.n_groups, -1), value.reshape(self.n_groups, -1)]
        assert n_query % self.n_groups == 0 == n_key % self.n_groups  # noqa: S101 - checked when it was made
        return torch.cat(parts, dim=1).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """One pass over one file."""

    file: AdapterFile
    options: ReadOptions

    @cached_property
    def hyperparameters(self) -> Mapping[str, Any]:
        return _read_yaml(self.file.path.parent, HYPERPARAMETERS)

    @cached_property
    def model(self) -> Mapping[str, Any]:
        return _read_yaml(self.file.path.parent, MODEL_CONFIG)

    @cached_property
    def base(self) -> str | None:
        hub = self.model.get("hf_config")
        if isinstance(hub, Mapping) and hub.get("org") and hub.get("name"):
            return f"{hub['org']}/{hub['name']}"
        return None

    def updates(self) -> Iterator[ModuleUpdate]:
        modules: dict[str, dict[str, str]] = {}
        for key in self.file.tensors:
            match = _KEY.match(key)
            if match is None:
                raise self._not_ours(key)
            modules.setdefault(key.rpartition(".")[0], {})[match["slot"]] = key
        for module, slots in modules.items():
            if slots.keys() != {"lora_A", "lora_B"}:
                raise self._malformed(module, f"has only {next(iter(slots))}")
            down, up = (factor(self.file, slots[slot], n_dims=(2,)) for slot in ("lora_A", "lora_B"))
            keys = (slots["lora_A"], slots["lora_B"])
            if module.endswith(_QKV):
                yield from self._fused(module, down, up, keys)
            else:
                yield self._update(_names(module), module, down, up, keys, int(up.shape[1]))

    def _not_ours(self, key: str) -> MalformedAdapterError | UnmergeableAdapterError:
        if _LEGACY in key:
            return UnmergeableAdapterError(
                f"{self.file.path}: {key}: an older release of litgpt, which mixes rows of q, k and v by group",
                hint="train it again with a litgpt whose key says attn.qkv",
            )
        if key.endswith((".linear.weight", ".linear.bias")):
            return UnmergeableAdapterError(
                f"{self.file.path}: {key}: base weights lie in the same file",
                hint="litgpt finetune_lora saves factors alone, as lit_model.pth.lora",
            )
        return self._malformed(key, "is no factor of litgpt's")

    def _update(
        self,
        names: tuple[str, ...],
        module: str,
        down: Tensor,
        up: Tensor,
        keys: tuple[str, ...],
        rank: int | None = None,
    ) -> ModuleUpdate:
        update = low_rank(self.file, module, down, up, self._scale(module, rank or int(up.shape[1])))
        first, *others = (f"{name}.weight" for name in names)
        return ModuleUpdate(target=first, update=update, alternatives=tuple(others), keys=keys)

    def _fused(self, module: str, down: Tensor, up: Tensor, keys: tuple[str, ...]) -> Iterator[ModuleUpdate]:
        heads, enabled = self._heads(module), self._enabled(module)
        rank = int(up.shape[1])
        rows = [n for n, is_on in zip(heads.rows, enabled, strict=True) if is_on]
        if down.shape[0] != rank * len(rows) or up.shape[0] != sum(rows):
            told = ",".join("T" if part else "F" for part in enabled)
            raise self._malformed(
                module,
                f"lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} are not of the parts {told} of "
                f"{heads.n_heads} heads in {heads.n_groups} groups of {heads.size}",
            )
        layer = _layer(module)
        pairs = list(zip(down.split(rank), up.split(rows), strict=True))
        if self._family in {"by-group", "stacked"}:
            dense = torch.zeros(sum(heads.rows), down.shape[0], dtype=up.dtype)
            starts = [start for start, is_on in zip(_starts(heads.rows), enabled, strict=True) if is_on]
            for k, (start, (_, part)) in enumerate(zip(starts, pairs, strict=True)):
                dense[start : start + len(part), k * rank : (k + 1) * rank] = part
            names = _BY_GROUP if self._family == "by-group" else ("model.layers.{}.self_attn.qkv_proj",)
            dense = dense[heads.by_group()] if self._family == "by-group" else dense
            yield self._update(tuple(name.format(layer) for name in names), module, down, dense, keys, rank)
            return
        targets = [name.format(layer) for name, is_on in zip(_SEPARATE, enabled, strict=True) if is_on]
        for target, (part_down, part_up) in zip(targets, pairs, strict=True):
            yield self._update((target,), module, part_down, part_up, keys, rank)

    @cached_property
    def _family(self) -> str:
        """How the base keeps q, k and v: separate, stacked in one weight, or mixed group by group."""
        name = str(self.model.get("name", "")).lower()
        if name.startswith(("phi-3", "phi-4")):
            return "stacked"
        is_neox = self.model.get("mlp_class_name") == "GptNeoxMLP" and not name.startswith("phi")
        return "by-group" if is_neox else "separate"

    def _heads(self, module: str) -> _Heads:
        n_heads = self._count(module, "n_head")
        n_groups = self._count(module, "n_query_groups", n_heads)
        size = self._count(module, "head_size", self._count(module, "n_embd") // n_heads)
        if n_heads % n_groups:
            raise self._malformed(MODEL_CONFIG, f"{n_heads} heads in {n_groups} groups")
        return _Heads(n_heads=n_heads, n_groups=n_groups, size=size)

    def _count(self, module: str, name: str, default: int | None = None) -> int:
        value = self.model.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise MalformedAdapterError(
                f"{self.file.path}: {module}: {MODEL_CONFIG} beside it names no {name}: "
                "how the rows of q, k and v divide is unknown",
                hint=f"copy litgpt's {MODEL_CONFIG} beside the file",
            )
        return value

    def _enabled(self, module: str) -> tuple[bool, ...]:
        if self.options.enable_lora is not None:
            if len(self.options.enable_lora) != 3 or not any(self.options.enable_lora):
                raise self._malformed(module, "--enable-lora needs three parts, one of them adapted")
            return self.options.enable_lora
        told = tuple(self.hyperparameters.get(f"lora_{part}") for part in ("query", "key", "value"))
        if not all(isinstance(part, bool) for part in told) or not any(told):
            raise MalformedAdapterError(
                f"{self.file.path}: {module}: {HYPERPARAMETERS} beside it does not say which of lora_query, lora_key "
                "and lora_value were trained",
                hint="say it: --enable-lora T,F,T for query and value",
                code="enable-lora-needed",
            )
        return tuple(map(bool, told))

    def _scale(self, module: str, rank: int) -> Scale:
        told = self.hyperparameters.get("lora_r")
        if told is not None and told != rank:
            raise self._malformed(module, f"its factors have rank {rank}, {HYPERPARAMETERS} says lora_r {told!r}")
        if self.options.alpha is not None:
            return Scale(
                factor=Fraction(self.options.alpha) / rank, source=f"--alpha {self.options.alpha:g} / r {rank}"
            )
        alpha = self.hyperparameters.get("lora_alpha")
        if alpha is None:
            raise missing_alpha(self.file, [rank])
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise self._malformed(HYPERPARAMETERS, f"lora_alpha: found {alpha!r}, expected a number")
        return Scale(factor=Fraction(alpha) / rank, source=f"lora_alpha {alpha} / lora_r {rank} ({HYPERPARAMETERS})")

    def _malformed(self, where: str, problem: str) -> MalformedAdapterError:
        return MalformedAdapterError(f"{self.file.path}: {where}: {problem}")

    def findings(self) -> Iterator[Finding]:
        if self.options.alpha is not None and self.hyperparameters.get("lora_alpha") is not None:
            message = f"--alpha {self.options.alpha:g} is used instead of the file's own"
            yield warn("alpha-overridden", HYPERPARAMETERS, message)


def _starts(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    return 0, sizes[0], sizes[0] + sizes[1]


def _layer(module: str) -> str:
    return module.split(".")[2]


def _names(module: str) -> tuple[str, ...]:
    if module == "lm_head":
        return ("lm_head",)
    layer, part = _layer(module), module.split(".", 3)[3]
    if part.startswith("mlp.experts."):
        expert, projection = part.split(".")[2:]
        return (f"model.layers.{layer}.mlp.experts.{expert}.{_EXPERTS.get(projection, projection)}",)
    return tuple(name.format(layer) for name in _NAMES[part])


def _read_yaml(folder: Path, name: str) -> Mapping[str, Any]:
    """Read a YAML mapping beside the weights; empty where there is none."""
    if not (folder / name).is_file():
        return {}
    try:
        path = contained_path(folder, name)
        if path.stat().st_size > _MAX_YAML_BYTES:
            raise MalformedAdapterError(f"{path}: {path.stat().st_size} bytes, expected settings")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except MalformedCheckpointError as error:
        raise MalformedAdapterError(error.message, hint=error.hint) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise MalformedAdapterError(f"{folder / name}: not YAML: {' '.join(str(error).split())[:200]}") from error
    except OSError as error:
        raise MalformedAdapterError(f"{folder / name}: cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise MalformedAdapterError(f"{folder / name}: found a {type(content).__name__}, expected settings by name")
    return content
