"""Transactions: all that is done in the block counts, or nothing of it, and nobody sees half.

``CHEST_SOAK=1`` counts to a thousand in each process, where a few must do otherwise.
"""

from __future__ import annotations

import errno
import functools
import gzip
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from copy import deepcopy
from io import FileIO
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import chest.bulk
import chest.head
import chest.index
import chest.ledger
import chest.store
import chest.upkeep
from chest import Chest, ChestClosedError, ReadOnlyError, UnsavedError
from chest.directory import Directory
from chest.index import Index
from chest.ledger import Ledger
from chest.memory import Memory
from chest.store import Store

ROOT = Path(chest.__file__).parent.parent
OLD = Path(__file__).parent / "old_chests"
SOAK = bool(os.environ.get("CHEST_SOAK"))
TIMES = int(os.environ.get("CHEST_STATEFUL", "0"))
JSON = {"dump": json.dump, "load": json.load}
HARMLESS = 250 if SOAK else 20  # seconds after which a test that waits has failed

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


class Failure(Exception):
    pass


def start():
    """What a chest holds before the transaction."""
    return {
        "a": 1,
        "b": [1, 2],
        ("t", "u"): {"k": [0]},
        "A": [5],
        "z": "text" * 100,
        "last": None,
    }


def other_values():
    """What is taken over from another chest."""
    return {"b": "theirs", "linked": [1], ("t", "linked"): "text" * 50, "unsaved": 1}


OPTIONS = {
    "all in memory": {},
    "nothing in memory": {"available_memory": 0},
    "json": {"available_memory": 0, **JSON},
    "packed, one name for all": {
        "available_memory": 600,
        "open": functools.partial(gzip.open, compresslevel=1),
        "key_to_filename": lambda key: "name",
    },
}


@pytest.fixture(params=OPTIONS)
def options(request):
    return OPTIONS[request.param]


@pytest.fixture
def often(monkeypatch):
    """Let indexes be compacted often."""
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 400)


@pytest.fixture
def chest_at(path):
    """Make chests at `path`, with what they are given saved; all are closed at the end."""
    with ExitStack() as stack:

        def make(data=None, **options):
            c = stack.enter_context(Chest(data, path, **options))
            c.flush()
            return c

        yield make


def tree(path):
    """Everything below a directory: files with their content, folders."""
    found = {}
    for folder, folders, files in os.walk(path):
        for name in files:
            full = os.path.join(folder, name)
            found[os.path.relpath(full, path)] = Path(full).read_bytes()
        for name in folders:
            found[os.path.relpath(os.path.join(folder, name), path)] = None
    return found


def read_back(path, **options):
    """What somebody who opens the chest finds; nothing is changed by that."""
    with Chest(path=path, readonly=True, **options) as c:
        return dict(c)


def abandon(c):
    """Let go of a chest as a process that dies does: nothing is written or removed."""
    c._finalizer.detach()
    c._memory._end()


def is_like(c, model):
    """Compare with a dict, the order of the keys too."""
    assert [*c] == [*model]
    assert dict(c) == model
    assert [*reversed(c)] == [*reversed(model)]
    return True


def goes_on(path, c, model, **options):
    """Check that a chest is like `model`, can be used, and leaves nothing about."""
    assert is_like(c, model)
    c["later"] = ["later"]
    c.flush()
    c._check()
    assert is_like(c, model | {"later": ["later"]})
    assert read_back(path, **options) == dict(c)
    with Chest(path=path, **options) as other, other.transaction(timeout=0):
        del other["later"]
    other = model.copy()
    assert is_like(c, other)
    return True


# -- what is done inside --------------------------------------------------------------------------


class Model(dict):
    """A dict with the methods that only a chest has, which change nothing of what it holds."""

    available_memory = 0

    def flush(self, *_):
        pass

    write_keys = refresh = shrink = move_to_disk = get_from_disk = prefetch = flush

    def transaction(self, timeout=None):
        return nullcontext()

    def update(self, other=(), /, overwrite=True, **more):
        pairs = dict(other) | more
        super().update({k: v for k, v in pairs.items() if overwrite or k not in self})


def set_values(m, _):
    m["a"] = 2
    m["new"] = [3]
    m["v", "w"] = "new"
    m["NEW"] = 4


def change_in_place(m, _):
    m["b"].append(3)
    m["t", "u"]["k"].append(1)
    m["A"].clear()


def delete(m, _):
    del m["a"], m["b"], m["t", "u"]


def pop(m, _):
    assert m.pop("b") == [1, 2]
    assert m.pop("none", 5) == 5


def pop_items(m, _):
    assert m.popitem() == ("last", None)
    assert m.popitem()[0] == "z"
    m["last"] = "back"


def set_defaults(m, _):
    m.setdefault("b", []).append(9)
    m.setdefault("new", []).append(1)
    m.setdefault("new", []).append(2)


def clear(m, _):
    m.clear()


def clear_and_set(m, _):
    m["new"] = 1
    m.clear()
    m["z"] = "back"
    m["a"] = [1]
    m.clear()
    m["b"] = [2]


def move_to_the_end(m, _):
    for key in ("a", "b"):
        value = m.pop(key)
        m[key] = value


def write_the_same_again_and_again(m, _):
    for n in range(12):
        m["a"] = n
        m.flush()
        m["b"].append(n)


def update(m, _):
    m.update({"a": 5, "n1": 1}, n2=[2])
    m.update([("n3", 3), ("b", 4)], overwrite=False)
    m |= {"n4": 4}


def take_over(m, more):
    m.update(more)


def take_over_what_is_missing(m, more):
    del m["b"]
    m.update(more, overwrite=False)
    m["linked"].append(2)


def move_to_disk(m, _):
    m["a"] = 2
    m.move_to_disk("a")
    m["b"].append(3)
    m.move_to_disk("b")
    m["b"].append(4)


def read(m, _):
    m.prefetch(["a", "b"])
    m.get_from_disk("z")
    m["b"].append(3)
    assert len([*m.items()]) == 6


def set_the_budget(m, _):
    m["b"].append(3)
    m.available_memory = 0
    m["b"].append(4)
    m.available_memory = 1e9
    m["b"].append(5)
    m["new"] = 1
    m.available_memory = 300


def flush(m, _):
    m["a"] = 2
    m.flush()
    del m["z"]
    m.write_keys()
    m["z"] = 1
    m.refresh()
    m.shrink()
    m.flush()


def much(m, _):
    for n in range(30):
        m[n] = [n] * 50
    for n in range(0, 30, 3):
        del m[n]
        m[n + 1].append(0)


def nest(m, _):
    with m.transaction():
        m["a"] = 2
        with m.transaction(timeout=0):
            m["b"].append(0)
        del m["A"]


def change_while_going_through(m, _):
    for key in list(m):
        if isinstance(m[key], list):
            m[key].append("more")
    for value in m.values():
        if isinstance(value, list):
            value.append("and more")


def nothing(m, _):
    pass


WORK = [
    *(set_values, change_in_place, delete, pop, pop_items, set_defaults, clear, clear_and_set),
    *(move_to_the_end, write_the_same_again_and_again, update, take_over, much, nest),
    *(take_over_what_is_missing, move_to_disk, read, set_the_budget, flush, nothing),
    change_while_going_through,
]


@pytest.fixture(params=WORK, ids=[work.__name__ for work in WORK])
def work(request):
    return request.param


@contextmanager
def another(options):
    """Another chest to take values over from; one of its values is not on disk."""
    with Chest(other_values(), **options) as more:
        more.flush()
        more["unsaved"] = 1
        yield more


def after(work):
    model = Model(start())
    work(model, other_values())
    return dict(model)


def test_all_that_is_done_inside_is_committed_at_once(chest_at, path, work, options):
    c, other = chest_at(start(), **options), chest_at(**options)
    with another(options) as more, c.transaction():
        work(c, more)
        assert is_like(other, start())
        c.flush()
        assert is_like(other, start())
        assert read_back(path, **options) == start()
        assert is_like(c, after(work))
    assert is_like(other, after(work))
    c._check()
    other._check()
    assert goes_on(path, c, after(work), **options)


def test_it_is_taken_back_when_the_block_fails(chest_at, path, work, options):
    c, other = chest_at(start(), **options), chest_at(**options)
    with another(options) as more, pytest.raises(Failure), c.transaction():
        was = tree(path)
        work(c, more)
        raise Failure
    assert tree(path) == was
    assert is_like(c, start())
    c._check()
    assert is_like(other, start())
    assert goes_on(path, c, start(), **options)


