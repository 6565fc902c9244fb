"""What a user of `Chest` may rely on, whatever lies below it."""

from __future__ import annotations

import collections
import copy
import datetime as dt
import decimal
import enum
import errno
import gc
import glob
import gzip
import json
import math
import os
import pickle
import stat
import tempfile
import threading
import uuid
from collections.abc import MutableMapping
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from test import mapping_tests

import chest.core
import chest.staging
from chest import (
    Chest,
    ChestClosedError,
    CorruptIndexError,
    CorruptValueError,
    KeyTypeError,
    ReadOnlyError,
    UnsavedError,
)

JSON = {"dump": json.dump, "load": json.load}
NAN = math.nan
drops_it_open = pytest.mark.filterwarnings("ignore:a chest was not closed:ResourceWarning")


class Color(enum.Enum):
    RED = 1


class Point(NamedTuple):
    x: int
    y: int


def refuse(file):
    """A `load` that nobody may call: it proves that no value was read."""
    raise AssertionError(f"{file} was read")


def store(path, data, **options):
    """Make a chest at `path` that holds `data`."""
    with Chest(path=path, **options) as c:
        c.update(data)


def contents(path):
    """Every file below `path`, with its bytes."""
    return {str(file): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


def temporary_directories():
    return glob.glob(os.path.join(tempfile.gettempdir(), "*.chest"))


def inode(file):
    return os.stat(file).st_ino


@pytest.fixture(params=[1e9, 300, 0], ids=["roomy", "tight", "nothing"])
def budget(request):
    """Bytes that values in memory may take."""
    return request.param


@pytest.fixture
def c(budget):
    """An empty temporary chest."""
    with Chest(available_memory=budget) as made:
        yield made


# -- CPython's own tests of mappings -------------------------------------------------------------
# TestHashMappingProtocol extends TestMappingProtocol, which extends BasicTestMappingProtocol.


class TestInMemory(mapping_tests.TestHashMappingProtocol):
    type2test = Chest
    options = {}

    def _empty_mapping(self):
        return Chest(**self.options)

    def test_constructor(self):
        # The free keywords of dict(x=1, y=2) are options here.
        mapping_tests.BasicTestMappingProtocol.test_constructor(self)
        assert self._empty_mapping() is not self._empty_mapping()
        assert Chest({"x": 1, "y": 2}, **self.options) == {"x": 1, "y": 2}

    def test_mutatingiteration(self):
        # Iteration walks a snapshot of the keys instead of raising.
        d = self._full_mapping({1: 1})
        for key in d:
            d[key + 1] = 1
        assert list(d) == [1, 2]

    def test_repr(self):
        # It tells how much there is, where; it would have to read all values to show them.
        assert "1 keys" in repr(self._full_mapping({"x": "value"}))
        assert "value" not in repr(self._full_mapping({"x": "value"}))

    def test_repr_deep(self):
        d = self._empty_mapping()
        d[1] = d  # what cannot be dumped stays in memory
        assert "1 keys" in repr(d)
        d.clear()


class TestWithoutMemory(TestInMemory):
    options = {"available_memory": 0}

    def test_popitem(self):
        # With 32 pairs instead of 2,048, each of which is a file here.
        def fewer(stop):
            return range(6 if stop == 12 else stop)

        with mock.patch.object(mapping_tests, "range", fewer, create=True):
            mapping_tests.TestMappingProtocol.test_popitem(self)


class TestWithLittleMemory(TestWithoutMemory):
    options = {"available_memory": 400}


class TestGzip(TestWithoutMemory):
    options = {"available_memory": 0, "open": gzip.open}


class TestJSON(mapping_tests.TestMappingProtocol):
    # Not the hash protocol: its keys are of classes that only pickle can store.
    type2test = Chest
    options = {"available_memory": 0, **JSON}
    _empty_mapping = TestInMemory._empty_mapping
    test_constructor = TestInMemory.test_constructor
    test_popitem = TestWithoutMemory.test_popitem

    def _reference(self):
        return {"1": "2", "key1": "value1", "key2": [1, 2, 3]}  # JSON has no tuples


def test_a_chest_is_a_mutable_mapping():
    assert issubclass(Chest, MutableMapping)


# -- order ---------------------------------------------------------------------------------------


def test_keys_come_in_the_order_in_which_they_were_set(c):
    words = ["b", "a", "d", "c", 3, 1, 2]
    for word in words:
        c[word] = [word]
    assert list(c) == list(c.keys()) == words
    assert list(c.values()) == [[word] for word in words]
    assert list(c.items()) == [(word, [word]) for word in words]


def test_order_does_not_depend_on_what_left_memory_first(path):
    with Chest(path=path) as c:
        c.update({"b": 1, "a": 2, "d": 3, "c": 4})
        for key in ["c", "a", "d", "b"]:
            c.move_to_disk(key)
        assert list(c) == ["b", "a", "d", "c"]
    with Chest(path=path) as c:
        assert list(c) == ["b", "a", "d", "c"]


def test_order_does_not_depend_on_sizes(path):
    with Chest(path=path, available_memory=500) as c:
        for n, key in enumerate("gfedcba"):
            c[key] = bytes(1 + 150 * (n % 3))
    with Chest(path=path) as c:
        assert list(c) == list("gfedcba")


def test_a_key_set_again_keeps_its_place(path, budget):
    with Chest(path=path, available_memory=budget) as c:
        c.update(b=1, a=2, c=3)
        c.flush()
        c["b"] = 4
        c["a"] = 5
        assert list(c) == ["b", "a", "c"]
    with Chest(path=path) as c:
        assert list(c.items()) == [("b", 4), ("a", 5), ("c", 3)]


def test_a_key_deleted_and_set_again_comes_last(path, budget):
    with Chest(path=path, available_memory=budget) as c:
        c.update(b=1, a=2, c=3)
        c.flush()
        del c["b"]
        c["b"] = 4
        assert list(c) == ["a", "c", "b"]
    with Chest(path=path) as c:
        assert list(c.items()) == [("a", 2), ("c", 3), ("b", 4)]


def test_keys_of_later_sessions_come_after_those_of_earlier_ones(path):
    store(path, {"z": 1, 2: 2})
    store(path, {"a": 3, 1: 4})
    with Chest(path=path) as c:
        assert list(c) == ["z", 2, "a", 1]


def test_order_survives_when_keys_of_classes_stand_between_plain_ones(path):
    keys = ["b", dt.date(2026, 1, 1), "a", Color.RED, 3]
    store(path, dict.fromkeys(keys))
    with Chest(path=path) as c:
        assert list(c) == keys


def test_order_after_clear_starts_anew(path, budget):
    with Chest(path=path, available_memory=budget) as c:
        c.update(a=1, b=2)
        c.flush()
        c.clear()
        c.update(b=3, a=4)
        assert list(c) == ["b", "a"]
    with Chest(path=path) as c:
        assert list(c.items()) == [("b", 3), ("a", 4)]


# -- views ---------------------------------------------------------------------------------------


def test_views_are_live(c):
    keys, values, items = c.keys(), c.values(), c.items()
    c["x"] = 1
    assert (list(keys), list(values), list(items)) == (["x"], [1], [("x", 1)])
    del c["x"]
    assert (len(keys), len(values), len(items)) == (0, 0, 0)


def test_views_contain_what_the_chest_contains(c):
    c.update(x=[1], y=2)
    assert "x" in c.keys()  # noqa: SIM118 -- the view is what is tested
    assert "z" not in c.keys()  # noqa: SIM118 -- the same
    assert [1] in c.values()
    assert 3 not in c.values()
    assert ("x", [1]) in c.items()
    assert ("x", 2) not in c.items()
    assert ("z", 2) not in c.items()


@pytest.mark.parametrize("view", [Chest.keys, Chest.values, Chest.items])
def test_views_have_the_chest_to_look_at(c, view):
    mapping = view(c).mapping
    assert dict(mapping) == dict(c)
    c["of late"] = 1
    assert mapping["of late"] == 1
    with pytest.raises(TypeError, match="does not support item assignment"):
        mapping["x"] = 1


def test_views_can_be_reversed(c):
    c.update(x=1, y=2, z=3)
    assert list(reversed(c)) == ["z", "y", "x"]
    assert list(reversed(c.keys())) == ["z", "y", "x"]
    assert list(reversed(c.values())) == [3, 2, 1]
    assert list(reversed(c.items())) == [("z", 3), ("y", 2), ("x", 1)]


def test_keys_are_a_set(c):
    c.update(x=1, y=2)
    keys = c.keys()
    assert keys == {"x", "y"}
    assert keys & {"x", "z"} == {"x"}
    assert keys | {"z"} == {"x", "y", "z"}
    assert keys - {"x"} == {"y"}
    assert {"x", "z"} - keys == {"z"}
    assert keys ^ {"x", "z"} == {"y", "z"}
    assert keys < {"x", "y", "z"}
    assert keys.isdisjoint({"z"})


def test_items_are_a_set(c):
    c.update(x=1, y=2)
    items = c.items()
    assert items == {("x", 1), ("y", 2)}
    assert items & {("x", 1), ("y", 3)} == {("x", 1)}
    assert items | {("z", 3)} == {("x", 1), ("y", 2), ("z", 3)}
    assert items - {("x", 1)} == {("y", 2)}
    assert items >= {("y", 2)}
    assert items.isdisjoint({("x", 2)})


# -- single keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["missing", 1, ("a", 1), None])
@pytest.mark.parametrize(
    "action",
    [
        lambda c, key: c[key],
        lambda c, key: c.__delitem__(key),
        lambda c, key: c.pop(key),
        lambda c, key: c.move_to_disk(key),
        lambda c, key: c.get_from_disk(key),
        lambda c, key: c.prefetch([key]),
    ],
    ids=["get", "del", "pop", "move_to_disk", "get_from_disk", "prefetch"],
)
def test_a_missing_key_is_a_key_error_with_the_bare_key(c, action, key):
    with pytest.raises(KeyError) as caught:
        action(c, key)
    assert type(caught.value) is KeyError
    assert caught.value.args == (key,)


def test_a_failed_deletion_deletes_nothing(path):
    with Chest(path=path) as c:
        c["1"] = "kept"
        c.flush()
        with pytest.raises(KeyError):
            del c[1]
        assert c == {"1": "kept"}
    with Chest(path=path) as c:
        assert c == {"1": "kept"}


@pytest.mark.parametrize(
    "action",
    [
        lambda c: c[[]],
        lambda c: c.__setitem__([], 1),
        lambda c: c.__delitem__([]),
        lambda c: [] in c,
        lambda c: c.pop([]),
        lambda c: c.setdefault([], 1),
    ],
    ids=["get", "set", "del", "in", "pop", "setdefault"],
)
def test_an_unhashable_key_is_a_type_error_as_in_dict(c, action):
    with pytest.raises(TypeError, match="unhashable"):
        action(c)
    assert len(c) == 0


def test_popitem_takes_the_pair_set_last(c):
    c.update(x=1, y=2, z=3)
    c["x"] = 4
    assert [c.popitem(), c.popitem(), c.popitem()] == [("z", 3), ("y", 2), ("x", 4)]


def test_popitem_leaves_nothing_that_the_next_one_would_walk_over(c):
    """As ``del`` does, for a dict keeps the places of keys that were deleted."""

    class Kept(dict):
        def __delitem__(self, key):
            raise AssertionError(key)

    c.update((n, None) for n in range(100))
    c._memory.ledger.rows = Kept(c._memory.ledger.rows)
    assert [c.popitem()[0] for _ in range(100)] == [*range(99, -1, -1)]


def test_popitem_takes_no_key_that_a_hook_sets_meanwhile(path):
    def on_miss(key):
        c.setdefault("new", key)

    Chest({"a": [1], "b": [2]}, path=path).close()
    with Chest(path=path, on_miss=on_miss) as c:
        assert c.popitem() == ("b", [2])
        assert dict(c) == {"a": [1], "new": "b"}


def test_popitem_of_an_empty_chest_is_a_key_error(c):
    with pytest.raises(KeyError):
        c.popitem()


def test_pop_removes_the_key_for_good(path, budget):
    with Chest(path=path, available_memory=budget) as c:
        c.update(x=[1], y=[2])
        c.flush()
        assert c.pop("x") == [1]
        assert c.pop("x", "default") == "default"
        assert c.pop("x", None) is None
    with Chest(path=path) as c:
        assert c == {"y": [2]}
        assert sorted(os.listdir(path)) == [".keys", "y"]


def test_setdefault_sets_what_is_missing_and_keeps_what_is_there(c):
    assert c.setdefault("x", 1) == 1
    assert c.setdefault("x", 2) == 1
    assert c.setdefault("y") is None
    assert c == {"x": 1, "y": None}


def test_what_setdefault_returns_may_be_changed_in_place(c):
    for n in range(3):
        c.setdefault("x", []).append(n)
        c.setdefault("y", set()).add(n)
    assert c == {"x": [0, 1, 2], "y": {0, 1, 2}}


def test_get_returns_a_default_for_a_missing_key(c):
    c["x"] = None
    assert c.get("x", 1) is None
    assert c.get("y", 1) == 1
    assert c.get("y") is None
    assert list(c) == ["x"]


def test_none_is_a_value_like_others(path, budget):
    with Chest(path=path, available_memory=budget) as c:
        c["x"] = None
        assert "x" in c
        assert c["x"] is None
        assert c.pop("x", 1) is None
        c["x"] = None
    with Chest(path=path) as c:
        assert c == {"x": None}


# -- whole mappings ------------------------------------------------------------------------------


class KeysOnly:
    """What `dict.update` takes for a mapping, and is none."""

    def keys(self):
        return ["x", "y"]

    def __getitem__(self, key):
        return key.upper()


@pytest.mark.parametrize(
    "other",
    [
        {"x": "X", "y": "Y"},
        collections.UserDict(x="X", y="Y"),
        [("x", "X"), ["y", "Y"]],
        [*{"x": "X", "y": "Y"}.items()],
        KeysOnly(),
        ["xX", "yY"],
    ],
    ids=["dict", "mapping", "pairs", "items", "keys and getitem", "strings of two"],
)
def test_update_takes_what_dict_takes(c, other):
    c.update(other)
    assert c == {"x": "X", "y": "Y"}


def test_update_takes_an_iterator_of_pairs(c):
    c.update((key, key.upper()) for key in "xy")
    assert c == {"x": "X", "y": "Y"}


def test_update_takes_keywords_even_those_named_as_its_parameters(c):
    c.update({"x": 1}, x=2, self=3, other=4)
    assert c == {"x": 2, "self": 3, "other": 4}


def test_update_with_nothing_changes_nothing(c):
    c["x"] = 1
    c.update()
    c.update({})
    c.update([])
    assert c == {"x": 1}


@pytest.mark.parametrize("other", [None, 5, [1], [(1, 2, 3)]])
def test_update_refuses_what_dict_refuses(c, other):
    with pytest.raises((TypeError, ValueError)):
        c.update(other)
    assert c == {}


@pytest.mark.parametrize("kind", [dict, lambda data: [*data.items()], Chest])
def test_update_without_overwriting_adds_new_keys_only(c, kind):
    c.update(x=1, y=2)
    c.update(kind({"y": 3, "z": 4}), overwrite=False)
    assert c == {"x": 1, "y": 2, "z": 4}
    c.update(overwrite=False, x=5, w=6)
    assert c == {"x": 1, "y": 2, "z": 4, "w": 6}


def test_update_of_a_chest_with_itself_changes_nothing(path, budget):
    with Chest(path=path, available_memory=budget) as c:
        c.update(x=[1], y=[2])
        c.flush()
        before = contents(path)
        c.update(c)
        c.flush()
        assert contents(path) == before
        assert list(c.items()) == [("x", [1]), ("y", [2])]
    with Chest(path=path) as c:
        assert list(c.items()) == [("x", [1]), ("y", [2])]


def test_update_with_another_handle_on_the_same_directory_changes_nothing(path):
    with Chest(path=path) as c, Chest(path=path) as other:
        c.update(x=[1], y=[2])
        c.flush()
        c.update(other)
        assert list(c.items()) == [("x", [1]), ("y", [2])]
    with Chest(path=path) as c:
        assert list(c.items()) == [("x", [1]), ("y", [2])]


def test_update_with_a_chest_links_files(tmp_path):
    with Chest(path=tmp_path / "a") as a, Chest(path=tmp_path / "b") as b:
        a["x"] = [1, 2, 3]
        b.update(a)
        assert inode(a.key_to_filename("x")) == inode(b.key_to_filename("x"))
        assert b == {"x": [1, 2, 3]}


def test_update_with_a_chest_copies_files_where_links_fail(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    with Chest(path=tmp_path / "a") as a, Chest(path=tmp_path / "b") as b:
        a["x"] = [1, 2, 3]
        monkeypatch.setattr(os, "link", link)
        b.update(a)
        assert inode(a.key_to_filename("x")) != inode(b.key_to_filename("x"))
        assert b == {"x": [1, 2, 3]}


def test_update_with_a_chest_loads_nothing(tmp_path):
    store(tmp_path / "a", {"x": [1], "y": [2]})
    with Chest(path=tmp_path / "a", load=refuse) as a:
        with Chest(path=tmp_path / "b", load=refuse) as b:
            b.update(a)
    with Chest(path=tmp_path / "b") as b:
        assert list(b.items()) == [("x", [1]), ("y", [2])]


def test_update_with_a_chest_keeps_its_order_and_what_cannot_be_written(c):
    with Chest() as other:
        other["a"] = 1
        other["f"] = function = lambda: 1  # no pickle
        other["b"] = 2
        c["b"] = 0
        c.update(other)
        assert list(c) == ["b", "a", "f"]
        assert c["f"] is function
        assert (c["a"], c["b"]) == (1, 2)


def test_update_with_a_chest_of_another_serializer_converts(tmp_path):
    with Chest(path=tmp_path / "a") as a, Chest(path=tmp_path / "b", **JSON) as b:
        a["x"] = [1, 2, 3]
        b.update(a)
        b.flush()
        with open(b.key_to_filename("x")) as file:
            assert json.load(file) == [1, 2, 3]


def test_update_with_a_compressed_chest_decompresses(tmp_path):
    with Chest(path=tmp_path / "a", open=gzip.open) as a, Chest(path=tmp_path / "b") as b:
        a["x"] = [1, 2, 3]
        b.update(a)
        b.flush()
        with open(b.key_to_filename("x"), "rb") as file:
            assert pickle.load(file) == [1, 2, 3]


def test_linked_values_are_independent(tmp_path):
    with Chest(path=tmp_path / "a") as a, Chest(path=tmp_path / "b") as b:
        a.update(x=[1], y=[2])
        b.update(a)
        b["x"].append(3)
        del a["y"]
    with Chest(path=tmp_path / "a") as a, Chest(path=tmp_path / "b") as b:
        assert a == {"x": [1]}
        assert b == {"x": [1, 3], "y": [2]}


def test_update_in_place_with_an_operator(c):
    same = c
    c["x"] = 1
    c |= {"y": 2}
    c |= [("z", 3)]
    assert c is same
    assert c == {"x": 1, "y": 2, "z": 3}


def test_union_is_a_new_chest(c):
    c.update(x=1, y=2)
    with c | {"y": 3, "z": 4} as union:
        assert isinstance(union, Chest)
        assert list(union.items()) == [("x", 1), ("y", 3), ("z", 4)]
    assert c == {"x": 1, "y": 2}


@pytest.mark.parametrize("kind", [dict, collections.UserDict])
def test_union_with_a_mapping_on_the_left(c, kind):
    c.update(x=1, y=2)
    with kind({"y": 3, "z": 4}) | c as union:
        assert isinstance(union, Chest)
        assert list(union.items()) == [("y", 2), ("z", 4), ("x", 1)]


def test_union_of_two_chests(c):
    c.update(x=1, y=2)
    with Chest({"y": 3, "z": 4}) as other, c | other as union:
        assert list(union.items()) == [("x", 1), ("y", 3), ("z", 4)]


@pytest.mark.parametrize("other", [None, 5, [("x", 1)]])
def test_union_takes_mappings_only_as_in_dict(c, other):
    with pytest.raises(TypeError):
        c | other
    with pytest.raises(TypeError):
        other | c


@pytest.mark.parametrize("make", [Chest.copy, copy.copy])
def test_a_copy_is_independent(c, make):
    c.update(x=[1], y=[2])
    with make(c) as new:
        assert type(new) is Chest
        assert list(new.items()) == [("x", [1]), ("y", [2])]
        new["x"] = [3]
        del new["y"]
        assert c == {"x": [1], "y": [2]}


def test_a_copy_has_the_same_options_and_a_directory_of_its_own(path):
    with Chest(path=path, available_memory=123, nbytes=len, mode="t", **JSON) as c:
        c["x"] = [1, 2, 3]
        with c.copy() as new:
            assert (new.available_memory, new.dump, new.load, new.mode) == (
                123,
                json.dump,
                json.load,
                "t",
            )
            new.prefetch("x")
            assert new.memory_usage == 3
            folder = new.path
            assert folder != path
    assert not os.path.exists(folder)
    assert os.path.exists(path)


def test_a_copy_holds_what_cannot_be_written_as_the_same_object(c):
    c["f"] = function = lambda: 1  # no pickle
    with c.copy() as new:
        assert new["f"] is function


def test_equality_compares_pairs_in_any_order(c):
    c.update(x=[1], y=2)
    assert c == {"y": 2, "x": [1]}
    assert {"y": 2, "x": [1]} == c  # noqa: SIM300 -- reflected
    assert c == collections.UserDict(x=[1], y=2)
    assert c == c
    with Chest({"y": 2, "x": [1]}) as other:
        assert c == other
    assert c != {"x": [1]}
    assert c != {"x": [1], "y": 3}
    assert c != {"x": [1], "z": 2}
    assert c != {"x": [1], "y": 2, "z": 3}
    assert c != [("x", [1]), ("y", 2)]
    assert c != 5


def test_equality_does_not_load_everything_at_once(tmp_path):
    data = {n: bytes([n]) * 100 for n in range(50)}
    with Chest(data, available_memory=1000, nbytes=len) as c:
        with Chest(data, available_memory=1000, nbytes=len) as other:
            hot = {*c.inmem}
            assert hot
            assert c == other
            assert hot <= {*c.inmem}
            assert c.memory_usage <= 1000
            assert other.memory_usage <= 1000


def test_a_chest_is_not_hashable(c):
    with pytest.raises(TypeError):
        hash(c)


def test_an_empty_chest_is_false(c):
    assert not c
    c["x"] = 0
    assert c


def test_fromkeys():
    with Chest.fromkeys("xy", 1) as c, Chest.fromkeys(["x"]) as none:
        assert type(c) is Chest
        assert list(c.items()) == [("x", 1), ("y", 1)]
        assert none == {"x": None}


# -- iterating while changing --------------------------------------------------------------------


def test_values_may_be_set_while_iterating(c):
    c.update({n: [n] for n in range(20)})
    for key in c:
        c[key] = [key, key]
    for key, value in c.items():
        c[key] = [*value, key]
    assert c == {n: [n, n, n] for n in range(20)}


@pytest.mark.parametrize("turn", [iter, reversed])
def test_all_iterators_walk_the_keys_of_the_moment_when_they_are_made(c, turn):
    c.update(a=1, b=2)
    keys, more, values, items = map(turn, (c, c.keys(), c.values(), c.items()))
    c["c"] = 3
    assert {*keys} == {*more} == {"a", "b"}
    assert {*values} == {1, 2}
    assert {*items} == {("a", 1), ("b", 2)}


def test_keys_may_be_added_while_iterating(c):
    c.update({n: [n] for n in range(20)})
    for key in c:
        c[key + 20] = [key]
    assert list(c) == list(range(40))


@pytest.mark.parametrize("view", ["__iter__", "keys", "items", "__reversed__"])
def test_keys_may_be_deleted_while_iterating(c, view):
    c.update({n: [n] for n in range(20)})
    seen = 0
    for key in getattr(c, view)():
        del c[key[0] if view == "items" else key]
        seen += 1
    assert seen == 20
    assert c == {}


def test_iterating_skips_what_has_been_deleted_meanwhile(c):
    c.update({n: [n] for n in range(6)})
    seen = []
    for key, value in c.items():
        seen.append((key, value))
        c.pop(key + 1)
    assert seen == [(0, [0]), (2, [2]), (4, [4])]


def test_a_chest_may_be_cleared_while_iterating(c):
    c.update({n: [n] for n in range(6)})
    seen = []
    for value in c.values():
        seen.append(value)
        c.clear()
    assert seen == [[0]]


# -- what reads no value -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (len, 2),
        (lambda c: "x" in c, True),
        (lambda c: "z" in c, False),
        (bool, True),
        (list, ["x", "y"]),
        (lambda c: list(reversed(c)), ["y", "x"]),
        (lambda c: list(c.keys()), ["x", "y"]),
        (lambda c: "x" in c.keys(), True),  # noqa: SIM118 -- the view is what is tested
        (lambda c: c.keys() & {"x"}, {"x"}),
        (lambda c: len(c.values()), 2),
        (lambda c: len(c.items()), 2),
        (lambda c: ("z", 1) in c.items(), False),
        (lambda c: c == {"x": 1}, False),
        (lambda c: c.get("z"), None),
        (lambda c: c.pop("z", 1), 1),
        (lambda c: c.setdefault("z", 1), 1),
        (lambda c: c.__setitem__("x", 1), None),
        (lambda c: c.__delitem__("x"), None),
        (lambda c: c.move_to_disk("x"), None),
        (lambda c: c.clear(), None),
        (lambda c: c.flush(), None),
        (lambda c: c.write_keys(), None),
        (lambda c: c.shrink(), None),
        (lambda c: os.path.basename(c.key_to_filename("x")), "x"),
        (lambda c: repr(c).count("2 keys"), 1),
    ],
)
def test_what_needs_no_value_reads_none(path, action, expected):
    store(path, {"x": [1], "y": [2]})
    with Chest(path=path, load=refuse) as c:
        assert action(c) == expected


