"""Modes of files that are written under a temporary name, which some libraries make for their owner alone."""

import os
from pathlib import Path


def umask() -> int:
    """The mask of this process, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def apply_umask(path: Path) -> None:
    """Gives a file or folder the mode that a new one has."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask())
