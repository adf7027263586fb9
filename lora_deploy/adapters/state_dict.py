"""The hand-written LoRA module of tutorials, and loralib: ``<m>.weight``, ``<m>.lora_A``, ``<m>.lora_B`` in one dict.

Alpha is not in such a file: it comes from the user or the header, or from an ``<m>.lora_alpha`` or ``<m>.scaling`` that
the module registered; it is never guessed. Which way round factors and weight lie is decided by their shapes; what only
the base can tell stays ``Orientation.UNKNOWN``, and what no shape can tell is an error.

A ``<m>.weight`` beside factors is a copy of the base's. Whether loralib had already merged it (``eval()``) cannot be
seen in the file: merging into a base of its own avoids the question.
Source: loralib 0.1.2, ``layers.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from lora_deploy.adapter import Adapter, ModuleUpdate, Orientation
from lora_deploy.adapters.alpha import metadata_alpha, missing_alpha
from lora_deploy.adapters.factors import check_finite, factor, is_zero
from lora_deploy.adapters.interface import AdapterFile, ReadOptions
from lora_deploy.adapters.keys import is_computed_buffer, unwrapped
from lora_deploy.adapters.layouts import lay_out, lay_out_convolution
from lora_deploy.adapters.litgpt import is_litgpt
from lora_deploy.errors import Finding, MalformedAdapterError, Severity
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement

_FACTOR = re.compile(r"(?:(?P<module>.+)\.)?(?P<slot>lora_[AB])$")
_SCALING = "scaling"
_ALPHAS = ("lora_alpha", "alpha")


class StateDictReader:
    """Reads state dicts whose modules hold ``lora_A`` and ``lora_B`` as bare parameters."""

    format = "state-dict"

    def recognises(self, file: AdapterFile) -> bool:
        """Whether factors are bare parameters and no PEFT configuration says otherwise."""
        is_peft = file.config is not None and ("peft_type" in file.config or "lora_alpha" in file.config)
        return not is_peft and not is_litgpt(file) and any(_FACTOR.match(key) for key in file.tensors)

    def read(self, file: AdapterFile, options: ReadOptions) -> Adapter:
        """Turn the file into updates.

        Raises:
            MalformedAdapterError: Factors that fit neither each other nor the weight beside them, or no alpha.
            AmbiguousAdapterFormatError: Factors that fit in several ways.
            NonFiniteTensorError: A tensor holds a NaN or an infinity.
        """
        return _Reading(file=file, options=options, keys=_by_name(file)).adapter()


READER = StateDictReader()


def _by_name(file: AdapterFile) -> dict[str, str]:
    return {name: key for key, name in unwrapped(file.path, file.tensors).items()}


@dataclass(slots=True, kw_only=True)
class _Reading:
    """One pass over one file: every key is used once."""

    file: AdapterFile
    options: ReadOptions
    keys: dict[str, str]
    """Key in the file by name without wrappers."""
    copies: list[ModuleUpdate] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def adapter(self) -> Adapter:
        adapted = [self._module(module) for module in self._modules()]
        buffers = [name for name in self.keys if name not in self.used and is_computed_buffer(name)]
        heads = [self._replacement(name) for name in self.keys if name not in {*self.used, *buffers}]
        for head in heads:
            check_finite(self.file, head.keys[0])
        return Adapter(
            path=self.file.path,
            name=self.file.name,
            format=StateDictReader.format,
            updates=(*heads, *adapted),
            base_copies=tuple(self.copies),
            findings=tuple(self._findings(adapted, heads, buffers)),
            sha256=self.file.sha256,
        )

    def _modules(self) -> dict[str, None]:
        matches = (_FACTOR.match(name) for name in self.keys)
        modules = dict.fromkeys(found["module"] or "" for found in matches if found)
        for module in modules:
            for slot in ("lora_A", "lora_B"):
                if _join(module, slot) not in self.keys:
                    raise MalformedAdapterError(f"{self.file.path}: {module}: has no {slot} beside its other factor")
        return modules

    def _module(self, module: str) -> ModuleUpdate:
        names = [_join(module, "lora_A"), _join(module, "lora_B")]
        down, up = (factor(self.file, self.keys[name], n_dims=(2,)) for name in names)
        weight_name = next((name for name in _weight_names(module) if name in self.keys), None)
        weight = None if weight_name is None else self.file.tensors[self.keys[weight_name]]
        if weight is not None and weight.ndim > 2:
            laid_out = lay_out_convolution(self.file, module, down, up, tuple(weight.shape))
        else:
            shape = None if weight is None else tuple(weight.shape)
            laid_out = lay_out(self.file, module, down, up, shape, self.options.enable_lora)
        scale, scalar_name = self._scale(module, laid_out.rank)
        names += [scalar_name] if scalar_name else []
        self.used.update(names)
        if weight_name is not None:
            self.copies.append(self._replacement(weight_name))
        return ModuleUpdate(
            target=weight_name or _join(module, "weight"),
            update=LowRank(down=laid_out.down, up=laid_out.up, scale=scale),
            orientation=laid_out.orientation,
            region=laid_out.region,
            keys=tuple(self.keys[name] for name in names),
        )

    def _scale(self, module: str, rank: int) -> tuple[Scale, str | None]:
        """Give the scale, and the name of the scalar in the file that says it (or that the user overrides)."""
        name = next(
            (name for name in (_join(module, slot) for slot in (_SCALING, *_ALPHAS)) if name in self.keys), None
        )
        stored = None if name is None else self._scalar(name)
        header = metadata_alpha(self.file)
        if self.options.alpha is not None:
            alpha, source = Fraction(self.options.alpha), f"--alpha {self.options.alpha:g}"
        elif stored is not None and name is not None and name.endswith(_SCALING):
            return Scale(factor=stored, source=f"{float(stored):g} (tensor {name})"), name
        elif stored is not None:
            alpha, source = stored, f"alpha {float(stored):g} (tensor {name})"
        elif header is not None:
            alpha, source = Fraction(header[1]), f"alpha {header[1]:g} (metadata {header[0]})"
        else:
            raise missing_alpha(self.file, [rank])
        return Scale(factor=alpha / rank, source=f"{source} / r {rank}"), name

    def _scalar(self, name: str) -> Fraction:
        tensor = self.file.tensors[self.keys[name]]
        if tensor.numel() != 1:
            raise MalformedAdapterError(
                f"{self.file.path}: {name}: found shape {tuple(tensor.shape)}, expected a number"
            )
        check_finite(self.file, self.keys[name])
        return Fraction(tensor.item())

    def _replacement(self, name: str) -> ModuleUpdate:
        self.used.add(name)
        key = self.keys[name]
        update = Replacement(values=self.file.tensors[key])
        return ModuleUpdate(target=name, update=update, orientation=Orientation.STORED, keys=(key,))

    def _findings(
        self, adapted: list[ModuleUpdate], heads: list[ModuleUpdate], buffers: list[str]
    ) -> Iterator[Finding]:
        if self.copies:
            yield _finding(
                Severity.NOTE,
                "base-copies",
                self.copies[0].target,
                f"{len(self.copies)} base tensors lie beside their factors: not used, they may already hold the update",
            )
        untrained = [m.target for m in adapted if isinstance(m.update, LowRank) and is_zero(m.update)]
        if untrained:
            message = f"{len(untrained)} of {len(adapted)} modules have a factor that is all zero: they change nothing"
            yield _finding(Severity.WARN, "untrained", untrained[0], message)
        if heads:
            message = f"{len(heads)} whole tensors replace the base's"
            yield _finding(Severity.NOTE, "saved-unlisted", heads[0].target, message)
        if buffers:
            message = f"{len(buffers)} tensors are left out: buffers that the model computes itself"
            yield _finding(Severity.NOTE, "unused-tensors", buffers[0], message)
        if self.options.alpha is not None and (metadata_alpha(self.file) or any(len(m.keys) > 2 for m in adapted)):
            message = f"--alpha {self.options.alpha:g} is used instead of the file's own scale"
            yield _finding(Severity.WARN, "alpha-overridden", self.file.path.name, message)


def _weight_names(module: str) -> tuple[str, ...]:
    """Names that the weight of an adapted module may have; loralib keeps a convolution one level down."""
    return _join(module, "weight"), _join(module, "conv.weight")


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _finding(severity: Severity, code: str, target: str, message: str) -> Finding:
    return Finding(code=code, severity=severity, target=target, message=message)
