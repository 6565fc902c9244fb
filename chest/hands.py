"""Values that are not resident and still alive, because somebody has them.

A value that somebody refers to as it leaves memory is *lent*: it is kept here until nobody has it
any more, and then is compared with what the disk holds. So ``c['a'].extend(c['b'])`` counts, also
where the two do not fit in memory together.

What a thread set or was handed last is in its *hand* until it sets or is handed another value. So
``c['a']['b'].append(3)`` counts, though another thread makes room just as nobody refers to the
value of ``'a'`` any more.

References are counted, as CPython does: a value is lent where it has more of them than are held
here. What contains itself has such references from within. Where much is kept, large values of that
kind are let go of, and the oldest; as far as they can be, they are remembered by weak references.
All that is kept or remembered comes back as the same object, and may have changed meanwhile.
"""

from __future__ import annotations

import gc
import operator
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, compress, filterfalse, islice, repeat
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType, TracebackType
from typing import Any

from chest.blocks import Steps, block
from chest.eviction import LARGE

THREADS = 32  # with a value in hand, before those that ended are looked for
REFERENCES = 1000  # kept before dead ones are looked for
PATIENCE = 16  # operations between two looks at what is lent
LOOKS = 32  # values, an operation
FEW = 8  # values are kept whatever their size
DEPTH, BREADTH, PARTS = 100, 30, 100  # of a value, where it is looked for: so many parts of each

_ALONE = next(map(sys.getrefcount, [object()]))  # what is counted of a value in one list
_APART = (type, ModuleType, FunctionType, BuiltinFunctionType, FrameType, TracebackType)
_PACKAGE = __name__.partition(".")[0]

_value = operator.itemgetter(1)


class _FixedReference(weakref.ref[Any]):
    """A weak reference to a value that could not change when it left."""

    __slots__ = ()


