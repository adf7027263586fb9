"""Real adapters of strangers: each file of the corpus reads as the table says, or is refused for the table's reason.

The tables lie beside this file: ``weights.tsv`` for whole files, ``configs.tsv`` for every adapter_config.json. What
they say of the files that read is checked once more against the corpus' own index, which other tools wrote.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.adapter import Adapter
from lora_deploy.adapters.interface import AdapterFile, ReadOptions
from lora_deploy.adapters.mlx import READER as MLX
from lora_deploy.adapters.open import open_adapter, read_adapter, read_config
from lora_deploy.adapters.peft.config import PeftConfig, parse_config, refuse_unmergeable
from lora_deploy.adapters.peft.reader import READER as PEFT
from lora_deploy.adapters.tuners import TUNERS
from lora_deploy.adapters.tuners.config import parse_config as parse_tuner_config
from lora_deploy.adapters.unsupported import refuse_configuration
from lora_deploy.errors import InputError, MalformedAdapterError
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement

CONFIG_NAME = "adapter_config.json"


def table(name: str) -> dict[str, list[str]]:
    with (Path(__file__).parent / name).open(newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if not row[0].startswith("#")]
    return {row[0]: row[1:] for row in rows}


WEIGHTS = table("weights.tsv")
CONFIGS = table("configs.tsv")
CHANGES_THE_MERGE = (
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "bias",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "init_lora_weights",
    "kasa_config",
    "use_bdlora",
    "enable_lora",
)


# ------------------------------------------------------------------------------------------------------- whole files


def test_the_table_of_weights_names_every_file(corpus: Path) -> None:
    folder = corpus / "adapters"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in found if not name.endswith((CONFIG_NAME, "index.jsonl"))} == set(WEIGHTS)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_real_file_reads_or_is_refused_as_the_table_says(corpus: Path, name: str) -> None:
    outcome, told, *rest = WEIGHTS[name]
    path = corpus / "adapters" / name
    if outcome.endswith("Error"):
        with pytest.raises(InputError) as caught:
            read_adapter(path, ReadOptions())
        assert type(caught.value).__name__ == outcome
        assert told in caught.value.message
        return
    adapter = read_adapter(path, ReadOptions())
    assert [adapter.format, *_row(adapter)] == [outcome, told, *rest]
    used = [key for update in adapter.updates for key in update.keys]
    used += adapter.model_wide.keys if adapter.model_wide else ()
    assert {*used} == {*open_adapter(path).tensors}


@pytest.mark.parametrize("name", [name for name, row in WEIGHTS.items() if row[0] == "peft" and row[1]])
def test_what_is_read_agrees_with_the_index_of_the_corpus(corpus: Path, name: str) -> None:
    facts = next(row for row in _index(corpus / "adapters") if _path_in_corpus(row) == name)
    adapter = read_adapter(corpus / "adapters" / name, ReadOptions())
    ranks = Counter(str(update.update.rank) for update in adapter.updates if isinstance(update.update, LowRank))
    heads = [key for update in adapter.updates if isinstance(update.update, Replacement) for key in update.keys]
    assert dict(ranks) == facts["ranks"]
    assert sorted(heads) == sorted(facts["extra_keys"] or [])
    assert len({key for update in adapter.updates for key in update.keys}) == facts["n_tensors"]
    assert adapter.sha256 == facts["sha256"]
    zero = any("all zero" in note for note in facts["notes"] or [])
    assert zero == any(finding.code == "untrained" for finding in adapter.findings)


def test_loralibs_own_example_reads_with_the_alpha_it_was_trained_with(corpus: Path) -> None:
    path = corpus / "adapters/microsoft__LoRA/examples/NLU/roberta_base_lora_mnli.bin"
    with pytest.raises(MalformedAdapterError) as caught:
        read_adapter(path, ReadOptions())
    assert "--alpha 8 is scale 1, --alpha 16 is scale 2" in str(caught.value.hint)
    adapter = read_adapter(path, ReadOptions(alpha=16))
    kinds = Counter(update.update.kind for update in adapter.updates if not hasattr(update.update, "nesting"))
    assert (adapter.format, kinds) == ("state-dict", {"low-rank": 24, "replacement": 4})
    scales = {update.update.scale.value for update in adapter.updates if isinstance(update.update, LowRank)}
    assert scales == {2.0}


def test_a_folder_with_a_configuration_only_says_that_the_weights_are_missing(corpus: Path) -> None:
    folders = [path.parent for path in (corpus / "adapters").rglob(CONFIG_NAME)]
    bare = [
        folder for folder in folders if not any(name.startswith(f"{_relative(corpus, folder)}/") for name in WEIGHTS)
    ]
    assert len(bare) == 7
    for folder in bare:
        with pytest.raises(MalformedAdapterError, match="no weights, expected"):
            read_adapter(folder, ReadOptions())


# ------------------------------------------------------------------------------------------------------ configurations


def test_the_table_of_configurations_names_every_file(corpus: Path) -> None:
    found = [*(corpus / "configs").glob("*.json"), *(corpus / "adapters").rglob(CONFIG_NAME)]
    assert {path.relative_to(corpus).as_posix() for path in found} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_real_configuration_is_accepted_or_refused_as_the_table_says(corpus: Path, name: str) -> None:
    outcome, told, *rest = CONFIGS[name]
    if outcome == "tuner":
        tuner = next(entry for entry in TUNERS if entry.name == told).load()
        raw = read_config(corpus / name)
        refuse_configuration(corpus / name, raw)
        assert parse_tuner_config(tuner.config, raw, corpus / name).peft_type == told
        return
    if outcome == "mlx":
        config, parameters = _mlx(corpus / name)
        assert [str(parameters.get(field, "-")) for field in ("rank", "scale", "alpha")] == [told, *rest]
        assert "peft_type" not in config
        return
    if outcome.endswith("Error"):
        with pytest.raises(InputError) as caught:
            _accepted(corpus / name)
        assert type(caught.value).__name__ == outcome
        assert told in caught.value.message
        return
    config = _accepted(corpus / name)
    assert [str(config.r), str(config.lora_alpha), _unusual(config)] == [told, *rest]


def test_every_lora_configuration_of_the_index_is_accepted_with_its_rank_and_alpha(corpus: Path) -> None:
    facts = {f"configs/{row['file']}": row for row in _index(corpus / "configs")}
    lora = {name: row for name, row in facts.items() if row["peft_type"] == "LORA"}
    assert len(lora) == 90
    for name, row in lora.items():
        assert CONFIGS[name][:3] == ["peft", str(row["r"]), str(row["lora_alpha"])], name


def _mlx(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a configuration of mlx-lm as its reader does."""
    raw = dict(read_config(path))
    fields: dict[str, Any] = {"path": path, "name": "a", "tensors": {}, "metadata": {}, "sha256": "0"}
    file = AdapterFile(config=raw, config_path=path, **fields)
    assert MLX.recognises(file)
    assert not PEFT.recognises(file)
    return raw, dict(raw["lora_parameters"])


