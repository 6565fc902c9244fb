"""What was replaced or deleted leaves the disk without a spill, a flush or a close, too."""

import gc
import json
import logging
import math
import os
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
from test_memory import Stubborn, refusing

import chest.ledger
import chest.spilling
import chest.upkeep
from chest import Chest, UnsavedError
from chest.directory import Directory
from chest.hands import Hands
from chest.ledger import Ledger
from chest.memory import Memory
from chest.store import Store

N, SIZE, LIMIT = 100, 1000, 10_000


@pytest.fixture(autouse=True)
def scarce(monkeypatch):
    """A disk of which little may be taken by what is out of date."""
    monkeypatch.setattr(chest.spilling, "OUTDATED", LIMIT)
    monkeypatch.setattr(chest.ledger, "BLOCK", 0)


@pytest.fixture(params=[0, 5000, 1e9])
def filled(path, request):
    """A chest whose values are on disk, half of them in packs."""
    with Chest(path=path, available_memory=request.param) as c:
        for n in range(0, N, 2):
            c[n] = bytes([n]) * SIZE
            c.flush()
        c.update({n: bytes([n]) * SIZE for n in range(1, N, 2)})
        c.flush()
        yield c
        c._check()


in_memory = pytest.mark.parametrize("filled", [1e9], indirect=True)  # where nothing else commits


def on_disk(c):
    names = [name for name in os.listdir(c.path) if name != ".keys"]
    return sum(os.path.getsize(os.path.join(c.path, name)) for name in names)


def alive(c):
    return sum(map(len, map(bytes, c.values())))


def committed(c):
    with Chest(path=c.path, readonly=True) as other:
        return dict(other)


def test_deleting_alone_frees_the_disk(filled):
    c, packed = filled, N // 2 * SIZE
    for n in range(N):
        before = c.memory_usage
        del c[n]
        assert on_disk(c) < alive(c) + before + LIMIT + 3 * SIZE + packed
    assert on_disk(c) < LIMIT + 2 * SIZE


@pytest.mark.parametrize("take", [Chest.pop, Chest.popitem])
def test_so_does_taking_values_out(filled, take):
    c = filled
    for n in range(N):
        take(c, *([n] if take is Chest.pop else []))
    assert on_disk(c) < LIMIT + 2 * SIZE


def test_deleting_one_large_value_frees_the_disk_at_once(path, monkeypatch):
    monkeypatch.setattr(chest.spilling, "MUCH", 2 * LIMIT)
    with Chest({"a": bytes(3 * LIMIT), "b": bytes(3 * LIMIT), "c": b""}, path) as c:
        c.move_to_disk("a")
        c.move_to_disk("b")
        value = c.pop("a")  # in nobody's hands but the user's
        assert on_disk(c) >= 6 * LIMIT
        c["x"] = value
        c.flush()
        c.move_to_disk("x")
        del c["b"]
        assert on_disk(c) < 4 * LIMIT
        with c.transaction():
            del c["x"]
            assert on_disk(c) >= 3 * LIMIT
        assert on_disk(c) < LIMIT


def test_what_memory_has_and_the_disk_as_well_lets_nothing_wait(path):
    others = [*range(N, N + 12)]
    with Chest(path=path) as c:
        for n in [*range(N), *others]:  # a file for each
            c[n] = bytes(SIZE)
            c.flush()
        assert c.memory_usage > (N + 12) * SIZE
        for n in others:
            del c[n]
        assert on_disk(c) <= N * SIZE + LIMIT + 2 * SIZE
        c["new"] = bytes(5 * SIZE)  # which has to be written then
        for n in range(12):
            del c[n]
        assert on_disk(c) > N * SIZE
        for n in range(12, 18):
            del c[n]
        assert on_disk(c) < N * SIZE


class Owner:
    """Deletes another key as it goes."""

    chest = None

    def __init__(self, nbytes):
        self.data = bytes(nbytes)

    def __del__(self):
        if self.chest is not None:
            del self.chest["its index"]


def test_a_value_may_use_the_chest_as_another_takes_its_place(path):
    with Chest(path=path) as c:
        value = Owner(5 * LIMIT)
        c["owner"], c["its index"] = value, [1]
        c.flush()
        value.chest = c
        del value
        c["owner"] = 1
        assert dict(c) == {"owner": 1}


