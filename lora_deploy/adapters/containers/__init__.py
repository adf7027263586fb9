"""Files that hold tensors by name, other than safetensors and ``torch.save``; a container is one module here.

Promise: what a header claims is checked against the file before memory is taken for it; nothing is unpickled; damage of
any sort is a ``MalformedAdapterError``.
"""

from __future__ import annotations


def one_line(error: Exception) -> str:
    """Say what a library's error says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
