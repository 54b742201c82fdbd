"""Builds the tensors of a batch from rows of tokens, with the bounds of documents for packed attention."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# the label that torch's cross-entropy ignores
IGNORE_INDEX = -100

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class Rows:
    """Sequences of a batch, as read from a source."""

    tokens: np.ndarray
    """Inputs and one more label, ``[B, T + 1]``."""
    ends: list[np.ndarray]
    """For each row, one past the last token of every document that ends within its inputs."""


def to_batch(rows: Rows, context_len: int | None) -> Batch:
    """Inputs and labels, both int64 ``[B, T]``; label ``t`` is the token that follows input ``t`` in the
    stream, across the ends of documents too.

    Args:
        rows: What was read.
        context_len: None for plain causal attention. Else the inputs get ``positions`` int64 ``[B, T]``
            and ``cu_seqlens`` int32 ``[N + 1]``: bounds within the rows laid end to end, 0 to ``B * T``,
            at every end of a row or a document, and after every ``context_len`` tokens of a piece.
            Positions start at 0 after each bound.
    """
    tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    # cloned: slices of a single row count as contiguous, so inputs and labels would share memory
    inputs, labels = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    if context_len is None:
        return {"input": inputs}, labels
    cu_seqlens = _bounds(rows.ends, inputs.shape[1], context_len)
    positions = np.arange(inputs.numel()) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    return {
        "input": inputs,
        "positions": torch.from_numpy(positions).view_as(inputs),
        "cu_seqlens": torch.from_numpy(cu_seqlens.astype(np.int32)),
    }, labels


def _bounds(ends: Sequence[np.ndarray], T: int, context_len: int) -> np.ndarray:
    starts = []
    for row, own in enumerate(ends):
        edges = [0, *(int(end) for end in own if 0 < end < T), T]
        for first, last in zip(edges, edges[1:], strict=False):
            starts.append(np.arange(first, last, context_len) + row * T)
    return np.append(np.concatenate(starts), len(ends) * T)
