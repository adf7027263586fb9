"""The stages of a run, apart from the recipe's models: the command line names them before anything is parsed."""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """What a run does, in this order."""

    VALIDATE = "validate"
    MERGE = "merge"
    EXPORT = "export"
    EVIDENCE = "evidence"
    RELEASE = "release"
    PUSH = "push"
