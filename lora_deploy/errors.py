"""Every error this package raises across a module's border, and the finding they carry.

    LoraDeployError                  exit 1   message; .hint; .code
    ├─ RecipeError                        2   an option that cannot be obeyed
    ├─ InputError                         3   a file that is not what it claims to be
    │   ├─ UnknownAdapterFormatError · AmbiguousAdapterFormatError
    │   ├─ MalformedAdapterError · UnmergeableAdapterError
    │   ├─ MalformedCheckpointError
    │   └─ UnsafeFileError                    pickle, path escape, link
    ├─ IncompatibleAdapterError           4   both sound, do not fit; .findings, all at once
    ├─ MergeError                         5
    │   ├─ MemoryBudgetError · DiskSpaceError   both before any write
    │   ├─ NonFiniteTensorError
    │   └─ OutputExistsError
    ├─ ExportError                        6
    ├─ EvidenceError                      7
    │   └─ ReplayError · ParityError · LatencyError
    ├─ ReleaseError                       8
    │   └─ DigestMismatchError · SignatureError
    ├─ PushError                          9
    │   └─ NotAuthorisedError · RevisionConflictError · RateLimitedError · HubUnavailableError
    └─ InconclusiveError                 10   could not be checked

Promise: errors survive pickling with all their fields, and ``code`` is stable for machines.
Only ``lora_deploy.cli`` catches ``LoraDeployError``; a bug keeps its own type and traceback.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Self


class Severity(StrEnum):
    """How much a finding weighs."""

    NOTE = "note"
    """Worth knowing; nothing to decide."""
    WARN = "warn"
    """Legal, but often a mistake."""
    ERROR = "error"
    """The work cannot go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing noticed about an adapter or about how it fits a base."""

    code: str
    """Stable kebab-case name, such as ``shape-mismatch``."""
    severity: Severity
    target: str
    """The tensor, module, key or file that the finding is about."""
    message: str
    """What was found against what was expected, in one line."""
    source: str = ""
    """Keys of the adapter file that it comes from; empty when the target says it all."""


class LoraDeployError(Exception):
    """Something foreseen that stops the work, said in one line.

    Attributes:
        message: What (path, key): found against expected. Lower case, one line.
        hint: What to do about it, or None.
        code: Stable kebab-case name, for ``--json``.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or _kebab(type(self).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__.copy())

    @classmethod
    def _blank(cls) -> Self:
        return cls.__new__(cls)


def _restore(cls: type[LoraDeployError], args: tuple[Any, ...], state: dict[str, Any]) -> LoraDeployError:
    error = cls._blank()
    error.args = args
    error.__dict__.update(state)
    return error


def _kebab(class_name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", class_name.removesuffix("Error")).lower()


class RecipeError(LoraDeployError):
    """A recipe or an option that cannot be obeyed."""

    exit_code = 2


class InputError(LoraDeployError):
    """A file that is not what it claims to be."""

    exit_code = 3


class UnknownAdapterFormatError(InputError):
    """No reader recognises the file."""


class AmbiguousAdapterFormatError(InputError):
    """The file can be read in more than one way; a choice is needed."""


class MalformedAdapterError(InputError):
    """The format is known, the content breaks its rules."""


class UnmergeableAdapterError(InputError):
    """Sound, but no weights can equal what it does (routing, virtual tokens, missing state)."""


class MalformedCheckpointError(InputError):
    """A base or merged checkpoint whose files contradict each other or their format."""


class UnsafeFileError(InputError):
    """A file that would run code or reach outside its root."""


class IncompatibleAdapterError(LoraDeployError):
    """Adapter and base are both sound and do not fit.

    Attributes:
        findings: Every misfit at once, errors and warnings.
    """

    exit_code = 4

    def __init__(self, message: str, *, findings: tuple[Finding, ...] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.findings = findings


class MergeError(LoraDeployError):
    """The merge could not be planned or carried out."""

    exit_code = 5


class MemoryBudgetError(MergeError):
    """The plan needs more memory than allowed or present; raised before the first write."""


class DiskSpaceError(MergeError):
    """The output does not fit the file system."""


class NonFiniteTensorError(MergeError):
    """A NaN or an infinity where a number must be, or a finite value the output dtype cannot hold."""


class OutputExistsError(MergeError):
    """Another result, or another unfinished merge, is in the way."""


class ExportError(LoraDeployError):
    """A graph could not be made or bound to weights."""

    exit_code = 6


class EvidenceError(LoraDeployError):
    """A measured fact contradicts what was promised."""

    exit_code = 7


class ReplayError(EvidenceError):
    """Stored weights differ from the definition of the merge."""


class ParityError(EvidenceError):
    """Outputs differ from the unmerged model's by more than rounding explains."""


class LatencyError(EvidenceError):
    """The merged graph is slower or faster than the base's, twice measured."""


class ReleaseError(LoraDeployError):
    """A release could not be assembled or does not match its manifest."""

    exit_code = 8


class SignatureError(ReleaseError):
    """A signature is missing, or is not of these files by this key."""


class DigestMismatchError(ReleaseError):
    """A file's bytes are not the recorded ones."""


class PushError(LoraDeployError):
    """A hub did not take, or did not give, what was asked."""

    exit_code = 9


class NotAuthorisedError(PushError):
    """The hub does not know the token, or the token may not do this."""


class RevisionConflictError(PushError):
    """Somebody else wrote meanwhile, or a tag or folder holds another release."""


class RateLimitedError(PushError):
    """The hub wants fewer requests, and did not get over it."""


class HubUnavailableError(PushError):
    """The hub could not be reached, or offline mode forbids asking it."""


class InconclusiveError(LoraDeployError):
    """Could not be checked, which is not the same as checked."""

    exit_code = 10
