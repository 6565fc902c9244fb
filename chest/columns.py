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
import pickle
import sys
from array import array
from collections.abc import Hashable, Iterable
from itertools import accumulate, islice
from typing import Any, NamedTuple

_ATOMS = {str, bytes, int, float, bool, type(None)}

Packed = tuple[str, bytes]


class FrameError(Exception):
    """A payload whose checksum is right, and whose content is not a frame's."""


class Entry(NamedTuple):
    """Where a value lies: file, place in it, length and digest of its stream."""

    file: str
    place: int
    length: int
    digest: int


class Keys(NamedTuple):
    """Keys that are stored as they are, and the pickles of the others."""

    plain: list[Any]
    pickled: list[bytes]

    @classmethod
    def of(cls, keys: Iterable[Any]) -> Keys:
        """Sort `keys` into the two kinds."""
        kinds: tuple[list[Any], list[Any]] = ([], [])
        for key in keys:
            kinds[not is_plain(key)].append(key)
        return cls(kinds[0], [pickle.dumps(key, 5) for key in kinds[1]])


class Block:
    """Values put by a frame, as columns: first the plain keys' rows, then the pickled ones'."""

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
        self.packed = isinstance(files, str)
        self.files = [files] * n if isinstance(files, str) else files
        if isinstance(serials, int):
            self.serials = array("Q", range(serials, serials + n))
        else:
            self.serials = _unpack(serials)
        if not isinstance(places, int):
            self.places = _unpack(places)
        elif isinstance(files, str):  # in a pack, end to end
            self.places = array("Q", islice(accumulate(self.lengths, initial=places), n))
        else:
            self.places = array("Q", [places]) * n
        numbers = (self.serials, self.places, self.lengths, self.digests)
        sizes = {len(self.files), *map(len, numbers)}
        if n == 0 or sizes != {n} or {*map(type, self.files)} != {str}:
            raise FrameError("its columns do not fit each other")


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
    try:
        # What mypy cannot see: it is iterable then.
        return (kind is tuple or kind is frozenset) and all(map(is_plain, key))  # type: ignore[call-overload]
    except RecursionError:  # nested so deeply that no pickle takes it either
        return False


def encode(
    puts: list[tuple[Any, int, Entry]],
    *,
    first: bool = False,
    cleared: bool = False,
    serializer: tuple[str, bool | None] | None = None,
    left: Iterable[Entry] = (),
    deleted: Iterable[Hashable] = (),
) -> bytes:
    """Return the payload of a frame; `puts` are keys with their serials and entries."""
    blocks = [_encode_block(puts)] if puts else []
    keys = tuple(Keys.of(deleted))
    return pickle.dumps((first, cleared, serializer, [*map(tuple, left)], keys, blocks), 5)


def _encode_block(puts: list[tuple[Any, int, Entry]]) -> tuple[Any, ...]:
    keys = Keys.of(key for key, _, _ in puts)
    if keys.pickled:
        puts = sorted(puts, key=lambda put: not is_plain(put[0]))
    serials = [serial for _, serial, _ in puts]
    places = [entry.place for _, _, entry in puts]
    rising = serials == list(range(serials[0], serials[0] + len(serials)))
    return (
        tuple(keys),
        serials[0] if rising else _pack(serials),
        [entry.file for _, _, entry in puts],
        _pack(places) if any(places) else 0,
        _pack([entry.length for _, _, entry in puts]),
        _pack([entry.digest for _, _, entry in puts]),
    )


def decode(payload: bytes) -> Frame:
    """Read a payload.

    Raises
    ------
    FrameError
        If it is not a frame's.
    """
    try:
        first, cleared, serializer, left, deleted, blocks = _Plain(io.BytesIO(payload)).load()
        if serializer is not None:
            name, text = serializer
            serializer = str(name), text
        made = [Block(*block) for block in blocks]
        return Frame(
            bool(first), bool(cleared), serializer, [Entry(*e) for e in left], _keys(*deleted), made
        )
    except FrameError:
        raise
    except Exception as error:  # content made by hand can raise nearly anything
        raise FrameError(f"it cannot be read ({type(error).__name__}: {error})") from error


def _keys(plain: list[Any], pickled: list[bytes]) -> Keys:
    kinds = {*map(type, plain)}
    if kinds & {float, tuple, frozenset} and any(map(_has_nan, plain)):
        plain = [*map(_with_one_nan, plain)]
    if not kinds <= _ATOMS and not all(map(is_plain, plain)):
        raise FrameError("it has a key that is not plain")
    if not {*map(type, pickled)} <= {bytes}:
        raise FrameError("it has a key that is not a pickle")
    return Keys(plain, pickled)


def _has_nan(key: Any) -> bool:
    if type(key) is tuple or type(key) is frozenset:
        return any(map(_has_nan, key))
    return type(key) is float and key != key  # noqa: PLR0124 -- only a nan is not itself


def _with_one_nan(key: Any) -> Any:
    """Make every nan the same object: as a key it is equal to nothing but that."""
    if type(key) is tuple or type(key) is frozenset:
        return type(key)(map(_with_one_nan, key))
    return math.nan if _has_nan(key) else key


def own_entries(payload: bytes) -> list[Entry]:
    """Return the entries that a payload puts, of values that have a file of their own."""
    columns = [
        zip(block.files, block.places, block.lengths, block.digests, strict=True)
        for block in decode(payload).blocks
        if not block.packed
    ]
    return [Entry(*row) for column in columns for row in column]


def _pack(numbers: list[int]) -> Packed:
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
