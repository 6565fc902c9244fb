"""What is wrong with a directory: found, told, and nothing touched."""

import bz2
import collections
import datetime as dt
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import types
from contextlib import suppress

import pytest
import test_old

import chest.verify
from chest import (
    Chest,
    ChestClosedError,
    CorruptIndexError,
    CorruptValueError,
    Problem,
    Report,
)
from chest.columns import Puts, encode
from chest.frames import frame
from chest.pickled import PickledKey, holds_json, skim
from chest.reading import Reading

JSON = {"dump": json.dump, "load": json.load}
KINDS = [
    pytest.param({}, id="pickle"),
    pytest.param(JSON, id="json"),
    pytest.param({"open": gzip.open}, id="gzip"),
    pytest.param({"dump": pickle.dump, "open": bz2.open}, id="bz2"),
]


def make(path, **options):
    """Two values in files of their own, and a hundred in a pack where there are packs."""
    with Chest(path=path, **options) as c:
        c["x"], c["y"] = "x" * 10_000, ["y"] * 10_000
        c.flush()
        for n in range(100):
            c[n] = f"value {n}"


def tree(path):
    """Every file below a directory, with its content."""
    return {name: content for name, (content, _) in test_old.tree(path).items()}


def flip(path, name, place=-1):
    """Change a bit of a file."""
    full = os.path.join(path, name)
    with open(full, "r+b") as file:
        file.seek(place, 0 if place >= 0 else 2)
        (byte,) = file.read(1)
        file.seek(place, 0 if place >= 0 else 2)
        file.write(bytes([byte ^ 1]))


def cut(path, name, size):
    os.truncate(os.path.join(path, name), size)


def keys(problems):
    return [problem.key for problem in problems]


# -- what is fine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_a_sound_chest_is_all_as_written(path, options):
    make(path, **options)
    before = tree(path)
    with Chest(path=path, **options) as c:
        report = c.verify()
        assert report.ok
        assert report.path == path
        assert report.keys == 102
        assert report.nbytes == sum(c._memory.ledger.entry(r).length for _, r in rows(c))
        assert report == Report(path, 102, report.nbytes)
        assert str(report) == f"102 values, {report.nbytes:,} bytes: all as written"
    assert tree(path) == before


def rows(c):
    return c._memory.ledger.stored()


def test_a_chest_without_a_directory_yet_is_fine_and_gets_none():
    c = Chest({"x": 1})
    assert c.verify() == Report(None)
    assert c.verify().ok
    assert c._memory.path is None
    c.close()


def test_only_what_is_committed_is_looked_at(path):
    with Chest(path=path) as c:
        c["x"] = 1
        assert c.verify().keys == 0
        c.flush()
        c["y"] = 2
        del c["x"]
        assert c.verify().keys == 1
        c.flush()
        assert c.verify().keys == 1


def test_nothing_becomes_resident_and_no_hook_is_called(path):
    make(path)
    missed = []
    with Chest(path=path, on_miss=missed.append) as c:
        assert c.verify().keys == 102
        assert not c.inmem
        assert not missed


class Bomb:
    armed = False

    def __reduce__(self):
        return blow, ()


def blow():
    if Bomb.armed:
        raise AssertionError("it was unpickled")
    return Bomb()


def test_no_value_is_unpickled(path, monkeypatch):
    with Chest(path=path) as c:
        c["x"] = Bomb()
        c.flush()
        monkeypatch.setattr(Bomb, "armed", True)
        assert c.verify() == Report(path, 1, c.verify().nbytes)


def test_a_closed_chest_is_an_error(path):
    c = Chest(path=path)
    c.close()
    with pytest.raises(ChestClosedError):
        c.verify()


def test_a_transaction_of_ones_own_is_not_waited_for(path):
    with Chest(path=path) as c:
        c["x"] = 1
        with c.transaction():
            c["y"] = [2] * 10_000
            c.move_to_disk("y")
            report = c.verify()
            assert (report.ok, report.keys, report.stray) == (True, 1, [])
        assert c.verify().keys == 2


def test_a_writer_is_not_waited_for_and_does_not_wait(path):
    make(path)
    with Chest(path=path) as a, Chest(path=path) as b, a.transaction():
        a["z"] = [1] * 10_000
        a.move_to_disk("z")
        assert b.verify() == Report(path, 102, b.verify().nbytes)


