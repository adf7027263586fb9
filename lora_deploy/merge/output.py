"""The output folder, and the folder beside it in which it is made: found, locked, claimed, put in place.

Promise (law 6): ``OUT`` is either what it was before or the finished merge. Work happens in ``OUT.partial``, which is
claimed for one plan and locked against a second process. Putting it in place is one rename; where it replaces another
merge, that one steps aside first and comes back if the process dies in between. A kill at any point leaves what the
same command finishes or tidies up. Nothing that is not ours is ever removed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_deploy.artifact import cached_sha256
from lora_deploy.errors import OutputExistsError
from lora_deploy.merge.identity import name_difference
from lora_deploy.merge.record import RECORD_NAME, MergeRecord, read_record
from lora_deploy.safetensors_file import sync_folder, write_file, writing_error

WORK_FOLDER = ".work"
"""Folder inside ``OUT.partial`` for what is not part of the result."""
_IDENTITY_NAME = "plan.json"
_LOCK_NAME = "lock"
_ELSEWHERE = "choose another -o"
_WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS})


def partial_of(out: Path) -> Path:
    """Name the folder in which ``out`` is made."""
    return out.with_name(out.name + ".partial")


def find_done(out: Path, digest: str, *, fresh: bool) -> MergeRecord | None:
    """Give the record of this very merge if ``out`` holds it, complete; None if ``out`` may be written.

    Raises:
        OutputExistsError: Something else is there, and ``fresh`` does not allow to replace it.
    """
    if not os.path.lexists(out):
        return None
    if os.path.ismount(out):
        raise OutputExistsError(f"{out}: is a mount point, which no rename can put in place", hint=f"-o {out}/merged")
    if out.is_dir() and not any(out.iterdir()):
        return None
    if not (out / RECORD_NAME).is_file():
        raise OutputExistsError(f"{out}: exists and is no merge of ours", hint=_ELSEWHERE)
    record = read_record(out)
    if record.digest == digest:
        changed = next((file.path for file in record.artifacts if not _is_intact(out / file.path, file.sha256)), None)
        if changed is None:
            return record
        problem = f"holds this merge, but {changed} was changed or lost since"
    else:
        problem = "holds another merge"
    if fresh:
        return None
    raise OutputExistsError(f"{out}: {problem}", hint="choose another -o, or replace it with --fresh")


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and cached_sha256(path) == sha256


@contextmanager
def locked(out: Path) -> Iterator[Path]:
    """Make or find ``OUT.partial``, hold it against a second process, and undo what a killed one left at ``out``.

    Raises:
        OutputExistsError: Something else has that name, or another process works there.
        MergeError: The folder cannot be written.
    """
    partial = partial_of(out)
    lock = _lock(partial)
    try:
        _step_back(out)
        yield partial
    except OSError as error:
        raise writing_error(partial, error) from error
    finally:
        os.close(lock)


@contextmanager
def shared(out: Path) -> Iterator[Path]:
    """Make or find ``OUT.partial`` and hold it, with other tasks, against whoever would put it in place.

    A file system without locks is taken as it is: shards and records come by rename, and all tasks write the same.

    Raises:
        OutputExistsError: Something else has that name, or it is being put in place.
        MergeError: The folder cannot be written.
    """
    partial = partial_of(out)
    lock = _lock(partial, fcntl.LOCK_SH)
    try:
        yield partial
    except OSError as error:
        raise writing_error(partial, error) from error
    finally:
        os.close(lock)


def _lock(partial: Path, kind: int = fcntl.LOCK_EX) -> int:
    work = partial / WORK_FOLDER
    while True:
        is_ours = not partial.is_symlink() and (work.is_dir() or (partial.is_dir() and not any(partial.iterdir())))
        if os.path.lexists(partial) and not is_ours:
            raise OutputExistsError(f"{partial}: exists and is no unfinished work of ours", hint=_ELSEWHERE)
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock = os.open(work / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise writing_error(partial, error) from error
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except OSError as error:
            if kind == fcntl.LOCK_SH and error.errno in _WITHOUT_LOCKS:
                return lock
            os.close(lock)
            raise OutputExistsError(f"{partial}: another process is at work there", hint="wait for it") from error
        if is_same_file(lock, work / _LOCK_NAME):
            return lock
        os.close(lock)  # the process that held it has put its folder in place meanwhile


def is_same_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def claim(partial: Path, identity: Mapping[str, Any], files: Container[str], *, fresh: bool) -> None:
    """Mark the working folder as this plan's; of what is in it only ``files`` stay, which the caller checks.

    Raises:
        OutputExistsError: It holds another plan's work, and ``fresh`` was not asked for; or files of nobody's.
    """
    marker = partial / WORK_FOLDER / _IDENTITY_NAME
    text = json.dumps(identity, sort_keys=True, indent=1)
    others = [path for path in partial.iterdir() if path.name != WORK_FOLDER]
    if marker.exists():
        before = marker.read_text()
        if before != text and not fresh:
            raise OutputExistsError(
                f"{partial}: holds an unfinished merge that differs in {name_difference(before, identity)}",
                hint="finish it with its own options, delete it, choose another -o, or pass --fresh",
            )
    elif others:
        raise OutputExistsError(f"{partial}: holds {others[0].name}, of no merge of ours", hint=_ELSEWHERE)
    write_text(marker, text)
    for path in others:
        _keep_only(files, path, partial)


def is_claimed(partial: Path) -> bool:
    """Whether a plan has marked the working folder as its own."""
    return (partial / WORK_FOLDER / _IDENTITY_NAME).exists()


def join(partial: Path, identity: Mapping[str, Any]) -> None:
    """Mark the working folder as this plan's, as every task of it does; what others write there stays.

    Raises:
        OutputExistsError: It holds another plan's work, or files of nobody's.
    """
    marker = partial / WORK_FOLDER / _IDENTITY_NAME
    text = json.dumps(identity, sort_keys=True, indent=1)
    strangers = [path for path in partial.iterdir() if path.name != WORK_FOLDER]
    if not marker.exists():  # looked at after the files: a task marks the folder before it writes any
        if strangers:
            raise OutputExistsError(f"{partial}: holds {strangers[0].name}, of no merge of ours", hint=_ELSEWHERE)
        write_text(marker, text)
    elif (before := marker.read_text()) != text:
        raise OutputExistsError(
            f"{partial}: holds an unfinished merge that differs in {name_difference(before, identity)}",
            hint="give every task the same options, or delete it",
        )


def _keep_only(files: Container[str], path: Path, root: Path) -> None:
    """Remove what is not one of these files of ``root``, in folders too."""
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            _keep_only(files, inner, root)
        if any(path.iterdir()):
            return
    if path.relative_to(root).as_posix() not in files:
        remove(path)


def abandon(partial: Path) -> None:
    """Remove a working folder that nothing was done in."""
    if not is_claimed(partial) and not any(p.name != WORK_FOLDER for p in partial.iterdir()):
        remove(partial)


def publish(partial: Path, out: Path) -> None:
    """Put the finished folder in its place; what was there is removed only after that succeeded."""
    for folder in (path for path in partial.iterdir() if path.is_dir()):
        sync_folder(folder)
    sync_folder(partial)
    if out.is_dir() and any(out.iterdir()):
        tidy(out)  # a process that was killed may have left there what ``out`` itself had replaced
        out.rename(_aside(out))
    partial.rename(out)
    sync_folder(out.parent)
    tidy(out)


def tidy(out: Path) -> None:
    """Remove what is left of making a finished ``out``: its working folder, and the merge that it replaced."""
    aside, doomed = _aside(out), out.with_name(f".{out.name}.lora-deploy-doomed")
    if os.path.lexists(aside) and not os.path.lexists(doomed):
        aside.rename(doomed)  # one that is half removed must never come back
    for path in (doomed, out / WORK_FOLDER):
        with suppress(FileNotFoundError):  # nothing to tidy, or another process is at it too
            remove(path)


def _step_back(out: Path) -> None:
    """Bring back the merge that stepped aside for one that never came."""
    if not os.path.lexists(out) and os.path.lexists(_aside(out)):
        _aside(out).rename(out)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.lora-deploy-replaced")


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder, 0 when there is none; another process may remove some meanwhile."""
    n_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                n_bytes += Path(parent, name).lstat().st_size
    return n_bytes


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all, flushed to disk."""
    write_file(path, text.encode(), (), root=path.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
