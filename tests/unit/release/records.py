"""Records of a small merge and its export, as cards and reports are written from."""

from __future__ import annotations

from typing import Any

from lora_deploy.export.record import ExportRecord
from lora_deploy.merge.record import MergeRecord
from lora_deploy.release.card import CardFacts

DIGEST = "ab" * 32


def merge_record(*base_names: str | None, **changes: Any) -> MergeRecord:
    """A merge of one adapter for each name of a base."""
    adapters = [
        {
            "name": f"adapter{k}",
            "path": f"/home/somebody/adapter{k}/adapter_model.safetensors",
            "format": "peft",
            "sha256": DIGEST,
            "config_sha256": None,
            "base_name": name,
            "base_revision": None,
            "weight": 1.0,
        }
        for k, name in enumerate(base_names or ("owner/base",))
    ]
    document = {
        "schema": 1,
        "digest": DIGEST,
        "versions": {"lora-deploy": "1", "torch": "2"},
        "base": {"name": "owner/base", "revision": "abc", "root": "/home/somebody/base", "files": []},
        "adapters": adapters,
        "options": {
            "read": {"alpha": None, "adapter_name": None, "enable_lora": None, "base_is_residual": False},
            "bind": {"weights": [], "include": [], "exclude": [], "tokenizer": None, "components": [], "variant": None},
            "merge": {"dtype": "float16", "max_shard_bytes": 5_000_000_000},
        },
        "config_edits": {},
        "excluded": [],
        "findings": [],
        "artifacts": [],
        "tensors": {},
        "n_untouched": 0,
        "cost": {"seconds": 1, "peak_private_bytes": 1, "planned_peak_bytes": 1, "n_workers": 1, "device": "cpu"},
    }
    return MergeRecord.model_validate(document | changes)


def export_record(**options: Any) -> ExportRecord:
    """An export with one graph."""
    base = {
        "dtype": "float16",
        "layout": "transformers",
        "maker": "transformers",
        "provider": "cpu",
        "storage": "external",
    }
    return ExportRecord.model_construct(options=base | options, graphs={}, findings=(), artifacts=(), versions={})


def card_facts(record: MergeRecord, **exports: ExportRecord) -> CardFacts:
    """What a card is written from."""
    return CardFacts(
        name="released",
        record=record,
        config={"architectures": ["LlamaForCausalLM"]},
        exports=exports,
        licence={"license": "mit"},
        adapter_card={"datasets": ["some/data"], "language": "de"},
        verdicts={"replay": "pass"},
        evidence={},
        accepted=(),
        findings=(),
    )
