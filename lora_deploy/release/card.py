"""The model card, ``README.md``: what a release is, how to load it, what was proven, how to make it again.

Promise: it says nothing that the records do not; it never names a path of the machine it was made on, nor the
manifest's digest. The user's own text goes in through a template of theirs.
Source: huggingface_hub's ``ModelCardData``; the hub's ``base_model_relation``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from lora_deploy.bases.hub import is_hub_id
from lora_deploy.errors import RecipeError
from lora_deploy.export.record import ExportRecord
from lora_deploy.merge.record import MergeRecord, RecordedFinding, RecordedOrigin, RecordedTensor
from lora_deploy.release.loading import snippets
from lora_deploy.release.options import Acceptance
from lora_deploy.release.reproduction import commands

CARD_NAME = "README.md"
_OF_ADAPTERS = ("peft", "lora", "qlora", "dora", "adapter", "adapters", "lora-deploy")
"""Tags of an adapter's card that are no longer true of a merged model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """Everything that a card is written from."""

    name: str
    record: MergeRecord | RecordedOrigin
    """What was merged; of an export straight from base and adapters, its origin."""
    config: Mapping[str, Any]
    """``config.json``, or a pipeline's ``model_index.json``."""
    exports: Mapping[str, ExportRecord]
    """By folder; ``.`` is the release itself."""
    licence: Mapping[str, str]
    adapter_card: Mapping[str, Any]
    """Metadata of the adapter's own card: tags, datasets and language are taken from it."""
    verdicts: Mapping[str, str]
    evidence: Mapping[str, Any]
    accepted: Sequence[Acceptance]
    findings: Sequence[RecordedFinding]
    template: Path | None = None
    """A user's own text, as a Jinja template over the same names; it is put under the table."""
    extra_tags: Sequence[str] = field(default=())

    @property
    def tensors(self) -> Mapping[str, RecordedTensor]:
        """What every changed tensor became; none where no checkpoint was written."""
        return self.record.tensors if isinstance(self.record, MergeRecord) else {}

    @property
    def weights(self) -> tuple[str, ...]:
        """Every file of the merge itself; none where there are only graphs."""
        return tuple(file.path for file in self.record.artifacts) if isinstance(self.record, MergeRecord) else ()


def public_name(record: MergeRecord | RecordedOrigin) -> str:
    """Name the base as others know it: its hub id where one is known, else its folder's own name."""
    hints = (record.base.name, *(adapter.base_name or "" for adapter in record.adapters))
    known = next((hint for hint in hints if is_hub_id(hint) and not Path(hint).exists()), None)
    place = PurePosixPath(record.base.name)
    return known or (place.parent.name if place.suffix == ".onnx" else place.name)


