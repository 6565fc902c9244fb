"""Directories that chest 0.2.3 wrote: opened, read, and brought to the index of today."""

import datetime as dt
import gzip
import json
import os
import pickle
import runpy
import shutil
from contextlib import suppress

import pytest

import chest.store
from chest import (
    Chest,
    ChestError,
    CorruptIndexError,
    CorruptValueError,
    ReadOnlyError,
    UnsavedError,
)
from chest.directory import Directory
from chest.frames import MAGIC
from chest.index import Index

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "old_chests")
MADE = runpy.run_path(os.path.join(HERE, "make.py"))
JSON = {"dump": json.dump, "load": json.load}
OLD = [
    pytest.param("pickle", MADE["PICKLE"], {}, id="pickle"),
    pytest.param("json", MADE["JSON"], JSON, id="json"),
    pytest.param("json", MADE["JSON"], JSON | {"mode": "t"}, id="json with a mode"),
    pytest.param("json_int", MADE["JSON_INT"], JSON, id="json with ints as keys"),
]


def old(name, path):
    """Copy one of the old chests."""
    shutil.copytree(os.path.join(HERE, name), path)


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)


def make(path, pairs, values, dumps=pickle.dumps):
    """Write a directory as 0.2.3 did: an index of pairs, and files with values."""
    os.mkdir(path)
    write(os.path.join(path, ".keys"), dumps(pairs))
    for name, value in values.items():
        os.makedirs(os.path.dirname(os.path.join(path, name)), exist_ok=True)
        write(os.path.join(path, name), dumps(value))


def json_dumps(value):
    return json.dumps(value).encode()


def tree(path):
    """Every file below a directory, with its content and the time it was changed."""
    found = {}
    for folder, _, names in os.walk(path):
        for name in names:
            full = os.path.join(folder, name)
            with open(full, "rb") as file:
                key = os.path.relpath(full, path).replace(os.sep, "/")
                found[key] = file.read(), os.stat(full).st_mtime_ns
    return found


