"""How one model is named by different versions of its library, on disk and in memory, as data.

An adapter carries the in-memory names of the version that trained it; the base carries on-disk names. Instead of a
table for every pair, each dialect is brought to one *canonical* form, without wrappers and without the base model's
prefix; two names mean the same tensor when their canonical forms are equal. The forms need not be any library's names:
they only must be the same for all dialects of one tensor and different for different tensors.

Source: transformers 5.23, ``conversion_mapping.py`` and each model's ``base_model_prefix``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

Renames = tuple[tuple[str, str], ...]

_WRAPPERS = r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)(?=\.)"
_ALWAYS: Renames = (
    (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),
    (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
    (r"\bweight_g$", "parametrizations.weight.original0"),
    (r"\bweight_v$", "parametrizations.weight.original1"),
)

_VISION_LANGUAGE: Renames = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^(vision_tower|image_tower|video_tower)\.vision_model\.", r"\1."),
)
_MIXTRAL: Renames = ((r"\.block_sparse_moe\.", ".mlp."),)
_VIT: Renames = (
    (r"\bencoder\.layer\.", "layers."),
    (r"\battention\.attention\.(query|key|value)\b", r"attention.\1"),
    (r"\battention\.query\b", "attention.q_proj"),
    (r"\battention\.key\b", "attention.k_proj"),
    (r"\battention\.value\b", "attention.v_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)
_DINOV2: Renames = (
    *_VIT[1:6],
    (r"\bmlp\.weights_out\b", "mlp.down_proj"),
)
_SWIN: Renames = (
    (r"\battention\.self\.query\b", "attention.q_proj"),
    (r"\battention\.self\.key\b", "attention.k_proj"),
    (r"\battention\.self\.value\b", "attention.v_proj"),
    (
        r"\battention\.self\.relative_position_bias_table\b",
        "attention.relative_position_bias.relative_position_bias_table",
    ),
    *_VIT[5:],
)
_SEGFORMER: Renames = (
    (r"\bencoder\.patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
    (r"\bencoder\.block\.(\d+)\.", r"stages.\1.blocks."),
    (r"\bencoder\.layer_norm\.(\d+)\b", r"stages.\1.layer_norm"),
    *_SWIN[:3],
    (r"\battention\.self\.sr\b", "attention.sequence_reduction.sequence_reduction"),
    (r"\battention\.self\.layer_norm\b", "attention.sequence_reduction.layer_norm"),
    _VIT[5],
    (r"\bmlp\.dense1\b", "mlp.fc1"),
    (r"\bmlp\.dense2\b", "mlp.fc2"),
    (r"\blayer_norm_1\b", "layernorm_before"),
    (r"\blayer_norm_2\b", "layernorm_after"),
    (r"\bdecode_head\.linear_c\b", "decode_head.linear_projections"),
)
_QWEN2_VL: Renames = (
    (r"^thinker\.", ""),
    (r"^model\.", ""),
    (r"^(layers|embed_tokens|norm)\.", r"language_model.\1."),
)

RENAMES: Mapping[str, Renames] = {
    **dict.fromkeys(
        (
            *("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "video_llava", "paligemma"),
            *("gemma3", "mistral3", "internvl", "aya_vision", "got_ocr2", "aria", "pp_chart2table", "mllama", "fuyu"),
            *("qwen2_audio", "voxtral", "voxtral_realtime", "audioflamingo3", "glmasr", "musicflamingo"),
            *("granite_speech", "granite_speech_plus", "vibevoice_asr"),
        ),
        _VISION_LANGUAGE,
    ),
    "emu3": ((r"^text_model\.lm_head\.", "lm_head."), (r"^text_model\.model\.", "text_model.")),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "qwen2_5_omni_thinker"), _QWEN2_VL),
    "qwen3_5_text": ((r"^language_model\.", ""),),
    "qwen3_5_moe_text": ((r"^language_model\.", ""),),
    "gemma3n_text": ((r"^language_model\.", ""),),
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    "phimoe": (*_MIXTRAL, (r"\.mlp\.gate\.weight$", ".mlp.router.weight")),
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        (
            (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
            (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
            (r"\.block_sparse_moe\.router\.layer\.weight$", ".block_sparse_moe.router.weight"),
        ),
    ),
    "aria_text": (
        (r"\.mlp\.experts\.fc1\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.mlp\.experts\.fc2\.weight$", ".mlp.experts.down_proj"),
    ),
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
    **dict.fromkeys(
        (
            *("vit", "deit", "ijepa", "vit_mae", "vit_msn", "vivit"),
            "audio-spectrogram-transformer",
        ),
        _VIT,
    ),
    "beit": ((r"\battention\.attention\.relative_position_bias\b", "relative_position_bias"), *_VIT),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "swin": _SWIN,
    "segformer": _SEGFORMER,
    "lw_detr": (*_VIT[1:5], (r"\battention\.output\b", "attention.o_proj")),
    "videomae": (
        (r"\battention\.attention\.q_bias$", "attention.attention.query.bias"),
        (r"\battention\.attention\.v_bias$", "attention.attention.value.bias"),
    ),
    "altclip": ((r"\blayer\.", "layers."),),
    "nomic_bert": (
        (r"\bencoder\.layers\.", "layers."),
        (r"\bemb_ln\.", "embeddings.LayerNorm."),
        (r"\battn\.out_proj\b", "self_attn.o_proj"),
        (r"\bfc11\b", "up_proj"),
        (r"\bfc12\b", "gate_proj"),
        (r"\bfc2\b", "down_proj"),
        (r"\bnorm1\b", "post_attention_layernorm"),
        (r"\bnorm2\b", "post_mlp_layernorm"),
    ),
    "gte": (
        (r"\bencoder\.layer\.", "layers."),
        (r"\battention\.o_proj\b", "self_attn.o_proj"),
        (r"\battention\.qkv_proj\b", "self_attn.qkv_proj"),
        (r"\battn_ln\b", "post_attention_layernorm"),
        (r"\bmlp_ln\b", "post_mlp_layernorm"),
        (r"\blm_head\.norm\b", "lm_head.layer_norm"),
    ),
    "jina_embeddings_v3": (
        (r"\bemb_ln\.", "embeddings.LayerNorm."),
        (r"\bencoder\.layers\.", "layers."),
        (r"\bmixer\.out_proj\b", "self_attn.o_proj"),
        (r"\bnorm1\b", "post_attention_layernorm"),
        (r"\bnorm2\b", "post_mlp_layernorm"),
    ),
    "hy_v3": (
        (r"\.mlp\.router\.gate\.weight$", ".mlp.gate.weight"),
        (r"\.mlp\.expert_bias$", ".mlp.e_score_correction_bias"),
        (r"\.mlp\.shared_mlp\.", ".mlp.shared_experts."),
    ),
    "hy_v4": (
        (r"\.hc_pre\.hc_", ".hc_"),
        (r"\.learnable_sink_param\b", ".sinks"),
        (r"\.linear_gate\b", ".gate_proj"),
        (r"\.hc_attn_layer\.hc_(fn|base|scale)\b", r".attn_hc.\1"),
        (r"\.hc_mlp_layer\.hc_(fn|base|scale)\b", r".ffn_hc.\1"),
        (r"\.hc_head_(fn|base|scale)\b", r".hc_\1"),
    ),
    "hrm_text": ((r"\.attn\.o_proj\b", ".self_attn.o_proj"),),
    "laguna": (
        (r"\.mlp\.experts\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),
        (r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),
    ),
    "olmo_hybrid": (
        (r"\battention_layer_norm\b", "input_layernorm"),
        (r"\bfeedforward_layer_norm\b", "post_attention_layernorm"),
    ),
    "colqwen2": ((r"^vlm\.model\.", "vlm."),),
}
"""By model type: regular expressions applied in order to names without prefix. Those anchored with ``^`` belong to the
root model and are left out where the type is that of a nested model."""

SPLITS: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "nomic_bert": (("attn.Wqkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),),
    "jina_embeddings_v3": (("mixer.Wqkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),),
    "gte": (
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.up_gate_proj", ("mlp.up_proj", "mlp.gate_proj")),
    ),
    "hrm_text": (
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ("attn.gqkv_proj", ("self_attn.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ),
    "dinov2": (("mlp.weights_in", ("mlp.gate_proj", "mlp.up_proj")),),
    "dinov2_with_registers": (("mlp.weights_in", ("mlp.gate_proj", "mlp.up_proj")),),
}
"""By model type: a module that one version stores whole and another as equal parts of its rows, in this order."""

_PREFIXES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("gpt2", "openai-gpt", "gptj", "gpt_neo", "gpt_bigcode", "codegen", "bloom", "falcon", "RefinedWeb"),
            *("RefinedWebModel", "mpt", "dbrx", "ctrl", "xlnet", "xlm", "flaubert", "imagegpt", "qwen", "chatglm"),
            *("t5", "mt5", "umt5", "longt5", "decision_transformer"),
        ),
        ("transformer",),
    ),
    **dict.fromkeys(("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "xmod"), ("roberta",)),
    **dict.fromkeys(("bert", "megatron-bert", "big_bird", "bert-generation"), ("bert",)),
    **dict.fromkeys(("deberta", "deberta-v2"), ("deberta",)),
    **dict.fromkeys(("vit", "vit_mae", "vit_msn", "yolos"), ("vit",)),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "xlstm"), ("backbone",)),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), ("vision_model",)),
    **dict.fromkeys(("clip_text_model", "siglip_text_model"), ("text_model",)),
    "audio-spectrogram-transformer": ("audio_spectrogram_transformer",),
    "data2vec-text": ("data2vec_text",),
    "jina_embeddings_v3": ("roberta",),
    "nemotron_h": ("backbone", "model"),
    "gte": ("new", "gte"),
    "timm_wrapper": ("timm_model",),
}
_ANY_PREFIX = (
    *("model", "transformer", "bert", "roberta", "deberta", "distilbert", "electra", "albert", "esm", "vit"),
    *("gpt_neox", "backbone", "wav2vec2", "hubert"),
)

CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
"""Model types whose ``CONV1D_MODULES`` store their weight as (in, out)."""
CONV1D_MODULES = re.compile(r"(?:^|\.)(?:c_attn|c_proj|c_fc|q_attn)\.weight$")

TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter"})
"""Model types whose fused expert parameters are (experts, in, out), in the file as in memory."""
TRANSPOSED_ON_DISK = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"})
"""Model types whose fused expert parameters are (experts, in, out) in the file, and were in memory before version 5."""


def model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the model type of a configuration, then those of the configurations nested in it."""
    own = config.get("model_type")
    if isinstance(own, str):
        yield own
    for value in config.values():
        if isinstance(value, Mapping):
            yield from model_types(value)


