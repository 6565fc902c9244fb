"""Keys that are equal and do not look alike: chest/aliases.py, and their names in the index."""

import copy
import json
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from enum import IntEnum, StrEnum
from fractions import Fraction

import numpy as np
import pytest

import chest
import chest.columns
import chest.replay
from chest import Chest, UnsavedError
from chest.aliases import as_set, may_differ
from chest.columns import decode

JSON = {"dump": json.dump, "load": json.load}


class Number(IntEnum):
    ONE = 1


class Text(StrEnum):
    A = "a"


class Str(str):
    """Text of another class."""


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
    """Equal to its own kind alone, and says so to everybody else."""

    number: int

    def __eq__(self, other):
        return isinstance(other, Alone) and abs(self.number) == abs(other.number)

    def __hash__(self):
        return abs(self.number)


@dataclass(frozen=True)
class Rude:
    """Raises where others compare themselves with it."""

    number: int

    def __eq__(self, other):
        return abs(self.number) == abs(other.number)

    def __hash__(self):
        return hash(("rude", abs(self.number)))


@dataclass(frozen=True)
class Named:
    """Pickled in other bytes as soon as it was read: its text is no more the attribute's name."""

    name: str


ONES = [1, True, 1.0, np.int64(1), np.float32(1), Decimal(1), Fraction(1), Number.ONE]
OF_NUMPY = (np.int64, np.float32)

# numpy's numbers cannot all be compared with those of decimal, nor be in one dict with them
PAIRS = [
    (first, second)
    for first in ONES
    for second in ONES
    if first is not second and not (isinstance(first, OF_NUMPY) and type(second) is Decimal)
    if not (isinstance(second, OF_NUMPY) and type(first) is Decimal)
]
PAIRS += [
    ("a", Text.A),
    (Text.A, "a"),
    (Str("a"), "a"),
    ("a", np.str_("a")),
    (b"a", np.bytes_(b"a")),
    (0.0, -0.0),
    (-0.0, 0.0),
    ((1, "a"), (Fraction(1), Text.A)),
    ((Fraction(1), Text.A), (1, "a")),
    (Folded("A"), Folded("a")),
    (Folded("A"), "a"),
    ("a", Folded("A")),
    (Alone(1), Alone(-1)),
    (Rude(1), Rude(-1)),
    (Named("name"), Named("name")),
    (("x", Named("x")), ("x", Named("".join("x")))),
]


def look(key):
    """Return what tells a key from equal ones, but for parts that were read back."""
    return type(key), repr(key)


@pytest.fixture(params=PAIRS, ids=repr)
def pair(request):
    return request.param


@pytest.fixture
def without_class(path, monkeypatch):
    """Do something with a chest as a process does that cannot load the classes of keys."""

    def refuse(data, trusted):
        raise ImportError("no such class here")

    def run(act):
        with monkeypatch.context() as patch:
            patch.setattr(chest.replay, "_load_key", refuse)
            return act(path)

    return run


def repair(path):
    report = chest.repair(path)
    assert not report.damaged
    assert not report.missing


def shrink(path):
    with Chest(path=path) as c:
        c["y"] = 1
        c.flush()
        c.compact()
        del c["y"]


def verify(path):
    with Chest(path=path) as c:
        assert c.verify().ok


@pytest.mark.parametrize(
    ("first", "second"), [(f, s) for f, s in PAIRS if chest.columns.is_plain(f)], ids=repr
)
def test_a_dict_tells_what_it_has_where_that_is_plain(first, second):
    assert as_set({2: None, first: None}, second) is first


def test_one_that_is_not_there_is_itself():
    key = np.int64(2)
    assert as_set({1: None, "2": None}, key) is key


@pytest.mark.parametrize("key", ["a", b"a", 1, None, (1, "a"), frozenset(["a"])], ids=repr)
def test_what_is_read_without_a_class_and_is_no_number_of_another_kind_looks_alike(key):
    assert not may_differ(key)


@pytest.mark.parametrize("key", [True, 1.0, np.int64(1), Text.A, Str("a"), Folded("a")], ids=repr)
def test_numbers_of_other_kinds_and_classes_may_differ(key):
    assert may_differ(key)


