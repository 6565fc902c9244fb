"""Which values share a pack, and what becomes of those that cannot be written or are taken back."""

import errno
import gzip
import json
import os
import pickle
import tracemalloc
from functools import partial
from io import FileIO
from types import SimpleNamespace

import pytest

import chest.packs
import chest.saving
import chest.staging
import chest.store
from chest import Chest, UnsavedError
from chest.directory import Directory
from chest.index import Index
from chest.packs import MANY, PACKED
from chest.serialize import digest_bytes
from chest.staging import GONE, Batch, StagedPack

JSON = {"dump": json.dump, "load": json.load}
FULL = "No space left on device"


def small(n, start=0):
    """Some values that are small."""
    return {f"k{i}": f"value {i}" for i in range(start, start + n)}


def dumped_to(nbytes):
    """A value whose pickle has so many bytes."""
    value = "x" * (nbytes - len(pickle.dumps("x" * 1000, 5)) + 1000)
    assert len(pickle.dumps(value, 5)) == nbytes
    return value


def packs(path):
    return sorted(name for name in os.listdir(path) if name.startswith(".pack-"))


def others(path):
    return sorted(name for name in os.listdir(path) if name[0] != ".")


def content(path, name=".pack-1"):
    with open(os.path.join(path, name), "rb") as file:
        return file.read()


def read_back(path, **options):
    """What somebody who opens the chest finds."""
    with Chest(path=path, readonly=True, **options) as c:
        return dict(c)


@pytest.fixture
def disk(monkeypatch):
    """A disk with `room` for so many bytes, which takes `step` of them at a time."""
    disk = SimpleNamespace(room=None, step=None)

    class File(FileIO):
        def write(self, data):
            part = memoryview(data)[: disk.step][: disk.room]
            if disk.room is not None:
                disk.room -= len(part)
                if not part:
                    raise OSError(errno.ENOSPC, FULL)
            return super().write(part)

    monkeypatch.setattr(chest.packs, "FileIO", File)
    monkeypatch.setattr(chest.staging, "FileIO", File)
    return disk


@pytest.fixture
def staged(monkeypatch):
    """Write small values to staged packs, sixteen at a time; those hold a thousand bytes."""
    monkeypatch.setattr(chest.saving, "STEP", 16)
    monkeypatch.setattr(chest.staging, "STREAM_BYTES", 200)
    for module in (chest.staging, chest.store):
        monkeypatch.setattr(module, "PACK_BYTES", 1000)


# -- what goes to a pack --------------------------------------------------------------------------


def spill(c):
    c.available_memory = 0


WAYS_OUT = [Chest.flush, Chest.close, spill]


@pytest.mark.parametrize("leave", WAYS_OUT)
def test_64_small_values_that_leave_together_go_to_one_pack(path, leave):
    with Chest(small(64), path=path) as c:
        leave(c)
        assert sorted(os.listdir(path)) == [".keys", ".pack-1"]
    assert content(path) == b"".join(pickle.dumps(value, 5) for value in small(64).values())
    assert read_back(path) == small(64)


@pytest.mark.parametrize("leave", WAYS_OUT)
def test_63_go_to_files_of_their_own(path, leave):
    with Chest(small(63), path=path) as c:
        leave(c)
        assert sorted(os.listdir(path)) == [".keys", *sorted(small(63))]
    assert read_back(path) == small(63)


def test_values_that_leave_one_by_one_get_files(path):
    with Chest(path=path, available_memory=0) as c:
        c.update(small(64))
        assert others(path) == sorted(small(64))
        c._check()


def test_no_value_above_the_limit_is_in_a_pack(path):
    values = small(MANY) | {"just": dumped_to(PACKED), "above": dumped_to(PACKED + 1)}
    values["far"] = "x" * 20 * PACKED
    with Chest(values, path=path) as c:
        c.flush()
        assert others(path) == ["above", "far"]
        c._check()
    assert content(path).endswith(pickle.dumps(values["just"], 5))
    assert read_back(path) == values


def test_a_packed_value_that_is_set_anew_alone_goes_to_a_pack_again(path):
    with Chest(small(64), path=path) as c:
        c.flush()
        size = len(content(path))
        c["k7"] = "changed"
        c["new"] = "gets a file"
        c.flush()
        assert others(path) == ["new"]
        assert content(path)[size:] == pickle.dumps("changed", 5)
        c["k7"] = dumped_to(PACKED + 1)
        c.flush()
        assert others(path) == ["k7", "new"]
        c._check()
    assert read_back(path)["k7"] == dumped_to(PACKED + 1)


