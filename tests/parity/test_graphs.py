"""Graphs beside the unmerged model: reading, decoding over a cache, greedy tokens; each fault has its own measure.

Times are taken for a few seconds: that they are there is tested here; whether they are equal is for quiet machines.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper, save

from lora_deploy.cli import main
from lora_deploy.errors import EvidenceError, InconclusiveError, InputError, RecipeError
from lora_deploy.evidence.bench import bench
from lora_deploy.evidence.graph_parity import Graphs
from lora_deploy.evidence.graphs import find_graphs
from lora_deploy.evidence.latency import LatencyOptions, check_latency
from lora_deploy.evidence.load_cost import load_cost
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.session import open_session
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.merge.options import MergeOptions
from lora_deploy.pipeline import merge
from tests.parity.conftest import Exported, folder_of
from tests.parity.exported import with_swapped_outputs
from tests.peer.trained import MEMORY_BYTES

pytestmark = pytest.mark.usefixtures("in_one_process")
PREFILL, ONE, FOUR, GREEDY = (
    "onnx prefill",
    "onnx decode over a cache, batch 1",
    "onnx decode over a cache, batch 4, left-padded",
    "onnx greedy",
)


def verdicts(report: ParityReport) -> dict[str, Verdict]:
    return {subject.name: subject.verdict for subject in report.subjects if subject.name.startswith("onnx")}


def test_a_right_export_passes_in_every_way_it_is_run(exported: Exported) -> None:
    report = exported.case.parity(graphs=exported.graphs)
    assert report.verdict is Verdict.PASS, report.reason
    assert verdicts(report) == dict.fromkeys((PREFILL, ONE, FOUR, GREEDY), Verdict.PASS)
    shares = {share.name: share for share in report.subjects[1].tolerances[0].shares}
    assert set(shares) == {"merge", "export"}
    assert "same stored weights" in shares["export"].source
    assert all(entry.first_difference is None for subject in report.subjects for entry in subject.greedy)
    assert report.subjects[1].facts["provider"] == "CPUExecutionProvider"


def test_without_a_graph_of_the_base_float32s_own_error_is_the_export_share(exported: Exported) -> None:
    report = exported.case.parity(graphs=Graphs(merged=exported.merged))
    assert report.verdict is Verdict.PASS, report.reason
    assert [share.name for share in report.subjects[1].tolerances[0].shares] == ["merge", "arithmetic"]


def test_the_bases_graph_passed_off_as_the_merged_one_fails_everywhere(exported: Exported) -> None:
    report = exported.case.parity(graphs=Graphs(merged=exported.base, base=exported.base))
    assert report.verdict is Verdict.FAIL
    assert set(verdicts(report).values()) == {Verdict.FAIL}
    assert report.subjects[0].verdict is Verdict.PASS, "the checkpoint is right"


def test_a_cache_that_continues_another_layer_shows_in_decoding_alone(exported: Exported, tmp_path: Path) -> None:
    names = [f"output.past_key_values.layers.{k}.keys" for k in (0, 1)]
    with_swapped_outputs(exported.merged.prefill, *names, tmp_path / "swapped")
    report = exported.case.parity(graphs=Graphs(merged=folder_of(tmp_path / "swapped"), base=exported.base))
    found = verdicts(report)
    assert (found[PREFILL], found[ONE], found[FOUR]) == (Verdict.PASS, Verdict.FAIL, Verdict.FAIL)
    assert found[GREEDY] is Verdict.FAIL
    assert "greedy token" in next(s.reason for s in report.subjects if s.name == GREEDY)


def test_a_graph_that_does_not_load_fails_and_one_that_cannot_be_fed_is_inconclusive(
    exported: Exported, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    (tmp_path / "export.json").write_text("{}")
    report = exported.case.parity(graphs=Graphs(merged=folder_of(tmp_path)))
    assert report.verdict is Verdict.FAIL
    assert "does not load it" in report.reason
    scale(tmp_path / "model.onnx", name="something_else")
    report = exported.case.parity(graphs=Graphs(merged=folder_of(tmp_path)))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "wants an input something_else" in report.reason


def test_a_provider_that_is_not_there_is_inconclusive(exported: Exported) -> None:
    report = exported.case.parity(graphs=replace(exported.graphs, provider="cuda"))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "CUDAExecutionProvider is not in this onnxruntime" in report.reason


# ------------------------------------------------------------------------------------------------------------- sessions


def scale(path: Path, *, name: str = "x", kind: int = TensorProto.FLOAT) -> Path:
    """Write a graph that doubles its input."""
    x, y = (helper.make_tensor_value_info(n, kind, ["batch", 2]) for n in (name, "y"))
    node = helper.make_node("Add", [name, name], ["y"])
    model = helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    save(model, path)
    return path


def test_a_session_runs_by_name_and_says_its_format(tmp_path: Path) -> None:
    session = open_session(scale(tmp_path / "g.onnx", kind=TensorProto.FLOAT16))
    assert session.run({"x": torch.ones(3, 2), "unknown": torch.ones(3)})["y"].tolist() == [[2, 2]] * 3
    assert (session.float_type, session.takes_cache) == (torch.float16, False)


def test_what_cannot_be_fed_or_found_is_said(tmp_path: Path) -> None:
    graph = scale(tmp_path / "g.onnx")
    with pytest.raises(InconclusiveError, match="wants an input x"):
        open_session(graph).run({"y": torch.ones(3, 2)})
    with pytest.raises(EvidenceError, match="does not run it"):
        open_session(graph).run({"x": torch.ones(3, 5)})
    with pytest.raises(RecipeError, match="found 'gpu', expected one of cpu, cuda"):
        open_session(graph, provider="gpu")
    with pytest.raises(InconclusiveError, match="cannot be fed"):
        open_session(scale(tmp_path / "b.onnx", kind=TensorProto.UINT8)).run({"x": torch.ones(3, 2)})


def test_a_provider_that_did_not_load_is_no_substitute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class FellBack:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: FellBack())
    with pytest.raises(InconclusiveError, match="fell back to CPUExecutionProvider"):
        open_session(scale(tmp_path / "g.onnx"), provider="cuda")


def test_caches_are_paired_whatever_their_names(tmp_path: Path) -> None:
    ins = ["past_key_values.3.key", "past_key_values.3.value", "past_key_values.0.encoder.key"]
    outs = ["present.3.value", "present.3.key", "present.0.encoder.key"]
    nodes = [helper.make_node("Identity", [i], [o]) for i, o in zip(ins, [outs[1], outs[0], outs[2]], strict=True)]
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 2, "past", 4]) for n in [*ins, *outs]}
    graph = helper.make_graph(nodes, "g", [values[n] for n in ins], [values[n] for n in outs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    save(model, tmp_path / "g.onnx")
    session = open_session(tmp_path / "g.onnx")
    empty = session.run({"input_ids": torch.ones(3, 1)})
    assert {tuple(value.shape) for value in empty.values()} == {(3, 2, 0, 4)}
    numbered = {name: torch.full((1, 2, 1, 4), float(k)) for k, name in enumerate(outs)}
    following = session.next_cache(numbered)
    assert {name: int(value[0, 0, 0, 0]) for name, value in following.items()} == {ins[0]: 1, ins[1]: 0, ins[2]: 2}


def test_graphs_are_found_below_onnx_or_in_the_folder_with_its_record(tmp_path: Path) -> None:
    assert find_graphs(tmp_path) is None
    scale(tmp_path / "model.onnx")
    assert find_graphs(tmp_path) is None, "nothing says that this is an export"
    (tmp_path / "export.json").write_text("{}")
    here = find_graphs(tmp_path)
    assert here is not None
    assert (here.root, here.decode) == (tmp_path, tmp_path / "model.onnx")
    (tmp_path / "onnx").mkdir()
    scale(tmp_path / "onnx" / "decoder_model.onnx")
    scale(tmp_path / "onnx" / "decoder_with_past_model.onnx")
    below = find_graphs(tmp_path)
    assert below is not None
    assert [path.name for path in below.files] == ["decoder_model.onnx", "decoder_with_past_model.onnx"]


# ---------------------------------------------------------------------------------------------------------------- bench

QUICK = LatencyOptions(seconds=2.0)


def test_two_folders_are_timed_in_fresh_pairs(exported: Exported) -> None:
    report = bench(exported.merged.root, against=exported.base.root, options=QUICK)
    (found,) = report.measurements
    assert len(found.pairs) >= 1
    assert set(found.sample("merged")) == {"prefill", "decode"}
    assert all(seconds > 0 for pair in found.pairs for times in pair.medians.values() for seconds in times.values())
    assert set(report.costs) == {"base", "merged"}
    assert all(cost.peak_bytes > cost.added_bytes > 0 for cost in report.costs.values())
    assert report.verdict in set(Verdict)


def test_a_childs_peak_memory_is_not_its_parents(exported: Exported) -> None:
    ballast = torch.ones(200_000_000)  # 800 MB, resident in this process alone
    assert load_cost(exported.merged).peak_bytes < 4 * ballast.numel()


def test_a_contrast_that_does_not_load_spoils_nothing(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    (tmp_path / "export.json").write_text("{}")
    report = check_latency(
        exported.merged, exported.base, exported.case.plan.config, QUICK, contrast=folder_of(tmp_path)
    )
    assert report.measurements
    assert "model.onnx" in report.why_no_contrast
    assert set(report.measurements[0].pairs[0].medians) == {"base", "merged", "base again"}
    beside = check_latency(exported.merged, exported.base, exported.case.plan.config, QUICK, contrast=exported.base)
    assert beside.why_no_contrast == ""
    assert "unmerged" in beside.measurements[0].pairs[0].medians


def test_the_command_prints_times_or_one_document(exported: Exported) -> None:
    arguments = ["bench", str(exported.merged.root), "--seconds", "1", "--latency-bound", "5%"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.stderr
    assert "prefill" in shown.stdout
    assert "peak memory" in shown.stdout
    document = CliRunner().invoke(main, [*arguments, "--json"])
    assert json.loads(document.stdout)["bound"] == pytest.approx(0.05)


def test_a_folder_without_graphs_is_refused(exported: Exported) -> None:
    with pytest.raises(InputError, match="holds no exported graphs"):
        bench(exported.case.merged.root)


def test_an_adapter_merged_into_transformers_export_gives_it_the_merged_weights(
    exported: Exported, tmp_path: Path
) -> None:
    """The other side was made by content: every initializer that holds a base weight, replaced by the merged one."""
    adapter, base = exported.case.trained.adapter, exported.base.root
    options = MergeOptions(dtype="base", n_workers=1, memory_bytes=MEMORY_BYTES)
    done = merge(adapter, base=base / "model.onnx", output=tmp_path / "out", merge_options=options)
    assert _weights(done.root) == _weights(exported.merged.root) != _weights(base)
    for name in ("model.onnx", "export.json"):
        assert (done.root / name).read_bytes() == (base / name).read_bytes()


def _weights(folder: Path) -> dict[str, bytes]:
    tensors = onnx.load(folder / "model.onnx").graph.initializer
    return {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in tensors}
