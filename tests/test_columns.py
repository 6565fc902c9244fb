"""The content of a frame: columns there and back, and nothing that could run code."""

import array
import datetime as dt
import enum
import math
import os
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chest.columns import (
    Entry,
    FrameError,
    Keys,
    decode,
    encode,
    is_plain,
    own_entries,
)

BIG = 2**64 - 1
NO_KEYS = ([], [])


def packed(*numbers, typecode="Q"):
    """Spell a column as the file holds it on a machine that is little-endian, as on any other."""
    width = {"I": 4, "Q": 8}[typecode]
    return typecode, b"".join(number.to_bytes(width, "little") for number in numbers)


def payload(*blocks, first=True, cleared=False, serializer=None, left=(), deleted=NO_KEYS):
    return pickle.dumps((first, cleared, serializer, list(left), deleted, list(blocks)), 5)


def block(keys="k", files=("f",), **columns):
    """Return a block of one key as it stands in a payload, or of other columns."""
    column = {"serials": 0, "places": 0, "lengths": packed(1), "digests": packed(2)} | columns
    keys = (list(keys), []) if isinstance(keys, str) else keys
    files = list(files) if isinstance(files, tuple) else files
    serials = column.pop("serials")
    return (keys, serials, files, *column.values())


def only_block(data):
    (found,) = decode(data).blocks
    return found


class Color(enum.Enum):
    RED = 1


class Text(str):
    pass


# -- there and back -------------------------------------------------------------------------------


def test_a_frame_says_what_was_put_in():
    data = encode(
        [("x", 3, Entry("x", 0, 10, BIG)), ("y", 4, Entry("_a/y", 0, 2**40, 0))],
        first=True,
        cleared=True,
        serializer=("json.dump", True),
        left=[Entry("old", 0, 5, 6)],
        deleted=["gone", ("a", 1)],
    )
    frame = decode(data)
    assert (frame.first, frame.cleared, frame.serializer) == (True, True, ("json.dump", True))
    assert (frame.left, frame.deleted) == ([Entry("old", 0, 5, 6)], Keys(["gone", ("a", 1)], []))
    (found,) = frame.blocks
    assert found.keys == Keys(["x", "y"], [])
    assert found.files == ["x", "_a/y"]
    assert [list(column) for column in (found.serials, found.places)] == [[3, 4], [0, 0]]
    assert [list(column) for column in (found.lengths, found.digests)] == [[10, 2**40], [BIG, 0]]


def test_a_frame_that_puts_nothing_has_no_block():
    assert decode(encode([], deleted=["x"])).blocks == []


def test_a_frame_is_no_first_one_unless_it_says_so():
    assert decode(encode([])).first is False


numbers = st.booleans() | st.integers() | st.floats(allow_nan=False)
plain_keys = st.recursive(
    st.none() | numbers | st.text() | st.binary(),
    lambda keys: st.tuples(keys, keys) | st.frozensets(keys, max_size=3),
    max_leaves=6,
)
words = st.integers(0, BIG)


@settings(max_examples=40, deadline=None, database=None)
@given(st.lists(st.tuples(plain_keys, words, st.text(), words, words), min_size=1, max_size=6))
def test_any_plain_keys_and_numbers_come_back(rows):
    found = only_block(encode([(k, n, Entry(f, 0, size, d)) for k, n, f, size, d in rows]))
    assert found.keys == Keys([key for key, *_ in rows], [])
    assert [*map(type, found.keys.plain)] == [type(key) for key, *_ in rows]
    assert list(found.serials) == [n for _, n, _, _, _ in rows]
    assert found.files == [name for _, _, name, _, _ in rows]
    assert list(zip(found.lengths, found.digests, strict=True)) == [(s, d) for *_, s, d in rows]