def test_a_value_that_cannot_be_dumped_stays_and_the_others_go_to_a_pack(path):
    def unpicklable():
        """Local: pickle does not find it."""

    with Chest(small(63) | {"bad": unpicklable} | small(30, 63), path=path) as c:
        with pytest.raises(UnsavedError) as caught:
            c.flush()
        assert caught.value.keys == ["bad"]
        assert packs(path) == [".pack-1"]
        assert read_back(path) == small(93)
        assert c["bad"] is unpicklable
        c._check()
        del c["bad"]


# -- serializers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, JSON], ids=["pickle", "json"])
def test_values_that_another_open_writes_never_go_to_packs(path, options):
    options = options | {"open": partial(gzip.open, compresslevel=1)}
    with Chest(small(70), path=path, **options) as c:
        c.flush()
        assert packs(path) == []
        assert content(path, "k3").startswith(b"\x1f\x8b")
        c._check()
    assert read_back(path, **options) == small(70)


@pytest.mark.parametrize("mode", [None, "t"])
def test_values_of_json_go_to_packs_as_they_are(path, mode):
    values = {f"k{n}": {"é": [n, None]} for n in range(64)}
    options = JSON | {"mode": mode}
    with Chest(values, path=path, **options) as c:
        c.flush()
        assert others(path) == []
        c._check()
    assert content(path) == "".join(map(json.dumps, values.values())).encode()
    assert read_back(path, **options) == values
    with Chest(path=path, **options) as c:
        c["k3"]["more"] = 1
        assert [*c.values()] == [*values.values()][:3] + [c["k3"]] + [*values.values()][4:]
    assert read_back(path, **options) == values | {"k3": values["k3"] | {"more": 1}}


def test_values_whose_dump_wants_a_real_file_get_files(path):
    def dump(value, file):
        assert os.path.exists(file.name)
        pickle.dump(value, file)

    with Chest(small(64), path=path, dump=dump) as c:
        c.flush()
        assert packs(path) == []
        c._check()
    assert read_back(path, dump=dump) == small(64)


def test_a_load_that_wants_a_real_file_gets_one(path):
    def load(file):
        with open(file.name, "rb") as same:
            return pickle.load(same)

    options = {"dump": lambda value, file: pickle.dump(value, file), "load": load}
    with Chest(small(64), path=path, **options) as c:
        c.flush()
        assert packs(path) == [".pack-1"]
    assert read_back(path, **options) == small(64)


# -- more than a commit keeps in memory -----------------------------------------------------------


def test_many_small_values_fill_several_packs(path, staged):
    with Chest(small(500), path=path) as c:
        c.flush()
        assert others(path) == []
        sizes = [len(content(path, name)) for name in packs(path)]
        assert sum(sizes) == sum(len(pickle.dumps(value, 5)) for value in small(500).values())
        assert len(sizes) >= 5
        assert max(sizes) < 1000 + 16 * 20
        assert sorted(sizes)[2] >= 1000  # but for the last staged one, and the one for the rest
        c._check()
    assert [*read_back(path).items()] == [*small(500).items()]


def test_the_streams_that_wait_in_memory_are_few(path, monkeypatch):
    monkeypatch.setattr(chest.staging, "STREAM_BYTES", 1000)
    with Chest(path=path):
        batch = Batch(Directory(path, str))
        for n in range(100):
            batch.add([2 * n, 2 * n + 1], [b"x" * 60, b"y" * 60])
            assert sum(map(len, batch.streams.values())) < 1000
            assert len(batch) == 2 * n + 2
        assert len(batch.packs) == 1
        assert sorted(batch.keys()) == [*range(200)]
        batch.discard()


@pytest.mark.parametrize(("n", "nbytes", "limit"), [(400, 250_000, 40e6), (64, 1_000_000, 30e6)])
def test_values_that_are_larger_than_they_say_are_not_dumped_all_at_once(path, n, nbytes, limit):
    with Chest(path=path, nbytes=lambda value: 1) as c:
        c.update(dict.fromkeys(range(n), bytes(nbytes)))
        tracemalloc.start()
        try:
            c.flush()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < limit


class Restless:
    """What another thread changes while it is dumped, so many times."""

    def __init__(self, changes):
        self.changes = changes

    def __reduce__(self):
        if self.changes:
            self.changes -= 1
            raise RuntimeError("dictionary changed size during iteration")
        return Restless, (0,)


def test_a_value_that_changed_while_it_was_dumped_is_dumped_once_more(path):
    with Chest({"x": Restless(1), "y": 2}, path=path) as c:
        c.flush()
        c._check()
        assert read_back(path)["x"].changes == 0
        c["x"] = Restless(1)
        c.move_to_disk("x")
        assert "x" not in c.inmem
        c["x"] = Restless(2)
        with pytest.raises(UnsavedError) as caught:
            c.flush()
        assert [type(cause) for cause in caught.value.causes] == [RuntimeError]
        c.flush()
    assert read_back(path)["y"] == 2


