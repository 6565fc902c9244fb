"""One fixed piece of work that comes by everything a chest does to its directory.

It is a list of steps. Each changes a chest, or a plain dict alike, and each ends in a commit; so
the states that may be found afterwards are known. A step may be done again after it failed.
"""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from disk import opened

import chest.saving
import chest.staging
import chest.store
import chest.upkeep

ROOM = 1e9
OTHER = {f"other {n}": bytes(9000) + bytes([n]) for n in range(3)}
AGES_AGO = (0, 0)

# So that a little work compacts the index and the packs, and fills and stages packs.
_small = [
    (chest.upkeep, "COMPACT_BYTES", 3000),
    (chest.upkeep, "WASTE", 2000),
    (chest.staging, "STREAM_BYTES", 10_000),
    (chest.saving, "STREAM_BYTES", 10_000),
    (chest.store, "PACK_BYTES", 16_000),
    (chest.staging, "PACK_BYTES", 16_000),
    (chest.upkeep, "PACK_BYTES", 16_000),
]


class Small:
    """Lowers what chest does rarely, so that it does it here."""

    def __enter__(self):
        self._patches = [mock.patch.object(*args) for args in _small]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error):
        for patch in self._patches:
            patch.stop()


class Step(NamedTuple):
    """A change, and how it is committed; `at_once` if there is no state in between."""

    change: Any
    way: str = "flush"
    at_once: bool = True


def small(start, stop, text):
    return {f"small {n}": (n, text * 5) for n in range(start, stop)}


def few(d):
    d.update({"x": 1, 7: [1], ("a", "b", "c"): "deep", ("a", "d"): {"deep": 1}, "long": "l" * 9000})


def arrays(d):
    for n in range(3):
        d[f"array {n}"] = np.arange(12_500) + n


def pack(d):
    d.update(small(0, 100, "first"))


def more_packed(d):
    d.update(small(100, 180, "second"))


def overwrite(d):
    d["x"], d["array 1"], d["new"] = 2, np.arange(26_000), "new"
    d.update(small(20, 60, "third"))


def in_place(d):
    d[7][0] = 70
    d["array 0"][:10] = 5
    d["a", "d"]["deep"] = 2


def delete(d):
    for key in ["array 2", ("a", "b", "c"), *small(0, 10, "")]:
        d.pop(key, None)


def transact(d):
    d["x"] = 3
    d["ann"], d["bob"] = 70, np.full(12_500, 30)
    d.pop("long", None)
    d.update(small(150, 230, "fourth"))
    d.pop("small 15", None)


def nothing(d):
    pass


def overwrite_all(d):
    d.update(small(10, 230, "fifth"))


def overwrite_half(d):
    d.update(small(10, 150, "sixth"))


def many(d):
    d.update(small(300, 560, "staged " * 3))


def spilled(d):
    d["array 0"] = np.arange(20_000)
    d["x"] = [1, 2, 3]
    d.update(small(560, 630, "spilled"))


def remove(d):
    d.clear()
    d["last"] = "last"


def link(d):
    if isinstance(d, dict):
        d.update(OTHER)
    else:
        with opened(d.others) as others:
            d.update(others)


STEPS = [
    Step(nothing, "open"),
    Step(few),
    Step(arrays),
    Step(pack),
    Step(more_packed),
    Step(overwrite),
    Step(in_place),
    Step(delete),
    Step(transact, "transaction"),
    Step(nothing, "unpack"),
    Step(overwrite_all),
    Step(nothing, "reopen"),
    Step(overwrite_half),
    Step(many),
    Step(spilled, "spill", at_once=False),
    Step(link),
    Step(remove),
    Step(few, "close"),
]


def states():
    """Return what the chest holds before the first step, and after each."""
    found = [{}]
    for step in STEPS:
        state = deepcopy(found[-1])
        step.change(state)
        found.append(state)
    return found


class Work:
    """Does the steps to the chest at `path`; at `others` is one from which `link` takes values."""

    def __init__(self, path, others, **options):
        self.path = path
        self.others = others
        self.options = options
        self.chest = None

    def do(self, step):
        if self.chest is None or self.chest.closed:
            self.chest = opened(self.path, available_memory=ROOM, **self.options)
            self.chest.others = self.others
        c = self.chest
        if step.way == "transaction":
            with c.transaction():
                c["half"] = "of a transaction"
                self._spill()
                del c["half"]
                step.change(c)
            return
        step.change(c)
        match step.way:
            case "flush":
                c.flush()
            case "unpack":
                c.key_to_filename("small 40")
            case "spill":
                self._spill()
            case "close":
                c.close()
            case "reopen":
                c.close()
                self.do(Step(nothing, "open"))

    def _spill(self):
        try:
            self.chest.available_memory = 0
        finally:
            self.chest.available_memory = ROOM


def make_others(path):
    with opened(path) as c:
        c.update(OTHER)
    return path


def seen(mapping):
    """Return the pairs of a mapping so that they can be compared, arrays by value."""
    return [(key, plain(value)) for key, value in mapping.items()]


def plain(value):
    return (str(value.dtype), value.tobytes()) if isinstance(value, np.ndarray) else value


def read_back(path):
    with opened(path) as c:
        return seen(c)


def fits(found, before, after, at_once):
    """Tell whether `found` may be there while what was `before` becomes `after`."""
    if found in (before, after):
        return True
    found, *parts = map(dict, (found, before, after))
    keys = {*found}.union(*parts)
    return not at_once and all(any(_same(key, found, part) for part in parts) for key in keys)


def _same(key, mine, theirs):
    return (key in mine) == (key in theirs) and mine.get(key) == theirs.get(key)


def check_usable(path, found, *, clean=True):
    """Assert that a chest that holds `found` can be written; if `clean`, nothing is stray then."""
    for name in os.listdir(path):
        if name.startswith(".new-"):  # of somebody who died an hour ago
            os.utime(os.path.join(path, name), AGES_AGO)
    with opened(path) as c:
        c["after"] = "after"
        c.flush()
        if clean:
            c._check()
        c.update(small(1000, 1070, "after"))
        c.flush()
        if clean:
            c._check()
    with opened(path) as c:
        assert seen(c) == found + seen({"after": "after", **small(1000, 1070, "after")})
        if clean:
            c._check()
