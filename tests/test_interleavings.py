"""Two threads at one chest, in every order: what each finds is what some order of the two gives.

A *step* is a method of the chest at which the first thread is held, before it or after it, while
the second one does something. Where the second has to wait for the first, by design, its lock tells
so, and the first is let go on. Nothing here depends on time, but for the last tests: those let
threads do anything at once and look afterwards whether it can have been.

The seed of those is printed: ``CHEST_SEED=1234`` does the same again, as far as the threads' turns
allow. ``CHEST_SOAK=60`` makes each of them go on for so many seconds, with another seed each time.
"""

from __future__ import annotations

import bisect
import enum
import functools
import inspect
import itertools
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import chest.memory
import chest.serialize
import chest.staging
import chest.store
import chest.upkeep
from chest import Chest, ChestClosedError
from chest.directory import Directory
from chest.eviction import Eviction
from chest.hands import Hands
from chest.index import Index
from chest.ledger import Ledger
from chest.loads import Loads
from chest.memory import Memory
from chest.packs import MANY, Packs
from chest.serialize import SMALL, Serializer
from chest.staging import Batch, StagedPack
from chest.store import Store

SOAK = float(os.environ.get("CHEST_SOAK", "0"))
PATIENCE = 10  # seconds after which a thread that should go on has failed


# -- two threads and a step ------------------------------------------------------------------------


class TellingLock:
    """The lock of a chest; tells when a thread is about to wait, for it or for a load."""

    def __init__(self, c):
        self._lock = threading.RLock()
        self.tell = lambda: None
        c._memory.lock = self
        c._memory._loads = Loads(self)

    def acquire(self, blocking=True, timeout=-1):
        if self._lock.acquire(blocking=False):
            return True
        if not blocking:
            return False
        self.tell()
        return self._lock.acquire(timeout=timeout)

    def release(self):
        self._lock.release()

    __enter__ = acquire

    def __exit__(self, *_):
        self.release()

    # what a condition asks of its lock

    def _is_owned(self):
        return self._lock._is_owned()

    def _release_save(self):
        state = self._lock._release_save()
        self.tell()
        return state

    def _acquire_restore(self, state):
        self._lock._acquire_restore(state)


class Step:
    """Holds the first thread that comes to a method for the `nth` time, before or after it."""

    def __init__(self, owner, name, nth=0):
        self.owner = owner
        self.name = name
        self.nth = nth
        self.reached = threading.Event()
        self.go = threading.Event()
        self.holds_lock = False

    @contextmanager
    def watched(self, when, lock):
        """Hold a thread there, from now on."""
        real = getattr(self.owner, self.name)
        numbers = itertools.count()

        def hold():
            self.holds_lock = lock._is_owned()
            self.reached.set()
            assert self.go.wait(PATIENCE), "nobody lets it go on"

        def method(*args, **kwargs):
            mine = next(numbers) == self.nth
            if mine and when == "before":
                hold()
            result = real(*args, **kwargs)
            if mine and when == "after":
                hold()
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.owner, self.name, method)
            try:
                yield
            finally:
                self.go.set()


class Model(dict):
    """What a chest is to its user: a dict, until it is closed."""

    end = None

    def __getattribute__(self, name):
        if name not in ("end", "close", "state") and dict.__getattribute__(self, "end") is not None:
            raise ChestClosedError("")
        return dict.__getattribute__(self, name)

    def move_to_disk(self, key):
        self[key]

    get_from_disk = move_to_disk

    def update(self, other=(), /, overwrite=True, **more):
        for key, value in dict(other, **more).items():
            if overwrite or key not in self:
                self[key] = value

    def prefetch(self, keys):
        for key in keys:
            self[key]

    def flush(self):
        pass

    def key_to_filename(self, key):
        pass

    @contextmanager
    def transaction(self):
        before = dict(self)
        try:
            yield
        except BaseException:
            self.clear()
            self.update(before)
            raise

    def close(self):
        self.end = deepcopy(list(self.items())) if self.end is None else self.end

    def state(self):
        return list(self.items()) if self.end is None else self.end


def guarded(name):
    def method(self, *args):
        self.keys  # noqa: B018 -- raises when it is closed
        return getattr(dict, name)(self, *args)

    return method


for name in ("__getitem__", "__setitem__", "__delitem__", "__contains__", "__len__"):
    setattr(Model, name, guarded(name))


def parts(act, d):
    """Do to a dict what `act` does, with a pause wherever it yields."""
    result = act(d)
    if inspect.isgenerator(result):
        result = yield from result
    return result


def go_on(run):
    """Do the next part; return what came of it all, if it is over."""
    try:
        next(run)
    except StopIteration as end:
        return "gives", end.value
    except KeyError as error:
        return "raises", KeyError, error.args
    except ChestClosedError:
        return "raises", ChestClosedError, ()
    return None


def finish(run):
    while (outcome := go_on(run)) is None:
        pass
    return outcome


def play(start, acts, order):
    """Do the parts of two acts to a dict in some order; return what comes of each and of it."""
    d = Model(deepcopy(start))
    runs = [parts(act, d) for act in acts]
    outcomes: list[Any] = [None, None]
    for n in order:
        outcomes[n] = outcomes[n] or go_on(runs[n])
    return [*outcomes, d.state()]


def all_orders(start, acts, prepared):
    """Return what may come of two acts; the first part of the second comes first if `prepared`."""
    head = (1,) if prepared else ()
    orders = {head + order for order in set(itertools.permutations((0, 0, 1, 1, 1)))}
    found = [play(start, acts, order) for order in orders]
    return [outcome for n, outcome in enumerate(found) if outcome not in found[:n]]


def meet(c, first, second, step, when, *, prepared=False):
    """Do `second` while the thread that does `first` is held at a step.

    Returns what comes of both, and whether the second had to wait for the first.
    """
    lock = TellingLock(c)
    runs = [parts(act, c) for act in (first, second)]
    settled = threading.Event()
    waits = threading.Event()
    me = []

    def do_second():
        me.append(threading.get_ident())
        return finish(runs[1])

    def tell():
        if threading.get_ident() in me:
            waits.set()
            settled.set()

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        if prepared:
            assert two.submit(go_on, runs[1]).result(PATIENCE) is None
        with step.watched(when, lock):
            held = one.submit(finish, runs[0])
            held.add_done_callback(lambda _: step.reached.set())
            assert step.reached.wait(PATIENCE)
            assert not held.done(), f"never came to {step.name}: {held.result()}"
            lock.tell = tell
            other = two.submit(do_second)
            other.add_done_callback(lambda _: settled.set())
            assert settled.wait(PATIENCE), "neither done nor waiting"
            waited = waits.is_set()
        outcomes = [held.result(PATIENCE), other.result(PATIENCE)]
    return outcomes, waited


def state(c, path):
    """Return the pairs of a chest, or of its directory when it is closed."""
    if not c.closed:
        c._check()
        assert not c._memory._loads.threads
        return list(c.items())
    with Chest(path=path) as again:
        again._check()
        return list(again.items())


def check_orders(c, path, start, acts, outcomes, *, prepared=False):
    """Check what came of two acts, then close the chest, open it and look again."""
    found = state(c, path)
    allowed = all_orders(start, acts, prepared)
    assert [*outcomes, found] in allowed
    c.close()
    with Chest(path=path) as again:
        again._check()
        assert list(again.items()) == found


def store(path, values):
    """Put values on disk, so that nobody has them in hand."""
    with Chest(values, path=path):
        pass


def many(what):
    """Return so many small values that they go to a pack."""
    return {f"{what} {n}": f"{what} {n}" for n in range(MANY)}


def store_packed(path, values):
    """Put values on disk, into a pack most of which is dead."""
    with Chest(values, path=path) as c:
        c.update(many("dead"))
        c.flush()
        for key in many("dead"):
            del c[key]
        c._memory.store._tolerated = NEVER
        assert all(map(c._memory.ledger.is_packed, values))


each_when = pytest.mark.parametrize("when", ["before", "after"])


# -- a load and anything ---------------------------------------------------------------------------


def append(d, what="mine"):
    value = d["k"]
    yield
    if isinstance(value, list):
        value.append(what)
    return value


