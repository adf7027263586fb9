"""``lora-deploy bench``: how fast a folder's graphs are, alone or beside another folder's."""

from __future__ import annotations

from pathlib import Path

import click

from lora_deploy.cli.options import latency_options, output_options, provider_option
from lora_deploy.cli.screen import Screen


@click.command(short_help="Time ONNX graphs, alone or beside others.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="DIR2",
    help="Another folder with graphs: the ratio of both times, in fresh pairs of sessions.",
)
@provider_option
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Threads of each session."
)
@latency_options
@output_options
@click.pass_obj
def bench(
    screen: Screen,
    /,
    folder: Path,
    against: Path | None,
    provider: str,
    threads: int,
    latency_bound: float,
    seconds: float,
) -> None:
    """Time the ONNX graphs in DIR: reading 64 tokens, then adding one to them over the cache.

    With --against, both folders' graphs are loaded again and again, in random order, and timed in turns: byte-identical
    graphs differ by a per cent or two within one pair of sessions, so that a pair counts as one observation.

    \b
    Examples:
      lora-deploy bench 7-merged
      lora-deploy bench 7-merged --against base-onnx --seconds 120
    """  # noqa: D301 - \b is click's mark for text that keeps its lines
    from lora_deploy import pipeline
    from lora_deploy.cli.latency_tables import show_bench
    from lora_deploy.evidence.latency import LatencyOptions

    options = LatencyOptions(bound=latency_bound, seconds=seconds, provider=provider, n_threads=threads)
    found = pipeline.bench(folder, against=against, options=options, progress=screen.progress())
    screen.publish({"folder": folder, "against": against, **found.to_json()})
    show_bench(screen, found, folder, against)
