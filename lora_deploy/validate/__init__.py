"""Bind adapters to a base: resolve every name, orientation and shape, or report every misfit at once.

Promise: a ``Binding`` is proof. It exists only when every adapter tensor has found the tensor it is meant for, by exact
name, with the right shape, and everything that only the base can tell was decided without a guess.
"""

from __future__ import annotations

from lora_deploy.validate.bind import bind
from lora_deploy.validate.binding import Binding, BindOptions

__all__ = ["BindOptions", "Binding", "bind"]
