"""What a run remembers of a cell: from which inputs its evidence was made, and whose folder it is.

Merges, exports and releases know by their own records whether they are done; a push asks its target. Evidence costs
minutes and has no such record, so it stands here, by the digest of everything that it depends on.

Promise: a file that exists proves nothing: an entry counts only while the digest of its inputs and the sha256 of
its result are the noted ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_deploy.artifact import cached_sha256
from lora_deploy.errors import OutputExistsError
from lora_deploy.merge.output import write_text

JOURNAL_NAME = "journal.json"


class _Done(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: str
    """Digest of everything that the stage depends on."""
    sha256: str
    """Of the file it made."""


class Journal(BaseModel):
    """The memory of one cell."""

    model_config = ConfigDict(extra="forbid")

    recipe: str
    """Path of the recipe that the folder belongs to."""
    done: dict[str, _Done] = {}
    """By stage."""

    def has(self, stage: str, inputs: str, made: Path) -> bool:
        """Whether a stage was done from these inputs, and what it made is still that."""
        found = self.done.get(stage)
        return found is not None and found.inputs == inputs and made.is_file() and cached_sha256(made) == found.sha256

    def note(self, stage: str, inputs: str, made: Path) -> None:
        """Remember that a stage was done."""
        self.done[stage] = _Done(inputs=inputs, sha256=cached_sha256(made))

    def write(self, folder: Path) -> None:
        """Write it into the cell's folder, whole or not at all."""
        write_text(folder / JOURNAL_NAME, self.model_dump_json(indent=2) + "\n")


def open_journal(folder: Path, recipe: Path, *, fresh: bool) -> Journal:
    """Read the journal of a cell, or begin one; a damaged one is begun anew.

    Raises:
        OutputExistsError: The folder belongs to another recipe, and ``fresh`` does not allow to take it.
    """
    own = str(recipe.resolve())
    try:
        journal = Journal.model_validate_json((folder / JOURNAL_NAME).read_bytes())
    except (OSError, ValidationError):
        return Journal(recipe=own)
    if fresh:
        return Journal(recipe=own)
    if journal.recipe != own and Path(journal.recipe).exists():
        raise OutputExistsError(
            f"{folder}: belongs to the recipe {journal.recipe}",
            hint="give this one another output:, or take the folder with --fresh",
        )
    return journal.model_copy(update={"recipe": own})


def digest_of_inputs(inputs: Mapping[str, Any]) -> str:
    """Digest whatever a stage depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
