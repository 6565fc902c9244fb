"""Tests of values that use the chest while the chest is busy: as they are pickled, and as they die.

What is collected as garbage does so at any moment, and so these are moments of everybody's.
"""

from __future__ import annotations

import errno
import gc
import os
import weakref
from contextlib import nullcontext, suppress
from functools import partial

import numpy as np
import pytest

import chest.spilling
import chest.upkeep
from chest import Chest, UnsavedError
from chest.directory import Directory
from chest.frames import HEAD
from chest.hands import Hands
from chest.index import Index
from chest.ledger import Ledger
from chest.residents import Residents
from chest.staging import Batch
from chest.store import Store
from chest.upkeep import Upkeep


class Acting:
    """A value that does something when it is pickled, or dies, the next time."""

    when = act = None

    def __init__(self, **state):
        vars(self).update(state)

    def does(self, when, act):
        self.when, self.act = when, act

    def _do(self, when):
        if self.when == when:
            self.when = None
            self.act()

    def __getstate__(self):
        self._do("pickled")
        return {}

    def __del__(self):
        self._do("dies")


def frozen():
    array = np.arange(3)
    array.flags.writeable = False
    return array


@pytest.fixture
def two(path):
    """Two handles on a directory with an acting value, a list and a small one."""
    with Chest(path=path, nbytes=lambda _: 100, available_memory=1e6) as c, Chest(path=path) as o:
        c.update({"a": Acting(), "k": ["old"], "z": 0})
        c.flush()
        yield c, o
        c._check()
        o._check()


def evict(c):
    c.evict()


def crowd(c):
    for n in range(20_000):
        c[n] = n


@pytest.mark.parametrize("when", ["pickled", "dies"])
@pytest.mark.parametrize("act", [Chest.flush, evict, crowd])
def test_what_comes_from_another_handle_is_not_taken_for_a_change_here(two, when, act):
    c, o = two
    c["a"].does(when, partial(act, c))
    c["z"]
    o["a"] = 5
    o.flush()
    o["k"] = ["new"]
    o.flush()
    assert len(c) >= 3
    assert c["k"] == o["k"] == ["new"]


@pytest.mark.parametrize("act", [Chest.flush, evict])
def test_nor_is_what_another_handle_deleted(two, act):
    c, o = two
    c["a"].does("pickled", partial(act, c))
    o["a"] = 5
    o.flush()
    del o["k"]
    o.flush()
    assert "k" not in c
    c.flush()
    assert "k" not in o


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [list, Acting])
def test_what_is_lent_and_was_deleted_elsewhere_is_no_more(path, kind):
    with Chest(path=path, available_memory=0) as c, Chest(path=path) as o:
        c["a"] = acting = Acting()
        value = c["k"] = kind()
        c["b"] = [2]
        c.flush()
        o["a"] = 5  # which is taken in first
        del o["k"]
        o.flush()
        found = []
        acting.does("pickled", lambda: found.append(c.get("k", "nothing")))
        c["b"]
        assert found in ([value], ["nothing"])
        assert "k" not in c
        c._check()


def test_what_is_set_as_its_deletion_is_taken_in_is_counted_once(two):
    c, o = two
    c["a"].does("pickled", partial(c.__setitem__, "k", "text"))
    c[7] = 0
    o["a"] = 5
    o.flush()
    del o["k"]
    o.flush()
    assert len(c) == 4
    assert c["k"] == "text"
    assert c.memory_usage == 100 * len(c.inmem)


def test_what_is_set_so_takes_no_room_on_disk_into_account_twice(path):
    with Chest(path=path) as c, Chest(path=path) as o:
        value = Acting()
        c.update({"a": value, "k": [bytes(1_000_000)], "z": 0})
        c.flush()
        c["k"] = [1]
        o["a"] = 5
        o.flush()
        del o["k"]
        o.flush()
        value.does("pickled", partial(c.__setitem__, "k", [2]))
        assert len(c) == 3
        assert value.when is None
        assert c["k"] == [2]
        c._check()


