"""Help that one can work from: every option of every command is there and says what it does."""

import click
import pytest
from click.testing import CliRunner

from lora_deploy.cli import main

READ = {"--alpha", "--adapter-name", "--enable-lora", "--base-is-residual", "--mlx-legacy-alpha"}
BIND = {
    "--base",
    "--weight",
    "--include",
    "--exclude",
    "--component",
    "--variant",
    "--dequantize",
    "--into-language-model",
}
SHOWN = {"--json", "-q", "--quiet", "-h", "--help"}
OPTIONS = {
    "inspect": READ | SHOWN,
    "validate": READ | BIND | SHOWN | {"--onnx"},
    "merge": READ
    | BIND
    | SHOWN
    | {"-o", "--output", "--dtype", "--device", "--tokenizer", "--max-shard-size", "--memory", "--dry-run", "--fresh"}
    | {"--task-index", "--task-count", "--finalize", "--executor"},
    "export": READ
    | BIND
    | SHOWN
    | {"--onnx", "-o", "--output", "--adapter", "--dtype", "--provider", "--weights", "--layout", "--maker"}
    | {"--device", "--memory", "--dry-run", "--fresh", "--multi-lora", "--targets", "--into"}
    | {"--quantize", "--block-size", "--symmetric"},
    "try": SHOWN | {"--max-tokens", "--raw", "--adapter"},
    "verify": READ
    | BIND
    | SHOWN
    | {
        "--adapter",
        "--device",
        "--memory",
        "--only",
        "--skip",
        "--probes",
        "--public-key",
        "--certificate",
        "--layerwise",
        "--provider",
        "--latency-bound",
        "--seconds",
    },
}


OPTIONS["release"] = SHOWN | {
    "--onnx",
    "-o",
    "--output",
    "--license",
    "--card-template",
    "--sign-key",
    "--sign-certificate",
    "--accept",
    "--because",
    "--fresh",
}
OPTIONS["push"] = SHOWN | {
    "--revision",
    "--private",
    "--create-pr",
    "--tag",
    "--token",
    "--commit-message",
    "--dry-run",
    "--yes",
}
OPTIONS["run"] = SHOWN | {
    "--from",
    "--until",
    "--only",
    "--set",
    "--fresh",
    "--dry-run",
    "--token",
    "--junit",
    "--executor",
}
OPTIONS["convert"] = READ | BIND | SHOWN | {"--to", "-o", "--output"}
OPTIONS["formats"] = SHOWN | {"--markdown"}
OPTIONS["doctor"] = SHOWN
OPTIONS["pull"] = SHOWN | {"--token"}
OPTIONS["bench"] = SHOWN | {"--against", "--provider", "--threads", "--latency-bound", "--seconds"}


def options_of(name: str) -> list[click.Option]:
    command = main.commands[name]
    with click.Context(command, help_option_names=["-h", "--help"]) as context:
        return [option for option in command.get_params(context) if isinstance(option, click.Option)]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_command_has_the_options_it_promises(name: str) -> None:
    assert {spelling for option in options_of(name) for spelling in option.opts} == OPTIONS[name]


def test_there_are_no_other_commands() -> None:
    assert set(main.commands) == set(OPTIONS) | {"recipe"}
    group = main.commands["recipe"]
    assert isinstance(group, click.Group)
    assert set(group.commands) == {"init", "show", "schema", "list"}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_says_what_it_does(name: str) -> None:
    assert [option.name for option in options_of(name) if not option.help] == []


@pytest.mark.parametrize("name", OPTIONS)
def test_help_fits_eighty_columns(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"], terminal_width=80)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_first_page_names_commands_exit_codes_and_a_tour() -> None:
    text = " ".join(CliRunner().invoke(main, ["--help"]).stdout.split())
    for needed in ("lora-deploy merge", "7 verification failed", "130 interrupted", "GiB is accepted"):
        assert needed in text


def test_the_version_is_the_packages() -> None:
    assert CliRunner().invoke(main, ["--version"]).stdout.startswith("lora-deploy, version 0.")
