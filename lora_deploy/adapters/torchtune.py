"""The torchtune reader: ``adapter_model.pt`` under torchtune's names, or the export beside it under PEFT's.

torchtune trains most families with the rows of q and k in rotary pairs. Its own file has them so. Its export brings B
into transformers' order, for every family, also for Qwen2, which is trained in that order already; and it leaves DoRA's
magnitudes as they were trained. Both are undone when the base says which family it is (``RowOrder``). Where both files
lie in a folder, torchtune's own is read.
Source: torchtune 0.6.1, ``models/convert_weights.py`` (``tune_to_peft_adapter_weights``: it looks for ``lora_B`` in the
key of a magnitude) and ``modules/peft`` (``DoRALinear.forward`` scales the bias, ``get_merged_lora_ckpt`` does not).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from lora_deploy.adapter import Adapter, BaseHint, ModuleUpdate, Orientation, RowOrder
from lora_deploy.adapters.alpha import missing_alpha
from lora_deploy.adapters.factors import factor, low_rank
from lora_deploy.adapters.findings import note, untrained, warn
from lora_deploy.adapters.interface import AdapterFile, ReadOptions
from lora_deploy.adapters.peft.config import PeftConfig, parse_config
from lora_deploy.adapters.peft.reader import PeftReader
from lora_deploy.adapters.torchtune_signs import holds_magnitudes, is_export, is_own
from lora_deploy.artifact import cached_sha256
from lora_deploy.errors import Finding, MalformedAdapterError
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank

_SLOT = re.compile(r"(?P<module>.+)\.(?:(?P<factor>lora_[ab])\.weight|(?P<magnitude>magnitude))$")
_LAYER = re.compile(r"^layers\.(?P<n>\d+)\.(?P<part>attn\.(?:[qkv]|output)_proj|mlp\.w[123])$")
_PARTS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_TOP = {"output": "lm_head", "tok_embeddings": "model.embed_tokens"}
_QUERY_OR_KEY = re.compile(r"\.[qk]_proj\.weight$")


class TorchtuneReader:
    """Reads what torchtune's LoRA recipes save."""

    format = "torchtune"

    def recognises(self, file: AdapterFile) -> bool:
        """Whether the names are torchtune's, or the file is its export under PEFT's."""
        return is_own(file) or is_export(file)

    def read(self, file: AdapterFile, options: ReadOptions) -> Adapter:
        """Turn the file into updates.

        Raises:
            MalformedAdapterError: A key of no language model of torchtune, one without its other, or no alpha.
            NonFiniteTensorError: A tensor holds a NaN or an infinity.
        """
        return _own(file, options) if is_own(file) else _exported(file, options)


READER = TorchtuneReader()


def _exported(file: AdapterFile, options: ReadOptions) -> Adapter:
    told = {**(file.config or {}), "use_dora": holds_magnitudes(file)}
    adapter = PeftReader().read(replace(file, config=told), options)
    updates = tuple(
        replace(update, row_order=RowOrder.TORCHTUNE_EXPORT) if _QUERY_OR_KEY.search(update.target) else update
        for update in adapter.updates
    )
    message = "torchtune's rendering as a PEFT folder: its order of rows is set right by the base's family"
    return replace(
        adapter,
        format=TorchtuneReader.format,
        updates=updates,
        config=file.config or {},
        scales_bias=True,
        findings=(*adapter.findings, note("torchtune-export", file.path.name, message)),
    )


def _own(file: AdapterFile, options: ReadOptions) -> Adapter:
    config = None if file.config is None else parse_config(file.config, file.config_path or file.path)
    reading = _Reading(file=file, options=options, config=config)
    updates = tuple(reading.updates())
    return Adapter(
        path=file.path,
        name=file.name if file.path.stem != "adapter_model" else file.path.parent.name,
        format=TorchtuneReader.format,
        base_hint=BaseHint(name=(config.base_model_name_or_path if config else None) or None),
        updates=updates,
        findings=(*untrained(updates), *reading.findings()),
        sha256=file.sha256,
        config_sha256=cached_sha256(file.config_path) if file.config_path else None,
        config=file.config or {},
        scales_bias=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """One pass over the factors of one file."""

    file: AdapterFile
    options: ReadOptions
    config: PeftConfig | None

    def updates(self) -> Iterator[ModuleUpdate]:
        modules: dict[str, dict[str, str]] = {}
        for key in self.file.tensors:
            match = _SLOT.match(key)
            if match is None:
                raise self._malformed(key, "is neither lora_a, lora_b nor magnitude")
            modules.setdefault(match["module"], {})[match["factor"] or "magnitude"] = key
        is_dora = any("magnitude" in slots for slots in modules.values())
        for module, slots in modules.items():
            wanted = {"lora_a", "lora_b"} | ({"magnitude"} if is_dora else set())
            if slots.keys() != wanted:
                raise self._malformed(module, f"found {', '.join(slots)}, expected {', '.join(sorted(wanted))}")
            yield self._update(module, slots)

    def _update(self, module: str, slots: Mapping[str, str]) -> ModuleUpdate:
        down, up = (factor(self.file, slots[slot], n_dims=(2,)) for slot in ("lora_a", "lora_b"))
        plain = low_rank(self.file, module, down, up, self._scale(module, int(down.shape[0])))
        update: LowRank | Dora = plain
        if "magnitude" in slots:
            magnitude = factor(self.file, slots["magnitude"], n_dims=(1,))
            if magnitude.shape[0] != up.shape[0]:
                raise self._malformed(module, f"{magnitude.shape[0]} magnitudes for {up.shape[0]} rows")
            update = Dora(inner=plain, magnitude=magnitude, axis="rows")
        target = f"{self._name(module)}.weight"
        return ModuleUpdate(
            target=target,
            update=update,
            orientation=Orientation.UNKNOWN,
            row_order=RowOrder.TORCHTUNE if _QUERY_OR_KEY.search(target) else RowOrder.STORED,
            keys=tuple(slots.values()),
        )

    def _name(self, module: str) -> str:
        match = _LAYER.match(module)
        if match is not None:
            return f"model.layers.{match['n']}.{_PARTS[match['part']]}"
        if module not in _TOP:
            raise self._malformed(module, "is no layer of torchtune's plain language models (llama, qwen, gemma …)")
        return _TOP[module]

    def _scale(self, module: str, rank: int) -> Scale:
        if self.config is not None and self.config.r != rank:
            raise self._malformed(module, f"its factors have rank {rank}, adapter_config.json says {self.config.r}")
        if self.options.alpha is not None:
            alpha: float = self.options.alpha
            return Scale(factor=Fraction(alpha) / rank, source=f"--alpha {alpha:g} / r {rank}")
        if self.config is None:
            raise missing_alpha(self.file, [rank])
        alpha = self.config.lora_alpha
        return Scale(factor=Fraction(alpha) / rank, source=f"lora_alpha {alpha} / r {rank} (adapter_config.json)")

    def _malformed(self, module: str, problem: str) -> MalformedAdapterError:
        return MalformedAdapterError(f"{self.file.path}: {module}: {problem}")

    def findings(self) -> Iterator[Finding]:
        if self.options.alpha is not None and self.config is not None:
            message = f"--alpha {self.options.alpha:g} is used instead of the file's own {self.config.lora_alpha}"
            yield warn("alpha-overridden", "adapter_config.json", message)
