"""Packs: read back whatever happens to them, never larger than need be, all or nothing."""

import datetime as dt
import errno
import gc
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from copy import deepcopy
from functools import partialmethod
from io import FileIO
from pathlib import Path
from types import SimpleNamespace

import pytest

import chest.head
import chest.index
import chest.ledger
import chest.packs
import chest.saving
import chest.staging
import chest.store
import chest.upkeep
from chest import Chest, CorruptValueError, ReadOnlyError, UnsavedError
from chest.directory import Directory
from chest.frames import WORD
from chest.index import Index
from chest.memory import Memory
from chest.packs import Packs, write_all
from chest.store import Store

ROOT = Path(chest.__file__).parent.parent
AGES_AGO = (0, 0)
FULL = "No space left on device"
JSON = {"dump": json.dump, "load": json.load}


def small(n, start=0, text="value"):
    """Some values that are small."""
    return {f"k{i}": f"{text} {i}" for i in range(start, start + n)}


def nbytes(values):
    """How many bytes some values take in packs."""
    return sum(len(pickle.dumps(value, 5)) for value in values)


def tree(path):
    """Everything in a directory: files with their content."""
    return {name: content(path, name) for name in os.listdir(path)}


def content(path, name=".pack-1"):
    with open(os.path.join(path, name), "rb") as file:
        return file.read()


def packs(path):
    names = [name for name in os.listdir(path) if name.startswith(".pack-")]
    return sorted(names, key=lambda name: int(name[6:]))


def packed_bytes(path):
    return sum(len(content(path, name)) for name in packs(path))


def read_back(path, **options):
    """What somebody who opens the chest finds; nothing is changed by that."""
    with Chest(path=path, readonly=True, **options) as c:
        return dict(c)


def entry(c, key):
    len(c)  # which catches up
    return c._memory.ledger.entry(c._memory.ledger.rows[key])


def check(c):
    """Assert every invariant, and that the chest knows how much of each pack is alive."""
    len(c)  # which catches up
    c._check()
    ledger = c._memory.ledger
    kept = [*ledger.rows.values(), *ledger._deleted.values(), *(ledger._cleared or {}).values()]
    alive = Counter()
    for name, _, length, _ in (ledger.entry(row) for row in kept if row >= 0):
        alive[name] += length
    assert ledger.packs == {name: alive[name] for name in ledger.packs}


def check_ends(c):
    """Assert that each pack ends where the last value that was put there does."""
    check(c)
    ends = Counter()
    for row in range(len(c._memory.ledger._files)):
        name, place, length, _ = c._memory.ledger.entry(row)
        ends[name] = max(ends[name], place + length)
    assert {name: len(content(c.path, name)) for name in packs(c.path)} == {
        name: ends[name] for name in c._memory.ledger.packs
    }


def reads(monkeypatch):
    """Note each reading from a pack that is open, from now on."""
    real, noted = os.pread, []

    def pread(fd, length, place):
        noted.append((place, length))
        return real(fd, length, place)

    monkeypatch.setattr(os, "pread", pread)
    return noted


@pytest.fixture
def tight(monkeypatch):
    """Let little waste be too much, and little be many; packs hold 3000 bytes."""
    monkeypatch.setattr(chest.upkeep, "WASTE", 2000)
    monkeypatch.setattr(chest.upkeep, "COPIED", 200)
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 3000)
    monkeypatch.setattr(chest.saving, "STEP", 16)
    monkeypatch.setattr(chest.staging, "STREAM_BYTES", 1000)
    for module in (chest.staging, chest.store, chest.upkeep):
        monkeypatch.setattr(module, "PACK_BYTES", 3000)


@pytest.fixture
def two_packs(path):
    """A chest on disk with 64 values in each of two packs."""
    with pytest.MonkeyPatch.context() as patch, Chest(small(64), path=path) as c:
        c.flush()
        patch.setattr(chest.store, "PACK_BYTES", 1)
        c.update(small(64, 64))
        c.flush()
        assert packs(path) == [".pack-1", ".pack-2"]
    return path


# -- there and back -------------------------------------------------------------------------------


def kinds():
    values = {f"text {n}": "é" * n for n in range(20)}
    values |= {n: n**9 for n in range(20)}
    values |= {("tuple", n): (n, (None, 1.5)) for n in range(20)}
    values |= {dt.date(2026, 1, 1 + n): [n, {n}] for n in range(20)}
    return values | {b"bytes": bytes(range(256)), None: {"a": [1]}, frozenset({1}): set("abc")}


@pytest.mark.parametrize("budget", [0, 2000, 1e9])
def test_values_of_packs_come_back_after_reopening(path, budget):
    with Chest(kinds(), path=path) as c:
        c.flush()
        assert sorted(os.listdir(path)) == [".keys", ".pack-1"]
    with Chest(path=path, available_memory=budget) as c:
        assert [(key, c[key]) for key in c] == [*kinds().items()]
        assert [*c.items()] == [*kinds().items()]
        check_ends(c)


def test_values_of_packs_come_back_in_another_process(two_packs):
    code = "import sys, chest; print(dict(chest.Chest(path=sys.argv[1], readonly=True)))"
    command = [sys.executable, "-c", code, two_packs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(small(128))


@pytest.mark.parametrize("n", [5, 64])
def test_values_that_are_overwritten_and_deleted_are_history(two_packs, n):
    with Chest(path=two_packs) as c, Chest(path=two_packs) as other:
        assert dict(other) == small(128)
        expected = small(128) | small(n, 40, "changed")
        c.update(small(n, 40, "changed"))
        for key in small(n, 60):
            del c[key], expected[key]
        c.flush()
        c["k60"] = expected["k60"] = "back"
        c.flush()
        for handle in (c, other):
            assert [*handle.items()] == [*expected.items()]
            check_ends(handle)
    assert [*read_back(two_packs).items()] == [*expected.items()]


def test_a_change_in_place_of_a_packed_value_is_kept(path):
    with Chest({n: [n] for n in range(64)}, path=path) as c:
        c.flush()
    with Chest(path=path) as c:
        c[3].append("by key")
        for value in c.values():
            value.append("by iterating")
        check(c)
    expected = {n: [n, "by iterating"] for n in range(64)} | {3: [3, "by key", "by iterating"]}
    assert read_back(path) == expected


def test_a_read_that_gives_less_than_asked_is_continued(two_packs, monkeypatch):
    real, asked = os.pread, []

    def pread(fd, length, place):
        asked.append(length)
        return real(fd, min(length, 7), place)

    monkeypatch.setattr(os, "pread", pread)
    with Chest(path=two_packs) as c:
        assert [*c.values()] == [*small(128).values()]
        assert {key: c[key] for key in c} == small(128)
        assert content(two_packs, c.key_to_filename("k5")) == pickle.dumps("value 5", 5)
    assert max(asked) > 1000


def test_a_system_without_pread_will_do(two_packs, monkeypatch):
    monkeypatch.delattr(os, "pread", raising=False)
    with Chest(path=two_packs) as c:
        assert {key: c[key] for key in c} == small(128)
        c.update(small(128, text="changed"))
        c.flush()
        assert [*c.values()] == [*small(128, text="changed").values()]
        check(c)


def open_packs(path):
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.lexists(link)]
    return [name for name in names if name.startswith(os.path.join(path, ".pack-"))]


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")


@needs_proc
def test_of_many_packs_few_are_open_at_a_time(path, tight, monkeypatch):
    monkeypatch.setattr(chest.packs, "OPEN_PACKS", 3)
    with Chest(small(1000), path=path) as c:
        c.flush()
        assert len(packs(path)) > 4
    with Chest(path=path) as c:
        most = 0
        for key, value in small(1000).items():
            assert c[key] == value
            most = max(most, len(open_packs(path)))
        assert most == 3
    assert open_packs(path) == []