def set_and_evict(d):
    d["k"] = ["new"]
    yield
    d.move_to_disk("k")


def delete_and_set(d):
    del d["k"]
    yield
    d["k"] = ["new"]


LOAD_STEPS = {
    "begin": (Memory, "_begin_load"),
    "load": (Memory, "_load"),
    "read": (Serializer, "read"),
    "measure": (Memory, "measure"),
    "digest": (Memory, "_digest_as_loaded"),
    "take in": (Memory, "_take_in"),
    "look again": (Memory, "_wants"),
    "admit": (Memory, "_admit"),
    "in hand": (Hands, "hold"),
}
OUT_OF_HAND = (Hands, "empty")  # "in hand" of what cannot change
READS = {
    "get": append,
    "pop": lambda d: d.pop("k", None),
    "setdefault": lambda d: d.setdefault("k", ["default"]),
    "prefetch": lambda d: d.prefetch(["k"]),
}
NOT_OF_PREFETCH = {"begin", "load"}
ACTIONS = {
    "set": lambda d: d.__setitem__("k", ["new"]),
    "set what cannot change": lambda d: d.__setitem__("k", "new"),
    "set and evict": set_and_evict,
    "delete": lambda d: d.__delitem__("k"),
    "delete and set": delete_and_set,
    "clear": lambda d: d.clear(),
    "pop": lambda d: d.pop("k", None),
    "setdefault": lambda d: d.setdefault("k", ["default"]),
    "evict": lambda d: d.move_to_disk("k"),
    "flush": lambda d: d.flush(),
    "close": lambda d: d.close(),
    "update": lambda d: d.update(k=["updated"], loose=["updated"], new=["updated"]),
    "get": lambda d: append(d, "theirs"),
}
WAIT_FOR_THE_LOAD = {"pop", "setdefault", "get"}
LOADS = [
    (step, read)
    for step in LOAD_STEPS
    for read in READS
    if read != "prefetch" or step not in NOT_OF_PREFETCH
]


@each_when
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(("step", "read"), LOADS)
@pytest.mark.many
def test_a_load_and_what_another_thread_does_meanwhile(path, step, read, action, when):
    for budget, value in [(1e9, ["k"]), (250, "k"), (0, ["k"])]:
        if read == "prefetch" and budget == 0:
            continue  # it would read nothing
        folder = f"{path}-{budget:.0f}-{value}"
        start = {"fixed": "fixed", "k": value, "loose": ["loose"]}
        store(folder, start)
        c = Chest(path=folder, available_memory=budget)
        c.prefetch(["fixed", "loose"])
        acts = [READS[read], ACTIONS[action]]
        empties = step == "in hand" and isinstance(value, str)
        held = Step(*(OUT_OF_HAND if empties else LOAD_STEPS[step]))
        outcomes, waited = meet(c, *acts, held, when)
        if waited and not held.holds_lock:
            assert action in WAIT_FOR_THE_LOAD, "it waited for a load that it does not need"
        check_orders(c, folder, start, acts, outcomes)


# -- a commit and anything -------------------------------------------------------------------------


class Box:
    """A value that weak references may lead to."""

    def __init__(self):
        self.items = []

    def append(self, item):
        self.items.append(item)

    def __eq__(self, other):
        return isinstance(other, Box) and self.items == other.items

    __hash__ = None

    def __repr__(self):
        return f"Box({self.items})"


class Telling:
    """A value that is dumped by a method of Python, at which a thread can be held."""

    def __reduce__(self):
        return Telling, ()

    def __eq__(self, other):
        return isinstance(other, Telling)

    __hash__ = None


def lower_the_budget(d):
    len(d)  # so that the model says that it is closed
    d.available_memory = 0


COMMIT_STEPS = {
    "compare values": (Memory, "_compare"),
    "dump small values": (Memory, "_streams"),
    "dump one of them": (Telling, "__reduce__"),
    "collect their streams": (Batch, "add"),
    "stage a value": (Store, "stage_stream"),
    "stage the last value": (Store, "stage_stream", 1),
    "stage a large value": (Store, "stage"),
    "stage a pack": (StagedPack, "append"),
    "take the lock of the index": (Index, "_lock"),
    "catch up": (Store, "catch_up"),
    "take in what others did": (Memory, "_absorb"),
    "choose names": (Store, "_plan"),
    "choose packs": (Packs, "new_name"),
    "append the frame": (Index, "append"),
    "place a file": (Directory, "place"),
    "place the last file": (Directory, "place", 1),
    "place a staged pack": (Directory, "place"),
    "append to a pack": (Packs, "append"),
    "publish": (Index, "publish"),
    "know where the values are": (Ledger, "committed"),
    "acknowledge": (Index, "acknowledge"),
    "remove what is obsolete": (Directory, "remove"),
    "remove a dead pack": (Packs, "forget"),
    "copy the living out of packs": (Store, "repack"),
    "publish the copies": (Index, "publish", 1),
    "compact the index": (Index, "replace"),
    "release the lock of the index": (Index, "_unlock"),
    "let values go that can change": (Memory, "_let_go_loose"),
    "see who has them": (Hands, "keep_some"),
    "forget what they were": (Eviction, "discard_all"),
    "let values go that cannot": (Memory, "_let_go"),
}
LEAVING = [
    "let values go that can change", "see who has them", "forget what they were",
    "let values go that cannot",
]  # fmt: skip
STAGED_PACKS = ["stage a pack", "place a staged pack"]
REPACKS = ["copy the living out of packs", "publish the copies"]
# Steps at which so many small values are dirty that they go to a pack.
OF_MANY = ["dump one of them", "choose packs", "append to a pack", *STAGED_PACKS]
COMMITS = {
    "flush": lambda d: d.flush(),
    "lower the budget": lower_the_budget,
    "close": lambda d: d.close(),
}
ALL_COMMITS = [
    (step, commit)
    for step in COMMIT_STEPS
    for commit in COMMITS
    if step not in LEAVING or commit == "lower the budget"
]


@pytest.fixture
def _bounds(step, monkeypatch):
    """Let few bytes be enough for what a step is about."""
    if step in STAGED_PACKS:
        monkeypatch.setattr(chest.staging, "STREAM_BYTES", 0)
    if step in REPACKS:
        monkeypatch.setattr(chest.upkeep, "WASTE", 0)
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", NEVER)  # till `dirty_chest` is ready


bounded = pytest.mark.usefixtures("_bounds")


def dirty_chest(path, step, value, *, set_again=True):
    """Return a chest with something of every kind to commit, and its pairs.

    There is a new value, a value of which the disk holds another one, a deletion, and there are
    two values that are resident and saved. If the step is about that, there are a large value, or
    many small ones, and an index to compact, or a pack that is dead, or one with little alive.
    """
    more = {}
    if step == "stage a large value":
        more = {"large": bytes(SMALL)}
    elif step in OF_MANY:
        more = {**many("small"), "telling": Telling()}
    stored = {"fixed": "fixed", "k": ["before"], "loose": ["loose"], "gone": 1}
    if step in REPACKS:
        store_packed(path, stored)
    else:
        store(path, stored)
    if step == "remove a dead pack":
        store(path, many("old"))
    c = Chest(path=path)
    c._memory.store._tolerated = NEVER
    if step == "compact the index":
        for n in range(6):
            c["gone"] = n
            c.flush()
    c["fixed"]
    c["k"] = value
    if not set_again:
        c.flush()
    if step == "compact the index":
        chest.upkeep.COMPACT_BYTES = 0
    c._memory.store._tolerated = 0
    c["newer"] = ["newer"]
    c.update(more)
    c["new"] = ["new"]
    del c["gone"]
    if step == "remove a dead pack":
        for key in many("old"):
            del c[key]
    c["loose"]
    c["fixed"]
    return c, {
        "fixed": "fixed",
        "k": deepcopy(value),
        "loose": ["loose"],
        "newer": ["newer"],
        **deepcopy(more),
        "new": ["new"],
    }


@bounded
@each_when
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(("step", "commit"), ALL_COMMITS)
@pytest.mark.many
def test_a_commit_and_what_another_thread_does_meanwhile(path, step, commit, action, when):
    c, start = dirty_chest(path, step, ["k"])
    acts = [COMMITS[commit], ACTIONS[action]]
    outcomes, _ = meet(c, *acts, Step(*COMMIT_STEPS[step]), when)
    check_orders(c, path, start, acts, outcomes)