def leave(c, key):
    c.move_to_disk(key)


def leave_with_others(c, key):
    c.update((n, n) for n in range(100, 300))
    c[key] = c[key]
    c.available_memory = 0


def be_flushed(c, _):
    c.flush()


def be_flushed_again(c, key):
    c.flush()
    c[key] = c[key]
    c.flush()


@pytest.mark.parametrize("save", [leave, leave_with_others, be_flushed, be_flushed_again])
@pytest.mark.many
def test_a_key_is_the_one_that_was_set_first(path, pair, save, without_class):
    first, second = pair
    with Chest(path=path) as c:
        c[first] = "old"
        c["z"] = 0
        c[second] = "new"
        save(c, second)
        assert look(next(iter(c))) == look(first)
    without_class(verify)
    with Chest(path=path) as c:
        assert look(next(iter(c))) == look(first)
        assert c[first] == c[second] == "new"


@pytest.mark.parametrize("first", [True, 1.0, -0.0])
def test_so_it_is_with_json(path, first):
    with Chest(path=path, **JSON) as c:
        c[first] = "old"
        c[int(first)] = "new"
        c.move_to_disk(int(first))
    with Chest(path=path, **JSON) as c:
        assert [(look(key), value) for key, value in c.items()] == [(look(first), "new")]


@pytest.mark.parametrize("then", [repair, shrink, verify])
@pytest.mark.parametrize("value", ["new", "new" * 2000])
@pytest.mark.many
def test_a_value_that_is_replaced_is_not_back_where_the_class_is_not(
    path, pair, then, value, without_class
):
    first, second = pair
    with Chest({n: n for n in range(100, 300)}, path=path) as c:
        c[first] = "old"
    with Chest(path=path) as c:
        c[second] = value
    without_class(then)
    with Chest(path=path) as c:
        assert c[first] == value
        assert len(c) == 201
        assert look([*c][-1]) == look(first)


@pytest.mark.parametrize("then", [repair, shrink, verify])
@pytest.mark.many
def test_nor_is_one_that_is_deleted(path, pair, then, without_class):
    first, second = pair
    with Chest({n: n for n in range(100, 300)}, path=path) as c:
        c[first] = "old"
    with Chest(path=path) as c:
        del c[second]
    without_class(then)
    with Chest(path=path) as c:
        assert first not in c
        assert len(c) == 200


@pytest.mark.parametrize("then", [repair, shrink, verify])
@pytest.mark.many
def test_one_that_is_deleted_and_set_again_is_the_new_one(path, pair, then, without_class):
    first, second = pair
    with Chest({first: "old", "z": 0}, path=path) as c:
        c.flush()
        del c[second]
        c[second] = "new"
    without_class(then)
    with Chest(path=path) as c:
        assert [look(key) for key in c] == [look("z"), look(second)]
        assert c[first] == "new"


@pytest.mark.parametrize("deleted", [0, 1], ids=["by its name", "by the other"])
@pytest.mark.parametrize("cleared", [True, False])
@pytest.mark.many
def test_a_roll_back_names_nothing_otherwise(path, pair, deleted, cleared, without_class):
    first, second = pair
    with Chest({first: "old", "z": 0}, path=path) as c:
        c.flush()
        with pytest.raises(LookupError), c.transaction():
            del c[pair[deleted]]
            c[second] = "in between"
            if cleared:
                c.clear()
            raise LookupError
        assert [look(key) for key in c] == [look(first), look("z")]
        assert c[first] == "old"
        c[second] = "new"
    without_class(repair)
    with Chest(path=path) as c:
        assert [look(key) for key in c] == [look(first), look("z")]
        assert c[first] == "new"


def test_the_name_that_is_committed_first_is_everybodys(path, pair, without_class):
    first, second = pair
    with Chest(path=path) as a, Chest(path=path) as b:
        a[first] = "old"
        b[second] = "new"
        a.flush()
        b.flush()
        assert look(*a) == look(*b) == look(first)
        b["x"] = 1
        b.compact()
    without_class(verify)
    with Chest(path=path) as c:
        assert look(next(iter(c))) == look(first)
        assert c[first] == "new"


