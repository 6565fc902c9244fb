"""What the frames add up to: keys, entries, order, and changes that are not committed yet."""

import dataclasses
import datetime as dt
import logging
import pickle
import random
import sys
import types
from array import array
from collections import Counter
from itertools import count

import pytest

import chest.ledger
from chest.aliases import UNSAVED
from chest.columns import Entry, FrameError, Puts, decode, encode
from chest.frames import log_size
from chest.ledger import Ledger

PICKLE = ("pickle", None)
P1, P2, P3 = ".pack-1", ".pack-2", ".pack-3"
DIGEST = 0x8765_4321_8765_4321  # they take eight bytes


class Log:
    """A log of frames in memory, that ledgers commit to."""

    def __init__(self):
        self.payloads = []
        self.sizes = {}  # of the packs that are there
        self._names = count()

    def open(self, trusted=True):
        """Replay everything, as opening the chest does, and look at the order, as its user does."""
        ledger = Ledger(trusted)
        for payload in self.payloads:
            ledger.apply(payload)
        ledger.inherit(Ledger(trusted))
        ledger.sort()
        ledger.check()
        return ledger

    def entry(self, digest=DIGEST):
        """An entry with a file of its own."""
        return Entry(f"f{next(self._names)}", 0, 10, digest)

    def packed(self, keys, name=P1, *, length=10, digest=DIGEST):
        """Put values at the end of a pack."""
        keys, start = [*keys], self.sizes.get(name, 0)
        places = [start + n * length for n in range(len(keys))]
        self.sizes[name] = start + len(keys) * length
        return Puts(keys, name, places, [length] * len(keys), [digest] * len(keys))

    def commit(self, ledger, puts=(), *packed, digest=DIGEST, left=(), serializer=PICKLE):
        """Commit values for keys, and whatever deletion is pending; return the payloads."""
        ledger.obsolete = [*left]  # all others of the last commit's files have been removed
        own = [Puts.of({key: self.entry(digest) for key in puts})] if puts else []
        blocks = [*own, *packed]
        for block in blocks:
            for key in block.keys:
                if key not in ledger.rows:
                    ledger.add(key)
        payloads, names = ledger.encode(blocks, serializer)
        ledger.committed(blocks, serializer, payloads, names)
        ledger.check()
        self.payloads += payloads
        return payloads

    def change(self, ledger, steps):
        """Commit what is said: "delete a", "clear", "file ab" or "pack ab 1", several with commas.

        Return the payloads.
        """
        files, packed = "", []
        for step in steps.split(", "):
            match step.split():
                case ["delete", key]:
                    ledger.delete(key)
                case ["clear"]:
                    ledger.clear()
                case ["file", keys]:
                    files += keys
                case ["pack", keys, number]:
                    packed.append(self.packed(keys, f".pack-{number}"))
        return self.commit(ledger, files, *packed)


@pytest.fixture
def log():
    return Log()


def entries(ledger):
    return {key: ledger.entry(row) for key, row in ledger.stored()}


def obsolete(ledger):
    return {entry.file for entry in ledger.obsolete}


def apply(ledger, payloads):
    for payload in payloads:
        ledger.apply(payload)
    ledger.check()


@pytest.fixture
def vanishing():
    """A class for keys, in a module that can go away."""
    module = types.ModuleType("vanishing")

    @dataclasses.dataclass(frozen=True)
    class Place:
        x: int
        y: int

    Place.__module__, Place.__qualname__ = "vanishing", "Place"
    module.Place = Place
    sys.modules["vanishing"] = module
    yield Place
    sys.modules.pop("vanishing", None)


# -- replay ---------------------------------------------------------------------------------------


def test_a_new_key_is_unsaved_until_a_commit_holds_it(log):
    ledger = Ledger(trusted=True)
    ledger.add("x")
    assert (ledger.rows, [*ledger.stored()]) == ({"x": UNSAVED}, [])
    log.commit(ledger, ["x"], digest=7)
    assert entries(ledger) == {"x": Entry("f0", 0, 10, 7)}
    assert ledger.digest("x") == 7


def test_what_was_committed_is_there_after_a_replay(log):
    ledger = log.open()
    log.commit(ledger, ["x", ("a", 1), 2.5])
    log.commit(ledger, ["x"])
    ledger.delete(2.5)
    log.commit(ledger, [None])
    assert entries(log.open()) == entries(ledger)
    assert [*log.open().rows] == [*ledger.rows] == ["x", ("a", 1), None]


def test_keys_that_need_a_class_are_there_after_a_replay(log):
    day = dt.date(2026, 1, 1)
    ledger = log.open()
    log.commit(ledger, [day, "x", (day, 1)])
    assert entries(log.open()) == entries(ledger)
    ledger.delete(day)
    log.commit(ledger)
    assert [*log.open().rows] == ["x", (day, 1)]


def test_each_serializer_that_wrote_is_known(log):
    wrote = {"a.dump": True, "b.dump": None}
    log.payloads = [encode([], serializer=serializer) for serializer in wrote.items()]
    assert log.open().serializers == wrote


