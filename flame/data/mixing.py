"""Which sequence of which source stands at a place of the global order."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# of a generator for the order of sources, where others have the number of a source
_MIXING = 1 << 30


def permutation(count: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """A random order of ``count`` things ``[count]``, a function of the arguments alone.

    The raw stream of a bit generator is fixed for all numpy versions; that of Generator.permutation is
    not, and a resumed run may meet another numpy.
    """
    keys = np.random.PCG64([seed, epoch, source]).random_raw(count)
    return np.argsort(keys, kind="stable")


class Mixture:
    """Deals the places of a global order to sources, by their shares.

    Places come in blocks of ``sum(shares)``, in each of which source ``k`` has exactly ``shares[k]``
    places, in a random order of the block's own. So the source of a place, and how many of its sequences
    came before, follow from the place: nothing has to be remembered.

    Args:
        shares: Places of each source in a block, each at least 1.
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
    """For each place of a block its source, and how many places of that source come before in it."""
    tickets = np.repeat(np.arange(len(shares)), shares)
    sources = tickets[permutation(len(tickets), seed, block, _MIXING)]
    before = np.empty(len(sources), np.int64)
    for source, share in enumerate(shares):
        before[sources == source] = np.arange(share)
    return sources, before
