"""A GGUF base becomes a safetensors folder without a changed value, or nothing is left and one line says why."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import lora_deploy.bases.gguf as subject
from lora_deploy.artifact import sha256_of
from lora_deploy.bases import open_base
from lora_deploy.bases.gguf import ImportedBase, cached_gguf, import_gguf, narrowest_exact_dtype
from lora_deploy.errors import (
    InputError,
    MalformedCheckpointError,
    MergeError,
    OutputExistsError,
    RecipeError,
)

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, N_TOKENS = 32, 4, 2, 64, 40
TENSORS = {
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "blk.0.attn_v.weight": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
    "blk.0.ffn_up.weight": (FEED_FORWARD, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, FEED_FORWARD),
    "token_embd.weight": (N_TOKENS, HIDDEN),
}
NORMS = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
NAMES = {
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
    "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    "output_norm.weight": "model.norm.weight",
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_gguf(
    path: Path,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q4_1,
    *,
    architecture: str = "llama",
    without: str = "",
) -> Path:
    """Write a one-layer llama with random weights, stored as ``quantization``, and a tokenizer of 40 tokens."""
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(N_TOKENS)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(97 + i) for i in range(26)), "Ġ", "ab"]
    tokens += [f"<|spare{i}|>" for i in range(N_TOKENS - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, shape in TENSORS.items():
        if name == without:
            continue
        weight = random.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(weight, quantization), raw_dtype=quantization)
    for name in NORMS:
        writer.add_tensor(name, np.linspace(0.5, 1.5, HIDDEN, dtype=np.float16).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference_weights(path: Path) -> dict[str, torch.Tensor]:
    """Dequantise every tensor with the gguf package itself, float32."""
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        for tensor in gguf.GGUFReader(path).tensors
    }


def as_stored_by_transformers(rotated: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Undo the row order that llama.cpp gives to queries and keys: pairs there, halves in transformers."""
    n_rows, n_columns = rotated.shape
    pairs = rotated.reshape(n_heads, n_rows // n_heads // 2, 2, n_columns)
    return pairs.swapaxes(1, 2).reshape(n_rows, n_columns)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf")


@pytest.fixture(scope="module")
def imported(quantised: Path, tmp_path_factory: pytest.TempPathFactory) -> ImportedBase:
    return import_gguf(quantised, tmp_path_factory.mktemp("bases") / "tiny", dequantize=True)


def test_every_stored_value_is_the_reference_dequantisation(quantised: Path, imported: ImportedBase) -> None:
    stored = load_file(imported.folder / "model.safetensors")
    reference = reference_weights(quantised)
    expected = {ours: reference[theirs] for theirs, ours in NAMES.items()}
    attention = "model.layers.0.self_attn"
    expected[f"{attention}.q_proj.weight"] = as_stored_by_transformers(reference["blk.0.attn_q.weight"], HEADS)
    expected[f"{attention}.k_proj.weight"] = as_stored_by_transformers(reference["blk.0.attn_k.weight"], KV_HEADS)
    assert stored.keys() == expected.keys()
    for name, weight in expected.items():
        assert stored[name].dtype == torch.float32
        assert torch.equal(stored[name], weight), name


def test_the_folder_loads_as_a_plain_model_with_tokenizer_and_chat_template(imported: ImportedBase) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(imported.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(imported.folder)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [30]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_peak_memory_is_that_of_the_process_that_did_the_work(imported: ImportedBase) -> None:
    assert imported.peak_bytes is not None
    assert 50e6 < imported.peak_bytes < 2e9  # an interpreter with torch and transformers; the model is tiny


def test_a_16_bit_file_stays_16_bit_and_the_cache_finds_it_again_and_a_killed_run_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_DEPLOY_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.F16.gguf", gguf.GGMLQuantizationType.F16)
    stale = tmp_path / "cache" / "bases" / f"tiny.F16-{subject._cache_key(path)}.k1ll3d.partial"
    stale.mkdir(parents=True)
    made = cached_gguf(path, dequantize=True)
    weights = made.folder / "model.safetensors"
    stored = load_file(weights)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    reference = reference_weights(path)
    assert all(torch.equal(stored[ours].float(), reference[theirs]) for theirs, ours in NAMES.items())
    assert '"dtype": "float16"' in (made.folder / "config.json").read_text()

    assert not list(made.folder.parent.glob("*.partial"))
    opened = open_base(str(path), dequantize=True)
    assert (opened.root, [finding.code for finding in opened.findings]) == (made.folder, ["dequantised-base"])

    before = sha256_of(weights), weights.stat().st_mtime_ns
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = cached_gguf(path.rename(elsewhere / path.name), dequantize=True)
    assert again == ImportedBase(folder=made.folder, peak_bytes=None)
    assert before == (sha256_of(weights), weights.stat().st_mtime_ns)
    assert sorted(entry.suffix for entry in made.folder.parent.iterdir() if entry != made.folder) == [".lock"]


def test_another_file_or_another_version_is_another_cached_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_DEPLOY_CACHE", str(tmp_path / "cache"))
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    one.write_bytes(b"GGUF one")
    other.write_bytes(b"GGUF other")
    assert subject._cache_key(one) != subject._cache_key(other)
    before = subject._cache_key(one)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.0.0")
    assert subject._cache_key(one) != before


def test_without_permission_to_dequantise_it_is_refused_with_the_option_to_give(
    quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_DEPLOY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RecipeError, match="must be unpacked") as refusal:
        import_gguf(quantised, tmp_path / "out")
    assert refusal.value.hint == "--dequantize"
    with pytest.raises(RecipeError, match="must be unpacked"):
        cached_gguf(quantised)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"<!DOCTYPE html><html>", "not a GGUF file: found first bytes b'<!DO'"),
        (b"GGUF\x03\x00", "truncated: found 6 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git LFS pointer"),
    ],
)
def test_what_is_no_gguf_file_is_refused_before_any_work(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(MalformedCheckpointError, match=message):
        import_gguf(path, tmp_path / "out", dequantize=True)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "out", dequantize=True)


