"""Adapter names against checkpoint names: which stored tensor, or which part of one, a name means.

Promise: names are compared whole, after both were brought to one canonical form; a suffix alone never matches. A name
that fits two tensors is ambiguous and said to be. transformers is not needed: what it renames between versions is
written down here as data (``dialects``) and compared with it by a test.
"""

from __future__ import annotations

from lora_deploy.names.index import AmbiguousNameError, NameIndex, Stack
from lora_deploy.names.parts import Part
from lora_deploy.names.ties import Tie, ties_of, vocabulary_names

__all__ = ["AmbiguousNameError", "NameIndex", "Part", "Stack", "Tie", "ties_of", "vocabulary_names"]
