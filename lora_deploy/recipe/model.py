"""What a recipe can say. Field names are those of the command line's options; each stage has a section of its own.

Promise: whatever is not said has the command line's default. A token is never part of a recipe.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lora_deploy.evidence.verdict import Check
from lora_deploy.recipe.fields import NoneOrMore, OneOrMore, Section, Share, Size
from lora_deploy.recipe.stages import Stage

Dtype = Literal["float16", "bfloat16", "float32", "base"]
Name = Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
"""A name that a folder can have."""


class AdapterChoice(Section):
    """One adapter, or several that are merged together, and what its files cannot say."""

    path: OneOrMore[str]
    """Folder, weights file or hub id; several add up in this order."""
    name: Name | None = None
    """What its folders are called. Default: the name of the path."""
    weights: OneOrMore[float] = ()
    """A factor for each path. Default: 1."""
    alpha: float | None = None
    """LoRA alpha, for files that carry none."""
    adapter_name: str | None = None
    """Which adapter, where the folder or file holds several."""
    enable_lora: tuple[bool, ...] | None = None
    """Which equal parts of a merged linear layer (loralib) are adapted."""
    base_is_residual: bool = False
    """The base is the residual model that training saved."""
    mlx_legacy_alpha: bool = False
    """The MLX adapter is of January to June 2024, when mlx-lm multiplied its scale by alpha / rank."""
    components: OneOrMore[str] = ()
    """Component of a diffusion pipeline that it changes; one, or one for each path."""

    @model_validator(mode="after")
    def _as_many_weights_as_paths(self) -> AdapterChoice:
        if not self.path:
            raise ValueError("path: expected at least one")
        if self.weights and len(self.weights) != len(self.path):
            raise ValueError(f"weights: found {len(self.weights)}, expected one for each of {len(self.path)} paths")
        return self


class BaseChoice(Section):
    """The model that adapters are merged into."""

    path: str
    """Folder, file or hub id ``owner/name[@revision]``."""
    dequantize: bool = False
    """Accept a quantised base and unpack it into the cache."""
    variant: str | None = None
    """Which weights of a diffusion pipeline are the base, such as fp16."""


class ValidateSection(Section):
    """How adapters meet the base."""

    include: OneOrMore[str] = ()
    """Change only tensors whose name matches one of these shell patterns."""
    exclude: OneOrMore[str] = ()
    """Do not change tensors whose name matches."""
    tokenizer: Literal["adapter", "base"] | None = None
    """Whose tokenizer, chat template and processor travel."""
    into_language_model: bool = False
    """Merge a text model's adapters into the language model of a vision-language base."""


class MergeSection(Section):
    """How weights are merged; nothing here changes a value."""

    max_shard_size: Size = Size(5_000_000_000)
    """Largest weight file."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Where products are computed."""
    memory: Size = Size(2_000_000_000)
    """Private memory that the work may use."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Threads. Default: as many as there are cores."""


class ExportChoice(Section):
    """One set of ONNX graphs."""

    name: Name | None = None
    """Folder inside the merged one. Default: onnx, or onnx-int4 and the like where weights are quantised."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What graphs compute in. Default: the weights' own."""
    provider: Literal["cpu", "cuda"] = "cpu"
    """Whose kernels nodes are fused for."""
    weights: Literal["external", "shared"] = "external"
    """Files of their own, or the merged safetensors files themselves."""
    layout: Literal["transformers", "diffusers", "genai"] = "transformers"
    """What loads the folder."""
    maker: Literal["auto", "transformers", "diffusers", "genai"] = "auto"
    """Which library makes the graphs."""
    quantize: Literal["int4", "int8-blockwise", "int8"] | None = None
    """Weights as integers."""
    block_size: Annotated[int, Field(ge=1)] | None = None
    """Weights that share a scale."""
    symmetric: bool | None = None
    """Whether blocks have no zero point."""


class EvidenceSection(Section):
    """What is proven, and how."""

    only: OneOrMore[Check] = ()
    """Checks to make. Default: all."""
    skip: OneOrMore[Check] = ()
    """Checks to leave out."""
    probes: str | None = None
    """JSON lines with prompts, token ids, images or sounds of your own."""
    layerwise: bool = False
    """Compare outputs layer by layer even where the whole model fits into memory."""
    provider: str = "cpu"
    """Execution provider that graphs run on."""
    latency_bound: Share = 0.03
    """How far the merged graph's time may be from the base's and still be called equal."""
    seconds: Annotated[float, Field(ge=1)] = 60.0
    """How long latency may be measured."""


