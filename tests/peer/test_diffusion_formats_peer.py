"""Files of diffusion trainers against diffusers: what its loader and ``fuse_lora`` make of the same file.

Every pipeline is tiny and random, the factors are random; names are those that each trainer writes. Where diffusers'
loader is wrong or does not read a format, the updates are computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_deploy import pipeline
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import IncompatibleAdapterError, RecipeError
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.merge.options import MergeOptions
from lora_deploy.names.diffusion import other_names
from lora_deploy.validate import BindOptions
from tests import pipelines as tiny
from tests.peer.test_diffusion_names_peer import renamed

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
KEEP = MergeOptions(dtype="base", n_workers=1)
RANK = 3

Tensors = dict[str, Tensor]
Names = Mapping[str, tuple[str, tuple[int, ...]]]
"""Of adapted modules: what the file calls each, and the shape of its weight."""


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = getattr(tiny, name)(tmp_path_factory.mktemp("pipelines") / name)
        return made[name]

    return make


def loaded(root: Path) -> Any:
    from diffusers import DiffusionPipeline

    found = DiffusionPipeline.from_pretrained(root)
    for part in found.components.values():
        if isinstance(part, nn.Module):
            part.double()
    return found


def adapted_modules(model: nn.Module, wanted: Callable[[str], bool]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and wanted(name):
            yield name, module


def factors(weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Down and up of a layer."""
    kernel = weight.shape[2:]
    down = 0.3 * torch.randn((RANK, *weight.shape[1:]), generator=generator)
    up = 0.3 * torch.randn((weight.shape[0], RANK, *(1 for _ in kernel)), generator=generator)
    return down, up


def kohya_file(
    path: Path, modules: Mapping[str, Tensor], *, alpha: float | None = 2.0, metadata: dict[str, str] | None = None
) -> Path:
    """Write modules by their whole names in the file."""
    generator, tensors = torch.Generator().manual_seed(11), {}
    for name, weight in modules.items():
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = factors(weight, generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


def fused(root: Path, file: Path) -> Any:
    """The pipeline as diffusers fuses the file into it, computed in float64."""
    found = loaded(root)
    found.load_lora_weights(str(file.parent), weight_name=file.name)
    found.fuse_lora()
    found.unload_lora_weights()
    return found


def assert_merged_like(out: Path, expected: Any, components: set[str], base: Path) -> None:
    """Every component's weights are those of the peer, rounded once; the named ones differ from the base's."""
    for component in (path.name for path in out.iterdir() if path.is_dir()):
        model = getattr(expected, component, None)
        if not isinstance(model, nn.Module):
            continue
        found = tensors_in(out / component)
        wanted = {name.replace("base_layer.", ""): t for name, t in model.state_dict().items()}
        before = tensors_in(base / component)
        changed = {name for name in found if not torch.equal(found[name], before[name])}
        assert bool(changed) == (component in components), (component, sorted(changed)[:3])
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=2e-6, atol=2e-7, msg=f"{component} {name}")


def tensors_in(folder: Path) -> Tensors:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def flat(prefix: str, name: str) -> str:
    return f"{prefix}_{name.replace('.', '_')}"


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")


def of_unet(root: Path, prefix: str = "lora_unet", *, kinds: tuple[str, ...] = ATTENTION, ldm: bool = False) -> Tensors:
    """Modules of the UNet by kohya's name: diffusers' names for Stable Diffusion, LDM's for SDXL."""
    unet = loaded(root).unet
    names = {}
    if ldm:
        from tests.peer.test_diffusion_names_peer import specs_of

        parts = other_names(specs_of({name: t.float() for name, t in unet.state_dict().items()}))
        names = {parts[0].tensor: other for other, parts in parts}
    found = {}
    for name, module in adapted_modules(unet, lambda name: name.endswith(kinds)):
        own = names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        found[flat(prefix, own)] = module.weight
    return found


def of_text(model: nn.Module, prefix: str) -> Tensors:
    def wanted(name: str) -> bool:
        return name.endswith(("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"))

    found = {}
    for name, module in adapted_modules(model, wanted):
        full = name if name.startswith("text_model.") else f"text_model.{name}"
        found[flat(prefix, full)] = module.weight
    return found


