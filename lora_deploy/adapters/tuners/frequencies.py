"""FOURIERFT and WAVEFT: a few trained coefficients at random places of a spectrum, which a seed draws again.

The places are the first n of a random permutation of all; what torch permutes for a seed may change between releases:
the release is told. WaveFT is read with the Haar wavelet (``db1``), whose inverse spreads each coefficient over two by
two elements, or with no transform at all.
Source: FourierFT, arXiv:2405.03003; WaveFT, arXiv:2505.12532; peft 0.21.2, ``tuners/fourierft/layer.py`` and
``tuners/waveft/layer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.sparse import Sparse
from lora_deploy.updates.spectral import Spectral

_SIGNS = {
    (False, False): (1, 1, 1, 1),
    (False, True): (1, 1, -1, -1),
    (True, False): (1, -1, 1, -1),
    (True, True): (1, -1, -1, 1),
}
"""Haar: signs of the elements (0, 0), (0, 1), (1, 0), (1, 1) for a coefficient of the upper or lower, left or right
part of the spectrum."""


def read_fourier(module: Adapted, *, scaling: float, seed: int) -> ModuleUpdate:
    """Make the FourierFT update of one module; its size only the base tells.

    Raises:
        MalformedAdapterError: No spectrum of one axis.
    """
    spectrum = module.factor("fourierft_spectrum", None)
    make = partial(_spectral, spectrum, seed, Scale(factor=Fraction(scaling), source=f"scaling {scaling:g}"))
    return module.update(Shapeless(kind=Spectral.kind, known=(None, None), make=make, tensors=(spectrum,)))


def read_wave(module: Adapted, *, scaling: float, seed: int, is_transformed: bool) -> ModuleUpdate:
    """Make the WaveFT update of one module; its size only the base tells.

    Raises:
        MalformedAdapterError: No spectrum of one axis.
    """
    spectrum = module.factor("waveft_spectrum", None)
    scale = Scale(factor=Fraction(scaling), source=f"scaling {scaling:g}")
    make = partial(_haar if is_transformed else _plain, spectrum, seed, scale)
    return module.update(Shapeless(kind=Sparse.kind, known=(None, None), make=make, tensors=(spectrum,)))


def places(seed: int, n: int, n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
    """Draw the rows and columns of n coefficients as PEFT does, from torch's generator of the CPU.

    Raises:
        UnmergeableAdapterError: There are fewer places.
    """
    if n > n_out * n_in:
        raise UnmergeableAdapterError(f"update has {n} coefficients, base only {n_out * n_in} elements")
    drawn = torch.randperm(n_out * n_in, generator=torch.Generator().manual_seed(seed))[:n]
    return drawn // n_in, drawn % n_in


def _spectral(spectrum: Tensor, seed: int, scale: Scale, n_out: int, n_in: int) -> Spectral:
    row, column = places(seed, len(spectrum), n_out, n_in)
    return Spectral(
        rows_of=row.clone(), columns_of=column.clone(), coefficients=spectrum, n_rows=n_out, n_cols=n_in, scale=scale
    )


def _plain(spectrum: Tensor, seed: int, scale: Scale, n_out: int, n_in: int) -> Sparse:
    row, column = places(seed, len(spectrum), n_out, n_in)
    return Sparse.at(row, column, spectrum, (n_out, n_in), scale)


def _haar(spectrum: Tensor, seed: int, scale: Scale, n_out: int, n_in: int) -> Sparse:
    """Spread coefficients over two by two elements; an odd side has a last row or column that is cut off."""
    row, column = places(seed, len(spectrum), n_out, n_in)
    half_down, half_across = (n_out + 1) // 2, (n_in + 1) // 2
    is_lower, is_right = row >= half_down, column >= half_across
    signs = torch.empty((len(spectrum), 4), dtype=spectrum.dtype)
    for (lower, right), four in _SIGNS.items():
        signs[(is_lower == lower) & (is_right == right)] = torch.tensor(four, dtype=spectrum.dtype)
    rows = 2 * (row - is_lower * half_down)[:, None] + torch.tensor([0, 0, 1, 1])
    columns = 2 * (column - is_right * half_across)[:, None] + torch.tensor([0, 1, 0, 1])
    values = spectrum[:, None] * signs  # the half is the scale's
    inside = (rows < n_out) & (columns < n_in)
    halved = scale.times(Fraction(1, 2), f"{scale.source} / 2 (Haar)")
    return Sparse.at(rows[inside], columns[inside], values[inside], (n_out, n_in), halved)


class FrequencyConfig(TunerConfig):
    """Fields that FOURIERFT and WAVEFT share; how many coefficients there are, the tensors say."""

    scaling: float = Field(allow_inf_nan=False)
    random_loc_seed: int | None = 777
    n_frequency: int | None = None
    n_frequency_pattern: dict[str, int] | None = None


class FourierConfig(FrequencyConfig):
    """Configuration of FOURIERFT."""

    scaling: float = Field(default=150.0, allow_inf_nan=False)


class WaveConfig(FrequencyConfig):
    """Configuration of WAVEFT."""

    scaling: float = Field(default=25.0, allow_inf_nan=False)
    wavelet_family: str = "db1"
    use_idwt: bool = True
    proportional_parameters: bool = False


def _read_fourier(modules: Sequence[Adapted], config: FourierConfig) -> Reading:
    seed = _seed(modules, config)
    return Reading(
        updates=[read_fourier(module, scaling=config.scaling, seed=seed) for module in modules], notes=(_told(seed),)
    )


def _read_wave(modules: Sequence[Adapted], config: WaveConfig) -> Reading:
    seed = _seed(modules, config)
    if config.use_idwt and config.wavelet_family != "db1":
        raise UnmergeableAdapterError(
            f"{modules[0].file.path}: wavelet_family {config.wavelet_family!r}: only db1 (Haar) is read, whose inverse "
            "needs no table of filter coefficients"
        )
    updates = [
        read_wave(module, scaling=config.scaling, seed=seed, is_transformed=config.use_idwt) for module in modules
    ]
    return Reading(updates=updates, notes=(_told(seed),))


def _seed(modules: Sequence[Adapted], config: FrequencyConfig) -> int:
    if config.random_loc_seed is None:
        raise UnmergeableAdapterError(
            f"{modules[0].file.path}: random_loc_seed is null: the coefficients' places are not known"
        )
    return config.random_loc_seed


def _told(seed: int) -> str:
    return f"places of coefficients drawn again with torch {torch.__version__}, random_loc_seed {seed}"


FOURIERFT = Tuner(peft_type="FOURIERFT", config=FourierConfig, slots=(("fourierft_spectrum", ""),), read=_read_fourier)
WAVEFT = Tuner(peft_type="WAVEFT", config=WaveConfig, slots=(("waveft_spectrum", ""),), read=_read_wave)
