"""Random operations, compared with a plain dict after each of them.

Hypothesis chooses the operations and, when something is wrong, finds the fewest that show it. The
same ones are tried in every run, for a few seconds; ``CHEST_STATEFUL=100`` tries a hundred times
as many, new ones each time.
"""

from __future__ import annotations

import datetime as dt
import enum
import functools
import gzip
import json
import os
import sys
import tempfile
from types import FunctionType
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import chest.upkeep
from chest import Chest, KeyTypeError, UnsavedError

TIMES = int(os.environ.get("CHEST_STATEFUL", "0"))
MISSING = object()


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    pass


PLAIN_KEYS = [
    *(1, True, 1.0, 0, False, -1, 2**70, "1", "", None),
    *("CON", "con", "Abc", "abc", "ABC", ".keys", "../x", "_a/b", "é", "\ud800", "x" * 300),
    *("_a", ("a", "b"), ("A", "b"), ("a", "b", "c"), ("a",), (), ("a", ("b", 1))),
    *(b"1", b"", frozenset(), frozenset({"a", (1, 2)})),
]
OTHER_KEYS = [dt.date(2026, 1, 1), Level.LOW, Text("abc"), Text("new"), np.int64(7)]

MAKERS = {
    "None": lambda n: None,
    "int": lambda n: n,
    "str": lambda n: f"text {n} \ud800",
    "list": lambda n: [n] * n,
    "nested": lambda n: [[n], {"key": [n, [n]]}],
    "dict": lambda n: {"a": n, "b": [n]},
    "lambda": lambda n: lambda: n,
}
PICKLED_MAKERS = MAKERS | {
    "bytes": lambda n: bytes([n]) * 200_000,
    "bytearray": lambda n: bytearray([n] * n),
    "tuple": lambda n: (n, [n], {n}),
    "set": lambda n: {n, str(n)},
    "array": lambda n: np.full(12_800, n),
    "frozen array": lambda n: np.frombuffer(bytes([n]) * 1000, np.uint8),
}
JSON_MAKERS = MAKERS | {"half unsaved": lambda n: [[n] * 10, {1, 2}]}


def change(value):
    """Change a value in place, always in the same way, where that is possible."""
    match value:
        case list():
            value.append(len(value))
            change(value[0])
        case dict():
            value[f"more {len(value)}"] = [len(value)]
            change(value.get("key"))
        case set():
            value.add(len(value) + 1000)
        case bytearray():
            value += b"more"
        case np.ndarray() if value.flags.writeable:
            value += 1
        case (_, list() as inner, *_):
            change(inner)


def same(mine, theirs):
    """Compare values and their types."""
    if type(mine) is not type(theirs):
        return False
    match mine:
        case np.ndarray():
            return mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
        case list() | tuple():
            return len(mine) == len(theirs) and all(map(same, mine, theirs))
        case dict():
            return list(mine) == list(theirs) and all(same(mine[key], theirs[key]) for key in mine)
        case FunctionType():
            return mine.__code__ is theirs.__code__
    return mine == theirs


def typed(keys):
    return [(type(key), key) for key in keys]


def holds_a(value, kinds):
    """Tell whether one of `kinds` is in a value, or is the value."""
    members = value.values() if type(value) is dict else value if type(value) is list else ()
    return isinstance(value, kinds) or any(holds_a(member, kinds) for member in members)


any_key = st.integers(0, 1000)
numbers = st.integers(1, 40)
budgets = st.sampled_from([0, 1, 300, 2000, 20_000, 250_000, 1e9, float("inf")])