def hits(d):
    return d["loose"], d.get("new"), *hits_of_what_cannot_change(d)


def hits_of_what_cannot_change(d):
    return d["fixed"], "k" in d, "gone" in d, len(d)


def stays(step, when):
    """Tell whether what can change is in memory yet."""
    return step not in LEAVING or (step, when) == (LEAVING[0], "before")


@bounded
@pytest.mark.parametrize(
    ("step", "commit", "when"),
    [
        (*each, when)
        for each in ALL_COMMITS
        for when in ("before", "after")
        if each[0] != LEAVING[1] and (each[0], when) != (LEAVING[3], "after")  # one is hit
    ],
)
def test_a_commit_delays_no_hit(path, step, commit, when):
    c, start = dirty_chest(path, step, ["k"])
    look = hits if stays(step, when) else hits_of_what_cannot_change
    acts = [COMMITS[commit], look]
    outcomes, waited = meet(c, *acts, Step(*COMMIT_STEPS[step]), when)
    assert not waited
    assert outcomes[1] == ("gives", look(start))
    check_orders(c, path, start, acts, outcomes)


def change_in_hand(d):
    value = d["k"]
    yield
    value.append("theirs")


def change_in_hand_and_go_on(d):
    value = d["k"]
    yield
    value.append("theirs")
    del value
    d["loose"]


def take_change_and_go_on(d):
    value = d["k"]
    value.append("theirs")
    del value
    d["loose"]


CHANGES_IN_HAND = {
    "keep it": change_in_hand,
    "take the next": change_in_hand_and_go_on,
    "take both meanwhile": take_change_and_go_on,
}


@bounded
@each_when
@pytest.mark.parametrize(
    ("kind", "set_again"),
    [(list, False), (list, True), (Box, True)],
    ids=["saved list", "dirty list", "dirty object"],
)
@pytest.mark.parametrize(
    ("step", "commit", "then"),
    [
        (*each, then)
        for each in ALL_COMMITS
        for then in CHANGES_IN_HAND
        if each[1] != "close" or then == "keep it"  # else: is it before the end, or after it?
    ],
)
@pytest.mark.many
def test_a_change_in_hand_counts_at_any_moment_of_a_commit(
    path, step, commit, then, kind, set_again, when
):
    c, start = dirty_chest(path, step, kind(), set_again=set_again)
    acts = [COMMITS[commit], CHANGES_IN_HAND[then]]
    prepared = then != "take both meanwhile"
    outcomes, _ = meet(c, *acts, Step(*COMMIT_STEPS[step]), when, prepared=prepared)
    check_orders(c, path, start, acts, outcomes, prepared=prepared)


# -- hits and loads --------------------------------------------------------------------------------


