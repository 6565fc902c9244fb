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

import chest.columns
from chest.columns import (
    SERIALS,
    Entry,
    FrameError,
    Keys,
    Pickled,
    Puts,
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


def pickled(key):
    return Pickled(pickle.dumps(key, 5))


def payload(*blocks, first=True, cleared=False, serializer=None, left=(), deleted=NO_KEYS):
    return pickle.dumps((first, cleared, serializer, list(left), deleted, list(blocks)), 5)


def block(keys="k", files=("f",), **columns):
    """Return a block of one key as it stands in a payload, or of other columns."""
    column = {"serials": 0, "places": 0, "lengths": packed(1), "digests": packed(2)} | columns
    keys = (list(keys), []) if isinstance(keys, str) else keys
    files = list(files) if isinstance(files, tuple) else files
    serials = column.pop("serials")
    return (keys, serials, files, *column.values())


def put(*rows):
    """Return the blocks of a frame that puts rows of a key, its serial and its entry."""
    keys, serials, entries = map(list, zip(*rows, strict=True))
    return [(serials, Puts(keys, *map(list, zip(*entries, strict=True))))]


def put_in_pack(*rows):
    """Return the blocks of a frame that puts rows of key, serial, place, length and digest."""
    keys, serials, *numbers = map(list, zip(*rows, strict=True))
    return [(serials, Puts(keys, ".pack-7", *numbers))]


def only_block(data):
    (found,) = decode(data).blocks
    return found


def only_columns(data):
    """Return the one block of a frame as it stands in the payload."""
    (columns,) = pickle.loads(data)[5]
    return columns


def rows_of(found):
    """Return the rows of a block of plain keys."""
    columns = (found.serials, found.files, found.places, found.lengths, found.digests)
    return [*zip(found.keys.plain, *columns, strict=True)]


class Color(enum.Enum):
    RED = 1


class Text(str):
    pass


# -- there and back -------------------------------------------------------------------------------


def test_a_frame_says_what_was_put_in():
    data = encode(
        put(("x", 3, Entry("x", 0, 10, BIG)), ("y", 4, Entry("_a/y", 0, 2**40, 0))),
        first=True,
        cleared=True,
        serializer=("json.dump", True),
        left=[Entry("old", 0, 5, 6)],
        deleted=["gone", ("a", 1)],
    )
    frame = decode(data)
    assert (frame.first, frame.cleared, frame.serializer) == (True, True, ("json.dump", True))
    assert frame.left == [Entry("old", 0, 5, 6)]
    assert frame.deleted == Keys(["gone", ("a", 1)], [], {str, tuple})
    (found,) = frame.blocks
    assert found.keys == Keys(["x", "y"], [], {str})
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
serials = st.integers(0, SERIALS - 1)
lengths = st.integers(1, BIG)  # of values in packs: dead packs are those of no length


@settings(max_examples=40, deadline=None, database=None)
@given(st.lists(st.tuples(plain_keys, serials, st.text(), words, words), min_size=1, max_size=6))
def test_any_plain_keys_and_numbers_come_back(rows):
    found = only_block(encode(put(*((k, n, Entry(f, 0, *ints)) for k, n, f, *ints in rows))))
    assert found.keys[:2] == ([key for key, *_ in rows], [])
    assert found.keys.kinds == {type(key) for key, *_ in rows}
    assert [*map(type, found.keys.plain)] == [type(key) for key, *_ in rows]
    assert list(found.serials) == [n for _, n, _, _, _ in rows]
    assert found.files == [name for _, _, name, _, _ in rows]
    assert list(zip(found.lengths, found.digests, strict=True)) == [(s, d) for *_, s, d in rows]


@settings(max_examples=40, deadline=None, database=None)
@given(st.lists(st.tuples(plain_keys, serials, words, lengths, words), min_size=1, max_size=6))
def test_any_plain_keys_and_numbers_come_back_from_a_pack(rows):
    found = only_block(encode(put_in_pack(*rows)))
    assert rows_of(found) == [(key, n, ".pack-7", *numbers) for key, n, *numbers in rows]
    assert [*map(type, found.keys.plain)] == [type(key) for key, *_ in rows]


@pytest.mark.parametrize("others", [[], [5], [SERIALS - 1]])
@pytest.mark.parametrize("serial", [SERIALS, BIG])
def test_a_serial_that_nobody_can_give_is_refused(serial, others):
    rows = [(n, n, Entry("x", 0, 1, 1)) for n in [*others, serial]]
    with pytest.raises(FrameError, match="as serials"):
        decode(encode(put(*rows)))


def test_a_frame_keeps_its_blocks_apart_and_in_order():
    own = put(("x", 0, Entry("x", 0, 1, 2)))
    shared = put_in_pack(("y", 1, 5, 6, 7))
    blocks = decode(encode(own + shared + own)).blocks
    assert [found.pack for found in blocks] == [None, ".pack-7", None]
    assert [*map(rows_of, blocks[:2])] == [[("x", 0, "x", 0, 1, 2)], [("y", 1, ".pack-7", 5, 6, 7)]]


def test_keys_that_need_a_class_stand_behind_the_others_with_their_own_rows():
    day = dt.date(2026, 1, 1)
    puts = put(
        (pickled(day), 0, Entry("day", 0, 1, 10)),
        ("x", 1, Entry("x", 0, 2, 20)),
        (pickled(Color.RED), 2, Entry("red", 0, 3, 30)),
        (7, 3, Entry("seven", 0, 4, 40)),
    )
    found = only_block(encode(puts))
    assert found.keys.plain == ["x", 7]
    assert [pickle.loads(data) for data in found.keys.pickled] == [day, Color.RED]
    assert found.files == ["x", "seven", "day", "red"]
    assert list(found.serials) == [1, 3, 0, 2]
    assert list(found.digests) == [20, 40, 10, 30]


def test_a_lack_of_memory_is_no_fault_of_the_frame(monkeypatch):
    def fail(stream):
        raise MemoryError

    data = encode([])
    monkeypatch.setattr(chest.columns, "_Plain", fail)
    with pytest.raises(MemoryError):
        decode(data)


def test_keys_that_need_a_class_keep_their_places_in_a_pack():
    puts = put_in_pack((pickled(Color.RED), 0, 50, 5, 10), ("x", 1, 55, 6, 20), (7, 2, 61, 7, 30))
    found = only_block(encode(puts))
    assert (found.keys.plain, [*map(pickle.loads, found.keys.pickled)]) == (["x", 7], [Color.RED])
    assert [list(column) for column in (found.serials, found.places)] == [[1, 2, 0], [55, 61, 50]]
    assert [list(column) for column in (found.lengths, found.digests)] == [[6, 7, 5], [20, 30, 10]]


def test_deleted_keys_that_need_a_class_are_pickled_too():
    deleted = decode(encode([], deleted=["x", pickled(Color.RED)])).deleted
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
    found = only_block(encode(put(*((k, n, Entry("f", 0, 1, 1)) for n, k in enumerate(keys)))))
    assert found.keys.plain == [math.nan, ("a", math.nan), frozenset({math.nan})]


def test_a_key_takes_about_35_bytes():
    rows = [(f"key{n:05}", n, Entry(f"key{n:05}", 0, 1000 + n, BIG - n)) for n in range(1000)]
    assert len(encode(put(*rows))) < 45 * 1000


def test_a_key_of_a_pack_takes_about_25_bytes():
    rows = [(f"key{n:05}", n, 100 * n, 100, BIG - n) for n in range(1000)]
    assert len(encode(put_in_pack(*rows))) < 30 * 1000


# -- what a commit puts ---------------------------------------------------------------------------


def test_entries_are_put_as_columns():
    entries = {"a": Entry("f", 0, 5, 6), 7: Entry("_g/h", 0, 8, 9)}
    assert Puts.of(entries) == (["a", 7], ["f", "_g/h"], [0, 0], [5, 8], [6, 9])


@pytest.mark.parametrize("rows", [[2, 0], range(1, 3), range(1)], ids=str)
def test_rows_that_are_picked_are_whole_in_the_order_asked_for(rows):
    puts = Puts([*"abc"], [*"fgh"], [1, 2, 3], array.array("Q", [4, 5, 6]), [7, 8, 9])
    every = [*zip(*puts, strict=True)]
    assert [*zip(*puts.pick(rows), strict=True)] == [every[row] for row in rows]


def test_rows_that_are_picked_from_a_pack_stay_in_it():
    puts = Puts([*"abc"], ".pack-2", array.array("Q", [1, 2, 3]), [4, 5, 6], [7, 8, 9])
    assert puts.pick([2, 0]) == (["c", "a"], ".pack-2", [3, 1], [6, 4], [9, 7])


# -- the forms that a column may have -------------------------------------------------------------


@pytest.mark.parametrize("serials", [[5, 6, 7], [5, 7, 6], [9, 5, 2**40]], ids=str)
def test_serials_that_rise_by_one_or_not_come_back(serials):
    data = encode(put(*((n, serial, Entry("f", 0, 1, 1)) for n, serial in enumerate(serials))))
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
    columns = only_columns(encode(put(("x", 9, Entry("x", 0, 2**32 - 1, 2**32)))))
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


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([100, 105, 111], 100),
        ([0, 5, 11], 0),
        ([100, 106, 112], packed(100, 106, 112, typecode="I")),
        ([111, 105, 100], packed(111, 105, 100, typecode="I")),
        ([0, 0, 0], packed(0, 0, 0, typecode="I")),
        ([0, 5, 2**32], packed(0, 5, 2**32)),
    ],
    ids=str,
)
def test_places_in_a_pack_are_one_number_where_values_lie_end_to_end(places, expected):
    rows = zip("abc", [0, 1, 2], places, [5, 6, 7], [1, 2, 3], strict=True)
    data = encode(put_in_pack(*rows))
    assert only_columns(data)[2:4] == (".pack-7", expected)
    assert list(only_block(data).places) == places


