"""The value in memory is the value; what cannot be written is kept; the budget holds."""

import array
import builtins
import collections
import datetime as dt
import enum
import errno
import functools
import gc
import gzip
import io
import json
import logging
import os
import pickle
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest

import chest.files
from chest import (
    Chest,
    ChestClosedError,
    KeyTypeError,
    SerializerError,
    UnsavedError,
    hands,
    nbytes,
    serialize,
)

BUDGETS = [0, 400, 4000, 1e9]
SERIALIZERS = {
    "pickle": {},
    "json": {"dump": json.dump, "load": json.load},
    "gzip": {"open": gzip.open},
    "json in gzip": {"dump": json.dump, "load": json.load, "open": gzip.open},
}


class Interrupt(BaseException):
    """What a KeyboardInterrupt is to the code; one that gets out does not end the whole run."""


class Box:
    """An ordinary object: it may change, and may be referred to weakly."""

    def __init__(self, *items):
        self.items = list(items)

    def __eq__(self, other):
        return self.items == other.items

    __hash__ = None


class Stubborn:
    """Cannot be pickled as long as it has an error to raise; counts the tries."""

    def __init__(self, error, content=None):
        self.error = error
        self.content = content
        self.tries = 0

    def __getstate__(self):
        self.tries += 1
        if self.error is not None:
            raise self.error
        return {"error": None, "content": self.content, "tries": 0}


def frozen(values):
    values = np.array(values)
    values.flags.writeable = False
    return values


def same(a, b):
    return np.array_equal(a, b) if isinstance(b, np.ndarray) else a == b


def crowd(c):
    """Set other values, several times what the small budgets allow."""
    for n in range(12):
        c[f"other{n}"] = "x" * 800


def reopen(c):
    c.close()
    return Chest(path=c.path, available_memory=c.available_memory)


def after(act):
    """Make an event of something that is done to a chest, which stays the chest to look at."""

    def event(c):
        act(c)
        return c

    return event


def files(path):
    """Return the names of all files below `path`."""
    return sorted(
        os.path.relpath(os.path.join(folder, name), path)
        for folder, _, names in os.walk(path)
        for name in names
    )


def stamps(path):
    names = ["", *files(path)]
    return {name: os.stat(os.path.join(path, name)).st_mtime_ns for name in names}


@contextmanager
def nothing_written(path):
    """Fail when a file below `path` is made, changed or removed meanwhile."""
    for name in ["", *files(path)]:
        os.utime(os.path.join(path, name), ns=(0, 0))
    before = stamps(path)
    yield
    assert stamps(path) == before


def in_threads(*actions):
    """Do each in a thread of its own, and raise what one of them raised."""
    with ThreadPoolExecutor(len(actions)) as pool:
        for done in [pool.submit(action) for action in actions]:
            done.result(60)


# -- changes in place ------------------------------------------------------------------------------


