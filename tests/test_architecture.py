"""The house keeps its shape: layers, start-up, errors, registries, the public verbs."""

import ast
import importlib
import json
import pickle
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lora_deploy
from lora_deploy import adapters, errors, updates
from lora_deploy.registry import Entry

makers = importlib.import_module("lora_deploy.export")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_deploy"
HEAVY = {
    "huggingface_hub",
    "numpy",
    "onnx",
    "onnxruntime",
    "peft",
    "pydantic",
    "safetensors",
    "torch",
    "transformers",
    "yaml",
}

EXIT_CODES = {
    "RecipeError": 2,
    "InputError": 3,
    "IncompatibleAdapterError": 4,
    "MergeError": 5,
    "ExportError": 6,
    "EvidenceError": 7,
    "ReleaseError": 8,
    "PushError": 9,
    "InconclusiveError": 10,
}


def _subclasses(cls: type) -> list[type]:
    return [cls, *(found for child in cls.__subclasses__() for found in _subclasses(child))]


ERRORS = [cls for cls in _subclasses(errors.LoraDeployError) if cls.__module__ == errors.__name__]


# ------------------------------------------------------------------------------------------------------------ start-up

ASK_FOR_HELP = """
import json, sys
from lora_deploy.cli import main

imported = {}
for arguments in [[], *([name] for name in main.commands)]:
    sys.argv = ["lora-deploy", *arguments, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
    imported[" ".join(arguments)] = sorted(sys.modules)
json.dump(imported, sys.stderr)
"""


def test_help_of_no_command_imports_a_tensor_library() -> None:
    done = subprocess.run([sys.executable, "-c", ASK_FOR_HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: lora-deploy" in done.stdout
    imported: dict[str, list[str]] = json.loads(done.stderr)
    assert {"", "export", "inspect", "merge", "try", "validate", "verify"} <= set(imported)
    assert {command: heavy for command, modules in imported.items() if (heavy := HEAVY & set(modules))} == {}


def test_the_package_and_its_registries_import_no_tensor_library() -> None:
    script = """
import sys, lora_deploy, lora_deploy.adapters, lora_deploy.errors, lora_deploy.export, lora_deploy.updates
assert lora_deploy.__version__
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "lora_deploy.adapters" in done.stdout.split()
    assert HEAVY & set(done.stdout.split()) == set()


# -------------------------------------------------------------------------------------------------------------- layers


@pytest.fixture
def copy_of_the_house(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "lora_deploy", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def _lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
    return subprocess.run(
        [*command, "--no-cache", "--no-logo"], cwd=root, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_contracts_hold(copy_of_the_house: Path) -> None:
    done = _lint_imports(copy_of_the_house)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("errors.py", "import lora_deploy.checkpoint", "lora_deploy.errors is not allowed to import"),
        ("tensors.py", "from lora_deploy.artifact import Artifact", "lora_deploy.tensors is not allowed to import"),
        ("updates/interface.py", "def f(): import lora_deploy.adapter", "lora_deploy.updates is not allowed to import"),
        ("utils.py", "", "lora_deploy.utils"),
        ("cli/__init__.py", "def f(): import torch", "lora_deploy.cli -> torch"),
        ("checkpoint.py", "import peft", "lora_deploy.checkpoint -> peft"),
        ("evidence/replay.py", "import peft", "lora_deploy.evidence.replay -> peft"),
    ],
)
def test_a_planted_wrong_import_breaks_a_contract(
    copy_of_the_house: Path, module: str, line: str, complaint: str
) -> None:
    with (copy_of_the_house / "lora_deploy" / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = _lint_imports(copy_of_the_house)
    assert done.returncode == 1
    assert complaint in done.stdout


def _imported_on_import(module: str, names: set[str]) -> set[str]:
    """Modules of the house that a module imports when it is imported itself: at its top level, packages included."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parents = {name.rsplit(".", k)[0] for name in imported for k in range(name.count(".") + 1)}
    return {name for name in parents & names if not f"{module}.".startswith(f"{name}.")}


def test_any_module_can_be_imported_first() -> None:
    names = {module.name for module in pkgutil.walk_packages([str(PACKAGE)], "lora_deploy.")}
    needs = {name: _imported_on_import(name, names) for name in names}
    while free := {name for name, needed in needs.items() if not needed}:
        needs = {name: needed - free for name, needed in needs.items() if name not in free}
    assert not needs, f"these import each other: {sorted(needs)}"


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("cls", ERRORS)
def test_an_error_survives_pickling_with_all_its_fields(cls: type[errors.LoraDeployError]) -> None:
    error = cls("runs/7: found 2, expected 3", hint="pass --alpha 3")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == "runs/7: found 2, expected 3"
    assert copy.hint == "pass --alpha 3"
    assert vars(copy) == vars(error)


def test_findings_travel_with_a_pickled_error() -> None:
    finding = errors.Finding(code="x", severity=errors.Severity.ERROR, target="w", message="found 2, expected 3")
    copy = pickle.loads(pickle.dumps(errors.IncompatibleAdapterError("no fit", findings=(finding,))))
    assert copy.findings == (finding,)


@pytest.mark.parametrize("cls", ERRORS)
def test_an_error_has_the_exit_code_of_its_family(cls: type[errors.LoraDeployError]) -> None:
    families = [EXIT_CODES[base.__name__] for base in cls.__mro__ if base.__name__ in EXIT_CODES]
    assert cls.exit_code == (families[0] if families else 1)
    assert families or cls is errors.LoraDeployError


@pytest.mark.parametrize("cls", ERRORS)
def test_an_error_stands_in_the_drawn_tree(cls: type[errors.LoraDeployError]) -> None:
    assert errors.__doc__ is not None
    assert cls.__name__ in errors.__doc__


def test_errors_have_codes_of_their_own() -> None:
    codes = [cls("x").code for cls in ERRORS]
    assert len(set(codes)) == len(codes)


def test_no_module_raises_a_bare_exception_class() -> None:
    bare = {"Exception", "BaseException", "RuntimeError", "LoraDeployError"}
    raised = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
        and node.exc.func.id in bare
    ]
    assert raised == []


# ---------------------------------------------------------------------------------------------------------- registries

REGISTRIES = [(adapters, adapters.READERS), (updates, updates.KINDS), (makers, makers.GRAPH_MAKERS)]


def _is_member(cls: type) -> bool:
    """Whether a class is something a registry lists: a reader, a graph maker, or a concrete kind of update."""
    update = importlib.import_module("lora_deploy.updates.interface").Update
    return (
        hasattr(cls, "recognises") or hasattr(cls, "draw") or (issubclass(cls, update) and not cls.__abstractmethods__)
    )


@pytest.mark.parametrize(("package", "registry"), REGISTRIES, ids=["READERS", "KINDS", "GRAPH_MAKERS"])
def test_every_reader_and_kind_is_registered_once(package: ModuleType, registry: tuple[Entry, ...]) -> None:
    names = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith(".interface")]
    defining = {
        module.__name__
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and _is_member(value)
    }
    assert sorted(entry.path.partition(":")[0] for entry in registry) == sorted(defining)