def test_keys_that_need_a_class_stand_behind_the_others_with_their_own_rows():
    day = dt.date(2026, 1, 1)
    puts = [
        (day, 0, Entry("day", 0, 1, 10)),
        ("x", 1, Entry("x", 0, 2, 20)),
        (Color.RED, 2, Entry("red", 0, 3, 30)),
        (7, 3, Entry("seven", 0, 4, 40)),
    ]
    found = only_block(encode(puts))
    assert found.keys.plain == ["x", 7]
    assert [pickle.loads(data) for data in found.keys.pickled] == [day, Color.RED]
    assert found.files == ["x", "seven", "day", "red"]
    assert list(found.serials) == [1, 3, 0, 2]
    assert list(found.digests) == [20, 40, 10, 30]


def test_deleted_keys_that_need_a_class_are_pickled_too():
    deleted = decode(encode([], deleted=["x", Color.RED])).deleted
    assert (deleted.plain, [*map(pickle.loads, deleted.pickled)]) == (["x"], [Color.RED])


def test_a_key_that_needs_a_class_is_not_opened_by_reading_the_frame(tmp_path):
    ran = tmp_path / "ran"
    hostile = pickle.dumps(Hostile(str(ran)))
    frame = decode(payload(block(keys=([], [hostile])), deleted=([], [hostile])))
    assert frame.deleted.pickled == [hostile]
    assert not ran.exists()


@pytest.mark.parametrize(
    "key",
    ["x", b"x", 1, 1.5, True, None, (), ("a", (1, None)), frozenset({1, ("a",)})],
    ids=repr,
)
def test_plain_keys_need_no_class(key):
    assert is_plain(key)


@pytest.mark.parametrize(
    "key",
    [dt.date(2026, 1, 1), Color.RED, Text("x"), ("a", Text("x")), frozenset({Color.RED}), 1j],
    ids=repr,
)
def test_keys_of_other_types_are_not_plain(key):
    assert not is_plain(key)


def test_a_key_that_is_nested_too_deeply_to_be_pickled_is_not_plain():
    key = ()
    for _ in range(100_000):
        key = (key,)
    assert not is_plain(key)


def test_a_key_that_is_no_number_is_the_same_object_in_every_frame():
    keys = [float("nan"), ("a", float("nan")), frozenset({float("nan")})]
    found = only_block(encode([(key, n, Entry("f", 0, 1, 1)) for n, key in enumerate(keys)]))
    assert found.keys.plain == [math.nan, ("a", math.nan), frozenset({math.nan})]


def test_a_key_takes_about_35_bytes():
    puts = [(f"key{n:05}", n, Entry(f"key{n:05}", 0, 1000 + n, BIG - n)) for n in range(1000)]
    assert len(encode(puts)) < 45 * 1000


# -- the forms that a column may have -------------------------------------------------------------


@pytest.mark.parametrize("serials", [[5, 6, 7], [5, 7, 6], [9, 5, 2**40]], ids=str)
def test_serials_that_rise_by_one_or_not_come_back(serials):
    data = encode([(n, serial, Entry("f", 0, 1, 1)) for n, serial in enumerate(serials)])
    assert list(only_block(data).serials) == serials


def test_serials_may_be_a_start_alone():
    data = payload(block("ab", ("f", "g"), serials=8, lengths=packed(1, 1), digests=packed(1, 1)))
    assert list(only_block(data).serials) == [8, 9]


def test_numbers_may_take_four_bytes_each_or_eight():
    four = {"lengths": packed(5, typecode="I"), "digests": packed(6, typecode="I")}
    small = only_block(payload(block(**four)))
    large = only_block(payload(block(lengths=packed(2**63), digests=packed(BIG))))
    assert (list(small.lengths), list(small.digests)) == ([5], [6])
    assert (list(large.lengths), list(large.digests)) == ([2**63], [BIG])


def test_numbers_are_written_in_the_smaller_form_that_holds_all_of_them():
    _, _, _, _, _, [columns] = pickle.loads(encode([("x", 9, Entry("x", 0, 2**32 - 1, 2**32))]))
    assert columns[1] == 9
    assert columns[4:] == (packed(2**32 - 1, typecode="I"), packed(2**32))


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        pytest.param(100, [100, 105, 111], id="end to end from a start"),
        pytest.param(packed(40, 0, 2**33), [40, 0, 2**33], id="anywhere"),
    ],
)
def test_values_may_lie_in_one_file(places, expected):
    columns = {"places": places, "lengths": packed(5, 6, 7), "digests": packed(1, 2, 3)}
    found = only_block(payload(block("abc", ".pack-1", **columns)))
    assert found.files == [".pack-1"] * 3
    assert list(found.places) == expected


