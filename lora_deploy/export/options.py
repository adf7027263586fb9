"""What the user may choose about an export. No tensor library is imported."""

from __future__ import annotations

from dataclasses import dataclass

MAKER_CHOICES = ("auto", "transformers", "diffusers", "genai")
DTYPE_CHOICES = ("float32", "float16", "bfloat16")
PROVIDER_CHOICES = ("cpu", "cuda")
STORAGE_CHOICES = ("external", "shared")
QUANTIZE_CHOICES = ("int4", "int8-blockwise", "int8")
LAYOUT_CHOICES = ("transformers", "diffusers", "genai")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Options of an export."""

    dtype: str | None = None
    """``float32``, ``float16`` or ``bfloat16``: what the graph computes in; None is the weights' own."""
    provider: str = "cpu"
    """``cpu`` or ``cuda``: whose kernels nodes are fused for."""
    storage: str = "external"
    """``external``: files of their own, laid out as the graph wants them; ``shared``: the merged safetensors files
    themselves, where their layout allows."""
    layout: str = "transformers"
    """``transformers``: what its ``ExportedModel`` loads; ``genai``: what onnxruntime-genai loads; ``diffusers``: what
    optimum's pipelines load, which every pipeline gets."""
    maker: str = "auto"
    """Which graph maker; ``auto`` is the one that the layout needs."""
    quantize: str | None = None
    """``int4``, ``int8-blockwise`` or ``int8``: see ``quantisation``; None keeps the graph's own format."""
    block_size: int | None = None
    """Weights that share a scale; None is the method's default."""
    is_symmetric: bool | None = None
    """Whether blocks have no zero point; None is the method's default."""
    fresh: bool = False
    """Replace another export at the output, after this one succeeded."""