def card_text(facts: CardFacts) -> str:
    """Write the card.

    Raises:
        RecipeError: The user's template cannot be read or rendered.
    """
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    names = _names(facts)
    own = _own_text(environment, facts.template, names)
    source = files("lora_deploy.release").joinpath("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(names | {"own_text": own, "front_matter": _front_matter(facts)})


def _own_text(environment: Any, path: Path | None, names: Mapping[str, Any]) -> str:  # noqa: ANN401 - of jinja2
    from jinja2 import TemplateError

    if path is None:
        return ""
    try:
        return str(environment.from_string(path.read_text(encoding="utf-8")).render(names)).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--card-template {path}: cannot be read: {error}") from error
    except TemplateError as error:
        known = ", ".join(sorted(names))
        raise RecipeError(f"--card-template {path}: {error}", hint=f"names that it may use: {known}") from error


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    adapter = facts.adapter_card
    relation = _relation(facts)
    data = ModelCardData(
        base_model=public_name(facts.record),
        base_model_relation=relation,
        library_name=_library(facts),
        datasets=adapter.get("datasets"),
        language=adapter.get("language"),
        pipeline_tag=adapter.get("pipeline_tag"),
        tags=_tags(facts),
        license=facts.licence.get("license"),
        license_name=facts.licence.get("license_name"),
        license_link=facts.licence.get("license_link"),
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n"


def _library(facts: CardFacts) -> str:
    if "_diffusers_version" in facts.config:
        return "diffusers"
    return "transformers" if any(path.endswith(".safetensors") for path in facts.weights) else "onnx"


def _tags(facts: CardFacts) -> list[str]:
    """List our own and those of the adapter's card; those with a colon are the hub's, and say what the rest says."""
    said = facts.adapter_card.get("tags")
    theirs = [tag for tag in said if isinstance(tag, str)] if isinstance(said, list) else []
    kept = [tag for tag in theirs if ":" not in tag and tag.lower() not in _OF_ADAPTERS]
    has_graphs = bool(facts.exports) or any(path.endswith(".onnx") for path in facts.weights)
    return sorted({"lora-deploy", "merged", *(["onnx"] if has_graphs else []), *kept, *facts.extra_tags})


def _relation(facts: CardFacts) -> str:
    if any(export.options.get("quantisation") for export in facts.exports.values()):
        return "quantized"
    parents = {adapter.base_name for adapter in facts.record.adapters if adapter.base_name}
    return "merge" if len(parents) > 1 else "finetune"


def _names(facts: CardFacts) -> dict[str, Any]:
    record = facts.record
    return {
        "name": facts.name,
        "summary": _summary(facts),
        "base": public_name(record),
        "base_revision": record.base.revision,
        "adapters": [adapter.model_dump(exclude={"path"}) for adapter in record.adapters],
        "dtype": _dtype(facts),
        "exports": [_export(folder, export) for folder, export in facts.exports.items()],
        "snippets": [
            {"library": library, "code": code} for library, code in snippets(facts.config, facts.weights, facts.exports)
        ],
        "evidence": [
            {"check": check, "verdict": verdict, "figures": figures(check, facts.evidence)}
            for check, verdict in facts.verdicts.items()
        ],
        "accepted": list(facts.accepted),
        "findings": [finding.model_dump() for finding in facts.findings],
        "commands": commands(record, facts.exports, public_name(record)),
    }


def _summary(facts: CardFacts) -> str:
    many = "adapters" if len(facts.record.adapters) > 1 else "adapter"
    names = ", ".join(adapter.name for adapter in facts.record.adapters)
    kinds = {update.kind for tensor in facts.tensors.values() for update in tensor.updates}
    how = ": W' = W + s·B·A, the exact value rounded once" if kinds == {"low-rank"} else ", every value rounded once"
    time = ", and takes the base's time" if facts.verdicts.get("latency") == "pass" else ""
    return f"The {many} {names}, merged into {public_name(facts.record)}{how}. It needs no PEFT{time}."


def _dtype(facts: CardFacts) -> str | None:
    """Say in which format weights are stored: the one that most of them have, where the base's was kept."""
    if not facts.weights:
        return None
    dtype = str(facts.record.options["merge"]["dtype"])
    found = [tensor.dtype for tensor in facts.tensors.values()]
    return f"{max(sorted(set(found)), key=found.count)}, as the base" if dtype == "base" and found else dtype


def _export(folder: str, record: ExportRecord) -> dict[str, Any]:
    quantisation = record.options.get("quantisation") or {}
    return {
        "folder": folder,
        "graphs": [graph.file for graph in record.graphs.values()],
        "dtype": record.options["dtype"],
        "provider": record.options["provider"],
        "quantised": quantisation.get("method"),
    }


def figures(check: str, evidence: Mapping[str, Any]) -> str:
    """Say in one line what a check measured; empty where it measured nothing."""
    report = evidence.get(check) or {}
    if check == "replay":
        counts = report.get("counts") or {}
        return ", ".join(f"{number} tensors {outcome}" for outcome, number in counts.items())
    if check == "parity":
        return "; ".join(_subject(subject) for subject in report.get("subjects") or [])
    return _latency(report)


def _latency(report: Mapping[str, Any]) -> str:
    proof = report.get("proof") or {}
    said = []
    if proof.get("is_equal") is True:
        said.append("the graphs are the base's, node for node")
    elif proof.get("reason"):
        said.append(str(proof["reason"]))
    clocks = (report.get("ratios") or {}).get("merged") or {}
    for phase, found in next(iter(clocks.values()), {}).items():
        said.append(f"{phase} {found['ratio']:.3f} of the base's time [{found['low']:.3f}, {found['high']:.3f}]")
    return "; ".join(said)


def _subject(subject: Mapping[str, Any]) -> str:
    first = (subject.get("outputs") or [{}])[0]
    agreed = f", top-1 {first['top1']:.1%}" if isinstance(first.get("top1"), float) else ""
    for key, name in (("kl_mean", "KL divergence"), ("relative_l2", "relative distance")):
        if isinstance(first.get(key), float):
            return f"{subject['name']}: {name} {first[key]:.2g}{agreed}"
    return f"{subject['name']}: {subject['verdict']}"
