"""Hub ids: from the cache without a network, from a server when there is one, and never with the token in a message."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.bases import open_base
from lora_deploy.bases.hub import is_hub_id, local_folder
from lora_deploy.errors import HubUnavailableError
from tests.builders import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_secret_that_no_message_may_hold"  # noqa: S105 - a token for a server in this file
W = {"model.norm.weight": torch.ones(2)}


def cache_snapshot(repository: str, revision: str = "main") -> Path:
    """Lay out a snapshot as huggingface_hub's cache does: blobs, links to them, and a ref."""
    from huggingface_hub.constants import HF_HUB_CACHE

    root = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    snapshot, blobs = root / "snapshots" / COMMIT, root / "blobs"
    make_checkpoint(snapshot, W, {"model_type": "llama"})
    blobs.mkdir()
    for path in [*snapshot.iterdir()]:
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(Path("../../blobs") / blob.name)
    (root / "refs").mkdir()
    (root / "refs" / revision).write_text(COMMIT)
    return snapshot


def test_a_cached_repository_opens_offline_at_its_commit() -> None:
    snapshot = cache_snapshot("owner/cached")
    for reference in ("owner/cached", f"owner/cached@{COMMIT}", "owner/cached@main"):
        checkpoint = open_base(reference)
        assert checkpoint.root == snapshot
        assert (checkpoint.ref.name, checkpoint.ref.revision) == ("owner/cached", COMMIT)
        assert set(checkpoint.tensors) == set(W)


def test_an_id_from_before_owners_is_found_under_its_owner() -> None:
    snapshot = cache_snapshot("openai-community/gpt2")
    assert local_folder("gpt2", ("*.json",)) == (snapshot, COMMIT)


def test_what_is_not_cached_cannot_be_had_offline() -> None:
    with pytest.raises(HubUnavailableError, match=r"owner/absent: .* HF_HUB_OFFLINE is set") as caught:
        open_base("owner/absent")
    assert caught.value.hint


@pytest.mark.parametrize("reference", ["owner/name", "owner/name@main", "o-1/n_2.0@refs/pr/3", "gpt2", "gpt2@v1"])
def test_ids_of_the_hub_are_recognised(reference: str) -> None:
    assert is_hub_id(reference)


@pytest.mark.parametrize("reference", ["name", "a/b/c", "/a/b", "./a/b", "../a", "a/", "a/b@", "a b/c", "a/b@x y", ""])
def test_other_references_are_no_ids(reference: str) -> None:
    assert is_hub_id(reference) == (reference == "a/b@")


class Hub(ThreadingHTTPServer):
    """As much of a hub as a download needs; it remembers the tokens that it was shown."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] = {"config.json": b'{"model_type": "llama"}'}
        self.status = 200
        self.error_code = ""
        self.tokens: set[str | None] = set()
        self.fetched: list[str] = []


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:
        hub = self.server
        hub.tokens.add(self.headers.get("authorization"))
        if hub.status != 200:
            self._answer(hub.status, b"{}", {"X-Error-Code": hub.error_code} if hub.error_code else {}, body=body)
        elif "/resolve/" in self.path:
            name = self.path.rpartition(f"/{COMMIT}/")[2]
            if body:
                hub.fetched.append(name)
            content = hub.files[name]
            etag = hashlib.sha256(content).hexdigest()
            self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body=body)
        elif "/tree/" in self.path:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}  # noqa: S324
                for name, content in hub.files.items()
            ]
            self._answer(200, json.dumps(tree).encode(), {}, body=body)
        else:
            content = {"id": "owner/served", "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]}
            self._answer(200, json.dumps(content).encode(), {}, body=body)

    def _answer(self, status: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


ASK = """
import sys
from lora_deploy.bases.hub import local_folder
from lora_deploy.errors import LoraDeployError
try:
    print(*local_folder(sys.argv[1], ("*.json", "*.safetensors"), within="".join(sys.argv[2:])))
except LoraDeployError as error:
    print(type(error).__name__, error.message, error.hint, sep="|")
"""


def ask(hub: Hub, home: Path, reference: str, *within: str) -> str:
    """Ask in a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-W", "error", "-c", ASK, reference, *within]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.strip()


def test_a_repository_is_fetched_without_its_sub_folders_and_then_found(hub: Hub, tmp_path: Path) -> None:
    hub.files |= {"model.safetensors": b"weights", "onnx/config.json": b"{}", "README.md": b"x"}
    folder, revision = ask(hub, tmp_path, "owner/served").split()
    assert revision == COMMIT
    assert sorted(path.name for path in Path(folder).iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(hub.fetched) == ["config.json", "model.safetensors"]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    hub.status = 500
    assert ask(hub, tmp_path, f"owner/served@{COMMIT}").split() == [folder, COMMIT]


def test_a_sub_folder_is_fetched_alone(hub: Hub, tmp_path: Path) -> None:
    hub.files |= {"poet/adapter_config.json": b"{}", "poet/logs/a.json": b"{}", "poets/b.json": b"{}"}
    folder, _ = ask(hub, tmp_path, "owner/served", "poet").split()
    assert hub.fetched == ["poet/adapter_config.json"]
    assert (Path(folder) / "poet" / "adapter_config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "RepoNotFound", "InputError|owner/served: no such folder, and the hub shows no such repository"),
        (404, "RevisionNotFound", "InputError|owner/served: has no revision 'v9'"),
        (403, "GatedRepo", "InputError|owner/served: access needs permission"),
    ],
)
def test_what_the_hub_refuses_is_said_by_reason(
    hub: Hub, tmp_path: Path, status: int, code: str, expected: str
) -> None:
    hub.status, hub.error_code = status, code
    assert ask(hub, tmp_path, "owner/served@v9").startswith(expected)


def test_a_hub_that_cannot_be_reached_is_unavailable(hub: Hub, tmp_path: Path) -> None:
    hub.server_close()
    hub.shutdown()
    answer = ask(hub, tmp_path, "owner/served")
    assert answer.startswith(
        "HubUnavailableError|owner/served: no such folder, not in the cache, and the hub cannot be"
    )


def test_a_cached_pipeline_opens_with_its_components() -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    root = Path(HF_HUB_CACHE) / "models--owner--pipeline"
    snapshot = root / "snapshots" / COMMIT
    make_checkpoint(snapshot / "unet", W, {"_class_name": "UNet2DConditionModel"})
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (snapshot / "model_index.json").write_text(json.dumps(index))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    blob = root / "blobs" / "weights"
    blob.parent.mkdir()
    (snapshot / "unet" / "model.safetensors").rename(blob)
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").symlink_to("../../../blobs/weights")
    checkpoint = open_base("owner/pipeline@main")
    assert (checkpoint.ref.name, checkpoint.ref.revision) == ("owner/pipeline", COMMIT)
    assert set(checkpoint.tensors) == {f"unet/{name}" for name in W}
