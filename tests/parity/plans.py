"""Tiny trained adapters, merged, with the plan that made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.bases import open_base
from lora_deploy.checkpoint import Checkpoint, open_checkpoint
from lora_deploy.evidence.parity import check_parity
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.merge.execute import execute
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan, plan_merge
from lora_deploy.validate import BindOptions, bind
from tests.peer.trained import MEMORY_BYTES, Trained, train


@dataclass(frozen=True, kw_only=True)
class Case:
    trained: Trained
    plan: MergePlan
    merged: Checkpoint

    def parity(self, **arguments: Any) -> ParityReport:
        report = check_parity(self.plan, open_checkpoint(self.merged.root), **arguments)
        assert isinstance(report, ParityReport), report
        return report


def merged_case(
    model: nn.Module,
    config: LoraConfig,
    folder: Path,
    *,
    dtype: str = "float16",
    read: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    n_adapters: int = 1,
    config_edits: Mapping[str, Any] | None = None,
    **saving: Any,
) -> Case:
    """Train, merge, and give the plan with both; several adapters are the same one again."""
    trained = train(model.float(), config, folder, **saving)
    if config_edits:
        path = trained.adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(config_edits)))
    adapters = [read_adapter(trained.adapter, read)] * n_adapters
    plan = plan_merge(
        bind(adapters, open_base(str(trained.base)), bind_options),
        MergeOptions(dtype=dtype, n_workers=1, memory_bytes=MEMORY_BYTES),
        read_options=read,
    )
    return Case(trained=trained, plan=plan, merged=open_checkpoint(execute(plan, folder / "merged").root))