def test_the_lock_of_the_chest_is_free_while_values_are_read(path, monkeypatch):
    make(path)
    real = chest.verify.Reading.check_value
    with Chest(path=path) as c:

        def check(self, key, entry):
            if key == "x":
                thread = threading.Thread(target=c.__setitem__, args=("new", 1))
                thread.start()
                thread.join(10)
                assert not thread.is_alive()
            return real(self, key, entry)

        monkeypatch.setattr(chest.verify.Reading, "check_value", check)
        assert c.verify().ok
        assert c["new"] == 1


# -- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("options", KINDS)
def test_every_damaged_or_missing_value_is_told_by_key_and_path(path, options, readonly):
    make(path, **options)
    with Chest(path=path, **options) as c:
        files = {key: os.path.relpath(c.key_to_filename(key), path) for key in ("x", "y", 7)}
    flip(path, files["x"], os.path.getsize(os.path.join(path, files["x"])) - 6)
    os.unlink(os.path.join(path, files["y"]))
    cut(path, files[7], 3)
    before = tree(path)
    with Chest(path=path, readonly=readonly, **options) as c:
        report = c.verify()
        assert not report.ok
        assert report.keys == 99
        assert {(p.key, os.path.relpath(p.path, path)) for p in report.damaged} == {
            ("x", files["x"]),
            (7, files[7]),
        }
        assert report.missing == [
            Problem("y", os.path.join(path, files["y"]), "the file is gone")
        ]
        for key in ("x", "y", 7):
            with pytest.raises(CorruptValueError) as caught:
                c[key]
            told = {p.key: p.reason for p in [*report.damaged, *report.missing]}
            assert caught.value.reason == told[key] or "open" in options
    assert tree(path) == before


def test_a_report_prints_well():
    report = Report(
        os.path.join(os.sep, "c"),
        1200,
        34567,
        ["the frame at byte 16 is not as written"],
        [Problem(("a", 1), os.path.join(os.sep, "c", "_a", "f"), "its bytes are wrong")],
        [Problem("k" * 500, os.path.join(os.sep, "c", "k"), "the file is gone")],
        [os.path.join(os.sep, "c", "notes.txt")],
    )
    lines = str(report).splitlines()
    assert lines[0] == "1,200 values, 34,567 bytes: 1 damaged, 1 missing, the index is damaged"
    assert lines[1] == "  index    .keys: the frame at byte 16 is not as written"
    assert lines[2] == f"  damaged  ('a', 1) in {os.path.join('_a', 'f')}: its bytes are wrong"
    assert lines[3].startswith("  missing  'kkk")
    assert len(lines[3]) < 180
    assert lines[3].endswith(" in k: the file is gone")
    assert lines[4:] == ["  stray    notes.txt"]
    assert not report.ok


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_wrong_byte_in_a_pack_damages_one_value_alone(path, place):
    make(path)
    flip(path, ".pack-1", 5 if place == "first" else -1)
    with Chest(path=path, readonly=True) as c:
        report = c.verify()
        assert keys(report.damaged) == [0 if place == "first" else 99]
        assert report.keys == 101


def test_a_pack_cut_short_damages_what_was_behind(path):
    make(path)
    cut(path, ".pack-1", os.path.getsize(os.path.join(path, ".pack-1")) // 2)
    with Chest(path=path) as c:
        report = c.verify()
        assert [*keys(report.damaged)] == [*range(100 - len(report.damaged), 100)]
        assert 40 < len(report.damaged) < 60
        assert report.keys == 102 - len(report.damaged)


def test_a_pack_that_is_gone_is_missing_for_each_of_its_values(path):
    make(path)
    os.unlink(os.path.join(path, ".pack-1"))
    with Chest(path=path) as c:
        report = c.verify()
        assert {*keys(report.missing)} == {*range(100)}
        assert not report.damaged


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["x", ".pack-1"])
@pytest.mark.parametrize("make_other", [os.mkfifo, os.mkdir] if os.name == "posix" else [os.mkdir])
def test_what_is_no_file_is_missing_and_nothing_waits_for_it(path, name, make_other):
    make(path)
    os.unlink(os.path.join(path, name))
    make_other(os.path.join(path, name))
    with Chest(path=path) as c:
        report = c.verify()
        assert len(report.missing) == (1 if name == "x" else 100)


