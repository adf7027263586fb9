"""Numbers as people type and read them: sizes, factors, flags, durations.

Promise: sizes are decimal (5GB is 5,000,000,000 bytes) unless they say GiB; what is printed can be typed again.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

import click

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?i?)b?", re.IGNORECASE)
_TRUE, _FALSE = {"t", "true", "1"}, {"f", "false", "0"}


def parse_size(text: str) -> int | None:
    """Read a size such as ``5GB``, ``1.5GiB``, ``800 MB`` or ``4096``; None when it is not one of a byte or more."""
    found = _SIZE.fullmatch(text.strip())
    factor = (_DECIMAL | _BINARY).get(found[2].lower()) if found else None
    if found is None or factor is None:
        return None
    n_bytes = int(Decimal(found[1]) * factor)
    return n_bytes if n_bytes >= 1 else None


def format_size(n_bytes: float) -> str:
    """Write bytes with a decimal unit and three digits or more: ``16.1 GB``."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= 0.9995 * factor:
            return f"{_three_digits(n_bytes / factor)} {unit}"
    return f"{n_bytes:.0f} bytes"


def format_number(number: float | None) -> str:
    """Write a figure with three significant digits; a dash where there is none."""
    return "–" if number is None else f"{number:.3g}"


def format_seconds(seconds: float) -> str:
    """Write a duration: ``0.4 s``, ``52 s``, ``3 min 5 s``, ``1 h 2 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _three_digits(number: float) -> str:
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


class Size(click.ParamType[int]):
    """A number of bytes."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read what was typed."""
        if isinstance(value, int):
            return value
        n_bytes = parse_size(str(value))
        if n_bytes is None:
            self.fail(f"found {value!r}, expected a size such as 5GB, 800MB or 2GiB", param, ctx)
        return n_bytes


class FiniteNumber(click.ParamType[float]):
    """Any real number."""

    name = "number"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read what was typed."""
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"found {value!r}, expected a finite number", param, ctx)
        return number


class Flags(click.ParamType[tuple[bool, ...]]):
    """A comma-separated list of T and F."""

    name = "flags"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[bool, ...]:
        """Read what was typed."""
        if isinstance(value, tuple):
            return value
        words = [word.strip().lower() for word in str(value).split(",")]
        if not all(word in _TRUE | _FALSE for word in words):
            self.fail(f"found {value!r}, expected T and F separated by commas, such as T,F,T", param, ctx)
        return tuple(word in _TRUE for word in words)


class Percent(click.ParamType[float]):
    """A part of something, as ``3%`` or ``0.03``, above 0 and below 1."""

    name = "percent"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read what was typed."""
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            number = math.nan
        if not 0 < number < 1:
            self.fail(f"found {value!r}, expected a part such as 3% or 0.03", param, ctx)
        return number
