"""Adapters of mlx-lm: LoRA and DoRA of linear layers, stacks of experts and embeddings, and whole tensors (``full``).

    linear     lora_a (in, r)      lora_b (r, out)      m (out)        delta = s·(lora_a·lora_b)^T
    embedding  lora_a (vocab, r)   lora_b (r, dim)      m (vocab)      delta = s·lora_a·lora_b
    experts    lora_a (E, r, in)   lora_b (E, out, r)                  delta_e = s·lora_b[e]·lora_a[e]

The scale s is ``lora_parameters.scale``, absolute: it is not divided by the rank. From January to June 2024 mlx-lm did
multiply it by alpha / rank, and wrote alpha for a year longer; the file does not say which, so today's loader is
followed, alpha is warned of where it would matter, and ``--mlx-legacy-alpha`` takes the older rule.

Where embeddings are tied, mlx multiplies by the adapted embedding in the head as well: both sides change.
Source: mlx-lm 0.32.2, ``tuner/lora.py``, ``tuner/dora.py`` and ``tuner/utils.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

from torch import Tensor

from lora_deploy.adapter import Adapter, BaseHint, ModuleUpdate, Orientation
from lora_deploy.adapters.factors import check_finite, factor, low_rank
from lora_deploy.adapters.findings import untrained, warn
from lora_deploy.adapters.interface import AdapterFile, Container, ReadOptions
from lora_deploy.artifact import cached_sha256
from lora_deploy.errors import Finding, MalformedAdapterError, UnmergeableAdapterError
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement

_CONFIG_KEYS = frozenset({"lora_parameters", "fine_tune_type", "lora_layers", "adapter_path"})
_SLOT = re.compile(r"(?:(?P<module>.+)\.)?(?P<slot>lora_a|lora_b|m)$")
_STACK = re.compile(r"(?P<owner>.+)\.(?:switch_mlp|switch_glu|experts)\.(?P<projection>\w+)$")
_EMBEDDING = re.compile(r"(?:^|\.)(embed_tokens|tok_embeddings|word_embeddings|embed_in|embeddings?|wte|wpe)$")
_LIKE_GPT2 = ("h.", "wte.", "wpe.", "ln_f.")
_DEFAULT_SCALE, _EARLY_SCALE = 20, 2
"""Of mlx-lm, and of the first mlx-examples, which wrote ``y + 2.0 * z``."""


class MlxReader:
    """Reads what ``mlx_lm.lora`` trains."""

    format = "mlx"
    containers: ClassVar[frozenset[Container]] = frozenset({"safetensors", "npz"})

    def recognises(self, file: AdapterFile) -> bool:
        """Whether the configuration is mlx-lm's, or there is none and the keys are."""
        if file.config is not None and "peft_type" not in file.config and _CONFIG_KEYS & set(file.config):
            return True
        return any(key.rpartition(".")[2] == "lora_a" for key in file.tensors)

    def read(self, file: AdapterFile, options: ReadOptions) -> Adapter:
        """Turn the file into updates.

        Raises:
            MalformedAdapterError: A factor without its other, shapes that do not fit, or an unknown scale.
            UnmergeableAdapterError: Whole tensors that are quantised.
            NonFiniteTensorError: A tensor holds a NaN or an infinity.
        """
        config = file.config or {}
        kind = config.get("fine_tune_type") or ("dora" if config.get("use_dora") else "lora")
        if not isinstance(kind, str) or kind not in {"lora", "dora", "full"}:
            raise MalformedAdapterError(f"{file.config_path}: fine_tune_type {kind!r}, expected lora, dora or full")
        if kind == "full":
            updates = tuple(_whole(file))
            findings: tuple[Finding, ...] = ()
        else:
            reading = _Reading(file=file, options=options, parameters=_parameters(file), is_dora=kind == "dora")
            updates = tuple(reading.updates())
            findings = (*untrained(updates), *reading.findings())
        updates = tuple(replace(update, alternatives=_without_model(update.target)) for update in updates)
        return Adapter(
            path=file.path,
            name=file.path.parent.name if file.name == "adapters" else file.name,
            format=self.format,
            base_hint=BaseHint(name=_text(config.get("model"))),
            updates=updates,
            findings=findings,
            sha256=file.sha256,
            config_sha256=cached_sha256(file.config_path) if file.config_path else None,
            config=config,
            shares_ties=True,
        )


