"""Batches from sources that can be read at any position, in an order that does not depend on the number of ranks."""

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from torch.distributed.checkpoint.stateful import Stateful

from flame.data.batches import IGNORE_INDEX, Batch, Rows, to_batch
from flame.data.mixing import Mixture, permutation
from flame.data.source import TokenSource
from flame.data.workers import Workers

# values that must be equal for a saved position to be valid, with the flag to check where they differ
_FINGERPRINT_FLAGS = {
    "seq_len": "--training.seq_len",
    "seed": "--training.seed",
    "num_sequences": "--training.dataset",
    "checksum": "--training.dataset",
}


class TokenLoader(Stateful):
    """Endless training batches for one data-parallel rank, with exact resume.

    Each source is cut into sequences. Sequence ``i`` has the inputs ``tokens[i * seq_len : (i + 1) * seq_len]`` and
    the same shifted by one as labels; with a bos, what `TokenSource` makes. One global order visits all sequences:
    `Mixture` maps a position to a source. In each of its epochs a source gives all of its sequences in a new
    permutation, a function of ``seed``, source and epoch. Every step takes the next ``dp_world_size * batch_size``
    positions; rank ``r`` takes the ``r``-th ``batch_size`` of them. An epoch may end inside a batch.

    The state is the position in the global order, the same on every rank. A run therefore continues exactly where it
    stopped, on any number of ranks and workers and with any batch size.

    Args:
        sources: What to read, each at least one sequence long.
        shares: Positions of each source in a block of ``sum(shares)``.
        seq_len: Sequence length ``T`` in tokens.
        batch_size: Sequences ``B`` per batch, of this rank.
        dp_rank: This rank among the data-parallel ranks.
        dp_world_size: Number of data-parallel ranks.
        seed: Seed of the order, at least 0.
        context_len: See `to_batch`; None for plain causal attention.
        num_workers: Processes that read ahead; 0: the batch is read when it is asked for.
        prefetch_factor: Batches that each of them reads ahead.

    Iterating yields what `to_batch` makes. Several iterators of one loader share its position. The
    state counts a batch when it is handed out, however far ahead the workers are.

    Raises:
        ValueError: An argument is out of range, or a source is shorter than one sequence.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        *,
        shares: Sequence[int],
        seq_len: int,
        batch_size: int,
        dp_rank: int,
        dp_world_size: int,
        seed: int,
        context_len: int | None = None,
        num_workers: int = 0,
        prefetch_factor: int = 2,
    ) -> None:
        _check(seq_len, batch_size, dp_rank, dp_world_size)
        if seed < 0:
            raise ValueError(f"--training.seed {seed}: expected at least 0")
        assert len(sources) == len(shares), (len(sources), shares)
        self._counts = [source.num_sequences(seq_len) for source in sources]
        for source, count in zip(sources, self._counts, strict=True):
            if not count:
                raise ValueError(
                    f"--training.seq_len {seq_len}: one sequence takes {seq_len + 1} tokens, but the "
                    f"training data of {source.name} has {len(source.tokens)}; use a shorter sequence "
                    "or more text"
                )
        # sequences handed out so far, over all ranks and epochs
        self.sequences_seen = 0
        self._sources = sources
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._dp_rank = dp_rank
        self._dp_world_size = dp_world_size
        self._seed = seed
        self._context_len = context_len
        self._mixture = Mixture(shares, seed)
        self._checksum = _combined([source.position_checksum() for source in sources], shares)
        # by source, the last two epochs, for a batch that spans an epoch's end
        self._orders: list[dict[int, np.ndarray]] = [{} for _ in sources]
        self._workers = Workers(self._read, num_workers, prefetch_factor)

    def __iter__(self) -> Iterator[Batch]:
        stride = self._dp_world_size * self._batch_size
        # first position of a step, and the future of its rows
        ahead: deque[tuple[int, Future[Rows]]] = deque()
        while True:
            if ahead and ahead[0][0] != self.sequences_seen:
                # another iterator took batches, or a state was loaded
                ahead.clear()
            while len(ahead) < self._workers.num_ahead:
                start = self.sequences_seen + len(ahead) * stride
                ahead.append((start, self._workers.submit(start)))
            rows = self._workers.result(ahead.popleft()[1])
            self.sequences_seen += stride
            yield to_batch(rows, self._context_len)

    def state_dict(self) -> dict[str, Any]:
        """The position in the global order, and a fingerprint of that order; plain ints."""
        return {
            "sequences_seen": self.sequences_seen,
            "seq_len": self._seq_len,
            "seed": self._seed,
            "num_sequences": sum(self._counts),
            "checksum": self._checksum,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
            ValueError: The state belongs to other data, another sequence length or another seed.
        """
        check_fingerprint(state_dict, self.state_dict(), _FINGERPRINT_FLAGS)
        self.sequences_seen = state_dict["sequences_seen"]

    def close(self) -> None:
        """Ends the workers."""
        self._workers.close()

    def _read(self, start: int) -> Rows:
        """This rank's rows of the step whose positions begin at ``start``."""
        first = start + self._dp_rank * self._batch_size
        pairs = []
        for position in range(first, first + self._batch_size):
            source, number = self._mixture.locate(position)
            epoch, i = divmod(number, self._counts[source])
            pairs.append((self._sources[source], int(self._order(source, epoch)[i])))
        return _rows(pairs, self._seq_len)

    def _order(self, source: int, epoch: int) -> np.ndarray:
        orders = self._orders[source]
        if epoch not in orders:
            if len(orders) == 2:
                del orders[min(orders)]
            orders[epoch] = permutation(self._counts[source], self._seed, epoch, source)
        return orders[epoch]


