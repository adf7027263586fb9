"""Merge into an existing ONNX export, whoever made it: its graphs stay, byte for byte, and only adapted weights change.

An export is seen as a checkpoint: every weight that can be named and whose layout the graph itself tells is a tensor
of it, under the name and in the layout that the model's checkpoint has. So adapters bind to it as to any base, the
merge is computed by the code that computes every merge, and the result is put back where the graph reads it. What
cannot be told is said, and refused when an adapter wants it; nothing is guessed.
"""

from __future__ import annotations
