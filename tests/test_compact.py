"""`Chest.compact`: nothing that is out of date is left, and the bytes that it says are free."""

import bz2
import datetime as dt
import errno
import gzip
import os
import sys

import pytest
from test_verify import JSON, make, tree, vanishing  # noqa: F401

import chest.index
import chest.store
import chest.upkeep
from chest import Chest, ReadOnlyError, UnsavedError, repair
from chest.columns import Puts, encode
from chest.frames import frame
from chest.serialize import digest_bytes


def nbytes(path):
    return sum(map(len, tree(path).values()))


@pytest.mark.parametrize("options", [{}, JSON, {"open": gzip.open}])
def test_what_is_out_of_date_goes_and_the_bytes_are_told(path, options):
    make(path, **options)
    with Chest(path=path, **options) as c:
        for n in range(0, 100, 2):
            del c[n]
        c["x"] = "new"
        expected = dict(c)
        c.flush()
        before = nbytes(path)
        freed = c.compact()
        assert freed == before - nbytes(path) > 0
        log = os.stat(os.path.join(path, ".keys")).st_ino
        assert c.compact() == 0
        assert os.stat(os.path.join(path, ".keys")).st_ino == log, "it is written once"
        assert dict(c) == expected
        assert c.verify().ok
        c._check()
        for name, alive in c._memory.ledger.packs.items():
            assert len(tree(path)[name]) == alive
    with Chest(path=path, **options) as c:
        assert dict(c) == expected


def test_a_log_that_would_not_be_shorter_stays(path):
    with Chest({"x": 1}, path) as c:
        c.flush()
        before = tree(path)
        assert c.compact() == 0
        assert tree(path) == before


def test_what_is_not_saved_yet_is(path):
    with Chest({"x": 1}, path) as c:
        c.compact()
        with Chest(path=path, readonly=True) as other:
            assert dict(other) == {"x": 1}
        c["bad"] = lambda: 1
        with pytest.raises(UnsavedError):
            c.compact()
        del c["bad"]


def test_a_chest_without_a_directory_has_nothing_to_free():
    c = Chest({"x": 1})
    assert c.compact() == 0
    assert c._memory.path is None
    c.close()


def test_it_is_refused_where_nothing_can_be_written_and_in_a_transaction(path):
    make(path)
    before = tree(path)
    with Chest(path=path, readonly=True) as c, pytest.raises(ReadOnlyError):
        c.compact()
    with Chest(path=path) as c:
        with c.transaction(), pytest.raises(RuntimeError, match="inside a transaction"):
            c.compact()
        assert c.verify().ok
    assert tree(path) == before


def test_what_a_crash_left_goes_and_counts(path):
    make(path)
    half = [([999], Puts(["new"], ["left"], [0], [4], [digest_bytes(b"half")]))]
    with open(os.path.join(path, ".keys"), "ab") as file:
        file.write(frame(encode(half, first=True)))
    staging, young = f".new-{'a' * 16}-0", f".new-{'b' * 16}-0"
    for name, data in [("left", b"half"), (staging, b"staged"), (young, b"-"), ("notes", b"mine")]:
        with open(os.path.join(path, name), "wb") as file:
            file.write(data)
    with Chest(path=path) as c:
        c["more"] = 1
        c.flush()  # sweeps, and looks for staging files this one time
        os.utime(os.path.join(path, staging), (0, 0))
        before = nbytes(path)
        assert c.compact() == before - nbytes(path) >= len(b"staged")
    assert {staging, "left"}.isdisjoint(tree(path))
    assert {young, "notes"} <= {*tree(path)}


def make_with_classes(path, cls):
    with Chest(path=path) as c:
        for n in range(100):
            c[n], c[cls(f"{n}")] = f"{n}", f"packed {n}"
        c.flush()
        for n in range(50):
            del c[n]


def test_keys_whose_class_is_gone_keep_their_pack_and_nothing_is_copied_twice(
    path,
    vanishing,  # noqa: F811
):
    make_with_classes(path, vanishing)
    classes = sys.modules.pop("vanishing")
    with Chest(path=path) as c:
        before = nbytes(path)
        freed = c.compact()
        assert freed == before - nbytes(path) >= 0
        assert [name for name in tree(path) if name.startswith(".pack")] == [".pack-1"]
        assert c.compact() == 0
        assert c.verify().keys == 150
    sys.modules["vanishing"] = classes
    with Chest(path=path) as c:
        assert len(c) == 150
        assert c.compact() > 0
        assert c[vanishing("7")] == "packed 7"
        c._check()