def test_iterating_over_values_pushes_nothing_out_of_memory():
    with Chest(available_memory=1000, nbytes=len) as c:
        c.update({n: bytes([n]) * 100 for n in range(50)})
        hot = {*c.inmem}
        assert hot
        assert [*c.values()] == [bytes([n]) * 100 for n in range(50)]
        assert [*c.items()] == [(n, bytes([n]) * 100) for n in range(50)]
        assert [*reversed(c.values())] == [bytes([n]) * 100 for n in reversed(range(50))]
        assert b"nowhere" not in c.values()
        assert hot <= {*c.inmem}
        assert c.memory_usage <= 1000


def test_iterating_over_values_does_not_push_out_even_what_was_read_once(path):
    data = {n: bytes([n]) * 100 for n in range(50)}
    store(path, data)
    with Chest(path=path, available_memory=1000, nbytes=len) as c:
        for n in range(10):
            assert c[n] == data[n]
        before = {*c.inmem}
        assert before == {*range(10)}
        assert [*c.values()] == [*data.values()]
        assert [*c.items()] == [*data.items()]
        assert c == data
        assert {*c.inmem} == before


def test_values_that_are_iterated_over_may_be_changed_in_place(c):
    c.update({n: [n] for n in range(20)})
    for value in c.values():
        value.append("changed")
    assert c == {n: [n, "changed"] for n in range(20)}