class Machine(RuleBasedStateMachine):
    """One chest against one dict; now and then through another handle on the directory."""

    key_pool: list
    makers: dict
    serializer = {}
    unsaveable_kinds = (FunctionType,)

    def __init__(self):
        super().__init__()
        self.patch = mock.patch.object(chest.upkeep, "COMPACT_BYTES", 1000)
        self.patch.start()
        self.folder = tempfile.TemporaryDirectory()
        self.model = {}
        self.chest = self.other = self.held = self.held_key = None

    def options(self, budget):
        return {"available_memory": budget, **self.serializer, **self.more}

    @initialize(
        budget=budgets,
        kind=st.sampled_from(["one handle", "two handles", "temporary"]),
        more=st.sampled_from(["nothing", "one name for all", "packed"]),
    )
    def begin(self, budget, kind, more):
        self.more = {
            "nothing": {},
            "one name for all": {"key_to_filename": lambda key: "name"},
            "packed": {"open": functools.partial(gzip.open, compresslevel=1)},
        }[more]
        self.budget = budget
        self.path = None if kind == "temporary" else os.path.join(self.folder.name, "chest")
        self.chest = Chest(path=self.path, **self.options(budget))
        if kind == "two handles":
            self.other = Chest(path=self.path, **self.options(budget))

    def teardown(self):
        try:
            if sys.exception() is None:
                self.end()
        finally:
            for handle in (self.chest, self.other):
                if handle is not None and not handle.closed:
                    handle.clear()
                    handle.close()
            self.patch.stop()
            self.folder.cleanup()

    def end(self):
        self.compare()
        self.drop_unsaveable()
        self.chest.close()
        if self.path is not None:
            self.chest = Chest(path=self.path, **self.options(1e9))
            self.compare()
            assert [name for name in os.listdir(self.path) if name.startswith(".")] == [".keys"]

    def compare(self):
        assert typed(self.chest) == typed(self.model)
        for key, value in self.chest.items():
            assert same(value, self.model[key]), key

    def unsaveable(self):
        kinds = self.unsaveable_kinds
        return {key for key, value in self.model.items() if holds_a(value, kinds)}

    def drop_unsaveable(self):
        for key in self.unsaveable():
            del self.model[key]
            self.chest.pop(key, None)

    def make(self, kind, n):
        """Make a value twice: one for the chest, one for the model."""
        maker = self.makers[sorted(self.makers)[kind % len(self.makers)]]
        return maker(n), maker(n)

    def key(self, number):
        """Choose a key, in two of three cases one that is there."""
        if self.model and number % 3:
            return list(self.model)[number % len(self.model)]
        return self.key_pool[number % len(self.key_pool)]

    # -- one key ---------------------------------------------------------------------------------

    @rule(number=any_key, kind=any_key, n=numbers)
    def set(self, number, kind, n):
        key = self.key(number)
        self.chest[key], self.model[key] = self.make(kind, n)

    @rule(number=any_key)
    def get(self, number):
        key = self.key(number)
        assert same(self.chest.get(key, MISSING), self.model.get(key, MISSING))
        assert (key in self.chest) == (key in self.model)

    @rule(number=any_key)
    def get_what_is_missing(self, number):
        key = self.key(number)
        if key not in self.model:
            with pytest.raises(KeyError) as caught:
                self.chest[key]
            assert caught.value.args == (key,)

    @precondition(lambda self: self.model)
    @rule(number=any_key)
    def change_in_place(self, number):
        key = list(self.model)[number % len(self.model)]
        change(self.chest[key])
        change(self.model[key])

    @rule(number=any_key, kind=any_key, n=numbers)
    def setdefault_and_change(self, number, kind, n):
        key = self.key(number)
        value, expected = self.make(kind, n)
        change(self.chest.setdefault(key, value))
        change(self.model.setdefault(key, expected))

    @rule(number=any_key)
    def delete(self, number):
        key = self.key(number)
        if key in self.model:
            del self.chest[key]
            del self.model[key]
        else:
            with pytest.raises(KeyError):
                del self.chest[key]

    @rule(number=any_key)
    def pop(self, number):
        key = self.key(number)
        assert same(self.chest.pop(key, MISSING), self.model.pop(key, MISSING))

    @precondition(lambda self: self.model)
    @rule()
    def popitem(self):
        key, value = self.model.popitem()
        popped, theirs = self.chest.popitem()
        assert typed([popped]) == typed([key])
        assert same(theirs, value)

    @precondition(lambda self: self.model)
    @rule(number=any_key)
    def hold_on_to_a_value(self, number):
        self.held_key = list(self.model)[number % len(self.model)]
        value = self.chest[self.held_key]
        self.held = value if isinstance(value, (set, np.ndarray)) else None

    @precondition(lambda self: self.held is not None)
    @rule()
    def change_what_is_held(self):
        change(self.held)
        if self.chest.get(self.held_key) is self.held:
            change(self.model[self.held_key])
        else:  # deleted or replaced meanwhile: no concern of the chest's any more
            self.held = None

    # -- many keys -------------------------------------------------------------------------------

    @rule(
        numbers=st.lists(any_key, max_size=6),
        kind=any_key,
        n=numbers,
        source=st.sampled_from(["mapping", "pairs", "keywords", "chest", "small chest", "or"]),
        overwrite=st.booleans(),
    )
    def update(self, numbers, kind, n, source, overwrite):
        pairs, expected = {}, {}
        for i, number in enumerate(numbers):
            key = self.key(number)
            pairs[key], expected[key] = self.make(kind + i, n)
        if source == "or":
            self.chest |= pairs
            self.model |= expected
            return
        if source == "keywords":
            pairs = {f"word{i}": value for i, value in enumerate(pairs.values())}
            expected = {f"word{i}": value for i, value in enumerate(expected.values())}
            self.chest.update(overwrite=overwrite, **pairs)
        elif source == "pairs":
            self.chest.update(list(pairs.items()), overwrite=overwrite)
        elif source == "mapping":
            self.chest.update(pairs, overwrite=overwrite)
        else:
            with Chest(pairs, **self.options(1e9 if source == "chest" else 0)) as given:
                self.chest.update(given, overwrite)
                given._check()
        self.model.update({k: v for k, v in expected.items() if overwrite or k not in self.model})

    @rule()
    def clear(self):
        self.chest.clear()
        self.model.clear()

    @rule(numbers=st.lists(any_key, max_size=4), kind=any_key, n=numbers)
    def set_and_delete_while_iterating(self, numbers, kind, n):
        doomed = [self.key(number) for number in numbers]
        seen = []
        for i, key in enumerate(self.chest):
            seen.append(key)
            if i % 2:
                self.chest[key], self.model[key] = self.make(kind, n)
            if doomed:
                gone = doomed.pop()
                assert same(self.chest.pop(gone, MISSING), self.model.pop(gone, MISSING))
        assert [key for key in seen if key in self.model] == list(self.model)

    @rule(with_keys=st.booleans(), backwards=st.booleans())
    def change_while_streaming(self, with_keys, backwards):
        view = self.chest.items() if with_keys else self.chest.values()
        order = reversed if backwards else iter
        for got, key in zip(order(view), order(list(self.model)), strict=True):
            value = got[1] if with_keys else got
            if with_keys:
                assert typed([got[0]]) == typed([key])
            assert same(value, self.model[key])
            change(value)
            change(self.model[key])

    @rule()
    def copy(self):
        with self.chest.copy() as twin:
            assert list(twin) == list(self.model)
            for key, value in self.model.items():
                assert same(twin[key], value)
                if key not in self.unsaveable():  # those are one object in both
                    change(twin[key])
            twin._check()

    @rule()
    def compare_all(self):
        self.compare()

    # -- memory and disk -------------------------------------------------------------------------

    @rule(budget=budgets)
    def set_budget(self, budget):
        self.budget = self.chest.available_memory = budget

    @precondition(lambda self: self.model)
    @rule(number=any_key)
    def move_to_disk(self, number):
        key = list(self.model)[number % len(self.model)]
        if key in self.unsaveable():
            with pytest.raises(UnsavedError):
                self.chest.move_to_disk(key)
        else:
            self.chest.move_to_disk(key)
            assert key not in self.chest.inmem

    @precondition(lambda self: self.model)
    @rule(number=any_key)
    def get_from_disk(self, number):
        self.chest.get_from_disk(list(self.model)[number % len(self.model)])

    @precondition(lambda self: self.model)
    @rule(numbers=st.lists(any_key, max_size=3))
    def prefetch(self, numbers):
        self.chest.prefetch([list(self.model)[number % len(self.model)] for number in numbers])

    @rule()
    def flush(self):
        unsaved = self.unsaveable()
        if unsaved:
            with pytest.raises(UnsavedError) as caught:
                self.chest.flush()
            assert sorted(map(repr, caught.value.keys)) == sorted(map(repr, unsaved))
        else:
            self.chest.flush()

    @rule()
    def write_keys(self):
        self.chest.write_keys()

    @precondition(lambda self: self.path is not None)
    @rule()
    def close_and_reopen(self):
        if self.unsaveable():
            with pytest.raises(UnsavedError):
                self.chest.close()
            assert not self.chest.closed
            self.drop_unsaveable()
        self.held = None
        self.chest.close()
        self.chest = Chest(path=self.path, **self.options(self.budget))

    @precondition(lambda self: self.other is not None)
    @rule()
    def go_on_with_the_other_handle(self):
        self.drop_unsaveable()
        self.held = None
        self.chest.flush()
        self.chest, self.other = self.other, self.chest
        self.budget = self.chest.available_memory

    # -- after each of them ----------------------------------------------------------------------

    @invariant()
    def sound(self):
        if self.chest is None:
            return
        assert typed(self.chest) == typed(self.model)
        assert len(self.chest) == len(self.model)
        self.chest._check()
        assert self.chest.memory_usage <= self.budget or self.unsaveable()
        if self.other is not None:
            len(self.other)  # takes in what the first has committed
            self.other._check()


