"""The architectures of the coverage table: each as small as it may be, with what its adapter changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.peer.trained import randomize

VOCABULARY = 97
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "d_ff", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok",), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
"""Settings under all the names that configurations have for them."""
LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers"),
    "decoder_layers",
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A tiny model and what its adapter adapts."""

    name: str
    """Row of the table."""
    cls: str
    """Class of transformers."""
    kind: str
    """Its ``model_type``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: str | tuple[str, ...] = "all-linear"
    n_layers: int = 2
    """Two where layers differ or are cheap; tracing takes its time for each."""
    saved: tuple[str, ...] = ()
    """Modules that are trained whole, such as a head."""
    fault: str = ""
    """What the error says, where it is known not to work."""

    def build(self) -> nn.Module:
        """Make the model, all of its weights random and none alike."""
        cls = getattr(transformers, self.cls)
        return randomize(cls(small(self.kind, self.n_layers, **self.options)))


def small(kind: str, n_layers: int, **options: Any) -> PreTrainedConfig:
    """Make a configuration with the sizes that it knows."""
    cls = CONFIG_MAPPING[kind]
    known = cls().to_dict()
    sizes = {name: size for name, size in {**SIZES, **dict.fromkeys(LAYERS, n_layers)}.items() if name in known}
    return cls(**{**sizes, **options})


def _decoder(kind: str, cls: str, name: str = "", n_layers: int = 1, **options: Any) -> Architecture:
    return Architecture(name=name or kind, cls=cls, kind=kind, n_layers=n_layers, options=options)


def _encoder(kind: str, cls: str, *saved: str, name: str = "", n_layers: int = 2, **options: Any) -> Architecture:
    return Architecture(name=name or kind, cls=cls, kind=kind, n_layers=n_layers, options=options, saved=saved)


_MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = {
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
    "num_key_value_heads": 4,
}

DECODERS = (
    _decoder("llama", "LlamaForCausalLM", n_layers=2),
    _decoder("mistral", "MistralForCausalLM", n_layers=2),
    _decoder("mistral", "MistralForCausalLM", "mistral, sliding window", sliding_window=4, n_layers=2),
    _decoder("mixtral", "MixtralForCausalLM", n_layers=2),
    _decoder("qwen2", "Qwen2ForCausalLM", n_layers=2),
    _decoder("qwen2_moe", "Qwen2MoeForCausalLM", **_MOE),
    _decoder("qwen3", "Qwen3ForCausalLM"),
    _decoder("qwen3_moe", "Qwen3MoeForCausalLM", **_MOE),
    _decoder("gemma", "GemmaForCausalLM"),
    _decoder("gemma2", "Gemma2ForCausalLM", sliding_window=4, n_layers=2),
    _decoder("gemma3_text", "Gemma3ForCausalLM", sliding_window=4, sliding_window_pattern=2, n_layers=2),
    _decoder("phi", "PhiForCausalLM"),
    _decoder("phi3", "Phi3ForCausalLM"),
    _decoder("gpt2", "GPT2LMHeadModel", n_layers=2),
    _decoder("gpt_bigcode", "GPTBigCodeForCausalLM"),
    _decoder("gpt_neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=4, n_layers=2),
    _decoder("gpt_neox", "GPTNeoXForCausalLM"),
    _decoder("gptj", "GPTJForCausalLM", rotary_dim=4),
    _decoder("gpt_oss", "GptOssForCausalLM", sliding_window=4, n_layers=2),
    _decoder("codegen", "CodeGenForCausalLM", rotary_dim=4),
    _decoder("bloom", "BloomForCausalLM"),
    _decoder("opt", "OPTForCausalLM"),
    _decoder("falcon", "FalconForCausalLM"),
    _decoder("mpt", "MptForCausalLM"),
    _decoder("olmo", "OlmoForCausalLM"),
    _decoder("olmo2", "Olmo2ForCausalLM"),
    _decoder("stablelm", "StableLmForCausalLM"),
    _decoder("starcoder2", "Starcoder2ForCausalLM"),
    _decoder("cohere", "CohereForCausalLM"),
    _decoder("cohere2", "Cohere2ForCausalLM", sliding_window=4, sliding_window_pattern=2, n_layers=2),
    _decoder("granite", "GraniteForCausalLM"),
    _decoder("deepseek_v3", "DeepseekV3ForCausalLM", **_DEEPSEEK),
    _decoder("smollm3", "SmolLM3ForCausalLM", n_layers=2),
    _decoder("nemotron", "NemotronForCausalLM"),
    _decoder("glm", "GlmForCausalLM"),
    _decoder("glm4", "Glm4ForCausalLM"),
    Architecture(
        name="llama4_text",
        cls="Llama4ForCausalLM",
        kind="llama4_text",
        options={"intermediate_size_mlp": 40},
        fault="prefill: cannot be exported: ConversionError",
    ),
    Architecture(
        name="mamba",
        cls="MambaForCausalLM",
        kind="mamba",
        options={"state_size": 4, "time_step_rank": 2},
        targets=("in_proj",),
        fault="Got invalid dimensions for input: attention_mask",
    ),
    Architecture(
        name="mamba2",
        cls="Mamba2ForCausalLM",
        kind="mamba2",
        options={"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        targets=("in_proj",),
    ),
)

_HEAD = {"num_labels": 3}

ENCODERS = (
    _encoder("bert", "BertModel"),
    _encoder("bert", "BertForMaskedLM", name="bert, masked language"),
    _encoder("bert", "BertForSequenceClassification", "classifier", name="bert, classifier", **_HEAD),
    _encoder("bert", "BertForTokenClassification", "classifier", name="bert, token classifier", **_HEAD),
    _encoder("roberta", "RobertaForSequenceClassification", "classifier", name="roberta, classifier", **_HEAD),
    _encoder("distilbert", "DistilBertForMaskedLM"),
    _encoder("deberta-v2", "DebertaV2ForSequenceClassification", "classifier", **_HEAD),
    _encoder("electra", "ElectraForSequenceClassification", "classifier", **_HEAD),
    _encoder("albert", "AlbertForSequenceClassification", "classifier", **_HEAD),
    _encoder("modernbert", "ModernBertForMaskedLM", local_attention=8, global_attn_every_n_layers=2),
    _encoder("xlm-roberta", "XLMRobertaModel"),
    _encoder("mpnet", "MPNetModel"),
    _encoder("llama", "LlamaForSequenceClassification", "score", name="llama, classifier", **_HEAD),
)

_SPEECH = {
    "num_mel_bins": 4,
    "max_source_positions": 10,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

ENCODER_DECODERS = (
    _encoder("t5", "T5ForConditionalGeneration"),
    _encoder("t5", "T5EncoderModel", name="t5, encoder alone"),
    _encoder("mt5", "MT5ForConditionalGeneration", n_layers=1),
    _encoder("bart", "BartForConditionalGeneration"),
    _encoder("mbart", "MBartForConditionalGeneration", n_layers=1),
    _encoder("pegasus", "PegasusForConditionalGeneration", n_layers=1),
    _encoder("marian", "MarianMTModel", n_layers=1),
    _encoder("m2m_100", "M2M100ForConditionalGeneration", n_layers=1),
    _encoder("whisper", "WhisperForConditionalGeneration", **_SPEECH),
)

_PATCHES = {"image_size": 16, "patch_size": 8}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **_PATCHES,
}
_TWO_TOWERS = {"text_config": {**_TEXT, "eos_token_id": 2}, "vision_config": _VISION, "projection_dim": 16}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
_CONVNEXT = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 16, "patch_size": 4}
_AUDIO = {
    "conv_dim": (8, 8),
    "conv_stride": (10, 8),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
_SPECTRUM = {"num_mel_bins": 16, "max_length": 32, "patch_size": 8, "num_labels": 3}
_BLIP_TEXT = {**_TEXT, "encoder_hidden_size": 32, "projection_dim": 16, "bos_token_id": 1, "sep_token_id": 2}
_LLAVA = {
    "text_config": {"model_type": "llama", **_TEXT, "num_key_value_heads": 2},
    "vision_config": {"model_type": "clip_vision_model", **_VISION},
    "image_token_index": 5,
}

_PALIGEMMA = {
    "text_config": {"model_type": "gemma", **_TEXT, "num_key_value_heads": 2, "head_dim": 8},
    "vision_config": {"model_type": "siglip_vision_model", **_VISION},
    "image_token_id": 5,
    "projection_dim": 32,
}
_QWEN_VL = {
    "text_config": {
        **_TEXT,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4},
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}

IMAGES_AND_SOUND = (
    _encoder("vit", "ViTForImageClassification", "classifier", **_HEAD),
    _encoder("deit", "DeiTForImageClassification", "classifier", **_HEAD),
    _encoder("swin", "SwinForImageClassification", "classifier", **_SWIN, **_HEAD),
    _encoder("dinov2", "Dinov2ForImageClassification", "classifier", **_HEAD),
    _encoder("convnext", "ConvNextForImageClassification", "classifier", **_CONVNEXT, **_HEAD),
    _encoder("clip", "CLIPModel", **_TWO_TOWERS),
    _encoder("clip_text_model", "CLIPTextModelWithProjection", name="clip, text tower", projection_dim=16),
    _encoder("clip_vision_model", "CLIPVisionModelWithProjection", name="clip, image tower", projection_dim=16),
    Architecture(
        name="siglip",
        cls="SiglipModel",
        kind="siglip",
        options={"text_config": {**_TEXT, "projection_size": 32}, "vision_config": _VISION},
        targets=("q_proj", "v_proj", "fc1"),  # PEFT's adapter beside the pooling head's out_proj is never run
    ),
    _encoder("wav2vec2", "Wav2Vec2ForCTC", **_AUDIO),
    _encoder("wav2vec2", "Wav2Vec2ForSequenceClassification", "classifier", name="wav2vec2, classifier", **_AUDIO),
    _encoder("hubert", "HubertForCTC", **_AUDIO),
    _encoder("audio-spectrogram-transformer", "ASTForAudioClassification", "classifier", **_SPECTRUM),
    Architecture(
        name="blip",
        cls="BlipForConditionalGeneration",
        kind="blip",
        options={"text_config": _BLIP_TEXT, "vision_config": _VISION},
        targets=("query", "value", "qkv", "fc1"),
    ),
    _encoder("llava", "LlavaForConditionalGeneration", **_LLAVA),
    Architecture(
        name="paligemma",
        cls="PaliGemmaForConditionalGeneration",
        kind="paligemma",
        options=_PALIGEMMA,
        fault="the base's own graph is not the base",
    ),
    Architecture(
        name="qwen2_vl",
        cls="Qwen2VLForConditionalGeneration",
        kind="qwen2_vl",
        options=_QWEN_VL,
        fault="its images come as patches of a grid (image_grid_thw), for which no sample is known",
    ),
)

ARCHITECTURES = {entry.name: entry for entry in (*DECODERS, *ENCODERS, *ENCODER_DECODERS, *IMAGES_AND_SOUND)}
