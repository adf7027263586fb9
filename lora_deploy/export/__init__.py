"""From weights to graphs that onnxruntime runs: the graph is made once a base, weights are bound to it in seconds.

    blueprint ─ graph maker, twice ─▶ graph and binding table, cached ─ weights streamed through the table ─▶ Exported

Promise: importing this package imports no tensor library. A graph depends on the base's configuration and on its
tensors' names, shapes and dtypes, never on a weight (law 8); every byte of weights is explained by the table, or there
is no export.
"""

from __future__ import annotations

from lora_deploy.registry import Entry

GRAPH_MAKERS: tuple[Entry, ...] = (
    Entry(
        name="transformers",
        summary="transformers' own exporters: every architecture that it can trace",
        path="lora_deploy.export.transformers:MAKER",
    ),
    Entry(
        name="diffusers",
        summary="diffusion pipelines, component by component, in the folders that optimum's pipelines read",
        path="lora_deploy.export.diffusers:MAKER",
    ),
    Entry(
        name="genai",
        summary="onnxruntime-genai's builder: fewer nodes, for the decoders that it knows",
        path="lora_deploy.export.genai:MAKER",
    ),
)
