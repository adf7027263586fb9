"""Files that travel with weights: tokenizer, chat template, processor and generation files, the base's own code files.

They come from the adapter's folder where it holds them, else from the base. A tokenizer is taken whole: an adapter that
brings a vocabulary brings all tokenizer files.

Promise: only files that lie in the folder itself are named (or in the cache behind a hub snapshot); ``.py`` files come
from the base only, because its configuration names them, and are copied, never run. ``config.json`` is not among them:
the merge writes it. A diffusion pipeline's files all travel: its index, schedulers, tokenizers and processors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_deploy.checkpoint import Checkpoint, contained_path, read_json
from lora_deploy.errors import Finding, MalformedCheckpointError, RecipeError, Severity
from lora_deploy.pipeline_layout import CONFIG_NAME, MODEL_INDEX, is_weight_file, listed_components

if TYPE_CHECKING:
    from lora_deploy.adapter import Adapter

_VOCABULARY = ("tokenizer.json", "vocab.*", "*.model", "*.spm", "*.tiktoken", "tekken.json")
_TOKENIZER = (
    *_VOCABULARY,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "normalizer.json"),
)
_TEMPLATE = ("chat_template.*",)
_OTHERS = ("*preprocessor_config.json", "processor_config.json", "generation_config.json", "feature_extractor*.json")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def companion_files(adapters: Sequence[Adapter], checkpoint: Checkpoint, choice: str | None = None) -> dict[str, Path]:
    """Name the files that travel, and where each lies.

    ``choice`` is ``base`` or ``adapter``: whose files travel; None is the adapter's where it has them, else the base's.
    Of several adapters the first that has a file gives it.

    Raises:
        RecipeError: The adapter's tokenizer is wanted, and none of them has one.
        UnsafeFileError: A file is a link out of its folder.
    """
    root = checkpoint.root
    if checkpoint.components:
        return _pipeline_files(checkpoint)
    files = {name: contained_path(root, name) for name in _names(root, (*_TOKENIZER, *_TEMPLATE, *_OTHERS))}
    if choice != "base":
        folders = adapter_folders(adapters, checkpoint)
        if choice == "adapter" and not any(_has_vocabulary(folder) for folder in folders):
            raise RecipeError("--tokenizer adapter: no adapter's folder holds a tokenizer", hint="--tokenizer base")
        for folder in reversed(folders):
            if _has_vocabulary(folder):
                own_template = _template(folder) is not None
                dropped = (*_TOKENIZER, *_TEMPLATE) if own_template else _TOKENIZER
                files = {name: path for name, path in files.items() if not _matches(name, dropped)}
            own = _names(folder, (*_TOKENIZER, *_TEMPLATE, *_OTHERS))
            files |= {name: contained_path(folder, name) for name in own}
    if "auto_map" in checkpoint.config:
        files |= {name: contained_path(root, name) for name in _names(root, ("*.py",))}
    return dict(sorted(files.items()))


def _pipeline_files(pipeline: Checkpoint) -> dict[str, Path]:
    """Name everything of a pipeline but weights and what the merge writes itself, the components' configurations."""
    root = pipeline.root
    names = _names(root, (MODEL_INDEX, *_LICENCES))
    for component in listed_components(root, read_json(contained_path(root, MODEL_INDEX))):
        for name in _names(root / component, ("*",)):
            is_written = component in pipeline.components and name == CONFIG_NAME
            if not (is_written or is_weight_file(name) or name.startswith(".") or name.endswith(".py")):
                names.append(f"{component}/{name}")
    return {name: contained_path(root, name) for name in sorted(names)}


def adapter_folders(adapters: Sequence[Adapter], checkpoint: Checkpoint) -> list[Path]:
    """Give the folders that adapters lie in, in order, but not the base's own."""
    folders = dict.fromkeys(adapter.path.parent for adapter in adapters)
    return [folder for folder in folders if folder.is_dir() and folder.resolve() != checkpoint.root.resolve()]


