"""Who leaves first: the large before the small, the cold before the hot; hits cost nothing."""

import pickle
import random

import numpy as np
import pytest

import chest
from chest import Chest, eviction
from chest.eviction import COHORT_BYTES, COHORT_MEMBERS, LARGE, MARKS_SLACK, READ_ONCE, Eviction

MB = 1_000_000


def order(e, *, mark=()):
    """Let everything leave, cohort by cohort; return the keys in the order in which they left."""
    e.marks.update(mark)
    left = []
    while keys := [*e.cheapest()]:
        left.append(keys)
        for key in keys:
            e.discard(key)
        check(e)
    return [key for keys in left for key in sorted(keys)]


def check(e):
    e.check([key for key in KEYS if key in e])


KEYS = [f"{name}{n}" for name in ("small", "large", "k") for n in range(50)]
KEYS += ["small", "large", "huge", "cold", "warm", "hot", "tiny"]


# -- Eviction: the order ---------------------------------------------------------------------------


def test_of_a_cohort_only_those_go_that_are_named():
    e = Eviction(1e9)
    first, *others = KEYS[:3]
    for key in KEYS[:3]:
        e.enroll(key, 100)
    e.discard_all([first])
    check(e)
    assert (e.total, first in e, *map(e.__contains__, others)) == (200, False, True, True)
    e.discard_all(others)
    check(e)
    assert e.total == 0


@pytest.mark.parametrize("first", ["small", "large"])
@pytest.mark.parametrize("uses", [1, 2, 5])
def test_of_the_same_use_the_large_leaves_first(first, uses):
    e = Eviction(1e9)
    sizes = {"small": 1000, "large": 10 * MB}
    for key in sorted(sizes, reverse=first == "small"):
        e.enroll(key, sizes[key], uses)
    assert order(e) == ["large", "small"]


def test_sizes_count_from_tiny_to_huge():
    e = Eviction(1e9)
    for key, size in {"tiny": 100, "huge": 100 * MB, "small": LARGE, "large": MB}.items():
        e.enroll(key, size)
    assert order(e) == ["huge", "large", "small", "tiny"]


@pytest.mark.parametrize("size", [100, LARGE, 10 * MB])
@pytest.mark.parametrize("hot", ["k0", "k1", "k2"])
def test_of_the_same_size_the_used_leaves_last(size, hot):
    e = Eviction(1e9)
    for n in range(3):
        e.enroll(f"k{n}", size)
    assert order(e, mark=[hot])[-1] == hot


def test_the_more_often_used_leaves_later():
    e = Eviction(1e9)
    for uses, key in enumerate(["hot", "warm", "cold"]):
        e.enroll(key, MB, 3 - uses)
    assert order(e) == ["cold", "warm", "hot"]


@pytest.mark.parametrize("size", [LARGE, 10 * MB])
def test_of_the_same_size_and_use_the_oldest_leaves_first(size):
    e = Eviction(1e9)
    keys = random.Random(0).sample([f"k{n}" for n in range(50)], 50)
    for key in keys:
        e.enroll(key, size)
    assert order(e) == keys


def test_sizes_that_hardly_differ_rank_by_age():
    e = Eviction(1e9)
    e.enroll("k0", 1_100_000)
    e.enroll("k1", 1_200_000)
    e.enroll("k2", 1_150_000)
    assert order(e) == ["k0", "k1", "k2"]


@pytest.mark.parametrize("size", [1, 1000, LARGE, MB])
def test_what_was_read_once_leaves_before_what_was_set(size):
    e = Eviction(1e9)
    e.enroll("warm", size)
    e.enroll("cold", size, uses=READ_ONCE)
    assert order(e) == ["cold", "warm"]


def test_what_was_read_once_is_like_others_after_one_more_use():
    e = Eviction(1e9)
    e.enroll("cold", LARGE, uses=READ_ONCE)
    e.enroll("warm", LARGE, uses=READ_ONCE)
    e.enroll("huge", 100 * MB)
    assert order(e, mark=["warm"]) == ["cold", "huge", "warm"]


def test_a_value_of_the_same_size_in_its_place_counts_as_a_use():
    e = Eviction(1e9)
    e.enroll("warm", 100)
    e.enroll("large", LARGE)
    e.set_aside("huge", 100)
    assert e.reuse("warm", 100)
    assert e.reuse("large", LARGE)
    assert not e.reuse("warm", 101)
    assert not e.reuse("cold", 100)
    assert not e.reuse("huge", 100)
    assert e.marks == {"warm", "large"}
    check(e)