def prefixes_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the attribute under which a model with a head keeps its base model."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return _ANY_PREFIX
    return _PREFIXES.get(model_type, (model_type.replace("-", "_"), "model"))


def canonical_form(config: Mapping[str, Any]) -> Callable[[str], str]:
    """Build the function that brings a name of any dialect of this model to its canonical form."""
    prefix = re.compile(rf"^(?:{'|'.join(map(re.escape, prefixes_of(config)))})\.")
    renames = [(re.compile(pattern), new) for pattern, new in (*_ALWAYS, *_renames_of(config))]
    wrappers = re.compile(_WRAPPERS)

    @cache  # every stage of binding asks for the same names again
    def canonical(name: str) -> str:
        if "_" in name:
            name = wrappers.sub("", name).removeprefix(".")
        name = prefix.sub("", name.removeprefix("module."), count=1)
        for pattern, new in renames:
            name = pattern.sub(new, name, count=1)
        return name

    return canonical


def _renames_of(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    own, *nested = [*model_types(config)] or [""]
    seen = set()
    for rename in RENAMES.get(own, ()):
        seen.add(rename)
        yield rename
    for model_type in nested:
        for rename in RENAMES.get(model_type, ()):
            if rename not in seen and not rename[0].startswith("^"):
                seen.add(rename)
                yield rename