def test_keys_of_one_number_have_one_order_for_everybody(path):
    with Chest(path=path) as a, Chest(path=path) as b:
        a[Named("a")], b[Text.A] = 1, 2
        a.flush()
        b.flush()
        a["q"] = 3
        a.flush()
        with Chest(path=path) as c:
            assert [*a] == [*b] == [*c]


@pytest.mark.parametrize(("first", "second"), [("z", "a"), ("a", "z")])
def test_and_do_so_once_all_of_them_are_committed(path, first, second):
    with Chest(path=path) as a, Chest(path=path) as b:
        a[first], b[second] = 1, 2
        a.flush()
        assert [*b] == [first, second]
        b.flush()
        with Chest(path=path) as c:
            assert [*a] == [*b] == [*c]


@pytest.mark.parametrize("how", ["copy", "|", "|=", "deepcopy"])
def test_chests_that_come_of_others_name_keys_as_dicts_do(how):
    a, b = {True: 1, 2.0: 2}, {1: 5, 2: 6, 3: 7}
    with Chest(a) as c, Chest(b) as d:
        if how == "|=":
            c |= d
        else:
            c = {"copy": Chest.copy, "|": lambda c: c | d, "deepcopy": copy.deepcopy}[how](c)
        with c:
            c.flush()
            with Chest(path=c.path) as again:
                expected = a | b if "|" in how else a
                assert [*map(look, again)] == [*map(look, c)] == [*map(look, expected)]


class Unpicklable(int):
    def __reduce__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize("key", [1, 1.0])
def test_a_first_name_that_cannot_be_pickled_is_told_of_under_any_other(path, key):
    with Chest(path=path) as c:
        c[Unpicklable(1)] = "a"
        c[key] = "b"
        with pytest.raises(UnsavedError):
            c.flush()
        del c[key]
        c[key] = "b"
    with Chest(path=path) as c:
        assert look(*c) == look(key)


@pytest.mark.parametrize("first", [1, True, Number.ONE])
def test_a_key_that_is_there_is_written_under_one_that_cannot_be_pickled(path, first):
    with Chest({first: "old"}, path=path) as c:
        c.flush()
        c[Unpicklable(1)] = "new"
    with Chest(path=path) as c:
        assert (*map(look, c),) == (look(first),)
        assert c[first] == "new"


def test_what_another_deleted_is_not_told_again(path):
    with Chest({Number.ONE: 1}, path=path) as a:
        a.flush()
        with Chest(path=path) as b:
            del b[Unpicklable(1)], a[Number.ONE]
            a.flush()
            b["x"] = 2
            b.flush()
        assert dict(a) == {"x": 2}


@pytest.mark.parametrize("then", [None, len, Chest.flush, Chest.compact])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("value", ["new", "new" * 5000])
def test_a_key_whose_class_comes_late_is_deleted_for_good(path, then, other, value, without_class):
    with Chest({Number.ONE: "old"}, path=path) as a:
        a.flush()
        late = without_class(lambda path: Chest(path=path))
        assert without_class(lambda _: len(late)) == 0
        c = a if other else late
        if then:
            c[1 if other else Number.ONE] = value
            then(c)
            assert c[1] == value
            c._check()
        if other or then:
            del c[1]
            c.flush()
        late["x"] = 1
        late.compact()
        late.close()
    with Chest(path=path) as c:
        assert dict(c) == ({"x": 1} if other or then else {1: "old", "x": 1})
        c._check()


@pytest.mark.parametrize("key", [Number.ONE, lambda: None], ids=["as it is there", "another"])
@pytest.mark.parametrize("fails", [False, True])
def test_it_is_deleted_by_that_name_alone_and_not_where_that_is_taken_back(
    path, key, fails, without_class
):
    Chest({Number.ONE: "old"}, path=path).close()
    c = without_class(lambda path: Chest(path=path))
    assert without_class(lambda _: len(c)) == 0
    with suppress(EOFError), c.transaction():
        c[key] = "new"
        del c[key]
        if fails:
            raise EOFError
    c["x"] = 1
    c._check()
    c.close()
    with Chest(path=path) as again:
        assert dict(again) == ({"x": 1} if key == 1 and not fails else {1: "old", "x": 1})
        again._check()


