"""Names: every name that a library version gives a tensor finds it, and no other."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_deploy.checkpoint import Checkpoint, open_checkpoint
from lora_deploy.names import AmbiguousNameError, NameIndex, Part, ties_of
from lora_deploy.tensors import DType, Region, TensorSpec

TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
ENCODER = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
IMAGES = {key: value for key, value in ENCODER.items() if key != "vocab_size"} | {"image_size": 8, "patch_size": 4}
SIGLIP = IMAGES | {"model_type": "siglip_vision_model", "projection_dim": 16, "vision_use_head": False}
M_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
SEGFORMER = {
    "hidden_sizes": [8] * 4,
    "depths": [1] * 4,
    "num_attention_heads": [1] * 4,
    "decoder_hidden_size": 8,
}
NEMOTRON = TEXT | {
    "num_hidden_layers": 3,
    "head_dim": 8,
    "layers_block_type": ["mamba", "moe", "attention"],
    "n_routed_experts": 2,
    "moe_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 4,
    "n_groups": 1,
    "num_experts_per_tok": 1,
}
QWEN2_VL = {
    "text_config": TEXT | M_ROPE,
    "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
}
ARIA = {
    "vision_config": IMAGES | {"model_type": "idefics3_vision"},
    "text_config": TEXT | {"moe_num_experts": 2, "moe_num_shared_experts": 1, "moe_topk": 1},
    "projector_patch_to_query_dict": {"4": 2},
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", TEXT | {"num_local_experts": 3}),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", TEXT | {"num_local_experts": 3}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        TEXT | {"num_experts": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    ),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", TEXT | {"num_local_experts": 3}),
    "nemotron_h": ("NemotronHForCausalLM", "NemotronHConfig", NEMOTRON),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", ENCODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32}),
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "nomic_bert": ("NomicBertModel", "NomicBertConfig", ENCODER),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGES),
    "deit": ("DeiTForImageClassification", "DeiTConfig", IMAGES),
    "beit": ("BeitForImageClassification", "BeitConfig", IMAGES | {"use_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", IMAGES | {"use_swiglu_ffn": True}),
    "swin": ("SwinForImageClassification", "SwinConfig", SWIN),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", SEGFORMER),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": IMAGES | {"model_type": "clip_vision_model"},
            "text_config": TEXT | {"model_type": "llama"},
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"vision_config": SIGLIP, "text_config": TEXT | {"head_dim": 8}, "mm_tokens_per_image": 4},
    ),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", QWEN2_VL),
    "aria": ("AriaForConditionalGeneration", "AriaConfig", ARIA),
}
RENAMED = {"mixtral", "phimoe", "nemotron_h", "vit", "llava", "gemma3", "qwen2_vl", "swin", "nomic_bert"}
"""Of these the in-memory names really differ from those on disk."""


def save_tiny(folder: Path, name: str) -> tuple[nn.Module, Checkpoint]:
    model_class, config_class, fields = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the peer thinks of tiny configurations
        config = getattr(transformers, config_class)(**fields)
        model = getattr(transformers, model_class)(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        model.save_pretrained(folder)
    return model, open_checkpoint(folder)


def assemble(parts: tuple[Part, ...], tensors: dict[str, Tensor], like: Tensor) -> Tensor:
    """Build the in-memory tensor from the places that its rows are said to lie in."""
    rows = like.reshape(-1, like.shape[-1]) if like.ndim > 1 else like.reshape(-1, 1)
    result = torch.full_like(rows, torch.nan) if rows.is_floating_point() else torch.zeros_like(rows)
    for part in parts:
        stored = tensors[part.tensor].reshape(-1)
        if part.region is not None:
            stored = stored[part.region.offset : part.region.stop]
        result[part.rows or slice(None)] = stored.reshape(-1, rows.shape[1]).to(rows.dtype)
    return result.reshape(like.shape)


@pytest.mark.parametrize("name", MODELS)
def test_every_name_in_memory_finds_exactly_its_values_on_disk(name: str, tmp_path: Path) -> None:
    model, checkpoint = save_tiny(tmp_path, name)
    index = NameIndex(checkpoint.tensors, checkpoint.config)
    tied = {index.canonical(tie.member) for tie in ties_of(index, checkpoint.tensors, checkpoint.config)}
    tensors = load_file(tmp_path / "model.safetensors")
    n_renamed = 0
    for key, value in model.state_dict().items():
        parts = index.find(key)
        if parts is None:
            assert index.canonical(key) in tied, key
            continue
        n_renamed += key not in tensors
        assert torch.equal(assemble(parts, tensors, value), value), key
    assert bool(n_renamed) >= (name in RENAMED)


@pytest.mark.parametrize("name", MODELS)
def test_every_name_on_disk_finds_itself(name: str, tmp_path: Path) -> None:
    _, checkpoint = save_tiny(tmp_path, name)
    index = NameIndex(checkpoint.tensors, checkpoint.config)
    assert all(index.find(key) == (Part(tensor=key),) for key in checkpoint.tensors)
    canonical = [index.canonical(key) for key in checkpoint.tensors]
    assert len(set(canonical)) == len(canonical)


def index_of(shapes: dict[str, tuple[int, ...]], **config: Any) -> NameIndex:
    specs = {
        name: TensorSpec(name=name, dtype=DType.F32, shape=shape, file="x", start=0, stop=0)
        for name, shape in shapes.items()
    }
    return NameIndex(specs, config)


@pytest.mark.parametrize(
    ("stored", "asked", "config"),
    [
        ("h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight", {"model_type": "gpt2"}),
        ("transformer.h.0.ln_1.weight", "h.0.ln_1.weight", {"model_type": "gpt2"}),
        ("encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.dense.weight", {"model_type": "bert"}),
        ("roberta.pooler.dense.weight", "pooler.dense.weight", {"model_type": "xlm-roberta"}),
        ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", {"model_type": "llama"}),
        ("_orig_mod.model.norm.weight", "model.norm.weight", {"model_type": "llama"}),
        ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight", {"model_type": "bert"}),
        ("gpt_neox.embed_in.weight", "embed_in.weight", {"model_type": "gpt_neox"}),
        (
            "model.language_model.layers.0.self_attn.q_proj.weight",
            "language_model.model.layers.0.self_attn.q_proj.weight",
            {"model_type": "llava"},
        ),
        (
            "language_model.model.layers.0.self_attn.q_proj.weight",
            "model.language_model.layers.0.self_attn.q_proj.weight",
            {"model_type": "llava"},
        ),
        (
            "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
            {"model_type": "paligemma"},
        ),
        ("lm_head.weight", "language_model.lm_head.weight", {"model_type": "llava_next"}),
    ],
)
def test_names_of_other_versions_find_the_tensor(stored: str, asked: str, config: dict[str, str]) -> None:
    assert index_of({stored: (2, 3)}, **config).find(asked) == (Part(tensor=stored),)


@pytest.mark.parametrize(
    ("stored", "asked", "config"),
    [
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_proj.weight", "llama"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", "llava"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "llama"),
        ("model.layers.0.mlp.up_proj.weight", "up_proj.weight", "llama"),
        ("transformer.h.0.attn.c_attn.weight", "model.h.0.attn.c_attn.weight", "gpt2"),
    ],
)
def test_a_common_suffix_is_no_match(stored: str, asked: str, config: str) -> None:
    assert index_of({stored: (2, 3)}, model_type=config).find(asked) is None


def test_a_name_that_fits_two_tensors_is_ambiguous_unless_one_has_exactly_that_name() -> None:
    index = index_of({"bert.pooler.dense.weight": (2, 2), "pooler.dense.weight": (2, 2)}, model_type="bert")
    assert index.find("pooler.dense.weight") == (Part(tensor="pooler.dense.weight"),)
    with pytest.raises(AmbiguousNameError, match=r"bert\.pooler\.dense\.weight and pooler\.dense\.weight"):
        index.find("_orig_mod.pooler.dense.weight")


def test_gate_rows_come_before_up_rows_where_experts_are_stored_one_by_one() -> None:
    shapes = {
        f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight": (2, 3) if name != "w2" else (3, 2)
        for e in range(2)
        for name in ("w1", "w2", "w3")
    }
    index = index_of(shapes, model_type="mixtral")
    stack = index.stack("model.layers.0.mlp.experts.gate_up_proj")
    assert stack is not None
    assert stack.shape == (2, 4, 3)
    module = "model.layers.0.block_sparse_moe.experts"
    assert stack.experts[1] == (
        Part(tensor=f"{module}.1.w1.weight", rows=slice(0, 2)),
        Part(tensor=f"{module}.1.w3.weight", rows=slice(2, 4)),
    )
    assert index.find("model.layers.0.mlp.experts.down_proj") == (
        Part(tensor=f"{module}.0.w2.weight", rows=slice(0, 3)),
        Part(tensor=f"{module}.1.w2.weight", rows=slice(3, 6)),
    )


def test_one_expert_of_a_fused_parameter_is_a_region_of_its_rows() -> None:
    index = index_of({"model.layers.0.mlp.experts.gate_up_proj": (2, 4, 3)}, model_type="qwen2_moe")
    found = index.find("model.layers.0.mlp.experts.1.up_proj.weight")
    assert found == (
        Part(tensor="model.layers.0.mlp.experts.gate_up_proj", region=Region(offset=18, n_rows=2, n_cols=3)),
    )


def test_experts_that_are_stored_transposed_have_no_rows_for_one_projection() -> None:
    index = index_of({"model.layers.0.mlp.experts.gate_up_proj": (2, 3, 4)}, model_type="gpt_oss")
    assert index.find("model.layers.0.mlp.experts.1.up_proj.weight") is None


def test_a_stack_with_a_missing_expert_is_no_stack() -> None:
    shapes = {f"m.experts.{e}.down_proj.weight": (3, 2) for e in (0, 2)}
    assert index_of(shapes, model_type="qwen2_moe").stack("m.experts.down_proj") is None


def test_nearest_names_are_searched_beside_the_missing_one() -> None:
    names = ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    index = index_of(
        {f"model.layers.{k}.{name}.weight": (2, 2) for k in range(3) for name in names}, model_type="llama"
    )
    assert index.nearest("model.layers.1.mlp.gate_up_proj.weight") == ("gate_proj", "up_proj", "down_proj")
    assert index.nearest("model.layers.7.mlp.gate_proj.weight")[0].endswith("mlp.gate_proj")


@pytest.mark.parametrize(
    ("shapes", "config", "expected"),
    [
        ({"model.embed_tokens.weight": (4, 2)}, {"model_type": "llama", "tie_word_embeddings": True}, "lm_head.weight"),
        ({"transformer.wte.weight": (4, 2)}, {"model_type": "gpt2"}, "lm_head.weight"),
        ({"model.decoder.embed_tokens.weight": (4, 2)}, {"model_type": "whisper"}, "proj_out.weight"),
        (
            {"bert.embeddings.word_embeddings.weight": (4, 2), "cls.predictions.bias": (4,)},
            {"model_type": "bert"},
            "cls.predictions.decoder.weight",
        ),
        (
            {"language_model.model.embed_tokens.weight": (4, 2)},
            {"model_type": "llava", "text_config": {"tie_word_embeddings": True}},
            "language_model.lm_head.weight",
        ),
    ],
)
def test_an_absent_head_shares_the_embedding(
    shapes: dict[str, tuple[int, ...]], config: dict[str, Any], expected: str
) -> None:
    index = index_of(shapes, **config)
    specs = index._specs
    present = [tie for tie in ties_of(index, specs, config) if tie.is_present]
    assert [tie.member for tie in present] == [expected]
    assert present[0].is_breakable
    assert not present[0].is_stored


def test_a_flag_that_is_off_unties_the_head() -> None:
    shapes = {"model.embed_tokens.weight": (4, 2), "lm_head.weight": (4, 2)}
    config = {"model_type": "llama", "tie_word_embeddings": False}
    index = index_of(shapes, **config)
    assert ties_of(index, index._specs, config) == ()


def test_t5_shares_its_embeddings_and_cannot_give_one_of_them_away() -> None:
    config = {"model_type": "t5"}
    index = index_of({"shared.weight": (4, 2)}, **config)
    ties = ties_of(index, index._specs, config)
    assert {tie.member for tie in ties} == {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    }
    assert not any(tie.is_breakable for tie in ties)
