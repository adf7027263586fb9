"""Whole tensors that adapters bring: heads, resized vocabularies, copies of the base, and a base in the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_deploy.adapter import Adapter, ModuleUpdate, Orientation
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.bases import open_base
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import IncompatibleAdapterError, Severity
from lora_deploy.updates.replacement import Replacement
from lora_deploy.validate import Binding, bind
from tests.builders import adapter_of, linear_adapter, low_rank, make_checkpoint, merged_values, module_update

EMBED, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
V, D = 5, 3
LLAMA = {
    "model_type": "llama",
    "tie_word_embeddings": False,
    "vocab_size": V,
    "architectures": ["LlamaForCausalLM"],
}


def whole(target: str, *shape: int) -> ModuleUpdate:
    return module_update(target, Replacement(values=torch.randn(shape)), Orientation.STORED)


def llama(folder: Path, **config: Any) -> Checkpoint:
    tensors = {EMBED: torch.randn(V, D), HEAD: torch.randn(V, D), Q: torch.randn(D, D)}
    return make_checkpoint(folder, tensors, LLAMA | config)


def errors(adapters: list[Adapter], checkpoint: Checkpoint) -> list[str]:
    with pytest.raises(IncompatibleAdapterError) as caught:
        bind(adapters, checkpoint)
    return [finding.code for finding in caught.value.findings if finding.severity is Severity.ERROR]


def codes(binding: Binding) -> list[str]:
    return [finding.code for finding in binding.findings]


def test_a_head_that_the_base_lacks_is_added_with_its_labels_and_class(tmp_path: Path) -> None:
    adapter = adapter_of(whole("score.weight", 4, D), config={"task_type": "SEQ_CLS"})
    binding = bind([adapter], llama(tmp_path))
    assert binding.outputs["score.weight"] is None
    assert binding.updates["score.weight"][0].update is adapter.updates[0].update
    assert binding.config_edits == {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2", "3": "LABEL_3"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2, "LABEL_3": 3},
    }
    assert codes(binding) == ["tensor-added"]


def test_labels_that_the_base_has_as_many_of_keep_their_names(tmp_path: Path) -> None:
    checkpoint = llama(tmp_path, id2label={"0": "no", "1": "yes"})
    assert "id2label" not in bind([adapter_of(whole("score.weight", 2, D))], checkpoint).config_edits


def test_a_head_of_another_size_replaces_the_bases(tmp_path: Path) -> None:
    tensors = {"classifier.weight": torch.zeros(2, D), "classifier.bias": torch.zeros(2)}
    checkpoint = make_checkpoint(tmp_path, tensors, {"model_type": "bert", "num_labels": 2})
    binding = bind([adapter_of(whole("classifier.weight", 3, D), whole("classifier.bias", 3))], checkpoint)
    assert merged_values(binding)["classifier.weight"].shape == (3, D)
    assert len(binding.config_edits["id2label"]) == 3
    assert binding.config_edits["num_labels"] == 3
    assert codes(binding) == ["tensor-resized", "tensor-resized"]


@pytest.mark.parametrize("module", ["value_model.out", "my_head"])
def test_a_module_that_the_configuration_names_is_added_whatever_its_name(tmp_path: Path, module: str) -> None:
    update = whole(f"{module}.weight", 1, D)
    assert errors([adapter_of(update)], llama(tmp_path)) == ["target-missing"]
    named = adapter_of(update, config={"modules_to_save": [module.rpartition(".")[2]]})
    assert bind([named], llama(tmp_path)).outputs[f"{module}.weight"] is None


@pytest.mark.parametrize("target", ["model.layers.9.mlp.up_proj.weight", "model.norm.weight"])
def test_a_whole_tensor_of_the_core_that_the_base_lacks_is_missing(tmp_path: Path, target: str) -> None:
    assert errors([adapter_of(whole(target, 2, 2))], llama(tmp_path)) == ["target-missing"]


def test_a_replaced_layer_of_another_shape_does_not_fit(tmp_path: Path) -> None:
    assert errors([adapter_of(whole(Q, D + 1, D))], llama(tmp_path)) == ["shape-mismatch"]
    assert errors([adapter_of(whole(EMBED, V, D + 1))], llama(tmp_path)) == ["shape-mismatch"]


def test_a_head_on_a_base_without_prefix_gives_all_others_theirs(tmp_path: Path) -> None:
    name = "encoder.layer.0.attention.self.query.weight"
    checkpoint = make_checkpoint(
        tmp_path, {name: torch.zeros(D, D), "pooler.dense.weight": torch.zeros(D, D)}, {"model_type": "bert"}
    )
    plain = bind([linear_adapter({f"bert.{name}": (D, D)})], checkpoint)
    assert [*plain.updates] == [name]
    lora = module_update(f"bert.{name}", low_rank(D, D))
    binding = bind([adapter_of(lora, whole("classifier.weight", 2, D))], checkpoint)
    assert binding.outputs == {
        f"bert.{name}": name,
        "bert.pooler.dense.weight": "pooler.dense.weight",
        "classifier.weight": None,
    }
    assert {update.target for updates in binding.updates.values() for update in updates} == {*binding.updates}
    assert [*binding.updates] == [f"bert.{name}", "classifier.weight"]
    assert binding.shapes == {"classifier.weight": (2, D)}


# ---------------------------------------------------------------------------------------------------------- vocabulary


def test_a_resized_vocabulary_is_written_whole_and_configured(tmp_path: Path) -> None:
    binding = bind([adapter_of(whole(EMBED, V + 2, D), whole(HEAD, V + 2, D))], llama(tmp_path))
    merged = merged_values(binding)
    assert merged[EMBED].shape == merged[HEAD].shape == (V + 2, D)
    assert binding.config_edits == {"vocab_size": V + 2}


def test_a_nested_vocabulary_size_is_edited_where_it_is(tmp_path: Path) -> None:
    config = {
        "model_type": "llava",
        "text_config": {"vocab_size": V},
        "vision_config": {"vocab_size": 99},
        "tie_word_embeddings": False,
    }
    name = "language_model.model.embed_tokens.weight"
    checkpoint = make_checkpoint(tmp_path, {name: torch.zeros(V, D)}, config)
    assert bind([adapter_of(whole(name, V + 1, D))], checkpoint).config_edits == {"text_config.vocab_size": V + 1}


def test_every_vocabulary_tensor_must_be_resized_alike(tmp_path: Path) -> None:
    assert errors([adapter_of(whole(EMBED, V + 2, D))], llama(tmp_path)) == ["vocabulary-mismatch"]
    both = adapter_of(whole(EMBED, V + 2, D), whole(HEAD, V + 1, D))
    assert set(errors([both], llama(tmp_path))) == {"vocabulary-mismatch"}


def test_a_change_must_fit_the_resized_tensor(tmp_path: Path) -> None:
    resized = [whole(EMBED, V + 2, D), whole(HEAD, V + 2, D)]
    fits = module_update(EMBED, low_rank(V + 2, D), Orientation.STORED)
    binding = bind([adapter_of(fits, *resized)], llama(tmp_path))
    assert [type(bound.update).__name__ for bound in binding.updates[EMBED]] == ["Replacement", "LowRank"]
    old = module_update(EMBED, low_rank(V, D), Orientation.STORED)
    assert errors([adapter_of(old, *resized)], llama(tmp_path)) == ["shape-mismatch"]


def test_two_adapters_that_resize_differently_conflict(tmp_path: Path) -> None:
    one, two = (adapter_of(whole(EMBED, n, D), whole(HEAD, n, D), name=str(n)) for n in (V + 1, V + 2))
    assert "replaced-twice" in errors([one, two], llama(tmp_path))


# --------------------------------------------------------------------------------------------------- copies of the base


def test_a_copy_of_the_base_is_compared_and_not_merged(tmp_path: Path) -> None:
    checkpoint = llama(tmp_path)
    stored = torch.frombuffer(bytearray(checkpoint.read(EMBED)), dtype=torch.float32).reshape(V, D)
    update = module_update(EMBED, low_rank(V, D), Orientation.STORED)

    def with_copy(values: Tensor) -> Adapter:
        copy = module_update(EMBED, Replacement(values=values), Orientation.STORED)
        return adapter_of(update, base_copies=(copy,))

    for values in (stored, stored.to(torch.bfloat16)):
        binding = bind([with_copy(values)], checkpoint)
        assert codes(binding) == []
        assert [type(bound.update).__name__ for bound in binding.updates[EMBED]] == ["LowRank"]
    assert codes(bind([with_copy(stored + 1)], checkpoint)) == ["base-differs"]


def test_a_copy_with_more_rows_is_the_resized_base(tmp_path: Path) -> None:
    update = module_update(EMBED, low_rank(V + 2, D), Orientation.STORED)
    adapter = adapter_of(update, whole(HEAD, V + 2, D), base_copies=(whole(EMBED, V + 2, D),))
    binding = bind([adapter], llama(tmp_path))
    assert [type(bound.update).__name__ for bound in binding.updates[EMBED]] == ["Replacement", "LowRank"]
    assert binding.config_edits == {"vocab_size": V + 2}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_one_file_is_base_and_adapter(tmp_path: Path, suffix: str) -> None:
    tensors = {
        "fc.weight": torch.randn(4, 3),
        "fc.bias": torch.randn(4),
        "fc.lora_A": torch.randn(2, 3),
        "fc.lora_B": torch.randn(4, 2),
        "norm.weight": torch.ones(3),
    }
    path = tmp_path / f"model{suffix}"
    if suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    adapter = read_adapter(path, ReadOptions(alpha=4))
    binding = bind([adapter], open_base(str(path)))
    assert set(binding.outputs) == {"fc.weight", "fc.bias", "norm.weight"}
    assert [*binding.updates] == ["fc.weight"]
    expected = tensors["fc.weight"].double() + 2 * tensors["fc.lora_B"].double() @ tensors["fc.lora_A"].double()
    assert torch.allclose(merged_values(binding)["fc.weight"], expected)


def test_a_raw_state_dict_of_a_wrapped_model_is_a_base_under_its_plain_names(tmp_path: Path) -> None:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.base_layer.weight": torch.randn(D, D),
        f"{prefix}.lora_A.default.weight": torch.randn(2, D),
        f"{prefix}.lora_B.default.weight": torch.randn(D, 2),
        "base_model.model.model.norm.weight": torch.ones(D),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    adapter = read_adapter(tmp_path / "model.safetensors", ReadOptions(alpha=4))
    binding = bind([adapter], open_base(str(tmp_path / "model.safetensors")))
    assert set(binding.outputs) == {Q, "model.norm.weight"}
    assert [*binding.updates] == [Q]


def test_a_carried_base_is_known_by_its_file_not_by_its_name(tmp_path: Path) -> None:
    checkpoint = llama(tmp_path / "base")
    adapter = adapter_of(module_update(Q, low_rank(D, D)), base_copies=(whole(Q, D, D),))
    assert set(bind([adapter], checkpoint).outputs) == {EMBED, HEAD, Q}
    own = replace(adapter, path=checkpoint.root / "model.safetensors", base_copies=())
    assert set(bind([own], checkpoint).outputs) == {EMBED, HEAD, Q}
