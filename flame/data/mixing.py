"""The global order: which sequence of which source is at a position."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# in the seed of the order of sources, where the seed of a permutation has the index of a source
_MIXING = 1 << 30


def permutation(count: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """A random permutation ``[count]``, a function of the arguments only.

    The raw stream of a bit generator is the same in all numpy versions; that of Generator.permutation is not, and a
    run may be resumed with another numpy.
    """
    keys = np.random.PCG64([seed, epoch, source]).random_raw(count)
    return np.argsort(keys, kind="stable")


class Mixture:
    """Assigns the positions of a global order to sources, by their shares.

    Positions come in blocks of ``sum(shares)``. In each block source ``k`` has exactly ``shares[k]`` positions, in a
    random order that differs by block. The source of a position, and the number of its earlier sequences, are
    functions of the position, so nothing has to be saved.

    Args:
        shares: Positions of each source in a block, each at least 1.
        seed: Seed of the order.
    """

    def __init__(self, shares: Sequence[int], seed: int) -> None:
        self._shares = tuple(shares)
        self._seed = seed

    def locate(self, position: int) -> tuple[int, int]:
        """The source at a position, and the index of its sequence in that source, counted over all epochs."""
        if len(self._shares) == 1:
            return 0, position
        block, i = divmod(position, sum(self._shares))
        sources, before = _block(self._shares, self._seed, block)
        source = int(sources[i])
        return source, block * self._shares[source] + int(before[i])


@lru_cache(maxsize=4)
def _block(shares: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """For each position of a block: its source, and the number of earlier positions of that source in the block."""
    tickets = np.repeat(np.arange(len(shares)), shares)
    sources = tickets[permutation(len(tickets), seed, block, _MIXING)]
    before = np.empty(len(sources), np.int64)
    for source, share in enumerate(shares):
        before[sources == source] = np.arange(share)
    return sources, before
