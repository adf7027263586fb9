"""Adapted modules of a PEFT file: which kind of update each one is, from its slots, its configuration and its shapes.

Promise: a module has exactly the slots that its kind writes, and the configuration agrees with them, or it is refused.
Source: peft 0.21.2, ``tuners/lora/layer.py`` and ``variants.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_deploy.adapter import Experts, ModuleUpdate, Orientation
from lora_deploy.adapters.factors import factor, low_rank
from lora_deploy.adapters.interface import AdapterFile
from lora_deploy.adapters.merged_linear import dense_factors
from lora_deploy.adapters.peft.config import PeftConfig
from lora_deploy.adapters.peft.key_table import without_base_layer
from lora_deploy.adapters.peft.scale import Scales
from lora_deploy.errors import MalformedAdapterError
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.kasa import Kasa
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.residual import Residual

_OUT_PROJ = ".base_layer.out_proj"
_DOUBLED_UNTIL = (0, 21, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReader:
    """Reads the adapted modules of one file."""

    file: AdapterFile
    config: PeftConfig
    scales: Scales
    base_is_residual: bool
    modules: Mapping[str, Mapping[str, str]]
    """Module path (with its ``base_layer`` components) to key by slot."""

    def updates(self) -> Iterator[ModuleUpdate]:
        """Read every module, in the order of the file.

        Raises:
            InputError: A module breaks the rules of its kind.
            NonFiniteTensorError: A factor holds a NaN or an infinity.
        """
        for module, slots in self.modules.items():
            path = without_base_layer(module)
            attention = module.removesuffix(_OUT_PROJ)
            if attention != module and attention in self.modules:
                yield from self._out_proj(without_base_layer(attention), slots)
            elif path != module or self._holds_parameters(path, slots):
                yield self._experts(path, module.split(".").count("base_layer"), slots)
            elif "lora_embedding_A" in slots or "lora_embedding_B" in slots:
                yield self._embedding(path, slots)
            elif module + _OUT_PROJ in self.modules:
                yield from self._in_proj(path, slots)
            else:
                yield from self._layer(path, slots)

    def _holds_parameters(self, module: str, slots: Mapping[str, str]) -> bool:
        """Whether a module's own parameters are adapted (fused experts), or it is a layer that is adapted itself.

        A name in ``target_parameters`` without its module (PEFT writes such ones for experts that it had to fuse) may
        be of any module: then a layer is known by factors of its own rank, where a stack has that rank for each expert.
        """
        if not self.config.adapts_parameters_of(module) or "lora_A" not in slots:
            return False
        if self.config.names_parameters_of(module) or any(
            other != module and without_base_layer(other) == module for other in self.modules
        ):
            return True
        return self.file.tensors[slots["lora_A"]].shape[0] != self.scales.of(module, None)[0]

    # ------------------------------------------------------------------------------------------------ kinds of modules

    def _layer(self, module: str, slots: Mapping[str, str]) -> Iterator[ModuleUpdate]:
        """Linear, Conv1D and convolutions."""
        self._check_slots(module, slots, {"lora_A", "lora_B"}, {"lora_B.bias", "lora_magnitude_vector", "lora_diag"})
        down, up = self._factors(slots, "lora_A", "lora_B", n_dims=(2, 3, 4, 5))
        n_parts = sum(self.config.enable_lora or ()) or 1
        _, scale = self.scales.of(module, down.shape[0] // n_parts)
        is_convolution = down.ndim > 2 and self.config.enable_lora is None
        if is_convolution and (self.config.residual_method or self.config.kasa_config is not None):
            raise self._malformed(module, "PiSSA, OLoRA and KaSA are not PEFT's for convolutions")
        down, up = self._dense(module, down, up)
        plain = low_rank(self.file, module, down, up, scale)
        update = self._with_magnitude(module, self._on_base(module, plain, slots), slots, "rows")
        bias_key = slots.get("lora_B.bias")
        keys = tuple(key for key in slots.values() if key != bias_key)
        orientation = Orientation.STORED if is_convolution else Orientation.UNKNOWN
        yield ModuleUpdate(target=_join(module, "weight"), update=update, orientation=orientation, keys=keys)
        yield from self._bias(module, up.shape[0], scale, bias_key)

    def _embedding(self, module: str, slots: Mapping[str, str]) -> ModuleUpdate:
        self._check_slots(module, slots, {"lora_embedding_A", "lora_embedding_B"}, {"lora_magnitude_vector"})
        down, up = self._factors(slots, "lora_embedding_A", "lora_embedding_B", n_dims=(2,))
        _, scale = self.scales.of(module, down.shape[0])
        if self.config.residual_method or self.config.kasa_config is not None:
            raise self._malformed(module, "PiSSA, OLoRA and KaSA are not PEFT's for embeddings")
        plain = low_rank(self.file, module, down, up, scale).transposed()
        update = self._with_magnitude(module, plain, slots, "columns")
        return ModuleUpdate(
            target=_join(module, "weight"), update=update, orientation=Orientation.STORED, keys=tuple(slots.values())
        )

    def _in_proj(self, module: str, slots: Mapping[str, str]) -> Iterator[ModuleUpdate]:
        """The fused query, key and value projection of ``nn.MultiheadAttention``; PEFT never applies its bias."""
        self._check_slots(module, slots, {"lora_A", "lora_B"}, set())
        down, up = self._factors(slots, "lora_A", "lora_B", n_dims=(2,))
        _, scale = self.scales.of(module, down.shape[0])
        update = low_rank(self.file, module, down, up, scale)
        target = _join(module, "in_proj_weight")
        yield ModuleUpdate(target=target, update=update, orientation=Orientation.STORED, keys=tuple(slots.values()))

    def _out_proj(self, attention: str, slots: Mapping[str, str]) -> Iterator[ModuleUpdate]:
        """The output projection of ``nn.MultiheadAttention``, whose weight delta peft <= 0.21.2 applies twice.

        Source: peft 0.21.2, ``tuners/lora/layer.py``, ``MultiheadAttention.merge``: it adds ``out_proj``'s delta, then
        calls ``out_proj.merge``, in the forward pass that trains as well as when merging.
        """
        module = _join(attention, "out_proj")
        self._check_slots(module, slots, {"lora_A", "lora_B"}, {"lora_B.bias"})
        down, up = self._factors(slots, "lora_A", "lora_B", n_dims=(2,))
        _, scale = self.scales.of(attention, down.shape[0])
        doubled = (self.config.version or (0,)) <= _DOUBLED_UNTIL
        weight_scale = scale.times(2, f"2 × {scale.source}: this PEFT applies it twice") if doubled else scale
        update = low_rank(self.file, module, down, up, weight_scale)
        bias_key = slots.get("lora_B.bias")
        keys = tuple(key for key in slots.values() if key != bias_key)
        yield ModuleUpdate(target=f"{module}.weight", update=update, orientation=Orientation.STORED, keys=keys)
        yield from self._bias(module, up.shape[0], scale, bias_key)

    def _experts(self, module: str, nesting: int, slots: Mapping[str, str]) -> ModuleUpdate:
        """One parameter of a module that ``target_parameters`` adapts; only the base can tell which one."""
        names = self.config.adapts_parameters_of(module)
        wrappers = sum(without_base_layer(other) == module for other in self.modules)
        if len(names) < wrappers:
            raise self._malformed(
                module, f"{wrappers} nested adapters, target_parameters names {len(names)} parameters of it"
            )
        self._check_slots(module, slots, {"lora_A", "lora_B"}, set())
        down, up = self._factors(slots, "lora_A", "lora_B", n_dims=(2,))
        if down.shape[0] != up.shape[1]:
            raise self._malformed(module, f"A is {tuple(down.shape)}, B is {tuple(up.shape)}: the ranks differ")
        resolved = {name: self.scales.of(_join(module, name), None) for name in names}
        ranks = {name: rank for name, (rank, _) in resolved.items()}
        if all(down.shape[0] % rank for rank in ranks.values()):
            raise self._malformed(module, f"A has {down.shape[0]} rows, no multiple of r {sorted(set(ranks.values()))}")
        experts = Experts(
            down=down,
            up=up,
            nesting=nesting,
            scales={name: scale for name, (_, scale) in resolved.items()},
            ranks=ranks,
        )
        return ModuleUpdate(target=module, update=experts, keys=tuple(slots.values()))

    # ---------------------------------------------------------------------------------------------------- their parts

    def _on_base(self, module: str, plain: LowRank, slots: Mapping[str, str]) -> LowRank | Residual | Kasa:
        """Choose the base that the delta was trained on: as it is, a residual, or KaSA's truncation."""
        diagonal_key = slots.get("lora_diag")
        if (diagonal_key is None) != (self.config.kasa_config is None) and self.scales.has_rank:
            found = "no lora_diag" if diagonal_key is None else "a lora_diag"
            wanted = "unset" if self.config.kasa_config is None else "set"
            raise self._malformed(module, f"{found} in the file, but kasa_config is {wanted}")
        if diagonal_key is not None:
            diagonal = factor(self.file, diagonal_key, n_dims=(1,))
            if len(diagonal) != plain.rank:
                raise self._malformed(module, f"lora_diag has {len(diagonal)} values, expected {plain.rank}")
            # Exact: the product of two numbers of 24 bits or fewer has at most 48.
            up = plain.up.to(torch.float64) * diagonal.to(torch.float64)
            scaled = LowRank(down=plain.down, up=up, scale=plain.scale)
            return scaled if self.base_is_residual else Kasa(low_rank=scaled)
        if self.config.residual_method is not None and not self.base_is_residual:
            return Residual(low_rank=plain, method=self.config.residual_method)
        return plain

    def _with_magnitude(
        self,
        module: str,
        inner: LowRank | Residual | Kasa,
        slots: Mapping[str, str],
        axis: Literal["rows", "columns"],
    ) -> LowRank | Residual | Kasa | Dora:
        key = slots.get("lora_magnitude_vector")
        if (key is not None) != self.config.use_dora and self.scales.has_rank:
            found = "no magnitude" if key is None else "a magnitude"
            raise self._malformed(module, f"{found} in the file, but use_dora is {str(self.config.use_dora).lower()}")
        if key is None:
            return inner
        if isinstance(inner, Kasa):
            raise self._malformed(module, "DoRA and KaSA together are not PEFT's")
        magnitude = factor(self.file, key).flatten()
        expected = inner.shape[0 if axis == "rows" else 1]
        if len(magnitude) != expected:
            raise self._malformed(module, f"magnitude has {len(magnitude)} values, expected {expected}")
        return Dora(inner=inner, magnitude=magnitude, axis=axis)

    def _bias(self, module: str, n_out: int, scale: Scale, key: str | None) -> Iterator[ModuleUpdate]:
        if (key is not None) != self.config.lora_bias and self.scales.has_rank:
            found = "no lora_B.bias" if key is None else "a lora_B.bias"
            raise self._malformed(module, f"{found} in the file, but lora_bias is {str(self.config.lora_bias).lower()}")
        if key is None:
            return
        values = factor(self.file, key, n_dims=(1,))
        if len(values) != n_out:
            raise self._malformed(module, f"lora_B.bias has {len(values)} values, expected {n_out}")
        update = Addition(values=values, scale=scale)
        yield ModuleUpdate(target=_join(module, "bias"), update=update, orientation=Orientation.STORED, keys=(key,))

    def _dense(self, module: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Expand block-diagonal (BD-LoRA) and merged (peft <= 0.2) factors to plain ones."""
        if self.config.enable_lora is not None:
            return dense_factors(self.file, module, down, up.flatten(1), self.config.enable_lora)
        blocks = self.config.use_bdlora
        if blocks is None:
            return down, up
        in_a = any(pattern in module for pattern in blocks.target_modules_bd_a or ())
        in_b = any(pattern in module for pattern in blocks.target_modules_bd_b or ())
        if (in_a and in_b) or (blocks.match_strict and not (in_a or in_b)):
            raise self._malformed(module, f"matches {'both' if in_a else 'none'} of target_modules_bd_a and _bd_b")
        blocked = down if in_a else up
        if (in_a or in_b) and (blocked.ndim != 2 or blocked.shape[0] % blocks.nblocks):
            raise self._malformed(module, f"{tuple(blocked.shape)} does not split into nblocks {blocks.nblocks}")
        if in_a:
            down = torch.block_diag(*down.chunk(blocks.nblocks))
        if in_b:
            up = torch.block_diag(*up.chunk(blocks.nblocks))
        return down, up

    def _factors(
        self, slots: Mapping[str, str], down: str, up: str, *, n_dims: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        return factor(self.file, slots[down], n_dims=n_dims), factor(self.file, slots[up], n_dims=n_dims)

    def _check_slots(self, module: str, slots: Mapping[str, str], needed: set[str], optional: set[str]) -> None:
        missing = sorted(needed - set(slots))
        if missing:
            raise self._malformed(module, f"has {', '.join(slots)} but no {' and no '.join(missing)}")
        surplus = sorted(set(slots) - needed - optional)
        if surplus:
            raise self._malformed(module, f"{slots[surplus[0]]} is no part of this kind of module")

    def _malformed(self, module: str, problem: str) -> MalformedAdapterError:
        return MalformedAdapterError(f"{self.file.path}: {module}: {problem}")


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter
