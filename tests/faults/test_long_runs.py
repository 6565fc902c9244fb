"""Many operations over a fixed amount of data: nothing that a chest takes grows with their number.

Proved, by looking at it again and again on the way: the descriptors and threads are those of the
beginning; the memory is what it was in the first half; value files take the bytes of the values;
packs take at most twice the bytes of what lies in them plus twice `chest.upkeep.WASTE`, and
``.keys`` at most twice what its keys need, or `chest.upkeep.COMPACT_BYTES`, and one commit.
And the values are right.

The figures are printed. ``CHEST_FAULTS=all`` takes a million operations in all.
"""

import datetime as dt
import gc
import json
import os
import random
import threading
import time
import tracemalloc
from contextlib import suppress
from statistics import median

import pytest
from damage import FULL, SEED

import chest.upkeep
from chest import Chest

FACTOR = 50 if FULL else 0.25
LOOKS = 16
WASTE = 5_000  # bytes
COMPACT_BYTES = 20_000
COMMIT = 10_000  # bytes that one takes in .keys
ROOM = 200_000  # bytes by which the memory of the second half may exceed that of the first
SMALL = [("s", n) for n in range(150)]
ALONE = [f"f{n}" for n in range(12)]
KEYS = [*SMALL, *ALONE]

pytestmark = [pytest.mark.repeats, pytest.mark.timeout(7200 if FULL else 300)]


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(chest.upkeep, "WASTE", WASTE)
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", COMPACT_BYTES)


