"""The content of a frame: what one commit changed, in columns.

The keys of a frame are one list, the lengths and digests of their values are packed integers.
That takes about 35 bytes a key, and is read without a step of Python for each key.

A frame holds plain values only, and is read by an unpickler that refuses everything else. A key
that needs a class (a date, an enum) stands in a column of its own, as the bytes of its own
pickle, which are not opened here.
"""

from __future__ import annotations

import io
import math
import operator
import pickle
import sys
from array import array
from collections.abc import Collection, Hashable, Iterable, Sequence
from itertools import accumulate, count, islice
from typing import Any, NamedTuple

from chest.filenames import pack_number
from chest.opcodes import demand_plain

SURE = {str, bytes, int, bool, type(None)}  # keys of these types come back as they were
_ATOMS = SURE | {float}
_WITH_NAN = {float, tuple, frozenset}  # what may be a nan, or have one in it
SERIALS = 1 << 63  # so many can be given
PARTS = 1 << 20  # of a plain key that has tuples in it: each is looked at for its hash
HEIGHT = 100  # of a plain key: tuples in tuples, each of which takes some of the reader's stack
NUMBERS = {bool, float}  # plain keys that may be equal to others, and look otherwise
CHECKED = 1 << 16  # bytes of a frame, up to which the opcodes of a trusted one are looked at, too

Packed = tuple[str, bytes]


def gather(source: Any, keys: Collection[Any]) -> Sequence[Any]:
    """Return the items of `source` under `keys`, in one step of C where there are several."""
    if len(keys) < 2:  # an itemgetter of one gives the item itself
        return [source[key] for key in keys]
    found: tuple[Any, ...] = operator.itemgetter(*keys)(source)
    return found


class FrameError(Exception):
    """A payload whose checksum is right, and whose content is not a frame's."""


class Entry(NamedTuple):
    """Where a value lies: file, place in it, length and digest of its stream."""

    file: str
    place: int
    length: int
    digest: int


class Keys(NamedTuple):
    """Keys that are stored as they are, and the pickles of the others.

    `kinds` are the types of the plain ones, where they were read.
    """

    plain: list[Any]
    pickled: list[bytes]
    kinds: Collection[type] = ()

    @classmethod
    def of(cls, keys: Iterable[Any]) -> Keys:
        """Sort `keys`, which are plain or `Pickled`, into the two kinds."""
        if Pickled not in {*map(type, keys := [*keys])}:
            return cls(keys, [])
        pickles = [key.data for key in keys if type(key) is Pickled]
        return cls([key for key in keys if type(key) is not Pickled], pickles)