def test_the_used_gets_a_second_chance_and_not_a_third():
    e = Eviction(1e9)
    e.enroll("hot", LARGE)
    e.enroll("cold", LARGE)
    e.marks.add("hot")
    assert [*e.cheapest()] == ["cold"]
    e.discard("cold")
    assert "hot" not in e.marks
    assert [*e.cheapest()] == ["hot"]


def test_each_use_found_counts():
    e = Eviction(1e9)
    e.enroll("hot", LARGE)
    e.marks.add("hot")
    assert e.uses("hot") == 2
    assert [*e.cheapest()] == ["hot"]  # nothing else is there: it is enrolled anew, then leaves
    assert e.uses("hot") == 2
    e.stay(["hot"])
    assert e.uses("hot") == 2
    e.marks.add("hot")
    assert e.uses("hot") == 3


def test_only_the_used_of_a_cohort_stay():
    e = Eviction(1e9)
    for n in range(10):
        e.enroll(f"k{n}", 100)
    e.marks.update(["k2", "k5"])
    assert sorted(e.cheapest()) == [f"k{n}" for n in range(10) if n not in (2, 5)]
    for n in range(10):
        if n not in (2, 5):
            e.discard(f"k{n}")
    assert sorted(e.cheapest()) == ["k2", "k5"]


def test_what_was_hot_once_leaves_in_the_end():
    e = Eviction(1e9)
    e.enroll("hot", LARGE, uses=5)
    for n in range(1000):
        e.enroll(n, LARGE)
        keys = [*e.cheapest()]
        for key in keys:
            e.discard(key)
        if keys == ["hot"]:
            break
    assert "hot" not in e
    assert n > 3  # though not at once


def test_what_is_used_all_the_time_never_leaves():
    e = Eviction(1e9)
    e.enroll("hot", LARGE)
    for n in range(500):
        e.enroll(n, LARGE)
        e.marks.add("hot")
        for key in e.cheapest():
            e.discard(key)
    assert "hot" in e


# -- Eviction: the sums ----------------------------------------------------------------------------


def test_the_total_is_the_sum_of_the_sizes():
    e = Eviction(1e9)
    for n, size in enumerate([0, 1, 1000, LARGE - 1, LARGE, 10 * MB]):
        e.enroll(f"k{n}", size)
        assert e.size(f"k{n}") == size
    assert e.total == 1001 + 2 * LARGE - 1 + 10 * MB
    assert len(e) == 6
    assert e.discard("k5") == 10 * MB
    assert e.total == 1001 + 2 * LARGE - 1
    check(e)


def test_to_discard_what_is_not_there_changes_nothing():
    e = Eviction(1e9)
    e.enroll("k0", 100)
    assert e.discard("k1") == 0
    assert e.uses("k1") == 0
    assert e.total == 100
    check(e)


def test_an_empty_one_has_nothing_to_give():
    e = Eviction(1e9)
    assert [*e.cheapest()] == []
    assert e.total == 0
    e.enroll("k0", 100)
    e.discard("k0")
    assert [*e.cheapest()] == []
    check(e)


@pytest.mark.parametrize("size", [100, LARGE])
def test_what_was_set_aside_is_counted_and_never_leaves(size):
    e = Eviction(1e9)
    e.set_aside("k0", size)
    e.enroll("k1", size)
    assert e.total == 2 * size
    assert [*e.cheapest()] == ["k1"]
    e.discard("k1")
    assert [*e.cheapest()] == []
    assert e.aside() == ["k0"]
    check(e)
    e.stay(["k0"])
    assert e.aside() == []
    check(e)
    assert [*e.cheapest()] == ["k0"]
    assert e.discard("k0") == size
    assert e.total == 0
    check(e)


@pytest.mark.parametrize("size", [100, LARGE])
def test_what_was_to_leave_and_could_not_is_there_still(size):
    e = Eviction(1e9)
    for n in range(5):
        e.enroll(f"k{n}", size, uses=3)
    keys = [*e.cheapest()]
    assert e.total == 5 * size
    e.stay(keys)
    check(e)
    assert e.total == 5 * size
    assert {e.uses(f"k{n}") for n in range(5)} == {3}
    assert sorted(order(e)) == [f"k{n}" for n in range(5)]