# -- keys ----------------------------------------------------------------------------------------


def test_numbers_that_are_equal_are_one_key(path, budget):
    with Chest(path=path, available_memory=budget) as c:
        c[1] = "int"
        c[1.0] = "float"
        c[True] = "bool"
        assert c == {1: "bool"}
    with Chest(path=path) as c:
        assert [type(key) for key in c] == [int]  # a dict keeps the key it got first, too
        assert (c[1], c[1.0], c[True], c[Fraction(1)]) == ("bool",) * 4


class Number(enum.IntEnum):
    ONE = 1


class Letter(enum.StrEnum):
    A = "a"


ALIASES = [
    pytest.param(1, np.int64(1), id="number of numpy"),
    pytest.param(1, Number.ONE, id="enum of numbers"),
    pytest.param("a", Letter.A, id="enum of text"),
    pytest.param(("x", 1), ("x", np.int64(1)), id="in a tuple"),
]


def read_in_place_of_it(c, key, alias):
    c[alias]
    c[key].append(5)


def prefetch_in_place_of_it(c, key, alias):
    c.prefetch([alias])
    c[key].append(5)


def move_to_disk(c, key, alias):
    c[key] = [1, 5]
    c.move_to_disk(alias)


def fall_back(c, key, alias):
    with pytest.raises(LookupError), c.transaction():
        c.pop(alias)
        raise LookupError
    assert [*map(type, c)] == [int, type(key)]
    c[key].append(5)
    c.compact()


@pytest.mark.parametrize(
    "change",
    [
        lambda c, key, alias: c[alias].append(5),
        read_in_place_of_it,
        prefetch_in_place_of_it,
        move_to_disk,
        lambda c, key, alias: c.setdefault(alias, []).append(5),
        lambda c, key, alias: c.pop(alias),
        lambda c, key, alias: c.__delitem__(alias),
        fall_back,
    ],
    ids=["change", "read", "prefetch", "move", "setdefault", "pop", "delete", "roll back"],
)
@pytest.mark.parametrize(("key", "alias"), ALIASES)
@pytest.mark.parametrize("name", ["pickle", "json"])
def test_what_equals_a_key_is_not_taken_for_it_on_disk(path, budget, change, key, alias, name):
    options = {"dump": json.dump, "load": json.load} if name == "json" else {}
    store(path, {0: [0], key: [1]}, **options)
    with Chest(path=path, available_memory=budget, **options) as c:
        change(c, key, alias)
        expected = dict(c)
        if key in c:
            assert c.key_to_filename(alias) == c.key_to_filename(key)
        c._check()
    assert expected in ({0: [0], key: [1, 5]}, {0: [0]})
    with Chest(path=path, readonly=True, **options) as c:
        assert c == expected
        assert [*map(type, c)] == [*map(type, [0, key][: len(c)])]
        assert not c._memory.ledger.unreadable
    assert b"numpy" not in read_index(path)
    assert b"test_core" not in read_index(path)


