"""Batches from documents that are read and tokenized while training, in their own order.

Each source is one endless stream of tokens: its documents in the order of its shards, each ended by eos,
again and again. Sequences are cut from it one after the other, nothing is dropped or shuffled.
"""

import json
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from torch.distributed.checkpoint.stateful import Stateful

from flame.data.batches import Batch, Rows, to_batch
from flame.data.bos import BEFORE_THE_FLAG
from flame.data.loader import check_fingerprint
from flame.data.mixing import Mixture
from flame.data.shards import Shards
from flame.data.source import TokenSource
from flame.data.tokens import Encoder
from flame.data.workers import Workers

# characters that a worker gets at a time, and at least one document
_CHUNK = 1 << 16

_FINGERPRINT = {
    "seq_len": "--training.seq_len",
    "seed": "--training.seed",
    "checksum": "--training.dataset",
}


class Cursor(NamedTuple):
    """Place of a document in the stream of a source."""

    epoch: int = 0
    shard: int = 0
    row: int = 0


def documents(shards: Shards, start: Cursor, begin: Cursor) -> Iterator[tuple[Cursor, str]]:
    """Documents from ``start`` on, without end; every later epoch starts at ``begin``."""
    epoch, shard, row = start
    is_empty = False
    while True:
        while shard < shards.count:
            for i, text in enumerate(shards.read(shard, row), row):
                is_empty = False
                yield Cursor(epoch, shard, i), text
            shard, row = shard + 1, 0
        if is_empty:
            raise ValueError(
                f"--training.dataset {shards.name!r}: no document is left to train on; hold out fewer "
                "--validation.sequences, or give more text"
            )
        is_empty = True
        epoch, shard, row = epoch + 1, begin.shard, begin.row


def hold_out(
    shards: Shards,
    encoder: Encoder,
    sequences: int,
    seq_len: int,
    *,
    bos: int | None = None,
    has_document_bos: bool = False,
) -> tuple[TokenSource, Cursor]:
    """The first documents as held-out sequences, and where those to train on begin.

    Args: ``bos`` and ``has_document_bos`` as in `TokenSource`.

    Raises:
        ValueError: The source has too few tokens.
    """
    needed = sequences * (seq_len - (bos is not None)) + 1 if sequences else 0
    tokens, ends = [np.empty(0, encoder.dtype)], [0]
    for cursor, text in documents(shards, Cursor(), Cursor()):
        if cursor.epoch:
            raise ValueError(
                f"--validation.sequences {sequences}: {shards.name} has {ends[-1]} tokens, of which "
                f"{needed} would be held out and none be left to train on; hold out fewer or give more text"
            )
        if ends[-1] >= needed:
            break
        tokens.append(encoder([text])[0])
        ends.append(ends[-1] + len(tokens[-1]))
    stream = np.concatenate(tokens)[:needed]
    ends = np.asarray(ends[1:], np.int64)
    source = TokenSource(shards.name, stream, ends, "", bos=bos, has_document_bos=has_document_bos)
    return source, cursor


class _TokenStream:
    """The tokens of one source from a place on, tokenized ahead by workers."""

    def __init__(
        self, shards: Shards, begin: Cursor, workers: Workers, document_bos: int | None
    ) -> None:
        self._shards, self._begin, self._workers = shards, begin, workers
        # in front of every document
        self._bos = [] if document_bos is None else [document_bos]
        self.seek(begin, 0)

    def seek(self, cursor: Cursor, offset: int) -> None:
        """Goes to the ``offset``-th token of a document."""
        self._reader = documents(self._shards, cursor, self._begin)
        self._pending: deque[tuple[list[Cursor], Future[Any]]] = deque()
        # documents of which a token is left, the first one used up to offset
        self._documents: deque[tuple[Cursor, np.ndarray]] = deque()
        self._first, self._offset, self._num_tokens = cursor, offset, -offset

    def place(self) -> list[int]:
        """Arguments of `seek` for the next token."""
        return [*(self._documents[0][0] if self._documents else self._first), self._offset]

    def is_at_start(self) -> bool:
        """Whether the next token is the first of a document."""
        return self._offset == 0

    def advance(self, length: int, row: np.ndarray | None = None) -> list[int]:
        """Takes ``length`` tokens off the stream.

        Args:
            length: How many.
            row: Filled with them and what follows, ``[length + 1]`` or more; None: they are not needed.

        Returns:
            One past the last token of each document that ends among them.
        """
        self._fill(length + 1 if row is None else len(row))
        if row is not None:
            # every document but the last ends in the row
            filled, ends, offset = 0, [], self._offset
            for _, tokens in self._documents:
                part = tokens[offset : offset + len(row) - filled]
                row[filled : filled + len(part)] = part
                filled += len(part)
                ends += [filled] * (offset + len(part) == len(tokens))
                offset = 0
                if filled == len(row):
                    break
        self._offset += length
        self._num_tokens -= length
        while self._offset >= len(self._documents[0][1]):
            self._offset -= len(self._documents.popleft()[1])
        return ends if row is not None else []

    def _fill(self, num_tokens: int) -> None:
        while self._num_tokens < num_tokens:
            while len(self._pending) < self._workers.num_ahead:
                cursors, texts = self._chunk()
                self._pending.append((cursors, self._workers.submit(texts)))
            cursors, future = self._pending.popleft()
            tokens, lengths = self._workers.result(future)
            starts = np.cumsum(lengths)[:-1]
            if self._bos:
                tokens = np.insert(tokens, [0, *starts], self._bos)
                lengths = lengths + 1
                starts = starts + np.arange(1, len(lengths))
            if not self._documents and self._offset >= lengths[0]:
                raise ValueError(
                    f"--training.dataset {self._shards.name!r}: the document where the checkpoint stopped, "
                    f"{cursors[0]}, has {lengths[0]} tokens, fewer than then; resume with its data"
                )
            self._documents.extend(zip(cursors, np.split(tokens, starts), strict=True))
            self._num_tokens += len(tokens)

    def _chunk(self) -> tuple[list[Cursor], list[str]]:
        cursors, texts, size = [], [], 0
        for cursor, text in self._reader:
            cursors.append(cursor)
            texts.append(text)
            size += len(text) + 1
            if size >= _CHUNK:
                break
        return cursors, texts