class Hands:
    """The values in hand, by thread, and those that are lent, by key.

    Attributes
    ----------
    kept : dict
        The values that are lent, each with its size in bytes; the oldest first.
    nbytes : int
        The sum of their sizes.
    room : float
        How many bytes they may take, but for a `FEW`.
    settling : bool
        True while those that came back are looked at.

    Notes
    -----
    Everything but `swap` and `is_time` is called under the lock of the chest.
    """

    def __init__(self, room: float = 0) -> None:
        self.held: dict[int, tuple[Any, Any]] = {}
        self.kept: dict[Any, tuple[int, Any]] = {}
        self.nbytes = 0
        self.room = room
        self.settling = False
        self._times: dict[int, int] = {}  # by identity: under how many keys a value is kept
        self._unsearched: set[Any] = set()  # the keys of large ones that may contain themselves
        self._round = iter(list[Any]())
        self._left: dict[Any, weakref.ref[Any]] = {}
        self._limit = REFERENCES
        self._patience = 0
        self._watched: dict[object, set[Any]] = {}  # keys, by who watches
        self._dropped: dict[int, Any] = {}  # by identity: what hands let go of, of watched keys

    # -- hands -------------------------------------------------------------------------------------

    def hold(self, key: Hashable, value: Any) -> list[Any]:
        """Put a value in the hand of this thread; if there are many, empty those of ended ones.

        Return the key of what was there before, if that is kept, and nobody else has it.
        """
        before = self.held.get(threading.get_ident(), ())[:1]
        self.swap(key, value)
        if len(self.held) > THREADS:
            self.open_ended()
        return self.alone(before) if before and before[0] in self.kept else []

    def swap(self, key: Hashable, value: Any) -> None:
        """Put a value in the hand of this thread, without the lock."""
        me = threading.get_ident()
        before = self.held.get(me)
        self.held[me] = (key, value)
        self._drop(before)

    def empty(self) -> list[Any]:
        """Empty the hand of this thread; return what `hold` does."""
        me = threading.get_ident()
        before = self.held.get(me, ())[:1]
        self._open(me)
        return self.alone(before) if before and before[0] in self.kept else []

    def open_ended(self) -> None:
        """Empty the hands of threads that ended."""
        held = self.held.copy()  # first: who takes something in hand from here on has not ended
        others = held.keys() - {thread.ident for thread in threading.enumerate()}
        if not others:  # to ask for frames takes a lock, for which garbage that asks waits for ever
            return
        for ident in others - sys._current_frames().keys():
            if self.held.get(ident) is held[ident]:
                self._open(ident)

    def _open(self, ident: int) -> None:
        self._drop(self.held.pop(ident, None))

    def _drop(self, pair: tuple[Any, Any] | None) -> None:
        if not self._watched or pair is None:
            return
        if any(pair[0] in keys for keys in self._watched.copy().values()):
            self._dropped[id(pair[1])] = pair[1]

    @block
    def watched(self, keys: list[Any]) -> Steps:
        """Keep what any hand lets go of under these keys, which makes it lent, until the end.

        For hooks, or other threads, may have changed it since it was compared.
        """
        mine, watch = {*keys}, object()
        try:
            self._watched[watch] = mine
            yield
        finally:
            self._watched.pop(watch, None)  # first, and in one step: an interrupt may come after it
            if not self._watched:
                self._dropped = {}

    def of_others(self) -> list[tuple[Any, Any]]:
        """Return what other threads have in hand, as pairs of key and value."""
        me = threading.get_ident()
        return [pair for ident, pair in self.held.copy().items() if ident != me]

    # -- values that are not resident --------------------------------------------------------------

    def keep(self, key: Hashable, value: Any, size: int) -> None:
        """Keep a value, of `size` bytes, that is lent and not resident, or is about to leave."""
        before = self.kept.get(key)
        self.kept[key] = (size, value)  # in one step: no interrupt shall lose it
        if before is not None:
            self._discount(*before)
        self.nbytes += size
        self._times[id(value)] = self._times.get(id(value), 0) + 1
        if size >= LARGE:
            self._unsearched.add(key)
        self._left.pop(key, None)

    def keep_some(
        self,
        keys: list[Any],
        values: Sequence[Any],
        size_of: Callable[[Any], int],
        which: Iterable[bool],
    ) -> None:
        """Do that for some of these values, but for those that are kept already."""
        for key, value in compress(zip(keys, values, strict=True), which):
            if key not in self.kept:
                self.keep(key, value, size_of(key))

    def remember(self, key: Hashable, value: Any, *, fixed: bool = False) -> None:
        """Remember that a value is not resident, as long as it is alive, if that can be.

        With `fixed` it could not change so far. Only the array of somebody who has it can be made
        read-only since, after it was changed.
        """
        if not type(value).__weakrefoffset__:
            self.forget(key)
            return
        self._left[key] = _FixedReference(value) if fixed else weakref.ref(value)
        self._keep_no_more(key)  # only now: an interrupt before that would leave it nowhere
        if len(self._left) > self._limit:
            self._left = {k: left for k, left in self._left.items() if left() is not None}
            self._limit = max(REFERENCES, 2 * len(self._left))

    def __len__(self) -> int:
        return len(self.kept) + len(self._left)

    def get(self, key: Hashable, default: Any = None) -> Any:
        """Return the value that left under `key`, `default` if there is none alive."""
        if key in self.kept:
            return self.kept[key][1]
        left = self._left.get(key)
        value = None if left is None else left()
        return default if value is None else value

    def is_fixed(self, key: Hashable) -> bool:
        """Tell whether what left under `key` could not change then."""
        return type(self._left.get(key)) is _FixedReference

    def knows(self, key: Hashable) -> bool:
        """Tell whether something left under `key` that may be alive."""
        return key in self.kept or key in self._left

    def forget(self, key: Hashable) -> None:
        """Forget what left under `key`: it is resident again, or replaced, or deleted."""
        if self._left:
            self._left.pop(key, None)
        self._keep_no_more(key)

    def _keep_no_more(self, key: Hashable) -> None:
        if key in self.kept:
            self._unsearched.discard(key)
            self._discount(*self.kept.pop(key))

    def _discount(self, size: int, value: Any) -> None:
        self.nbytes -= size
        times = self._times.pop(id(value), 0) - 1
        if times > 0:
            self._times[id(value)] = times

    def kept_small(self, keys: list[Any]) -> dict[Any, Any]:
        """Return those of these kept values that are small."""
        entries = ((key, *self.kept[key]) for key in keys if key in self.kept)
        return {key: value for key, size, value in entries if size < LARGE}

    def is_time(self, *, is_hit: bool = False) -> bool:
        """Tell whether to look at what is lent: now and then, so that it is at several at a time.

        Where that takes more than its room, it is at each operation that is no hit.
        """
        self._patience -= 1
        return self._patience <= 0 or not (is_hit or self.nbytes <= self.room)

    def due(self, *, every: bool = False) -> list[Any]:
        """Look at some of the values that are lent, or at `every` one; return the keys of some.

        They are those that nobody else has any more and, where the others take too much room, large
        ones that contain themselves, and the oldest but for a `FEW`.
        """
        self._patience = PATIENCE
        if every or self.nbytes > self.room:
            kept = self.kept.copy()  # garbage that is collected meanwhile may change it
            back = self.alone(kept)
            return back + self._excess(kept, {*back})
        some = [*islice(self._round, LOOKS)]
        if not some:
            self._round = iter([*self.kept])
            some = [*islice(self._round, LOOKS)]
        return self.alone(some)

    def _excess(self, kept: dict[Any, tuple[int, Any]], back: set[Any]) -> list[Any]:
        """Return the keys of what is to go besides those that come back, but is in no hand."""
        lent = [*filterfalse(back.__contains__, kept)]
        left = sum(kept[key][0] for key in lent)
        if left <= self.room:
            return []
        in_hand = {id(value) for _, value in [*self.held.values()]}
        lent = [key for key in lent if id(kept[key][1]) not in in_hand]
        new = [*filter(self._unsearched.__contains__, lent)]
        gone = {key for key in new if contains_itself(kept[key][1])}
        self._unsearched.difference_update(new)
        left -= sum(kept[key][0] for key in gone)
        lent = [*filterfalse(gone.__contains__, lent)]
        for key in lent[: max(len(lent) - FEW, 0)]:
            if left <= self.room:
                break
            left -= kept[key][0]
            gone.add(key)
        return [*gone]

    def alone(self, keys: Iterable[Any]) -> list[Any]:
        """Return the keys of those values that are kept, and that nobody else has.

        Such a value is referred to by an entry of `kept` for each of its keys, and by nothing else.
        """
        entries = {key: entry for key in keys if (entry := self.kept.get(key))}
        counts = map(sys.getrefcount, map(_value, entries.values()))
        times = map(self._times.get, map(id, map(_value, entries.values())), repeat(0))
        found = zip(entries, counts, times, strict=True)
        return [key for key, count, here in found if count < _ALONE + here]

    def let_go(self, key: Hashable, entry: tuple[int, Any]) -> None:
        """Let go of a kept value that is as the disk holds it, if it was not handed out since."""
        if self.kept.get(key) is entry:
            if self.alone([key]):
                self.forget(key)
            else:
                self.remember(key, entry[1])

    def mend(self, rows: dict[Any, int], inmem: dict[Any, Any]) -> None:
        """Forget what is resident, or deleted, after all."""
        self.settling = False
        kept = {k: some for k, some in self.kept.items() if k in rows and k not in inmem}
        others = ((k, some) for k, some in self._left.items() if k not in kept)
        left = {k: some for k, some in others if k in rows and k not in inmem}
        # Whatever is interrupted here is done again, as long as nothing is missing from `kept`.
        self._left = left
        self._unsearched = {key for key, (size, _) in kept.items() if size >= LARGE}
        self.nbytes = sum(size for size, _ in kept.values())
        self._times = dict(Counter(id(value) for _, value in kept.values()))
        self.kept = kept

    def alive(self) -> list[tuple[Any, Any]]:
        """Return all that left and is alive, as pairs of key and value."""
        pairs = [(key, left()) for key, left in self._left.copy().items()]
        kept = [(key, value) for key, (_, value) in self.kept.copy().items()]
        return kept + [(key, value) for key, value in pairs if value is not None]

    def check(self, rows: dict[Any, int], inmem: dict[Any, Any]) -> None:
        """Assert every invariant."""
        left = self._left.keys() | self.kept.keys()
        assert not left & inmem.keys(), "a resident value has left"
        assert left <= rows.keys(), "a deleted value has left"
        assert not self._left.keys() & self.kept.keys()
        assert self.nbytes == sum(size for size, _ in self.kept.values())
        assert sum(self._times.values()) == len(self.kept)