def read_index(path):
    with open(os.path.join(path, ".keys"), "rb") as file:
        return file.read()


def test_keys_that_need_a_class_are_told_apart_from_what_they_equal(path, budget):
    keys = [dt.date(2026, 1, 1), dt.timedelta(1), Fraction(1, 3), Number.ONE]
    store(path, {key: [1] for key in keys}, available_memory=budget)
    with Chest(path=path, available_memory=budget) as c:
        for key in keys:
            c[key].append(2)
        del c[1], c[Fraction(2, 6)]
    with Chest(path=path) as c:
        assert c == {key: [1, 2] for key in keys[:2]}


class Contrary:
    """A key that cannot be compared with what is none of its kind."""

    def __init__(self, n):
        self.n = n

    def __hash__(self):
        return hash(self.n)

    def __eq__(self, other):
        return self.n == other.n


def test_a_key_that_compares_with_no_other_is_deleted(path, budget):
    with Chest({Contrary(n): n for n in range(3)}, path, available_memory=budget) as c:
        c.flush()
        del c[Contrary(1)]
        c[Contrary(2)] = "new"
    with Chest(path=path) as c:
        assert {key.n: value for key, value in c.items()} == {0: 0, 2: "new"}


CLASSES = [
    pytest.param(np.int64(1), 1, id="number of numpy"),
    pytest.param(np.int64(1), np.int32(1), id="two numbers of numpy"),
    pytest.param(Letter.A, "a", id="enum of text"),
    pytest.param(Fraction(1), True, id="fraction"),
    pytest.param(("t", Number.ONE), ("t", 1), id="in a tuple"),
    pytest.param(1, np.int64(1), id="plain first"),
    pytest.param(True, 1.0, id="both plain"),
]


@pytest.mark.parametrize(("first", "then"), CLASSES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_key_is_one_also_for_those_who_load_no_class(path, budget, first, then, packed):
    others = dict.fromkeys(range(1000, 1100)) if packed else {}
    with Chest({first: "old", **others}, path, available_memory=budget) as c:
        c.flush()
        c[then] = "new"
    assert chest.repair(path).ok
    with Chest(path=path, available_memory=budget) as c:
        assert c[then] == c[first] == "new"
        assert type(next(iter(c))) is type(first)
        del c[then]
    assert chest.repair(path).ok
    with Chest(path=path) as c:
        assert first not in c


@pytest.mark.parametrize(("first", "then"), CLASSES)
@pytest.mark.parametrize("delete", [False, True])
def test_so_it_is_where_two_handles_name_it(path, first, then, delete):
    with Chest(path=path) as a, Chest(path=path) as b:
        a[then] = "a"
        b[first] = "b"
        b["z"] = 1
        b.flush()
        if delete:
            del a[then]
        a.flush()
        a._check()
        kinds = [*map(type, a)]
    report = chest.repair(path)
    assert report.ok, report
    with Chest(path=path) as c:
        assert c == ({"z": 1} if delete else {then: "a", "z": 1})
        assert [*map(type, c)] == kinds


@pytest.mark.parametrize("staged", [False, True])
def test_what_equals_keys_is_not_taken_for_them_in_packs(path, budget, staged, monkeypatch):
    if staged:  # packs of their own
        monkeypatch.setattr(chest.staging, "STREAM_BYTES", 100)
    store(path, dict.fromkeys(range(200), "old"))
    with Chest(path=path, available_memory=budget) as c:
        for n in np.arange(200):
            c[n] = "new"
    with Chest(path=path) as c:
        assert c == dict.fromkeys(range(200), "new")
        assert {*map(type, c)} == {int}
    assert b"numpy" not in read_index(path)


def test_what_equals_a_key_gives_it_no_other_name(path):
    with Chest({1: "v"}, path) as c:
        assert c.key_to_filename(np.int64(1)) == c.key_to_filename(1)
        c.flush()
        assert c.key_to_filename(np.int64(1)) == c.key_to_filename(1)


def test_a_key_that_another_handle_names_keeps_its_place(path):
    with Chest(path=path) as a, Chest(path=path) as b:
        a.update({"x": 1, 1: 2, "y": 3})
        b[np.int64(1)] = 4
        b.flush()
        len(a)
        seen = list(a)
        a.flush()
        assert list(b) == list(a) == seen
    with Chest(path=path) as c:
        assert list(c) == seen


def test_what_equals_a_key_need_not_be_picklable(path, budget):
    class Local(int):
        pass

    store(path, {1: ["a"]})
    with Chest(path=path, available_memory=budget) as c:
        c[Local(1)].append("b")
    with Chest(path=path) as c:
        assert c == {1: ["a", "b"]}


def test_keys_are_not_compared_with_those_that_they_cannot_equal(path):
    store(path, {("a", "b"): [1], 1: "v"})
    with Chest(path=path) as c:
        c["a", "b"], c[np.int64(1)]
        c["z"] = "z"
        c.available_memory = 0
        assert not c.inmem
        c._check()


@pytest.mark.parametrize("alias", [True, 1.0])
def test_a_key_is_as_it_was_first_set_wherever_its_value_went(path, alias):
    with Chest(path=path) as c:
        c[1] = "int"
        c[alias] = "alias"
        c.available_memory = 0
        assert [*map(type, c)] == [int]
    with Chest(path=path) as c:
        assert [*map(type, c)] == [int]
        with pytest.raises(LookupError), c.transaction():
            del c[alias]
            raise LookupError
        assert [*map(type, c)] == [int]


def test_a_number_and_its_digits_are_two_keys(path, budget):
    data = {1: "int", "1": "str", b"1": "bytes", (1,): "tuple", ("1",): "tuple of str"}
    store(path, data, available_memory=budget)
    with Chest(path=path) as c:
        assert c == data


def test_nan_is_found_as_the_same_object(path, budget):
    with Chest(path=path, available_memory=budget) as c:
        c[NAN] = 1
        c.flush()
        assert c[NAN] == 1
        c[NAN] = 2
        assert [math.isnan(key) for key in c] == [True]
        assert c[NAN] == 2
        assert float("nan") not in c
    with Chest(path=path) as c:
        (key,) = c
        assert math.isnan(key)
        assert c[key] == 2
        del c[key]
    with Chest(path=path) as c:
        assert len(c) == 0


def test_a_tuple_with_nan_is_found_as_the_same_object(path, budget):
    key = ("a", NAN)
    with Chest(path=path, available_memory=budget) as c:
        c[key] = 1
        c.flush()
        c[key] = 2
        assert len(c) == 1
        assert c[key] == 2
        del c[key]
        c.flush()
    with Chest(path=path) as c:
        assert len(c) == 0


class Alone:
    """Equal to nothing but itself."""


@pytest.mark.parametrize(
    "key",
    [float("nan"), ("a", float("nan")), frozenset({float("nan")}), Alone(), ("a", Alone())],
    ids=["nan", "in a tuple", "in a set", "object", "object in a tuple"],
)
def test_a_key_that_nobody_could_find_again_is_told_and_not_stored(path, key):
    with Chest({"other": 1, key: "first"}, path=path) as c:
        with pytest.raises(UnsavedError) as info:
            c.flush()
        assert info.value.keys == [key]
        assert isinstance(info.value.causes[0], KeyTypeError)
        assert "not equal to its own copy" in str(info.value.causes[0])
        assert c[key] == "first"
        c._check()
        del c[key]
    with Chest(path=path) as c:
        assert c == {"other": 1}


def test_a_copy_has_its_keys_in_the_same_order_wherever_their_values_lie():
    data = {n: "small" if n % 2 else bytes(5000) for n in range(200)}
    with Chest(data) as c:
        c.flush()
        with c.copy() as d, Chest() | c as e, Chest() as f:
            f.update(c)
            assert [*d] == [*e] == [*f] == [*data]
            assert d == e == f == data


KEYS = [
    "x",
    "",
    ".",
    "..",
    "../x",
    "/x",
    ".keys",
    "~x",
    "a b",
    "nul",
    "x" * 300,
    "é",
    "e\u0301",
    "\ud800",
    "\0",
    "\n",
    b"x",
    b"",
    b"\xff",
    0,
    -1,
    2**100,
    1.5,
    -0.5,
    math.inf,
    False,
    None,
    1j,
    (),
    (1,),
    ("a", ("b", "c")),
    ("a", "b", "c"),
    ("a", 1, None),
    ("..", "x"),
    frozenset(),
    frozenset({1, "a", (2, 3)}),
    ...,
    dt.date(2026, 1, 1),
    dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    dt.timedelta(1),
    decimal.Decimal("1.50"),
    Fraction(1, 3),
    uuid.UUID(int=1),
    Color.RED,
    Point(1, 2),
    range(3),
    np.float64(0.25),
    np.int32(7),
    np.datetime64("2026-01-01"),
    np.str_("numpy"),
    int,
    len,
]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: ascii(key)[:30])
def test_any_hashable_key_works_and_keeps_its_type(path, key):
    with Chest(path=path, available_memory=0) as c:
        c[key] = [1]
        assert key in c
        assert c[key] == [1]
        c[key] = [2]
    with Chest(path=path) as c:
        assert list(c) == [key]
        assert type(next(iter(c))) is type(key)
        assert key in c
        assert c.pop(key) == [2]
    with Chest(path=path) as c:
        assert len(c) == 0
        assert os.listdir(path) == [".keys"]


