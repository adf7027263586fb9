"""``lora-deploy try``: talk to what is about to be shipped."""

from __future__ import annotations

from pathlib import Path

import click

from lora_deploy.cli.numbers import format_seconds
from lora_deploy.cli.options import output_options
from lora_deploy.cli.screen import Screen


@click.command("try", short_help="Let an exported model answer a prompt.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("prompt", metavar="PROMPT")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="Longest answer."
)
@click.option("--raw", "is_raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--adapter", metavar="NAME", help="Switch this adapter on, one of an export --multi-lora.")
@output_options
@click.pass_obj
def try_prompt(
    screen: Screen, /, folder: Path, prompt: str, max_tokens: int, is_raw: bool, adapter: str | None
) -> None:
    """Answer PROMPT with the graphs in DIR, or in DIR/onnx: the most likely tokens, as onnxruntime finds them.

    \b
    Examples:
      lora-deploy try 7-merged "The capital of France is"
      lora-deploy try many "The capital of France is" --adapter fr
    """  # noqa: D301 - \b is click's mark for text that keeps its lines
    from lora_deploy import pipeline

    answer = pipeline.answer_prompt(
        folder,
        prompt,
        max_tokens=max_tokens,
        is_raw=is_raw,
        adapter=adapter,
        say=screen.piece if screen.shows_text else None,
    )
    screen.publish(
        {
            "text": answer.text,
            "n_prompt_tokens": answer.n_prompt_tokens,
            "n_tokens": answer.n_tokens,
            "prefill_s": answer.prefill_s,
            "decode_s": answer.decode_s,
            "tokens_per_s": answer.tokens_per_s,
        }
    )
    screen.line()
    rate = f", {answer.tokens_per_s:.1f} tokens/s" if answer.tokens_per_s else ""
    screen.line(f"first token after {format_seconds(answer.prefill_s)}, {answer.n_tokens} tokens{rate}")
