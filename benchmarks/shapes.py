"""Model shapes that the benchmarks are run on: real architectures, random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder of the Llama family."""

    name: str
    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocabulary: int
    n_shards: int
    is_tied: bool = False
    """Whether the head is the embedding."""
    dtype: str = "bfloat16"
    """What weights are stored in."""

    @property
    def key_value(self) -> int:
        """Rows of the key and value projections."""
        return self.hidden // self.n_heads * self.n_kv_heads

    def projections(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the seven linear layers of a block, by path within it."""
        h, i, kv = self.hidden, self.intermediate, self.key_value
        return {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (i, h),
            "mlp.up_proj": (i, h),
            "mlp.down_proj": (h, i),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order in which a checkpoint holds them."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.n_layers):
            prefix = f"model.layers.{layer}"
            for path, shape in self.projections().items():
                yield f"{prefix}.{path}.weight", shape
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"{prefix}.{norm}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.is_tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.is_tied,
            "torch_dtype": self.dtype,
        }


SHAPES = {
    "tiny": Shape(
        name="Llama-shaped, 20M parameters",
        hidden=256,
        intermediate=704,
        n_layers=12,
        n_heads=8,
        n_kv_heads=4,
        vocabulary=16000,
        n_shards=2,
    ),
    "135m": Shape(
        name="SmolLM2-135M-shaped",
        hidden=576,
        intermediate=1536,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        vocabulary=49152,
        n_shards=1,
        is_tied=True,
        dtype="float32",
    ),
    "1b": Shape(
        name="TinyLlama-1.1B-shaped",
        hidden=2048,
        intermediate=5632,
        n_layers=22,
        n_heads=32,
        n_kv_heads=4,
        vocabulary=32000,
        n_shards=1,
    ),
    "8b": Shape(
        name="Llama-3-8B-shaped",
        hidden=4096,
        intermediate=14336,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        vocabulary=128256,
        n_shards=4,
    ),
}
