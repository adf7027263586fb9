"""Round the parameters of a loaded model by chance, each to the dtype that the merged checkpoint stores it in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_deploy.evidence.chance import round_by_chance
from lora_deploy.rounding import torch_dtype
from lora_deploy.tensors import DType, TensorSpec

_BLOCK_ELEMENTS = 1 << 19
"""Fits the cache of a core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DTypes:
    """In which format each parameter is stored."""

    by_name: Mapping[str, DType]
    usual: DType
    """Of those that the checkpoint stores under another name."""

    @classmethod
    def of(cls, tensors: Mapping[str, TensorSpec], adapted: Collection[str]) -> DTypes:
        """Find the formats of a merged checkpoint; the usual one is that of most adapted tensors' bytes."""
        floating = {name: spec for name, spec in tensors.items() if spec.dtype.is_floating}
        sizes: dict[DType, int] = {}
        for name, spec in floating.items():
            if name in adapted or not floating.keys() & set(adapted):
                sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.n_bytes
        usual = max(sizes, key=lambda dtype: sizes[dtype], default=DType.F32)
        return cls(by_name={name: spec.dtype for name, spec in floating.items()}, usual=usual)

    def of_tensor(self, name: str) -> DType:
        """Give the format of one."""
        return self.by_name.get(name, self.usual)

    def round(self, name: str, values: Tensor, generator: torch.Generator) -> Tensor:
        """Round values by chance, block by block; gives float32."""
        dtype = self.of_tensor(name)
        if dtype is DType.F64:
            return values.to(torch.float32)
        flat, found = values.reshape(-1), torch.empty(values.numel())
        for k in range(0, flat.numel(), _BLOCK_ELEMENTS):
            block = slice(k, k + _BLOCK_ELEMENTS)
            found[block] = round_by_chance(flat[block], dtype, generator)
        return found.view(values.shape)

    @property
    def working(self) -> torch.dtype:
        """The format to merge in before rounding: much finer than any stored one."""
        return torch.float64 if self.usual in {DType.F32, DType.F64} else torch.float32

    def holds(self, name: str, values: Tensor) -> bool:
        """Whether values are of the stored format already, so that rounding leaves them."""
        dtype = self.of_tensor(name)
        if dtype in {DType.F64, DType.F32}:
            return values.dtype is torch.float32
        return torch.equal(values.to(torch_dtype(dtype)).to(values.dtype), values)


@contextmanager
def rounded_parameters(
    model: nn.Module,
    dtypes: DTypes,
    generator: torch.Generator,
    *,
    skip: Collection[int] = (),
    name_of: Callable[[str], str] = str,
) -> Iterator[None]:
    """Round every floating parameter but those in ``skip`` (by id) while the block runs."""
    saved: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for path, module in model.named_modules():
            if any(part.startswith("lora_") or part == "original_module" for part in path.split(".")):
                continue
            for name, parameter in list(module.named_parameters(recurse=False)):
                full = name_of(f"{path}.{name}" if path else name)
                if id(parameter) in skip or not parameter.is_floating_point() or dtypes.holds(full, parameter.data):
                    continue
                saved.append((module, name, parameter))
                value = dtypes.round(full, parameter.detach(), generator)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        yield
    finally:
        for module, name, parameter in saved:
            setattr(module, name, parameter)
