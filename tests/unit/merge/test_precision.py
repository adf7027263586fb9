"""Tensors that an architecture keeps in float32 stay as they are; the tables are transformers' own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from lora_deploy.merge import precision
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import Treatment, plan_merge
from lora_deploy.merge.precision import is_kept
from lora_deploy.tensors import DType
from tests.builders import low_rank, make_checkpoint
from tests.merging import binding_of

T5_WO = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
NAMES = {
    "_keep_in_fp32_modules": precision._KEPT_IN_FLOAT16,
    "_keep_in_fp32_modules_strict": precision._KEPT_IN_16_BITS,
}


def kept_by_folder(attribute: str) -> Iterator[tuple[Path, frozenset[str]]]:
    """What every modelling file of transformers says, read from its source: importing them all takes minutes."""
    import transformers

    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = path.read_text()
        if attribute not in text:
            continue
        found: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(t, ast.Name) and t.id == attribute for t in targets):
                value = getattr(node, "value", None)
                if isinstance(value, ast.List | ast.Set | ast.Tuple):
                    found |= {str(item.value) for item in value.elts if isinstance(item, ast.Constant)}
        if found:
            yield path, frozenset(found)


def types_of(folder: Path) -> set[str]:
    """Every model type that the configuration beside a modelling file declares."""
    text = "".join(path.read_text() for path in folder.glob("configuration_*.py"))
    return set(re.findall(r"""^    model_type(?:: str)? = ["']([^"']+)["']""", text, re.MULTILINE))


@pytest.mark.parametrize("attribute", list(NAMES))
def test_the_tables_keep_what_transformers_keeps(attribute: str) -> None:
    table: dict[str, set[str]] = {}
    for types, parts in NAMES[attribute]:
        for model_type in types:
            table.setdefault(model_type, set()).update(parts)
    kept = {
        (model_type, part)
        for path, parts in kept_by_folder(attribute)
        for model_type in types_of(path.parent)
        for part in parts
    }
    assert len(kept) > 30, "the sources are not written as they were: this test no longer reads them"
    missing = {(model_type, part) for model_type, part in kept if part not in table.get(model_type, ())}
    if version("transformers").split(".")[:2] == ["5", "23"]:
        assert not missing
    known = {model_type for model_type, _ in missing} & set(table)
    assert not known, "a newer transformers keeps more for these: extend the tables"


def test_wo_of_t5_stays_in_float32_and_its_neighbours_do_not(tmp_path: Path) -> None:
    tensors = {
        T5_WO: torch.ones(4, 6),
        T5_WO.replace(".wo.", ".wi."): torch.ones(6, 4),
        "two.wow.weight": torch.ones(2),
    }
    checkpoint = make_checkpoint(tmp_path / "base", tensors, {"model_type": "t5"})
    for dtype, expected in (("float16", DType.F32), ("bfloat16", DType.BF16)):
        plan = plan_merge(binding_of(checkpoint, {T5_WO: low_rank(4, 6)}), MergeOptions(dtype=dtype))
        planned = {tensor.spec.name: tensor for tensor in plan.tensors}
        assert planned[T5_WO].spec.dtype is expected
        assert planned[T5_WO].treatment is Treatment.MERGED
        assert planned["two.wow.weight"].treatment is Treatment.CAST


def test_what_is_kept_goes_by_whole_parts_of_the_name_and_by_nested_model_types() -> None:
    nested = {"model_type": "blip-9", "text_config": {"model_type": "mt5"}}
    assert is_kept(T5_WO, nested, DType.F16)
    assert not is_kept(T5_WO, nested, DType.BF16)
    assert not is_kept(T5_WO, nested, DType.F32)
    assert not is_kept("encoder.two.weight", nested, DType.F16)
    assert not is_kept(T5_WO, {"model_type": "llama"}, DType.F16)
    assert is_kept("model.layers.3.mlp.gate.e_score_correction_bias", {"model_type": "deepseek_v3"}, DType.BF16)
    assert not is_kept("model.layers.3.mlp.gateXweight", {"model_type": "beam"}, DType.BF16)


def test_the_table_of_classes_keeps_what_diffusers_keeps() -> None:
    from importlib.util import find_spec

    spec = find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    kept: dict[str, set[str]] = {}
    for path in Path(spec.origin).parent.glob("models/**/*.py"):
        text = path.read_text()
        if "_keep_in_fp32_modules = [" not in text:
            continue
        for cls in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)):
            for node in cls.body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_keep_in_fp32_modules":
                    kept[cls.name] = set(ast.literal_eval(node.value))
    table = {name: set(parts) for names, parts in precision._KEPT_BY_DIFFUSERS for name in names}
    assert table == kept