def test_a_kohya_file_of_stable_diffusion_merges_as_diffusers_fuses_it(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    base = pipelines("stable_diffusion")
    modules = of_unet(base) | of_text(loaded(base).text_encoder, "lora_te")
    file = kohya_file(tmp_path / "style.safetensors", modules)
    pipeline.merge(file, base=base, output=tmp_path / "out", merge_options=KEEP)
    assert_merged_like(tmp_path / "out", fused(base, file), {"unet", "text_encoder"}, base)


def test_a_kohya_file_of_sdxl_names_blocks_as_ldm_and_both_text_encoders(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    """The second text encoder is CLIP-G: both have the same names and, here, shapes."""
    base = pipelines("stable_diffusion_xl")
    text, other = loaded(base).text_encoder, loaded(base).text_encoder_2
    modules = of_unet(base, ldm=True) | of_text(text, "lora_te1") | of_text(other, "lora_te2")
    assert any("input_blocks" in name for name in modules)
    file = kohya_file(tmp_path / "style.safetensors", modules)
    pipeline.merge(file, base=base, output=tmp_path / "out", merge_options=KEEP)
    expected = loaded(base)
    plain = {
        component: by_hand(getattr(expected, component), file, prefix, names)
        for component, prefix, names in (
            ("unet", "lora_unet_", ldm_names(expected.unet)),
            ("text_encoder", "lora_te1_", {}),
            ("text_encoder_2", "lora_te2_", {}),
        )
    }
    for component, tensors in plain.items():
        found = tensors_in(tmp_path / "out" / component)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.double(), tensors[name], rtol=2e-6, atol=2e-7, msg=name)


def ldm_names(unet: nn.Module) -> dict[str, str]:
    from tests.peer.test_diffusion_names_peer import specs_of

    pairs = other_names(specs_of({name: t.float() for name, t in unet.state_dict().items()}))
    return {other.removesuffix(".weight"): parts[0].tensor.removesuffix(".weight") for other, parts in pairs}


def by_hand(model: nn.Module, file: Path, prefix: str, names: Mapping[str, str]) -> Tensors:
    """W + (alpha / r)·up·down for every module of a component, its name looked up without our own index."""
    tensors, state = load_file(file), {name: t.clone() for name, t in model.state_dict().items()}
    flattened = {name.rpartition(".")[0].replace(".", "_"): name for name in state if name.endswith(".weight")}
    flattened |= {other.replace(".", "_"): f"{own}.weight" for other, own in names.items()}
    n_found = 0
    for key in tensors:
        if key.startswith(prefix) and key.endswith(".lora_down.weight"):
            module = key.removesuffix(".lora_down.weight")
            flat_name = module.removeprefix(prefix)
            name = flattened.get(flat_name) or flattened[flat_name.removeprefix("text_model_")]
            down, up = (tensors[f"{module}.lora_{way}.weight"].double() for way in ("down", "up"))
            scale = float(tensors[f"{module}.alpha"]) / down.shape[0]
            state[name] += scale * (up.flatten(1) @ down.flatten(1)).reshape(state[name].shape)
            n_found += 1
    assert n_found
    return state


def test_a_file_of_one_algorithm_for_each_module_is_read_module_by_module(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    """LoHa, LoKr and differences beside LoRA, as merged files have them: each by its own formula."""
    base = pipelines("stable_diffusion")
    unet = loaded(base).unet
    q, k, v = (dict(adapted_modules(unet, lambda n, e=e: n.endswith(f"attn1.{e}"))) for e in ("to_q", "to_k", "to_v"))
    (q_name, q_layer), (k_name, k_layer), (v_name, v_layer) = (next(iter(found.items())) for found in (q, k, v))
    n_out, n_in = q_layer.weight.shape
    draw = torch.Generator().manual_seed(3)
    pairs = {
        name: torch.randn(shape, generator=draw)
        for name, shape in (
            ("hada_w1_a", (n_out, 2)),
            ("hada_w1_b", (2, n_in)),
            ("hada_w2_a", (n_out, 2)),
            ("hada_w2_b", (2, n_in)),
        )
    }
    kron = {"lokr_w1": torch.randn(2, 2, generator=draw), "lokr_w2": torch.randn(n_out // 2, n_in // 2, generator=draw)}
    diff = torch.randn(v_layer.weight.shape, generator=draw)
    tensors = {f"{flat('lora_unet', q_name)}.{slot}": t for slot, t in pairs.items()}
    tensors |= {f"{flat('lora_unet', k_name)}.{slot}": t for slot, t in kron.items()}
    tensors |= {
        f"{flat('lora_unet', q_name)}.alpha": torch.tensor(1.0),
        f"{flat('lora_unet', k_name)}.alpha": torch.tensor(7.0),
        f"{flat('lora_unet', v_name)}.diff": diff,
    }
    save_file(tensors, tmp_path / "mixed.safetensors")
    pipeline.merge(tmp_path / "mixed.safetensors", base=base, output=tmp_path / "out", merge_options=KEEP)
    found = tensors_in(tmp_path / "out" / "unet")
    a, b, c, d = (pairs[name].double() for name in pairs)
    expected = {
        q_name: q_layer.weight + 0.5 * (a @ b) * (c @ d),
        k_name: k_layer.weight + torch.kron(kron["lokr_w1"].double(), kron["lokr_w2"].double()),
        v_name: v_layer.weight + diff.double(),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(found[f"{name}.weight"].double(), tensor.detach(), rtol=1e-6, atol=1e-6)


def test_an_adapter_file_without_alpha_has_scale_one(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    base = pipelines("stable_diffusion")
    file = kohya_file(tmp_path / "style.safetensors", of_unet(base), alpha=None)
    adapter = read_adapter(file)
    assert {update.update.scale.value for update in adapter.updates} == {1.0}  # type: ignore[union-attr]
    given = read_adapter(file, ReadOptions(alpha=6))
    assert {update.update.scale.value for update in given.updates} == {2.0}  # type: ignore[union-attr]


PROJECTIONS = {"to_q": "to_q_lora", "to_k": "to_k_lora", "to_v": "to_v_lora", "to_out.0": "to_out_lora"}


def of_processors(name: str) -> str:
    parent, _, last = name.rpartition(".")
    projection = "to_out.0" if last == "0" else last
    parent = parent.removesuffix(".to_out") if last == "0" else parent
    return f"{parent}.processor.{PROJECTIONS[projection]}"


def of_text_processors(name: str) -> str:
    parent, _, last = name.rpartition(".")
    return f"text_encoder.{parent}.to_{last[0] if last != 'out_proj' else 'out'}_lora"


ATTENDING = ("to_q", "to_k", "to_v", "to_out.0")
GENERATIONS: dict[str, tuple[str, Callable[[str], str], str, str]] = {
    "PEFT's factors": ("unet", lambda name: f"unet.{name}", "lora_A", "lora_B"),
    "lora.down": ("unet", lambda name: f"unet.{name}", "lora.down", "lora.up"),
    "processors": ("unet", lambda name: f"unet.{of_processors(name)}", "down", "up"),
    "processors, without the component": ("unet", of_processors, "down", "up"),
    "PEFT's factors of text": ("text_encoder", lambda name: f"text_encoder.{name}", "lora_A", "lora_B"),
    "lora_linear_layer": (
        "text_encoder",
        lambda name: f"text_encoder.{name}",
        "lora_linear_layer.down",
        "lora_linear_layer.up",
    ),
    "processors of text": ("text_encoder", of_text_processors, "down", "up"),
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_of_diffusers_merges_as_diffusers_fuses_it(
    generation: str, pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    base = pipelines("stable_diffusion")
    component, place, down_name, up_name = GENERATIONS[generation]
    draw, tensors, theirs = torch.Generator().manual_seed(13), {}, {}
    ends = ATTENDING if component == "unet" else ("q_proj", "k_proj", "v_proj", "out_proj")
    for name, module in adapted_modules(getattr(loaded(base), component), lambda name: name.endswith(ends)):
        down, up = factors(module.weight, draw)
        tensors |= {f"{place(name)}.{down_name}.weight": down, f"{place(name)}.{up_name}.weight": up}
        theirs |= {f"{component}.{name}.lora_A.weight": down, f"{component}.{name}.lora_B.weight": up}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file)
    save_file(theirs, tmp_path / "theirs.safetensors")
    pipeline.merge(file, base=base, output=tmp_path / "out", merge_options=KEEP)
    own_loader_reads = generation not in {"processors, without the component", "processors of text"}
    read = file if own_loader_reads else tmp_path / "theirs.safetensors"
    assert_merged_like(tmp_path / "out", fused(base, read), {component}, base)


def test_the_header_of_diffusers_says_the_scale(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    """Diffusers writes the file itself, with ranks and alphas of two components in ``lora_adapter_metadata``."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    base = pipelines("stable_diffusion")
    model = loaded(base)
    unet = LoraConfig(r=3, lora_alpha=7, target_modules=["to_q", "to_v"], rank_pattern={"attn1.to_q": 2})
    text = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], use_rslora=True)
    model.unet.add_adapter(unet)
    model.text_encoder.add_adapter(text)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in (model.unet, model.text_encoder):
            for name, parameter in part.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(model.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(model.text_encoder),
        unet_lora_adapter_metadata=unet.to_dict(),
        text_encoder_lora_adapter_metadata=text.to_dict(),
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    pipeline.merge(file, base=base, output=tmp_path / "out", merge_options=KEEP)
    model.fuse_lora()
    model.unload_lora_weights()
    assert_merged_like(tmp_path / "out", model, {"unet", "text_encoder"}, base)


def flux_modules(root: Path) -> Tensors:
    """Modules of Flux by Black Forest Labs' names, with the shape that each has there."""
    original = renamed({name: t.float() for name, t in loaded(root).transformer.state_dict().items()})
    return {name: t for name, t in original.items() if name.endswith(".weight") and t.ndim == 2 and "norm" not in name}


def flux_merged(root: Path, changed: Mapping[str, Tensor]) -> Tensors:
    """The transformer with some of its tensors replaced, which are given by Black Forest Labs' names."""
    original = renamed({name: t.double() for name, t in loaded(root).transformer.state_dict().items()})
    original = {name: t for name, t in original.items() if ".linear1.qkv." not in name}
    return renamed(original | dict(changed))


def test_flux_in_black_forest_labs_names_merges_into_diffusers_split_layers(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    """Kohya's file: fused query, key, value and ``linear1``, and a final layer whose halves are swapped."""
    base = pipelines("flux")
    modules = {name: t for name, t in flux_modules(base).items() if ".linear1.qkv." not in name}
    assert {"final_layer.adaLN_modulation.1.weight", "single_blocks.0.linear1.weight"} <= modules.keys()
    file = kohya_file(
        tmp_path / "flux.safetensors",
        {flat("lora_unet", name.removesuffix(".weight")): t for name, t in modules.items()},
    )
    pipeline.merge(file, base=base, output=tmp_path / "out", merge_options=KEEP)
    tensors, changed = load_file(file), {}
    for name, weight in modules.items():
        key = flat("lora_unet", name.removesuffix(".weight"))
        down, up = (tensors[f"{key}.lora_{way}.weight"].double() for way in ("down", "up"))
        changed[name] = weight.double() + 2 / RANK * (up @ down)
    expected = flux_merged(base, changed)
    found = tensors_in(tmp_path / "out" / "transformer")
    for name, tensor in expected.items():
        if ".linear1.qkv." not in name:
            torch.testing.assert_close(found[name].double(), tensor, rtol=2e-6, atol=2e-7, msg=name)


@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_oft_of_flux_turns_the_parts_of_fused_layers_one_by_one(
    layout: str, pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    """sd-scripts' own formula: R = (I + Q)(I − Q)⁻¹ in blocks of rows, Q shortened to alpha times the part's rows."""
    root = pipelines("flux")
    base = root if layout == "folder" else single_file(root, {"transformer": ""}, tmp_path / "flux.safetensors")
    modules = flux_modules(root)
    heights = {"double_blocks.0.img_attn.qkv": [16] * 3, "single_blocks.0.linear1": [16] * 3 + [64]}
    draw, tensors, changed, alpha = torch.Generator().manual_seed(13), {}, {}, 0.02
    for module, parts in heights.items():
        key, weight, start = flat("lora_unet", module), modules[f"{module}.weight"].double().clone(), 0
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        for k, height in enumerate(parts):
            blocks = torch.randn(4, height // 4, height // 4, generator=draw)
            tensors[f"{key}.oft_blocks.{k}"] = blocks
            skew = (blocks - blocks.transpose(1, 2)).double()
            skew *= min(1.0, float(torch.tensor(alpha)) * height / float(skew.norm()))
            eye = torch.eye(height // 4, dtype=torch.float64)
            turns = torch.matmul(eye + skew, torch.linalg.inv(eye - skew))
            rows = weight[start : start + height].reshape(4, height // 4, -1)
            weight[start : start + height] = torch.einsum("knm,knp->kmp", turns, rows).flatten(0, 1)
            start += height
        changed[f"{module}.weight"] = weight
    save_file(tensors, tmp_path / "oft.safetensors", {"ss_network_module": "networks.oft_flux"})
    pipeline.merge(tmp_path / "oft.safetensors", base=base, output=tmp_path / "out", merge_options=KEEP)
    found = tensors_in(tmp_path / "out" / "transformer" if layout == "folder" else tmp_path / "out")
    expected = flux_merged(root, changed)
    expected = expected if layout == "folder" else renamed(expected)
    for name, tensor in expected.items():
        if ".linear1.qkv." not in name:
            torch.testing.assert_close(found[name].double(), tensor, rtol=2e-6, atol=2e-7, msg=name)


def test_xlabs_adapts_the_attention_rows_alone(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    base = pipelines("flux")
    modules = flux_modules(base)
    places = {
        "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.processor.qkv_lora2": "double_blocks.0.txt_attn.qkv.weight",
        "double_blocks.0.processor.proj_lora1": "double_blocks.0.img_attn.proj.weight",
        "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj.weight",
        "single_blocks.0.processor.qkv_lora": "single_blocks.0.linear1.qkv.weight",
        "single_blocks.0.processor.proj_lora": "single_blocks.0.linear2.weight",
    }
    draw, tensors, deltas = torch.Generator().manual_seed(13), {}, {}
    for key, name in places.items():
        down, up = factors(modules[name], draw)
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        deltas[name] = up.double() @ down.double()
    save_file(tensors, tmp_path / "xlabs.safetensors")
    pipeline.merge(tmp_path / "xlabs.safetensors", base=base, output=tmp_path / "out", merge_options=KEEP)
    rows = deltas.pop("single_blocks.0.linear1.qkv.weight")
    whole = modules["single_blocks.0.linear1.weight"].double()
    whole[: len(rows)] += rows
    changed = {name: modules[name].double() + delta for name, delta in deltas.items()}
    expected = flux_merged(base, changed | {"single_blocks.0.linear1.weight": whole})
    found = tensors_in(tmp_path / "out" / "transformer")
    for name, tensor in expected.items():
        if ".linear1.qkv." not in name:
            torch.testing.assert_close(found[name].double(), tensor, rtol=2e-6, atol=2e-7, msg=name)


def test_black_forest_labs_own_adapters_bring_biases_and_norms(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    base = pipelines("flux")
    original = renamed({name: t.float() for name, t in loaded(base).transformer.state_dict().items()})
    draw, tensors, changed = torch.Generator().manual_seed(13), {}, {}
    for module in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "img_in"):
        down, up = factors(original[f"{module}.weight"], draw)
        bias = torch.randn(len(up), generator=draw)
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up, f"{module}.lora_B.bias": bias}
        changed[f"{module}.weight"] = original[f"{module}.weight"].double() + up.double() @ down.double()
        changed[f"{module}.bias"] = original[f"{module}.bias"].double() + bias.double()
    norm = "double_blocks.0.txt_attn.norm.key_norm.scale"
    tensors[norm] = torch.randn(original[norm].shape, generator=draw)
    changed[norm] = tensors[norm].double()
    save_file(tensors, tmp_path / "canny.safetensors")
    pipeline.merge(tmp_path / "canny.safetensors", base=base, output=tmp_path / "out", merge_options=KEEP)
    expected = flux_merged(base, changed)
    found = tensors_in(tmp_path / "out" / "transformer")
    for name, tensor in expected.items():
        if ".linear1.qkv." not in name:
            torch.testing.assert_close(found[name].double(), tensor, rtol=2e-6, atol=2e-7, msg=name)


def test_a_control_adapter_does_not_fit_a_base_of_half_its_channels(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    base = pipelines("flux")
    width = flux_modules(base)["img_in.weight"].shape
    tensors = {"img_in.lora_A.weight": torch.ones(2, 2 * width[1]), "img_in.lora_B.weight": torch.ones(width[0], 2)}
    save_file(tensors, tmp_path / "canny.safetensors")
    with pytest.raises(IncompatibleAdapterError, match=r"img_in|x_embedder"):
        pipeline.validate(tmp_path / "canny.safetensors", base=base)


def test_one_part_of_a_file_goes_into_one_model(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    base = pipelines("stable_diffusion")
    modules = of_unet(base) | of_text(loaded(base).text_encoder, "lora_te")
    file = kohya_file(tmp_path / "style.safetensors", modules)
    with pytest.raises(RecipeError, match="several models, text_encoder, unet"):
        pipeline.validate(file, base=base / "unet")
    pipeline.merge(
        file,
        base=base / "unet",
        output=tmp_path / "alone",
        merge_options=KEEP,
        read_options=ReadOptions(adapter_name="unet"),
    )
    pipeline.merge(file, base=base, output=tmp_path / "whole", merge_options=KEEP)
    alone, whole = tensors_in(tmp_path / "alone"), tensors_in(tmp_path / "whole" / "unet")
    assert all(torch.equal(alone[name], whole[name]) for name in whole)
    with pytest.raises(RecipeError, match="nothing for a text_encoder_3"):
        pipeline.validate(file, base=base, read_options=ReadOptions(adapter_name="text_encoder_3"))


def test_a_component_that_the_pipeline_lacks_is_named(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    base = pipelines("stable_diffusion")
    file = kohya_file(tmp_path / "style.safetensors", of_text(loaded(base).text_encoder, "lora_te2"))
    with pytest.raises(IncompatibleAdapterError, match=r"is for the text_encoder_2, .* has"):
        pipeline.validate(file, base=base)


def test_a_name_that_is_no_module_is_an_error_with_the_nearest(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    base = pipelines("stable_diffusion")
    modules = of_unet(base)
    name = next(iter(modules))
    file = kohya_file(tmp_path / "style.safetensors", modules | {f"{name}x": modules[name]})
    with pytest.raises(IncompatibleAdapterError, match=rf"not in base; nearest: .*{name.removeprefix('lora_unet_')}"):
        pipeline.validate(file, base=base)


def test_a_converted_file_merges_into_the_same_weights(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    """Convolutions keep their kernels, components their names: of both text encoders the second."""
    base = pipelines("stable_diffusion_xl")
    modules = of_unet(base, kinds=("to_q", "conv1"), ldm=True) | of_text(loaded(base).text_encoder_2, "lora_te2")
    file = kohya_file(tmp_path / "style.safetensors", modules)
    pipeline.merge(file, base=base, output=tmp_path / "own", merge_options=KEEP)
    with pytest.raises(RecipeError, match="--base says which modules they mean"):
        pipeline.convert(file, "kohya", tmp_path / "nowhere.safetensors")
    made = pipeline.convert(file, "kohya", tmp_path / "made.safetensors", base=base)
    pipeline.merge(made.path, base=base, output=tmp_path / "kohya", merge_options=KEEP)
    with pytest.raises(RecipeError, match="one folder is one component's") as caught:
        pipeline.convert(file, "peft", tmp_path / "nowhere", base=base)
    assert "--adapter-name text_encoder_2" in str(caught.value.hint)
    for component in ("unet", "text_encoder_2"):
        own = tensors_in(tmp_path / "own" / component)
        assert_equal(tensors_in(tmp_path / "kohya" / component), own)
        choice = ReadOptions(adapter_name=component)
        folder = pipeline.convert(file, "peft", tmp_path / component, base=base, read_options=choice).path
        out = tmp_path / f"peft-{component}"
        to = BindOptions(components=(component,))
        pipeline.merge(folder, base=base, output=out, merge_options=KEEP, bind_options=to)
        assert_equal(tensors_in(out / component), own)


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_verify_passes_what_diffusers_fuses_and_names_another_scale(
    dtype: torch.dtype, pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    """Another tool's merge, in its own arithmetic: right with the adapter's scale, wrong with half of it."""
    from diffusers import DiffusionPipeline

    base = pipelines("stable_diffusion")
    modules = of_unet(base) | of_text(loaded(base).text_encoder, "lora_te")
    file = kohya_file(tmp_path / "style.safetensors", modules)
    only = VerifyOptions(only=(Check.REPLAY,))
    for scale, verdict in ((1.0, Verdict.PASS), (0.5, Verdict.FAIL)):
        peer = DiffusionPipeline.from_pretrained(base, torch_dtype=dtype)
        peer.load_lora_weights(str(tmp_path), weight_name=file.name)
        peer.fuse_lora(lora_scale=scale)
        peer.unload_lora_weights()
        peer.save_pretrained(tmp_path / str(scale))
        found = pipeline.verify(tmp_path / str(scale), adapters=file, base=base, options=only)
        assert found.verdict is verdict
    assert found.replay is not None
    assert any("scale" in outcome.message or outcome.factor for outcome in found.replay.outcomes)


def test_magnitudes_of_inputs_have_no_place_in_other_formats(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    base = pipelines("stable_diffusion")
    modules = of_unet(base, kinds=("attn1.to_q",))
    file = kohya_file(tmp_path / "plain.safetensors", modules)
    tensors = load_file(file)
    for name, weight in modules.items():
        tensors[f"{name}.dora_scale"] = torch.rand(1, weight.shape[1]) + 1
    save_file(tensors, file)
    with pytest.raises(RecipeError, match="its magnitudes are those of inputs"):
        pipeline.convert(file, "peft", tmp_path / "made", base=base)


SINGLE_FILES: dict[str, tuple[str, dict[str, str]]] = {
    "stable_diffusion": (
        "stable_diffusion",
        {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."},
    ),
    "stable_diffusion_xl": (
        "stable_diffusion_xl",
        {"unet": "model.diffusion_model.", "text_encoder": "conditioner.embedders.0.transformer."},
    ),
    "flux": ("flux", {"transformer": "model.diffusion_model."}),
    "flux without a prefix": ("flux", {"transformer": ""}),
    "stable_diffusion_3": ("stable_diffusion_3", {"transformer": "model.diffusion_model."}),
}


def single_file(root: Path, prefixes: Mapping[str, str], path: Path) -> Path:
    """The pipeline's models in one file under their original names."""
    tensors = {"first_stage_model.quant_conv.weight": torch.ones(2, 2)}
    for component, prefix in prefixes.items():
        own = {name: t.float() for name, t in getattr(loaded(root), component).state_dict().items()}
        if component == "text_encoder":
            own = {name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in own.items()}
        else:
            original = {name: t for name, t in renamed(own).items() if ".linear1.qkv." not in name}
            same = {name: own[name] for name in ("context_embedder.weight", "context_embedder.bias") if name in own}
            own = original if "double_blocks.0.img_attn.qkv.weight" in original else original | same
        tensors |= {prefix + name: t.clone() for name, t in own.items()}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("layout", SINGLE_FILES)
def test_a_single_file_takes_adapters_in_both_dialects_as_the_pipeline_does(
    layout: str, pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT's factors in diffusers' names: merged into the pipeline and then renamed, or into the single file."""
    name, prefixes = SINGLE_FILES[layout]
    root = pipelines(name)
    base = single_file(root, prefixes, tmp_path / "base.safetensors")
    denoiser = next(iter(prefixes))
    draw, tensors = torch.Generator().manual_seed(17), {}
    ends = ("to_q", "to_k", "to_v", "add_q_proj", "to_out.0", "proj_mlp", "ff.net.2", "norm_out.linear", "conv1")
    for module, layer in adapted_modules(getattr(loaded(root), denoiser), lambda n: n.endswith(ends)):
        down, up = factors(layer.weight, draw)
        tensors |= {f"{denoiser}.{module}.lora_A.weight": down, f"{denoiser}.{module}.lora_B.weight": up}
    save_file(tensors, tmp_path / "adapter.safetensors")
    pipeline.merge(tmp_path / "adapter.safetensors", base=root, output=tmp_path / "folder", merge_options=KEEP)
    pipeline.merge(tmp_path / "adapter.safetensors", base=base, output=tmp_path / "single", merge_options=KEEP)
    found, before = tensors_in(tmp_path / "single"), load_file(base)
    own = tensors_in(tmp_path / "folder" / denoiser)
    expected = {prefixes[denoiser] + other: t for other, t in renamed(own).items() if ".linear1.qkv." not in other}
    assert found.keys() == before.keys()
    assert any(not torch.equal(found[key], before[key]) for key in expected)
    for key, tensor in found.items():
        assert torch.equal(tensor, expected.get(key, before[key])), key


def test_a_single_files_text_encoder_is_named_by_its_prefix(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    name, prefixes = SINGLE_FILES["stable_diffusion"]
    root = pipelines(name)
    base = single_file(root, prefixes, tmp_path / "base.safetensors")
    file = kohya_file(tmp_path / "style.safetensors", of_unet(root) | of_text(loaded(root).text_encoder, "lora_te"))
    pipeline.merge(file, base=root, output=tmp_path / "folder", merge_options=KEEP)
    pipeline.merge(file, base=base, output=tmp_path / "single", merge_options=KEEP)
    found, text = tensors_in(tmp_path / "single"), tensors_in(tmp_path / "folder" / "text_encoder")
    for key, tensor in text.items():
        full = key if key.startswith("text_model.") else f"text_model.{key}"
        assert torch.equal(found[f"cond_stage_model.transformer.{full}"], tensor), key


def test_open_clips_fused_projections_take_their_rows(tmp_path: Path) -> None:
    """CLIP-G in SDXL's single file: query, key and value are rows of one tensor."""
    width, prefix = 8, "conditioner.embedders.1.model.transformer.resblocks.0"
    draw = torch.Generator().manual_seed(3)
    shapes = {
        f"{prefix}.attn.in_proj_weight": (3 * width, width),
        f"{prefix}.attn.in_proj_bias": (3 * width,),
        f"{prefix}.attn.out_proj.weight": (width, width),
        f"{prefix}.mlp.c_fc.weight": (2 * width, width),
        f"{prefix}.mlp.c_proj.weight": (width, 2 * width),
    }
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_file(base, tmp_path / "base.safetensors")
    layer = "lora_te2_text_model_encoder_layers_0"
    modules = {f"{layer}_self_attn_{letter}_proj": torch.empty(width, width) for letter in "qkv"}
    modules[f"{layer}_mlp_fc2"] = base[f"{prefix}.mlp.c_proj.weight"]
    file = kohya_file(tmp_path / "style.safetensors", modules)
    pipeline.merge(file, base=tmp_path / "base.safetensors", output=tmp_path / "out", merge_options=KEEP)
    found, tensors = tensors_in(tmp_path / "out"), load_file(file)
    deltas = {}
    for module in modules:
        down, up = (tensors[f"{module}.lora_{way}.weight"].double() for way in ("down", "up"))
        deltas[module] = 2 / RANK * up @ down
    rows = torch.cat([deltas[f"{layer}_self_attn_{letter}_proj"] for letter in "qkv"])
    expected = {name: t.double() for name, t in base.items()}
    expected[f"{prefix}.attn.in_proj_weight"] += rows
    expected[f"{prefix}.mlp.c_proj.weight"] += deltas[f"{layer}_mlp_fc2"]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=2e-6, atol=2e-7, msg=name)
