"""The views of a chest: `values()` and `items()` that stream what does not fit in memory."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from types import MappingProxyType
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class _View:
    _mapping: Any

    @property
    def mapping(self) -> MappingProxyType[Any, Any]:
        """The chest, to be looked at only."""
        return MappingProxyType(self._mapping)


class ChestKeys(_View, KeysView[K]):
    """The keys, in the order in which they were first set."""

    def __iter__(self) -> Iterator[K]:
        return iter(self._mapping)

    def __reversed__(self) -> Iterator[K]:
        return iter(reversed(self._mapping))


class ChestValues(_View, ValuesView[V]):
    """The values; iterating pushes nothing out of memory.

    Change a value before you take the next: where it does not fit in memory, it is a copy then.
    """

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in self._mapping._stream(self._mapping._in_order()))

    def __reversed__(self) -> Iterator[V]:
        return (value for _, value in self._mapping._stream(self._mapping._in_order()[::-1]))

    def __contains__(self, value: object) -> bool:
        return any(mine is value or mine == value for mine in self)


class ChestItems(_View, ItemsView[K, V]):
    """The pairs; iterating pushes nothing out of memory.

    Change a value before you take the next: where it does not fit in memory, it is a copy then.
    """

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return iter(self._mapping._stream(self._mapping._in_order()))

    def __contains__(self, item: object) -> bool:
        return isinstance(item, tuple) and len(item) == 2 and super().__contains__(item)

    def __reversed__(self) -> Iterator[tuple[K, V]]:
        return iter(self._mapping._stream(self._mapping._in_order()[::-1]))
