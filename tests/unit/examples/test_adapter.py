"""The committed example adapter is the one its card describes."""

import csv
import hashlib
import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[3] / "examples"
ADAPTER = EXAMPLES / "adapters" / "smollm2-json"


def test_it_is_a_trained_rank_4_lora_on_all_linear_layers_in_float16() -> None:
    config = json.loads((ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(ADAPTER / "adapter_model.safetensors")
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert len(tensors) == 30 * 7 * 2
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float16
        assert tensor.count_nonzero() > 0, name
        assert tensor.shape[0 if "lora_A" in name else 1] == 4
    assert (ADAPTER / "adapter_model.safetensors").stat().st_size == pytest.approx(2.4e6, rel=0.1)


def test_the_card_states_the_digest_of_the_weights() -> None:
    digest = hashlib.sha256((ADAPTER / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert digest in (ADAPTER / "README.md").read_text(encoding="utf-8")


def test_the_recorded_replies_give_the_success_rates_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    fault_in = importlib.import_module("strict_json").fault_in
    card = (ADAPTER / "README.md").read_text(encoding="utf-8")
    held_back = (EXAMPLES / "held_back.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in held_back]
    rates = {}
    for title, evaluation in json.loads((ADAPTER / "evaluation.json").read_text(encoding="utf-8")).items():
        assert list(evaluation["replies"]) == prompts
        n_strict = sum(fault_in(reply) is None for reply in evaluation["replies"].values())
        assert n_strict == evaluation["n_strict"]
        assert f"| {title} | {n_strict} of {len(prompts)} (" in card
        rates[title] = n_strict / len(prompts)
    assert rates["base"] < 0.1
    assert rates["adapted"] > 0.9


def test_the_loss_curve_falls() -> None:
    with (ADAPTER / "loss.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    losses = [float(row["loss"]) for row in rows]
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
