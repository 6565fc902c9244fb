"""`Chest.compact`: nothing that is out of date is left, and the bytes that it says are free."""

import bz2
import datetime as dt
import gzip
import os
import sys

import pytest
from test_verify import JSON, make, tree, vanishing  # noqa: F401

import chest.store
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