def test_a_value_that_dies_as_news_are_taken_in_may_look(path):
    with Chest(path=path) as c, Chest(path=path) as o:
        c["a"] = array = frozen()
        c["x"] = 1
        c.flush()
        weakref.finalize(array, lambda: c.get("x"))
        del array
        o["a"], o["x"] = 5, 2
        o.flush()
        assert (len(c), c["x"], c["a"]) == (2, 2, 5)
        c._check()


def test_what_a_dying_array_sets_can_leave(path):
    with Chest(path=path, available_memory=1e6, nbytes=lambda _: 100) as c:
        c["a"] = array = frozen()
        c["y"] = "old"
        c["b"] = ["old"]
        c.flush()

        def act():
            c["y"] = "new"
            c["b"] = ["new"]
            c["other"] = [1]

        weakref.finalize(array, act)
        del array
        c["z"] = [0]
        c.evict()
        assert (c["y"], c["b"]) == ("new", ["new"])
        c._check()
        c.available_memory = 0
        assert c.memory_usage == 0
        c._check()
    with Chest(path=path) as c:
        assert (c["y"], c["b"]) == ("new", ["new"])


@pytest.mark.parametrize("when", ["pickled", "dies"])
@pytest.mark.parametrize("how", ["set", "move"])
@pytest.mark.parametrize("after", [[0], "text"])
def test_what_comes_and_changes_while_others_leave(path, when, how, after):
    with Chest(path=path, available_memory=1e6, nbytes=lambda _: 100) as c:
        value = Acting()
        c.update({"b": [1], "x": after, "a": value, "z": [0]})
        c.flush()
        c.move_to_disk("x")

        def act():
            if how == "set":
                c["b"] = [1]
                c.flush()
            else:
                c.move_to_disk("b")
            c["b"].append(2)
            c["x"]

        value.does(when, act)
        del value
        c.evict()
        assert c["b"] == [1, 2]
        c._check()
    with Chest(path=path) as c:
        assert c["b"] == [1, 2]


def test_what_is_read_is_in_hand_though_what_was_there_dies_and_reads(path):
    with Chest(path=path, available_memory=0) as c:
        c["k"], c["x"] = [1], [0]
        c["a"] = value = Acting()
        value.does("dies", lambda: c.get("x"))
        del value
        c["k"].append(3)
        assert c["k"] == [1, 3]
        c["b"] = value = Acting()
        value.does("dies", lambda: c.get("x"))
        del value
        c.setdefault("new", []).append(3)
        assert c["new"] == [3]
        c._check()


def test_a_hook_that_is_interrupted_and_goes_on_leaves_nothing_watched(path):
    def interrupted(key):
        if key == "k":
            try:
                with c._memory:
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                len(c)
                c.get("none")

    with Chest(path=path, available_memory=0, on_overflow=interrupted) as c:
        c["k"] = [1]
        c.move_to_disk("k")
        values = [Acting() for _ in range(10)]
        references = [*map(weakref.ref, values)]
        for n, value in enumerate(values):
            c[n] = value
        del value, values
        c.get("none")
        c["last"] = [1]
        c.get("none")
        assert not any(reference() for reference in references)
        c._check()


@pytest.mark.parametrize("act", ["set", "get"])
def test_what_a_hook_takes_in_hand_takes_no_place_of_what_is_held(path, act):
    def take(_):
        for n in range(20 if ready else 0):
            ready.clear()
            if act == "set":
                c[n] = [n]
            else:
                c[n]

    ready = []
    with Chest(path=path, available_memory=0, on_overflow=take) as c:
        c.update((n, [n]) for n in range(20))
        c["mine"] = mine = [0]
        for _ in range(40):
            c.get("none")
        ready.append(True)
        c["a"] = [1]
        mine.append(1)
        assert not ready
        assert c["mine"] == [0, 1]
        assert c["mine"] is mine


def test_what_a_hook_reads_leaves_memory_as_it_goes(path):
    def read(_):
        if c.get("ready"):
            c["ready"] = ""
            for n in range(30):
                references.append(weakref.ref(c[n]))
                alive.append(sum(reference() is not None for reference in references))

    references, alive = [], []
    with Chest(path=path, available_memory=1000, nbytes=lambda _: 300, on_overflow=read) as c:
        for n in range(30):
            c[n] = Acting()
        c["ready"] = "yes"
        c.update(a=1, b=2, c=3)
        assert len(references) == 30
        assert max(alive) < 10


