"""Many adapters on one base: switched on in onnxruntime, each does what PEFT's unmerged model does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import onnxruntime
import onnxruntime_genai as og
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers.exporters import ExportedModel

from lora_deploy.adapters.open import read_adapter
from lora_deploy.bases import open_base
from lora_deploy.errors import ExportError, IncompatibleAdapterError, OutputExistsError
from lora_deploy.export.execute import Exported
from lora_deploy.export.generate import _adapter_file, greedy_tokens
from lora_deploy.export.options import ExportOptions
from lora_deploy.export.record import read_record
from lora_deploy.pipeline import add_to_export, check_graph_fit, execute_multi_lora, plan_of_multi_lora
from lora_deploy.validate import bind
from tests.builders import merged_values
from tests.parity.exports import assert_close, contents, tokens
from tests.peer.models import llama
from tests.peer.trained import Trained, save_base, train

pytestmark = [pytest.mark.slow]

CONFIGS: dict[str, LoraConfig] = {
    "queries": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]),
    "all": LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={"layers.1.mlp.up_proj": 5},
        alpha_pattern={"v_proj": 7},
    ),
    "some": LoraConfig(r=3, lora_alpha=6, target_modules=["v_proj", "down_proj"], layers_to_transform=[1]),
}
MODELS: dict[str, Callable[[], Any]] = {
    "transformers": lambda: llama(hidden_size=32, head_dim=8),
    "genai": lambda: llama(hidden_size=32, head_dim=16, tie_word_embeddings=True, max_position_embeddings=64),
}


@dataclass(kw_only=True)
class Many:
    """A base, its adapters and its multi-lora exports."""

    layout: str
    base: Path
    trained: Mapping[str, Trained]
    folder: Path
    """With all adapters from the start."""
    begun: Path
    """With one adapter, and inputs for all linear layers."""
    wide: Path
    """With two adapters from the start, and inputs for all linear layers."""

    def run(self, graph: Path, inputs: Mapping[str, Tensor], adapter: str | None) -> dict[str, Tensor]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        feed = {port.name: self._fed(port, inputs) for port in session.get_inputs()}
        chosen = onnxruntime.RunOptions()
        if adapter is not None:
            loaded = onnxruntime.LoraAdapter()
            loaded.Load(str(graph.parent / f"{adapter}.onnx_adapter"))
            chosen.add_active_adapter(loaded)
        names = [port.name for port in session.get_outputs()]
        found = session.run(names, feed, chosen)
        return {name.removeprefix("output."): torch.from_numpy(v) for name, v in zip(names, found, strict=True)}

    def _fed(self, port: Any, inputs: Mapping[str, Tensor]) -> Any:
        name = port.name.removeprefix("input.")
        if name in inputs:
            return inputs[name].numpy()
        return torch.zeros(len(inputs["input_ids"]), 2, 0, 16).numpy()

    def expected(self, adapter: str | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """PEFT's unmerged logits, or the base's."""
        model = self.trained["all"].bare if adapter is None else self.trained[adapter].model
        with torch.no_grad():
            logits: Tensor = model(**inputs).logits
        return logits


def exported(many: Mapping[str, Path], base: Path, out: Path, layout: str, targets: Sequence[str] = ()) -> Exported:
    named = [f"{name}={path}" for name, path in many.items()]
    options = ExportOptions(layout=layout)
    return execute_multi_lora(plan_of_multi_lora(named, base=base, targets=targets, export_options=options), out)


@pytest.fixture(scope="module", params=MODELS)
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Many:
    root, layout = tmp_path_factory.mktemp(request.param), request.param
    model = MODELS[layout]()
    base = save_base(model, root / "base")
    trained = {name: train(model, config, root / name, base=base) for name, config in CONFIGS.items()}
    paths = {name: found.adapter for name, found in trained.items()}
    two = {name: paths[name] for name in ("all", "queries")}
    folder, begun, wide = root / "many", root / "begun", root / "wide"
    exported(paths, base, folder, layout)
    exported({"queries": paths["queries"]}, base, begun, layout, ["all-linear"])
    assert not exported(two, base, wide, layout, ["all-linear"]).was_done
    again = exported(dict(reversed(two.items())), base, wide, layout, ["all-linear"])
    assert again.was_done, "the order of adapters is no other export"
    return Many(layout=layout, base=base, trained=trained, folder=folder, begun=begun, wide=wide)


def first_graph(many: Many, folder: Path) -> Path:
    return folder / ("model.onnx" if many.layout == "genai" else "prefill.onnx")


def batch(many: Many) -> dict[str, Tensor]:
    found = tokens(2, 9)
    return {**found, "position_ids": torch.arange(9).expand(2, 9)}


@pytest.mark.parametrize("adapter", [None, *CONFIGS])
def test_each_adapter_says_what_its_unmerged_model_says_and_none_what_the_base_says(
    many: Many, adapter: str | None
) -> None:
    inputs = batch(many)
    found = many.run(first_graph(many, many.folder), inputs, adapter)["logits"]
    assert_close(found, many.expected(adapter, inputs).float())
    if adapter is not None:
        base = many.expected(None, inputs)
        assert (many.expected(adapter, inputs) - base).abs().max() > 0.02 * base.abs().max()


@pytest.mark.parametrize("adapter", CONFIGS)
def test_a_file_for_onnxruntime_reads_back_as_the_adapter_that_it_was(many: Many, adapter: str) -> None:
    """Within the rounding of s·B to float32."""
    base = open_base(str(many.base))
    found, expected = (
        merged_values(bind([read_adapter(path)], base))
        for path in (many.folder / f"{adapter}.onnx_adapter", many.trained[adapter].adapter)
    )
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name] - values).abs().max() <= 1e-6 * values.abs().max(), name


def test_decoding_over_a_cache_is_adapted_too(many: Many) -> None:
    ids = tokens(2, 10)["input_ids"]
    positions = torch.arange(10).expand(2, 10)
    for adapter in (None, *CONFIGS):
        first = {"input_ids": ids[:, :9], "attention_mask": torch.ones_like(ids[:, :9])}
        cache = many.run(first_graph(many, many.folder), {**first, "position_ids": positions[:, :9]}, adapter)
        del cache["logits"]
        inputs = {"input_ids": ids[:, 9:], "attention_mask": torch.ones_like(ids), "position_ids": positions[:, 9:]}
        inputs |= {name.replace("present", "past_key_values"): value for name, value in cache.items()}
        graph = many.folder / ("model.onnx" if many.layout == "genai" else "decode.onnx")
        found = many.run(graph, inputs, adapter)["logits"]
        expected = many.expected(adapter, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, 9:]
        assert_close(found, expected.float(), tolerance=5e-5)


def test_an_adapter_that_comes_later_leaves_the_folder_as_if_it_had_been_there(many: Many, tmp_path: Path) -> None:
    folder = tmp_path / "begun"
    shutil.copytree(many.begun, folder)
    graphs = {name: (folder / name).stat() for name in contents(folder, "*.onnx", "*.data")}
    added = add_to_export(folder, f"all={many.trained['all'].adapter}", base=many.base)
    assert set(added.record.multi_lora.adapters) == {"all", "queries"}  # type: ignore[union-attr]
    assert contents(folder) == contents(many.wide)
    assert all((folder / name).stat() == before for name, before in graphs.items())
    assert add_to_export(folder, f"all={many.trained['all'].adapter}", base=many.base).was_done
    inputs = batch(many)
    assert_close(many.run(first_graph(many, folder), inputs, "all")["logits"], many.expected("all", inputs).float())


def test_a_name_that_is_taken_needs_fresh(many: Many, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    shutil.copytree(many.wide, folder)
    other = f"all={many.trained['some'].adapter}"
    with pytest.raises(OutputExistsError, match="another adapter has this name"):
        add_to_export(folder, other, base=many.base)
    assert contents(folder) == contents(many.wide)
    add_to_export(folder, other, base=many.base, fresh=True)
    inputs = batch(many)
    assert_close(many.run(first_graph(many, folder), inputs, "all")["logits"], many.expected("some", inputs).float())


def test_what_has_no_inputs_is_listed_whole(many: Many, tmp_path: Path) -> None:
    """Inputs are for what the adapters change: of ``some``, a graph for ``queries`` knows nothing."""
    record = json.loads((many.folder / "export.json").read_text())
    inputs = record["lora_deploy"]["multi_lora"]["inputs"]
    assert len(inputs) == 14
    assert {entry["dtype"] for entry in inputs.values()} == {"F32"}
    folder = tmp_path / "narrow"
    shutil.copytree(many.folder, folder)
    for name in [name for name in inputs if "q_proj" not in name]:
        del inputs[name]
    (folder / "export.json").write_text(json.dumps(record))
    for check in (
        lambda: check_graph_fit(many.trained["some"].adapter, folder),
        lambda: add_to_export(folder, f"new={many.trained['some'].adapter}", base=many.base),
    ):
        with pytest.raises(IncompatibleAdapterError) as caught:
            check()
        assert [finding.code for finding in caught.value.findings] == ["no-input"] * 2
        assert {finding.target for finding in caught.value.findings} == {
            "model.layers.1.self_attn.v_proj.weight",
            "model.layers.1.mlp.down_proj.weight",
        }


def test_what_needs_another_graph_is_refused_before_one_is_made(tmp_path: Path) -> None:
    """A head that is untied, trained biases, and a module that is saved whole, all of it listed."""
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["norm"], bias="lora_only")
    model = llama(tie_word_embeddings=True, attention_bias=True)
    trained = train(model, config, tmp_path)
    with pytest.raises(IncompatibleAdapterError) as caught:
        plan_of_multi_lora(trained.adapter, base=trained.base)
    found = {(finding.code, finding.target) for finding in caught.value.findings}
    assert {
        ("changes-config", "config.json"),
        ("changes-structure", "lm_head.weight"),
        ("kind-replacement", "model.layers.0.self_attn.q_proj.bias"),
        ("kind-replacement", "model.norm.weight"),
    } <= found
    assert ("kind-replacement", "model.layers.0.self_attn.q_proj.weight") not in found


@pytest.mark.parametrize("adapter", CONFIGS)
def test_the_record_says_what_each_adapter_is(many: Many, adapter: str) -> None:
    record = json.loads((many.folder / "export.json").read_text())["lora_deploy"]
    found = record["multi_lora"]["adapters"][adapter]
    peft = json.loads((many.trained[adapter].adapter / "adapter_config.json").read_text())
    layers = {
        name.removeprefix("base_model.model.") + ".weight": module
        for name, module in many.trained[adapter].model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found["factors"] == {
        name: {"rank": layer.r["default"], "scales": [layer.scaling["default"]]} for name, layer in layers.items()
    }
    assert found["file"] in [file["path"] for file in record["artifacts"]]
    assert len(found["sha256"]) == len(found["config_sha256"]) == 64
    assert peft["r"] in {entry["rank"] for entry in found["factors"].values()}


def test_a_file_fits_the_graphs_that_it_was_made_for(many: Many) -> None:
    for adapter in CONFIGS:
        by_reader = check_graph_fit(many.trained[adapter].adapter, many.folder)
        by_file = check_graph_fit(many.folder / f"{adapter}.onnx_adapter", first_graph(many, many.folder))
        assert dict(by_reader.ranks) == dict(by_file.ranks)
        assert by_reader.n_ports == by_file.n_ports == 14


@pytest.mark.parametrize("many", ["genai"], indirect=True)
def test_onnxruntime_genai_switches_adapters(many: Many) -> None:
    model = og.Model(str(many.folder))
    adapters = og.Adapters(model)
    for name in CONFIGS:
        adapters.load(str(many.folder / f"{name}.onnx_adapter"), name)
    prompt = [7, 11, 23, 9, 30]
    for name in ("all", None, "queries", "some"):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=17, min_length=17, do_sample=False)
        generator = og.Generator(model, parameters)
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        assert list(map(int, generator.get_sequence(0))) == greedy(many, name, prompt, 17), name


@pytest.mark.parametrize("many", ["transformers"], indirect=True)
def test_transformers_loads_the_base_of_it(many: Many) -> None:
    inputs = batch(many)
    runners = ExportedModel.from_pretrained(many.folder, device="cpu").runners
    assert_close(runners["prefill"](**inputs).logits, many.expected(None, inputs).float())


def test_try_hears_the_adapter_that_it_names(many: Many) -> None:
    prompt = [7, 11, 23]
    record = read_record(many.folder)
    for name in (None, *CONFIGS):
        file = many.folder / f"{name}.onnx_adapter" if name else None
        found = list(islice(greedy_tokens(many.folder, record, prompt, 9, adapter=file), 6))
        assert prompt + found == greedy(many, name, prompt, 9), name
    with pytest.raises(ExportError, match="has no adapter nobody; it has all, queries, some"):
        _adapter_file(many.folder, record, "nobody")


def greedy(many: Many, adapter: str | None, prompt: Sequence[int], length: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < length:
        ids.append(int(many.expected(adapter, {"input_ids": torch.tensor([ids])})[0, -1].argmax()))
    return ids
