"""The demo's comparison passes for equal models and finds every way in which they may not be equal."""

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("side_by_side")


@pytest.fixture
def comparison(side_by_side: ModuleType) -> Any:
    """Two models that agree, with margins of 0.5 and more against a logit error of 0.01, and a base that does not."""
    adapted = side_by_side.Reply(tokens=(4, 5, 6), margins=(3.0, 0.5, 2.0))
    return side_by_side.Comparison(
        prompt="why?",
        base=side_by_side.Reply(tokens=(1, 2), margins=(1.0, 1.0)),
        unmerged=adapted,
        merged=adapted,
        onnx=side_by_side.Reply(tokens=adapted.tokens, margins=()),
        logit_error=0.01,
    )


def tiny_model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_equal_replies_unlike_the_base_have_no_fault(side_by_side: ModuleType, comparison: Any) -> None:
    assert side_by_side.faults([comparison]) == []


def test_other_tokens_on_a_decisive_prompt_are_a_fault(side_by_side: ModuleType, comparison: Any) -> None:
    other = dataclasses.replace(comparison.merged, tokens=(4, 5, 7))
    changed = dataclasses.replace(comparison, merged=other)
    assert side_by_side.faults([comparison, changed]) == ["'why?': unmerged and merged give different tokens"]


def test_other_tokens_of_the_graphs_are_a_fault(side_by_side: ModuleType, comparison: Any) -> None:
    changed = dataclasses.replace(comparison, onnx=side_by_side.Reply(tokens=(4, 5), margins=()))
    assert side_by_side.faults([comparison, changed]) == ["'why?': unmerged and onnx give different tokens"]


def test_other_tokens_are_allowed_where_a_step_is_nearly_a_tie(side_by_side: ModuleType, comparison: Any) -> None:
    close = dataclasses.replace(comparison.unmerged, margins=(3.0, 0.09, 2.0))
    other = dataclasses.replace(comparison.merged, tokens=(4, 9, 9))
    nearly = dataclasses.replace(comparison, unmerged=close, merged=other)
    assert side_by_side.decisive([comparison, nearly]) == [comparison]
    assert side_by_side.faults([comparison, nearly]) == []


def test_the_largest_error_of_all_prompts_sets_the_threshold(side_by_side: ModuleType, comparison: Any) -> None:
    noisy = dataclasses.replace(comparison, logit_error=0.06)
    assert side_by_side.faults([comparison, noisy]) == [
        "no prompt is decisive: every reply has a step within ten times the logit error"
    ]


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_an_error_that_is_no_number_is_a_fault(error: float, side_by_side: ModuleType, comparison: Any) -> None:
    broken = dataclasses.replace(comparison, logit_error=error)
    assert side_by_side.faults([comparison, broken]) == [f"'why?': logit error is {error}"]


def test_saying_what_the_base_says_is_a_fault_for_both(side_by_side: ModuleType, comparison: Any) -> None:
    same = dataclasses.replace(comparison, base=comparison.unmerged)
    assert side_by_side.faults([same]) == [
        "'why?': unmerged says what the base says",
        "'why?': merged says what the base says",
        "'why?': onnx says what the base says",
    ]


def test_a_greedy_reply_takes_the_best_token_and_records_its_lead(side_by_side: ModuleType) -> None:
    model, prompt = tiny_model(1), [3, 14, 15]
    reply = side_by_side.greedy_reply(model, prompt, max_new_tokens=8)
    tokens = list(prompt)
    for token, margin in zip(reply.tokens, reply.margins, strict=True):
        with torch.inference_mode():
            best, second = model(torch.tensor([tokens])).logits[0, -1].topk(2).values.tolist()
            assert token == int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        assert margin == pytest.approx(best - second, abs=1e-4)
        tokens.append(token)
    assert len(reply.tokens) == 8
    assert reply.smallest_margin == min(reply.margins)


def test_the_logit_error_is_taken_where_the_reply_is_chosen(side_by_side: ModuleType) -> None:
    model, other, prompt = tiny_model(1), tiny_model(1), [3, 14, 15]
    reply = side_by_side.greedy_reply(model, prompt, max_new_tokens=8)
    logits = side_by_side.reply_logits(model, prompt, reply)
    assert logits.argmax(dim=-1).tolist() == list(reply.tokens)
    assert side_by_side.largest_difference(logits, side_by_side.reply_logits(other, prompt, reply)) == 0.0
    with torch.no_grad():
        other.lm_head.weight[7] += 1.0
    moved = side_by_side.reply_logits(other, prompt, reply)
    assert side_by_side.largest_difference(logits, moved) == pytest.approx((moved - logits)[:, 7].abs().max().item())
    assert side_by_side.largest_difference(logits, moved) > 0.1
