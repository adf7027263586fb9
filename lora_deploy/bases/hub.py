"""Hub ids: found in, or fetched into, the cache that huggingface_hub keeps.

Promise: ``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` mean what they mean there; no token is ever part of a message;
what is returned is a snapshot of one commit, and its name is that commit.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from lora_deploy.errors import HubUnavailableError, InputError

_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_REVISION = re.compile(r"^[\w./-]+$")
_OLD_IDS = {
    **dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), "openai-community"),
    **dict.fromkeys(("t5-small", "t5-base", "t5-large", "t5-3b", "t5-11b"), "google-t5"),
    **dict.fromkeys(("roberta-base", "roberta-large", "xlm-roberta-base", "xlm-roberta-large"), "FacebookAI"),
    **dict.fromkeys(
        ("distilbert-base-uncased", "distilbert-base-cased", "distilgpt2", "distilroberta-base"), "distilbert"
    ),
    **dict.fromkeys(("albert-base-v2", "albert-large-v2"), "albert"),
    **dict.fromkeys(
        (
            *("bert-base-uncased", "bert-base-cased", "bert-large-uncased", "bert-large-cased"),
            *("bert-base-multilingual-cased", "bert-base-multilingual-uncased", "bert-base-chinese"),
        ),
        "google-bert",
    ),
}
"""Ids from before repositories had owners; adapters still name them."""


def is_hub_id(reference: str) -> bool:
    """Whether a reference has the form of a hub id, with or without ``@revision``."""
    name, _, revision = reference.partition("@")
    return (bool(_ID.match(name)) or name in _OLD_IDS) and (not revision or bool(_REVISION.match(revision)))


def local_folder(reference: str, patterns: Sequence[str], *, within: str = "") -> tuple[Path, str]:
    """Give the folder of a snapshot that holds the files named by shell patterns, and its commit.

    ``within`` is a sub-folder that is fetched in place of the repository's own files; others are left out. Nothing is
    fetched that the cache holds.

    Raises:
        InputError: No such repository or revision, or it needs a licence to be accepted.
        HubUnavailableError: Not in the cache, and the hub cannot be asked.
    """
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name, _, revision = reference.partition("@")
    repository = f"{_OLD_IDS[name]}/{name}" if name in _OLD_IDS else name
    inside = f"{glob.escape(within)}/" if within else ""
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=[inside + pattern for pattern in patterns],
            ignore_patterns=[f"{inside}*/*", "consolidated*"],
        )
    except errors.GatedRepoError as error:
        hint = "accept its licence on the hub, then set HF_TOKEN"
        raise InputError(f"{repository}: access needs permission", hint=hint, code="gated-repository") from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the name; a private one needs HF_TOKEN"
        raise InputError(f"{repository}: no such folder, and the hub shows no such repository", hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repository}: has no revision {revision!r}") from error
    except errors.HFValidationError as error:
        raise InputError(f"{reference}: no such folder, and not the id of a repository") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else f"the hub cannot be reached ({type(error).__name__})"
        raise HubUnavailableError(
            f"{reference}: no such folder, not in the cache, and {reason}",
            hint="download it where there is a network, or pass a folder",
        ) from error
    return Path(folder), Path(folder).name
