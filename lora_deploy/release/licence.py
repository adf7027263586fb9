"""Under which licence a release stands: the base's, with its files; the adapter's where it says the same.

Promise: nothing is guessed. Where base and adapter disagree, or the base is gated or under a licence of its own making,
a person must say ``--license``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lora_deploy.errors import Finding, ReleaseError, Severity

_FILES = ("license*", "licence*", "notice*", "copying*", "use_policy*", "use-policy*")
_GATES = ("extra_gated_prompt", "extra_gated_fields", "extra_gated_heading", "extra_gated_button_content")


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """What the card says."""

    card: Mapping[str, str]
    """``license``, and ``license_name`` and ``license_link`` where the base has them; empty when nothing is known."""
    files: Mapping[str, Path]
    """Licence files that travel, by name."""
    findings: tuple[Finding, ...] = ()


def licence_of(base: Path, adapters: Sequence[Path], chosen: str | None) -> Licence:
    """Settle the licence from the cards in the folders of base and adapters; ``chosen`` overrules them.

    Raises:
        ReleaseError: Base and adapter disagree, or the base is gated or has a licence of its own.
    """
    files = {path.name: path for path in sorted(base.iterdir()) if _is_licence(path)} if base.is_dir() else {}
    said = card_metadata(base)
    card = {key: str(said[key]) for key in ("license", "license_name", "license_link") if said.get(key)}
    if chosen is not None:
        kept = card if card.get("license") == chosen else {"license": chosen}
        return Licence(card=kept, files=files)
    if any(key in said for key in _GATES):
        raise _ask(f"{base.name}: is gated: its licence was granted to a person", "license-gated")
    if card.get("license") == "other":
        raise _ask(
            f"{base.name}: is under a licence of its own, {card.get('license_name', 'unnamed')}", "license-other"
        )
    for folder in adapters:
        own = card_metadata(folder).get("license")
        if own and card.get("license") and own != card["license"]:
            raise _ask(f"the adapter is under {own}, its base under {card['license']}", "license-conflict")
        if own and not card.get("license"):
            raise _ask(f"the adapter is under {own}, its base says nothing", "license-conflict")
    if card.get("license"):
        return Licence(card=card, files=files)
    message = f"the card of the base ({base.name}) names no licence; --license ID states one"
    finding = Finding(code="license-unknown", severity=Severity.WARN, target="README.md", message=message)
    return Licence(card={}, files=files, findings=(finding,))


def card_metadata(folder: Path) -> dict[str, Any]:
    """Read the metadata of a model card; empty where there is none that can be read."""
    import yaml

    path = folder / "README.md"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return {}
    block = text[3:].split("\n---", 1)[0]
    try:
        found = yaml.safe_load(block)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_licence(path: Path) -> bool:
    return path.is_file() and any(fnmatchcase(path.name.lower(), pattern) for pattern in _FILES)


def _ask(message: str, code: str) -> ReleaseError:
    return ReleaseError(message, hint="say under which licence you release: --license ID", code=code)
