"""Run commands as a user does, within this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from click.testing import CliRunner, Result

from lora_deploy.cli import main


def run(*arguments: object) -> Result:
    """Run a command line."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def document(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    """Run a command line with ``--json``, and give what it printed."""
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def settings(values: Mapping[str, object]) -> list[str]:
    """Say values of a recipe on the command line."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