@pytest.mark.parametrize(
    ("places", "expected"),
    [([0, 0], 0), ([3, 3], packed(3, 3, typecode="I")), ([0, 5], packed(0, 5, typecode="I"))],
    ids=str,
)
def test_places_in_files_are_one_number_where_values_begin_their_files(places, expected):
    rows = [(key, n, Entry("f", places[n], 5, 1)) for n, key in enumerate("ab")]
    data = encode(put(*rows))
    assert only_columns(data)[2:4] == (["f", "f"], expected)
    assert list(only_block(data).places) == places


def test_values_in_files_of_their_own_may_have_places():
    columns = {"places": packed(3, 4), "lengths": packed(5, 6), "digests": packed(1, 2)}
    found = only_block(payload(block("ab", ("f", "g"), **columns)))
    assert (found.files, list(found.places)) == (["f", "g"], [3, 4])


def test_a_frame_names_the_files_it_puts():
    own = block("ab", ("a", "_b/c"), lengths=packed(1, 2), digests=packed(3, 4))
    named = own_entries(payload(own, left=[("old", 0, 1, 1)]))
    assert named == [Entry("a", 0, 1, 3), Entry("_b/c", 0, 2, 4)]


def test_of_a_pack_a_frame_names_the_first_of_the_values_it_puts_there():
    columns = {"lengths": packed(5, 6, 7), "digests": packed(3, 2, 1)}
    first = block("abc", ".pack-1", places=packed(40, 7, 50), **columns)
    second = block("def", ".pack-2", places=100, **columns)
    named = own_entries(payload(first, block("g"), second))
    expected = [Entry(".pack-1", 7, 6, 2), Entry("f", 0, 1, 2), Entry(".pack-2", 100, 5, 3)]
    assert named == expected


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
        pytest.param(payload(block(lengths=("I", "text"))), id="lengths that are a text"),
        pytest.param(payload(block(serials=None)), id="no serials"),
        pytest.param(payload(block(serials=0.0)), id="a serial that is a float"),
        pytest.param(payload(block(serials="0")), id="a serial that is a text"),
        pytest.param(payload(block(serials=[0])), id="serials that are a list"),
        pytest.param(payload(block(serials=2**64)), id="a serial that is too large"),
        pytest.param(payload(block(places=None)), id="no places"),
        pytest.param(payload(block(places=0.0)), id="a place that is a float"),
        pytest.param(payload(block(places="0")), id="a place that is a text"),
        pytest.param(payload(block(places=[0])), id="places that are a list"),
        pytest.param(payload(block(places=-1)), id="a negative place"),
        pytest.param(payload(block()[:-1]), id="a block of too few columns"),
    ],
)
def test_what_is_no_frame_is_refused(data):
    with pytest.raises(FrameError):
        decode(data)


