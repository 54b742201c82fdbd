"""The one way to end because of what the user asked for: a line on stderr and exit code 2."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

EXIT_CODE = 2
_PATIENCE_S = 10


class UsageError(ValueError):
    """A flag, file or value that the user must mend; the message names it and says what would be right."""


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names the step, what happened and where to look."""


def require_unicode(flag: str, text: str) -> None:
    """Raises UsageError for bytes of a command line that are no UTF-8, which Python passes on as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{flag} must be UTF-8, got {ascii(text)}, whose character {error.start + 1} is none"
        ) from None


@contextlib.contextmanager
def exit_on_training_error() -> Iterator[None]:
    """Turns `TrainingError` into one line of every process that it happens to, and exit code 1."""
    try:
        yield
    except TrainingError as error:
        sys.stderr.write(f"flame: error: rank {os.environ.get('RANK', '0')}: {error}\n")
        sys.exit(1)


@contextlib.contextmanager
def exit_on_usage_error() -> Iterator[None]:
    """Turns `UsageError` into one line, of one process of a machine under torchrun, and exit code 2."""
    try:
        yield
    except UsageError as error:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["LOCAL_RANK"] != "0":
            # torchrun ends all processes as soon as one has ended: the first one, which as a rule says the same,
            # is to be heard, and where it has nothing to say this one is
            time.sleep(_PATIENCE_S)
        sys.stderr.write(f"flame: error: {error}\n")
        sys.exit(EXIT_CODE)
