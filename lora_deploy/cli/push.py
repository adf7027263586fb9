"""``lora-deploy push`` and ``pull``: a release to a target, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_deploy.cli.numbers import format_size
from lora_deploy.cli.options import chosen, output_options
from lora_deploy.cli.screen import Screen
from lora_deploy.hubs.options import PushOptions

_token_option = click.option(
    "--token",
    metavar="TOKEN",
    help="Token of the hub, or of a registry (user:password too). Better: HF_TOKEN in the environment, or a login. "
    "It is never printed or written.",
)


def _one_of_two(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if not 1 <= len(value) <= 2:
        raise click.BadParameter(f"found {len(value)} arguments, expected [RELEASE] TARGET", ctx=ctx, param=param)
    return value


@click.command(short_help="Publish a release, all or nothing.")
@click.argument("places", nargs=-1, required=True, metavar="[RELEASE] TARGET", callback=_one_of_two)
@click.option("--revision", metavar="BRANCH", help="Branch to push to; it is made where it is missing. Default: main.")
@click.option("--private/--public", default=None, help="Visibility of a repository that is made. Default: private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request in place of committing to the branch.")
@click.option("--tag", metavar="TAG", help="Tag to set on the commit.")
@_token_option
@click.option("--commit-message", metavar="TEXT", help="Message of the one commit.")
@click.option("--dry-run", is_flag=True, help="Plan only, write nothing.")
@click.option(
    "--yes",
    is_flag=True,
    help="Replace what is at a target that keeps no history, and remove what is of no release of ours.",
)
@output_options
@click.pass_obj
def push(
    screen: Screen,
    /,
    places: tuple[str, ...],
    dry_run: bool,
    **choices: Any,  # noqa: ANN401 - options by name
) -> None:
    """Publish the release in RELEASE, by default the current folder, to TARGET.

    TARGET is owner/name[@rev] or hf://owner/name[@rev] on a Hugging Face compatible hub (HF_ENDPOINT, HF_TOKEN),
    oci://host/ns/name:tag in a container registry (docker's login, or --token user:password), s3://bucket/prefix,
    gs://bucket/prefix or az://container/prefix in an object store (extras s3, gs, az), or a folder: ./folder, /folder,
    file:///folder. Exactly what the manifest names is sent, in one step wherever the target has one; then the target's
    own digests are compared with the manifest. A push that broke off resumes: what the target has is not sent again.

    \b
    Examples:
      lora-deploy push 7-release owner/name --tag v1
      lora-deploy push 7-release /mnt/models/7
    """  # noqa: D301 - \b is click's mark for text that keeps its lines
    from lora_deploy import pipeline

    *folder, target = places
    options = chosen(PushOptions, choices)
    if dry_run:
        would = pipeline.preview_push(folder[0] if folder else None, target, options=options)
        n_bytes = sum(file.n_bytes for file in would.to_send)
        files = [{"path": str(f.path), "n_bytes": f.n_bytes, "sha256": f.sha256} for f in would.to_send]
        screen.publish({"dry_run": True, "url": would.url, "to_send": files, "notes": would.notes})
        screen.line(f"would push to {would.url}")
        screen.fields([("to send", f"{len(files)} files, {format_size(n_bytes)}"), *(("note", n) for n in would.notes)])
        return
    screen.resumes = "; the same command resumes"
    receipt = pipeline.push(folder[0] if folder else None, target, options=options, progress=screen.progress())
    screen.publish({"receipt": receipt})
    screen.line(f"pushed to {receipt.url}")
    screen.fields(
        [
            *([("revision", receipt.revision)] if receipt.revision else []),
            ("sent", f"{format_size(receipt.n_sent_bytes)} of {format_size(receipt.n_bytes)}"),
            ("read back", f"{len(receipt.digests)} digests, all equal"),
            *([("tag", receipt.tag)] if receipt.tag else []),
            *([("pull request", receipt.pull_request)] if receipt.pull_request else []),
            *(("note", note) for note in receipt.notes),
        ]
    )


@click.command(short_help="Fetch a release and check every digest.")
@click.argument("target")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@_token_option
@output_options
@click.pass_obj
def pull(screen: Screen, /, target: str, folder: Path, token: str | None) -> None:
    """Fetch the release at TARGET into DIR, which appears whole or not at all.

    Every file is compared with the manifest; lora-deploy verify DIR then works on it.
    """
    from lora_deploy import pipeline

    manifest = pipeline.pull(target, folder, options=PushOptions(token=token), progress=screen.progress())
    n_bytes = sum(file.n_bytes for file in manifest.files)
    screen.publish({"folder": folder, "content_digest": manifest.content.digest, "manifest": manifest})
    screen.line(f"pulled {manifest.name} to {folder}")
    screen.fields([("files", f"{len(manifest.files)}, {format_size(n_bytes)}, every digest as in the manifest")])
