"""Kinds of updates; a kind is one module here and one line in ``KINDS``.

Promise: importing this package imports no tensor library.
"""

from __future__ import annotations

from lora_deploy.registry import Entry

KINDS: tuple[Entry, ...] = (
    Entry(
        name="low-rank",
        summary="W + s·B·A, exact, rounded once",
        path="lora_deploy.updates.low_rank:LowRank",
    ),
    Entry(
        name="replacement",
        summary="the adapter's own tensor in place of the base's",
        path="lora_deploy.updates.replacement:Replacement",
    ),
    Entry(
        name="token-rows",
        summary="some rows of an embedding replaced",
        path="lora_deploy.updates.token_rows:TokenRows",
    ),
    Entry(
        name="addition",
        summary="W + s·d for a dense d (trained bias differences)",
        path="lora_deploy.updates.addition:Addition",
    ),
    Entry(
        name="dora",
        summary="m ⊙ (W + s·B·A) / ‖W + s·B·A‖ by rows or columns",
        path="lora_deploy.updates.dora:Dora",
    ),
    Entry(
        name="residual",
        summary="W minus its PiSSA or OLoRA component, plus s·B·A",
        path="lora_deploy.updates.residual:Residual",
    ),
    Entry(
        name="kasa",
        summary="W without its r smallest singular components, plus s·B·diag·A",
        path="lora_deploy.updates.kasa:Kasa",
    ),
    Entry(
        name="scaled-product",
        summary="W + s·diag(a)·B·diag(d)·A·diag(c): VeRA, PVeRA, DeLoRA",
        path="lora_deploy.updates.scaled_product:ScaledProduct",
    ),
    Entry(
        name="random-bases",
        summary="W + a full-rank sum of shared random bases: RandLoRA",
        path="lora_deploy.updates.random_bases:RandomBases",
    ),
    Entry(
        name="block-affine",
        summary="blocks of W multiplied and shifted: MiSS and Bone in mode bat",
        path="lora_deploy.updates.block_affine:BlockAffine",
    ),
    Entry(
        name="circulant",
        summary="W + circulant blocks: C3A",
        path="lora_deploy.updates.circulant:Circulant",
    ),
    Entry(
        name="spectral",
        summary="W + Re(F⁻¹(S)) for a few Fourier coefficients: FourierFT",
        path="lora_deploy.updates.spectral:Spectral",
    ),
    Entry(
        name="sparse",
        summary="W + values at some places: SHiRA, Super-Tuning, WaveFT",
        path="lora_deploy.updates.sparse:Sparse",
    ),
    Entry(
        name="subspace",
        summary="W without what it has in a subspace, plus Q·R: DEFT, PaRa",
        path="lora_deploy.updates.subspace:Subspace",
    ),
    Entry(
        name="principal",
        summary="principal components of W turned among themselves: PSOFT",
        path="lora_deploy.updates.principal:Principal",
    ),
    Entry(
        name="joint",
        summary="W given anew in a basis that layers share: FRoD",
        path="lora_deploy.updates.joint:Joint",
    ),
    Entry(
        name="weight-network",
        summary="W + s·B·net(A·W): PEANuT",
        path="lora_deploy.updates.weight_network:WeightNetwork",
    ),
    Entry(
        name="hadamard",
        summary="W + s·(B₁·A₁) ⊙ (B₂·A₂): LoHa",
        path="lora_deploy.updates.hadamard:Hadamard",
    ),
    Entry(
        name="mixed-inputs",
        summary="W + s·(W·P·Q + B·A): GLoRA",
        path="lora_deploy.updates.mixed_inputs:MixedInputs",
    ),
    Entry(
        name="kronecker",
        summary="W + s·(C ⊗ D): LoKr",
        path="lora_deploy.updates.kronecker:Kronecker",
    ),
    Entry(
        name="rescaling",
        summary="rows or columns of W multiplied: IA3",
        path="lora_deploy.updates.rescaling:Rescaling",
    ),
    Entry(
        name="affine",
        summary="W + s·(W ⊙ A + B), A and B of low rank: PEFT's GLoRA",
        path="lora_deploy.updates.affine:Affine",
    ),
    Entry(
        name="modulation",
        summary="W ⊙ (1 + B·A): HiRA",
        path="lora_deploy.updates.modulation:Modulation",
    ),
    Entry(
        name="rotation",
        summary="inputs or outputs of W turned: OFT, BOFT, HRA, RoAd",
        path="lora_deploy.updates.rotation:Rotation",
    ),
)