def test_a_pack_is_full_at_its_size_and_the_next_values_open_another(path, monkeypatch):
    monkeypatch.setattr(chest.store, "PACK_BYTES", 2000)
    with Chest(path=path) as c:
        for start in range(0, 640, 64):
            c.update(small(64, start))
            c.flush()
        sizes = [len(content(path, name)) for name in packs(path)]
        assert len(sizes) == 5  # of two commits each
        assert all(2000 <= size < 4000 for size in sizes)
        c._check()
    assert read_back(path) == small(640)


@pytest.mark.parametrize("n", [64, 500])
def test_a_staged_pack_that_somebody_removed_is_written_again(path, staged, monkeypatch, n):
    real, lost = Directory.place, []

    def place(self, source, name):
        if not lost:
            lost.append(name)
            os.unlink(source)
        real(self, source, name)

    monkeypatch.setattr(Directory, "place", place)
    with Chest(small(n), path=path) as c:
        c.flush()
        c._check()
    assert len(lost) == 1
    assert read_back(path) == small(n)


def test_packs_are_safe_before_the_commit_that_names_them(path, staged, monkeypatch):
    log = []
    monkeypatch.setattr(os, "fsync", lambda fd: log.append(os.fstat(fd).st_ino))
    real = Index.publish

    def publish(self):
        log.append(None)
        real(self)

    monkeypatch.setattr(Index, "publish", publish)
    with Chest(path=path, fsync=True) as c:
        for start in (0, 520):  # the second time, the rest goes to a pack that was there
            del log[:]
            before = {name: len(content(path, name)) for name in packs(path)}
            c.update(small(520, start))
            c.flush()
            safe = log[: log.index(None)]
            written = [p for p in packs(path) if before.get(p) != len(content(path, p))]
            assert len(written) > 5
            for name in ["", *written]:
                assert os.stat(os.path.join(path, name)).st_ino in safe
        assert any(name in before for name in written)


# -- a disk that refuses --------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 30, 700])
def test_a_flush_saves_what_the_disk_takes_and_names_the_rest(path, staged, disk, room):
    with Chest(small(100), path=path) as c:
        disk.room = room
        with pytest.raises(UnsavedError, match=FULL) as caught:
            c.flush()
        assert not {*caught.value.keys} & {*read_back(path)}
        assert {*caught.value.keys} | {*read_back(path)} == {*small(100)}
        assert dict(c.inmem) == small(100)
        c._check()
        disk.room = None
        c.flush()
        c._check()
    assert read_back(path) == small(100)


def test_a_spill_that_is_refused_leaves_everything_in_memory(path, staged, disk):
    with Chest(small(100), path=path) as c:
        disk.room = 700
        with pytest.raises(OSError, match=f"{FULL}.*bytes needed") as caught:
            c.available_memory = 0
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, path)
        assert os.listdir(path) == [".keys"]
        assert dict(c.inmem) == small(100)
        c._check()
        disk.room = None
        c.shrink()
        assert dict(c.inmem) == {}
        c._check()
    assert read_back(path) == small(100)


def test_writes_that_take_less_than_asked_are_completed(path, staged, disk):
    disk.step = 7
    with Chest(small(500), path=path) as c:
        c.flush()
        c._check()
    assert read_back(path) == small(500)


def test_a_staged_pack_holds_what_it_held_when_the_disk_refuses(tmp_path, disk):
    pack = StagedPack(str(tmp_path / "pack"))
    pack.append(["a"], [b"first"], [1])
    disk.room = 3
    with pytest.raises(OSError, match=FULL):
        pack.append(["b"], [b"second"], [2])
    assert (pack.keys, pack.nbytes, [*pack.lengths], [*pack.digests]) == (["a"], 5, [5], [1])
    disk.room = None
    pack.append(["c"], [b"third"], [3])
    pack.close(fsync=True)
    assert content(tmp_path, "pack") == b"firstthird"
    puts = pack.puts(".pack-1")
    assert (puts.keys, [*puts.places], [*puts.lengths]) == (["a", "c"], [0, 5], [5, 5])


def test_a_batch_that_is_refused_holds_what_it_held(path, disk, monkeypatch):
    monkeypatch.setattr(chest.staging, "STREAM_BYTES", 10)
    os.mkdir(path)
    batch = Batch(Directory(path, str))
    batch.add(["a"], [b"first"])
    disk.room = 3
    with pytest.raises(OSError, match=FULL):
        batch.add(["b", "c"], [b"second", b"third"])
    assert batch.keys() == ["a"]
    assert batch.streams == {"a": b"first"}
    disk.room = None
    batch.add(["d"], [b"fourth"])
    assert batch.keys() == ["a", "d"]
    batch.discard()
    assert os.listdir(path) == []


# -- values that are taken back -------------------------------------------------------------------


