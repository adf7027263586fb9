"""Rank and scale of each adapted module: ``lora_alpha / r``, patterns, rank stabilisation, by the rules of its version.

Promise: the rank that the rules give is the rank that the tensors have, or the file is refused; where the file does not
say which version wrote it, all rules that fit the tensors must agree.
Source: peft 0.21.2 ``utils/other.py:get_pattern_key``; peft 0.14.0 and 0.13.2 ``tuners/lora/model.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from lora_deploy.adapters.configuration import Number
from lora_deploy.adapters.peft.config import PeftConfig
from lora_deploy.errors import AmbiguousAdapterFormatError, MalformedAdapterError
from lora_deploy.updates.interface import Scale

_WITH_OPTIONAL_PATH = r"(.*\.)?({})$"
_BEHIND_A_DOT = r".*\.{}$"
"""Not grouped, as it was: an alternation in a key splits the whole expression."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What one version's rules give for a module, and which pattern gave it."""

    rank: int
    alpha: Number
    rank_key: str | None
    alpha_key: str | None


def _matching(patterns: Iterable[str], module: str) -> list[str]:
    return [key for key in patterns if re.match(_WITH_OPTIONAL_PATH.format(key), module)]


Rule = Callable[[PeftConfig, str], Resolved]


def _first(patterns: Iterable[str], form: str, module: str) -> str | None:
    return next((key for key in patterns if re.match(form.format(key), module)), None)


def _independently(form: str) -> Rule:
    def resolve(config: PeftConfig, module: str) -> Resolved:
        return _resolved(config, _first(config.rank_pattern, form, module), _first(config.alpha_pattern, form, module))

    return resolve


def _jointly(config: PeftConfig, module: str) -> Resolved:
    key = _first([*config.rank_pattern, *config.alpha_pattern], _BEHIND_A_DOT, module)
    return _resolved(config, key if key in config.rank_pattern else None, key if key in config.alpha_pattern else None)


def _resolved(config: PeftConfig, rank_key: str | None, alpha_key: str | None) -> Resolved:
    return Resolved(
        rank=config.r if rank_key is None else config.rank_pattern[rank_key],
        alpha=config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key],
        rank_key=rank_key,
        alpha_key=alpha_key,
    )


_SINCE_0_15 = _independently(_WITH_OPTIONAL_PATH)
_IN_0_14 = _independently(_BEHIND_A_DOT)


def _rules(version: tuple[int, ...] | None) -> tuple[Rule, ...]:
    if version is None:
        return _SINCE_0_15, _IN_0_14, _jointly
    return (_SINCE_0_15 if version >= (0, 15) else _IN_0_14 if version >= (0, 14) else _jointly,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Gives each module of one file its rank and scale."""

    path: Path
    config: PeftConfig
    config_name: str
    """Where alpha was read, for a person."""
    has_alpha: bool = True
    """Whether the file names alpha at all, rather than leaving it to PEFT's default."""
    has_rank: bool = True
    """Whether the file names the rank; otherwise the tensors do."""
    alpha: float | None = None
    """What the user said instead."""

    def of(self, module: str, rank_found: int | None) -> tuple[int, Scale]:
        """Give rank and scale of a module.

        ``rank_found`` is the rank of its tensors, None where they do not show it.

        Raises:
            MalformedAdapterError: The tensors have another rank than the configuration says.
            AmbiguousAdapterFormatError: Versions of PEFT read the patterns differently, and the file names none.
        """
        if not self.has_rank:
            resolved = Resolved(rank_found or self.config.r, self.config.lora_alpha, None, None)
            return resolved.rank, self._scale(resolved)
        found = [rule(self.config, module) for rule in _rules(self.config.version)]
        fitting = [resolved for resolved in found if rank_found in (None, resolved.rank)]
        fitting = fitting or self._in_another_order(found, module, rank_found)
        if not fitting:
            told = f"{found[0].rank}" + (f" (rank_pattern {found[0].rank_key!r})" if found[0].rank_key else "")
            raise MalformedAdapterError(
                f"{self.path}: {module}: its tensors have rank {rank_found}, {self.config_name} says {told}"
            )
        values = {(resolved.rank, resolved.alpha) for resolved in fitting}
        if len(values) > 1 and self.alpha is None:
            raise AmbiguousAdapterFormatError(
                f"{self.path}: {module}: versions of PEFT match its patterns differently: "
                + " or ".join(f"alpha {alpha} / r {rank}" for rank, alpha in sorted(values)),
                hint=f'add the "peft_version" that trained it to {self.config_name}',
            )
        return fitting[0].rank, self._scale(fitting[0])

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """List the pattern keys that match none of the modules."""
        known = tuple(modules)
        return [
            key
            for key in dict.fromkeys([*self.config.rank_pattern, *self.config.alpha_pattern])
            if not any(re.match(_WITH_OPTIONAL_PATH.format(key), module) for module in known)
        ]

    def contested(self, modules: Iterable[str]) -> list[tuple[str, list[str]]]:
        """List the modules for which several ``alpha_pattern`` keys give different values, with these keys.

        The first key counts, but PEFT sorts the keys when it saves them: which one was first in training is lost.
        """
        contested = []
        for module in modules:
            keys = _matching(self.config.alpha_pattern, module)
            if len({self.config.alpha_pattern[key] for key in keys}) > 1:
                contested.append((module, keys))
        return contested

    def _in_another_order(self, found: list[Resolved], module: str, rank_found: int | None) -> list[Resolved]:
        """Resolve again with the key first that the tensors fit: PEFT sorts the keys when it saves them."""
        keys = [
            key for key in _matching(self.config.rank_pattern, module) if self.config.rank_pattern[key] == rank_found
        ]
        return [
            replace(resolved, rank=self.config.rank_pattern[key], rank_key=key)
            for key in keys[:1]
            for resolved in found
        ]

    def _scale(self, resolved: Resolved) -> Scale:
        rank = resolved.rank
        divisor = f"sqrt(r {rank}), rank-stabilised" if self.config.use_rslora else f"r {rank}"
        if resolved.rank_key:
            divisor += f" by rank_pattern {resolved.rank_key!r}"
        alpha: Number = resolved.alpha
        if self.alpha is not None:
            told = f" (instead of {alpha} in {self.config_name})" if self.has_alpha else ""
            alpha, source = self.alpha, f"--alpha {self.alpha:g} / {divisor}{told}"
        elif resolved.alpha_key:
            source = f"alpha_pattern {resolved.alpha_key!r} {alpha} / {divisor} ({self.config_name})"
        elif self.has_alpha:
            source = f"lora_alpha {alpha} / {divisor} ({self.config_name})"
        else:
            source = f"lora_alpha {alpha} / {divisor} (PEFT's default, {self.config_name} names none)"
        factor = Fraction(alpha)
        if self.config.use_rslora:
            return Scale(factor=factor, root=rank, source=source)
        return Scale(factor=factor / rank, source=source)