def value(key, chance):
    """Return a value whose size depends on the key alone."""
    number = chance.randrange(1 << 40, 1 << 41)
    if key in ALONE:
        size = 70_000 if key == ALONE[0] else 5_000
        return [number, "text" * (size // 4)]
    return [number, key[1]] if key[1] % 2 else f"{number} {key[1]:03}"


def act(c, chance, expected):
    """Do something to the chest, and the same to a dict."""
    key = chance.choice(KEYS)
    match chance.randrange(24):
        case 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8:
            assert c.get(key) == expected.get(key)
        case 9 | 10 | 11 | 12:
            c[key] = expected[key] = value(key, chance)
        case 13 | 14:
            if key in expected and type(expected[key]) is list:
                c[key][0] = number = chance.randrange(1 << 40, 1 << 41)
                expected[key] = [number, expected[key][1]]
        case 15:
            assert c.pop(key, None) == expected.pop(key, None)
        case 16:
            value_there = value(key, chance)
            assert c.setdefault(key, value_there) == expected.setdefault(key, value_there)
        case 17 if chance.random() < 0.2:
            many = {key: value(key, chance) for key in chance.sample(SMALL, 80)}
            c.update(many)
            expected.update(many)
        case 18:
            c.flush()
        case 19 if chance.random() < 0.3:
            with c.transaction():
                c[key] = expected[key] = value(key, chance)
                expected.pop(KEYS[0], None)
                c.pop(KEYS[0], None)
        case 20 if chance.random() < 0.3:
            with suppress(ZeroDivisionError), c.transaction():
                c.clear()
                c[key] = value(key, chance)
                1 / 0  # noqa: B018
        case 21 if chance.random() < 0.1:
            assert {k: v for k, v in c.items() if k in SMALL[:9]} == {
                k: v for k, v in expected.items() if k in SMALL[:9]
            }
        case 22 if chance.random() < 0.02:
            c.clear()
            expected.clear()
        case _:
            assert (key in c) == (key in expected)


class Gauge:
    """What a process and a directory take, looked at again and again."""

    def __init__(self, path):
        self.path = path
        self.descriptors, self.threads = [], []
        self.memory, self.packs, self.keys = [], [], []
        self.started = time.perf_counter()
        tracemalloc.start()

    def look(self, ledger):
        gc.collect()
        self.memory.append(tracemalloc.get_traced_memory()[0])
        if os.path.isdir("/proc/self/fd"):
            self.descriptors.append(len(os.listdir("/proc/self/fd")))
        self.threads.append(threading.active_count())
        sizes = {}
        for folder, _, names in os.walk(self.path):
            files = [os.path.join(folder, name) for name in names]
            sizes |= {os.path.relpath(file, self.path): os.stat(file).st_size for file in files}
        keys = sizes.pop(".keys")
        packs = sum(sizes.pop(name) for name in [*sizes] if name.startswith(".pack"))
        needed = sum(map(len, ledger.snapshot()))
        rows = [*dict(ledger.stored()).values(), *ledger.unreadable.values()]
        entries = [*map(ledger.entry, rows)]
        live = sum(entry.length for entry in entries if entry.file in ledger.packs)
        assert packs <= 2 * live + 2 * WASTE
        assert sum(sizes.values()) == sum(entry.length for entry in entries) - live
        assert keys <= max(2 * needed, COMPACT_BYTES) + COMMIT
        self.packs.append((packs, live))
        self.keys.append((keys, needed))

    def stop(self, operations):
        tracemalloc.stop()
        seconds = time.perf_counter() - self.started
        early, late = self.memory[: len(self.memory) // 2], self.memory[len(self.memory) // 2 :]
        print(f"{operations} operations in {seconds:.0f} s, seed {SEED}")
        print(f"  descriptors {_span(self.descriptors)}, threads {_span(self.threads)}")
        print(f"  memory {_span(early)} bytes, then {_span(late)}")
        print(f"  packs up to {max(self.packs)[0]} bytes, with {max(self.packs)[1]} alive")
        print(f"  .keys up to {max(self.keys)[0]} bytes, with {max(self.keys)[1]} needed")
        assert median(late) <= median(early) + ROOM
        assert max(self.threads) == min(self.threads)
        assert max(self.descriptors, default=0) - min(self.descriptors, default=0) <= 4  # packs


def _span(numbers):
    return f"{min(numbers)} to {max(numbers)}" if numbers else "unknown"


@pytest.fixture
def gauge(path):
    made = Gauge(path)
    yield made
    tracemalloc.stop()


def parts(operations):
    """Yield, for each look, how many operations come before it."""
    return [int(operations * FACTOR) // LOOKS] * LOOKS


@pytest.mark.parametrize("options", [{}, {"dump": json.dump, "load": json.load}, {"fsync": True}])
def test_one_chest(path, gauge, options):
    operations = 800 if "fsync" in options else 4000
    expected, chance = {}, random.Random(SEED)
    with Chest(path=path, available_memory=60_000, **options) as c:
        for part in parts(operations):
            for _ in range(part):
                act(c, chance, expected)
            assert {k: c[k] for k in c} == expected
            c.flush()
            gauge.look(c._memory.ledger)
            c._check()
        gauge.stop(sum(parts(operations)))


def test_chests_that_share_a_directory(path, gauge):
    expected, chance = {}, random.Random(SEED)
    chests = [Chest(path=path, available_memory=60_000) for _ in range(3)]
    with Chest(path=path, readonly=True, available_memory=60_000) as reader:
        for part in parts(2500):
            for _ in range(part):
                c = chance.choice(chests)
                act(c, chance, expected)
                c.flush()
                if chance.random() < 0.05:
                    key = chance.choice(KEYS)
                    assert reader.get(key) == expected.get(key)
            assert dict(reader.items()) == expected
            for c in chests:
                assert {k: c[k] for k in c} == expected
                c._check()
            gauge.look(reader._memory.ledger)
        gauge.stop(sum(parts(2500)))
    for c in chests:
        c.close()


def test_a_chest_that_is_opened_and_closed(path, gauge):
    expected, chance = {}, random.Random(SEED)
    for part in parts(1500):
        for _ in range(part // 3):
            with Chest(path=path, readonly=chance.random() < 0.1, available_memory=60_000) as c:
                for _ in range(3):
                    if c._memory.options.readonly:
                        key = chance.choice(KEYS)
                        assert c.get(key) == expected.get(key)
                    else:
                        act(c, chance, expected)
        with Chest(path=path) as c:
            assert {k: c[k] for k in c} == expected
            gauge.look(c._memory.ledger)
    gauge.stop(sum(parts(1500)))


def test_threads(path, gauge):
    """Each has keys of its own, so that it knows what they are."""
    failed = []

    def work(c, n, part, chance, mine):
        try:
            for _ in range(part // 4):
                key = n, chance.randrange(60)
                match chance.randrange(5):
                    case 0 | 1:
                        c[key] = mine[key] = [chance.random(), "text" * (1500 if key[1] < 3 else 1)]
                    case 2:
                        assert c.get(key) == mine.get(key)
                    case 3:
                        assert c.pop(key, None) == mine.pop(key, None)
                    case 4 if chance.random() < 0.2:
                        c.flush()
            assert {key: c[key] for key in mine} == mine
        except BaseException as error:
            failed.append(error)

    states = [(random.Random(SEED + n), {}) for n in range(4)]
    with Chest(path=path, available_memory=60_000) as c:
        for part in parts(4000):
            threads = [
                threading.Thread(target=work, args=(c, n, part, *state))
                for n, state in enumerate(states)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not failed
            assert len(c) == sum(len(mine) for _, mine in states)
            c.flush()
            gauge.look(c._memory.ledger)
            c._check()
        gauge.stop(sum(parts(4000)))


def test_temporary_chests(path, gauge):
    chance = random.Random(SEED)
    with Chest(path=path) as lasting:
        for part in parts(3000):
            for _ in range(part // 30):
                expected = {}
                c = Chest(available_memory=10_000)
                for _ in range(30):
                    act(c, chance, expected)
                assert dict(c) == expected
                del c
            gauge.look(lasting._memory.ledger)
        gauge.stop(sum(parts(3000)))


def test_a_chest_with_a_key_that_cannot_be_read(path, gauge):
    options = {"dump": json.dump, "load": json.load}
    with Chest({dt.date(2026, 11, 26): 0}, path=path):
        pass
    with Chest(path=path, **options) as c:
        for part in parts(1600):
            for n in range(part):
                c["x"] = n
                c.flush()
            gauge.look(c._memory.ledger)
        gauge.stop(sum(parts(1600)))
