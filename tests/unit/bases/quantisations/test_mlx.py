"""MLX layers, packed here from the published layout, come back as scale · q + bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_deploy.bases import open_base
from lora_deploy.errors import InputError, MalformedCheckpointError
from tests.builders import make_checkpoint
from tests.unit.bases.quantisations.test_gptq import stream
from tests.unit.bases.quantisations.unpacked import LAYER, tensor_of

NAME = f"{LAYER}.weight"
N_OUT, N_IN, GROUP = 5, 64, 32


def drawn(bits: int, module: str = LAYER) -> tuple[dict[str, Tensor], Tensor]:
    codes = torch.randint(0, 1 << bits, (N_OUT, N_IN))
    scales, biases = (torch.randn(N_OUT, N_IN // GROUP).to(torch.bfloat16) for _ in range(2))
    words = torch.tensor([stream(row, bits) for row in codes.tolist()], dtype=torch.int32).view(torch.uint32)
    group = torch.arange(N_IN) // GROUP
    tensors = {f"{module}.weight": words, f"{module}.scales": scales, f"{module}.biases": biases}
    return tensors, codes * scales.double()[:, group] + biases.double()[:, group]


def opened(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Any:
    config = {"quantization": {"group_size": GROUP, "bits": 4} | settings, "dtype": "float32"}
    make_checkpoint(folder, tensors, config)
    return open_base(str(folder), dequantize=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layer_is_scale_times_code_and_bias(bits: int, tmp_path: Path) -> None:
    tensors, exact = drawn(bits)
    base = opened(tmp_path, tensors, bits=bits)
    assert list(base.tensors) == [NAME]
    assert base.config == {"dtype": "float32"}
    assert torch.equal(tensor_of(base, NAME), exact.float())


@pytest.mark.parametrize("n_rows", [1, 3, 7])
def test_it_does_not_matter_how_few_rows_are_unpacked_at_once(
    n_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_deploy.bases.dequantise._BLOCK_ELEMENTS", n_rows * N_IN)
    tensors, exact = drawn(4)
    assert torch.equal(tensor_of(opened(tmp_path, tensors), NAME), exact.float())


def test_a_hand_packed_row_says_what_it_is_meant_to(tmp_path: Path) -> None:
    """Codes 0 … 7; the scale is 0.5, the bias −1."""
    tensors = {
        NAME: torch.full((1, 1), 0x76543210, dtype=torch.int32).view(torch.uint32),
        f"{LAYER}.scales": torch.full((1, 1), 0.5),
        f"{LAYER}.biases": torch.full((1, 1), -1.0),
    }
    base = opened(tmp_path, tensors, group_size=8)
    assert tensor_of(base, NAME).tolist() == [[-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5]]


def test_a_layer_may_have_a_width_of_its_own(tmp_path: Path) -> None:
    four, exact_four = drawn(4)
    eight, exact_eight = drawn(8, "lm_head")
    base = opened(tmp_path, four | eight, lm_head={"bits": 8, "group_size": GROUP})
    assert torch.equal(tensor_of(base, NAME), exact_four.float())
    assert torch.equal(tensor_of(base, "lm_head.weight"), exact_eight.float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"bits": 6}, "MLX of 6 bits"), ({"mode": "mxfp4"}, "in the mode 'mxfp4'"), ({"bits": None}, "MLX of None bits")],
)
def test_what_is_not_known_is_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        opened(tmp_path, drawn(4)[0], **settings)


@pytest.mark.parametrize(("size", "message"), [(48, "says 48 a group"), (64, r"scales: found shape \(5, 2\)")])
def test_groups_that_do_not_cover_the_inputs_are_malformed(size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(MalformedCheckpointError, match=message):
        opened(tmp_path, drawn(4)[0], group_size=size)