class PickleMachine(Machine):
    key_pool = PLAIN_KEYS + OTHER_KEYS
    makers = PICKLED_MAKERS


class JsonMachine(Machine):
    key_pool = PLAIN_KEYS
    makers = JSON_MAKERS
    serializer = {"dump": json.dump, "load": json.load}
    unsaveable_kinds = (FunctionType, set)

    @rule(key=st.sampled_from(OTHER_KEYS))
    def refuse_a_key(self, key):
        if key not in self.model:
            with pytest.raises(KeyTypeError):
                self.chest[key] = 1


GONE = object()


class ConflictMachine(RuleBasedStateMachine):
    """Two handles that change the same keys before either tells the other.

    The model is what was committed, and for each handle what it did since its last flush: a
    handle sees the one under the other, and a flush puts the other over the one.
    """

    def __init__(self):
        super().__init__()
        self.patch = mock.patch.object(chest.upkeep, "COMPACT_BYTES", 1000)
        self.patch.start()
        self.folder = tempfile.TemporaryDirectory()
        path = os.path.join(self.folder.name, "chest")
        self.handles = [Chest(path=path), Chest(path=path)]
        self.committed = {}
        self.pending = [{}, {}]

    def teardown(self):
        try:
            if sys.exception() is None:
                self.flush(0)
                self.flush(1)
                self.sound()
        finally:
            self.patch.stop()
            for handle in self.handles:
                handle.close()
            self.folder.cleanup()

    def view(self, i):
        both = self.committed | self.pending[i]
        return {key: value for key, value in both.items() if value is not GONE}

    which = st.integers(0, 1)
    keys = st.sampled_from(["a", "A", "b"])

    @rule(i=which, key=keys, n=numbers)
    def set(self, i, key, n):
        self.handles[i][key] = [n]
        self.pending[i][key] = [n]

    @rule(i=which, key=keys)
    def delete(self, i, key):
        if self.handles[i].pop(key, None) is not None:
            self.gone(i, key)

    def gone(self, i, key):
        """Note a deletion; of what nobody has committed, nothing is left to be told."""
        self.pending[i].pop(key, None)
        if key in self.committed:
            self.pending[i][key] = GONE

    @rule(i=which, key=keys, n=numbers)
    def delete_and_set(self, i, key, n):
        self.delete(i, key)
        self.set(i, key, n)

    @rule(i=which, key=keys)
    def change_in_place(self, i, key):
        if key in self.handles[i]:
            self.pending[i][key] = [*self.view(i)[key], "more"]
            self.handles[i][key].append("more")

    @rule(i=which)
    def clear(self, i):
        self.handles[i].clear()
        for key in self.view(i):
            self.gone(i, key)

    @rule(i=which)
    def flush(self, i):
        self.handles[i].flush()
        theirs = self.pending[1 - i]
        for key, value in self.pending[i].items():
            self.committed[key] = value
            if value is GONE and theirs.get(key) is GONE:
                del theirs[key]
        self.committed = {k: v for k, v in self.committed.items() if v is not GONE}
        self.pending[i] = {}

    @invariant()
    def sound(self):
        for i, handle in enumerate(self.handles):
            assert {**handle} == self.view(i)
        for handle in self.handles:
            handle._check()


def effort(examples, steps):
    return settings(
        max_examples=examples * max(TIMES, 1),
        stateful_step_count=steps,
        derandomize=not TIMES,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


def test_a_chest_of_pickles_is_a_dict_whatever_is_done_with_it():
    run_state_machine_as_test(PickleMachine, settings=effort(150, 50))


def test_a_chest_of_json_is_a_dict_whatever_is_done_with_it():
    run_state_machine_as_test(JsonMachine, settings=effort(100, 50))


def test_of_two_handles_that_disagree_the_last_commit_wins():
    run_state_machine_as_test(ConflictMachine, settings=effort(100, 40))
