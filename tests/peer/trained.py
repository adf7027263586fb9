"""An adapter as training leaves it, and the peer's own idea of what it means.

A tiny model with random weights is adapted by PEFT, every trainable tensor is moved away from its start, and adapter
and base are saved by the peers themselves. Two oracles, both in float64: PEFT's merge of the adapter in memory
(``merged``) and PEFT's forward pass without any merge (``output``), which is what training saw.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.bases import open_base
from lora_deploy.merge.execute import Merged, execute
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import plan_merge
from lora_deploy.rounding import dtype_of, round_once
from lora_deploy.validate import BindOptions, bind

SINGLE_FACTORISATION = 1e-5
"""PEFT factorises in float32 whatever the model's dtype."""
MEMORY_BYTES = 8_000_000_000
"""A test process has grown by the peers before it merges."""
_DOUBLE_NOISE = 2.0**-40
"""More than float64 sums of a few hundred products lose, and far less than half a unit of any stored format."""

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained adapter in memory and on disk, with its base."""

    base: Path
    adapter: Path
    model: PeftModel
    """In float64; its forward pass is the one that training saw."""
    bare: nn.Module
    """The model before it was adapted, in float64."""

    def output(self, inputs: Inputs) -> Tensor:
        """The unmerged forward pass."""
        return forward(self.model, inputs)

    def merged(self, name: str = "default") -> dict[str, Tensor]:
        """What PEFT's ``merge_and_unload`` makes of the adapter, in float64."""
        return {name: t.detach() for name, t in self.merged_model(name).state_dict().items()}

    def merged_model(self, name: str = "default") -> nn.Module:
        """PEFT's merge of one adapter; it takes ``model`` to pieces: ask for ``output`` before."""
        with peft_advice_unheard():
            return self.model.merge_and_unload(adapter_names=[name])


@contextmanager
def peft_advice_unheard() -> Iterator[None]:
    """PEFT advises against much of what is done here on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def randomize(model: nn.Module) -> nn.Module:
    """Give a fresh model weights that all matter: no zero bias, no unit norm, activations of order one."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        if parameter.ndim > 1:
            parameter.data.copy_(noise * 0.3)
        else:
            parameter.data.add_(noise * 0.1)
    return in_double(model)


def in_double(model: nn.Module) -> nn.Module:
    """Make experts compute one by one: the grouped product of torch 2.13 has no float64."""
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation("eager")
    return model.eval()


def perturb(model: nn.Module) -> None:
    """Move every tensor that training moves away from its start; magnitudes stay positive, tied factors stay tied."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or "lora_" in name):
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * noise.abs())
        else:
            parameter.data.add_(noise * 0.3)


def take_steps(model: nn.Module, inputs: Inputs, n_steps: int = 2) -> None:
    """Train what is trainable to make the output small."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs = {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}
    for _ in range(n_steps):
        optimizer.zero_grad()
        output_of(model, inputs).square().mean().backward()
        optimizer.step()