def test_a_hook_may_clear_the_chest_and_change_what_it_sets(path):
    def act():
        c.clear()
        for key in "bcd":
            c[key] = [1]
        c.flush()
        c["b"].append(2)
        c["z"] = [0]

    with Chest(path=path) as c:
        c.update({"a": (value := Acting()), "b": [0], "c": [0], "d": [0]})
        c.flush()
        value.does("pickled", act)
        c["z"] = 0
        c.evict()
        assert value.when is None
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"b": [1, 2], "c": [1], "d": [1], "z": [0]}


def test_a_hook_may_change_a_value_after_an_interrupt_in_the_chest(path):
    def act():
        with suppress(KeyboardInterrupt), c._memory:
            raise KeyboardInterrupt
        c.get("none")
        c["d"].append(2)
        c["z"] = [0]

    with Chest(path=path) as c:
        c.update({"b": [0], "c": [0], "d": [0], "a": (value := Acting())})
        c.flush()
        value.does("pickled", act)
        c["z"] = 0
        c.evict()
        assert value.when is None
    with Chest(path=path) as c:
        assert c["d"] == [0, 2]


def test_what_is_handed_out_again_as_it_is_looked_at_is_looked_at_again(path):
    def act():
        c["x"].append(2)
        c["y"]

    with Chest(path=path, available_memory=0) as c:
        c["x"] = held = [1]
        c["a"] = value = Acting()
        c["y"] = [0]
        value.does("pickled", act)
        del held, value
        c.get("none")
        assert c["x"] == [1, 2]
        c._check()


def test_what_is_set_anew_after_a_clear_is_not_taken_for_what_was_there(path):
    def act():
        c.clear()
        c["k"] = [1]
        c["z"] = [5]
        c["k"].append(2)
        c["z"]

    with Chest(path=path, available_memory=0) as c:
        c["k"] = value = Acting()
        c["x"] = [1]
        value.does("pickled", act)
        del value
        c["y"] = [6]
        c["y"]
        assert c["k"] == [1, 2]
        c._check()


class Refusing(bytes):
    def __reduce__(self):
        raise TypeError


def test_what_cannot_be_written_keeps_no_other_in_memory():
    with Chest(available_memory=1000, nbytes=len) as c:
        for n in range(15):
            c[n] = Refusing(62)  # a cohort of its own
        c["p"], c["q"] = b"x" * 60, b"x" * 60
        assert c.memory_usage <= 1000
        c._check()


def test_what_is_collected_as_files_are_removed_cannot_commit_there(path, monkeypatch):
    """It would give the name of a file that goes to one that counts."""
    remove, refused = Directory._remove, []

    def act():
        c["k"] = ["C"]
        try:
            c.flush()
        except RuntimeError as error:
            refused.append(error)

    def collect(self, name):
        if garbage:
            value = garbage.pop()
            value.does("dies", act)
            value.me = value
            del value
            gc.collect()
        return remove(self, name)

    monkeypatch.setattr(Directory, "_remove", collect)
    garbage = []
    with Chest(path=path) as c:
        c["k"] = ["A"]
        c.flush()
        garbage.append(Acting())
        c["k"] = ["B"]
        c.flush()
        assert refused
        c._check()
    with Chest(path=path) as c:
        assert c["k"] == ["C"]


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Upkeep, "_replace_index"), (Batch, "write"), (Upkeep, "_remove_dead_packs")],
    ids=lambda some: getattr(some, "__name__", some),
)
def test_what_is_collected_amid_a_commit_comes_after_it(path, monkeypatch, owner, name):
    """It would be written over by what was gathered before, and its file be removed."""
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 300)
    monkeypatch.setattr(chest.upkeep, "WASTE", 0)
    plain, moments = getattr(owner, name), []

    def collect(self, *args, **options):
        if not moments and "last" in c:
            moments.append(name)
            c["k"], c["added"] = ["new"], ["new"]
            with suppress(RuntimeError):
                c.flush()
        return plain(self, *args, **options)

    small = {n: (n, "text " * 9) for n in range(100)}
    with Chest(path=path) as c:
        monkeypatch.setattr(owner, name, collect)
        c["k"] = ["old"]
        c.update(small)
        c.flush()
        c["last"] = [1]
        for n in range(10):
            c.update(dict.fromkeys(range(90), (n, "text")))
            c.flush()
        assert moments
        assert c["k"] == c["added"] == ["new"]
        c.flush()
        c._check()
    with Chest(path=path) as c:
        assert c["k"] == c["added"] == ["new"]
        assert c[95] == small[95]
        assert len(c) == 103


