"""Keys that are equal and do not look alike: chest/aliases.py."""

from dataclasses import dataclass
from decimal import Decimal
from enum import IntEnum, StrEnum
from fractions import Fraction
from pathlib import PurePosixPath

import numpy as np
import pandas as pd
import pytest

from chest import Chest
from chest.aliases import as_set, may_differ


class Number(IntEnum):
    ONE = 1


class Text(StrEnum):
    A = "a"


class Str(str):
    pass


@dataclass(frozen=True)
class Folded:
    """Equal to another, and to text, in upper or lower case; compares that instead of itself."""

    text: str

    def __eq__(self, other):
        return self.text.lower() == (other.text.lower() if isinstance(other, Folded) else other)

    def __hash__(self):
        return hash(self.text.lower())


@dataclass(frozen=True)
class Alone:
    """Equal to its own kind alone, and tells everybody else so."""

    number: int

    def __eq__(self, other):
        return isinstance(other, Alone) and abs(self.number) == abs(other.number)

    def __hash__(self):
        return abs(self.number)


ONES = [1, True, 1.0, np.int64(1), np.float32(1), Decimal(1), Fraction(1), Number.ONE]
# numpy's numbers cannot be compared with those of decimal, nor be in one dict with them
PAIRS = [(a, b) for a in ONES for b in ONES if not {type(a), type(b)} >= {np.int64, Decimal}]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=repr)
def test_a_key_is_the_one_that_was_set_first(first, second):
    assert as_set({0: None, first: None}, second) is first


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a", Text.A),
        (Text.A, "a"),
        ("a", Str("a")),
        (Str("a"), np.str_("a")),
        (b"a", np.bytes_(b"a")),
        ((1, "a"), (True, Text.A)),
        (frozenset([1]), frozenset([Fraction(1)])),
        (pd.Timestamp("2020-01-01"), pd.Timestamp("2020-01-01").to_pydatetime()),
        (PurePosixPath("a/b"), PurePosixPath("a//b")),
    ],
    ids=repr,
)
def test_so_it_is_for_text_tuples_dates_and_paths(first, second):
    assert as_set({first: None, "b": None}, second) is first


def test_one_that_is_not_there_is_itself():
    key = np.int64(2)
    assert as_set({1: None, "2": None}, key) is key


@pytest.mark.parametrize(
    ("first", "second"), [(Folded("A"), Folded("a")), (Folded("a"), "a"), (Alone(1), Alone(-1))]
)
def test_what_a_key_compares_instead_of_itself_is_never_taken_for_a_key(first, second):
    assert second in {first: None}
    assert as_set({first: None}, second) is second


def test_what_cannot_be_compared_is_itself():
    class Rude:
        def __hash__(self):
            return 1

        def __eq__(self, other):
            if other is self:
                return True
            raise ValueError("not with you")

    key = Rude()
    assert as_set({1: None}, key) is key
    assert as_set({key: None}, 1) == 1


@pytest.mark.parametrize("key", ["a", b"a", 1, None, (1, "a"), frozenset(["a"])], ids=repr)
def test_what_is_read_without_a_class_and_is_no_number_of_another_kind_looks_alike(key):
    assert not may_differ(key)


@pytest.mark.parametrize("key", [True, 1.0, np.int64(1), Text.A, Str("a"), Folded("a")], ids=repr)
def test_numbers_of_other_kinds_and_classes_may_differ(key):
    assert may_differ(key)


def test_keys_keep_their_class_where_that_compares_parts_of_them(path):
    with Chest(path=path) as c:
        c[Folded("A")] = 1
        c[Folded("b")] = 2
        c.flush()
        c[Folded("b")] = 3
        del c[Folded("a")]
    with Chest(path=path) as c:
        assert [(type(key), key.text, value) for key, value in c.items()] == [(Folded, "b", 3)]
