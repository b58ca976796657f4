"""Files appear whole or not at all, each output with its manifest, in a folder that may be written."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bge_core import UserError, __version__
from bge_core.files.records import Row


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """A temporary name beside `target` (file or folder) that becomes `target` when the block ends well.

    A file is flushed to disk before the rename. On an error, or where the target cannot be written, nothing is left.
    A folder replaces an earlier folder of that name, a file never does. A symbolic link stays one: what it points to is
    replaced.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            _flush(file)
        if target.is_dir() and not temporary.is_dir():
            raise UserError(f"{target}: is a folder; name a file")
        if target.is_dir():
            aside = target.with_name(f".{target.name}.old-{os.getpid()}")
            os.replace(target, aside)
            try:
                os.replace(temporary, target)
            except OSError:
                os.replace(aside, target)
                raise
            shutil.rmtree(aside)
        else:
            os.replace(temporary, target)
        _flush(target.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> int:
    """Write the rows, whole or not at all; returns their number."""
    count = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for row in rows:
            try:
                line = json.dumps(row, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:  # half a character in a column that we only pass through
                line = json.dumps(row).encode("utf-8")
            file.write(line + b"\n")
            count += 1
    return count


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON value, indented, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """One JSON value, None where the file is missing; UserError where it is broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_input(path: str | Path, num_rows: int) -> Row:
    """A manifest's entry of one input file."""
    return {"path": str(path), "sha256": sha256(path), "rows": num_rows}


def make_manifest(stage: str, config: Row, inputs: list[Row], **more: Any) -> Row:
    """The manifest of an output: stage, version, resolved settings, inputs, library versions, and what a stage adds."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "datasets", "safetensors", "faiss-cpu", "faiss-gpu", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "stage": stage,
        "version": __version__,
        "config": config,
        "seed": config.get("seed"),
        "inputs": inputs,
        "libraries": versions,
        **more,
    }


def refuse_foreign_folder(folder: str | Path, overwrite: bool, own_files: Iterable[str]) -> None:
    """Before a stage starts: may it write its files into `folder`?

    Raises:
        UserError: the folder is a file, cannot be written, or holds something and `overwrite` is False (the message
            names what is there). With `overwrite`, `own_files` will be replaced and everything else stays.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    held = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.exists() else []
    if held and not overwrite:
        shown = ", ".join(held[:5]) + (", ..." if len(held) > 5 else "")
        own = ", ".join(sorted(own_files))
        raise UserError(
            f"{folder}: is not empty (it holds {shown}); name another folder, or add --overwrite_output_dir "
            f"to replace {own}"
        )
    refuse_unwritable(folder)


def refuse_unwritable(folder: str | Path) -> None:
    """Make the folder and try to write in it now, rather than after the work. UserError where that fails."""
    probe = Path(folder) / f".probe-{os.getpid()}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