@pytest.mark.parametrize(("package", "registry"), REGISTRIES, ids=["READERS", "KINDS", "GRAPH_MAKERS"])
def test_names_of_a_registry_are_unique_and_summaries_one_line(
    package: ModuleType, registry: tuple[Entry, ...]
) -> None:
    assert len({entry.name for entry in registry}) == len(registry)
    assert all(entry.summary and "\n" not in entry.summary for entry in registry)


@pytest.mark.parametrize("entry", adapters.READERS, ids=lambda entry: entry.name)
def test_a_registered_reader_reads_the_format_it_is_registered_for(entry: Entry) -> None:
    reader = entry.load()
    assert reader.format == entry.name
    assert callable(reader.recognises)
    assert callable(reader.read)


@pytest.mark.parametrize("entry", makers.GRAPH_MAKERS, ids=lambda entry: entry.name)
def test_a_registered_graph_maker_has_the_name_it_is_registered_under(entry: Entry) -> None:
    maker = entry.load()
    assert maker.name == entry.name
    assert maker.packages
    assert callable(maker.draw)


@pytest.mark.parametrize("entry", updates.KINDS, ids=lambda entry: entry.name)
def test_a_registered_kind_is_a_concrete_update(entry: Entry) -> None:
    kind = entry.load()
    assert issubclass(kind, importlib.import_module("lora_deploy.updates.interface").Update)
    assert not kind.__abstractmethods__


# -------------------------------------------------------------------------------------------------------- public verbs


@pytest.mark.parametrize("verb", [name for name in lora_deploy.__all__ if name != "__version__"])
def test_a_public_verb_is_the_pipelines_function_whatever_was_imported_before(verb: str) -> None:
    script = f"""
import contextlib, importlib, types
import lora_deploy
with contextlib.suppress(ModuleNotFoundError):
    namesake = importlib.import_module("lora_deploy.{verb}")
    assert isinstance(namesake, types.ModuleType)
from lora_deploy import {verb}
import lora_deploy.pipeline
assert {verb} is lora_deploy.{verb} is lora_deploy.pipeline.{verb}, {verb}
assert isinstance({verb}, types.FunctionType), {verb}
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_public_verb_cannot_be_replaced_by_accident() -> None:
    with pytest.raises(TypeError, match="not to be replaced"):
        lora_deploy.merge = None