def _accepted(path: Path) -> PeftConfig:
    raw = read_config(path)
    refuse_configuration(path, raw)
    tuner = next((entry for entry in TUNERS if entry.name == raw.get("peft_type")), None)
    if tuner is not None:
        parse_tuner_config(tuner.load().config, raw, path)
    config = parse_config(raw, path)
    refuse_unmergeable(config, path, base_is_residual=False)
    return config


def _unusual(config: PeftConfig) -> str:
    """Name the fields that change the merge and are not at PEFT's default; a false initialisation changes nothing."""
    default = PeftConfig()
    names = [name for name in CHANGES_THE_MERGE if getattr(config, name) != getattr(default, name)]
    return " ".join(name for name in names if getattr(config, name) is not False) or "-"


def _row(adapter: Adapter) -> list[str]:
    found: list[Any] = [update.update for update in adapter.updates]
    kinds = Counter(update.kind for update in found)
    return [
        " ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
        ",".join(map(str, sorted({update.rank for update in found if isinstance(update, LowRank)}))),
        "; ".join(sorted({update.scale.source for update in found if isinstance(update, LowRank)})),
        " ".join(finding.code for finding in adapter.findings) or "-",
        adapter.base_hint.name or "-",
    ]


def _index(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def _path_in_corpus(row: dict[str, Any]) -> str:
    return f"{row['repo'].replace('/', '__')}/{row['path']}"


def _relative(corpus: Path, folder: Path) -> str:
    return folder.relative_to(corpus / "adapters").as_posix()
