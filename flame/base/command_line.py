"""Shared by all commands: checks of the arguments, an argparse parser, and the output folder."""

import argparse
import difflib
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flame.base.errors import UsageError, require_unicode

_LIKE_ENOUGH = 0.7
# values that users give to a switch, which takes none
_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, or None. In dotted names such as ``training.steps`` the option counts most."""
    section, _, option = name.rpartition(".")

    def likeness(other: str) -> float:
        of, _, last = other.rpartition(".")
        # the section decides between options that are equally like
        same = difflib.SequenceMatcher(None, section, of).ratio()
        return difflib.SequenceMatcher(None, option, last).ratio() + same / 10

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= _LIKE_ENOUGH else None


def require_text(words: Sequence[str]) -> None:
    """Raises UsageError for an argument that is not valid UTF-8."""
    for i, word in enumerate(words):
        name = words[i - 1] if i and words[i - 1].startswith("--") else "an argument"
        flag, equals, value = word.partition("=")
        if word.startswith("--") and equals and flag.isascii():
            name, word = flag, value
        require_unicode(name, word)


def require_flags(
    words: Sequence[str],
    options: Mapping[str, bool],
    *,
    aliases: Mapping[str, str] | None = None,
    help_command: str,
) -> None:
    """Raises UsageError for an unknown flag, with the closest known one, or for a switch with a value.

    Args:
        words: The command line.
        options: Name of a flag, without its dashes -> whether it takes a value.
        aliases: Name of an option in other programs -> its name here.
        help_command: Command that lists the flags.
    """
    aliases = {other: name for other, name in (aliases or {}).items() if name in options}
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == "--":
            return
        if not word.startswith("--"):
            continue
        flag, has_value, value = word.removeprefix("--").partition("=")
        if flag not in options:
            meant = aliases.get(flag.rpartition(".")[2]) or closest(flag, options)
            hint = f"; perhaps you meant --{meant}" if meant else ""
            raise UsageError(f"unrecognized option --{flag}{hint} ({help_command} lists the flags)")
        if not options[flag]:
            if not has_value and following.lower() in _BOOLEANS:
                has_value, value = "=", following
            if has_value:
                raise UsageError(
                    f"--{flag} takes no value, got {value!r}; give it alone, or leave it out"
                )


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags, whose errors are one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # argparse is generic in the class of the namespace; all callers use the default
        self, args: Iterable[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As in argparse, after checks for text that is not UTF-8 and for unknown flags."""
        words = sys.argv[1:] if args is None else list(args)
        require_text(words)
        # the parser of a subcommand checks the flags of the subcommand
        if self._subparsers is None:
            options = {
                name.removeprefix("--"): action.nargs != 0
                for action in self._actions
                for name in action.option_strings
                if name.startswith("--")
            }
            require_flags(words, options, help_command=f"{self.prog} -h")
        return super().parse_known_args(words, namespace)  # pyright: ignore[reportReturnType]  # argparse replaces None by a new namespace

    def error(self, message: str) -> NoReturn:
        """Raises UsageError, where argparse would print the usage and exit."""
        raise UsageError(f"{message} ({self.prog} -h lists the flags)")


def make_folder(name: str, folder: Path) -> None:
    """Creates ``folder`` if needed and checks that it is writable, before work that would be lost otherwise.

    Args:
        name: The user's name for the folder, such as a flag.
        folder: The folder; its parents are created too.

    Raises:
        UsageError: It cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{name} {folder} cannot be written: {error}") from None
