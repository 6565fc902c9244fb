"""`nbytes` against a full walk that counts everything, and against bytes that are known."""

import array
import collections
import dataclasses
import enum
import fractions
import gc
import random
import sys
import threading
import timeit
import tracemalloc
import types
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from chest import sizes
from chest.sizes import nbytes

MB = 1_000_000


def exact(value):
    """Add up getsizeof of every object in built-in containers, each once."""
    seen, total, stack = set(), 0, [value]
    while stack:
        part = stack.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        total += sys.getsizeof(part)
        if isinstance(part, dict):
            stack += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set, frozenset, collections.deque)):
            stack += part
    return total


def about(expected, rel=0.1):
    return pytest.approx(expected, rel=rel)


@pytest.fixture
def register(monkeypatch):
    """Register for one test only."""
    before = dict(sizes._registered)
    yield nbytes.register
    sizes._registered.clear()
    sizes._registered.update(before)
    for known in (sizes._plain, sizes._sizers, sizes._openers):
        known.clear()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_an_array_costs_what_was_registered_for_its_memory(register, kind):
    value = np.frombuffer(bytearray(8000) if kind is memoryview else kind(8000))
    register(kind, lambda memory: 7)
    for known in (b"", bytearray(), memoryview(b"")):
        nbytes(known)
    assert nbytes(value) == nbytes([value]) - sys.getsizeof([value]) < 1000


class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y


class Slotted:
    __slots__ = ("__mangled", "a", "unset")

    def __init__(self, a):
        self.a = a
        self.__mangled = bytes(1000)


class SlottedChild(Slotted):
    __slots__ = ("b",)


@dataclasses.dataclass
class Record:
    name: str
    data: bytes


class Colour(enum.Enum):
    RED = "x" * 5000


class Pair(NamedTuple):
    a: object
    b: object


SCALARS = [
    "", "abc", "é" * 100, "x" * 10**6, b"", b"abc", bytes(10**6), 0, 1, -5, 10**1000, 2.5, 1j,
    True, None, ..., NotImplemented, range(5), bytearray(1000), array.array("d", range(1000)),
    slice(1), np.float64(1), np.int8(1), object(),
]  # fmt: skip


@pytest.mark.parametrize("value", SCALARS, ids=lambda value: type(value).__name__)
def test_scalars_are_exact(value):
    assert nbytes(value) == sys.getsizeof(value)
    assert type(nbytes(value)) is int


SMALL = [
    (), [], {}, set(), frozenset(), (1, "abc", 2.5), [1, [2, [3, (4, {5: "six"})]]],
    {"a": 1, "b": [1.5, 2.5]}, {1, 2, 3}, frozenset("abc"), list(range(200)),
    {str(i): float(i) for i in range(90)}, collections.deque(["a", 1.5]),
    collections.OrderedDict(a=1, b=[2]), collections.Counter("abc"), {"n": {"n": {"n": [b"x"]}}},
    collections.defaultdict(list, a=[1]), Pair("left", ["right"]), {("a", 1): 2}, {2: [None] * 5},
]  # fmt: skip


@pytest.mark.parametrize("value", SMALL, ids=repr)
def test_small_containers_are_exact(value):
    assert nbytes(value) == exact(value) + (
        # what a subclass written in Python (Counter) keeps besides its entries
        sys.getsizeof(vars(value)) if hasattr(value, "__dict__") else 0
    )


def words(n):
    rng = random.Random(n)
    return ["w" * rng.randrange(100) + str(i) for i in range(n)]


