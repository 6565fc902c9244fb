"""Commits: all or nothing at every step, for several handles, and for a power cut."""

import dataclasses
import datetime as dt
import errno
import gc
import json
import logging
import os
import pickle
import random
import shutil
import sys
import threading
import time
import types
from contextlib import suppress
from io import FileIO

import pytest
from xxhash import xxh3_64_intdigest

import chest.head
import chest.index
import chest.ledger
import chest.store
import chest.upkeep
from chest import Chest, CorruptIndexError, CorruptValueError, ReadOnlyError, UnsavedError
from chest.columns import Entry, Puts, encode
from chest.directory import Directory
from chest.frames import MAGIC, WORD, encode_length, frame, log_size
from chest.index import Index
from chest.ledger import Ledger
from chest.serialize import Serializer
from chest.store import Store

AGES_AGO = (0, 0)
drops_it_open = pytest.mark.filterwarnings("ignore:a chest was not closed:ResourceWarning")
JSON = {"dump": json.dump, "load": json.load}


def tree(path):
    """Everything below a directory: files with their content, folders."""
    found = {}
    for folder, folders, files in os.walk(path):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                found[os.path.relpath(os.path.join(folder, name), path)] = file.read()
        for name in folders:
            found[os.path.relpath(os.path.join(folder, name), path)] = None
    return found


def files(path):
    return {name for name, content in tree(path).items() if content is not None} - {".keys"}


def keys_file(path):
    return os.path.join(path, ".keys")


def append(path, *payloads):
    """Leave frames beyond the committed length, as a crash does."""
    with open(keys_file(path), "ab") as file:
        file.write(b"".join(map(frame, payloads)))


def block(serial, **entries):
    """One block of values that have files of their own."""
    return [([serial] * len(entries), Puts.of(entries))]