def flush(c, ready):
    ready()
    c.flush()


def unpack(c, ready):
    ready()
    c.key_to_filename(7)


def compact(c, ready):
    ready()
    c.compact()


def take_over(c, ready):
    with Chest({"other": 1}) as other:
        other.flush()
        ready()
        c.update(other)


def tidy_later(c, ready):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "tidy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            c.flush()
    ready()
    c.write_keys()


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("act", "owner", "name"),
    [
        (flush, Store, "commit"),
        (unpack, Store, "commit"),
        (compact, Upkeep, "_compact"),
        (take_over, Index, "publish"),
        (tidy_later, Upkeep, "_remove_dead_packs"),
    ],
)
def test_what_is_collected_amid_a_commit_is_refused_one(path, monkeypatch, act, owner, name):
    def collect(self, *args):
        if moments:
            moments.pop()
            c["k"], c[7] = ["newer"], "newer"
            with pytest.raises(RuntimeError, match="amid a commit"):
                c.flush()
            with pytest.raises(RuntimeError, match="amid a commit"):
                del c[8]
        return plain(self, *args)

    plain, moments = getattr(owner, name), []
    with Chest(path=path) as c:
        c.update((n, f"small {n}") for n in range(100))
        c["k"] = ["old"]
        c.flush()
        c["k"] = ["new"]
        monkeypatch.setattr(owner, name, collect)
        act(c, lambda: moments.append(name))
        assert not moments
        assert (c["k"], c[7], c[8]) == (["newer"], "newer", "small 8")
        c.flush()
        c._check()
    with Chest(path=path) as c:
        assert (c["k"], c[7], c[8]) == (["newer"], "newer", "small 8")


def test_who_has_nothing_to_save_may_flush_amid_a_commit(path, monkeypatch):
    def collect(self):
        assert self.untidy
        c.flush()
        c.move_to_disk("k")
        moments.append(self)
        return plain(self)

    plain, moments = Upkeep._compact_if_due, []
    with Chest(path=path) as c:
        c["k"] = ["old"]
        c.flush()
        c["k"] = ["new"]
        with monkeypatch.context() as patch:
            patch.setattr(Upkeep, "_compact_if_due", collect)
            c.flush()
        assert moments
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"k": ["new"]}


@pytest.mark.parametrize("act", ["flush", "compact", "transaction", "drop"])
def test_what_is_collected_amid_the_tidying_up_does_nothing_to_the_index(path, monkeypatch, act):
    def transaction():
        with c.transaction():
            c["k"] = ["new"]

    def collect(self):
        if moments:
            moments.pop()
            with pytest.raises(RuntimeError, match="amid a commit"):
                c["other"] = ["new"]
                transaction() if act == "transaction" else getattr(c, act)()
            c["after"] = ["new"]
        return plain(self)

    plain, moments = Upkeep._remove_dead_packs, []
    monkeypatch.setattr(Upkeep, "_remove_dead_packs", collect)
    with Chest(path=path) as c:
        c["k"] = ["old"]
        c.flush()
        moments.append(act)
        c["k"] = ["newer"]
        c.flush()
        assert not moments
        assert c["k"] == ["newer"]
        c.flush()
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"k": ["newer"], "other": ["new"], "after": ["new"]}