def in_thread(act, *args):
    """Do something in a thread of its own, and return what it returns."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act, *args).result(PATIENCE)


def frozen_array():
    array = np.arange(3)
    array.flags.writeable = False
    return array


KINDS = {
    "str": lambda: "text",
    "bytes": lambda: b"bytes",
    "int": lambda: 5,
    "None": lambda: None,
    "tuple": lambda: (1, "a"),
    "read-only array": frozen_array,
    "list": lambda: [1],
    "list within a tuple": lambda: (1, [2]),
    "dict": lambda: {"a": 1},
    "set": lambda: {1},
    "array": lambda: np.arange(3),
    "object": Box,
}


@pytest.mark.parametrize("kind", KINDS)
def test_hits_take_no_lock(kind):
    with Chest({"k": KINDS[kind](), "x": "x"}) as c:
        lock = TellingLock(c)
        waited = []
        lock.tell = lambda: waited.append(threading.get_ident())
        value = c.inmem["k"]

        def hit():
            for _ in range(200):
                assert c["k"] is value
                assert c.get("k") is value
                assert "k" in c
                assert "missing" not in c
                assert len(c) == 2
                if waited:
                    return

        with ThreadPoolExecutor(1) as pool:
            with c.lock:
                hits = pool.submit(hit)
                while not hits.done() and not waited:
                    threading.Event().wait(0.001)
            hits.result(PATIENCE)
        assert not waited


def loader(act):
    """Return a `load` that first does something with the name of the file."""

    def load(file):
        act(os.path.basename(file.name))
        return pickle.load(file)

    return load


@pytest.mark.parametrize("together", [2, 8])
@pytest.mark.parametrize("way", ["get", "prefetch"])
def test_different_keys_load_side_by_side(path, way, together):
    keys = [f"k{n}" for n in range(together)]
    store(path, {key: [key] for key in keys})
    barrier = threading.Barrier(together)
    load = loader(lambda name: barrier.wait(PATIENCE))
    with Chest(path=path, dump=pickle.dump, load=load) as c:
        if way == "prefetch":
            c.prefetch(keys)
        else:
            with ThreadPoolExecutor(together) as pool:
                assert list(pool.map(c.__getitem__, keys)) == [[key] for key in keys]
        assert dict(c.inmem) == {key: [key] for key in keys}


@each_when
@pytest.mark.parametrize("step", LOAD_STEPS)
def test_a_key_is_loaded_once_wherever_the_first_of_eight_threads_is(path, step, when):
    loads = []
    store(path, {"k": ["k"]})
    with Chest(path=path, dump=pickle.dump, load=loader(loads.append)) as c:
        lock = TellingLock(c)
        held = Step(*LOAD_STEPS[step])
        settled = threading.Semaphore(0)
        with ThreadPoolExecutor(8) as pool:
            with held.watched(when, lock):
                got = [pool.submit(c.__getitem__, "k")]
                assert held.reached.wait(PATIENCE)
                lock.tell = settled.release
                for _ in range(7):  # one after the other, so that none waits for another one
                    got.append(pool.submit(c.__getitem__, "k"))
                    got[-1].add_done_callback(lambda _: settled.release())
                    assert settled.acquire(timeout=PATIENCE)
                lock.tell = lambda: None
            values = [each.result(PATIENCE) for each in got]
        assert loads == ["k"]
        assert all(value is values[0] for value in values)
        c._check()


def test_a_read_within_a_read_lets_no_other_thread_read_it_too(path):
    """`load` reads its own key once more; another thread waits for the outer read all the same."""
    outer, leave, readers = threading.Event(), threading.Event(), []

    def load(file):
        readers.append(threading.get_ident())
        if len(readers) == 1:
            assert c["x"] == "value"
            c["y"] = "in its hand"
            outer.set()
            assert leave.wait(10)
        return pickle.load(file)

    with Chest({"x": "value"}, path):
        pass
    with Chest(path=path, load=load, available_memory=1) as c, ThreadPoolExecutor(2) as pool:
        first = pool.submit(c.__getitem__, "x")
        assert outer.wait(10)
        second = pool.submit(c.__getitem__, "x")
        wait_until(lambda: c._memory._loads.waiting or len(readers) > 2)
        assert len(readers) == 2
        leave.set()
        assert first.result(10) == second.result(10) == "value"


def wait_until(told, seconds=10):
    until = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_value_that_was_replaced_and_set_back_while_it_was_read_is_no_damage(path, monkeypatch):
    store(path, {"k": ["k"]})
    real = Serializer.read
    reads = []

    def read(self, *args):
        reads.append(args)
        if len(reads) > 1:
            return real(self, *args)
        for value in (["other"], ["k"]):
            in_thread(c.__setitem__, "k", value)
            in_thread(c.flush)
            if value == ["other"]:
                with pytest.raises(FileNotFoundError) as info:
                    real(self, *args)
        raise info.value

    monkeypatch.setattr(Serializer, "read", read)
    with Chest(path=path) as c:
        assert c["k"] == ["k"]


@pytest.mark.parametrize("step", ["measure", "_digest_as_loaded"])
@pytest.mark.parametrize("value", ["text", ["k"]], ids=["str", "list"])
def test_a_value_that_is_set_back_after_its_file_was_gone_is_that_value(
    path, value, step, monkeypatch
):
    def replace(value):
        c["k"] = value
        c.move_to_disk("k")

    def first_time(owner, name, act):
        real = getattr(owner, name)
        acts = [act]

        def method(*args):
            if acts and threading.current_thread() is threading.main_thread():
                in_thread(acts.pop())
            return real(*args)

        monkeypatch.setattr(owner, name, method)

    def back():
        assert not os.path.exists(f"{path}/k")
        replace(value)
        assert os.path.exists(f"{path}/k")

    store(path, {"k": value})
    with Chest(path=path) as c:
        first_time(Serializer, "read", lambda: replace("other"))
        first_time(Memory, step, back)
        assert c["k"] == value
        c._check()


def test_a_value_that_another_handle_replaces_sets_back_and_replaces_again_is_no_damage(
    path, monkeypatch
):
    with Chest({"x": "first"}, path) as other:
        other.flush()
        real, reads = chest.serialize.read_whole, []

        def read_whole(*args):
            reads.append(args)
            if len(reads) < 3:  # it is as it was when this thread looks, and is not when it reads
                other["x"] = "second"
                other.flush()
            try:
                return real(*args)
            finally:
                if len(reads) == 1:
                    other["x"] = "first"
                    other.flush()

        with Chest(path=path) as c:
            monkeypatch.setattr(chest.serialize, "read_whole", read_whole)
            assert c["x"] == "second"
            assert len(reads) == 3


# -- updates and prefetches ------------------------------------------------------------------------


def update_missing(d):
    d.update({"new": ["mine"]}, overwrite=False)


def update_missing_with_keywords(d):
    d.update(overwrite=False, new=["mine"])


UPDATES = {
    "pairs": update_missing,
    "keywords": update_missing_with_keywords,
    "setdefault": lambda d: d.setdefault("new", ["mine"]),
}


@each_when
@pytest.mark.parametrize("action", ["set", "setdefault", "delete", "pop", "clear"])
@pytest.mark.parametrize("step", ["measure", "put"])
@pytest.mark.parametrize("update", UPDATES)
def test_what_sets_only_missing_keys_keeps_what_others_set(path, update, step, action, when):
    acts = [
        UPDATES[update],
        {
            "set": lambda d: d.__setitem__("new", ["theirs"]),
            "setdefault": lambda d: d.setdefault("new", ["theirs"]),
            "delete": lambda d: d.pop("new"),
            "pop": lambda d: d.pop("new", None),
            "clear": lambda d: d.clear(),
        }[action],
    ]
    c = Chest({"k": ["k"]}, path=path)
    outcomes, _ = meet(c, *acts, Step(Memory, step), when)
    check_orders(c, path, {"k": ["k"]}, acts, outcomes)


LINK_STEPS = {"link": (Store, "stage_link"), "publish": (Memory, "adopt")}


@each_when
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("step", LINK_STEPS)
@pytest.mark.parametrize("action", ["set", "setdefault", "pop", "evict", "flush", "clear"])
def test_an_update_from_a_chest_and_what_another_thread_does_meanwhile(
    path, action, step, overwrite, when
):
    start = {"k": ["k"], "x": ["x"]}
    with Chest({"k": ["linked"]}) as other:
        linked = {"k": ["linked"]}
        acts = [
            lambda d: d.update(other if isinstance(d, Chest) else linked, overwrite=overwrite),
            ACTIONS[action],
        ]
        if not overwrite:
            del start["k"]  # else there would be nothing to link
        c = Chest(start, path=path)
        outcomes, _ = meet(c, *acts, Step(*LINK_STEPS[step]), when)
        check_orders(c, path, start, acts, outcomes)


@each_when
@pytest.mark.parametrize("step", LINK_STEPS)
@pytest.mark.parametrize(
    "action", ["replace", "replace twice", "delete", "delete and set", "clear"]
)
def test_an_update_from_a_chest_that_changes_meanwhile(path, step, action, when):
    def change(d):
        if action in ("replace", "replace twice"):
            d["k"] = ["a longer one"]
        elif action == "clear":
            d.clear()
        else:
            del d["k"]
        d.flush()  # from here on the name of its file is free
        if action in ("replace twice", "delete and set"):
            d["k"] = ["another one"]
            d.flush()

    store(path, {"k": ["k"]})
    with Chest(path=path) as source, Chest() as c:
        outcomes, _ = meet(source, c.update, change, Step(*LINK_STEPS[step]), when)
        assert outcomes == [("gives", None), ("gives", None)]
        assert c.get("k", ["k"]) in (["k"], ["a longer one"], ["another one"])
        c._check()
        source._check()


@pytest.mark.parametrize("action", ["set", "set and evict", "delete", "delete and set", "clear"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_prefetch_through_open_many_and_what_another_thread_does_meanwhile(path, action, moment):
    @contextmanager
    def open_many(paths, mode):
        if moment == "before":
            in_thread(replace)
        with ExitStack() as stack:
            files = [stack.enter_context(open(name, mode)) for name in paths]
            if moment == "after":
                in_thread(replace)
            yield files

    def replace():
        finish(parts(ACTIONS[action], c))
        c.flush()

    def prefetch(d):
        d.prefetch(["x", "k"])

    start = {"x": ["x"], "k": ["k"]}
    store(path, start)
    c = Chest(path=path, open_many=open_many)
    outcome = finish(parts(prefetch, c))
    check_orders(c, path, start, [prefetch, ACTIONS[action]], [outcome, ("gives", None)])


@pytest.mark.parametrize("hold", ["lock", "transaction"])
def test_prefetch_while_the_lock_is_held_may_load_what_uses_the_chest(path, hold):
    store(path, {"k": ["k"], "other": ["other"]})

    def refuse():
        raise AssertionError("waits for ever")

    def act(name):
        if name == "k":
            assert c["other"] == ["other"]

    with Chest(path=path, dump=pickle.dump, load=loader(act)) as c:
        lock = TellingLock(c)
        with c.lock if hold == "lock" else c.transaction():
            lock.tell = refuse
            c.prefetch(["k"])
            assert c.inmem["k"] == ["k"]
            lock.tell = lambda: None


@pytest.mark.parametrize("ways", [["get", "prefetch"], ["prefetch", "get"], ["prefetch"] * 2])
def test_a_key_that_is_prefetched_is_loaded_once(path, ways):
    with Chest({"x": ["x"], "y": ["y"]}, path):
        pass
    loads = []
    loading, go_on = threading.Event(), threading.Event()

    def load(file):
        loading.set()
        assert go_on.wait(PATIENCE)
        value = pickle.load(file)
        loads.append(value)
        return value

    with Chest(path=path, load=load) as c, ThreadPoolExecutor(2) as pool:
        read = {"get": lambda: c["x"], "prefetch": lambda: c.prefetch(["x"])}
        results = [pool.submit(read[ways[0]])]
        assert loading.wait(PATIENCE)
        results.append(pool.submit(read[ways[1]]))
        wait(results, 0.1)
        go_on.set()
        assert [result.result(PATIENCE) for result in results].count(None) == ways.count("prefetch")
        assert "x" in c.inmem
        assert loads == [["x"]]


@pytest.mark.parametrize("locked", ["transaction", "lock"])
def test_a_prefetch_may_tell_a_hook_that_uses_what_this_thread_has_locked(path, locked):
    with Chest(dict.fromkeys(range(6), "v" * 9000), path):
        pass
    with Chest({"misses": 0}) as other:

        def on_miss(key):
            other["misses"] += 1

        with Chest(path=path, on_miss=on_miss) as c:
            with other.transaction() if locked == "transaction" else other.lock:
                c.prefetch(range(6))
            assert other["misses"] == 6
            assert c.inmem.keys() == {*range(6)}


def test_a_prefetch_in_the_transaction_of_another_handle_waits_for_nobody(path):
    with Chest({n: bytes([n]) * 300_000 for n in range(6)}, path):
        pass
    with Chest(path=path) as c, Chest(path=path, available_memory=1_000_000) as other:
        other.update({f"new{n}": bytes(300_000) for n in range(3)})
        with c.transaction(), suppress(OSError):
            other.prefetch(range(3))
        other._check()
        assert other[1] == bytes([1]) * 300_000


def test_the_threads_of_a_prefetch_leave_nothing_in_their_hands(path):
    with Chest({n: [n] for n in range(8)}, path):
        pass
    with Chest(path=path) as c:
        c.prefetch(range(8))
        assert c.inmem.keys() == {*range(8)}
        assert c._memory._hands.held.keys() <= {threading.get_ident()}


def test_nobody_waits_for_a_load_that_ended_before_it_was_known_that_somebody_waits(monkeypatch):
    waited = []
    lock = threading.RLock()
    loads = Loads(lock)
    monkeypatch.setattr(loads._ended, "wait", waited.append)
    loads.threads["x"] = 1
    with lock:
        loads.wait("y")
        assert waited == []
        loads.wait("x")
        assert len(waited) == 1


def test_a_key_error_of_a_hook_comes_through_prefetch_but_none_of_a_key_that_went(path):
    with Chest({n: [n] for n in range(8)}, path):
        pass

    def on_miss(key):
        del missing[key]

    missing = dict.fromkeys(range(7))
    with Chest(path=path, on_miss=on_miss) as c:
        with pytest.raises(KeyError):
            c.prefetch(range(8))
        assert c.inmem.keys() == {*range(7)}

    def deletes(key):
        if key in c:
            del c[key]

    with Chest(path=path, on_miss=deletes) as c:
        c.prefetch([1, 2])
        assert {1, 2}.isdisjoint(c)


@pytest.fixture
def sigint():
    """Have SIGINT raise KeyboardInterrupt: a shell starts its background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_who_is_interrupted_as_it_waits_for_the_lock_does_not_wait_to_tell(path):
    with Chest({n: n for n in range(100)} | {"alone": [1]}, path):
        pass
    for key in 1, "alone":
        with Chest(path=path) as c, ThreadPoolExecutor(1) as pool:
            c[2]
            held, let_go = threading.Event(), threading.Event()

            def hold(c=c, held=held, let_go=let_go):
                with c.lock:
                    held.set()
                    return let_go.wait(PATIENCE)

            holding = pool.submit(hold)
            assert held.wait(PATIENCE)
            me = threading.get_ident()
            threading.Timer(0.2, signal.pthread_kill, [me, signal.SIGINT]).start()
            with pytest.raises(KeyboardInterrupt):
                c[key]
            let_go.set()
            assert holding.result(PATIENCE)
            assert c[key] == (1 if key == 1 else [1])
            c._check()


