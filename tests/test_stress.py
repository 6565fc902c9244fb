"""Threads that do everything at once to one chest, each knowing what it has to find.

The seed is printed: ``CHEST_SEED=1234`` does the same again, as far as the threads' turns allow.
``CHEST_STRESS=60`` goes on for that many seconds in each test, with another seed each time.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time

import numpy as np
import pytest

import chest.upkeep
from chest import Chest

SECONDS = float(os.environ.get("CHEST_STRESS", "0"))
THREADS = 4
STEPS = 400  # of each thread, where no time is given
OWN_KEYS = 12
SHARED = ["n0", "n1", "n2"]
COUNTS = 60  # of each thread


@pytest.fixture(autouse=True)
def _hostile(monkeypatch):
    """Let threads take turns as often as they can, and the index be compacted all the time."""
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 3000)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    logging.getLogger("chest").setLevel(logging.ERROR)
    yield
    logging.getLogger("chest").setLevel(logging.NOTSET)
    sys.setswitchinterval(interval)


@pytest.fixture
def seed():
    seed = int(os.environ.get("CHEST_SEED") or (random.randrange(10**6) if SECONDS else 1))
    print("CHEST_SEED =", seed)
    return seed


def together(*actors):
    """Run actors side by side; raise what the first to fail raised, and tell the others."""
    errors = []

    def run(actor):
        try:
            actor()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[actor], daemon=True) for actor in actors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120 + 2 * SECONDS)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other for ever"


def turns(steps):
    """Yield so many times, or for as long as the environment asks."""
    until = time.monotonic() + SECONDS
    while steps > 0 or time.monotonic() < until:
        steps -= 1
        yield


def make(choice):
    match choice.randrange(5):
        case 0:
            return choice.randrange(1000)
        case 1:
            return "text" * choice.randrange(100)
        case 2:
            return np.full(choice.randrange(1, 200), choice.randrange(100))
        case 3:
            return {"a": [choice.randrange(100)]}
    return [choice.randrange(100)] * choice.randrange(1, 50)


def change(value):
    match value:
        case list():
            value.append(len(value))
        case dict():
            value["a"].append(len(value["a"]))
        case np.ndarray():
            value += 1


def twin(value):
    match value:
        case np.ndarray() | list():
            return value.copy()
        case dict():
            return {"a": value["a"].copy()}
    return value


def same(mine, theirs):
    if isinstance(mine, np.ndarray) and isinstance(theirs, np.ndarray):
        return np.array_equal(mine, theirs)
    return type(mine) is type(theirs) and mine == theirs


class Owner:
    """Sets, changes, deletes and reads keys that only it changes, and knows what each must be."""

    def __init__(self, c, name, seed):
        self.c = c
        self.name = name
        self.choice = random.Random(f"{seed} {name}")
        self.model = {}

    def __call__(self):
        for _ in turns(STEPS):
            self.step((self.name, self.choice.randrange(OWN_KEYS)))
        for number in range(OWN_KEYS):
            self.look((self.name, number))

    def look(self, key):
        got, expected = self.c.get(key), self.model.get(key)
        assert same(got, expected), f"{key}: {got!r} instead of {expected!r}"

    def step(self, key):
        c, model, choice = self.c, self.model, self.choice
        match choice.randrange(16):
            case 0 | 1 | 2:
                value = make(choice)
                model[key] = twin(value)
                c[key] = value
            case 3 | 4 | 5:
                if key in model:
                    change(c[key])
                    change(model[key])
            case 6:
                value = make(choice)
                change(c.setdefault(key, twin(value)))
                change(model.setdefault(key, value))
            case 7:
                assert same(c.pop(key, None), model.pop(key, None))
            case 8:
                if key in model:
                    del c[key], model[key]
            case 9:
                assert (key in c) == (key in model)
                if key in model:
                    c.move_to_disk(key)
            case 10:
                value = make(choice)
                c.update({key: twin(value)}, **{self.name: 1})
                model[key] = value
            case 11:
                self.prefetch()
            case 12:
                self.walk()
            case 13 if choice.random() < 0.2:
                c.flush()
            case _:
                self.look(key)

    def prefetch(self):
        mine = list(self.model)
        self.c.prefetch(mine[:3])

    def walk(self):
        """Read everything; others change theirs meanwhile, so only what is one's own is sure."""
        seen = {}
        for key, value in self.c.items():
            if isinstance(key, tuple) and key[0] == self.name:
                assert key not in seen, f"{key} twice"
                seen[key] = value
                assert same(value, self.model[key]), key
                change(value)
                change(self.model[key])
        assert seen.keys() == self.model.keys()