def is_modern(path):
    with open(os.path.join(path, ".keys"), "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def abandon(c):
    """Let go of a chest as a process that dies does."""
    c._finalizer.detach()
    c._memory._end()


# -- opened ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected", "options"), OLD)
def test_an_old_chest_opens_with_all_values_in_order(path, name, expected, options):
    old(name, path)
    with Chest(path=path, **options) as c:
        assert [*c.items()] == [*expected.items()]
        assert [*map(type, c)] == [*map(type, expected)]
        c._check()


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(("name", "expected", "options"), OLD)
def test_reading_an_old_chest_changes_nothing(path, name, expected, options, readonly):
    old(name, path)
    before = tree(path)
    with Chest(path=path, readonly=readonly, available_memory=0, **options) as c:
        assert dict(c) == expected
        c.flush()
    assert tree(path) == before


def test_an_old_chest_opened_for_reading_alone_takes_nothing_in(path):
    old("pickle", path)
    before = tree(path)
    with Chest(path=path, readonly=True) as c:
        with pytest.raises(ReadOnlyError):
            c["new"] = 1
        with pytest.raises(ReadOnlyError):
            del c["x"]
        c["x"].append("never written")
        c.flush()
    assert tree(path) == before


def test_lists_that_json_made_of_tuples_are_tuples_again(path):
    pairs = [[["a", ["b", 1]], "_a/b"], ["c", "c"]]
    make(path, pairs, {"_a/b": [1], "c": [2]}, json_dumps)
    with Chest(path=path, **JSON) as c:
        assert dict(c) == {("a", ("b", 1)): [1], "c": [2]}


def test_an_old_chest_in_compressed_files_opens(path):
    def dumps(value):
        return gzip.compress(pickle.dumps(value))

    make(path, [("x", "x"), ("y", "y")], {"x": [1], "y": [2]}, dumps)
    with Chest(path=path, open=gzip.open) as c:
        assert dict(c) == {"x": [1], "y": [2]}
        c["z"] = [3]
    with Chest(path=path, open=gzip.open) as c:
        assert dict(c) == {"x": [1], "y": [2], "z": [3]}
        c._check()


# Windows takes none but the last of these.
NAMES = ["con", "aux.txt", "x\n", "x.", "a:b", "a\\b", "_a/nul"] if os.name == "posix" else []


@pytest.mark.parametrize("name", [*NAMES, "a b"])
def test_values_under_names_that_are_given_no_more_are_read_and_removed(path, name):
    make(path, [("k", name), ("x", "x")], {name: [1], "x": [2]})
    with Chest(path=path) as c:
        assert dict(c) == {"k": [1], "x": [2]}
        c["new"] = [3]
        c.flush()
        c._check()
        assert name in tree(path)
    with Chest(path=path) as c:
        assert dict(c) == {"k": [1], "x": [2], "new": [3]}
        c["k"] = [4]
        c.flush()
        c._check()
        assert tree(path).keys() == {".keys", "k", "x", "new"}


def test_an_old_chest_without_keys_is_an_empty_one(path):
    make(path, [], {})
    with Chest(path=path) as c:
        assert dict(c) == {}
        c["x"] = 1
        c.flush()
        assert is_modern(path)
    with Chest(path=path) as c:
        assert dict(c) == {"x": 1}


# -- brought to the index of today ----------------------------------------------------------------


def set_a_key(c):
    c["new"] = ["value"]


def replace_a_key(c):
    c[next(iter(c))] = "replaced"


def delete_a_key(c):
    del c[next(iter(c))]


def change_a_value(c):
    key = next(key for key in c if isinstance(c[key], list))
    c[key].append("changed")


@pytest.mark.parametrize("change", [set_a_key, replace_a_key, delete_a_key, change_a_value])
@pytest.mark.parametrize(("name", "expected", "options"), OLD)
def test_the_first_commit_brings_an_old_chest_to_the_new_index(
    path, name, expected, options, change
):
    old(name, path)
    with Chest(path=path, **options) as c:
        change(c)
        c.flush()
        assert is_modern(path)
        c._check()
        after = [*c.items()]
    for _ in range(2):
        with Chest(path=path, **options) as c:
            assert [*c.items()] == after
            assert [*map(type, c)] == [type(key) for key, _ in after]
            c._check()
            c["once more"] = 1
        after += [("once more", 1)] if ("once more", 1) not in after else []


def test_spilling_an_old_chest_is_a_commit_too(path):
    old("pickle", path)
    with Chest(path=path, available_memory=0) as c:
        c["new"] = [1]
        assert is_modern(path)
        assert dict(c) == MADE["PICKLE"] | {"new": [1]}
        c._check()


def test_the_values_stay_in_their_files(path):
    old("pickle", path)
    before = tree(path)
    with Chest({"new": 1}, path=path) as c:
        c.flush()
        assert c.key_to_filename(("d", ("e", "f"))) == os.path.join(path, "_d/_e/f")
    after = tree(path)
    del before[".keys"], after[".keys"], after["new"]
    assert after == before


@pytest.mark.parametrize(("name", "expected", "options"), OLD)
def test_the_values_have_digests_from_then_on(path, name, expected, options):
    old(name, path)
    with Chest({"new": 1}, path=path, **options) as c:
        c.flush()
        full = c.key_to_filename(next(iter(expected)))
    with open(full, "rb") as file:
        content = file.read()
    write(full, content.replace(b"2", b"3", 1) if b"2" in content else content[::-1])
    with Chest(path=path, **options) as c:
        with pytest.raises(CorruptValueError):
            c[next(iter(expected))]
        rest = [*expected.items()][1:] + [("new", 1)]
        assert [(key, c[key]) for key in [*c][1:]] == rest


def test_keys_that_shared_a_file_get_one_each(path):
    shared = "c4ca4238a0b923820dcc509a6f75849b"
    pairs = [(1, shared), ("x", "x"), ("1", shared), (("1",), shared)]
    make(path, pairs, {shared: ["last"], "x": [2]})
    values = {1: ["last"], "x": [2], "1": ["last"], ("1",): ["last"]}
    with Chest(path=path) as c:
        assert [*c.items()] == [*values.items()]
        c["new"] = values["new"] = 3
        c.flush()
        c._check()
        assert len({c.key_to_filename(key) for key in c}) == 5
        c[1].append("of 1 alone")
        del c["1"]
    del values["1"]
    values[1] = ["last", "of 1 alone"]
    with Chest(path=path) as c:
        assert [*c.items()] == [*values.items()]
        c._check()


@pytest.mark.parametrize("written", [0, 3])
def test_a_copy_that_fails_leaves_nothing(path, monkeypatch, written):
    def copy(source, target):
        with open(target, "wb") as file:
            file.write(b"x" * written)
        raise OSError(28, "No space left on device")

    make(path, [(1, "shared"), (2, "shared")], {"shared": ["both"]})
    with Chest(path=path) as c:
        c[3] = 3
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfile", copy)
            for _ in range(3):
                with pytest.raises(UnsavedError, match="No space"):
                    c.flush()
        assert sorted(os.listdir(path)) == [".keys", "shared"]
        c.flush()
        c._check()
        assert dict(c) == {1: ["both"], 2: ["both"], 3: 3}


def test_a_value_that_is_gone_costs_that_value_alone(path):
    make(path, [("x", "x"), ("gone", "gone"), ("y", "y")], {"x": 1, "y": 2})
    for _ in range(2):
        with Chest(path=path) as c:
            assert [*c][:3] == ["x", "gone", "y"]
            assert (c["x"], c["y"]) == (1, 2)
            with pytest.raises(CorruptValueError):
                c["gone"]
            c["new"] = 3
    with Chest(path=path) as c:
        del c["gone"]
        c.flush()
        c._check()
        assert dict(c) == {"x": 1, "y": 2, "new": 3}


def test_a_cleared_old_chest_leaves_nothing_of_its_own(path):
    old("pickle", path)
    write(os.path.join(path, "_a", "foreign"), b"foreign")
    with Chest(path=path) as c:
        c.clear()
        c.flush()
        assert tree(path).keys() == {".keys", "_a/foreign"}
    with Chest(path=path) as c:
        assert not c


def test_a_dropped_old_chest_leaves_nothing_at_all(path):
    old("pickle", path)
    Chest(path=path).drop()
    assert not os.path.exists(path)


def my_dump(value, file):
    pickle.dump(value, file)


def my_load(file):
    return pickle.load(file)


def test_keys_of_a_load_of_ones_own_are_never_lost(path):
    day = dt.date(2014, 5, 1)
    make(path, [("x", "x"), (day, "day")], {"x": [1], "day": [2]})
    with Chest(path=path, dump=my_dump, load=my_load) as c:
        assert dict(c) == {"x": [1], day: [2]}
        c["new"] = [3]
        with suppress(ChestError):  # such keys cannot be written without pickle
            c.flush()
        assert dict(c) == {"x": [1], day: [2], "new": [3]}
        abandon(c)
    with Chest(path=path) as c:
        assert c.items() >= {"x": [1], day: [2]}.items()


# -- several handles ------------------------------------------------------------------------------


def test_handles_that_were_open_before_follow_to_the_new_index(path):
    old("pickle", path)
    expected = dict(MADE["PICKLE"])
    with Chest(path=path) as c, Chest(path=path) as other, Chest(path=path) as reader:
        assert dict(other) == dict(reader) == expected
        other["mine"] = "unsaved"
        other["nested"]["mine"] = "changed"
        del other["two words"]
        c["x"] = "replaced"
        c.flush()
        assert is_modern(path)
        assert other["x"] == reader["x"] == "replaced"
        assert dict(reader) == expected | {"x": "replaced"}
        other.flush()
        del expected["two words"]
        expected["nested"] = expected["nested"] | {"mine": "changed"}
        expected |= {"x": "replaced", "mine": "unsaved"}
        assert dict(c) == dict(other) == dict(reader) == expected
        c._check()
        other._check()


def test_clean_values_of_other_handles_are_not_written_again(path):
    old("pickle", path)
    with Chest(path=path) as c, Chest(path=path) as other:
        assert dict(other) == MADE["PICKLE"]
        c["new"] = 1
        c.flush()
        before = tree(path)
        other.flush()
        assert "new" in other
        assert tree(path) == before


# -- a crash --------------------------------------------------------------------------------------

STEPS = [
    (os, "replace"),
    (shutil, "copyfile"),
    (Index, "append"),
    (Index, "publish"),
    (Directory, "place"),
    (chest.store.Store, "_modernize"),
]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_a_crash_in_the_first_commit_loses_nothing(path, monkeypatch, owner, name, late):
    values = {"x": [1], "y": [1], "z": [2]}
    make(path, [("x", "same"), ("y", "same"), ("z", "z")], {"same": [1], "z": [2]})
    real = getattr(owner, name)

    def interrupted(*args):
        if late:
            real(*args)
        raise KeyboardInterrupt

    c = Chest(path=path)
    c["new"] = [3]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            c.flush()
    abandon(c)
    with Chest(path=path) as c:
        assert dict(c) in (values, values | {"new": [3]})
        c["later"] = [4]
        c["new"] = [3]
        c.flush()
        c._check()
        assert dict(c) == values | {"new": [3], "later": [4]}


# -- what is no old index -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected", "options"), OLD[:2])
def test_an_old_index_that_is_cut_short_is_an_error_and_nothing_is_changed(
    path, name, expected, options
):
    old(name, path)
    with open(os.path.join(path, ".keys"), "rb") as file:
        content = file.read()
    for length in [*range(0, len(content), 7), len(content) - 1]:
        write(os.path.join(path, ".keys"), content[:length])
        before = tree(path)
        with pytest.raises(CorruptIndexError):
            Chest(path=path, **options)
        assert tree(path) == before


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"ab": 1},
        "ab",
        ["ab"],
        5,
        None,
        ["x"],
        [["x"]],
        [["x", "x", "x"]],
        [["x", 5]],
        [["x", None]],
        [[{}, "x"]],
        [["x", "../outside"]],
        [["x", "/outside"]],
        [["x", ""]],
        [["x", ".keys"]],
        [["y", "y"], ["x", "a/../../outside"]],
    ],
    ids=repr,
)
@pytest.mark.parametrize("options", [{}, JSON], ids=["pickle", "json"])
def test_a_file_that_is_no_list_of_pairs_is_an_error_and_nothing_is_changed(
    path, tmp_path, content, options
):
    make(path, content, {}, json_dumps if options else pickle.dumps)
    (tmp_path / "outside").write_text("1")
    before = tree(tmp_path)
    with pytest.raises(CorruptIndexError):
        Chest(path=path, **options)
    assert tree(tmp_path) == before


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_where_an_index_in_json_belongs_is_never_run(path, tmp_path):
    ran = tmp_path / "ran"
    make(path, [("x", Hostile(str(ran)))], {})
    before = tree(path)
    for mode in (None, "t", "b"):
        with pytest.raises(CorruptIndexError):
            Chest(path=path, mode=mode, **JSON)
    assert tree(path) == before
    assert not ran.exists()