def test_values_that_lie_in_one_file_have_their_places(log):
    block = ((["a", "b"], []), 0, P1, 100, ("I", b"\5\0\0\0\6\0\0\0"), ("Q", bytes(16)))
    log.payloads = [pickle.dumps((True, False, None, [], ([], []), [block]), 5)]
    assert entries(log.open()) == {"a": Entry(P1, 100, 5, 0), "b": Entry(P1, 105, 6, 0)}
    log.payloads = log.open().snapshot()
    assert entries(log.open()) == {"a": Entry(P1, 100, 5, 0), "b": Entry(P1, 105, 6, 0)}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param((True, False, 5, [], ([], []), []), id="a serializer that is a number"),
        pytest.param((True, False, None, 5, ([], []), []), id="obsolete files that are a number"),
        pytest.param((True, False, None, [], ([[]], []), []), id="a deleted key without hash"),
        pytest.param((True, False, None, [], ([], [5]), []), id="a pickle that is a number"),
        pytest.param(
            (True, False, None, [], ([], []), [(([[]], []), 0, ["f"], 0, *[("Q", bytes(8))] * 2)]),
            id="a key without hash",
        ),
        pytest.param(
            (
                *(True, False, PICKLE, [(P2, 0, 0, 0)], ([], [])),
                [(([7], []), 0, pack, 0, *[("Q", bytes(8))] * 2) for pack in (P1, "no pack")],
            ),
            id="a good block and one in a file that is no pack",
        ),
    ],
)
def test_a_frame_of_the_wrong_types_is_refused_as_a_whole(content):
    ledger = Ledger(trusted=True)
    with pytest.raises(FrameError):
        ledger.apply(pickle.dumps(content, 5))
    assert (ledger.rows, ledger.packs, ledger.serializers) == ({}, {}, {})


# -- order ----------------------------------------------------------------------------------------


def test_keys_keep_the_order_in_which_they_were_set_however_they_left_memory(log):
    ledger = log.open()
    for key in "abcde":
        ledger.add(key)
    for batch in (["d", "b"], ["e"], ["a", "c"]):
        log.commit(ledger, batch)
    assert [*ledger.rows] == [*log.open().rows] == [*"abcde"]


def test_a_key_that_is_replaced_keeps_its_place(log):
    ledger = log.open()
    log.commit(ledger, "abc")
    log.commit(ledger, "b")
    assert [*ledger.rows] == [*log.open().rows] == [*"abc"]


def test_a_key_that_was_deleted_and_set_again_goes_to_the_end(log):
    ledger = log.open()
    log.commit(ledger, "abc")
    ledger.delete("a")
    log.commit(ledger, "a")
    assert [*ledger.rows] == [*log.open().rows] == [*"bca"]


def test_keys_set_after_a_reopening_come_after_the_others(log):
    log.commit(log.open(), "ab")
    ledger = log.open()
    ledger.add("c")
    log.commit(ledger, "da")
    log.commit(ledger, "c")
    assert [*log.open().rows] == [*"abcd"]


def test_plain_and_pickled_keys_keep_their_common_order(log):
    keys = [dt.date(2026, 1, 1), "a", dt.date(2026, 1, 2), 1, (dt.date(2026, 1, 3),)]
    log.commit(log.open(), keys)
    assert [*log.open().rows] == keys


def test_order_survives_a_snapshot(log):
    ledger = log.open()
    for key in "abcd":
        ledger.add(key)
    log.commit(ledger, "dca")
    log.commit(ledger, "b")
    ledger.delete("a")
    log.commit(ledger, "ea")
    log.payloads = ledger.snapshot()
    assert [*log.open().rows] == [*ledger.rows] == [*"bcdea"]


# -- deletions ------------------------------------------------------------------------------------


def test_a_deletion_is_pending_until_a_commit_tells_it(log):
    ledger = log.open()
    log.commit(ledger, "ab")
    ledger.delete("a")
    assert ledger.pending
    assert [*log.open().rows] == ["a", "b"]
    assert ledger.files() == {"f0", "f1"}, "until then its file is no stray"
    log.commit(ledger)
    assert not ledger.pending
    assert [*log.open().rows] == ["b"]
    assert ledger.files() == log.open().files() == {"f1"}


def test_deleting_a_key_that_no_commit_holds_is_nothing_to_tell():
    ledger = Ledger(trusted=True)
    ledger.add("a")
    ledger.delete("a")
    assert not ledger.pending
    assert ledger.rows == {}


def test_a_cleared_chest_is_told_in_one_word(log):
    ledger = log.open()
    log.commit(ledger, range(1000))
    ledger.clear()
    assert ledger.rows == {}
    (payload,) = log.commit(ledger)
    assert len(payload) < 100
    assert log.open().rows == {}


def test_clearing_an_empty_chest_is_nothing_to_tell():
    ledger = Ledger(trusted=True)
    ledger.clear()
    assert not ledger.pending


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ("delete a, clear", []),
        ("clear, set a", ["a"]),
        ("clear, set d", ["d"]),
        ("delete a, clear, set a", ["a"]),
        ("clear, set a, clear", []),
        ("clear, set a, commit, clear, set b", ["b"]),
        ("clear, set a, clear, set b", ["b"]),
        ("set d, delete a, clear, set d, set a, delete d", ["a"]),
    ],
)
def test_deletions_add_up_in_any_order(log, steps, left):
    ledger = log.open()
    log.commit(ledger, "abc")
    for step in steps.split(", "):
        action, _, key = step.partition(" ")
        if action == "set":
            ledger.add(key)
        elif action == "delete":
            ledger.delete(key)
        elif action == "clear":
            ledger.clear()
        else:
            log.commit(ledger, [key for key, row in ledger.rows.items() if row < 0])
    log.commit(ledger, [key for key, row in ledger.rows.items() if row < 0])
    assert [*ledger.rows] == [*log.open().rows] == left
    assert entries(log.open()) == entries(ledger)


