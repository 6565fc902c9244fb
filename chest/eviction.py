"""Who leaves memory first.

Values are enrolled in *cohorts*, which leave memory together: a large value is a cohort of its
own, small ones share one. A heap ranks the cohorts by GreedyDual-Size-Frequency (Cao and Irani
1997, Cherkasova 1998), where the cost of a value is the time to read it back. So large values
leave before small ones that were used as often, and cold ones before hot ones.

The ranking is lazy, as in CLOCK and SIEVE (Zhang et al. 2024): a use only marks the key, and a
marked key whose turn comes is enrolled anew with one more use to its credit instead of leaving.
Nothing here takes a lock but `mark`, which any thread may call at any time, everything is called
under the lock of the chest.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import count

from heapdict import heapdict

LARGE = 64 * 1024  # bytes; a value from this size is a cohort of its own
COHORT_BYTES = 256 * 1024
COHORT_MEMBERS = 4096
COHORTS = 16  # at least so many in a budget, so that little more leaves than has to
CROSSOVER = 100_000  # bytes that are read in the time that opening a file takes
MARKS_SLACK = 1000


class Cohort:
    """Keys with the sizes of their values in bytes, and how often the cohort was found used."""

    __slots__ = ("nbytes", "sizes", "uses")

    def __init__(self, uses: int) -> None:
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
        self.set_budget(budget)
        self.marks: set[Hashable] = set()
        self._homes: dict[Hashable, Cohort] = {}
        self._heap: heapdict[Cohort, tuple[float, int]] = heapdict()
        self._open: dict[int, Cohort] = {}  # by uses: the cohort that small values still join
        self._aside = Cohort(0)
        self._floor = 0.0
        self._ticks = count()

    def set_budget(self, budget: float) -> None:
        """Let small values share cohorts that fit a budget of so many bytes."""
        self.cohort_bytes = min(COHORT_BYTES, budget / COHORTS)

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._homes

    def enroll(self, key: Hashable, size: int, uses: int = 1) -> None:
        """Enroll a value of `size` bytes; with ``uses=0`` it is the coldest of all."""
        if size >= LARGE:
            cohort = Cohort(uses)
        else:
            cohort = self._open.get(uses) or self._open.setdefault(uses, Cohort(uses))
        self._join(cohort, key, size)
        if size >= LARGE or len(cohort.sizes) == 1:
            self._rank(cohort)
        elif cohort.nbytes >= self.cohort_bytes or len(cohort.sizes) >= COHORT_MEMBERS:
            self._rank(cohort)
            self._close(cohort)

    def set_aside(self, key: Hashable, size: int) -> None:
        """Count a value of `size` bytes that cannot leave."""
        self._join(self._aside, key, size)

    def _join(self, cohort: Cohort, key: Hashable, size: int) -> None:
        cohort.sizes[key] = size
        cohort.nbytes += size
        self._homes[key] = cohort
        self.total += size

    def _rank(self, cohort: Cohort) -> None:
        mean = cohort.nbytes // len(cohort.sizes)
        size_class = 1 << mean.bit_length()
        number = self._floor + cohort.uses * (1 + CROSSOVER / size_class)
        self._heap[cohort] = (number, next(self._ticks))

    def _close(self, cohort: Cohort) -> None:
        if self._open.get(cohort.uses) is cohort:
            del self._open[cohort.uses]

    def discard(self, key: Hashable) -> int:
        """Forget a value that left; return the size it was enrolled with, 0 if it was not."""
        cohort = self._homes.pop(key, None)
        if cohort is None:
            return 0
        size = cohort.sizes.pop(key)
        cohort.nbytes -= size
        self.total -= size
        self.marks.discard(key)
        if not cohort.sizes and cohort is not self._aside:
            self._heap.pop(cohort, None)
            self._close(cohort)
        return size

    def size(self, key: Hashable) -> int:
        """Return the size in bytes that `key` was enrolled with."""
        return self._homes[key].sizes[key]

    def uses(self, key: Hashable) -> int:
        """Return how often `key` was found used, its last use included; 0 if not enrolled."""
        cohort = self._homes.get(key)
        return 0 if cohort is None else cohort.uses + (key in self.marks)

    def cheapest(self) -> list[Hashable]:
        """Return the keys that should leave next, empty when none can.

        They stay enrolled, and counted, until each is discarded, set aside or enrolled anew, one
        of which the caller owes to every one of them.
        """
        while self._heap:
            cohort, (self._floor, _) = self._heap.popitem()
            self._close(cohort)
            # Not an intersection of sets: that may go through the marks, to which hits add.
            for key in [key for key in cohort.sizes if key in self.marks]:
                size = self.discard(key)
                self.enroll(key, size, cohort.uses + 1)
            if cohort.sizes:
                self._purge_marks()
                return list(cohort.sizes)
        return []

    def stay(self, keys: Iterable[Hashable]) -> None:
        """Enroll anew keys that were to leave and could not."""
        for key in keys:
            uses = self._homes[key].uses
            self.enroll(key, self.discard(key), uses)

    def aside(self) -> list[Hashable]:
        """Return the keys that were set aside."""
        return list(self._aside.sizes)

    def _purge_marks(self) -> None:
        if len(self.marks) > len(self._homes) + MARKS_SLACK:
            self.marks.intersection_update(list(self._homes))

    def check(self, inmem: Iterable[Hashable]) -> None:
        """Assert every invariant, and that exactly the keys of `inmem` are enrolled."""
        keys = set(inmem)
        assert keys == self._homes.keys(), keys ^ self._homes.keys()
        cohorts = {*self._heap, self._aside}
        assert {*self._homes.values()} <= cohorts, "a cohort is neither in the heap nor aside"
        assert all(cohort.sizes for cohort in self._heap), "an empty cohort"
        assert {*self._open.values()} <= {*self._heap}, "an open cohort is not in the heap"
        for cohort in cohorts:
            assert cohort.nbytes == sum(cohort.sizes.values())
            assert all(self._homes[key] is cohort for key in cohort.sizes)
        assert self.total == sum(cohort.nbytes for cohort in cohorts)