def test_a_crash_inside_leaves_what_was_before(chest_at, path, tmp_path, work, options):
    c = chest_at(start(), **options)
    with another(options) as more, c.transaction():
        work(c, more)
        c.flush()
        shutil.copytree(path, tmp_path / "copy")
    with Chest(path=tmp_path / "copy", **options) as found:
        assert is_like(found, start())
        assert goes_on(tmp_path / "copy", found, start(), **options)


@pytest.mark.parametrize("options", [{"available_memory": 0}, JSON], ids=["pickle", "json"])
def test_a_handle_that_lives_on_takes_over_after_a_crash(chest_at, path, work, options):
    c, other = Chest(start(), path, **options), chest_at(**options)
    block = c.transaction()
    with another(options) as more:
        block.__enter__()
        work(c, more)
        c.flush()
    abandon(c)
    del block
    assert goes_on(path, other, start(), **options)


def test_so_does_one_that_only_begins_a_transaction(chest_at):
    c, other = Chest(start(), chest_at().path, available_memory=0), chest_at()
    block = c.transaction()
    block.__enter__()
    much(c, None)
    abandon(c)
    del block
    with suppress(Failure), other.transaction():
        other._check()
        raise Failure
    other._check()
    assert is_like(other, start())


@pytest.mark.parametrize("budget", [1e9, 0])
def test_a_temporary_chest_has_transactions(work, budget):
    with Chest(available_memory=budget) as c, another({}) as more:
        c.update(start())
        with suppress(Failure), c.transaction():
            work(c, more)
            raise Failure
        assert is_like(c, start())
        with c.transaction():
            work(c, more)
        assert is_like(c, after(work))
        c._check()


def test_what_was_not_saved_is_committed_first(chest_at, path, options):
    c, other = chest_at(start(), **options), chest_at(**options)
    c["unsaved"] = 1
    c["b"].append(3)
    del c["a"]
    was = dict(c)
    with suppress(Failure), c.transaction():
        assert is_like(other, was)
        c.clear()
        raise Failure
    assert is_like(other, was)
    assert is_like(c, was)


def test_what_others_committed_is_taken_in_first(chest_at, options):
    c, other = chest_at(start(), **options), chest_at(**options)
    other["a"] = 10
    other["new"] = 1
    other.flush()
    with c.transaction():
        c["a"] += c["new"]
    assert other["a"] == 11