class Circle:
    """Sets a key when it is collected as garbage."""

    def __init__(self, chest, key):
        self.me, self.chest, self.key = self, chest, key

    def __del__(self):
        self.chest[self.key] = 1


def test_what_is_collected_may_set_keys_while_it_is_counted_what_to_write(path):
    before = gc.get_threshold()
    try:
        for n in range(2, 60):
            with Chest({"old": bytes(2 * LIMIT)}, path=f"{path}{n}") as c:
                c.flush()
                c.update((i, i) for i in range(20))
                gc.collect()
                Circle(c, "late")
                gc.set_threshold(n)
                c["old"] = b"small"
                gc.set_threshold(*before)
                gc.collect()
                assert dict(c) == {"old": b"small", **{i: i for i in range(20)}, "late": 1}
    finally:
        gc.set_threshold(*before)


def test_clearing_alone_frees_the_disk(filled):
    filled.clear()
    assert on_disk(filled) == 0
    assert committed(filled) == {}


def test_replacing_by_what_takes_less_frees_the_disk(path):
    with Chest({n: bytes([n]) * SIZE for n in range(N)}, path, open=open_like_builtin) as c:
        c.flush()
        for n in range(N):
            c[n] = [n]
        assert on_disk(c) < LIMIT + c.memory_usage + 2 * SIZE
        c._check()
        assert dict(c) == {n: [n] for n in range(N)}


def open_like_builtin(path, mode):
    """Open a file, and keep the chest from packs, which would keep what is dead for a while."""
    return open(path, mode)


def test_a_commit_waits_until_more_is_out_of_date_than_is_in_memory(path):
    with Chest({n: bytes([n]) * SIZE for n in range(N)}, path) as c:
        c.flush()
        length = os.path.getsize(c.path + "/.keys")
        for turn in range(3):
            for n in range(N):
                c[n] = [turn] * SIZE
        assert os.path.getsize(c.path + "/.keys") == length


@in_memory
def test_a_value_that_is_renamed_is_on_disk_at_every_moment(filled):
    c = filled
    values = sorted(c.values())
    for n in range(N):
        c[f"new {n}"] = bytearray(c.pop(n))
        assert sorted(map(bytes, committed(c).values())) == values
    assert on_disk(c) < 2 * N * SIZE
    c.flush()
    assert committed(c) == {f"new {n}": bytearray([n]) * SIZE for n in range(N)}


@pytest.mark.parametrize("fails", [True, False])
def test_a_transaction_keeps_what_it_may_have_to_give_back(filled, fails):
    c, before = filled, dict(filled)

    class Fails(Exception):
        pass

    with pytest.raises(Fails):
        with c.transaction():
            for n in range(N):
                del c[n]
            c.clear()
            c["x"] = []
            assert committed(c) == before
            if fails:
                raise Fails
        assert committed(c) == {"x": []}
        assert on_disk(c) < SIZE
        raise Fails
    assert dict(c) == (before if fails else {"x": []})


def test_nothing_is_dumped_for_it_in_a_transaction(path):
    dumped = []

    with Chest({n: bytes(SIZE) for n in range(N)}, path, available_memory=0) as c:
        c.available_memory = 1e9
        with c.transaction():
            c["acts"] = Acts(lambda: dumped.append(1))
            for n in range(N):
                del c[n]
            assert not dumped
        assert dumped


@in_memory
@pytest.mark.parametrize("how", ["open", "write"])
def test_a_disk_that_refuses_is_told_of_once_and_nothing_is_lost(filled, how, caplog):
    c = filled
    with refusing(how):
        for n in range(N - 1):
            if n % 3:
                del c[n]
            else:
                c[n] = [n]
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 1
    assert "still takes room on disk" in told[0]
    assert c.path in told[0]
    c._check()
    expected = {n: [n] for n in range(0, N - 1, 3)} | {N - 1: bytes([N - 1]) * SIZE}
    assert dict(c) == expected
    c.flush()
    assert committed(c) == expected
    assert on_disk(c) < 10_000