# -- files ----------------------------------------------------------------------------------------


def test_the_files_of_replaced_and_deleted_values_are_obsolete_after_the_commit(log):
    ledger = log.open()
    log.commit(ledger, "abc")
    ledger.delete("a")
    log.commit(ledger, "b")
    assert obsolete(ledger) == {"f0", "f1"}
    assert obsolete(log.open()) == {"f0", "f1"}, "whoever opens it knows what a crash left"


def test_obsolete_files_are_those_of_the_last_commit_and_those_it_was_left(log):
    ledger = log.open()
    log.commit(ledger, "ab")
    log.commit(ledger, "a")
    log.commit(ledger, "b")
    assert obsolete(ledger) == obsolete(log.open()) == {"f1"}
    left = Entry("f0", 0, 10, 1)
    log.payloads.append(encode([], first=True, left=[left]))
    assert log.open().obsolete == [left]


def test_every_file_of_a_cleared_chest_is_obsolete(log):
    ledger = log.open()
    log.commit(ledger, "ab")
    ledger.clear()
    log.commit(ledger, "a")
    assert obsolete(ledger) == obsolete(log.open()) == {"f0", "f1"}
    assert ledger.files() == {"f2"}


def test_a_file_that_a_key_has_is_not_obsolete_when_its_frame_is_read_twice(log):
    ledger = log.open()
    payloads = log.commit(ledger, "ab")
    for payload in payloads:
        ledger.apply(payload)
    assert not obsolete(ledger) & ledger.files()


def test_a_commit_of_many_keys_is_several_frames_that_begin_with_the_first(log, monkeypatch):
    monkeypatch.setattr(chest.ledger, "FRAME_KEYS", 3)
    ledger = log.open()
    assert len(log.commit(ledger, range(10))) == 4
    ledger.delete(9)
    payloads = log.commit(ledger, range(8))
    assert [decode(payload).first for payload in payloads] == [True, False, False]
    assert obsolete(log.open()) == {f"f{n}" for n in (*range(8), 9)}
    assert entries(log.open()) == entries(ledger)
    log.payloads = ledger.snapshot()
    assert entries(log.open()) == entries(ledger)
    assert obsolete(log.open()) == obsolete(ledger)


@pytest.mark.parametrize(
    ("sizes", "frames"),
    [
        ((3,), [[3]]),
        ((10,), [[3], [3], [3], [1]]),
        ((1, 2), [[1, 2]]),
        ((1, 1, 1, 1), [[1, 1, 1], [1]]),
        ((2, 2), [[2], [2]]),
        ((4, 2), [[3], [1, 2]]),
        ((2, 4), [[2], [3], [1]]),
        ((0, 2), [[2]]),
    ],
    ids=str,
)
def test_blocks_are_cut_so_that_no_frame_holds_too_many_keys(log, monkeypatch, sizes, frames):
    monkeypatch.setattr(chest.ledger, "FRAME_KEYS", 3)
    ledger, keys = log.open(), count()
    blocks = [log.packed([next(keys) for _ in range(size)]) for size in sizes]
    payloads = log.commit(ledger, (), *blocks)
    assert [[len(b.files) for b in decode(payload).blocks] for payload in payloads] == frames
    assert entries(log.open()) == entries(ledger)
    assert [*log.open().rows] == [*range(sum(sizes))]
    log.payloads = ledger.snapshot()
    assert entries(log.open()) == entries(ledger)


def test_a_frame_holds_4096_keys_at_most(log):
    payloads = log.commit(log.open(), (), log.packed(range(4096 + 1)))
    assert [[len(b.files) for b in decode(p).blocks] for p in payloads] == [[4096], [1]]


def test_what_goes_on_with_a_commit_does_not_begin_one():
    ledger = Ledger(trusted=True)
    ledger.add("x")
    ledger.obsolete, ledger.packs = [Entry("f", 0, 1, 1)], {P1: 0}
    puts = Puts.of({"x": Entry("x", 0, 1, 1)})
    for first, left in [(True, [*ledger.obsolete, Entry(P1, 0, 0, 0)]), (False, [])]:
        (payload,), _ = ledger.encode([puts], PICKLE, first=first)
        assert (decode(payload).first, decode(payload).left) == (first, left)


def test_names_with_capitals_are_known_by_their_lower_case_as_long_as_they_are_used(log):
    ledger = Ledger(trusted=True)
    puts = Puts.of({"k": Entry("_A/Abc", 0, 1, 1), "l": Entry("x", 0, 1, 1)})
    ledger.apply(encode([([0, 1], puts)]))
    assert {"_a", "_a/abc"} == ledger.folded
    ledger.apply(encode([], first=True, deleted=["k", "l"]))
    assert "_a/abc" not in ledger.folded


# -- packs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "packs", "retired"),
    [
        ("pack d 1", {P1: 40}, 0),
        ("file d", {P1: 30}, 0),
        ("file a", {P1: 20}, 10),
        ("pack a 1", {P1: 30}, 10),
        ("pack a 2", {P1: 20, P2: 10}, 10),
        ("file b, pack a 2, pack c 3", {P1: 0, P2: 10, P3: 10}, 30),
        ("delete a", {P1: 20}, 10),
        ("delete a, file a", {P1: 20}, 10),
        ("delete a, pack a 1", {P1: 30}, 10),
        ("delete a, pack b 1", {P1: 20}, 20),
        ("clear", {P1: 0}, 30),
        ("clear, file a", {P1: 0}, 30),
        ("clear, pack a 1", {P1: 10}, 30),
        ("delete a, clear, pack ad 2", {P1: 0, P2: 20}, 30),
    ],
)
def test_a_pack_has_the_bytes_of_its_living_values(log, steps, packs, retired):
    here, there = log.open(), log.open()
    apply(here, log.change(there, "pack abc 1"))
    apply(here, log.change(there, steps))
    for ledger in (here, there, log.open()):
        assert (ledger.packs, ledger.retired) == (packs, retired)