@pytest.mark.parametrize("budget", [0, 600])
def test_the_work_may_be_larger_than_memory(chest_at, path, budget):
    c, other = chest_at(available_memory=budget), chest_at()
    with c.transaction():
        for n in range(50):
            c[n] = [n] * 100
            c[n // 2].append(n)
            assert c.memory_usage <= budget
        assert sum(map(len, filter(None, tree(path).values()))) > 50 * 200
        assert not other
    expected = {n: [n] * 100 for n in range(50)}
    for n in range(50):
        expected[n // 2].append(n)
    assert is_like(other, expected)
    c._check()


def test_frames_beyond_the_first_belong_to_it(chest_at, monkeypatch):
    monkeypatch.setattr(chest.ledger, "FRAME_KEYS", 2)
    c, other = chest_at(start()), chest_at()
    other["pending"] = 1
    del other["A"]
    with c.transaction():
        much(c, None)
        c.flush()
        delete(c, None)
        set_values(c, None)
        c.flush()
        assert dict(other) == {k: v for k, v in start().items() if k != "A"} | {"pending": 1}
    expected = dict(c) | {"pending": 1}
    del expected["A"]
    assert dict(other) == expected
    other.flush()
    assert dict(c) == dict(other) == expected
    c._check()


CHANGEABLE = {
    "list": ([1], lambda value: value.append(2)),
    "dict": ({"k": [1]}, lambda value: value["k"].append(2)),
    "set": ({1}, lambda value: value.add(2)),
    "bytearray": (bytearray(b"1"), lambda value: value.extend(b"2")),
    "array": (np.arange(3), lambda value: value.__iadd__(1)),
    "tuple": (([1],), lambda value: value[0].append(2)),
    "large": ([0] * 20_000, lambda value: value.append(2)),
}


@pytest.mark.parametrize("budget", [1e9, 0])
@pytest.mark.parametrize("held", ["held before", "got inside", "moved inside"])
@pytest.mark.parametrize("kind", CHANGEABLE)
def test_changes_in_place_are_taken_back(chest_at, budget, held, kind):
    value, change = CHANGEABLE[kind]
    c = chest_at({"x": value}, available_memory=budget)
    was = pickle.dumps(c["x"])
    mine = c["x"] if held == "held before" else None
    with suppress(Failure), c.transaction():
        change(c["x"])
        if held == "moved inside":
            c.move_to_disk("x")
            change(c["x"])
        raise Failure
    assert pickle.dumps(c["x"]) == was
    if mine is not None:
        change(mine)
        c["other"] = 1
        c.flush()
        assert pickle.dumps(c["x"]) == was
    c._check()


def test_a_value_that_was_not_changed_is_still_the_object_in_memory(chest_at):
    c = chest_at({"x": [1], "y": [2]})
    mine = c["x"]
    with suppress(Failure), c.transaction():
        c["y"].append(3)
        raise Failure
    mine.append(4)
    assert c["x"] is mine
    c.flush()
    assert is_like(c, {"x": [1, 4], "y": [2]})


@pytest.mark.parametrize("kind", [
    *(Failure, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, StopAsyncIteration),
    *(RuntimeError, MemoryError, OSError, TimeoutError),
])
def test_any_exception_takes_it_back_and_goes_on_as_it_is(chest_at, path, kind):
    c = chest_at(start(), available_memory=0)
    error = kind("mine")
    with pytest.raises(kind) as caught, c.transaction():
        much(c, None)
        raise error
    assert caught.value is error
    assert goes_on(path, c, start())


def test_leaving_the_block_early_is_no_failure(chest_at):
    c = chest_at(start())

    def work():
        with c.transaction():
            c["a"] = 2
            return c["a"]

    assert work() == 2
    for n in range(3):
        with c.transaction():
            c["n"] = n
            if n:
                break
    assert read_back(c.path) == start() | {"a": 2, "n": 1}


def test_the_inner_block_is_part_of_the_outer(chest_at):
    c, other = chest_at(start()), chest_at()
    with suppress(Failure), c.transaction():
        with c.transaction():
            c["a"] = 2
        assert other["a"] == 1
        with suppress(Failure), c.transaction():
            c["b"] = 3
            raise Failure
        raise Failure
    assert is_like(c, start())
    assert is_like(other, start())
    with c.transaction(), c.transaction(), c.transaction():
        c["a"] = 3
    assert other["a"] == 3


def test_transactions_follow_each_other(chest_at):
    c, other = chest_at(start(), available_memory=0), chest_at()
    for n in range(20):
        with suppress(Failure), (c, other)[n % 2].transaction():
            (c, other)[n % 2]["a"] += 1
            (c, other)[n % 3 % 2]["b"]
            if n % 5 == 0:
                raise Failure
    assert c["a"] == other["a"] == 17
    c._check()
    other._check()


def test_a_transaction_may_be_begun_again_in_a_with_block_of_many(path, tmp_path):
    with Chest(path=path) as a, Chest(path=tmp_path / "b") as b:
        with suppress(Failure), a.transaction(), b.transaction():
            a["x"] = b["x"] = 1
            raise Failure
        assert not a
        assert not b
        with a.transaction(), b.transaction():
            a["x"] = b["x"] = 1
        assert dict(a) == dict(b) == {"x": 1}


def test_without_writeback_only_what_is_set_counts(chest_at):
    c = chest_at(start(), writeback=False, available_memory=0)
    with c.transaction():
        c["b"].append(3)
        c["a"] = 2
    assert is_like(c, start() | {"a": 2})


# -- old chests and compaction --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pickle", "json"])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("first", ["delete", "set", "replace", "change", "pop", "clear", "nothing"])
def test_the_first_thing_done_to_an_old_chest_may_be_a_transaction(path, name, fails, first):
    shutil.copytree(OLD / name, path)
    options = JSON if name == "json" else {}
    with Chest(path=path, **options) as c, Chest(path=path, **options) as other:
        was, expected = deepcopy(dict(c)), deepcopy(dict(c))
        with suppress(Failure), c.transaction():
            for m in (c, expected):
                match first:
                    case "delete":
                        del m["x"]
                    case "set":
                        m["new"] = 1
                    case "replace":
                        m["x"] = 1
                    case "change":
                        m["x"] += [4]
                    case "pop":
                        m.popitem()
                    case "clear":
                        m.clear()
            if fails:
                raise Failure
        expected = was if fails else expected
        assert is_like(c, expected)
        assert dict(other) == expected
        assert goes_on(path, c, expected, **options)


def test_the_index_is_compacted_before_and_after(chest_at, path, often, monkeypatch):
    compacted = []
    real = Index.replace

    def replace(self, *args):
        compacted.append(c._memory.in_transaction)
        assert self.appended == 0
        real(self, *args)

    c, other = chest_at(start(), available_memory=0), chest_at()
    monkeypatch.setattr(Index, "replace", replace)
    expected = start()
    for n in range(30):
        with suppress(Failure), c.transaction():
            c["a"] = n
            c["b"].append(n)
            c.flush()
            assert is_like(other, expected)
            if n % 3 == 1:
                raise Failure
            expected |= {"a": n, "b": [*expected["b"], n]}
        assert is_like(c, expected)
        assert is_like(other, expected)
        c._check()
        other._check()
    assert len(compacted) > 3
    assert goes_on(path, c, expected)


def test_the_index_may_have_been_compacted_by_somebody_else(chest_at, often):
    c, other = chest_at(start()), chest_at()
    for n in range(40):
        other["filler"] = n
        other.flush()
    with c.transaction():
        c["a"] = 2
        assert c["filler"] == 39
    assert other["a"] == 2
    c._check()


# -- what is not possible -------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "drop", "with block"])
def test_a_chest_cannot_be_closed_inside(chest_at, path, end):
    c = chest_at(start())
    with c.transaction():
        c["a"] = 2
        with pytest.raises(RuntimeError, match="inside a transaction"):
            if end == "with block":
                with c:
                    pass
            else:
                getattr(c, end)()
        c["b"] = 3
    expected = start() | {"a": 2, "b": 3}
    assert is_like(c, expected)
    with pytest.raises(RuntimeError), c.transaction():
        c.clear()
        c.close()
    assert goes_on(path, c, expected)


def test_a_chest_that_is_only_read_has_no_transaction(path):
    with Chest(start(), path):
        pass
    with Chest(path=path, readonly=True) as c:
        with pytest.raises(ReadOnlyError), c.transaction():
            raise AssertionError("this must not be reached")
        assert is_like(c, start())


def test_a_closed_chest_has_no_transaction(path):
    c = Chest(path=path)
    c.close()
    with pytest.raises(ChestClosedError), c.transaction():
        raise AssertionError("this must not be reached")


def test_what_cannot_be_saved_at_the_start_prevents_it(chest_at, path):
    c = chest_at(start())
    c["unsavable"] = lambda: None
    with pytest.raises(UnsavedError) as caught, c.transaction():
        raise AssertionError("this must not be reached")
    assert caught.value.keys == ["unsavable"]
    assert not c._memory.in_transaction
    del c["unsavable"]
    assert goes_on(path, c, start())


def set_unsavable(c):
    c["new"] = lambda: None


def put_unsavable_into_a_value(c):
    c["b"].append(lambda: None)


def replace_by_unsavable(c):
    c["a"] = lambda: None
    c.available_memory = 0


@pytest.mark.parametrize("budget", [1e9, 0])
@pytest.mark.parametrize("spoil", [
    *(set_unsavable, put_unsavable_into_a_value, replace_by_unsavable),
])
def test_what_cannot_be_saved_at_the_end_takes_all_back(chest_at, path, budget, spoil):
    c = chest_at(start(), available_memory=budget)
    with pytest.raises(UnsavedError), c.transaction():
        c["ok"] = 1
        spoil(c)
        del c["z"]
    assert goes_on(path, c, start())


def test_what_is_gone_by_the_end_needs_no_saving(chest_at):
    c = chest_at(start(), available_memory=0)
    with c.transaction():
        c["new"] = lambda: None
        c["a"] = c["new"]
        del c["new"]
        c["a"] = 2
    assert is_like(c, start() | {"a": 2})


# -- time -----------------------------------------------------------------------------------------


@contextmanager
def thread(function, *args):
    """Run a function in a thread that has ended at the end of the block."""
    errors = []

    def run():
        try:
            function(*args)
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    yield
    worker.join(HARMLESS)
    assert not worker.is_alive(), "it waits for ever"
    if errors:
        raise errors[0]


@contextmanager
def inside_elsewhere(c, work=lambda c: None, *, fails=False):
    """Let another thread be inside a transaction of `c`."""
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with suppress(Failure), c.transaction():
            work(c)
            inside.set()
            assert leave.wait(HARMLESS)
            if fails:
                raise Failure

    with thread(hold):
        assert inside.wait(HARMLESS)
        try:
            yield
        finally:
            leave.set()


@pytest.mark.parametrize("timeout", [0, 0.01, -1])
@pytest.mark.parametrize("whose", ["the same chest", "another handle"])
def test_a_thread_does_not_wait_for_longer_than_it_says(chest_at, path, timeout, whose):
    c, other = chest_at(start()), chest_at()
    with inside_elsewhere(c):
        waiting = c if whose == "the same chest" else other
        with pytest.raises(TimeoutError) as caught, waiting.transaction(timeout=timeout):
            raise AssertionError("this must not be reached")
        assert caught.value.errno == errno.ETIMEDOUT
        assert caught.value.filename.startswith(path)
    with waiting.transaction(timeout=timeout):
        waiting["a"] = 2
    assert goes_on(path, c, start() | {"a": 2})


def test_what_was_to_be_saved_before_is_kept_when_the_time_is_over(chest_at):
    c, other = chest_at(start()), chest_at()
    with inside_elsewhere(c):
        other["new"] = 1
        with pytest.raises(TimeoutError), other.transaction(timeout=0):
            raise AssertionError("this must not be reached")
        assert other["new"] == 1
    other.flush()
    assert c["new"] == 1


@pytest.mark.parametrize("timeout", [None, 0, 0.5, -5, 1e6, 1e10, 1e300, math.inf])
def test_any_timeout_will_do_where_nobody_is_in_the_way(chest_at, timeout):
    c = chest_at(start())
    with c.transaction(timeout=timeout), c.transaction(timeout):
        c["a"] = 2
    assert c["a"] == 2


def test_both_waits_together_last_no_longer(chest_at, monkeypatch):
    """The time that the lock of the threads took is not there for that of the processes."""
    c = chest_at(start())
    now = [100.0]
    monkeypatch.setattr("chest.memory.time.monotonic", lambda: now[0])
    limits = []
    real = Store.writing

    class Slow:
        def __init__(self, lock):
            self.lock = lock

        def acquire(self, *args, **options):
            limits.append(options["timeout"])
            now[0] += 3
            return self.lock.acquire()

        def __getattr__(self, name):
            return getattr(self.lock, name)

        def __enter__(self):
            self.lock.acquire()

        def __exit__(self, *_):
            self.lock.release()

    def writing(self, timeout=None):
        limits.append(timeout)
        return real(self, timeout)

    monkeypatch.setattr(Store, "writing", writing)
    with monkeypatch.context() as patch:
        patch.setattr(c._memory, "lock", Slow(c.lock))
        with c.transaction(timeout=5):
            pass
        assert limits[:2] == [5, 2]


def test_two_handles_of_one_thread_do_not_wait_for_each_other(chest_at):
    c, other = chest_at(start()), chest_at()
    with c.transaction():
        with pytest.raises(OSError, match="this thread") as caught, other.transaction():
            raise AssertionError("this must not be reached")
        assert caught.value.errno == errno.EDEADLK
        other["new"] = 1
        with pytest.raises(UnsavedError):
            other.flush()
        c["a"] = 2
    other.flush()
    assert dict(c) == start() | {"a": 2, "new": 1}


def test_nor_do_they_where_one_came_by_a_link(chest_at, path):
    c = chest_at(start())
    os.symlink(path, path + "-link")
    with Chest(path=path + "-link") as other:
        with c.transaction():
            with pytest.raises(OSError, match="this thread"), other.transaction(timeout=0):
                raise AssertionError("this must not be reached")
        with other.transaction(timeout=0):
            other["a"] = 2
        assert c["a"] == 2


# -- threads --------------------------------------------------------------------------------------


def make_a_mess(c):
    c["n"] = 1
    c["b"] = [1, 2, 3]
    del c["a"]
    c["z"] = "replaced"
    c["A"] = [6]
    c.move_to_disk("A")


def leave_nothing(c):
    make_a_mess(c)
    c.clear()


LOOKS = {
    "len": len,
    "bool": bool,
    "in": lambda c: ("n" in c, "a" in c, c.keys() >= {"n"}, ("n", 1) in c.items()),
    "iter": list,
    "reversed": lambda c: list(reversed(c)),
    "a hit": lambda c: c["a"],
    "a hit that may change": lambda c: list(c["b"]),
    "a miss": lambda c: c.get("n", "none"),
    "get": lambda c: (c.get("a"), c.get("z")),
    "moved": lambda c: c["A"],
    "keys": lambda c: list(c.keys()),
    "values": lambda c: list(c.values()),
    "items": lambda c: list(c.items()),
    "dict": dict,
    "==": lambda c: (c == start(), start() == c),
    "setdefault": lambda c: c.setdefault("a", "mine"),
    "pop": lambda c: c.pop("b"),
    "pop what is not there": lambda c: c.pop("n", "none"),
    "popitem": lambda c: c.popitem(),
    "copy": lambda c: copied(c),
    "update": lambda c: (c.update({"n": 5}, overwrite=False), c["n"])[1],
    "repr": lambda c: " 6 keys" in repr(c),
    "prefetch": lambda c: (c.prefetch(["A", "z"]), c["z"])[1],
    "move_to_disk": lambda c: (c.move_to_disk("a"), c["a"])[1],
    "flush": lambda c: (c.flush(), read_back(c.path))[1],
    "transaction": lambda c: in_transaction(c),
}


def copied(c):
    if not isinstance(c, Chest):
        return dict(c)
    with c.copy() as twin:
        return dict(twin)


def in_transaction(c):
    with c.transaction():
        return dict(c)


def expected_of(look):
    """What it returns where nothing was done, and nobody else is there."""
    with Chest(start()) as c:
        return look(c)


class Lock:
    """The lock of a chest, which tells when this thread asks for it, and when it lets go."""

    def __init__(self, lock, asked, released):
        self.lock = lock
        self.me = threading.get_ident()
        self.asked = asked
        self.released = released

    def acquire(self, *args, **options):
        if threading.get_ident() == self.me and not self.lock._is_owned():
            self.asked()
        return self.lock.acquire(*args, **options)

    def release(self):
        self.lock.release()
        if threading.get_ident() == self.me and not self.lock._is_owned():
            self.released()

    __enter__ = acquire

    def __exit__(self, *_):
        self.release()

    def _is_owned(self):
        return self.lock._is_owned()


class Here:
    """A thread that does its work in the one that starts it."""

    ident = None

    def __init__(self, target, daemon):
        self.start = target

    def join(self):
        pass


@pytest.mark.parametrize("budget", [1e9, 0])
@pytest.mark.parametrize("look", LOOKS)
def test_nobody_sees_what_is_taken_back(chest_at, look, budget, monkeypatch):
    """Another thread is in a transaction whenever this one does not hold the lock.

    It takes everything back as soon as this thread asks for the lock.
    """
    c = chest_at(start(), available_memory=budget)
    elsewhere = ExitStack()
    messes = itertools.cycle([make_a_mess, leave_nothing])

    def begin():
        elsewhere.enter_context(inside_elsewhere(c, next(messes), fails=True))

    monkeypatch.setattr(c._memory, "lock", Lock(c.lock, elsewhere.close, begin))
    monkeypatch.setattr(chest.bulk, "Thread", Here)
    begin()
    try:
        seen = LOOKS[look](c)
    finally:
        elsewhere.close()
        monkeypatch.undo()
    assert seen == expected_of(LOOKS[look])
    c._check()


@pytest.mark.parametrize("budget", [1e9, 0])
@pytest.mark.parametrize("look", LOOKS)
def test_everybody_sees_what_was_committed(chest_at, look, budget, monkeypatch):
    c = chest_at(start(), available_memory=budget)
    elsewhere = ExitStack()
    elsewhere.enter_context(inside_elsewhere(c, lambda c: change_in_place(c, None)))
    monkeypatch.setattr(c._memory, "lock", Lock(c.lock, elsewhere.close, lambda: None))
    seen = LOOKS[look](c)
    elsewhere.close()
    monkeypatch.undo()
    with Chest(start()) as twin:
        change_in_place(twin, None)
        assert seen == LOOKS[look](twin)


class Key:
    """A key whose hash lets somebody in."""

    def __init__(self, meanwhile=lambda: None):
        self.meanwhile = meanwhile

    def __hash__(self):
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return 1

    def __eq__(self, other):
        return isinstance(other, Key)

    def __reduce__(self):
        return Key, ()


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("look", ["hit", "get", "in"])
def test_nor_does_one_who_was_about_to_look(chest_at, look, there):
    """Another thread begins while the hash of a key is computed, if it can."""
    c = chest_at({"x": 1})
    if there:
        c[Key()] = "before"
    elsewhere = ExitStack()
    results = []

    def meanwhile():
        if not c.lock._is_owned():
            elsewhere.enter_context(
                inside_elsewhere(c, lambda c: c.__setitem__(Key(), "inside"), fails=True)
            )

    def ask():
        match look:
            case "hit":
                results.append(c[Key(meanwhile)] if there else "missing")
            case "get":
                results.append(c.get(Key(meanwhile), "missing"))
            case "in":
                results.append("before" if Key(meanwhile) in c else "missing")

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join(0.05)  # it has what it asked for, or waits for the transaction
    elsewhere.close()
    asking.join(HARMLESS)
    assert results == ["before" if there else "missing"]


def test_nor_does_one_who_looks_just_as_a_transaction_begins(chest_at, monkeypatch):
    c = chest_at({"x": 1})
    looks, changed = threading.Event(), threading.Event()
    results = []
    real = c._memory._look

    def meanwhile():
        looks.set()
        if not c.lock._is_owned():
            changed.wait(HARMLESS)

    def look(store):
        if c._memory.in_transaction and not looks.is_set():
            asking.start()
            looks.wait(0.05)
        real(store)

    asking = threading.Thread(target=lambda: results.append(Key(meanwhile) in c))
    monkeypatch.setattr(c._memory, "_look", look)
    with suppress(Failure), c.transaction():
        c[Key()] = "inside"
        changed.set()
        asking.join(0.05)
        raise Failure
    asking.join(HARMLESS)
    assert results == [False]


@pytest.mark.parametrize("written", [False, True])
def test_what_another_thread_changed_in_place_meanwhile_is_kept(chest_at, written):
    """It got the value before, and is no part of the transaction that fails."""
    c = chest_at({"a": [1], "b": [1]})
    got, go, done, leave = (threading.Event() for _ in range(4))

    def append():
        value = c.setdefault("b", [])
        got.set()
        assert go.wait(HARMLESS)
        value.append(2)
        done.set()
        assert leave.wait(HARMLESS)  # what is in hand is known as long as the thread lives

    with thread(append):
        assert got.wait(HARMLESS)
        with suppress(Failure), c.transaction():
            c["a"].append(2)
            go.set()
            assert done.wait(HARMLESS)
            if written:
                c.flush()
            raise Failure
        leave.set()
    assert is_like(c, {"a": [1], "b": [1, 2]})
    assert read_back(c.path) == {"a": [1], "b": [1]}
    c.flush()
    assert read_back(c.path) == {"a": [1], "b": [1, 2]}
    c._check()


def test_a_load_that_was_under_way_ends_with_what_is_there_afterwards(chest_at):
    started, go = threading.Event(), threading.Event()

    def load(file):
        if os.path.basename(file.name) == "b" and not started.is_set():
            started.set()
            assert go.wait(HARMLESS)
        return pickle.load(file)

    c = chest_at(start(), dump=pickle.dump, load=load)
    c.move_to_disk("b")
    results = []
    with thread(lambda: results.append(c["b"])):
        assert started.wait(HARMLESS)
        with c.transaction():
            c["b"] = "new"
            c.move_to_disk("b")
            go.set()
    assert results == ["new"]
    with thread(lambda: results.append(c["b"])):
        pass
    assert results == ["new", "new"]
    c._check()


def test_a_load_that_was_under_way_is_not_disturbed_by_what_is_taken_back(chest_at):
    started, go = threading.Event(), threading.Event()

    def load(file):
        if os.path.basename(file.name) == "b" and not started.is_set():
            started.set()
            assert go.wait(HARMLESS)
        return pickle.load(file)

    c = chest_at(start(), dump=pickle.dump, load=load)
    c.move_to_disk("b")
    results = []
    with thread(lambda: results.append(c["b"])):
        assert started.wait(HARMLESS)
        with suppress(Failure), c.transaction():
            assert c.pop("b") == [1, 2]
            c["b"] = "new"
            c.flush()
            go.set()
            raise Failure
    assert results == [[1, 2]]
    assert is_like(c, start())
    c._check()


@pytest.mark.parametrize("budget", [1e9, 0])
@pytest.mark.parametrize("handles", [1, 4])
def test_threads_count_together(chest_at, budget, handles):
    times = 1000 if SOAK else 10
    chests = [chest_at(available_memory=budget) for _ in range(handles)]
    chests[0].update(n=0, all=[])
    chests[0].flush()

    def count_up(c):
        for n in range(times):
            with suppress(Failure), c.transaction():
                c["n"] += 1
                number = c["n"]
                c["all"].append(number)
                if n % 3 == 0:
                    raise Failure
            with c.transaction():
                c["n"] += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ExitStack() as stack:
            for n in range(4):
                stack.enter_context(thread(count_up, chests[n % handles]))
    finally:
        sys.setswitchinterval(interval)
    failed = len(range(0, times, 3))
    for c in chests:
        assert c["n"] == 4 * (2 * times - failed)
        assert len(c["all"]) == 4 * (times - failed)
        assert c["all"] == sorted(set(c["all"]))
        c._check()


# -- hooks ----------------------------------------------------------------------------------------


def test_hooks_may_use_the_chest(path):
    seen = []

    def on_overflow(key):
        seen.append((key, len(c), "a" in c))

    def on_miss(key):
        with c.transaction():
            c["misses"] = c.get("misses", 0) + 1 if key != "misses" else 1

    with Chest(start(), path, on_overflow=on_overflow, on_miss=on_miss) as c:
        c.flush()
        with c.transaction():
            c.move_to_disk("b")
            c["b"].append(3)
            c.move_to_disk("A")
            c["A"]
        assert seen == [("b", 6, True), ("A", 7, True)]
        expected = start() | {"b": [1, 2, 3], "misses": 2}
        assert read_back(path) == dict(c) == expected


@pytest.mark.parametrize("hook", ["on_miss", "on_overflow", "nbytes", "key_to_filename"])
def test_what_a_hook_raises_takes_all_back_where_it_is_raised(path, hook):
    armed = []

    def fail(*args):
        if armed:
            raise Failure
        return {"nbytes": 100, "key_to_filename": "name"}.get(hook)

    with Chest(start(), path, **{hook: fail}) as c:
        c.flush()
        c.move_to_disk("A")
        with suppress(Failure), c.transaction():
            c["a"] = 2
            armed.append(True)
            c["A"]
            c["new"] = 1
            c.available_memory = 0
            assert hook in ("nbytes", "key_to_filename"), "it was not called"
            raise Failure
        armed.clear()
        assert goes_on(path, c, start())


def test_what_a_hook_raises_at_the_end_takes_all_back(path):
    armed = []

    def on_overflow(key):
        if armed:
            raise Failure

    with Chest(start(), path, on_overflow=on_overflow) as c:
        with pytest.raises(Failure), c.transaction():
            c["a"] = 2
            c["b"].extend([0] * 1000)
            c._memory.available = 50  # so that values leave at the end only
            armed.append(True)
        armed.clear()
        c._memory.available = 1e9
        assert goes_on(path, c, start())


def test_a_value_may_begin_a_transaction_while_it_is_pickled(path):
    with Chest(start(), path) as c:
        c["p"] = Pickled(c)
        c.flush()
        assert read_back(path) == start() | {"p": "pickled", "counted": 1}
        with c.transaction():
            c["q"] = Pickled(c)
        assert c["counted"] == 2
        c.move_to_disk("q")
        c.move_to_disk("p")
        assert goes_on(path, c, start() | {"p": "pickled", "counted": 2, "q": "pickled"})


class Pickled:
    def __init__(self, c):
        self.c = c
        self.counted = False

    def __reduce__(self):
        if not self.counted:
            self.counted = True
            with self.c.transaction() if self.c._memory.in_transaction else nullcontext():
                self.c["counted"] = self.c.get("counted", 0) + 1
            self.c.flush()
        return str, ("pickled",)


# -- other processes ------------------------------------------------------------------------------


def test_a_chest_that_is_pickled_inside_shows_what_was_before(chest_at):
    c = chest_at(start(), available_memory=0)
    with c.transaction():
        c["a"] = 2
        with pickle.loads(pickle.dumps(c)) as other:
            assert is_like(other, start())
            with pytest.raises(OSError, match="this thread"), other.transaction():
                raise AssertionError("this must not be reached")
        c["b"] = 3
    with pickle.loads(pickle.dumps(c)) as other:
        assert is_like(other, start() | {"a": 2, "b": 3})


@contextmanager
def child(script, *args, status=0):
    """Run a script in a new process; at the end of the block it must have ended."""
    start = f"""
        import os, signal, sys, threading
        from contextlib import suppress
        from chest import Chest
        PATH, *ARGS = {[str(arg) for arg in args]!r}
        """
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(start) + textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": modules},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
            _, told = process.communicate(timeout=HARMLESS)
        finally:
            process.kill()
    assert process.returncode == status, told


def test_other_processes_wait_as_long_as_they_say_and_read_what_was_before(chest_at):
    c = chest_at(start())
    wait = """
        with Chest(path=PATH) as c:
            try:
                with c.transaction(timeout=0.01):
                    print("was let in")
            except TimeoutError:
                print(c["a"], flush=True)
            with c.transaction():
                print(c["a"], flush=True)
                c["a"] = 3
        """
    with ExitStack() as stack:
        with c.transaction():
            c["a"] = 2
            c.flush()
            process = stack.enter_context(child(wait, c.path))
            assert process.stdout.readline() == "1\n"
        assert process.stdout.readline() == "2\n"
    assert c["a"] == 3


def test_a_transaction_waits_for_another_process(chest_at):
    c = chest_at(start())
    hold = """
        with Chest(path=PATH) as c, c.transaction():
            c["a"] = 2
            print("inside", flush=True)
            sys.stdin.readline()
        """
    with child(hold, c.path) as process:
        assert process.stdout.readline() == "inside\n"
        with pytest.raises(TimeoutError), c.transaction(timeout=0.01):
            raise AssertionError("this must not be reached")
        assert is_like(c, start())
        c["b"] = 3
        process.stdin.write("\n")
        process.stdin.flush()
        with c.transaction():
            assert is_like(c, start() | {"a": 2, "b": 3})
            c["a"] += 1
    assert read_back(c.path) == start() | {"a": 3, "b": 3}


def test_processes_count_together(path):
    times = 1000 if SOAK else 25
    with Chest(path=path) as c:
        c["n"] = 0
    count_up = """
        with Chest(path=PATH, available_memory=float(ARGS[1])) as c:
            sys.stdin.readline()
            for n in range(int(ARGS[0])):
                with suppress(ZeroDivisionError), c.transaction():
                    c["n"] += 1000
                    c[os.getpid(), n] = [n]
                    1 / 0
                with c.transaction():
                    c["n"] += 1
        """
    with ExitStack() as stack:
        processes = [
            stack.enter_context(child(count_up, path, times, budget)) for budget in (1e9, 0, 1e9, 0)
        ]
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
    with Chest(path=path) as c:
        assert is_like(c, {"n": 4 * times})
        c.flush()
        c._check()


ENDS = {
    "os._exit": ("os._exit(0)", 0),
    "an error": ("raise SystemExit(3)", 3),
    "sys.exit": ("sys.exit()", 0),
    "a thread that exits": ("thread = threading.Thread(target=work); thread.start()", 0),
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", -9),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", -15),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_that_ends_inside_leaves_what_was_before(path, end):
    how, status = ENDS[end]
    if end.startswith("SIG") and not hasattr(signal, "SIGKILL"):
        pytest.skip("no such signals here")
    script = f"""
        def work():
            with c.transaction():
                for n in range(20):
                    c[n] = [n]
                c["b"].append(3)
                del c["a"]
                c.flush()
                {how if "thread" not in end else "sys.exit()"}

        c = Chest(path=PATH, available_memory=0)
        {how if "thread" in end else "work()"}
        """
    with Chest(start(), path):
        pass
    with child(script, path, status=status):
        pass
    with Chest(path=path) as c:
        assert goes_on(path, c, start())


UNFINISHED = {
    "a block that is never left": """
        block = c.transaction()
        block.__enter__()
        c["a"] = 2
        """,
    "a generator that is never ended": """
        def work():
            with c.transaction():
                c["a"] = 2
                yield

        generator = work()
        next(generator)
        """,
    "a thread that never ends": """
        inside = threading.Event()

        def work():
            with c.transaction():
                c["a"] = 2
                inside.set()
                threading.Event().wait()

        threading.Thread(target=work, daemon=True).start()
        inside.wait()
        """,
}


@pytest.mark.parametrize("what", UNFINISHED)
def test_a_program_ends_though_a_transaction_does_not(path, what):
    with Chest(start(), path):
        pass
    script = "c = Chest(path=PATH, available_memory=0)\n" + textwrap.dedent(UNFINISHED[what])
    with child(script, path):
        pass
    with Chest(path=path) as c:
        assert goes_on(path, c, start())


@pytest.mark.parametrize("what", UNFINISHED)
def test_a_temporary_chest_goes_though_a_transaction_does_not_end(tmp_path, what, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    script = "c = Chest(available_memory=0)\n" + textwrap.dedent(UNFINISHED[what])
    with child(script, tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def suspended(c, work=much):
    """A list of a generator alone, which is suspended inside a transaction."""

    def work_and_wait():
        with c.transaction():
            work(c, None)
            yield

    generator = work_and_wait()
    next(generator)
    return [generator]


@pytest.fixture
def collect_at(monkeypatch):
    """Empty a list when a method is called next, as if garbage were collected just there."""

    def prepare(garbage, owner, name):
        real = getattr(owner, name)

        def collect_first(*args, **options):
            garbage.clear()
            return real(*args, **options)

        monkeypatch.setattr(owner, name, collect_first)

    return prepare


def waits_for_others(path, c):
    with Chest(path=path) as other, inside_elsewhere(other):
        with pytest.raises(TimeoutError), c.transaction(timeout=0):
            raise AssertionError("this must not be reached")
    return True


def test_a_block_that_nobody_will_leave_is_taken_back(chest_at, path):
    c = chest_at(start(), available_memory=0)
    block = c.transaction()
    block.__enter__()
    much(c, None)
    del block
    assert goes_on(path, c, start())
    suspended(c).clear()
    assert goes_on(path, c, start())


@pytest.mark.parametrize(("owner", "name"), [
    (Index, "_lock"),
    (Store, "_plan"),
    (Store, "_write"),
    (Index, "publish"),
    (Store, "tidy"),
])
def test_so_it_is_when_collected_amid_the_commit_of_another_chest(
    chest_at, path, tmp_path, collect_at, owner, name
):
    c = chest_at(start(), available_memory=0)
    with Chest(path=tmp_path / "another") as another:
        garbage = suspended(c)
        collect_at(garbage, owner, name)
        another["x"] = [1]
        another.flush()
        assert not garbage
        another._check()
        assert read_back(another.path) == {"x": [1]}
        assert waits_for_others(another.path, another)
    assert goes_on(path, c, start())
    assert waits_for_others(path, c)


@pytest.mark.parametrize(("budget", "act", "owner", "name"), [
    (0, lambda c: c["z"], Store, "read"),
    (0, lambda c: [*c.items()], Memory, "_take_in"),
    (1e9, Chest.flush, Memory, "_stage"),
    (1e9, Chest.flush, Store, "_plan"),
    (1e9, Chest.flush, Ledger, "encode"),
    (1e9, Chest.flush, Store, "_write"),
    (1e9, Chest.flush, Ledger, "committed"),
    (1e9, Chest.flush, Store, "tidy"),
    (1e9, lambda c: c.update(twin()), Memory, "_forget_all"),
])
def test_and_when_collected_amid_what_the_same_chest_does(
    chest_at, path, collect_at, budget, act, owner, name
):
    c = chest_at(start(), available_memory=budget)
    garbage = suspended(c)
    collect_at(garbage, owner, name)
    with suppress(KeyError, RuntimeError):  # what was to be written is taken back
        act(c)
    assert not garbage
    with thread(write_alone, path):  # at once, and not as soon as the chest is used again
        pass
    assert goes_on(path, c, start())
    assert waits_for_others(path, c)


def write_alone(path):
    with Chest(path=path) as other, other.transaction(timeout=0):
        pass


def twin():
    """Another chest, whose files can be linked."""
    other = Chest({"x": ["twin"], "new": ["twin"]})
    other.flush()
    return other


@pytest.mark.parametrize("inner", [False, True])
def test_and_when_collected_in_another_thread(chest_at, path, inner):
    c = chest_at(start(), available_memory=0)
    outer = c.transaction() if inner else nullcontext()
    with outer:
        garbage = suspended(c, nothing if inner else much)
        with thread(garbage.clear):
            pass
        if not inner:
            assert is_like(c, start())

    def enter():
        with c.transaction(timeout=1):
            pass

    with thread(enter):
        pass
    assert goes_on(path, c, start())
    assert waits_for_others(path, c)


def test_others_wait_until_the_thread_of_such_a_block_takes_it_back(chest_at, path):
    c = chest_at(start(), available_memory=0)
    garbage = suspended(c)
    with thread(garbage.clear):
        pass

    def write():
        with pytest.raises(TimeoutError), Chest(path=path) as other, other.transaction(timeout=0):
            raise AssertionError("this must not be reached")

    with thread(write):
        pass
    assert read_back(path) == start()
    c.close()
    assert read_back(path) == start()


def test_a_block_whose_thread_has_ended_is_taken_back_by_whoever_collects_it(chest_at, path):
    c = chest_at(start(), available_memory=0)
    garbage = []
    with thread(lambda: garbage.extend(suspended(c))):
        pass
    garbage.clear()
    assert goes_on(path, c, start())
    assert waits_for_others(path, c)


def test_a_commit_during_which_its_transaction_is_collected_in_another_thread(
    chest_at, path, monkeypatch
):
    c = chest_at(start(), available_memory=1e9)
    garbage = suspended(c)
    real = Store._write

    def write(self, *args):
        with thread(garbage.clear):
            pass
        assert len(c)  # a step of the chest, but it is too early to take anything back
        assert self.index.is_locked
        return real(self, *args)

    monkeypatch.setattr(Store, "_write", write)
    c.flush()
    monkeypatch.undo()
    assert not garbage
    assert goes_on(path, c, start())
    assert waits_for_others(path, c)


def test_a_block_that_was_entered_before_says_so(chest_at):
    c = chest_at()
    block = c.transaction()
    with block:
        c["x"] = 1
    with pytest.raises(RuntimeError, match="entered before"), block:
        c["x"] = 2
    assert c == {"x": 1}


def test_a_block_that_was_never_entered_does_nothing(chest_at):
    c, other = chest_at(start()), chest_at()
    block = c.transaction()
    with other.transaction(timeout=0):
        pass
    del block
    assert is_like(c, start())


def fork(work):
    """Run a function in a forked child; return its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = work() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@needs_fork
@pytest.mark.parametrize("budget", [1e9, 0])
def test_a_child_that_is_forked_inside_is_outside(chest_at, path, budget):
    c = chest_at(start(), available_memory=budget)

    def look():
        assert is_like(c, start())
        try:
            with c.transaction(timeout=0.01):
                return 1
        except TimeoutError:
            pass
        return 0

    with c.transaction():
        c["a"] = 2
        c["b"].append(3)
        assert fork(look) == 0
        c["z"] = 3
    assert goes_on(path, c, start() | {"a": 2, "b": [1, 2, 3], "z": 3})


@needs_fork
@pytest.mark.parametrize("leave", ["at its end", "by an exception"])
def test_a_child_that_leaves_the_block_commits_and_takes_back_nothing(chest_at, path, leave):
    c = chest_at(start(), available_memory=0)
    child = None
    try:
        with c.transaction():
            c["a"] = 2
            c.flush()
            was = tree(path)
            child = os.fork()
            if child == 0 and leave == "by an exception":
                raise Failure
            if child:
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                assert status == 0
                assert tree(path) == was
    except Failure:
        assert child == 0
    finally:
        if child == 0:
            outside = not c._memory.in_transaction and c["a"] == 1
            os._exit(0 if outside and sys.exception() is None else 1)
    assert goes_on(path, c, start() | {"a": 2})


@needs_fork
def test_a_child_may_write_once_the_parent_is_done(chest_at):
    c = chest_at(start())
    with c.transaction():
        c["a"] = 2
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                with c.transaction():
                    c["a"] += 1
                status = 0
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert c["a"] == 3


# -- a crash, a refusal and an interrupt at each step ---------------------------------------------


class Steps:
    """Calls a function before each step on the files of a chest, and after it."""

    NAMES = ["mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync"]

    def __init__(self, monkeypatch):
        self.before = self.after = lambda: None
        monkeypatch.setattr(os, "fsync", lambda fd: None)  # no power cut comes here
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self._around(getattr(os, name)))

        class Stepwise(FileIO):
            write = self._around(FileIO.write)
            truncate = self._around(FileIO.truncate)

        monkeypatch.setattr(chest.head, "FileIO", Stepwise)
        monkeypatch.setattr(Index, "publish", self._around(Index.publish))

    def _around(self, function):
        def step(*args, **options):
            self.before()
            try:
                return function(*args, **options)
            finally:
                self.after()

        return step

    @contextmanager
    def doing(self, before=lambda: None, after=lambda: None):
        self.before, self.after = before, after
        try:
            yield
        finally:
            self.before = self.after = lambda: None


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch)


def change_much(c):
    c["a"] = 2
    c["b"].append(3)
    del c["A"], c["t", "u"]
    c["v", "w"] = "new"
    c.flush()
    c["a"] = 4
    c["last"] = "text" * 50
    del c["z"]


def changed():
    model = Model(start())
    change_much(model)
    return dict(model)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("options", [
    *({}, {"available_memory": 0}, {"fsync": True}),
], ids=str)
def test_a_crash_at_any_step_leaves_all_or_nothing(path, tmp_path, steps, often, fails, options):
    copies, seen = [], []

    def copy():
        now = tree(path)
        if now not in seen:
            seen.append(now)
            copies.append(tmp_path / str(len(copies)))
            with steps.doing():
                shutil.copytree(path, copies[-1])
            steps.before = steps.after = copy

    with Chest(start(), path, **options) as c:
        c.flush()
        with suppress(Failure), steps.doing(copy, copy), c.transaction():
            change_much(c)
            if fails:
                raise Failure
    outcomes = []
    for copied in copies:
        for name in os.listdir(copied):
            if name.startswith(".new-"):
                os.utime(copied / name, (0, 0))
        found = read_back(copied)
        assert found in (start(), changed())
        outcomes.append(found == changed())
        with Chest(path=copied) as c:
            assert goes_on(copied, c, found)
    assert len(copies) > 8
    assert outcomes == sorted(outcomes), "once committed it stays so"
    assert outcomes[-1] is not fails


class Refusals:
    """Refuses one step after the other, one in each round, until there is none left."""

    def __init__(self, steps):
        self.steps = steps
        self.number = 0
        self.refused = True

    def __iter__(self):
        while self.refused:
            self.number += 1
            self.refused = False
            yield self

    @contextmanager
    def __call__(self):
        number = itertools.count(1)

        def refuse():
            if next(number) == self.number:
                self.refused = True
                raise OSError(errno.ENOSPC, "No space left on device")

        with self.steps.doing(refuse):
            yield


@pytest.mark.parametrize("options", [{}, {"available_memory": 0}, {"fsync": True}], ids=str)
def test_a_disk_that_refuses_any_step_of_the_end_takes_all_back(tmp_path, steps, options):
    """Only what is refused after the commit, as removing old files, changes nothing any more."""
    for refusal in Refusals(steps):
        path = str(tmp_path / str(refusal.number))
        with Chest(start(), path, **options) as c, Chest(path=path, **options) as other:
            c.flush()
            failed = None
            with ExitStack() as stack:
                try:
                    with c.transaction():
                        change_much(c)
                        stack.enter_context(refusal())
                except (OSError, UnsavedError) as error:
                    failed = error
            published = dict(other) == changed()
            expected = changed() if published else start()
            assert failed is None or not published or options.get("fsync")
            assert failed is not None or published
            assert is_like(c, expected), failed
            assert is_like(other, expected)
            assert goes_on(path, c, expected)
    assert refusal.number > 5


@pytest.mark.parametrize("options", [{}, {"available_memory": 0}, {"fsync": True}], ids=str)
def test_a_disk_that_refuses_any_step_inside_may_be_tried_again(tmp_path, steps, options):
    for refusal in Refusals(steps):
        path = str(tmp_path / str(refusal.number))
        with Chest(start(), path, **options) as c:
            c.flush()
            with c.transaction():
                c["first"] = 1
                c.flush()
                with suppress(OSError, UnsavedError), refusal():
                    c["a"] = 2
                    c["v", "w"] = "new"
                    c.flush()
                c["v", "w"] = "new"
                c["a"] = 2
                del c["z"]
            expected = start() | {"first": 1, "a": 2, ("v", "w"): "new"}
            del expected["z"]
            assert dict(c) == expected
            c.flush()
            c._check()
            assert read_back(path) == expected
    assert refusal.number > 4


@pytest.mark.parametrize("options", [{}, {"available_memory": 0}, {"fsync": True}], ids=str)
def test_a_disk_that_refuses_any_step_of_taking_back_keeps_what_was_before(
    tmp_path, steps, options
):
    for refusal in Refusals(steps):
        path = str(tmp_path / str(refusal.number))
        with Chest(start(), path, **options) as c, Chest(path=path, **options) as other:
            c.flush()
            with ExitStack() as stack, suppress(Failure, OSError), c.transaction():
                change_much(c)
                stack.enter_context(refusal())
                raise Failure
            assert is_like(other, start())
            assert goes_on(path, c, start())
    assert refusal.number > 2


@pytest.mark.parametrize("options", [{}, {"fsync": True}], ids=str)
def test_a_disk_that_refuses_any_step_of_the_start_does_nothing(tmp_path, steps, options):
    for refusal in Refusals(steps):
        path = str(tmp_path / str(refusal.number))
        with Chest(start(), path, **options) as c:
            c.flush()
            c["b"].append(3)
            c["unsaved"] = 1
            was = dict(c)
            with suppress(OSError, UnsavedError, Failure), ExitStack() as stack:
                stack.enter_context(refusal())
                with c.transaction():
                    stack.close()
                    raise Failure
            assert not c._memory.in_transaction
            assert is_like(c, was)
            assert goes_on(path, c, was)
    assert refusal.number > 4


INTERRUPTED = [
    *((Store, name) for name in ("begin_transaction", "end_transaction", "roll_back", "commit")),
    *((Index, name) for name in ("append", "publish", "acknowledge", "cut", "rewind", "refresh")),
    *((Ledger, name) for name in ("encode", "committed", "revert", "inherit", "delete", "add")),
    *((Directory, name) for name in ("place", "remove", "name_for")),
    *((Memory, name) for name in ("flush", "_isolate", "_roll_back", "_forget", "_look", "_save")),
]


def interrupt(patch, owner, name, *, late):
    """Raise KeyboardInterrupt before or after a method does its work, the first time."""
    real = getattr(owner, name)
    raised = []

    def method(*args, **options):
        done = real(*args, **options) if late or raised else None
        if not raised:
            raised.append(name)
            raise KeyboardInterrupt
        return done

    patch.setattr(owner, name, method)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("when", ["around the block", "in the block", "at the end", "taking back"])
@pytest.mark.parametrize(
    ("owner", "name"), [pytest.param(*each, id=each[1]) for each in INTERRUPTED]
)
def test_an_interrupt_leaves_all_or_nothing(chest_at, path, monkeypatch, owner, name, when, late):
    c, other = chest_at(start()), chest_at()
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt, Failure):
        if when == "around the block":
            interrupt(patch, owner, name, late=late)
        with c.transaction():
            c["first"] = 1
            c.flush()
            if when == "in the block":
                interrupt(patch, owner, name, late=late)
            change_much(c)
            if when == "at the end":
                interrupt(patch, owner, name, late=late)
            if when == "taking back":
                interrupt(patch, owner, name, late=late)
                raise Failure
    expected = dict(other)
    committed = changed() | {"first": 1}
    assert expected == start() or (expected == committed and when != "taking back")
    with thread(free, c):
        pass
    assert not c._memory.in_transaction
    assert dict(c) == expected
    with c.transaction(timeout=0):
        c["n"] = 1
    c["later"] = 2
    c.flush()
    c._check()
    assert dict(c) == dict(other) == read_back(path) == expected | {"n": 1, "later": 2}


def free(c):
    """Fail if a lock is still held, seen from another thread."""
    with c.transaction(timeout=HARMLESS), Chest(path=c.path) as other:
        assert dict(other) == dict(c)
    with Chest(path=c.path) as other, other.transaction(timeout=0):
        pass


# -- random operations ----------------------------------------------------------------------------

GONE = object()

keys = st.sampled_from(["a", "A", "b", ("a", "b"), 1])
values = st.one_of(
    st.integers(),
    st.lists(st.integers(0, 9), max_size=3),
    st.builds(lambda n: ["large"] * n, st.integers(200, 300)),
)
operations = st.tuples(
    st.sampled_from([
        *("set", "set", "change", "change", "delete", "clear", "pop", "setdefault"),
        *("move", "flush", "write_keys", "prefetch", "update", "take over", "nest", "replace"),
    ]),
    keys,
    values,
)


def do(c, model, operation, key, value):
    """Do the same to a chest and to a dict; return the keys that were set or changed."""
    twin = value.copy() if isinstance(value, list) else value
    match operation:
        case "set":
            c[key], model[key] = value, twin
        case "replace":
            for m, new in ((c, value), (model, twin)):
                m.pop(key, None)
                m[key] = new
        case "change" if isinstance(model.get(key), list):
            c[key].append("more")
            model[key].append("more")
        case "delete" | "pop":
            assert c.pop(key, None) == model.pop(key, None)
        case "setdefault":
            assert c.setdefault(key, value) == model.setdefault(key, twin)
        case "update":
            c.update({key: value})
            model.update({key: twin})
        case "take over":
            with Chest({key: value}) as other:
                c.update(other)
            model[key] = twin
        case "nest":
            with c.transaction():
                c[key] = value
            model[key] = twin
        case "clear":
            c.clear()
            model.clear()
        case "move" if key in model:
            c.move_to_disk(key)
        case "prefetch":
            c.prefetch(list(model))
        case "flush":
            c.flush()
        case "write_keys":
            c.write_keys()


class TransactionMachine(RuleBasedStateMachine):
    """Two handles, transactions of random operations, which end, fail, or die with their process.

    The model is what was committed, and for each handle what it did since its last commit: a
    handle sees the one under the other.
    """

    which = st.integers(0, 1)

    def __init__(self):
        super().__init__()
        self.patches = ExitStack()
        for owner, name in ((chest.upkeep, "COMPACT_BYTES"), (chest.ledger, "FRAME_KEYS")):
            few = 1000 if name == "COMPACT_BYTES" else 2
            self.patches.enter_context(mock.patch.object(owner, name, few))
        self.folder = tempfile.TemporaryDirectory()
        self.path = os.path.join(self.folder.name, "chest")
        self.handles = []
        self.committed = {}
        self.pending = [{}, {}]
        self.budgets = [1e9, 1e9]
        self.left = False  # a crash may have left something, which the next transaction removes

    @initialize(budgets=st.tuples(*[st.sampled_from([1e9, 1000, 0])] * 2))
    def begin(self, budgets):
        self.budgets = [*budgets]
        self.handles = [Chest(path=self.path, available_memory=budget) for budget in budgets]

    def teardown(self):
        try:
            if sys.exception() is None and self.handles:
                self.flush(0)
                self.flush(1)
                self.sound()
        finally:
            for handle in self.handles:
                abandon(handle)
            self.patches.close()
            self.folder.cleanup()

    def view(self, i):
        both = self.committed | self.pending[i]
        return {key: value for key, value in both.items() if value is not GONE}

    def commit(self, i, after):
        """Make a dict the committed state; what both deleted, the other need not tell any more."""
        theirs = self.pending[1 - i]
        for key in self.committed.keys() - after.keys():
            if theirs.get(key) is GONE:
                del theirs[key]
        self.committed = {
            key: value.copy() if isinstance(value, list) else value for key, value in after.items()
        }
        self.pending[i] = {}

    @rule(i=which, key=keys, value=values)
    def set(self, i, key, value):
        self.handles[i][key] = value
        if self.budgets[i] == 1e9:
            self.pending[i][key] = value.copy() if isinstance(value, list) else value
        else:
            self.flush_after(i, lambda model: model.__setitem__(key, value))

    @rule(i=which, key=keys)
    def delete(self, i, key):
        if self.handles[i].pop(key, GONE) is not GONE:
            if self.budgets[i] == 1e9:
                self.pending[i].pop(key, None)
                if key in self.committed:
                    self.pending[i][key] = GONE
            else:
                self.flush_after(i, lambda model: model.pop(key, None))

    def flush_after(self, i, change):
        """Where nobody knows what spilled, tell the other at once."""
        self.handles[i].flush()
        model = self.view(i)
        change(model)
        self.commit(i, model)

    @rule(i=which)
    def flush(self, i):
        self.handles[i].flush()
        self.commit(i, self.view(i))

    @rule(i=which)
    def reopen(self, i):
        self.handles[i].close()
        self.commit(i, self.view(i))
        self.handles[i] = Chest(path=self.path, available_memory=self.budgets[i])

    @rule(
        i=which,
        work=st.lists(operations, max_size=8),
        end=st.sampled_from(["commit", "commit", "fail", "fail", "die"]),
    )
    def transaction(self, i, work, end):
        handle, other = self.handles[i], self.handles[1 - i]
        model = self.view(i)
        block = handle.transaction()
        block.__enter__()
        self.commit(i, model)
        self.left = False
        model = {**handle}  # in its order
        try:
            for step in work:
                assert {**other} == self.view(1 - i)
                do(handle, model, *step)
                assert is_like(handle, model)
            assert {**other} == self.view(1 - i)
        except BaseException as error:
            block.__exit__(type(error), error, None)
            raise
        if end == "commit":
            block.__exit__(None, None, None)
            self.commit(i, model)
        elif end == "fail":
            error = Failure()
            assert not block.__exit__(Failure, error, None)
        else:
            abandon(handle)
            del block
            self.left = True
            self.handles[i] = Chest(path=self.path, available_memory=self.budgets[i])

    @invariant()
    def sound(self):
        for i, handle in enumerate(self.handles):
            assert {**handle} == self.view(i)
        for handle in () if self.left else self.handles:
            handle._check()


def test_random_transactions_of_two_handles_are_all_or_nothing():
    effort = settings(
        max_examples=60 * max(TIMES, 1),
        stateful_step_count=15,
        derandomize=not TIMES,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    run_state_machine_as_test(TransactionMachine, settings=effort)


def test_what_another_thread_changes_while_a_transaction_begins_is_not_taken_back(path):
    dumping, done = threading.Event(), threading.Event()

    def dump(value, file):
        if value == ["slow"]:
            dumping.set()
            assert done.wait(HARMLESS)
        pickle.dump(value, file)

    with Chest({"k": [0], "j": [0]}, path, dump=dump) as c:
        c.flush()

        def change():
            assert dumping.wait(HARMLESS)
            c["k"].append(1)  # which has been compared already
            c["j"]
            done.set()

        thread = threading.Thread(target=change)
        thread.start()
        c["slow"] = ["slow"]
        with pytest.raises(Failure), c.transaction():
            c["mine"] = [1]
            raise Failure
        thread.join()
        assert c == {"k": [0, 1], "j": [0], "slow": ["slow"]}
        c._check()


@pytest.mark.parametrize("last", [False, True])
def test_a_transaction_that_cannot_be_made_safe_tells_whether_it_counts(path, last):
    fsync = os.fsync
    with Chest({"x": 1}, path=path, fsync=True) as c, Chest(path=path) as other:
        c.flush()
        length = c._memory.store.index.head[1]

        def refuse(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def fail(number):
            if (c._memory.store.index.head[1] != length) == last:
                patch.setattr(chest.index, "read_frames", refuse)  # nor can it be read now
                refuse()
            fsync(number)

        with pytest.MonkeyPatch.context() as patch:
            with pytest.raises((OSError, UnsavedError)) as caught, c.transaction():
                c["x"] = 2
                patch.setattr(os, "fsync", fail)
        assert ("it is committed, but may be lost" in str(caught.value)) == last
        assert c["x"] == other["x"] == 1 + last
        c["y"] = 1
        c.flush()
        c._check()
        assert dict(other) == {"x": 1 + last, "y": 1}