@needs_proc
def test_a_pack_is_not_closed_while_somebody_reads_from_it(two_packs, monkeypatch):
    monkeypatch.setattr(chest.packs, "OPEN_PACKS", 1)
    with Chest(path=two_packs) as c:
        read = c._memory.store.packs.read
        first, second = entry(c, "k0"), entry(c, "k64")
        real, inside = os.pread, []

        def pread(fd, length, place):
            if not inside:  # the other pack is opened, and this one is no longer kept
                inside.append(place)
                assert read(*second[:3]) == pickle.dumps("value 64", 5)
                gc.collect()
            return real(fd, length, place)

        monkeypatch.setattr(os, "pread", pread)
        assert read(*first[:3]) == pickle.dumps("value 0", 5)
        assert inside == [0]
        assert len(open_packs(two_packs)) == 1


# -- a file for one value -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, JSON], ids=["pickle", "json"])
def test_the_file_of_a_packed_value_holds_its_stream(path, options):
    with Chest(small(64), path=path, **options) as c:
        c.flush()
        name = c.key_to_filename("k7")
        assert name == os.path.join(path, "k7")
        assert sorted(os.listdir(path)) == [".keys", ".pack-1", "k7"]
        with open(name, **({} if options else {"mode": "rb"})) as file:
            assert options.get("load", pickle.load)(file) == "value 7"
        assert c.key_to_filename("k7") == name
        assert dict(c) == small(64)
        check(c)
    with Chest(path=path, **options) as c:
        assert c.key_to_filename("k7") == name
        assert dict(c) == small(64)
        check(c)
    assert sorted(os.listdir(path)) == [".keys", ".pack-1", "k7"]


def test_a_pack_whose_values_all_got_files_goes(path):
    with Chest(small(64), path=path) as c, Chest(path=path) as other:
        c.flush()
        for key in small(64):
            other.key_to_filename(key)
        assert sorted(os.listdir(path)) == [".keys", *sorted(small(64))]
        assert dict(c) == dict(other) == small(64)
        check(c)
        check(other)


def test_a_value_that_is_set_and_not_saved_keeps_its_new_value(path):
    with Chest(small(64), path=path) as c:
        c.flush()
        c["k7"] = "new"
        with open(c.key_to_filename("k7"), "rb") as file:
            assert pickle.load(file) == "value 7"
        c.flush()
        with open(c.key_to_filename("k7"), "rb") as file:
            assert pickle.load(file) == "new"
        check(c)
    assert read_back(path) == small(64) | {"k7": "new"}


def test_a_readonly_chest_gives_no_value_a_file(two_packs):
    was = tree(two_packs)
    with Chest(path=two_packs, readonly=True) as c:
        with pytest.raises(ReadOnlyError):
            c.key_to_filename("k7")
        assert c.key_to_filename("none") == os.path.join(two_packs, "none")
        assert tree(two_packs) == was
        assert dict(c) == small(128)
        check(c)


def test_a_value_that_is_damaged_gets_no_file(two_packs):
    with Chest(path=two_packs) as c:
        flip(c, "k7")
        was = tree(two_packs)
        with pytest.raises(CorruptValueError):
            c.key_to_filename("k7")
        assert tree(two_packs) == was
        check(c)


def test_a_disk_that_is_full_gives_a_value_no_file(two_packs, monkeypatch):
    with Chest(path=two_packs) as c:
        was = tree(two_packs)
        with monkeypatch.context() as patch:
            interrupt(patch, Index, "publish", OSError(errno.ENOSPC, FULL), late=False)
            with pytest.raises(OSError, match=FULL):
                c.key_to_filename("k7")
        assert tree(two_packs) == was
        check(c)
        assert os.path.exists(c.key_to_filename("k7"))


# -- damage ---------------------------------------------------------------------------------------