pending = pytest.mark.parametrize(
    "delete",
    [pytest.param(lambda ledger: ledger.delete("a"), id="delete"), Ledger.clear],
)


@pending
def test_a_packed_value_lives_until_a_commit_tells_that_it_was_deleted(log, delete):
    ledger = log.open()
    log.change(ledger, "pack a 1")
    delete(ledger)
    assert (ledger.packs, ledger.retired, ledger.dead_packs()) == ({P1: 10}, 0, [])
    ledger.revert()
    assert (ledger.packs, ledger.retired, ledger.dead_packs()) == ({P1: 10}, 0, [])
    delete(ledger)
    log.commit(ledger)
    assert (ledger.packs, ledger.retired, ledger.dead_packs()) == ({P1: 0}, 10, [P1])


elsewhere = pytest.mark.parametrize(
    ("steps", "packs"),
    [
        ("file a", {P1: 10}),
        ("pack a 1", {P1: 20}),
        ("pack a 2", {P1: 10, P2: 10}),
        ("delete a", {P1: 10}),
        ("clear", {P1: 0}),
        ("clear, pack a 2", {P1: 0, P2: 10}),
        ("file c", {P1: 20}),
    ],
)


@pending
@elsewhere
def test_what_others_do_to_a_value_that_is_deleted_here_is_counted_once(log, delete, steps, packs):
    here, there = log.open(), log.open()
    apply(here, log.change(there, "pack ab 1"))
    delete(here)
    apply(here, log.change(there, steps))
    assert here.packs == there.packs == packs
    apply(there, log.commit(here))
    assert here.packs == there.packs == log.open().packs
    assert here.retired == there.retired == log.open().retired


@pending
@elsewhere
def test_a_new_index_has_the_same_bytes_whatever_is_deleted_here(log, delete, steps, packs):
    here, there = log.open(), log.open()
    apply(here, log.change(there, "pack ab 1"))
    delete(here)
    log.change(there, steps)
    log.payloads = there.snapshot()
    anew = log.open()
    anew.inherit(here)
    assert (anew.packs, anew.retired) == (packs, 0)
    apply(there, log.commit(anew))
    assert anew.packs == there.packs == log.open().packs


def test_values_that_die_in_a_pack_make_no_file_obsolete(log):
    ledger = log.open()
    log.change(ledger, "pack abcd 1, file e")
    log.change(ledger, "delete a, file b, pack c 1, pack de 2")
    assert obsolete(ledger) == obsolete(log.open()) == {"f0"}
    ledger.clear()
    log.commit(ledger)
    assert obsolete(ledger) == obsolete(log.open()) == {"f1"}


def test_a_pack_is_dead_when_the_committed_state_needs_nothing_of_it(log):
    ledger = log.open()
    log.change(ledger, "pack ab 1, pack c 2, pack d 3")
    log.change(ledger, "delete a, delete c, pack d 1")
    assert sorted(ledger.dead_packs()) == sorted(log.open().dead_packs()) == [P2, P3]
    assert ledger.files() == {P1}


def test_a_dead_pack_that_could_not_be_removed_stays_known(log):
    here, there = log.open(), log.open()
    for steps in ("pack a 1", "file a", "file b", "pack b 2"):
        apply(here, log.change(there, steps))
    assert here.packs == there.packs == log.open().packs == {P1: 0, P2: 10}
    log.payloads = there.snapshot()
    assert log.open().packs == {P1: 0, P2: 10}


def test_a_dead_pack_that_was_removed_is_forgotten_with_the_next_commit(log):
    here, there = log.open(), log.open()
    for steps in ("pack a 1, pack b 2", "file a", "file b"):
        apply(here, log.change(there, steps))
    del there.packs[P1]
    apply(here, log.change(there, "file c"))
    assert here.packs == log.open().packs == {P2: 0}


def test_a_pack_may_have_the_name_of_one_that_was_removed(log):
    here, there = log.open(), log.open()
    for steps in ("pack ab 1", "file ab"):
        apply(here, log.change(there, steps))
    del there.packs[P1]
    apply(here, log.change(there, "pack b 1"))
    assert here.packs == there.packs == log.open().packs == {P1: 10}


def test_a_key_knows_whether_its_stored_value_is_packed(log):
    ledger = log.open()
    log.change(ledger, "pack ab 1, file c")
    log.change(ledger, "file b, pack d 2")
    ledger.add("e")
    assert [*filter(ledger.is_packed, "abcdef")] == ["a", "d"]


def test_the_keys_whose_values_lie_in_some_packs_can_be_told(log):
    ledger = log.open()
    log.change(ledger, "pack abc 1, pack de 2, pack f 3, file g")
    log.change(ledger, "pack b 2, file c")
    ledger.delete("d")
    ledger.add("h")
    assert ledger.packed_in({P1}) == [("a", ledger.rows["a"])]
    assert ledger.packed_in([P2, P3]) == [(key, ledger.rows[key]) for key in "bef"]
    assert ledger.packed_in([]) == []


