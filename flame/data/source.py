"""Tokens that can be read at any place, in memory or in a memory map, with the ends of their documents."""

import zlib
from dataclasses import dataclass, replace

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
    """One past the last token of each document ``[num_documents]``, in the stream that this is a part of."""
    checksum: str
    """Of all tokens of that stream."""
    offset: int = 0
    """Where in that stream the part begins."""

    @classmethod
    def of_documents(cls, name: str, documents: object, encoder: Encoder) -> "TokenSource":
        """Encodes documents, an iterable of str, in memory."""
        tokens, lengths = encoder(documents)
        return cls(name, tokens, np.cumsum(lengths), f"crc32 {crc32(tokens):08x}")

    def split(self, seq_len: int, share: float) -> "tuple[TokenSource, TokenSource]":
        """The part to train on and the part held out, as `split_tokens` cuts them, without a copy."""
        try:
            train, held_out = split_tokens(self.tokens, seq_len, share)
        except ValueError as error:
            raise ValueError(f"{error} (--training.dataset {self.name})") from None
        middle = self.offset + len(train)
        return replace(self, tokens=train), replace(self, tokens=held_out, offset=middle)

    def num_sequences(self, seq_len: int) -> int:
        """Whole sequences; the last label needs one token beyond the last input."""
        return max(0, (len(self.tokens) - 1) // seq_len)

    def read(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequence ``index``: its tokens ``[seq_len + 1]`` and where documents end in its inputs."""
        first = index * seq_len
        start = self.offset + first
        low, high = np.searchsorted(self.ends, [start + 1, start + seq_len])
        ends = np.asarray(self.ends[low:high]).astype(np.int64) - start
        return self.tokens[first : first + seq_len + 1], ends

    def sample_checksum(self) -> int:
        """CRC-32 of evenly spaced tokens: cheap on a memory map, and moved by any shift of the stream."""
        return sample_crc32(self.tokens)


def sample_crc32(tokens: np.ndarray) -> int:
    """CRC-32 of evenly spaced tokens."""
    places = np.linspace(0, len(tokens) - 1, _CHECKSUM_SAMPLES).astype(np.int64)
    return zlib.crc32(tokens[places].astype("<u4").tobytes())


def crc32(tokens: np.ndarray) -> int:
    """CRC-32 of all token ids, read a piece at a time."""
    crc = 0
    for start in range(0, len(tokens), 1 << 20):
        crc = zlib.crc32(tokens[start : start + (1 << 20)].astype("<u4").tobytes(), crc)
    return crc
