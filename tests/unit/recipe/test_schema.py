"""The published schema, the starter and the options of the stages agree with what a recipe can say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.export.options import (
    DTYPE_CHOICES,
    LAYOUT_CHOICES,
    MAKER_CHOICES,
    PROVIDER_CHOICES,
    QUANTIZE_CHOICES,
    STORAGE_CHOICES,
    ExportOptions,
)
from lora_deploy.hubs.options import PushOptions
from lora_deploy.merge.options import MergeOptions
from lora_deploy.recipe.model import (
    AdapterChoice,
    BaseChoice,
    EvidenceSection,
    ExportChoice,
    MergeSection,
    PushSection,
    Recipe,
    ReleaseSection,
    Section,
    ValidateSection,
)
from lora_deploy.recipe.read import parse_recipe
from lora_deploy.recipe.schema import keys_at, schema, schema_text
from lora_deploy.recipe.starter import starter
from lora_deploy.release.options import ReleaseOptions
from lora_deploy.validate import BindOptions

DOCS = Path(__file__).parents[3] / "docs"
NAMES = {
    "max_shard_bytes": "max_shard_size",
    "memory_bytes": "memory",
    "n_workers": "workers",
    "storage": "weights",
    "is_symmetric": "symmetric",
    "accepted": "accept",
    "yes": "replace",
}
"""Options that a recipe calls by the command line's name."""


@pytest.mark.parametrize(
    ("options", "sections", "left_out"),
    [
        (ReadOptions, [AdapterChoice], set()),
        (BindOptions, [ValidateSection, AdapterChoice, BaseChoice], set()),
        (MergeOptions, [MergeSection], {"dtype", "fresh"}),
        (ExportOptions, [ExportChoice], {"fresh"}),
        (VerifyOptions, [EvidenceSection], {"base_graph"}),
        (ReleaseOptions, [ReleaseSection], {"fresh", "recipe"}),
        (PushOptions, [PushSection], {"token"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_option_of_a_stage_can_be_said(options: type, sections: list[type[Section]], left_out: set[str]) -> None:
    known = {name for section in sections for name in section.model_fields}
    missing = {NAMES.get(f.name, f.name) for f in dataclasses.fields(options)} - known - left_out
    assert not missing


def test_choices_are_those_of_the_command_line() -> None:
    choices = schema()["$defs"]["ExportChoice"]["properties"]
    enums = {
        name: next(c["enum"] for c in field.get("anyOf", [field]) if "enum" in c)
        for name, field in choices.items()
        if "enum" in json.dumps(field)
    }
    assert enums == {
        "dtype": list(DTYPE_CHOICES),
        "provider": list(PROVIDER_CHOICES),
        "weights": list(STORAGE_CHOICES),
        "layout": ["transformers", "diffusers", "genai"],
        "maker": list(MAKER_CHOICES),
        "quantize": list(QUANTIZE_CHOICES),
    }
    assert set(LAYOUT_CHOICES) == set(enums["layout"])


def test_the_published_schema_is_this_one() -> None:
    assert (DOCS / "recipe.schema.json").read_text() == schema_text(), (
        "lora-deploy recipe schema > docs/recipe.schema.json"
    )


def test_recipes_in_the_documentation_can_be_read() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "recipes.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        parse_recipe(block, "docs/recipes.md")


def test_every_key_says_what_it_is() -> None:
    for definition in (schema(), *schema()["$defs"].values()):
        for name, field in definition.get("properties", {}).items():
            assert "description" in field or "$ref" in field or name in {"validate", "merge", "push"}, name


def test_keys_are_known_at_every_depth() -> None:
    assert keys_at(("adapters", 0))[0] == "path"
    assert keys_at(("adapters",))[0] == "path"
    assert "quantize" in keys_at(("export",))
    assert keys_at(("release", "accept", 3)) == ["code", "because"]
    assert keys_at(("no", "such")) == []


@pytest.mark.parametrize("needs_alpha", [False, True])
@pytest.mark.parametrize("base", ["o/n@v1", None])
@pytest.mark.parametrize("adapter", ["runs/7", "no", "a: b", "~x"])
def test_the_starter_is_a_recipe(adapter: str, base: str | None, needs_alpha: bool) -> None:
    text = starter(adapter=adapter, base=base, needs_alpha=needs_alpha, summary="two\nlines")
    recipe = parse_recipe(text, "starter")
    assert recipe.adapters[0].path == (adapter,)
    assert recipe.base is not None
    assert recipe.base.path == (base or "owner/name")
    assert recipe == Recipe.model_validate({"adapters": [adapter], "base": base or "owner/name"})


def test_everything_that_the_starter_mentions_can_be_said() -> None:
    text = starter(adapter="a", base="b", needs_alpha=True, summary="")
    uncommented = "\n".join(
        line.replace("# ", "", 1) if line.lstrip().startswith("#") and (":" in line or "- " in line) else line
        for line in text.splitlines()[3:]
    )
    document = yaml.safe_load(uncommented)
    assert {"targets", "push"} <= set(document)
    Recipe.model_validate(document)