def test_many_kinds_of_keys_live_side_by_side(path, budget):
    keys = [*KEYS, "_a", "a", "A", ("a",), ("a", "b"), ("_a", "b"), ("A", "b"), "_A"]
    data = {key: [n] for n, key in enumerate(keys)}
    with Chest(path=path, available_memory=budget) as c:
        c.update(data)
        c.flush()
        assert len({c.key_to_filename(key).lower() for key in c}) == len(data)
    with Chest(path=path) as c:
        assert dict(c) == data
        assert list(c) == list(data)


def test_a_key_that_only_pickle_can_store_is_refused_by_other_serializers():
    with Chest(**JSON) as c:
        with pytest.raises(KeyTypeError) as caught:
            c[dt.date(2026, 1, 1)] = 1
        assert caught.value.key == dt.date(2026, 1, 1)
        assert len(c) == 0


def test_json_keeps_the_types_of_keys(path):
    data = {1: 1, "1": 2, (1, "a"): 3, None: 4, 1.5: 5, b"x": 6, frozenset({1}): 7}
    store(path, data, **JSON)
    with Chest(path=path, **JSON) as c:
        assert list(c.items()) == list(data.items())


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, -0.001, NAN, -math.inf])
def test_a_budget_has_to_be_a_number_of_bytes(c, bad):
    with pytest.raises(ValueError, match="available_memory"):
        Chest(available_memory=bad)
    before = c.available_memory
    with pytest.raises(ValueError, match="available_memory"):
        c.available_memory = bad
    assert c.available_memory == before


def test_a_budget_may_be_without_limit_or_left_out():
    with Chest(available_memory=math.inf) as c, Chest(available_memory=None) as d, Chest() as e:
        c["x"] = 1
        assert "x" in c.inmem
        assert "inf" in repr(c)
        assert d.available_memory == e.available_memory == 1e9


@pytest.mark.parametrize("bad", ["", "x", "wb", 1])
def test_mode_has_to_be_t_or_b(bad):
    with pytest.raises(ValueError, match="mode"):
        Chest(mode=bad)


@pytest.mark.parametrize(
    ("mode", "serializer"), [("t", JSON), ("b", {}), (None, JSON), (None, {})]
)
def test_mode_may_be_given_or_found_out(path, mode, serializer):
    store(path, {"x": [1]}, mode=mode, **serializer)
    with Chest(path=path, mode=mode, **serializer) as c:
        assert c.mode == mode
        assert c["x"] == [1]


def test_an_empty_path_is_refused():
    with pytest.raises(ValueError, match="path"):
        Chest(path="")


