"""The length that a model was trained at, and the lengths that are measured by default."""

from collections.abc import Iterable, Mapping
from typing import Any

SHORTEST = 16
FACTOR = 4
"""Ratio of two default lengths."""
WITHOUT_RUN = (128, 512)
"""Default lengths if no run says how long training sequences were."""


def training_length(run: Mapping[str, Any]) -> int | None:
    """The most tokens that attended to each other in training, by the run's ``run.json``; None if it does not say."""
    # packed documents may be cut shorter than a row of the batch
    return run.get("--training.context_len") or run.get("--training.seq_len")


def default_lengths(trained: Iterable[int | None], most: Iterable[int | None]) -> list[int]:
    """The shortest training length, and below it the powers of `FACTOR` from `SHORTEST` on.

    Args:
        trained: The training length of each model, None where it is unknown.
        most: The longest sequence that each model takes, None for any.
    """
    known = [n for n in trained if n is not None]
    limit = min((n for n in most if n is not None), default=None)
    if not known:
        fitting = [n for n in WITHOUT_RUN if limit is None or n <= limit]
        return fitting or [limit or WITHOUT_RUN[0]]
    longest = min(known) if limit is None else min(*known, limit)
    lengths, n = [], SHORTEST
    while n < longest:
        lengths.append(n)
        n *= FACTOR
    return [*lengths, longest]
