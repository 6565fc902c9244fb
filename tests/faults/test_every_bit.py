"""One fault anywhere in a chest's directory: a wrong bit, a cut, a file gone, two files swapped.

Proved for every one of these, with chests of every kind: whoever opens the chest, to write or to
read only, and gets every key, gets the value that was stored, or a `ChestError` that names key and
path. A fault in a value file or pack costs the values there alone, and every key stays to be seen;
a fault in ``.keys`` is a `CorruptIndexError` with its path. Nothing hangs, takes much memory or
changes the directory.

Without ``CHEST_FAULTS=all`` a sample of the bits is tried.
"""

import datetime as dt
import gzip
import json
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from damage import FULL, SEED, little_memory, measured_peak, read, some, tree, write

import chest.serialize
import chest.upkeep
from chest import Chest, ChestError, CorruptIndexError, CorruptValueError

JSON = {"dump": json.dump, "load": json.load}
ROOM = 256 << 20  # bytes of address space that a damaged chest may ask for
SAMPLE = 100  # bits of a file
MOVED = 127  # the bit of .keys that says where to look for a newer one: that is no damage

pytestmark = [pytest.mark.repeats, pytest.mark.timeout(3600 if FULL else 300)]


# -- chests ---------------------------------------------------------------------------------------


def plain(path, **options):
    with Chest(path=path, **options) as c:
        c["x"] = [1, 2, 3]
        c["a", "b"] = {"n": 1.5, "long": ["text"] * 20}
        c.flush()
        c[7] = "seven"
        c[True, None] = (1, "one")
        c.flush()
        c[b"raw"] = b"\x00" * 40
        c[frozenset({"x", 2.5})] = [["nested"], {}]


def pickled_keys(path):
    day = dt.date(2026, 11, 26)
    with Chest(path=path) as c:
        c["plain"] = [day, day]
        c["day", day] = {"since": day}
        c[frozenset({day, "x"})] = (Fraction(1, 3), complex(1, 2))
        c.flush()
        c[Fraction(2, 7), (day, None)] = range(7)
        c[day] = bytearray(b"bytes")


def in_json(path):
    with Chest(path=path, **JSON) as c:
        c["x"] = [1, 2, 3]
        c["a", "b"] = {"n": 1.5, "é": [None, True]}
        c.flush()
        c[7] = "seven"


def in_gzip(path):
    plain(path, open=gzip.open)


def packs(path):
    with Chest(path=path) as c:
        c.update((n, (n, str(n))) for n in range(70))
        c.flush()
        c.update((("n", n), [n]) for n in range(64))
        c["alone"] = ["alone"]