# -- other orders ----------------------------------------------------------------------------------


REMOVALS = {
    "delete": lambda d: d.__delitem__("k"),
    "pop": lambda d: d.pop("k"),
    "clear": lambda d: d.clear(),
    "popitem": lambda d: d.popitem(),
}
REMOVAL_STEPS = {
    "its row": (Ledger, "delete"),
    "all rows": (Ledger, "clear"),
    "forget it": (Memory, "_forget"),
    "let it go": (Memory, "_leave"),
    "forget all": (Memory, "_empty"),
}
ALL_REMOVALS = [
    (step, removal)
    for step in REMOVAL_STEPS
    for removal in REMOVALS
    if (removal == "clear") == (step in ("all rows", "forget all"))
]


@each_when
@pytest.mark.parametrize("value", ["text", ["list"]], ids=["str", "list"])
@pytest.mark.parametrize(("step", "removal"), ALL_REMOVALS)
def test_a_key_goes_at_once(path, step, removal, value, when):
    def look(d):
        seen = ["k" in d]
        yield
        seen.append(len(d))
        yield
        seen.append(d.get("k"))
        yield
        seen.append("k" in d)
        yield
        seen.append(d.get("k"))
        return seen

    start = {"k": value}
    c = Chest(start, path=path)
    acts = [REMOVALS[removal], look]
    outcomes, _ = meet(c, *acts, Step(*REMOVAL_STEPS[step]), when)
    allowed = []
    for looks in range(6):  # before it went
        there = [n < looks for n in range(5)]
        found = [value if there[n] else None for n in (2, 4)]
        allowed.append([there[0], int(there[1]), found[0], there[3], found[1]])
    assert outcomes[1][1] in allowed
    assert state(c, path) == []
    c.close()


class Colour(enum.Enum):
    RED = 1


@dataclass(frozen=True)
class Key:
    """A key whose hash and comparison are Python, so that threads may switch in a look-up."""

    n: int
    hook = None

    def __hash__(self):
        if Key.hook is not None:
            Key.hook(self)
        return hash(self.n)


def test_hits_while_the_next_to_leave_are_chosen(monkeypatch):
    """A set of marks that grows while it is gone through is a RuntimeError."""
    keys = [Key(n) for n in range(50)]
    choosing = []
    real = Eviction.cheapest

    def cheapest(self):
        choosing.append(True)
        try:
            return real(self)
        finally:
            choosing.clear()

    def hook(key):
        if choosing and untouched and threading.current_thread() is threading.main_thread():
            in_thread(c.__getitem__, untouched.pop())

    monkeypatch.setattr(Eviction, "cheapest", cheapest)
    with Chest({key: f"value {key.n}" for key in keys}) as c:
        for key in keys[:5]:
            c[key]
        untouched = keys[5:10]
        monkeypatch.setattr(Key, "hook", hook)
        c.available_memory = c.memory_usage / 2
        assert not untouched, "no look-up while they were chosen"
        c._check()
        assert dict(c) == {key: f"value {key.n}" for key in keys}
        c.available_memory = 0
        assert c.memory_usage == 0


@pytest.mark.parametrize("value", ["text", ["list"]], ids=["str", "list"])
@pytest.mark.parametrize("ends", ["commit", "roll back"])
def test_a_hit_never_finds_what_a_transaction_has_not_committed(path, ends, value, monkeypatch):
    key = Key(1)
    looking, inside = threading.Event(), threading.Event()

    def hook(_):
        if threading.current_thread().name == "hits":
            looking.set()
            assert inside.wait(PATIENCE)

    def transact():
        assert looking.wait(PATIENCE)
        with c.transaction():
            c[key] = ["new"] if isinstance(value, list) else "new"
            inside.set()
            settled.wait(PATIENCE)
            if ends == "roll back":
                raise ZeroDivisionError

    def hit():
        threading.current_thread().name = "hits"
        try:
            return c[key], waited
        finally:
            settled.set()

    def tell():
        if threading.current_thread().name == "hits":
            waited.append(True)
            settled.set()

    with Chest({key: value}, path=path) as c:
        settled = threading.Event()
        waited = []
        TellingLock(c).tell = tell
        monkeypatch.setattr(Key, "hook", hook)
        with ThreadPoolExecutor(2) as pool:
            hits, transaction = pool.submit(hit), pool.submit(transact)
            if ends == "roll back":
                with pytest.raises(ZeroDivisionError):
                    transaction.result(PATIENCE)
            else:
                transaction.result(PATIENCE)
            found, _ = hits.result(PATIENCE)
        if ends == "roll back" or not waited:
            assert found == value
        else:
            assert found in (value, c[key])


# -- hooks that use the chest ----------------------------------------------------------------------


class Hook:
    """Something that a chest calls, and that does to the chest what it is told."""

    def __init__(self, name):
        self.name = name
        self.act = lambda: None

    def options(self):
        """Return the options of a chest that has this hook."""

        def dump(value, file):
            self.called("dump")
            pickle.dump(value, file)

        def load(file):
            self.called("load")
            return pickle.load(file)

        def nbytes(value):
            self.called("nbytes")
            return 100

        def open_file(path, mode):
            self.called("open")
            return open(path, mode)

        options = {
            "dump": dump,
            "load": load,
            "nbytes": nbytes,
            "open": open_file,
            "on_miss": lambda key: self.called("on_miss"),
            "on_overflow": lambda key: self.called("on_overflow"),
        }
        with_dump = {"dump": pickle.dump, "load": pickle.load, "nbytes": lambda value: 100}
        return {**with_dump, self.name: options[self.name]}

    def called(self, name):
        if name == self.name:
            self.act()

    def once(self, act):
        """Do this when it is called the next time, and nothing after that."""

        def act_and_forget():
            self.act = lambda: None
            act()

        self.act = act_and_forget


HOOKS = ["on_miss", "on_overflow", "dump", "load", "nbytes", "open"]


