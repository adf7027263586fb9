"""The pipeline definitions for other projects: least rights, pinned actions, no stored token."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

CI = Path(__file__).parents[2] / "ci"
WORKFLOWS = sorted((CI / "github").glob("*.yml"))
TEMPLATES = [*WORKFLOWS, CI / "gitlab/release-adapter.yml"]


def document(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CI / name).read_text())
    return found


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_no_template_asks_for_a_stored_token(path: Path) -> None:
    text = path.read_text()
    assert "secrets." not in text
    assert "HF_TOKEN" not in text
    assert "pull_request_target" not in text


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_an_action_of_others_is_pinned_by_commit_with_its_version_beside_it(path: Path) -> None:
    for used in re.findall(r"uses: (.+)", path.read_text()):
        assert used.startswith("./") or re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", used)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_script_is_put_together_from_what_strangers_write(path: Path) -> None:
    found = yaml.safe_load(path.read_text())
    jobs = [found["runs"]] if "runs" in found else found["jobs"].values()
    for step in (step for job in jobs for step in job.get("steps", ())):
        assert "${{" not in step.get("run", "")


def test_each_job_has_the_rights_it_needs_and_only_a_tag_may_push() -> None:
    workflow = document("github/release-adapter.yml")
    assert workflow["permissions"] == {}
    rights = {name: job["permissions"] for name, job in workflow["jobs"].items()}
    assert rights == {
        "check": {"contents": "read"},
        "comment": {"actions": "read", "pull-requests": "write"},
        "release": {"contents": "read", "id-token": "write"},
    }
    assert "head.repo.full_name == github.repository" in workflow["jobs"]["comment"]["if"]
    modes = {
        name: [step["with"].get("mode") for step in job["steps"] if step.get("uses") == "./ci/github"]
        for name, job in workflow["jobs"].items()
    }
    assert modes == {"check": [None], "comment": [], "release": ["push"]}
    assert document("github/action.yml")["inputs"]["mode"]["default"] == "check"
    most = document("github/example.yml")["jobs"]["adapter"]["permissions"]
    assert most == {name: right for job in rights.values() for name, right in job.items()}


def test_a_merge_request_does_not_push_and_a_tag_does() -> None:
    jobs = document("gitlab/release-adapter.yml")
    assert jobs["lora-deploy check"]["script"] == ['ci/release.sh "$RECIPE" check']
    assert jobs["lora-deploy release"]["rules"] == [{"if": "$CI_COMMIT_TAG"}]
    assert "id_tokens" not in jobs["lora-deploy check"]
    assert jobs["lora-deploy release"]["script"][-1].startswith('ci/release.sh "$RECIPE" push')


def test_a_linter_of_workflows_finds_nothing(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("zizmor")
    if not program.is_file():
        pytest.skip("zizmor is not installed")
    shutil.copytree(CI, tmp_path / "ci")
    shutil.copytree(CI / "github", tmp_path / ".github/workflows", ignore=shutil.ignore_patterns("action.yml"))
    command = [str(program), "--offline", "--no-progress", "--min-severity", "medium", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["bug.yml", "format.yml", "wrong-merge.yml"])
def test_an_issue_template_asks_for_what_is_needed_to_look_into_it(name: str) -> None:
    template = yaml.safe_load((CI.parent / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    assert {"name", "description", "labels", "body"} == template.keys()
    fields = template["body"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["type"] in {"input", "textarea"} and field["attributes"]["label"] for field in fields)
