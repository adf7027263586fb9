"""Differences that a small network computes from the weight itself (PEANuT): W' = W + s·B·X^T, X = net(f(W^T·A^T)).

net is d encoders X ← f(X·E^T), then d decoders X ← f(X·D^T) + the X before the matching encoder.

Definition: A·W in float64, summed over fixed blocks of rows; the network in float64 on the (in, r) result; then one
product for each block.
Source: PEANuT, arXiv:2410.01870; peft 0.21.2, ``tuners/peanut/layer.py``, ``_compute_delta_weight``; activations as in
transformers 5.23, ``activations.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch.nn import functional

from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.interface import ReadRows, Scale, Update
from lora_deploy.updates.reduction import row_blocks

if TYPE_CHECKING:
    from torch import Tensor


def _tanh_gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": functional.gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_python_tanh": _tanh_gelu,
    "hardswish": functional.hardswish,
    "leaky_relu": functional.leaky_relu,
    "linear": lambda x: x,
    "mish": functional.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
"""Activations without parameters of their own, by the names that transformers gives them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightNetwork(Update):
    """Adds what a network makes of the weight."""

    kind: ClassVar[str] = "weight-network"

    first: Tensor
    """(r, n_rows): A, any floating dtype."""
    encoders: tuple[Tensor, ...]
    """(r, r) each."""
    decoders: tuple[Tensor, ...]
    """(r, r) each; as many as encoders."""
    last: Tensor
    """(n_rows, r): B, any floating dtype."""
    activation: str
    """A name in ``ACTIVATIONS``."""
    scale: Scale
    n_cols: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return int(self.last.shape[0]), self.n_cols

    @property
    def n_bytes(self) -> int:
        """Memory of the network in bytes."""
        return sum(tensor.nbytes for tensor in (self.first, self.last, *self.encoders, *self.decoders))

    @property
    def n_prepared_bytes(self) -> int:
        """The X of every layer, and A and B in float64."""
        rank, n_rows = self.first.shape
        return 8 * int(rank) * ((3 + len(self.encoders)) * self.n_cols + 2 * int(n_rows))

    def transposed(self) -> Self:
        """PEFT adapts no layer like this that is stored as (in, out).

        Raises:
            UnmergeableAdapterError: Always.
        """
        message = f"a {self.kind} update is computed from the weight as (out, in): it has no form for an (in, out) one"
        raise UnmergeableAdapterError(message)

    def weighted(self, weight: float) -> Self:
        """Multiply the scale: the change is linear in B."""
        return replace(self, scale=self.scale.times(weight))

    def prepare(self, read: ReadRows) -> Tensor:
        """Run the network on the weight: (r, n_cols) float64, s·X^T."""
        first = self.first.to(torch.float64)
        product = torch.zeros((len(first), self.n_cols), dtype=torch.float64)
        for rows in row_blocks(self.shape[0]):
            product += first[:, rows] @ read(rows)
        activate = ACTIVATIONS[self.activation]
        x = activate(product.T)
        before = []
        for encoder in self.encoders:
            before.append(x)
            x = activate(x @ encoder.to(torch.float64).T)
        for decoder in self.decoders:
            x = activate(x @ decoder.to(torch.float64).T) + before.pop()
        return self.scale.value * x.T

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Add the rows' part of the product."""
        assert isinstance(state, torch.Tensor)  # noqa: S101 - what prepare gave
        return weight_rows + self.last[rows].to(torch.float64) @ state
