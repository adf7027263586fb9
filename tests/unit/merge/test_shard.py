"""What every tensor becomes on its way into the merged checkpoint, byte for byte."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_deploy.checkpoint import Checkpoint, open_checkpoint
from lora_deploy.errors import MergeError, NonFiniteTensorError
from lora_deploy.merge.execute import Merged, execute
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import plan_merge
from lora_deploy.merge.shard import chunks
from lora_deploy.tensors import DType, Region
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.token_rows import TokenRows
from tests.builders import low_rank, make_checkpoint
from tests.exact_oracle import TORCH, exact_sum, merged_exactly, nearest
from tests.merging import binding_of

W = "w.weight"
EXECUTE = importlib.import_module("lora_deploy.merge.execute")


def merge(checkpoint: Checkpoint, updates: Any, out: Path, **options: Any) -> tuple[dict[str, Tensor], Merged]:
    fields = options.pop("fields", {})
    plan = plan_merge(binding_of(checkpoint, updates, **fields), MergeOptions(device="cpu", **options))
    done = execute(plan, out)
    tensors: dict[str, Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors, done


def exactly(weight: Tensor, updates: list[LowRank], dtype: DType) -> Tensor:
    return torch.tensor(merged_exactly(weight, updates, dtype), dtype=torch.float64).to(TORCH[dtype])


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def every_16_bits(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def test_untouched_tensors_are_the_base_s_bytes(tmp_path: Path) -> None:
    tensors = {
        "all.bfloat16": every_16_bits(torch.bfloat16),
        "all.float16": every_16_bits(torch.float16),
        "nan.float32": torch.tensor([0x7FC00001, 0x7F800001, -1], dtype=torch.int32).view(torch.float32),
        "small.float8": torch.randn(5).to(torch.float8_e4m3fn),
        "mask.bool": torch.tensor([True, False, True]),
        "count.int64": torch.tensor([2**62, -1]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        W: torch.randn(4, 4),
    }
    checkpoint = make_checkpoint(tmp_path / "base", tensors)
    merged, done = merge(checkpoint, {W: low_rank(4, 4)}, tmp_path / "out", dtype="base")
    assert set(merged) == set(tensors)
    for name in tensors.keys() - {W}:
        assert merged[name].dtype == tensors[name].dtype
        assert merged[name].shape == tensors[name].shape
        assert torch.equal(bits(merged[name]), bits(tensors[name])), name
    assert set(done.record.tensors) == {W}
    assert done.record.n_untouched == len(tensors) - 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_integers_bools_and_float8_are_copied_whatever_the_dtype(tmp_path: Path, dtype: str) -> None:
    tensors = {
        "a": torch.tensor([300, -5], dtype=torch.int32),
        "b": torch.tensor([True, False]),
        "c": torch.randn(5).to(torch.float8_e5m2),
        "d": torch.tensor(7, dtype=torch.uint8),
    }
    merged, _ = merge(make_checkpoint(tmp_path / "base", tensors), {}, tmp_path / "out", dtype=dtype)
    for name, tensor in tensors.items():
        assert merged[name].dtype == tensor.dtype
        assert torch.equal(bits(merged[name].view(-1)), bits(tensor.view(-1)))


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32])
def test_every_16_bit_number_is_cast_to_the_nearest_of_any_format(
    tmp_path: Path, base: torch.dtype, dtype: DType
) -> None:
    values = every_16_bits(base)
    values = values[values.abs() < 65520]
    merged, done = merge(make_checkpoint(tmp_path / "base", {"a": values}), {}, tmp_path / "out", dtype=dtype.long_name)
    expected = [nearest(Fraction(value), dtype) for value in values.tolist()]
    signed = torch.tensor(expected, dtype=torch.float64).copysign(values.double())  # a cast keeps the sign of zero
    assert torch.equal(bits(merged["a"]), bits(signed.to(TORCH[dtype])))
    if base != TORCH[dtype]:
        underflowed = int(((merged["a"] == 0) & (values != 0)).sum())
        assert done.record.tensors["a"].n_underflowed == underflowed
        assert done.record.tensors["a"].max_abs == float(merged["a"].abs().max())


@pytest.mark.parametrize("base", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32])
def test_wider_numbers_are_cast_once(tmp_path: Path, base: torch.dtype, dtype: DType) -> None:
    ties = [1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-11, 1 + 2.0**-11 - 2.0**-40, 2.0**-25, -(2.0**-25)]
    near = torch.tensor(ties, dtype=torch.float64)
    values = torch.cat([torch.randn(300, dtype=torch.float64), near, near * (1 + 2**-45)]).to(base)
    values = torch.cat([values, values * 2.0**-14, values * 2.0**-20])
    merged, _ = merge(make_checkpoint(tmp_path / "base", {"a": values}), {}, tmp_path / "out", dtype=dtype.long_name)
    expected = torch.tensor([nearest(Fraction(value), dtype) for value in values.tolist()], dtype=torch.float64)
    assert torch.equal(bits(merged["a"]), bits(expected.to(TORCH[dtype])))


def test_infinities_and_nans_of_the_base_pass_a_cast(tmp_path: Path) -> None:
    values = torch.tensor([math.inf, 1.0, -math.inf, math.nan])
    merged, _ = merge(make_checkpoint(tmp_path / "base", {"a": values}), {}, tmp_path / "out")
    assert merged["a"].tolist()[:3] == [math.inf, 1.0, -math.inf]
    assert math.isnan(merged["a"][3])


def test_a_finite_value_that_a_cast_would_make_infinite_is_refused_by_name_and_value(tmp_path: Path) -> None:
    values = torch.ones(300, 8, dtype=torch.bfloat16)
    values[211, 3] = -70000
    checkpoint = make_checkpoint(tmp_path / "base", {"ok": torch.ones(3), "a.weight": values})
    with pytest.raises(NonFiniteTensorError, match=r"a\.weight: element \[211, 3\] is -70144, .*65504") as caught:
        merge(checkpoint, {}, tmp_path / "out")
    assert caught.value.hint == "--dtype base"


def test_an_element_of_a_part_is_named_in_the_tensor_s_own_terms(tmp_path: Path) -> None:
    stack = torch.ones(5, 4, 6)
    stack[3, 2, 5] = math.nan
    part = (low_rank(4, 6), Region(offset=3 * 24, n_rows=4, n_cols=6))
    with pytest.raises(NonFiniteTensorError, match=r"^w\.weight: element \[3, 2, 5\] of the base is nan"):
        merge(make_checkpoint(tmp_path / "base", {W: stack}), {W: part}, tmp_path / "out")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", ["float16", "base"])
def test_a_replacement_that_is_no_number_is_refused_by_name(tmp_path: Path, value: float, dtype: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "base", {W: torch.ones(2, 3)})
    values = torch.ones(2, 3)
    values[1, 2] = value
    tokens = TokenRows(indices=(1,), values=values[1:], n_rows=2)
    for update in (Replacement(values=values), tokens):
        with pytest.raises(NonFiniteTensorError, match=rf"w\.weight: element \[1, 2\] of what the adapter .*{value}"):
            merge(checkpoint, {W: update}, tmp_path / "out", dtype=dtype, fresh=True)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
def test_adapted_tensors_are_the_exact_sum_rounded_once(tmp_path: Path, base: torch.dtype, dtype: str) -> None:
    weight = (torch.randn(9, 7) * 0.1).to(base)
    updates = [low_rank(9, 7, scale=0.1), low_rank(9, 7, rank=3, scale=-0.02)]
    merged, done = merge(make_checkpoint(tmp_path / "base", {W: weight}), {W: updates}, tmp_path / "out", dtype=dtype)
    stored = DType.from_long_name(str(base) if dtype == "base" else dtype)
    assert torch.equal(bits(merged[W]), bits(exactly(weight, updates, stored)))
    delta = updates[0].delta() + updates[1].delta()
    entry = done.record.tensors[W]
    assert entry.delta_norm == pytest.approx(float(delta.norm()))
    assert entry.weight_norm == pytest.approx(float(weight.double().norm()))
    error = float((merged[W].double() - weight.double() - delta).norm())
    assert entry.survival == pytest.approx(1 - error / float(delta.norm()), abs=1e-5)
    assert entry.ratio == pytest.approx(float(delta.norm() / weight.double().norm()))


def test_convolutions_and_scalars_are_matrices_of_their_first_axis(tmp_path: Path) -> None:
    kernel = torch.randn(4, 3, 2, 2)
    update = low_rank(4, 12)
    merged, _ = merge(make_checkpoint(tmp_path / "base", {W: kernel}), {W: update}, tmp_path / "out")
    assert torch.equal(merged[W].reshape(4, 12), exactly(kernel.reshape(4, 12), [update], DType.F16))


def test_parts_of_a_tensor_are_merged_and_what_lies_between_is_cast(tmp_path: Path) -> None:
    """Experts 1 and 3 of five in a stack, and rows of another tensor."""
    stack, fused = torch.randn(5, 4, 6).to(torch.bfloat16), torch.randn(10, 6).to(torch.bfloat16)
    of_expert = {e: low_rank(4, 6) for e in (3, 1)}
    rows = low_rank(3, 6)
    updates = {
        "experts": [(of_expert[e], Region(offset=e * 24, n_rows=4, n_cols=6)) for e in (3, 1)],
        "fused": (rows, Region(offset=4 * 6, n_rows=3, n_cols=6)),
    }
    checkpoint = make_checkpoint(tmp_path / "base", {"experts": stack, "fused": fused})
    for dtype, stored in (("float16", DType.F16), ("base", DType.BF16)):
        merged, done = merge(checkpoint, updates, tmp_path / f"to-{dtype}", dtype=dtype)
        for e in range(5):
            expected = exactly(stack[e], [of_expert[e]] if e in of_expert else [], stored)
            assert torch.equal(merged["experts"][e], expected), e
        assert torch.equal(merged["fused"][4:7], exactly(fused[4:7], [rows], stored))
        rest = [0, 1, 2, 3, 7, 8, 9]
        assert torch.equal(merged["fused"][rest], fused[rest].to(TORCH[stored]))
        assert done.record.tensors["experts"].max_abs == float(merged["experts"].abs().max())


def test_regions_that_overlap_are_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base", {W: torch.randn(6, 4)})
    updates = {W: [(low_rank(4, 4), Region(offset=o, n_rows=4, n_cols=4)) for o in (0, 8)]}
    with pytest.raises(MergeError, match=r"w\.weight: updates of overlapping regions"):
        merge(checkpoint, updates, tmp_path / "out")


def test_two_outputs_may_start_from_one_base_tensor(tmp_path: Path) -> None:
    """As when layers are replicated: one copy is adapted, the other is not."""
    weight, update = torch.randn(4, 4).to(torch.bfloat16), low_rank(4, 4)
    checkpoint = make_checkpoint(tmp_path / "base", {"layers.0.w": weight})
    outputs = {"layers.0.w": "layers.0.w", "layers.1.w": "layers.0.w"}
    merged, _ = merge(checkpoint, {"layers.1.w": update}, tmp_path / "out", dtype="base", fields={"outputs": outputs})
    assert torch.equal(merged["layers.0.w"], weight)
    assert torch.equal(merged["layers.1.w"], exactly(weight, [update], DType.BF16))


def test_replaced_and_added_tensors_are_the_adapter_s_values(tmp_path: Path) -> None:
    new, added = torch.randn(3, 4), torch.randn(2, 4).to(torch.float16)
    checkpoint = make_checkpoint(tmp_path / "base", {W: torch.randn(3, 4).to(torch.bfloat16)})
    updates = {W: Replacement(values=new), "score.weight": Replacement(values=added)}
    shapes = {"score.weight": (2, 4)}
    merged, done = merge(checkpoint, updates, tmp_path / "out", fields={"shapes": shapes})
    assert torch.equal(merged[W], new.half())
    assert torch.equal(merged["score.weight"], added)
    treatments = {name: entry.treatment for name, entry in done.record.tensors.items()}
    assert treatments == {W: "replaced", "score.weight": "added"}
    assert done.record.tensors["score.weight"].max_abs == float(added.abs().max())


def test_a_resized_embedding_is_replaced_and_its_delta_added_on_top(tmp_path: Path) -> None:
    new, update = torch.randn(7, 4), low_rank(7, 4)
    checkpoint = make_checkpoint(tmp_path / "base", {W: torch.randn(5, 4)})
    updates = {W: [Replacement(values=new), update]}
    merged, done = merge(checkpoint, updates, tmp_path / "out", fields={"shapes": {W: (7, 4)}})
    assert torch.equal(merged[W], exactly(new, [update], DType.F16))
    assert done.record.tensors[W].treatment == "merged"


def test_trained_token_rows_are_put_in_place_before_the_delta_is_added(tmp_path: Path) -> None:
    weight, rows, update = torch.randn(600, 4).to(torch.bfloat16), torch.randn(3, 4), low_rank(600, 4)
    tokens = TokenRows(indices=(599, 2, 300), values=rows, n_rows=600)
    checkpoint = make_checkpoint(tmp_path / "base", {W: weight})
    expected = weight.float()
    expected[[599, 2, 300]] = rows
    merged, _ = merge(checkpoint, {W: tokens}, tmp_path / "alone")
    assert torch.equal(merged[W], expected.half())
    merged, _ = merge(checkpoint, {W: [tokens, update]}, tmp_path / "both")
    assert torch.equal(merged[W], exactly(expected, [update], DType.F16))


@pytest.mark.parametrize("chunk_elements", [400, 4, 10**6])
def test_facts_and_token_rows_do_not_depend_on_how_a_tensor_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_elements: int
) -> None:
    real = EXECUTE.fit
    monkeypatch.setattr(EXECUTE, "fit", lambda plan: replace(real(plan), chunk_elements=chunk_elements))
    weight, update = torch.randn(600, 4).to(torch.bfloat16), low_rank(600, 4)
    tokens = TokenRows(indices=(0, 300, 599), values=torch.randn(3, 4), n_rows=600)
    checkpoint = make_checkpoint(tmp_path / "base", {W: weight, "rows": weight})
    merged, done = merge(checkpoint, {W: update, "rows": tokens}, tmp_path / "out")
    entry, delta = done.record.tensors[W], update.delta()
    assert entry.delta_norm == pytest.approx(float(delta.norm()))
    assert entry.weight_norm == pytest.approx(float(weight.double().norm()))
    error = float((merged[W].double() - weight.double() - delta).norm())
    assert entry.survival == pytest.approx(1 - error / float(delta.norm()), abs=1e-5)
    assert entry.max_abs == float(merged[W].abs().max())
    expected = weight.float()
    expected[list(tokens.indices)] = tokens.values
    assert torch.equal(merged["rows"], expected.half())


def test_kinds_defined_in_float64_are_rounded_once(tmp_path: Path) -> None:
    weight, inner = torch.randn(8, 6).to(torch.bfloat16), low_rank(8, 6)
    dora = Dora(inner=inner, magnitude=torch.rand(8) + 1, axis="rows")
    merged, done = merge(make_checkpoint(tmp_path / "base", {W: weight}), {W: dora}, tmp_path / "out", dtype="bfloat16")
    v = weight.double() + inner.delta()
    exact = dora.magnitude.double()[:, None] / v.norm(dim=1, keepdim=True) * v
    expected = [[nearest(Fraction(value), DType.BF16) for value in line] for line in exact.tolist()]
    assert torch.equal(merged[W], torch.tensor(expected, dtype=torch.float64).to(torch.bfloat16))
    assert done.record.tensors[W].delta_norm == pytest.approx(float((exact - weight.double()).norm()))
    weight[3, 2] = math.nan
    with pytest.raises(NonFiniteTensorError, match=r"w\.weight: element \[3, 2\] of the base is nan"):
        merge(make_checkpoint(tmp_path / "damaged", {W: weight}), {W: dora}, tmp_path / "no")


def test_tensors_that_begin_at_any_byte_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.randn(5, 3), "c": torch.randn(2, 2).double()}
    make_checkpoint(tmp_path / "base", tensors)
    header = (tmp_path / "base" / "model.safetensors").read_bytes()
    n_header = int.from_bytes(header[:8], "little")
    entries = json.loads(header[8 : 8 + n_header])
    order = ["a", "b", "c"]
    start, data = 0, b""
    for name in order:
        content = tensors[name].numpy().tobytes()
        entries[name]["data_offsets"] = [start, start + len(content)]
        start += len(content)
        data += content
    entries.pop("__metadata__", None)
    text = json.dumps({name: entries[name] for name in order}).encode()
    (tmp_path / "base" / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    checkpoint = open_checkpoint(tmp_path / "base")
    update = low_rank(5, 3)
    merged, _ = merge(checkpoint, {"b": update}, tmp_path / "out")
    assert torch.equal(merged["b"], exactly(tensors["b"], [update], DType.F16))
    assert torch.equal(merged["c"], tensors["c"].half())


def test_the_index_names_every_tensor_and_the_size_of_all(tmp_path: Path) -> None:
    tensors = {f"t{k}": torch.randn(8, 8) for k in range(5)} | {"n": torch.arange(3)}
    checkpoint = make_checkpoint(tmp_path / "base", tensors, n_shards=2)
    merge(checkpoint, {"t1": low_rank(8, 8)}, tmp_path / "out", max_shard_bytes=260)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 5 * 64 + 3, "total_size": 5 * 128 + 24}
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert set(index["weight_map"]) == set(tensors)
    merge(checkpoint, {}, tmp_path / "one")
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("chunk_elements", [1, 7, 64, 10**6])
def test_chunks_cover_every_byte_in_order(tmp_path: Path, chunk_elements: int) -> None:
    tensors = {"a": torch.randn(10, 6), "b": torch.arange(20), "c": torch.zeros(0, 3), "d": torch.randn(())}
    updates = {"a": (low_rank(3, 6), Region(offset=12, n_rows=3, n_cols=6))}
    plan = plan_merge(binding_of(make_checkpoint(tmp_path / "base", tensors), updates), MergeOptions())
    for tensor in plan.tensors:
        end = 0
        for chunk in chunks(tensor, plan.binding.checkpoint, torch.device("cpu"), chunk_elements):
            assert chunk.start == end
            end = chunk.stop
        assert end == tensor.spec.n_bytes


def test_the_recorded_digests_are_those_of_the_files(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base", {W: torch.randn(8, 8)}, {"model_type": "llama"})
    _, done = merge(checkpoint, {W: low_rank(8, 8)}, tmp_path / "out")
    for file in done.record.artifacts:
        content = (tmp_path / "out" / file.path).read_bytes()
        assert (file.n_bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert {file.path for file in done.record.artifacts} == {"model.safetensors", "config.json"}


def test_underflows_are_counted_in_adapted_tensors_too(tmp_path: Path) -> None:
    weight, update = torch.randn(20, 10) * 1e-7, low_rank(20, 10, scale=1e-9)
    _, done = merge(make_checkpoint(tmp_path / "base", {W: weight}), {W: update}, tmp_path / "out")
    exact = [exact_sum(weight, [update], i, j) for i in range(20) for j in range(10)]
    expected = sum(value != 0 and nearest(value, DType.F16) == 0 for value in exact)
    assert expected > 10
    assert done.record.tensors[W].n_underflowed == expected
