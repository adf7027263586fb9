"""Merges into exports by hand: only adapted bytes change, and what a graph cannot express is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_deploy.errors import IncompatibleAdapterError, InputError, OutputExistsError, RecipeError, ReplayError
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import Outcome
from lora_deploy.evidence.verdict import Check
from lora_deploy.merge.execute import Merged
from lora_deploy.merge.options import MergeOptions
from lora_deploy.pipeline import merge, require_pass, verify
from tests.builders import make_checkpoint
from tests.unit.export.existing.test_explained import packed
from tests.unit.export.foreign import (
    CONFIG,
    SIZE,
    UP,
    K,
    Q,
    V,
    adapter,
    delta,
    initializers,
    matrix,
    merged,
    optimum,
    plain_tensors,
    scoped,
    write,
)

LIMITS: dict[str, Any] = {"n_workers": 1, "memory_bytes": 4_000_000_000}


def graft(base: Path, given: Path, out: Path, **options: Any) -> Merged:
    return merge(given, base=base, output=out, merge_options=MergeOptions(**{"dtype": "base", **LIMITS, **options}))


def check(folder: Path) -> Any:
    return verify(folder, options=VerifyOptions(only=(Check.REPLAY,)), merge_options=MergeOptions(**LIMITS)).replay


@pytest.mark.parametrize("data", [None, "model.onnx.data", "weights/model.data"])
def test_only_the_adapted_bytes_change(tmp_path: Path, data: str | None) -> None:
    if data:
        (tmp_path / "base" / data).parent.mkdir(parents=True)
    base = write(tmp_path / "base", *optimum(plain_tensors()), data=data)
    given = adapter(tmp_path / "adapter", Q)
    done = graft(base, given, tmp_path / "out")
    found, before = initializers(done.root), initializers(base)
    assert torch.equal(found["onnx::MatMul_1"], merged(matrix(1), given, Q).T)
    assert torch.equal(found["onnx::MatMul_2"], before["onnx::MatMul_2"])
    file = data or "model.onnx"
    old, new = (base / file).read_bytes(), (done.root / file).read_bytes()
    raw = before["onnx::MatMul_1"].numpy().tobytes()
    assert new == old.replace(raw, found["onnx::MatMul_1"].numpy().tobytes())
    if data:
        assert (done.root / "model.onnx").read_bytes() == (base / "model.onnx").read_bytes()
    assert (done.root / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert list(done.record.tensors) == [f"{Q}.weight"]
    assert done.record.n_untouched == 1
    assert check(done.root).verdict == "pass"


def test_packed_projections_get_their_own_updates(tmp_path: Path) -> None:
    weights, nodes = packed()
    base = write(tmp_path / "base", weights, nodes)
    given = adapter(tmp_path / "adapter", Q, V, shapes={V: (4, SIZE)})
    name = next(iter(weights))
    found = initializers(graft(base, given, tmp_path / "out").root)[name]
    parts = [merged(matrix(0), given, Q), matrix(1, 4), merged(matrix(2, 4), given, V)]
    assert torch.equal(found, torch.cat(parts).T)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}])
def test_the_bytes_are_those_of_a_merged_checkpoint(tmp_path: Path, kind: dict[str, Any]) -> None:
    """Kinds that depend on blocks and axes are evaluated in the checkpoint's layout, not in the graph's."""
    given = adapter(tmp_path / "adapter", Q, UP, **kind)
    if kind:
        path = given / "adapter_model.safetensors"
        magnitude = {f"base_model.model.{m}.lora_magnitude_vector": matrix(7, SIZE, 1)[:, 0].abs() for m in (Q, UP)}
        save_file({**load_file(path), **magnitude}, path)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", plain_tensors(), CONFIG)
    graft(checkpoint.root, given, tmp_path / "merged")
    expected = optimum(load_file(tmp_path / "merged" / "model.safetensors"))[0]
    found = initializers(graft(write(tmp_path / "base", *optimum(plain_tensors())), given, tmp_path / "out").root)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(found["onnx::MatMul_1"], optimum(plain_tensors())[0]["onnx::MatMul_1"])


def test_float16_is_rounded_once(tmp_path: Path) -> None:
    weights, nodes = optimum(plain_tensors())
    base = write(tmp_path / "base", {name: value.half() for name, value in weights.items()}, nodes)
    given = adapter(tmp_path / "adapter", Q)
    found = initializers(graft(base, given, tmp_path / "out", dtype="float16").root)["onnx::MatMul_1"]
    exact = matrix(1).half().double() + delta(given, Q)
    assert torch.equal(found, torch.from_numpy(exact.T.numpy().astype("float16")))  # numpy rounds float64 once


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    base, given = write(tmp_path / "base", *optimum(plain_tensors())), adapter(tmp_path / "adapter", Q)
    with pytest.raises(RecipeError, match="expected float32") as caught:
        graft(base, given, tmp_path / "out", dtype="bfloat16")
    assert caught.value.hint == "--dtype base"
    graft(base, given, tmp_path / "out", dtype="float32")


def copies(folder: Path, second: Tensor) -> Path:
    """Two graphs with a copy of their own each."""
    tensors = plain_tensors()
    write(folder, *optimum(tensors), file="decoder_model.onnx", data="decoder_model.onnx_data")
    weights, nodes = optimum(tensors | {f"{Q}.weight": second})
    return write(folder, weights, nodes, file="decoder_with_past_model.onnx", data="decoder_with_past_model.onnx_data")


def test_every_copy_changes(tmp_path: Path) -> None:
    given = adapter(tmp_path / "adapter", Q)
    done = graft(copies(tmp_path / "base", matrix(1)), given, tmp_path / "out")
    for file in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
        assert torch.equal(initializers(done.root, file)["onnx::MatMul_1"], merged(matrix(1), given, Q).T)
    once = graft(write(tmp_path / "one", *optimum(plain_tensors())), given, tmp_path / "other")
    assert done.record.tensors[f"{Q}.weight"].delta_norm == once.record.tensors[f"{Q}.weight"].delta_norm


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    base, given = copies(tmp_path / "base", matrix(9)), adapter(tmp_path / "adapter", Q)
    assert refusal(base, given, tmp_path / "out") == {("copies-differ", f"{Q}.weight")}
    graft(base, adapter(tmp_path / "other", UP), tmp_path / "out")


def test_a_file_that_graphs_share_changes_for_all_of_them(tmp_path: Path) -> None:
    base = write(tmp_path / "base", *optimum(plain_tensors()))
    shutil.copy(base / "model.onnx", base / "with_past.onnx")
    done = graft(base / "model.onnx", adapter(tmp_path / "adapter", Q), tmp_path / "out")
    assert {"model.onnx", "with_past.onnx"} <= {file.path for file in done.record.artifacts}
    assert torch.equal(
        initializers(done.root, "with_past.onnx")["onnx::MatMul_1"], initializers(done.root)["onnx::MatMul_1"]
    )


# ------------------------------------------------------------------------------------------------------------ refusals


def refusal(base: Path, given: Path, out: Path) -> set[tuple[str, str]]:
    with pytest.raises(IncompatibleAdapterError) as caught:
        graft(base, given, out)
    assert not out.exists()
    return {(f.code, f.target) for f in caught.value.findings if f.severity.value == "error"}


def tied(folder: Path, *, is_apart: bool = False) -> Path:
    """An embedding that the head reads too; or a copy of it, as constant folding leaves it."""
    nodes = [scoped("Gather", ["w", "x"], "h", "model.embed_tokens")]
    if is_apart:
        nodes.append(scoped("MatMul", ["h", "val_1"], "y", "lm_head"))
        return write(
            folder, {"w": matrix(1), "val_1": matrix(1).T}, nodes, config=CONFIG | {"tie_word_embeddings": True}
        )
    nodes += [scoped("Transpose", ["w"], "t", "lm_head"), scoped("MatMul", ["h", "t"], "y", "lm_head")]
    return write(folder, {"w": matrix(1)}, nodes, config=CONFIG | {"tie_word_embeddings": True})


def test_one_side_of_a_tied_matrix_cannot_change_alone(tmp_path: Path) -> None:
    given = adapter(tmp_path / "adapter", "lm_head")
    found = refusal(tied(tmp_path / "base"), given, tmp_path / "out")
    assert found == {("tie-inseparable", "lm_head.weight")}


def test_a_head_of_its_own_changes_alone(tmp_path: Path) -> None:
    given = adapter(tmp_path / "adapter", "lm_head")
    done = graft(tied(tmp_path / "base", is_apart=True), given, tmp_path / "out")
    found = initializers(done.root)
    assert torch.equal(found["w"], matrix(1))
    assert torch.equal(found["val_1"], merged(matrix(1), given, "lm_head").T)
    assert json.loads((done.root / "config.json").read_text())["tie_word_embeddings"] is False
    assert check(done.root).verdict == "pass"


def test_equal_weights_that_the_exporter_made_one_cannot_become_two(tmp_path: Path) -> None:
    nodes = [scoped("MatMul", ["x", "w"], "h", Q), scoped("MatMul", ["h", "w"], "y", K)]
    base = write(tmp_path / "base", {"w": matrix(1)}, nodes)
    assert refusal(base, adapter(tmp_path / "adapter", Q), tmp_path / "out") == {("tie-inseparable", f"{Q}.weight")}


def test_what_is_not_explained_is_listed(tmp_path: Path) -> None:
    weights, nodes = optimum(plain_tensors())
    nodes[0].name = "MatMul_1"
    base = write(tmp_path / "base", weights, nodes)
    with pytest.raises(IncompatibleAdapterError) as caught:
        graft(base, adapter(tmp_path / "adapter", Q), tmp_path / "out")
    message = caught.value.message
    assert f"error target-missing           {Q}.weight: not in base; nearest: mlp.up_proj" in message
    assert "onnx::MatMul_1 [8, 8]: neither its name nor its readers tell what it is" in message


def test_an_adapter_of_another_width_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", *optimum(plain_tensors()))
    given = adapter(tmp_path / "adapter", Q, shapes={Q: (16, 16)})
    assert refusal(base, given, tmp_path / "out") == {("shape-mismatch", f"{Q}.weight")}


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", *optimum(plain_tensors()))
    given = adapter(tmp_path / "adapter", "bert.encoder.layer.0.attention.self.query")
    assert {code for code, _ in refusal(base, given, tmp_path / "out")} == {"target-missing"}


def test_the_output_is_not_put_over_the_base(tmp_path: Path) -> None:
    base, given = write(tmp_path / "base", *optimum(plain_tensors())), adapter(tmp_path / "adapter", Q)
    with pytest.raises(OutputExistsError):
        graft(base, given, base)
    first = graft(base, given, tmp_path / "out")
    assert graft(base, given, tmp_path / "out").was_done
    assert first.record.digest == graft(base, given, tmp_path / "again").record.digest


# -------------------------------------------------------------------------------------------------------------- replay


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def _base_again(out: Path) -> None:
    shutil.copy(out.with_name("base") / "model.onnx.data", out / "model.onnx.data")


FAULTS: dict[str, tuple[Callable[[Path], None], Outcome, str]] = {
    "an adapted byte": (lambda out: _flip(out / "model.onnx.data", 70), Outcome.UNEXPLAINED, f"{Q}.weight"),
    "not merged": (_base_again, Outcome.NOT_APPLIED, f"{Q}.weight"),
    "another weight": (lambda out: _flip(out / "model.onnx.data", 400), Outcome.CHANGED, f"{UP}.weight"),
    "a byte before": (lambda out: _flip(out / "model.onnx.data", 3), Outcome.WRONG_LAYOUT, "model.onnx.data"),
    "a byte between": (lambda out: _flip(out / "model.onnx.data", 322), Outcome.WRONG_LAYOUT, "model.onnx.data"),
    "the graph": (lambda out: _flip(out / "model.onnx", 30), Outcome.WRONG_GRAPH, "model.onnx"),
    "a lost file": (lambda out: (out / "model.onnx.data").unlink(), Outcome.WRONG_LAYOUT, "model.onnx.data"),
    "a shorter file": (
        lambda out: (out / "model.onnx.data").write_bytes(b"x"),
        Outcome.WRONG_LAYOUT,
        "model.onnx.data",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_replay_sees(tmp_path: Path, fault: str) -> None:
    spoil, outcome, name = FAULTS[fault]
    base, given = write(tmp_path / "base", *optimum(plain_tensors())), adapter(tmp_path / "adapter", Q)
    out = graft(base, given, tmp_path / "out").root
    spoil(out)
    found = verify(out, options=VerifyOptions(only=(Check.REPLAY,)), merge_options=MergeOptions(**LIMITS))
    assert [(entry.outcome, entry.name) for entry in found.replay.faults] == [(outcome, name)]
    with pytest.raises(ReplayError):
        require_pass(found, out)


def test_verify_wants_the_base_that_was_merged(tmp_path: Path) -> None:
    base, given = write(tmp_path / "base", *optimum(plain_tensors())), adapter(tmp_path / "adapter", Q)
    out = graft(base, given, tmp_path / "out").root
    moved = tmp_path / "moved"
    base.rename(moved)
    assert verify(out, base=moved, options=VerifyOptions(only=(Check.REPLAY,))).replay.verdict == "pass"
    _flip(moved / "model.onnx.data", 70)
    with pytest.raises(InputError, match="not the base that was merged"):
        verify(out, base=moved)
    (moved / "model.onnx").unlink()
    with pytest.raises(InputError):
        verify(out, base=moved)


def test_weights_that_a_graph_holds_as_numbers_change_in_place(tmp_path: Path) -> None:
    """``float_data`` instead of raw bytes: one run of little-endian numbers in the file all the same."""
    weights, nodes = optimum(plain_tensors())
    base, given = write(tmp_path / "base", weights, nodes, data=None), adapter(tmp_path / "adapter", Q)
    model = onnx.load(str(base / "model.onnx"))
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT, values.shape, values.flatten()))
    onnx.save(model, str(base / "model.onnx"))
    done = graft(base, given, tmp_path / "out")
    assert torch.equal(initializers(done.root)["onnx::MatMul_1"], merged(matrix(1), given, Q).T)
    assert (done.root / "model.onnx").stat().st_size == (base / "model.onnx").stat().st_size
