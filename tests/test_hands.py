"""Tests of chest.hands: values that leave memory while somebody has them."""

from __future__ import annotations

import gc
import pickle
import random
import sys
import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Event, Thread

import numpy as np
import pytest

from chest import Chest
from chest.eviction import LARGE
from chest.hands import FEW, PARTS, Hands, contains_itself

BUDGETS = [0, 100, 700, 1000, 5000, 10**6]


class Node:
    """What refers to its children, which may refer back."""

    def __init__(self, *children):
        self.children = [*children]
        self.parent = None


class Knowing(Node):
    """Knows the chest that it is in, and does not take that along."""

    def __init__(self, chest):
        super().__init__()
        self.chest = chest

    def __getstate__(self):
        return {}


def tree():
    root = Node(Node(), Node())
    for child in root.children:
        child.parent = root
    return root


def broad_tree(n):
    root = Node(*(Node() for _ in range(n)))
    for child in root.children:
        child.parent = root
    return root


@pytest.fixture(params=BUDGETS)
def c(request, path):
    with Chest(path=path, available_memory=request.param) as chest:
        for key in "abcde":
            chest[key] = [ord(key)] * 30
        for n in range(100):
            chest[n] = -n
        yield chest
        if not chest.closed:
            chest._check()


def reopened(c):
    c.close()
    return Chest(path=c.path)


# -- what counts -----------------------------------------------------------------------------------


def test_an_expression_that_reads_another_value(c):
    c["a"].extend(c["b"])
    c["c"][3] += c["d"][3]
    c["e"][:2] = c["a"][:1], c["b"][:1]
    with reopened(c) as again:
        assert again["a"] == [97] * 30 + [98] * 30
        assert again["c"] == [99] * 3 + [199] + [99] * 26
        assert again["e"] == [[97], [98], *[101] * 28]


def test_a_sort_that_reads_the_chest(c):
    c["order"] = list(range(100))
    c["order"].sort(key=lambda key: c[key])
    with reopened(c) as again:
        assert again["order"] == list(range(99, -1, -1))


def test_a_sort_that_reads_lists_of_the_chest(c):
    c["order"] = list("edcba")
    c["order"].sort(key=lambda key: c[key])
    with reopened(c) as again:
        assert again["order"] == list("abcde")


def test_an_array_that_is_changed_by_others(c):
    c["x"], c["y"] = np.zeros(100), np.ones(100)
    c["x"][3] += c["y"][3]
    c["x"][10:] += c["y"][10:]
    with reopened(c) as again:
        assert list(again["x"][:12]) == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("kind", [list, dict, Node, np.array])
def test_a_variable_is_the_value_of_the_chest(c, kind):
    c["x"] = value = kind([]) if kind is not np.array else np.zeros(5)
    for _ in range(3):
        for key in "abcde":
            c[key].append(0)
    assert c["x"] is value
    for key in "abcde":
        c[key].append(0)
    if kind is list:
        value.append(1)
    elif kind is dict:
        value["k"] = 1
    elif kind is Node:
        value.parent = 1
    else:
        value[3] = 1
    del value
    for key in "abcde":
        c[key].append(0)
    with reopened(c) as again:
        found = again["x"]
        assert found == [1] if kind is list else True
        assert found == {"k": 1} if kind is dict else True
        assert found.parent == 1 if kind is Node else True
        assert found[3] == 1 if kind is np.array else True


def test_what_a_loop_holds_is_saved_by_a_flush(c):
    for before, after in pairwise("abcde"):
        value = c[before]
        value.append(c[after][0])
        c.flush()
        with Chest(path=c.path, readonly=True) as other:
            assert other[before] == value
    assert [c[key][30:] for key in "abcde"] == [[98], [99], [100], [101], []]


def test_what_is_moved_to_disk_is_written_though_it_left_before(c):
    value = c["a"]
    for key in "bcde":
        c[key].append(0)
    value.append("x")
    c.move_to_disk("a")
    with Chest(path=c.path, readonly=True) as other:
        assert other["a"] == [97] * 30 + ["x"]


def test_what_another_thread_has(c):
    has, go_on = threading.Event(), threading.Event()

    def change():
        value = c["a"]
        c["b"]
        has.set()
        assert go_on.wait(10)
        value.append("x")

    thread = threading.Thread(target=change)
    thread.start()
    assert has.wait(10)
    for key in "bcde" * 3:
        c[key].append(0)
    go_on.set()
    thread.join()
    for key in "bcde" * 3:
        c[key].append(0)
    assert c["a"] == [97] * 30 + ["x"]


