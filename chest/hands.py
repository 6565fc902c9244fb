"""Values that are not resident and still alive: in somebody's hand, or referred to elsewhere.

What a thread set or was handed last is in its *hand* until it sets or is handed another value, so
that ``c.setdefault('k', []).append(3)`` counts although the list leaves memory before it is
appended to. Other values that left memory are remembered by weak references, where their type
allows it. Either kind comes back as the same object, and may have changed meanwhile.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from itertools import repeat
from typing import Any

from chest.blocks import Steps, block

THREADS = 32  # with a value in hand, before those that ended are looked for
REFERENCES = 1000  # kept before dead ones are looked for


class _FixedReference(weakref.ref[Any]):
    """A weak reference to a value that could not change when it left."""

    __slots__ = ()


class _Fixed:
    """Keeps a value that could not change when it left."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self) -> Any:
        return self._value


class Hands:
    """The values in hand, by thread, and those that left memory, by key.

    Notes
    -----
    Everything but `swap` is called under the lock of the chest.
    """

    def __init__(self) -> None:
        self.held: dict[int, tuple[Any, Any]] = {}
        self.left: dict[Any, Callable[[], Any]] = {}
        self._pinned: dict[object, tuple[Any, Any]] = {}
        self._passing: dict[int, tuple[Any, Any]] = {}  # by thread, on the way out of its hand
        self.owed: deque[tuple[Any, Any]] = deque()  # let go of, not looked at yet
        self.settling = False  # while the first of them is looked at
        self._limit = REFERENCES

    def hold(self, key: Hashable, value: Any) -> None:
        """Put a value in the hand of this thread.

        What was in it before, and is not resident, is `owed` a look; if there are many hands, so is
        what was in those of threads that ended.
        """
        me, hand = threading.get_ident(), (key, value)
        while self.held.get(me) is not hand:
            before = self.held.get(me)
            self.empty()
            self.held[me] = hand
            del before  # which may die here, and take others in hand as it does
        if len(self.held) > THREADS:
            self.open_ended()

    def empty(self) -> None:
        """Empty the hand of this thread, as `hold` does."""
        self._open(threading.get_ident())

    def open_ended(self) -> None:
        """Empty the hands of threads that ended, as `hold` does."""
        for ident in self.held.keys() - sys._current_frames().keys():
            self._open(ident)

    def _open(self, ident: int) -> None:
        hand = self.held.get(ident)
        if hand is None:
            return
        if hand[0] in self.left:
            self.owed.append(hand)
        self.held.pop(ident, None)  # last: at an interrupt it is in one place or the other

    def swap(self, key: Hashable, value: Any) -> None:
        """Put a resident value in the hand of this thread, without the lock.

        What was in the hand before, and is not resident, is `owed` a look.
        """
        me = threading.get_ident()
        hand = self.held.get(me)
        if hand is None:
            self.held[me] = (key, value)
            return
        self._passing[me] = hand  # so that it is held at any moment until it is owed
        self.held[me] = (key, value)
        is_owed = hand[0] in self.left  # only now: it may have left memory while it was in the hand
        if is_owed:
            self.owed.append(hand)
        self._passing.pop(me, None)
        if not is_owed and hand[0] in self.left:  # just now
            self.owed.append(hand)

    @block
    def pinned(self) -> Steps:
        """Keep what is in the hand of this thread there, whatever hooks take meanwhile."""
        me = threading.get_ident()
        hand = self.held.get(me)
        if hand is None:
            yield
            return
        pin = object()
        self._pinned[pin] = hand
        try:
            yield
        finally:
            taken = self.held.get(me)
            if taken is not None and taken is not hand:
                self.owed.append(taken)
            self.held[me] = hand
            del self._pinned[pin]

    def leave(
        self, key: Hashable, value: Any, *, soon: bool = False, fixed: bool = False
    ) -> None:
        """Remember that a value is not resident, or not `soon`, as long as it is alive.

        With `fixed` it could not change so far. Only the array of somebody who has it can be made
        read-only since, after it was changed.
        """
        if type(value).__weakrefoffset__:
            self.left[key] = _FixedReference(value) if fixed else weakref.ref(value)
        elif soon or self._is_held(key, value):
            self.left[key] = _Fixed(value) if fixed else lambda: value
        else:
            self.left.pop(key, None)
        if len(self.left) > self._limit:
            self.left = {key: left for key, left in self.left.items() if left() is not None}
            self._limit = max(REFERENCES, 2 * len(self.left))

    def leave_all(self, keys: list[Any], values: Sequence[Any]) -> None:
        """Remember those of values that are not resident and in a hand, and forget the others.

        There are no weak references to any of them.
        """
        held = {id(value) for _, value in self._in_hands()}
        ids = [*map(id, values)]
        if held.isdisjoint(ids):
            deque(map(self.left.pop, keys, repeat(None)), maxlen=0)
            return
        for key, value, some in zip(keys, values, ids, strict=True):
            if some in held:
                self.leave(key, value)
            else:
                self.left.pop(key, None)

    def _in_hands(self) -> list[tuple[Any, Any]]:
        # In the order that a value takes, so that it is met wherever it goes meanwhile.
        return [*self.held.values(), *self._pinned.values(), *self._passing.values(), *self.owed]

    def _is_held(self, key: Hashable, value: Any, times: int = 1) -> bool:
        names = [name for name, some in self._in_hands() if some is value]
        # As a dict compares keys: some cannot be compared that have different hashes.
        return len([n for n in names if hash(n) == hash(key) and (n,) == (key,)]) >= times

    def of_others(self) -> list[tuple[Any, Any]]:
        """Return what other threads have in hand, as pairs of key and value."""
        me = threading.get_ident()
        return [pair for ident, pair in self.held.copy().items() if ident != me]

    def get(self, key: Hashable, default: Any = None) -> Any:
        """Return the value that left under `key`, `default` if there is none alive."""
        left = self.left.get(key)
        if left is None:
            return default
        value = left()
        return default if value is None and isinstance(left, weakref.ref) else value

    def is_fixed(self, key: Hashable) -> bool:
        """Tell whether what left under `key` could not change then."""
        return isinstance(self.left.get(key), _FixedReference | _Fixed)

    def knows(self, key: Hashable) -> bool:
        """Tell whether something left under `key` that may be alive."""
        return key in self.left

    def forget(self, key: Hashable) -> None:
        """Forget what left under `key`: it is resident again, or replaced, or deleted."""
        self.left.pop(key, None)

    def is_gone(self, key: Hashable, value: Any) -> bool:
        """Tell whether a value that is owed a look is not resident, and waits for nothing else."""
        left = self.left.get(key)
        if left is None or left() is not value:
            return False
        return isinstance(left, weakref.ref) or not self._is_held(key, value, 2)

    def settled(self, key: Hashable, value: Any) -> None:
        """Let go of a value that `is_gone`, and is as the disk holds it."""
        left = self.left.get(key)
        if left is not None and left() is value and not isinstance(left, weakref.ref):
            del self.left[key]

    def mend(self, rows: dict[Any, int], inmem: dict[Any, Any]) -> None:
        """Forget what is resident, or deleted, after all."""
        self.settling = False
        left = {key: value for key, value in self.left.items() if key in rows and key not in inmem}
        # What is referred to here alone was about to leave, and is as the disk holds it.
        self.left = {
            key: value
            for key, value in left.items()
            if isinstance(value, weakref.ref) or self._is_held(key, value())
        }

    def alive(self) -> list[tuple[Any, Any]]:
        """Return all that left and is alive, as pairs of key and value."""
        pairs = [(key, left()) for key, left in self.left.items()]
        return [(key, value) for key, value in pairs if value is not None]

    def check(self, rows: dict[Any, int], inmem: dict[Any, Any]) -> None:
        """Assert every invariant."""
        assert not self.left.keys() & inmem.keys(), "a resident value has left"
        assert self.left.keys() <= rows.keys(), "a deleted value has left"