class AcceptedGap(Section):
    """Evidence that is missing or cannot tell, and that a person takes upon themselves."""

    code: str
    """Such as ``parity-inconclusive``."""
    because: Annotated[str, Field(min_length=1)]
    """Why; it is written into the release."""


class ReleaseSection(Section):
    """How the folder to publish is made."""

    license: str | None = None
    """Licence to state in place of the base's."""
    card_template: str | None = None
    """File with your own text for the model card."""
    sign_key: str | None = None
    """File with the private key to sign with."""
    sign_certificate: str | None = None
    """File with the key's certificate, then those of its issuers."""
    accept: OneOrMore[AcceptedGap] = ()
    """Evidence that may be missing or unclear, and why."""


class PushSection(Section):
    """How the release is published."""

    revision: str | None = None
    """Branch. Default: the hub's own."""
    private: bool | None = None
    """Visibility of a repository that is made. Default: private."""
    create_pr: bool = False
    """Open a pull request in place of committing."""
    tag: str | None = None
    """Tag to set on the commit."""
    commit_message: str | None = None
    """Message of the one commit."""
    replace: bool = False
    """Replace what is at the target, where it is no release of ours or has no history."""


def _a_path(value: Any) -> Any:  # noqa: ANN401 - YAML
    return {"path": value} if isinstance(value, str) else value


_Adapter = Annotated[AdapterChoice, BeforeValidator(_a_path, json_schema_input_type=str | AdapterChoice)]
_Base = Annotated[BaseChoice, BeforeValidator(_a_path, json_schema_input_type=str | BaseChoice)]


def _off(value: Any) -> Any:  # noqa: ANN401 - YAML
    return None if value is False else value


_Evidence = Annotated[
    EvidenceSection | None, BeforeValidator(_off, json_schema_input_type=EvidenceSection | Literal[False] | None)
]
_Release = Annotated[
    ReleaseSection | None, BeforeValidator(_off, json_schema_input_type=ReleaseSection | Literal[False] | None)
]


class Recipe(Section):
    """A deployment: every adapter with every dtype, merged into one base, proven, released and pushed."""

    summary: str = ""
    """One line for people."""
    adapters: OneOrMore[_Adapter]
    """One cell of the matrix each."""
    base: _Base | None = None
    """Default: the base that the adapter names."""
    dtypes: OneOrMore[Dtype] = ("float16",)
    """One cell of the matrix each: what floating tensors are rounded to, once."""
    output: str = "dist"
    """Folder for everything that is made, a folder in it for each cell."""
    validation: Annotated[ValidateSection, Field(alias="validate")] = ValidateSection()
    """The key `validate`: what of the adapters is bound to the base."""
    merge: MergeSection = MergeSection()
    """What the merge may take, and how its files are cut."""
    export: NoneOrMore[ExportChoice] = (ExportChoice(),)
    """Graphs to make; false: none."""
    evidence: _Evidence = EvidenceSection()
    """What is proven; false: nothing."""
    release: _Release = ReleaseSection()
    """What is put together; false: nothing."""
    targets: OneOrMore[str] = ()
    """Where releases go; {adapter}, {dtype} and {cell} stand for what is released. Default: nowhere."""
    push: PushSection = PushSection()
    """How targets are told."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_the_default(cls, value: Any) -> Any:  # noqa: ANN401 - YAML
        """Take a key with nothing after it, or only comments, as not said."""
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _has_adapters(self) -> Recipe:
        if not self.adapters:
            raise ValueError("adapters: expected at least one")
        if not self.dtypes:
            raise ValueError("dtypes: expected at least one")
        if self.targets and self.release is None:
            raise ValueError("targets: nothing is released, so nothing can be pushed")
        return self

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What a run of it does."""
        has = {
            Stage.EXPORT: bool(self.export),
            Stage.EVIDENCE: self.evidence is not None,
            Stage.RELEASE: self.release is not None,
            Stage.PUSH: bool(self.targets),
        }
        return tuple(stage for stage in Stage if has.get(stage, True))

    @property
    def content(self) -> dict[str, Any]:
        """What decides the bytes of weights and graphs, as far as it was said."""
        what = {"adapters", "base", "dtypes", "validation", "merge", "export"}
        return self.model_dump(mode="json", by_alias=True, include=what, exclude_defaults=True)