def test_a_transaction_that_fails_takes_back_what_was_lent(c):
    value = c["a"]
    with pytest.raises(ZeroDivisionError), c.transaction():
        value = c["a"]
        for key in "bcde":
            c[key].append(0)
        value.append("x")
        del value
        for key in "bcde":
            c[key].append(0)
        raise ZeroDivisionError
    assert {key: len(c[key]) for key in "abcde"} == dict.fromkeys("abcde", 30)


def test_another_handle_that_replaces_what_is_lent(c):
    value = c["a"]
    c["b"], c["c"]
    c.flush()
    with Chest(path=c.path) as other:
        other["a"] = ["new"]
    assert c["a"] == ["new"]
    assert value == [97] * 30


def test_an_array_that_is_made_read_only_while_it_is_lent():
    with Chest(available_memory=0) as c:
        c["x"] = array = np.zeros(10)
        c["y"] = [1]
        array.flags.writeable = False
        assert c["x"] is array
        c._check()
        c["y"]
        array.flags.writeable = True
        array[3] = 1
        c.flush()
        c._check()
        del array
        c["y"]
        assert c["x"][3] == 1


@pytest.mark.parametrize("options", [{"writeback": False}, {"readonly": True}])
def test_what_may_not_change_is_not_compared(path, options):
    with Chest({"a": [1], "b": [2], "x": np.zeros(20_000)}, path):
        pass
    with Chest(path=path, available_memory=0, **options) as c:
        for key in "abx" * 3:
            value = c[key]
            value[0] = 7
        c["a"], c["b"]
        assert not c._memory.dirty
        del value
        c["b"], c["a"], c["b"]
        assert not c._memory.dirty
        assert c["a"] == [1]
        c._check()


# -- what does not stay in memory ------------------------------------------------------------------


@pytest.mark.parametrize("changes", [False, True])
def test_what_nobody_has_any_more_goes_with_the_next_operation(changes):
    with Chest(available_memory=0) as c:
        c["x"] = value = Node()
        reference = weakref.ref(value)
        c["y"] = []
        for _ in range(3):
            c.get("none")
        assert reference() is value
        if changes:
            value.parent = "changed"
        del value
        c.get("none")
        assert reference() is None
        assert c["x"].parent == ("changed" if changes else None)
        c._check()


def test_values_that_contain_themselves_are_not_kept():
    gc.disable()
    try:
        with Chest(available_memory=0, nbytes=lambda _: LARGE) as c:
            for n in range(100):
                c[n] = tree()
            assert len(c._memory._hands.kept) <= 2
            gc.collect()
            assert sum(isinstance(o, Node) for o in gc.get_objects()) <= 6
            assert c[5].children[1].parent.children[0].parent is c[5]
            c._check()
    finally:
        gc.enable()


def test_what_a_window_over_records_held_goes(path):
    with Chest({n: Node() for n in range(5000)}, path) as c:
        c.flush()
    with Chest(path=path, available_memory=200_000) as c:
        window = deque(maxlen=1000)
        values = weakref.WeakSet()
        for n in range(5000):
            window.append(c[n])
            values.add(window[-1])
            assert c._memory._hands.nbytes <= 40_000
        del window
        c.flush()
        assert len(values) <= len(c.inmem) + 1  # and what is in hand
        c._check()


def test_a_large_value_that_nobody_has_goes_though_only_hits_follow():
    with Chest(available_memory=10_000) as c:
        c["large"], c["small"] = Node(), [1]
        c["large"].children = [bytes(100_000)]
        c.move_to_disk("large")
        value = weakref.ref(c["large"])
        assert value() is not None
        for _ in range(20):
            c["small"]
        assert value() is None


def test_values_that_nobody_has_take_no_place_of_those_that_are_held():
    with Chest(available_memory=1e6, nbytes=lambda _: 1000) as c:
        for n in range(30):
            c[n] = [n]
        mine, others = c[0], [c[n] for n in range(1, 13)]
        c[29]
        c.available_memory = 0
        del others
        c["x"] = [1]
        mine.append("kept")
        c["y"] = [2]
        assert c[0] == [0, "kept"]


