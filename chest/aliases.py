"""Keys that are equal and do not look alike: 1, True, 1.0, a number of numpy, a member of an enum.

A dict takes them for one key, which is the one that was set first. So must an index, where some of
them can only be read with their class, and are two for who has not got it.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Hashable
from typing import Any

from chest.columns import is_plain

ALIKE = {str, bytes, int, type(None)}  # of these types, keys that are set look like those there


class _Probe:
    """Equal to whatever a key is equal to, and takes note of what a dict compares it with."""

    __array_ufunc__ = None  # for numpy to compare with this, and with no number made of its own

    def __init__(self, key: Hashable) -> None:
        self._key = key
        self._hash = hash(key)
        self.found: Any = key

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        same = bool(self._key == other)
        if same and sys._getframe(1).f_code is as_set.__code__:
            self.found = other  # else it is a part that the key there compares instead of itself
        return same


def may_differ(key: Hashable) -> bool:
    """Tell whether a key may look otherwise than an equal one, both read without any class."""
    return type(key) not in ALIKE and (not is_plain(key) or type(key) in (bool, float))


def as_set(keys: Container[Hashable], key: Any) -> Any:
    """Return a key as a dict has it.

    It is returned itself if none is equal, or where the class of that one does not leave it to
    others to compare themselves with it.
    """
    probe = _Probe(key)
    try:
        return probe.found if probe in keys else key
    except Exception:  # noqa: BLE001 -- a class of theirs compares with its own kind alone
        return key
