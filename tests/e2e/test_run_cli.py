"""A recipe run on the command line: what is done, what is skipped, what one failure leaves alone."""

from __future__ import annotations

import json
import shutil
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from peft import LoraConfig

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import MergeError
from lora_deploy.hubs.open import fitting
from lora_deploy.hubs.options import PushOptions
from lora_deploy.pipeline import cell as cells
from tests.e2e.commands import document, run
from tests.peer.models import llama
from tests.peer.trained import train

RECIPE = """\
adapters:
  - adapter
  - {name: half, path: adapter, weights: 0.5}
base: base
export: false
evidence: {only: replay}
release: {license: mit, accept: {code: parity-missing, because: it takes too long for a test}}
targets: ["./published/{cell}"]
push: {replace: true}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = llama(hidden_size=64, intermediate_size=48)
    train(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), folder)
    return folder


@pytest.fixture
def recipe(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "here")
    path = tmp_path / "here" / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def verdicts(found: dict) -> dict[str, str]:
    return {f"{o['cell']} {o['stage']}": o["verdict"] for o in found["outcomes"]}


def unchanged(found: dict) -> set[str]:
    return {f"{o['cell']} {o['stage']}" for o in found["outcomes"] if o["was_done"]}


def test_every_cell_is_merged_proven_released_and_pushed_once(recipe: Path, tmp_path: Path) -> None:
    first = document("run", recipe)
    assert first["verdict"] == "pass"
    assert set(verdicts(first).values()) == {"pass"}
    assert not unchanged(first)
    here = recipe.parent
    for name in ("adapter", "half"):
        assert (here / f"published/{name}/lora_deploy.json").is_file()
    manifest = json.loads((here / "published/half/lora_deploy.json").read_text())
    assert manifest["name"] == "half"
    assert manifest["content"]["recipe"]["adapters"][1] == {"name": "half", "path": ["adapter"], "weights": [0.5]}
    weights = [(here / f"dist/{name}/merged/model.safetensors").read_bytes() for name in ("adapter", "half")]
    assert weights[0] != weights[1]

    again = document("run", recipe)
    stages = {"merge", "evidence", "release", "push"}
    assert unchanged(again) == {f"{name} {stage}" for name in ("adapter", "half") for stage in stages}

    evidence = here / "dist/half/merged/evidence.json"
    evidence.write_text(evidence.read_text().replace('"pass"', '"Pass"', 1))
    third = document("run", recipe)
    assert {"half evidence", "half release"}.isdisjoint(unchanged(third)), "what is not what was written is made again"
    assert {f"adapter {stage}" for stage in stages} <= unchanged(third)

    changed = document("run", recipe, "--set", "evidence.seconds=7")
    assert "adapter evidence" not in unchanged(changed)
    assert "adapter merge" in unchanged(changed)


def test_the_base_is_read_once_for_all_cells(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is read for one cell after the other before the next shard is."""
    read: list[str] = []
    fetch = Checkpoint.fetch

    def recorded(self: Checkpoint, name: str, start: int, stop: int) -> None:
        read.append(name)
        fetch(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "fetch", recorded)
    found = document("run", recipe, "--until", "merge", "--set", "merge.max_shard_size=40kB")
    stages = ("validate", "merge")
    assert list(verdicts(found)) == [f"{cell} {stage}" for cell in ("adapter", "half") for stage in stages]
    index = json.loads((recipe.parent / "dist/half/merged/model.safetensors.index.json").read_text())["weight_map"]
    shards = [shard for shard, _ in groupby(index[name] for name in read)]
    assert len(shards) > 2
    assert shards == sorted(set(shards))


def test_a_cell_that_fails_does_not_stop_the_others(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("  - adapter\n", "  - gone\n"))
    junit = recipe.with_name("junit.xml")
    result = run("run", recipe, "--json", "--junit", junit)
    assert result.exit_code == 3, "that of an input that is not there"
    found = json.loads(result.stdout)
    assert found["verdict"] == "fail"
    assert found["cause"].startswith(": gone, validate: ")
    assert verdicts(found)["gone validate"] == "fail"
    assert "gone merge" not in verdicts(found)
    assert verdicts(found)["half push"] == "pass"
    assert not (recipe.parent / "published/gone").exists()

    suites = {suite.get("name"): suite for suite in ET.parse(junit).getroot()}  # noqa: S314 - our own
    assert [suites["gone"].get(key) for key in ("tests", "failures", "errors")] == ["1", "1", "0"]
    assert [suites["half"].get(key) for key in ("tests", "failures", "errors")] == ["5", "0", "0"]
    assert suites["gone"].find("testcase/failure") is not None


def test_targets_that_share_options_get_those_that_they_can_obey(recipe: Path) -> None:
    """A tag and a token are for hubs: beside one, a folder is a target all the same."""
    word = "secret"
    options = PushOptions(tag="v1", revision="dev", private=True, token=word, commit_message="m", yes=True)
    assert fitting("owner/name", options) == fitting("hf://owner/name@x", options) == options
    assert fitting("oci://host/ns/name:tag", options) == PushOptions(token=word, yes=True)
    for target in ("./folder", "/folder", "file:///folder", "s3://bucket/prefix"):
        assert fitting(target, options) == PushOptions(yes=True)
    found = document("run", recipe, "--set", "adapters=adapter", "--set", "push.tag=v1")
    assert verdicts(found)["adapter push"] == "pass"


