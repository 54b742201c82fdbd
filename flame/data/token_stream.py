"""The tokens of one source from any document on, without end, tokenized ahead by workers."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from flame.data.shards import Shards
from flame.data.source import crc32
from flame.data.workers import Workers

# characters that a worker gets at a time; at least one document
_CHUNK = 1 << 16

SOURCE_FLAG = "--training.dataset"


class Cursor(NamedTuple):
    """Position of a document in the stream of a source."""

    epoch: int = 0
    shard: int = 0
    row: int = 0


def documents(shards: Shards, start: Cursor, begin: Cursor) -> Iterator[tuple[Cursor, str]]:
    """Documents from ``start`` on, without end; every later epoch starts at ``begin``.

    Raises:
        ValueError: A whole epoch has no document, or a shard cannot be read.
    """
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
                f"{SOURCE_FLAG} {shards.name!r}: no document is left to train on; hold out fewer "
                "--validation.sequences, or give more text"
            )
        is_empty = True
        epoch, shard, row = epoch + 1, begin.shard, begin.row


def checksum(document: np.ndarray | int | None) -> int | None:
    """The checksum of a document's tokens; what is one already, or None, stays."""
    return crc32(document) if isinstance(document, np.ndarray) else document


class TokenStream:
    """The tokens of one source from a position on, tokenized ahead by workers."""

    def __init__(
        self, shards: Shards, begin: Cursor, workers: Workers, document_bos: int | None
    ) -> None:
        self._shards, self._begin, self._workers = shards, begin, workers
        # added before every document
        self._bos = [] if document_bos is None else [document_bos]
        self.seek(begin, 0)

    def seek(self, cursor: Cursor, offset: int, document: np.ndarray | int | None = None) -> None:
        """Goes to the ``offset``-th token of a document, or past its last.

        Args:
            cursor: The document.
            offset: Tokens of it that were taken.
            document: All of its tokens or their checksum, which must not have changed; None: unknown.
        """
        self._reader = documents(self._shards, cursor, self._begin)
        self._error: ValueError | None = None
        self._pending: deque[tuple[list[Cursor], Future[Any]]] = deque()
        # documents with tokens left; those of the first are used up to offset
        self._documents: deque[tuple[Cursor, np.ndarray]] = deque()
        self._offset, self._num_tokens = offset, -offset
        # the last document whose tokens are used up, or the one where reading began
        self._last = (cursor, offset, document)
        self._has_begun = False

    def position(self) -> tuple[Cursor, int, np.ndarray | int | None]:
        """Arguments of `seek` for the next token, relative to the document of the last token that was taken."""
        if self._has_begun and self._offset:
            cursor, tokens = self._documents[0]
            return cursor, self._offset, tokens
        return self._last

    def is_at_start(self) -> bool:
        """Whether the next token is the first of a document."""
        # after the last token of a document, the next document has to be read first
        self._fill(1)
        return self._offset == 0

    def advance(self, length: int, row: np.ndarray | None = None) -> list[int]:
        """Takes ``length`` tokens off the stream.

        Args:
            length: How many.
            row: Filled with them and the tokens that follow, ``[length + 1]`` or more; None: not needed.

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
        self._drop_used()
        return ends if row is not None else []  # pyright: ignore[reportPossiblyUnboundVariable]  # bound if row is not None

    def _drop_used(self) -> None:
        while self._documents and self._offset >= len(self._documents[0][1]):
            cursor, tokens = self._documents.popleft()
            self._last = (cursor, len(tokens), tokens)
            self._offset -= len(tokens)

    def _fill(self, num_tokens: int) -> None:
        while self._num_tokens < num_tokens:
            while len(self._pending) < self._workers.num_ahead and self._error is None:
                cursors, texts = self._chunk()
                if texts:
                    self._pending.append((cursors, self._workers.submit(texts)))
            if not self._pending:
                raise self._error  # pyright: ignore[reportGeneralTypeIssues]  # nothing is pending and nothing more was read, so an error is set
            cursors, future = self._pending.popleft()
            tokens, lengths = self._workers.result(future)
            starts = np.cumsum(lengths)[:-1]
            if self._bos:
                tokens = np.insert(tokens, [0, *starts], self._bos)
                starts = starts + np.arange(1, len(lengths))
            self._documents.extend(zip(cursors, np.split(tokens, starts), strict=True))
            self._num_tokens += len(tokens)
            if not self._has_begun:
                self._require_same_document()
                self._has_begun = True
                self._drop_used()

    def _require_same_document(self) -> None:
        """Raises ValueError unless the document where reading stopped is unchanged."""
        cursor, offset, document = self._last
        found, tokens = self._documents[0]
        if offset and not (
            found == cursor and len(tokens) >= offset and document in (None, checksum(tokens))
        ):
            raise ValueError(
                f"{SOURCE_FLAG} {self._shards.name!r}: document {cursor.row} of "
                f"{self._shards.part(cursor.shard)}, where the checkpoint stopped, is missing or has "
                "changed; restore the documents up to that one"
            )

    def _chunk(self) -> tuple[list[Cursor], list[str]]:
        cursors, texts, size = [], [], 0
        try:
            for cursor, text in self._reader:
                cursors.append(cursor)
                texts.append(text)
                size += len(text) + 1
                if size >= _CHUNK:
                    break
        except ValueError as error:
            # raised later, when all documents before it are used up
            self._error = error
        return cursors, texts
