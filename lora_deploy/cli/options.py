"""Options that commands share, and how they become the stages' option types. No tensor library is imported.

Promise: an option's name, meaning and help are the same in every command that has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, TypeVar

import click

from lora_deploy.cli.numbers import FiniteNumber, Flags, Percent, Size
from lora_deploy.cli.screen import Screen

C = TypeVar("C", bound=Callable[..., Any])
T = TypeVar("T")
_DEVICE = r"auto|cpu|cuda(:\d+)?"


provider_option = click.option(
    "--provider",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="Execution provider of onnxruntime that graphs run on, such as cpu or cuda.",
)


def _all(*options: Callable[[C], C]) -> Callable[[C], C]:
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


def chosen(options_type: type[T], choices: Mapping[str, Any]) -> T:
    """Make a stage's options out of the command's: a choice goes to the field of its name."""
    names = [field.name for field in dataclasses.fields(options_type)]  # type: ignore[arg-type]
    return options_type(**{name: choices[name] for name in names if name in choices})


def unless_default(options: T) -> T | None:
    """Give None in place of options that the user left alone."""
    return None if options == type(options)() else options


def _set_quiet(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.ensure_object(Screen).is_quiet = value


def _check_device(_: click.Context, __: click.Parameter, value: str) -> str:
    import re

    if not re.fullmatch(_DEVICE, value):
        raise click.BadParameter(f"found {value!r}, expected auto, cpu, cuda or cuda:0, cuda:1 …")
    return value


output_options = _all(
    click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        help="Print one JSON document on stdout instead of tables; on errors {'error': {code, message, hint}}.",
    ),
    click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=_set_quiet,
        help="Print nothing but errors (and the document of --json).",
    ),
)
"""How results are shown; every command has them."""

read_options = _all(
    click.option(
        "--alpha",
        type=FiniteNumber(),
        metavar="A",
        help="LoRA alpha, for files that carry none; it replaces the one of those that do. "
        "The scale is alpha / rank (alpha / √rank if the file says rsLoRA).",
    ),
    click.option("--adapter-name", metavar="NAME", help="Which adapter, where the folder or file holds several."),
    click.option(
        "--enable-lora",
        type=Flags(),
        metavar="T,F,T",
        help="Which equal parts of a merged linear layer (loralib MergedLinear) are adapted.",
    ),
    click.option(
        "--base-is-residual",
        is_flag=True,
        help="The base is the residual model that training saved (PiSSA, OLoRA, CorDA, LoRA-GA …), "
        "not the original one: add s·B·A to it as it is.",
    ),
    click.option(
        "--mlx-legacy-alpha",
        is_flag=True,
        help="The MLX adapter was trained with mlx-lm or mlx-examples of January to June 2024, which multiplied "
        "lora_parameters.scale by alpha / rank; today's ignore alpha.",
    ),
)
"""What the user says because the adapter's file cannot: fields of ``ReadOptions``."""

base_option = click.option(
    "--base",
    metavar="BASE",
    help="The base model: a folder (of a model or a diffusion pipeline), a .safetensors file, a GGUF file, an ONNX "
    "export (a graph or its folder), or a hub id owner/name[@revision] (from the Hugging Face cache; HF_HOME, HF_TOKEN "
    "and HF_HUB_OFFLINE are honoured). "
    "Default: the one that the adapter names.",
)

bind_options = _all(
    click.option(
        "--weight",
        "weights",
        type=FiniteNumber(),
        multiple=True,
        metavar="W",
        help="Factor of each adapter, in their order; once for each adapter. Default: 1.",
    ),
    click.option(
        "--include",
        multiple=True,
        metavar="GLOB",
        help="Change only tensors whose name matches, such as '*.self_attn.*'. Repeatable.",
    ),
    click.option(
        "--exclude", multiple=True, metavar="GLOB", help="Do not change tensors whose name matches. Repeatable."
    ),
    click.option(
        "--component",
        "components",
        multiple=True,
        metavar="NAME",
        help="Component of a diffusion pipeline that the adapters change, such as unet or text_encoder; "
        "once, or once for each adapter. Default: the only one that fits.",
    ),
    click.option(
        "--variant",
        metavar="NAME",
        help="Which weights of a diffusion pipeline are the base, such as fp16. Default: the plain ones.",
    ),
    click.option(
        "--into-language-model",
        is_flag=True,
        help="The adapters are a text model's and BASE is a vision-language model: merge them into its language model.",
    ),
    click.option(
        "--dequantize",
        is_flag=True,
        help="Accept a quantised base (GGUF, bitsandbytes, GPTQ, AWQ, FP8, MXFP4 …): unpack it, once, into the cache "
        "($LORA_DEPLOY_CACHE or ~/.cache/lora-deploy). The merged model is as large as the unpacked one.",
    ),
)
"""What the user chooses when adapters meet a base: fields of ``BindOptions``, and whether a packed base is unpacked."""

work_options = _all(
    click.option(
        "--device",
        default="auto",
        show_default=True,
        callback=_check_device,
        metavar="auto|cpu|cuda[:i]",
        help="Where products are computed; the bytes are the same. auto: CUDA when there is one.",
    ),
    click.option(
        "--memory",
        "memory_bytes",
        type=Size(),
        default="2GB",
        show_default=True,
        metavar="SIZE",
        help="Private memory that the work may use; a plan that needs more is an error.",
    ),
)
"""What changes speed and memory but no byte: fields of ``MergeOptions``."""

latency_options = _all(
    click.option(
        "--latency-bound",
        type=Percent(),
        default="3%",
        show_default=True,
        metavar="P",
        help="How far the merged graph's time may be from the base's and still be called equal.",
    ),
    click.option(
        "--seconds",
        type=click.FloatRange(min=1),
        default=60.0,
        show_default=True,
        metavar="S",
        help="How long latency may be measured.",
    ),
)
"""How latency is measured: fields of ``VerifyOptions``."""