def test_values_in_files_of_their_own_may_have_places():
    columns = {"places": packed(3, 4), "lengths": packed(5, 6), "digests": packed(1, 2)}
    found = only_block(payload(block("ab", ("f", "g"), **columns)))
    assert (found.files, list(found.places)) == (["f", "g"], [3, 4])


def test_a_frame_names_the_files_it_puts_but_not_a_shared_one():
    own = block("ab", ("a", "_b/c"), lengths=packed(1, 1), digests=packed(1, 1))
    shared = block("p", ".pack-1")
    named = own_entries(payload(own, shared, left=[("old", 0, 1, 1)]))
    assert [entry.file for entry in named] == ["a", "_b/c"]


# -- what is no frame -----------------------------------------------------------------------------


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


class Persistent(pickle.Pickler):
    def persistent_id(self, obj):
        return "anything" if obj == "here" else None


@pytest.mark.parametrize("place", ["whole", "key", "file", "left", "serializer"])
def test_reading_a_frame_runs_nothing_wherever_it_hides(tmp_path, place):
    hostile = Hostile(str(tmp_path / "ran"))
    data = {
        "whole": lambda: pickle.dumps(hostile),
        "key": lambda: payload(block(keys=([hostile], []))),
        "file": lambda: payload(block(files=(hostile,))),
        "left": lambda: payload(left=[hostile]),
        "serializer": lambda: payload(serializer=hostile),
    }[place]()
    with pytest.raises(FrameError, match="mkdir"):
        decode(data)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("harmless", [dt.date(2026, 1, 1), Color.RED, array.array("Q", [1]), 1j])
def test_a_frame_may_name_no_class_at_all(harmless):
    with pytest.raises(FrameError, match="may name nothing"):
        decode(payload(block(keys=([harmless], []))))


def test_a_frame_may_hold_no_persistent_id(tmp_path):
    target = tmp_path / "pickle"
    with open(target, "wb") as file:
        Persistent(file).dump((True, False, None, ["here"], NO_KEYS, []))
    with pytest.raises(FrameError, match="persistent id 'anything'"):
        decode(target.read_bytes())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"no pickle", id="no pickle"),
        pytest.param(payload()[:-1], id="cut short"),
        pytest.param(pickle.dumps("text"), id="a string"),
        pytest.param(pickle.dumps((True, False, None, [], NO_KEYS)), id="too few columns"),
        pytest.param(payload(block("ab")), id="more keys than files"),
        pytest.param(payload(block(files=("f", "g"))), id="more files than keys"),
        pytest.param(payload(block(lengths=packed(1, 2))), id="more lengths than keys"),
        pytest.param(payload(block(digests=packed())), id="no digests"),
        pytest.param(payload(block(places=packed(1, 2))), id="more places than keys"),
        pytest.param(payload(block(serials=packed(1, 2))), id="more serials than keys"),
        pytest.param(payload(block(files=(5,))), id="a file that is a number"),
        pytest.param(payload(block(files=None)), id="no files"),
        pytest.param(payload(block(serials=-1)), id="a negative serial"),
        pytest.param(payload(block(digests=("d", bytes(8)))), id="digests as floats"),
        pytest.param(payload(block(digests=("Q", bytes(7)))), id="half a digest"),
        pytest.param(payload(block(lengths=7)), id="lengths that are a number"),
    ],
)
def test_what_is_no_frame_is_refused(data):
    with pytest.raises(FrameError):
        decode(data)


def test_a_block_without_keys_is_refused():
    nothing = {"lengths": packed(), "digests": packed()}
    with pytest.raises(FrameError):
        decode(payload(block(NO_KEYS, (), **nothing)))