def alive(d):
    value = d["k"]
    d.move_to_disk("k")
    yield
    return d["k"] == value


def append_and(act):
    def steps(d):
        d["k"].append("mine")
        d["other"]
        yield
        return act(d)

    return steps


def hold(d):
    d["k"].append("mine")
    yield
    return d["other"]


TRIGGERS = {
    "get": lambda d: d["k"],
    "get what is alive": alive,
    "get many times": lambda d: [d["k"] for _ in range(70)][-1],
    "set": lambda d: d.__setitem__("k", ["set"]),
    "set another": lambda d: d.__setitem__("new", ["set"]),
    "pop": lambda d: d.pop("k", None),
    "setdefault": lambda d: d.setdefault("k", ["default"]),
    "prefetch": lambda d: d.prefetch(["k"]),
    "evict what changed": append_and(lambda d: d.move_to_disk("k")),
    "flush what changed": append_and(lambda d: d.flush()),
    "close": append_and(lambda d: d.close()),
    "lower the budget": append_and(lower_the_budget),
    "change and take the next": hold,
}
PREPARED = {
    TRIGGERS[name]
    for name in (
        "get what is alive",
        "evict what changed",
        "flush what changed",
        "close",
        "lower the budget",
        "change and take the next",
    )
}
USES = {
    "get it": lambda d: d["k"],
    "get another": lambda d: d["other"],
    "change it": lambda d: d["k"].append("theirs"),
    "set it": lambda d: d.__setitem__("k", ["theirs"]),
    "set another": lambda d: d.__setitem__("other", ["theirs"]),
    "set a new one": lambda d: d.__setitem__("newer", ["theirs"]),
    "delete it": lambda d: d.__delitem__("k"),
    "delete another": lambda d: d.__delitem__("other"),
    "delete and set it": lambda d: (d.pop("k"), d.__setitem__("k", ["theirs"])),
    "pop it": lambda d: d.pop("k", None),
    "setdefault": lambda d: d.setdefault("k", ["theirs"]),
    "clear": lambda d: d.clear(),
    "flush": lambda d: d.flush(),
    "len": len,
    "keys": list,
    "items": lambda d: list(d.items()),
    "evict it": lambda d: d.move_to_disk("k"),
    "evict another": lambda d: d.move_to_disk("other"),
    "prefetch": lambda d: d.prefetch(["other"]),
}


@pytest.mark.parametrize(
    ("use", "trigger"),
    [
        (use, trigger)
        for use in USES
        for trigger in TRIGGERS
        if (use, trigger) != ("change it", "close")  # is it before the end, or after it?
    ],
)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.many
def test_a_hook_may_use_the_chest_at_any_moment(path, hook, use, trigger):
    for budget in (0, 250):
        use_in_hook(f"{path}-{budget}", Hook(hook), USES[use], TRIGGERS[trigger], budget)


def use_in_hook(path, hook, use, trigger, budget):
    start = {"k": ["k"], "other": ["other"], "third": ["third"]}
    options = hook.options()
    with Chest(start, path=path, **options):
        pass
    c = Chest(path=path, available_memory=budget, **options)
    outcomes = [None, None]

    def act():
        outcomes[1] = finish(parts(use, c))

    run = parts(trigger, c)
    prepared = trigger in PREPARED
    if prepared:
        assert go_on(run) is None
    hook.once(act)
    outcomes[0] = finish(run)
    hook.once(lambda: None)
    if outcomes[1] is None:  # it was not called
        act()
    found = state(c, path)
    orders = [(0, 0, 1), (0, 1, 0)] if prepared else [(0, 1), (1, 0)]
    assert [*outcomes, found] in [play(start, [trigger, use], order) for order in orders]
    c.close()
    with Chest(path=path, **options) as again:
        again._check()
        assert list(again.items()) == found


def run_together(*acts):
    """Do each in a thread of its own; raise what the first to fail raised."""
    errors = []

    def run(act):
        try:
            act()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[act], daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE + 2 * SOAK)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other for ever"


@pytest.fixture
def hostile(monkeypatch):
    """Let threads take turns as often as they can, and the index be compacted all the time."""
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 3000)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def get_again(d):
    value = d["k"]
    d.move_to_disk("k")
    yield
    return d["k"] if value else None


HANDED_OUT = {
    "get": lambda d: d["k"],
    "get what is alive": get_again,
    "get many times": lambda d: [d["k"] for _ in range(70)][-1],
    "set": lambda d: [d.__setitem__("k", []), d["k"]][1],
    "setdefault": lambda d: d.setdefault("k", []),
    "setdefault of a new key": lambda d: d.setdefault("new", []),
    "fetch": lambda d: next(iter(d.values())),
}
TAKES = {
    "get": lambda d: d["other"],
    "get what does not change": lambda d: d["fixed"],
    "set": lambda d: d.__setitem__("other", ["theirs"]),
    "set what does not change": lambda d: d.__setitem__("other", "theirs"),
    "setdefault": lambda d: d.setdefault("newer", ["theirs"]),
    "pop": lambda d: d.pop("other"),
    "items": lambda d: list(d.items()),
    "evict": lambda d: [d.move_to_disk(key) for key in d],
    "flush": lambda d: d.flush(),
}


@pytest.mark.parametrize("handed", HANDED_OUT)
@pytest.mark.parametrize("take", TAKES)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.many
def test_what_is_handed_out_is_in_hand_though_a_hook_took_something_else(path, hook, take, handed):
    for budget in (0, 250):
        take_in_hook(f"{path}-{budget}", Hook(hook), TAKES[take], HANDED_OUT[handed], budget)


def take_in_hook(path, hook, take, handed, budget):
    store(path, {"k": ["k"], "other": ["other"], "third": ["third"], "fixed": "fixed"})
    with Chest(path=path, available_memory=budget, **hook.options()) as c:
        run = parts(handed, c)
        if handed is get_again:
            assert go_on(run) is None
        hook.once(lambda: take(c))
        _, value = finish(run)
        hook.once(lambda: None)
        assert value in (["k"], [])
        value.append("mine")
        expected = list(value)
        del value, run
        c["third"]  # the next in hand
        c["fixed"]
        assert c["new" if "new" in c else "k"] == expected
        c._check()


@pytest.mark.parametrize("hook", ["on_miss", "load", "nbytes"])
@pytest.mark.parametrize("value", ["text", ["list"]], ids=["str", "list"])
def test_a_hook_may_set_the_key_each_time_that_it_is_read(path, hook, value):
    hooked = Hook(hook)
    calls = []

    def act():
        calls.append(hook)
        assert len(calls) < 50, "it goes on for ever"
        hooked.act = lambda: None
        c["k"] = value
        hooked.act = act

    store(path, {"k": "k"})
    with Chest(path=path, available_memory=0, **hooked.options()) as c:
        hooked.act = act
        assert c["k"] in ("k", value)
        hooked.act = lambda: None
        assert c["k"] == value
        c._check()


SHARED_USES = {
    "get": lambda d: d["k"],
    "get the other": lambda d: d["other"],
    "set": lambda d: d.__setitem__("k", ["set"]),
    "set a constant": lambda d: d.__setitem__("k", "set"),
    "delete": lambda d: d.__delitem__("k"),
    "pop": lambda d: d.pop("k", None),
    "setdefault": lambda d: d.setdefault("k", ["default"]),
    "flush": lambda d: d.flush(),
    "len": len,
    "keys": list,
    "items": lambda d: list(d.items()),
    "evict": lambda d: d.move_to_disk("k"),
    "prefetch": lambda d: d.prefetch(["k", "other"]),
}


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize("budget", [0, 450])
@pytest.mark.parametrize("use", SHARED_USES)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.many
def test_hooks_of_several_threads_may_use_the_chest(path, hook, use, budget):
    hooked = Hook(hook)
    inside = threading.local()
    used = []

    def act():
        if not getattr(inside, "hook", False) and len(used) < 1000:
            inside.hook = True
            used.append(finish(parts(SHARED_USES[use], c)))
            inside.hook = False

    def work(name):
        for n in range(4):
            c[name, n] = [n]
            c[name, n].append("mine")
            c["k"] = [name]
            c.move_to_disk((name, n))
            assert c[name, n] == [n, "mine"]
            assert c.pop((name, n)) == [n, "mine"]
            c[name, n] = [n]
            c.prefetch([(name, n)])
            c[name, n].append("again")
            assert c.get("k", [name])

    start = {"k": ["k"], "other": ["other"]}
    with Chest(start, path=path, available_memory=budget, **hooked.options()) as c:
        hooked.act = act
        run_together(*(lambda name=name: work(name) for name in "abc"))
        hooked.act = lambda: None
        assert used
        c._check()
        found = dict(c)
        assert found.pop("k", ["a"])
        expected = {(name, n): [n, "again"] for name in "abc" for n in range(4)}
        assert found == {"other": ["other"], **expected}
    with Chest(path=path) as c:
        c._check()
        assert {key: value for key, value in c.items() if key != "k"} == found


