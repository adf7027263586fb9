"""The largest value that passes each module's border: what a format with a small range could not hold.

Promise: recorded in the float32 pass of the unmerged model, so that nothing has overflown yet. Only what enters and
leaves modules is seen; sums inside one (scores of attention before their softmax) are not. Masks are no values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_deploy.evidence.verdict import Verdict

FLOAT16_LARGEST = 65_504.0
WARNING_SHARE = 0.25
_N_LISTED = 10
_NO_VALUES = ("mask", "position", "cache", "past_key")


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeReport:
    """Where values are largest."""

    applies: bool
    """Whether the merged model's dtype is float16, whose range this is about."""
    largest: tuple[tuple[str, float], ...]
    """Module names with the largest absolute value at their border, largest first, a few."""
    n_modules: int

    @property
    def verdict(self) -> Verdict:
        """Fail where float16 would overflow."""
        return Verdict.FAIL if self.applies and self.too_large else Verdict.PASS

    @property
    def too_large(self) -> tuple[tuple[str, float], ...]:
        """Modules whose values float16 does not hold."""
        return tuple(entry for entry in self.largest if not entry[1] <= FLOAT16_LARGEST)

    @property
    def warning(self) -> str:
        """What to know where values come near the end of the range; empty where they do not."""
        name, value = self.largest[0] if self.largest else ("", 0.0)
        if not self.applies or value <= WARNING_SHARE * FLOAT16_LARGEST:
            return ""
        verb = "exceeds" if value > FLOAT16_LARGEST else "is more than a quarter of"
        return f"{name or 'the model'}: values reach {value:.4g}, which {verb} float16's largest, {FLOAT16_LARGEST:g}"

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return {
            "verdict": self.verdict.value,
            "applies": self.applies,
            "limit": FLOAT16_LARGEST,
            "warning_share": WARNING_SHARE,
            "n_modules": self.n_modules,
            "largest": [{"module": name, "max_abs": value} for name, value in self.largest],
            "warning": self.warning,
        }


@contextmanager
def recording(names: Mapping[str, nn.Module]) -> Iterator[dict[str, float]]:
    """Record the largest absolute value at the border of the named modules while the block runs."""
    found: dict[str, float] = {}
    hooks = [
        module.register_forward_hook(_Recorder(name, found), with_kwargs=True, always_call=False)
        for name, module in names.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def summarise(found: Mapping[str, float], *, applies: bool) -> RangeReport:
    """Keep the largest; all that exceed the range count as largest."""
    ordered = sorted(found.items(), key=lambda entry: (-entry[1], entry[0].count("."), entry[0]))
    return RangeReport(applies=applies, largest=tuple(ordered[:_N_LISTED]), n_modules=len(found))


@dataclass(frozen=True, slots=True)
class _Recorder:
    name: str
    found: dict[str, float]

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,  # noqa: ANN401 - anything
    ) -> None:
        named = {key: value for key, value in kwargs.items() if not any(part in key for part in _NO_VALUES)}
        largest = max((_largest(value) for value in _tensors((args, named, output))), default=0.0)
        self.found[self.name] = max(self.found.get(self.name, 0.0), largest)


def _tensors(value: Any) -> Iterator[Tensor]:  # noqa: ANN401 - nested as modules please
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value.detach()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not any(part in str(key) for part in _NO_VALUES):
                yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _largest(value: Tensor) -> float:
    """Largest |value|; the lowest number of the format stands for minus infinity in masks and is none."""
    lowest, highest = (float(end) for end in torch.aminmax(value))
    if lowest <= torch.finfo(value.dtype).min:
        kept = value[value > torch.finfo(value.dtype).min]
        return float(kept.abs().max()) if kept.numel() else 0.0
    found = max(-lowest, highest)
    return math.inf if math.isnan(found) else found