@pytest.mark.parametrize("act", [Chest.flush, Chest.refresh, Chest.drop, Chest.compact])
def test_what_is_collected_as_a_commit_is_taken_in_takes_it_for_no_other(path, monkeypatch, act):
    """It would forget which files are obsolete, and they would stay for good."""

    def collect(self, *args):
        plain(self, *args)
        if moments:
            moments.pop()
            c["other"] = ["new"]
            with suppress(RuntimeError):
                act(c)

    plain, moments = Ledger.committed, []
    monkeypatch.setattr(Ledger, "committed", collect)
    with Chest(path=path) as c:
        c["k"] = ["old"]
        c.flush()
        c["k"] = ["new"]
        moments.append(act)
        c.flush()
        assert not moments
        c.flush()
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"k": ["new"], "other": ["new"]}


def test_what_is_collected_at_the_end_of_a_transaction_is_not_part_of_it(path, monkeypatch):
    def collect(self, word):
        if moments:
            moments.pop()
            c["z"] = ["new"]
            with pytest.raises(RuntimeError, match="amid a commit"):
                c.flush()
        return plain(self, word)

    plain, moments = Index._store, []
    monkeypatch.setattr(Index, "_store", collect)
    with Chest(path=path) as c:
        with c.transaction():
            c["k"] = ["new"]
            c.flush()
            moments.append("end")
        assert not moments
        with Chest(path=path, readonly=True) as reader:
            assert dict(reader) == {"k": ["new"]}
        c.flush()
    with Chest(path=path) as c:
        assert dict(c) == {"k": ["new"], "z": ["new"]}


class Exhausting:
    """A key with which memory ends."""

    def __hash__(self):
        raise MemoryError


def mark_as_moved(path):
    """Leave the mark of a compaction that died."""
    with open(os.path.join(path, ".keys"), "r+b") as file:
        last = file.read(HEAD)[-1]
        file.seek(HEAD - 1)
        file.write(bytes([last | 0x80]))


@pytest.mark.parametrize("act", ["get", "delete", "flush", "clear", "compact", "drop"])
@pytest.mark.parametrize("before", ["nothing", "a mark", "an error", "a refusal"])
def test_nothing_is_mended_or_looked_at_amid_a_commit(path, monkeypatch, before, act):
    def collect(self, *args):
        if moments:
            moments.pop()
            if before == "an error":
                with pytest.raises(MemoryError):
                    c[Exhausting()] = 1
            if before == "a refusal":
                with pytest.raises(RuntimeError, match="amid a commit"):
                    c.drop()
            assert c["x"] == ["old"]
            c["later"] = ["new"]
            with suppress(RuntimeError):
                c.pop("x") if act == "delete" else getattr(c, act)(*["x"] * (act == "get"))
        plain(self, *args)

    plain, moments = Store._write, []
    monkeypatch.setattr(Store, "_write", collect)
    with Chest({"k": ["old"], "x": ["old"]}, path=path):
        pass
    if before == "a mark":
        mark_as_moved(path)
    expected = {"k": ["new"], "x": ["old"], "more": ["new"], "later": ["new"]}
    with Chest(path=path) as c:
        c["k"], c["more"] = ["new"], ["new"]
        moments.append(act)
        c.flush()
        assert not moments
        assert dict(c) == expected
        c.flush()
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == expected


@pytest.mark.parametrize("kind", ["new", "number"])
def test_what_is_set_while_garbage_sets_and_commits_the_same_is_there_once(path, monkeypatch, kind):
    def collect(self, key):
        if moments:
            moments.pop()
            c[key] = ["garbage"]
            c.flush()
        plain(self, key)

    key = {"new": "new", "number": 1.0}[kind]
    plain, moments = Ledger.add, []
    monkeypatch.setattr(Ledger, "add", collect)
    with Chest({"k": ["old"]}, path=path) as c:
        moments.append("set")
        c[key] = ["set"]
        assert not moments
        c.flush()
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"k": ["old"], key: ["set"]}


