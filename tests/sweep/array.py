"""A covering array: rows of values so that every two values of different factors meet in a row.

It is made greedily and while it is used, because only the program says which values do not go
together: a combination that is refused is forbidden from then on, and its pairs count as refused.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations

Item = tuple[str, Hashable]  # a factor and one of its values
Row = dict[str, Hashable]
Pair = tuple[Item, Item]

_TRIES = 12  # rows that are made greedily; the one with the most new pairs is taken


class CoveringArray:
    """The pairs of factors' values that are still to be met, and rows that meet them.

    factors: {factor: values}. first: factors whose pairs come before all others. seed: of the
    order, so that the same answers give the same rows.
    """

    def __init__(
        self, factors: Mapping[str, Sequence[Hashable]], seed: int, first: Iterable[str] = ()
    ) -> None:
        self._factors = factors
        self._random = random.Random(seed)
        self._forbidden: set[frozenset[Item]] = set()
        self._open: dict[Item, set[Item]] = {}
        self._first = set(first) or set(factors)
        for one, other in combinations(factors, 2):
            for value in factors[one]:
                for other_value in factors[other]:
                    self._open.setdefault((one, value), set()).add((other, other_value))
                    self._open.setdefault((other, other_value), set()).add((one, value))
        self.pairs = self.open
        self.met = 0
        self.refused = 0
        self.unmet = 0  # of combinations of three and more that are refused whatever row is made

    @property
    def open(self) -> int:
        """The number of pairs that no row has met and nothing refuses."""
        return sum(map(len, self._open.values())) // 2

    def make_row(self) -> Row | None:
        """Return a row that meets pairs which are open, or None if there are none.

        Forbidden combinations are not in it.
        """
        best: Row = {}
        best_gain = 0
        for _ in range(_TRIES):
            start = self._choose_pair()
            if start is None:
                return None
            row = self._extend(dict(start))
            if row is None:
                continue
            gain = self._count_open(row)
            if gain > best_gain:
                best, best_gain = row, gain
        if best_gain == 0:
            return self._give_up()
        return best

    def meet(self, row: Row) -> list[Pair]:
        """Count the pairs of a row as met, and return those that were open."""
        closed = [pair for pair in combinations(row.items(), 2) if self._close(*pair)]
        self.met += len(closed)
        return closed

    def reopen(self, pairs: Iterable[Pair]) -> None:
        """Open pairs again that were counted as met: their row was refused."""
        for one, other in pairs:
            self._open[one].add(other)
            self._open[other].add(one)
            self.met -= 1

    def forbid(self, items: Iterable[Item]) -> None:
        """Forbid a combination that is refused: one value, two, or more."""
        combination = frozenset(items)
        assert combination, "a row of base values alone cannot be refused"
        self._forbidden.add(combination)
        if len(combination) == 1:
            (one,) = combination
            for other in list(self._open.get(one, ())):
                self.refused += self._close(one, other)
        elif len(combination) == 2:
            one, other = combination
            self.refused += self._close(one, other)

    def _close(self, one: Item, other: Item) -> int:
        """Take a pair off the open ones; return 1 if it was open, else 0."""
        if other not in self._open.get(one, ()):
            return 0
        self._open[one].discard(other)
        self._open[other].discard(one)
        return 1

    def _choose_pair(self) -> Pair | None:
        """Return an open pair, of the factors that come first while there is one."""
        for wanted in (self._first, set(self._factors)):
            ones = [item for item, others in self._open.items() if others and item[0] in wanted]
            self._random.shuffle(ones)
            for one in ones:
                others = [other for other in self._open[one] if other[0] in wanted]
                if others:
                    return one, self._random.choice(sorted(others, key=repr))
        return None

    def _extend(self, row: Row) -> Row | None:
        """Return the row with a value for every factor, or None where something is forbidden."""
        if self._is_forbidden(row):
            return None
        names = [name for name in self._factors if name not in row]
        self._random.shuffle(names)
        for name in names:
            ranked = []
            for value in self._factors[name]:
                if self._is_forbidden({**row, name: value}):
                    continue
                partners = self._open.get((name, value), set())
                gain = sum(item in partners for item in row.items())
                ranked.append((gain, self._random.random(), value))
            if not ranked:
                return None
            row[name] = max(ranked, key=lambda entry: entry[:2])[2]
        return row

    def _is_forbidden(self, row: Row) -> bool:
        items = row.items()
        return any(combination <= items for combination in self._forbidden)

    def _count_open(self, row: Row) -> int:
        return sum(other in self._open.get(one, ()) for one, other in combinations(row.items(), 2))

    def _give_up(self) -> Row | None:
        """Take off a pair that fits into no row: three and more refuse each other around it."""
        pair = self._choose_pair()
        if pair is None:
            return None
        self.unmet += self._close(*pair)
        return self.make_row()