def are_lent(values: Sequence[Any], ours: int = 0) -> list[bool]:
    """Tell which values others refer to than this sequence, and so many more that are not lent."""
    return [n > _ALONE + ours for n in map(sys.getrefcount, values)]


def contains_itself(value: Any) -> bool:
    """Tell whether a value is among its own first parts, their parts, and so on."""
    met, parts = {id(value)}, [value]
    for _ in range(DEPTH):
        if not parts:
            break
        found = [*chain.from_iterable(map(_parts, parts))]
        if any(map(operator.is_, found, repeat(value))):
            return True
        new = {id(part): part for part in found if gc.is_tracked(part) and id(part) not in met}
        parts = [*islice(filterfalse(_is_apart, new.values()), BREADTH)]
        met.update(map(id, parts))
    return False


def _is_apart(part: Any) -> bool:
    """Tell whether a value has something, but does not hold it: a class, a chest."""
    kind = type(part)  # what a value says of its class may be an error
    return issubclass(kind, _APART) or str(kind.__module__).partition(".")[0] == _PACKAGE


def _parts(whole: Any) -> list[Any]:
    if type(whole) in (list, tuple, set, frozenset):  # to have the interpreter tell copies it all
        return [*islice(whole, PARTS)]
    return gc.get_referents(whole)[:PARTS]
