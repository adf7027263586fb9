"""Every known way to merge wrongly without a word is planted somewhere, under its number."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import IA3Config
from safetensors.torch import load_file
from torch import nn

from lora_deploy.merge.options import MergeOptions
from lora_deploy.pipeline import merge
from tests.builders import make_checkpoint, save_peft
from tests.peer.models import toy
from tests.peer.trained import assert_merges_as_trained, train
from tests.traps.planted import N_TRAPS, PLANTED

TESTS = Path(__file__).parents[1]
_PLACE = re.compile(r"(?P<file>[\w/]+\.py)::(?P<name>test_\w+)(?:\[(?P<case>.*)\])?")
IDS = [f"{number:02} {trap}" for number, (trap, _) in PLANTED.items()]


@cache
def _functions(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("number", PLANTED, ids=IDS)
def test_a_trap_is_planted_where_the_table_says(number: int) -> None:
    for place in PLANTED[number][1]:
        match = _PLACE.fullmatch(place)
        assert match is not None, place
        function = _functions(match["file"]).get(match["name"])
        assert function is not None, f"{match['file']} has no {match['name']}"
        skipped = [mark for mark in map(ast.unparse, function.decorator_list) if "skip" in mark or "xfail" in mark]
        assert not skipped, f"{place}: {skipped[0]}"
        if match["case"]:
            assert match["case"] in (TESTS / match["file"]).read_text(encoding="utf-8"), place


def test_every_trap_is_planted() -> None:
    assert sorted(PLANTED) == list(range(1, N_TRAPS + 1))


@pytest.mark.parametrize("is_equal", [True, False], ids=["tied", "of its own"])
def test_a_tied_copy_in_another_shard_is_untied_with_the_head_that_was_changed(is_equal: bool, tmp_path: Path) -> None:
    """The flag says tied, and the head lies in another shard than the embedding: the change is the head's alone."""
    embedding = torch.randn(6, 4)
    head = embedding.clone() if is_equal else torch.randn(6, 4)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": torch.ones(4)}
    base = make_checkpoint(tmp_path / "base", tensors, {"model_type": "llama", "tie_word_embeddings": True}, n_shards=2)
    assert base.tensors["lm_head.weight"].file != base.tensors["model.embed_tokens.weight"].file
    down, up = torch.randn(2, 4), torch.randn(6, 2)
    factors = {f"base_model.model.lm_head.lora_{k}.weight": t for k, t in (("A", down), ("B", up))}
    adapter = save_peft(tmp_path / "adapter", factors, {"r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]})
    merged = merge(adapter, base=base.root, output=tmp_path / "out", merge_options=MergeOptions(dtype="float32"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], embedding)
    assert torch.equal(found["lm_head.weight"], (head.double() + up.double() @ down.double()).float())
    assert merged.record.config_edits == ({"tie_word_embeddings": False} if is_equal else {})


def test_ia3_scales_the_side_that_peft_0_21_2_scales_though_the_matrix_is_square(tmp_path: Path) -> None:
    """A module is feed-forward where its name ends in one that is listed, wherever a part of the name begins."""
    square = toy(a=nn.Linear(6, 6), b=nn.Linear(6, 6), ab=nn.Linear(6, 6))
    config = IA3Config(target_modules=["a", "b", "ab"], feedforward_modules=["b"])
    trained = train(square, config, tmp_path)
    assert_merges_as_trained(trained, {"x": torch.randn(5, 6)}, tmp_path / "out")
