"""The merge on a CUDA device: the same bytes as on the CPU, on little device memory too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.checkpoint import open_checkpoint
from lora_deploy.merge.exact import merge_rows
from lora_deploy.merge.execute import execute
from lora_deploy.merge.factors import Factors
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan, plan_merge
from lora_deploy.merge.workspace import Workspace
from lora_deploy.tensors import DType, Place, Region
from lora_deploy.updates.low_rank import LowRank
from tests.builders import make_checkpoint, make_scale
from tests.merging import LLAMA, binding_of, digests, every_kind

pytestmark = pytest.mark.gpu
DTYPES = ["float16", "bfloat16", "float32", "base"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., MergePlan]:
    torch.manual_seed(12)
    folder = tmp_path_factory.mktemp("base")
    tensors, updates = every_kind()
    tensors["large"] = (torch.randn(3000, 4100) * 0.02).to(torch.bfloat16)
    up, down = (torch.randn(3000, 16) * 0.01).half(), torch.randn(16, 4100).half()
    updates["large"] = LowRank(up=up, down=down, scale=make_scale(2.0))
    make_checkpoint(folder, tensors, LLAMA)

    def plan(**options: Any) -> MergePlan:
        return plan_merge(binding_of(open_checkpoint(folder), updates), MergeOptions(**options))

    return plan


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Leave this process 96 MiB of the device beyond what it holds."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (96 << 20)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def merged(plan: MergePlan, out: Path) -> dict[str, str]:
    return digests(execute(plan, out).root, "*.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_writes_the_bytes_that_the_cpu_writes(planned: Any, tmp_path: Path, dtype: str) -> None:
    on_cpu = merged(planned(dtype=dtype, device="cpu"), tmp_path / "cpu")
    assert merged(planned(dtype=dtype, device="cuda"), tmp_path / "cuda") == on_cpu
    assert merged(planned(dtype=dtype, device="cuda:0", n_workers=1), tmp_path / "one") == on_cpu
    assert merged(planned(dtype=dtype, device="auto", n_workers=8), tmp_path / "eight") == on_cpu


def test_little_device_memory_makes_smaller_blocks_of_the_same_bytes(
    planned: Any, tmp_path: Path, little_memory: None
) -> None:
    on_cpu = merged(planned(device="cpu"), tmp_path / "cpu")
    assert merged(planned(device="cuda", n_workers=2), tmp_path / "cuda") == on_cpu


def test_the_record_says_which_device_and_tf32_is_as_it_was(planned: Any, tmp_path: Path) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    assert execute(planned(device="cuda"), tmp_path / "out").record.cost.device == "cuda"
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32, DType.F64])
@pytest.mark.parametrize("factor", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ties_cancellations_and_extremes_are_settled_alike(dtype: DType, factor: torch.dtype) -> None:
    ties = (torch.randint(-8, 9, (200, 130)) * 2.0**-7).float()
    up, down = torch.randint(-1, 2, (200, 3)) * 2.0**-8, torch.randint(-3, 4, (3, 130)).float()
    cancelling = torch.randn(200, 3), torch.randn(3, 130)
    tiny = torch.randn(200, 3) * 1e-18, torch.randn(3, 130) * 1e-18
    for weight, (left, right) in (
        (ties, (up, down)),
        (-(cancelling[0].to(factor).double() @ cancelling[1].to(factor).double()).float(), cancelling),
        (torch.randn(200, 130) * 1e-38, tiny),
        (torch.zeros(200, 130), (torch.zeros(200, 3), down)),
    ):
        update = LowRank(up=left.to(factor), down=right.to(factor), scale=make_scale(1.0))
        place, found = Place("w", (200, 130), Region.whole((200, 130))), []
        for device in (torch.device("cpu"), torch.device("cuda")):
            factors, workspace = Factors([update], device), Workspace(device)
            with workspace.active():
                result, _ = merge_rows(place, workspace.bring(weight), factors, slice(0, 200), dtype, workspace)
                found.append(bytes(workspace.fetch(result).contiguous().view(torch.uint8).numpy()))
        assert found[0] == found[1]