@pytest.mark.parametrize("hook", ["load", "on_miss"])
@pytest.mark.parametrize("ways", [("get", "get"), ("get", "prefetch"), ("prefetch", "pop")])
@pytest.mark.parametrize("count", [2, 3])
def test_loads_that_need_each_others_keys(path, hook, ways, count):
    """Each thread is in the midst of its load when it asks for the key that the next one loads."""
    keys = [f"k{n}" for n in range(count)]
    barrier = threading.Barrier(count)
    needed = []

    def need(key):
        if len(needed) < count:
            needed.append(key)
            barrier.wait(PATIENCE)
            following = keys[(keys.index(key) + 1) % count]
            assert c.get(following, [following]) == [following]

    def get(key):
        assert c[key] == [key]

    def prefetch(key):
        c.prefetch([key])
        assert c[key] == [key]

    def pop(key):
        assert c.pop(key, [key]) == [key]

    acts = {"get": get, "prefetch": prefetch, "pop": pop}
    by_load = {"dump": pickle.dump, "load": loader(need)}
    options = by_load if hook == "load" else {"on_miss": need}
    store(path, {key: [key] for key in keys})
    with Chest(path=path, **options) as c:
        doing = [acts[ways[n % 2]] for n in range(count)]
        run_together(*map(functools.partial, doing, keys))
        c._check()
        assert not c._memory._loads.threads


# -- everything at once ----------------------------------------------------------------------------


THREADS = 8
STEPS = 1000  # of each thread, where no time is given
SHARED = ["k1", "k2", 3, ("t", 4), Key(5), Colour.RED]
MISSING = "missing"
BEFORE = -1.0
NEVER = float("inf")


@dataclass
class Seen:
    """What was done with one value of one key, with the times at which that began and ended."""

    written: tuple[float, float] = (NEVER, NEVER)
    ends: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    removed: int = 0


class History:
    """What threads did with one key, each value of which is written once.

    An operation happens at one moment between its begin and its end. A value is there from its
    write to the last of its reads, so from the first end to the last begin of those it is *surely*
    there: at such a moment there can be no other value, and the key cannot be missing (Gibbons and
    Korach, Testing shared memories, 1997).
    """

    def __init__(self):
        self.values = defaultdict(Seen)
        self.missing = []  # when it was found missing, or removed
        self.removals = [(BEFORE, BEFORE)]

    def add(self, what, value, start, end):
        if what == "removed":
            self.removals.append((start, end))
        if value is MISSING:
            self.missing.append((start, end))
            return
        seen = self.values[value]
        seen.ends.append(end)
        seen.starts.append(start)
        if what == "written":
            seen.written = (start, end)
        elif what == "removed":
            seen.removed += 1
            self.missing.append((start, end))

    def check(self, key):
        sure, other = [], list(self.missing)
        for value, seen in self.values.items():
            assert seen.removed < 2, f"{value} of {key!r} was handed out twice by pop"
            assert min(seen.ends) > seen.written[0], f"{value} of {key!r} was not set when read"
            first, last = min(seen.ends), max(seen.starts)
            if first < last:
                sure.append((first, last, value))
            else:
                other.append((last, first))
        sure.sort()
        for (_, last, value), (first, _, following) in itertools.pairwise(sure):
            assert last < first, f"{value} of {key!r} was read although {following} was there"
        firsts = [first for first, _, _ in sure]
        for start, end in other:
            n = bisect.bisect_left(firsts, start) - 1
            if n >= 0:
                first, last, value = sure[n]
                assert not (first < start and end < last), f"{value} of {key!r} was there meanwhile"
        self.check_missing(key)

    def check_missing(self, key):
        """Check that each time that it was missing, something may have removed it before."""
        writes = sorted((seen.written[0], min(seen.ends)) for seen in self.values.values())
        starts = [start for start, _ in writes]
        first_end = [*itertools.accumulate((end for _, end in reversed(writes)), min)][::-1]
        first_end.append(NEVER)
        until = sorted(
            (start, first_end[bisect.bisect_right(starts, end)]) for start, end in self.removals
        )
        begins = [start for start, _ in until]
        latest = [*itertools.accumulate((end for _, end in until), max)]
        for start, end in self.missing:
            n = bisect.bisect_left(begins, end) - 1
            assert latest[n] > start, f"{key!r} was missing although nobody had removed it"


class Actor:
    """Does anything with the shared keys, and notes what it found."""

    def __init__(self, c, name, seed, clock):
        self.c = c
        self.name = name
        self.choice = random.Random(f"{seed} {name}")
        self.clock = clock
        self.numbers = itertools.count()
        self.notes = []

    def __call__(self):
        steps = range(STEPS) if not SOAK else itertools.count()
        until = time.monotonic() + SOAK
        for _ in steps:
            self.step()
            if SOAK and time.monotonic() > until:
                return

    def make(self):
        """Return a new value: a list, or something that cannot change, small or not so small."""
        number, choice = next(self.numbers), self.choice
        padding = "x" * choice.choice([0, 10, 100, 300])
        kind = choice.choice([tuple, list, frozenset, Padded])
        return kind([("id", self.name, number), padding])

    def note(self, what, key, value, start):
        self.notes.append((what, key, value, start, next(self.clock)))

    def step(self):
        c, choice = self.c, self.choice
        key = choice.choice(SHARED)
        start = next(self.clock)
        match choice.randrange(20):
            case 0 | 1 | 2 | 3:
                value = self.make()
                c[key] = value
                self.note("written", key, identity(value), start)
            case 4:
                pairs = {key: self.make() for key in choice.sample(SHARED, 2)}
                c.update(pairs)
                for key, value in pairs.items():
                    self.note("written", key, identity(value), start)
            case 5:
                value = self.make()
                found = c.setdefault(key, value)
                if found is value:
                    self.note("read", key, MISSING, start)
                    self.note("written", key, identity(value), start)
                else:
                    self.note("read", key, identity(found), start)
            case 6:
                found = c.pop(key, None)
                self.note("read" if found is None else "removed", key, identity(found), start)
            case 7:
                try:
                    key, found = c.popitem()
                except KeyError:
                    return
                if key == "constant":
                    assert found == "constant"
                else:
                    self.note("removed", key, identity(found), start)
            case 8:
                try:
                    del c[key]
                except KeyError:
                    self.note("read", key, MISSING, start)
                else:
                    self.note("removed", key, MISSING, start)
            case 9 if choice.random() < 0.2:
                c.clear()
                for key in SHARED:
                    self.note("removed", key, MISSING, start)
            case 10 if choice.random() < 0.3:
                c.flush()
            case 11:
                self.iterate(start)
            case 12:
                try:
                    c.prefetch(choice.sample(SHARED, 2))
                except KeyError as error:
                    self.note("read", error.args[0], MISSING, start)
            case 13 | 14:
                try:
                    c.move_to_disk(key)
                except KeyError:
                    self.note("read", key, MISSING, start)
            case 15:
                self.look_often(key)
            case 16:
                self.use_constant()
            case _:
                self.note("read", key, identity(c.get(key)), start)

    def look_often(self, key):
        for _ in range(4):
            start = next(self.clock)
            if key not in self.c:
                self.note("read", key, MISSING, start)
            start = next(self.clock)
            self.note("read", key, identity(self.c.get(key)), start)

    def use_constant(self):
        """Use a key that is missing or has one and the same value, also in the same file."""
        c = self.c
        for _ in range(3):
            match self.choice.randrange(3):
                case 0:
                    c["constant"] = "constant"
                case 1:
                    assert c.pop("constant", "constant") == "constant"
                case 2:
                    with suppress(KeyError):
                        c.move_to_disk("constant")
            assert c.get("constant", "constant") == "constant"

    def iterate(self, start):
        found = dict(self.c.items()) if self.choice.random() < 0.5 else dict.fromkeys(self.c)
        for key in SHARED:
            if key not in found:
                self.note("read", key, MISSING, start)
            elif found[key] is not None:
                self.note("read", key, identity(found[key]), start)