def validation_batches(
    sources: Sequence[TokenSource],
    *,
    seq_len: int,
    batch_size: int,
    dp_rank: int,
    dp_world_size: int,
    context_len: int | None = None,
) -> Iterator[Batch]:
    """All sequences of the held-out sources once, in order, dealt out to the ranks batch by batch.

    Every rank yields the same number of batches, so that collectives match, all of them ``[B, T]``:
    the rest is filled with rows of token 0 whose labels are all ``IGNORE_INDEX``. A batch, and on a short stream all
    batches of a rank, can consist of such rows: sum the losses and the valid labels over batches and ranks, and
    divide once.

    Args:
        sources: What is held out; with no whole sequence, as for a validation share of 0, there are no
            batches.
        seq_len: Sequence length ``T`` in tokens.
        batch_size: Sequences ``B`` per batch, of this rank.
        dp_rank: This rank among the data-parallel ranks.
        dp_world_size: Number of data-parallel ranks.
        context_len: See `to_batch`; None for plain causal attention.

    Yields:
        What `to_batch` makes.
    """
    _check(seq_len, batch_size, dp_rank, dp_world_size)
    pairs = [(source, i) for source in sources for i in range(source.num_sequences(seq_len))]
    for start in range(0, len(pairs), batch_size * dp_world_size):
        first = start + dp_rank * batch_size
        rows = _rows(pairs[first : first + batch_size], seq_len)
        missing = batch_size - len(rows.ends)
        rows = Rows(
            np.pad(rows.tokens, ((0, missing), (0, 0))), rows.ends + [np.empty(0, int)] * missing
        )
        inputs, labels = to_batch(rows, context_len)
        labels[batch_size - missing :] = IGNORE_INDEX
        yield inputs, labels


def check_fingerprint(saved: dict[str, Any], own: dict[str, Any], flags: dict[str, str]) -> None:
    """Raises ValueError, naming the flag to look at, unless the fields in ``flags`` agree."""
    for field, flag in flags.items():
        if saved.get(field) != own[field]:
            raise ValueError(
                f"{flag}: the checkpoint's data has {field} {saved.get(field)}, this run's has "
                f"{own[field]}; resume with the checkpoint's data, tokenizer, validation share, sequence "
                "length and seed, or start a new run in another folder"
            )


def _rows(pairs: Sequence[tuple[TokenSource, int]], seq_len: int) -> Rows:
    read = [source.read(index, seq_len) for source, index in pairs]
    # uint32 only where a source has it
    dtype = np.result_type(*(row for row, _ in read)) if read else np.uint16
    tokens = np.empty((len(read), seq_len + 1), dtype)
    for i, (row, _) in enumerate(read):
        tokens[i] = row
    return Rows(tokens, [ends for _, ends in read])


def _combined(checksums: Sequence[int], shares: Sequence[int]) -> int:
    """One checksum for all sources and their shares; that of the source if there is only one."""
    if len(checksums) == 1:
        return checksums[0]
    return zlib.crc32(repr((list(checksums), list(shares))).encode())


def _check(seq_len: int, batch_size: int, dp_rank: int, dp_world_size: int) -> None:
    if seq_len < 1:
        raise ValueError(f"--training.seq_len {seq_len}: expected at least 1")
    if batch_size < 1:
        raise ValueError(f"--training.batch_size {batch_size}: expected at least 1")
    assert 0 <= dp_rank < dp_world_size, (dp_rank, dp_world_size)
