"""Tests of chest.changes: many values that may have changed in place, compared all at once."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from chest import Chest, UnsavedError
from chest.serialize import Serializer


@pytest.mark.parametrize("n", [1, 100, 3000])
def test_a_flush_writes_those_of_many_values_that_changed_in_place(path, n):
    values = {f"k{i}": [i] for i in range(n)}
    with Chest(values, path=path) as c:
        c["array"] = np.zeros(10_000)
        c.flush()
        values["k0"].append("x")  # resident, so it is the same list
        values[f"k{n - 1}"].append("y")
        c.inmem["array"][5] = 1
        before = c._memory.meter.writes
        c.flush()
        assert c._memory.meter.writes - before == len({"k0", f"k{n - 1}", "array"})
        c._check()
    with Chest(path=path) as c:
        assert c["array"][5] == 1
        del c["array"]
        assert c == values


def test_a_value_that_can_be_pickled_no_more_hides_no_change_of_others(path):
    values = {f"k{n}": [n] for n in range(200)}
    with Chest(values, path=path) as c:
        c.flush()
        values["k3"].append(threading.Lock())
        values["k100"].append("x")
        with pytest.raises(UnsavedError) as info:
            c.flush()
        assert info.value.keys == ["k3"]
        c._check()
        values["k3"].pop()
    with Chest(path=path) as c:
        assert c == values


class Deleting:
    """Deletes a key of a chest when it is pickled, from the second time on."""

    chest, key = None, None

    def __reduce__(self):
        if Deleting.chest is not None:
            Deleting.chest.pop(Deleting.key, None)
        return Deleting, ()


@pytest.mark.parametrize("key", ["a", "k", "z"])
def test_a_value_that_deletes_others_when_it_is_compared_keeps_none_from_being_saved(path, key):
    try:
        with Chest(path=path) as c:
            c["a"], c["k"], c["z"] = ["a"], Deleting(), ["z"]
            c.flush()
            c["a"].append(1)
            c["z"].append(1)
            Deleting.chest, Deleting.key = c, key
            c.flush()
            Deleting.chest = None
            c._check()
        with Chest(path=path) as c:
            assert [*c] == [k for k in "akz" if k != key]
            assert all(c[k] == [k, 1] for k in c if k != "k")
    finally:
        Deleting.chest = None


def whole(array):
    return array


def within(array):
    return 1, array


@pytest.mark.parametrize("size", [3, 100_000])
@pytest.mark.parametrize("form", [whole, within])
@pytest.mark.parametrize("by", ["flush", "spill", "move", "close", "get and close", "others"])
@pytest.mark.parametrize("left", [False, True])
def test_what_was_changed_before_it_was_made_read_only_is_saved(path, left, by, form, size):
    def array_of(value):
        return value if form is whole else value[1]

    with Chest({"k": form(np.zeros(size)), "other": [1]}, path=path) as c:
        c.flush()
        value = c["k"]
        if left:
            c.available_memory = 0
            c.available_memory = 1 << 30
            assert "k" not in c.inmem
        array_of(value)[1] = 5
        array_of(value).flags.writeable = False
        if by == "flush":
            c.flush()
        elif by == "spill":
            c.available_memory = 0
        elif by == "move":
            c["k"]
            c.move_to_disk("k")
        elif by == "get and close":
            del value
            assert array_of(c["k"])[1] == 5
            c["other"]
        elif by == "others":
            with Chest(path=path) as d:
                d["other"] = [2]
            c["other"]
        c._check()
    with Chest(path=path) as c:
        assert array_of(c["k"])[1] == 5


def test_a_read_only_array_is_not_looked_at(path, monkeypatch):
    array = np.zeros(100_000)
    array.flags.writeable = False
    with Chest({"k": array, "many": (1, array)}, path=path) as c:
        c.flush()
        looked = []
        digest = Serializer.digest
        monkeypatch.setattr(Serializer, "digest", lambda *args: looked.append(1) or digest(*args))
        for available in (0, 1 << 30, 0):
            c.available_memory = available
            assert c["k"].sum() == c["many"][1].sum() == 0
            c.flush()
        assert not looked
        c._check()


def test_a_transaction_that_fails_takes_back_what_was_made_read_only(path):
    with Chest({"k": np.zeros(3)}, path=path) as c:
        with pytest.raises(ZeroDivisionError), c.transaction():
            c["k"][0] = 5
            c["k"].flags.writeable = False
            raise ZeroDivisionError
        assert c["k"][0] == 0
        c._check()


class Interrupting:
    def __reduce__(self):
        raise KeyboardInterrupt


def test_nor_does_an_interrupt_make_it_forgotten(path):
    with Chest({"k": np.zeros(3)}, path=path) as c:
        c.flush()
        c["k"][1] = 5
        c["k"].flags.writeable = False
        c["i"] = Interrupting()
        with pytest.raises(KeyboardInterrupt):
            c.move_to_disk("i")
        del c["i"]
        c._check()
    with Chest(path=path) as c:
        assert c["k"][1] == 5


def test_an_array_that_is_made_writable_where_it_left_is_saved(path):
    array = np.zeros(3)
    array.flags.writeable = False
    with Chest({"k": array}, path=path) as c:
        c.move_to_disk("k")
        array.flags.writeable = True
        array[1] = 5
        c.flush()
    with Chest(path=path) as c:
        assert c["k"][1] == 5
