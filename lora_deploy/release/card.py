"""The model card, ``README.md``: what a release is, how to load it, what was proven, how to make it again.

Promise: it says nothing that the records do not; it never names a path of the machine it was made on, nor the
manifest's digest. The user's own text goes in through a template of theirs.
Source: huggingface_hub's ``ModelCardData``; the hub's ``base_model_relation``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from lora_deploy.bases.hub import is_hub_id
from lora_deploy.errors import RecipeError
from lora_deploy.export.record import ExportRecord
from lora_deploy.merge.record import MergeRecord, RecordedFinding
from lora_deploy.release.options import Acceptance

CARD_NAME = "README.md"
_GENAI = """import onnxruntime_genai

model = onnxruntime_genai.Model("{folder}")"""
_ONNXRUNTIME = """import onnxruntime

session = onnxruntime.InferenceSession("{folder}/{graph}")
print([(port.name, port.shape) for port in session.get_inputs()])"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """Everything that a card is written from."""

    name: str
    record: MergeRecord
    config: Mapping[str, Any]
    exports: Mapping[str, ExportRecord]
    """By folder."""
    licence: Mapping[str, str]
    adapter_card: Mapping[str, Any]
    """Metadata of the adapter's own card: datasets and language are taken from it."""
    verdicts: Mapping[str, str]
    evidence: Mapping[str, Any]
    accepted: Sequence[Acceptance]
    findings: Sequence[RecordedFinding]
    template: Path | None = None
    """A user's own text, as a Jinja template over the same names; it is put under the table."""
    extra_tags: Sequence[str] = field(default=())


def public_name(record: MergeRecord) -> str:
    """Name the base as others know it: its hub id where one is known, else its folder's own name."""
    hints = (record.base.name, *(adapter.base_name or "" for adapter in record.adapters))
    known = next((hint for hint in hints if is_hub_id(hint) and not Path(hint).exists()), None)
    return known or PurePosixPath(record.base.name).name


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
        library_name="diffusers" if "_diffusers_version" in facts.config else "transformers",
        datasets=adapter.get("datasets"),
        language=adapter.get("language"),
        pipeline_tag=adapter.get("pipeline_tag"),
        tags=sorted({"lora-deploy", "merged", *(["onnx"] if facts.exports else []), *facts.extra_tags}),
        license=facts.licence.get("license"),
        license_name=facts.licence.get("license_name"),
        license_link=facts.licence.get("license_link"),
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n"


def _relation(facts: CardFacts) -> str:
    if any(export.options.get("quantize") for export in facts.exports.values()):
        return "quantized"
    parents = {adapter.base_name for adapter in facts.record.adapters if adapter.base_name}
    return "merge" if len(parents) > 1 else "finetune"


def _names(facts: CardFacts) -> dict[str, Any]:
    record = facts.record
    architectures = facts.config.get("architectures") or []
    return {
        "name": facts.name,
        "summary": _summary(facts),
        "base": public_name(record),
        "base_revision": record.base.revision,
        "adapters": [adapter.model_dump(exclude={"path"}) for adapter in record.adapters],
        "dtype": record.options["merge"]["dtype"],
        "exports": [_export(folder, export) for folder, export in facts.exports.items()],
        "model_class": architectures[0] if architectures else None,
        "evidence": [
            {"check": check, "verdict": verdict, "figures": figures(check, facts.evidence)}
            for check, verdict in facts.verdicts.items()
        ],
        "accepted": list(facts.accepted),
        "findings": [finding.model_dump() for finding in facts.findings],
        "commands": _commands(facts),
    }


def _summary(facts: CardFacts) -> str:
    many = "adapters" if len(facts.record.adapters) > 1 else "adapter"
    names = ", ".join(adapter.name for adapter in facts.record.adapters)
    return (
        f"The {many} {names}, merged into {public_name(facts.record)}: W' = W + s·B·A, the exact value rounded once. "
        "It needs no PEFT, and takes the base's time."
    )


def _export(folder: str, record: ExportRecord) -> dict[str, Any]:
    graphs = [graph.file for graph in record.graphs.values()]
    is_genai = record.options.get("layout") == "genai"
    snippet = (_GENAI if is_genai else _ONNXRUNTIME).format(folder=folder, graph=graphs[0])
    return {
        "folder": folder,
        "graphs": graphs,
        "dtype": record.options["dtype"],
        "provider": record.options["provider"],
        "library": "onnxruntime-genai" if is_genai else "onnxruntime",
        "snippet": snippet,
    }


def figures(check: str, evidence: Mapping[str, Any]) -> str:
    """Say in one line what a check measured; empty where it measured nothing."""
    report = evidence.get(check) or {}
    if check == "replay":
        counts = report.get("counts") or {}
        return ", ".join(f"{number} tensors {outcome}" for outcome, number in counts.items())
    if check == "parity":
        return "; ".join(_subject(subject) for subject in report.get("subjects") or [])
    proof = report.get("proof") or {}
    return str(proof.get("reason", ""))


def _subject(subject: Mapping[str, Any]) -> str:
    first = (subject.get("outputs") or [{}])[0]
    for key, name in (("kl_mean", "KL divergence"), ("relative_l2", "relative distance")):
        if isinstance(first.get(key), float):
            return f"{subject['name']}: {name} {first[key]:.2g}"
    return f"{subject['name']}: {subject['verdict']}"


def _commands(facts: CardFacts) -> list[str]:
    record = facts.record
    adapters = " ".join(shlex.quote(adapter.name) for adapter in record.adapters)
    base = public_name(record) + (f"@{record.base.revision}" if record.base.revision else "")
    merge = (
        f"lora-deploy merge {adapters} --base {shlex.quote(base)} --dtype {record.options['merge']['dtype']} -o merged"
    )
    weights = [f"--weight {adapter.weight:g}" for adapter in record.adapters]
    if any(adapter.weight != 1 for adapter in record.adapters):
        merge = f"{merge} {' '.join(weights)}"
    exports = [_export_command(folder, export) for folder, export in facts.exports.items()]
    return [merge, *exports, "lora-deploy verify merged", "lora-deploy release merged"]


def _export_command(folder: str, record: ExportRecord) -> str:
    options = record.options
    return (
        f"lora-deploy export merged --onnx -o merged/{folder} --dtype {options['dtype']} "
        f"--provider {options['provider']} --layout {options['layout']}"
    )