def test_where_a_value_lies_is_its_entry_as_a_plain_tuple(log):
    ledger = log.open()
    log.commit(ledger, "a", log.packed("bc", length=7, digest=5), digest=6)
    rows = ledger.rows.values()
    assert [*map(ledger.where, rows)] == [("f0", 0, 10, 6), (P1, 0, 7, 5), (P1, 7, 7, 5)]
    assert [*map(ledger.where, rows)] == [*map(ledger.entry, rows)]
    assert {type(ledger.where(row)) for row in rows} == {tuple}


@pytest.fixture
def spread(log):
    """A ledger whose rows 0 to 2 lie in a pack, 3 in a file, 4 in another pack, and 5, 6 and 7
    in the first pack again, with a gap before the last.
    """
    ledger = log.open()
    first = Puts([*"abc"], P1, [100, 105, 111], [5, 6, 7], [1, 2, 3])
    second = Puts([*"fgh"], P1, [118, 119, 122], [1, 2, 4], [6, 7, 8])
    log.commit(ledger, (), first)
    log.commit(ledger, "d", Puts(["e"], P2, [113], [5], [5]), second)
    return ledger


@pytest.mark.parametrize(
    ("rows", "place", "lengths", "digests"),
    [
        (range(3), 100, [5, 6, 7], [1, 2, 3]),
        (range(1, 3), 105, [6, 7], [2, 3]),
        (range(2, 3), 111, [7], [3]),
        (range(5, 7), 118, [1, 2], [6, 7]),
        (range(7, 8), 122, [4], [8]),
    ],
    ids=str,
)
def test_rows_whose_values_lie_end_to_end_in_a_pack_span_it(spread, rows, place, lengths, digests):
    assert spread.span(rows) == (P1, place, array("Q", lengths), array("Q", digests))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(range(3, 4), id="a file"),
        pytest.param(range(2, 4), id="from a pack to a file"),
        pytest.param(range(3, 5), id="from a file to a pack"),
        pytest.param(range(4, 6), id="two packs"),
        pytest.param(range(6), id="others in between"),
        pytest.param(range(6, 8), id="a gap"),
    ],
)
def test_rows_whose_values_lie_anywhere_span_nothing(spread, rows):
    assert spread.span(rows) is None


def test_keys_that_look_alike_need_no_other_table(log):
    here, there = log.open(), log.open()
    here.add("a")
    rows = here.rows
    apply(here, log.commit(there, "ab"))
    assert here.rows is rows
    assert entries(here) == entries(there)


def test_values_that_were_only_moved_did_not_change(log):
    here, there = log.open(), log.open()
    apply(here, log.commit(there, "ab", log.packed("cd", digest=5), digest=5))
    moved = log.packed("ac", P2, digest=5), log.packed("bd", P2, digest=6)
    apply(here, log.commit(there, (), *moved))
    assert here.changed == {"b": 5, "d": 5}


# -- snapshots ------------------------------------------------------------------------------------


def test_a_snapshot_holds_the_committed_state_and_nothing_of_the_past(log):
    ledger = log.open()
    for n in range(50):
        log.commit(ledger, ["a", "b"], digest=n)
    ledger.delete("b")
    log.commit(ledger, ["c"])
    before = log_size(log.payloads)
    log.payloads = ledger.snapshot()
    snapshot = log.open()
    assert entries(snapshot) == entries(ledger)
    assert log_size(log.payloads) < before / 20
    assert snapshot.serializers == {"pickle": None}
    assert snapshot.obsolete == ledger.obsolete


def deal(log, ledger, chance):
    """Put keys, new and old ones, and delete others, all of one length; return the payloads."""
    some = [f"{chance.randrange(2000):04}" for _ in range(chance.choice([1, 50, 300]))]
    for key in ledger.rows.keys() & some[::3]:
        ledger.delete(key)
    if chance.random() < 0.02:
        ledger.clear()
    put = dict.fromkeys(key for n, key in enumerate(some) if n % 3 or chance.random() < 0.3)
    return log.commit(ledger, (), *[log.packed(put, chance.choice([P1, P2]))] if put else ())


@pytest.mark.parametrize("seed", range(4))
def test_everybody_knows_about_how_many_bytes_of_the_log_are_needed(log, seed):
    chance = random.Random(seed)
    ledger, other = log.open(), log.open()
    for _ in range(200):
        for payload in deal(log, ledger, chance):
            other.apply(payload)
        assert other.needed == ledger.needed
        assert_bounds(ledger)
    assert log.open().needed == ledger.needed


def assert_bounds(ledger):
    """What is needed is known to be at least so much, sooner or later, and is never less."""
    assert ledger.needed <= ledger.least() <= log_size(ledger.snapshot())


def is_about_right(ledger):
    assert_bounds(ledger)
    return 0.6 * ledger.least() - 500 < ledger.needed


def test_what_only_grows_is_needed_as_a_whole(log):
    ledger, other = log.open(), log.open()
    for n in range(50):
        keys = [f"{n:04} of many {m:04}" for m in range(100)]
        apply(other, log.commit(ledger, (), log.packed(keys)))
    assert is_about_right(ledger)
    assert other.needed == ledger.needed


def test_the_names_of_deleted_files_are_needed_no_more(log):
    ledger, other = log.open(), log.open()
    keys = range(300)
    log.commit(ledger, (), log.packed(range(1000, 4000)))
    named = Puts.of({key: Entry(f"{key:0200}", 0, 10, 1) for key in keys})
    log.commit(ledger, (), named)
    before = ledger.needed
    for key in [*keys][::2]:
        ledger.delete(key)
    log.commit(ledger)
    log.commit(ledger, (), log.packed([*keys][1::2]))
    assert ledger.needed < before - 200 * len(keys)
    apply(other, log.payloads)
    ledger.obsolete, other.obsolete = [], []  # the files have been removed
    assert is_about_right(ledger)
    assert is_about_right(other)