BREAKS = {
    "the total": lambda e: setattr(e, "total", e.total + 1),
    "a size": lambda e: e._homes["small0"].sizes.__setitem__("small0", 0),
    "a home": lambda e: e._homes.pop("large0"),
    "a member": lambda e: e._homes["large0"].sizes.pop("large0"),
    "the heap": lambda e: e._heap.pop(e._homes["large0"]),
    "an empty cohort": lambda e: e._heap.__setitem__(eviction.Cohort(1), (0.0, 0)),
    "an open cohort": lambda e: e._open.__setitem__(7, eviction.Cohort(7)),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_check_finds_what_is_wrong(broken):
    e = Eviction(1e9)
    for n in range(3):
        e.enroll(f"small{n}", 100)
        e.enroll(f"large{n}", MB)
    check(e)
    keys = [f"{name}{n}" for name in ("small", "large") for n in range(3)]
    BREAKS[broken](e)
    with pytest.raises((AssertionError, KeyError)):
        e.check(keys)


@pytest.mark.parametrize("change", [lambda keys: keys[1:], lambda keys: [*keys, "more"]])
def test_check_finds_keys_that_are_missing_or_too_many(change):
    e = Eviction(1e9)
    keys = ["small", "large"]
    for key in keys:
        e.enroll(key, 100)
    e.check(keys)
    with pytest.raises(AssertionError):
        e.check(change(keys))


@pytest.mark.parametrize("seed", range(3))
def test_the_invariants_hold_whatever_is_done(seed):
    rng = random.Random(seed)
    e = Eviction(1e9)
    sizes = {}
    for _ in range(1500):
        key = rng.choice(KEYS)
        action = rng.choice(["enroll"] * 4 + ["discard", "mark", "leave", "stay", "aside"])
        if action == "mark":
            e.marks.add(key)
        elif action == "discard":
            assert e.discard(key) == sizes.pop(key, 0)
        elif action in ("enroll", "aside"):
            sizes.pop(key, None)
            e.discard(key)
            sizes[key] = rng.choice([0, 10, 5000, LARGE - 1, LARGE, MB])
            if action == "aside":
                e.set_aside(key, sizes[key])
            else:
                e.enroll(key, sizes[key], rng.randrange(4))
        else:
            keys = [*e.cheapest()]
            assert {*keys} <= sizes.keys()
            if action == "stay":
                e.stay(keys)
            for key in keys if action == "leave" else ():
                assert e.discard(key) == sizes.pop(key)
        e.check(sizes)
        assert e.total == sum(sizes.values())
    assert {*order(e)} | {*e.aside()} == {*sizes}


# -- Eviction: its price ---------------------------------------------------------------------------


class CountingHeap(eviction.heapdict):
    """A heapdict that counts what is done to it."""

    operations = 0

    def __setitem__(self, key, value):
        CountingHeap.operations += 1
        super().__setitem__(key, value)

    def __delitem__(self, key):
        CountingHeap.operations += 1
        super().__delitem__(key)

    def popitem(self):
        CountingHeap.operations += 1
        return super().popitem()

    def peekitem(self):
        CountingHeap.operations += 1
        return super().peekitem()


@pytest.fixture
def heap(monkeypatch):
    """Count from now on; the number is in ``heap.operations``."""
    monkeypatch.setattr(eviction, "heapdict", CountingHeap)
    monkeypatch.setattr(CountingHeap, "operations", 0)
    return CountingHeap


def test_small_values_share_the_price_of_the_heap(heap):
    e = Eviction(1e9)
    for n in range(10_000):
        e.enroll(n, 50)
    assert 0 < heap.operations < 30
    while keys := [*e.cheapest()]:
        for key in keys:
            e.discard(key)
    assert heap.operations < 60


@pytest.mark.parametrize("size", [0, 10, 1000, 10_000, LARGE - 1])
def test_what_leaves_together_is_neither_many_nor_much(size):
    e = Eviction(1e9)
    number = min(10_000, 20 * COHORT_BYTES // max(size, 1))
    for n in range(number):
        e.enroll(n, size)
    left = 0
    while keys := [*e.cheapest()]:
        assert len(keys) <= COHORT_MEMBERS
        assert sum(map(e.size, keys)) < COHORT_BYTES + LARGE
        left += len(keys)
        for key in keys:
            e.discard(key)
    assert left == number


def test_a_large_value_leaves_alone():
    e = Eviction(1e9)
    for n in range(5):
        e.enroll(n, LARGE)
        e.enroll(f"small{n}", 10)
    sizes = []
    while keys := [*e.cheapest()]:
        sizes.append(len(keys))
        for key in keys:
            e.discard(key)
    assert sizes == [1, 1, 1, 1, 1, 5]


def test_deleting_small_values_does_not_touch_the_heap_but_for_the_last(heap):
    e = Eviction(1e9)
    for n in range(1000):
        e.enroll(n, 50)
    before = heap.operations
    for n in range(999):
        e.discard(n)
    assert heap.operations == before
    e.discard(999)
    assert len(e._heap) == 0


def test_nothing_stays_of_what_was_deleted():
    e = Eviction(1e9)
    for n in range(3000):
        e.enroll(n, 50 if n % 2 else LARGE)
        e.marks.add(n)
        e.discard(n)
    assert not e._homes
    assert not e._heap
    assert not e._open
    assert not e.marks


def test_marks_of_keys_that_have_gone_are_purged():
    e = Eviction(1e9)
    e.enroll("k0", 100)
    e.enroll("k1", 100)
    e.marks.update(range(5 * MARKS_SLACK))  # as hits do that race with a deletion
    e.marks.add("k1")
    e.cheapest()
    assert len(e.marks) <= len(e) + MARKS_SLACK


# -- Chest -----------------------------------------------------------------------------------------


VALUES = {
    "str": "x" * 100,
    "large bytes": bytes(100_000),
    "numpy array": np.zeros(100),
    "list": [1, 2, 3],
    "dict": {"a": [1]},
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_hit_never_touches_the_heap(heap, kind):
    with Chest() as c:
        for n in range(10):
            c[n] = VALUES[kind]
        before = heap.operations
        for _ in range(100):
            for n in range(10):
                c[n]
                c.get(n)
        assert heap.operations == before


def test_what_is_hit_stays_while_others_come_and_go():
    with Chest(available_memory=1_000_000) as c:
        c["hot"] = "h" * 90_000
        for n in range(200):
            c[n] = "x" * 90_000
            assert c["hot"][0] == "h"
            assert "hot" in c.inmem


def test_the_largest_leaves_first():
    with Chest(available_memory=10 * MB) as c:
        c["huge"] = bytes(8 * MB)
        for n in range(50):
            c[n] = bytes(10_000)
        c["large"] = bytes(2 * MB)
        assert "huge" not in c.inmem
        assert {*range(50), "large"} <= c.inmem.keys()


def test_a_pass_over_thousands_of_packed_values_leaves_those_in_use_resident(path):
    values = {n: ("value", n) for n in range(5050)}
    with Chest(values, path):
        pass
    with Chest(path=path, available_memory=100 * chest.nbytes(values[0])) as c:
        for n in range(50, 5050):
            c[n]
            c[n % 50]
        assert sum(n in c.inmem for n in range(50)) > 40


def test_what_is_read_twice_in_a_row_stays_longer_than_what_is_read_once():
    with Chest(available_memory=1_000_000) as c:
        for n in range(50):
            c[n] = "x" * 90_000
            c.move_to_disk(n)
        c[0]
        c[0]
        for n in range(1, 25):
            c[n]
        assert 0 in c.inmem
        assert 1 not in c.inmem


def test_a_value_that_is_set_anew_keeps_its_uses():
    with Chest(available_memory=1_000_000) as c:
        c["hot"] = "h" * 90_000
        for n in range(100):
            c["hot"]
            c[n] = "x" * 90_000
        assert c._memory.eviction.uses("hot") > 1
        before = c._memory.eviction.uses("hot")
        c["hot"] = "H" * 90_000
        assert c._memory.eviction.uses("hot") >= before


def test_room_is_made_for_more_than_one_value():
    spilled = []
    with Chest(available_memory=10 * MB, on_overflow=spilled.append) as c:
        for n in range(100):
            c[n] = "x" * 99_000
        assert not spilled
        c[100] = "x" * 200_000
        room = c.available_memory - c.memory_usage
        assert room >= 10 * MB / 16 - 200_000
        before = len(spilled)
        c[101] = "x" * 99_000
        assert len(spilled) == before


def test_a_value_in_place_of_one_that_cannot_be_written_leaves(path):
    def dump(value, file):
        if value == "bad!":
            raise ValueError
        pickle.dump(value, file)

    with Chest(path=path, dump=dump, available_memory=1e6) as c:
        c["x"] = "bad!"
        c.available_memory = 0
        assert c.inmem == {"x": "bad!"}
        c.available_memory = 1e6
        c["x"] = "good"
        c.available_memory = 0
        assert c.inmem == {}
        assert c["x"] == "good"


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_value_of_the_same_size_in_place_of_a_saved_one_is_saved(path, elsewhere):
    with Chest({"x": "old", "y": "old"}, path) as c, Chest(path=path) as other:
        c.flush()
        if elsewhere:
            del other["x"]
            other.flush()
        c["x"] = "new"
        assert c["x"] == "new"
        c._check()
        c.flush()
        assert other["x"] == "new"
        del c["y"]
        c["y"] = "new"
        c.flush()
        assert dict(other) == {"x": "new", "y": "new"}


def test_text_in_place_of_a_list_of_its_size_is_kept_as_what_cannot_change(path):
    with Chest(path=path, nbytes=lambda _: 1) as c:
        c["x"] = [1]
        c["y"] = "in the hand now, instead of the list"
        c["x"] = "text"
        c._check()
        c.flush()
        c._check()
