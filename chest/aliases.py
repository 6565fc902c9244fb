"""Keys that are equal and do not look alike: 1, True, 1.0, a number of numpy, a member of an enum.

A dict takes them for one key, which is the one that was set first. So must an index, where some of
them can only be read with their class, and are two for who has not got it. Even one that is set
again may be pickled otherwise.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Collection, Hashable, Iterable
from contextlib import suppress
from itertools import repeat
from typing import Any

from chest.columns import NUMBERS, Pickled, all_plain, is_plain
from chest.rows import Rows

UNSAVED = -1  # stands for any row of a key whose value no commit holds: it is negative
ALIKE = {str, bytes, int, type(None)}  # of these types, keys that are set look like those there


class _Probe:
    """Equal to whatever a key is equal to, and takes note of it."""

    __array_ufunc__ = None  # for numpy to compare with this, and with no number made of its own

    def __init__(self, key: Hashable) -> None:
        self._key = key
        self._hash = hash(key)
        self.found: Any = self

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if same := bool(self._key == other):
            self.found = other
        return same


def may_differ(key: Hashable) -> bool:
    """Tell whether a key may look otherwise than an equal one, both read without any class."""
    return type(key) not in ALIKE and (not is_plain(key) or type(key) in NUMBERS)


def as_set(keys: Collection[Hashable], key: Any) -> Any:
    """Return a key as a dict has it, where that is a plain one; itself if it has none.

    Keys of other classes may know their own kind alone, or compare a part of them with it.
    """
    probe = _Probe(key)
    with suppress(Exception):  # of another key of that hash, which is asked first
        if probe not in keys:
            return key
    if probe.found is not probe:
        return probe.found
    alike = (other for other in keys if hash(other) == hash(key) and other == key)
    return next(alike, key)


class Aliases(Rows):
    """The keys of a chest, and what each was first set as.

    Attributes
    ----------
    rows : dict
        Every key, in order, with its row, or with ``~serial`` as long as no commit holds its
        value; replaced as a whole when cleared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[Any, int] = {}
        # What keys were first set as, by row, where an equal one may be written otherwise: their
        # pickles if the index has any, and else themselves.
        self._names: dict[int, Any] = {}

    def spelled(self, key: Any) -> Any:
        """Return a key as it was first set, but for one of which a commit holds the pickle.

        A number of numpy's, or of an enum, finds the value of the int that it is equal to. No
        commit may name one in the place of the other: where a class cannot be loaded, they are two.
        """
        row = self.rows.get(key)
        if row is None or self._has_pickle(row):
            return key
        if row in self._names:
            return self._names[row]
        return as_set(self.rows, key) if may_differ(key) else key

    def is_pickled(self, key: Any) -> bool:
        """Tell whether a commit holds the pickle of a key, or of an equal one."""
        return key in self.rows and self._has_pickle(self.rows[key])

    def _has_pickle(self, row: int) -> bool:
        return type(self._names.get(row)) is bytes

    def spell(self, keys: list[Any]) -> list[Any]:
        """Return keys as they were first set, as `spelled` does."""
        if not self._names and ALIKE.issuperset(map(type, keys)):
            return keys
        return [*map(self.spelled, keys)]

    def _named(self, key: Any, row: int) -> Any:
        """Return what the index names a key, if it has that row."""
        name = self._names.get(row, key) if row >= 0 else key
        return Pickled(name) if type(name) is bytes and name is not key else name

    def _written(self, keys: list[Any], rows: Iterable[int]) -> list[Any]:
        """Return keys as the index has them, or shall; the very list where that is as they are."""
        if not self._names and all_plain(keys):
            return keys
        named = map(self._named, keys, rows)
        return [
            name if type(name) is Pickled or is_plain(name) else Pickled(pickle.dumps(name, 5))
            for name in named
        ]

    def _names_of_stored(self) -> dict[int, Any]:
        return {row: name for row, name in self._names.items() if row >= 0}

    def _retire(self, rows: Iterable[int]) -> None:
        stored = [row for row in rows if row >= 0]
        super()._retire(stored)
        self._forget_names(stored)

    def _forget_names(self, rows: Iterable[int]) -> None:
        if self._names:
            deque(map(self._names.pop, rows, repeat(None)), maxlen=0)