def test_what_cannot_be_written_keeps_nothing_else_from_the_disk(filled, caplog):
    c = filled
    value = Stubborn(ValueError("no"))
    c["bad"] = value
    for n in range(N):
        c[n] = [n]
    for n in range(0, N, 2):
        del c[n]
    assert on_disk(c) < LIMIT + 3 * SIZE + 50 * N
    assert c["bad"] is value
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 1
    assert "'bad' stays in memory" in told[0]
    c._check()
    del c["bad"]


def unsavable(c):
    for n in range(N):
        c[f"k{n}"] = lambda: 0


def of_the_same_size(c):
    for n in range(N):
        c[f"k{n}"] = b"\7" * SIZE


def changed_in_place(c):
    for n in range(N):
        c[f"k{n}"] = [b"\7" * SIZE]
    c.flush()
    for n in range(N):
        c[f"k{n}"].append(lambda: 0)
    with pytest.raises(UnsavedError):
        c.flush()


def set_elsewhere_meanwhile(c):
    for n in range(N):
        c[f"k{n}"] = [n]
    values = {f"k{n}": b"\7" * SIZE for n in range(N)}
    with Chest(values, c.path, open=open_like_builtin):
        pass
    assert len(c) == N


def reverted(c):
    with pytest.raises(LookupError), c.transaction():
        of_the_same_size(c)
        raise LookupError


states = pytest.mark.parametrize(
    "change",
    [unsavable, of_the_same_size, changed_in_place, set_elsewhere_meanwhile, reverted],
)


@pytest.fixture
def named(path):
    """A chest with files for its values, all of which are in memory, too."""
    c = Chest({f"k{n}": bytes([n]) * SIZE for n in range(N)}, path, open=open_like_builtin)
    c.flush()
    yield c
    c._check()
    c.drop()


@states
def test_what_is_deleted_frees_the_disk_whatever_had_become_of_it(named, change):
    c = named
    change(c)
    for n in range(N):
        del c[f"k{n}"]
    assert on_disk(c) < LIMIT + 2 * SIZE


@states
def test_what_is_replaced_frees_the_disk_whatever_had_become_of_it(named, change):
    c = named
    change(c)
    for n in range(N):
        c[f"k{n}"] = b""
    assert on_disk(c) < LIMIT + c.memory_usage + 2 * SIZE


def test_what_leaves_in_the_meantime_hides_nothing_that_stays(path):
    with Chest(path=path, available_memory=60_000) as c:
        for n in range(2 * N):
            c[n] = bytes(SIZE)
        for n in range(40):
            c[f"m{n}"] = bytearray(SIZE)
        c.flush()
        for n in range(2 * N):
            c[n] = [n]
            c[f"m{n % 40}"][0] = n
        assert on_disk(c) < 40 * SIZE + LIMIT + c.memory_usage + 2 * N * SIZE // 4
        c._check()


def test_the_last_large_value_frees_the_disk_with_the_next_set(path):
    with Chest({"big": bytes(N * SIZE)}, path) as c:
        c.flush()
        del c["big"]
        c["x"] = b"1"
        assert on_disk(c) < SIZE


@pytest.mark.parametrize(
    "error", [ValueError, RuntimeError, EOFError, OSError, MemoryError, RecursionError]
)
def test_deleting_raises_nothing_that_opens_a_file_raises(path, error, caplog):
    fails = False

    def open_file(path, mode):
        if fails and "r" not in mode:
            raise error("no")
        return open(path, mode)

    with Chest({"big": bytes(N * SIZE), "k": ["old"]}, path, open=open_file) as c:
        c.flush()
        del c["big"]
        fails = True
        c["new"] = [1]
        del c["k"]
        c["new"] = [1]
        assert c.pop("k", None) is None
        assert dict(c) == {"new": [1]}
        c._check()
        fails = False
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 1
    assert f"{error.__name__}: " in told[0]


class Acts:
    """Does something the first time that it is pickled."""

    def __init__(self, act):
        self.act = act

    def __reduce__(self):
        act, self.act = self.act, None
        if act:
            act()
        return Acts, (None,)


