"""Count the rows of a data set that become pairs or are left out, and how often its scores agree."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from axolotl_mopo.data.rows import PreferencePair
from axolotl_mopo.digests import fingerprint

_NO_SCORE = 2


@dataclass
class RowStats:
    """Counts of the rows read, the pairs made and what was left out."""

    rows: int = 0
    pairs: int = 0
    ties: int = 0
    unscored: int = 0
    """Rated responses without a score to order them by."""
    incomplete: int = 0
    """Pairs without a score that the run needs in addition."""
    identical: int = 0
    """Pairs of rated responses with the same text."""
    alone: int = 0
    """Rated responses that are the only one for their prompt."""
    empty: int = 0
    """Rows of rated data without a response."""
    capped: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that the entry's own settings leave out, by description."""
    bad: Counter[str] = field(default_factory=Counter)
    """Rows (of rated data: responses) that were dropped, by reason."""
    _keys: array = field(default_factory=lambda: array("q"))
    _orders: dict[str, bytearray] = field(default_factory=dict)

    def add(self, pair: PreferencePair) -> None:
        """Count a pair that is kept."""
        self._keys.append(fingerprint([pair.prompt_key, pair.chosen.content, pair.rejected.content]))
        for name in dict.fromkeys((*pair.chosen.scores, *pair.rejected.scores)):
            chosen, rejected = pair.chosen.scores.get(name), pair.rejected.scores.get(name)
            orders = self._orders.setdefault(name, bytearray())
            orders.extend([_NO_SCORE] * (self.pairs - len(orders)))
            if chosen is None or rejected is None:
                orders.append(_NO_SCORE)
            else:
                orders.append(((chosen > rejected) - (chosen < rejected)) % 256)
        self.pairs += 1

    @property
    def score_names(self) -> list[str]:
        """Scores that at least one response has, whether they are numbers or not."""
        return list(self._orders)

    @property
    def duplicates(self) -> int:
        """Pairs with the same prompt and texts as an earlier pair; they are kept."""
        return len(self._keys) - len(np.unique(np.asarray(self._keys)))

    @property
    def names(self) -> list[str]:
        """Scores that at least one pair has on both sides."""
        return [name for name, orders in self._orders.items() if orders.count(_NO_SCORE) < len(orders)]

    def below(self, name: str) -> int:
        """Count the pairs whose chosen response has a lower score than the rejected one."""
        return int((self._signs(name) == -1).sum())

    def agreement(self, names: Sequence[str]) -> np.ndarray:
        """Compute how often two orders of the responses agree, over the pairs that are tied in neither order.

        The first order is the label's; the others are those of the scores `names`.

        Returns:
            Fractions of shape [1 + len(names), 1 + len(names)]; NaN if no pair can be compared.
        """
        signs = np.stack([np.ones(self.pairs, dtype=np.int8), *(self._signs(name) for name in names)])
        signs = np.where(signs == _NO_SCORE, 0, signs).astype(np.float64)
        comparable = np.abs(signs) @ np.abs(signs).T
        same = (comparable + signs @ signs.T) / 2
        return np.divide(same, comparable, out=np.full_like(same, np.nan), where=comparable > 0)

    def _signs(self, name: str) -> np.ndarray:
        signs = np.full(self.pairs, _NO_SCORE, dtype=np.int8)
        orders = np.frombuffer(bytes(self._orders.get(name, b"")), dtype=np.int8)
        signs[: len(orders)] = orders
        return signs

    def lines(self) -> list[str]:
        """Return one line for each count that is not 0, and always those of rows and pairs."""
        duplicates = self.duplicates
        dropped = ", ".join(f"{count:,} {kind}" for kind, count in self.bad.most_common())
        counts = [
            (True, f"{self.rows:,} rows read"),
            (True, f"{self.pairs:,} pairs made"),
            *((count, f"{count:,} {what} left out") for what, count in self.left_out.most_common()),
            (self.ties, f"{self.ties:,} ties left out"),
            (self.unscored, f"{self.unscored:,} responses without a score to order them by left out"),
            (self.incomplete, f"{self.incomplete:,} pairs without a required score left out"),
            (self.identical, f"{self.identical:,} pairs of identical responses left out"),
            (self.alone, f"{self.alone:,} responses that are the only one for their prompt left out"),
            (self.empty, f"{self.empty:,} rows without a response left out"),
            (self.capped, f"{self.capped:,} pairs left out by max_pairs_per_prompt"),
            (duplicates, f"{duplicates:,} duplicate pairs kept"),
            (self.bad, f"{self.bad.total():,} bad rows or responses dropped: {dropped}"),
        ]
        return [line for shown, line in counts if shown]
