"""Paths in flags and files: expands ``~`` and refuses URLs."""

import argparse
import os
import re
from pathlib import Path

from flame.base.errors import UsageError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def expand(flag: str, value: str) -> str:
    """A path with its ``~`` replaced; other values stay as they are.

    Args:
        flag: The flag of the value, for the message.
        value: A path, or a name that is not one.

    Raises:
        UsageError: The value is a URL, or its ``~user`` does not exist.
    """
    try:
        return _expand(value)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{flag} {error}") from None


def path_argument(value: str) -> Path:
    """``type=`` of an argparse argument that is a path."""
    return Path(_expand(value))


def text_argument(value: str) -> str:
    """``type=`` of an argparse argument that is a path or a name."""
    return _expand(value)


def split_list(value: str) -> list[str]:
    """The values of a list separated by commas, where an existing path keeps the commas in its name."""
    pieces = value.split(",")
    values: list[str] = []
    while pieces:
        length = next(
            (n for n in range(len(pieces), 1, -1) if _exists(",".join(pieces[:n]))),
            1,
        )
        values.append(",".join(pieces[:length]))
        del pieces[:length]
    return values


def _exists(value: str) -> bool:
    return os.path.exists(os.path.expanduser(value))


def _expand(value: str) -> str:
    if _URL.match(value):
        raise argparse.ArgumentTypeError(f"{value!r} is a URL; give a path of this machine")
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(
            f"{value!r} names the home folder of a user that does not exist; a file of that name is ./{value}"
        )
    return path
