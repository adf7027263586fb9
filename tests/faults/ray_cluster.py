"""Run in a network namespace of its own: a merge, or a recipe, on a Ray cluster of two nodes, one of which dies.

    python -m tests.faults.ray_cluster merge ADAPTER BASE OUT MAX_SHARD_BYTES
    python -m tests.faults.ray_cluster run RECIPE

The node is killed when its first task, or its first cell, has begun; what it did is done again on the other.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from lora_deploy import pipeline
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.output import WORK_FOLDER, partial_of
from lora_deploy.validate import BindOptions

N_CPUS = 2


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def kill_once(cluster: Cluster, node: object, has_begun: Callable[[], bool]) -> threading.Thread:
    """Take a node away, with everything that runs on it, once work has begun."""

    def wait_and_kill() -> None:
        deadline = time.monotonic() + 60
        while not has_begun() and time.monotonic() < deadline:
            time.sleep(0.002)
        cluster.remove_node(node, allow_graceful=False)
        say("killed a node")

    thread = threading.Thread(target=wait_and_kill, daemon=True)
    thread.start()
    return thread


def main() -> None:
    what, *rest = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": N_CPUS, "include_dashboard": False})
    node = cluster.add_node(num_cpus=N_CPUS)
    ray.init(address=cluster.address, log_to_driver=False)
    if what == "merge":
        adapter, base, out, shard_bytes = rest
        thread = kill_once(cluster, node, (partial_of(Path(out)) / WORK_FOLDER / "plan.json").exists)
        request = pipeline.MergeRequest(
            adapters=(adapter,),
            base=base,
            output=out,
            read_options=ReadOptions(),
            bind_options=BindOptions(),
            merge_options=MergeOptions(max_shard_bytes=int(shard_bytes)),
        )
        say("merged", pipeline.merge_on_ray(request).root)
    else:
        opened = pipeline.open_recipe(rest[0])
        thread = kill_once(cluster, node, lambda: any(cell.folder.exists() for cell in opened.cells))
        report = pipeline.run_recipe_on_ray(opened, pipeline.chosen_stages(opened.recipe))
        say("verdict", report.verdict, *(f"{o.cell}/{o.stage}:{o.verdict}" for o in report.outcomes))
    thread.join(60)
    os._exit(0)  # the cluster's processes go with the namespace


if __name__ == "__main__":
    main()
