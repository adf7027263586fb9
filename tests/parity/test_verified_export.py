"""``verify`` on a merged folder with graphs: the base is exported as well, every byte that graphs read is replayed."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from lora_deploy.errors import InputError, RecipeError
from lora_deploy.evidence.dossier import Evidence
from lora_deploy.evidence.graphs import GraphFolder, find_graphs
from lora_deploy.evidence.latency import LatencyReport
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import Outcome
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.replay import ReplayReport
from lora_deploy.evidence.unmerged_graph import unmerged_graph
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.binding_table import BindingTable
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan
from lora_deploy.pipeline import plan, verify
from lora_deploy.validate import BindOptions
from tests.parity.exports import Case, assert_close, contents, prepare, run, tokens
from tests.peer.models import bert, llama
from tests.peer.trained import Trained, train

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("decoder")
    return prepare(llama(hidden_size=32, head_dim=8), "all-linear", folder, init_lora_weights=False)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = bert(BertForSequenceClassification, num_labels=3)
    options = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "init_lora_weights": False}
    return prepare(model, ["query", "value"], tmp_path_factory.mktemp("classifier"), **options)


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    """Have tests share the graphs that the module's fixtures made: making them again would take most of the time."""


def checked(folder: Path, *only: Check) -> Evidence:
    return verify(folder, options=VerifyOptions(only=only, seconds=3))


@torch.no_grad()
def test_the_contrast_does_what_the_unmerged_decoder_does(decoder: Case) -> None:
    """What latency is measured beside is PEFT's unmerged model: prefill, and decode over a cache."""
    base = folder_of(decoder.base_export.root)
    before = contents(base.root)
    ids, positions = tokens(2, 10)["input_ids"], torch.arange(10).expand(2, 10)
    mask = torch.ones_like(ids)
    with unmerged_graph(planned(decoder.trained), base) as unmerged:
        assert isinstance(unmerged, GraphFolder), unmerged
        first = {"input_ids": ids[:, :9], "attention_mask": mask[:, :9], "position_ids": positions[:, :9]}
        found = run(unmerged.prefill, first)
        more = {"input_ids": ids[:, 9:], "attention_mask": mask, "position_ids": positions[:, 9:]}
        last = run(unmerged.decode, {**found, **more})
    expected = decoder.trained.output({"input_ids": ids}).float()
    assert_close(found["logits"], expected[:, :9])
    assert_close(last["logits"], expected[:, 9:], tolerance=5e-5)
    assert contents(base.root) == before, "its weights are links to the base's"


@torch.no_grad()
def test_the_contrast_does_what_the_unmerged_encoder_does(classifier: Case, tmp_path: Path) -> None:
    model = bert(BertForSequenceClassification, num_labels=3)
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    trained = train(model, config, tmp_path, base=classifier.trained.base)
    batch = tokens(2, 9)
    batch |= {"token_type_ids": torch.zeros_like(batch["input_ids"])}
    with unmerged_graph(planned(trained), folder_of(classifier.base_export.root)) as unmerged:
        assert isinstance(unmerged, GraphFolder), unmerged
        found = run(unmerged.prefill, batch)["logits"]
    assert_close(found, trained.output(batch).float())


def test_no_contrast_where_the_adapter_is_more_than_factors(classifier: Case, tmp_path: Path) -> None:
    base = folder_of(classifier.base_export.root)
    dora = LoraConfig(r=2, target_modules=["query"], use_dora=True, init_lora_weights=False)
    trained = train(bert(BertForSequenceClassification, num_labels=3), dora, tmp_path / "dora")
    for one, reason in ((trained, "found a dora update"), (classifier.trained, "classifier.bias: found a replacement")):
        with unmerged_graph(planned(one), base) as why:
            assert isinstance(why, str)
            assert reason in why
    plain = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    trained = train(bert(BertForSequenceClassification, num_labels=3), plain, tmp_path / "plain")
    (tmp_path / "elsewhere").mkdir()
    for file in ("model.onnx", "config.json"):
        shutil.copy(base.root / file, tmp_path / "elsewhere" / file)
    with unmerged_graph(planned(trained), folder_of(tmp_path / "elsewhere")) as why:
        assert "nothing says where its weights come from" in str(why)


def planned(trained: Trained) -> MergePlan:
    return plan(trained.adapter, base=trained.base, merge_options=MergeOptions(dtype="float32"))


def folder_of(path: Path) -> GraphFolder:
    found = find_graphs(path)
    assert found is not None
    return found


def damaged(case: Case, folder: Path) -> Path:
    shutil.copytree(case.merged, folder)
    return folder


