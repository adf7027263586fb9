"""What an update is: the change that one adapter makes to one region of one stored tensor.

An update is written in the layout of the *stored* tensor: ``block`` takes and gives rows of the region as it lies in
the file. Readers emit updates in the module's own layout (out, in) and say so (``Orientation.UNKNOWN``); ``bind``
turns them with ``transposed`` where the base stores the module the other way round.

Promise: ``block`` is a pure function of its arguments; what needs more than one block (norms, factorisations) is
computed once, in ``prepare``, in float64, in a fixed order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias, TypeVar

from lora_deploy.errors import UnmergeableAdapterError

if TYPE_CHECKING:
    from torch import Tensor

ReadRows: TypeAlias = "Callable[[slice], Tensor]"
"""Gives rows of the region before this update, float64, shape (rows, n_cols)."""

_ROOT_BITS = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The exact factor before B·A: ``factor / sqrt(root)``, and where it came from."""

    factor: Fraction
    """k * weight * alpha / r, or k * weight * alpha for rank-stabilised adapters."""
    root: int = 1
    """1, or the rank r for rank-stabilised adapters (arXiv:2312.03732)."""
    source: str
    """For a person: ``lora_alpha 16 / r 8 (adapter_config.json)``."""

    def times(self, weight: Fraction | float, source: str | None = None) -> Scale:
        """Multiply by a finite weight, exactly."""
        return replace(self, factor=self.factor * Fraction(weight), source=source or self.source)

    @property
    def value(self) -> float:
        """The float64 nearest to the exact factor: the scale that the merge is defined with.

        Raises:
            UnmergeableAdapterError: It exceeds float64.
        """
        try:
            return self._nearest()
        except OverflowError as error:
            raise UnmergeableAdapterError(f"scale {self.source}: exceeds float64's range") from error

    def _nearest(self) -> float:
        if self.root == 1 or not self.factor:
            return float(self.factor)
        square = self.factor**2 / self.root
        shift = _ROOT_BITS + max(0, square.denominator.bit_length() - square.numerator.bit_length())
        scaled = square * (1 << (2 * shift))
        root = math.isqrt(math.floor(scaled))
        is_cut = root**2 != scaled  # one more bit says so: what lies a hair above a tie must not be rounded as the tie
        size = float(Fraction(2 * root + is_cut, 2 << shift))
        return -size if self.factor < 0 else size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update(ABC):
    """A change of a region of a tensor."""

    is_exact: ClassVar[bool] = False
    """Whether the merge evaluates it as the exact real value, rounded once (low-rank sums and replacements)."""
    kind: ClassVar[str]
    """Its name in ``KINDS``."""

    @property
    def needs_whole(self) -> bool:
        """Whether ``prepare`` holds the whole region in float64; the plan then reserves memory for it."""
        return False

    @property
    def n_prepared_bytes(self) -> int:
        """Memory that ``prepare`` and its result take beyond ``needs_whole``; the plan reserves it for one region."""
        return 0

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region that it changes."""

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """Memory that its own tensors take."""

    @abstractmethod
    def transposed(self) -> Self:
        """Give the same change for a tensor that is stored the other way round."""

    @abstractmethod
    def weighted(self, weight: float) -> Self:
        """Multiply the change by a weight.

        Raises:
            UnmergeableAdapterError: The kind is not linear, and the weight is not 1.
        """

    def prepare(self, read: ReadRows) -> object:
        """Compute what ``block`` needs of more than one block; the default needs nothing."""
        del read
        return None

    @abstractmethod
    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Change rows of the region.

        Shapes: weight_rows (n, n_cols) float64, rows of the region; the result has the same shape and dtype.
        """


U = TypeVar("U", bound=Update)


def refuse_weight(update: U, weight: float) -> U:
    """Pass an update through when the weight is 1.

    Raises:
        UnmergeableAdapterError: Any other weight: the kind is not linear in the adapter.
    """
    if weight == 1:
        return update
    raise UnmergeableAdapterError(
        f"a {update.kind} update cannot be weighted: found weight {weight}, expected 1",
        hint="leave this adapter's --weight at 1, or --exclude the tensor",
    )
