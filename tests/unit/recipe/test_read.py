"""Recipes are read with every fault named by its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_deploy.errors import RecipeError
from lora_deploy.recipe.model import Recipe
from lora_deploy.recipe.read import parse_recipe, read_recipe
from lora_deploy.recipe.stages import Stage


def parse(text: str, *overrides: str, **environment: str) -> Recipe:
    return parse_recipe(text, "r.yaml", overrides, environment)


def test_the_shortest_recipe_has_every_default() -> None:
    recipe = parse("adapters: runs/7\n")
    assert [adapter.path for adapter in recipe.adapters] == [("runs/7",)]
    assert recipe.dtypes == ("float16",)
    assert recipe.merge.memory == 2_000_000_000
    assert recipe.stages == (Stage.VALIDATE, Stage.MERGE, Stage.EXPORT, Stage.EVIDENCE, Stage.RELEASE)


def test_values_are_read_as_people_write_them() -> None:
    recipe = parse("""
adapters:
  - a
  - {path: [b, c], weights: [1, 0.5], name: both}
base: {path: x/y, dequantize: true}
merge: {memory: 4GiB, max_shard_size: 800MB}
export: false
evidence: {latency_bound: 5%}
release: false
""")
    assert recipe.adapters[1].weights == (1, 0.5)
    assert recipe.merge.memory == 4 * 2**30
    assert recipe.merge.max_shard_size == 800_000_000
    assert recipe.evidence is not None
    assert recipe.evidence.latency_bound == pytest.approx(0.05)
    assert recipe.stages == (Stage.VALIDATE, Stage.MERGE, Stage.EVIDENCE)


def test_a_key_with_nothing_after_it_is_not_said() -> None:
    assert parse("adapters: a\nrelease:\n  # license: mit\nexport:\nmerge:\n") == parse("adapters: a\n")


def test_every_fault_is_named_with_its_line_and_the_nearest_key() -> None:
    with pytest.raises(RecipeError) as caught:
        parse(
            "adapters:\n  - path: a\n    weihgts: [1]\nmerge:\n  memoy: 4GB\n  device: gpu\nexport: {quantise: int4}\n"
        )
    lines = caught.value.message.split("\n  ")
    assert lines[0] == "r.yaml:3: adapters.0.weihgts: unknown key; nearest: weights"
    assert any(line.startswith("r.yaml:6: merge.device: ") and line.endswith("found 'gpu'") for line in lines)
    assert "r.yaml:5: merge.memoy: unknown key; nearest: memory" in lines
    assert "r.yaml:7: export.quantise: unknown key; nearest: quantize" in lines
    assert len(lines) == 4
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing"),
        ("- a\n", "found list"),
        ("adapters: [a\n", "is not YAML"),
        ("base: b\n", "adapters: is missing"),
        ("adapters: []\n", "adapters: expected at least one"),
        ("adapters: a\nadapters: b\n", "r.yaml:2: adapters: was said in line 1"),
        ("adapters: a\nmerge: {memory: lots}\n", "merge.memory"),
        ("adapters: a\nmerge: {memory: 0}\n", "expected a byte or more"),
        ("adapters: {path: [a, b], weights: [1]}\n", "found 1, expected one for each of 2 paths"),
        ("adapters: {path: a, alpha: .inf}\n", "adapters.alpha: input should be a finite number"),
        ("adapters: a\nevidence: {only: parrot}\n", "found 'parrot'"),
        ("adapters: a\nevidence: {latency_bound: 300%}\n", "latency_bound"),
        ("adapters: a\ntargets: o/n\nrelease: false\n", "nothing can be pushed"),
        ("adapters: a\nrelease: {accept: {code: x, because: ''}}\n", "because"),
    ],
)
def test_what_no_recipe_can_say_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        parse(text)


def test_a_secret_has_no_place_in_a_recipe() -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:2: push.token: a secret has no place") as caught:
        parse("adapters: a\npush: {token: very-secret}\n")
    assert "very-secret" not in str(caught.value)
    assert caught.value.hint == "set HF_TOKEN in the environment"


def test_the_command_line_wins_over_the_environment_and_that_over_the_file() -> None:
    text = "adapters: a\nbase: b\nmerge: {memory: 1GB, workers: 3}\n"
    recipe = parse(text, "merge.memory=4GB", "base.dequantize=true", LORA_DEPLOY__MERGE__MEMORY="3GB")
    assert recipe.merge.memory == 4_000_000_000
    assert recipe.merge.workers == 3
    assert recipe.base is not None
    assert (recipe.base.path, recipe.base.dequantize) == ("b", True)
    assert parse(text, LORA_DEPLOY__MERGE__MEMORY="3GB").merge.memory == 3_000_000_000


def test_items_of_lists_can_be_set() -> None:
    recipe = parse("adapters: [a, b]\n", "adapters.1.alpha=16", "dtypes=[float16, base]")
    assert recipe.adapters[1].path == ("b",)
    assert recipe.adapters[1].alpha == 16
    assert recipe.dtypes == ("float16", "base")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("merge.memoy=1", "--set merge.memoy: merge.memoy: unknown key; nearest: memory"),
        ("merge", "expected key.key=value"),
        ("merge.memory=[1", "is not YAML"),
        ("adapters.7=a", "expected a number up to 1"),
        ("adapters.x=a", "expected a number up to 1"),
    ],
)
def test_a_wrong_override_is_named_by_where_it_came_from(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse("adapters: [a]\n", override)
    assert message in caught.value.message


def test_a_variable_with_an_unknown_key_is_named() -> None:
    with pytest.raises(RecipeError, match=r"\$LORA_DEPLOY__MERGE__MEMOY: merge.memoy: unknown key; nearest: memory"):
        parse("adapters: a\n", LORA_DEPLOY__MERGE__MEMOY="3GB")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "recipe.yaml")