class Deletes:
    """Deletes keys of the chest while it is pickled, once."""

    def __init__(self, c, keys):
        self.todo = [(c, keys)]

    def __reduce__(self):
        while self.todo:
            c, keys = self.todo.pop()
            for key in keys:
                del c[key]
        return str, ("pickled",)


@pytest.mark.parametrize("gone", [["k0"], ["k5", "k37"], ["k499"], [*small(80)], [*small(500)]],
                         ids=["first", "some", "last", "many", "all"])
def test_what_is_deleted_while_others_are_staged_is_not_committed(path, staged, gone):
    with Chest(small(500), path=path) as c:
        c["hook"] = Deletes(c, gone)
        c.flush()
        assert len(c) == 501 - len(gone)
        c._check()
    left = {key: value for key, value in small(500).items() if key not in gone}
    assert read_back(path) == left | {"hook": "pickled"}


def test_a_batch_forgets_what_is_taken_back_wherever_it_is(path, monkeypatch):
    monkeypatch.setattr(chest.staging, "STREAM_BYTES", 10)
    with Chest(path=path) as c:
        batch = Batch(c._memory.store.directory)
        batch.add([1, 2, 3], [b"one", b"two", b"three"])
        batch.add([4, 5], [b"four", b"five"])
        batch.files |= {n: c._memory.store.stage_stream(b"file") for n in (6, 7)}
        assert batch.keys() == [6, 7, 4, 5, 1, 2, 3]
        assert len(batch) == 7
        batch.remove({1, 3, 5, 7})
        assert batch.keys() == [6, 4, 2]
        assert batch.packs[0].keys == [GONE, 2, GONE]
        puts = batch.packs[0].puts(".pack-1")
        assert (puts.keys, [*puts.places], [*puts.lengths]) == ([2], [3], [3])
        assert [*puts.digests] == [digest_bytes(b"two")]
        assert len([name for name in os.listdir(path) if name.startswith(".new-")]) == 2
        batch.discard()
        assert os.listdir(path) == [".keys"]
        assert (len(batch), batch.keys()) == (0, [])


def test_a_batch_that_was_discarded_takes_new_values(path, monkeypatch):
    monkeypatch.setattr(chest.staging, "STREAM_BYTES", 10)
    os.mkdir(path)
    batch = Batch(Directory(path, str))
    for _ in range(2):
        batch.add([1], [b"one"])
        assert (batch.streams, batch.packs) == ({1: b"one"}, [])
        batch.add([2], [b"more than ten"])
        assert (batch.streams, batch.packs[0].keys) == ({}, [1, 2])
        batch.discard()


@pytest.mark.parametrize("refuses", ["unlink", "close"])
def test_a_batch_goes_though_the_system_refuses(path, monkeypatch, refuses):
    monkeypatch.setattr(chest.staging, "STREAM_BYTES", 10)
    monkeypatch.setattr(chest.staging, "PACK_BYTES", 10)
    os.mkdir(path)
    batch = Batch(Directory(path, str))
    for key in range(4):
        batch.add([key], [b"more than ten"])
    opened = [pack._file for pack in batch.packs]
    refused = batch.packs[1]
    unlink_really, close_really = os.unlink, StagedPack.close

    def unlink(full, **options):
        if full == refused.path and refuses == "unlink":
            raise PermissionError(errno.EACCES, "in use", full)
        unlink_really(full, **options)

    def close(self, **options):
        close_really(self, **options)
        if self is refused and refuses == "close":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(StagedPack, "close", close)
    batch.discard()
    left = [os.path.basename(refused.path)] if refuses == "unlink" else []
    assert os.listdir(path) == left
    assert len(opened) == 4
    assert all(file.closed for file in opened)
    assert (len(batch), batch.keys()) == (0, [])


# -- from one chest to another --------------------------------------------------------------------


@pytest.mark.parametrize("n", [64, 500])
def test_a_chest_takes_over_packed_values_without_loading_them(path, staged, n, monkeypatch):
    with Chest(small(n) | {"x": [1]}) as source, Chest({"k3": "old"}, path=path) as c:
        source.available_memory = 0
        c.flush()
        loaded = []
        monkeypatch.setattr(pickle, "loads", lambda data: loaded.append(data))
        c.update(source)
        monkeypatch.undo()
        assert loaded == []
        assert not c.inmem
        c._check()
        source._check()
        assert c == source
    assert read_back(path) == small(n) | {"x": [1]}


def test_values_that_are_there_already_are_taken_back_if_they_are_to_stay(path, staged):
    with Chest(small(500)) as source, Chest({"k3": "mine"}, path=path) as c:
        source.flush()
        c.update(source, overwrite=False)
        c._check()
        assert dict(c) == small(500) | {"k3": "mine"}
    assert read_back(path) == small(500) | {"k3": "mine"}
