"""What a value costs in memory, in bytes, found out in microseconds.

`nbytes` walks a value from the outside in, one level of nesting at a time. A level of up to two
hundred parts is looked at in full. From a larger one, parts are drawn at even distances, more
densely at its front, and stand for all of them, so that a list of a million elements takes as long
as one of a thousand; but dicts, sets and deques have to be stepped through, at a millisecond or
two per value. What occurs twice within one value is counted once; a view (of an array, of bytes)
costs what it keeps alive.

It is an estimate, within a few percent where data is of one kind. It cannot see one huge element
among thousands of tiny ones, what lies more than some 3,000 levels deep, nor what a class written
in C hides without telling ``__sizeof__`` or ``nbytes``: for such there is ``nbytes.register``.
"""

from __future__ import annotations

import enum
import operator
import os
import types
from bisect import bisect
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from math import gcd
from sys import getrefcount, getsizeof
from threading import RLock
from typing import Any, Protocol, TypeVar, cast, overload

from chest.library_sizes import NAMED, SEALED, Fields, Group, Opened, Opener, viewed

__all__ = ["nbytes"]

_Sizer = Callable[[Any], int]
_SizerT = TypeVar("_SizerT", bound=_Sizer)
_Sized = list[tuple[Group, int]]  # collections with the number of their parts
_Stratum = tuple[list[Any], float]  # parts, and how many real ones each of them stands for

_BUDGET = 3072  # parts looked at in one value, whatever its size
_TAPER = 16  # a level may take this fraction of what is left of the budget
_RECORD = 16  # parts up to which a collection is drawn whole or not at all
_SMALL = 32  # parts up to which adding them up at once is quicker than a walk
_FRONT = 4  # the front of a large collection takes this fraction of what is drawn from it
_REACH = 1 << 17  # entries of a dict, a set or a deque that are stepped over, at 5 ns each
_TINY = 1024  # bytes up to which finding out what is shared costs more than it tells

_Keys: type = type({}.keys())
_Values: type = type({}.values())
# As unique as id, which raises an audit event: half a microsecond once filelock is imported.
_identity = object.__hash__
_registered: dict[type, _Sizer] = {}
_plain: dict[type, _Sizer] = {}  # types without parts, sized by a C function that cannot fail
_lock = RLock()  # a finalizer may size something in the midst of it


def _renew_lock() -> None:
    """Forget, in a forked child, that a thread of its parent was holding the lock."""
    global _lock
    _lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class _Nbytes(Protocol):
    def __call__(self, value: object, /) -> int: ...
    @overload
    def register(self, kind: type, /) -> Callable[[_SizerT], _SizerT]: ...
    @overload
    def register(self, kind: type, sizer: _SizerT, /) -> _SizerT: ...


class _Rules(dict[type, Any]):
    """One column of what is known about types, filled when a type is first met."""

    def __missing__(self, kind: type) -> Any:
        with _lock:
            _sizers[kind], _openers[kind] = _find(kind)
            return self[kind]


_sizers = _Rules()  # type -> what sizes a value of it
_openers = _Rules()  # type -> what takes a value of it apart, or None


def _register(kind: type, sizer: _SizerT | None = None, /) -> Any:
    """Size `kind` and its subclasses with `sizer` from now on; without it, be a decorator."""
    if not isinstance(kind, type):
        raise TypeError(f"nbytes.register needs a class, got {kind!r}")
    if sizer is None:
        return partial(_register, kind)
    with _lock:
        _registered[kind] = sizer
        for known in (_plain, _sizers, _openers):
            known.clear()
    return sizer


def _registrable(function: Callable[[object], int]) -> _Nbytes:
    vars(function)["register"] = _register
    return cast(_Nbytes, function)