def test_an_error_of_the_disk_is_damage_and_other_refusals_are_raised(path, monkeypatch):
    make(path)
    real = chest.verify.Reading.check_value

    def refusing(error):
        def check(self, key, entry):
            if key == "x":
                raise error
            return real(self, key, entry)

        return check

    with Chest(path=path) as c:
        monkeypatch.setattr(chest.verify.Reading, "check_value", refusing(OSError(5, "I/O error")))
        (problem,) = c.verify().damaged
        assert problem == Problem("x", os.path.join(path, "x"), "[Errno 5] I/O error")
        forbidden = refusing(PermissionError(13, "no"))
        monkeypatch.setattr(chest.verify.Reading, "check_value", forbidden)
        with pytest.raises(PermissionError):
            c.verify()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_file_that_may_not_be_read_is_no_damage(path):
    make(path)
    os.chmod(os.path.join(path, "x"), 0)
    with Chest(path=path) as c, pytest.raises(PermissionError):
        c.verify()


def test_another_serializer_than_the_one_that_wrote_does_not_raise(path):
    make(path, open=gzip.open)
    with Chest(path=path, readonly=True) as c:
        assert not c.verify().ok


def test_an_index_damaged_after_opening_is_told_and_values_are_read_as_far_as_it_goes(path):
    with Chest(path=path) as c:
        for name in "abc":
            c[name] = [name] * 10_000
            c.flush()
        size = os.path.getsize(os.path.join(path, ".keys"))
        flip(path, ".keys", size - 1)
        report = c.verify()
        assert report.index == [f"the frame at byte {report.index[0].split()[4]} is not as written"]
        assert report.keys == 2
        assert report.stray == [os.path.join(path, "c")]
        assert not report.ok
        flip(path, ".keys", size - 1)
        assert c.verify() == Report(path, 3, c.verify().nbytes)


def test_an_index_that_is_damaged_while_values_are_read_is_told(path, monkeypatch):
    make(path)
    real = chest.verify.Reading.check_value

    def check(self, key, entry):
        if key == "x":
            flip(path, ".keys", 9)
            raise CorruptValueError(key, "nowhere", "for this test")
        return real(self, key, entry)

    with Chest(path=path, readonly=True) as c:
        monkeypatch.setattr(chest.verify.Reading, "check_value", check)
        report = c.verify()
        assert keys(report.damaged) == ["x"]
        assert report.index == ["the committed length in its head fails its checksum"]
        flip(path, ".keys", 9)


def test_an_index_of_a_newer_version_is_no_damage(path):
    make(path)
    with Chest(path=path, readonly=True) as c:
        with open(os.path.join(path, ".keys"), "r+b") as file:
            file.seek(6)
            file.write(b"\2")
        with pytest.raises(CorruptIndexError, match="newer version"):
            c.verify()


# -- changes while it reads -----------------------------------------------------------------------


def while_checking(monkeypatch, key, act):
    """Do something once, just before the value of `key` is read."""
    real = chest.verify.Reading.check_value
    todo = [act]

    def check(self, this, entry):
        if this == key and todo:
            todo.pop()()
        return real(self, this, entry)

    monkeypatch.setattr(chest.verify.Reading, "check_value", check)


@pytest.mark.parametrize("key", ["x", 50])
@pytest.mark.parametrize("act", ["replace", "delete", "compact"])
def test_what_others_change_meanwhile_is_no_damage(path, monkeypatch, key, act):
    make(path)
    with Chest(path=path) as a, Chest(path=path, available_memory=0) as b:

        def change():
            if act == "replace":
                b[key] = "new" * 3000
            elif act == "delete":
                del b[key]
            else:
                del b[0]
                b[1] = "one"
            b.compact()

        while_checking(monkeypatch, key, change)
        report = a.verify()
        assert report.ok, report
        assert not report.stray
        assert report.keys >= 101


