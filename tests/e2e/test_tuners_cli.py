"""Adapters of PEFT's other tuners from the command line to the evidence: merged, replayed, run beside PEFT's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

from lora_deploy.rounding import round_once
from lora_deploy.tensors import DType
from tests.e2e.commands import document, run
from tests.peer.models import llama
from tests.peer.trained import Trained, peft_advice_unheard, tensors_of, train

TARGETS = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "Vera": {"r": 3, "save_projection": False, "projection_prng_key": 3},
    "Miss": {"r": 3},
}


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    with peft_advice_unheard():
        config = getattr(peft, f"{request.param}Config")(target_modules=TARGETS, **CASES[request.param])
    return train(llama(), config, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def merged(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    result = run("merge", trained.adapter, "--base", trained.base, "-o", out, "--dtype", "base")
    assert result.exit_code == 0, result.stderr
    return out


def test_a_merge_replays_bit_for_bit(merged: Path) -> None:
    found = document("verify", merged, "--only", "replay")
    assert (found["verdict"], found["replay"]["counts"]) == ("pass", {"exact": 21})


@pytest.mark.slow
def test_a_merge_answers_as_pefts_own_loader_makes_the_base_answer(merged: Path) -> None:
    parity = document("verify", merged, "--only", "parity")["parity"]
    assert parity["verdict"] == "pass"
    assert "peft" in parity["reference"]
    assert parity["is_independent"]
    assert parity["power"][0]["ratio"] > 100


def test_a_merge_is_what_peft_merges(trained: Trained, merged: Path) -> None:
    expected = {name: round_once(tensor, DType.F32) for name, tensor in trained.merged().items()}
    found = tensors_of(merged)
    changed = [name for name in found if any(f".{target}." in name for target in TARGETS)]
    assert len(changed) == 6
    for name in changed:
        assert (found[name] - expected[name]).abs().max() <= 1e-7 * expected[name].abs().max()


def test_inspect_names_every_module_before_any_base_is_known(trained: Trained) -> None:
    modules = document("inspect", trained.adapter)["modules"]
    assert len(modules) == 6
    assert {module["shape"][1] for module in modules} == {None}
    assert {module["dtype"] for module in modules} == {"float32"}