@pytest.mark.parametrize(
    "columns",
    [
        pytest.param({"lengths": packed(1)}, id="fewer lengths than keys"),
        pytest.param({"lengths": packed(1, 2, 3)}, id="more lengths than keys"),
        pytest.param({"lengths": packed()}, id="no lengths"),
        pytest.param({"digests": packed(1)}, id="fewer digests than keys"),
        pytest.param({"places": packed(1)}, id="fewer places than keys"),
        pytest.param({"places": packed(1, 2, 3)}, id="more places than keys"),
        pytest.param({"serials": packed(1)}, id="fewer serials than keys"),
        pytest.param({"keys": "a"}, id="fewer keys than the rest"),
        pytest.param({"keys": "abc"}, id="more keys than the rest"),
        pytest.param({"places": -1}, id="a negative place"),
        pytest.param({"places": BIG}, id="a place beyond any file"),
        pytest.param({"places": None}, id="no places"),
        pytest.param({"places": 0.0}, id="a place that is a float"),
        pytest.param({"serials": None}, id="no serials"),
    ],
)
def test_a_block_of_a_pack_whose_columns_do_not_fit_is_refused(columns):
    fitting = {"keys": "ab", "lengths": packed(1, 1), "digests": packed(2, 2)}
    assert only_block(payload(block(files=".pack-1", **fitting))).pack == ".pack-1"
    with pytest.raises(FrameError):
        decode(payload(block(files=".pack-1", **fitting | columns)))