def check_companions(
    adapters: Sequence[Adapter], checkpoint: Checkpoint, n_tokens: int | None, choice: str | None = None
) -> Iterator[Finding]:
    """Find what the tokenizers of adapters and base disagree about, and token ids that no embedding row is for.

    ``n_tokens`` is the number of rows of the merged embedding; None when the model has none that is known.
    """
    root = checkpoint.root
    for folder in adapter_folders(adapters, checkpoint) if choice != "base" else ():
        try:
            yield from _changes(folder, root)
            if n_tokens is not None and _has_vocabulary(folder):
                yield from _outside(folder, n_tokens)
        except MalformedCheckpointError as error:
            yield _finding("companion-unreadable", Severity.ERROR, str(folder), error.message)


def _changes(folder: Path, root: Path) -> Iterator[Finding]:
    ours, bases = _json(folder, "tokenizer_config.json"), _json(root, "tokenizer_config.json")
    if ours and bases:
        for token in _SPECIAL_TOKENS:
            mine, theirs = _text(ours.get(token)), _text(bases.get(token))
            if token in ours and mine != theirs:
                severity = Severity.WARN if token in {"bos_token", "eos_token"} else Severity.NOTE
                message = f"{token} is {mine!r} in the adapter's tokenizer, {theirs!r} in the base's"
                yield _finding("special-token-changed", severity, "tokenizer_config.json", message)
    mine, theirs = _template(folder), _template(root)
    if mine is not None and theirs is not None and mine != theirs:
        message = "the adapter's chat template is not the base's: conversations are rendered differently"
        yield _finding("chat-template-changed", Severity.WARN, "chat template", message)
    eos = [_json(path, "generation_config.json").get("eos_token_id") for path in (folder, root)]
    if None not in eos and eos[0] != eos[1]:
        message = f"eos_token_id is {eos[0]} in the adapter's folder, {eos[1]} in the base's"
        yield _finding("eos-changed", Severity.WARN, "generation_config.json", message)


def _outside(folder: Path, n_tokens: int) -> Iterator[Finding]:
    outside = {text: k for text, k in _token_ids(folder) if k >= n_tokens}
    if outside:
        text, k = max(outside.items(), key=lambda item: item[1])
        message = (
            f"the adapter's tokenizer has {len(outside)} token ids up to {k} ({text!r}), "
            f"the embedding has {n_tokens} rows; --tokenizer base leaves it out"
        )
        yield _finding("token-outside", Severity.ERROR, str(folder), message)


def _token_ids(folder: Path) -> Iterator[tuple[str, int]]:
    tokenizer = _json(folder, "tokenizer.json")
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or ()
    if isinstance(vocabulary, Mapping):
        yield from _integers(vocabulary.items())
    else:
        yield from ((str(entry[0]), k) for k, entry in enumerate(vocabulary))
    yield from _integers((token.get("content"), token.get("id")) for token in tokenizer.get("added_tokens") or ())
    yield from _integers(_json(folder, "added_tokens.json").items())
    decoder = _json(folder, "tokenizer_config.json").get("added_tokens_decoder") or {}
    yield from ((_text(token) or "", int(k)) for k, token in decoder.items() if str(k).isdecimal())


def _integers(pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, int]]:
    return ((str(text), k) for text, k in pairs if isinstance(k, int))


def _template(folder: Path) -> str | None:
    for name in _names(folder, ("chat_template.jinja", "chat_template.json")):
        if name.endswith(".jinja"):
            return contained_path(folder, name).read_text(encoding="utf-8", errors="replace")
        return str(_json(folder, name).get("chat_template"))
    template = _json(folder, "tokenizer_config.json").get("chat_template")
    return None if template is None else str(template)


def _text(token: object) -> str | None:
    """Give a special token's text: a string, or the dictionary that older tokenizers write."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return None if token is None else str(token)


def _json(folder: Path, name: str) -> dict[str, Any]:
    return read_json(contained_path(folder, name)) if (folder / name).is_file() else {}


def _has_vocabulary(folder: Path) -> bool:
    return bool(_names(folder, _VOCABULARY))


def _names(folder: Path, patterns: Sequence[str]) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and _matches(path.name, patterns))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _finding(code: str, severity: Severity, target: str, message: str) -> Finding:
    return Finding(code=code, severity=severity, target=target, message=message)
