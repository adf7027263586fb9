"""Files of LyCORIS: every algorithm on every layer class that it adapts, against LyCORIS 4.1.3's own forward pass.

The modules are LyCORIS' own, their parameters random and none at its start; they write the file, and say what the layer
computes with them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.peer.models import toy
from tests.peer.trained import merge, tensors_of

with torch.no_grad():
    logging.getLogger("LyCORIS").setLevel(logging.CRITICAL)
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.full import FullModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.ia3 import IA3Module
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule
    from lycoris.modules.norms import NormModule

DORA = {"weight_decompose": True}
COLUMNS = {"weight_decompose": True, "wd_on_out": False}
CASES: list[tuple[str, type, dict[str, Any]]] = [
    ("LoRA", LoConModule, {"lora_dim": 3, "alpha": 5}),
    ("LoRA, rank-stabilised", LoConModule, {"lora_dim": 3, "alpha": 5, "rs_lora": True}),
    ("LoRA, scalar", LoConModule, {"lora_dim": 3, "alpha": 5, "use_scalar": True}),
    ("LoRA, Tucker", LoConModule, {"lora_dim": 3, "alpha": 5, "use_tucker": True}),
    ("DoRA by rows", LoConModule, {"lora_dim": 3, "alpha": 5, **DORA}),
    ("DoRA by columns", LoConModule, {"lora_dim": 3, "alpha": 5, **COLUMNS}),
    ("LoHa", LohaModule, {"lora_dim": 3, "alpha": 5}),
    ("LoHa, Tucker", LohaModule, {"lora_dim": 3, "alpha": 5, "use_tucker": True}),
    ("LoHa, DoRA by rows", LohaModule, {"lora_dim": 3, "alpha": 5, **DORA}),
    ("LoHa, DoRA by columns", LohaModule, {"lora_dim": 3, "alpha": 5, **COLUMNS}),
    ("LoKr", LokrModule, {"lora_dim": 1, "alpha": 5}),
    ("LoKr, both decomposed", LokrModule, {"lora_dim": 1, "alpha": 5, "decompose_both": True, "factor": 4}),
    ("LoKr, Tucker", LokrModule, {"lora_dim": 1, "alpha": 5, "use_tucker": True}),
    ("LoKr, whole", LokrModule, {"lora_dim": 64, "alpha": 5}),
    ("LoKr, DoRA by rows", LokrModule, {"lora_dim": 1, "alpha": 5, **DORA}),
    ("LoKr, DoRA by columns", LokrModule, {"lora_dim": 1, "alpha": 5, **COLUMNS}),
    ("OFT", DiagOFTModule, {"lora_dim": 4}),
    ("OFT, limited", DiagOFTModule, {"lora_dim": 4, "constraint": 0.05}),
    ("OFT, rescaled", DiagOFTModule, {"lora_dim": 4, "rescaled": True}),
    ("BOFT", ButterflyOFTModule, {"lora_dim": 4}),
    ("BOFT, limited and rescaled", ButterflyOFTModule, {"lora_dim": 4, "constraint": 0.05, "rescaled": True}),
    ("GLoRA", GLoRAModule, {"lora_dim": 3, "alpha": 5}),
    ("IA3 on outputs", IA3Module, {}),
    ("IA3 on inputs", IA3Module, {"train_on_input": True}),
    ("differences", FullModule, {}),
]
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(8, 16), (5, 8)),
    "Conv2d": (lambda: nn.Conv2d(8, 16, 3, padding=1), (2, 8, 6, 6)),
    "Conv2d 1x1": (lambda: nn.Conv2d(8, 16, 1), (2, 8, 6, 6)),
    "Conv1d": (lambda: nn.Conv1d(8, 16, 3), (2, 8, 7)),
}


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def adapted(kind: type, layer: nn.Module, options: dict[str, Any]) -> nn.Module:
    """LyCORIS' module around a layer, its parameters moved."""
    module = kind("lora_unet_a", layer, multiplier=1.0, bypass_mode=False, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if not any(parameter is own for own in layer.parameters()):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    module.eval()
    return module


def written(module: nn.Module, folder: Path) -> Path:
    """The file that LyCORIS saves: its wrapper prefixes the module's own state dict, without the wrapped layer."""
    state = module.custom_state_dict() if hasattr(module, "custom_state_dict") else None
    if not state:
        state = {name: t for name, t in module.state_dict().items() if "org" not in name}
    tensors = {f"lora_unet_a.{name}": t.detach().clone().contiguous() for name, t in state.items()}
    save_file(tensors, folder / "lycoris.safetensors")
    return folder / "lycoris.safetensors"


def base_of(layer: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    save_file({f"a.{name}": t.detach().clone() for name, t in layer.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("kind", "options"), [pytest.param(k, o, id=name) for name, k, o in CASES])
def test_a_merged_layer_computes_what_lycoris_does(
    kind: type, options: dict[str, Any], layer: str, tmp_path: Path
) -> None:
    make, shape = LAYERS[layer]
    model = toy(a=make())
    base = base_of(model.a, tmp_path / "base")
    x = numbers(*shape)
    bare = model.a(x).detach()
    module = adapted(kind, model.a, options)
    with torch.no_grad():
        module.apply_to()
        file = written(module, tmp_path)
        expected = model.a(x).detach()
    merge(file, base, tmp_path / "out")
    merged = make()
    merged.load_state_dict({name.removeprefix("a."): t for name, t in tensors_of(tmp_path / "out").items()})
    found = merged(x).detach()
    size = expected.abs().max()
    assert (bare - expected).abs().max() > 0.02 * size, "the adapter changes nothing that shows"
    assert (found - expected).abs().max() < 5e-6 * size


@pytest.mark.parametrize("layer", ["LayerNorm", "GroupNorm"])
def test_norms_are_differences(layer: str, tmp_path: Path) -> None:
    make = {"LayerNorm": lambda: nn.LayerNorm(8), "GroupNorm": lambda: nn.GroupNorm(2, 8)}[layer]
    model = toy(a=make())
    base = base_of(model.a, tmp_path / "base")
    x = numbers(3, 8)
    module = adapted(NormModule, model.a, {})
    file = written(module, tmp_path)
    with torch.no_grad():
        module.apply_to()
        expected = model.a(x).detach()
    merge(file, base, tmp_path / "out")
    merged = make()
    merged.load_state_dict({name.removeprefix("a."): t for name, t in tensors_of(tmp_path / "out").items()})
    assert torch.allclose(merged(x), expected, atol=1e-6)