def test_what_is_deleted_while_garbage_commits_is_gone_for_good(path, monkeypatch):
    def collect(self, key):
        if moments:
            moments.pop()
            c["k"] = c["new"] = ["garbage"]
            c.flush()
        return plain(self, key)

    plain, moments = Ledger.spelled, []
    monkeypatch.setattr(Ledger, "spelled", collect)
    with Chest({"k": ["old"], "x": ["old"]}, path=path) as c:
        c.flush()
        moments.append("deleted")
        del c["k"]
        assert not moments
        c.flush()
        assert dict(c) == {"x": ["old"], "new": ["garbage"]}
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"x": ["old"], "new": ["garbage"]}


def test_garbage_may_commit_as_the_lock_is_taken(path, monkeypatch):
    def collect(self, timeout):
        if moments:
            moments.pop()
            c["new"] = ["garbage"]
            c.flush()
        plain(self, timeout)

    plain, moments = Index._lock, []
    monkeypatch.setattr(Index, "_lock", collect)
    with Chest({"k": ["old"]}, path=path) as c:
        moments.append("locked")
        c.flush()
        assert not moments
        c._check()
        with Chest(path=path) as other:  # which gets the lock
            other["other"] = ["new"]
            other.flush()
    with Chest(path=path) as c:
        assert dict(c) == {"k": ["old"], "new": ["garbage"], "other": ["new"]}


@pytest.mark.parametrize("act", ["compact", "roll back"])
def test_what_is_set_as_the_index_is_read_anew_is_not_lost(path, monkeypatch, act):
    def collect(self, old):
        plain(self, old)
        if moments:
            moments.pop()
            c["new"], c["k"] = ["garbage"], ["garbage"]
            with pytest.raises(RuntimeError, match="amid a commit"):
                del c["x"]

    plain, moments = Ledger.inherit, []
    monkeypatch.setattr(Ledger, "inherit", collect)
    with Chest({"k": ["old"], "x": ["old"]}, path=path) as c:
        c.flush()
        for n in range(100):
            c["x"] = [n]
            c.flush()
        moments.append(act)
        if act == "compact":
            c.compact()
        else:
            with suppress(ZeroDivisionError), c.transaction():
                c["k"] = ["never"]
                c.flush()
                1 / 0  # noqa: B018
        assert not moments
        kept = "garbage" if act == "compact" else "old"  # as of before the transaction
        expected = {"k": [kept], "x": [99], "new": ["garbage"]}
        assert dict(c) == expected
        c.flush()
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == expected


def test_what_is_deleted_once_the_index_was_read_anew_stays_so(path, monkeypatch):
    def collect(self, store):
        if moments and self.ledger is not store.ledger:
            moments.pop()
            del c["x"]
            c["y"], c["new"] = ["garbage"], ["garbage"]
        plain(self, store)

    plain, moments = Residents._look, []
    monkeypatch.setattr(Residents, "_look", collect)
    with Chest({"k": ["old"], "x": ["old"], "y": ["old"]}, path=path) as c:
        c.flush()
        del c["y"]
        for n in range(20):
            c["k"] = [n]
            c.flush()
        moments.append("compact")
        c.compact()
        assert not moments
        assert dict(c) == {"k": [19], "y": ["garbage"], "new": ["garbage"]}
        c.flush()
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"k": [19], "y": ["garbage"], "new": ["garbage"]}


def test_what_is_set_amid_a_roll_back_breaks_nothing(path, monkeypatch):
    def collect(self):
        if moments:
            moments.pop()
            c["new"] = ["garbage"]
        plain(self)

    plain, moments = Store.roll_back, []
    monkeypatch.setattr(Store, "roll_back", collect)
    with Chest({"k": ["old"]}, path=path) as c:
        c.flush()
        with suppress(ZeroDivisionError), c.transaction():
            c["k"] = ["never"]
            moments.append("now")
            1 / 0  # noqa: B018
        assert not moments
        c._check()
        assert dict(c) == {"k": ["old"]}
        c.flush()
    with Chest(path=path) as c:
        assert dict(c) == {"k": ["old"]}


