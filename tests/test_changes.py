"""Tests of chest.changes: many values that may have changed in place, compared all at once."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from chest import Chest, UnsavedError


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