def test_what_leaves_with_a_value_that_cannot_be_pickled_is_not_lent_for_that():
    with Chest(available_memory=1e6, nbytes=lambda _: 1000) as c:
        c["mine"] = [0]
        for n in range(30):
            c[n] = [n]
        c["bad"] = [lambda: None]
        mine = c["mine"]
        c[0]
        c.available_memory = 0  # the error, with its traceback, is garbage that is not collected
        for n in range(3):
            c[n]
        mine.append("kept")
        for n in range(3):
            c[n]
        assert c["mine"] == [0, "kept"]
        del c["bad"]


@pytest.mark.parametrize("budget", [0, 250, 450, 950])
@pytest.mark.parametrize("get", [lambda c, n: c[n], lambda c, n: c.setdefault(n, None)])
def test_what_hooks_read_pushes_nothing_out_of_the_hand(budget, get):
    read, busy = [], [True]

    def read_all(_key):
        if not busy:
            busy.append(True)
            read.append([*c.items()])
            busy.clear()

    options = {"nbytes": lambda _: 100, "on_overflow": read_all}
    with Chest({n: [n] for n in range(20)}, available_memory=budget, **options) as c:
        c.flush()
        busy.clear()
        for turn in range(3):
            for n in range(20):
                get(c, n).append(turn)
        busy.append(True)
        assert read
        assert {n: c[n] for n in range(20)} == {n: [n, 0, 1, 2] for n in range(20)}


@pytest.mark.parametrize("seed", range(20))
def test_what_hooks_read_pushes_nothing_out_that_was_changed(seed):
    draw, read, busy = random.Random(seed), [], [True]

    def read_all(_key):
        if not busy:
            busy.append(True)
            read.append([*c.values()])
            busy.clear()

    options = {"nbytes": lambda _: 100, "on_overflow": read_all}
    budget = draw.choice([150, 450, 950])
    expected = {n: [n] for n in range(20)}
    with Chest({n: [n] for n in range(20)}, available_memory=budget, **options) as c:
        c.flush()
        busy.clear()
        for turn in range(60):
            n, act = draw.randrange(20), draw.randrange(8)
            if act < 6:
                c[n].append(turn)
                expected[n].append(turn)
            elif act == 6:
                c.flush()
            else:
                c.move_to_disk(n)
        busy.append(True)
        assert read
        assert dict(c) == expected


def test_the_room_for_what_is_lent_goes_with_the_budget():
    with Chest(available_memory=1e6, nbytes=lambda _: 1000) as c:
        for n in range(30):
            c[n] = [n]
        values = [c[n] for n in range(30)]
        c.available_memory = 0
        c.get("none")
        assert len(c._memory._hands.kept) <= FEW + 1
        assert len(values) == 30


def test_what_is_in_hand_is_not_let_go_of_however_much_is_lent():
    with Chest(available_memory=1e6, nbytes=lambda _: 1000) as c:
        for n in range(30):
            c[n] = [n]
        values = [c[n] for n in range(20)]
        mine = c[0]  # the oldest, and what this thread was handed last
        c.available_memory = 0
        c.get("none")
        mine.append("kept")
        c["x"] = [1]
        assert c[0] == [0, "kept"]
        assert len(values) == 20


def test_a_large_value_that_nobody_has_goes_as_small_ones_are_set():
    with Chest(available_memory=10_000) as c:
        c["large"] = large = Node(bytes(100_000))
        c["x"] = [1]
        c["x"] = "text"
        value = weakref.ref(large)
        del large
        for n in range(20):
            c[f"k{n}"] = "text"
        assert value() is None


def test_a_part_that_does_not_tell_its_class():
    class Unbound:
        @property
        def __class__(self):
            raise RuntimeError

    assert not contains_itself([Unbound(), [Unbound()]])


def test_a_value_that_knows_the_chest_is_none_that_contains_itself():
    with Chest(available_memory=0, nbytes=lambda _: LARGE) as c:
        c["x"] = mine = [Knowing(c)]
        for _ in range(5):
            c["y"] = [2]
        mine.append("kept")
        del mine
        c["y"] = [3]
        assert len(c["x"]) == 2


def test_one_object_under_many_keys_goes_where_all_of_them_left():
    value = Node()
    reference = weakref.ref(value)
    with Chest(available_memory=0) as c:
        for n in range(5):
            c[n] = value
        del value
        for _ in range(4):
            c.get("none")
        c[0] = []
        for _ in range(4):
            c.get("none")
        assert reference() is None
        c._check()