@dataclass(frozen=True)
class Stranger:
    """Has the hash of 1, and compares itself with others as it is told to."""

    answer: object

    def __eq__(self, other):
        if isinstance(other, (int, Stranger)):
            return isinstance(other, Stranger)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def __hash__(self):
        return 1


@pytest.mark.parametrize("answer", [False, True, TypeError("no")])
def test_a_key_of_the_same_hash_may_compare_badly(path, answer):
    with Chest(path=path) as c:
        c[Stranger(answer)], c[1] = 0, 1
        c.flush()
        c[True] = 2
        c.flush()
        c.compact()
        assert look([*c][1]) == look(1)
        del c[True]
        assert len(c) == 1
        c[True] = 3
    with Chest(path=path) as c:
        assert look([*c][1]) == look(True)
        assert c[1] == 3


def test_names_take_no_memory_that_grows(path):
    with Chest(path=path) as c:
        for n in range(100):
            c[Named("x")] = n
            c[0.5] = n
            c[n + 0.5] = n
            c[np.int64(-1)] = n
            if n % 2:
                c.flush()
            if n % 3:
                del c[Named("x")], c[n + 0.5]
            elif n % 4:
                c.clear()
            assert len(c._memory.ledger._names) <= len(c) + 8  # which are deleted, not committed


def test_nor_do_those_of_keys_that_no_commit_held(path):
    with Chest(path=path) as c:
        for n in range(100):
            c[0.5], c[Named("x")] = n, n
            del c[0.5], c[Named("x")]
        assert not c._memory.ledger._names


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (None, Chest.clear),
        (None, lambda c: c.pop(Named("x"))),
        (lambda c: c.pop(Named("x")), lambda c: c.pop(Named("x"))),
        (lambda c: c.pop(Named("x")), lambda c: c.__setitem__(Named("x"), 1)),
        (Chest.clear, lambda c: c.pop(Named("x"))),
        (Chest.clear, lambda c: c.__setitem__(Named("x"), 1)),
    ],
)
def test_nor_do_those_of_what_others_commit(path, mine, theirs):
    with Chest(path=path) as a, Chest(path=path) as b:
        for n in range(20):
            a[Named("x")] = n
            a.flush()
            if mine and len(b):
                mine(b)
            theirs(a)
            a.flush()
            assert len(b) <= 1
        b.flush()
        assert len(a) == len(b)
        assert len(a._memory.ledger._names) == len(b._memory.ledger._names) == len(a)


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.many
def test_a_name_stays_that_is_committed_again_by_another(path, pair, reads):
    first, second = pair
    with Chest(path=path) as a, Chest(path=path) as b:
        c = a if reads else b
        c[first] = "old"
        c.flush()
        assert look(*a) == look(*b) == look(first)
        del a[first]
        a[first] = "mine"
        b[second] = "theirs"
        b.flush()
        assert look(*a) == look(*b) == look(first)
        a.flush()
        a.compact()
        with Chest(path=path) as c:
            assert look(*a) == look(*b) == look(*c) == look(first)
            assert c[first] == "mine"


def test_what_is_cleared_keeps_its_name_in_a_snapshot(path):
    with Chest({1: "old"}, path=path) as c:
        c.flush()
        del c[1]
        c[np.int64(1)] = "new"
        c.clear()
        keys = [block.keys for data in c._memory.ledger.snapshot() for block in decode(data).blocks]
        assert keys == [([1], [], {int})]


class Anything:
    """Equal to all there is."""

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 5


@pytest.mark.parametrize("key", [Rude(1), Anything()])
def test_the_last_pair_may_have_a_key_that_compares_badly(key):
    with Chest() as c:
        c[key] = 1
        assert c.popitem() == (key, 1)
        with pytest.raises(KeyError):
            c.popitem()


def test_what_is_in_hand_is_compared_with_no_key_of_another_hash():
    value = [1]
    with Chest(available_memory=0) as c:
        c[np.int64(5)] = value
        c[1, 2] = value
        assert {**c} == {5: [1], (1, 2): [1]}
