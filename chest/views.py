"""The views of a chest: `values()` and `items()` that stream what does not fit in memory."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class ChestKeys(KeysView[K]):
    """The keys, in the order in which they were first set."""

    _mapping: Any

    def __iter__(self) -> Iterator[K]:
        return iter(self._mapping)

    def __reversed__(self) -> Iterator[K]:
        return iter(reversed(self._mapping))


class ChestValues(ValuesView[V]):
    """The values; iterating pushes nothing out of memory."""

    _mapping: Any

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in self._mapping._stream(self._mapping._in_order()))

    def __reversed__(self) -> Iterator[V]:
        return (value for _, value in self._mapping._stream(self._mapping._in_order()[::-1]))

    def __contains__(self, value: object) -> bool:
        return any(mine is value or mine == value for mine in self)


class ChestItems(ItemsView[K, V]):
    """The pairs; iterating pushes nothing out of memory."""

    _mapping: Any

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return iter(self._mapping._stream(self._mapping._in_order()))

    def __reversed__(self) -> Iterator[tuple[K, V]]:
        return iter(self._mapping._stream(self._mapping._in_order()[::-1]))