@pytest.mark.parametrize("take", [Chest.pop, Chest.__delitem__])
@pytest.mark.parametrize("change", ["set", "delete", "clear"])
def test_what_is_pickled_for_it_may_change_what_is_taken_out(path, take, change):
    acts = {
        "set": lambda: c.update(k=["new"]),
        "delete": lambda: c.pop("k"),
        "clear": lambda: c.clear(),
    }
    with Chest({"big": bytes(N * SIZE), "k": ["old"]}, path) as c:
        c.flush()
        c["acts"] = Acts(acts[change])
        del c["big"]
        if change == "set":
            assert take(c, "k") in (["new"], None)
        else:
            with pytest.raises(KeyError):
                take(c, "k")
        assert "k" not in c
        c._check()


def test_a_name_may_be_given_by_what_sets_a_value(path, caplog):
    def name(key):
        if key == 900:
            c["count"] = [1]
        return f"k{key}"

    with Chest({1: bytes(N * SIZE)}, path, key_to_filename=name) as c:
        c.flush()
        c[900] = bytes(5000)
        del c[1]
        c.flush()
        assert dict(c) == {900: bytes(5000), "count": [1]}
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


class Interrupt(BaseException):
    """What a KeyboardInterrupt is to the code; one that gets out does not end the whole run."""


@contextmanager
def interrupted(inside):
    """Have what is done here interrupted as a function begins."""

    def interrupt(frame, event, arg):
        if event == "call" and frame.f_code.co_name == inside:
            sys.setprofile(None)
            raise Interrupt

    sys.setprofile(interrupt)
    try:
        with pytest.raises(Interrupt):
            yield
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize(
    ("change", "inside"),
    [
        (Chest.clear, "_empty"),
        (lambda c: c.pop("big"), "room"),
        (lambda c: c.__delitem__("big"), "room"),
    ],
    ids=["clear", "pop", "delete"],
)
def test_what_is_interrupted_is_counted_by_the_next_operation(path, change, inside):
    with Chest({"big": bytes(N * SIZE)}, path) as c:
        c.move_to_disk("big")
        with interrupted(inside):
            change(c)
        c["x"] = [1]
        c["x"] = [2]
        c._check()
        assert on_disk(c) < 1000


def test_what_an_interrupted_set_did_not_replace_is_counted_as_it_is(path):
    with Chest({"big": bytes(N * SIZE), "small": bytes(5 * LIMIT)}, path) as c:
        c.flush()
        c["small"] = [1]
        with interrupted("_enter"):
            c["small"] = [2] * 5600  # of nearly the size that it has on disk
        assert c["small"] == [1]
        c._check()
        c.move_to_disk("big")  # from here on little is in memory
        c["x"] = [1]
        assert on_disk(c) < N * SIZE + 1000


def test_what_was_refused_is_tried_again_once_some_time_has_gone(path, monkeypatch):
    monkeypatch.setattr(chest.spilling, "RETRY", 3600)
    with Chest({"big": bytes(N * SIZE)}, path) as c:
        c.flush()
        del c["big"]
        with refusing("open") as tried:
            for n in range(10):
                c["x"] = [n]
            assert len(tried) == 1
        c["x"] = [1]
        assert on_disk(c) > N * SIZE
        now = time.monotonic()
        monkeypatch.setattr(chest.spilling.time, "monotonic", lambda: now + 3601)
        c["x"] = [2]
        assert on_disk(c) < 1000
        c._check()


def test_a_hook_that_sets_something_is_not_asked_again_and_again(path, caplog):
    depth, most = 0, 0

    class Sets:
        def __reduce__(self):
            nonlocal depth, most
            depth += 1
            most = max(most, depth)
            c["n"] = [most]
            del c["n"]
            depth -= 1
            return list, ()

    with Chest({n: bytes(SIZE) for n in range(N)}, path, open=open_like_builtin) as c:
        c.flush()
        c["sets"] = Sets()
        for n in range(N):
            del c[n]
        assert 0 < most < 3
        assert on_disk(c) < 2 * LIMIT
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
        c._check()
        del c["sets"]


def test_what_another_handle_set_meanwhile_counts_by_its_own_size(path):
    with Chest({"a": b"old"}, path) as c, Chest(path=path) as other:
        c.flush()
        c["a"] = b"new"
        other["a"] = bytes(10 * LIMIT)
        other.flush()
        assert c["a"] == b"new"
        c["x"] = [1]
        assert on_disk(c) < 1000
        c._check()


