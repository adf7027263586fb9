"""Models of any class, as small as their library lets them be."""

from __future__ import annotations

import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.peer.models import VOCABULARY
from tests.peer.trained import randomize

SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "d_ff", "ffn_hidden_size"), 24),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 12),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts"), 3),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 1,
    "n_routed_experts": 4,
    "state_size": 4,
    "d_inner": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "use_cache": False,
}


def small(model_type: str) -> PreTrainedConfig:
    """Configure a model as small as the library lets it be."""
    cls = CONFIG_MAPPING[model_type]
    known = cls().to_dict()
    return cls(**{name: size for name, size in SIZES.items() if name in known})


def of_class(name: str) -> nn.Module:
    """Build a small model of a class of transformers, with random weights."""
    cls = getattr(transformers, name)
    return randomize(cls(small(cls.config_class.model_type)))