class Padded(list):
    """A list that weak references may lead to."""

    __slots__ = ("__weakref__",)


def identity(value):
    """Return who made a value, and as its how manieth."""
    if value is None:
        return MISSING
    ids = [part for part in value if isinstance(part, tuple)]
    assert len(value) == 2
    assert len(ids) == 1
    return ids[0][1:]


@pytest.fixture
def seed():
    seed = int(os.environ.get("CHEST_SEED") or (random.randrange(10**6) if SOAK else 1))
    print("CHEST_SEED =", seed)
    return seed


@pytest.mark.usefixtures("hostile")
@pytest.mark.timeout(300 + 3 * SOAK)
@pytest.mark.parametrize("budget", [0, 1000])
def test_what_eight_threads_find_can_have_been(path, seed, budget):
    clock = itertools.count()
    with Chest(path=path, available_memory=budget) as c:
        start = threading.Barrier(THREADS)
        actors = [Actor(c, f"t{n}", seed, clock) for n in range(THREADS)]
        run_together(*(lambda actor=actor: (start.wait(), actor()) for actor in actors))
        c._check()
        assert c.memory_usage <= budget
        histories = defaultdict(History)
        for actor in actors:
            for what, key, value, begun, ended in actor.notes:
                histories[key].add(what, value, begun, ended)
        assert c.pop("constant", "constant") == "constant"
        left = {key: identity(value) for key, value in c.items()}
        for key in SHARED:
            histories[key].add("read", left.get(key, MISSING), next(clock), next(clock))
            histories[key].check(key)
    with Chest(path=path) as c:
        c._check()
        assert {key: identity(value) for key, value in c.items()} == left


@pytest.mark.parametrize(
    ("operations", "sound"),
    [
        ([("written", 1, 0, 1), ("read", 1, 2, 3)], True),
        ([("written", 1, 2, 5), ("read", 1, 3, 4)], True),
        ([("written", 1, 2, 5), ("read", 1, 0, 1)], False),
        ([("read", 1, 0, 1)], False),
        ([("written", 1, 0, 1), ("written", 2, 2, 3), ("read", 1, 4, 5)], False),
        ([("written", 1, 0, 3), ("written", 2, 1, 2), ("read", 1, 4, 5)], True),
        ([("written", 1, 0, 9), ("written", 2, 1, 8), ("read", 2, 2, 3), ("read", 1, 4, 5)], True),
        (
            [
                ("written", 1, 0, 1),
                ("written", 2, 2, 9),
                ("read", 2, 3, 4),
                ("read", 1, 5, 6),
            ],
            False,
        ),
        ([("written", 1, 0, 1), ("read", MISSING, 2, 3)], False),
        ([("written", 1, 0, 5), ("read", MISSING, 2, 3)], True),
        ([("written", 1, 0, 5), ("read", 1, 1, 2), ("read", MISSING, 3, 4)], False),
        ([("written", 1, 0, 1), ("removed", MISSING, 2, 5), ("read", MISSING, 3, 4)], True),
        ([("written", 1, 0, 1), ("removed", MISSING, 2, 3), ("read", 1, 4, 5)], False),
        ([("written", 1, 0, 1), ("removed", MISSING, 2, 5), ("read", 1, 3, 4)], True),
        (
            [
                ("written", 1, 0, 1),
                ("removed", MISSING, 2, 7),
                ("read", MISSING, 3, 4),
                ("read", 1, 5, 6),
            ],
            False,
        ),
        (
            [
                ("written", 1, 0, 1),
                ("removed", MISSING, 2, 3),
                ("written", 2, 4, 5),
                ("read", MISSING, 6, 7),
            ],
            False,
        ),
        ([("written", 1, 0, 1), ("removed", 1, 2, 5), ("removed", 1, 3, 4)], False),
    ],
)
def test_the_judge_of_histories_tells_right_from_wrong(operations, sound):
    history = History()
    for what, value, start, end in operations:
        history.add(what, value, start, end)
    if sound:
        history.check("k")
    else:
        with pytest.raises(AssertionError):
            history.check("k")


# -- two handles, and threads, at moments of their own ---------------------------------------------


@pytest.mark.parametrize("then", ["", "b"])
def test_what_is_handed_out_and_changed_just_as_it_leaves(path, then):
    """It is taken, and changed, when it was compared and is still there."""
    with Chest({"a": [1], "b": [2]}, path) as c, ThreadPoolExecutor(1) as pool:
        c.flush()
        memory = c._memory
        memory._hands.empty()
        find_changed = memory._find_changed

        def change():
            c["a"].append("change")
            if then:
                c[then]

        def compare(keys):
            find_changed(keys)
            pool.submit(change).result(10)

        memory._find_changed = compare
        c.move_to_disk("a")
        del memory._find_changed
        assert "a" not in c.inmem
        assert c["a"] == [1, "change"]


def test_what_a_thread_had_before_it_left_and_lets_go_of_just_then(path):
    """It is changed when it was compared and is still there, and is in nobody's hand."""
    with Chest({"a": [1], "b": [2]}, path) as c, ThreadPoolExecutor(1) as pool:
        c.flush()
        has = []

        def take():
            has.append(c["a"])
            c["b"]

        pool.submit(take).result(10)
        memory = c._memory
        find_changed = memory._find_changed

        def compare(keys):
            find_changed(keys)
            has.pop().append("change")

        memory._find_changed = compare
        c.move_to_disk("a")
        del memory._find_changed
        assert c["a"] == [1, "change"]


def test_who_is_interrupted_while_it_waits_for_the_lock_disturbs_nobody(path):
    class Interrupted:
        """The lock of a chest that another thread has, where Ctrl-C is pressed."""

        def __init__(self, lock):
            self.lock = lock

        def acquire(self, *args, **kwargs):
            raise KeyboardInterrupt

        def __getattr__(self, name):
            return getattr(self.lock, name)

    with Chest({"n": 0}, path) as c:
        lock = c.lock
        held, leave = threading.Event(), threading.Event()

        def hold():
            with lock:
                held.set()
                assert leave.wait(10)

        with ThreadPoolExecutor(1) as pool:
            holding = pool.submit(hold)
            assert held.wait(10)
            c._memory.lock = Interrupted(lock)
            with pytest.raises(KeyboardInterrupt):
                c["small"] = 1
            c._memory.lock = lock
            assert not c._memory._torn
            leave.set()
            holding.result(10)
        assert dict(c) == {"n": 0}


class Slow:
    """Takes its time to be pickled once there is something to wait for."""

    waits: list[Any] = []

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        for pickling, go_on in self.waits:
            pickling.set()
            assert go_on.wait(10)
        return Slow, (self.number,)


def test_no_thread_gets_what_was_replaced_while_another_one_takes_in_the_news(path, monkeypatch):
    with Chest(path=path) as c, Chest(path=path) as other, ThreadPoolExecutor(2) as pool:
        c.update(slow=Slow(1), replaced="old", deleted="old", changed=["old"])
        c.flush()
        other.update(slow=Slow(2), replaced="new", changed=["new"])
        del other["deleted"]
        other.flush()
        pickling, go_on = threading.Event(), threading.Event()
        monkeypatch.setattr(Slow, "waits", [(pickling, go_on)])
        looking = pool.submit(len, c)
        assert pickling.wait(10)
        assert "deleted" not in c
        assert not c._memory.quick[2].keys() & {"replaced", "deleted"}, "hits find what was there"
        reading = pool.submit(c.__getitem__, "changed")
        wait([reading], 0.2)
        go_on.set()
        assert reading.result(10) == ["new"]
        assert looking.result(10) == 3
        assert c["slow"].number == 2