def flip(c, key):
    """Change one byte of a value in its pack."""
    name, place, length, _ = entry(c, key)
    with open(os.path.join(c.path, name), "r+b") as file:
        file.seek(place + length // 2)
        byte = file.read(1)[0]
        file.seek(place + length // 2)
        file.write(bytes([byte ^ 4]))


def flip_some(c):
    lost = ["k0", "k7", "k8", "k63"]
    for key in lost:
        flip(c, key)
    return lost


def cut(c):
    os.truncate(os.path.join(c.path, ".pack-1"), entry(c, "k20").place + 1)
    return [*small(44, 20)]


def empty(c):
    os.truncate(os.path.join(c.path, ".pack-1"), 0)
    return [*small(64)]


def remove(c):
    os.unlink(os.path.join(c.path, ".pack-1"))
    return [*small(64)]


DAMAGES = [flip_some, cut, empty, remove]


@pytest.mark.parametrize("open_before", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_costs_the_values_that_it_hits(two_packs, damage, open_before):
    with Chest(path=two_packs) as c:
        lost = damage(c)
        if open_before and damage is not remove:
            c["k64"], c._memory.store.packs.read(".pack-1", 0, 1)
        for key, value in small(128).items():
            if key in lost:
                with pytest.raises(CorruptValueError) as caught:
                    c[key]
                found = caught.value.key, caught.value.path
                assert found == (key, os.path.join(two_packs, ".pack-1"))
            else:
                assert c[key] == value
            assert key in c
        assert len(c) == 128


@pytest.mark.parametrize("damage", DAMAGES)
def test_iterating_tells_of_damage_where_it_is(two_packs, damage):
    with Chest(path=two_packs) as c:
        lost = damage(c)
        items = iter(c.items())
        for key, value in small(128).items():
            if key == lost[0]:
                break
            assert next(items) == (key, value)
        with pytest.raises(CorruptValueError) as caught:
            next(items)
        assert caught.value.key == lost[0]
        whole = [key for key in small(128) if key not in lost]
        assert [*c._stream(whole)] == [(key, small(128)[key]) for key in whole]


@pytest.mark.parametrize("n", [3, 64])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_values_can_be_deleted_and_overwritten(two_packs, damage, n):
    with Chest(path=two_packs) as c:
        lost = damage(c)
        expected = {key: value for key, value in small(128).items() if key not in lost}
        for key in lost[1::2]:
            del c[key]
        new = dict.fromkeys(lost[::2], "new") | small(n, 200)
        c.update(new)
        c.flush()
        check(c)
        assert dict(c) == expected | new
    with Chest(path=two_packs) as c:
        assert dict(c) == expected | new
        check(c)


@pytest.mark.parametrize("damage", DAMAGES)
def test_packs_that_are_copied_neither_spread_damage_nor_hide_it(
    two_packs, damage, tight, monkeypatch
):
    monkeypatch.setattr(chest.upkeep, "WASTE", 1)
    with Chest(path=two_packs) as c:
        lost = damage(c)
        kept = {*small(3), *lost[:2], "k100"}
        before = {key: entry(c, key).file for key in kept}
        for key in {*c} - kept:
            del c[key]
        c.write_keys()
        moved = {key for key in kept if entry(c, key).file != before[key]}
        assert moved >= kept - {*lost}
    with Chest(path=two_packs) as c:
        for key in kept:
            if key in lost:
                with pytest.raises(CorruptValueError):
                    c[key]
            else:
                assert c[key] == small(128)[key]
        for key in kept & {*lost}:
            del c[key]
        c.write_keys()
        check(c)


@pytest.mark.parametrize("open_before", [False, True])
def test_a_pack_that_goes_just_before_it_is_copied_costs_its_own_values(
    two_packs, tight, monkeypatch, open_before, caplog
):
    real = Store.repack

    def repack(self, names):
        assert names == {".pack-1", ".pack-2"}
        remove(c)
        real(self, names)

    monkeypatch.setattr(Store, "repack", repack)
    monkeypatch.setattr(chest.upkeep, "WASTE", 1)
    kept = small(3) | small(3, 64)
    with Chest(path=two_packs) as c:
        if open_before:  # then it can still be read
            c["k60"]
        for key in {*c} - {*kept}:
            del c[key]
        c.write_keys()
        assert packs(two_packs) == [".pack-3"]
        assert caplog.text == ""
        for key, value in kept.items():
            if open_before or key not in small(3):
                assert c[key] == value
                continue
            with pytest.raises(CorruptValueError) as caught:
                c[key]
            found = caught.value.key, caught.value.path
            assert found == (key, os.path.join(two_packs, ".pack-1"))
            c[key] = value
    assert read_back(two_packs) == kept


def test_damage_in_a_pack_that_goes_as_it_is_copied_costs_no_other_value(
    two_packs, tight, monkeypatch
):
    real = Store.repack

    def repack(self, names):
        remove(c)
        real(self, names)

    monkeypatch.setattr(Store, "repack", repack)
    monkeypatch.setattr(chest.upkeep, "WASTE", 1)
    kept = small(6)
    with Chest(path=two_packs) as c:
        c["k60"]  # from now on the pack is open
        flip(c, "k1")
        for key in {*c} - {*kept}:
            del c[key]
        c.write_keys()
        assert ".pack-1" not in packs(two_packs)
    del kept["k1"]
    with Chest(path=two_packs) as c:
        with pytest.raises(CorruptValueError):
            c["k1"]
        assert {key: c[key] for key in kept} == kept


def test_what_lies_over_the_place_of_lost_values_is_copied(two_packs):
    with Chest(path=two_packs) as c:
        os.truncate(os.path.join(two_packs, ".pack-2"), entry(c, "k70").place)
        c.update({"large": "y" * 4000} | small(64, 200))
        c.flush()
        assert entry(c, "large").file == ".pack-2"
        lost = small(58, 70)
        for key in [*small(64), *small(64, 200), *[*lost][:-1]]:
            del c[key]
        c.compact()
        assert entry(c, "large").file == ".pack-3"
        assert c["large"] == "y" * 4000
        with pytest.raises(CorruptValueError):
            c[[*lost][-1]]


@pytest.mark.parametrize("automatic", [True, False])
def test_a_sector_that_cannot_be_read_costs_what_is_alive_in_it(
    two_packs, tight, monkeypatch, automatic, caplog
):
    with Chest(path=two_packs) as c:
        _, start, length, _ = entry(c, "k7")
    real = os.pread

    def pread(fd, n, place):  # as the kernel does: first what comes before
        if os.path.samestat(os.fstat(fd), pack) and place < start + length and place + n > start:
            if place < start:
                return real(fd, start - place, place)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, n, place)

    pack = os.stat(os.path.join(two_packs, ".pack-1"))
    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(chest.upkeep, "WASTE", 1 if automatic else 1 << 20)
    kept = small(20)
    del kept["k7"]
    with Chest(path=two_packs) as c:
        for key in {*c} - {*kept} - {"k7"}:
            del c[key]
        c.write_keys()
        assert ".pack-1" in packs(two_packs)  # something alive cannot be read
        assert ("could not be compacted: [Errno 5]" in caplog.text) is automatic
        caplog.clear()  # with the error, whose frames have the pack open
        with pytest.raises(OSError, match="pack-1"):
            c["k7"]
        del c["k7"]
        c.write_keys() if automatic else c.compact()
        assert ".pack-1" not in packs(two_packs)
        assert dict(c) == kept


def test_packs_are_not_measured_again_once_they_are_copied(two_packs, monkeypatch):
    kept = small(3) | small(3, 64)
    monkeypatch.setattr(chest.upkeep, "WASTE", nbytes(kept.values()) * 5)
    with Chest(path=two_packs) as c:
        for key in {*c} - {*kept}:
            del c[key]
        c.write_keys()
        assert packs(two_packs) == [".pack-3"]
        measured = []
        monkeypatch.setattr(chest.packs.Packs, "size", lambda self, name: measured.append(name))
        del c[next(iter(c))]
        c.write_keys()
        assert not measured


def test_a_commit_counts_though_nobody_can_tell_how_large_the_packs_are(
    two_packs, tight, monkeypatch, caplog
):
    monkeypatch.setattr(chest.upkeep, "WASTE", 1)

    def size(self, name):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)

    with Chest(path=two_packs) as c:
        for key in [*c][:-3]:
            del c[key]
        expected = dict(c)
        with monkeypatch.context() as patch:
            patch.setattr(chest.packs.Packs, "size", size)
            c.write_keys()
        assert "could not be compacted: [Errno 13]" in caplog.text
        assert read_back(two_packs) == expected
        del c[next(iter(c))]
        c.write_keys()
        assert packs(two_packs) == [".pack-3"]
        check(c)


def test_a_copied_pack_counts_though_the_last_fsync_fails(two_packs, tight, monkeypatch, caplog):
    monkeypatch.setattr(chest.upkeep, "WASTE", 1)
    fsync, sync = os.fsync, Index._sync

    def fail(number):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def sync_index(self):
        copied = "repack" in {frame.name for frame in traceback.extract_stack()}
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail if copied and self.published else fsync)
            sync(self)

    monkeypatch.setattr(Index, "_sync", sync_index)
    kept = small(3) | small(3, 64)
    with Chest(path=two_packs, fsync=True) as c:
        for key in {*c} - {*kept}:
            del c[key]
        c.write_keys()
        assert "it is committed, but may be lost if the power fails" in caplog.text
        assert packs(two_packs) == [".pack-3"]
        c["more"] = 1
        c.flush()
        c._check()
    assert read_back(two_packs) == kept | {"more": 1}


@pytest.mark.parametrize("view", [Chest.items, Chest.values])
@pytest.mark.parametrize("way", [iter, reversed])
def test_values_are_read_in_the_order_of_their_bytes_whatever_that_of_the_keys(
    path, monkeypatch, view, way
):
    expected = small(500)
    Chest(expected, path=path).close()
    with Chest(path=path, available_memory=0) as c:
        keys = [*expected]
        random.Random(1).shuffle(keys)
        c.update((key, expected[key]) for key in keys)
        del c["k7"], expected["k7"]
        c.flush()
        noted = reads(monkeypatch)
        found = [*way(view(c))]
    assert found == [*way(getattr(expected, view.__name__)())]
    places = [place for place, _ in noted]
    assert places == sorted(places)
    assert len(places) < 5


# -- room on disk ---------------------------------------------------------------------------------


def room(path):
    """How many bytes all files take, but for the index."""
    names = {*os.listdir(path)} - {".keys"}
    return sum(os.path.getsize(os.path.join(path, name)) for name in names)


@pytest.mark.parametrize("how", [Chest.compact, Chest.write_keys])
def test_to_copy_what_is_alive_takes_room_for_one_pack_at_a_time(path, tight, monkeypatch, how):
    real, sizes = Store.commit, []

    def commit(self, batch):
        sizes.append(room(path))
        real(self, batch)

    with Chest(path=path) as c:
        for n in range(0, 2000, 100):
            c.update(small(100, n, text="v" * 100))
            c.flush()
        assert len(packs(path)) >= 20
        for key in [*c][:: 2 if how is Chest.compact else 3]:
            del c[key]
        monkeypatch.setattr(chest.upkeep, "WASTE", 0)
        if how is Chest.write_keys:
            for key in [*c][::2]:
                del c[key]
        monkeypatch.setattr(Store, "commit", commit)
        before = room(path)
        how(c)
        assert max(sizes) <= before + 2200  # what is alive in one pack or two
        assert packed_bytes(path) < before / 1.5
        c._check()
    read_back(path)


