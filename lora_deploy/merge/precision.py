"""Which tensors an architecture keeps in float32, and which architectures overflow float16 in their activations.

Both are facts about architectures, not choices: a table here, by ``model_type``, from transformers 5.23.0
(``_keep_in_fp32_modules`` and ``_keep_in_fp32_modules_strict`` of every modelling file; a test compares them), and by
class from diffusers 0.42.1 (``_keep_in_fp32_modules``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_deploy.tensors import DType

_KEPT_IN_FLOAT16 = (
    (
        ("afmoe",),
        (
            "expert_bias",
            "input_layernorm",
            "k_norm",
            "norm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
            "pre_mlp_layernorm",
            "q_norm",
        ),
    ),
    (
        ("axk2", "deepseek_v32", "glm_moe_dsa", "mistral_large4", "mistral_large4_text", "pixtral"),
        ("indexer.weights_proj",),
    ),
    (
        ("deepseek_v4",),
        (
            "self_attn.compressor.gate_proj",
            "self_attn.compressor.indexer.gate_proj",
            "self_attn.compressor.indexer.kv_proj",
            "self_attn.compressor.indexer.scorer.weights_proj",
            "self_attn.compressor.kv_proj",
        ),
    ),
    (("gpt_oss",), ("input_layernorm", "norm", "post_attention_layernorm")),
    (
        (
            "instructblip",
            "instructblip_qformer",
            "instructblip_vision_model",
            "instructblipvideo",
            "instructblipvideo_qformer",
            "instructblipvideo_vision_model",
        ),
        ("query_tokens",),
    ),
    (("longcat_flash",), ("classifier.weight",)),
    (("mt5", "pop2piano", "t5", "udop", "umt5"), ("wo",)),
    (("blip-2", "blip_2_qformer", "blip_2_vision_model", "opt"), ("qformer", "query_tokens")),
    (("rwkv",), ("time_decay", "time_first")),
)
"""Model types, and the parts of tensor names that stay float32 in a float16 model."""

_KEPT_IN_16_BITS = (
    (
        (
            "axk1",
            "axk2",
            "deepseek_v3",
            "deepseek_v32",
            "dots1",
            "dots3_note",
            "dots3_note_audio_encoder",
            "dots3_note_text",
            "dots3_note_vision_encoder",
            "exaone_moe",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe",
            "glm4v_moe_text",
            "glm4v_moe_vision",
            "glm_moe_dsa",
            "hy_v3",
            "kolibri1",
            "mimo_v2_flash",
            "solar_open",
        ),
        ("e_score_correction_bias",),
    ),
    (("bailing_hybrid",), ("A_log", "conv1d", "dt_bias", "e_score_correction_bias")),
    (("beam",), ("e_score_correction_bias", "mlp.gate.weight")),
    (
        ("deepseek_v4",),
        (
            "attn_hc",
            "e_score_correction_bias",
            "ffn_hc",
            "hc_head",
            "input_layernorm",
            "kv_norm",
            "norm",
            "position_bias",
            "post_attention_layernorm",
            "q_a_norm",
            "sinks",
        ),
    ),
    (
        ("ernie4_5_moe", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "ernie4_5_vl_moe_vision"),
        ("gate.weight", "moe_statics"),
    ),
    (
        ("esmc", "esmfold2"),
        (
            "boundaries",
            "distogram_head",
            "fourier",
            "norm.bias",
            "norm.weight",
            "norm_mix",
            "norm_single",
            "norm_start",
        ),
    ),
    (("flint",), ("gate.weight", "sinks")),
    (
        ("glm5_next", "glm5_next_text", "glm5_next_vision"),
        (
            "A_log",
            "attn_hc.base",
            "attn_hc.scale",
            "conv1d",
            "dt_bias",
            "e_score_correction_bias",
            "ffn_hc.base",
            "ffn_hc.scale",
        ),
    ),
    (("gradium_phonon_tts", "pocket_tts"), ("freqs", "latent_mean", "latent_std")),
    (("granite_speech5_ctc", "granite_speech5_encoder"), ("conv.norm",)),
    (
        ("hy_v4",),
        (
            "base",
            "e_score_correction_bias",
            "fn",
            "hc_base",
            "hc_fn",
            "hc_scale",
            "k_norm",
            "lm_head",
            "scale",
            "sinks",
            "weights_proj",
        ),
    ),
    (
        ("inkling2", "inkling2_text", "inkling2_vision"),
        (
            "attention_input",
            "e_score_correction_bias",
            "final_input",
            "k_sconv.conv1d",
            "mlp.gate.weight",
            "mlp_input",
            "post_attention_convolution",
            "post_mlp_convolution",
            "v_sconv.conv1d",
        ),
    ),
    (
        ("inkling_audio", "inkling_mm_model", "inkling_text", "inkling_vision"),
        ("attn_sconv", "e_score_correction_bias", "gate.global_scale", "k_sconv", "mlp_sconv", "v_sconv"),
    ),
    (("llama", "voxtral", "voxtral_encoder"), ("embed_positions",)),
    (("kyutai_speech_to_text", "mimi"), ("codec_model",)),
    (
        ("muse_spark", "muse_spark_audio", "muse_spark_text", "muse_spark_vision"),
        (
            "e_score_correction_bias",
            "mlp.gate.weight",
            "post_attention_residual_gate",
            "post_feedforward_residual_gate",
        ),
    ),
    (
        (
            "nemo_speechlm",
            "nemotron3_5_transcribe_asr_audio",
            "nemotron3_5_transcribe_audio",
            "nemotron3_5_transcribe_word_timestamp",
            "nemotron3_diarization",
        ),
        ("audio_tower", "multi_modal_projector"),
    ),
    (("nemotron_h",), ("audio_tower", "e_score_correction_bias", "multi_modal_projector")),
    (("openai_privacy_filter",), ("sinks",)),
    (("mistral_large4", "mistral_large4_text", "pixtral"), ("mlp.gate.weight", "rotary_emb")),
    (("slanext", "slanext_vision"), ("structure_attention_cell", "structure_generator")),
)
"""Model types, and the parts of tensor names that stay float32 in a float16 or bfloat16 model."""

_KEPT_BY_DIFFUSERS = (
    (
        ("AnyFlowFARTransformer3DModel", "AnyFlowTransformer3DModel", "ChronoEditTransformer3DModel"),
        ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
    ),
    (
        ("SkyReelsV2Transformer3DModel", "WanTransformer3DModel", "WanVACETransformer3DModel"),
        ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
    ),
    (
        ("WanAnimateTransformer3DModel",),
        ("motion_synthesis_weight", "rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
    ),
    (
        ("WanAnimate2Transformer3DModel",),
        ("modulation", "time_embedding", "time_projection", "scale_shift_table", "norm1", "norm2", "norm3"),
    ),
    (
        ("HeliosTransformer3DModel",),
        ("history_key_scale", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
    ),
    (("CosmosControlNetModel", "CosmosTransformer3DModel"), ("learnable_pos_embed",)),
    (("Cosmos3OmniTransformer",), ("time_embedder",)),
    (("Flux3Transformer2DModel",), ("norm_k", "norm_q")),
    (
        ("JoyImageEditPlusTransformer3DModel", "JoyImageEditTransformer3DModel"),
        ("norm1", "norm2", "norm_out", "time_embedder"),
    ),
    (("Kandinsky5Transformer3DModel",), ("modulation", "text_modulation", "time_embeddings", "visual_modulation")),
    (("Kandinsky6SRTransformer3DModel",), ("modulation", "pooled_bias", "time_embeddings")),
    (("Kandinsky6Transformer3DModel",), ("modulation", "time_embeddings")),
    (("Krea2Transformer2DModel",), ("norm", "norm1", "norm2", "norm_k", "norm_q")),
    (
        ("MiniMaxH3Transformer3DModel",),
        ("audio_proj_in", "audio_proj_out", "proj_in", "proj_out", "rope", "time_embedder"),
    ),
    (
        ("AutoencoderKLMiniMaxH3",),
        ("encoder", "norm1", "norm2", "norm_out", "quant_conv", "scale1", "scale2"),
    ),
    (
        ("AutoencoderKLMiniMaxH3Audio",),
        ("dec_in_proj", "decoder", "encoder", "logs_proj", "mean_proj", "pre_block"),
    ),
    (("RFD4ProteinaAutoencoder",), ("latent_decoder_mean_n_log_scale", "norm")),
    (("RFD4ProteinaTransformer",), ("cond_factory", "ln_out", "norm")),
)
"""Classes of diffusers 0.42.1, and the parts of tensor names that stay float32 in a 16-bit model."""

OVERFLOWS_FLOAT16 = frozenset(
    {
        "t5",
        "mt5",
        "umt5",
        "longt5",
        "udop",
        "pop2piano",
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "pegasus",
        "bigbird_pegasus",
    }
)
"""Model types whose activations are known to exceed float16's range whatever their weights are."""


def model_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Every ``model_type`` that a configuration and its nested ones name, outermost first."""
    found = [config["model_type"]] if isinstance(config.get("model_type"), str) else []
    for value in config.values():
        if isinstance(value, Mapping):
            found.extend(model_types(value))
    return tuple(found)


def is_kept(name: str, config: Mapping[str, Any], dtype: DType) -> bool:
    """Whether the architecture keeps this tensor as it is when the model is cast to ``dtype``."""
    if dtype not in {DType.F16, DType.BF16}:
        return False
    types = {*model_types(config), config.get("_class_name")}
    tables: Iterable[tuple[tuple[str, ...], tuple[str, ...]]] = (*_KEPT_IN_16_BITS, *_KEPT_BY_DIFFUSERS)
    if dtype is DType.F16:
        tables = (*_KEPT_IN_FLOAT16, *tables)
    parts = [part for names, kept in tables if types.intersection(names) for part in kept]
    return any(re.search(rf"(^|\.){re.escape(part)}($|\.)", name) for part in parts)
