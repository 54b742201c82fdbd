"""Text that is said once: repeated passages and documents are left out; and which documents are held out."""

import hashlib
import re

from miniature.hypertext import Block
from miniature.prose import MIN_CHARACTERS, without_empty_headings

_SENTENCE = re.compile(r"(?<=[.!?;:])\s+")
_NOISE = re.compile(r"[^a-z]+")
# shorter sentences may come again
_SHORT = 30


class Seen:
    """The sentences so far, as hashes of 8 bytes, without case, digits and punctuation.

    So the licence in every manual, the paragraph that two of them share and the same page of another version
    count as repeated.
    """

    def __init__(self) -> None:
        self._sentences: set[bytes] = set()

    def new_part(self, blocks: list[Block]) -> list[Block]:
        """What of a document is new; empty if less than half of it is, or less than 300 characters.

        A paragraph counts as repeated if half of its characters are in sentences that were seen before.
        What is returned counts as seen from now on.
        """
        kept: list[Block] = []
        own: set[bytes] = set()
        total = 0
        for block in blocks:
            if block.is_heading:
                kept.append(block)
                continue
            sentences = [_NOISE.sub(" ", s.lower()).strip() for s in _SENTENCE.split(block.text)]
            keys = {_key(s): len(s) for s in sentences if len(s) >= _SHORT}
            repeated = sum(n for key, n in keys.items() if key in self._sentences or key in own)
            total += len(block.text)
            if 2 * repeated < len(block.text) - 1:
                kept.append(block)
                own.update(keys)
        kept = without_empty_headings(kept)
        size = sum(len(block.text) for block in kept if not block.is_heading)
        if size < MIN_CHARACTERS or 2 * size < total:
            return []
        self._sentences |= own
        return kept


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def position(name: str) -> int:
    """Position of a document in the shuffled order: a hash of its name, from 0 to 2**64 - 1."""
    return int.from_bytes(_key(name))


def is_held_out(name: str, share: float) -> bool:
    """Whether a document is held out, by a hash of its name alone."""
    return position("held out " + name) < share * 2**64
