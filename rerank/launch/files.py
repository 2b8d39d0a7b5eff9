"""Atomic writes and deletions, and fingerprints of files."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: `write` makes it under a temporary name, which is renamed to `path` at the end.

    The content is on disk before the rename, so that a crash of the machine leaves no empty file.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)  # it may have filled the disk
        raise
    for name in (temporary, path.parent):  # the content, then the name
        handle = os.open(name, os.O_RDONLY)
        try:
            if name == path.parent:
                temporary.replace(path)
            os.fsync(handle)
        finally:
            os.close(handle)


def clear(folder: Path, kept: tuple[str, ...]) -> None:
    """Delete all that is in a folder but what has these names."""
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def delete_folder(folder: Path) -> None:
    """Delete a folder, or a link to one, if it is there; at no moment is it there in part."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        deleted = folder.with_name(f"{folder.name}.deleted")
        shutil.rmtree(deleted, ignore_errors=True)  # of a deletion that was killed
        folder.rename(deleted)
        shutil.rmtree(deleted)


def delete_folders(parent: Path, pattern: str) -> None:
    """Delete the folders of a folder whose names match a pattern."""
    for folder in sorted(parent.glob(pattern)):
        delete_folder(folder)


def files_of(path: Path) -> list[Path]:
    """A file, the files of a folder or of a glob, in order; what Python has compiled is left out."""
    if path.is_file() or not path.exists():
        return [path] if path.is_file() else glob_of(path)
    return sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")


def glob_of(pattern: str | Path) -> list[Path]:
    """The files that a pattern such as `log/*.csv` or `log/**/*.csv` names, in order; none for a plain path."""
    found = glob.glob(str(pattern), recursive=True) if glob.has_magic(str(pattern)) else []
    return sorted(path for path in map(Path, found) if path.is_file())


def name_in(path: Path, file: Path) -> str:
    """The name of one of the files of a folder or of a glob, which stays where all are moved together."""
    parents = path if path.is_dir() else next(p for p in path.parents if not glob.has_magic(str(p)))
    return str(file.relative_to(parents))


def fingerprint(path: str | Path) -> str:
    """The sha256 of a file, or of the names and contents of a folder's or a glob's files."""
    path, digest = Path(path), hashlib.sha256()
    for file in files_of(path):
        digest.update(b"" if file == path else name_in(path, file).encode())
        with file.open("rb") as handle:
            hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()