class Pickled:
    """Stands for a key that needs a class, whether it can be read here or not."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


class Puts(NamedTuple):
    """Values that a commit puts, as columns.

    Attributes
    ----------
    keys : list
    files : str or list of str
        The pack that holds them all, or the file of each.
    places, lengths, digests : sequence of int
    """

    keys: list[Any]
    files: str | list[str]
    places: Sequence[int]
    lengths: Sequence[int]
    digests: Sequence[int]

    @classmethod
    def of(cls, entries: dict[Any, Entry]) -> Puts:
        """Return what puts values that have files of their own."""
        return cls([*entries], *map(list, zip(*entries.values(), strict=True)))

    def pick(self, rows: Sequence[int]) -> Puts:
        """Return those rows alone."""
        files = self.files if isinstance(self.files, str) else [*gather(self.files, rows)]
        columns = ([*gather(column, rows)] for column in self[2:])
        return Puts([*gather(self.keys, rows)], files, *columns)


class Block:
    """Values put by a frame, as columns: first the plain keys' rows, then the pickled ones'.

    Attributes
    ----------
    keys : Keys
    pack : str or None
        The pack that holds all of them, if one does.
    files, serials, places, lengths, digests
    """

    def __init__(
        self,
        keys: tuple[list[Any], list[bytes]],
        serials: int | Packed,
        files: str | list[str],
        places: int | Packed,
        lengths: Packed,
        digests: Packed,
    ) -> None:
        self.keys = _keys(*keys)
        n = len(self.keys.plain) + len(self.keys.pickled)
        self.lengths = _unpack(lengths)
        self.digests = _unpack(digests)
        self.pack = files if isinstance(files, str) else None
        self.files = [files] * n if isinstance(files, str) else files
        self.serials: Sequence[int]
        if isinstance(serials, int):
            self.serials = range(serials, serials + n)
            lowest, highest = serials, serials + n - 1
        else:
            self.serials = _unpack(serials)
            lowest, highest = 0, max(self.serials, default=0)
        if lowest < 0 or highest >= SERIALS:
            raise FrameError(f"it has {lowest} to {highest} as serials")
        if not isinstance(places, int):
            self.places = _unpack(places)
        elif isinstance(files, str):  # end to end
            self.places = array("Q", islice(accumulate(self.lengths, initial=places), n))
        else:
            self.places = array("Q", [places]) * n
        self._check(n)

    def _check(self, n: int) -> None:
        numbers = (self.serials, self.places, self.lengths, self.digests)
        sizes = {len(self.files), *map(len, numbers)}
        if n == 0 or sizes != {n} or (not self.pack and {*map(type, self.files)} != {str}):
            raise FrameError("its columns do not fit each other")
        if self.pack is not None and not pack_number(self.pack):
            raise FrameError(f"it calls {self.pack!r} a pack")
        if self.pack is not None and 0 in self.lengths:  # then nobody could tell a dead pack
            raise FrameError("it has a value of no bytes in a pack")


class Frame(NamedTuple):
    """What a frame says.

    Attributes
    ----------
    first : bool
        A commit begins here.
    cleared : bool
        All that was there before goes.
    serializer : (str, bool or None) or None
        The name of what wrote the values, and whether that writes text.
    left : list of Entry
        Obsolete values of earlier commits whose files could not be removed yet.
    deleted : Keys
    blocks : list of Block
    """

    first: bool
    cleared: bool
    serializer: tuple[str, bool | None] | None
    left: list[Entry]
    deleted: Keys
    blocks: list[Block]


class _Plain(pickle.Unpickler):
    """Reads primitives and containers of them, and refuses whatever would import or run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse to import."""
        raise FrameError(f"it names {module}.{name}, and an index may name nothing")

    def persistent_load(self, pid: Any) -> Any:
        """Refuse what is not in the stream itself."""
        raise FrameError(f"it holds a persistent id {pid!r}, and an index may hold none")


def is_plain(key: Hashable) -> bool:
    """Tell whether `key` can be stored and read back without any class.

    Examples
    --------
    >>> import datetime
    >>> is_plain(("a", 1)), is_plain(datetime.date(2026, 1, 1))
    (True, False)
    """
    kind = type(key)
    if kind in _ATOMS:
        return True
    if kind is not tuple and kind is not frozenset:
        return False
    parts: Any = key
    try:
        if _ATOMS.issuperset(map(type, parts)):
            return True
        total, height = _count_parts(parts, {})
        return total <= PARTS and height <= HEIGHT
    except RecursionError:  # nested so deeply that no pickle takes it either
        return False


def _count_parts(
    key: Collection[Any], known: dict[int, tuple[float, int]]
) -> tuple[float, int]:
    """Count the parts of a key, each as often as it is there, and the tuples around the innermost.

    There are infinitely many if one is not plain. What is there several times is walked once: 60
    pairs can add up to all there is time for.
    """
    total, height = 1.0, 0
    for part in key:
        kind = type(part)
        if kind in _ATOMS:
            total += 1
        elif kind is tuple or kind is frozenset:
            parts, below = known.get(id(part)) or _count_parts(part, known)
            total, height = total + parts, max(height, below + 1)
        else:
            return math.inf, 0
    known[id(key)] = total, height
    return total, height


def all_plain(keys: Collection[Any]) -> bool:
    """Tell whether all of `keys` are plain."""
    return _ATOMS.issuperset(map(type, keys)) or all(map(is_plain, keys))


def encode(
    blocks: Iterable[tuple[Sequence[int], Puts]],
    *,
    first: bool = False,
    cleared: bool = False,
    serializer: tuple[str, bool | None] | None = None,
    left: Iterable[Entry] = (),
    deleted: Iterable[Hashable] = (),
) -> bytes:
    """Return the payload of a frame; `blocks` are values with the serials of their keys.

    Keys that need a class are `Pickled`.
    """
    encoded = [_encode_block(serials, puts) for serials, puts in blocks]
    keys = tuple(Keys.of(deleted)[:2])
    return pickle.dumps((first, cleared, serializer, [*map(tuple, left)], keys, encoded), 5)


def _encode_block(serials: Sequence[int], puts: Puts) -> tuple[Any, ...]:
    keys = Keys.of(puts.keys)
    if keys.pickled:
        rows = sorted(range(len(serials)), key=lambda row: type(puts.keys[row]) is Pickled)
        serials, puts = [serials[row] for row in rows], puts.pick(rows)
    places, lengths = puts.places, puts.lengths
    rising = all(map(operator.eq, serials, count(serials[0])))
    if isinstance(puts.files, str):
        following = all(map(operator.eq, places, accumulate(lengths, initial=places[0])))
    else:
        following = not any(places)
    return (
        tuple(keys[:2]),
        serials[0] if rising else _pack(serials),
        puts.files,
        places[0] if following else _pack(places),
        _pack(lengths),
        _pack(puts.digests),
    )


def decode(payload: bytes, *, trusted: bool = False) -> Frame:
    """Read a payload; one that is trusted, as what runs code anyway, is read quicker.

    Raises
    ------
    FrameError
        If it is not a frame's.
    """
    try:
        if not trusted or len(payload) <= CHECKED:
            demand_plain(payload)
        first, cleared, serializer, left, deleted, blocks = _Plain(io.BytesIO(payload)).load()
        if serializer is not None:
            name, text = serializer
            serializer = str(name), text
        made = [Block(*block) for block in blocks]
        return Frame(
            bool(first), bool(cleared), serializer, [Entry(*e) for e in left], _keys(*deleted), made
        )
    except (FrameError, MemoryError):
        raise
    except Exception as error:  # content made by hand can raise nearly anything
        raise FrameError(f"it cannot be read ({type(error).__name__}: {error})") from error


def _keys(plain: list[Any], pickled: list[bytes]) -> Keys:
    kinds = {*map(type, plain)}
    if not kinds <= _ATOMS and not all(map(is_plain, plain)):
        raise FrameError("it has a key that is not plain")
    if kinds & _WITH_NAN:
        without: set[int] = set()
        if any(_has_nan(key, without) for key in plain):
            made: dict[int, Any] = {}
            plain = [_with_one_nan(key, made) for key in plain]
    if not {*map(type, pickled)} <= {bytes}:
        raise FrameError("it has a key that is not a pickle")
    return Keys(plain, pickled, kinds)


def _has_nan(key: Any, without: set[int]) -> bool:
    """Tell whether a key is, or has, a nan; `without` are the tuples seen before that have none."""
    if type(key) is not tuple and type(key) is not frozenset:
        return type(key) is float and math.isnan(key)
    if not _WITH_NAN.isdisjoint(map(type, key)) and id(key) not in without:
        if any(_has_nan(part, without) for part in key):
            return True
        without.add(id(key))
    return False


def _with_one_nan(key: Any, made: dict[int, Any]) -> Any:
    """Make every nan the same object: as a key it is equal to nothing but that."""
    if type(key) is not tuple and type(key) is not frozenset:
        return math.nan if type(key) is float and math.isnan(key) else key
    if id(key) not in made:
        made[id(key)] = type(key)(_with_one_nan(part, made) for part in key)
    return made[id(key)]


def as_read(key: Hashable) -> Hashable:
    """Return a key as it comes back from a payload; raises whatever its class does."""
    read: Hashable = _with_one_nan(key, {}) if is_plain(key) else pickle.loads(pickle.dumps(key, 5))
    return read


def own_entries(payload: bytes) -> list[Entry]:
    """Return the entries that a payload puts; of a pack, that of its first value there alone."""
    entries = []
    for block in decode(payload).blocks:
        columns = zip(block.files, block.places, block.lengths, block.digests, strict=True)
        rows = [Entry(*row) for row in columns]
        entries += [min(rows)] if block.pack else rows
    return entries


def _pack(numbers: Sequence[int]) -> Packed:
    packed = array("I" if max(numbers) < 1 << 32 else "Q", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.typecode, packed.tobytes()


def _unpack(column: Packed) -> array[int]:
    typecode, data = column
    if typecode not in ("I", "Q"):
        raise FrameError(f"it has a column of type {typecode!r}")
    numbers = array(typecode)
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers if typecode == "Q" else array("Q", numbers)
