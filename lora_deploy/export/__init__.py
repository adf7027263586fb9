"""From weights to graphs that onnxruntime runs: the graph is made once a base, weights are bound to it in seconds.

Promise: importing this package imports no tensor library.
"""

from __future__ import annotations

from lora_deploy.registry import Entry

GRAPH_MAKERS: tuple[Entry, ...] = ()
