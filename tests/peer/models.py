"""Tiny models with random weights: one for each architecture that names, ties or stores its weights in its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from tests.peer.trained import Inputs, randomize

VOCABULARY = 37


def token_ids(n_tokens: int = 9) -> Inputs:
    """Two rows of tokens, the same for every model."""
    generator = torch.Generator().manual_seed(5)
    return {"input_ids": torch.randint(0, VOCABULARY, (2, n_tokens), generator=generator)}


def llama(**options: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return randomize(LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options})))


def qwen2(**options: Any) -> Qwen2ForCausalLM:
    """Biases on q, k and v."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return randomize(Qwen2ForCausalLM(Qwen2Config(**{**sizes, **heads, **options})))


def gpt2(**options: Any) -> GPT2LMHeadModel:
    """Conv1D layers, one of them square (``attn.c_proj``), and a tied head."""
    config = GPT2Config(
        **{"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 16, **options}
    )
    return randomize(GPT2LMHeadModel(config))


_EXPERTS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def mixtral(**options: Any) -> MixtralForCausalLM:
    """Fused experts in memory, (experts, out, in); on disk ``block_sparse_moe`` with a file entry for each expert."""
    sizes = {"intermediate_size": 12, "num_local_experts": 3, "num_experts_per_tok": 2, "vocab_size": VOCABULARY}
    return randomize(MixtralForCausalLM(MixtralConfig(**{**_EXPERTS, **sizes, **options})))


def qwen2_moe(**options: Any) -> Qwen2MoeForCausalLM:
    """As Mixtral, under other names, with a shared expert beside."""
    sizes = {"intermediate_size": 24, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "vocab_size": VOCABULARY}
    return randomize(Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**_EXPERTS, **sizes, **experts, **options})))


def gpt_oss(**options: Any) -> GptOssForCausalLM:
    """Fused experts on disk too, (experts, in, out), and they say so (``is_transposed``)."""
    sizes = {"intermediate_size": 12, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
    return randomize(GptOssForCausalLM(GptOssConfig(**{**_EXPERTS, **sizes, "vocab_size": VOCABULARY, **options})))


def llama4(**options: Any) -> Llama4ForCausalLM:
    """Fused experts on disk too, (experts, in, out), and nothing says so."""
    sizes = {"intermediate_size": 12, "intermediate_size_mlp": 20, "num_local_experts": 3, "head_dim": 8}
    config = Llama4TextConfig(**{**_EXPERTS, **sizes, "vocab_size": VOCABULARY, **options})
    return randomize(Llama4ForCausalLM(config))


def gpt_neox() -> GPTNeoXForCausalLM:
    """Saves its head as ``embed_out``, keeps it as ``lm_head``."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return randomize(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes)))


def opt() -> OPTForCausalLM:
    """Biases everywhere, an embedding narrower than the model, a tied head."""
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=8, max_position_embeddings=16, **sizes)
    return randomize(OPTForCausalLM(config))


def t5(**options: Any) -> T5ForConditionalGeneration:
    """An encoder and a decoder that share their embedding; ``wo`` stays in float32."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return randomize(
        T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes, **options))
    )


def bert(cls: type[nn.Module] = BertModel, **options: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return randomize(cls(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes, **options)))


def distilbert(cls: type[nn.Module] = DistilBertForMaskedLM, **options: Any) -> nn.Module:
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
    return randomize(cls(DistilBertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes, **options)))


def vit(cls: type[nn.Module] = ViTForImageClassification, **options: Any) -> nn.Module:
    """Renamed in memory: ``encoder.layer.0.attention.attention.query`` is ``layers.0.attention.q_proj``."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return randomize(cls(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes, **options)))


def whisper() -> WhisperForConditionalGeneration:
    """A head, ``proj_out``, that is the decoder's embedding."""
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 4}
    places = {"max_source_positions": 10, "max_target_positions": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = WhisperConfig(
        vocab_size=VOCABULARY, suppress_tokens=None, begin_suppress_tokens=None, **sizes, **heads, **places, **tokens
    )
    return randomize(WhisperForConditionalGeneration(config))


def llava(text: PreTrainedConfig | None = None) -> LlavaForConditionalGeneration:
    """Every tensor has another name on disk than in memory; a llama reads the text, or what ``text`` configures."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = text or LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    return randomize(
        LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=3))
    )


def clip(**options: Any) -> CLIPModel:
    """Two towers that meet in their last projections."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 5, **sizes}
    vision = {"image_size": 8, "patch_size": 4, **sizes}
    return randomize(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12, **options)))


def wav2vec2(**options: Any) -> Wav2Vec2ForCTC:
    """Waves, cut by convolutions; a weight norm inside."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    cut = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    places = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    return randomize(Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=VOCABULARY, **sizes, **cut, **places, **options)))


def images() -> Inputs:
    generator = torch.Generator().manual_seed(5)
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)}


def translation() -> Inputs:
    tokens = token_ids()["input_ids"]
    return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}


def speech() -> Inputs:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(2, 4, 20, generator=generator, dtype=torch.float64)
    return {"input_features": features, "decoder_input_ids": token_ids()["input_ids"]}


def image_and_text() -> Inputs:
    tokens = token_ids()["input_ids"].clamp(min=4)
    tokens[:, 1:5] = 3  # one place for each of the four patches
    return {"input_ids": tokens, **images()}


class Toy(nn.Module):
    """Modules applied one after the other."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.order = list(modules)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = getattr(self, name)(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


class SelfAttention(nn.Module):
    """Torch's own attention, wrapped so that it takes one input."""

    def __init__(self, n_dims: int = 8) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(n_dims, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def toy(**modules: nn.Module) -> nn.Module:
    return randomize(Toy(**modules))


def conv1d(n_in: int, n_out: int) -> nn.Module:
    """GPT-2's linear layer, which stores (in, out)."""
    return Conv1D(n_out, n_in)