@pytest.mark.parametrize("name", ["decoder", "classifier"])
def test_weights_outputs_and_graphs_of_an_export_are_proven(name: str, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(name)
    found = checked(case.merged)
    assert isinstance(found.replay, ReplayReport)
    assert found.replay.verdict is Verdict.PASS, found.replay.faults
    assert isinstance(found.parity, ParityReport)
    assert found.parity.verdict is Verdict.PASS, found.parity.reason
    assert any(subject.name.startswith("onnx") for subject in found.parity.subjects)
    shares = {share.name for s in found.parity.subjects for bound in s.tolerances for share in bound.shares}
    assert shares == {"merge", "export"}
    assert isinstance(found.latency, LatencyReport)
    assert found.latency.proof.is_equal, found.latency.proof.reason
    assert found.latency.verdict is not Verdict.INCONCLUSIVE
    is_plain = name == "decoder"
    assert ("unmerged" in found.latency.measurements[-1].pairs[0].medians) is is_plain, found.latency.why_no_contrast
    assert ("replacement" in found.latency.why_no_contrast) is not is_plain


def test_a_changed_byte_of_the_graphs_weights_is_found(decoder: Case, tmp_path: Path) -> None:
    folder = damaged(decoder, tmp_path / "merged")
    table = BindingTable.model_validate_json((folder / "onnx" / "binding_table.json").read_bytes())
    slot = next(slot for slot in table.slots if slot.file == "prefill.onnx.data" and len(slot.shape) == 2)
    path = folder / "onnx" / slot.file
    content = bytearray(path.read_bytes())
    content[slot.offset + slot.n_bytes - 1] ^= 1
    path.write_bytes(content)
    report = checked(folder, Check.REPLAY).replay
    assert isinstance(report, ReplayReport)
    assert report.verdict is Verdict.FAIL
    assert [entry.outcome for entry in report.faults] == [Outcome.WRONG_GRAPH]
    assert f"prefill.onnx.data: byte {slot.offset}: " in report.faults[0].message


def test_an_initializer_that_reads_another_place_is_named(decoder: Case, tmp_path: Path) -> None:
    folder = damaged(decoder, tmp_path / "merged")
    path = folder / "onnx" / "decode.onnx"
    model = onnx.load(path, load_external_data=False)
    one, other, *_ = (t for t in model.graph.initializer if t.external_data and list(t.dims) == [32, 32])
    for mine, theirs in zip(one.external_data, other.external_data, strict=True):
        mine.value, theirs.value = theirs.value, mine.value
    path.write_bytes(model.SerializeToString())
    report = checked(folder, Check.REPLAY).replay
    assert isinstance(report, ReplayReport)
    assert report.verdict is Verdict.FAIL
    assert {one.name, other.name} == {entry.message.split(": ")[1] for entry in report.faults}


def test_an_export_of_other_weights_is_not_this_merges(decoder: Case, tmp_path: Path) -> None:
    folder = damaged(decoder, tmp_path / "merged")
    shutil.rmtree(folder / "onnx")
    shutil.copytree(decoder.base_export.root, folder / "onnx")
    report = checked(folder, Check.REPLAY).replay
    assert isinstance(report, ReplayReport)
    assert report.verdict is Verdict.FAIL
    assert all(entry.outcome is Outcome.WRONG_GRAPH for entry in report.faults)


# ------------------------------------------------------------------------------------- straight from adapter and base


def straight(case: Case, folder: Path) -> Path:
    shutil.copytree(case.straight.root, folder)
    return folder


def test_a_direct_export_is_proven_from_its_own_record(decoder: Case, tmp_path: Path) -> None:
    folder = straight(decoder, tmp_path / "straight")
    found = checked(folder)
    assert isinstance(found.replay, ReplayReport)
    assert found.replay.verdict is Verdict.PASS, found.replay.faults
    assert found.replay.counts[Outcome.EXACT] > 10
    assert isinstance(found.parity, ParityReport)
    assert found.parity.verdict is Verdict.PASS, found.parity.reason
    assert {subject.name.partition(" ")[0] for subject in found.parity.subjects} == {"onnx"}
    assert isinstance(found.latency, LatencyReport)
    assert found.latency.proof.is_equal, found.latency.proof.reason
    assert (folder / "evidence.json").is_file()


def test_a_direct_export_that_was_changed_is_found(decoder: Case, tmp_path: Path) -> None:
    folder = straight(decoder, tmp_path / "straight")
    path = folder / "prefill.onnx.data"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    report = checked(folder, Check.REPLAY).replay
    assert isinstance(report, ReplayReport)
    assert report.verdict is Verdict.FAIL
    assert [entry.outcome for entry in report.faults] == [Outcome.WRONG_GRAPH, Outcome.WRONG_CONFIG]


def test_an_export_of_the_base_with_the_record_of_a_merge_fails(decoder: Case, tmp_path: Path) -> None:
    folder = straight(decoder, tmp_path / "straight")
    shutil.copy(decoder.base_export.root / "prefill.onnx.data", folder / "prefill.onnx.data")
    found = checked(folder, Check.REPLAY, Check.PARITY)
    assert isinstance(found.replay, ReplayReport)
    assert found.replay.verdict is Verdict.FAIL
    assert isinstance(found.parity, ParityReport)
    assert found.parity.verdict is Verdict.FAIL


def test_inputs_of_a_direct_export_may_lie_elsewhere_but_must_be_the_same(decoder: Case, tmp_path: Path) -> None:
    folder = straight(decoder, tmp_path / "straight")
    record = folder / "export.json"
    moved = {name: tmp_path / name for name in ("base", "adapter")}
    shutil.copytree(decoder.trained.base, moved["base"])
    shutil.copytree(decoder.trained.adapter, moved["adapter"])
    for name in moved:
        record.write_text(
            record.read_text().replace(str(getattr(decoder.trained, name)), str(tmp_path / "gone" / name))
        )
    options = VerifyOptions(only=(Check.REPLAY,))
    with pytest.raises(InputError):
        verify(folder, options=options)
    found = verify(folder, adapters=moved["adapter"], base=moved["base"], options=options)
    assert found.replay.to_json()["verdict"] == "pass"
    other = next(moved["adapter"].glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(other).items()}, other)
    with pytest.raises(InputError, match="not the adapter that was merged"):
        verify(folder, adapters=moved["adapter"], base=moved["base"], options=options)
    with pytest.raises(RecipeError, match=r"its export.json says with which options"):
        verify(folder, adapters=moved["adapter"], bind_options=BindOptions(weights=(2.0,)), options=options)


def test_the_graphs_of_a_merged_folder_are_verified_with_it(decoder: Case) -> None:
    with pytest.raises(RecipeError, match=r"has no merge.json") as caught:
        verify(decoder.exported.root)
    assert "verify the merged folder" in str(caught.value.hint)