def test_a_damaged_pack_with_such_keys_is_repaired_in_its_place(path, vanishing):  # noqa: F811
    make_with_classes(path, vanishing)
    with Chest(path=path) as c:
        ledger = c._memory.ledger
        place = ledger.entry(ledger.rows[99]).place
    full = os.path.join(path, ".pack-1")
    with open(full, "r+b") as file:
        file.seek(place + 3)
        file.write(b"????????")
    sys.modules.pop("vanishing")
    report = repair(path)
    assert report.damaged
    assert not report.aside
    assert [name for name in tree(path) if name.startswith(".pack")] == [".pack-1"]
    assert repair(path).ok


def test_other_handles_go_on(path):
    make(path)
    with Chest(path=path) as a, Chest(path=path) as b, Chest(path=path, readonly=True) as reader:
        b["own"] = [1]
        for n in range(50):
            del a[n]
        assert a.compact() > 0
        for c in (a, b, reader):
            assert (5 in c, c[77], c["x"][0]) == (False, "value 77", "x")
        b.flush()
        assert a["own"] == reader["own"] == [1]


def test_a_full_disk_is_told_and_loses_nothing(path, monkeypatch):
    make(path)

    def refuse(*_):
        raise OSError(28, "full")

    with Chest(path=path) as c:
        for n in range(50):
            del c[n]
        expected = dict(c)
        monkeypatch.setattr(chest.staging, "write_all", refuse)
        with pytest.raises(OSError, match="full"):
            c.compact()
        monkeypatch.undo()
        assert dict(c) == expected
        c._check()
        assert c.compact() > 0
        assert dict(c) == expected


def test_files_opened_in_two_ways_are_left_to_python(path, tmp_path):
    with Chest(path=path, open=gzip.open) as c:
        c["x"] = "x" * 9000
    with Chest(path=path, open=bz2.open) as c:
        c["y"] = "y" * 9000
    before = tree(path)
    with pytest.raises(ValueError, match=r"bz2\.open or gzip\.open"):
        repair(path)
    assert tree(path) == before


def test_dates_as_keys_are_no_hindrance(path):
    days = [dt.date(2026, 1, 1) + dt.timedelta(n) for n in range(200)]
    with Chest({day: str(day) for day in days}, path) as c:
        c.flush()
        for day in days[::2]:
            del c[day]
        assert c.compact() > 0
        assert [*c] == days[1::2]
        c._check()


def flush_until_compacted(c):
    made = os.stat(os.path.join(c.path, ".keys")).st_ino
    while os.stat(os.path.join(c.path, ".keys")).st_ino == made:
        c["k"] = c["k"] + 1
        c.flush()


def update_from_another(c):
    with Chest({"k": 0}) as other:
        other.flush()
        c.update(other)


def in_a_transaction(c):
    with c.transaction():
        c["k"] = 0


@pytest.mark.parametrize("act", [Chest.compact, Chest.flush, update_from_another, in_a_transaction])
@pytest.mark.parametrize("call", ["lstat", "fstat", "listdir", "read_frames"])
def test_a_call_that_fails_once_the_index_was_replaced_makes_nothing_stale(
    tmp_path, monkeypatch, act, call
):
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 1000)
    owner = chest.index if call == "read_frames" else os
    real, replace = getattr(owner, call), chest.index.Index.replace
    for n in range(1, 12):
        path = str(tmp_path / str(n))
        left = 0

        def then(self, *args):
            nonlocal left
            replace(self, *args)
            left = n  # noqa: B023 -- called in this very round

        def fail(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.EIO, "the disk fails")
            return real(*args, **options)

        with Chest(path=path) as c, Chest(path=path) as other:
            for k in range(20):
                c["k"] = k
                c.flush()
            c["due"] = "x"
            with monkeypatch.context() as patch:
                if act is not Chest.compact:  # which does it anyway
                    patch.setattr(chest.upkeep, "COMPACT_BYTES", 0)
                patch.setattr(chest.index.Index, "replace", then)
                patch.setattr(owner, call, fail)
                try:
                    act(c)
                except (OSError, UnsavedError) as error:
                    assert "the disk fails" in str(error)
                    assert (act, call, n) != (update_from_another, "read_frames", 1), "it is saved"
            other["k"], other["n"] = "other", "other"
            other.flush()
            assert (c["k"], c.get("n")) == ("other", "other")
            c["new"] = 1
            c.flush()
            assert dict(other) == dict(c)
            c._check()