def assert_bounded(c):
    """Assert that dead values take little room."""
    len(c)
    alive = sum(c._memory.ledger.packs.values())
    assert packed_bytes(c.path) <= 2 * alive + chest.upkeep.WASTE


def test_overwriting_keeps_the_packs_small(path, tight):
    with Chest(path=path, available_memory=4000) as c:
        largest = 0
        for turn in range(30):
            c.update(small(300, text=f"turn {turn}"))
            assert_bounded(c)
            largest = max(largest, packed_bytes(path))
        assert dict(c) == small(300, text="turn 29")
        c.flush()
        check(c)
        assert largest < 2 * nbytes(c.values()) + 2000
    assert read_back(path) == small(300, text="turn 29")


def test_so_does_overwriting_a_few_at_a_time(path, tight):
    with Chest(small(300), path=path) as c:
        expected = small(300)
        for turn in range(400):
            new = small(3, turn * 7 % 298, f"turn {turn}")
            c.update(new)
            expected.update(new)
            c.flush()
            assert_bounded(c)
        assert len(os.listdir(path)) < 10
        assert dict(c) == expected
        check(c)


def test_so_do_two_handles_that_overwrite_in_turn(path, tight):
    with Chest(small(300), path=path) as first, Chest(path=path) as second:
        first.flush()
        for turn in range(30):
            c = (first, second)[turn % 2]
            c.update(small(100, turn * 37 % 200, f"turn {turn}"))
            c.flush()
            assert_bounded(first)
            assert_bounded(second)
        assert dict(first) == dict(second)
        assert packed_bytes(path) < 2 * nbytes(first.values()) + 2000
        check(first)
        check(second)


def test_so_does_one_that_opens_the_chest_anew_each_time(path, tight):
    for turn in range(20):
        with Chest(path=path) as c:
            c.update(small(100, text=f"turn {turn}"))
            c.flush()
            assert_bounded(c)
            check(c)
    assert read_back(path) == small(100, text="turn 19")


def test_what_large_deletes_leave_dead_does_not_stay(path, tight):
    with Chest(small(2000), path=path) as c:
        c.flush()
        for key in [*small(2000)]:
            if key[-1] != "7":
                del c[key]
        c["more"] = 1
        c.flush()
        assert len(c) == 201
        assert_bounded(c)
        check(c)
        for key in [*c][1:]:
            del c[key]
        c.write_keys()
        assert packed_bytes(path) <= 2000 + 20
        check(c)
        c.clear()
        c.write_keys()
        assert os.listdir(path) == [".keys"]
        check(c)
    assert read_back(path) == {}


def test_what_another_handle_deletes_does_not_stay(path, tight):
    with Chest(small(2000), path=path) as c, Chest(path=path) as other:
        c.flush()
        for key in [*small(2000)]:
            if key[-1] != "7":
                del other[key]
        other.write_keys()
        assert_bounded(c)
        assert dict(c) == {key: value for key, value in small(2000).items() if key[-1] == "7"}
        check(c)
        check(other)


def test_a_transaction_gives_back_its_room_at_its_end(path, tight):
    with Chest(small(300), path=path) as c:
        with c.transaction():
            for turn in range(20):
                c.update(small(300, text=f"turn {turn}"))
                c.flush()
            assert packed_bytes(path) > 10 * nbytes(c.values())
        assert_bounded(c)
        check(c)
    assert read_back(path) == small(300, text="turn 19")


def test_packs_that_are_mostly_alive_are_left_alone(path, tight):
    with Chest(small(300), path=path) as c:
        c.flush()
        full = {name: content(path, name) for name in packs(path)[:-1]}
        for turn in range(20):  # one dead in four, and a pack that is copied now and then
            c.update({f"k{4 * n}": f"turn {turn}" for n in range(75)})
            c.flush()
            assert_bounded(c)
        assert full.items() <= tree(path).items()
        check(c)


def test_copied_values_fill_packs_of_up_to_half_the_usual_size(path, tight):
    with Chest(small(3000), path=path) as c:
        c.flush()
        before = {*packs(path)}
        for n in range(3000):
            if n % 3:
                del c[f"k{n}"]
        c.write_keys()
        assert not before & {*packs(path)}
        sizes = [len(content(path, name)) for name in packs(path)]
        assert sum(sizes) == nbytes(c.values())
        assert all(750 <= size <= 1500 for size in sorted(sizes)[1:])  # but the last
        check_ends(c)
        assert dict(c) == {f"k{n}": f"value {n}" for n in range(0, 3000, 3)}


def test_a_disk_that_refuses_the_copies_refuses_nothing_else(path, tight, disk, caplog):
    with Chest(small(500), path=path) as c:
        c.flush()
        for key in [*small(500)][::2] + [*small(500)][1::4]:
            del c[key]
        left = dict(c)
        disk.room = 700
        c.write_keys()
        assert "could not be compacted" in caplog.text
        assert read_back(path) == dict(c) == left
        check(c)
        disk.room = None
        for turn in range(10):
            c.update(small(100, 1000, f"turn {turn}"))
            c.flush()
        assert_bounded(c)
        check(c)
    assert read_back(path) == left | small(100, 1000, "turn 9")


def test_the_index_takes_little_more_than_the_live_keys_need(path, tmp_path, tight):
    with Chest(small(1000), path=str(tmp_path / "fresh")) as fresh:
        fresh.flush()
        need = len(content(fresh.path, ".keys"))
    with Chest(small(1000), path=path) as c:
        for turn in range(40):
            c.update(small(250, turn % 4 * 250, f"turn {turn}"))
            c.flush()
            assert len(content(path, ".keys")) < 2.5 * need
        for key in small(900):
            del c[key]
        c.write_keys()
        assert len(content(path, ".keys")) < need
        check(c)
        expected = dict(c)
    assert read_back(path) == expected


def act(c, expected, rnd):
    """Do something or other to a chest, and to the dict that it should equal."""
    keys = rnd.sample(range(200), rnd.choice([1, 5, 20, 100]))
    there = [key for key in keys if key in expected]
    match rnd.randrange(8):
        case 0 | 1 | 2:
            kinds = [bytes, str, list(b"list").copy, lambda: "x" * rnd.randrange(5000), rnd.random]
            for key in keys:
                value = rnd.choice(kinds)()
                c[key] = value
                expected[key] = pickle.loads(pickle.dumps(value))
        case 3:
            for key in there:
                del c[key], expected[key]
        case 4 if rnd.random() < 0.3:
            c.clear()
            expected.clear()
        case 5:
            assert {key: c[key] for key in there} == {key: expected[key] for key in there}
            for key in there[:3]:
                c.key_to_filename(key)
        case 6:
            for key in there:
                if isinstance(expected[key], list):
                    c[key].append(1)
                    expected[key] = [*expected[key], 1]
        case 7:
            assert {**c} == expected
    return expected


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_the_books_are_right_and_the_packs_small(path, tight, monkeypatch, seed):
    monkeypatch.setattr(chest.saving, "MANY", 8)
    monkeypatch.setattr(chest.ledger, "FRAME_KEYS", 10)
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 3000)
    rnd = random.Random(seed)
    expected = {}
    handles = [Chest(path=path, available_memory=budget) for budget in (3000, 1e9)]
    for _ in range(40):
        n = rnd.randrange(2)
        c = handles[n]
        if rnd.random() < 0.2:
            c.close()
            handles[n] = c = Chest(path=path, available_memory=c.available_memory)
        if rnd.random() < 0.3:
            changed = {**expected}
            try:
                with c.transaction():
                    for _ in range(3):
                        act(c, changed, rnd)
                    1 / rnd.randrange(2)
                expected = changed
            except ZeroDivisionError:
                pass
        else:
            act(c, expected, rnd)
        c.flush()
        for handle in handles:
            assert {**handle} == expected
            assert_bounded(handle)
            check(handle)
    for handle in handles:
        handle.close()


