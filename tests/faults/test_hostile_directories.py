"""Directories made by somebody else: names that lead out, things that are no files, huge numbers.

Proved for each of them, whatever is asked of the chest (to get, delete and replace values, to clear
and to drop it): that ends soon and in little memory, with the right values or with an error that
says which file is to blame; nothing outside of the directory is touched, and nothing in it that
the chest did not write; what is beside the trap is as good as before.
"""

import gzip
import json
import os
import pickle
import random
import shutil
from contextlib import suppress
from itertools import product

import pytest
from damage import FULL, SEED, Hung, in_time, little_memory, peak, read, tree, write
from xxhash import xxh3_64_intdigest

from chest import Chest, ChestError, CorruptIndexError, CorruptValueError
from chest.columns import Entry, Puts, encode
from chest.index import MAGIC, encode_length, frame, write_log

if os.name != "posix":
    pytest.skip("links, pipes and devices are POSIX", allow_module_level=True)

JSON = {"dump": json.dump, "load": json.load}
GZIP = {"open": gzip.open}
KINDS = [{}, JSON, GZIP]
CLEAR = (ChestError, OSError)
ROOM = 256 << 20
SOON = 1.0  # seconds
OLD = os.path.join(os.path.dirname(os.path.dirname(__file__)), "old_chests")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def _little_memory():
    before = peak()
    with little_memory(ROOM):
        yield
    assert peak() - before < ROOM / 2


@pytest.fixture
def outside(tmp_path):
    """A folder beside the chest, with what is nobody's business."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "victim").write_text("precious")
    Chest({"theirs": [1]}, path=str(folder / "chest")).close()
    return str(folder)


# -- what is asked of a chest ---------------------------------------------------------------------


def get_each(c):
    """Get every value; what cannot be had is told for each."""
    told = []
    for key in list(c):
        try:
            c[key]
        except CLEAR as error:
            assert getattr(error, "path", None) or error.filename
            told.append(error)
    if told:
        raise told[0]


def get_together(c):
    dict(c.items())


def read_ahead(c):
    c.prefetch(list(c))


def delete(c):
    for key in list(c):
        del c[key]
    c.flush()


def replace(c):
    for key in list(c):
        c[key] = ["new"]
    c.flush()


def clear(c):
    c.clear()
    c.flush()


def add(c):
    c["added"] = ["new"]
    c.flush()


def drop(c):
    c.drop()


READING = [get_each, get_together, read_ahead]
WRITING = [delete, replace, clear, add, drop]


def asked(ask, path, *, readonly=False, **options):
    """Ask something of the chest there; return the error that it ends in, if it is a clear one."""
    with in_time(SOON):
        try:
            c = Chest(path=path, readonly=readonly, **options)
        except CLEAR as error:
            return error
        caught = None
        try:
            ask(c)
        except CLEAR as error:
            caught = error
        try:
            c.close()
        except CLEAR:
            c._finalizer.detach()
            c._memory._end()
        return caught


# -- things that are no files ---------------------------------------------------------------------


def pipe(full, outside):
    os.mkfifo(full)


def endless(full, outside):
    os.symlink("/dev/zero", full)


def empty_device(full, outside):
    os.symlink("/dev/null", full)


def folder(full, outside):
    os.mkdir(full)


def full_folder(full, outside):
    os.mkdir(full)
    write(os.path.join(full, "mine"), b"mine")


def link_out(full, outside):
    os.symlink(os.path.join(outside, "victim"), full)


def link_to_folder(full, outside):
    os.symlink(outside, full)


def link_to_nothing(full, outside):
    os.symlink(os.path.join(outside, "nothing"), full)


def cycle(full, outside):
    os.symlink(full + "~", full)
    os.symlink(full, full + "~")


THINGS = [
    pipe, endless, empty_device, folder, full_folder,
    link_out, link_to_folder, link_to_nothing, cycle,
]  # fmt: skip
PLACES = {  # with the keys of the values there
    "x": ["x"],
    "large": ["large"],
    "_a/b": [("a", "b")],
    "_a": [("a", "b")],
    ".pack-1": [str(n) for n in range(64)],
}


def fill(path, options):
    """Make a chest with a value of each kind, and return what it holds."""
    with Chest(path=path, **options) as c:
        c.update({"x": [1], ("a", "b"): [2], "large": list(range(30_000))})
        c.flush()
        if options is not GZIP:
            c.update((key, [key]) for key in PLACES[".pack-1"])
            c.flush()
    with Chest(path=path, **options) as c:
        return dict(c)


def trap(path, place, thing, outside):
    full = os.path.join(path, place)
    if os.path.isdir(full):
        shutil.rmtree(full)
    else:
        os.unlink(full)
    thing(full, outside)


def is_endless(thing, place):
    """Tell whether this is waited for, or read, for ever."""
    return (thing is pipe and place != "_a") or (thing is endless and place not in ("_a", ".pack-1"))


def is_pack(thing, place):
    """Tell whether this is taken for the newest pack, to append to."""
    return place == ".pack-1" and thing not in (pipe, endless, empty_device, link_to_nothing)


def traps(is_known, reason):
    known = pytest.mark.xfail(reason=reason, raises=(Hung, AssertionError))
    return [
        pytest.param(*case, marks=[known] if is_known(*case) else [])
        for case in product(THINGS, PLACES)
    ]


@pytest.mark.parametrize(
    ("thing", "place"),
    traps(is_endless, "whatever has the name of a value is opened, and read to its end"),
)
def test_what_is_no_file_costs_the_value_there_alone(path, outside, thing, place):
    tried = 0
    for options in KINDS:
        if (place, options) == (".pack-1", GZIP):
            continue
        expected = fill(path, options)
        trap(path, place, thing, outside)
        before, untouched = tree(path), tree(outside)
        blamed = os.path.join(path, place)
        for readonly, ask in product([False, True], READING):
            error = asked(ask, path, readonly=readonly, **options)
            assert blamed in (getattr(error, "path", None) or error.filename)
            tried += 1
        assert tree(path) == before
        assert tree(outside) == untouched
        with Chest(path=path, readonly=True, **options) as c:
            assert [*c] == [*expected]
            for key in set(expected).difference(PLACES[place]):
                assert c[key] == expected[key]
        shutil.rmtree(path)
    print(f"{tried} points")


@pytest.mark.parametrize(
    ("thing", "place"),
    traps(is_pack, "whatever has the name of the newest pack is appended to, links are followed"),
)
def test_what_is_no_file_is_removed_itself_alone(path, outside, thing, place):
    untouched = tree(outside)
    for ask in WRITING:
        expected = fill(path, {})
        write(os.path.join(path, "theirs"), b"theirs")
        trap(path, place, thing, outside)
        error = asked(ask, path)
        assert tree(outside) == untouched
        assert read(os.path.join(path, "theirs")) == b"theirs"
        if thing is full_folder:
            assert read(os.path.join(path, place, "mine")) == b"mine"
        assert error is None
        if ask is not drop:
            with Chest(path=path) as c:
                if ask is replace:
                    assert dict(c) == dict.fromkeys(expected, ["new"])
                assert len(c) == {delete: 0, clear: 0, add: 68}.get(ask, 67)
        shutil.rmtree(path)
    print(f"{len(WRITING)} points")