def publish_anyhow(path, payload):
    """Commit a payload that somebody else made, whatever it holds."""
    append(path, payload)
    with open(keys_file(path), "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        file.write(MAGIC + encode_length(size).to_bytes(8, "little"))


def abandon(c):
    """Let go of a chest as a process that dies does: nothing is written or removed."""
    c._finalizer.detach()
    c._memory._end()


def read_back(path, **options):
    """What somebody who opens the chest finds; nothing is changed by that."""
    with Chest(path=path, readonly=True, **options) as c:
        return dict(c)


def compact(c):
    """Commit until the index has been compacted."""
    before = os.stat(keys_file(c.path)).st_ino
    for n in range(3 * len(c) + chest.upkeep.COMPACT_BYTES // 30):
        c["filler"] = n
        c.flush()
        if os.stat(keys_file(c.path)).st_ino != before:
            return
    raise AssertionError("the index was not compacted")


@pytest.fixture
def often(monkeypatch):
    """Let indexes be compacted often."""
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 400)


# -- a crash at any step --------------------------------------------------------------------------


class Crashes:
    """Copies of a directory as a crash before or after each step on its files would leave it."""

    STEPS = ["mkdir", "rename", "replace", "link", "unlink", "rmdir", "write", "fsync"]

    def __init__(self, path, copies, monkeypatch):
        self.path = path
        self.copies = copies
        self.seen = []
        self._off = True
        for name in self.STEPS:
            monkeypatch.setattr(os, name, self._around(getattr(os, name), half=name == "write"))

        class Stepwise(FileIO):
            write = self._around(FileIO.write, half=True)
            truncate = self._around(FileIO.truncate)

        monkeypatch.setattr(chest.head, "FileIO", Stepwise)

    def _around(self, function, *, half=False):
        def step(*args, **options):
            if self._off:
                return function(*args, **options)
            if half:  # the system may write less than it is asked to, but for a single word
                args = (args[0], memoryview(args[1])[: max(len(args[1]) // 2 + 1, WORD)])
            self._copy()
            try:
                return function(*args, **options)
            finally:
                self._copy()

        return step

    def _copy(self):
        self._off = True
        now = tree(self.path)
        if now not in self.seen:
            shutil.copytree(self.path, self._name(len(self.seen)))
            self.seen.append(now)
        self._off = False

    def _name(self, number):
        return os.path.join(self.copies, str(number))

    def __enter__(self):
        self._copy()

    def __exit__(self, *error):
        self._copy()
        self._off = True

    def forget(self):
        """Start again."""
        for number in range(len(self.seen)):
            shutil.rmtree(self._name(number))
        self.seen.clear()

    def found(self):
        """Yield the copies, all staging files in them long abandoned."""
        for number in range(len(self.seen)):
            copy = self._name(number)
            for name in os.listdir(copy):
                if name.startswith(".new-"):
                    os.utime(os.path.join(copy, name), AGES_AGO)
            yield copy


@pytest.fixture
def crashes(path, tmp_path, monkeypatch):
    os.mkdir(tmp_path / "copies")
    return Crashes(path, str(tmp_path / "copies"), monkeypatch)


def before():
    return {"kept": [0], "replaced": [1], "gone": [2], ("a", "kept"): [3], ("a", "gone"): [4]}


def change_values(c):
    c["replaced"] = [10]
    del c["gone"], c["a", "gone"]
    c["new"] = [11]
    c["b", "c", "new"] = [12]
    c["large"] = bytes(200_000)
    c.flush()


def clear(c):
    c.clear()
    c["gone"] = "back"
    c.flush()


def only_delete(c):
    del c["gone"], c["a", "kept"], c["a", "gone"]
    c.write_keys()


def spill(c):
    c["kept"].append(5)
    c["new"] = [1]
    c.available_memory = 0


def take_over(c):
    with Chest({"kept": "taken", "linked": [1]}) as other:
        c.update(other)


def change_nothing(c):
    c.flush()


CHANGES = [change_values, clear, only_delete, spill, take_over]


def assert_all_or_nothing(crashes, was, after):
    outcomes = []
    for copy in crashes.found():
        outcome = read_back(copy)
        assert outcome in (was, after)
        assert [*outcome] in ([*was], [*after])
        outcomes.append(outcome == after)
        with Chest(path=copy) as c:
            assert dict(c) == outcome
            c["later"] = "x"
            c.flush()
            c._check()
        assert read_back(copy) == outcome | {"later": "x"}
    assert outcomes == sorted(outcomes), "once committed it stays so"
    assert outcomes[0] is False
    assert outcomes[-1] is True


@pytest.mark.parametrize("change", CHANGES)
def test_a_crash_at_any_step_leaves_the_chest_before_or_after_the_commit(path, crashes, change):
    with Chest(before(), path=path) as c:
        c.flush()
        with crashes:
            change(c)
        after = dict(c)
    assert len(crashes.seen) > 3
    assert_all_or_nothing(crashes, before(), after)


@pytest.mark.parametrize("change", CHANGES)
def test_so_does_one_while_a_commit_of_several_frames_is_written(
    path, crashes, change, monkeypatch
):
    monkeypatch.setattr(chest.ledger, "FRAME_KEYS", 2)
    with Chest(before(), path=path) as c:
        c.flush()
        with crashes:
            change(c)
        after = dict(c)
    assert_all_or_nothing(crashes, before(), after)


def test_so_does_one_while_the_index_is_compacted(path, crashes, often):
    with Chest(before(), path=path) as c:
        c.flush()
        compact(c)
        inode = os.stat(keys_file(path)).st_ino
        while os.stat(keys_file(path)).st_ino == inode:
            was = dict(c)
            c["filler"] += 1
            crashes.forget()
            with crashes:
                c.flush()
        after = dict(c)
    assert_all_or_nothing(crashes, was, after)


def test_so_does_one_while_what_a_crash_left_is_swept(path, tmp_path, monkeypatch):
    first = Crashes(path, str(tmp_path / "first"), monkeypatch)
    os.mkdir(first.copies)
    with Chest(before(), path=path) as c:
        c.flush()
        with first:
            change_values(c)
    for number, copy in enumerate([*first.found()][4::5]):
        was = read_back(copy)
        again = Crashes(copy, str(tmp_path / f"again{number}"), monkeypatch)
        os.mkdir(again.copies)
        with Chest(path=copy) as c:
            with again:
                c["kept"] = "changed"
                c.flush()
            after = dict(c)
        assert_all_or_nothing(again, was, after)


def test_a_crash_while_a_chest_is_made_leaves_an_empty_one(path, crashes):
    os.mkdir(path)
    with crashes:
        with Chest({"x": 1}, path=path):
            pass
    for copy in crashes.found():
        with Chest(path=copy) as c:
            assert dict(c) in ({}, {"x": 1})
            c["later"] = 1
            c.flush()
            c._check()


def test_a_crash_while_a_chest_is_dropped_leaves_it_whole_or_empty(path, crashes):
    c = Chest(before(), path=path)
    c.flush()
    with suppress(FileNotFoundError), crashes:  # the last copy would be of nothing
        c.drop()
    for copy in crashes.found():
        assert (read_back(copy) if os.path.exists(keys_file(copy)) else {}) in (before(), {})
        with Chest(path=copy) as c:
            c["later"] = 1
            c.flush()
            c._check()


def test_a_crash_leaves_no_folder_behind(path, crashes):
    with Chest(path=path) as c:
        with crashes:
            c["a", "b", "c"] = 1
            c.flush()
    for copy in crashes.found():
        with Chest(path=copy) as c:
            c["x"] = 1
            c.flush()
            c.clear()
        assert [*tree(copy)] == [".keys"]


# -- an interrupt at any step ---------------------------------------------------------------------

INTERRUPTED = [
    (Index, "append", False, False),
    (Index, "append", True, False),
    (Directory, "place", False, False),
    (Directory, "place", True, False),
    (Index, "publish", False, False),
    (Index, "publish", True, True),
    (Ledger, "committed", False, True),
    (Ledger, "committed", True, True),
    (Index, "acknowledge", False, True),
    (Index, "acknowledge", True, True),
    (Directory, "remove", False, True),
    (Directory, "remove", True, True),
]


def interrupt(monkeypatch, owner, name, error, *, late):
    """Raise an error before or after a method does its work, the first time."""
    real = getattr(owner, name)
    raised = []

    def method(*args):
        done = real(*args) if late or raised else None
        if not raised:
            raised.append(error)
            raise error
        return done

    monkeypatch.setattr(owner, name, method)


STEPS = [
    pytest.param(owner, name, late, committed, id=f"{'after' if late else 'before'} {name}")
    for owner, name, late, committed in INTERRUPTED
]


@pytest.mark.parametrize(("owner", "name", "late", "committed"), STEPS)
def test_a_process_that_dies_of_an_interrupt_leaves_all_or_nothing(
    path, monkeypatch, owner, name, late, committed
):
    with Chest(before(), path=path):
        pass
    c = Chest(path=path)
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, KeyboardInterrupt(), late=late)
        with pytest.raises(KeyboardInterrupt):
            change_values(c)
    after = dict(c)
    abandon(c)
    left = after if committed else before()
    assert read_back(path) == left
    with Chest({"later": 1}, path=path) as c:
        c.flush()
        c._check()
        assert dict(c) == left | {"later": 1}


@pytest.mark.parametrize(("owner", "name", "late", "committed"), STEPS)
def test_a_chest_goes_on_after_an_interrupt(path, monkeypatch, owner, name, late, committed):
    with Chest(before(), path=path) as c, Chest(path=path) as other:
        c.flush()
        with monkeypatch.context() as patch:
            interrupt(patch, owner, name, KeyboardInterrupt(), late=late)
            with pytest.raises(KeyboardInterrupt):
                change_values(c)
        after = {key: value for key, value in before().items() if "gone" not in key}
        after |= {"replaced": [10], "new": [11], ("b", "c", "new"): [12], "large": bytes(200_000)}
        assert dict(c) == after
        assert len(other) == len(after if committed else before())
        c["later"] = after["later"] = 1
        c.flush()
        c._check()
        for key in after:
            c.move_to_disk(key)
        c.flush()
        assert dict(c) == dict(other) == read_back(path) == after
        c._check()


@pytest.mark.parametrize(("owner", "name", "late"), [
    pytest.param(Index, "append", True, id="after append"),
    pytest.param(Directory, "place", False, id="before place"),
    pytest.param(Directory, "place", True, id="after place"),
    pytest.param(Index, "publish", False, id="before publish"),
])
def test_a_disk_that_refuses_leaves_everything_as_it_was(path, monkeypatch, owner, name, late):
    with Chest(before(), path=path) as c:
        c.flush()
        was = tree(path)
        with monkeypatch.context() as patch:
            interrupt(patch, owner, name, OSError(28, "No space left on device"), late=late)
            with pytest.raises(Exception, match="No space left on device"):
                change_values(c)
        assert tree(path) == was
        after = dict(c)
        c.flush()
        c._check()
        assert read_back(path) == after


def test_a_disk_that_is_full_in_the_middle_of_a_frame_leaves_everything_as_it_was(
    path, monkeypatch
):
    full = []

    class Full(FileIO):
        def write(self, data):
            if not full:
                return super().write(data)
            full.append(super().write(data[:10]) if len(full) == 1 else None)
            if len(full) == 2:
                return 10
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(chest.head, "FileIO", Full)
    with Chest(before(), path=path) as c:
        c.flush()
        was = tree(path)
        full.append("now")
        with pytest.raises(Exception, match="No space left on device"):
            change_values(c)
        assert tree(path) == was
        full.clear()
        c.flush()
        assert read_back(path) == dict(c)


def test_an_interrupt_while_frames_of_others_come_in_loses_none_of_them(path, monkeypatch):
    with Chest(path=path) as c, Chest(path=path) as other:
        other["x"] = [1]
        other.flush()
        other["y"] = [2]
        other.flush()
        for late in (False, True):
            with monkeypatch.context() as patch:
                interrupt(patch, Ledger, "apply", KeyboardInterrupt(), late=late)
                with pytest.raises(KeyboardInterrupt):
                    len(c)
        assert dict(c) == {"x": [1], "y": [2]}
        c["z"] = [3]
        c.flush()
        c._check()
        assert dict(other) == {"x": [1], "y": [2], "z": [3]}


def test_a_staging_file_that_somebody_removed_is_written_again(path, monkeypatch):
    real, lost = Directory.place, []

    def place(self, staged, name):
        if not lost:
            lost.append(name)
            os.unlink(staged)
        real(self, staged, name)

    monkeypatch.setattr(Directory, "place", place)
    with Chest({"x": [1], "y": [2]}, path=path) as c:
        c.flush()
        c._check()
        assert read_back(path) == {"x": [1], "y": [2]}
    assert lost == ["x"]


def test_an_interrupt_while_a_value_is_written_leaves_no_file(path):
    def dump(value, file):
        file.write(b"half a value")
        raise KeyboardInterrupt

    c = Chest({"x": [1]}, path=path, dump=dump)
    with pytest.raises(KeyboardInterrupt):
        c.flush()
    assert files(path) == set()
    abandon(c)


def test_an_error_of_the_disk_tells_where_and_how_much(path, monkeypatch):
    with Chest({"x": [1]}, path=path) as c:
        with monkeypatch.context() as patch:
            interrupt(patch, Index, "publish", OSError(28, "No space left on device"), late=False)
            told = r"about \d+ bytes needed, \d+ bytes are free"
            with pytest.raises(OSError, match=told) as caught:
                c.move_to_disk("x")
        assert caught.value.errno == 28
        assert caught.value.filename == keys_file(path)


# -- a new directory ------------------------------------------------------------------------------


def test_a_file_system_without_links_will_do(path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted", source)

    monkeypatch.setattr(os, "link", refuse)
    with Chest({"x": 1}, path=path) as c:
        c.flush()
        c._check()
    assert read_back(path) == {"x": 1}


def test_two_handles_may_make_a_chest_at_the_same_time(path, monkeypatch):
    real, others = os.link, []

    def link(source, target):
        if not others:
            others.append(None)
            others.append(Chest({"of another": 1}, path=path))
            others[1].flush()
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    with Chest({"mine": 2}, path=path) as c:
        assert dict(c) == {"of another": 1, "mine": 2}
        c.flush()
        c._check()
        assert dict(others[1]) == {"of another": 1, "mine": 2}
    others.pop().close()


# -- what a crash left ----------------------------------------------------------------------------


def value_file(path, name, value):
    """Write a value file; return its entry."""
    data = pickle.dumps(value, 5)
    with open(os.path.join(path, name), "wb") as file:
        file.write(data)
    return Entry(name, 0, len(data), xxh3_64_intdigest(data))


def test_a_frame_beyond_the_length_does_not_count_and_its_files_are_swept_by_the_next_writer(path):
    with Chest({"x": 1}, path=path):
        pass
    entry = value_file(path, "new", 2)
    value_file(path, "foreign", 3)
    append(path, encode(block(1, new=entry), first=True, deleted=["x"]))
    left = tree(path)
    with Chest(path=path, readonly=True) as reader, Chest(path=path) as c:
        assert dict(reader) == dict(c) == {"x": 1}
        c.flush()
        assert tree(path) == left, "a reader sweeps nothing"
        c["y"] = 4
        c.flush()
        assert files(path) == {"x", "y", "foreign"}
        assert dict(reader) == {"x": 1, "y": 4}


def test_what_could_not_be_swept_is_swept_later(path, monkeypatch):
    with Chest({"x": 1}, path=path):
        pass
    entry = value_file(path, "new", 2)
    append(path, encode(block(1, new=entry), first=True))
    real = os.unlink

    def unlink(full, **options):
        if os.path.basename(full) == "new":
            raise PermissionError(13, "in use", full)
        real(full, **options)

    with Chest(path=path) as c:
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", unlink)
            c["y"] = 3
            c.flush()
            assert files(path) == {"x", "y", "new"}
        c["z"] = 4
        c.flush()
        assert files(path) == {"x", "y", "z"}
        c._check()


@pytest.mark.parametrize("whose", ["ours", "another's"])
def test_what_could_not_be_looked_at_is_looked_at_later(path, monkeypatch, whose):
    with Chest({"x": 1}, path=path):
        pass
    append(path, encode(block(1, new=value_file(path, "new", 2)), first=True))
    if whose != "ours":
        value_file(path, "new", "written by somebody else since")
    real = Serializer.measure

    def measure(self, full, *args):
        if os.path.basename(full) == "new":
            raise OSError(errno.EIO, "Input/output error", full)
        return real(self, full, *args)

    with Chest(path=path) as c:
        with monkeypatch.context() as patch:
            patch.setattr(Serializer, "measure", measure)
            for n in range(2):
                c["y"] = n
                c.flush()
                assert "new" in files(path)
        c["z"] = 4
        c.flush()
        assert ("new" in files(path)) is (whose != "ours")


def test_the_values_that_count_are_not_swept_whatever_lies_beyond(path):
    with Chest({"x": 1, "y": 2}, path=path) as c:
        c.flush()
        entries = {key: c._memory.ledger.entry(row) for key, row in c._memory.ledger.stored()}
    append(path, encode(block(5, **entries), first=True))
    append(path, encode([], first=True, cleared=True, left=entries.values()))
    with Chest({"z": 3}, path=path) as c:
        c.flush()
        c._check()
    assert read_back(path) == {"x": 1, "y": 2, "z": 3}


def test_a_file_of_another_made_under_a_name_that_was_never_committed_stays(path):
    with Chest({"x": 1}, path=path):
        pass
    append(path, encode(block(1, new=value_file(path, "new", 2)), first=True))
    value_file(path, "new", "written by somebody else since")
    with Chest({"y": 4}, path=path):
        pass
    assert files(path) == {"x", "y", "new"}


@pytest.mark.parametrize(
    "beyond",
    [
        pytest.param(b"\0", id="a byte"),
        pytest.param(b"anything at all", id="anything"),
        pytest.param(frame(encode([], deleted=["x"]))[:-1], id="half a frame"),
        pytest.param(frame(pickle.dumps("text")), id="a frame that is none"),
        pytest.param(frame(pickle.dumps(print)), id="a frame that names a function"),
    ],
)
def test_whatever_lies_beyond_the_length_does_not_count(path, beyond):
    with Chest({"x": 1}, path=path):
        pass
    with open(keys_file(path), "ab") as file:
        file.write(beyond)
    with Chest(path=path) as c:
        assert dict(c) == {"x": 1}
        c["y"] = 2
        c.flush()
        c._check()
    assert read_back(path) == {"x": 1, "y": 2}


# -- damage and malice ----------------------------------------------------------------------------


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("options", [{}, JSON], ids=["pickle", "json"])
@pytest.mark.parametrize("open_already", [False, True])
def test_a_frame_with_the_right_checksum_runs_nothing(path, tmp_path, options, open_already):
    with Chest({"x": 1}, path=path, **options):
        pass
    ran = tmp_path / "ran"
    with Chest(path=path, **options) as c:
        publish_anyhow(path, pickle.dumps(Hostile(str(ran)), 5))
        with pytest.raises(CorruptIndexError, match="mkdir"):
            if open_already:
                c["x"]
            else:
                Chest(path=path, **options)
        abandon(c)
    assert not ran.exists()


def test_a_pickled_key_stays_closed_in_a_chest_that_is_not_of_pickles(path, tmp_path):
    with Chest({"x": 1}, path=path, **JSON):
        pass
    ran = tmp_path / "ran"
    hostile = pickle.dumps(Hostile(str(ran)), 5)
    numbers = ("Q", bytes(8))
    block = (([], [hostile]), 9, ["file"], 0, numbers, numbers)
    publish_anyhow(path, pickle.dumps((True, False, None, [], ([], [hostile]), [block]), 5))
    with Chest(path=path, **JSON) as c:
        assert dict(c) == {"x": 1}
        c["y"] = 2
    assert read_back(path, **JSON) == {"x": 1, "y": 2}
    assert not ran.exists()


def test_a_frame_whose_content_is_none_is_an_error_and_nothing_is_changed(path):
    with Chest({"x": 1}, path=path):
        pass
    publish_anyhow(path, pickle.dumps((True, False, 5, [], ([[]], []), []), 5))
    before = tree(path)
    for _ in range(2):
        with pytest.raises(CorruptIndexError):
            Chest(path=path)
    assert tree(path) == before


def test_a_damaged_value_costs_that_value_alone(path):
    with Chest({"x": [1], "y": [2], "z": [3]}, path=path):
        pass
    value_file(path, "x", [9])
    os.unlink(os.path.join(path, "y"))
    with Chest(path=path) as c:
        for key in ("x", "y"):
            with pytest.raises(CorruptValueError) as caught:
                c[key]
            assert (caught.value.key, caught.value.path) == (key, os.path.join(path, key))
        assert c["z"] == [3]
        c["x"] = [4]
        del c["y"]
        c.flush()
    assert read_back(path) == {"x": [4], "z": [3]}


# -- keys that cannot be read ---------------------------------------------------------------------


@pytest.fixture
def vanishing():
    """A class for keys, in a module that can go away."""
    module = types.ModuleType("vanishing")

    @dataclasses.dataclass(frozen=True)
    class Place:
        x: int

    Place.__module__, Place.__qualname__ = "vanishing", "Place"
    module.Place = Place
    sys.modules["vanishing"] = module
    yield Place
    sys.modules.pop("vanishing", None)


def test_a_key_whose_class_has_gone_hides_no_other_and_is_never_compacted_away(
    path, vanishing, often, caplog
):
    with Chest({"x": 1, vanishing(1): 2, "y": 3}, path=path):
        pass
    module = sys.modules.pop("vanishing")
    with caplog.at_level(logging.WARNING, "chest"), Chest(path=path) as c:
        assert dict(c) == {"x": 1, "y": 3}
        for n in range(30):
            c["x"] = n
            c.flush()
        c._check()
        del c["y"]
    assert "vanishing" in caplog.text
    sys.modules["vanishing"] = module
    with Chest(path=path) as c:
        assert [*c.items()] == [("x", 29), (vanishing(1), 2)]
        compact(c)
        c._check()
    del c
    assert read_back(path).keys() == {"x", vanishing(1), "filler"}


# -- compaction -----------------------------------------------------------------------------------


def test_an_index_of_dead_records_is_compacted(path, often):
    with Chest(path=path) as c:
        sizes = []
        for n in range(40):
            for key in "abc":
                c[key] = (key, n)
            c.flush()
            sizes.append(os.path.getsize(keys_file(path)))
        assert max(sizes) < 6 * sizes[0]
        c._check()
        assert [*c] == [*"abc"]
    assert read_back(path) == {key: (key, 39) for key in "abc"}


def test_an_index_of_many_frames_is_compacted_though_every_record_lives(path):
    keys = {f"k{n}": (n,) for n in range(2000)}
    with Chest(path=path) as c:
        sizes = set()
        for key, value in keys.items():
            c[key] = value
            c.flush()
            sizes.add(os.path.getsize(keys_file(path)))
        c._check()
    with Chest(keys, path=path + "-at-once") as c:
        c.flush()
        at_once = os.path.getsize(keys_file(c.path))
    assert max(sizes) < 3 * at_once
    assert read_back(path) == keys


LONG = "x" * 20_000


def set_and_delete(c, n):
    c[n, LONG] = c.pop((n - 1, LONG), 1)
    c.flush()
    del c[n, LONG]


def overwrite_among_new_ones(c, n):
    c[LONG] = n
    c.update({(n, j): j for j in range(20)})


def delete_as_another_is_set(c, n):
    c[n, LONG] = 1
    c.flush()
    del c[n, LONG]
    c[n] = 1


def delete_many_long_ones(c, n):
    if n == 0:
        c.update({(m, LONG): m for m in range(150)})
    elif n <= 150:
        del c[n - 1, LONG]


def delete_many_at_a_time(c, n):
    if n == 0:
        c.update({m: m for m in range(6000)})
    elif n <= 30:
        for m in range(200 * n - 200, 200 * n):
            del c[m]


def delete_all_but_some(c, n):
    for m in range(10 * n, 10 * n + 10):
        c.pop(f"k{m}", None)


def delete_files(c, n):
    if n == 0:
        c.update({f"one in a file of its own, {m}": bytes(5000) for m in range(150)})
    elif n <= 150:
        del c[f"one in a file of its own, {n - 1}"]


def delete_long_ones_among_many(c, n):
    if n == 0:
        c.update({(m, "y" * 3000): m for m in range(150)})
    elif n <= 150:
        del c[n - 1, "y" * 3000]
        c.update({(n, m): m for m in range(64)})


def move_files_into_packs(c, n):
    if n < 100:
        c.update({f"{m} {'in a file of its own ' * 8}": bytes(5000) for m in range(n, n + 1)})
    elif n == 100:
        c.update({key: 1 for key in c if "own" in key})


def set_one_of_many_that_share_a_part(c, n):
    c["z" * 300, n] = n


def keep_the_newest(c, n):
    c[f"k{3000 + n}"] = n
    del c[f"k{n}"]


def overwrite(c, n):
    c[f"k{n % 50}"] = n


@pytest.mark.parametrize(
    "act",
    [
        set_and_delete,
        overwrite_among_new_ones,
        delete_as_another_is_set,
        delete_many_long_ones,
        delete_many_at_a_time,
        delete_all_but_some,
        delete_files,
        delete_long_ones_among_many,
        move_files_into_packs,
        set_one_of_many_that_share_a_part,
        keep_the_newest,
        overwrite,
    ],
)
def test_the_index_takes_at_most_twice_what_its_keys_need(path, act, monkeypatch):
    floor = 20_000
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", floor)
    with Chest({f"k{n}": n for n in range(3000)}, path=path) as c, Chest(path=path) as other:
        c.flush()
        for n in range(200):
            act(c, n)
            c.flush()
            about = c._memory.ledger.needed
            assert os.path.getsize(keys_file(path)) <= max(2 * about, floor)
            if n % 5 == 0:
                needed = log_size(c._memory.ledger.snapshot())
                assert os.path.getsize(keys_file(path)) <= max(2 * needed, floor)
        c._check()
        assert dict(other) == dict(c)


def test_an_index_that_could_not_be_compacted_is_after_some_time(path, monkeypatch):
    with Chest({"k" * 100 + str(n): None for n in range(3000)}, path=path) as c:
        c.flush()
        size = os.path.getsize(keys_file(path))
        for n in range(2999):
            del c["k" * 100 + str(n)]
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            c.flush()
        assert os.path.getsize(keys_file(path)) > size
        c["x"] = 1
        c.flush()
        assert os.path.getsize(keys_file(path)) > size
        now = time.monotonic()
        monkeypatch.setattr(chest.upkeep.time, "monotonic", lambda: now + chest.upkeep.RETRY)
        c["x"] = 2
        c.flush()
        assert os.path.getsize(keys_file(path)) < 1000
        c._check()


def test_so_is_one_whose_compaction_was_interrupted(path, monkeypatch):
    with Chest({"k" * 100 + str(n): None for n in range(3000)}, path=path) as c:
        c.flush()
        for n in range(2999):
            del c["k" * 100 + str(n)]
        interrupt(monkeypatch, Index, "replace", KeyboardInterrupt(), late=False)
        with pytest.raises(KeyboardInterrupt):
            c.flush()
        assert os.path.getsize(keys_file(path)) > 100_000
        c.flush()
        assert os.path.getsize(keys_file(path)) < 1000


def refuse(*_):
    raise OSError(errno.ENOSPC, "no luck")


@dataclasses.dataclass(frozen=True)
class Labelled:
    n: int
    text: str


def set_in_turn(c, n):
    c.update({n * 16 % 400 + m: n for m in range(16)})


def set_long_ones_of_a_class(c, n):
    c.update({Labelled(n * 16 % 128 + m, "x" * 1000): n for m in range(16)})


def delete_long_ones_of_a_class(c, n):
    if n == 0:
        c.update({Labelled(m, "x" * 500): m for m in range(200)})
    else:
        del c[Labelled(n - 1, "x" * 500)]


def delete_by_one_string_what_was_set_by_many(c, n):
    if n == 0:
        c.update({(("x" * 60 + str(m))[:60], m): m for m in range(3000)})
    elif n < 30:
        text = "x" * 60
        for m in range(100 * n - 100, 100 * n):
            del c[text, m]


def dump_by_a_function_that_has_a_long_name(value, file):
    pickle.dump(value, file)


dump_by_a_function_that_has_a_long_name.__qualname__ *= 6


LONG = "z" * 10_000


def set_many_that_share_a_long_part(c, n):
    c.update({(LONG, n, m): n for m in range(90)})


class Noted(str):
    """A text with attributes."""


def delete_texts_with_long_notes(c, n):
    if n == 0:
        c.update({m: m for m in range(3000)})
    for m in range(180):
        key = Noted(f"text {m}")
        key.note = "x" * 2000
        if n == 0:
            c[key] = m
        elif m == n - 1:
            del c[key]


def delete_what_is_out_of_order(c, n):
    if n == 0:
        c.update({str(m): m for m in range(2000, 0, -1)})
    for m in range(10 * n, 10 * n + 10):
        c.pop(str(m), None)


@pytest.mark.parametrize(
    ("act", "options"),
    [
        (set_long_ones_of_a_class, {}),
        (delete_long_ones_of_a_class, {}),
        (delete_by_one_string_what_was_set_by_many, {}),
        (set_many_that_share_a_long_part, {}),
        (delete_texts_with_long_notes, {}),
        (delete_what_is_out_of_order, {}),
        (delete_what_is_out_of_order, JSON),
        (set_in_turn, {"key_to_filename": lambda key: "\N{GRINNING FACE}" * 50 + str(key)}),
        (set_in_turn, {"dump": dump_by_a_function_that_has_a_long_name}),
    ],
)
def test_so_it_does_where_the_bytes_of_keys_are_misjudged(path, act, options, monkeypatch):
    floor = 20_000
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", floor)
    with Chest(path=path, **options) as c:
        for n in range(200):
            act(c, n)
            c.flush()
            needed = log_size(c._memory.ledger.snapshot())
            assert os.path.getsize(keys_file(path)) <= max(2 * needed, floor)
        c._check()


def named_by_lines_of_text(c, n):
    if n == 0:
        c.update({m: m for m in range(6000)})
        c.flush()
        c.update({("".join(["x"] * 30), m): m for m in range(2500)})
    elif n <= 10:
        text = "x" * 30
        for m in range(250 * n - 250, 250 * n):
            del c[text, m]


def delete_long_ones_of_a_class_among_others(c, n):
    if n == 0:
        c.update({m: m for m in range(10_000)})
        c.update({Labelled(m, "x" * 1000): m for m in range(600)})
    elif n <= 6:
        for m in range(100 * n - 100, 100 * n):
            del c[Labelled(m, "x" * 1000)]
        c[n] = -1


def churn_long_ones_of_a_class_among_short_ones(c, n):
    if n == 0:
        c.update({Labelled(m, ""): m for m in range(1000)})
        c.flush()
    c.update({Labelled(n, "x" * 3000 + str(m)): m for m in range(10)})
    c.flush()
    for m in range(10):
        del c[Labelled(n, "x" * 3000 + str(m))]


def replace_all(c, n):
    for key in list(c):
        del c[key]
    c.update({f"{n:03} entry {m:05}": m for m in range(1000 + n % 7)})


def overwrite_all(c, n):
    c.update({f"entry {m:05}": n for m in range(1000)})


def fill_a_queue_and_empty_it(c, n):
    c.update({(n, m): m for m in range(1200)})
    for key in list(c)[:-700]:
        del c[key]


@pytest.mark.parametrize(
    ("act", "handles"),
    [
        (named_by_lines_of_text, 1),
        (delete_long_ones_of_a_class_among_others, 1),
        (churn_long_ones_of_a_class_among_short_ones, 1),
        (churn_long_ones_of_a_class_among_short_ones, 2),
        (replace_all, 1),
        (replace_all, 2),
        (overwrite_all, 2),
        (overwrite_all, 4),
        (fill_a_queue_and_empty_it, 1),
        (fill_a_queue_and_empty_it, 3),
    ],
)
def test_so_it_does_where_much_changes_at_once_by_whomever(path, act, handles, monkeypatch):
    floor = 20_000
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", floor)
    every = [Chest(path=path) for _ in range(handles)]
    for n in range(40):
        c = every[n % handles]
        act(c, n)
        c.flush()
        needed = log_size(c._memory.ledger.snapshot())
        assert os.path.getsize(keys_file(path)) <= max(2 * needed, floor)
    for c in every:
        c._check()
        c.close()


def nested(kind, depth):
    key = kind()
    for _ in range(depth):
        key = kind([key])
    return key


@pytest.mark.parametrize("depth", [99, 100, 101, 102, 400])
@pytest.mark.parametrize("kind", [tuple, frozenset])
def test_keys_may_be_nested(path, kind, depth):
    key, other = nested(kind, depth), nested(kind, depth - 1)
    with Chest({"a": 1}, path=path) as c:
        for n in range(3):
            c[key] = c[other] = n
            c.flush()
        del c[other]
    with Chest(path=path) as c:
        assert dict(c) == {"a": 1, key: 2}
        c.compact()
    with Chest(path=path) as c:
        assert dict(c) == {"a": 1, key: 2}
        del c[key]
    with Chest(path=path) as c:
        assert dict(c) == {"a": 1}
        c._check()


def test_keys_may_be_nested_as_deeply_as_this_python_goes(path):
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        key = nested(tuple, 2500)
        try:
            pickle.dumps(key)
        except RecursionError:
            pytest.skip("pickle goes less deep, whatever the limit")
        for n in range(3):
            with Chest(path=path) as c:
                c[key] = c["a"] = n
                c.flush()
                c[key] = n + 1
        with Chest(path=path) as c:
            assert c[key] == 3
            del c[key]
        with Chest(path=path) as c:
            assert dict(c) == {"a": 2}
    finally:
        sys.setrecursionlimit(limit)


def counted(monkeypatch, cls, name):
    """Count the calls of a method."""
    calls, real = [], getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda *args: calls.append(1) or real(*args))
    return calls


SNAPSHOTS = ((Ledger, "snapshot"), (Store, "_replace_index"))


@pytest.mark.parametrize("again", ["opened", "rolled back"])
@pytest.mark.parametrize("more", [0, 5])
def test_no_index_is_made_in_vain_by_who_reads_it_anew(path, often, monkeypatch, again, more):
    text = "x" * 200
    with Chest({f"{n} {text}": n for n in range(500)}, path=path) as c:
        c.flush()
    made, replaced = (counted(monkeypatch, *of) for of in SNAPSHOTS)
    with Chest(path=path) as c:
        for n in range(150):
            if again == "opened":
                c.close()
                c = Chest(path=path)
            else:
                with suppress(ZeroDivisionError), c.transaction():
                    c["x"] = n
                    c.flush()
                    1 / 0  # noqa: B018
            del c[f"{n} {text}"]
            c.update({f"{n} {m} {text}": m for m in range(more)})
            c["another"] = n
            c.flush()
        c.close()
    assert len(made) == len(replaced) < 10


@pytest.mark.parametrize("kind", ["dates", "long ones and a queue", "pairs"])
def test_what_is_needed_is_seldom_looked_at_in_vain(path, often, monkeypatch, kind):
    days = [dt.date(2000, 1, 1) + dt.timedelta(n) for n in range(1000)]
    texts = [f"{n:0300}" for n in range(500)]
    with Chest(dict.fromkeys(days if kind == "dates" else texts), path=path):
        pass
    made, replaced = (counted(monkeypatch, *of) for of in SNAPSHOTS)
    looked = counted(monkeypatch, Ledger, "least")
    c = Chest(path=path)
    for n in range(100):
        if kind == "dates":
            c.close()
            c = Chest(path=path)
            c.update(dict.fromkeys(days[n : n + 900 : 60], n))
        elif kind == "pairs":  # whose records may need less than they take, and do not
            c.update({(n, f"one of many {m}"): m for m in range(100)})
        else:
            c.update({(n, m): m for m in range(100)})
            c.flush()
            for m in range(100):
                del c[n, m]
        c.flush()
    c.close()
    assert len(replaced) == len(made)
    assert bool(made) == (kind != "pairs")
    assert kind == "dates" or len(looked) < 12 + 2 * len(made)


def test_what_is_needed_of_an_index_is_found_out_once(path, often, monkeypatch):
    with Chest({f"k{n}": n for n in range(3000)}, path=path) as c:
        c.flush()
        before = os.stat(keys_file(path)).st_ino
        looked = counted(monkeypatch, Ledger, "least")
        c._memory.ledger.needed = 0  # as if nothing were known
        for n in range(100):
            c["another"] = n
            c.flush()
        assert os.stat(keys_file(path)).st_ino == before
        assert len(looked) == 1


def test_an_index_that_would_be_as_long_is_made_anew_once(path, often, monkeypatch):
    with Chest({f"k{n}": n for n in range(3000)}, path=path) as c:
        c.flush()
        made, replaced = (counted(monkeypatch, *of) for of in SNAPSHOTS)
        c._memory.ledger.needed = 0
        monkeypatch.setattr(Ledger, "least", lambda _: 1000)  # as where parts of keys are shared
        for n in range(100):
            c["another"] = n
            c.flush()
        assert len(made) == 1
        assert not replaced


def test_an_index_of_living_records_is_not_compacted(path, often):
    with Chest(path=path) as c:
        c.update(zip(range(40), range(40), strict=True))
        c.flush()
        before = os.stat(keys_file(path)).st_ino
        for n in range(40, 45):
            c[n] = n
            c.flush()
        assert os.stat(keys_file(path)).st_ino == before


def test_keys_keep_their_order_and_values_through_compactions(path, often):
    with Chest(path=path) as c:
        for key in ["d", "c", "b", "a", ("t", 1)]:
            c[key] = [key]
        c.available_memory = 0
        c.flush()
        compact(c)
        del c["c"]
        c["c"] = "last"
        compact(c)
        expected = [("d", ["d"]), ("b", ["b"]), ("a", ["a"]), (("t", 1), [("t", 1)])]
        expected += [("filler", c["filler"]), ("c", "last")]
        assert [*c.items()] == expected
        c._check()
    assert [*read_back(path).items()] == expected


def test_other_handles_follow_a_compaction(path, often):
    with Chest({"x": [1], "y": [2]}, path=path) as c:
        c.flush()
        with Chest(path=path) as other, Chest(path=path, readonly=True) as reader:
            assert other["x"] == reader["x"] == [1]
            other["mine"] = [3]
            compact(c)
            c["x"] = [4]
            c.flush()
            compact(c)
            assert other["x"] == reader["x"] == [4]
            assert other["mine"] == [3]
            other.flush()
            compact(other)
            assert c["mine"] == reader["mine"] == [3]
            assert dict(c) == dict(other) == dict(reader)
            other._check()
        c._check()


def test_a_compaction_that_fails_is_told_and_the_chest_goes_on(path, often, monkeypatch, caplog):
    def refuse(source, target):
        raise PermissionError(13, "in use", target)

    with Chest(path=path) as c:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            for n in range(30):
                c["x"] = n
                c.flush()
        assert 0 < len(caplog.records) < 10
        assert "could not be compacted" in caplog.text
        c._check()
        assert read_back(path) == {"x": 29}
        now = time.monotonic()
        monkeypatch.setattr(chest.upkeep.time, "monotonic", lambda: now + chest.upkeep.RETRY)
        for n in range(30, 90):
            c["x"] = n
            c.flush()
        assert os.path.getsize(keys_file(path)) < 2000
        c._check()


def test_a_compacted_index_knows_what_wrote_the_values(path, often):
    with Chest({"x": "é"}, path=path, **JSON) as c:
        compact(c)
    with Chest(path=path, **JSON) as c:
        assert c["x"] == "é"
        assert c._memory.serializer.text is True


def test_a_compacted_index_knows_the_files_that_could_not_be_removed(path, often, monkeypatch):
    real = os.unlink

    def unlink(full, **options):
        if os.path.basename(full) == "stuck":
            raise PermissionError(13, "in use", full)
        real(full, **options)

    with Chest({"stuck": 1}, path=path) as c:
        c.flush()
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", unlink)
            del c["stuck"]
            compact(c)
            assert "stuck" in files(path)
    with Chest({"x": 1}, path=path) as c:
        c.flush()
        c._check()


# -- several handles ------------------------------------------------------------------------------


def test_what_one_handle_flushed_every_other_sees_at_its_next_operation(path):
    with Chest(path=path) as c, Chest(path=path) as other, Chest(path=path) as reader:
        looks = [
            lambda seen: seen["k"] == n,
            lambda seen: seen.get("k") == n,
            lambda seen: len(seen) == n + 2,
            lambda seen: [*seen] == ["k", *range(n + 1)],
            lambda seen: [*reversed(seen)] == [*reversed(range(n + 1)), "k"],
            lambda seen: n in seen,
            lambda seen: seen.items() >= {("k", n), (n, n)},
            lambda seen: seen == {"k": n} | {m: m for m in range(n + 1)},
        ]
        for n, look in enumerate(looks):
            c["k"] = c[n] = n
            c.flush()
            assert look(other)
            assert look(reader)
        c.clear()
        c.flush()
        assert not other
        assert not reader


def test_nothing_is_seen_before_it_is_committed(path):
    with Chest({"x": 1}, path=path) as c, Chest(path=path) as other:
        c.flush()
        c["x"], c["y"] = 2, 3
        assert dict(other) == {"x": 1}
        del c["x"]
        assert dict(other) == {"x": 1}


def test_two_handles_that_write_different_keys_lose_none(path):
    with Chest(path=path) as c, Chest(path=path) as other:
        for n in range(10):
            c["a", n] = other["b", n] = [n]
            (c if n % 2 else other).flush()
        c.flush()
        other.flush()
        assert dict(c) == dict(other)
        assert len(c) == 20
        c._check()
    assert len(read_back(path)) == 20


def test_of_two_handles_that_write_one_key_the_last_wins(path):
    with Chest(path=path) as c, Chest(path=path) as other:
        c["x"], other["x"] = "first", "last"
        c.flush()
        assert other["x"] == "last"
        other.flush()
        assert c["x"] == "last"
        c._check()
        assert len(files(path)) == 1


def order(*chests):
    """The order of the keys, which is the same in all chests."""
    orders = [[key for key in c if key != "filler"] for c in chests]
    assert orders == orders[:1] * len(chests)
    return orders[0]


@pytest.mark.parametrize(("mine", "theirs"), [
    pytest.param(3, 3, id="files"),
    pytest.param(64, 64, id="packs"),
    pytest.param(3, 64, id="files first"),
    pytest.param(64, 3, id="packs first"),
])  # fmt: skip
def test_keys_that_two_handles_set_before_either_flushed_have_one_order(path, often, mine, theirs):
    expected = [(who, n) for n in range(64) for who in ("mine", "theirs")]
    expected = [(who, n) for who, n in expected if n < {"mine": mine, "theirs": theirs}[who]]
    with Chest(path=path) as c, Chest(path=path) as other:
        c.update({("mine", n): n for n in range(mine)})
        other.update({("theirs", n): n for n in range(theirs)})
        c.flush()
        other.flush()
        with Chest(path=path) as third:
            assert order(c, other, third) == expected
        for handle in (c, other):
            compact(handle)
            with Chest(path=path) as third:
                assert order(c, other, third) == expected


def test_a_key_that_two_handles_numbered_alike_keeps_its_place_when_it_is_replaced(path):
    with Chest(path=path) as c, Chest(path=path) as other:
        c["first"], other["second"] = 1, 1
        c.flush()
        other.flush()
        for handle, key in (c, "first"), (other, "second"), (c, "second"):
            handle[key] = 2
            handle.flush()
            with Chest(path=path) as third:
                assert order(c, other, third) == ["first", "second"]


def nothing(c):
    c["k"]


def forget(c):
    c.move_to_disk("k")


def change_in_place(c):
    c["k"].add("here")


def change_elsewhere(c):
    c.held = c["k"]
    c.move_to_disk("k")
    c.held.add("here")


def set_here(c):
    c["k"] = {"here"}


def delete_here(c):
    del c["k"]


def set_again_here(c):
    del c["k"]
    c["k"] = {"here"}


def clear_here(c):
    c.clear()


def clear_and_set_here(c):
    c.clear()
    c["k"] = {"here"}


def replace_there(c):
    c["k"] = {"there"}


def delete_there(c):
    del c["k"]


def set_again_there(c):
    del c["k"]
    c["k"] = {"there"}


def clear_there(c):
    c.clear()


def clear_and_set_there(c):
    c.clear()
    c["k"] = {"there"}


def in_two_commits_there(c):
    del c["k"]
    c.flush()
    c["k"] = {"there"}


CLEAN = [nothing, forget]
CHANGED = [change_in_place, change_elsewhere]
DIRTY = [set_here, set_again_here, clear_and_set_here]
DELETED = [delete_here, clear_here]
REPLACED = [replace_there, set_again_there, clear_and_set_there]
GONE = [delete_there, clear_there]


class HoldingChest(Chest):
    """A chest beside which a value can be held."""

    held = None


@pytest.mark.parametrize("how", ["frames", "compaction"])
@pytest.mark.parametrize("there", REPLACED + GONE)
@pytest.mark.parametrize("here", CLEAN + CHANGED + DIRTY + DELETED)
def test_a_key_that_two_handles_changed(path, monkeypatch, here, there, how):
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 400)
    with HoldingChest({"k": {"old"}, "l": {1}}, path=path) as c, Chest(path=path) as other:
        c.flush()
        other["k"]
        here(c)
        there(other)
        other.flush()
        if how == "compaction":
            compact(other)
        if here in CLEAN:
            mine = theirs = {"there"} if there in REPLACED else None
        elif here in DELETED:
            mine = theirs = None
        elif here in CHANGED:
            mine = theirs = {"old", "here"}
        else:
            mine = theirs = {"here"}
        assert c.get("k") == mine
        assert ("k" in c) is (mine is not None)
        c._check()
        c.flush()
        c._check()
        assert other.get("k") == theirs
        other.flush()
        assert c.get("k") == mine
        c._check()
        other._check()
        assert read_back(path) == dict(c) == dict(other)
        c.held = None


class Named:
    """A value that is pickled in another form once it was loaded: its name is interned."""

    def __init__(self):
        self.name = "value"


@pytest.mark.parametrize("value", [{"name": Named()}, {1, 9, 17, 25}], ids=["object", "set"])
def test_a_clean_value_is_not_taken_for_changed_though_its_pickle_is_another_by_now(path, value):
    loaded = pickle.loads(pickle.dumps(value, 5))
    assert pickle.dumps(loaded, 5) != pickle.dumps(value, 5), "or this tests nothing"
    with Chest({"k": value, "l": value}, path=path) as c:
        c.flush()
        with Chest(path=path) as other:
            assert type(other["k"]) is type(other["l"]) is type(value)
            before = tree(path)
            other.flush()
            assert tree(path) == before
            c["k"] = "replaced"
            c.flush()
            assert other["k"] == "replaced"
            other.flush()
        assert c["k"] == "replaced"


def test_a_clear_that_is_committed_leaves_what_another_handle_added_meanwhile(path):
    with Chest({"old": 1}, path=path) as c, Chest(path=path) as other:
        c.flush()
        other["unsaved"] = 2
        c.clear()
        other["added"] = 3
        other.move_to_disk("added")
        assert dict(c) == {"added": 3}
        c.flush()
        assert dict(other) == {"unsaved": 2, "added": 3}
        other.flush()
        assert dict(c) == {"unsaved": 2, "added": 3}
        c._check()


def test_a_value_that_is_replaced_while_it_is_read_is_read_again(path):
    with Chest({"x": "old"}, path=path) as c:
        c.flush()

        def replace(key):
            if c["x"] == "old":
                c["x"] = "new"
                c.flush()

        with Chest(path=path, on_miss=replace) as other:
            assert other["x"] == "new"
            other._check()


def test_a_value_that_is_deleted_while_it_is_read_is_missing(path, often):
    with Chest({"x": "old"}, path=path) as c:
        c.flush()

        def delete(key):
            del c["x"]
            compact(c)

        with Chest(path=path, on_miss=delete) as other:
            with pytest.raises(KeyError, match="x"):
                other["x"]
            other._check()


def test_handles_at_random_agree(path, often):
    # Each key belongs to one handle, so that what all of them hold is known.
    rng = random.Random(1)
    handles = [Chest(path=path, available_memory=rng.choice([0, 300, 1e9])) for _ in range(3)]
    known = [{}, {}, {}]
    for _ in range(300):
        n = rng.randrange(3)
        c, mine = handles[n], known[n]
        key = (n, rng.randrange(5))
        action = rng.choice(["set", "set", "append", "delete", "flush", "read", "reopen"])
        if action == "set":
            c[key] = mine[key] = [rng.random()]
            mine[key] = [*mine[key]]
        elif action == "append" and key in mine:
            c[key].append(1)
            mine[key].append(1)
        elif action == "delete" and key in mine:
            del c[key], mine[key]
        elif action == "flush":
            c.flush()
        elif action == "reopen":
            c.close()
            handles[n] = Chest(path=path, available_memory=rng.choice([0, 300, 1e9]))
        else:
            assert c.get(key) == mine.get(key)
        assert {k: v for k, v in handles[n].items() if k[0] == n} == mine
    for c in handles:
        c.close()
    assert read_back(path) == known[0] | known[1] | known[2]


# -- read only ------------------------------------------------------------------------------------


def test_a_readonly_handle_changes_nothing(path):
    with Chest({"x": [1], "y": [2]}, path=path):
        pass
    append(path, encode(block(5, new=value_file(path, "new", 2)), first=True))
    value_file(path, ".new-0123456789abcdef-0", 1)
    os.utime(os.path.join(path, ".new-0123456789abcdef-0"), AGES_AGO)
    before = tree(path)
    with Chest(path=path, readonly=True, available_memory=0) as c:
        for change in (
            lambda: c.__setitem__("x", 1),
            lambda: c.__delitem__("x"),
            lambda: c.pop("x"),
            lambda: c.popitem(),
            lambda: c.clear(),
            lambda: c.update(z=1),
            lambda: c.setdefault("z", 1),
            lambda: c.drop(),
            lambda: c.write_keys(),
        ):
            with pytest.raises(ReadOnlyError):
                change()
        assert dict(c) == {"x": [1], "y": [2]}
        c["x"].append("never written")
        c.flush()
        c.shrink()
    assert tree(path) == before


def test_a_readonly_handle_needs_a_chest_to_read(path):
    with pytest.raises(FileNotFoundError):
        Chest(path=path, readonly=True)
    assert not os.path.exists(path)


def test_a_directory_that_cannot_be_written_is_opened_for_reading(path, monkeypatch):
    with Chest({"x": 1}, path=path):
        pass
    before = tree(path)
    monkeypatch.setattr(os, "access", lambda full, mode: False)
    with Chest(path=path) as c:
        assert c["x"] == 1
        with pytest.raises(ReadOnlyError):
            c["x"] = 2
    assert tree(path) == before


# -- values taken over from another chest ---------------------------------------------------------


def load_nothing(file):
    raise AssertionError("a value was loaded")


@pytest.mark.parametrize("linkable", [True, False])
def test_values_of_another_chest_are_linked_or_copied_and_never_loaded(
    path, tmp_path, monkeypatch, linkable
):
    values = {"x": [1], ("a", "b"): [2], "large": bytes(200_000)}
    source = str(tmp_path / "source")
    with Chest(values, path=source):
        pass
    if not linkable:
        real = os.link

        def link(one, two):
            if one.startswith(source):
                raise OSError(18, "Invalid cross-device link")
            real(one, two)

        monkeypatch.setattr(os, "link", link)
    with Chest(path=source, load=load_nothing) as other:
        with Chest(path=path, load=load_nothing) as c:
            c.update(other)
            c._check()
            for key in values:
                pair = c.key_to_filename(key), other.key_to_filename(key)
                assert os.path.samefile(*pair) is linkable
    with Chest(path=source) as other:
        other.update(dict.fromkeys(values, "changed"))
    with Chest(path=path) as c:
        assert dict(c) == values
        c["x"].append(3)
    assert read_back(source)["x"] == "changed"
    assert read_back(path)["x"] == [1, 3]


def test_a_value_that_is_another_one_just_while_it_is_linked_is_taken_over_as_it_is(
    path, tmp_path, monkeypatch
):
    with Chest({"x": "A" * 5000}, path) as b, Chest(path=tmp_path / "new") as c:
        b.flush()
        real = chest.store._link_or_copy

        def put(letter):
            del b["x"]  # which frees the name of its file
            b.flush()
            b["x"] = letter * 5000
            b.flush()

        def link(*args):
            monkeypatch.setattr(chest.store, "_link_or_copy", real)
            put("B")
            real(*args)
            put("A")

        with Chest(path=path) as a:
            monkeypatch.setattr(chest.store, "_link_or_copy", link)
            c.update(a)
        assert c["x"] == "A" * 5000
        c._check()


def test_a_value_that_can_neither_be_linked_nor_copied_is_set(path, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    with Chest({"x": [1]}, path=str(tmp_path / "source")) as other, Chest(path=path) as c:
        other.flush()
        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(shutil, "copyfile", refuse)
        c.update(other)
        c.flush()
        c._check()
        assert dict(c) == {"x": [1]}


def test_a_value_that_is_linked_and_cannot_be_made_safe_leaves_no_file(
    path, tmp_path, monkeypatch
):
    with Chest({"x": [1]}, path=str(tmp_path / "source")) as other:
        with Chest(path=path, fsync=True) as c:
            with monkeypatch.context() as patch:
                interrupt(patch, chest.store, "sync_file", OSError(5, "Input/output"), late=False)
                c.update(other)
            c.flush()
            c._check()
            assert dict(c) == {"x": [1]}


# -- a power cut ----------------------------------------------------------------------------------


class Syncs:
    """What was made safe from a power cut, and whether the commit was made by then."""

    def __init__(self, monkeypatch, path):
        self.path = path
        self.calls = []
        self._real = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self._fsync)
        monkeypatch.setattr(os, "replace", self._replace)

    def length(self):
        with open(keys_file(self.path), "rb") as file:
            return int.from_bytes(file.read(16)[8:14], "little")

    def _fsync(self, fd):
        made = os.path.exists(keys_file(self.path))
        self.calls.append((os.fstat(fd).st_ino, self.length() if made else 0))
        self._real[0](fd)

    def _replace(self, source, target):
        self.calls.append(("replaced by", os.stat(source).st_ino))
        self._real[1](source, target)

    def of(self, *names):
        """Return when a file or folder was made safe, as the committed lengths of that time."""
        inode = os.stat(os.path.join(self.path, *names)).st_ino
        return [length for called, length in self.calls if called == inode]


@pytest.fixture
def syncs(monkeypatch, path):
    return Syncs(monkeypatch, path)


def test_with_fsync_all_is_safe_before_the_commit_and_the_commit_after_it(path, syncs):
    with Chest({"old": 1}, path=path, fsync=True) as c:
        c.flush()
        syncs.calls.clear()
        before = syncs.length()
        c["x"], c["a", "b", "y"], c["large"] = 1, 2, bytes(200_000)
        c.flush()
        after = syncs.length()
        assert before < after
        for name in ("x", "_a/_b/y", "large", "_a", "_a/_b", "."):
            assert before in syncs.of(name), name
        assert syncs.of(".keys") == [before, after]


def test_with_fsync_spilled_values_and_deletions_are_safe_too(path, syncs):
    with Chest({"old": 1, "gone": 1}, path=path, fsync=True) as c:
        c.flush()
        syncs.calls.clear()
        lengths = [syncs.length()]
        c.available_memory = 0
        c["x"] = [1]
        lengths.append(syncs.length())
        assert syncs.of("x") == [lengths[0]]
        del c["gone"]
        c.flush()
        lengths.append(syncs.length())
        assert [*dict.fromkeys(syncs.of(".keys"))] == lengths
        assert syncs.of(".keys").count(lengths[2]) == 1


def test_without_fsync_nothing_waits_for_the_disk(path, syncs, often):
    with Chest({"x": 1, ("a", "b"): 2}, path=path) as c:
        compact(c)
    assert {call[0] for call in syncs.calls} == {"replaced by"}


def test_with_fsync_a_new_directory_is_safe_in_the_one_above(path, tmp_path, syncs):
    syncs.path = os.path.join(path, "deeper")
    with Chest({"x": 1}, path=syncs.path, fsync=True) as c:
        c.flush()
        length = syncs.length()
        for above in ("..", "../.."):
            assert syncs.of(above), above
            assert min(syncs.of(above)) < length


def test_with_fsync_values_taken_over_are_safe_before_the_commit(path, tmp_path, syncs):
    with Chest({"x": [1]}, path=str(tmp_path / "source")) as other:
        other.flush()
        with Chest(path=path, fsync=True) as c:
            before = syncs.length()
            c.update(other)
            assert before in syncs.of("x")


def test_with_fsync_a_compacted_index_is_safe_before_it_takes_the_place_of_the_old(
    path, syncs, often
):
    with Chest({"x": 1}, path=path, fsync=True) as c:
        compact(c)
        new = os.stat(keys_file(path)).st_ino
        called = [call[0] for call in syncs.calls]
        assert called.index(new) < syncs.calls.index(("replaced by", new))


def test_with_fsync_an_error_of_the_disk_commits_nothing(path, monkeypatch):
    with Chest({"x": 1}, path=path, fsync=True) as c:
        c.flush()
        before = tree(path)
        with monkeypatch.context() as patch:

            def fail(fd):
                raise OSError(5, "Input/output error")

            patch.setattr(os, "fsync", fail)
            c["y"] = 2
            with pytest.raises(Exception, match="Input/output error"):
                c.flush()
        assert tree(path) == before
        c.flush()
    assert read_back(path) == {"x": 1, "y": 2}


# -- two handles of one thread --------------------------------------------------------------------


@drops_it_open
def test_a_chest_that_is_collected_while_another_commits_is_saved_after_it(path):
    forgotten = Chest(path=path)
    forgotten["x"] = [1]
    forgotten.itself = forgotten  # only the garbage collector finds it
    del forgotten

    def name(key):
        gc.collect()
        return str(key)

    with Chest(path=path, key_to_filename=name) as c:
        c["y"] = 2
        c.flush()
        for thread in threading.enumerate():
            if thread.name.endswith("(finish)"):
                thread.join(10)
        assert dict(c) == {"x": [1], "y": 2}
        c._check()


def test_to_commit_within_a_commit_to_the_same_directory_is_an_error_not_a_hang(path):
    with Chest(path=path) as inner:
        inner["x"] = 1
        causes = []

        def name(key):
            with pytest.raises(UnsavedError) as caught:
                inner.flush()
            causes.extend(caught.value.causes)
            return str(key)

        with Chest(path=path, key_to_filename=name) as c:
            c["y"] = 2
            c.flush()
            assert causes[0].errno == errno.EDEADLK
        inner.flush()
        assert dict(inner) == {"x": 1, "y": 2}


def set_anew(c):
    del c["x"]
    c["x"] = "new"


def overwrite(c):
    c["x"] = "new"


def clear_and_set(c):
    c.clear()
    c["x"] = "new"


def set_anew_in_a_transaction(c):
    with c.transaction():
        del c["x"]
        c.flush()
        c["x"] = "new"


def set_anew_by_and_by(c):
    del c["x"]
    c.flush()
    c["x"] = "new"


@pytest.mark.parametrize(
    "act",
    [set_anew, overwrite, clear_and_set, set_anew_in_a_transaction, set_anew_by_and_by],
)
@pytest.mark.parametrize("text", ["old", "new"])
def test_what_gets_the_name_of_a_file_that_is_gone_keeps_it(path, act, text):
    with Chest({"x": text}, path=path) as c, Chest(path=path) as other:
        c.flush()
        os.unlink(c.key_to_filename("x"))
        assert len(other) == 1
        act(c)
        c.flush()
        assert c.verify().ok
        c._check()
        other["y"] = 1
        other.flush()
        other._check()
        assert other["x"] == "new"
    with Chest(path=path) as c:
        assert c["x"] == "new"


@pytest.mark.parametrize("act", [
    lambda c: c["other"], lambda c: c.__setitem__("z", [1]), lambda c: c.get("k"),
    lambda c: len(c), lambda c: list(c.items()),
])  # fmt: skip
@pytest.mark.parametrize("owner", [
    (Ledger, "committed"), (Ledger, "_replace"), (Index, "acknowledge"), (Index, "publish"),
    (Index, "append"), (Index, "_decode"), (Index, "_size"),
])  # fmt: skip
@pytest.mark.parametrize("when", ["before", "after"])
def test_who_is_collected_as_garbage_amid_a_commit_may_use_the_chest(
    path, monkeypatch, act, owner, when
):
    acts = []
    real = getattr(*owner)

    def step(self, *args, **options):
        if when == "before" and acts:
            acts.pop()(c)
        result = real(self, *args, **options)
        if when == "after" and acts:
            acts.pop()(c)
        return result

    with Chest({"k": [1], "other": [2], "z": [0]}, path=path, available_memory=0) as c:
        c.flush()
        c["dirty"] = ["d"]  # in this hand
        acts.append(act)
        monkeypatch.setattr(*owner, step)
        c["k"] = [3]
        c.flush()
        assert not acts
        c.flush()
        c._check()
        expected = {"k": [3], "other": [2], "z": c["z"], "dirty": ["d"]}
        assert dict(c) == expected
        assert c.verify().ok
    with Chest(path=path) as c:
        assert dict(c) == expected


def test_nobody_deletes_or_commits_amid_a_commit(path, monkeypatch):
    refused = []
    real = Ledger.committed

    def committed(self, *args):
        for act in (lambda: c.pop("other"), c.clear, c.flush, lambda: c.move_to_disk("z")):
            try:
                act()
            except RuntimeError as error:
                refused.append(error)
        return real(self, *args)

    with Chest({"k": [1], "other": [2], "z": [0]}, path=path) as c:
        c.flush()
        c["k"], c["z"] = [3], [4]
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "committed", committed)
            c.flush()
        assert len(refused) >= 3
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"k": [3], "other": [2], "z": [4]}


@pytest.mark.parametrize("step", ["_decode", "_size", "_read"])
def test_news_are_taken_in_once_though_they_are_asked_for_meanwhile(path, monkeypatch, step):
    acts = []
    real = getattr(Index, step)

    def asking(self, *args):
        if acts:
            acts.pop()(c)
        return real(self, *args)

    with Chest({n: f"value {n}" for n in range(100)}, path) as c, Chest(path=path) as other:
        c.flush()
        for turn in range(3):
            other.update((n, f"turn {turn} {n}") for n in range(20, 90))
            other.flush()
        monkeypatch.setattr(Index, step, asking)
        acts.append(len)
        assert c[50] == "turn 2 50"
        assert not acts
        assert dict(c) == dict(other)
        rows = len(c._memory.ledger._files)
        assert rows == 100 + 3 * 70
        c._check()