# -- files of others ------------------------------------------------------------------------------


def foreign(path, *names):
    for name in names:
        with open(os.path.join(path, name), "w", encoding="utf-8") as file:
            file.write(f"foreign {name}")


def test_files_of_others_that_are_called_as_packs_are_left_alone(path, tight):
    names = [".pack-1", ".pack-3", ".pack-9", ".pack-", ".pack-x", ".pack-01", ".pack-1~"]
    os.mkdir(path)
    foreign(path, *names)
    was = tree(path)
    with Chest(path=path) as c:
        for turn in range(10):
            c.update(small(300, text=f"turn {turn}"))
            c.flush()
            assert was.items() <= tree(path).items()
        assert max(int(name[6:]) for name in c._memory.ledger.packs) > 10
    with Chest(path=path) as c:
        assert dict(c) == small(300, text="turn 9")
        c.clear()
        c.update(small(64))
        c.flush()
        assert was.items() <= tree(path).items()
        c.drop()
    assert tree(path) == was


def test_new_packs_have_names_that_nobody_uses(path):
    os.mkdir(path)
    packs = Packs(Directory(path, str))
    assert packs.new_name([]) == ".pack-1"
    assert packs.new_name([".pack-7", ".pack-5"]) == ".pack-8"
    foreign(path, ".pack-9")
    os.symlink("nowhere", os.path.join(path, ".pack-10"))
    assert packs.new_name([]) == ".pack-11"
    assert Packs(Directory(path, str)).new_name([".pack-8"]) == ".pack-11"


def test_a_pack_that_was_taken_back_is_not_read_in_place_of_the_next(path):
    os.mkdir(path)
    packs = Packs(Directory(path, str))
    for content in b"first", b"second":
        packs.append(".pack-1", 0, [content], fsync=False)
        assert packs.read(".pack-1", 0, 10) == content
        packs.cut(".pack-1", 0)


# -- a crash --------------------------------------------------------------------------------------


class Crashes:
    """Copies of a directory as a crash before, in or after each step on its files leaves it."""

    def __init__(self, path, copies, monkeypatch):
        self.path = path
        self.copies = copies
        self.seen = []
        self._off = True
        for name in ("rename", "replace", "unlink", "truncate"):
            monkeypatch.setattr(os, name, self._around(getattr(os, name)))

        def write_less(file, data):  # than it is asked to, but for a single word
            return FileIO.write(file, data[: max(len(data) // 2 + 1, WORD)])

        class Stepwise(FileIO):
            write = self._around(write_less)
            truncate = self._around(FileIO.truncate)

        for module in (chest.head, chest.packs, chest.staging):
            monkeypatch.setattr(module, "FileIO", Stepwise)

    def _around(self, function):
        def step(*args):
            self._copy()
            try:
                return function(*args)
            finally:
                self._copy()

        return step

    def _copy(self):
        if not self._off and (not self.seen or tree(self.path) != tree(self.seen[-1])):
            self.seen.append(os.path.join(self.copies, str(len(self.seen))))
            shutil.copytree(self.path, self.seen[-1])

    def __enter__(self):
        self._off = False
        self._copy()

    def __exit__(self, *error):
        self._copy()
        self._off = True


@pytest.fixture
def crashes(path, tmp_path, monkeypatch):
    os.mkdir(tmp_path / "copies")
    return Crashes(path, str(tmp_path / "copies"), monkeypatch)


def append_more(c):
    c.update(small(64, 300))
    c.flush()


def overwrite(c):
    c.update(small(100, text="changed"))
    c.flush()


def fill_packs(c):
    c.update(small(500, 300))
    c.flush()


def remove_all(c):
    c.clear()
    c.write_keys()


def remove_most(c):
    for key in [*c][20:]:
        del c[key]
    c.write_keys()


def take_out(c):
    c.key_to_filename("k7")


def transact(c):
    with c.transaction():
        fill_packs(c)
        remove_most(c)
        overwrite(c)


CHANGES = [append_more, overwrite, fill_packs, remove_all, remove_most, take_out, transact]


@pytest.mark.parametrize("change", CHANGES)
def test_a_crash_at_any_step_leaves_the_chest_before_or_after_the_commit(
    path, tight, crashes, change
):
    with Chest(small(200), path=path) as c:
        c.flush()
        with crashes:
            change(c)
        after = dict(c)
    outcomes = []
    for copy in crashes.seen:
        for name in os.listdir(copy):
            if name.startswith(".new-"):
                os.utime(os.path.join(copy, name), AGES_AGO)
        outcome = read_back(copy)
        assert outcome in (small(200), after)
        outcomes.append(outcome == after)
        with Chest({"later": "x"}, path=copy) as c:
            c.flush()
            check_ends(c)
            c.update(small(100, 1000))
            c.flush()
            check_ends(c)
        assert read_back(copy) == outcome | {"later": "x"} | small(100, 1000)
    assert outcomes == sorted(outcomes), "once committed it stays so"
    assert outcomes[-1] is True
    assert len(outcomes) > 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("before", [0, 64], ids=["new pack", "older pack"])
def test_the_tail_of_a_process_that_died_is_cut_by_the_next_writer(path, before, monkeypatch):
    with Chest(small(before), path=path):
        pass
    size = packed_bytes(path)
    with Chest(path=path, readonly=True) as reader, Chest(path=path) as c:
        pid = os.fork()
        if pid == 0:
            monkeypatch.setattr(Index, "publish", lambda index: os._exit(9))
            try:
                dying = Chest(small(100, 100), path=path)
                dying.flush()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        assert packed_bytes(path) == size + nbytes(small(100, 100).values())
        left = tree(path)
        assert dict(reader) == dict(c) == read_back(path) == small(before)
        assert tree(path) == left, "a reader cuts nothing"
        c["x"] = 1
        c.flush()
        assert packed_bytes(path) == size
        check_ends(c)
        c.update(small(64, 64))
        c.flush()
        check_ends(c)
        assert dict(reader) == dict(c) == small(before) | {"x": 1} | small(64, 64)


# -- a disk that refuses, an interrupt ------------------------------------------------------------


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


@pytest.mark.parametrize("room", [0, 100])
@pytest.mark.parametrize("before", [0, 64], ids=["new pack", "older pack"])
def test_a_full_disk_leaves_the_pack_as_it_was_and_the_values_in_memory(path, disk, before, room):
    with Chest(small(before), path=path) as c:
        c.flush()
        was = tree(path)
        more = small(64, before)
        c.update(more)
        disk.room = room
        with pytest.raises(UnsavedError, match=FULL) as caught:
            c.flush()
        assert caught.value.keys == [*more]
        disk.room = room
        with pytest.raises(OSError, match=FULL):
            c.available_memory = 0
        assert tree(path) == was
        assert more.items() <= c.inmem.items()
        check(c)
        disk.room = None
        c.flush()
        check_ends(c)
    assert read_back(path) == small(64 + before)


@pytest.mark.parametrize("before", [0, 64], ids=["new pack", "older pack"])
def test_a_tail_that_cannot_be_cut_now_is_cut_by_the_next_commit(path, disk, before, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "not now")

    with Chest(small(before), path=path) as c, Chest(path=path) as other:
        c.flush()
        size = packed_bytes(path)
        c.update(small(64, before))
        disk.room = 100
        with monkeypatch.context() as patch:
            patch.setattr(chest.packs.FileIO, "truncate", refuse)
            patch.setattr(os, "unlink", refuse)
            with pytest.raises(UnsavedError, match=FULL):
                c.flush()
        assert packed_bytes(path) == size + 100
        assert dict(other) == read_back(path) == small(before)
        disk.room = None
        other["x"] = 1
        other.flush()
        assert packed_bytes(path) == size
        c.flush()
        check_ends(c)
        check_ends(other)
    assert read_back(path) == {**small(before), "x": 1, **small(64, before)}


def test_writes_that_take_less_than_asked_are_completed(path, disk):
    disk.step = 7
    with Chest(small(64), path=path) as c:
        c.flush()
        c.update(small(64, 64))
        c.flush()
        assert content(path) == b"".join(pickle.dumps(v, 5) for v in small(128).values())
        check_ends(c)
    assert read_back(path) == small(128)


def test_write_all_tells_how_much_it_wrote(tmp_path, disk):
    disk.step = 3
    with chest.packs.FileIO(str(tmp_path / "file"), "x") as file:
        assert write_all(file, [b"first", b"", b"second"]) == 11
        assert write_all(file, []) == 0
    assert content(tmp_path, "file") == b"firstsecond"


def interrupt(monkeypatch, owner, name, error, *, late):
    """Raise an error before or after a method does its work, the first time."""
    real = getattr(owner, name)
    raised = []

    def method(*args, **options):
        done = real(*args, **options) if late or raised else None
        if not raised:
            raised.append(error)
            raise error
        return done

    monkeypatch.setattr(owner, name, method)


STEPS = [
    pytest.param(Packs, "append", False, id="before append"),
    pytest.param(Packs, "append", True, id="after append"),
    pytest.param(Directory, "place", False, id="before place"),
    pytest.param(Directory, "place", True, id="after place"),
    pytest.param(Index, "publish", False, id="before publish"),
]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "no luck")],
                         ids=["interrupt", "EIO"])