@_registrable
def nbytes(value: object) -> int:
    """Return how many bytes a value costs in memory.

    Parameters
    ----------
    value : object
        Anything. It is not changed.

    Returns
    -------
    int
        Bytes, at least 0: the value, what it contains, and what it keeps alive, each counted
        once. Classes, functions, modules and enum members are everybody's and count without
        their contents.

    Raises
    ------
    Exception
        Only what a sizer given to ``nbytes.register`` raises, and RuntimeError or IndexError
        when another thread changes the value meanwhile.

    Notes
    -----
    ``nbytes.register(kind, sizer)``, or ``@nbytes.register(kind)`` above a function, has values
    of the class `kind` and its subclasses sized by ``sizer(value) -> int`` (bytes), also inside
    containers. The most specific class wins, and of one class the last registration.

    At most about 3,000 parts of a value are looked at. They are drawn from all over it,
    more densely at the front of large collections; from dicts, sets and deques of more than 131,072
    entries, at their two ends. In a flat value of up to 1 KiB the parts are added up without
    looking for shared ones. A slice of a DataFrame costs its
    own rows, a memory map little, memory of a GPU as much as any.

    Any number of threads may call it, and register, at the same time.

    Examples
    --------
    >>> nbytes(bytes(1000)) - nbytes(b"")
    1000
    >>> rows = [[float(i), float(-i)] for i in range(100_000)]
    >>> 12_000_000 < nbytes(rows) < 14_000_000
    True
    >>> 1_000_000 < nbytes([bytearray(1_000_000)] * 1000) < 1_020_000
    True
    >>> class Picture:
    ...     def __init__(self, width, height):
    ...         self.width, self.height = width, height
    >>> @nbytes.register(Picture)
    ... def _(picture):
    ...     return 4 * picture.width * picture.height
    >>> nbytes(Picture(640, 480))
    1228800
    """
    size: int = _sizers[type(value)](value)
    return size


def _row(value: Any) -> int:
    """Size a small flat list, tuple or set; anything else is walked."""
    if len(value) > _SMALL:
        return _walk(value)
    total = getsizeof(value)
    for part in value:
        sizer = _plain.get(type(part))
        if sizer is None:
            return _walk(value)
        total += sizer(part)
    return total if total <= _TINY else _walk(value)


def _pairs(value: dict[Any, Any]) -> int:
    """Size a small flat dict; anything else is walked."""
    if len(value) > _SMALL:
        return _walk(value)
    total = getsizeof(value)
    for key, part in value.items():
        sizer, key_sizer = _plain.get(type(part)), _plain.get(type(key))
        if sizer is None or key_sizer is None:
            return _walk(value)
        total += sizer(part) + key_sizer(key)
    return total if total <= _TINY else _walk(value)


def _array(value: Any) -> int:
    """Size an array of numbers with the memory that it is a view of; anything else is walked."""
    total, memory = getsizeof(value), value.base
    if memory is None and value.dtype.hasobject:
        return _walk(value)
    while memory is not None:
        kind = type(memory)
        total += getsizeof(memory)
        if kind in _plain:  # bytes, a bytearray: nobody registered another size
            break
        if kind is memoryview and _sizers[kind] is _walk:
            memory = viewed(memory)
        elif kind is type(value) and not memory.dtype.hasobject:
            memory = memory.base
        else:
            return _walk(value)
    return total


# The walk: open all values of a level, draw parts from them, go on with these.


def _walk(value: Any) -> int:
    total: float
    total, groups = _open([value])
    opened = [(groups, 1.0)] if groups else []
    budget = _BUDGET
    seen = {_identity(value): value}  # holds on to it, so that no identity is used again
    while opened:
        strata: list[_Stratum] = []
        for (groups, weight), count in zip(opened, _quotas(opened, budget), strict=True):
            for parts, factor in _draw(groups, count):
                budget -= len(parts)
                strata += _unshared(parts, weight * factor, seen)
        opened = []
        for parts, weight in strata:
            own, groups = _open(parts)
            total += own * weight
            if groups and budget > 0:
                opened.append((groups, weight))
    return round(total)


def _quotas(opened: list[tuple[_Sized, float]], budget: int) -> list[int]:
    """Say how many parts to draw: one half for each stratum alike, one by what they stand for."""
    stand = [weight * sum(size for _, size in groups) for groups, weight in opened]
    half, everything = budget / _TAPER / 2, sum(stand)
    return [int(half / len(opened) + half * some / everything) or 1 for some in stand]


def _open(values: list[Any]) -> tuple[int, _Sized]:
    """Take values apart: the sum of their own bytes, and all collections of parts in them."""
    kinds = set(map(type, values))
    if len(kinds) == 1 and (plain := _plain.get(*kinds)) is not None:
        return sum(map(plain, values)), []
    total, found = 0, []
    for value in values:
        opener = _openers[type(value)]
        if opener is None:
            total += _sizers[type(value)](value)
        else:
            own, groups = opener(value)
            total += own
            found += [(group, n) for group in groups if (n := group[0].__len__(group[1]))]
    return total, found


