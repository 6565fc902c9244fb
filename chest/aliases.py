"""Keys that are equal and do not look alike: 1, True, 1.0, a number of numpy, a member of an enum.

A dict takes them for one key, which is the one that was set first. So must an index, where some of
them can only be read with their class, and are two for who has not got it. Even one that is set
again may be pickled otherwise.
"""

from __future__ import annotations

from collections.abc import Container, Hashable
from typing import Any

from chest.columns import is_plain

ALIKE = {str, bytes, int, type(None)}  # of these types, keys that are set look like those there


class _Probe:
    """Equal to whatever a key is equal to, and takes note of it."""

    __array_ufunc__ = None  # for numpy to compare with this, and with no number made of its own

    def __init__(self, key: Hashable) -> None:
        self._key = key
        self._hash = hash(key)
        self.found: Any = key

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if same := bool(self._key == other):
            self.found = other
        return same


def may_differ(key: Hashable) -> bool:
    """Tell whether a key may look otherwise than an equal one, both read without any class."""
    return type(key) not in ALIKE and (not is_plain(key) or type(key) in (bool, float))


def as_set(keys: Container[Hashable], key: Any) -> Any:
    """Return a key as a dict has it, where that is a plain one; itself if it has none.

    Keys of other classes may know their own kind alone, or compare a part of them with it.
    """
    probe = _Probe(key)
    return probe.found if probe in keys else key