LARGE = {
    "ints": lambda: list(range(3 * 10**5)),
    "small ints": lambda: [i % 100 for i in range(3 * 10**5)],
    "floats": lambda: tuple(map(float, range(10**5))),
    "words": lambda: words(10**5),
    "set": lambda: set(words(10**5)),
    "frozenset": lambda: frozenset(range(10**5)),
    "deque": lambda: collections.deque(words(10**5)),
    "dict": lambda: {word: len(word) for word in words(10**5)},
    "odd and even": lambda: [float(i) if i % 2 else "x" * 200 + str(i) for i in range(10**5)],
    "period 16": lambda: ["x" * 1000 + str(i) if i % 16 == 0 else i for i in range(2**16)],
    "growing": lambda: [bytes(i) for i in range(5000)],
    "dict growing": lambda: {i: bytes(i) for i in range(5000)},
    "lists of lists": lambda: [[float(i) for i in range(100)] for _ in range(2000)],
    "deeper": lambda: [[[[str(i * 99)] for i in range(10)] for _ in range(10)] for _ in range(500)],
    "dict of lists": lambda: {str(i): [float(i), float(-i)] for i in range(30_000)},
    "list of dicts": lambda: [{"id": i, "name": f"n{i}", "x": i / 2} for i in range(30_000)],
    "wide dicts": lambda: [{str(k): "v" * k + str(i) for k in range(50)} for i in range(1000)],
    "tuples": lambda: [(i, str(i), float(i)) for i in range(30_000)],
    "sets in dicts": lambda: {i: {i, i + 0.5, str(i)} for i in range(30_000)},
    "pool of 1000": lambda: random.Random(1).choices(words(1000), k=10**5),
    "half None": lambda: [None if i % 2 else "x" * 100 + str(i) for i in range(10**5)],
    "some empty": lambda: ["" if i % 50 == 0 else "x" * 100 + str(i) for i in range(10**5)],
    "pairs of same": lambda: [[s, s] for s in words(20_000)],
    "columns": lambda: {name: words(20_000) for name in "abcd"},
    "just above a sample": lambda: [bytes(1000 + i) for i in range(220)],
    "config and data": lambda: {"config": {"w": bytes(10**7), "n": 3}, "rows": list(range(10**5))},
    "deep config": lambda: [[[[[[bytearray(MB)]]]]], [[str(i)] for i in range(10**5)]],
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_large_containers_within_ten_percent(make):
    value = make()
    assert nbytes(value) == about(exact(value))


def test_61_megabytes_of_nested_lists():
    value = [[list(map(float, range(100))) for _ in range(20)] for _ in range(900)]
    leaf = sys.getsizeof(value[0][0]) + 100 * sys.getsizeof(1.5)
    expected = sys.getsizeof(value) + 900 * (sys.getsizeof(value[0]) + 20 * leaf)
    assert expected > 55 * MB
    assert nbytes(value) == about(expected)


def group_by(n=300_000):
    """Index words of very different frequency: the frequent ones come first."""
    rng = random.Random(1)
    index = {}
    for i in range(n):
        word = f"w{int(rng.paretovariate(0.5)) % 30_000}"
        index.setdefault(word, []).append(("f.py", i))
    return index


def test_index_whose_first_keys_hold_the_largest_values():
    tracemalloc.start()
    try:
        index = group_by()
        expected, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert nbytes(index) == about(expected, rel=0.3)


@pytest.mark.parametrize(
    "make", [
        lambda index: list(index.values()),
        lambda index: collections.deque(index.values()),
        lambda index: collections.Counter({k: 1 << 8 * len(v) for k, v in index.items()}),
        lambda index: dict(reversed(index.items())),
    ], ids=["list", "deque", "counter", "reversed"],
)  # fmt: skip
def test_very_different_sizes(make):
    value = make(group_by(50_000))
    assert nbytes(value) == about(exact(value), rel=0.3)


@pytest.mark.parametrize("make", [dict.fromkeys, set, collections.deque])
def test_collections_too_long_to_be_stepped_through(make):
    value = make(map(float, range(3 * sizes._REACH)))
    assert nbytes(value) == about(sys.getsizeof(value) + len(value) * sys.getsizeof(1.5))


def test_long_dict_is_seen_at_both_ends():
    half = 2 * sizes._REACH
    value = {i: 100 * "x" + str(i) if i < half else i / 7 for i in range(2 * half)}
    assert nbytes(value) == about(exact(value))
    time = min(timeit.repeat(lambda: nbytes(value), number=1))
    assert time < 0.1  # seconds; all of it would take half a second


def test_large_dict_after_its_front_was_deleted():
    value = {i: str(i) for i in range(20_000)}
    for i in range(19_000):
        del value[i]
    assert nbytes(value) == about(exact(value))


# Shared parts, cycles, depth.


@pytest.mark.parametrize("n", [2, 10, 1000, 10**6])
@pytest.mark.parametrize(
    "part", [bytearray(5000), "x" * 5000, [bytes(5000)], np.ones(625)], ids=type
)
def test_shared_part_counts_once(n, part):
    assert nbytes([part] * n) == nbytes(part) + sys.getsizeof([part] * n)


def test_shared_across_levels_and_containers():
    part = bytearray(MB)
    value = {"a": part, "b": [part, (part,)], "c": {"d": {"e": part}}, "f": Point(part, part)}
    assert nbytes(value) == about(MB, rel=0.01)
    value["self"] = value
    assert nbytes(value) == about(MB, rel=0.01)
    assert nbytes([[part, i] for i in range(10_000)]) < 3 * MB


def test_references_from_outside_do_not_make_it_cheaper():
    value = words(10**5)
    others = [list(value) for _ in range(9)]
    assert nbytes(value) == about(exact(value))
    assert len(others) == 9


def test_cycles():
    a, b = [bytes(1000)], {}
    a.append(b)
    b["a"] = a
    a.append(a)
    assert nbytes(a) == exact(a)
    point = Point(1, 2)
    point.x = point
    assert nbytes(point) < 1000


@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: (v,), lambda v: {"k": v}, lambda v: Point(v, 1)]
)
def test_very_deep_nesting(wrap):
    value = shallow = wrap(b"")
    for _ in range(1000):
        shallow = wrap(shallow)
    for _ in range(100_000):
        value = wrap(value)
    assert nbytes(value) > nbytes(shallow) > 48_000
    while value:  # taken apart by hand: older Pythons recurse when they free it
        value = next(iter(value.values() if isinstance(value, dict) else vars(value).values()
                          if isinstance(value, Point) else value))  # fmt: skip


