"""The log of a run: time and message, printed by rank 0."""

import logging
import os
import sys

from flame.base.errors import UsageError

logger = logging.getLogger("flame")


class _Handler(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        # the buffered text would raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        raise UsageError(f"standard output cannot be written: {error.strerror}") from None


def init_logger() -> None:
    """Sends the lines of rank 0 to stdout; a failure to write raises `UsageError`."""
    handler = _Handler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def announce_imports() -> None:
    """Logs that imports take some seconds, in a program that was started by hand."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and not {"-h", "--help"} & set(sys.argv):
        init_logger()
        logger.info("importing torch and transformers")
