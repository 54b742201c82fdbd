"""The parser of the small commands: `flame.convert`, `flame.generate`, `flame.data.prepare`."""

import argparse
from typing import Any, NoReturn

from flame.errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse that takes whole flags alone and answers a mistake with one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} -h lists the flags)")
