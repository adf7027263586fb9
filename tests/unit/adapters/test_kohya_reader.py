"""Files of sd-scripts and LyCORIS: what each key is, where the scale comes from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_deploy.adapter import Adapter, Naming
from lora_deploy.adapters.diffusion.keys import parse
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import (
    MalformedAdapterError,
    NonFiniteTensorError,
    RecipeError,
    UnmergeableAdapterError,
)
from lora_deploy.inspection import inspect_adapter
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.low_rank import LowRank

NAME = "lora_unet_a"


def pair(name: str = NAME, *, alpha: Tensor | float | None = 4.0) -> dict[str, Tensor]:
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 6), f"{name}.lora_up.weight": torch.randn(4, 2)}
    return tensors if alpha is None else tensors | {f"{name}.alpha": torch.as_tensor(alpha)}


def read(folder: Path, tensors: dict[str, Tensor], options: ReadOptions | None = None, **metadata: str) -> Adapter:
    save_file(tensors, folder / "a.safetensors", metadata)
    return read_adapter(folder / "a.safetensors", options)


def scales(adapter: Adapter) -> list[float]:
    return [update.update.scale.value for update in adapter.updates]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("key", "component", "module", "slot"),
    [
        ("lora_unet_down_blocks_0_to_q.lora_down.weight", "unet", "down_blocks_0_to_q", "down"),
        ("lora_te_text_model_q.lora_up.weight", "text_encoder", "text_model_q", "up"),
        ("lora_te1_text_model_q.alpha", "text_encoder", "text_model_q", "alpha"),
        ("lora_te2_text_model_q.alpha", "text_encoder_2", "text_model_q", "alpha"),
        ("lora_te3_encoder_block_0.alpha", "text_encoder_3", "encoder_block_0", "alpha"),
        ("lora_unet_a.hada_w1_a", "unet", "a", "hada_w1_a"),
        ("lora_unet_a.lora_mid.weight", "unet", "a", "mid"),
        ("lora_unet_a.dora_scale", "unet", "a", "magnitude"),
        ("lora_unet_a.a1.weight", "unet", "a", "a1.weight"),
        ("lycoris_blocks_0_q.lokr_w1", None, "blocks_0_q", "lokr_w1"),
        ("diffusion_model.blocks.0.q.lora_down.weight", "unet", "blocks.0.q", "down"),
        ("transformer.blocks.0.q.alpha", "unet", "blocks.0.q", "alpha"),
        ("clip_l.text_model.q.lora_up.weight", "text_encoder", "text_model.q", "up"),
        ("unet.attn1.processor.to_out_lora.up.weight", "unet", "attn1.to_out.0", "up"),
        ("unet.attn1.processor.to_out_lora.alpha", "unet", "attn1.to_out.0", "alpha"),
        ("text_encoder.l.self_attn.to_q_lora.down.weight", "text_encoder", "l.self_attn.q_proj", "down"),
        ("double_blocks.3.processor.proj_lora2.up.weight", None, "double_blocks.3.txt_attn.proj", "up"),
        ("single_blocks.3.processor.qkv_lora.up.weight", None, "single_blocks.3.linear1.qkv", "up"),
    ],
)
def test_a_key_is_component_module_and_slot(key: str, component: str | None, module: str, slot: str) -> None:
    found = parse(key)
    assert found is not None
    assert (next(iter(found.components), None), found.module, found.slot) == (component, module, slot)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_a.weights",
        "lora_unet_a",
        "a.norm.weight2",
        "lora_unet_a_lora_down.weight",
        "lora_unet_a.lora_down.weight.x",
        "weight",
        "",
    ],
)
def test_what_no_trainer_writes_is_no_key(key: str) -> None:
    assert parse(key) is None


def test_each_module_has_its_own_alpha_and_rank(tmp_path: Path) -> None:
    other = {
        "lora_te_b.lora_down.weight": torch.randn(3, 6),
        "lora_te_b.lora_up.weight": torch.randn(4, 3),
        "lora_te_b.alpha": torch.tensor(3),
    }
    adapter = read(tmp_path, pair() | other)
    assert adapter.naming is Naming.FLATTENED
    assert dict(zip((update.target for update in adapter.updates), scales(adapter), strict=True)) == {
        "a.weight": 2.0,
        "b.weight": 1.0,
    }
    assert {update.components[0] for update in adapter.updates} == {"unet", "text_encoder"}


@pytest.mark.parametrize("alpha", [torch.tensor(4), torch.tensor([4.0]), torch.tensor(4.0, dtype=torch.bfloat16)])
def test_alpha_is_one_number_of_any_dtype(tmp_path: Path, alpha: Tensor) -> None:
    assert scales(read(tmp_path, pair(alpha=alpha))) == [2.0]


def test_without_alpha_the_scale_is_one_or_what_the_user_says(tmp_path: Path) -> None:
    assert scales(read(tmp_path, pair(alpha=None))) == [1.0]
    assert scales(read(tmp_path, pair(alpha=None), ReadOptions(alpha=6))) == [3.0]
    assert scales(read(tmp_path, pair(alpha=4.0), ReadOptions(alpha=6))) == [2.0]


def test_an_alpha_of_zero_is_for_the_user_to_explain(tmp_path: Path) -> None:
    with pytest.raises(MalformedAdapterError, match=r"a: alpha is 0") as caught:
        read(tmp_path, pair(alpha=0.0))
    assert caught.value.hint == "say which: --alpha 2 is scale 1"
    assert scales(read(tmp_path, pair(alpha=0.0), ReadOptions(alpha=2))) == [1.0]


def test_a_magnitudes_shape_says_what_it_is_for(tmp_path: Path) -> None:
    """Rows (out, 1) or columns (1, in), even where the matrix is square."""
    square = {f"{NAME}.lora_down.weight": torch.randn(2, 4), f"{NAME}.lora_up.weight": torch.randn(4, 2)}
    for shape, axis in (((4, 1), "rows"), ((1, 4), "columns")):
        (update,) = read(tmp_path, square | {f"{NAME}.dora_scale": torch.rand(shape)}).updates
        assert isinstance(update.update, Dora)
        assert update.update.axis == axis
    (update,) = read(tmp_path, pair() | {f"{NAME}.dora_scale": torch.rand(1, 6)}).updates
    assert isinstance(update.update, Dora)
    assert update.method == "LoRA with DoRA"


def test_a_core_tensor_is_folded_into_the_lower_factor(tmp_path: Path) -> None:
    down, up, core = torch.randn(2, 6, 1, 1), torch.randn(4, 3, 1, 1), torch.randn(3, 2, 3, 3)
    tensors = {f"{NAME}.lora_down.weight": down, f"{NAME}.lora_up.weight": up, f"{NAME}.lora_mid.weight": core}
    (update,) = read(tmp_path, tensors).updates
    assert isinstance(update.update, LowRank)
    expected = torch.einsum("ijkl,oi,jp->opkl", core.double(), up[:, :, 0, 0].double(), down[:, :, 0, 0].double())
    assert torch.allclose(update.update.delta(), expected.flatten(1))


def test_inspect_says_what_the_trainer_calls_it(tmp_path: Path) -> None:
    header = {"ss_network_module": "networks.lora\n\x1b[31m", "ss_network_dim": "2", "ss_network_alpha": "None"}
    found = inspect_adapter(read(tmp_path, pair(), **header))
    assert found.trained_with == "network networks.lora[31m, dim 2"
    assert [(module.component, module.method) for module in found.modules] == [("unet", "LoRA")]


FAULTS: dict[str, tuple[dict[str, Tensor], type[Exception], str]] = {
    "a factor without its other": ({f"{NAME}.lora_down.weight": torch.ones(2, 6)}, MalformedAdapterError, "no up"),
    "ranks that differ": (
        {f"{NAME}.lora_down.weight": torch.ones(2, 6), f"{NAME}.lora_up.weight": torch.ones(4, 3)},
        MalformedAdapterError,
        "the ranks differ",
    ),
    "a number": ({f"{NAME}.lora_down.weight": torch.ones(()), **pair()}, MalformedAdapterError, "at least 2 sides"),
    "an alpha alone": ({f"{NAME}.alpha": torch.ones(())}, MalformedAdapterError, "alpha without the tensors"),
    "an alpha of several": (pair(alpha=torch.ones(2)), MalformedAdapterError, "expected one number"),
    "an alpha of NaN": (pair(alpha=torch.tensor(torch.nan)), NonFiniteTensorError, "NaN"),
    "an empty factor": (
        {f"{NAME}.lora_down.weight": torch.ones(0, 6), f"{NAME}.lora_up.weight": torch.ones(4, 0)},
        MalformedAdapterError,
        "is empty",
    ),
    "a magnitude of the wrong side": (
        pair() | {f"{NAME}.dora_scale": torch.rand(5, 1)},
        MalformedAdapterError,
        r"magnitude has shape \(5, 1\)",
    ),
    "a matrix of magnitudes": (pair() | {f"{NAME}.dora_scale": torch.rand(4, 6)}, MalformedAdapterError, "magnitude"),
    "an unknown tensor": (pair() | {f"{NAME}.gate": torch.ones(1)}, MalformedAdapterError, "no tensor that sd-scripts"),
    "T-LoRA": (
        {f"{NAME}.q_layer.weight": torch.ones(2, 6), f"{NAME}.p_layer.weight": torch.ones(4, 2)},
        UnmergeableAdapterError,
        "T-LoRA masks ranks by the time step",
    ),
    "OFT of parts that the layer does not have": (
        {"lora_unet_double_blocks_0_img_attn_qkv.oft_blocks.0": torch.ones(2, 2, 2)},
        MalformedAdapterError,
        "expected oft_blocks for each of 3 parts",
    ),
    "OFT of parts of no fused layer": (
        {f"{NAME}.oft_blocks.0": torch.ones(2, 2, 2)},
        MalformedAdapterError,
        "expected oft_blocks for each of 0 parts",
    ),
    "blocks that are not square": ({f"{NAME}.oft_blocks": torch.ones(2, 3, 2)}, MalformedAdapterError, "square blocks"),
    "a butterfly that does not close": (
        {f"{NAME}.oft_blocks": torch.ones(4, 3, 2, 2)},
        MalformedAdapterError,
        "have no stage",
    ),
    "a rescale of another size": (
        {f"{NAME}.oft_blocks": torch.ones(2, 2, 2), f"{NAME}.rescale": torch.ones(5, 1)},
        MalformedAdapterError,
        "rescale has 5 elements",
    ),
    "Kronecker factors of three axes": (
        {f"{NAME}.lokr_w1": torch.ones(2, 2, 2), f"{NAME}.lokr_w2": torch.ones(2, 2)},
        MalformedAdapterError,
        "expected a matrix",
    ),
    "IA3 without its factors": ({f"{NAME}.on_input": torch.tensor(0)}, MalformedAdapterError, "no weight"),
    "GLoRA with a core": (
        {f"{NAME}.{n}.weight": torch.ones(2, 2) for n in ("a1", "a2", "b1", "b2", "bm")},
        UnmergeableAdapterError,
        "core tensor",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_breaks_the_rules_is_named(fault: str, tmp_path: Path) -> None:
    tensors, error, message = FAULTS[fault]
    if fault == "a number":
        tensors = pair() | {f"{NAME}.lora_down.weight": torch.ones(())}
    with pytest.raises(error, match=message):
        read(tmp_path, tensors)


def test_two_keys_of_one_slot_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(MalformedAdapterError, match="are both down of a"):
        read(tmp_path, pair() | {f"{NAME}.lora_A.weight": torch.ones(2, 6)})


def test_a_limit_of_zero_turns_nothing_in_sd_scripts_and_is_none_in_lycoris(tmp_path: Path) -> None:
    tensors = {f"{NAME}.oft_blocks": torch.randn(2, 2, 2), f"{NAME}.alpha": torch.tensor(0.0)}
    with pytest.raises(UnmergeableAdapterError, match="sd-scripts' OFT turns nothing then"):
        read(tmp_path, tensors, ss_network_module="networks.oft")
    assert len(read(tmp_path, tensors, ss_network_module="lycoris.kohya").updates) == 1


def test_a_choice_of_component_leaves_the_others_and_says_so(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair() | pair("lora_te_b"), ReadOptions(adapter_name="text_encoder"))
    assert [update.target for update in adapter.updates] == ["b.weight"]
    assert [finding.code for finding in adapter.findings] == ["unused-tensors"]
    with pytest.raises(RecipeError, match="nothing for a text_encoder_2 in the file, it holds text_encoder, unet"):
        read(tmp_path, pair() | pair("lora_te_b"), ReadOptions(adapter_name="text_encoder_2"))


def test_factors_of_zero_are_untrained(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair() | {f"{NAME}.lora_up.weight": torch.zeros(4, 2)})
    assert [finding.code for finding in adapter.findings] == ["untrained"]