def test_no_more_is_kept_than_a_sixteenth_of_the_budget_and_a_few():
    with Chest(available_memory=64_000, nbytes=lambda _: 1000) as c:
        values = [[n] for n in range(500)]
        for n, value in enumerate(values):
            c[n] = value
            assert c._memory._hands.nbytes <= 16_000  # and what left last
        c._check()
        for value in values:
            value.append("x")
        c.flush()
        count = sum(len(c[n]) == 2 for n in range(500))
        assert count - len(c.inmem) >= FEW or count >= 64  # these, and what was resident


def test_the_oldest_is_compared_before_it_goes():
    with Chest(available_memory=0) as c:
        values = [[n] for n in range(3 * FEW)]
        for n, value in enumerate(values):
            c[n] = value
            value.append("x")
        assert all(c[n] == [n, "x"] for n in range(3 * FEW))
        c._check()


def test_what_is_kept_is_as_of_the_last_change(path):
    with Chest(path=path, available_memory=0) as c:
        c["x"] = value = [0]
        for n in range(50):
            c["y"] = [n]
            value.append(n)
        c.flush()
        with Chest(path=path) as other:
            assert other["x"] == [0, *range(50)]
        del value
        c._check()


def test_nothing_is_remembered_of_what_other_threads_are_handed_as_values_leave():
    hands = Hands()
    hands.swap("a", a := [1])
    with hands.watched(["a", "b"]):
        for n in range(100):
            hands.swap(n % 3 + 1, [n])
        assert sys.getrefcount(a) == 3  # the value that is watched, and no other
        assert len(hands._dropped) == 1
        with hands.watched([0]):
            hands.swap(0, [0])
            hands.empty()
        assert len(hands._dropped) == 2
    assert sys.getrefcount(a) == 2


def test_the_hand_of_a_thread_that_begins_as_ended_ones_are_looked_for(path, monkeypatch):
    def other():
        part = c["a"]["b"]
        got.set()
        go.wait()
        part.append(3)
        c.get("none")

    def frames():
        found = plain()
        thread.start()
        got.wait()
        return found

    got, go, thread, plain = Event(), Event(), Thread(target=other), sys._current_frames
    with Chest(path=path) as c:
        c.update(a={"b": []}, z=[0])
        ended = Thread(target=c.get, args=("a",))
        ended.start()
        ended.join()
        monkeypatch.setattr(sys, "_current_frames", frames)
        c.flush()
        monkeypatch.undo()
        c.move_to_disk("a")
        go.set()
        thread.join()
        assert c["a"] == {"b": [3]}


def test_nobody_asks_for_frames_where_all_threads_are_known(path, monkeypatch):
    """CPython 3.11 collects garbage as it holds a lock for that, which may ask for it, too."""
    with Chest(path=path) as c, ThreadPoolExecutor(2) as pool:
        c["x"] = [0]
        pool.submit(c.get, "x").result()
        monkeypatch.delattr(sys, "_current_frames")
        c["x"].append(1)
        c.flush()
        with pytest.raises(ZeroDivisionError), c.transaction():
            c["x"].append(1 / 0)
        assert c["x"] == [0, 1]
        monkeypatch.undo()


def test_a_value_that_dies_as_it_comes_back_may_use_the_chest():
    class Dying(list):
        def __del__(self):
            if sys is not None and not c.closed:
                c["last words"] = [len(self)]
                c["x"] = [1]

    globals()["Dying"], Dying.__qualname__ = Dying, "Dying"
    with Chest(available_memory=0) as c:
        c["x"] = value = Dying([1, 2])
        c["y"] = []
        c["z"] = []
        del value
        c.get("none")
        assert (c["x"], c["last words"]) == ([1], [2])
        c._check()


# -- what contains itself --------------------------------------------------------------------------


def looped(depth, breadth):
    inner = outer = []
    for _ in range(depth):
        inner.append([*range(breadth)])
        inner = inner[-1]
    inner.append(outer)
    return outer


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: [1, [2, {"k": (3, [])}]], False),
        (lambda: looped(0, 0), True),
        (lambda: looped(50, 3), True),
        (lambda: looped(5, 10 * PARTS), False),  # that far nobody looks
        (lambda: Node(*(tree() for _ in range(10 * PARTS))), False),
        (lambda: broad_tree(10 * PARTS), True),
        (tree, True),
        (Node, False),
        (lambda: np.zeros(5), False),
        (lambda: [*range(10 * PARTS)], False),
        (lambda: {"type": Node, "module": sys, "function": looped}, False),
        (lambda: [pickle.Pickler, len, "text"], False),
    ],
)
def test_what_contains_itself(make, expected):
    value = make()
    assert contains_itself(value) is expected
