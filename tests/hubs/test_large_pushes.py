"""What large releases cost: memory, and passes over the files. Each push is a process of its own, as a user's is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.release.manifest import check
from tests.hubs.huggingface_server import Hub, serving
from tests.hubs.registries import Running
from tests.hubs.releases import write_release

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]

MEASURE = """
import json, sys, time
begun = time.perf_counter()

def number(path, name):
    with open(path) as stream:
        return int(stream.read().split(name)[1].split()[0])

def tell(**more):
    peak = number("/proc/self/status", "VmHWM:") * 1024  # ru_maxrss would count what started this process
    n_read = number("/proc/self/io", "rchar:")
    print(json.dumps(dict(peak_bytes=peak, n_read_bytes=n_read, seconds=time.perf_counter() - begun, **more)))
"""

PUSH = """
from pathlib import Path
from lora_deploy.hubs.options import PushOptions
from lora_deploy.push import push
receipt = push(Path(sys.argv[1]), sys.argv[2], PushOptions())
tell(n_sent_bytes=receipt.n_sent_bytes)
"""

PULL = """
from pathlib import Path
from lora_deploy.hubs.options import PushOptions
from lora_deploy.push import pull
pull(sys.argv[2], Path(sys.argv[1]), PushOptions())
tell()
"""

CLIENT = """
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, constants
constants.HF_HUB_DISABLE_XET = sys.argv[3] == "lfs"
api, root = HfApi(), Path(sys.argv[1])
api.create_repo(sys.argv[2])
additions = []
for path in sorted(path for path in root.rglob("*") if path.is_file()):
    additions.append(CommitOperationAdd(path.relative_to(root).as_posix(), path))
    api.preupload_lfs_files(sys.argv[2], additions[-1:])
api.create_commit(sys.argv[2], additions, commit_message="x")
tell()
"""


def measured(code: str, *arguments: object, **environment: str) -> dict[str, Any]:
    """Run code in a process of its own; give its peak of memory, the bytes that it read, and its seconds."""
    found = subprocess.run(
        [sys.executable, "-c", MEASURE + code, *map(str, arguments)],
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    print(found.args[3:], {name: f"{value:,.1f}" for name, value in result.items()})  # noqa: T201 - pytest -s shows it
    return result


def random_file(n_bytes: int) -> Iterator[bytes]:
    for _ in range(n_bytes >> 24):
        yield os.urandom(1 << 24)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards, 2 GB of noise together."""
    shards = {f"model-{k:05d}-of-00004.safetensors": random_file(1 << 29) for k in range(1, 5)}
    return write_release(tmp_path_factory.mktemp("large") / "release", {"config.json": iter([b"{}"]), **shards})


@pytest.fixture
def wide_hub(tmp_path: Path) -> Iterator[Hub]:
    with serving(tmp_path / "hub") as found:
        yield found


@pytest.mark.parametrize("way", ["lfs", "xet"])
def test_two_gigabytes_to_a_hub_cost_no_more_memory_or_passes_than_the_clients_own(
    wide_hub: Hub, large: Path, tmp_path: Path, way: str
) -> None:
    world = {"HF_ENDPOINT": wide_hub.url, "HF_TOKEN": "hf_writer", "HF_HUB_OFFLINE": "0"}
    n_bytes = sum(path.stat().st_size for path in large.rglob("*") if path.is_file())
    _give_xet(wide_hub, way, tmp_path / "xet-of-ours")
    ours = measured(PUSH, large, "me/ours", **world, HF_HOME=str(tmp_path / "home-of-ours"))
    _give_xet(wide_hub, way, tmp_path / "xet-of-theirs")  # a store that has nothing yet
    theirs = measured(CLIENT, large, "me/theirs", way, **world, HF_HOME=str(tmp_path / "home-of-theirs"))
    assert ours["n_sent_bytes"] == n_bytes
    assert ours["peak_bytes"] - theirs["peak_bytes"] < 200e6
    assert ours["n_read_bytes"] - theirs["n_read_bytes"] < 0.02 * n_bytes
    n_passes = {"lfs": 2, "xet": 1}[way]  # one to hash, one to send; or both at once
    assert ours["n_read_bytes"] < (n_passes + 0.05) * n_bytes


def _give_xet(hub: Hub, way: str, folder: Path) -> None:
    if way == "xet":
        folder.mkdir()
        hub.xet = folder


def test_a_layer_of_a_gigabyte_passes_through_little_memory(registry: Running, tmp_path: Path) -> None:
    root = write_release(tmp_path / "release", {"model.safetensors": random_file(1 << 30)})
    assert measured(PUSH, root, registry.target)["peak_bytes"] < 100e6
    assert measured(PULL, tmp_path / "back", registry.target)["peak_bytes"] < 100e6
    assert check(tmp_path / "back") == check(root)


def test_a_gigabyte_to_a_folder_passes_through_little_memory(tmp_path: Path) -> None:
    root = write_release(tmp_path / "release", {"model.safetensors": random_file(1 << 30)})
    assert measured(PUSH, root, tmp_path / "x")["peak_bytes"] < 100e6
    assert measured(PULL, tmp_path / "back", tmp_path / "x")["peak_bytes"] < 100e6
    assert check(tmp_path / "back") == check(root)