def history(path):
    """Transactions, one of them taken back, and compactions of packs and of the index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chest.upkeep, "COMPACT_BYTES", 2000)
        patch.setattr(chest.upkeep, "WASTE", 100)
        with Chest(path=path) as c:
            for turn in range(4):
                with c.transaction():
                    c.update((n, (turn, n)) for n in range(turn, 70))
                    c["x"] = [turn]
            first = os.stat(os.path.join(path, ".keys")).st_ino
            c.clear()
            c.flush()
            c.update((n, (n, "again")) for n in range(66))
            c.flush()
            with pytest.raises(ZeroDivisionError):
                with c.transaction():
                    c["x"] = ["never"]
                    del c[3]
                    raise ZeroDivisionError
            with c.transaction():
                c["x"] = ["last"]
                del c[5]
        assert os.stat(os.path.join(path, ".keys")).st_ino != first


def deletions(path):
    with Chest({n: [n] for n in range(5)}, path=path) as c:
        c.flush()
        c.clear()
        c.update({"a": [1], "b": [2], "d": [5], ("c", 1): [3], ("c", dt.date(2026, 1, 1)): [4]})
        c.flush()
        del c["a"], c["c", dt.date(2026, 1, 1)]
        c.flush()
        c["a"] = ["again"]
        c.flush()
        del c["b"]


CHESTS = {make.__name__: make for make in (plain, pickled_keys, packs, history, deletions)}
CHESTS |= {"json": in_json, "gzip": in_gzip}
OPTIONS = {"json": JSON, "gzip": {"open": gzip.open}}
LARGE = {
    "objects": [dt.date(2000, 1, 1) + dt.timedelta(n) for n in range(12000)],
    "array": np.arange(18_000),
    "bytearray": bytearray(140_000),
    "text": ["é" * 80_000],
}


class Subject:
    """A chest on disk with what it holds: to be damaged, looked at, and put right again."""

    def __init__(self, path, make, options):
        self.path = path
        self.options = options
        self.keys = os.path.join(path, ".keys")
        make(path)
        self.before = tree(path)
        self.files = [name for name, data in self.before.items() if isinstance(data, bytes)]
        with Chest(path=path, **self.options) as c:
            self.expected = {key: repr(c[key]) for key in c}
            self.needed = self.bytes_needed(c._memory.ledger)
        self.tried = Counter()
        self.starved = 0
        self.slowest = 0.0

    def bytes_needed(self, ledger):
        """Return which bytes of each file a value lies in; in packs there are dead ones, too."""
        needed = {name: set() for name in self.files}
        for _, row in ledger.stored():
            name, place, length, _ = ledger.entry(row)
            packed = name in ledger.packs
            needed[name].update(range(place, place + length if packed else len(self.before[name])))
        return needed | {".keys": set(range(len(self.before[".keys"])))}

    def put(self, name, data):
        write(os.path.join(self.path, name), data)

    def damaged(self, changes, place):
        """Try the chest with other files; `changes` leads from names to bytes, or None for gone.

        Returns
        -------
        told : int
            How many of the two chests that were opened told of the damage.
        """
        for name, data in changes.items():
            if data is None:
                os.unlink(os.path.join(self.path, name))
            else:
                self.put(name, data)
        wrong = {os.path.join(self.path, name) for name in changes}
        before = tree(self.path)
        started = time.perf_counter()
        try:
            told = sum(self.opened(readonly, wrong) for readonly in (False, True))
        except BaseException as error:
            error.add_note(f"with {place}")
            raise
        self.slowest = max(self.slowest, time.perf_counter() - started)
        assert tree(self.path) == before, place
        for name in changes:
            self.put(name, self.before[name])
        self.tried["told" if told else "harmless"] += 1
        return told

    def opened(self, readonly, wrong):
        """Open the chest and get everything; tell whether anything was found to be wrong."""
        try:
            c = Chest(path=self.path, readonly=readonly, **self.options)
        except CorruptIndexError as error:
            assert error.path == self.keys in wrong
            assert self.keys in str(error)
            return True
        with c:
            assert [*c] == [*self.expected]
            together = self.together(c) if readonly else None  # read ahead, nothing in memory yet
            lost = [key for key in self.expected if not self.right(c, key, wrong)]
            together = together or self.together(c)
            assert together in lost if lost else together == self.expected
        return bool(lost)

    def together(self, c):
        """Get everything in one go; return the key of the first that is wrong, if one is."""
        try:
            return {key: repr(value) for key, value in c.items()}
        except CorruptValueError as error:
            return error.key

    def right(self, c, key, wrong):
        try:
            value = c[key]
        except CorruptValueError as error:
            assert error.key == key
            assert error.path in wrong
            assert error.path in str(error)
            self.starved += any(isinstance(cause, MemoryError) for cause in causes(error))
            return False
        assert repr(value) == self.expected[key]
        return True


def causes(error):
    while error is not None:
        yield error
        error = error.__cause__


@contextmanager
def watched(made):
    """Bound what a chest takes while it is damaged, and say what was tried."""
    with little_memory(ROOM), measured_peak() as grown:
        yield made
    for name in ("last_type", "last_value", "last_traceback"):
        # CPython prints an error for a bytearray too large to be made, and keeps its traceback.
        vars(sys).pop(name, None)
    assert made.tried.total()
    assert grown[0] < ROOM / 2
    assert made.slowest < 5
    counts = ", ".join(f"{n} {what}" for what, n in sorted(made.tried.items()))
    print(f"{made.tried.total()} points ({counts}), slowest {made.slowest * 1000:.1f} ms")


@pytest.fixture(params=CHESTS)
def subject(path, request):
    """A chest of each kind."""
    made = Subject(path, CHESTS[request.param], OPTIONS.get(request.param, {}))
    assert len(made.expected) >= 3
    with watched(made):
        yield made


@pytest.fixture(params=LARGE)
def large(path, request):
    """A chest with one value of 128 KiB and more, which is read part by part."""

    def make(path):
        Chest({"k": LARGE[request.param]}, path=path).close()

    made = Subject(path, make, {})
    with watched(made):
        yield made


def flipped(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


# -- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_a_wrong_bit(subject, streamed, monkeypatch):
    if streamed:  # as values from 128 KiB are: part by part
        monkeypatch.setattr(chest.serialize, "SMALL", 0)
    for name in subject.files:
        data = subject.before[name]
        for bit in some(range(8 * len(data)), SAMPLE // (1 if name == ".keys" else 5)):
            told = subject.damaged({name: flipped(data, bit)}, f"bit {bit} of {name} wrong")
            harmless = (name, bit) == (".keys", MOVED) or bit // 8 not in subject.needed[name]
            in_header = told == 0 and "open" in subject.options  # of gzip: the time, the name
            assert told == (0 if harmless else 2) or in_header, (name, bit)


@pytest.mark.parametrize("kept", [None, 0])
def test_a_wrong_bit_in_a_large_value(large, kept, monkeypatch):
    """The bits that say what the value is and how long, and not its many alike."""
    if kept is not None:  # as the largest are: read again when they are known to be right
        monkeypatch.setattr(chest.serialize, "KEPT", kept)
    bits = 8 * len(large.before["k"])
    for bit in [*range(200), *some(range(200, 1280), 40), *range(bits - 24, bits)]:
        assert large.damaged({"k": flipped(large.before["k"], bit)}, f"bit {bit} wrong") == 2
    assert not large.starved


def test_a_file_cut_short(subject):
    for name in subject.files:
        data = subject.before[name]
        for length in some(range(len(data)), SAMPLE // 2):
            told = subject.damaged({name: data[:length]}, f"{name} cut to {length} bytes")
            assert told == (2 if max(subject.needed[name]) >= length else 0), (name, length)


def test_a_file_that_goes_on(subject):
    """What lies beyond the committed length of ``.keys``, and of a pack, is nobody's."""
    for name in subject.files:
        for more in (b"\x00", b"\xff" * 4096, subject.before[name]):
            data = subject.before[name] + more
            told = subject.damaged({name: data}, f"{name} with {len(more)} bytes more")
            assert (told == 0) == name.startswith((".keys", ".pack")) or "open" in subject.options


