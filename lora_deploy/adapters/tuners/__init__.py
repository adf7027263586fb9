"""PEFT's tuners other than LORA; a tuner is one module here and one line in ``TUNERS``.

Promise: importing this package imports no tensor library.
"""

from __future__ import annotations

from lora_deploy.registry import Entry

_HERE = "lora_deploy.adapters.tuners"

TUNERS: tuple[Entry, ...] = (
    Entry(name="ADALORA", summary="singular vectors and values of a difference", path=f"{_HERE}.adalora:TUNER"),
    Entry(name="BEFT", summary="differences of biases", path=f"{_HERE}.replaced:BEFT"),
    Entry(name="BOFT", summary="inputs turned by a butterfly of blocks", path=f"{_HERE}.boft:TUNER"),
    Entry(name="BONE", summary="a trained block repeated along the inputs", path=f"{_HERE}.miss:BONE"),
    Entry(name="C3A", summary="circulant blocks", path=f"{_HERE}.c3a:TUNER"),
    Entry(name="DEFT", summary="a subspace of the weight replaced", path=f"{_HERE}.deft:TUNER"),
    Entry(name="DELORA", summary="rank-one parts of equal length", path=f"{_HERE}.delora:TUNER"),
    Entry(name="FOURIERFT", summary="a few Fourier coefficients", path=f"{_HERE}.frequencies:FOURIERFT"),
    Entry(name="FROD", summary="coefficients in a basis that layers share", path=f"{_HERE}.frod:TUNER"),
    Entry(name="GLORA", summary="every element multiplied and shifted", path=f"{_HERE}.glora:TUNER"),
    Entry(name="GRALORA", summary="a low-rank pair for each block", path=f"{_HERE}.gralora:TUNER"),
    Entry(name="HIRA", summary="every element multiplied, by a low-rank matrix", path=f"{_HERE}.hira:TUNER"),
    Entry(name="HRA", summary="inputs reflected", path=f"{_HERE}.hra:TUNER"),
    Entry(name="IA3", summary="rows or columns multiplied", path=f"{_HERE}.ia3:TUNER"),
    Entry(name="LN_TUNING", summary="normalisations replaced", path=f"{_HERE}.replaced:LN_TUNING"),
    Entry(name="LOHA", summary="elementwise product of two low-rank differences", path=f"{_HERE}.lycoris:LOHA"),
    Entry(name="LOKR", summary="Kronecker product", path=f"{_HERE}.lycoris:LOKR"),
    Entry(name="MISS", summary="a trained block repeated along the inputs", path=f"{_HERE}.miss:MISS"),
    Entry(name="OFT", summary="blocks of inputs turned", path=f"{_HERE}.oft:TUNER"),
    Entry(name="OSF", summary="the smaller singular components trained", path=f"{_HERE}.osf:TUNER"),
    Entry(name="PEANUT", summary="a network of the weight", path=f"{_HERE}.peanut:TUNER"),
    Entry(name="PSOFT", summary="principal components turned", path=f"{_HERE}.psoft:TUNER"),
    Entry(name="PVERA", summary="VeRA's mean path", path=f"{_HERE}.vera:PVERA"),
    Entry(name="RANDLORA", summary="full-rank sums of shared random bases", path=f"{_HERE}.randlora:TUNER"),
    Entry(name="ROAD", summary="outputs turned in pairs", path=f"{_HERE}.road:TUNER"),
    Entry(name="SHIRA", summary="differences of a few elements", path=f"{_HERE}.places:SHIRA"),
    Entry(name="SUPERTUNING", summary="differences of the largest elements", path=f"{_HERE}.places:SUPERTUNING"),
    Entry(name="TINYLORA", summary="a shared vector between frozen factors", path=f"{_HERE}.tinylora:TUNER"),
    Entry(name="TRAINABLE_TOKENS", summary="rows of embeddings replaced", path=f"{_HERE}.replaced:TRAINABLE_TOKENS"),
    Entry(name="UNILORA", summary="all factors from one vector", path=f"{_HERE}.unilora:TUNER"),
    Entry(name="VBLORA", summary="factors from a shared bank of vectors", path=f"{_HERE}.vblora:TUNER"),
    Entry(name="VERA", summary="vectors around shared random matrices", path=f"{_HERE}.vera:VERA"),
    Entry(name="WAVEFT", summary="a few Haar wavelet coefficients", path=f"{_HERE}.frequencies:WAVEFT"),
)