def test_an_existing_destination_is_never_overwritten(quantised: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists already"):
        import_gguf(quantised, tmp_path, dequantize=True)


def test_missing_packages_are_named_with_what_installs_them(
    quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in {"gguf", "accelerate"} else name)
    with pytest.raises(InputError, match="needs accelerate, gguf: not installed") as refusal:
        import_gguf(quantised, tmp_path / "out", dequantize=True)
    assert refusal.value.hint == "pip install 'lora-deploy[demo]'"


@pytest.mark.parametrize(
    ("fault", "message"),
    [("truncated", "cannot be unpacked"), ("architecture", "not supported"), ("tensor", "are not in the file")],
)
def test_what_the_loader_cannot_read_leaves_nothing_behind(
    fault: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_DEPLOY_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    if fault == "truncated":
        path.write_bytes(write_gguf(path).read_bytes()[:-5000])
    elif fault == "architecture":
        write_gguf(path, architecture="teapot")
    else:
        write_gguf(path, without="blk.0.ffn_up.weight")
    with pytest.raises(InputError, match=message):
        cached_gguf(path, dequantize=True)
    assert not [entry for entry in (tmp_path / "cache" / "bases").iterdir() if entry.is_dir()]


def test_a_folder_that_cannot_be_written_is_one_clear_error(quantised: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(MergeError, match="cannot be written"):
        import_gguf(quantised, blocked / "out", dequantize=True)
    assert blocked.read_text() == "in the way"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 0.5, -2.0], torch.float16),
        ([1.0 + 2**-10], torch.float16),
        ([1.0 + 2**-7, 2.0**100], torch.bfloat16),
        ([1.0 + 2**-10, 2.0**100], torch.float32),
        ([1.0 + 2**-11], torch.float32),
        ([float("nan")], torch.float32),
        ([2.0**-24], torch.float16),
        ([2.0**-25], torch.bfloat16),
    ],
)
def test_the_narrowest_dtype_that_holds_all_values_exactly_is_chosen(
    values: list[float], expected: torch.dtype
) -> None:
    assert narrowest_exact_dtype([torch.tensor([0.0]), torch.tensor(values)]) == expected
