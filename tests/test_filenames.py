from __future__ import annotations

import datetime as dt
import enum
import functools
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Hashable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from unittest.mock import MagicMock, Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chest.filenames import digest_name, is_safe_filename, key_to_filename

ROOT = Path(__file__).parent.parent
DIGEST = re.compile(r"[0-9a-f]{32}")
WORD = "x" * 100


def is_digest(name: str) -> bool:
    return DIGEST.fullmatch(name) is not None


class Color(enum.Enum):
    RED = 1
    GREEN = 2


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.StrEnum):
    TEXT = "t"
    SPACED = "a b"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: int
    y: int


@dataclass(frozen=True)
class Tagged:
    name: str
    tags: frozenset[str]


class Plain:
    def __init__(self, value: object = None) -> None:
        self.value = value


class Wild(str):
    """A str whose methods all fail."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __str__(self) -> str:
        raise RuntimeError

    def __repr__(self) -> str:
        raise RuntimeError

    def __len__(self) -> int:
        raise RuntimeError


class Short(str):
    """A str that is longer than it says."""

    __slots__ = ()

    def __len__(self) -> int:
        return 1


class Pair(tuple[Any, ...]):
    __slots__ = ()

    def __iter__(self) -> Any:
        raise RuntimeError

    def __getitem__(self, index: Any) -> Any:
        raise RuntimeError


class Speechless:
    def __repr__(self) -> str:
        raise ZeroDivisionError

    def __reduce__(self) -> Any:
        raise ZeroDivisionError


class NamelessType(type):
    def __getattribute__(cls, name: str) -> Any:
        if name == "__qualname__":
            raise ZeroDivisionError
        return super().__getattribute__(name)


class Nameless(metaclass=NamelessType):
    pass


def nested(levels: int, key: Hashable = 0) -> Hashable:
    for _ in range(levels):
        key = (key,)
    return key


# --- what names look like ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["x", "_", "_a", "X9", "a_b", "com", "com10", "console", "nul_", WORD]
)
def test_identifiers_keep_their_name(key: str) -> None:
    assert key_to_filename(key) == key


@pytest.mark.parametrize(
    "key",
    [
        *["", "1", "a b", "a.b", ".", "..", ".keys", "../x", "/x", "a/b", "a\\b", "C:"],
        *["x\n", "\0", "\ud800", "-x", "~", WORD + "x"],
        *["é", "Straße", "a\u0301", "\u017f", "\u212a"],
    ],
)
def test_other_strings_get_a_digest(key: str) -> None:
    assert is_digest(key_to_filename(key))


@pytest.mark.parametrize(
    "key",
    [
        *["con", "CON", "Prn", "aux", "nUL", "CONIN$", "conout$", "clock$"],
        *[f"{device}{n}" for device in ("com", "LPT") for n in range(10)],
    ],
)
def test_names_reserved_on_windows_get_a_digest(key: str) -> None:
    assert is_digest(key_to_filename(key))
    assert is_digest(key_to_filename(("a", key)).removeprefix("_a/"))
    assert not is_safe_filename(key)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (("a", "b"), "_a/b"),
        (("a", "b", "c"), "_a/_b/c"),
        (("_a", "_b"), "__a/_b"),
        (tuple("abcdefgh"), "_a/_b/_c/_d/_e/_f/_g/h"),
        (("a", 1), f"_a/{digest_name(1)}"),
        ((1, "a"), f"_{digest_name(1)}/a"),
        (("a", ("b", "c")), f"_a/{digest_name(('b', 'c'))}"),
        ((("a", "b"), "c"), f"_{digest_name(('a', 'b'))}/c"),
        (Point(1, 2), f"_{digest_name(1)}/{digest_name(2)}"),
        (("a", WORD[:-5]), f"_a/{WORD[:-5]}"),
        ((WORD[:-1], "b"), f"_{WORD[:-1]}/b"),
        ((WORD, "b"), f"_{digest_name(WORD)}/b"),
        (("a", WORD + "x"), f"_a/{digest_name(WORD + 'x')}"),
    ],
)
def test_tuples_become_directories(key: tuple[object, ...], name: str) -> None:
    assert key_to_filename(key) == name


@pytest.mark.parametrize(
    "key",
    [(), ("a",), tuple("abcdefghi"), (WORD[:-1], WORD), nested(5), nested(10**4)],
    ids=lambda key: len(key),
)
def test_tuples_that_are_no_short_path_get_one_digest(key: tuple[object, ...]) -> None:
    assert is_digest(key_to_filename(key))


@pytest.mark.parametrize(
    "key",
    [
        *[1, -1, 0, 1.5, True, None, ..., b"x", b"", 2**100_000, float("nan"), 1j, frozenset()],
        *[Color.RED, Level.LOW, Mode.SPACED, Right(0), Right.READ | Right.WRITE],
        *[dt.date(2024, 5, 1), uuid.UUID(int=1), Decimal("1.5"), Fraction(1, 3), range(3)],
        *[PurePosixPath("a/b"), int, len, Plain(), Tagged("a", frozenset("ab"))],
    ],
    ids=lambda key: type(key).__name__,
)
def test_all_else_gets_a_digest(key: object) -> None:
    assert is_digest(key_to_filename(key))


def test_strings_of_other_types_keep_their_name_too() -> None:
    assert key_to_filename(Mode.TEXT) == "t"
    assert type(key_to_filename(Mode.TEXT)) is str
    assert key_to_filename(Wild("x")) == "x"


def test_string_that_lies_about_its_length_gets_a_digest() -> None:
    assert is_digest(key_to_filename(Short("x" * 1000)))


def test_digest_names_of_this_release_are_those_of_the_next() -> None:
    assert key_to_filename(1) == "9e4e915e013b4bfbc9d741efb8744a30"
    assert key_to_filename("a b") == "07edb30a1ac057982ac64687e1531bf6"
    assert key_to_filename(()) == "ed0ea1fe348f88a5b58ab7773211b464"


# --- keys that fight ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        *[Wild("x"), Wild("a b"), (Wild("x"), 1), Pair("ab"), Pair("a"), (Pair("ab"), 1)],
        *[Speechless(), ("a", Speechless()), frozenset([Speechless()])],
        *[Nameless(), (Nameless(), 1), frozenset([Nameless()])],
        *[Mock(spec=str), (Mock(spec=str), 1), MagicMock(spec=tuple), Mock(spec=int), lambda: 0],
        *[nested(10**4), Fraction(10**5000), memoryview(b"a")],
    ],
    ids=lambda key: type(key).__name__,
)
def test_no_key_makes_it_raise(key: object) -> None:
    assert is_safe_filename(key_to_filename(key))
    assert is_digest(digest_name(key))


def test_keys_that_nothing_tells_apart_share_the_name_of_their_type() -> None:
    assert key_to_filename(Speechless()) == key_to_filename(Speechless())
    assert key_to_filename(Speechless()) != key_to_filename(object())


def test_address_in_a_repr_does_not_count() -> None:
    assert key_to_filename(Plain(1)) == key_to_filename(Plain(1)) != key_to_filename(Plain(2))
    assert key_to_filename(functools.partial(len)) == key_to_filename(functools.partial(len))


def test_keys_nested_beyond_the_limit_are_told_apart() -> None:
    assert key_to_filename(nested(100, 1)) != key_to_filename(nested(100, 2))


def test_numpy_scalars() -> None:
    np = pytest.importorskip("numpy")
    assert key_to_filename(np.str_("x")) == "x"
    keys = [np.int64(1), np.int32(1), np.float64(1), np.bool_(1), 1, 1.0, True]
    names = list(map(key_to_filename, keys))
    assert len(set(names)) == len(keys)
    assert all(map(is_digest, names))


# --- any key ------------------------------------------------------------------------------------

words = st.one_of(st.text(), st.from_regex(r"[_a-zA-Z][_a-zA-Z0-9]*", fullmatch=True))
surrogates = st.text(st.characters(categories=["Cs", "Lu"]))
decimals = st.decimals(allow_nan=False)
numbers = st.one_of(st.integers(), st.floats(), st.complex_numbers(), decimals, st.fractions())
times = st.one_of(st.dates(), st.datetimes(), st.times(), st.timedeltas())
members: list[Hashable] = [*Color, *Level, *Mode, *Right]
enums = st.sampled_from(members)
others = st.one_of(st.none(), st.booleans(), st.binary(), st.uuids())
atoms: st.SearchStrategy[Hashable] = st.one_of(words, surrogates, numbers, times, enums, others)
keys = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=10).map(tuple),
        st.frozensets(inner, max_size=5),
        st.builds(Tagged, st.text(), st.frozensets(st.text(), max_size=5)),
    ),
    max_leaves=20,
)


@given(keys)
def test_every_name_is_safe_and_short(key: Hashable) -> None:
    name = key_to_filename(key)
    assert is_safe_filename(name)
    assert name.isascii()
    assert len(name) <= 200
    assert all(len(part) <= 100 for part in name.split("/"))
    assert name.count("/") < 8
    assert key_to_filename(key) == name


usual: st.SearchStrategy[Hashable] = st.one_of(
    words,
    st.integers(),
    st.floats(allow_nan=False),
    st.binary(),
    st.dates(),
    st.sampled_from(Color),
)
usual_keys = st.recursive(
    usual,
    lambda inner: st.lists(inner, max_size=5).map(tuple) | st.frozensets(inner, max_size=5),
    max_leaves=10,
)


@given(st.sets(usual_keys, min_size=2, max_size=20))
def test_distinct_keys_have_distinct_names(keys: set[Hashable]) -> None:
    assert len(set(map(key_to_filename, keys))) == len(keys)


@pytest.mark.parametrize(
    "keys",
    [
        [1, "1", b"1", 1.5, "1.5", "_1"],
        ["a", ("a",), (("a",),), frozenset("a"), b"a"],
        [("a", ("b", "c")), ("a", "b", "c"), (("a", "b"), "c"), ("ab", "c"), ("a", "bc")],
        [(), frozenset(), "", b"", None, 0],
        [Color.RED, Color.GREEN, "Color.RED", "RED"],
        [Right.READ, Right.WRITE, Right(0), Right.READ | Right.WRITE],
        [2**100_000, 2**100_000 + 1, -(2**100_000)],
        [Tagged("a", frozenset("bc")), Tagged("a", frozenset("bd")), ("a", frozenset("bc"))],
        ["x" * 101, "x" * 102],
        ["\ud800", "\ud801"],
    ],
)
def test_keys_that_look_alike_have_distinct_names(keys: list[Hashable]) -> None:
    assert len(set(map(key_to_filename, keys))) == len(keys)


def test_many_keys_have_distinct_names() -> None:
    keys = [*range(10_000), *map(str, range(10_000)), *((i, str(i)) for i in range(10_000))]
    assert len(set(map(key_to_filename, keys))) == len(keys)


TELL_NAMES = """
import datetime, decimal, json
from dataclasses import dataclass
from chest.filenames import key_to_filename

