"""What becomes of errors: one clear line, a hint, one JSON document, the exit code of the family."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

import pytest
from click.testing import CliRunner, Result

from lora_deploy import errors, pipeline
from lora_deploy.cli import main

FAMILIES = {
    errors.RecipeError: 2,
    errors.MalformedAdapterError: 3,
    errors.UnsafeFileError: 3,
    errors.IncompatibleAdapterError: 4,
    errors.DiskSpaceError: 5,
    errors.OutputExistsError: 5,
    errors.ReplayError: 7,
    errors.HubUnavailableError: 9,
    errors.InconclusiveError: 10,
}

Failing = Callable[[BaseException], None]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Make the stage behind ``inspect`` raise."""

    def install(error: BaseException) -> None:
        def stage(*_: object, **__: object) -> NoReturn:
            raise error

        monkeypatch.setattr(pipeline, "inspect", stage)

    return install


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(("cls", "code"), FAMILIES.items(), ids=lambda value: getattr(value, "__name__", None))
def test_an_error_is_one_line_a_hint_and_its_familys_exit_code(
    cls: type[errors.LoraDeployError], code: int, failing: Failing
) -> None:
    failing(cls("runs/7: found 2, expected 3", hint="pass --alpha 3"))
    result = run("inspect", "runs/7")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.splitlines() == ["error: runs/7: found 2, expected 3", "hint: pass --alpha 3"]


def test_an_error_without_hint_is_one_line(failing: Failing) -> None:
    failing(errors.InputError("runs/7: empty"))
    assert run("inspect", "runs/7").stderr == "error: runs/7: empty\n"


def test_json_on_an_error_is_one_document_on_stdout(failing: Failing) -> None:
    failing(errors.InputError("runs/7: ‖Δ‖ is no number", hint="train again", code="no-number"))
    result = run("inspect", "runs/7", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == {
        "error": {"code": "no-number", "message": "runs/7: ‖Δ‖ is no number", "hint": "train again"}
    }


def test_json_on_misfits_lists_them_all(failing: Failing) -> None:
    findings = tuple(
        errors.Finding(code="target-missing", severity=errors.Severity.ERROR, target=f"t{k}", message="not in base")
        for k in range(100)
    )
    failing(errors.IncompatibleAdapterError("no fit: 100 errors", findings=findings))
    result = run("inspect", "runs/7", "--json")
    assert result.exit_code == 4
    listed = json.loads(result.stdout)["error"]["findings"]
    assert [finding["target"] for finding in listed] == [f"t{k}" for k in range(100)]
    assert listed[0]["severity"] == "error"


def test_quiet_still_prints_errors(failing: Failing) -> None:
    failing(errors.InputError("runs/7: empty"))
    assert run("inspect", "-q", "runs/7").stderr == "error: runs/7: empty\n"


def test_ctrl_c_exits_130_with_one_line(failing: Failing) -> None:
    failing(KeyboardInterrupt())
    result = run("inspect", "runs/7")
    assert (result.exit_code, result.stderr) == (130, "error: interrupted\n")


def test_ctrl_c_with_json_is_a_document_too(failing: Failing) -> None:
    failing(KeyboardInterrupt())
    result = run("inspect", "runs/7", "--json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["error"]["code"] == "interrupted"


def test_a_bug_keeps_its_traceback_and_exits_70(failing: Failing) -> None:
    failing(KeyError("model.layers.0"))
    result = run("inspect", "runs/7", "--json")
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "in stage" in result.stderr
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "bug"
    assert error["message"] == "KeyError: 'model.layers.0'"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["inspect"], "Missing argument 'ADAPTER'"),
        (["merge"], "Missing argument 'ADAPTER...'"),
        (["merge", "a", "--dtype", "int8"], "'int8' is not one of"),
        (["merge", "a", "--memory", "lots"], "expected a size such as 5GB"),
        (["merge", "a", "--weight", "nan"], "expected a finite number"),
        (["merge", "a", "--enable-lora", "yes"], "expected T and F"),
        (["merge", "a", "--device", "tpu"], "expected auto, cpu, cuda"),
        (["merge", "a", "--tokenizer", "none"], "is not one of"),
        (["merge", "a", "--no-such-option"], "No such option '--no-such-option'"),
        (["fuse", "a"], "No such command 'fuse'"),
    ],
)
def test_a_usage_error_exits_2_and_says_what_is_wrong(arguments: list[str], complaint: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stdout == ""
    as_json = run(*arguments, "--json")
    assert as_json.exit_code == 2
    error = json.loads(as_json.stdout)["error"]
    assert error["code"] == "usage"
    assert complaint in error["message"]


def test_a_reader_that_goes_away_is_no_error_to_talk_about() -> None:
    script = "import sys; from lora_deploy.cli import main; sys.argv = ['lora-deploy', 'inspect', sys.argv[1]]; main()"
    adapter = "examples/adapters/smollm2-json"
    reader = subprocess.Popen(
        [sys.executable, "-c", script, adapter], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stderr is not None
    reader.stdout.close()
    complaints = reader.stderr.read()
    assert (reader.wait(), complaints) == (1, "")
    reader.stderr.close()