class StreamLoader(Stateful):
    """Endless training batches for one data-parallel rank from documents in their order.

    `Mixture` says which source a place of the global order takes from; a source gives its sequences one
    after the other. Every step takes the next ``dp_world_size * batch_size`` places, rank ``r`` the
    ``r``-th ``batch_size`` of them. For that every rank reads and tokenizes all of the documents: where a
    sequence begins depends on the tokens before it.

    The state is the place in the global order and, for each source, the document and token where its next
    sequence begins: the same on every rank, so a run goes on exactly where it stopped, on any number of
    ranks and workers and with any batch size. Whole shards before that place are not read again.

    Args:
        shards: What to read, with where training begins in each.
        shares: Places of each source among ``sum(shares)``.
        encoder: Tokenizes.
        seq_len: Sequence length ``T`` in tokens.
        batch_size: Sequences ``B`` a batch, of this rank.
        dp_rank: This rank among the data-parallel ranks.
        dp_world_size: Number of data-parallel ranks.
        seed: Seed of the order of sources.
        bos: See `TokenSource`, whose sequences are the same.
        has_document_bos: See `TokenSource`.
        context_len: See `to_batch`; None for plain causal attention.
        num_workers: Processes that tokenize ahead; 0: this one tokenizes when a batch is asked for.
        prefetch_factor: Pieces of 65,536 characters of each source that each of them has ahead.

    Iterating yields what `to_batch` makes. Several iterators of one loader share its place.

    Raises:
        ValueError: While iterating: a document or shard that cannot be read, by name.
    """

    def __init__(
        self,
        shards: Sequence[tuple[Shards, Cursor]],
        *,
        shares: Sequence[int],
        encoder: Encoder,
        seq_len: int,
        batch_size: int,
        dp_rank: int,
        dp_world_size: int,
        seed: int,
        bos: int | None = None,
        has_document_bos: bool = False,
        context_len: int | None = None,
        num_workers: int = 0,
        prefetch_factor: int = 2,
    ) -> None:
        # sequences handed out so far, over all ranks and epochs
        self.sequences_seen = 0
        self._workers = Workers(encoder, num_workers, prefetch_factor)
        self._bos, self._has_document_bos = bos, has_document_bos
        document_bos = bos if has_document_bos else None
        self._streams = [
            _TokenStream(own, begin, self._workers, document_bos) for own, begin in shards
        ]
        self._mixture = Mixture(shares, seed)
        self._dtype = encoder.dtype
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._dp_rank = dp_rank
        self._dp_world_size = dp_world_size
        self._seed = seed
        self._context_len = context_len
        data = [(own.count, own.identity, begin) for own, begin in shards]
        # of checkpoints from before --training.bos, which say nothing of the tokenizer
        self._earlier_checksum = zlib.crc32(repr((data, list(shares))).encode())
        how = (encoder.fingerprint, bos, has_document_bos)
        self._checksum = zlib.crc32(repr((self._earlier_checksum, how)).encode())
        self._is_as_earlier = encoder.bos == BEFORE_THE_FLAG

    def __iter__(self) -> Iterator[Batch]:
        while True:
            first = self._dp_rank * self._batch_size
            rows = Rows(np.empty((self._batch_size, self._seq_len + 1), self._dtype), [])
            # the others' sequences too: the next step begins behind them
            for i in range(self._dp_world_size * self._batch_size):
                stream = self._streams[self._mixture.locate(self.sequences_seen + i)[0]]
                if first <= i < first + self._batch_size:
                    rows.ends.append(self._read(stream, rows.tokens[i - first]))
                else:
                    stream.advance(self._seq_len - (self._bos is not None))
            self.sequences_seen += self._dp_world_size * self._batch_size
            yield to_batch(rows, self._context_len)

    def _read(self, stream: _TokenStream, row: np.ndarray) -> np.ndarray:
        """Fills a row with the next sequence; where documents end in its inputs."""
        if self._bos is None:
            return np.asarray(stream.advance(self._seq_len, row), np.int64)
        # the bos of a document that starts here is the sequence's
        lead = not (self._has_document_bos and stream.is_at_start())
        row[:lead] = self._bos
        return np.asarray(stream.advance(self._seq_len - 1, row[lead:]), np.int64) + lead

    def state_dict(self) -> dict[str, Any]:
        """The place in the global order and in each source, and a fingerprint; ints and one string."""
        return {
            "sequences_seen": self.sequences_seen,
            "seq_len": self._seq_len,
            "seed": self._seed,
            "checksum": self._checksum,
            "places": json.dumps([stream.place() for stream in self._streams]),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            ValueError: The state belongs to other data, another sequence length or another seed.
        """
        own = self.state_dict()
        if self._is_as_earlier and state_dict["checksum"] == self._earlier_checksum:
            own["checksum"] = self._earlier_checksum
        check_fingerprint(state_dict, own, _FINGERPRINT)
        self.sequences_seen = state_dict["sequences_seen"]
        for stream, place in zip(self._streams, json.loads(state_dict["places"]), strict=True):
            *cursor, offset = place
            stream.seek(Cursor(*cursor), offset)

    def close(self) -> None:
        """Ends the workers."""
        self._workers.close()
