"""The command line: options in, one stage of the pipeline, tables or JSON out, exit codes.

Promise: ``--help`` imports no tensor library; commands import the pipeline when they run. This is the one place that
catches ``LoraDeployError``: one clear line, a hint, and the exit code of its family. Besides: 0 done, 2 usage, 70 a bug
(with its traceback), 130 interrupted.
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import Any

import click

from lora_deploy.cli.bench import bench
from lora_deploy.cli.convert import convert
from lora_deploy.cli.doctor import doctor
from lora_deploy.cli.export import export
from lora_deploy.cli.formats import formats
from lora_deploy.cli.inspect import inspect
from lora_deploy.cli.merge import merge
from lora_deploy.cli.push import pull, push
from lora_deploy.cli.recipe import recipe
from lora_deploy.cli.release import release
from lora_deploy.cli.run import run as run_recipe
from lora_deploy.cli.screen import Screen
from lora_deploy.cli.try_prompt import try_prompt
from lora_deploy.cli.validate import validate
from lora_deploy.cli.verify import verify
from lora_deploy.errors import LoraDeployError

_BUG, _INTERRUPTED = 70, 130


class CommandLine(click.Group):
    """All commands, and what becomes of their errors."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's signature
        """Run a command; turn errors into lines and exit codes."""
        screen = ctx.obj = Screen(as_json="--json" in ctx.args)
        status = self._run(ctx, screen)
        screen.close()
        ctx.exit(status)

    def _run(self, ctx: click.Context, screen: Screen) -> int:
        try:
            super().invoke(ctx)
        except LoraDeployError as error:
            screen.fail(error)
            return error.exit_code
        except KeyboardInterrupt:
            screen.fail_interrupted()
            return _INTERRUPTED
        except click.ClickException as error:
            if not screen.as_json:
                raise
            error.show()
            screen.fail_usage(error)
            return error.exit_code
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a bug of ours
            screen.fail_bug(error)
            return _BUG
        return screen.exit_code


@click.group(
    cls=CommandLine,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Sizes are decimal (5GB), GiB is accepted. Exit status: 0 done, 2 usage, 3 unusable input, 4 adapter and "
    "base do not fit, 5 merge failed, 6 export failed, 7 verification failed, 8 release failed, 9 push failed, "
    "10 could not be verified, 70 a bug, 130 interrupted.",
)
@click.version_option(package_name="lora-deploy", prog_name="lora-deploy")
def main() -> None:
    """Merge trained LoRA adapters into their base model, exactly, and check the result.

    \b
    A first tour:
      lora-deploy inspect  runs/7                     what the adapter holds
      lora-deploy validate runs/7 --base owner/name   whether it fits, every misfit at once
      lora-deploy merge    runs/7 --base owner/name   the merged checkpoint, in ./7-merged
      lora-deploy export   7-merged --onnx            graphs for onnxruntime, in 7-merged/onnx
      lora-deploy verify   7-merged                   its bytes, its answers and its speed, proven
      lora-deploy bench    7-merged                   how fast its graphs are
      lora-deploy release  7-merged                   with card and manifest, in 7-release
      lora-deploy push     7-release owner/name       all of it or nothing, read back
      lora-deploy run      recipe.yaml                all of that, with one verdict
    """  # noqa: D301 - \b is click's mark for text that keeps its lines


def run() -> None:
    """Be the program: run ``main`` and end, without taking apart what the tensor library made, which takes a second."""
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    atexit._run_exitfuncs()  # noqa: SLF001 - what Python does at this point
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


_COMMANDS = (
    *(inspect, formats, convert, validate, merge, export, verify, bench, try_prompt, release, push, pull),
    *(run_recipe, recipe, doctor),
)
for _command in _COMMANDS:
    main.add_command(_command)