def test_keys_that_are_deleted_here_as_others_set_them_again_are_counted_once(log):
    ledger, other = log.open(), log.open()
    log.commit(ledger, (), log.packed(range(300)))
    apply(other, log.payloads)
    for _ in range(5):
        for key in [*other.rows]:
            other.delete(key)
        apply(other, log.commit(ledger, (), log.packed(range(300))))
    assert is_about_right(ledger)
    assert is_about_right(other)


def test_what_keys_share_is_not_needed_for_each(log):
    ledger, other = log.open(), log.open()
    text = "x" * 300
    for n in range(50):
        apply(other, log.commit(ledger, (), log.packed([(text, n)])))
    assert other.needed == ledger.needed < 50 * 30
    assert_bounds(ledger)
    assert_bounds(other)
    assert ledger.least() < 50 * 30 < 50 * 300 < other.least()  # which has a text for each


def test_what_of_all_is_needed_least_counts_the_names_of_files_and_what_is_unreadable(log):
    ledger, other = log.open(), Ledger(trusted=False)
    days = [dt.date(2000, 1, 1) + dt.timedelta(n) for n in range(100)]
    log.commit(ledger, (), Puts.of({f"{n}": Entry(f"{n:0200}", 0, 10, DIGEST) for n in range(100)}))
    log.commit(ledger, (), log.packed(days))
    apply(other, log.payloads)
    assert len(other.unreadable) == 100
    for one in (ledger, other):
        assert 0.9 * log_size(one.snapshot()) < one.least() <= log_size(one.snapshot())


@pytest.mark.parametrize("beside", ["files left", "a long name", "blocks", "columns"])
def test_what_stands_beside_the_records_is_not_needed(log, beside):
    ledger, other = log.open(), log.open()
    left = [Entry("x" * 500, 0, 10, DIGEST)] if beside == "files left" else []
    serializer = ("long" * 100, None) if beside == "a long name" else PICKLE
    for n in range(20):
        keys = [f"{n:02} {m:0100}" for m in range(40)]
        if beside == "blocks":
            puts = [log.packed([key]) for key in keys]
        elif beside == "columns":
            for key in keys:
                ledger.add(key)
            puts = [log.packed(keys).pick(random.Random(n).sample(range(40), 40))]
        else:
            puts = [log.packed(keys)]
        apply(other, log.commit(ledger, (), *puts, left=left, serializer=serializer))
    assert other.needed == ledger.needed > 0
    assert_bounds(ledger)
    assert_bounds(other)


def test_what_nobody_could_read_here_is_counted_once_when_it_is_set_again(log, vanishing):
    keys = [vanishing(x, 0) for x in range(300)]
    log.commit(log.open(), (), log.packed(keys))
    module = sys.modules.pop("vanishing")
    ledger = log.open()
    assert len(ledger.unreadable) == 300
    sys.modules["vanishing"] = module
    log.commit(ledger, (), log.packed(keys))
    assert not ledger.unreadable
    assert_bounds(ledger)


def test_keys_that_need_a_class_are_needed_no_more_when_they_are_deleted(log):
    ledger, other = log.open(), log.open()
    days = [dt.date(2000, 1, 1) + dt.timedelta(n) for n in range(600)]
    apply(other, log.commit(ledger, (), log.packed(days)))
    assert is_about_right(ledger)
    assert is_about_right(other)
    for some in (days[:200], days[200:400], days[400:]):
        for day in some:
            ledger.delete(day)
        before = ledger.needed
        apply(other, log.commit(ledger))
        assert other.needed == ledger.needed <= max(before - 50 * len(some), 0)
        assert_bounds(ledger)


def test_keys_that_nobody_can_read_here_are_counted_once(log):
    ledger, other = log.open(), Ledger(trusted=False)
    days = [dt.date(2000, 1, 1) + dt.timedelta(n) for n in range(300)]
    for _ in range(5):
        log.commit(ledger, (), log.packed(days))
    apply(other, log.payloads)
    assert len(other.unreadable) == 300
    assert is_about_right(other)


def test_a_snapshot_tells_nothing_that_is_pending(log):
    ledger = log.open()
    log.commit(ledger, "abc")
    committed = entries(ledger)
    ledger.delete("a")
    ledger.clear()
    ledger.add("d")
    log.payloads = ledger.snapshot()
    assert entries(log.open()) == committed


def test_a_snapshot_tells_obsolete_files_and_dead_packs_apart(log):
    ledger = log.open()
    log.change(ledger, "pack ab 1, file c")
    log.change(ledger, "file a, pack bc 2")
    log.payloads = ledger.snapshot()
    snapshot = log.open()
    assert obsolete(snapshot) == {"f0"}
    assert (snapshot.packs, snapshot.dead_packs()) == ({P1: 0, P2: 20}, [P1])
    assert snapshot.retired == 0


