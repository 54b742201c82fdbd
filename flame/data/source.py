"""Tokens that can be read at any position, in memory or in a memory map, with the ends of their documents."""

import zlib
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flame.data.tokens import Encoder, split_tokens

_CHECKSUM_SAMPLES = 1024


@dataclass(frozen=True, slots=True, eq=False)
class TokenSource:
    """One stream of documents, or a part of it."""

    name: str
    """What messages call it: the value of ``--training.dataset``."""
    tokens: np.ndarray
    """Token ids ``[num_tokens]``, any integer dtype; may be a memory map."""
    ends: np.ndarray
    """One past the last token of each document ``[num_documents]``, counted in the whole stream."""
    checksum: str
    """Checksum of all tokens of the whole stream."""
    offset: int = 0
    """Where in the whole stream this part begins."""
    bos: int | None = None
    """Added at the start of every sequence; `tokens` does not contain it."""
    has_document_bos: bool = False
    """Whether ``bos`` is also added before every document, before the stream is cut into sequences."""

    @classmethod
    def of_documents(
        cls, name: str, documents: Iterable[str], encoder: Encoder, **bos: Any
    ) -> "TokenSource":
        """Encodes documents, an iterable of str, in memory."""
        tokens, lengths = encoder(documents)
        return cls(name, tokens, np.cumsum(lengths), f"crc32 {crc32(tokens):08x}", **bos)

    def split(self, seq_len: int, share: float) -> "tuple[TokenSource, TokenSource]":
        """The part to train on and the part held out, as `split_tokens` cuts them, without a copy.

        Raises:
            ValueError: As `split_tokens`.
        """
        try:
            train, held_out = split_tokens(
                self.tokens, seq_len, share, stride=self._stride(seq_len)
            )
        except ValueError as error:
            raise ValueError(f"{error} (--training.dataset {self.name})") from None
        middle = self.offset + len(train)
        return replace(self, tokens=train), replace(self, tokens=held_out, offset=middle)

    def num_sequences(self, seq_len: int) -> int:
        """Whole sequences; the last label needs one token beyond the last input."""
        stride, length = self._stride(seq_len), len(self.tokens)
        if not self.has_document_bos:
            return max(0, (length - 1) // stride)
        length += self._num_starts()
        count = max(0, (length - 1) // stride)
        last = (count - 1) * stride
        # a sequence that begins with a document's bos ends one token later
        return count - (count > 0 and self._is_start(last) and last + seq_len + 1 > length)

    def read(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequence ``index``: its tokens ``[seq_len + 1]`` and where documents end in its inputs."""
        first = index * self._stride(seq_len)
        if self.has_document_bos:
            return self._read_with_bos(first, seq_len)
        bos = self.bos
        lead = bos is not None
        start = self.offset + first
        low, high = np.searchsorted(self.ends, [start + 1, start + seq_len - lead])
        ends = np.asarray(self.ends[low:high]).astype(np.int64) - start + lead
        tokens = self.tokens[first : first + seq_len + 1 - lead]
        return np.insert(tokens, 0, bos) if lead else tokens, ends

    def _stride(self, seq_len: int) -> int:
        """Tokens from the start of a sequence to that of the next."""
        return seq_len - (self.bos is not None)

    # With a bos before every document there are two ways to count: indices of `tokens`, and positions in the stream
    # that has the bos too. The j-th document that starts in this part has its bos at position start(j) + j.

    def _start(self, j: int) -> int:
        """Index of the first token of the j-th document that starts in this part."""
        i = self._first_end() + j
        return 0 if i < 0 else int(self.ends[i]) - self.offset

    def _first_end(self) -> int:
        """Index in `ends` of the document before the first that starts here; -1: it is the stream's first."""
        return int(np.searchsorted(self.ends, self.offset)) if self.offset else -1

    def _num_starts(self) -> int:
        high = int(np.searchsorted(self.ends, self.offset + len(self.tokens)))
        return high - self._first_end() if len(self.tokens) else 0

    def _starts_before(self, position: int) -> int:
        return bisect_left(range(self._num_starts()), position, key=lambda j: self._start(j) + j)

    def _is_start(self, position: int) -> bool:
        j = self._starts_before(position)
        return j < self._num_starts() and self._start(j) + j == position

    def _read_with_bos(self, position: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        bos: int = self.bos  # pyright: ignore[reportAssignmentType]  # has_document_bos is set only together with bos
        # the bos of the sequence is that of its first document, or precedes the rest of a document
        position += self._is_start(position)
        j = self._starts_before(position)
        first = position - j
        low = self._first_end() + j
        high = np.searchsorted(self.ends, self.offset + first + seq_len)
        starts = np.asarray(self.ends[low:high]).astype(np.int64) - self.offset - first
        tokens = np.insert(self.tokens[first : first + seq_len], starts, bos)[:seq_len]
        # the positions of their bos after the insertion
        ends = starts + np.arange(1, len(starts) + 1)
        return np.insert(tokens, 0, bos), ends[ends <= seq_len]

    def position_checksum(self) -> int:
        """CRC-32 of evenly spaced tokens, and of how sequences are cut.

        It is cheap on a memory map, and any shift of the stream changes it.
        """
        sample = sample_crc32(self.tokens)
        if self.bos is None:
            return sample
        return zlib.crc32(repr((sample, self.bos, self.has_document_bos)).encode())


def sample_crc32(tokens: np.ndarray) -> int:
    """CRC-32 of evenly spaced tokens."""
    sampled = np.linspace(0, len(tokens) - 1, _CHECKSUM_SAMPLES).astype(np.int64)
    return zlib.crc32(tokens[sampled].astype("<u4").tobytes())


def crc32(tokens: np.ndarray) -> int:
    """CRC-32 of all token ids, read a piece at a time."""
    crc = 0
    for start in range(0, len(tokens), 1 << 20):
        crc = zlib.crc32(tokens[start : start + (1 << 20)].astype("<u4").tobytes(), crc)
    return crc