@pytest.mark.parametrize(("owner", "name", "late"), STEPS)
def test_what_ends_a_commit_leaves_the_packs_as_they_were(
    path, tight, monkeypatch, owner, name, late, error
):
    with Chest(small(100), path=path) as c, Chest(path=path) as other:
        c.flush()
        was = tree(path)
        c.update(small(500, 50, "changed"))
        with monkeypatch.context() as patch:
            interrupt(patch, owner, name, error, late=late)
            with pytest.raises((KeyboardInterrupt, UnsavedError)):
                c.flush()
        assert tree(path) == was
        assert dict(c) == small(100) | small(500, 50, "changed")
        assert dict(other) == small(100)
        check(c)
        c.flush()
        check(c)
        assert dict(other) == read_back(path) == dict(c)
        check(other)


def test_a_transaction_that_is_taken_back_leaves_the_packs_as_they_were(path, tight):
    with Chest(small(100), path=path) as c, Chest(path=path) as other:
        c.flush()
        was = tree(path)
        with pytest.raises(ZeroDivisionError):
            with c.transaction():
                for change in (append_more, overwrite, fill_packs, take_out, remove_all):
                    change(c)
                assert len(packs(path)) > 3
                raise ZeroDivisionError
        assert tree(path) == was
        assert dict(c) == dict(other) == small(100)
        check_ends(c)
        append_more(c)
        check_ends(c)
        assert dict(other) == small(100) | small(64, 300)


# -- other handles --------------------------------------------------------------------------------


def test_two_handles_append_to_the_same_pack(path):
    with Chest(path=path) as first, Chest(path=path) as second:
        for turn in range(10):
            (first, second)[turn % 2].update(small(64, 64 * turn))
            (first, second)[turn % 2].flush()
        assert packs(path) == [".pack-1"]
        assert dict(first) == dict(second) == small(640)
        check_ends(first)
        check_ends(second)


def rewrite_until_moved(c, key):
    """Overwrite other values until the chest has copied that of `key` into another pack."""
    before = entry(c, key).file
    others = [other for other in c if other != key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chest.upkeep, "WASTE", 1)
        for turn in range(50):
            c.update(dict.fromkeys(others, f"turn {turn}"))
            c.flush()
            if entry(c, key).file != before:
                assert before not in packs(c.path)
                return
    raise AssertionError("the pack was not copied")


def test_an_open_descriptor_reads_on_when_the_pack_is_gone(path, tight):
    with Chest(small(100), path=path) as c, Chest(path=path, readonly=True) as reader:
        c.flush()
        was = entry(reader, "k5")
        assert reader["k5"] == "value 5"
        rewrite_until_moved(c, "k5")
        assert reader._memory.store.packs.read(*was[:3]) == pickle.dumps("value 5", 5)
        assert dict(reader) == dict(c)
        assert entry(reader, "k5") == entry(c, "k5") != was
        check(c)


@pytest.mark.parametrize("open_before", [False, True])
@pytest.mark.parametrize("how", ["get", "iterate", "prefetch"])
def test_a_pack_that_is_copied_while_somebody_reads_costs_nothing(
    path, tight, monkeypatch, how, open_before
):
    read = {
        "get": lambda c: c["k5"],
        "iterate": lambda c: next(iter(c._stream(["k5"])))[1],
        "prefetch": lambda c: [c.prefetch(["k5"]), c["k5"]][1],
    }[how]
    with Chest(small(100), path=path) as c, Chest(path=path) as reader:
        c.flush()
        if open_before:
            assert reader["k6"] == "value 6"
        done = []
        for name in ("read", "peek"):

            def first_move(self, *args, real):
                if self is reader._memory.store.packs and not done:
                    done.append(True)
                    rewrite_until_moved(c, "k5")
                return real(self, *args)

            method = partialmethod(first_move, real=getattr(Packs, name))
            monkeypatch.setattr(Packs, name, method)
        assert read(reader) == "value 5"
        assert dict(reader) == dict(c)
        check(c)
        check(reader)


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("how", ["get", "iterate", "on_miss"])
def test_a_pack_name_that_is_used_again_is_noticed(path, how, readonly):
    options = {"on_miss": str} if how == "on_miss" else {}
    with Chest(small(64, text="first"), path=path):
        pass
    with Chest(path=path, readonly=readonly, **options) as reader:
        assert dict(reader) == small(64, text="first")
        with Chest(path=path) as c:
            c.clear()
            c.flush()
            assert packs(path) == []
        with Chest(small(64, text="again"), path=path):
            assert len(reader) == 0
        assert packs(path) == [".pack-1"]
        if how == "iterate":
            assert dict(reader.items()) == small(64, text="again")
        assert {key: reader[key] for key in reader} == small(64, text="again")
        check(reader)


def test_a_value_that_is_only_moved_stays_in_memory(path, tight, monkeypatch):
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 1 << 30)
    with Chest({f"k{n}": [n] for n in range(100)}, path=path) as c, Chest(path=path) as other:
        c.flush()
        value, text = other["k5"], other.setdefault("text", "x" * 10)
        rewrite_until_moved(c, "k5")
        assert other["k5"] is value
        value.append("changed")
        other.flush()
        assert c["k5"] == [5, "changed"]
        assert c["text"] == text
        check(c)
        check(other)


