"""Collect what is noticed while binding, and say it all at once in the words of the architecture's section 6."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_deploy.adapter import Adapter
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import Finding, IncompatibleAdapterError, Severity

_MAX_LINES = 40


class Findings:
    """What was noticed so far, in order, each once."""

    def __init__(self) -> None:
        """Start with nothing noticed."""
        self._found: dict[Finding, None] = {}

    def error(self, code: str, target: str, message: str, keys: Iterable[str] = ()) -> None:
        """Note a reason not to merge."""
        self._add(Severity.ERROR, code, target, message, keys)

    def warn(self, code: str, target: str, message: str, keys: Iterable[str] = ()) -> None:
        """Note what is legal but often a mistake."""
        self._add(Severity.WARN, code, target, message, keys)

    def note(self, code: str, target: str, message: str, keys: Iterable[str] = ()) -> None:
        """Note what is worth knowing."""
        self._add(Severity.NOTE, code, target, message, keys)

    def extend(self, findings: Iterable[Finding]) -> None:
        """Take over what another part noticed."""
        self._found.update(dict.fromkeys(findings))

    @property
    def all(self) -> tuple[Finding, ...]:
        """Everything noticed, in order."""
        return tuple(self._found)

    @property
    def has_errors(self) -> bool:
        """Whether anything stops the merge."""
        return any(finding.severity is Severity.ERROR for finding in self._found)

    def _add(self, severity: Severity, code: str, target: str, message: str, keys: Iterable[str]) -> None:
        self._found[
            Finding(code=code, severity=severity, target=target, message=message, source=short_keys([*keys]))
        ] = None


def misfit(adapters: Sequence[Adapter], checkpoint: Checkpoint, findings: Findings) -> IncompatibleAdapterError:
    """Make the error that lists every misfit."""
    base_names = [a.base_hint.name for a in adapters if a.base_hint.name and a.base_hint.name != checkpoint.ref.name]
    hints = [f"the adapter names base {base_names[0]}; pass --base {base_names[0]}"] if base_names else []
    if any(finding.code == "text-model-target" for finding in findings.all):
        hints.append("a text model's adapter goes into this base's language model with --into-language-model")
    hint = "; or ".join(hints) or None
    message = misfit_message(adapters, checkpoint, findings.all)
    return IncompatibleAdapterError(message, findings=findings.all, hint=hint)


def misfit_message(adapters: Sequence[Adapter], checkpoint: Checkpoint, findings: Sequence[Finding]) -> str:
    """Format findings, errors first: one line each, the adapter's keys on a second."""
    listed = sorted((f for f in findings if f.severity is not Severity.NOTE), key=lambda f: f.severity.value)
    n_errors = sum(f.severity is Severity.ERROR for f in listed)
    n_warnings = len(listed) - n_errors
    who = ", ".join(map(title, adapters))
    base = checkpoint.ref.name + (f"@{checkpoint.ref.revision[:7]}" if checkpoint.ref.revision else "")
    counts = _count(n_errors, "error") + (f", {_count(n_warnings, 'warning')}" if n_warnings else "")
    lines = [f"{_kind(adapters)} {who} {_verb(adapters)} not fit base {base}: {counts}"]
    return "\n".join([*lines, *lines_of(listed)])


def lines_of(findings: Sequence[Finding]) -> list[str]:
    """Format findings: one line each, the adapter's keys on a second; a long list is cut."""
    shown = findings[:_MAX_LINES]
    width = max((len(f.code) for f in shown), default=0)
    lines = []
    for finding in shown:
        lines.append(f"  {finding.severity.value:5} {finding.code:{width}}  {finding.target}: {finding.message}")
        if finding.source:
            lines.append(f"  {'':5} {'':{width}}  from {finding.source}")
    if len(findings) > _MAX_LINES:
        lines.append(f"  … and {len(findings) - _MAX_LINES} more (--json lists all)")
    return lines


def short_keys(keys: Sequence[str]) -> str:
    """Write keys that differ in one place as one: ``q_proj.lora_{A,B}.weight``."""
    if len(keys) < 2:
        return "".join(keys)
    start = _n_common(keys)
    tails = [key[start:] for key in keys]
    end = _n_common([tail[::-1] for tail in tails])
    middles = [tail[: len(tail) - end] for tail in tails]
    suffix = tails[0][len(tails[0]) - end :]
    return f"{keys[0][:start]}{{{','.join(middles)}}}{suffix}"


def _n_common(texts: Sequence[str]) -> int:
    """Count the characters that all texts begin with."""
    first, last = min(texts), max(texts)
    return next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def title(adapter: Adapter) -> str:
    """Name an adapter as the user knows it: where it lies, and its format."""
    path = adapter.path.parent if adapter.path.stem in {"adapter_model", "adapters"} else adapter.path
    return f"{path} ({adapter.format})"


def _kind(adapters: Sequence[Adapter]) -> str:
    return "adapter" if len(adapters) == 1 else "adapters"


def _verb(adapters: Sequence[Adapter]) -> str:
    return "does" if len(adapters) == 1 else "do"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