# Bounded work.


class Visited:
    count = 0

    def __sizeof__(self):
        Visited.count += 1
        return 100


@pytest.mark.parametrize(
    "make",
    [
        lambda: [Visited() for _ in range(10**5)],
        lambda: [[Visited() for _ in range(10)] for _ in range(10**4)],
        lambda: [[[[[Visited() for _ in range(6)] for _ in range(6)] for _ in range(6)]
                  for _ in range(6)] for _ in range(20)],
        lambda: {i: {"k": Visited()} for i in range(30_000)},
        lambda: {Visited() for _ in range(10**5)},
        lambda: {str(i): [Visited() for _ in range(i)] for i in range(300)},
    ],
)  # fmt: skip
def test_work_is_bounded(make):
    value = make()
    Visited.count = 0
    nbytes(value)
    assert 20 < Visited.count <= sizes._BUDGET


def test_deep_and_wide_work_is_bounded():
    chains = []
    for _ in range(500):
        chain = []
        for _ in range(300):
            chain = [Visited(), chain]
        chains.append(chain)
    Visited.count = 0
    assert nbytes(chains) > 2 * MB
    assert Visited.count <= sizes._BUDGET + sizes._BUDGET // sizes._TAPER


# Instances.


def test_instances():
    own = sys.getsizeof
    assert nbytes(Point(bytes(5000), "y")) >= 5000 + own("y")
    record = Record("n", bytes(5000))
    assert nbytes(record) == own(record) + own(vars(record)) + own("n") + own(bytes(5000))
    slotted = SlottedChild(bytes(3000))
    slotted.b = [bytes(200)]
    assert nbytes(slotted) == (
        own(slotted) + own(bytes(1000)) + own(bytes(3000)) + nbytes([bytes(200)]) + own(None)
    )
    points = [Point(bytes(1000 + i), i) for i in range(10_000)]
    assert nbytes(points) == about(exact([[vars(p), p.x, p.y] for p in points]) - 88 * 10_000)
    assert nbytes(fractions.Fraction(10**1000, 3)) > own(10**1000)
    assert nbytes(types.SimpleNamespace(a=bytes(5000))) > 5000


def test_many_slotted_instances():
    values = []
    for i in range(20_000):
        values.append(SlottedChild(bytes(500 + i % 7)))
        values[-1].b = None
    assert nbytes(values) == about(20_000 * (8 + sys.getsizeof(values[0]) + 33 + 1000 + 33 + 503))


def test_many_records_of_many_kinds():
    rng = random.Random(2)
    values = [
        {"id": i, "tags": words(rng.randrange(4)), "ok": None, "at": {"x": i / 7, "y": [i / 3] * 9}}
        for i in range(20_000)
    ]
    assert nbytes(values) == about(exact(values))


@pytest.mark.parametrize("base", [list, dict, set, tuple, str, int, bytearray, collections.deque])
def test_subclasses_count_their_attributes(base):
    kind = type("Sub", (base,), {})
    value = kind()
    before = nbytes(value)
    value.extra = bytes(10_000)
    assert nbytes(value) == about(before + 10_000, rel=0.05)


class Hostile(list):
    """Refuses and miscounts whatever Python code can override."""

    def boom(self, *_):
        raise RuntimeError("not to be called")

    __iter__ = __len__ = __getitem__ = __getattr__ = __bool__ = __eq__ = __reversed__ = boom
    __hash__ = None

    @property
    def secret(self):
        return self.boom()


class HostileDict(dict):
    __iter__ = __len__ = __getitem__ = keys = values = items = Hostile.boom


@pytest.mark.parametrize("n", [3, 10_000])
def test_overridden_methods_are_not_called(n):
    row, table = [float(i) for i in range(n)], {i: float(i) for i in range(n)}
    attributes = sys.getsizeof(vars(Hostile())) + sys.getsizeof(Hostile()) - sys.getsizeof([])
    assert nbytes(Hostile(row)) == about(exact(row) + attributes)
    assert nbytes(HostileDict(table)) == about(exact(table) + attributes)


