"""Who leaves memory first.

Values are enrolled in *cohorts*, which leave memory together: a large value is a cohort of its
own, small ones share one. A heap ranks the cohorts by GreedyDual-Size-Frequency (Cao and Irani
1997, Cherkasova 1998), where the cost of a value is the time to read it back. So large values
leave before small ones that were used as often, and cold ones before hot ones.

The ranking is lazy, as in CLOCK and SIEVE (Zhang et al. 2024): a use only marks the key, and a
marked key whose turn comes is enrolled anew with one more use to its credit instead of leaving. A
value that was read once counts less than one that was set, until it is used again.
Nothing here takes a lock but `mark`, which any thread may call at any time, everything is called
under the lock of the chest.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Hashable, Iterable
from itertools import chain, count
from typing import Any

from heapdict import heapdict

LARGE = 64 * 1024  # bytes; a value from this size is a cohort of its own
COHORT_BYTES = 256 * 1024
COHORT_MEMBERS = 4096
SLACK = 16  # one part in so many of the budget is made free at a time, or may be lent
COHORTS = 16  # at least so many in a budget, so that little more leaves than has to
CROSSOVER = 100_000  # bytes that are read in the time that opening a file takes
MARKS_SLACK = 1000
READ_ONCE = 0.5  # uses; on traces, 0 moves large values too often and 1 keeps scans too long


class Cohort:
    """Keys with the sizes of their values in bytes, and how often the cohort was found used."""

    __slots__ = ("nbytes", "sizes", "uses")

    def __init__(self, uses: float) -> None:
        self.sizes: dict[Hashable, int] = {}
        self.nbytes = 0
        self.uses = uses


class Eviction:
    """The values in memory, with their sizes, in the order in which they should leave.

    Parameters
    ----------
    budget : float
        How many bytes the values may take; nothing here makes them keep to it.

    Attributes
    ----------
    total : int
        Sum of the sizes of all values enrolled, in bytes.
    cohort_bytes : float
        How large a cohort of small values may become.
    marks : set
        Keys used since they were enrolled; may name keys that are not enrolled any more.
    """

    def __init__(self, budget: float) -> None:
        self.total = 0
        self._large = 0  # how many values of so many bytes are enrolled
        self.set_budget(budget)
        self.marks: set[Hashable] = set()
        self._homes: dict[Hashable, Cohort] = {}  # but for new values, as long as theirs is open
        self._heap: heapdict[Cohort, tuple[float, int]] = heapdict()
        self._open: dict[float, Cohort] = {}  # by uses: the cohort that small values still join
        self._aside = Cohort(0)
        self._floor = 0.0
        self._ticks = count()

    def set_budget(self, budget: float) -> None:
        """Let small values share cohorts that fit a budget of so many bytes."""
        self.cohort_bytes = min(COHORT_BYTES, budget / COHORTS)

    def __len__(self) -> int:
        return len(self._keys())

    def __contains__(self, key: Hashable) -> bool:
        return self._home(key) is not None

    def _keys(self) -> set[Hashable]:
        return {*self._homes, *(self._open[1].sizes if 1 in self._open else ())}

    def enroll(self, key: Hashable, size: int, uses: float = 1) -> None:
        """Enroll a value of `size` bytes, used so often; one just read counts as `READ_ONCE`."""
        cohort = self._open.get(uses) if size < LARGE else None
        if cohort is None:
            cohort = Cohort(uses)
            self._join(cohort, key, size)
            self._rank(cohort)
            if size < LARGE:
                self._open[uses] = cohort
            return
        # This is where small values pass by the million. New ones get their homes all at once.
        cohort.sizes[key] = size
        cohort.nbytes += size
        self.total += size
        if uses != 1:
            self._homes[key] = cohort
        if cohort.nbytes >= self.cohort_bytes or len(cohort.sizes) >= COHORT_MEMBERS:
            self._rank(cohort)
            self._close(cohort)

    def reuse(self, key: Hashable, size: int) -> bool:
        """Count one more use of a key; False where it is not enrolled with `size`, or set aside."""
        home = self._home(key)
        if home is None or home is self._aside or home.sizes[key] != size:
            return False
        self.marks.add(key)
        return True

    def set_aside(self, key: Hashable, size: int) -> None:
        """Count a value of `size` bytes that cannot leave."""
        self._join(self._aside, key, size)

    def _join(self, cohort: Cohort, key: Hashable, size: int) -> None:
        cohort.sizes[key] = size
        cohort.nbytes += size
        self._homes[key] = cohort
        self.total += size
        self._large += size >= LARGE

    def _rank(self, cohort: Cohort) -> None:
        mean = cohort.nbytes // len(cohort.sizes)
        size_class = 1 << mean.bit_length()
        number = self._floor + cohort.uses * (1 + CROSSOVER / size_class)
        self._heap[cohort] = (number, next(self._ticks))

    def _close(self, cohort: Cohort) -> None:
        if self._open.get(cohort.uses) is cohort:
            homes = dict.fromkeys(cohort.sizes, cohort) if cohort.uses == 1 else {}
            if self._open.get(cohort.uses) is cohort:  # what is collected as garbage may come here
                self._homes.update(homes)
                del self._open[cohort.uses]

    def _home(self, key: Hashable) -> Cohort | None:
        """Return the cohort of a key, None if it is not enrolled."""
        home = self._homes.get(key)
        if home is None and 1 in self._open and key in self._open[1].sizes:
            return self._open[1]
        return home

    def discard(self, key: Hashable) -> int:
        """Forget a value that left; return the size it was enrolled with, 0 if it was not."""
        cohort = self._home(key)
        if cohort is None:
            return 0
        self._homes.pop(key, None)
        size = cohort.sizes.pop(key)
        cohort.nbytes -= size
        self.total -= size
        self._large -= size >= LARGE
        self.marks.discard(key)
        if not cohort.sizes and cohort is not self._aside:
            self._heap.pop(cohort, None)
            self._close(cohort)
        return size

    def discard_all(self, keys: list[Hashable]) -> None:
        """Forget values that left, whole cohorts at a time."""
        start = 0
        while start < len(keys):
            cohort = self._home(keys[start]) or self._aside
            end = start + len(cohort.sizes)
            # To ask whether different keys are equal is more than any dict would do.
            whole = end <= len(keys) and all(map(operator.is_, cohort.sizes, keys[start:end]))
            if whole and len(cohort.sizes) > 1 and cohort is not self._aside:
                self._close(cohort)
                deque(map(self._homes.pop, cohort.sizes), maxlen=0)
                self.total -= cohort.nbytes
                self._heap.pop(cohort, None)
                start = end
            else:
                self.discard(keys[start])
                start += 1
        if self.marks:
            self.marks.difference_update(keys)

    def size(self, key: Hashable) -> int:
        """Return the size in bytes that `key` was enrolled with."""
        home = self._home(key)
        if home is None:
            raise KeyError(key)
        return home.sizes[key]

    def small(self, keys: list[Any]) -> list[Any]:
        """Return those of `keys` that were enrolled with less than `LARGE` bytes."""
        if not self._large:
            return keys
        if self._aside not in (homes := {*map(self._homes.get, keys)}):
            known = [home for home in homes if home is not None]  # the others are new, and small
            if all(len(home.sizes) > 1 or home.nbytes < LARGE for home in known):
                return keys
        return [key for key in keys if self.size(key) < LARGE]

    def uses(self, key: Hashable) -> float:
        """Return how often `key` was found used, its last use included; 0 if not enrolled."""
        cohort = self._home(key)
        return 0 if cohort is None else cohort.uses + (key in self.marks)

    def cheapest(self) -> dict[Hashable, int]:
        """Return the keys that should leave next, with their sizes; empty when none can.

        They stay enrolled, and counted, until each is discarded, set aside or enrolled anew, one
        of which the caller owes to every one of them.
        """
        while self._heap:
            cohort, (self._floor, _) = self._heap.popitem()
            self._close(cohort)
            # Not an intersection of sets: that may go through the marks, to which hits add.
            for key in [*filter(self.marks.__contains__, cohort.sizes)]:
                size = self.discard(key)
                self.enroll(key, size, cohort.uses + 1)
            if cohort.sizes:
                self._purge_marks()
                sizes: dict[Hashable, int] = cohort.sizes.copy()
                return sizes
        return {}

    def stay(self, keys: Iterable[Hashable]) -> None:
        """Enroll anew keys that were to leave and could not."""
        for key in keys:
            home = self._home(key)
            if home is not None:
                self.enroll(key, self.discard(key), home.uses)

    def aside(self) -> list[Hashable]:
        """Return the keys that were set aside."""
        return list(self._aside.sizes)

    def _purge_marks(self) -> None:
        if len(self.marks) > len(self._homes) + MARKS_SLACK:
            self.marks.intersection_update(self._keys())

    def check(self, inmem: Iterable[Hashable]) -> None:
        """Assert every invariant, and that exactly the keys of `inmem` are enrolled."""
        keys = set(inmem)
        assert keys == self._keys(), keys ^ self._keys()
        cohorts = {*self._heap, self._aside}
        assert {*map(self._home, keys)} <= cohorts, "a cohort is neither in the heap nor aside"
        assert all(cohort.sizes for cohort in self._heap), "an empty cohort"
        assert {*self._open.values()} <= {*self._heap}, "an open cohort is not in the heap"
        for cohort in cohorts:
            assert cohort.nbytes == sum(cohort.sizes.values())
            assert all(self._home(key) is cohort for key in cohort.sizes)
        assert self.total == sum(cohort.nbytes for cohort in cohorts)
        sizes = chain.from_iterable(cohort.sizes.values() for cohort in cohorts)
        assert self._large == sum(size >= LARGE for size in sizes)