def test_a_path_that_is_a_file_is_refused_and_the_file_kept(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(OSError, match="file"):
        Chest(path=file)
    with pytest.raises(OSError, match="file"):
        Chest(path=file / "below")
    assert file.read_text() == "kept"


def test_a_path_may_be_a_path_object_with_parents_still_to_be_made(tmp_path):
    with Chest(path=tmp_path / "a" / "b") as c:
        assert c.path == str(tmp_path / "a" / "b")
        assert os.path.isdir(c.path)


def test_a_relative_path_means_what_it_meant_when_the_chest_was_made(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Chest(path="chest") as c:
        monkeypatch.chdir("elsewhere")
        c["x"] = [1]
        c.flush()
        c.move_to_disk("x")
        assert c["x"] == [1]
        assert c.path == str(tmp_path / "chest")
    assert sorted(os.listdir(tmp_path / "chest")) == [".keys", "x"]
    assert os.listdir(tmp_path / "elsewhere") == []


def test_directories_are_for_the_user_alone(path):
    def mode(folder):
        return stat.S_IMODE(os.stat(folder).st_mode)

    before = os.umask(0)
    try:
        with Chest({("a", "b"): 1}, path=path) as c, Chest() as temporary:
            c.flush()
            folders = [path, os.path.join(path, "_a"), temporary.path]
            assert [mode(folder) for folder in folders] == [0o700] * 3
    finally:
        os.umask(before)


def test_data_is_copied_and_not_emptied(budget):
    data = {"x": [1], "y": [2]}
    with Chest(data, available_memory=budget) as c:
        assert list(c.items()) == [("x", [1]), ("y", [2])]
        c["z"] = 3
        del c["x"]
    assert data == {"x": [1], "y": [2]}


@pytest.mark.parametrize("kind", [dict, lambda data: iter([*data.items()]), Chest])
def test_data_may_be_whatever_update_takes(kind):
    with Chest(kind({"x": 1, "y": 2})) as c:
        assert list(c.items()) == [("x", 1), ("y", 2)]


def test_data_larger_than_memory_spills():
    with Chest({n: bytes(100) for n in range(50)}, available_memory=1000, nbytes=len) as c:
        assert len(c) == 50
        assert c.memory_usage <= 1000


def test_data_comes_on_top_of_what_is_there(path):
    store(path, {"x": 1, "y": 2})
    with Chest({"y": 3, "z": 4}, path) as c:
        assert list(c.items()) == [("x", 1), ("y", 3), ("z", 4)]


def test_data_that_is_no_mapping_makes_no_chest():
    with pytest.raises(TypeError):
        Chest(5)
    assert temporary_directories() == []


def test_options_can_be_read_back(path):
    @contextmanager
    def open_many(paths, mode):
        yield []

    with Chest(path=path, open=gzip.open, open_many=open_many, mode="t", **JSON) as c:
        assert (c.dump, c.load, c.open, c.open_many, c.mode) == (
            json.dump,
            json.load,
            gzip.open,
            open_many,
            "t",
        )


def test_key_to_filename_may_be_given(path):
    with Chest(path=path, key_to_filename=lambda key: f"{key}.pickle") as c:
        c["x"] = [1]
        c.flush()
        assert c.key_to_filename("x") == os.path.join(path, "x.pickle")
        assert sorted(os.listdir(path)) == [".keys", "x.pickle"]


@pytest.mark.parametrize(
    "name", ["same", "", "..", "../outside", "/outside", ".keys", "x" * 300, 5]
)
def test_values_are_kept_apart_whatever_names_key_to_filename_gives(tmp_path, path, name):
    with Chest(path=path, key_to_filename=lambda key: name) as c:
        c.update(x=[1], y=[2])
    with Chest(path=path) as c:
        assert c == {"x": [1], "y": [2]}
    assert os.listdir(tmp_path) == ["chest"]


def test_values_are_saved_where_key_to_filename_raises(path):
    with Chest(path=path, key_to_filename=lambda key: key + ".pickle") as c:
        c["x"] = [1]
        c[1] = [2]
    with Chest(path=path) as c:
        assert list(c.items()) == [("x", [1]), (1, [2])]
        assert c.key_to_filename("x") == os.path.join(path, "x.pickle")


def test_the_file_name_told_before_the_first_flush_is_the_one_used(path):
    with Chest(path=path) as c:
        c["x"] = [1]
        told = c.key_to_filename("x")
        c.flush()
        assert c.key_to_filename("x") == told
        assert os.path.exists(told)


def test_nbytes_may_be_given():
    with Chest(available_memory=250, nbytes=lambda value: 100) as c:
        c.update(x=1, y=2)
        assert c.memory_usage == 200
        c["z"] = 3
        assert c.memory_usage <= 250


def test_without_writeback_only_what_is_set_is_written(path):
    with Chest(path=path, writeback=False) as c:
        c.update(x=[1], y=[2])
        c.flush()
        c["x"].append("lost")
        c["y"].append("kept")
        c["y"] = c["y"]
    with Chest(path=path) as c:
        assert c == {"x": [1], "y": [2, "kept"]}


def test_fsync_is_asked_for_only_where_it_is_wanted(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(fd) or fsync(fd))
    store(tmp_path / "a", {"x": 1})
    assert synced == []
    store(tmp_path / "b", {"x": 1}, fsync=True)
    assert synced != []
    with Chest(path=tmp_path / "b") as c:
        assert c == {"x": 1}


# -- the temporary directory ---------------------------------------------------------------------


def test_a_temporary_directory_is_made_only_when_it_is_needed():
    with Chest() as c:
        c.update(x=1, y=[2])
        c.pop("x")
        assert c == {"y": [2]}
        assert "no directory yet" in repr(c)
        assert temporary_directories() == []
        c.flush()
        assert temporary_directories() == [c.path]


@pytest.mark.parametrize("end", [Chest.close, Chest.drop])
def test_a_temporary_directory_is_gone_when_the_chest_was_closed(end):
    c = Chest(available_memory=0)
    c.update({"x": 1, ("a", "b"): 2})
    assert temporary_directories() == [c.path]
    end(c)
    assert temporary_directories() == []


def test_a_temporary_directory_is_gone_when_the_last_reference_is():
    c = Chest(available_memory=0)
    c["x"] = 1
    assert temporary_directories() != []
    del c
    assert temporary_directories() == []


@drops_it_open
def test_a_chest_in_a_reference_cycle_ends_when_it_is_collected(path):
    for options in [{"path": path}, {"available_memory": 0}]:
        c = Chest(**options)
        c["x"] = [1]
        c.cycle = c.values()
        del c
        gc.collect()
    assert temporary_directories() == []
    with Chest(path=path) as c:
        assert c == {"x": [1]}


@drops_it_open
def test_a_chest_with_a_path_is_saved_when_the_last_reference_goes(path):
    c = Chest(path=path)
    c["x"] = [1]
    del c
    with Chest(path=path) as c:
        assert c == {"x": [1]}


def test_foreign_files_in_a_temporary_directory_stay():
    c = Chest({"x": 1})
    c.flush()
    file = Path(c.path, "foreign")
    file.write_text("kept")
    c.close()
    assert file.read_text() == "kept"
    assert os.listdir(file.parent) == ["foreign"]
    file.unlink()
    file.parent.rmdir()


# -- memory --------------------------------------------------------------------------------------


def test_memory_usage_is_the_size_of_the_values_in_memory():
    with Chest(nbytes=len) as c:
        assert c.memory_usage == 0
        c["x"] = bytes(100)
        c["y"] = bytes(10)
        assert c.memory_usage == 110
        c["x"] = bytes(50)
        assert c.memory_usage == 60
        c.move_to_disk("x")
        assert c.memory_usage == 10
        assert c["x"] == bytes(50)
        assert c.memory_usage == 60
        del c["x"]
        assert c.memory_usage == 10
        c.clear()
        assert c.memory_usage == 0


def test_memory_usage_does_not_drift_when_values_change_their_size():
    with Chest(nbytes=len) as c:
        c["x"] = [1] * 10
        c["x"] += [1] * 90
        c["y"] = [1]
        c.move_to_disk("x")
        assert c.memory_usage == 1
        del c["y"]
        assert c.memory_usage == 0


def test_memory_stays_below_the_budget():
    with Chest(available_memory=1000, nbytes=len) as c:
        for n in range(100):
            c[n] = bytes(n)
            assert c.memory_usage <= 1000
        for n in range(100):
            assert c[n] == bytes(n)
            assert c.memory_usage <= 1000


def test_a_value_larger_than_the_budget_pushes_no_other_out():
    with Chest(available_memory=1000, nbytes=len) as c:
        c["small"] = bytes(10)
        c["large"] = bytes(5000)
        assert [*c.inmem] == ["small"]
        assert c["large"] == bytes(5000)
        assert [*c.inmem] == ["small"]


def test_inmem_holds_the_values_that_are_in_memory():
    with Chest() as c:
        c["x"] = value = [1]
        assert c.inmem == {"x": [1]}
        assert c.inmem["x"] is value
        c.move_to_disk("x")
        assert c.inmem == {}


def test_a_smaller_budget_takes_effect_at_once():
    with Chest({n: bytes(100) for n in range(10)}, nbytes=len) as c:
        assert c.memory_usage == 1000
        c.available_memory = 500
        assert c.available_memory == 500
        assert c.memory_usage <= 500
        c.available_memory = 0
        assert (c.memory_usage, c.inmem) == (0, {})
        c.available_memory = 1e6
        assert c == {n: bytes(100) for n in range(10)}


def test_shrink_leaves_alone_what_fits():
    with Chest({"x": 1}) as c:
        c.shrink()
        assert c.inmem == {"x": 1}


def test_move_to_disk_writes_a_value_and_lets_it_go(path):
    with Chest(path=path) as c:
        c.update(x=[1], y=[2])
        c.move_to_disk("x")
        assert [*c.inmem] == ["y"]
        assert sorted(os.listdir(path)) == [".keys", "x"]
        c.move_to_disk("x")
        assert c["x"] == [1]


def test_move_to_disk_tells_that_a_value_cannot_be_written_and_keeps_it():
    with Chest() as c:
        c["f"] = function = lambda: 1  # no pickle
        with pytest.raises(UnsavedError) as caught:
            c.move_to_disk("f")
        assert caught.value.keys == ["f"]
        assert c["f"] is function


def test_get_from_disk_brings_a_value_into_memory(path):
    store(path, {"x": [1], "y": [2]})
    with Chest(path=path) as c:
        c.get_from_disk("x")
        assert c.inmem == {"x": [1]}
        c.get_from_disk("x")
        assert c.inmem == {"x": [1]}


@pytest.mark.parametrize(
    "keys",
    [["x", ("a", "b")], ("x", ("a", "b")), {"x": 0, ("a", "b"): 0}],
    ids=["list", "tuple", "dict"],
)
def test_prefetch_brings_values_into_memory(path, keys):
    store(path, {"x": [1], "y": [2], ("a", "b"): [3]})
    with Chest(path=path) as c:
        c.prefetch(keys)
        assert c.inmem == {"x": [1], ("a", "b"): [3]}


def test_prefetch_takes_a_generator(path):
    store(path, {n: [n] for n in range(20)})
    with Chest(path=path) as c:
        c.prefetch(n for n in range(0, 20, 2))
        assert c.inmem == {n: [n] for n in range(0, 20, 2)}


@pytest.mark.parametrize("key", ["xy", b"xy", ("x", "y"), frozenset("xy"), 5])
def test_prefetch_takes_a_single_key(path, key):
    store(path, {key: [1], "x": [2], "y": [3]})
    with Chest(path=path) as c:
        c.prefetch(key)
        assert c.inmem == {key: [1]}


def test_prefetch_leaves_alone_what_is_in_memory_already(path):
    misses = []
    store(path, {"x": [1], "y": [2]})
    with Chest(path=path, on_miss=misses.append) as c:
        value = c["x"]
        c.prefetch(["x", "y", "x"])
        assert misses == ["x", "y"]
        assert c["x"] is value


def test_prefetch_stops_when_the_budget_is_used_up(path):
    misses = []
    store(path, {n: bytes(100) for n in range(50)})
    with Chest(path=path, available_memory=1000, nbytes=len, on_miss=misses.append) as c:
        c.prefetch(range(50))
        assert 1 <= len(misses) <= 10
        assert {*c.inmem} == {*misses}
        assert c.memory_usage <= 1000


def test_prefetch_takes_no_more_of_a_generator_than_fits(path):
    store(path, {n: bytes(100) for n in range(50)})
    with Chest(path=path, available_memory=1000, nbytes=len) as c:
        keys = iter(range(50))
        c.prefetch(keys)
        assert len([*keys]) >= 39


class OpenMany:
    """An `open_many` that remembers what it was asked for."""

    def __init__(self, open=open):
        self.open = open
        self.calls = []
        self.files = []

    @contextmanager
    def __call__(self, paths, mode):
        paths = [*paths]
        self.calls.append((paths, mode))
        with ExitStack() as stack:
            files = [stack.enter_context(self.open(path, mode=mode)) for path in paths]
            self.files += files
            yield files


@pytest.mark.parametrize("options", [{}, JSON, {"open": gzip.open}], ids=["pickle", "json", "gzip"])
def test_prefetch_reads_through_open_many(path, options):
    store(path, {"x": [1], "y": [2], "z": [3]}, **options)
    opener = OpenMany(options.get("open", open))
    with Chest(path=path, open_many=opener, **options) as c:
        c.prefetch(["z", "x"])
        assert c.inmem == {"z": [3], "x": [1]}
        assert opener.calls == [([c.key_to_filename("z"), c.key_to_filename("x")], "rb")]
        assert all(file.closed for file in opener.files)


def test_prefetch_through_open_many_tells_of_misses(path):
    misses = []
    store(path, {"x": [1], "y": [2]})
    with Chest(path=path, open_many=OpenMany(), on_miss=misses.append) as c:
        c.prefetch(["x", "y"])
    assert misses == ["x", "y"]


def test_prefetch_finds_damage(path):
    store(path, {"x": [1], "y": [2]})
    Path(path, "x").write_bytes(b"damaged")
    for open_many in [None, OpenMany()]:
        with Chest(path=path, open_many=open_many) as c:
            with pytest.raises(CorruptValueError) as caught:
                c.prefetch(["x", "y"])
            assert caught.value.key == "x"
            assert c["y"] == [2]


def test_on_miss_is_told_of_each_key_that_is_read(path):
    misses = []
    store(path, {"x": [1], "y": [2]})
    with Chest(path=path, on_miss=misses.append) as c:
        assert misses == []
        assert c["x"] == c["x"] == [1]
        c["z"] = [3]
        assert c["z"] == [3]
        assert "y" in c
        with pytest.raises(KeyError):
            c["missing"]
        assert misses == ["x"]
        c.get_from_disk("y")
        assert misses == ["x", "y"]


def test_on_overflow_is_told_of_each_key_that_leaves_memory():
    left = []
    with Chest(available_memory=1000, nbytes=len, on_overflow=left.append) as c:
        c["x"] = bytes(600)
        assert left == []
        c["y"] = bytes(300)
        c.move_to_disk("y")
        assert left == ["y"]
        c["large"] = bytes(5000)
        assert left == ["y", "large"]
        c.available_memory = 0
        assert left == ["y", "large", "x"]


def test_on_overflow_is_not_told_of_values_that_cannot_leave():
    left = []
    with Chest(available_memory=0, on_overflow=left.append) as c:
        c["f"] = lambda: 1  # no pickle
        c["x"] = 1
        assert left == ["x"]


def test_hooks_may_use_the_chest(path):
    store(path, {"x": [1], "y": [2]})
    seen = []

    def hook(key):
        seen.append((key, len(c), key in c))

    with Chest(path=path, available_memory=0, on_miss=hook, on_overflow=hook) as c:
        assert c["x"] == [1]
        c["z"] = [3]
    assert seen == [("x", 2, True), ("z", 3, True)]


def test_the_lock_is_held_by_what_changes_the_chest():
    tries = []

    def try_lock(key=None):
        free = c.lock.acquire(blocking=False)
        tries.append(free)
        if free:
            c.lock.release()

    def try_in_another_thread(key=None):
        thread = threading.Thread(target=try_lock)
        thread.start()
        thread.join()

    with Chest(available_memory=0, on_overflow=try_in_another_thread) as c:
        c["x"] = 1
        try_in_another_thread()
    assert tries == [False, True]


# -- the disk ------------------------------------------------------------------------------------


def test_flush_keeps_values_in_memory(path):
    with Chest(path=path) as c:
        c["x"] = value = [1]
        c.flush()
        assert c["x"] is value
        assert sorted(os.listdir(path)) == [".keys", "x"]


def test_flush_writes_what_changed_in_place(path):
    with Chest(path=path) as c, Chest(path=path) as other:
        c["x"] = [1]
        c.flush()
        c["x"].append(2)
        c.flush()
        assert other["x"] == [1, 2]


def test_flush_writes_nothing_that_has_not_changed(path):
    with Chest(path=path) as c:
        c.update(x=[1], y="text")
        c.flush()
        before = contents(path), inode(os.path.join(path, "x"))
        c.flush()
        assert (contents(path), inode(os.path.join(path, "x"))) == before


def test_flush_saves_all_it_can_and_then_names_the_rest(path):
    c = Chest(path=path)
    c["a"] = 1
    c["f"] = lambda: 1  # no pickle
    c["b"] = 2
    with pytest.raises(UnsavedError, match="'f'") as caught:
        c.flush()
    assert caught.value.keys == ["f"]
    with Chest(path=path) as other:
        assert other == {"a": 1, "b": 2}
    with pytest.raises(UnsavedError):
        c.close()
    assert not c.closed
    del c["f"]
    c.close()


def test_write_keys_commits_deletions_and_writes_no_value(path):
    store(path, {"x": 1, "y": 2})
    with Chest(path=path) as c, Chest(path=path) as other:
        del c["x"]
        c["z"] = 3
        assert list(other) == ["x", "y"]
        c.write_keys()
        assert list(other) == ["y"]
        assert sorted(os.listdir(path)) == [".keys", "y"]
        assert c == {"y": 2, "z": 3}


def test_a_deleted_value_is_gone_from_disk_after_the_next_flush(path, budget):
    with Chest({"x": [1], ("a", "b"): [2]}, path, budget) as c:
        c.flush()
        del c["x"], c["a", "b"]
        assert c == {}
        c.flush()
        assert os.listdir(path) == [".keys"]


def test_a_replaced_value_leaves_no_file_behind(path, budget):
    with Chest(path=path, available_memory=budget) as c:
        for n in range(5):
            c["x"] = [n]
            c.flush()
            assert len(os.listdir(path)) == 2
        assert c["x"] == [4]


def test_close_saves(path, budget):
    c = Chest(path=path, available_memory=budget)
    c.update(x=[1], y=2)
    assert not c.closed
    c.close()
    assert c.closed
    with Chest(path=path) as c:
        assert list(c.items()) == [("x", [1]), ("y", 2)]


def test_close_may_be_called_twice(path):
    c = Chest({"x": 1}, path)
    c.close()
    before = contents(path)
    c.close()
    assert contents(path) == before


def test_a_with_block_gives_the_chest_and_saves_it(path):
    c = Chest(path=path)
    with c as given:
        assert given is c
        c["x"] = [1]
    assert c.closed
    with Chest(path=path) as c:
        assert c == {"x": [1]}


def test_a_with_block_saves_also_after_an_exception(path):
    with pytest.raises(ZeroDivisionError), Chest(path=path) as c:
        c["x"] = [1]
        c["y"] = 1 / 0
    assert c.closed
    with Chest(path=path) as c:
        assert c == {"x": [1]}


def test_drop_removes_everything_the_chest_wrote(path):
    c = Chest({"x": 1, ("a", "b"): 2}, path)
    c.flush()
    c.drop()
    assert c.closed
    assert not os.path.exists(path)


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EACCES])
def test_a_drop_that_may_not_remove_the_folder_closes_the_chest(path, monkeypatch, code):
    """As at a mount point, or in a folder of somebody else's."""

    def refuse(folder):
        raise OSError(code, os.strerror(code), folder)

    with Chest({"x": [1]}, path) as c:
        c.flush()
        monkeypatch.setattr(os, "rmdir", refuse)
        with pytest.raises(OSError, match=path):
            c.drop()
        assert c.closed
        assert os.listdir(path) == []
    with Chest(path=path) as c:
        assert dict(c) == {}