def test_nothing_commits_what_is_taken_back(path, monkeypatch):
    def collect(self, *args):
        if moments:
            moments.pop()
            c["new"] = ["garbage"]
            with pytest.raises(RuntimeError, match="amid a commit"):
                c.flush()
        plain(self, *args)

    plain, moments = Store._take_back, []
    monkeypatch.setattr(Store, "_take_back", collect)
    with Chest({"k": ["old"], "x": ["old"]}, path=path) as c:
        c.flush()
        with suppress(ZeroDivisionError), c.transaction():
            c["k"] = ["never"]
            c.flush()
            moments.append("now")
            1 / 0  # noqa: B018
        assert not moments
        c.flush()
        c._check()
        assert (c["k"], c["x"]) == (["old"], ["old"])
    with Chest(path=path) as c:
        assert (c["k"], c["x"]) == (["old"], ["old"])


def test_what_garbage_saves_once_more_is_saved(path, monkeypatch):
    def collect(self, store):
        if moments and store.untidy and not store.is_recording:
            moments.pop()
            c.flush()
        plain(self, store)

    plain, moments = Residents._look, []
    with Chest({"k": ["old"]}, path=path) as c:
        c.flush()
        c["k"], c["new"] = ["new"], ["new"]
        with monkeypatch.context() as patch:
            patch.setattr(Residents, "_look", collect)
            moments.append("saved")
            c.flush()
        assert not moments
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"k": ["new"], "new": ["new"]}


def test_nobody_closes_the_chest_amid_a_commit(path, monkeypatch):
    def collect(self):
        if moments and not c._memory.dirty:
            moments.pop()
            with pytest.raises(RuntimeError, match="amid a commit"):
                c.close()
        return plain(self)

    plain, moments = Upkeep._remove_dead_packs, []
    monkeypatch.setattr(Upkeep, "_remove_dead_packs", collect)
    with Chest({"k": ["old"]}, path=path) as c:
        c.flush()
        c["k"] = ["new"]
        moments.append("tidied up")
        c.flush()
        assert not moments
        c["x"] = ["new"]
    with Chest(path=path) as c:
        assert dict(c) == {"k": ["new"], "x": ["new"]}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fails", [False, True])
def test_another_chest_of_the_thread_does_not_wait_for_a_compaction(path, monkeypatch, fails):
    """It would wait for ever."""

    def then(source, target):
        if target.endswith(".keys") and moments:
            moments.pop()
            if fails:
                raise OSError(errno.EIO, "the disk fails")
            plain(source, target)
            with Chest(path=path) as other, pytest.raises(UnsavedError, match="of this thread"):
                other["other"] = 1
                try:
                    other.flush()
                finally:
                    del other["other"]
        else:
            plain(source, target)

    plain, moments = os.replace, []
    monkeypatch.setattr(os, "replace", then)
    with Chest({"k": ["old"]}, path=path) as c:
        for n in range(9):
            c["k"] = [n]
            c.flush()
        moments.append("replaced")
        with pytest.raises(OSError, match="the disk fails") if fails else nullcontext():
            c.compact()
        assert not moments
        with Chest(path=path) as other:  # now it may
            other["other"] = 2
            other.flush()
        assert dict(c) == {"k": [8], "other": 2}
        c._check()


def test_what_is_set_and_deleted_as_a_transaction_begins_outlives_its_rollback(path, monkeypatch):
    monkeypatch.setattr("threading.active_count", lambda: 1)  # else all is flushed once more

    def act():
        c["k"], c["n"], c["late"] = ["hook"], ["hook"], ["hook"]
        del c["d"]

    with Chest({"k": ["old"], "d": ["old"]}, path=path) as c:
        c.flush()
        c["k"], c["n"] = ["before"], ["before"]
        hook = c["hook"] = Acting()
        hook.does("pickled", act)
        expected = {"k": ["hook"], "n": ["hook"], "late": ["hook"]}
        with suppress(ZeroDivisionError), c.transaction():
            c["k"] = ["never"]
            1 / 0  # noqa: B018
        del c["hook"]
        assert dict(c) == expected
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == expected