READER = MlxReader()


def _without_model(target: str) -> tuple[str, ...]:
    """mlx-lm calls every base model ``model``; GPT-2 and its like are called otherwise, or nothing, in their files."""
    rest = target.removeprefix("model.")
    return (rest,) if rest != target and rest.startswith(_LIKE_GPT2) else ()


def _text(value: object) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _parameters(file: AdapterFile) -> Mapping[str, Any]:
    found = (file.config or {}).get("lora_parameters") or {}
    if not isinstance(found, Mapping):
        raise MalformedAdapterError(f"{file.config_path}: lora_parameters: found {found!r}, expected an object")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """One pass over the factors of one file."""

    file: AdapterFile
    options: ReadOptions
    parameters: Mapping[str, Any]
    """``lora_parameters``."""
    is_dora: bool

    def updates(self) -> Iterator[ModuleUpdate]:
        for module, slots in self._modules().items():
            up = self.file.tensors[slots["lora_b"]]
            if up.ndim == 3:
                yield from self._stack(module, slots)
            else:
                yield self._layer(module, slots)

    def _modules(self) -> dict[str, dict[str, str]]:
        modules: dict[str, dict[str, str]] = {}
        for key in self.file.tensors:
            match = _SLOT.match(key)
            if match is None:
                raise MalformedAdapterError(
                    f"{self.file.path}: {key}: mlx-lm writes lora_a, lora_b and m here, and nothing else",
                    hint='whole tensors need "fine_tune_type": "full" in adapter_config.json',
                )
            modules.setdefault(match["module"] or "", {})[match["slot"]] = key
        for module, slots in modules.items():
            wanted = {"lora_a", "lora_b"} | ({"m"} if self.is_dora else set())
            if slots.keys() != wanted:
                found, expected = ", ".join(sorted(slots)), ", ".join(sorted(wanted))
                kind = "dora" if self.is_dora else "lora"
                raise MalformedAdapterError(
                    f"{self.file.path}: {module}: found {found}, expected {expected} (fine_tune_type {kind})"
                )
        return modules

    def _layer(self, module: str, slots: Mapping[str, str]) -> ModuleUpdate:
        """Linear layers, and embeddings, whose factors lie as the stored weight does."""
        first, second = (factor(self.file, slots[slot], n_dims=(2,)) for slot in ("lora_a", "lora_b"))
        magnitude = factor(self.file, slots["m"], n_dims=(1,)) if "m" in slots else None
        scale = self._scale(module, int(first.shape[1]))
        linear = low_rank(self.file, module, first.T, second.T, scale)
        is_embedding = _is_embedding(module, linear, magnitude)
        plain = linear.transposed() if is_embedding else linear
        update: LowRank | Dora = plain
        if magnitude is not None:
            if magnitude.shape[0] != plain.shape[0]:
                raise MalformedAdapterError(
                    f"{self.file.path}: {module}.m: {magnitude.shape[0]} magnitudes for {plain.shape[0]} rows"
                )
            update = Dora(inner=plain, magnitude=magnitude, axis="rows")
        return ModuleUpdate(
            target=f"{module}.weight".removeprefix("."),
            update=update,
            orientation=Orientation.STORED if is_embedding else Orientation.UNKNOWN,
            keys=tuple(slots.values()),
        )

    def _stack(self, module: str, slots: Mapping[str, str]) -> Iterator[ModuleUpdate]:
        """A stack of experts: one update for each, under the name that a single one has."""
        match = _STACK.match(module)
        if match is None:
            raise MalformedAdapterError(f"{self.file.path}: {module}: factors of a stack, but no stack of experts")
        if "m" in slots:
            raise MalformedAdapterError(f"{self.file.path}: {module}: mlx-lm trains no magnitudes of experts")
        down = factor(self.file, slots["lora_a"], n_dims=(2, 3))
        up = factor(self.file, slots["lora_b"], n_dims=(3,))
        n_experts, _, rank = up.shape
        if down.ndim == 2 and down.shape[0] == n_experts * rank:  # as first releases had it
            down = down.reshape(n_experts, rank, -1)
        if down.ndim != 3 or down.shape[:2] != (n_experts, rank):
            raise MalformedAdapterError(
                f"{self.file.path}: {module}: lora_a {tuple(down.shape)} and lora_b {tuple(up.shape)} are not "
                "(experts, r, in) and (experts, out, r)"
            )
        scale = self._scale(module, rank)
        for e in range(n_experts):
            yield ModuleUpdate(
                target=f"{match['owner']}.experts.{e}.{match['projection']}.weight",
                update=LowRank(down=down[e], up=up[e], scale=scale),
                orientation=Orientation.STORED,
                keys=tuple(slots.values()),
            )

    def _scale(self, module: str, rank: int) -> Scale:
        told = self.parameters.get("rank")
        if told is not None and told != rank:
            raise MalformedAdapterError(
                f"{self.file.path}: {module}: its factors have rank {rank}, lora_parameters says {told}"
            )
        if self.options.alpha is not None:
            alpha = self.options.alpha
            return Scale(factor=Fraction(alpha) / rank, source=f"--alpha {alpha:g} / r {rank}")
        scale = self._number("scale")
        if scale is None:
            raise MalformedAdapterError(
                f"{self.file.path}: no lora_parameters.scale beside it: the scale is unknown, r is {rank}",
                hint=f"--alpha {_DEFAULT_SCALE * rank} is scale {_DEFAULT_SCALE}, mlx-lm's default; --alpha "
                f"{_EARLY_SCALE * rank} is scale {_EARLY_SCALE}, that of the first mlx-examples",
                code="alpha-unknown",
            )
        source = f"lora_parameters.scale {scale:g}, absolute (adapter_config.json)"
        alpha_told = self._number("alpha")
        if not self.options.mlx_legacy_alpha:
            return Scale(factor=Fraction(scale), source=source)
        if alpha_told is None:
            raise MalformedAdapterError(
                f"{self.file.config_path}: --mlx-legacy-alpha, but lora_parameters names no alpha",
                hint="leave the option out: the scale is absolute",
            )
        return Scale(
            factor=Fraction(scale) * Fraction(alpha_told) / rank,
            source=f"lora_parameters.scale {scale:g} · alpha {alpha_told:g} / rank {rank} (--mlx-legacy-alpha)",
        )

    def _number(self, name: str) -> float | None:
        value = self.parameters.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise MalformedAdapterError(
                f"{self.file.config_path}: lora_parameters.{name}: found {value!r}, expected a number"
            )
        return value

    def findings(self) -> Iterator[Finding]:
        alpha, rank = self._number("alpha"), self._number("rank")
        if self.options.alpha is not None:
            if self._number("scale") is not None:
                message = f"--alpha {self.options.alpha:g} is used instead of the file's own scale"
                yield warn("alpha-overridden", "adapter_config.json", message)
        elif alpha is not None and alpha != rank and not self.options.mlx_legacy_alpha:
            yield warn(
                "mlx-alpha-ignored",
                "adapter_config.json",
                f"lora_parameters has alpha {alpha:g}, rank {rank}: ignored, as mlx-lm does since June 2024; before, "
                "it multiplied the scale by alpha / rank: if it was trained then, --mlx-legacy-alpha",
            )


def _is_embedding(module: str, linear: LowRank, magnitude: Tensor | None) -> bool:
    if _EMBEDDING.search(module):
        return True
    n_out, n_in = linear.shape
    return magnitude is not None and magnitude.shape[0] == n_in != n_out


def _whole(file: AdapterFile) -> Iterator[ModuleUpdate]:
    for key, values in file.tensors.items():
        if not values.is_floating_point() or key.endswith((".scales", ".biases")):
            raise UnmergeableAdapterError(
                f"{file.path}: {key}: found {str(values.dtype).removeprefix('torch.')}: weights that mlx quantised "
                "replace nothing in a base that is not",
            )
        if not values.numel():
            raise MalformedAdapterError(f"{file.path}: {key}: is empty, shape {tuple(values.shape)}")
        check_finite(file, key)
        yield ModuleUpdate(target=key, update=Replacement(values=values), orientation=Orientation.STORED, keys=(key,))
