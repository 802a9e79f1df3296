"""Which prompt comes when: a pure function of (seed, ordinal), so that nothing needs saving."""

import numpy as np

from rlkit.types import IntArray


class PromptOrder:
    """Maps an ordinal, the position in the run's endless sequence of prompts, to a prompt.

    Ordinals [e * count, (e + 1) * count) are epoch e: each prompt once, shuffled by (seed, e), or in file order without
    `shuffle`. One epoch's permutation is kept.
    """

    def __init__(self, count: int, seed: int, shuffle: bool = True) -> None:
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self._kept: tuple[int, IntArray] = (-1, np.empty(0, dtype=np.int64))  # (epoch, permutation)

    def index(self, ordinal: int) -> int:
        """Index of the prompt at `ordinal` (0 or more)."""
        epoch, offset = divmod(ordinal, self.count)
        if not self.shuffle:
            return offset
        if epoch != self._kept[0]:
            # numpy keeps a bit generator's raw stream the same in every version, but not `shuffle` and `permutation`:
            # with sorted raw draws a resumed run is right also after an upgrade.
            draws = np.random.Philox(np.random.SeedSequence((self.seed, epoch))).random_raw(self.count)
            self._kept = epoch, np.argsort(draws, kind="stable").astype(np.int64)
        return int(self._kept[1][offset])