def _draw(groups: _Sized, count: int) -> Iterator[_Stratum]:
    """Draw about `count` parts: small collections in full, the others at even distances.

    In the order they came in, the first keys of an index, a counter, a group-by hold the largest
    values; so the front of a large collection is a stratum of its own, and so is what follows it.
    """
    total = sum(size for _, size in groups)
    fair = count if total <= count else count // len(groups)
    whole = list(chain.from_iterable(base.__iter__(h) for (base, h), n in groups if n <= fair))
    if whole:
        yield whole, 1.0
    large = [each for each in groups if each[1] > fair]
    total, count = total - len(whole), count - len(whole)
    if len(large) > 1 and total <= _RECORD * len(large):  # whole ones: their parts belong together
        few = _spread([(list, large)], [(0, len(large))], count * len(large) // total or 1)
        drawn = list(chain.from_iterable(base.__iter__(held) for (base, held), _ in few))
        yield drawn, total / len(drawn)
    elif large:
        front = count // len(large) // _FRONT
        marks = [(0, front, min(17 * front, n // 2), n) for _, n in large]
        quotas = front * len(large), front * len(large), count - 2 * front * len(large)
        for i, quota in enumerate(quotas):
            bounds = [(mark[i], mark[i + 1]) for mark in marks]
            if drawn := _spread([group for group, _ in large], bounds, quota):
                yield drawn, sum(high - low for low, high in bounds) / len(drawn)


def _spread(groups: list[Group], bounds: list[tuple[int, int]], count: int) -> list[Any]:
    """Draw at one distance throughout, as if these stretches of collections lay end to end.

    It has to fall in step with no period in the data: a large distance shares no small factor
    with any, a small one (in 1/65536) ends in the golden ratio.
    """
    total = sum(high - low for low, high in bounds)
    if not total:
        return []
    bits, step = 16, (total // count << 16) + 40503 if total > count else 1 << 16
    if total > 100 * count:
        bits, step = 0, next(n for n in range(total // count, total) if gcd(n, 30030) == 1)
    start = step // 2
    drawn = []
    for group, (low, high) in zip(groups, bounds, strict=True):
        spots = range(start + (low << bits), high << bits, step)
        start += len(spots) * step - (high - low << bits)
        if spots:
            drawn += _pick(*group, [spot >> bits for spot in spots] if bits else spots)
    return drawn


def _pick(base: Any, held: Any, places: Sequence[int]) -> list[Any]:
    if isinstance(places, range) and base in (list, tuple):
        return list(base.__getitem__(held, slice(places.start, places.stop, places.step)))
    if hasattr(base, "__getitem__") and base is not deque:
        return list(map(partial(base.__getitem__, held), places))
    size = base.__len__(held)
    if size <= _REACH or places[-1] < _REACH // 2:
        return _step(base.__iter__(held), places)
    places = [place * _REACH // size for place in places]
    half = bisect(places, _REACH // 2) if hasattr(base, "__reversed__") else len(places)
    drawn = _step(base.__iter__(held), places[:half])
    if half < len(places):
        back = [_REACH - 1 - place for place in reversed(places[half:])]
        drawn += _step(base.__reversed__(held), back)
    return drawn


def _step(parts: Iterator[Any], places: Sequence[int]) -> list[Any]:
    drawn, at = [], 0
    for place in places:
        drawn.append(next(islice(parts, place - at, None)))
        at = place + 1
    return drawn


_COUNTING = next(map(getrefcount, [object()])) - 1  # references that only counting them takes


def _unshared(parts: list[Any], weight: float, seen: dict[int, Any]) -> list[_Stratum]:
    """Leave out what was seen before, and weigh what is drawn several times as what it stands for.

    There are two lower bounds for how many different objects one stands for: the places it was
    drawn for, divided by all references to it; and, if drawn once, how seldom the sample met others
    twice (Chao 1984, Nonparametric estimation of the number of classes in a population).
    """
    ids = list(map(_identity, parts))
    different = dict(zip(ids, parts, strict=True))
    if len(different) == len(parts) and seen.keys().isdisjoint(ids):
        seen.update(different)
        return [(parts, weight)]
    times = Counter(ids)
    references = dict(zip(ids, map(getrefcount, parts), strict=True))
    often = Counter(drawn + (key in seen) for key, drawn in times.items())
    least = min(1 + often[1] / (2 * often[2]), weight) if often[2] else weight
    alike = defaultdict[int, tuple[list[Any], list[float]]](lambda: ([], []))  # in powers of two
    for key, drawn in times.items():
        if key not in seen:
            elsewhere = references[key] - _COUNTING - drawn - 1  # not in `parts` and `different`
            stands = max(drawn * weight / (elsewhere or 1), least if drawn == 1 else 1.0)
            some, weights = alike[int(stands).bit_length()]
            some.append(different[key])
            weights.append(stands)
    seen.update(different)
    return [(some, sum(weights) / len(some)) for some, weights in alike.values()]


# What is known about types: what a value itself takes, and where its parts are.


def _find(kind: type) -> tuple[_Sizer, Opener | None]:
    """Find out how values of a type are sized, and how they are taken apart, if they are."""
    for base in kind.__mro__:
        name = base.__module__.partition(".")[0], base.__qualname__
        if base in _registered:
            return partial(_ask, _registered[base]), None
        if base in _SHARED or name == ("numpy", "generic"):
            return _leaf(kind), None
        opener = _OPENERS.get(base) or NAMED.get(name)
        if opener:
            more = _NOTHING if name[0] in SEALED else _fields(kind)
            is_array = base is kind and name == ("numpy", "ndarray")
            quick = _array if is_array else _QUICK.get(kind, _walk)
            return quick, partial(_open_with, opener, *more)
    more = _fields(kind)
    if any("nbytes" in vars(base) for base in kind.__mro__):
        return _walk, partial(_open_claim, partial(_open_with, _open_bare, *more))
    if more == _NOTHING:
        return _leaf(kind), None
    return _walk, partial(_open_with, _open_bare, *more)


def _leaf(kind: type) -> _Sizer:
    if not isinstance(kind.__sizeof__, types.MethodDescriptorType):
        return _own
    collected = kind.__flags__ & 1 << 14  # __sizeof__ leaves out what the collector puts in front
    _plain[kind] = getsizeof if collected else kind.__sizeof__
    return _plain[kind]


def _own(value: Any) -> int:
    if isinstance(type(value).__sizeof__, types.MethodDescriptorType):
        return getsizeof(value)
    with suppress(Exception):  # anybody's __sizeof__: it may raise, or answer -1 or "big"
        return getsizeof(value)
    return type(value).__basicsize__


def _ask(sizer: _Sizer, value: Any) -> int:
    return max(int(sizer(value)), 0)


_NOTHING: tuple[tuple[Any, ...], Any] = (), None


def _fields(kind: type) -> tuple[tuple[Any, ...], Any]:
    """Find the descriptors of slots and of ``__dict__``: reading these runs nobody's code."""
    slots = tuple(
        field
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for field in vars(base).values()
        if isinstance(field, types.MemberDescriptorType)
    )
    dicts = (vars(base).get("__dict__") for base in kind.__mro__)
    c_made = types.GetSetDescriptorType, types.MemberDescriptorType
    return slots, next((attributes for attributes in dicts if isinstance(attributes, c_made)), None)


class _Entries:
    """The keys and the values of a small dict, which are drawn together or not at all."""

    def __init__(self, value: dict[Any, Any]) -> None:
        self.value = value

    def __len__(self) -> int:
        return 2 * dict.__len__(self.value)

    def __iter__(self) -> Iterator[Any]:
        return chain(dict.keys(self.value), dict.values(self.value))


def _open_with(opener: Opener, slots: tuple[Any, ...], attributes: Any, value: Any) -> Opened:
    total, groups = opener(value)
    if slots:
        groups.append((Fields, Fields(slots, value)))
    if attributes:
        names = attributes.__get__(value)
        if type(claim := dict.get(names, "nbytes")) is int:
            return max(total, claim), []
        total += getsizeof(names)  # the names themselves belong to the class
        groups.append((_Values, dict.values(names)))
    return total, groups


def _open_claim(otherwise: Opener, value: Any) -> Opened:
    with suppress(Exception):  # a property that raises, a method, None
        return max(_own(value), operator.index(value.nbytes)), []
    return otherwise(value)


def _open_bare(value: Any) -> Opened:
    return _own(value), []


def _open_row(base: type, value: Any) -> Opened:
    return _own(value), [(base, value)]


def _open_dict(value: Any) -> Opened:
    if dict.__len__(value) <= _RECORD:
        return _own(value), [(_Entries, _Entries(value))]
    return _own(value), [(_Keys, dict.keys(value)), (_Values, dict.values(value))]


_QUICK: dict[type, _Sizer] = {list: _row, tuple: _row, set: _row, frozenset: _row, dict: _pairs}
_SHARED = {type, types.FunctionType, types.ModuleType, enum.Enum}
_OPENERS: dict[type, Opener] = {
    **{base: partial(_open_row, base) for base in (list, tuple, set, frozenset, deque)},
    dict: _open_dict,
}
