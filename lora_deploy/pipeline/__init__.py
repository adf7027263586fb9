"""The stages in order: read, bind, plan, execute, verify. The only module that names them all.

    inspect   adapter ─▶ Inspection
    convert   adapter ─▶ Converted                        the same adapter in another format
    validate  adapters, base ─▶ Binding
    plan      adapters, base ─▶ MergePlan                 nothing is written
    merge     adapters, base ─▶ Merged                    plan, then execute
    export    merged folder, or adapters, base ─▶ Exported
    verify    merged folder ─▶ Evidence                   require_pass turns its verdict into an exception
    bench     exported folders ─▶ LatencyReport
    release   merged folder, graphs, evidence ─▶ Release
    push      release, target ─▶ Receipt                  pull fetches one back
    run       recipe ─▶ RunReport                         all of these, for every cell of its matrix

ADAPTER is a folder, a file or a hub id; BASE a folder, a file or a hub id; a local path wins over a hub id of the same
name. Promise: no stage is skipped, none is run twice, and what a stage found is returned even where it is bad news.
"""

from __future__ import annotations

from lora_deploy.evidence.bench import bench
from lora_deploy.export.execute import default_output as default_export
from lora_deploy.export.execute import execute_export
from lora_deploy.export.multi_lora import execute_multi_lora
from lora_deploy.merge.budget import estimate, require_disk
from lora_deploy.merge.execute import is_done
from lora_deploy.merge.identity import base_artifacts
from lora_deploy.pipeline.chain import run_recipe
from lora_deploy.pipeline.converting import Converted, convert
from lora_deploy.pipeline.exporting import (
    add_to_export,
    answer_prompt,
    check_graph_fit,
    export,
    plan_of_export,
    plan_of_multi_lora,
)
from lora_deploy.pipeline.foresight import foresee
from lora_deploy.pipeline.merging import (
    carry_out_task,
    default_output,
    execute,
    finalize,
    inspect,
    is_onnx,
    merge,
    plan,
    validate,
)
from lora_deploy.pipeline.on_ray import MergeRequest, merge_on_ray, run_recipe_on_ray
from lora_deploy.pipeline.opening import chosen_stages, open_recipe
from lora_deploy.pipeline.releasing import default_release, preview_push, pull, push, release
from lora_deploy.pipeline.verifying import require_pass, verify
from lora_deploy.references import Reference, named_base

__all__ = [
    "Converted",
    "MergeRequest",
    "Reference",
    "add_to_export",
    "answer_prompt",
    "base_artifacts",
    "bench",
    "carry_out_task",
    "check_graph_fit",
    "chosen_stages",
    "convert",
    "default_export",
    "default_output",
    "default_release",
    "estimate",
    "execute",
    "execute_export",
    "execute_multi_lora",
    "export",
    "finalize",
    "foresee",
    "inspect",
    "is_done",
    "is_onnx",
    "merge",
    "merge_on_ray",
    "named_base",
    "open_recipe",
    "plan",
    "plan_of_export",
    "plan_of_multi_lora",
    "preview_push",
    "pull",
    "push",
    "release",
    "require_disk",
    "require_pass",
    "run_recipe",
    "run_recipe_on_ray",
    "validate",
    "verify",
]