class SetsItself:
    """Is set anew in a chest as it is pickled."""

    def __init__(self, text, chest=None):
        self.text, self.chest = text, chest

    def __reduce__(self):
        chest, self.chest = self.chest, None
        if chest is not None:
            chest["k"] = self
        return SetsItself, (self.text,)


def test_what_is_set_again_as_it_is_looked_at_stays_counted(path):
    with Chest(path=path, nbytes=lambda value: 100) as c:
        c["k"] = value = SetsItself("x" * 1000)
        c.flush()
        value.text, value.chest = "y", c
        c["bad"] = lambda: 0
        c.move_to_disk("k")
        c._check()
        del c["bad"]


def test_what_is_replaced_again_by_the_same_size_stays_counted(path):
    with Chest({"k": bytes(LIMIT), "more": bytes(LIMIT)}, path) as c:
        c.flush()
        c["k"] = b"1"
        c["k"] = b"2"
        c._check()
        c["more"] = b"1"
        assert on_disk(c) < 1000


@contextmanager
def interrupt_in(owner, name):
    """Have a call of a method end in an interrupt, instead of doing anything."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with mock.patch.object(owner, name, interrupt), pytest.raises(KeyboardInterrupt):
        yield


def free_by_sets(c):
    c._memory._free_after = 0  # for it failed just now
    for n in range(10):
        c["x"] = [n]


@pytest.mark.parametrize("step", [(Directory, "remove"), (Ledger, "_retire"), (Store, "tidy")])
@pytest.mark.parametrize("free", [Chest.flush, Chest.write_keys, Chest.close, free_by_sets])
def test_what_an_interrupt_left_of_it_is_removed_all_the_same(path, step, free):
    with Chest({n: bytes(LIMIT) for n in range(10)}, path) as c:
        c.flush()
        with interrupt_in(*step):
            c.clear()
        free(c)
        found = [name for name in os.listdir(path) if name not in (".keys", "x")]
        assert not found


def test_it_is_tried_again_wherever_an_interrupt_came(path):
    with Chest({"big": bytes(N * SIZE)}, path) as c:
        c.move_to_disk("big")
        del c["big"]
        c._memory._free_after = math.inf  # as it is while something is freed
        c._memory._tear()
        c["x"] = [1]
        c["x"] = [2]
        assert on_disk(c) < 1000


def test_what_fails_as_that_is_removed_fails_once(path):
    with Chest({"x": bytes(LIMIT)}, path) as c:
        c.flush()
        with interrupt_in(Store, "tidy"):
            c.clear()
        with mock.patch.object(Store, "_sweep", side_effect=OSError):
            with pytest.raises(OSError):
                c.flush()
            c.flush()


def test_nothing_is_swept_where_all_was_tidy(path, monkeypatch):
    with Chest({"a": [1]}, path) as c:
        c["a"] = [2]
        c.flush()
        monkeypatch.setattr(Store, "sweep", None)
        c.flush()
        c.write_keys()


@pytest.mark.parametrize(
    ("options", "old", "new"),
    [
        ({"dump": json.dump, "load": json.load}, "\x01" * 1000, "a" * 1000),
        ({"nbytes": lambda value: 100}, "x" * 6000, "y"),
    ],
)
def test_the_streams_count_where_sizes_in_memory_are_the_same(path, options, old, new):
    with Chest({f"k{n}": old for n in range(N)}, path, open=open_like_builtin, **options) as c:
        c.flush()
        before = on_disk(c)
        for n in range(N):
            c[f"k{n}"] = new
        assert on_disk(c) < before / 2
        c._check()


def test_keys_count_too(path):
    with Chest({"k" * SIZE + str(n): None for n in range(10 * N)}, path) as c:
        c.flush()
        before = os.path.getsize(os.path.join(path, ".keys"))
        for n in range(10 * N - 1):
            del c["k" * SIZE + str(n)]
        after = os.path.getsize(os.path.join(path, ".keys"))
        assert after < chest.upkeep.COMPACT_BYTES + 3 * LIMIT < before / 9
        c.update({"k" * SIZE + str(n): None for n in range(10 * N)})
        c.flush()
        c.clear()
        assert os.path.getsize(os.path.join(path, ".keys")) < 1000


@pytest.mark.parametrize("act", [lambda c: [*map(c.pop, range(N))], Chest.clear])
def test_files_of_few_bytes_count_as_blocks(path, act, monkeypatch):
    monkeypatch.setattr(chest.ledger, "BLOCK", 4096)
    with Chest({n: n for n in range(N)}, path, open=open_like_builtin) as c:
        c.flush()
        act(c)
        assert len(os.listdir(path)) < 5


def test_so_they_do_beside_a_pack(path, monkeypatch):
    monkeypatch.setattr(chest.ledger, "BLOCK", 4096)
    with Chest({n: n for n in range(N)}, path) as c:
        c.flush()
        for n in range(N):
            c["of its own", n] = n
            c.flush()
        assert len(os.listdir(path)) == 3
        c.clear()
        assert len(os.listdir(path)) < 3


def test_what_is_deleted_as_the_log_tells_of_something_stays_counted(path):
    class Deletes(logging.Handler):
        def emit(self, record):
            c.pop("big", None)

    handler = Deletes(logging.WARNING)
    with Chest({"first": bytes(2 * LIMIT), "big": bytes(N * SIZE)}, path) as c:
        c.flush()
        c.move_to_disk("first")
        c.move_to_disk("big")
        c["bad"] = Stubborn(ValueError("no"))
        logging.getLogger("chest").addHandler(handler)
        try:
            del c["first"]
            c["x"] = [1]
        finally:
            logging.getLogger("chest").removeHandler(handler)
        c["x"] = [2]
        assert on_disk(c) < 1000
        del c["bad"]


# -- and nothing is written for nothing -----------------------------------------------------------


def commits(c):
    """What changes with every commit."""
    return os.path.getsize(os.path.join(c.path, ".keys"))


def test_what_was_out_of_date_long_ago_counts_no_more(path):
    with Chest(path=path) as c:
        for _ in range(10):
            c["a"] = [bytes(10 * LIMIT)]
            c.flush()
        c.clear()
        c.flush()
        before = commits(c)
        for _ in range(100):
            c["a"] = [1]
            c.clear()
        assert commits(c) == before


def test_what_was_set_aside_is_not_dumped_again(named):
    c, value = named, Stubborn(ValueError("no"))
    c["bad"] = value
    for n in range(N):
        del c[f"k{n}"]
    assert value.tries == 1
    del c["bad"]


def test_what_nobody_can_free_counts_no_more(named):
    named._memory._outdated = 10 * N * SIZE  # as where another handle has freed it
    with pytest.raises(KeyError):
        del named["nothing"]
    named._check()
    assert named._memory._outdated == 0


def test_what_a_failure_left_half_done_is_mended_before_anything_goes(path):
    def open_file(path, mode):
        if fails and "r" not in mode:
            raise MemoryError
        return open(path, mode)

    fails = False
    with Chest({"big": bytes(N * SIZE)}, path, open=open_file) as c:
        c.flush()
        del c["big"]
        fails = True
        c["x"] = [1]
        c._memory._free_after = 0
        c._memory.begin_to_delete("delete a key")
        assert not c._memory._torn
        fails = False


def test_what_cannot_be_written_is_not_tried_again_and_again(named, monkeypatch):
    c, tried = named, []
    unsavable(c)
    save = Memory._save

    def counted(self, *args, **options):
        tried.append(args)
        return save(self, *args, **options)

    monkeypatch.setattr(Memory, "_save", counted)
    for n in range(100):
        c["x"] = [n]
    assert len(tried) < 3
    for n in range(N):
        c[f"k{n}"] = n


def test_what_was_taken_back_counts_no_more(named):
    c = named
    with pytest.raises(LookupError), c.transaction():
        for n in range(N):
            del c[f"k{n}"]
        raise LookupError
    before = commits(c)
    for n in range(100):
        c["x"] = [n]
    assert commits(c) == before


@pytest.mark.parametrize("how", ["update", "unpack"])
def test_what_any_commit_freed_counts_no_more(path, how):
    large = bytes(LIMIT - 1000)
    values = dict.fromkeys(range(100)) | {"big": large, "more": large}
    with Chest(values, path) as c, Chest({"y": [1]}) as other:
        c.flush()
        assert c.memory_usage < 3 * LIMIT
        c.move_to_disk("big")
        c.move_to_disk("more")
        assert c.memory_usage < LIMIT // 2
        del c["big"]
        if how == "update":
            c.update(other)
        else:
            c.key_to_filename(1)
        before = commits(c)
        del c["more"]
        c["x"] = [1]
        assert commits(c) == before


def test_what_a_flush_freed_counts_no_more(path):
    with Chest({"big": bytes(10 * LIMIT)}, path) as c:
        c.flush()
        del c["big"]
        c.flush()
        before = commits(c)
        c["x"] = [1]
        assert commits(c) == before


def test_text_that_is_longer_on_disk_is_not_written_again_and_again(path):
    with Chest(dict.fromkeys(range(N), "\u4e2d" * 1000), path) as c:
        c.flush()
        before = commits(c)
        for turn in "\u4e2e\u4e2f\u4e30":
            for n in range(N):
                c[n] = turn * 1000
        assert commits(c) == before


class Appending:
    """Appends to another value when it is pickled, and goes on to the next."""

    c, times = None, 1

    def __reduce__(self):
        if Appending.c is not None and Appending.times:
            Appending.times -= 1
            Appending.c["list"].append("late")
            Appending.c["other"]
        return str, ()


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("by", ["pickling", "naming"])
def test_what_a_hook_changes_of_what_is_leaving_is_kept(path, stored, by):
    def name(key):
        if by == "naming" and key == "hook":
            appending.__reduce__()
        return key

    appending = Appending()
    with Chest({"other": [0]}, path, key_to_filename=name) as c:
        c.flush()
        c["list"] = [1]
        if stored:
            c.flush()
            c["list"].append(2)
        c["hook"] = appending if by == "pickling" else [9]
        c["last"] = [1]
        Appending.c, Appending.times = c, 1
        c.available_memory = 0
        Appending.c = None
        expected = [1, 2, "late"] if stored else [1, "late"]
        assert c["list"] == expected
        c._check()
    with Chest(path=path, key_to_filename=name) as c:
        assert c["list"] == expected


def test_a_value_that_dies_as_the_next_is_looked_at_may_use_the_chest(path):
    acts = []

    class Dying(list):
        def __reduce__(self):
            return list, ([*self],)

        def __del__(self):
            while acts:
                acts.pop()()

    with Chest({k: [k] for k in "abcwx"}, path, available_memory=0) as c:
        for key, value in (("a", Dying([1])), ("b", ["B"])):
            thread = threading.Thread(target=c.__setitem__, args=(key, value))
            thread.start()
            thread.join()
            del value
        acts.append(lambda: [c[key] for key in "wx"])
        c.flush()
        assert (c["a"], c["b"]) == ([1], ["B"])
        c._check()


class Ambiguous:
    """A key whose comparisons have no truth, as pandas.NA's."""

    def __eq__(self, other):
        raise TypeError("boolean value is ambiguous")

    def __hash__(self):
        return 5

    def __reduce__(self):
        return "AMBIGUOUS"