def test_files_removed(subject):
    for name in subject.files:
        if name != ".keys":
            assert subject.damaged({name: None}, f"{name} removed") == 2


def test_without_its_index_a_directory_is_no_chest_to_read(subject):
    os.unlink(subject.keys)
    before = tree(subject.path)
    with pytest.raises(FileNotFoundError) as caught:
        Chest(path=subject.path, readonly=True, **subject.options)
    assert caught.value.filename == subject.keys
    assert tree(subject.path) == before
    subject.tried["told"] += 1


def test_an_index_that_is_gone_makes_no_file_a_foreign_one(subject):
    """Packs tell that there was a chest; other files may be anybody's, and stay as they are."""
    os.unlink(subject.keys)
    before = tree(subject.path)
    try:
        with Chest(path=subject.path, **subject.options) as c:
            assert not any(name.startswith(".pack") for name in before)
            c.update(dict.fromkeys(subject.expected, "new"))
    except CorruptIndexError as error:
        assert error.path == subject.keys
        assert tree(subject.path) == before
    else:
        assert tree(subject.path).items() > before.items()
    subject.tried["told"] += 1


def test_files_swapped(subject):
    same = 0
    for one, other in some(combinations(subject.files, 2), SAMPLE):
        data = subject.before
        told = subject.damaged({one: data[other], other: data[one]}, f"{one} and {other} swapped")
        same += data[one] == data[other]
        assert told == 2 or data[one] == data[other]
    assert not same


@pytest.mark.parametrize("key", ["x", ("a", "b")])
@pytest.mark.parametrize("value", [[], [("x", "x")], [("x", "y")]])
def test_an_index_swapped_with_a_value_that_could_be_an_old_one(path, key, value):
    with Chest({"x": 1, "y": 2}, path=path) as c:
        c[key] = value
        file = os.path.join(path, c.key_to_filename(key))
    data, index = read(file), read(os.path.join(path, ".keys"))
    write(file, index)
    write(os.path.join(path, ".keys"), data)
    before = tree(path)
    for readonly in (False, True):
        with pytest.raises(CorruptIndexError) as caught:
            Chest(path=path, readonly=readonly)
        assert file in str(caught.value)
    assert tree(path) == before


def test_an_index_of_an_earlier_commit(path, tmp_path):
    """A ``.keys`` from a backup, with the files of today: values of then, or errors."""
    indexes, states = [], []
    turns = 40 if FULL else 12
    with Chest(path=path) as c:
        for turn in range(turns):
            c[turn % 5] = [turn]
            c[turn % 3, "x"] = (turn, "x")
            c.pop(turn % 4, None)
            if turn % 4 == 3:
                c.update((("packed", n), (turn, n)) for n in range(64))
            c.flush()
            indexes.append(read(os.path.join(path, ".keys")))
            states.append(dict(c))
    gone = right = 0
    for index, state in zip(indexes, states, strict=True):
        write(os.path.join(path, ".keys"), index)
        with Chest(path=path, readonly=True) as c:
            assert {*c} == {*state}
            for key, value in state.items():
                try:
                    assert c[key] == value
                    right += 1
                except ChestError as error:
                    assert error.key == key
                    assert error.path in str(error)
                    gone += 1
    assert gone
    assert right
    print(f"{turns} points ({right} values as of then, {gone} errors), seed {SEED}")
