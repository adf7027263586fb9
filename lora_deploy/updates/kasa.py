"""KaSA and OSF updates: the weight loses its r smallest singular components and gains s·B·diag(d)·A.

The reader folds diag(d) into B, exactly, in float64. For OSF these are the components that it trained on.
Source: KaSA, arXiv:2412.06071; peft 0.21.2, ``tuners/lora/variants.py``, ``KasaLinearVariant``, and
``tuners/osf/layer.py``, ``get_delta_weight`` (which truncate in float32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lora_deploy.updates.residual import Component, WithoutComponent

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kasa(WithoutComponent):
    """Low-rank delta on a weight without its ``rank`` smallest singular components."""

    kind: ClassVar[str] = "kasa"

    def component(self, weight: Tensor) -> Component:
        """Compute the smallest singular components; at least one other must remain."""
        rank = self.low_rank.rank
        self.check_rank(min(weight.shape) - 1)
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        return Component(left=left[:, -rank:] * sizes[-rank:], right=right[-rank:].clone())
