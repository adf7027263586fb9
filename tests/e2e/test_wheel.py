"""The wheel that users get holds the whole package and works in an environment that never saw the checkout."""

import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest

import lora_deploy

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A virtual environment of its own and an empty folder to work in."""

    root: Path
    cwd: Path

    def run(self, *command: str) -> str:
        """Run one of the environment's programs; give what it printed."""
        variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        program = [str(self.root / "bin" / command[0]), *command[1:]]
        done = subprocess.run(program, cwd=self.cwd, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, symlinks=True)
    _pip("--python", str(root / "bin" / "python"), "install", str(wheel))
    (packages,) = root.glob("lib/python*/site-packages")
    # Dependencies come from the environment that runs the tests. A path added by a .pth file is searched last, and the
    # .pth files inside it (such as the one that points at this checkout) are not read.
    dependencies = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    return Environment(root=root, cwd=tmp_path_factory.mktemp("elsewhere"))


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "lora_deploy"
    kinds = {".py", ".typed", ".jinja"}
    expected = {str(path.relative_to(ROOT)) for path in package.rglob("*") if path.suffix in kinds}
    expected |= {f"lora_deploy/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert "lora_deploy/py.typed" in names


def test_the_wheel_carries_the_license_and_the_extras(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        (license_file,) = (name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    assert "License-Expression: Apache-2.0" in lines
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    engines = {"cpu", "gpu", "fast", "export", "genai", "diffusers"}
    assert extras == engines | {"release", "sign", "s3", "gs", "az", "ray", "demo", "dev"}


def test_the_installed_package_is_the_wheels_and_not_the_checkouts(environment: Environment) -> None:
    printed = environment.run("python", "-c", "import lora_deploy; print(lora_deploy.__file__)")
    assert Path(printed.strip()).is_relative_to(environment.root)


def test_the_installed_command_helps_and_says_its_version(environment: Environment) -> None:
    assert "Usage: lora-deploy" in environment.run("lora-deploy", "--help")
    assert lora_deploy.__version__ in environment.run("lora-deploy", "--version")


@pytest.mark.parametrize("command", ["inspect", "validate", "merge", "verify", "bench"])
def test_each_installed_command_explains_itself(environment: Environment, command: str) -> None:
    assert f"Usage: lora-deploy {command}" in environment.run("lora-deploy", command, "--help")


def test_the_installed_package_runs_as_a_module(environment: Environment) -> None:
    printed = environment.run("python", "-m", "lora_deploy", "--version")
    assert lora_deploy.__version__ in printed


def test_the_installed_command_knows_the_recipes_of_the_package(environment: Environment) -> None:
    found = json.loads(environment.run("lora-deploy", "recipe", "list", "--json"))["recipes"]
    assert set(found) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


def test_every_module_of_the_installed_package_imports(environment: Environment) -> None:
    script = """
import importlib, pkgutil, lora_deploy
names = [module.name for module in pkgutil.walk_packages(lora_deploy.__path__, "lora_deploy.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""
    assert int(environment.run("python", "-c", script)) > 1
