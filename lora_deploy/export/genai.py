"""The graph maker of onnxruntime-genai: its builder knows some decoders, and writes their graphs operator by operator.

It is run as its own program, since it is written as one, on each of the two checkpoints. What it also writes about
special tokens is taken from the real configuration when weights are bound.
Source: onnxruntime-genai 0.18 ``models/builder.py``, ``models/builders/base.py`` (``make_genai_config``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_deploy.errors import ExportError, Finding, Severity
from lora_deploy.export.extras import require_genai, require_onnx_ir
from lora_deploy.export.interface import Drawing, GraphTask
from lora_deploy.export.loading import load_model, quiet
from lora_deploy.export.runtime import open_session
from lora_deploy.tensors import DType

CONFIG_NAME = "genai_config.json"
_PRECISIONS = {DType.F32: "fp32", DType.F16: "fp16", DType.BF16: "bf16"}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
_MODULE = "onnxruntime_genai.models.builder"
_MAX_REASON = 400


class GenaiMaker:
    """Graphs by onnxruntime-genai's builder: one ``model`` that both starts and continues a cache."""

    name = "genai"
    packages = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime-genai", "onnxruntime-genai-cuda")

    def draw(self, task: GraphTask) -> Iterator[Drawing]:
        """Run the builder on both checkpoints; see the protocol."""
        ir = require_onnx_ir()
        _require(task)
        for seed, checkpoint in enumerate(task.checkpoints):
            graph = _build(checkpoint, task) / "model.onnx"
            findings: tuple[Finding, ...] = ()
            if seed == 0:
                findings = _tried(graph, checkpoint, task)
            yield Drawing(component="model", seed=seed, model=ir.load(str(graph)), metadata={}, findings=findings)

    def companions(self, task: GraphTask) -> Mapping[str, bytes]:
        """The configuration that onnxruntime-genai reads, as the builder wrote it."""
        return {CONFIG_NAME: (_output(task.checkpoints[0]) / CONFIG_NAME).read_bytes()}

    def settled(
        self, companions: Mapping[str, bytes], config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> Mapping[str, bytes]:
        """Put special tokens and search settings of the real model into that configuration."""
        whole = json.loads(companions[CONFIG_NAME])
        for name in _TOKENS:
            value = generation.get(name, config.get(name))
            if value is not None:
                whole["model"][name] = value
        for name in _SEARCH:
            if generation.get(name) is not None:
                whole["search"][name] = generation[name]
        if whole["model"].get("pad_token_id") is None:
            end = whole["model"].get("eos_token_id")
            whole["model"]["pad_token_id"] = end[0] if isinstance(end, list) else end
        return {CONFIG_NAME: (json.dumps(whole, indent=2, sort_keys=True) + "\n").encode()}


MAKER = GenaiMaker()


def _require(task: GraphTask) -> None:
    require_genai()
    if task.dtype is DType.F16 and task.provider == "cpu":
        raise ExportError(
            "--layout genai: onnxruntime-genai cannot generate in float16 on the CPU",
            hint="--dtype float32, or --provider cuda",
            code="provider-dtype",
        )


def _build(checkpoint: Path, task: GraphTask) -> Path:
    _write_tokenizer(checkpoint)
    output = _output(checkpoint)
    options = ["-i", str(checkpoint), "-o", str(output), "-p", _PRECISIONS[task.dtype], "-e", task.provider]
    command = [sys.executable, "-m", _MODULE, *options, "-c", str(output / "cache")]
    done = subprocess.run(  # noqa: S603 - our own interpreter, paths of ours
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode or not (output / "model.onnx").is_file():
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no reason given"]
        raise ExportError(
            f"onnxruntime-genai's builder cannot make this graph: {reason[0][:_MAX_REASON]}",
            hint="--layout transformers knows more architectures",
        )
    return output


def _tried(graph: Path, checkpoint: Path, task: GraphTask) -> tuple[Finding, ...]:
    """Run the graph beside the model, from an empty cache.

    Raises:
        ExportError: It does not run, or says something else.
    """
    if task.provider != "cpu":
        message = f"the graph was not run: only --provider cpu is tried here, not {task.provider}"
        return (Finding(code="untried", severity=Severity.WARN, target="model", message=message),)
    import torch

    from lora_deploy.export.trial import deviation
    from lora_deploy.rounding import torch_dtype

    with quiet():
        model = load_model(checkpoint, task.dtype)
    ids = torch.randint(model.config.vocab_size // 4, model.config.vocab_size // 2, (1, 7))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    session = open_session(graph, task.provider, n_threads=1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(7)[None]}
    config = model.config
    n_heads = config.num_key_value_heads or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    empty = torch.zeros(1, n_heads, 0, width, dtype=torch_dtype(task.dtype)).numpy()
    feed = {port.name: given[port.name].numpy() if port.name in given else empty for port in session.get_inputs()}
    try:
        found = torch.from_numpy(session.run(["logits"], feed)[0])
    except Exception as error:  # onnxruntime's own errors have no common class
        reason = " ".join(str(error).split())[:_MAX_REASON]
        raise ExportError(f"onnxruntime cannot run the graph of its own builder: {reason}") from error
    fault = deviation(found, expected, task.dtype)
    if fault:
        raise ExportError(f"the graph of onnxruntime-genai's builder is not the model: its logits {fault}")
    return ()


def _output(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}-built")


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one word: the builder insists on loading one, and the graph does not depend on it."""
    model = {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}
    content = {"version": "1.0", "added_tokens": [], "model": model}
    others = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps({**content, **others}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
