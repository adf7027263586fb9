"""What the documentation shows is true: its commands are commands, its Python runs, its recipes are recipes."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_deploy.cli import main
from lora_deploy.recipe.read import read_recipe
from tests import pipelines
from tests.docs.blocks import ALL, FILES, GENERATED, ROOT, blocks_of, commands_of
from tests.e2e.commands import run
from tests.merging import digests
from tests.peer.models import llama
from tests.peer.test_diffusion_formats_peer import (
    SINGLE_FILES,
    kohya_file,
    loaded,
    of_text,
    of_unet,
    single_file,
)
from tests.peer.trained import Trained, train

COMMANDS = {f"{block.name} {line}": line for block in ALL for line in commands_of(block)}
PLACEHOLDER = re.compile(r"\b(ADAPTER|BASE|OUT|GRAPH|RELEASE|TARGET|FOLDER|FILE|NAME|CODE)\b|…|\.\.\.|\[option")
"""What a reader is to fill in: such a line shows a form, no command."""
ELSEWHERE = {"push", "pull"}
"""Commands of the tutorial that need a hub: a folder stands for it."""


def save_tokenizer(folder: Path) -> None:
    """As many words as the model has tokens, and those of the tutorial's prompt among them."""
    words = ["<unk>", "a", "prompt", *(f"word{k}" for k in range(34))]
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="word33").save_pretrained(folder)  # noqa: S106


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("tutorial")
    model = llama(hidden_size=64, intermediate_size=96)
    made = train(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), folder)
    save_tokenizer(made.base)
    (made.base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return made


@pytest.fixture
def here(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the names of the documentation are real: ``runs/7`` and the base ``owner/name``."""
    for name, place in (("runs/7", trained.adapter), ("runs/8", trained.adapter), ("owner/name", trained.base)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(place)
    (tmp_path / "many").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(line: str) -> list[str]:
    return shlex.split(line.partition("  #")[0].partition("    (")[0].partition(" > ")[0], comments=False)[1:]


def parse(words: list[str]) -> None:
    """Have click read a command line without carrying it out."""
    command: click.Command | None = main
    with click.Context(main, **main.context_settings) as context:
        while isinstance(command, click.Group):
            name, *words = words
            command = command.get_command(context, name)
        assert command is not None, name
        command.make_context(name, words, parent=context)


@pytest.mark.parametrize("where", COMMANDS)
def test_a_command_that_is_shown_is_one(where: str, here: Path) -> None:
    line = COMMANDS[where]
    if PLACEHOLDER.search(line.partition("  #")[0]):
        line = re.sub(r"\[[^\]]*\]|\.\.\.|…", "", line)
    words = [word for word in words_of(line) if not word.startswith("[")]
    with contextlib.suppress(click.exceptions.Exit):
        parse(words)


def test_every_command_is_shown_somewhere() -> None:
    shown = {words_of(line)[0] for line in COMMANDS.values()}
    assert set(main.commands) <= shown | {"formats"}


@pytest.mark.slow
def test_the_tutorial_of_the_readme_runs_as_it_stands(here: Path) -> None:
    """Line by line, in order; the options of the table's own lines and nothing else."""
    block = next(block for block in ALL if block.file == "README.md" and "lora-deploy inspect  runs/7" in block.text)
    for line in commands_of(block):
        words = words_of(line)
        if words[0] in ELSEWHERE:
            words = [word.replace("owner/name", (here / "hub").as_uri()) for word in words]
        if words[0] == "run":
            (here / "recipe.yaml").write_text("adapters: [runs/7]\nbase: owner/name\nexport: false\nevidence: false\n")
        result = run(*words)
        if words[0] == "release" and result.exit_code == 8:  # on a busy machine latency may stay open
            result = run(*words, "--accept", "latency-inconclusive", "--because", "a busy machine")
        assert result.exit_code in ({0, 10} if words[0] in {"verify", "bench", "run"} else {0}), (line, result.stderr)
    assert (here / "hub" / "lora_deploy.json").is_file()
    assert digests(here / "copy") == digests(here / "hub")


@pytest.mark.slow
def test_the_tutorial_of_a_kohya_file_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of every block, in a folder where the names of the tutorial are tiny and real."""
    base = pipelines.stable_diffusion_xl(tmp_path / "sdxl")
    single_file(base, SINGLE_FILES["stable_diffusion_xl"][1], tmp_path / "sdxl.safetensors")
    text, other = loaded(base).text_encoder, loaded(base).text_encoder_2
    kohya_file(
        tmp_path / "style.safetensors",
        of_unet(base, ldm=True) | of_text(text, "lora_te1") | of_text(other, "lora_te2"),
    )
    monkeypatch.chdir(tmp_path)
    for block in ALL:
        for line in commands_of(block) if block.file == "docs/tutorials/sdxl.md" else ():
            result = run(*words_of(line))
            assert result.exit_code == 0, (line, result.stderr)
    assert (tmp_path / "style-peft" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_the_readmes_python_runs(here: Path) -> None:
    block = next(block for block in ALL if block.file == "README.md" and "from lora_deploy import" in block.text)
    code = block.text.replace('.verdict == "pass"', '.verdict in ("pass", "inconclusive")')
    exec(compile(code, block.name, "exec"), {})  # noqa: S102 - the README's own
    assert (here / "7-merged" / "merge.json").is_file()


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "python"], ids=lambda block: block.name)
def test_python_that_is_shown_compiles_and_names_what_exists(block: object) -> None:
    import onnxruntime
    import onnxruntime_genai

    modules = {"onnxruntime": onnxruntime, "onnxruntime_genai": onnxruntime_genai}
    code = block.text  # type: ignore[attr-defined]
    compile(code, block.name, "exec")  # type: ignore[attr-defined]
    for module, name in re.findall(r"\b(onnxruntime|onnxruntime_genai)\.(\w+)", code):
        assert hasattr(modules[module], name), (module, name)


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "yaml"], ids=lambda block: block.name)
def test_yaml_that_is_shown_is_a_recipe_or_a_pipeline(block: object, tmp_path: Path) -> None:
    text = block.text  # type: ignore[attr-defined]
    if "adapters:" in text:
        (tmp_path / "recipe.yaml").write_text(text)
        read_recipe(tmp_path / "recipe.yaml", ())
    else:
        assert yaml.safe_load(text)


def test_what_documents_link_to_is_there() -> None:
    """Every relative link of every document leads to a file of this repository, and to a heading where it names one."""
    lost = []
    for file in (*FILES, *(f"docs/adr/{path.name}" for path in (ROOT / "docs" / "adr").glob("*.md"))):
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / file).read_text(encoding="utf-8")):
            if "://" in target or target.startswith("#") or file in GENERATED:
                continue
            path = (ROOT / file).parent / target.partition("#")[0]
            if not path.exists():
                lost.append(f"{file}: {target}")
    assert not lost


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 250
    assert os.access(ROOT / "ci" / "release.sh", os.X_OK)


def headings_of(file: str) -> list[int]:
    """Levels of the headings, in order."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [len(line.split(" ")[0]) for line in lines if re.match(r"#+ ", line)]


def test_the_chinese_readme_has_the_headings_blocks_tables_and_links_of_the_english_one() -> None:
    english, chinese = "README.md", "README.zh-CN.md"
    assert headings_of(chinese) == headings_of(english)
    assert [block.text for block in blocks_of(chinese)] == [block.text for block in blocks_of(english)]
    texts = [(ROOT / file).read_text(encoding="utf-8") for file in (english, chinese)]
    own = {"README.md", "README.zh-CN.md"}
    links, numbers = ([set(re.findall(pattern, text)) for text in texts] for pattern in (r"\]\((\S+?)\)", r"`[^`\n]+`"))
    assert links[0] - own == links[1] - own
    assert numbers[0] == numbers[1]
    rows = [[line.count("|") for line in text.splitlines() if line.startswith("|")] for text in texts]
    assert rows[0] == rows[1]
