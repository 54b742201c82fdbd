"""Files that appear under their name when they are whole, and the mode that a new one has."""

import os
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def temporary_name(file: Path) -> Path:
    """Where `write_atomically` writes before the file has its name; what a kill may leave behind."""
    return file.with_name(file.name + TEMPORARY_SUFFIX)


def write_atomically(file: Path, text: str) -> None:
    """Writes ``file`` in UTF-8 and in one move: a reader, or a kill, sees all of the old text or all of the new.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    temporary = temporary_name(file)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def umask() -> int:
    """The mask of this process, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def apply_umask(path: Path) -> None:
    """Gives a file or folder the mode that a new one has."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask())
