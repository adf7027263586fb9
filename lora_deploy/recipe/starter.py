"""A first recipe for an adapter, with a comment for everything that one may want to change."""

from __future__ import annotations

from string import Template

import yaml

_STARTER = Template("""\
# Everything that becomes of this adapter: lora-deploy run recipe.yaml
# What is not said has a default; lora-deploy recipe show recipe.yaml prints them all.
# $summary
adapters:
  - $adapter$alpha
base: $base
dtypes: [float16]     # or bfloat16, float32, base; several make a matrix
output: dist          # a folder in it for each adapter and dtype

merge:
  memory: 2GB         # the most that the work may use; more makes it no better, less may make it slower

export:               # ONNX graphs; false: none
  provider: cpu       # or cuda
  # quantize: int4    # or int8, int8-blockwise
  # layout: genai     # what onnxruntime-genai loads

evidence:
  # probes: prompts.jsonl   # your own prompts, beside the random ones
  latency_bound: 3%
  seconds: 60

release:
  # license: apache-2.0     # default: the base's own
  # accept:                 # what is missing or cannot tell, and that you take upon yourself
  #   - {code: latency-inconclusive, because: "a busy machine"}

# targets:                  # owner/name, oci://host/ns/name:tag, s3://bucket/path, ./folder
#   - owner/{adapter}
# push:
#   tag: v1
""")


def starter(*, adapter: str, base: str | None, needs_alpha: bool, summary: str) -> str:
    """Write a first recipe.

    ``summary`` says what the adapter is, in one line; without a base, its place says that one is needed.
    """
    alpha = "\n    # alpha: 16        # its file carries none: say it" if needs_alpha else ""
    return _STARTER.substitute(
        adapter=_scalar(adapter) if not needs_alpha else f"path: {_scalar(adapter)}",
        alpha=alpha,
        base=_scalar(base) if base else "owner/name    # the adapter names none: say it",
        summary=" ".join(summary.split()),
    )


def _scalar(text: str) -> str:
    """Write a string as YAML, in quotes only where it needs them."""
    return yaml.safe_dump(text, width=10_000, allow_unicode=True).removesuffix("...\n").strip()