def test_a_busy_writer_in_another_process_is_never_damage(path):
    code = (
        "import sys, random\n"
        "from chest import Chest\n"
        "c = Chest(path=sys.argv[1], available_memory=20_000)\n"
        "print('go', flush=True)\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    c[random.randrange(300)] = 'v' * random.randrange(6000)\n"
        "    c.pop(random.randrange(300), None)\n"
        "    if n % 50 == 0: c.compact()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        with Chest(path=path, readonly=True) as c:
            for _ in range(100):
                report = c.verify()
                assert report.ok, str(report)
                assert not report.stray, str(report)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


# -- strays ---------------------------------------------------------------------------------------


def test_foreign_files_are_told_and_do_no_harm(path):
    make(path)
    os.mkdir(os.path.join(path, "folder"))
    for name in ["notes.txt", "folder/more.txt", ".pack-77", ".hidden"]:
        with open(os.path.join(path, name), "w") as file:
            file.write("mine")
    with Chest(path=path) as c:
        report = c.verify()
        assert report.ok
        assert [os.path.relpath(stray, path).replace(os.sep, "/") for stray in report.stray] == [
            ".hidden",
            ".pack-77",
            "folder/more.txt",
            "notes.txt",
        ]
        assert "stray    notes.txt" in str(report)


def test_staging_files_are_strays_when_nobody_can_want_them_any_more(path):
    make(path)
    new, old = f".new-{'a' * 16}-0", f".new-{'b' * 16}-0"
    for name in (new, old):
        with open(os.path.join(path, name), "w") as file:
            file.write("on its way")
    os.utime(os.path.join(path, old), (0, 0))
    with Chest(path=path, readonly=True) as c:
        assert c.verify().stray == [os.path.join(path, old)]


def test_what_a_crash_left_to_the_next_writer_is_no_stray(path):
    make(path)
    block = [([999], Puts(["new"], ["left"], [0], [4], [1]))]
    with open(os.path.join(path, ".keys"), "ab") as file:
        file.write(frame(encode(block, first=True)) + frame(b"no frame"))
    with open(os.path.join(path, "left"), "w") as file:
        file.write("half")
    with Chest(path=path, readonly=True) as c:
        report = c.verify()
        assert (report.ok, report.stray) == (True, [])


def test_what_a_repair_moved_aside_is_no_stray(path):
    make(path)
    os.mkdir(os.path.join(path, ".damaged"))
    with open(os.path.join(path, ".damaged", "x"), "w") as file:
        file.write("bad")
    with Chest(path=path) as c:
        assert c.verify().stray == []
        c._check()


# -- keys that cannot be read ---------------------------------------------------------------------


@pytest.fixture
def vanishing():
    """A class of keys that can go."""
    module = types.ModuleType("vanishing")
    exec("class Key(str): pass", module.__dict__)
    module.Key.__module__ = "vanishing"
    sys.modules["vanishing"] = module
    yield module.Key
    sys.modules.pop("vanishing", None)


def test_values_of_keys_whose_class_is_gone_are_read_too(path, vanishing):
    with Chest(path=path) as c:
        c[vanishing("a")], c[vanishing("b")], c["c"] = "A" * 5000, "B" * 5000, "C" * 5000
        c.flush()
        name = c.key_to_filename(vanishing("a"))
    del sys.modules["vanishing"]
    with Chest(path=path, readonly=True) as c:
        assert c.verify().keys == 3
    flip(path, name)
    with Chest(path=path, readonly=True) as c:
        report = c.verify()
        (problem,) = report.damaged
        assert isinstance(problem.key, PickledKey)
        assert repr(problem.key) == "<vanishing.Key('a')>"
        assert report.keys == 2


class Run:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        (dt.timedelta(1, 2), "<datetime.timedelta(1, 2, 0)>"),
        (collections.OrderedDict, "<collections.OrderedDict>"),
        (frozenset([1]), "<frozenset({1})>"),
        (Run("pass"), "<builtins.exec('pass')>"),
    ],
)
def test_a_pickled_key_is_shown_without_its_class(key, shown):
    for protocol in (2, 4, 5):
        text = repr(PickledKey(pickle.dumps(key, protocol)))
        if protocol > 2:
            assert text == shown


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x05N", b"c\n\n.", b"P1\n.", b"(" * 50])
def test_what_is_no_pickle_is_shown_as_such(data):
    assert repr(PickledKey(data)) in {f"<a pickle of {len(data)} bytes>", "<.>"}


def test_showing_a_key_runs_nothing(tmp_path):
    mark = tmp_path / "mark"
    data = pickle.dumps(Run(f"open({str(mark)!r}, 'w').close()"), 5)
    repr(PickledKey(data))
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists()


# -- old directories ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected", "options"), test_old.OLD)
def test_a_sound_old_chest_is_fine_and_stays_old(path, name, expected, options):
    test_old.old(name, path)
    before = tree(path)
    with Chest(path=path, **options) as c:
        report = c.verify()
        assert report.ok, report
        assert report.keys == len(expected)
        assert not c.inmem
    assert tree(path) == before


@pytest.mark.parametrize(("name", "options"), [("pickle", {}), ("json", JSON)])
def test_damage_of_an_old_chest_is_told_as_far_as_its_files_show_it(path, name, options):
    test_old.old(name, path)
    with Chest(path=path, **options) as c:
        first, second = [c._memory.ledger.entry(row).file for _, row in rows(c)][:2]
    cut(path, first, os.path.getsize(os.path.join(path, first)) - 1)
    os.unlink(os.path.join(path, second))
    with Chest(path=path, readonly=True, **options) as c:
        report = c.verify()
        assert [os.path.relpath(p.path, path) for p in report.damaged] == [first]
        assert [os.path.relpath(p.path, path) for p in report.missing] == [second]


def test_values_of_an_old_chest_are_not_unpickled(path):
    test_old.make(path, [("x", "x")], {"x": Bomb()})
    with Chest(path=path) as c:
        Bomb.armed = True
        try:
            assert c.verify().ok
        finally:
            Bomb.armed = False


def test_an_old_chest_of_a_serializer_of_ones_own_is_loaded(path):
    def load(file):
        data = file.read()
        if not data.startswith(b"mine "):
            raise ValueError(data)
        return json.loads(data[5:])

    def dump(obj, file):
        file.write(b"mine " + json.dumps(obj).encode())

    os.mkdir(path)
    for name, value in [(".keys", [["x", "x"], ["y", "y"]]), ("x", 1), ("y", 2)]:
        with open(os.path.join(path, name), "wb") as file:
            dump(value, file)
    options = {"dump": dump, "load": load}
    with Chest(path=path, readonly=True, **options) as c:
        assert c.verify().keys == 2
    flip(path, "y", 0)
    with Chest(path=path, readonly=True, **options) as c:
        assert keys(c.verify().damaged) == ["y"]


@pytest.mark.parametrize("value", [[1, {"a": None}], "text", 1.5, True, None, [[]]])
def test_json_and_pickle_are_told_apart(value):
    assert holds_json(json.dumps(value).encode())
    for protocol in range(6):
        assert not holds_json(pickle.dumps(value, protocol)) or protocol == 0


def test_a_pickle_is_skimmed_to_its_end(tmp_path):
    for n, value in enumerate([dt.date(2026, 1, 1), [Bomb()], b"x" * 200_000]):
        data = pickle.dumps(value)
        file = tmp_path / str(n)
        file.write_bytes(data)
        with file.open("rb") as opened:
            skim(opened)
        for end in (0, 1, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:end])
            with file.open("rb") as opened, pytest.raises(ValueError, match="no whole pickle"):
                skim(opened)