def test_a_dropped_directory_can_be_used_again(path):
    store(path, {"x": 1})
    Chest(path=path).drop()
    with Chest(path=path) as c:
        assert c == {}


def test_foreign_files_stay(path):
    os.makedirs(os.path.join(path, "_a"))
    for name in ["x", "foreign", "_a/foreign", ".hidden", "y~1"]:
        Path(path, name).write_text(name)
    with Chest(path=path) as c:
        c.update({"x": [1], "y": [2], ("a", "b"): [3]})
        c.flush()
        assert c == {"x": [1], "y": [2], ("a", "b"): [3]}
        del c["x"]
        c.clear()
        c.flush()
        c["x"] = [4]
        c.drop()
    kept = contents(path)
    assert {name.removeprefix(path)[1:]: data.decode() for name, data in kept.items()} == {
        name.replace("/", os.sep): name for name in ["x", "foreign", "_a/foreign", ".hidden", "y~1"]
    }


def test_a_directory_may_be_moved(tmp_path):
    store(tmp_path / "a", {"x": [1], ("a", "b"): [2]})
    os.rename(tmp_path / "a", tmp_path / "b")
    with Chest(path=tmp_path / "b") as c:
        assert c == {"x": [1], ("a", "b"): [2]}
        assert c.key_to_filename("x") == str(tmp_path / "b" / "x")
    assert not os.path.exists(tmp_path / "a")


# -- after the end -------------------------------------------------------------------------------


OPERATIONS = {
    "get": lambda c: c["x"],
    "set": lambda c: c.__setitem__("x", 1),
    "del": lambda c: c.__delitem__("x"),
    "in": lambda c: "x" in c,
    "len": len,
    "bool": bool,
    "iter": list,
    "reversed": lambda c: list(reversed(c)),
    "keys": lambda c: list(c.keys()),
    "values": lambda c: list(c.values()),
    "items": lambda c: list(c.items()),
    "get with default": lambda c: c.get("z"),
    "pop": lambda c: c.pop("x"),
    "pop with default": lambda c: c.pop("z", 1),
    "popitem": lambda c: c.popitem(),
    "setdefault": lambda c: c.setdefault("x", 1),
    "clear": lambda c: c.clear(),
    "update": lambda c: c.update({"y": 1}),
    "update with a chest": lambda c: c.update(Chest({"y": 1})),
    "update a chest": lambda c: Chest().update(c),
    "copy": lambda c: c.copy(),
    "or": lambda c: c | {},
    "ror": lambda c: {} | c,
    "ior": lambda c: c.__ior__({"y": 1}),
    "eq": lambda c: c == {"x": 1},
    "memory_usage": lambda c: c.memory_usage,
    "available_memory": lambda c: setattr(c, "available_memory", 5),
    "inmem": lambda c: c.inmem["x"],
    "in inmem": lambda c: "x" in c.inmem,
    "len of inmem": lambda c: len(c.inmem),
    "shrink": lambda c: c.shrink(),
    "move_to_disk": lambda c: c.move_to_disk("x"),
    "get_from_disk": lambda c: c.get_from_disk("x"),
    "prefetch": lambda c: c.prefetch(["x"]),
    "prefetch one": lambda c: c.prefetch("x"),
    "key_to_filename": lambda c: c.key_to_filename("x"),
    "flush": lambda c: c.flush(),
    "write_keys": lambda c: c.write_keys(),
    "drop": lambda c: c.drop(),
}


@pytest.mark.parametrize("where", ["path", "temporary", "never wrote"])
@pytest.mark.parametrize("end", [Chest.close, Chest.drop])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_closed_chest_refuses_every_operation(path, where, end, operation):
    c = Chest({"x": [1]}, path if where == "path" else None)
    if where != "never wrote":
        c.flush()
    end(c)
    with pytest.raises(ChestClosedError):
        OPERATIONS[operation](c)
    if where == "path" and end is Chest.close:
        with Chest(path=path) as c:
            assert c == {"x": [1]}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_closed_chest_that_was_only_read_refuses_every_operation_as_closed(path, operation):
    Chest({"x": [1]}, path).close()
    c = Chest(path=path, readonly=True)
    c.close()
    with pytest.raises(ChestClosedError):
        OPERATIONS[operation](c)


def test_iterating_goes_no_further_when_the_chest_is_closed(path):
    c = Chest({"x": [1], "y": [2]}, path)
    iterators = [iter(c), iter(c.values()), iter(c.items())]
    for iterator in iterators:
        next(iterator)
    c.close()
    for iterator in iterators:
        with pytest.raises(ChestClosedError):
            next(iterator)


def test_a_closed_chest_tells_where_it_was(path):
    c = Chest(path=path)
    c.close()
    assert c.path == path
    with pytest.raises(ChestClosedError, match="closed") as caught:
        len(c)
    assert caught.value.path == path


def test_repr_tells_where_and_how_much(path):
    with Chest({"x": bytes(5000)}, path, nbytes=len) as c:
        assert path in repr(c)
        assert "1 keys" in repr(c)
        assert "5,000 of 1,000,000,000 bytes" in repr(c)
    assert repr(c) == f"<closed chest at {path}>"


# -- reading only --------------------------------------------------------------------------------


@pytest.fixture(params=["asked for", "found out"])
def readonly(request, path, monkeypatch):
    """A chest that is only read, with x -> [1] and y -> [2]."""
    store(path, {"x": [1], "y": [2]})
    before = contents(path)
    if request.param == "found out":
        access = os.access
        refused = os.W_OK
        monkeypatch.setattr(os, "access", lambda p, mode: not mode & refused and access(p, mode))
        c = Chest(path=path)
    else:
        c = Chest(path=path, readonly=True)
    with c:
        yield c
    assert contents(path) == before


def test_a_chest_that_is_only_read_can_be_read(readonly):
    assert list(readonly.items()) == [("x", [1]), ("y", [2])]
    assert readonly["x"] == readonly.get("x") == readonly.setdefault("x", 5) == [1]
    assert readonly == {"x": [1], "y": [2]}
    readonly.move_to_disk("x")
    readonly.available_memory = 0
    readonly.prefetch(["x", "y"])
    assert readonly["y"] == [2]