AMBIGUOUS = Ambiguous()


@pytest.mark.parametrize("key", [math.nan, AMBIGUOUS, ("t", math.nan)], ids=["nan", "NA", "tuple"])
def test_a_key_that_equals_itself_by_identity_alone_is_one_like_others(path, key):
    with Chest({"important": [1]}, path, available_memory=0) as c:
        c.setdefault(key, []).append(3)
        c["other"] = [1]
        c[key].append(4)
        c["other"], c["another"] = [2], [2]
        assert (c[key], c["important"]) == ([3, 4], [1])
        c.flush()
        c._check()
    with Chest(path=path) as c:
        assert c["important"] == [1]
        assert (c[key], len(c)) == ([3, 4], 4)


class Acting:
    """A value that does something when it dies, or is pickled, once it is told to."""

    def __init__(self, n=0, dies=None, dumps=None, loads=None):
        self.n, self.dies, self.dumps, self.loads = n, dies, dumps, loads

    def __getstate__(self):
        if self.dumps:
            act, self.dumps = self.dumps, None
            act()
        return {"n": self.n, "dies": None, "dumps": None, "loads": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if Acting.loading:
            Acting.loading.pop()()

    def __del__(self):
        if self.dies:
            self.dies()

    loading = []


@pytest.mark.parametrize("how", ["set", "delete and set", "delete"])
@pytest.mark.parametrize("at", [0, 5, 19])
def test_what_a_value_sets_as_it_leaves_does_not_leave_unwritten(path, at, how):
    def act():
        for n in range(20):
            if n != at:
                if how != "set":
                    del c[n]
                if how != "delete":
                    c[n] = Acting(n + 100)

    values = {n: Acting(n) for n in range(20)}
    with Chest(values, path, nbytes=lambda _: 300, available_memory=10_000) as c:
        c["last"] = 0
        c.flush()
        values = {at: values[at]}
        values[at].dies = act
        dying = [values.pop(at)]
        values[at] = SimpleNamespace()
        dying.clear()
        while c.evict() != -1:
            pass
        assert {n: c[n].n for n in c if n not in (at, "last")} == (
            {} if how == "delete" else {n: n + 100 for n in range(20) if n != at}
        )
        c._check()
    with Chest(path=path) as c:
        assert len(c) == (2 if how == "delete" else 21)


def test_what_is_read_is_in_hand_though_what_was_there_dies(path):
    def act():
        for n in range(300):
            c[f"more {n}"] = ["y"]

    with Chest(path=path, nbytes=lambda _: 1000, available_memory=10_000) as c:
        c["k"] = [1]
        c.move_to_disk("k")
        c["d"] = Acting(dies=act)
        del c["d"]
        c["k"].append(3)
        c["z"] = [0]
        assert "more 299" in c
        assert c["k"] == [1, 3]
        c._check()


def test_what_its_own_pickling_gets_leaves_all_the_same(path):
    class Getting:
        def __reduce__(self):
            c["k"], c["z"]
            return list, ([1],)

    sizes = {Getting: 2000}
    with Chest(path=path, available_memory=3000, nbytes=lambda v: sizes.get(type(v), 10)) as c:
        c["z"] = [1]
        c["k"] = Getting()
        c["other"] = [2]
        c.available_memory = 1000
        assert c.memory_usage <= 1000
        c._check()
    with Chest(path=path) as c:
        assert c["k"] == [1]


def test_a_key_that_is_set_as_its_deletion_is_taken_in_counts_once(path):
    with Chest(path=path, nbytes=lambda _: 300) as c, Chest(path=path) as other:
        hook = c["a"] = Acting()
        c["k"] = [1]
        c.flush()
        hook.dumps = lambda: c.__setitem__("k", [2])
        c["z"] = [0]
        other["a"] = 5
        other.flush()
        del other["k"]
        other.flush()
        len(c)
        assert c["k"] == [2]
        c._check()
        c.clear()
        assert c.memory_usage == 0


@pytest.mark.parametrize("options", [{"readonly": True}, {"writeback": False}])
def test_values_are_read_ahead_while_another_handle_compacts(path, options):
    def act():
        for n in range(5, 200):
            del c[n]
        c.flush()
        c.compact()
        len(d)

    with Chest(path=path) as c:
        for turn in range(5):
            c.update((n, Acting(turn)) for n in range(300))
            c.flush()
        with Chest(path=path, **options) as d:
            Acting.loading.append(act)
            found = {key: value.n for key, value in d.items()}
            Acting.loading.clear()
            assert {n for n in range(300) if n < 5 or n >= 200} <= found.keys()
            assert {*found.values()} == {4}


@pytest.mark.parametrize("how", ["evict", "flush"])
def test_a_value_that_is_set_anew_while_many_are_compared_is_saved(path, how):
    def act():
        del c[500]
        c[500] = [-1]

    with Chest(path=path, nbytes=lambda _: 100, available_memory=1e6) as c:
        hook = c["hook"] = Acting()
        c.update((n, [n]) for n in range(600))
        c["last"] = 0
        c.flush()
        hook.dumps = act
        if how == "flush":
            c.flush()
        else:
            c.available_memory = 0
        assert hook.dumps is None
        assert c[500] == [-1]
        c._check()
    with Chest(path=path) as c:
        assert (c[500], len(c)) == ([-1], 602)


def test_an_interrupt_keeps_nothing_in_memory_that_left(path):
    with Chest({n: [n] for n in range(20)}, path) as c:
        c["last"] = 0
        c.flush()
        with interrupt_in(Hands, "keep_some"):
            c.available_memory = 0
        assert len(c) == 21
        assert not c._memory._hands.kept
        assert c[5] == [5]
        c._check()
