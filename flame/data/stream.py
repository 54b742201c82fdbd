"""Batches from documents that are read and tokenized while training, in their own order.

Each source is one endless stream of tokens: its documents in the order of its shards, each followed by eos, repeated
without end. Sequences are cut from it one after the other; nothing is dropped or shuffled.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.distributed.checkpoint.stateful import Stateful

from flame.data.batches import Batch, Rows, to_batch
from flame.data.bos import BEFORE_THE_FLAG
from flame.data.loader import check_fingerprint
from flame.data.mixing import Mixture
from flame.data.shards import Shards
from flame.data.source import TokenSource, crc32
from flame.data.token_stream import SOURCE_FLAG, Cursor, TokenStream, checksum, documents
from flame.data.tokens import Encoder
from flame.data.workers import Workers

# fields of the record of what was read, with the flag to check where they differ
_RECORD = dict.fromkeys(("shares", "identities", "begins", "held_out"), SOURCE_FLAG) | {
    "encoding": "--model.tokenizer_path, --training.bos"
}
_FINGERPRINT_FLAGS = {"seq_len": "--training.seq_len", "seed": "--training.seed"}


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
                f"{needed} would be held out, which leaves none to train on; hold out fewer or give more text"
            )
        if ends[-1] >= needed:
            break
        tokens.append(encoder([text])[0])
        ends.append(ends[-1] + len(tokens[-1]))
    stream = np.concatenate(tokens)[:needed]
    ends = np.asarray(ends[1:], np.int64)
    checksum = f"crc32 {crc32(stream):08x}"
    source = TokenSource(
        shards.name, stream, ends, checksum, bos=bos, has_document_bos=has_document_bos
    )
    return source, cursor  # pyright: ignore[reportPossiblyUnboundVariable]  # documents() is endless, so the loop runs


class StreamLoader(Stateful):
    """Endless training batches for one data-parallel rank from documents in their order.

    `Mixture` maps a position of the global order to a source; a source gives its sequences one after the other. Every
    step takes the next ``dp_world_size * batch_size`` positions; rank ``r`` takes the ``r``-th ``batch_size`` of them.
    Every rank reads and tokenizes all documents, since the start of a sequence depends on the tokens before it.

    The state is the position in the global order and, for each source, the document and token where its next sequence
    begins. It is the same on every rank, so a run continues exactly where it stopped, on any number of ranks and
    workers and with any batch size. Whole shards before the position are not read again. The state also records what
    was read: files before the position must not change, later ones may, and none may once an epoch has ended.

    Args:
        shards: What to read, with where training begins in each.
        held_out: Checksum of the held-out tokens of each source.
        shares: Positions of each source in a block of ``sum(shares)``.
        encoder: Tokenizes documents.
        seq_len: Sequence length ``T`` in tokens.
        batch_size: Sequences ``B`` per batch, of this rank.
        dp_rank: This rank among the data-parallel ranks.
        dp_world_size: Number of data-parallel ranks.
        seed: Seed of the order of sources.
        bos: See `TokenSource`, whose sequences are the same.
        has_document_bos: See `TokenSource`.
        context_len: See `to_batch`; None for plain causal attention.
        num_workers: Processes that tokenize ahead; 0: this one tokenizes when a batch is asked for.
        prefetch_factor: Pieces of 65,536 characters of each source that each of them has ahead.

    Iterating yields what `to_batch` makes. Several iterators of one loader share its position.

    Raises:
        ValueError: While iterating: a document or shard that cannot be read, by name.
    """

    def __init__(
        self,
        shards: Sequence[tuple[Shards, Cursor]],
        *,
        held_out: Sequence[str],
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
            TokenStream(own, begin, self._workers, document_bos) for own, begin in shards
        ]
        self._shards = shards
        self._held_out = list(held_out)
        self._shares = list(shares)
        self._mixture = Mixture(shares, seed)
        self._dtype = encoder.dtype
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._dp_rank = dp_rank
        self._dp_world_size = dp_world_size
        self._seed = seed
        self._context_len = context_len
        data = [(own.count, own.fingerprint, begin) for own, begin in shards]
        # of checkpoints from before --training.bos, which say nothing of the tokenizer
        self._earlier_checksum = zlib.crc32(repr((data, list(shares))).encode())
        self._encoding = [encoder.fingerprint, bos, has_document_bos]
        self._checksum = zlib.crc32(repr((self._earlier_checksum, self._encoding)).encode())
        self._is_as_earlier = encoder.bos == BEFORE_THE_FLAG

    def __iter__(self) -> Iterator[Batch]:
        while True:
            first = self._dp_rank * self._batch_size
            rows = Rows(np.empty((self._batch_size, self._seq_len + 1), self._dtype), [])
            # skip the sequences of other ranks too: the next step begins after them
            for i in range(self._dp_world_size * self._batch_size):
                stream = self._streams[self._mixture.locate(self.sequences_seen + i)[0]]
                if first <= i < first + self._batch_size:
                    rows.ends.append(self._read(stream, rows.tokens[i - first]))
                else:
                    stream.advance(self._seq_len - (self._bos is not None))
            self.sequences_seen += self._dp_world_size * self._batch_size
            yield to_batch(rows, self._context_len)

    def mark(self) -> Any:
        """The position, for `rewind`; cheap."""
        return self.sequences_seen, [stream.position() for stream in self._streams]

    def rewind(self, mark: Any) -> None:
        """Goes back to a position of this loader, also in the middle of a batch that could not be read."""
        self.sequences_seen, positions = mark
        for stream, position in zip(self._streams, positions, strict=True):
            stream.seek(*position)

    def _read(self, stream: TokenStream, row: np.ndarray) -> np.ndarray:
        """Fills a row with the next sequence; where documents end in its inputs."""
        if self._bos is None:
            return np.asarray(stream.advance(self._seq_len, row), np.int64)
        # the bos of a document that starts here is the sequence's
        lead = not (self._has_document_bos and stream.is_at_start())
        row[:lead] = self._bos
        return np.asarray(stream.advance(self._seq_len - 1, row[lead:]), np.int64) + lead

    def state_dict(self) -> dict[str, Any]:
        """The position in the global order and in each source, and a fingerprint; ints and one string."""
        positions = [stream.position() for stream in self._streams]
        record = {
            "places": [[*cursor, offset] for cursor, offset, _ in positions],
            "documents": [checksum(document) for _, _, document in positions],
            # in the first epoch: up to the position
            "files": [
                own.files and own.files[: None if cursor.epoch else cursor.shard + 1]
                for (own, _), (cursor, _, _) in zip(self._shards, positions, strict=True)
            ],
            # what may not change at all
            "identities": [None if own.files else own.fingerprint for own, _ in self._shards],
            "held_out": self._held_out,
            "begins": [begin for _, begin in self._shards],
            "shares": self._shares,
            "encoding": self._encoding,
        }
        return {
            "sequences_seen": self.sequences_seen,
            "seq_len": self._seq_len,
            "seed": self._seed,
            "checksum": self._checksum,
            "places": json.dumps(record),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
            ValueError: The state belongs to other data, another sequence length or another seed.
        """
        own = self.state_dict()
        record = json.loads(state_dict["places"])
        # older checkpoints hold the positions only: then no file may have changed
        is_old = isinstance(record, list)
        if is_old and self._is_as_earlier:
            own["checksum"] = self._earlier_checksum
        check_fingerprint(
            state_dict, own, _FINGERPRINT_FLAGS | ({"checksum": SOURCE_FLAG} if is_old else {})
        )
        if is_old:
            record = {"places": record, "documents": [None] * len(record)}
        else:
            self._require_same_past(record, json.loads(own["places"]))
        self.sequences_seen = state_dict["sequences_seen"]
        for stream, position, document in zip(
            self._streams, record["places"], record["documents"], strict=True
        ):
            *cursor, offset = position
            stream.seek(Cursor(*cursor), offset, document)

    def _require_same_past(self, saved: dict[str, Any], own: dict[str, Any]) -> None:
        """Raises ValueError if data that were read or held out have changed."""
        check_fingerprint(saved, own, _RECORD)
        for (shards, _), files, position in zip(
            self._shards, saved["files"], saved["places"], strict=True
        ):
            epoch, shard, _, offset = position
            now = shards.files and [list(file) for file in shards.files]
            if files is None or now is None:
                continue
            for i, then in enumerate(files):
                found = now[i] if i < len(now) else ["nothing", 0]
                # the file that is being read may change after the position
                is_same = found == then if epoch or i < shard else found[0] == then[0] or not offset
                if not is_same:
                    raise ValueError(
                        f"{SOURCE_FLAG}: the checkpoint's data has {then[0]}, {then[1]:,} bytes, as file {i + 1}, which "
                        f"was read; this run's has {found[0]}, {found[1]:,} bytes; only files that are still "
                        "to be read may change or go: restore it, or start a new run in another folder"
                    )
            if epoch and len(now) != len(files):
                raise ValueError(
                    f"{SOURCE_FLAG}: the checkpoint's data has {len(files)} files, all of which were read; this run's "
                    f"has {len(now)}; restore them, or start a new run in another folder"
                )

    def close(self) -> None:
        """Ends the workers."""
        self._workers.close()
