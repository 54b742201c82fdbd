"""The one way to end because of what the user asked for: a line on stderr and exit code 2."""

import contextlib
import os
import sys
from collections.abc import Iterator

EXIT_CODE = 2


class UsageError(ValueError):
    """A flag, file or value that the user must mend; the message names it and says what would be right."""


@contextlib.contextmanager
def exit_on_usage_error() -> Iterator[None]:
    """Turns `UsageError` into one line, printed by the first process of a node, and exit code 2."""
    try:
        yield
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"flame: error: {error}\n")
        sys.exit(EXIT_CODE)
