"""One conversation before and after: the merged folder's tokenizer renders it the same (transformers 5.23)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_deploy import pipeline
from lora_deploy.merge.options import MergeOptions
from lora_deploy.validate import BindOptions
from tests.peer.models import VOCABULARY, llama
from tests.peer.trained import MEMORY_BYTES, Trained, peft_advice_unheard, save_base, train

WORDS = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "what", "is", "two", "and", "four", "?", "."]
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
CONVERSATION = [
    {"role": "user", "content": "what is two and two ?"},
    {"role": "assistant", "content": "four ."},
    {"role": "user", "content": "and four and two ?"},
]
BASE_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ADAPTER_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|begin|> {{ m['role'] }} : {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|begin|> assistant :{% endif %}"
)


def _tokenizer(template: str | None, *special: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token=SPECIAL["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **SPECIAL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", *special]})
    if special:
        tokenizer.eos_token = special[-1]
    return tokenizer


def _rendered(folder: Path) -> tuple[str, list[int], dict[str, object], list[str]]:
    """The conversation as text and as ids, and the special tokens with their ids."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    return text, ids, dict(tokenizer.special_tokens_map) | kept, [tokenizer.decode(ids), tokenizer.eos_token]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """An adapter of a chat model that leaves the tokenizer alone."""
    folder = tmp_path_factory.mktemp("chat")
    trained = train(llama(), LoraConfig(r=2, target_modules=["q_proj"]), folder)
    _tokenizer(BASE_TEMPLATE).save_pretrained(trained.base)
    return trained


def _merge(adapter: Path, **options: Any) -> None:
    pipeline.merge(adapter, merge_options=MergeOptions(memory_bytes=MEMORY_BYTES), **options)


def _copy(adapter: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((adapter / name).read_bytes())
    return folder


def test_a_conversation_is_rendered_as_with_the_base_when_the_adapter_brings_no_tokenizer(
    trained: Trained, tmp_path: Path
) -> None:
    _merge(trained.adapter, base=trained.base, output=tmp_path / "out")
    assert _rendered(tmp_path / "out") == _rendered(trained.base)
    assert "<|user|> what is two and two ?</s>" in _rendered(tmp_path / "out")[0]


@pytest.mark.parametrize("is_old_layout", [False, True], ids=["template in its file", "template in the configuration"])
def test_a_conversation_is_rendered_as_with_the_adapter_that_brings_its_tokenizer_template_and_tokens(
    is_old_layout: bool, trained: Trained, tmp_path: Path
) -> None:
    model = llama()
    with peft_advice_unheard():
        model.resize_token_embeddings(VOCABULARY + 3)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    base = save_base(llama(), tmp_path / "base")
    _tokenizer(BASE_TEMPLATE).save_pretrained(base)
    resized = train(model, config, tmp_path, base=base, save_embedding_layers=True)
    _tokenizer(ADAPTER_TEMPLATE, "<|begin|>", "<|end|>").save_pretrained(resized.adapter)
    if is_old_layout:
        path = resized.adapter / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": ADAPTER_TEMPLATE}))
        (resized.adapter / "chat_template.jinja").unlink()

    _merge(resized.adapter, base=base, output=tmp_path / "out")
    rendered = _rendered(tmp_path / "out")
    assert rendered == _rendered(resized.adapter)
    assert rendered != _rendered(base)
    assert "<|begin|> user : what is two and two ?<|end|>" in rendered[0]
    assert max(rendered[1]) == len(WORDS) + 1


def test_a_template_of_the_adapter_goes_with_the_tokenizer_of_the_base(trained: Trained, tmp_path: Path) -> None:
    adapter = _copy(trained.adapter, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} . {% endfor %}")
    _merge(adapter, base=trained.base, output=tmp_path / "out")
    text, _, special, _ = _rendered(tmp_path / "out")
    assert text == "what is two and two ? . four . . and four and two ? . "
    assert special == _rendered(trained.base)[2]


def test_the_tokenizer_of_the_base_travels_when_it_is_asked_for(trained: Trained, tmp_path: Path) -> None:
    adapter = _copy(trained.adapter, tmp_path / "adapter")
    _tokenizer(ADAPTER_TEMPLATE, "<|begin|>", "<|end|>").save_pretrained(adapter)
    options = BindOptions(tokenizer="base")
    _merge(adapter, base=trained.base, output=tmp_path / "base's", bind_options=options)
    _merge(adapter, base=trained.base, output=tmp_path / "adapter's")
    assert _rendered(tmp_path / "base's") == _rendered(trained.base)
    assert _rendered(tmp_path / "adapter's") == _rendered(adapter)
    assert _rendered(adapter) != _rendered(trained.base)