def test_a_copy_on_read_only_media_is_verified(path):
    make(path)
    shutil.copytree(path, path + "-copy")
    before = tree(path + "-copy")
    for folder, _, names in os.walk(path + "-copy"):
        for name in names:
            os.chmod(os.path.join(folder, name), 0o444)
        os.chmod(folder, 0o555)
    try:
        with Chest(path=path + "-copy", readonly=True) as c:
            assert c.verify().ok
        assert tree(path + "-copy") == before
    finally:
        for folder, _, _ in os.walk(path + "-copy"):
            with suppress(OSError):
                os.chmod(folder, 0o755)


def test_a_value_that_is_replaced_and_set_back_while_it_is_looked_at_is_sound(path, monkeypatch):
    with Chest({"x": "first"}, path) as other:
        other.flush()
        real, looks = Reading.check_value, []

        def check_value(self, *args):
            looks.append(args)
            if len(looks) > 2:
                return real(self, *args)
            for value in ("second", "first"):  # the same entry again, and no file in between
                if value == "first":
                    with pytest.raises(CorruptValueError) as caught:
                        real(self, *args)
                other["x"] = value
                other.flush()
            raise caught.value

        monkeypatch.setattr(Reading, "check_value", check_value)
        with Chest(path=path, readonly=True) as c:
            report = c.verify()
        assert report.ok, str(report)
        assert len(looks) == 3