@pytest.mark.parametrize(
    "name",
    ["", "f", "pack-1", ".pack-", ".pack-0", ".pack-01", ".pack-x", "a/.pack-1", ".pack-1\n"],
    ids=repr,
)
def test_values_may_lie_in_one_file_only_if_it_is_a_pack(name):
    with pytest.raises(FrameError, match="a pack"):
        decode(payload(block(files=name)))


def test_a_value_in_a_pack_takes_a_byte_at_least():
    with pytest.raises(FrameError, match="no bytes"):
        decode(encode(put_in_pack(("x", 0, 0, 5, 0), ("y", 1, 5, 0, 0))))


@pytest.mark.parametrize("files", [(), ".pack-1"], ids=repr)
def test_a_block_without_keys_is_refused(files):
    nothing = {"lengths": packed(), "digests": packed()}
    with pytest.raises(FrameError):
        decode(payload(block(NO_KEYS, files, **nothing)))


def nested(depth, key=()):
    for _ in range(depth):
        key = (key,)
    return key


def test_plain_keys_are_nested_a_hundred_deep_at_most():
    deep = nested(90)
    assert is_plain(nested(100))
    assert not is_plain(nested(101))
    assert not is_plain((nested(101), ()))
    assert is_plain((deep, nested(9, deep)))
    assert not is_plain((deep, nested(50, deep)))