class Counter:
    """Counts up shared numbers under the lock, so that none may get lost."""

    def __init__(self, c, seed):
        self.c = c
        self.choice = random.Random(seed)
        self.counted = dict.fromkeys(SHARED, 0)

    def __call__(self):
        last = dict(self.counted)
        for _ in turns(COUNTS):
            for name in self.choice.sample(SHARED, 2):
                with self.c.lock:
                    number = self.c[name][0]
                    others = [self.c[other][0] for other in SHARED]
                    self.c[name] = [number + 1] * self.choice.randrange(1, 50)
                    assert [self.c[other][0] for other in SHARED if other != name] == [
                        n for other, n in zip(SHARED, others, strict=True) if other != name
                    ]
                self.counted[name] += 1
            for name in SHARED:
                number = self.c[name][0]
                assert number >= last[name], f"{name} went back from {last[name]} to {number}"
                last[name] = number


@pytest.mark.parametrize("budget", [0, 3000, 20_000])
def test_threads_find_what_each_of_them_left(path, seed, budget):
    with Chest(path=path, available_memory=budget) as c:
        owners = [Owner(c, f"t{n}", seed) for n in range(THREADS)]
        together(*owners)
        c._check()
        assert c.memory_usage <= budget
    expected = {key: value for owner in owners for key, value in owner.model.items()}
    with Chest(path=path) as c:
        c._check()
        assert {key for key in c if isinstance(key, tuple)} == expected.keys()
        for key, value in expected.items():
            assert same(c[key], value), key


@pytest.mark.parametrize("budget", [0, 300, 1e9])
def test_numbers_that_threads_count_up_under_the_lock_are_exact(path, seed, budget):
    with Chest(path=path, available_memory=budget) as c:
        c.update((name, [0]) for name in SHARED)
        counters = [Counter(c, f"{seed} {n}") for n in range(THREADS)]
        together(*counters)
        c._check()
        for name in SHARED:
            assert c[name][0] == sum(counter.counted[name] for counter in counters)


def test_threads_that_own_keys_and_threads_that_count_do_not_disturb_each_other(path, seed):
    with Chest(path=path, available_memory=2000) as c:
        c.update((name, [0]) for name in SHARED)
        counters = [Counter(c, seed), Counter(c, seed + 1)]
        together(Owner(c, "t0", seed), Owner(c, "t1", seed), *counters)
        c._check()
        assert c["n0"][0] == counters[0].counted["n0"] + counters[1].counted["n0"]


def test_each_of_two_handles_finds_what_its_threads_left(path, seed):
    with Chest(path=path, available_memory=3000) as c, Chest(path=path, available_memory=0) as d:
        together(*[Owner(handle, f"t{n}", seed) for n, handle in enumerate([c, c, d, d])])
        c.flush()
        d.flush()
        len(c)
        c._check()
        d._check()
        assert {*c} == {*d}
        for key in c:
            assert same(c[key], d[key]), key


def test_setdefault_gives_all_threads_one_value(path):
    got = []
    start = threading.Barrier(THREADS)

    def slow(value):
        return len([n + 1 for n in range(1000)])

    with Chest(path=path, available_memory=0, nbytes=slow) as c:

        def ask(n):
            for key in range(50):
                start.wait()
                got.append((key, c.setdefault(key, n)))

        together(*[lambda n=n: ask(n) for n in range(THREADS)])
        for key in range(50):
            assert {value for asked, value in got if asked == key} == {c[key]}


def test_nothing_is_lost_that_is_appended_while_others_fill_the_chest(path):
    with Chest(path=path, available_memory=2000) as c:
        c["mine"] = []
        done = threading.Event()

        def append():
            try:
                for n in range(300):
                    c["mine"].append(n)
            finally:
                done.set()

        def fill(key):
            while not done.is_set():
                c[key] = [key] * 200

        together(append, lambda: fill("a"), lambda: fill("b"))
        assert c["mine"] == list(range(300))


def test_pop_gives_a_value_to_one_thread(path):
    got = []
    with Chest(path=path, available_memory=500) as c:
        c.update((key, [key]) for key in range(200))

        def take():
            for key in range(200):
                value = c.pop(key, None)
                if value is not None:
                    got.append(value[0])

        together(*[take] * THREADS)
        assert not c
        c._check()
    assert sorted(got) == list(range(200))


def test_popitem_empties_a_chest_between_threads(path):
    got = []
    with Chest(path=path, available_memory=500) as c:
        c.update((key, [key]) for key in range(200))

        def take():
            while True:
                try:
                    got.append(c.popitem())
                except KeyError:
                    return

        together(*[take] * THREADS)
        c._check()
    assert sorted(got) == [(key, [key]) for key in range(200)]