@pytest.mark.parametrize(
    "action",
    [
        lambda c: c.__setitem__("x", 1),
        lambda c: c.__setitem__("z", 1),
        lambda c: c.__delitem__("x"),
        lambda c: c.pop("x"),
        lambda c: c.popitem(),
        lambda c: c.setdefault("z", 1),
        lambda c: c.clear(),
        lambda c: c.update({"z": 1}),
        lambda c: c.update(z=1),
        lambda c: c.update(Chest({"z": 1})),
        lambda c: c.__ior__({"z": 1}),
        lambda c: c.write_keys(),
        lambda c: c.drop(),
    ],
    ids=[
        "set",
        "set new",
        "del",
        "pop",
        "popitem",
        "setdefault",
        "clear",
        "update",
        "update with keywords",
        "update with a chest",
        "ior",
        "write_keys",
        "drop",
    ],
)
def test_a_chest_that_is_only_read_refuses_changes(readonly, action):
    with pytest.raises(ReadOnlyError) as caught:
        action(readonly)
    assert caught.value.path == readonly.path
    assert list(readonly.items()) == [("x", [1]), ("y", [2])]


def test_a_chest_that_is_only_read_does_not_save_what_changed_in_place(readonly, path):
    readonly["x"].append("changed")
    readonly.flush()
    with Chest(path=path, readonly=True) as c:
        assert c["x"] == [1]


def test_a_chest_that_is_only_read_can_be_copied(readonly):
    with readonly.copy() as c:
        c["z"] = [3]
        assert c == {"x": [1], "y": [2], "z": [3]}


def test_reading_only_sees_what_others_commit(path):
    store(path, {"x": [1]})
    with Chest(path=path, readonly=True) as c, Chest(path=path) as writer:
        assert c["x"] == [1]
        writer.update(x=[2], y=[3])
        writer.flush()
        assert c == {"x": [2], "y": [3]}


def test_reading_only_needs_a_path():
    with pytest.raises(ValueError, match="readonly"):
        Chest(readonly=True)


def test_reading_only_makes_no_chest(tmp_path):
    with pytest.raises(FileNotFoundError):
        Chest(path=tmp_path / "missing", readonly=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        Chest(path=tmp_path / "empty", readonly=True)
    assert os.listdir(tmp_path) == ["empty"]
    assert os.listdir(tmp_path / "empty") == []


# -- several handles -----------------------------------------------------------------------------


@pytest.fixture
def handles(path):
    with Chest(path=path) as a, Chest(path=path) as b:
        yield a, b


def test_what_one_handle_flushed_the_other_sees(handles):
    a, b = handles
    a["x"] = [1]
    assert "x" not in b
    a.flush()
    assert "x" in b
    assert b["x"] == [1]
    b["y"] = [2]
    b.flush()
    assert list(a.items()) == [("x", [1]), ("y", [2])]
    assert len(a) == len(b) == 2


def test_what_one_handle_replaced_the_other_reads_anew(handles):
    a, b = handles
    a["x"] = [1]
    a.flush()
    assert b["x"] == [1]
    for n in range(3):
        a["x"] = [n, n]
        a.flush()
        assert b["x"] == [n, n]


def test_what_one_handle_deleted_is_gone_for_the_other(handles):
    a, b = handles
    a.update(x=[1], y=[2])
    a.flush()
    assert b["x"] == [1]
    del a["x"]
    a.flush()
    assert list(b) == ["y"]
    assert b.memory_usage == 0
    with pytest.raises(KeyError):
        b["x"]


def test_what_one_handle_cleared_is_gone_for_the_other(handles):
    a, b = handles
    a.update(x=[1], y=[2])
    a.flush()
    assert b == {"x": [1], "y": [2]}
    b["mine"] = [3]
    a.clear()
    a.flush()
    assert b == {"mine": [3]}


def test_no_key_of_either_handle_is_lost(handles, path):
    a, b = handles
    for n in range(20):
        (a, b)[n % 2][n] = [n]
    a.close()
    b.close()
    with Chest(path=path) as c:
        assert dict(c) == {n: [n] for n in range(20)}


def test_the_last_commit_of_a_key_wins(handles, path):
    a, b = handles
    a["x"] = "a"
    b["x"] = "b"
    b.flush()
    assert a["x"] == "a"
    a.flush()
    assert a["x"] == b["x"] == "a"


def test_a_value_changed_in_place_here_wins_over_one_replaced_there(handles):
    a, b = handles
    a["x"] = [1]
    a.flush()
    a["x"].append(2)
    b["x"] = ["other"]
    b.flush()
    assert a["x"] == [1, 2]
    a.flush()
    assert b["x"] == [1, 2]


def test_a_key_deleted_here_stays_deleted_when_it_is_replaced_there(handles, path):
    a, b = handles
    a["x"] = [1]
    a.flush()
    del a["x"]
    b["x"] = [2]
    b.flush()
    assert "x" not in a
    a.flush()
    assert "x" not in b


@pytest.mark.parametrize(
    "change", [lambda c: c.__setitem__("x", [1, 2]), lambda c: c["x"].append(2)]
)
def test_a_key_changed_here_comes_back_when_it_is_deleted_there(handles, change):
    a, b = handles
    a["x"] = [1]
    a.flush()
    change(a)
    del b["x"]
    b.flush()
    assert a == {"x": [1, 2]}
    a.flush()
    assert b == {"x": [1, 2]}


def test_popitem_sees_what_another_handle_added(handles):
    a, b = handles
    a["x"] = [1]
    b["y"] = [2]
    b.flush()
    assert a.popitem() == ("x", [1])  # not committed yet, so it comes after what is
    assert a.popitem() == ("y", [2])


# -- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, JSON], ids=["pickle", "json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:8],
        lambda data: data[:12],
        lambda data: data[:16],
        lambda data: data[:24],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: bytes(len(data)),
        lambda data: bytes(16) + data[16:],
        lambda data: data[:8] + bytes(8) + data[16:],
        lambda data: data[:16] + bytes(len(data) - 16),
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:],
        lambda data: b"garbage" * 30,
        lambda data: b"[1, 2]",
        lambda data: b"null",
    ],
    ids=[
        "empty",
        "5 bytes",
        "8 bytes",
        "12 bytes",
        "head only",
        "24 bytes",
        "half",
        "one byte short",
        "zeroed",
        "head zeroed",
        "length zeroed",
        "frames zeroed",
        "last bit wrong",
        "length wrong",
        "garbage",
        "list",
        "null",
    ],
)
def test_an_index_that_cannot_be_read_is_an_error_and_changes_nothing(path, options, damage):
    store(path, {"x": [1], "y": [2]}, **options)
    file = Path(path, ".keys")
    file.write_bytes(damage(file.read_bytes()))
    before = contents(path)
    with pytest.raises(CorruptIndexError) as caught:
        Chest(path=path, **options)
    assert caught.value.path == str(file)
    assert contents(path) == before


def test_a_wrong_bit_anywhere_in_the_index_is_found(path):
    store(path, {"x": [1], dt.date(2026, 1, 1): [2]})
    store(path, {"y": [3]})
    file = Path(path, ".keys")
    good = file.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1
        file.write_bytes(bad)
        with pytest.raises(CorruptIndexError):
            Chest(path=path)


def test_a_missing_value_costs_that_value_alone(path):
    store(path, {"x": [1], "y": [2]})
    os.unlink(os.path.join(path, "x"))
    with Chest(path=path) as c:
        with pytest.raises(CorruptValueError) as caught:
            c["x"]
        assert (caught.value.key, caught.value.path) == ("x", os.path.join(path, "x"))
        assert c["y"] == [2]
        assert list(c) == ["x", "y"]
        c["x"] = [3]
    with Chest(path=path) as c:
        assert c == {"x": [3], "y": [2]}


# -- chest 0.2.3 ---------------------------------------------------------------------------------


def test_the_examples_of_the_old_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c = Chest()
    # Acts like a normal dictionary
    c["x"] = [1, 2, 3]
    assert c["x"] == [1, 2, 3]
    # Data persists to local files
    c.flush()
    assert sorted(os.listdir(c.path)) == [".keys", "x"]
    # These files hold pickled results
    with open(c.key_to_filename("x"), "rb") as file:
        assert pickle.load(file) == [1, 2, 3]
    # Though one normally accesses these files with chest itself
    c2 = Chest(path=c.path)
    assert list(c2.keys()) == ["x"]
    assert c2["x"] == [1, 2, 3]
    c2.close()
    # Chest is configurable, so one can use json, etc. instead of pickle
    c = Chest(path="my-chest", dump=json.dump, load=json.load)
    c["x"] = [1, 2, 3]
    c.flush()
    with open(c.key_to_filename("x")) as file:
        assert json.load(file) == [1, 2, 3]
    c.close()


def test_what_was_imported_from_chest_core_still_is():
    assert chest.core.nbytes(b"x" * 1000) >= 1000
    assert chest.core.key_to_filename("x") == "x"
    assert chest.core.key_to_filename(("a", "b", "c")) == "_a/_b/c"


def test_the_parameters_of_0_2_3_may_be_given_by_place(path):
    misses, left = [], []
    with Chest(
        {"x": [1]},
        path,
        1e6,
        pickle.dump,
        pickle.load,
        chest.core.key_to_filename,
        misses.append,
        left.append,
        open,
        None,
        "b",
    ) as c:
        c["y"] = [2]
        c.move_to_disk("x")
        assert c["x"] == [1]
    assert (misses, left) == (["x"], ["x"])


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_chest_that_nobody_names_stays_open_while_it_is_iterated_over(path):
    with Chest({n: [n] for n in range(5)}, path):
        pass
    assert dict(Chest(path=path).items()) == {n: [n] for n in range(5)}
    assert [*zip(Chest(path=path).values(), "ab", strict=False)] == [([0], "a"), ([1], "b")]
    assert [*reversed(Chest(path=path).values())] == [[n] for n in range(5)][::-1]
    gc.collect()


@pytest.mark.parametrize("item", ["a", ("a", 1, 2), 1, None, ["a", 1], ()])
def test_what_is_no_pair_is_not_among_the_items(c, item):
    c["a"] = 1
    assert item not in c.items()
    assert ("a", 1) in c.items()


def test_a_key_that_is_too_long_to_be_shown_is_told_of_all_the_same(c):
    key = 10**5000
    c[key], c["sound"] = threading.Lock(), 1
    with pytest.raises(UnsavedError, match="<int>"):
        c.flush()
    del c[key]