@dataclass(frozen=True)
class Tagged:
    name: str
    tags: frozenset

class Plain:
    pass

words = "the quick brown fox jumps over the lazy dog".split()
many = frozenset(words)
keys = [
    *words, *map(len, words), *range(-3, 3), 1.5, None, b"x", "two words", "\\ud800", 2**20_000,
    many, (many, "x"), ("x", (many, 1)), frozenset([many, frozenset(map(str.upper, words))]),
    Tagged("a", many), ("x", Tagged("b", many)), datetime.date(2024, 5, 1), decimal.Decimal("1.5"),
    Plain(), len, Plain, lambda: 0, memoryview(b"x"),
]
print(json.dumps([list(map(key_to_filename, keys)), list(many)]))
"""


def test_names_are_the_same_in_every_process() -> None:
    names, orders = set(), set()
    for seed in "0", "1", "2", "3":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", TELL_NAMES]
        told = subprocess.check_output(command, env=environment, cwd=ROOT)
        here, order = json.loads(told)
        names.add(tuple(here))
        orders.add(tuple(order))
    assert len(names) == 1
    assert len(orders) > 1, "the hash seeds changed nothing"


# --- names from elsewhere -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *["x", "_a/b", "x~1", "a b", " x", "é/ü", "日本", "a.b.c", "x..y", "-x", "a?*<>|"],
        *["con_", "console.txt", "xcon", "a/xcon.txt", "com10", "com\u2070"],
        *["x" * 255, "é" * 127, "/".join(["x" * 99] * 10)],
    ],
)
def test_safe(name: str) -> None:
    assert is_safe_filename(name)


@pytest.mark.parametrize(
    "name",
    [
        *[None, 1, b"x", ("x",), "", " ", "/", "/x", "x/", "a//b", "//x"],
        *[".", "..", "../x", "a/..", "a/../b", "a/./b", "./x", "..."],
        *[".keys", ".pack-1", ".new-1-1", "a/.x"],
        *["a\\b", "\\x", "C:x", "C:/x", "x:stream"],
        *["x\0", "x\n", "\nx", "a\tb", "x\x7f", "x\x85", "x\ud800"],
        *["x.", "x ", "x./y", "x /y", "x. "],
        *["con", "con.txt", "CON.tar.gz", "a/nul", "a/nul.x/b", "nul /b", "con .txt", "com1"],
        *["lpt9.x", "COM¹", "lpt³.y", "conin$", "CONOUT$", "clock$.x"],
        *["x" * 256, "é" * 128, "a/" + "日" * 86, "/".join(["x" * 99] * 11)],
        *["/".join(["é" * 60] * 10), "x/" * 10**6],
    ],
    ids=lambda name: ascii(name)[:20],
)
def test_unsafe(name: object) -> None:
    assert not is_safe_filename(name)


@given(st.one_of(st.text(), st.text("./\\:ab \0")))
def test_safe_names_stay_inside(name: str) -> None:
    if is_safe_filename(name):
        joined = os.path.normpath(os.path.join("/base", name))
        assert joined == "/base/" + name or os.sep != "/"
        assert not any(part.startswith(".") for part in name.split("/"))
