"""Errors that end a program with one line on stderr and an exit code: wrong input, or lack of memory or disk."""

import contextlib
import errno
import os
import re
import sys
import time
from collections.abc import Iterator

EXIT_CODE = 2
PATIENCE_S = 10
"""Seconds that a process waits for another one to report the error first."""
LESS_MEMORY = (
    "lower --training.batch_size and raise --training.gradient_accumulation_steps as much, lower "
    "--training.seq_len, or give --activation_checkpoint.mode full"
)
# the host's memory, and a GPU's where its runtime cannot start
_NO_MEMORY = re.compile(r"DefaultCPUAllocator: can't allocate|(CUDA|HIP) error: out of memory")


class UsageError(ValueError):
    """A flag, file or value that the user must correct; the message names it and says what is expected."""


class TrainingError(RuntimeError):
    """A run that cannot continue; the message names the step, what happened and where to look."""


def require_unicode(flag: str, text: str) -> None:
    """Raises UsageError for bytes of a command line that are not UTF-8, which Python passes on as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{flag} must be text in UTF-8, got {text!r}") from None


@contextlib.contextmanager
def exit_on_training_error() -> Iterator[None]:
    """Turns `TrainingError` into one line on stderr, of every process that raises it, and exit code 1."""
    try:
        yield
    except TrainingError as error:
        sys.stderr.write(f"flame: error: rank {os.environ.get('RANK', '0')}: {error}\n")
        sys.exit(1)


@contextlib.contextmanager
def exit_on_usage_error() -> Iterator[None]:
    """Turns `UsageError` or a full disk into one line on stderr and exit code 2.

    Under torchrun one process of a machine prints the line.
    """
    try:
        yield
    except (UsageError, OSError) as error:
        if isinstance(error, OSError):
            if not is_full_disk(error):
                raise
            error = f"{error.filename or 'a file'} cannot be written: {error.strerror}"
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
            # torchrun kills all ranks when one exits. Give local rank 0 ten seconds to report first; if it does not,
            # this rank reports
            time.sleep(PATIENCE_S)
        sys.stderr.write(f"flame: error: {error}\n")
        sys.exit(EXIT_CODE)


def is_full_disk(error: OSError) -> bool:
    """Whether the file system, a quota or a limit has no room for what was written."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host's or the device's memory ran out."""
    # torch.OutOfMemoryError of a GPU, by name, since the launcher imports no torch
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))
    )


@contextlib.contextmanager
def explain_out_of_memory(batch: str) -> Iterator[None]:
    """Turns memory that ran out into a `TrainingError`.

    Args:
        batch: What was asked for, as flags.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # the first line only: torch adds advice and a C++ stack of a page
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"memory ran out ({reason}) with {batch}: {LESS_MEMORY}") from None
