"""``lora-deploy release``: a merged folder and its evidence in, a folder that can be published out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_deploy.cli.numbers import format_size
from lora_deploy.cli.options import chosen, output_options
from lora_deploy.cli.screen import Screen
from lora_deploy.errors import Finding, Severity
from lora_deploy.release.options import Acceptance, ReleaseOptions

if TYPE_CHECKING:
    from lora_deploy.release.assemble import Release


@click.command(short_help="Put weights, graphs and evidence together as a release.")
@click.argument("folder", required=False, metavar="[MERGED]", type=click.Path(path_type=Path))
@click.option(
    "--onnx",
    "graphs",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of an export to take along. Repeatable. Default: those inside MERGED.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Folder of the release. Default: beside MERGED, named <name>-release.",
)
@click.option("--license", metavar="ID", help="Licence to state, such as apache-2.0. Default: the base's own.")
@click.option(
    "--card-template",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Your own text for the model card: Markdown with Jinja expressions.",
)
@click.option(
    "--sign-key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Private elliptic key (PEM) to sign with: OpenSSF model signing, offline, into model.sig.",
)
@click.option(
    "--sign-certificate",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Certificate of the key (PEM), then those of its issuers: signed with it, for verify --certificate.",
)
@click.option(
    "--accept",
    "accepted",
    multiple=True,
    metavar="CODE",
    help="Release although this is not proven, such as parity-inconclusive; each with a --because. What failed is "
    "never released.",
)
@click.option(
    "--because",
    "reasons",
    multiple=True,
    metavar="TEXT",
    help="Why, for each --accept; it is written into the release.",
)
@click.option("--fresh", is_flag=True, help="Replace another release at OUT.")
@output_options
@click.pass_obj
def release(
    screen: Screen,
    /,
    folder: Path | None,
    graphs: tuple[Path, ...],
    output: Path | None,
    accepted: tuple[str, ...],
    reasons: tuple[str, ...],
    **choices: Any,  # noqa: ANN401 - options by name
) -> None:
    """Put the merged model in MERGED, its graphs and its evidence together as a release.

    MERGED defaults to the current folder if it holds a merge.json, or the export.json of an export straight from
    adapter and base. Its evidence.json, written by verify, must be about these very files and say pass for every check;
    what is missing or inconclusive can be accepted by name, with a reason. The release has a model card and a manifest
    that lists every file with its sha256.

    \b
    Examples:
      lora-deploy release 7-merged
      lora-deploy release 7-merged --accept latency-missing --because "no graphs"
    """  # noqa: D301 - \b is click's mark for text that keeps its lines
    from lora_deploy import pipeline

    if len(accepted) != len(reasons):
        raise click.UsageError(f"found {len(accepted)} --accept and {len(reasons)} --because, expected as many of each")
    acceptances = tuple(Acceptance(code=c, because=b) for c, b in zip(accepted, reasons, strict=True))
    options = chosen(ReleaseOptions, choices | {"accepted": acceptances})
    _show(
        screen,
        pipeline.release(folder, output=output, graphs=graphs, options=options, progress=screen.progress()),
    )


def _show(screen: Screen, made: Release) -> None:
    manifest = made.manifest
    screen.publish(
        {
            "output": made.root,
            "was_done": made.was_done,
            "content_digest": manifest.content.digest,
            "manifest": manifest,
        }
    )
    said = "was released before, from the same files" if made.was_done else "released"
    screen.line(f"{made.root}: {said}")
    n_bytes = sum(file.n_bytes for file in manifest.files)
    screen.fields(
        [
            ("files", f"{len(manifest.files)}, {format_size(n_bytes)}"),
            ("evidence", ", ".join(f"{check} {verdict}" for check, verdict in manifest.evidence.verdicts.items())),
            *(("accepted", f"{entry.code}: {entry.because}") for entry in manifest.accepted),
            ("content", manifest.content.digest),
        ]
    )
    screen.findings(
        Finding(code=f.code, severity=Severity(f.severity), target=f.target, message=f.message)
        for f in manifest.findings
    )