def test_a_snapshot_has_a_block_for_each_pack_with_its_values_as_they_lie(log):
    ledger = log.open()
    for key in "abcdefg":
        ledger.add(key)
    log.change(ledger, "pack gb 2, pack fae 1, file c")
    log.change(ledger, "pack d 2, delete a")
    log.payloads = ledger.snapshot()
    blocks = [block for payload in log.payloads for block in decode(payload).blocks]
    assert [(block.pack, [*block.places], block.keys.plain) for block in blocks] == [
        (None, [0], ["c"]),
        (P1, [0, 20], ["f", "e"]),
        (P2, [0, 10, 20], ["g", "b", "d"]),
    ]
    assert entries(log.open()) == entries(ledger)
    assert [*log.open().rows] == [*"bcdefg"]


# -- keys that cannot be read ---------------------------------------------------------------------


def test_a_key_whose_class_has_gone_hides_no_other_and_comes_back_with_it(log, vanishing, caplog):
    ledger = log.open()
    log.commit(ledger, ["a", vanishing(1, 2), "b", vanishing(3, 4)])
    complete = entries(ledger)
    module = sys.modules.pop("vanishing")
    with caplog.at_level(logging.WARNING, "chest"):
        without = log.open()
    assert [*without.rows] == ["a", "b"]
    assert len(without.unreadable) == 2
    assert "vanishing" in caplog.text
    assert without.files() == {"f0", "f1", "f2", "f3"}, "their files are no strays"
    without.delete("b")
    log.commit(without, ["c"])
    assert not {"f1", "f3"} & obsolete(without)
    sys.modules["vanishing"] = module
    assert [*log.open().rows] == ["a", vanishing(1, 2), vanishing(3, 4), "c"]
    del complete["b"]
    assert entries(log.open()).items() > complete.items()


def test_a_key_that_cannot_be_read_may_be_replaced_and_deleted_by_others(log, vanishing):
    ledger = log.open()
    log.commit(ledger, [vanishing(1, 2), vanishing(3, 4)])
    module = sys.modules.pop("vanishing")
    without = log.open()
    sys.modules["vanishing"] = module
    ledger.delete(vanishing(3, 4))
    payloads = log.commit(ledger, [vanishing(1, 2)])
    del sys.modules["vanishing"]
    for payload in payloads:
        without.apply(payload)
    assert [*without.unreadable.values()] == [2]
    assert without.files() == {"f2"}
    assert obsolete(without) == {"f0", "f1"}


def test_clearing_a_chest_removes_the_keys_that_cannot_be_read_too(log, vanishing):
    log.commit(log.open(), ["a", vanishing(1, 2)])
    module = sys.modules.pop("vanishing")
    without = log.open()
    without.clear()
    log.commit(without)
    assert obsolete(without) == {"f0", "f1"}
    assert without.files() == set()
    sys.modules["vanishing"] = module
    assert log.open().rows == {}


def test_clearing_a_chest_of_which_no_key_can_be_read_is_something_to_tell(log, vanishing):
    log.commit(log.open(), [vanishing(1, 2)])
    del sys.modules["vanishing"]
    without = log.open()
    without.clear()
    assert without.pending


def test_a_key_that_cannot_be_read_keeps_its_pack_alive(log, vanishing):
    ledger = log.open()
    log.commit(ledger, (), log.packed([vanishing(1, 2), "a"]), log.packed([vanishing(3, 4)], P2))
    module = sys.modules.pop("vanishing")
    without = log.open()
    log.change(without, "delete a")
    assert without.packs == {P1: 10, P2: 10}
    assert without.dead_packs() == []
    sys.modules["vanishing"] = module
    apply(ledger, log.payloads[-1:])
    ledger.delete(vanishing(3, 4))
    payloads = log.commit(ledger, (), log.packed([vanishing(1, 2)], P3))
    del sys.modules["vanishing"]
    apply(without, payloads)
    assert without.packs == {P1: 0, P2: 0, P3: 10}
    assert without.retired == 30
    without.clear()
    log.commit(without)
    assert without.packs[P3] == log.open().packs[P3] == 0


def test_a_key_whose_hash_fails_hides_no_other(log, vanishing):
    log.commit(log.open(), ["a", vanishing(1, 2)])
    vanishing.__hash__ = None
    assert [*log.open().rows] == ["a"]


def test_pickled_keys_stay_closed_where_pickle_is_not_trusted(log, tmp_path, caplog):
    target = tmp_path / "ran"
    hostile = pickle.dumps(Hostile(str(target)), 5)
    numbers = ("Q", bytes(16))
    block = ((["a"], [hostile]), 0, ["a", "b"], 0, numbers, numbers)
    log.payloads = [pickle.dumps((True, False, None, [], ([], [hostile]), [block]), 5)]
    ledger = log.open(trusted=False)
    assert [*ledger.rows] == ["a"]
    assert ledger.unreadable == {hostile: 1}
    assert not target.exists()
    assert caplog.text == ""


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return __import__("os").mkdir, (self.target,)


# -- what another handle committed ----------------------------------------------------------------


def test_keys_that_others_replaced_or_deleted_are_told_with_their_old_digests(log):
    here, there = log.open(), log.open()
    for payload in log.commit(there, "abcd", digest=5):
        here.apply(payload)
    assert here.changed == {}
    there.delete("c")
    payloads = log.commit(there, "ab", digest=6)
    here.apply(payloads[0])
    assert here.changed == {"a": 5, "b": 5, "c": 5}
    assert entries(here) == entries(there)


def test_a_new_index_tells_the_same(log):
    here, there = log.open(), log.open()
    for payload in log.commit(there, "abcd", digest=5):
        here.apply(payload)
    there.delete("c")
    log.commit(there, "ab", digest=6)
    log.payloads = there.snapshot()
    anew = log.open()
    anew.inherit(here)
    assert anew.changed == {"a": 5, "b": 5, "c": 5}
    assert entries(anew) == entries(there)


