"""A real release, through each kind of target and back, and what ``verify`` then says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import LoraConfig

from lora_deploy.hubs.options import PushOptions
from lora_deploy.merge.options import MergeOptions
from lora_deploy.pipeline import merge, push, release, verify
from lora_deploy.release.manifest import check
from tests.e2e.commands import document
from tests.hubs.huggingface_server import Hub
from tests.hubs.registries import Running
from tests.peer.models import llama
from tests.peer.trained import Trained, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = llama(hidden_size=64, intermediate_size=48)
    return train(model, config, tmp_path_factory.mktemp("round-trip"))


@pytest.fixture(scope="module")
def released(trained: Trained) -> Path:
    """A merged model that was verified, as a release; what it was made of is named by digest."""
    folder = trained.base.parent
    (trained.base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    merge(trained.adapter, base=trained.base, output=folder / "merged", merge_options=MergeOptions(n_workers=1))
    assert verify(folder / "merged").verdict == "pass"
    return release(folder / "merged", output=folder / "release").root


@pytest.fixture(params=["hub", "hub over xet", "registry", "folder"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, PushOptions]]:
    if request.param.startswith("hub"):
        request.getfixturevalue("xet_hub" if "xet" in request.param else "hub")
        yield "hf://me/model@dev", PushOptions(token="hf_writer")
    elif request.param == "registry":
        registry: Running = request.getfixturevalue("registry")
        yield registry.target, PushOptions()
    else:
        yield (tmp_path / "folder").as_uri(), PushOptions()


def test_what_comes_back_is_verified_like_what_was_sent(
    trained: Trained, released: Path, target: tuple[str, PushOptions], tmp_path: Path
) -> None:
    place, options = target
    receipt = push(released, place, options=options)
    assert receipt.n_sent_bytes == receipt.n_bytes
    words = ["--token", options.token] if options.token else []
    pulled = document("pull", place, tmp_path / "back", *words)
    assert check(tmp_path / "back") == check(released)
    assert pulled["content_digest"] == check(released).content.digest
    made_of = ("--adapter", trained.adapter, "--base", trained.base)
    shown = document("verify", tmp_path / "back", "--only", "replay", *made_of)
    assert shown["replay"]["verdict"] == "pass"


def test_a_weight_that_was_changed_at_the_hub_is_not_pulled(hub: Hub, released: Path, tmp_path: Path) -> None:
    """The hub gives other bytes under the name that its own tree lists."""
    push(released, "me/model", options=PushOptions(token="hf_writer"))
    blob = hub.store.repositories["me/model"].history("main")[0].files["model.safetensors"]
    path = hub.store.object_path(str(blob.sha256))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    error = document("pull", "me/model", tmp_path / "back", "--token", "hf_writer", exit_code=8)["error"]
    assert error["code"] == "digest-mismatch"
    assert not (tmp_path / "back").exists()