CHANGES = {
    "list": (list, lambda v: v.append(len(v))),
    "dict": (dict, lambda v: v.update({len(v): [0]})),
    "set": (set, lambda v: v.add(len(v))),
    "bytearray": (bytearray, lambda v: v.append(7)),
    "deque": (collections.deque, lambda v: v.append(len(v))),
    "array.array": (lambda: array.array("q"), lambda v: v.append(7)),
    "numpy array": (lambda: np.zeros(3), lambda v: v.__iadd__(1)),
    "large numpy array": (lambda: np.zeros(20_000), lambda v: v.__iadd__(1)),
    "object": (Box, lambda v: v.items.append(len(v.items))),
    "list within a tuple": (lambda: (1, []), lambda v: v[1].append(len(v[1]))),
    "list within a dict": (lambda: {"a": []}, lambda v: v["a"].append(len(v["a"]))),
    "large list": (lambda: list(range(15_000)), lambda v: v.append(-1)),
}
EVENTS = {
    "spill": after(crowd),
    "flush": after(Chest.flush),
    "close": reopen,
    "flush and spill": after(lambda c: [c.flush(), crowd(c)]),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_in_place_is_kept(path, kind, event, budget):
    make, change = CHANGES[kind]
    c = Chest(path=path, available_memory=budget)
    c["k"] = make()
    expected = make()
    for _ in range(2):
        change(c["k"])
        change(expected)
        c = EVENTS[event](c)
        assert same(c["k"], expected)
    c._check()
    c.close()
    with Chest(path=path) as c:
        assert same(c["k"], expected)


@pytest.mark.parametrize("name", SERIALIZERS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_change_in_place_is_kept_with_any_serializer(path, name, budget):
    with Chest(path=path, available_memory=budget, **SERIALIZERS[name]) as c:
        c["k"] = [1]
        crowd(c)
        c["k"].append(2)
        crowd(c)
        c["k"].append(3)
        c.flush()
        assert c["k"] == [1, 2, 3]
        c["k"].append(4)
    with Chest(path=path, **SERIALIZERS[name]) as c:
        assert c["k"] == [1, 2, 3, 4]


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_appended_to_a_default_counts(path, budget):
    expected = {}
    with Chest(path=path, available_memory=budget) as c:
        for i in range(200):
            c.setdefault(f"k{i % 7}", []).append(i)
            expected.setdefault(f"k{i % 7}", []).append(i)
        assert dict(c) == expected
    with Chest(path=path) as c:
        assert dict(c) == expected


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("view", ["values", "items"])
def test_values_may_be_changed_while_they_are_gone_through(path, view, budget):
    with Chest({f"k{i}": [i] for i in range(20)}, path=path, available_memory=budget) as c:
        for each in getattr(c, view)():
            value = each[1] if view == "items" else each
            value.append("seen")
        assert dict(c) == {f"k{i}": [i, "seen"] for i in range(20)}
    with Chest(path=path) as c:
        assert list(c.values()) == [[i, "seen"] for i in range(20)]


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_was_handed_out_before_the_end_of_the_program_is_saved(tmp_path, budget):
    path = str(tmp_path / "c")
    program = (
        f"from chest import Chest\nc = Chest(path={path!r}, available_memory={budget})\n"
        "c.setdefault('k', []).append(1)\nc['k'].append(2)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with Chest(path=path) as c:
        assert c["k"] == [1, 2]


# -- the value in hand -----------------------------------------------------------------------------


WAYS = {
    "set": lambda c: c.__setitem__("k", value := []) or value,
    "get": lambda c: c["k"],
    "get with a default": lambda c: c.get("k"),
    "setdefault": lambda c: c.setdefault("k", [0]),
    "setdefault of a new key": lambda c: (c.__delitem__("k"), c.setdefault("k", []))[1],
    "values": lambda c: next(value for key, value in c.items() if key == "k"),
}
NO_NEW_VALUE = {
    "contains": lambda c: "x" in c,
    "len": len,
    "iterate": list,
    "repr": repr,
    "delete another": lambda c: c.__delitem__("x"),
    "flush": lambda c: c.flush(),
    "write the index": lambda c: c.write_keys(),
    "shrink": lambda c: c.shrink(),
    "lower the budget": lambda c: setattr(c, "available_memory", 0),
    "move it to disk": lambda c: c.move_to_disk("k"),
    "miss a key": lambda c: c.get("missing"),
}


@pytest.mark.parametrize("budget", [0, 300])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_thread_was_handed_is_kept_in_hand(path, way, budget):
    with Chest(path=path, available_memory=budget) as c:
        c["k"] = []
        c["x"] = "x" * 200
        value = WAYS[way](c)
        value.append(1)
        assert c["k"] == [1]
        c["x"] = "another"
        assert c["k"] == [1]


@pytest.mark.parametrize("budget", [0, 300])
@pytest.mark.parametrize("operation", NO_NEW_VALUE)
def test_it_stays_in_hand_until_the_next_value(path, operation, budget):
    with Chest(path=path, available_memory=budget) as c:
        c["x"] = 1
        value = c.setdefault("k", [])
        NO_NEW_VALUE[operation](c)
        value.append(1)
        assert c["k"] == [1]
        c["y"] = "the next value"
        assert c["k"] == [1]


def test_a_value_in_hand_comes_back_as_the_same_object():
    with Chest(available_memory=0) as c:
        value = c["k"] = [1]
        assert not c.inmem
        assert c["k"] is value
        assert c["k"] is value


IN_HAND = ["list", "object", "numpy array", "large numpy array"]


@pytest.mark.parametrize("kind", IN_HAND)
@pytest.mark.parametrize("way", ["set", "get from disk", "get from memory"])
def test_another_thread_cannot_push_it_out_of_the_hand(path, way, kind):
    make, change = CHANGES[kind]
    expected = make()
    change(expected)
    with Chest(path=path, available_memory=200_000) as c:
        c["k"] = make()
        if way == "get from disk":
            c.move_to_disk("k")
        c["x"] = ["the next value"]
        in_hand, gone = threading.Event(), threading.Event()

        def change_it():
            if way == "set":
                c["k"] = value = make()
            else:
                value = c["k"]
            in_hand.set()
            assert gone.wait(10)
            change(value)

        def push_it_out():
            assert in_hand.wait(10)
            c.available_memory = 0
            assert "k" not in c.inmem
            gone.set()

        in_threads(change_it, push_it_out)
        c["x"] = ["the next value"]
        assert same(c["k"], expected)
    with Chest(path=path) as c:
        assert same(c["k"], expected)


@pytest.mark.parametrize("kind", IN_HAND)
def test_a_value_that_leaves_while_it_is_handed_out_is_in_hand(path, kind):
    make, change = CHANGES[kind]
    expected = make()
    change(expected)
    with Chest({"k": make()}, path=path) as c:
        c["x"] = ["the next value"]
        marked = []

        class Marks(set):
            def add(self, key):  # called by a hit between finding the value and handing it out
                marked.append(key)
                in_threads(lambda: c.move_to_disk("k"))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(c._memory.eviction, "marks", Marks())
            c._memory._arm()
            value = c["k"]
        assert marked == ["k"]
        change(value)
        del value
        c["x"] = ["the next value"]
        assert same(c["k"], expected)


@pytest.mark.parametrize("budget", [0, 400, 4000])
def test_threads_append_each_to_a_key_of_its_own(path, budget):
    with Chest(path=path, available_memory=budget) as c:

        def append(name):
            for i in range(60):
                c.setdefault(name, []).append(i)

        in_threads(*(functools.partial(append, f"k{n}") for n in range(4)))
        c._check()
        assert dict(c) == {f"k{n}": list(range(60)) for n in range(4)}
    with Chest(path=path) as c:
        assert dict(c) == {f"k{n}": list(range(60)) for n in range(4)}


def test_what_was_in_the_hand_of_a_thread_that_ended_is_kept(path):
    with Chest(path=path, available_memory=0) as c:
        in_threads(lambda: c.setdefault("k", []).append(1))
        assert not c.inmem
        c.flush()
    with Chest(path=path) as c:
        assert c["k"] == [1]


def test_what_is_in_the_hand_of_another_thread_is_flushed(path):
    with Chest(path=path, available_memory=0) as c:
        in_hand, flushed = threading.Event(), threading.Event()

        def append():
            value = c.setdefault("k", [])
            value.append(1)
            in_hand.set()
            assert flushed.wait(10)
            value.append(2)

        def flush():
            assert in_hand.wait(10)
            c.flush()
            with Chest(path=path, readonly=True) as other:
                assert other["k"] == [1]
            flushed.set()

        in_threads(append, flush)
        assert c["k"] == [1, 2]


def test_flush_takes_what_threads_that_ended_had_in_hand():
    with Chest(available_memory=0) as c:
        values = []

        def set_one():
            c["k"] = value = Box()
            values.append(weakref.ref(value))

        in_threads(set_one)
        assert values[0]() is not None
        c.flush()
        gc.collect()
        assert values[0]() is None


def test_threads_that_ended_do_not_hold_on_to_their_values():
    with Chest(available_memory=0) as c:
        values = []

        def set_one(n):
            c[f"k{n}"] = value = Box()
            values.append(weakref.ref(value))

        for n in range(3 * hands.THREADS):
            in_threads(functools.partial(set_one, n))
            c["x"] = []
        gc.collect()
        assert sum(value() is not None for value in values) <= hands.THREADS + 1


class Countdown(Box):
    """Interrupts when the last of so many dumps from now is made."""

    dumps = 0

    def __getstate__(self):
        if Countdown.dumps:
            Countdown.dumps -= 1
            if not Countdown.dumps:
                raise Interrupt
        return vars(self)


def test_an_interrupt_does_not_lose_what_was_in_hand():
    with Chest(available_memory=0) as c:
        c.setdefault("k", Countdown()).items.append(3)
        Countdown.dumps = 1
        with pytest.raises(Interrupt):
            c["x"] = 1
        c._check()
        assert c["k"].items == [3]


@pytest.mark.parametrize("dumps", range(1, 7))
def test_an_interrupt_does_not_lose_what_threads_had_in_hand(dumps, monkeypatch):
    with Chest(available_memory=0) as c:
        barrier = threading.Barrier(3)  # three threads at a time have three hands

        def change(key):
            c.setdefault(key, Countdown()).items.append(key)
            barrier.wait(10)

        in_threads(*(functools.partial(change, key) for key in "abc"))
        monkeypatch.setattr(Countdown, "dumps", dumps)
        with pytest.raises(Interrupt):
            c.flush()
        assert Countdown.dumps == 0
        c._check()
        assert [c[key].items for key in "abc"] == [["a"], ["b"], ["c"]]


# -- values that are alive elsewhere ---------------------------------------------------------------


ALIVE = {
    "object": (lambda: Box(1), lambda v: v.items.append(2)),
    "set": (lambda: {1}, lambda v: v.add(2)),
    "numpy array": (lambda: np.zeros(3), lambda v: v.__iadd__(1)),
    "large numpy array": (lambda: np.zeros(20_000), lambda v: v.__iadd__(1)),
}


def test_an_array_that_cannot_change_and_is_alive_comes_back_as_the_same_object():
    value = frozen([1.0, 2.0])
    with Chest(available_memory=4000) as c:
        c["k"] = value
        crowd(c)
        assert "k" not in c.inmem
        assert c["k"] is value


@pytest.fixture(params=ALIVE)
def alive(request):
    """A value that can be referred to weakly, and something that changes it."""
    make, change = ALIVE[request.param]
    return make(), change


def test_a_value_that_is_alive_comes_back_as_the_same_object_without_a_read(alive):
    value, _ = alive
    missed = []
    with Chest(available_memory=0, on_miss=missed.append) as c:
        c["k"] = value
        crowd(c)
        assert "k" not in c.inmem
        assert c["k"] is value
        c.flush()
        assert c["k"] is value
        assert not missed


def test_a_value_that_was_read_comes_back_as_the_same_object(path, alive):
    with Chest({"k": alive[0]}, path=path):
        pass
    missed = []
    with Chest(path=path, available_memory=0, on_miss=missed.append) as c:
        value = c["k"]
        crowd(c)
        assert c["k"] is value
        assert missed == ["k"]


def test_flush_writes_what_changed_after_it_left(path, alive):
    value, change = alive
    with Chest(path=path, available_memory=0) as c:
        c["k"] = value
        crowd(c)
        change(value)
        c.flush()
        with Chest(path=path, readonly=True) as other:
            assert same(other["k"], value)


def test_close_writes_what_changed_after_it_left(path, alive):
    value, change = alive
    with Chest(path=path, available_memory=0) as c:
        c["k"] = value
        crowd(c)
        change(value)
    with Chest(path=path) as c:
        assert same(c["k"], value)


def test_what_changed_after_it_left_changes_again(path, alive):
    value, change = alive
    with Chest(path=path, available_memory=0) as c:
        c["k"] = value
        for _ in range(3):
            crowd(c)
            change(value)
            c.flush()
            assert c["k"] is value
    with Chest(path=path) as c:
        assert same(c["k"], value)


def test_a_replaced_value_stays_replaced_though_the_old_one_is_alive_and_changes(path, alive):
    old, change = alive
    with Chest(path=path, available_memory=0) as c:
        c["k"] = old
        crowd(c)
        c["k"] = "new"
        change(old)
        c.flush()
        assert c["k"] == "new"


def test_a_deleted_value_stays_deleted_though_it_is_alive_and_changes(path, alive):
    old, change = alive
    with Chest(path=path, available_memory=0) as c:
        c["k"] = old
        crowd(c)
        del c["k"]
        change(old)
        c.flush()
        assert "k" not in c
        c._check()


def test_one_object_under_two_keys_is_kept_under_both(path, alive):
    value, change = alive
    with Chest(path=path, available_memory=0) as c:
        c["a"] = c["b"] = value
        crowd(c)
        change(value)
        c.flush()
    with Chest(path=path) as c:
        assert same(c["a"], value)
        assert same(c["b"], value)


def test_a_value_that_left_is_not_kept_alive():
    with Chest(available_memory=0) as c:
        c["k"] = value = Box(1)
        reference = weakref.ref(value)
        crowd(c)
        del value
        c.get("other1")
        assert reference() is None
        assert c["k"] == Box(1)


def test_references_to_the_dead_do_not_pile_up():
    left = hands.Hands()
    for n in range(5 * hands.REFERENCES):
        left.remember(n, Box())
    gc.collect()
    assert len(left.alive()) == 0
    assert sum(left.get(n, "gone") != "gone" for n in range(5 * hands.REFERENCES)) == 0
    assert sum(map(left.knows, range(5 * hands.REFERENCES))) <= hands.REFERENCES + 1


# -- no needless work ------------------------------------------------------------------------------


IMMUTABLE = {
    "str": "text",
    "bytes": b"bytes",
    "int": 10**30,
    "float": 1.5,
    "bool": True,
    "complex": 1j,
    "None": None,
    "Decimal": Decimal("1.5"),
    "Fraction": Fraction(1, 3),
    "tuple": (1, "a", (None, b"b")),
    "frozenset": frozenset({1, ("a", 2.5)}),
    "numpy scalar": np.float64(1.5),
    "read-only array": frozen([1, 2, 3]),
    "large read-only array": frozen(range(20_000)),
    "large str": "x" * 200_000,
}


class CountingDump:
    """A serializer that counts what it writes."""

    def __init__(self):
        self.dumps = 0

    def dump(self, obj, file):
        self.dumps += 1
        pickle.dump(obj, file, protocol=5)

    def chest(self, path, **options):
        return Chest(path=path, dump=self.dump, load=pickle.load, **options)


@pytest.mark.parametrize("kind", IMMUTABLE)
def test_a_value_that_cannot_change_is_dumped_once(path, kind):
    counting = CountingDump()
    with counting.chest(path, available_memory=10**6) as c:
        c["k"] = IMMUTABLE[kind]
        c.flush()
        c.flush()
        c.available_memory = 0
        assert same(c["k"], IMMUTABLE[kind])
        c.available_memory = 10**6
        assert same(c["k"], IMMUTABLE[kind])
        c.move_to_disk("k")
        c.flush()
    with counting.chest(path) as c:
        assert same(c["k"], IMMUTABLE[kind])
    assert counting.dumps == 1


@pytest.mark.parametrize("kind", CHANGES)
def test_without_writeback_values_are_never_compared(path, kind):
    make, change = CHANGES[kind]
    counting = CountingDump()
    with counting.chest(path, available_memory=10**6, writeback=False) as c:
        c["k"] = make()
        c.flush()
        change(c["k"])
        c.flush()
        c.move_to_disk("k")
        assert counting.dumps == 1
        c["k"] = c["k"]  # an assignment counts
        c.flush()
        assert counting.dumps == 2


LEAVING = {
    "spill": lambda c: setattr(c, "available_memory", 0),
    "move to disk": lambda c: c.move_to_disk("k"),
    "flush": lambda c: c.flush(),
    "close": lambda c: c.close(),
}


@pytest.mark.parametrize("name", SERIALIZERS)
@pytest.mark.parametrize("leaving", LEAVING)
@pytest.mark.parametrize("value", [[1], list(range(15_000))], ids=["small", "large"])
def test_an_unchanged_value_leaves_without_a_write(path, value, leaving, name):
    with Chest({"k": value}, path=path, **SERIALIZERS[name]) as c:
        c.flush()
        with nothing_written(path):
            LEAVING[leaving](c)


@pytest.mark.parametrize("name", SERIALIZERS)
@pytest.mark.parametrize("value", [[1], list(range(15_000))], ids=["small", "large"])
def test_a_value_that_was_only_read_leaves_without_a_write(path, value, name):
    with Chest({"k": value}, path=path, **SERIALIZERS[name]):
        pass
    with Chest(path=path, **SERIALIZERS[name]) as c, nothing_written(path):
        assert c["k"] == value
        c.move_to_disk("k")
        assert c["k"] == value
        c.flush()
        c.available_memory = 0
        assert not c.inmem


def test_a_second_flush_writes_nothing(path):
    with Chest({f"k{n}": [n] for n in range(10)}, path=path) as c:
        c.flush()
        with nothing_written(path):
            c.flush()


class Meddler:
    """A key that does something whenever it is pickled."""

    meddle = staticmethod(int)

    def __eq__(self, other):
        return type(other) is Meddler

    def __hash__(self):
        return 1

    def __reduce__(self):
        self.meddle()
        return Meddler, ()


@pytest.mark.parametrize("more", [0, 100])
@pytest.mark.parametrize("where", ["a key is pickled", "a file gets its name"])
def test_a_value_that_is_set_in_the_midst_of_a_commit_is_written_by_the_next(
    path, monkeypatch, where, more
):
    def set_it():
        if c._memory.store.index.is_locked and c.inmem["a"] == "old":
            c["a"] = "new"

    def namer(key):
        if where == "a file gets its name":
            set_it()
        return chest.key_to_filename(key)

    with Chest(path=path, key_to_filename=namer) as c:
        c["a"], c[Meddler()], c["b"] = "old", "x" * 5000, "old"
        for n in range(more):
            c[n] = n
        if where == "a key is pickled":
            monkeypatch.setattr(Meddler, "meddle", staticmethod(set_it))
        c.flush()
        assert c["a"] == "new"
        c._check()
        c.flush()
    with Chest(path=path) as c:
        assert c["a"] == "new"


REFUSED = {
    "del": lambda c: c.__delitem__("a"),
    "pop": lambda c: c.pop("a"),
    "clear": lambda c: c.clear(),
    "flush": lambda c: c.flush(),
    "compact": lambda c: c.compact(),
    "move to disk": lambda c: c.move_to_disk("a"),
}


@pytest.mark.parametrize("action", REFUSED)
@pytest.mark.parametrize("where", ["a key is pickled", "a file gets its name"])
def test_who_deletes_or_commits_in_the_midst_of_a_commit_is_refused(
    path, monkeypatch, where, action
):
    refused = []

    def meddle():
        if c._memory.store.index.is_locked and not refused:
            refused.append(action)  # first: a flush pickles the key again
            with pytest.raises(RuntimeError, match="must not delete keys or commit"):
                REFUSED[action](c)

    def namer(key):
        if where == "a file gets its name":
            meddle()
        return chest.key_to_filename(key)

    with Chest(path=path, key_to_filename=namer) as c:
        c["a"], c[Meddler()], c["b"] = "x", "y" * 5000, "z"
        if where == "a key is pickled":
            monkeypatch.setattr(Meddler, "meddle", staticmethod(meddle))
        c.flush()
        assert refused
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"a": "x", Meddler(): "y" * 5000, "b": "z"}


def test_flush_writes_only_what_changed(path):
    with Chest({"a": [1], "b": [2]}, path=path) as c:
        c.flush()
        before = stamps(path)["a"]
        c["b"].append(3)
        c.flush()
        assert stamps(path)["a"] == before
        with Chest(path=path, readonly=True) as other:
            assert other["b"] == [2, 3]


# -- values that cannot be written -----------------------------------------------------------------


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def local_object():
    class Local:
        pass

    return Local()


def big(value):
    """Make what is dumped as a stream."""
    return [bytes(200_000), value]


UNSAVABLE = {
    "lambda": lambda: lambda: 0,
    "object of a local class": local_object,
    "generator": lambda: (n for n in "abc"),
    "lock": threading.Lock,
    "nested too deeply": lambda: nested(50_000),
    "large, with a lambda": lambda: big(lambda: 0),
    **{
        f"raises {error!r}": functools.partial(Stubborn, error)
        for error in (
            ValueError("no"),
            KeyError("no"),
            TypeError(),
            AttributeError("no"),
            StopIteration(),
            RecursionError(),
            MemoryError(),
            OSError("no"),
            OSError(errno.ENOSPC, "not the disk, the value"),
            FileNotFoundError(errno.ENOENT, "the value's"),
            pickle.PicklingError("no"),
            Exception("two\nlines"),
        )
    },
    **{
        f"large, raises {error!r}": lambda error=error: big(Stubborn(error))
        for error in (
            ValueError("no"),
            MemoryError(),
            OSError(errno.ENOSPC, "not the disk, the value"),
            EOFError(),
        )
    },
}


@pytest.fixture(params=UNSAVABLE)
def unsavable(request):
    return UNSAVABLE[request.param]()


def discard(c, *keys):
    """Delete what keeps a chest from being closed."""
    for key in keys:
        del c[key]


def test_an_unsavable_value_stays_in_memory_and_counts(path, unsavable):
    with Chest(path=path, available_memory=0, nbytes=lambda value: 1000) as c:
        c["bad"] = unsavable
        assert c["bad"] is unsavable
        assert list(c.inmem) == ["bad"]
        assert c.memory_usage == 1000
        c._check()
        discard(c, "bad")
        assert c.memory_usage == 0


def test_an_unsavable_value_keeps_no_other_from_spilling(path, unsavable):
    with Chest(path=path, available_memory=2000) as c:
        for n in range(5):
            c[f"before{n}"] = [n] * 20
        c["bad"] = unsavable
        crowd(c)
        c["bad again"] = unsavable
        crowd(c)
        c.available_memory = 0
        assert {*c.inmem} == {"bad", "bad again"}
        with Chest(path=path, readonly=True) as other:
            assert {*other} == {*c} - {"bad", "bad again"}
            assert all(other[key] == c[key] for key in other)
        c._check()
        discard(c, "bad", "bad again")


def test_no_half_written_file_stays_of_an_unsavable_value(path, unsavable):
    with Chest(path=path, available_memory=0) as c:
        c["bad"] = unsavable
        assert files(path) == [".keys"]
        with pytest.raises(UnsavedError):
            c.flush()
        assert files(path) == [".keys"]
        discard(c, "bad")


def test_flush_saves_all_others_and_names_the_unsavable(path, unsavable):
    with Chest(path=path) as c:
        c["a"], c["bad"], c["b"] = 1, unsavable, 2
        with pytest.raises(UnsavedError, match="'bad'") as info:
            c.flush()
        assert info.value.keys == ["bad"]
        assert len(info.value.causes) == 1
        assert isinstance(info.value.causes[0], Exception)
        with Chest(path=path, readonly=True) as other:
            assert dict(other) == {"a": 1, "b": 2}
        c._check()
        discard(c, "bad")


def test_a_large_value_may_raise_what_looks_like_a_full_disk(path):
    value = big(Stubborn(OSError(errno.ENOSPC, "not the disk")))
    with Chest(path=path, available_memory=0) as c:
        c["bad"] = value
        c["good"] = big(None)
        assert [*c.inmem] == ["bad"]
        discard(c, "bad")


def test_the_cause_is_what_the_value_raised(path):
    error = ValueError("not me")
    with Chest({"bad": Stubborn(error)}, path=path) as c:
        with pytest.raises(UnsavedError, match="ValueError: not me") as info:
            c.flush()
        assert info.value.causes == [error]
        discard(c, "bad")


def test_the_text_of_the_error_names_the_first_ten_and_its_keys_all(path):
    with Chest({f"bad{n:02}": Stubborn(ValueError("no")) for n in range(25)}, path=path) as c:
        with pytest.raises(UnsavedError) as info:
            c.flush()
        assert info.value.keys == [f"bad{n:02}" for n in range(25)]
        assert len(info.value.causes) == 25
        assert re.findall(r"bad\d\d", str(info.value)) == [f"bad{n:02}" for n in range(10)]
        assert "15 more" in str(info.value)
        c.clear()


@pytest.mark.parametrize("mend", ["replace", "delete", "pop", "clear", "mend in place"])
def test_flush_succeeds_once_the_unsavable_value_has_gone(path, mend):
    with Chest(path=path, available_memory=0) as c:
        c["bad"] = bad = Stubborn(ValueError("no"), "content")
        with pytest.raises(UnsavedError):
            c.flush()
        if mend == "replace":
            c["bad"] = "good"
        elif mend == "delete":
            del c["bad"]
        elif mend == "pop":
            assert c.pop("bad") is bad
        elif mend == "clear":
            c.clear()
        else:
            bad.error = None
        c.flush()
        c._check()
        assert not c.inmem
    with Chest(path=path) as c:
        assert ("bad" in c) == (mend in ("replace", "mend in place"))


def test_close_saves_all_others_and_leaves_the_chest_open(path):
    c = Chest({"a": 1, "bad": Stubborn(ValueError("no")), "b": 2}, path=path)
    with pytest.raises(UnsavedError, match="'bad'"):
        c.close()
    assert not c.closed
    assert c["a"] == 1
    with Chest(path=path, readonly=True) as other:
        assert dict(other) == {"a": 1, "b": 2}
    discard(c, "bad")
    c.close()
    assert c.closed


def test_the_end_of_a_with_block_tells_of_the_unsavable(path):
    with pytest.raises(UnsavedError, match="'bad'"), Chest(path=path) as c:
        c["bad"] = lambda: 0
    discard(c, "bad")
    c.close()


def test_a_temporary_chest_is_closed_whatever_it_holds():
    with Chest(available_memory=0) as c:
        c["bad"] = lambda: 0
        c["good"] = 1
    assert c.closed


def test_move_to_disk_tells_that_a_value_is_unsavable(path):
    with Chest({"bad": lambda: 0, "good": 1}, path=path) as c:
        with pytest.raises(UnsavedError, match="'bad'"):
            c.move_to_disk("bad")
        assert "bad" in c.inmem
        c._check()
        discard(c, "bad")


def test_a_value_that_becomes_unsavable_stays_and_disk_keeps_the_old_one(path):
    with Chest({"k": [1]}, path=path) as c:
        c.flush()
        c["k"].append(lambda: 0)
        c.available_memory = 0
        assert len(c["k"]) == 2
        with pytest.raises(UnsavedError, match="'k'"):
            c.flush()
        with Chest(path=path, readonly=True) as other:
            assert other["k"] == [1]
        c["k"][1] = 2
    with Chest(path=path) as c:
        assert c["k"] == [1, 2]


def test_an_unsavable_value_is_told_of_once(path, caplog):
    caplog.set_level(logging.WARNING, "chest")
    with Chest(path=path, available_memory=0) as c:
        c["bad"] = Stubborn(ValueError("no"))
        crowd(c)
        with pytest.raises(UnsavedError):
            c.flush()
        crowd(c)
        assert [(record.name, record.levelname) for record in caplog.records] == [
            ("chest", "WARNING")
        ]
        assert "'bad'" in caplog.text
        assert re.search("ValueError.*no", caplog.text)
        discard(c, "bad")


def test_a_flood_of_unsavable_values_is_tried_once_each_and_told_of_once(path, caplog):
    caplog.set_level(logging.WARNING, "chest")
    error = ValueError("no")
    with Chest(path=path, available_memory=1000) as c:
        flood = [Stubborn(error) for _ in range(10_000)]
        for n, value in enumerate(flood):
            c[n] = value
        c["good"] = "x" * 500
        assert "good" not in c.inmem
        assert {value.tries for value in flood} <= {0, 1}
        assert sum(value.tries for value in flood) > 9_900
        assert len(caplog.records) == 1
        assert len(c.inmem) == 10_000
        c._check()
        c.clear()


def test_an_unsavable_value_is_not_tried_again_by_what_others_do(path):
    with Chest(path=path, available_memory=0) as c:
        c["bad"] = bad = Stubborn(ValueError("no"))
        assert bad.tries == 1
        crowd(c)
        list(c.values())
        c.shrink()
        c.available_memory = 10
        c.available_memory = 0
        del c["other0"]
        c.write_keys()
        c.get("other1")
        assert bad.tries == 1
        discard(c, "bad")


@pytest.mark.parametrize("retry", ["flush", "close", "set"])
def test_an_unsavable_value_is_tried_again(path, retry):
    c = Chest(path=path, available_memory=0)
    c["bad"] = bad = Stubborn(ValueError("no"), "content")
    for _ in range(2):
        tries = bad.tries
        if retry == "set":
            c["bad"] = bad
        else:
            with pytest.raises(UnsavedError):
                getattr(c, retry)()
        assert tries < bad.tries <= tries + 2
        assert "bad" in c.inmem
    bad.error = None
    if retry == "set":
        c["bad"] = bad
    else:
        getattr(c, retry)()
    c.close()
    with Chest(path=path) as c:
        assert c["bad"].content == "content"


@pytest.mark.parametrize("value", [{"a": object()}, nested(5_000), {(1, 2): 3}, {1, 2}, b"bytes"],
                         ids=["object", "deep", "tuple as key", "set", "bytes"])  # fmt: skip
@pytest.mark.parametrize("name", ["json", "json in gzip"])
def test_what_json_cannot_write_stays_in_memory(path, value, name):
    with Chest(path=path, available_memory=0, **SERIALIZERS[name]) as c:
        c["bad"] = [*range(100), value]
        c["good"] = [1]
        assert [*c.inmem] == ["bad"]
        with pytest.raises(UnsavedError, match="'bad'"):
            c.flush()
        assert files(path) == [".keys", "good"]
        c._check()
        discard(c, "bad")


INTERRUPTED = {
    "set": lambda c: c.__setitem__("new", "n" * 500),
    "set of a large value": lambda c: c.__setitem__("new", "n" * 200_000),
    "flush": lambda c: c.flush(),
    "close": lambda c: c.close(),
    "read": lambda c: c["old"],
    "lower the budget": lambda c: setattr(c, "available_memory", 0),
    "move to disk": lambda c: c.move_to_disk("k3"),
}


@pytest.mark.parametrize("known", [False, True], ids=["new values", "values on disk"])
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("operation", INTERRUPTED)
def test_an_interrupt_leaves_a_sound_chest(path, operation, large, known):
    content = bytes(200_000) if large else b"c"
    values = {f"k{n}": Stubborn(None, content) for n in range(5)}
    with Chest(path=path, nbytes=lambda value: 1000) as c:
        c["old"] = "old"
        c.move_to_disk("old")
        c.update(values)
        if known:
            c.flush()
        c.available_memory = 5000
        values["k3"].error = Interrupt()
        for _ in range(10):  # until it is the turn of k3
            try:
                INTERRUPTED[operation](c)
                c["another"] = [c.get("another")]
                c.move_to_disk("old")
                c["k0"] = values["k0"]
            except Interrupt:
                break
        else:
            pytest.fail("nothing was interrupted")
        c._check()
        values["k3"].error = None
        assert {key: c[key] for key in values} == values
        assert c["old"] == "old"
        c.flush()
        c._check()
        with Chest(path=path, readonly=True) as other:
            assert {*other} == {*c}
            assert all(other[key].content == content for key in values)


def test_telling_of_an_unsavable_value_does_not_keep_it_alive(path, caplog):
    with Chest(path=path, available_memory=0) as c:
        c["bad"] = value = Stubborn(ValueError("no"))
        reference = weakref.ref(value)
        assert caplog.records
        c["bad"] = ["good"]
        del value
        gc.collect()
        assert reference() is None


class Busy(Box):
    """Does something while it is pickled, as finalizers do that garbage collection runs."""

    act = None

    def __getstate__(self):
        if Busy.act is not None:
            act, Busy.act = Busy.act, None
            act()
        return vars(self)


WHILE_PICKLED = {
    "read": lambda c: c["k1"],
    "change": lambda c: c["k1"].append("more"),
    "set another": lambda c: c.__setitem__("k1", ["new"]),
    "set a new key": lambda c: c.__setitem__("new", ["new"]),
    "delete another": lambda c: c.__delitem__("k1"),
    "delete one after it": lambda c: c.__delitem__("k3"),
    "pop it": lambda c: c.pop("k2"),
    "replace it": lambda c: c.__setitem__("k2", ["new"]),
    "clear": lambda c: c.clear(),
    "flush": lambda c: c.flush(),
    "spill": lambda c: c.move_to_disk("k1"),
    "spill one after it": lambda c: c.move_to_disk("k3"),
}


@pytest.mark.parametrize("clean", [False, True], ids=["new values", "values on disk"])
@pytest.mark.parametrize("leaving", ["lower the budget", "flush", "set"])
@pytest.mark.parametrize("act", WHILE_PICKLED)
def test_the_chest_may_be_used_while_a_value_is_pickled(path, act, leaving, clean, monkeypatch):
    with Chest(path=path, nbytes=lambda value: 1000) as c:
        c.update({f"k{n}": Busy(n) if n == 2 else [n] for n in range(5)})
        if clean:
            c.flush()
        monkeypatch.setattr(Busy, "act", staticmethod(lambda: WHILE_PICKLED[act](c)))
        if leaving == "lower the budget":
            c.available_memory = 0
        elif leaving == "flush":
            c.flush()
        else:
            c.available_memory = 5000
            c["set"] = ["set"]
            c.flush()
        assert Busy.act is None
        c._check()
        found = dict(c)
        expected = {f"k{n}": Busy(n) if n == 2 else [n] for n in range(5)}
        if leaving == "set":
            expected["set"] = ["set"]
        if act == "change":
            expected["k1"].append("more")
        elif act == "set another":
            expected["k1"] = ["new"]
        elif act == "set a new key":
            expected["new"] = ["new"]
        elif act == "replace it":
            expected["k2"] = ["new"]
        elif act == "clear":
            expected = {key: expected[key] for key in found}
        else:
            deleted = {"delete another": "k1", "delete one after it": "k3", "pop it": "k2"}
            expected.pop(deleted.get(act), None)
        assert found == expected
    with Chest(path=path) as c:
        assert dict(c) == expected


# -- keys that cannot be written -------------------------------------------------------------------


def nested_tuple(depth):
    key = ()
    for _ in range(depth):
        key = (key,)
    return key


class StubbornKey(Stubborn):
    __hash__ = object.__hash__


class NamelessKey(StubbornKey):
    def __repr__(self):
        raise ValueError("no name")


UNPICKLABLE_KEYS = {
    "lambda": lambda: lambda: 0,
    "object of a local class": local_object,
    "raises ValueError": lambda: StubbornKey(ValueError("no")),
    "raises OSError": lambda: StubbornKey(OSError(errno.ENOSPC, "the key's")),
    "raises MemoryError": lambda: StubbornKey(MemoryError()),
    "within a tuple": lambda: ("a", StubbornKey(KeyError("no"))),
}


@pytest.fixture(params=UNPICKLABLE_KEYS)
def unpicklable(request):
    return UNPICKLABLE_KEYS[request.param]()


def test_the_value_of_an_unpicklable_key_stays_in_memory(path, unpicklable):
    with Chest(path=path, available_memory=0) as c:
        c[unpicklable] = "stays"
        crowd(c)
        assert [*c.inmem.values()] == ["stays"]
        assert c[unpicklable] == "stays"
        c._check()
        discard(c, unpicklable)


def test_flush_names_an_unpicklable_key_and_saves_all_others(path, unpicklable):
    with Chest(path=path) as c:
        c["a"], c[unpicklable], c["b"] = 1, 2, 3
        with pytest.raises(UnsavedError) as info:
            c.flush()
        assert [id(key) for key in info.value.keys] == [id(unpicklable)]
        assert isinstance(info.value.causes[0], KeyTypeError)
        assert info.value.causes[0].key is unpicklable
        assert "1 of the values could not be saved" in str(info.value)
        with Chest(path=path, readonly=True) as other:
            assert dict(other) == {"a": 1, "b": 3}
        discard(c, unpicklable)


@pytest.mark.parametrize(
    "key",
    [nested_tuple(20_000), NamelessKey(ValueError("no"))],
    ids=["nested too deeply", "without a repr"],
)
def test_an_unpicklable_key_is_told_of_even_where_its_repr_fails(path, key, caplog):
    c = Chest(path=path, available_memory=0)
    try:
        c[key] = "stays"
        crowd(c)
        assert [*c.inmem.values()] == ["stays"]
        assert len(caplog.records) == 1
        with pytest.raises(UnsavedError) as info:
            c.flush()
        assert info.value.keys[0] is key
        assert "1 of the values could not be saved" in str(info.value)
    finally:
        c.clear()
        c.close()


class Colour(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


class Name(str):
    pass


class Pair(NamedTuple):
    a: int
    b: int


NOT_PLAIN = [
    dt.date(2026, 1, 1), Colour.RED, Number.ONE, Name("b"), Pair(1, 2), np.int64(1),
    np.str_("b"), ("a", dt.date(2026, 1, 1)), frozenset({Colour.RED}), object(), len,
    Decimal(1), 1j, range(3),
]  # fmt: skip
PLAIN = [
    "text", "", b"bytes", 1, -(10**30), 1.5, float("inf"), True, None, (), ("a", 1, (None,)),
    frozenset({1, "a"}), frozenset(), "\udc80", "a/b", "../x",
]  # fmt: skip


@pytest.mark.parametrize("key", NOT_PLAIN, ids=repr)
@pytest.mark.parametrize("way", ["set", "setdefault", "update", "update with pairs"])
def test_a_key_that_json_cannot_store_is_refused_when_it_is_set(path, key, way):
    with Chest(path=path, **SERIALIZERS["json"]) as c:
        c["a"] = 1
        with pytest.raises(KeyTypeError) as info:
            if way == "set":
                c[key] = 2
            elif way == "setdefault":
                c.setdefault(key, 2)
            elif way == "update":
                c.update({key: 2})
            else:
                c.update([(key, 2)])
        assert info.value.key is key
        assert dict(c) == {"a": 1}
        c._check()


@pytest.mark.parametrize("key", PLAIN, ids=repr)
@pytest.mark.parametrize("name", SERIALIZERS)
def test_a_plain_key_goes_with_every_serializer(path, key, name):
    with Chest(path=path, available_memory=0, **SERIALIZERS[name]) as c:
        c[key] = ["value"]
        assert not c.inmem
    with Chest(path=path, **SERIALIZERS[name]) as c:
        assert [*c.items()] == [(key, ["value"])]
        assert [type(k) for k in c] == [type(key)]


# -- a disk that refuses ---------------------------------------------------------------------------


CODES = {
    name: getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EMFILE", "EACCES")
}
NEW = {
    "small": ["n" * 500],
    "larger than the budget": ["n" * 2000],
    "large": ["n" * 200_000],
}


class Seen:
    """A module as another one sees it, with some of its functions replaced."""

    def __init__(self, module, **replaced):
        self._module = module
        vars(self).update(replaced)

    def __getattr__(self, name):
        return getattr(self._module, name)


@contextmanager
def refusing(how, code=errno.ENOSPC):
    """Let no value file be opened for writing, or fill each only half; list those tried."""
    tried = []

    class Half(io.FileIO):
        def write(self, data):
            super().write(data[: len(data) // 2])
            raise OSError(code, os.strerror(code))

    def open_file(path, mode="r", **options):
        if "r" in mode:
            return open(path, mode, **options)
        tried.append(path)
        if how == "open":
            raise OSError(code, os.strerror(code), path)
        return Half(path, mode)

    with pytest.MonkeyPatch.context() as patch:
        for module in (chest.files, serialize):
            patch.setattr(module, "builtins", Seen(builtins, open=open_file))
        yield tried


@pytest.fixture
def crowded(path):
    """A chest with a value on disk, and one in memory that leaves little room for others."""
    with Chest(path=path, available_memory=1000) as c:
        c["old"] = ["old"]
        c.move_to_disk("old")
        c["kept"] = ["k" * 600]
        yield c
        c._check()


each_way = pytest.mark.parametrize("how", ["open", "write"])
each_code = pytest.mark.parametrize("code", CODES)
each_size = pytest.mark.parametrize("size", NEW)


@each_way
@each_code
@each_size
def test_a_set_that_the_disk_refuses_raises_after_its_value_was_stored(crowded, how, code, size):
    c, value = crowded, NEW[size]
    with refusing(how, CODES[code]):
        with pytest.raises(OSError) as info:
            c["new"] = value
        assert info.value.errno == CODES[code]
        assert c["new"] is value
        assert c["kept"] == ["k" * 600]
        assert {*c.inmem} == {"new", "kept"}
        assert c.memory_usage == sum(nbytes(each) for each in c.inmem.values())
        c._check()


@each_way
@each_code
@each_size
def test_the_refusal_says_where_how_much_is_needed_and_how_much_is_free(crowded, how, code, size):
    with refusing(how, CODES[code]), pytest.raises(OSError) as info:
        crowded["new"] = NEW[size]
    assert str(info.value.filename).startswith(crowded.path)
    assert crowded.path in str(info.value)
    assert os.strerror(CODES[code]) in str(info.value)
    needed, free = map(int, re.search(r"(\d+) bytes needed, (\d+) bytes", str(info.value)).groups())
    streams = [len(pickle.dumps(value, 5)) for value in (NEW[size], crowded["kept"])]
    assert needed in streams or (size, needed) == ("large", nbytes(NEW[size]))  # not dumped yet
    assert free > 0


@each_way
@each_size
def test_a_refused_value_leaves_no_file(crowded, path, how, size):
    with refusing(how):
        with pytest.raises(OSError):
            crowded["new"] = NEW[size]
        with pytest.raises(UnsavedError):
            crowded.flush()
        assert files(path) == [".keys", "old"]


@each_way
@each_code
@each_size
def test_flush_names_all_that_was_refused_and_succeeds_later(crowded, path, how, code, size):
    c = crowded
    with refusing(how, CODES[code]):
        with pytest.raises(OSError):
            c["new"] = NEW[size]
        with pytest.raises(UnsavedError) as info:
            c.flush()
        assert {*info.value.keys} == {"new", "kept"}
        assert [cause.errno for cause in info.value.causes] == [CODES[code]] * 2
        c._check()
    c.flush()
    assert c.memory_usage <= c.available_memory
    with Chest(path=path, readonly=True) as other:
        assert dict(other) == {"old": ["old"], "kept": ["k" * 600], "new": NEW[size]}


@each_way
def test_close_names_all_that_was_refused_and_succeeds_later(path, how):
    c = Chest(path=path, available_memory=1000)
    with refusing(how):
        with pytest.raises(OSError):
            c["new"] = NEW["large"]
        with pytest.raises(UnsavedError, match="'new'"):
            c.close()
        assert not c.closed
        assert c["new"] == NEW["large"]
    c.close()
    with Chest(path=path) as c:
        assert c["new"] == NEW["large"]


@each_way
@each_code
def test_reading_raises_nothing_though_nothing_can_leave_for_it(path, how, code):
    expected = {f"k{n}": [n, "x" * 200] for n in range(20)}
    with Chest(expected, path=path):
        pass
    with Chest(path=path, available_memory=1000) as c:
        c["new"] = expected["new"] = ["n" * 900]
        with refusing(how, CODES[code]):
            for key, value in expected.items():
                assert c[key] == value
                assert c.get(key) == value
                assert c.setdefault(key, "default") == value
            assert dict(c.items()) == expected
            c.prefetch(expected)
            c.get_from_disk("k3")
            c._check()


@each_way
def test_a_change_in_place_raises_nothing_in_a_read_though_it_cannot_be_written(path, how):
    with Chest({f"k{n}": [n] for n in range(5)}, path=path):
        pass
    with Chest(path=path, available_memory=0) as c:
        with refusing(how):
            for n in range(5):
                c[f"k{n}"].append("changed")
            assert dict(c) == {f"k{n}": [n, "changed"] for n in range(5)}
            c._check()
        c.flush()
        assert not c.inmem
    with Chest(path=path) as c:
        assert dict(c) == {f"k{n}": [n, "changed"] for n in range(5)}


@each_way
def test_that_reads_make_no_room_is_told_once(path, how, caplog):
    caplog.set_level(logging.WARNING, "chest")
    with Chest({f"k{n}": [n] for n in range(20)}, path=path):
        pass
    with Chest(path=path, available_memory=0) as c, refusing(how):
        for n in range(20):
            c[f"k{n}"].append("changed")
        assert len(caplog.records) == 1
        assert os.strerror(errno.ENOSPC) in caplog.text
        assert path in caplog.text
        c.clear()


@each_way
def test_the_first_refusal_ends_the_spill(path, how):
    with Chest({f"k{n}": ["x" * 500] for n in range(50)}, path=path) as c:
        with refusing(how) as tried:
            with pytest.raises(OSError):
                c.available_memory = 0
            assert len(tried) == 1
            assert len(c.inmem) == 50
            c._check()
        c.shrink()
        assert not c.inmem


@each_way
def test_move_to_disk_raises_the_refusal(crowded, how):
    with refusing(how):
        with pytest.raises(OSError, match="bytes needed"):
            crowded.move_to_disk("kept")
        assert "kept" in crowded.inmem


@each_way
def test_deleting_makes_room_on_a_full_disk(crowded, how):
    c = crowded
    with refusing(how):
        with pytest.raises(OSError):
            c["new"] = ["n" * 500]
        del c["kept"]
        c["new"] = ["n" * 600]
        c["another"] = 1
        assert c.pop("new") == ["n" * 600]
        assert [*c] == ["old", "another"]
        c.clear()
        assert not c
        c.flush()


@each_way
def test_flush_names_the_unsavable_and_the_refused_together(crowded, how):
    c = crowded
    c["bad"] = lambda: 0
    with refusing(how), pytest.raises(UnsavedError) as info:
        c.flush()
    assert {*info.value.keys} == {"bad", "kept"}
    with pytest.raises(UnsavedError) as info:
        c.flush()
    assert info.value.keys == ["bad"]
    discard(c, "bad")


class Limit:
    """A folder on a disk that is full for any file that is to grow."""

    def __init__(self, path):
        self.path = path
        os.mkdir(path)

    @contextmanager
    def full(self):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def remove(self):
        """Do nothing: the folder goes with all that the test made."""


class SmallDisk:
    """A folder that is a file system of its own."""

    def __init__(self, path):
        self.path = path
        os.mkdir(path)
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path]
        subprocess.run(command, check=True, capture_output=True)

    @contextmanager
    def full(self):
        ballast = os.path.join(self.path, "ballast")
        with suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        try:
            yield
        finally:
            os.unlink(ballast)

    def remove(self):
        subprocess.run(["umount", "--lazy", self.path], check=True)


@pytest.fixture(params=[Limit, SmallDisk])
def small_disk(request, tmp_path):
    """A disk that really refuses; a file system of its own where one may be mounted."""
    try:
        disk = request.param(str(tmp_path / "disk"))
    except (OSError, subprocess.CalledProcessError):  # not as root: then the other one again
        disk = Limit(str(tmp_path / "folder"))
    yield disk
    disk.remove()


@pytest.mark.parametrize("name", SERIALIZERS)
@each_size
def test_a_full_disk_loses_nothing(small_disk, size, name):
    path = os.path.join(small_disk.path, "chest")
    with Chest(path=path, available_memory=1000, **SERIALIZERS[name]) as c:
        c["old"] = ["old"]
        c.move_to_disk("old")
        c["kept"] = ["k" * 600]
        expected = {"old": ["old"], "kept": ["k" * 600], "new": random_text(NEW[size])}
        with small_disk.full():
            with pytest.raises(OSError, match=r"bytes needed, \d+ bytes are free") as info:
                c["new"] = expected["new"]
            assert path in str(info.value)
            assert c["new"] is expected["new"]
            assert dict(c) == expected
            assert files(path) == [".keys", "old"]
            with pytest.raises(UnsavedError) as info:
                c.flush()
            assert {*info.value.keys} == {"new", "kept"}
            assert files(path) == [".keys", "old"]
            c._check()
        c.flush()
        c._check()
        assert dict(c) == expected
    with Chest(path=path, **SERIALIZERS[name]) as c:
        assert dict(c) == expected
        c._check()


def random_text(value):
    """Return a value like this one that does not shrink when it is compressed."""
    return ["".join(random.Random(0).choices("0123456789abcdef", k=len(value[0])))]


def dump_in_pieces(obj, file):
    for start in range(0, len(obj), 999):
        file.write(obj[start : start + 999])


def dump_flushing(obj, file):
    file.write(obj)
    file.flush()


def dump_zip(obj, file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("content", obj)


def dump_by_name(obj, file):
    with open(file.name, "wb") as again:
        again.write(obj)


def dump_complaining(obj, file):
    try:
        file.write(obj)
        file.flush()
    except OSError as error:
        raise ValueError("it does not work") from error


def dump_silently(obj, file):
    with suppress(OSError):
        file.write(obj)
    with suppress(OSError):
        file.flush()


DUMPS = {
    "write": lambda obj, file: file.write(obj),
    "write in pieces": dump_in_pieces,
    "flush": dump_flushing,
    "zip": dump_zip,
    "by name": dump_by_name,
    "numpy": lambda obj, file: np.save(file, np.frombuffer(obj, "u1")),
    "with an error of its own": dump_complaining,
    "without an error": dump_silently,
}


@pytest.mark.parametrize("length", [5000, 200_000])
@pytest.mark.parametrize("name", DUMPS)
def test_a_full_disk_is_not_taken_for_an_unsavable_value(small_disk, name, length):
    path = os.path.join(small_disk.path, "chest")
    value = random.Random(0).randbytes(length)
    with Chest(path=path, available_memory=0, dump=DUMPS[name]) as c:
        with small_disk.full():
            for _ in range(2):
                with pytest.raises(OSError, match="bytes needed"):
                    c["k"] = value
            with pytest.raises(OSError, match="bytes needed"):
                c.shrink()
            assert c["k"] is value
            assert files(path) == [".keys"]
        c.shrink()
        assert not c.inmem
        with open(c.key_to_filename("k"), "rb") as file:
            assert value in file.read()
        c._check()


@pytest.mark.parametrize("name", SERIALIZERS)
def test_unchanged_values_leave_though_the_disk_is_full(small_disk, name):
    path = os.path.join(small_disk.path, "chest")
    expected = {f"k{n}": [n] for n in range(5)}
    with Chest(expected, path=path, **SERIALIZERS[name]) as c:
        c.flush()
        with small_disk.full():
            c.available_memory = 0
            assert not c.inmem
            assert dict(c) == expected


def test_what_was_changed_stays_while_it_cannot_be_written(small_disk):
    path = os.path.join(small_disk.path, "chest")
    with Chest(path=path, available_memory=50_000) as c:
        for n in range(20):
            c[n] = [b"x" * 9000]
        c.flush()
        with small_disk.full():
            for n in range(20):
                c[n].append(n)
            assert c.memory_usage > 150_000
            assert [c[n] for n in range(20)] == [[b"x" * 9000, n] for n in range(20)]
        c.shrink()
        assert c.memory_usage <= 50_000
        c._check()
    with Chest(path=path) as c:
        assert [c[n] for n in range(20)] == [[b"x" * 9000, n] for n in range(20)]


@pytest.mark.parametrize("make", [bytes, lambda n: [b"x" * n]])
def test_what_is_read_leaves_though_what_is_new_cannot(small_disk, make):
    path = os.path.join(small_disk.path, "chest")
    left = []
    with Chest(path=path, available_memory=50_000, on_overflow=left.append) as c:
        for n in range(40):
            c[n] = make(9000 + n)
        c.flush()
        with small_disk.full():
            with suppress(OSError):
                for n in range(100):
                    c["new", n] = make(9000)
            new = [key for key in c if key not in range(40)]
            assert new
            for n in [*range(40)] * 2:
                del left[:]
                assert c[n] == make(9000 + n)
                assert c.memory_usage < 2 * 50_000 + 2 * 9100
                assert not {*left} & {*c.inmem}
            assert {*new} <= {*c.inmem}
        c.shrink()
        assert c.memory_usage <= 50_000
        c._check()
    with Chest(path=path) as c:
        assert [c[n] for n in range(40)] == [make(9000 + n) for n in range(40)]
        assert all(c[key] == make(9000) for key in new)


def test_a_temporary_chest_leaves_no_folder_on_a_full_disk(small_disk, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", small_disk.path)
    with Chest(available_memory=0) as c:
        with small_disk.full():
            before = os.listdir(small_disk.path)
            for n in range(3):
                with pytest.raises(OSError, match=r"bytes needed, \d+ bytes are free") as info:
                    c[n] = [n]
                assert small_disk.path in str(info.value)
            assert os.listdir(small_disk.path) == before
            assert dict(c) == {n: [n] for n in range(3)}
        c.shrink()
        assert not c.inmem
        assert dict(c) == {n: [n] for n in range(3)}


# -- the budget ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1000, 20_000, 300_000])
def test_the_budget_holds_after_every_operation(path, budget):
    rng = random.Random(budget)
    expected = {}
    with Chest(path=path, available_memory=budget) as c:
        for _ in range(300):
            key = f"k{rng.randrange(30)}"
            action = rng.choice(["set", "set", "get", "get", "delete", "change", "values"])
            if action == "set":
                c[key] = expected[key] = ["x" * rng.choice([1, 50, 900, 5000, 200_000])]
                expected[key] = [*expected[key]]
            elif action == "get":
                assert c.get(key) == expected.get(key)
            elif action == "delete":
                assert (c.pop(key, None) is None) == (expected.pop(key, None) is None)
            elif action == "change" and key in c:
                c[key].append("more")
                expected[key].append("more")
            elif action == "values" and rng.random() < 0.2:
                assert [*c.values()] == [*expected.values()]
            assert c.memory_usage <= budget
        c._check()
        assert dict(c) == expected


@pytest.mark.parametrize("value", [["x" * 5000], ["x" * 200_000]], ids=["small", "large"])
@pytest.mark.parametrize("way", ["set", "read", "read and changed", "changed in hand"])
def test_a_value_larger_than_the_budget_pushes_nothing_else_out(path, way, value):
    small = {f"k{n}": [n] for n in range(10)}
    with Chest({**small, "larger": value}, path=path):
        pass
    with Chest(path=path, available_memory=3000) as c:
        c.prefetch(small)
        assert {*c.inmem} == {*small}
        if way == "set":
            c["larger"] = [*value]
        elif way == "read":
            assert c["larger"] == value
        else:
            c["larger"].append("more")
            if way == "read and changed":
                assert c["larger"][-1] == "more"
            c["k0"].append("next value")
        assert {*c.inmem} == {*small}
        c.flush()
        assert {*c.inmem} == {*small}
        c._check()


def test_usage_is_the_sum_of_the_sizes():
    with Chest() as c:
        values = [b"x" * 1000, [1, 2], "text", {"a": 1}, np.zeros(1000)]
        for n, value in enumerate(values):
            c[n] = value
        assert c.memory_usage == sum(map(nbytes, values))
        c[0] = "replaced"
        del c[1]
        c.move_to_disk(4)
        assert c.memory_usage == sum(map(nbytes, ["replaced", *values[2:4]]))


@pytest.mark.parametrize("end", ["delete", "pop", "replace", "clear", "spill", "flush and spill"])
def test_a_value_that_grows_and_shrinks_leaves_no_trace_in_the_sum(end):
    with Chest() as c:
        for n in range(10):
            c[n] = [n]
            c[n].extend("x" * 1000)
            if n % 2:
                c[n].clear()
        if end == "delete":
            for n in range(10):
                del c[n]
        elif end == "pop":
            for n in range(10):
                c.pop(n)
        elif end == "replace":
            for n in range(10):
                c[n] = n
            assert c.memory_usage == sum(map(nbytes, range(10)))
            c.clear()
        elif end == "clear":
            c.clear()
        else:
            if end == "flush and spill":
                c.flush()
            c.available_memory = 0
        assert c.memory_usage == 0
        c._check()


def test_what_is_set_is_measured_once():
    sized = []
    with Chest(nbytes=lambda value: sized.append(value) or 10) as c:
        c["k"] = "value"
        c["k"]
        c.flush()
        c.move_to_disk("k")
        assert sized == ["value"]


def test_a_size_function_of_ones_own_counts():
    with Chest(available_memory=100, nbytes=len) as c:
        c["a"] = "x" * 60
        assert c.memory_usage == 60
        c["b"] = "x" * 40
        assert c.memory_usage == 100
        c["c"] = "x"
        assert c.memory_usage < 100


@pytest.mark.parametrize("size", [np.int64(100), np.float64(100.5), 100.0, True, 0], ids=repr)
def test_a_size_may_be_any_number(size):
    with Chest(nbytes=lambda value: size) as c:
        c["k"] = "value"
        assert c.memory_usage == int(size)
        assert type(c.memory_usage) is int
        c._check()


NONSENSE = [-1, -0.5, float("nan"), float("inf"), None, "12", object(), [], 1j, np.zeros(3)]


@pytest.mark.parametrize("size", NONSENSE, ids=lambda size: type(size).__name__)
def test_where_a_size_is_nonsense_the_estimate_counts_and_that_is_told_once(size, caplog):
    caplog.set_level(logging.INFO, "chest")
    with Chest(nbytes=lambda value: size) as c:
        for n in range(5):
            c[n] = f"value {n}"
        assert c.memory_usage == sum(nbytes(f"value {n}") for n in range(5))
        assert len(caplog.records) == 1
        c._check()


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("no"), OSError("no"), MemoryError()])
def test_where_the_size_function_raises_the_estimate_counts_and_that_is_told_once(error, caplog):
    def fail(value):
        raise error

    caplog.set_level(logging.INFO, "chest")
    with Chest(nbytes=fail) as c:
        for n in range(5):
            c[n] = f"value {n}"
        assert c[0] == "value 0"
        assert c.memory_usage == sum(nbytes(f"value {n}") for n in range(5))
        assert len(caplog.records) == 1
        assert type(error).__name__ in caplog.text


def test_a_lower_budget_holds_at_once():
    with Chest() as c:
        for n in range(20):
            c[n] = "x" * 1000
        for budget in (15_000, 5000, 1000.5, 0):
            c.available_memory = budget
            assert c.available_memory == budget
            assert c.memory_usage <= budget
        assert not c.inmem
        assert all(c[n] == "x" * 1000 for n in range(20))


def test_a_higher_budget_is_used():
    with Chest(available_memory=0) as c:
        for n in range(5):
            c[n] = "x" * 1000
        c.available_memory = 10**6
        for n in range(5):
            c[n]
        assert len(c.inmem) == 5


@pytest.mark.parametrize("budget", [-1, float("nan"), -0.5])
def test_a_budget_that_is_none_is_refused_and_the_old_one_stays(budget):
    with Chest(available_memory=1000) as c:
        with pytest.raises(ValueError, match="available_memory"):
            c.available_memory = budget
        assert c.available_memory == 1000


def test_with_an_infinite_budget_nothing_leaves(path):
    with Chest(path=path, available_memory=float("inf")) as c:
        crowd(c)
        assert len(c.inmem) == 12
        assert files(path) == [".keys"]


# -- loading ---------------------------------------------------------------------------------------


class Gate:
    """A loader that waits with the value of ``slow`` until it is let go on."""

    def __init__(self):
        self.started = threading.Event()
        self.go = threading.Event()
        self.loads = collections.Counter()
        self.error = None

    def load(self, file):
        name = os.path.basename(file.name)
        self.loads[name] += 1
        if name == "slow":
            self.started.set()
            assert self.go.wait(10)
            if self.error is not None:
                raise self.error
        return pickle.load(file)


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def gated(path, gate):
    """A chest on whose disk are ``slow`` and ``other``, with ``resident`` in memory."""
    with Chest(path=path, dump=pickle.dump, load=gate.load) as c:
        c.update(slow=["slow"], other=["other"], resident=["resident"])
        c.flush()
        c.move_to_disk("slow")
        c.move_to_disk("other")
        c["resident"]
        yield c
        gate.go.set()
        c._check()


class Watched(threading.Condition):
    """A condition that tells when a thread is about to wait for it."""

    def __init__(self, lock):
        super().__init__(lock)
        self.waiting = threading.Semaphore(0)

    def wait(self, timeout=None):
        self.waiting.release()
        return super().wait(timeout)


@pytest.fixture
def watched(gated, monkeypatch):
    condition = Watched(gated.lock)
    monkeypatch.setattr(gated._memory._loads, "_ended", condition)
    return condition


MEANWHILE = {
    "hit": lambda c: c["resident"].append(1),
    "hit with get": lambda c: c.get("resident"),
    "load another": lambda c: c["other"],
    "set": lambda c: c.__setitem__("new", 1),
    "set and spill": lambda c: (c.__setitem__("new", 1), c.move_to_disk("new")),
    "delete": lambda c: c.__delitem__("other"),
    "contains": lambda c: "slow" in c,
    "len": len,
    "keys": list,
    "flush": lambda c: c.flush(),
    "lower the budget": lambda c: setattr(c, "available_memory", 0),
}


@pytest.mark.parametrize("operation", MEANWHILE)
def test_a_slow_load_delays_nobody_else(gated, gate, operation):
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(gated.__getitem__, "slow")
        assert gate.started.wait(10)
        MEANWHILE[operation](gated)
        assert not slow.done()
        gate.go.set()
        assert slow.result(10) == ["slow"]


def test_a_value_is_loaded_once_however_many_threads_miss_it(gated, gate, watched):
    with ThreadPoolExecutor(6) as pool:
        found = [pool.submit(gated.__getitem__, "slow") for _ in range(6)]
        for _ in range(5):
            assert watched.waiting.acquire(timeout=10)
        gate.go.set()
        values = [each.result(10) for each in found]
    assert gate.loads["slow"] == 1
    assert all(value is values[0] for value in values)


def test_a_load_that_fails_fails_for_each_thread_that_waits_for_it(gated, gate, watched):
    gate.error = ValueError("no")
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(gated.__getitem__, "slow") for _ in range(4)]
        for _ in range(3):
            assert watched.waiting.acquire(timeout=10)
        gate.go.set()
        errors = [each.exception(10) for each in found]
    assert [type(error) for error in errors] == [SerializerError] * 4
    gate.error = None
    assert gated["slow"] == ["slow"]


def test_a_value_that_is_replaced_while_it_loads_is_the_new_one(gated, gate):
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(gated.__getitem__, "slow")
        assert gate.started.wait(10)
        gated["slow"] = "new"
        gate.go.set()
        assert slow.result(10) == "new"
    assert gated["slow"] == "new"


def test_a_value_that_is_replaced_on_disk_while_it_loads_is_the_new_one(gated, gate):
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(gated.__getitem__, "slow")
        assert gate.started.wait(10)
        gated["slow"] = "new"
        gated.move_to_disk("slow")
        gate.go.set()
        assert slow.result(10) == "new"


def test_a_key_that_is_deleted_while_it_loads_is_missing(gated, gate):
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(gated.__getitem__, "slow")
        assert gate.started.wait(10)
        del gated["slow"]
        gate.go.set()
        with pytest.raises(KeyError) as info:
            slow.result(10)
    assert info.value.args == ("slow",)


def test_a_chest_that_is_closed_while_it_loads_says_so(path, gate):
    c = Chest({"slow": ["slow"]}, path=path, dump=pickle.dump, load=gate.load)
    c.move_to_disk("slow")
    c["another"] = 1
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(c.__getitem__, "slow")
        assert gate.started.wait(10)
        c.close()
        gate.go.set()
        with pytest.raises(ChestClosedError):
            slow.result(10)


def test_a_pop_while_another_thread_loads_takes_the_value_out(gated, gate, watched):
    with ThreadPoolExecutor(2) as pool:
        got = pool.submit(gated.__getitem__, "slow")
        assert gate.started.wait(10)
        popped = pool.submit(gated.pop, "slow")
        assert watched.waiting.acquire(timeout=10)
        gate.go.set()
        assert got.result(10) == ["slow"]
        assert popped.result(10) == ["slow"]
    assert "slow" not in gated


def test_an_interrupted_load_can_be_done_again(gated, gate):
    gate.go.set()
    gate.error = Interrupt()
    with pytest.raises(Interrupt):
        gated["slow"]
    gate.error = None
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(gated.__getitem__, "slow").result(10) == ["slow"]


def test_a_list_under_two_keys_stays_in_memory_under_none_of_them():
    with Chest(available_memory=0) as c:
        for n in range(5):
            c["a", n] = [0] * 1000
            c["b", n] = c["a", n]
        c["last"] = [1]
        c.flush()
        c.get("none")
        assert c._memory._hands.kept.keys() <= {"last"}
        assert c["a", 0] == c["b", 4] == [0] * 1000


def test_a_budget_that_is_set_once_closed_is_not_changed():
    c = Chest(available_memory=777)
    c.close()
    with pytest.raises(ChestClosedError):
        c.available_memory = "1 GB"
    assert c.available_memory == 777


class Nosy(list):
    """Looks into the chest whenever it is pickled."""

    chest, times = None, 0

    def __reduce__(self):
        Nosy.times += 1
        Nosy.chest.get("other")
        return list, (list(self),)


def test_what_uses_the_chest_as_it_is_looked_at_is_looked_at_once(path):
    with Chest({"other": [1]}, path, available_memory=0) as c:
        Nosy.chest = c
        c.setdefault("nosy", Nosy([1])).append(2)
        Nosy.times = 0
        c["x"] = [1]
        assert Nosy.times <= 3  # as it is compared, and as it is written
        assert c["nosy"] == [1, 2]
        c._check()


def test_looking_at_what_was_in_hand_goes_on_after_an_interrupt(path):
    with Chest(path=path, available_memory=0) as c:
        c.setdefault("x", [1]).append(2)
        c._memory._hands.settling = True  # it came as the look ended
        c._memory._tear()
        c["y"] = [1]
        with Chest(path=path) as other:
            assert other["x"] == [1, 2]


def test_what_cannot_be_looked_at_stops_one_operation_and_no_other(path, monkeypatch):
    with Chest(path=path, available_memory=0, nbytes=lambda _: 100_000) as c:
        c.setdefault("x", [1]).append(2)
        differs = c._memory._differs

        def fail(key, *args):
            if key == "x":
                raise ValueError
            return differs(key, *args)

        with monkeypatch.context() as patch:
            patch.setattr(c._memory, "_differs", fail)
            with pytest.raises(ValueError):
                c["y"] = [1]
            assert c.get("z") is None
        assert c["x"] == [1, 2]
        c._check()


class Dying:
    """A value that does something when it dies, once."""

    def __init__(self, act):
        self.act = act

    def __reduce__(self):
        return list, ()

    def __del__(self):
        self.act()


def replace(c):
    c["k"] = [5]


def replace_in_hand(c):
    c["k"] = Dying(lambda: None)
    c.get("z")


def delete_and_read(c):
    del c["k"]
    c.get("z")


def delete_and_read_what_left(c):
    c.move_to_disk("z")
    del c["k"]
    c.get("z")


def delete(c):
    c.get("z")
    with suppress(KeyError):  # it may have done so as it left the hand
        del c["k"]


def clear(c):
    c.clear()


def fail(c):
    c.get("z")
    with suppress(ZeroDivisionError), c.transaction():
        c["k"] = [1]
        raise ZeroDivisionError


def fail_with_it(c):
    dying = c.pop("k")
    with suppress(ZeroDivisionError), c.transaction():
        c["k"] = dying
        del dying
        c["z"].append(4)
        raise ZeroDivisionError


def take_over(c):
    with Chest(path=c.path) as other:
        other["k"] = "theirs"
    c.get("z")


def transact_at_last(c):
    with c.transaction():
        c["last"] = ["word"]
        c.pop("x", None)


LAST_ACTS = {
    "set": lambda c: c.__setitem__("last", "word"),
    "set a list": lambda c: c.__setitem__("last", ["word"]),
    "set its key": lambda c: c.__setitem__("k", ["word"]),
    "set what is read": lambda c: c.__setitem__("z", ["word"]),
    "pop": lambda c: c.pop("k", None),
    "pop what is read": lambda c: c.pop("z", None),
    "clear": lambda c: c.clear(),
    "get": lambda c: [c.get(key) for key in ("k", "z", "x")],
    "flush": lambda c: c.flush(),
    "spill": lambda c: c.move_to_disk("x") if "x" in c else None,
    "transaction": transact_at_last,
}


@pytest.mark.parametrize("act", LAST_ACTS)
@pytest.mark.parametrize(
    "step",
    [
        replace, replace_in_hand, delete, delete_and_read, delete_and_read_what_left, clear, fail,
        fail_with_it, take_over,
    ],
)  # fmt: skip
@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_what_a_value_does_as_it_dies_is_done(path, step, act, budget):
    acts = []
    with Chest({"z": [1], "x": [2]}, path, available_memory=budget) as c:
        c["k"] = Dying(lambda: acts and acts.pop()(c))
        c.flush()
        acts.append(LAST_ACTS[act])
        step(c)
        len(c)
        acts.clear()
        c._check()
        found = {key: c.get(key) for key in ("k", "z", "x", "last") if key in c}
        assert found.keys() == {*c}
        assert c.memory_usage <= max(budget, 0)
        kept = {key: [] if isinstance(value, Dying) else value for key, value in found.items()}
        c.flush()
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == kept
