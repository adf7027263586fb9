"""Tuners that multiply, turn or replace: every layer class that they adapt, against PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_deploy.adapters.open import read_adapter
from lora_deploy.bases import open_base
from lora_deploy.errors import IncompatibleAdapterError, LoraDeployError
from lora_deploy.validate import BindOptions, bind
from tests.peer.models import conv1d, llama, token_ids, toy
from tests.peer.trained import (
    assert_merges_as_trained,
    assert_rounded_once,
    merge,
    peft_advice_unheard,
    tensors_of,
    train,
)

Make = Callable[[], nn.Module]


def config(kind: str, **options: Any) -> PeftConfig:
    with peft_advice_unheard():
        return getattr(peft, f"{kind}Config")(**{"target_modules": ["a", "b", "c"], **options})


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def linear() -> nn.Module:
    """Wide, high and square, one without a bias."""
    return toy(a=nn.Linear(8, 16), b=nn.Linear(16, 16, bias=False), c=nn.Linear(16, 8))


def transposed() -> nn.Module:
    return toy(a=conv1d(8, 16), b=conv1d(16, 16), c=conv1d(16, 8))


def convolutions(kernel: int = 3) -> nn.Module:
    return toy(a=nn.Conv2d(4, 8, kernel, padding=1), b=nn.Conv2d(8, 8, kernel, padding=1), c=nn.Conv2d(8, 4, kernel))


def convolutions_1d() -> nn.Module:
    """For LoKr also with more outputs than inputs of a factor, so that no order of axes is like another."""
    return toy(a=nn.Conv1d(4, 24, 3, padding=1), b=nn.Conv1d(24, 8, 3, padding=1), c=nn.Conv1d(8, 6, 5))


NOISE = {"OFT": 2e-6, "LoHa": 2e-7}
"""PEFT makes OFT's matrices in float32, and multiplies LoHa's by a scale in float32."""


LINEAR = [
    ("LoHa", {"r": 3, "alpha": 5}),
    ("LoHa", {"r": 3, "alpha": 5, "rank_pattern": {"b": 2}, "alpha_pattern": {"c": 7}}),
    ("LoKr", {"r": 2, "alpha": 5}),
    ("LoKr", {"r": 2, "alpha": 5, "decompose_both": True, "decompose_factor": 4}),
    ("LoKr", {"r": 64, "alpha": 5}),
    ("IA3", {"feedforward_modules": ["b"]}),
    ("IA3", {"feedforward_modules": []}),
    ("OFT", {"oft_block_size": 4}),
    ("OFT", {"oft_block_size": 4, "use_cayley_neumann": False}),
    ("OFT", {"oft_block_size": 4, "num_cayley_neumann_terms": 2}),
    ("OFT", {"oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    ("OFT", {"oft_block_size": 4, "num_cayley_neumann_terms": 7}),
    ("OFT", {"oft_block_size": 4, "block_share": True}),
    ("OFT", {"oft_block_size": 4, "coft": True, "eps": 0.3}),
    ("BOFT", {"boft_block_size": 4}),
    ("HRA", {"r": 3}),
    ("HRA", {"r": 4, "apply_GS": True}),
    ("Road", {"variant": "road_1", "group_size": 4}),
    ("Road", {"variant": "road_2", "group_size": 8}),
    ("Road", {"variant": "road_4", "group_size": 4}),
    ("Hira", {"r": 3}),
    ("Glora", {"r": 3}),
    ("Glora", {"r": 3, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    ("Glora", {"r": 3, "config_A_B": "constant", "config_C": "none", "config_D_E": "constant"}),
    ("Glora", {"r": 3, "config_A_B": "none", "config_D_E": "none"}),
    ("Glora", {"r": 3, "config_C": "none", "config_D_E": "none"}),
    ("AdaLora", {"init_r": 5, "target_r": 3, "lora_alpha": 7, "total_step": 10}),
]
TRANSPOSED = [
    ("IA3", {"feedforward_modules": ["b"], "fan_in_fan_out": True}),
    ("Hira", {"r": 3, "fan_in_fan_out": True}),
]
CONVOLUTIONS = [
    ("LoHa", {"r": 3, "alpha": 5}),
    ("LoHa", {"r": 3, "alpha": 5, "use_effective_conv2d": True}),
    ("LoKr", {"r": 2, "alpha": 5}),
    ("LoKr", {"r": 2, "alpha": 5, "use_effective_conv2d": True}),
    ("LoKr", {"r": 64, "alpha": 5}),
    ("IA3", {"feedforward_modules": ["b"]}),
    ("Hira", {"r": 3}),
    ("HRA", {"r": 3}),
    ("BOFT", {"boft_block_size": 4}),
]
CONVOLUTIONS_1D = [
    ("LoHa", {"r": 3, "alpha": 5}),
    ("LoHa", {"r": 3, "alpha": 5, "use_effective_conv2d": True}),
    ("LoKr", {"r": 1, "alpha": 5, "decompose_both": True}),
    ("LoKr", {"r": 2, "alpha": 5, "use_effective_conv2d": True}),
    ("LoKr", {"r": 64, "alpha": 5}),
]


def named(kind: str, options: dict[str, Any], layers: str) -> str:
    return f"{kind} on {layers}: " + ", ".join(f"{name} {value}" for name, value in options.items())


CASES = [
    *(pytest.param(kind, options, linear, (5, 8), id=named(kind, options, "Linear")) for kind, options in LINEAR),
    *(
        pytest.param(kind, options, transposed, (5, 8), id=named(kind, options, "Conv1D"))
        for kind, options in TRANSPOSED
    ),
    *(
        pytest.param(kind, options, convolutions, (2, 4, 9, 9), id=named(kind, options, "Conv2d"))
        for kind, options in CONVOLUTIONS
    ),
    *(
        pytest.param(kind, options, convolutions_1d, (2, 4, 9), id=named(kind, options, "Conv1d"))
        for kind, options in CONVOLUTIONS_1D
    ),
]


@pytest.mark.parametrize(("kind", "options", "make", "shape"), CASES)
def test_a_tuner_merges_to_what_peft_0_21_2_merges_and_computes_what_it_was_trained_to(
    kind: str, options: dict[str, Any], make: Make, shape: tuple[int, ...], tmp_path: Path
) -> None:
    trained = train(make(), config(kind, **options), tmp_path)
    assert_merges_as_trained(trained, {"x": numbers(*shape)}, tmp_path / "out", noise=NOISE.get(kind, 0))


def test_layer_norms_tokens_and_biases_are_what_training_left(tmp_path: Path) -> None:
    trained = train(llama(), config("LNTuning", target_modules=["input_layernorm", "norm"]), tmp_path / "norms")
    assert_merges_as_trained(trained, token_ids(), tmp_path / "norms-out")
    tokens = config("TrainableTokens", target_modules=["embed_tokens"], token_indices=[3, 0, 7])
    trained = train(llama(), tokens, tmp_path / "tokens")
    assert_merges_as_trained(trained, token_ids(), tmp_path / "tokens-out")
    trained = train(
        toy(a=nn.Linear(8, 4), b=nn.Linear(4, 6)), config("Beft", target_modules=["a", "b"]), tmp_path / "b"
    )
    assert_merges_as_trained(trained, {"x": numbers(5, 8)}, tmp_path / "b-out")


def test_both_sides_of_tied_embeddings_get_their_trained_rows_once(tmp_path: Path) -> None:
    tokens = config("TrainableTokens", target_modules=["embed_tokens"], token_indices=[1, 5])
    trained = train(llama(tie_word_embeddings=True), tokens, tmp_path)
    assert_merges_as_trained(trained, token_ids(), tmp_path / "out")


def test_a_butterfly_of_several_stages_is_that_of_the_papers_matrices(tmp_path: Path) -> None:
    """PEFT needs a CUDA extension for this: M is written out here as its layer does with one."""
    from lora_deploy.adapters.tuners.boft import butterfly

    size, block, n_stages = 16, 4, 3
    trained = train(toy(a=nn.Linear(size, 6)), config("BOFT", target_modules=["a"], boft_block_size=block), tmp_path)
    generator = torch.Generator().manual_seed(3)
    stored = torch.randn((n_stages, size // block, block, block), generator=generator) * 0.3
    edit(trained.adapter, "boft_R", stored)
    layer = trained.model.base_model.model.a
    whole = torch.eye(size, dtype=torch.float64)
    for stage in range(n_stages):
        perm = layer.block_butterfly_perm(size, size // block // 2**stage, block // 2, n_stages - 1)
        assert torch.equal(perm, butterfly(size, block, stage))
        matrix = layer.perm2mat(perm).double()
        skew = (stored[stage].double() - stored[stage].double().transpose(1, 2)) / 2
        identity = torch.eye(block, dtype=torch.float64)
        blocks = [torch.linalg.solve(identity + s, identity - s, left=False) for s in skew]
        whole = matrix @ torch.block_diag(*blocks) @ matrix.T @ whole
    merge(trained.adapter, trained.base, tmp_path / "out")
    lengths = layer.boft_s["default"].detach().double()
    expected = (trained.bare.a.weight.detach() @ whole.T) * lengths
    found = tensors_of(tmp_path / "out")
    assert_rounded_once({"w": found["a.weight"]}, {"w": expected})
    assert torch.equal(found["a.bias"], tensors_of(trained.base)["a.bias"])


def test_tuners_of_whole_models_merge_as_trained(tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    for kind, options in (("LoHa", {"r": 2}), ("IA3", {"feedforward_modules": ["down_proj"]}), ("HRA", {"r": 2})):
        trained = train(llama(), config(kind, target_modules=targets, **options), tmp_path / kind)
        out = tmp_path / f"{kind}-out"
        assert_merges_as_trained(trained, token_ids(), out, noise=NOISE.get(kind, 0))


def test_an_embedding_is_turned_by_oft(tmp_path: Path) -> None:
    trained = train(
        llama(),
        config("OFT", target_modules=["embed_tokens"], oft_block_size=4),
        tmp_path,
        save_embedding_layers=False,
    )
    assert_merges_as_trained(trained, token_ids(), tmp_path / "out", noise=NOISE["OFT"])


def edit(adapter: Path, part: str, value: Tensor) -> None:
    """Put another tensor into a saved adapter."""
    file = adapter / "adapter_model.safetensors"
    tensors = {name: value if part in name else tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("kind", "options", "part", "value", "message"),
    [
        ("LoHa", {"r": 2}, "hada_w1_b", torch.ones(3, 8), "share no rank"),
        ("LoHa", {"r": 2}, "hada_w1_a", torch.full((4, 2), torch.nan), "NaN"),
        ("LoKr", {"r": 2}, "lokr_w2", torch.ones(5, 7), "does not fit"),
        ("IA3", {"feedforward_modules": []}, "ia3_l", torch.ones(4, 2), "expected a vector"),
        ("OFT", {"oft_block_size": 4}, "oft_R", torch.ones(2, 7), "no triangle of a square"),
        ("BOFT", {"boft_block_size": 4}, "boft_R", torch.ones(2, 2, 4, 3), "square blocks"),
        ("BOFT", {"boft_block_size": 4}, "boft_R", torch.ones(5, 2, 4, 4), "no butterfly"),
        ("HRA", {"r": 2}, "hra_u", torch.zeros(8, 2), "divides by it"),
        ("Glora", {"r": 2}, "glora_A.Xu", torch.ones(3, 8), "the ranks differ"),
        ("Glora", {"r": 2}, "glora_B.Xd", torch.ones(5, 2), r"\[4, 5\] outputs"),
        ("Glora", {"r": 2}, "glora_C.Xd", torch.ones(7, 2), "multiplies the weight by 7 numbers"),
        ("Glora", {"r": 2}, "glora_C.Xu", torch.ones(2, 2), "expected one column"),
        ("Glora", {"r": 2, "config_D_E": "vector"}, "glora_D.X", torch.ones(3), "D fits no bias of 4 outputs"),
        ("Glora", {"r": 2, "config_D_E": "none"}, "glora_D.zeros", torch.ones(4), "not trained, and not zero"),
        ("Road", {"group_size": 4}, "road_theta", torch.ones(3), "a multiple of 2"),
        ("Hira", {"r": 2}, "hira_B", torch.ones(4, 3), "the ranks differ"),
    ],
)
def test_tensors_that_no_peft_writes_are_refused(
    kind: str, options: dict[str, Any], part: str, value: Tensor, message: str, tmp_path: Path
) -> None:
    trained = train(toy(a=nn.Linear(8, 4)), config(kind, target_modules=["a"], **options), tmp_path)
    edit(trained.adapter, part, value)
    with pytest.raises(LoraDeployError, match=message):
        merge(trained.adapter, trained.base, tmp_path / "out")


def test_a_convolution_turned_by_oft_is_merged_as_peft_does_with_a_warning(tmp_path: Path) -> None:
    """PEFT's forward of a kernel of 3×3 is no convolution of that kernel: of 1×1 it is."""
    model = toy(a=nn.Conv2d(4, 8, 3), b=nn.Conv2d(8, 4, 1))
    trained = train(model, config("OFT", target_modules=["a", "b"], oft_block_size=4), tmp_path)
    merge(trained.adapter, trained.base, tmp_path / "out")
    assert_rounded_once(tensors_of(tmp_path / "out"), trained.merged(), noise=NOISE["OFT"])
    binding = bind([read_adapter(trained.adapter)], open_base(str(trained.base)))
    warned = [finding for finding in binding.findings if finding.code == "unlike-training"]
    assert [finding.target for finding in warned] == ["a.weight"]


def test_layers_of_a_model_without_type_are_never_turned_over(tmp_path: Path) -> None:
    """Until peft 0.13, OFT's blocks could be wider than the outputs; their number may then be that of the inputs."""
    trained = train(toy(a=nn.Linear(12, 10)), config("OFT", target_modules=["a"], oft_block_size=4), tmp_path)
    file = trained.adapter / "adapter_model.safetensors"
    save_file({"base_model.model.a.oft_r": torch.randn(3, 4, 4)}, file)
    with pytest.raises(IncompatibleAdapterError, match=r"\(12, \?\), base is \(10, 12\)"):
        merge(trained.adapter, trained.base, tmp_path / "out")


def test_what_multiplies_cannot_be_weighted_or_stacked(tmp_path: Path) -> None:
    trained = train(toy(a=nn.Linear(8, 4)), config("IA3", target_modules=["a"], feedforward_modules=[]), tmp_path)
    with pytest.raises(IncompatibleAdapterError, match="cannot be weighted"):
        merge(trained.adapter, trained.base, tmp_path / "out", bind_options=BindOptions(weights=(0.5,)))
    with pytest.raises(IncompatibleAdapterError, match="each was trained alone"):
        merge([trained.adapter, trained.adapter], trained.base, tmp_path / "out")