def test_dead_packs_that_others_removed_are_no_matter(path):
    with Chest(small(64), path=path) as c, Chest(path=path) as other:
        c.flush()
        assert len(other) == 64
        c.clear()
        c.write_keys()
        assert packs(path) == []
        other.update(small(64, text="new"))
        other.flush()
        assert dict(c) == dict(other) == small(64, text="new")
        check(c)
        check(other)


def test_a_dead_pack_that_cannot_be_removed_now_is_removed_later(path, monkeypatch):
    real = os.unlink

    def unlink(name):
        if ".pack-" in name:
            raise PermissionError(errno.EACCES, "open elsewhere")
        real(name)

    with Chest(small(64), path=path) as c:
        c.flush()
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", unlink)
            c.clear()
            c.write_keys()
            c["x"] = 1
            c.flush()
        assert packs(path) == [".pack-1"]
    with Chest(path=path) as c:
        c["y"] = 2
        c.flush()
        assert packs(path) == []
        check(c)
    assert read_back(path) == {"x": 1, "y": 2}


# -- iterating ------------------------------------------------------------------------------------


@pytest.fixture
def mixed(path):
    """A chest with values in packs, in files and in memory; give it with the dict it equals."""
    expected = small(3000)
    with Chest(expected, path=path) as c:
        c.flush()
        changes = {"k10": "changed", "big": "x" * 10_000, "list": [1], **small(100, 2000, "new")}
        for key in ("k20", "k30"):
            del c[key], expected[key]
        for key, value in [*changes.items(), ("k30", "back")]:
            c[key] = expected[key] = value
            c.flush()
    with Chest(path=path) as c:
        c.update(small(5, 50, "unsaved"))
        expected |= small(5, 50, "unsaved")
        yield c, expected


def test_iterating_gives_what_a_dict_gives_in_its_order(mixed):
    c, expected = mixed
    assert [*c.items()] == [*expected.items()]
    assert [*c.values()] == [*expected.values()]
    assert [*c.items()] == [(key, c[key]) for key in c]
    assert c == expected
    c.clear()
    assert [*c.values()] == []


def test_values_that_cannot_change_do_not_become_resident(path):
    values = {n: (n, "text", 1.5, None) for n in range(100)} | {"list": [1], "nested": ([],)}
    with Chest(values, path=path) as c:
        c.flush()
    with Chest(path=path) as c:
        assert [*c.values()] == [*values.values()]
        assert c.inmem == {"list": [1], "nested": ([],)}
        assert dict(c.items())["list"] is c["list"]
        check(c)


@pytest.mark.parametrize("options", [{"on_miss": str}, {"dump": json.dump, "load": json.load}])
def test_nor_do_those_that_are_read_one_by_one(path, options):
    values = {str(n): n * "n" for n in range(100)} | {"list": [1]}
    with Chest(values, path, **options) as c:
        c.flush()
    with Chest(path=path, **options) as c:
        assert [*c.values()] == [*values.values()]
        assert [*c.inmem] == ["list"]
        assert c["5"] == "nnnnn"
        assert {*c.inmem} == {"list", "5"}
        check(c)


def test_values_are_read_many_at_a_time(path, monkeypatch):
    with Chest(small(3000), path=path) as c:
        c.flush()
    noted = reads(monkeypatch)
    with Chest(path=path) as c:
        assert dict(c.items()) == small(3000)
    assert len(noted) < 10
    assert sum(length for _, length in noted) == nbytes(small(3000).values())


def test_a_value_that_is_on_no_disk_keeps_none_of_its_neighbours_from_that(path, monkeypatch):
    with Chest(path=path) as c:
        c["unsaved"] = lambda: 0
        c.update(small(200))
        with pytest.raises(UnsavedError):
            c.flush()
        c.available_memory = 0
        noted = reads(monkeypatch)
        assert dict(c.items()) == {"unsaved": c["unsaved"]} | small(200)
        assert len(noted) < 10
        del c["unsaved"]


def test_each_value_that_is_read_is_told_of(path):
    with Chest(small(64), path=path) as c:
        c.flush()
    missed = []
    with Chest(path=path, on_miss=missed.append) as c:
        assert [*c.values()] == [*small(64).values()]
    assert missed == [*small(64)]


def set_one(c, other):
    c["k40"] = "changed"


def set_and_let_go(c, other):
    c["k40"] = "changed"
    c.available_memory = 0


def set_elsewhere(c, other):
    other["k40"] = "changed"
    other.flush()


def set_many_elsewhere(c, other):
    other.update(small(64, 30, "changed"))
    other.flush()


def delete_one(c, other):
    del c["k40"]


def delete_elsewhere(c, other):
    del other["k40"]
    other.flush()


def delete_and_set(c, other):
    del c["k40"]
    c["k40"] = "back"


def set_a_list(c, other):
    c["k40"] = [1]


def clear(c, other):
    c.clear()


def clear_and_set(c, other):
    c.clear()
    c["k40"] = "back"
    c.flush()


def clear_elsewhere(c, other):
    other.clear()
    other.flush()


def move(c, other):
    for turn in range(9):
        other.update(small(60, 60, f"turn {turn}"))
        other.flush()


def use_the_name_again(c, other):
    other.clear()
    other.flush()
    with Chest(small(64, text="again"), path=other.path):
        pass


def give_files(c, other):
    for key in ("k40", "k41"):
        other.key_to_filename(key)


def roll_back(c, other):
    with pytest.raises(ZeroDivisionError):
        with c.transaction():
            set_many_elsewhere(None, c)
            raise ZeroDivisionError


class Box(list):
    """Something changeable to which there are weak references."""


class Fickle(list):
    """A list that is loaded with a pickle unlike the one that it was loaded from."""

    def __reduce__(self):
        return Fickle._load, (getattr(self, "times", 0), [*self])

    def __init__(self, n):
        super().__init__([n])

    @staticmethod
    def _load(times, items):
        value = Fickle(0)
        value[:] = items
        value.times = times + 1
        return value


MEANWHILE = [
    set_one, set_and_let_go, set_elsewhere, set_many_elsewhere, delete_one, delete_elsewhere,
    delete_and_set, set_a_list, clear, clear_and_set, clear_elsewhere, move, use_the_name_again,
    give_files, roll_back,
]


@pytest.mark.parametrize("kind", [str, Box, list], ids=["text", "object", "list"])
@pytest.mark.parametrize("change", MEANWHILE)
def test_what_changes_during_the_iteration_is_seen(path, tight, change, kind):
    start = {key: kind(value) for key, value in small(120).items()}
    with Chest(start, path=path) as c:
        c.flush()
    with Chest(path=path) as c, Chest(path=path) as other:
        found = []
        for item in c.items():
            found.append(item)
            if item[0] == "k10":
                change(c, other)
        now = dict(c)
        keys = [key for key in small(120) if key in now or key in small(11)]
        assert found[:11] == [*start.items()][:11]
        assert found[11:] == [(key, now[key]) for key in keys[11:]]
        check(c)
        check(other)


RECORDS = {
    "list": lambda n: [n],
    "dict": lambda n: {"n": n},
    "object": lambda n: Box([n]),
    "list in a tuple": lambda n: (n, [n]),
    "set": lambda n: {n, "n"},  # which other processes pickle in another order
    "unlike its pickle": Fickle,
}


def change_record(value, by=1):
    """Change a record in place so that it is unlike all others, and what it was."""
    if isinstance(value, dict):
        value["n"] += by
    elif isinstance(value, set):
        value.add(("changed", by))
    else:
        (value[1] if isinstance(value, tuple) else value).append(by)