def test_what_changed_at_a_target_is_replaced_only_when_the_recipe_says_so(recipe: Path) -> None:
    one = ("--set", "adapters=adapter", "--set", "push.replace=false")
    assert document("run", recipe, *one)["verdict"] == "pass"
    found = document("run", recipe, *one, "--set", "release.license=apache-2.0", exit_code=9)
    assert "holds something else" in found["cause"]
    found = document("run", recipe, "--set", "adapters=adapter", "--set", "release.license=apache-2.0")
    assert verdicts(found)["adapter push"] == "pass"


def test_what_cannot_be_told_is_released_only_when_somebody_accepts_it(recipe: Path) -> None:
    found = document("run", recipe, "--set", "release.accept=[]", "--set", "adapters=adapter", exit_code=10)
    assert found["verdict"] == "inconclusive"
    assert verdicts(found)["adapter release"] == "inconclusive"
    assert "parity" in found["cause"]
    assert not (recipe.parent / "published").exists()

    found = document("run", recipe, "--set", "adapters=adapter")
    assert found["verdict"] == "pass"
    manifest = json.loads((recipe.parent / "published/adapter/lora_deploy.json").read_text())
    assert [gap["code"] for gap in manifest["accepted"]] == ["parity-missing"]


def test_stages_are_chosen_and_miss_what_was_not_made(recipe: Path) -> None:
    until = document("run", recipe, "--until", "merge", "--set", "adapters=adapter")
    assert list(verdicts(until)) == ["adapter validate", "adapter merge"]
    only = document("run", recipe, "--only", "evidence", "--set", "adapters=adapter")
    assert verdicts(only) == {"adapter evidence": "pass"}
    missing = document("run", recipe, "--from", "push", "--set", "adapters=adapter", exit_code=2)
    assert "lora_deploy.json: is not there" in missing["cause"]
    rest = document("run", recipe, "--from", "release", "--set", "adapters=adapter")
    assert list(verdicts(rest)) == ["adapter release", "adapter push"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "export"], "the recipe has no stage export"),
        (["--only", "merge", "--from", "merge"], "give one or the other"),
        (["--set", "merge.memoy=1"], "unknown key; nearest: memory"),
    ],
)
def test_options_that_cannot_be_obeyed(recipe: Path, options: list[str], message: str) -> None:
    result = run("run", recipe, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_dry_run_writes_nothing_and_says_what_it_would_take(recipe: Path) -> None:
    before = sorted(recipe.parent.rglob("*"))
    found = document("run", recipe, "--dry-run")
    assert sorted(recipe.parent.rglob("*")) == before
    assert [cell["cell"] for cell in found["cells"]] == ["adapter", "half"]
    assert all(cell["merge"]["peak_bytes"] > 0 and cell["merge"]["n_output_bytes"] > 0 for cell in found["cells"])
    table = run("run", recipe, "--dry-run").stdout
    assert "disk: " in table


def test_graphs_are_foreseen_in_the_dtype_that_they_will_have(recipe: Path) -> None:
    """Graphs are made of the merged model: in its dtype, unless the export says another."""
    sizes = []
    for graphs in ("[{}, {dtype: float32}]", "[{}]"):
        recipe.write_text(RECIPE.replace("export: false", f"dtypes: float16\nexport: {graphs}"))
        sizes.append(document("run", recipe, "--dry-run")["cells"][0]["n_graph_bytes"])
    both, half = sizes
    assert 0.99 < both / (3 * half) < 1.01


def test_a_dry_run_names_what_would_fail(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("  - adapter\n", "  - gone\n"))
    result = run("run", recipe, "--dry-run")
    assert result.exit_code == 3
    assert "gone" in result.stderr


def test_an_interrupted_run_goes_on_where_it_was(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cells, "release", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        result = run("run", recipe)
    assert result.exit_code == 130
    assert "the same command goes on where it was" in result.stderr
    found = document("run", recipe)
    assert {"adapter merge", "adapter evidence"} <= unchanged(found)
    assert found["verdict"] == "pass"


def test_a_folder_of_another_recipe_is_left_alone(recipe: Path) -> None:
    document("run", recipe, "--until", "merge")
    other = recipe.with_name("other.yaml")
    other.write_text(RECIPE)
    found = document("run", other, "--until", "merge", exit_code=MergeError.exit_code)
    assert "belongs to the recipe" in found["cause"]
    assert document("run", other, "--until", "merge", "--fresh")["verdict"] == "pass"


def test_a_jobs_page_gets_the_table(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    document("run", recipe, "--until", "merge")
    assert page.read_text().startswith("### lora-deploy: PASS\n")
    assert "| half | merge | pass |" in page.read_text()


def test_a_token_is_in_no_output(recipe: Path) -> None:
    result = run("run", recipe, "--until", "push", "--set", "adapters=adapter", "--token", "hf_verysecret")
    assert result.exit_code == 0
    assert "hf_verysecret" not in result.stdout + result.stderr
    written = [path for path in recipe.parent.rglob("*") if path.is_file()]
    assert not [path for path in written if b"hf_verysecret" in path.read_bytes()]


def test_a_first_recipe_runs(recipe: Path) -> None:
    begun = recipe.with_name("begun.yaml")
    result = run("recipe", "init", recipe.parent / "adapter", "--base", recipe.parent / "base", "-o", begun)
    assert result.exit_code == 0, result.stderr
    assert run("recipe", "init", recipe.parent / "adapter", "-o", begun).exit_code == 2, "it exists"
    assert document("run", begun, "--until", "merge")["verdict"] == "pass"
    shown = run("recipe", "show", begun).stdout
    assert "latency_bound: 0.03" in shown
    assert "# stages: validate, merge, export, evidence, release" in shown
