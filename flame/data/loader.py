"""Batches of sequences cut from one token stream, in an order that no number of ranks changes."""

import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.stateful import Stateful

# the label that torch's cross-entropy leaves out
IGNORE_INDEX = -100

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]

_CHECKSUM_SAMPLES = 1024
# what must be equal for a saved position to mean the same, with the flag to look at where it is not
_FINGERPRINT = {
    "seq_len": "--training.seq_len",
    "seed": "--training.seed",
    "num_sequences": "--training.dataset",
    "checksum": "--training.dataset",
}


class TokenLoader(Stateful):
    """Endless training batches for one data-parallel rank, with exact resume.

    The stream is cut into ``(len(tokens) - 1) // seq_len`` sequences; sequence ``i`` has the inputs
    ``tokens[i * seq_len : (i + 1) * seq_len]`` and the same shifted by one as labels. One global order
    visits all of them in a fresh permutation each epoch, given by ``seed`` and the epoch alone. Every
    step takes the next ``dp_world_size * batch_size`` places of that order, rank ``r`` the ``r``-th
    ``batch_size`` of them; an epoch may end inside a batch.

    The state is the place in the global order, the same on every rank, so a run goes on exactly where
    it stopped, on any number of ranks and with any batch size.

    Args:
        tokens: Token ids ``[num_tokens]``, any integer dtype; may be a memory map, of which only the
            sequences of a batch are read.
        seq_len: Sequence length ``T`` in tokens.
        batch_size: Sequences ``B`` a batch, of this rank.
        dp_rank: This rank among the data-parallel ranks.
        dp_world_size: Number of data-parallel ranks.
        seed: Seed of the order, at least 0.

    Iterating yields ``({"input": ids}, labels)``, both int64 ``[B, T]``. Several iterators of one loader
    share its place. The state counts a batch as soon as it is handed out.

    Raises:
        ValueError: An argument is out of range, or the stream is shorter than one sequence.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        seq_len: int,
        batch_size: int,
        dp_rank: int,
        dp_world_size: int,
        seed: int,
    ) -> None:
        _check(seq_len, batch_size, dp_rank, dp_world_size)
        if seed < 0:
            raise ValueError(f"--training.seed {seed}: expected at least 0")
        self.num_sequences = _count(tokens, seq_len)
        if not self.num_sequences:
            raise ValueError(
                f"--training.seq_len {seq_len}: one sequence takes {seq_len + 1} tokens, but the "
                f"training data has {len(tokens)}; use a shorter sequence or more text"
            )
        # sequences handed out so far, over all ranks and epochs
        self.sequences_seen = 0
        self._tokens = tokens
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._dp_rank = dp_rank
        self._dp_world_size = dp_world_size
        self._seed = seed
        self._checksum = _checksum(tokens)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            start = self.sequences_seen + self._dp_rank * self._batch_size
            self.sequences_seen += self._dp_world_size * self._batch_size
            places = (
                divmod(place, self.num_sequences)
                for place in range(start, start + self._batch_size)
            )
            indices = [
                int(_permutation(self.num_sequences, self._seed, epoch)[i]) for epoch, i in places
            ]
            yield _read(self._tokens, indices, self._seq_len)

    def state_dict(self) -> dict[str, Any]:
        """The place in the global order, and a fingerprint of that order; plain ints."""
        return {
            "sequences_seen": self.sequences_seen,
            "seq_len": self._seq_len,
            "seed": self._seed,
            "num_sequences": self.num_sequences,
            "checksum": self._checksum,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            ValueError: The state belongs to other data, another sequence length or another seed.
        """
        own = self.state_dict()
        for field, flag in _FINGERPRINT.items():
            if state_dict.get(field) != own[field]:
                raise ValueError(
                    f"{flag}: the checkpoint's data has {field} {state_dict.get(field)}, this run's "
                    f"has {own[field]}; resume with the checkpoint's data, tokenizer, validation "
                    "share, sequence length and seed, or start a new run in another folder"
                )
        self.sequences_seen = state_dict["sequences_seen"]


def validation_batches(
    tokens: np.ndarray, *, seq_len: int, batch_size: int, dp_rank: int, dp_world_size: int
) -> Iterator[Batch]:
    """All sequences of the validation stream once, in order, dealt out to the ranks batch by batch.

    Every rank yields the same number of batches, so that collectives match, all of them ``[B, T]``:
    what is left over is filled with rows of token 0 whose labels are all ``IGNORE_INDEX``. A batch, and
    on a short stream all batches of a rank, can be nothing else: sum the losses and the valid labels
    over batches and ranks, and divide once.

    Args:
        tokens: Token ids ``[num_tokens]``, any integer dtype; with no whole sequence, as for a
            validation share of 0, there are no batches.
        seq_len: Sequence length ``T`` in tokens.
        batch_size: Sequences ``B`` a batch, of this rank.
        dp_rank: This rank among the data-parallel ranks.
        dp_world_size: Number of data-parallel ranks.

    Yields:
        ``({"input": ids}, labels)``, both int64 ``[B, T]``.
    """
    _check(seq_len, batch_size, dp_rank, dp_world_size)
    num_sequences = _count(tokens, seq_len)
    for start in range(0, num_sequences, batch_size * dp_world_size):
        first = start + dp_rank * batch_size
        indices = range(first, min(first + batch_size, num_sequences))
        inputs, labels = _read(tokens, indices, seq_len)
        padding = (0, 0, 0, batch_size - len(indices))
        yield (
            {"input": torch.nn.functional.pad(inputs["input"], padding)},
            torch.nn.functional.pad(labels, padding, value=IGNORE_INDEX),
        )


@lru_cache(maxsize=2)
def _permutation(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch ``[num_sequences]``; two are kept, for a batch that spans an epoch's end.

    The raw stream of a bit generator is fixed for all numpy versions; that of Generator.permutation is
    not, and a resumed run may meet another numpy.
    """
    keys = np.random.PCG64([seed, epoch]).random_raw(num_sequences)
    return np.argsort(keys, kind="stable")


def _count(tokens: np.ndarray, seq_len: int) -> int:
    # the last label needs one token beyond the last input
    return max(0, (len(tokens) - 1) // seq_len)


def _read(tokens: np.ndarray, indices: Sequence[int], seq_len: int) -> Batch:
    """Inputs and labels ``[len(indices), seq_len]`` of the given sequences."""
    rows = np.empty((len(indices), seq_len + 1), np.int64)
    for row, index in zip(rows, indices, strict=True):
        row[:] = tokens[index * seq_len : (index + 1) * seq_len + 1]
    batch = torch.from_numpy(rows)
    return {"input": batch[:, :-1].contiguous()}, batch[:, 1:].contiguous()


def _checksum(tokens: np.ndarray) -> int:
    """CRC-32 of evenly spaced tokens: cheap on a memory map, and moved by any shift of the stream."""
    places = np.linspace(0, len(tokens) - 1, _CHECKSUM_SAMPLES).astype(np.int64)
    return zlib.crc32(tokens[places].astype("<u4").tobytes())


def _check(seq_len: int, batch_size: int, dp_rank: int, dp_world_size: int) -> None:
    if seq_len < 1:
        raise ValueError(f"--training.seq_len {seq_len}: expected at least 1")
    if batch_size < 1:
        raise ValueError(f"--training.batch_size {batch_size}: expected at least 1")
    assert 0 <= dp_rank < dp_world_size, (dp_rank, dp_world_size)