@pytest.fixture(params=RECORDS)
def records(request, path):
    """A chest with packed records that can change, of which few fit in memory, and its pairs."""
    expected = {n: RECORDS[request.param](n) for n in range(2500)}
    with Chest(expected, path=path) as c:
        c.flush()
    with Chest(path=path, available_memory=20_000) as c:
        yield c, deepcopy(expected)


def test_values_that_can_change_are_read_many_at_a_time_too(records, monkeypatch):
    c, expected = records
    noted = reads(monkeypatch)
    assert [*c.items()] == [*expected.items()]
    assert c.memory_usage <= 20_000
    assert len(noted) < 20
    noted.clear()
    assert [*reversed(c.values())] == [*expected.values()][::-1]
    assert len(noted) < 20
    assert c.stats().writes == 0
    check(c)


def test_each_value_may_be_changed_in_place_before_the_next_is_taken(records, path):
    c, expected = records
    for turn in range(2):
        for value in c.values():
            change_record(value, turn)
        assert c.memory_usage <= 20_000
        for value in expected.values():
            change_record(value, turn)
        assert [*c.items()] == [*expected.items()]
    check(c)
    c.close()
    assert read_back(path) == expected


def test_a_value_that_was_changed_before_it_is_reached_is_the_changed_one(records, path):
    c, expected = records
    for n, (key, value) in enumerate(c.items()):
        assert value == expected[key]
        if n % 50 == 0:
            for other in (key + 1, key + 700):
                if other in c:
                    change_record(c[other])
                    change_record(expected[other])
    check(c)
    c.close()
    assert read_back(path) == expected


def test_what_is_read_ahead_again_and_again_is_less_and_less(path, monkeypatch):
    with Chest({n: [n] for n in range(2000)}, path=path) as c:
        c.flush()
    with Chest(path=path, available_memory=0) as c:
        noted = reads(monkeypatch)
        c["x"] = None
        for n, (key, _) in enumerate(c.items()):
            if key != "x":
                assert key == n
                c["x"] = n  # and that is a commit
        assert sum(length for _, length in noted) < 5 * packed_bytes(path)


def test_what_is_known_of_values_that_are_gone_takes_no_memory(path):
    n = 8000
    with Chest({i: Fickle(i) for i in range(n)}, path=path) as c:
        c.flush()
    with Chest(path=path, available_memory=10_000) as c:
        for step in (c.values, lambda: map(c.__getitem__, c)):
            assert sum(len(value) for value in step()) == n
            assert len(c._memory._as_loaded) < n / 2
        check(c)


def test_a_copy_is_read_many_at_a_time_and_in_order(mixed, monkeypatch):
    c, expected = mixed
    c.flush()
    noted = reads(monkeypatch)
    new = c.copy()
    assert len(noted) < 500  # of 3,000
    assert [*new.items()] == [*expected.items()]
    new.flush()
    noted.clear()
    assert new == c
    assert len(noted) < 1000
    new["k2000"] = "other"
    assert new != c
    check(new)


# -- hooks amid a commit --------------------------------------------------------------------------


class Hook:
    """A key that does something the first time that it is pickled."""

    act = staticmethod(lambda: None)

    def __reduce__(self):
        Hook.act, act = staticmethod(lambda: None), Hook.act
        act()
        return Hook, ()

    def __eq__(self, other):
        return isinstance(other, Hook)

    def __hash__(self):
        return 7


@pytest.mark.parametrize("victim", ["x", bytes(100_000)], ids=["small", "large"])
@pytest.mark.parametrize("by", ["key", "value"])
def test_what_is_deleted_while_others_are_dumped_is_gone(path, victim, by):
    with Chest({"victim": victim}, path=path) as c:
        hook = Hook()
        if by == "key":
            c[hook] = 1
        else:
            c["hook"] = hook
        c["large"] = bytes(100_000)
        c.update(small(64))
        Hook.act = staticmethod(lambda: c.pop("victim"))
        c.flush()
        c._check()
        assert "victim" not in c
    with Chest(path=path) as c:
        assert "victim" not in c
        assert c["large"] == bytes(100_000)
        assert small(64).items() <= dict(c).items()


def test_a_list_in_the_place_of_a_string_that_is_leaving_counts(path):
    hook = Hook()
    with Chest({**small(64), hook: "x"}, path=path) as c:

        def act():
            c[hook] = [1]
            c.flush()

        Hook.act = act
        c.move_to_disk(hook)
        c._check()
        with c.transaction():
            c[hook].append(2)
        c._check()
    with Chest(path=path) as c:
        assert c[hook] == [1, 2]


def test_who_asks_for_the_file_of_a_packed_value_that_another_one_deletes(path, monkeypatch):
    with Chest(small(64), path=path) as c, Chest(path=path) as other:
        c.flush()
        unpack = Memory._unpack

        def unpack_late(memory, key):
            del other[key]
            other.write_keys()
            unpack(memory, key)

        assert c._memory.ledger.is_packed("k5")
        monkeypatch.setattr(Memory, "_unpack", unpack_late)
        assert not os.path.exists(c.key_to_filename("k5"))
        assert "k5" not in c
        c._check()


class Hooked(Hook):
    """A key that does something the second time that it is pickled: amid the commit."""

    def __reduce__(self):
        Hooked.times += 1
        if Hooked.times == 2:
            Hooked.act()
        return Hooked, ()


@pytest.mark.parametrize("transaction", [False, True])
@pytest.mark.parametrize("act", ["delete", "clear", "flush"])
def test_a_key_that_wants_another_commit_amid_its_own_is_refused(path, act, transaction):
    Hooked.times = 0
    with Chest(small(64), path=path) as c:
        c.flush()
        c[Hooked()] = "hooked"
        c.update(small(64, 100))
        expected = dict(c)

        def nested():
            c["new"] = "new"
            {"delete": lambda: c.pop("k100"), "clear": c.clear, "flush": c.flush}[act]()

        Hooked.act = staticmethod(nested)
        with pytest.raises(RuntimeError, match="must not delete keys or commit"):
            if transaction:
                with c.transaction():
                    pass
            c.flush()
        c._check()
        Hooked.act = staticmethod(lambda: None)
        c.pop("new", None)
        assert c == expected
    with Chest(path=path) as c:
        assert c == expected


@pytest.mark.parametrize("at", range(-9, -1))
def test_a_byte_that_changes_while_its_pack_is_open_is_told(path, at):
    with Chest(small(64), path=path):
        pass
    with Chest(path=path) as c:
        assert (c["k0"], c["k1"]) == ("value 0", "value 1")  # from here on the pack is open
        place = entry(c, "k7")
        end = place.place + place.length
        with open(os.path.join(path, place.file), "r+b") as file:
            file.seek(end + at)
            byte = file.read(1)[0]
            file.seek(end + at)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(CorruptValueError):
            c["k7"]
        assert c["k8"] == "value 8"


def test_a_pack_whose_name_was_used_again_is_not_copied_from_the_old_one(path, monkeypatch):
    monkeypatch.setattr(chest.upkeep, "WASTE", 10_000)
    new = {n: f"new{n:04}" * 100 for n in range(200)}
    with Chest({n: f"old{n:04}" * 100 for n in range(200)}, path) as first:
        first.flush()
        with Chest(path=path, available_memory=0) as c:
            assert c[0] == first[0]  # the pack is open
            first.clear()
            first.flush()
            with Chest(path=path) as other:
                other.update(new)
                other.flush()
                assert ".pack-1" in os.listdir(path)
            for n in range(150):
                del c[n]
                del new[n]
            c.flush()
            assert dict(c) == dict(first) == new
    with Chest(path=path) as again:
        assert dict(again) == new
