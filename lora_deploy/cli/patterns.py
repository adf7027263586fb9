"""Many tensor names in few lines: layers of one kind become one pattern and a count."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def summarise_names(names: Iterable[str]) -> list[tuple[str, int]]:
    """Replace numbers between dots by ``*`` and count; in the order of first appearance.

    ``model.layers.0.mlp.up_proj.weight`` counts as ``model.layers.*.mlp.up_proj.weight``; a name that is alone stays.
    """
    names = list(names)
    patterns = Counter(_NUMBER.sub("*", name) for name in names)
    alone = {_NUMBER.sub("*", name): name for name in names}
    return [(alone[pattern] if number == 1 else pattern, number) for pattern, number in patterns.items()]
