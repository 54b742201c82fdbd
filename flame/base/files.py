"""Atomic writing of files, and their permissions."""

import os
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def temporary_name(file: Path) -> Path:
    """Name under which `write_atomically` writes; a kill may leave such a file behind."""
    return file.with_name(file.name + TEMPORARY_SUFFIX)


def write_atomically(file: Path, text: str) -> None:
    """Writes ``file`` in UTF-8, atomically: a reader, or a kill, sees either the old text or the new.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    temporary = temporary_name(file)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def umask() -> int:
    """The umask of this process, which can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def apply_umask(path: Path) -> None:
    """Gives a file or folder the permissions of a newly created one."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask())
