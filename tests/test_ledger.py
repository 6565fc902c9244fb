"""What the frames add up to: keys, entries, order, and changes that are not committed yet."""

import dataclasses
import datetime as dt
import logging
import pickle
import random
import sys
import types
from itertools import count

import pytest

import chest.ledger
from chest.columns import Entry, FrameError, decode, encode
from chest.ledger import UNSAVED, Ledger

PICKLE = ("pickle", None)


class Log:
    """A log of frames in memory, that ledgers commit to."""

    def __init__(self):
        self.payloads = []
        self._names = count()

    def open(self, trusted=True):
        """Replay everything, as opening the chest does."""
        ledger = Ledger(trusted)
        for payload in self.payloads:
            ledger.apply(payload)
        ledger.inherit(Ledger(trusted))
        ledger.check()
        return ledger

    def entry(self, digest=1):
        """An entry with a file of its own."""
        return Entry(f"f{next(self._names)}", 0, 10, digest)

    def commit(self, ledger, puts=(), digest=1):
        """Commit values for keys, and whatever deletion is pending; return the payloads."""
        ledger.obsolete = []  # the files of the last commit have been removed
        for key in puts:
            if key not in ledger.rows:
                ledger.add(key)
        entries = {key: self.entry(digest) for key in puts}
        payloads = ledger.encode(entries, PICKLE)
        ledger.committed(entries, PICKLE)
        ledger.check()
        self.payloads += payloads
        return payloads


@pytest.fixture
def log():
    return Log()


def entries(ledger):
    return {key: ledger.entry(row) for key, row in ledger.stored()}


def obsolete(ledger):
    return {entry.file for entry in ledger.obsolete}


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
    block = ((["a", "b"], []), 0, "pack", 100, ("I", b"\5\0\0\0\6\0\0\0"), ("Q", bytes(16)))
    log.payloads = [pickle.dumps((True, False, None, [], ([], []), [block]), 5)]
    assert entries(log.open()) == {"a": Entry("pack", 100, 5, 0), "b": Entry("pack", 105, 6, 0)}
    log.payloads = log.open().snapshot()
    assert entries(log.open()) == {"a": Entry("pack", 100, 5, 0), "b": Entry("pack", 105, 6, 0)}


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
    ],
)
def test_a_frame_of_the_wrong_types_is_refused_as_a_whole(content):
    ledger = Ledger(trusted=True)
    with pytest.raises(FrameError):
        ledger.apply(pickle.dumps(content, 5))
    assert ledger.rows == {}


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
            log.commit(ledger, [key for key, row in ledger.rows.items() if row == UNSAVED])
    log.commit(ledger, [key for key, row in ledger.rows.items() if row == UNSAVED])
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


def test_names_with_capitals_are_known_by_their_lower_case_as_long_as_they_are_used(log):
    ledger = Ledger(trusted=True)
    ledger.apply(encode([("k", 0, Entry("_A/Abc", 0, 1, 1)), ("l", 1, Entry("x", 0, 1, 1))]))
    assert {"_a", "_a/abc"} == ledger.folded
    ledger.apply(encode([], first=True, deleted=["k", "l"]))
    assert "_a/abc" not in ledger.folded


# -- snapshots ------------------------------------------------------------------------------------


def test_a_snapshot_holds_the_committed_state_and_nothing_of_the_past(log):
    ledger = log.open()
    for n in range(50):
        log.commit(ledger, ["a", "b"], digest=n)
    ledger.delete("b")
    log.commit(ledger, ["c"])
    before = ledger.records
    log.payloads = ledger.snapshot()
    snapshot = log.open()
    assert entries(snapshot) == entries(ledger)
    assert (before, snapshot.records) == (102, 2)
    assert snapshot.serializers == {"pickle": None}
    assert snapshot.obsolete == ledger.obsolete


def test_a_snapshot_tells_nothing_that_is_pending(log):
    ledger = log.open()
    log.commit(ledger, "abc")
    committed = entries(ledger)
    ledger.delete("a")
    ledger.clear()
    ledger.add("d")
    log.payloads = ledger.snapshot()
    assert entries(log.open()) == committed


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
            self.deleted &= self.log.state.keys()
        else:
            for payload in self.log.payloads[self.read :]:
                self.ledger.apply(payload)
                keys, puts = self.log.account[payload]
                self.deleted = self.deleted & keys - (self.dirty.keys() & puts)
        self.read, self.origin = len(self.log.payloads), self.log.origin
        for key in self.dirty.keys() & self.ledger.changed.keys() - self.ledger.rows.keys():
            self.ledger.add(key)
        self.ledger.changed.clear()
        self.ledger.check()
        assert self.ledger.rows.keys() == self.view()
        assert not obsolete(self.ledger) & self.ledger.files()

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
        (payload,) = self.log.commit(self.ledger, puts)
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

    def compact(self):
        self.log.payloads = self.ledger.snapshot()
        self.log.origin = object()  # as another inode
        assert entries(self.log.open()) == self.log.state


@pytest.mark.parametrize("seed", range(8))
def test_two_handles_that_change_keys_at_random_agree_on_what_is_committed(log, seed):
    rng = random.Random(seed)
    log.state, log.account, log.origin = {}, {}, None
    actors = [Actor(log, rng), Actor(log, rng)]
    for _ in range(150):
        actor = rng.choice(actors)
        actor.catch_up()
        action = rng.choice(["set"] * 5 + ["delete"] * 3 + ["commit"] * 4 + ["clear", "compact"])
        if action in ("set", "delete"):
            for key in rng.sample("abcdefgh", rng.randint(1, 3)):
                getattr(actor, action)(key)
        else:
            getattr(actor, action)()
        assert actor.ledger.rows.keys() == actor.view()
        actor.ledger.check()


def test_keys_come_in_the_order_of_their_serials(log):
    serials = {"c": 2, "a": 0, "b": 2**40}
    log.payloads = [encode([(key, serial, log.entry()) for key, serial in serials.items()])]
    log.commit(log.open(), "d")
    assert [*log.open().rows] == [*"acbd"]
