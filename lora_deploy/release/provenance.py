"""Where a release comes from: a provenance statement, ``provenance.json``, and a bill of materials, ``bom.json``.

Promise: both say what the manifest's ``content`` says, in the forms that other tools read; nothing of the machine or of
the time is in them, so that the same content gives the same bytes.
Source: SLSA provenance v1 in an in-toto statement v1; CycloneDX 1.6, its component type machine-learning-model.
"""

from __future__ import annotations

from typing import Any
from uuid import NAMESPACE_URL, uuid5

from lora_deploy.release.manifest import Content

PROVENANCE_NAME, BOM_NAME = "provenance.json", "bom.json"
_BUILD_TYPE = "urn:lora-deploy:release:1"
_TOOL = "lora-deploy"


def provenance(content: Content) -> dict[str, Any]:
    """State how the content was made, with base and adapters as what it was made from."""
    dependencies = [
        {"name": f"{content.base.name}/{file.path}", "digest": {"sha256": file.sha256}} for file in content.base.files
    ] + [{"name": adapter.name, "digest": {"sha256": adapter.sha256}} for adapter in content.adapters]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": file.path, "digest": {"sha256": file.sha256}} for file in content.files],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {
                    "base": {"name": content.base.name, "revision": content.base.revision},
                    "options": content.options,
                    "recipe": content.recipe,
                },
                "resolvedDependencies": dependencies,
            },
            "runDetails": {"builder": {"id": f"urn:{_TOOL}", "version": content.versions}},
        },
    }


def bill_of_materials(name: str, content: Content, digest: str, licence: str | None) -> dict[str, Any]:
    """List the model, its files, what it descends from and what made it; ``digest`` is the content's."""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid5(NAMESPACE_URL, digest)}",
        "version": 1,
        "metadata": {
            "tools": {"components": [_tool(package, version) for package, version in content.versions.items()]},
            "component": _model(name, content, licence),
        },
        "components": [
            {"type": "file", "bom-ref": f"file:{file.path}", "name": file.path, "hashes": _hash(file.sha256)}
            for file in content.files
        ],
        "dependencies": [{"ref": "model", "dependsOn": [f"file:{file.path}" for file in content.files]}],
    }


def _model(name: str, content: Content, licence: str | None) -> dict[str, Any]:
    ancestors: list[dict[str, Any]] = [
        {
            "type": "machine-learning-model",
            "bom-ref": "base",
            "name": content.base.name,
            **({"version": content.base.revision} if content.base.revision else {}),
            "components": [
                {"type": "file", "bom-ref": f"base:{f.path}", "name": f.path, "hashes": _hash(f.sha256)}
                for f in content.base.files
            ],
        }
    ]
    ancestors += [
        {"type": "machine-learning-model", "bom-ref": f"adapter:{k}", "name": a.name, "hashes": _hash(a.sha256)}
        for k, a in enumerate(content.adapters)
    ]
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        **({"licenses": [{"license": {"name": licence}}]} if licence else {}),
        "pedigree": {"ancestors": ancestors},
    }


def _tool(package: str, version: str) -> dict[str, Any]:
    return {"type": "application" if package == _TOOL else "library", "name": package, "version": version}


def _hash(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]