def test_a_ledger_can_be_asked_while_frames_come_in(log):
    ledger = log.open()
    log.commit(ledger, "ab")
    rows, row = ledger.rows, ledger.rows["a"]
    before = ledger.entry(row)
    log.commit(ledger, "a", digest=9)
    assert ledger.entry(row) == before, "rows are only ever added"
    ledger.clear()
    assert [*rows] == ["a", "b"], "a cleared table is replaced, never emptied"


class Actor:
    """A handle, with a plain account of what it should know."""

    def __init__(self, log, rng):
        self.log = log
        self.rng = rng
        self.ledger = log.open()
        self.read, self.origin = len(log.payloads), log.origin
        self.deleted = set()
        self.dirty = {}

    def view(self):
        """The keys that this handle should have."""
        return (self.log.state.keys() - self.deleted) | self.dirty.keys()

    def catch_up(self):
        if self.origin != self.log.origin:
            anew = self.log.open()
            anew.inherit(self.ledger)
            self.ledger = anew
            self.deleted = self.deleted & self.log.state.keys() - self.dirty.keys()
        else:
            for payload in self.log.payloads[self.read :]:
                self.ledger.apply(payload)
                keys, puts = self.log.account[payload]
                self.deleted = self.deleted & keys - (self.dirty.keys() & puts)
        self.read, self.origin = len(self.log.payloads), self.log.origin
        for key in self.dirty.keys() & self.ledger.changed.keys() - self.ledger.rows.keys():
            self.ledger.add(key)
        self.ledger.changed.clear()
        self.check()
        assert not obsolete(self.ledger) & self.ledger.files()

    def check(self):
        self.ledger.check()
        assert self.ledger.rows.keys() == self.view()

    def set(self, key):
        if key not in self.ledger.rows:
            self.ledger.add(key)
        self.dirty[key] = None

    def delete(self, key):
        if key in self.ledger.rows:
            self.ledger.delete(key)
            self.dirty.pop(key, None)
            if key in self.log.state:
                self.deleted.add(key)

    def clear(self):
        self.ledger.clear()
        self.dirty = {}
        self.deleted = {*self.log.state}

    def commit(self):
        puts = self.rng.sample([*self.dirty], self.rng.randint(0, len(self.dirty)))
        (payload,) = self.write(puts)
        self.read += 1
        for key in self.deleted:
            self.log.state.pop(key, None)
        for key in puts:
            self.log.state[key] = self.ledger.entry(self.ledger.rows[key])
            del self.dirty[key]
        self.deleted = set()
        self.log.account[payload] = {*self.log.state}, {*puts}
        assert entries(self.ledger) == self.log.state
        assert entries(self.log.open()) == self.log.state

    def write(self, puts):
        return self.log.commit(self.ledger, puts)

    def compact(self):
        self.log.payloads = self.ledger.snapshot()
        self.log.origin = object()  # as another inode
        assert entries(self.log.open()) == self.log.state


class Packer(Actor):
    """One that packs some of its values, and tries to remove packs that are dead."""

    def check(self):
        super().check()
        for ledger in (self.ledger, self.log.open()):
            alive = Counter()
            for name, _, length, _ in self.log.state.values():
                alive[name] += length if name in self.log.sizes else 0
            alive = +alive
            assert {name: n for name, n in ledger.packs.items() if n} == alive
            assert {*ledger.dead_packs()} == ledger.packs.keys() - alive.keys()
            assert self.log.sizes.keys() <= ledger.packs.keys(), "a pack that nobody would remove"

    def write(self, puts):
        for name in self.ledger.dead_packs():
            if self.rng.random() < 0.7:
                del self.ledger.packs[name]
                self.log.sizes.pop(name, None)
        homes = {"": [], P1: [], P2: [], P3: []}
        for key in puts:
            homes[self.rng.choice([*homes])].append(key)
        own = homes.pop("")
        packed = [
            self.log.packed(keys, name, length=self.rng.randint(1, 99))
            for name, keys in homes.items()
            if keys
        ]
        return self.log.commit(self.ledger, own, *packed)


def play(log, kind, seed):
    """Let two handles change keys at random, and check each after all it does."""
    rng = random.Random(seed)
    log.state, log.account, log.origin = {}, {}, None
    actors = [kind(log, rng), kind(log, rng)]
    for _ in range(150):
        actor = rng.choice(actors)
        actor.catch_up()
        action = rng.choice(["set"] * 5 + ["delete"] * 3 + ["commit"] * 4 + ["clear", "compact"])
        if action in ("set", "delete"):
            for key in rng.sample("abcdefgh", rng.randint(1, 3)):
                getattr(actor, action)(key)
        else:
            getattr(actor, action)()
        actor.check()


@pytest.mark.parametrize("seed", range(8))
def test_two_handles_that_change_keys_at_random_agree_on_what_is_committed(log, seed):
    play(log, Actor, seed)


@pytest.mark.parametrize("seed", range(8))
def test_two_handles_that_pack_at_random_agree_on_what_every_pack_holds(log, seed):
    play(log, Packer, seed)


def test_keys_come_in_the_order_of_their_serials(log):
    serials = {"c": 2, "a": 0, "b": 2**40}
    puts = Puts.of({key: log.entry() for key in serials})
    log.payloads = [encode([([*serials.values()], puts)])]
    log.commit(log.open(), "d")
    assert [*log.open().rows] == [*"acbd"]