def save_base(model: nn.Module, folder: Path, **options: Any) -> Path:
    """Save a base as its library does; a toy module's state dict goes into one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, **options)
    else:
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def train(
    model: nn.Module,
    config: LoraConfig,
    folder: Path,
    *,
    base: Path | None = None,
    before: Callable[[PeftModel], None] | None = None,
    inputs: Inputs | None = None,
    **saving: Any,
) -> Trained:
    """Adapt, perturb and save.

    ``base`` is where the model came from, if its base is not simply the model itself; ``before`` sees the adapted
    model at its start. With ``inputs`` it is really trained on them, for two steps, in place of being perturbed.
    """
    base = base or save_base(model, folder / "base")
    with peft_advice_unheard():
        trained = get_peft_model(copy.deepcopy(model), config)
        if before is not None:
            before(trained)
        if inputs is None:
            perturb(trained)
        else:
            take_steps(trained.eval(), inputs)
        trained.eval().save_pretrained(folder / "adapter", **saving)
    return Trained(
        base=base, adapter=folder / "adapter", model=trained.double(), bare=copy.deepcopy(model).double().eval()
    )


def merge(
    adapters: Path | Sequence[Path],
    base: Path,
    out: Path,
    *,
    dtype: str = "float32",
    read: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
) -> Merged:
    """Read, bind, plan and execute."""
    paths = [adapters] if isinstance(adapters, Path) else adapters
    binding = bind([read_adapter(path, read) for path in paths], open_base(str(base)), bind_options)
    return execute(
        plan_merge(binding, MergeOptions(dtype=dtype, n_workers=1, memory_bytes=MEMORY_BYTES), read_options=read), out
    )


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's safetensors files."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@torch.no_grad()
def forward(model: nn.Module, inputs: Inputs) -> Tensor:
    """Logits, or the first output."""
    return output_of(model, inputs)


def output_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """As ``forward``, with what a gradient needs."""
    output = model(**inputs)
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    return found if found is not None else output[0]


def reload(model: nn.Module, folder: Path, *, ignored: frozenset[str] = frozenset()) -> nn.Module:
    """Load a merged checkpoint as its library does, in float64; every tensor of it must be wanted and found."""
    if isinstance(model, PreTrainedModel):
        loaded, report = type(model).from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
        assert not report["missing_keys"]
        assert set(report["unexpected_keys"]) == ignored, report["unexpected_keys"]
        assert not report["mismatched_keys"]
        return in_double(loaded.double())
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(tensors_of(folder), strict=True)
    return loaded.eval()


def assert_rounded_once(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], *, noise: float = 0) -> None:
    """Assert that each value is the exact one, rounded once; the peer knows the exact one to float64's own error.

    ``noise`` is the error of a peer that does worse.
    """
    assert set(found) == set(exact)
    for name, value in exact.items():
        tensor, expected = found[name], value.double()
        if not tensor.is_floating_point():
            assert torch.equal(tensor, value), name
            continue
        assert tensor.shape == expected.shape, name
        error = max(_DOUBLE_NOISE, noise) * (expected.abs() + expected.abs().max())
        dtype = dtype_of(tensor)
        lowest, highest = round_once(expected - error, dtype), round_once(expected + error, dtype)
        outside = (tensor < lowest) | (tensor > highest)
        assert not outside.any(), (name, int(outside.sum()), (tensor.double() - expected).abs().max().item())


def assert_same_output(found: Tensor, expected: Tensor, base: Tensor, *, tolerance: float = 2e-5) -> None:
    """Assert that two forward passes agree, where the base's own is far away.

    ``tolerance`` is relative to the largest output: weights stored in float32 are off by 6e-8 of their size, two layers
    of tiny models make at most a hundred times that of it.
    """
    size = expected.abs().max()
    if base.shape == expected.shape:
        assert (base - expected).abs().max() > 0.02 * size, "the adapter changes nothing that shows"
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * size


def assert_merges_as_trained(
    trained: Trained,
    inputs: Inputs,
    out: Path,
    *,
    noise: float = 0,
    weights: bool = True,
    ignored: frozenset[str] = frozenset(),
    **options: Any,
) -> nn.Module:
    """Merge in float32 and compare the reloaded model with PEFT's merge, and its output with PEFT's forward pass.

    ``weights`` is False where PEFT's merge is wrong, which is asserted too; ``ignored`` are tensors of the base that
    the model trained with does not have.
    """
    merge(trained.adapter, trained.base, out, **options)
    loaded = reload(trained.bare, out, ignored=ignored)
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    expected = trained.output(inputs)
    if weights:
        found = {name: tensor.float() for name, tensor in loaded.state_dict().items()}
        assert_rounded_once(found, trained.merged(), noise=noise)
    else:
        assert not torch.allclose(forward(trained.merged_model(), inputs), expected, rtol=1e-3)
    assert_same_output(
        forward(loaded, inputs), expected, forward(trained.bare, inputs), tolerance=max(2e-5, 10 * noise)
    )
    return loaded
