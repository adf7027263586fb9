"""The stages called from Python: which base, which output, which errors, and what a verdict becomes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora_deploy
from lora_deploy import pipeline
from lora_deploy.adapter import Adapter, BaseHint, Orientation
from lora_deploy.artifact import cache_root
from lora_deploy.bases import open_base
from lora_deploy.errors import InconclusiveError, InputError, RecipeError, ReplayError
from lora_deploy.evidence.dossier import Evidence
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import NotApplicable, Outcome, TensorOutcome
from lora_deploy.evidence.replay import ReplayReport
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.record import read_record
from lora_deploy.updates.replacement import Replacement
from lora_deploy.validate import BindOptions
from tests.builders import adapter_of, low_rank, make_checkpoint, module_update, save_peft

FACTORS = {
    "base_model.model.fc.lora_A.weight": torch.tensor([[1.0, 0.0, 2.0]]),
    "base_model.model.fc.lora_B.weight": torch.tensor([[3.0], [0.5]]),
}
WEIGHT = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
DELTA = torch.tensor([[3.0, 0.0, 6.0], [0.5, 0.0, 1.0]])


def naming(base: str | None, revision: str | None = None, **fields: Any) -> Adapter:
    hint = BaseHint(name=base, revision=revision)
    return adapter_of(module_update("fc.weight", low_rank(2, 3)), base_hint=hint, **fields)


def carrying(*names: str, path: Path = Path("whole.safetensors")) -> Adapter:
    copies = tuple(module_update(name, Replacement(values=WEIGHT), Orientation.STORED) for name in names)
    updates = [module_update(name, low_rank(2, 3)) for name in ("fc.weight", "head.weight")]
    return adapter_of(*updates, base_copies=copies, path=path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base", {"fc.weight": WEIGHT, "norm.weight": torch.ones(3)}).root


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_peft(
        tmp_path / "lora",
        FACTORS,
        {"r": 1, "lora_alpha": 1, "base_model_name_or_path": str(base), "target_modules": ["fc"]},
    )


def test_the_base_that_all_adapters_name_is_taken() -> None:
    assert pipeline.named_base([naming("owner/name"), naming(None), naming("owner/name")]) == "owner/name"


def test_a_revision_belongs_to_the_base() -> None:
    assert pipeline.named_base([naming("owner/name"), naming("owner/name", "abc123")]) == "owner/name@abc123"


def test_a_local_folder_has_no_revision(tmp_path: Path) -> None:
    assert pipeline.named_base([naming(str(tmp_path), "abc123")]) == str(tmp_path)


@pytest.mark.parametrize(
    "pair",
    [
        [naming("owner/one", name="a"), naming("owner/two", name="b")],
        [naming("owner/one", "r1", name="a"), naming("owner/one", "r2", name="b")],
    ],
)
def test_adapters_of_different_bases_or_revisions_are_refused_by_name(pair: list[Adapter]) -> None:
    with pytest.raises(RecipeError, match=r"a names owner/one.*, b names owner/(two|one@r2)") as caught:
        pipeline.named_base(pair)
    assert caught.value.hint == "choose one with --base"


def test_a_file_that_holds_all_it_changes_is_its_own_base() -> None:
    assert pipeline.named_base([carrying("fc.weight", "head.weight", "norm.weight")]) == "whole.safetensors"


def test_a_file_that_copies_one_base_tensor_is_no_base() -> None:
    with pytest.raises(RecipeError, match="names no base"):
        pipeline.named_base([carrying("fc.weight")])


def test_a_base_that_is_quantised_by_its_name_is_refused_with_the_originals_name() -> None:
    with pytest.raises(InputError, match="quantised") as caught:
        pipeline.named_base([naming("unsloth/llama-3-8b-bnb-4bit")])
    original = "merge it into the 16-bit original: --base unsloth/llama-3-8b"
    assert caught.value.hint == f"{original}, or unpack this one: --dequantize"


def test_a_base_that_is_quantised_by_its_name_is_the_base_where_it_is_to_be_dequantised() -> None:
    named = naming("unsloth/llama-3-8b-bnb-4bit")
    assert pipeline.named_base([named], dequantize=True) == "unsloth/llama-3-8b-bnb-4bit"


def test_a_merge_into_a_dequantised_base_is_verified_even_when_the_cache_was_emptied_since(tmp_path: Path) -> None:
    tensors = {"fc.weight": WEIGHT.to(torch.float8_e4m3fn), "fc.weight_scale": torch.full((1,), 0.5)}
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}
    base = make_checkpoint(tmp_path / "base", tensors, config).root
    adapter = save_peft(tmp_path / "lora", FACTORS, {"r": 1, "lora_alpha": 1, "target_modules": ["fc"]})
    merged = pipeline.merge(adapter, base=base, output=tmp_path / "out", dequantize=True)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["fc.weight"], (WEIGHT / 2 + DELTA).half())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert merged.record.base.name == str(base)
    assert "dequantised-base" in {finding.code for finding in merged.record.findings}
    only = VerifyOptions(only=(Check.REPLAY,))
    assert pipeline.verify(tmp_path / "out", options=only).verdict is Verdict.PASS
    shutil.rmtree(cache_root())
    with pytest.raises(InputError, match=r"quantised \(fp8\)") as caught:
        pipeline.verify(tmp_path / "out", options=only)
    assert str(caught.value.hint).endswith("--dequantize")
    assert pipeline.verify(tmp_path / "out", options=only, dequantize=True).verdict is Verdict.PASS


def test_a_local_folder_may_be_called_anything(tmp_path: Path) -> None:
    folder = tmp_path / "mine-4bit"
    folder.mkdir()
    assert pipeline.named_base([naming(str(folder))]) == str(folder)


def test_a_merge_from_python_is_the_definition(adapter: Path, tmp_path: Path) -> None:
    merged = lora_deploy.merge(adapter, output=tmp_path / "out", merge_options=MergeOptions(dtype="float32"))
    found = torch.frombuffer(bytearray(open_base(str(merged.root)).read("fc.weight")), dtype=torch.float32).reshape(
        2, 3
    )
    assert torch.equal(found, WEIGHT + DELTA)
    assert lora_deploy.verify(tmp_path / "out").verdict is Verdict.PASS


def test_one_adapter_may_be_given_as_a_string_or_a_path_or_in_a_list(adapter: Path, base: Path) -> None:
    for given in (str(adapter), adapter, [adapter], (str(adapter),)):
        assert set(lora_deploy.validate(given, base=base).updates) == {"fc.weight"}


def test_the_output_is_named_after_the_adapters_and_lies_here(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = save_peft(tmp_path / "style", FACTORS, {"r": 1, "lora_alpha": 1})
    monkeypatch.chdir(tmp_path)
    assert pipeline.default_output(pipeline.plan([adapter, second], base=base)) == Path("lora+style-merged")
    assert pipeline.merge(adapter).root.resolve() == tmp_path / "lora-merged"


def test_the_tokenizer_that_travels_is_the_chosen_one(adapter: Path, base: Path) -> None:
    (base / "generation_config.json").write_text('{"from": "base"}')
    (adapter / "generation_config.json").write_text('{"from": "adapter"}')
    by_default = pipeline.plan(adapter, base=base)
    chosen = pipeline.plan(adapter, base=base, bind_options=BindOptions(tokenizer="base"))
    assert by_default.companions["generation_config.json"].parent == adapter
    assert chosen.companions["generation_config.json"].parent == base


def test_a_record_finds_its_inputs_by_absolute_paths(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline.merge("lora", base="base", output="out")
    record = read_record(tmp_path / "out")
    assert (record.base.root, record.adapters[0].path) == (str(base), str(adapter / "adapter_model.safetensors"))


def test_a_base_that_changed_since_the_merge_is_not_blamed_on_the_merge(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    pipeline.merge(adapter, output=tmp_path / "out")
    make_checkpoint(base, {"fc.weight": WEIGHT + 1, "norm.weight": torch.ones(3)})
    with pytest.raises(InputError, match="not the base that was merged") as caught:
        pipeline.verify(tmp_path / "out")
    assert caught.value.code == "input-changed"


def test_a_base_in_a_lone_file_beside_others_is_found_again(adapter: Path, base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").rename(base / "second.safetensors")
    make_checkpoint(tmp_path / "third", {"x": torch.ones(2)}).root.joinpath("model.safetensors").rename(
        base / "third.safetensors"
    )
    pipeline.merge(adapter, base=base / "second.safetensors", output=tmp_path / "out")
    assert pipeline.verify(tmp_path / "out").verdict is Verdict.PASS


def replayed(verdict: Verdict, *outcomes: Outcome, is_ours: bool = False) -> ReplayReport:
    found = tuple(TensorOutcome(name=f"t{k}", outcome=outcome) for k, outcome in enumerate(outcomes))
    return ReplayReport(verdict=verdict, outcomes=found, n_bytes=1, tolerance="none", seconds=0.1, is_ours=is_ours)


def report(verdict: Verdict, *outcomes: Outcome, is_ours: bool = False) -> Evidence:
    absent = NotApplicable(reason="not asked for")
    return Evidence(replay=replayed(verdict, *outcomes, is_ours=is_ours), parity=absent, latency=absent)


def test_a_pass_raises_nothing() -> None:
    pipeline.require_pass(report(Verdict.PASS, Outcome.EXACT, Outcome.ROUNDED), "out")


def test_a_failure_names_what_speaks_against_the_folder() -> None:
    found = report(Verdict.FAIL, Outcome.EXACT, Outcome.ROUNDED, Outcome.MISSING, Outcome.MISSING)
    with pytest.raises(ReplayError, match=r"^out: is not the merge of its base and adapters: 2 missing$"):
        pipeline.require_pass(found, "out")


def test_another_rounding_speaks_against_a_merge_of_ours() -> None:
    found = report(Verdict.FAIL, Outcome.EXACT, Outcome.ROUNDED, is_ours=True)
    with pytest.raises(ReplayError, match="1 rounded"):
        pipeline.require_pass(found, "out")


def test_what_could_not_be_checked_is_not_called_checked() -> None:
    with pytest.raises(InconclusiveError, match="could not be verified: replay: 1 inconclusive"):
        pipeline.require_pass(report(Verdict.INCONCLUSIVE, Outcome.EXACT, Outcome.INCONCLUSIVE), "out")


def test_faults_come_before_what_could_not_be_checked() -> None:
    found = replayed(Verdict.FAIL, Outcome.INCONCLUSIVE, Outcome.WRONG_SCALE)
    assert [entry.outcome for entry in found.faults] == [Outcome.WRONG_SCALE, Outcome.INCONCLUSIVE]


@pytest.mark.parametrize("name", ["missing", "./missing", "~/missing"])
def test_an_adapter_that_is_not_there_is_naming(name: str) -> None:
    with pytest.raises(InputError, match=r"missing: no such file or folder"):
        pipeline.inspect(name)


@pytest.mark.parametrize(("is_dora", "promised"), [(True, False), (False, True)])
def test_another_torch_build_owes_the_same_bytes_to_exact_kinds_only(
    base: Path, tmp_path: Path, *, is_dora: bool, promised: bool
) -> None:
    magnitude = {"base_model.model.fc.lora_magnitude_vector": torch.tensor([2.0, 3.0])} if is_dora else {}
    config = {"r": 1, "lora_alpha": 1, "use_dora": is_dora, "target_modules": ["fc"]}
    adapter = save_peft(tmp_path / "lora", FACTORS | magnitude, config)
    merged = pipeline.merge(adapter, base=base, output=tmp_path / "out")
    before = pipeline.verify(merged.root).replay
    assert isinstance(before, ReplayReport)
    assert before.is_ours
    record = merged.root / "merge.json"
    record.write_text(record.read_text().replace(torch.__version__, "0.1"))
    after = pipeline.verify(merged.root).replay
    assert isinstance(after, ReplayReport)
    assert after.is_ours is promised
    assert after.verdict is Verdict.PASS