def test_a_pickle_where_a_value_in_json_belongs_is_never_run(path, tmp_path):
    ran = tmp_path / "ran"
    make(path, [["x", "x"], ["y", "y"]], {"y": [2]}, json_dumps)
    write(os.path.join(path, "x"), pickle.dumps(Hostile(str(ran))))
    for _ in range(2):
        with Chest(path=path, **JSON) as c:
            with pytest.raises(ChestError):
                c["x"]
            assert c["y"] == [2]
            c["new"] = 1
    assert not ran.exists()


def refuse_to_tell(monkeypatch, *names):
    """Let the system not say what certain files are."""
    real = os.stat

    def stat(full, *args, **options):
        if os.path.basename(full) in names:
            raise OSError(5, "Input/output error", full)
        return real(full, *args, **options)

    monkeypatch.setattr(os, "stat", stat)


def test_a_file_of_which_the_system_does_not_tell_is_not_taken_for_gone(path, monkeypatch):
    make(path, [("x", "x"), ("y", "y")], {"x": [1], "y": [2]})
    with monkeypatch.context() as patch:
        refuse_to_tell(patch, "x")
        with pytest.raises(OSError, match="Input/output error"):
            Chest(path=path)
    with Chest(path=path) as c:
        c["z"] = 3
        c.flush()
    with Chest(path=path) as c:
        assert dict(c) == {"x": [1], "y": [2], "z": 3}


def test_nor_is_one_that_keys_shared(path, monkeypatch):
    make(path, [(1, "shared"), ("1", "shared")], {"shared": ["last"]})
    with Chest(path=path) as c:
        c["z"] = 3
        with monkeypatch.context() as patch:
            refuse_to_tell(patch, "shared")
            with pytest.raises(ChestError, match="Input/output error"):
                c.flush()
    with Chest(path=path) as c:
        assert dict(c) == {1: ["last"], "1": ["last"], "z": 3}