@pytest.mark.parametrize("how", ["compact", "roll back"])
@pytest.mark.parametrize("act", ["add", "spelled", "clear"])
def test_what_is_amid_a_step_of_the_ledger_goes_on_with_the_one_read_anew(
    path, monkeypatch, act, how
):
    def collect(self, *args):
        if moments:
            moments.pop()
            if how == "compact":
                c.compact()
            else:
                with suppress(ZeroDivisionError), c.transaction():
                    c["x"] = ["never"]
                    c.flush()
                    1 / 0  # noqa: B018
        return plain(self, *args)

    plain, moments = getattr(Ledger, act), []
    monkeypatch.setattr(Ledger, act, collect)
    with Chest({"k": ["old"], "x": ["old"]}, path=path) as c:
        c.flush()
        for n in range(20):
            c["x"] = [n]
            c.flush()
        before = c._memory.ledger
        moments.append("now")
        if act == "add":
            c["new"] = ["new"]
            expected = {"k": ["old"], "x": [19], "new": ["new"]}
        elif act == "spelled":
            del c["k"]
            expected = {"x": [19]}
        else:
            c.clear()
            expected = {}
        assert not moments
        assert c._memory.ledger is not before
        assert dict(c) == expected
        c._check()
        c.flush()
    with Chest(path=path) as c:
        assert dict(c) == expected


def test_what_is_set_as_its_key_leaves_memory_is_counted_and_saved(path, monkeypatch):
    def collect(*args):
        moments.append("lent")
        if len(moments) == 2:  # the old value left
            c["k"] = ["again"]
        return plain(*args)

    plain, moments = chest.spilling.are_lent, []
    monkeypatch.setattr(chest.spilling, "are_lent", collect)
    with Chest({"k": ["old"], "x": ["old"]}, path=path) as c:
        c.flush()
        c["k"] = ["new"]
        c.move_to_disk("k")
        assert len(moments) == 2
        c._check()
        c.move_to_disk("k")
        assert c["k"] == ["again"]
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"k": ["again"], "x": ["old"]}


class Key:
    """A key that does something when it is hashed, the next time."""

    act = None

    def __hash__(self):
        act, Key.act = Key.act, None
        if act is not None:
            act()
        return 1

    def __eq__(self, other):
        return type(other) is Key

    def __reduce__(self):
        return Key, ()


@pytest.mark.parametrize("moment", ["alive", "hashed"])
def test_a_rollback_goes_on_where_others_are_deleted_or_set(path, monkeypatch, moment):
    def act():
        c["set"] = ["garbage"]
        if moment == "alive":
            del c["x"]

    def collect(self):
        if moments:
            moments.pop()
            if moment == "alive":
                act()
            else:
                Key.act = act
        return plain(self)

    plain, moments = Hands.alive, []
    monkeypatch.setattr(Hands, "alive", collect)
    with Chest({Key(): ["old"], "x": ["old"], "k": ["old"]}, path=path) as c:
        c.flush()
        with pytest.raises(ZeroDivisionError), c.transaction():
            c["k"] = ["never"]
            c.flush()
            moments.append("rolled back")
            1 / 0  # noqa: B018
        assert not moments
        assert Key.act is None
        c._check()
        assert dict(c) == {Key(): ["old"], "x": ["old"], "k": ["old"]}
    with Chest(path=path) as c:
        assert dict(c) == {Key(): ["old"], "x": ["old"], "k": ["old"]}


def test_garbage_may_commit_as_the_holders_of_the_lock_are_looked_at(path, monkeypatch):
    def collect(self):
        if moments:
            moments.pop()
            c["new"] = ["garbage"]
            c.flush()
        return plain(self)

    plain, moments = Index.held_here, []
    monkeypatch.setattr(Index, "held_here", collect)
    with Chest({"k": ["old"]}, path=path) as c:
        c.flush()
        moments.append("now")
        c.compact()
        assert not moments
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"k": ["old"], "new": ["garbage"]}


def test_what_leaves_memory_while_others_are_compared_is_no_longer_looked_for_there(path):
    with Chest({"a": Acting(), "b": ["old"]}, path=path) as c:
        c.flush()
        c["b"].append("new")
        hook = c["a"]
        hook.does("pickled", lambda: c.move_to_disk("b"))
        c.flush()
        assert hook.when is None
        c._check()
        assert c["b"] == ["old", "new"]
        del c["a"]
    with Chest(path=path) as c:
        assert dict(c) == {"b": ["old", "new"]}
