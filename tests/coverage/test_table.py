"""The coverage table says what was found, and what was not run."""

from __future__ import annotations

from tests.coverage.cover import Row
from tests.coverage.table import compose

GOOD = Row(
    name="llama",
    cls="LlamaForCausalLM",
    graphs=("decode", "prefill"),
    is_fused=True,
    parity="pass",
    measure="KL divergence of logits",
    divergence=1.7e-11,
    effect=2.6,
    excess=3.14,
    seconds=17.3,
)
BAD = Row(name="mamba2", cls="Mamba2ForCausalLM", error="prefill: cannot be exported: RuntimeError: no such operator")


def test_a_proven_architecture_has_its_figures_and_another_its_error_word_for_word() -> None:
    text = compose({row.name: row for row in (GOOD, BAD)}, ["Commit: abc"])
    assert "| llama | `LlamaForCausalLM` | decode, prefill | yes | pass | 1.7e-11 | 2.6e+00 | 3.1 | 17 |" in text
    assert "| mamba2 | `Mamba2ForCausalLM` | none |  | not measured |  |  |  |  |" in text
    assert f"- **mamba2** (`Mamba2ForCausalLM`): `{BAD.error}`" in text
    assert "- Result: 1 of 2 exported and proven" in text


def test_an_architecture_without_a_row_is_named() -> None:
    assert "Not run: llama; mistral;" in compose({BAD.name: BAD}, [])
    assert "mamba2;" not in compose({BAD.name: BAD}, [])
