"""The run's own lines: time and message, printed by rank 0."""

import logging
import os
import sys

logger = logging.getLogger("flame")


def init_logger() -> None:
    """Sends this logger's lines of rank 0 to stdout."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
