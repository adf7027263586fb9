"""Code blocks of Markdown files: fenced ones by their language, and indented ones, which are shell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "adr"
)
FILES = ("README.md", "ci/README.md", *_DOCUMENTS)
GENERATED = frozenset({"docs/nightly.md", "docs/coverage.md"})
_FENCE = re.compile(r"^```(\w*)\s*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block, and where it stands."""

    file: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}"


def blocks_of(file: str) -> Iterator[Block]:
    """Yield the blocks of a file in order."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    k = 0
    while k < len(lines):
        start = k
        if fence := _FENCE.match(lines[k]):
            k += 1
            while lines[k] != "```":
                k += 1
            yield Block(file=file, line=start + 1, language=fence[1], text="\n".join(lines[start + 1 : k]))
        elif lines[k].startswith("    ") and not lines[k - 1].strip():
            while k < len(lines) and (lines[k].startswith("    ") or not lines[k].strip()):
                k += 1
            text = "\n".join(line.removeprefix("    ") for line in lines[start:k]).rstrip()
            yield Block(file=file, line=start + 1, language="", text=text)
            continue
        k += 1


ALL = [block for file in FILES if file not in GENERATED for block in blocks_of(file)]


def commands_of(block: Block) -> Iterator[str]:
    """Yield the command lines of ``lora-deploy`` in a block, with their comments; a backslash joins two lines."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    for line in text.splitlines():
        match = re.match(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(lora-deploy .+)$", line)
        if match:
            yield match[1]
