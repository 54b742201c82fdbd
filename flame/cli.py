"""What the small commands share: their parser, and the folder that they write."""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from flame.errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse that takes whole flags alone and answers a mistake with one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} -h lists the flags)")


def make_folder(name: str, folder: Path) -> None:
    """Makes ``folder`` if it is not there, before the work that would be lost without it.

    Args:
        name: What the user calls it, such as a flag.

    Raises:
        UsageError: It cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{name} {folder} cannot be written: {error}") from None