@pytest.mark.parametrize("answer", [-1, "big", 2.5, None, 2**70, RuntimeError, RecursionError])
def test_sizeof_that_raises_or_lies(answer):
    def lie(self):
        if isinstance(answer, type):
            raise answer
        return answer

    for bases in [(), (list,), (int,)]:
        value = type("Liar", bases, {"__sizeof__": lie})()
        value.data = bytes(1000)
        assert 1000 < nbytes(value) < 2000
        assert 1000 < nbytes([value]) < 2000
        assert nbytes(type("Bare", bases, {"__sizeof__": lie, "__slots__": ()})()) >= 0
    assert nbytes(type("None", (), {"__sizeof__": None})()) >= 0


def test_what_is_shared_by_all_is_not_walked():
    class Big:
        table = bytes(MB)

    def function(big=bytes(MB)):
        return big

    function.attribute = bytes(MB)
    assert Colour.RED.value * 2
    for value in [Big, function, sys, np, len, Colour.RED, Colour, type, Big().__init__]:
        assert 0 < nbytes(value) < 10_000
        assert nbytes([value]) < 10_000


def test_the_value_is_not_changed():
    value = {"a": [1, {2, 3}], "b": np.arange(3), "c": collections.defaultdict(list)}
    before = repr(value)
    nbytes(value)
    assert repr(value) == before
    part = [bytes(1000)]
    count = sys.getrefcount(part)
    nbytes([part, part])
    gc.collect()
    assert sys.getrefcount(part) == count


class Claims:
    def __init__(self, claim):
        self.claim = claim

    @property
    def nbytes(self):
        if isinstance(self.claim, Exception):
            raise self.claim
        return self.claim


def test_nbytes_attribute():
    assert nbytes(Claims(MB)) == MB
    assert nbytes([Claims(MB), Claims(np.int64(MB))]) == about(2 * MB, rel=0.01)
    assert nbytes(types.SimpleNamespace(nbytes=MB)) == MB
    for claim in [None, "many", -7, 2.5, ValueError("closed"), RuntimeError()]:
        assert 0 < nbytes(Claims(claim)) < 2000


# Registration


def test_register_as_function_and_decorator(register):
    assert register(Point, lambda point: point.x)(Point(7, 0)) == 7
    assert nbytes(Point(5000, 0)) == 5000

    @register(Record)
    def record_bytes(record):
        return np.int64(3000)

    assert record_bytes(None) == 3000
    assert type(nbytes(Record("", b""))) is int
    part = Record("", b"")
    assert nbytes([part, {"k": Record("", b"")}, part]) == about(6000, rel=0.1)
    assert nbytes([Point(1000, 0) for _ in range(10**4)]) == about(10_080_000, rel=0.02)


def test_register_after_it_was_sized(register):
    value = [Point(1, 2), 7]
    small = nbytes(value)
    register(Point, lambda point: MB)
    assert nbytes(value) > MB > small
    register(Point, lambda point: 2 * MB)
    assert nbytes(value) > 2 * MB
    register(int, lambda number: 10 * MB)
    assert nbytes(value) > 12 * MB
    assert nbytes((7,)) > 10 * MB
    assert nbytes(True) == 10 * MB


def test_register_reaches_subclasses_and_the_most_specific_wins(register):
    class Child(Point):
        pass

    class Grandchild(Child):
        pass

    register(Point, lambda point: 1)
    register(Child, lambda point: 2)
    assert [nbytes(kind(0, 0)) for kind in (Point, Child, Grandchild)] == [1, 2, 2]


def test_register_takes_precedence_over_what_is_known(register):
    for kind, value in [(list, [1]), (np.ndarray, np.ones(3)), (pd.DataFrame, pd.DataFrame()),
                        (enum.Enum, Colour.RED), (type, Point), (Claims, Claims(5))]:  # fmt: skip
        register(kind, lambda value: 123_456)
        assert nbytes(value) == 123_456
        assert nbytes((value,)) == about(123_456, rel=0.01)


def test_registered_sizer_may_raise(register):
    def refuse(value):
        raise LookupError("no size")

    register(Point, refuse)
    for value in [Point(1, 2), [Point(1, 2)], {"a": {"b": Point(1, 2)}}]:
        with pytest.raises(LookupError, match="no size"):
            nbytes(value)


def test_registered_sizer_never_makes_it_negative(register):
    register(Point, lambda point: -5)
    assert nbytes(Point(1, 2)) == 0


@pytest.mark.parametrize("kind", ["Point", 3, None, Point(1, 2)])
def test_register_wants_a_class(kind):
    with pytest.raises(TypeError, match="needs a class"):
        nbytes.register(kind, len)


def test_register_while_others_size(register):
    failures = []

    def size():
        try:
            while not done.is_set():
                assert nbytes((1, [Point(1, 2)], 2.5)) > 0
        except BaseException as error:
            failures.append(error)

    done = threading.Event()
    threads = [threading.Thread(target=size) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(300):
        register(Point, lambda point, i=i: i)
        assert nbytes(Point(1, 2)) == i
    done.set()
    for thread in threads:
        thread.join()
    assert not failures
