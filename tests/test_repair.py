"""A damaged directory becomes a sound chest, with every value that is as it was written."""

import datetime as dt
import gzip
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
import types

import pytest
import test_old
from test_verify import JSON, KINDS, Bomb, cut, flip, keys, make, tree, vanishing  # noqa: F401

import chest.repairs
from chest import Chest, CorruptIndexError, KeyTypeError, ReadOnlyError, Report, repair
from chest.columns import Puts, encode, is_plain
from chest.frames import HEAD, MAGIC, encode_length, frame
from chest.pickled import PickledKey
from chest.salvage import salvage


def opens_and_works(path, expected, **options):
    """Assert that a chest holds what is expected, is sound, and can be written."""
    with Chest(path=path, **options) as c:
        assert {**c} == expected
        report = c.verify()
        assert report.ok, str(report)
        c["written later"] = [1, 2]
        c.flush()
        assert c.verify().ok
    with Chest(path=path, **options) as c:
        assert {**c} == {**expected, "written later": [1, 2]}


def content(path, **options):
    with Chest(path=path, readonly=True, **options) as c:
        return {**c}


def relative(path, names):
    return [os.path.relpath(name, path).replace(os.sep, "/") for name in names]


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_a_sound_chest_is_left_as_it_is(path, options):
    make(path, **options)
    before = tree(path)
    report = repair(path)
    assert report.ok
    assert (report.keys, report.repaired) == (102, True)
    assert (report.aside, report.stray) == ([], [])
    assert "kept" not in str(report)
    assert tree(path) == before


@pytest.mark.parametrize("options", KINDS)
def test_damaged_and_missing_values_go_and_all_others_stay(path, options):
    make(path, **options)
    expected = content(path, **options)
    flip(path, "x", os.path.getsize(os.path.join(path, "x")) - 6)
    os.unlink(os.path.join(path, "y"))
    bad = tree(path)["x"]
    report = repair(path)
    assert keys(report.damaged) == ["x"]
    assert keys(report.missing) == ["y"]
    assert report.keys == 100
    assert relative(path, report.aside) == [".damaged/x"]
    assert tree(path)[".damaged/x"] == bad
    assert "x" not in tree(path)
    del expected["x"], expected["y"]
    opens_and_works(path, expected, **options)


def test_a_report_of_a_repair_prints_well(path):
    make(path)
    written = os.path.getsize(os.path.join(path, "x"))
    cut(path, "x", 3)
    report = repair(path)
    size = report.nbytes
    assert str(report).splitlines() == [
        f"101 values kept, {size:,} bytes: 1 damaged",
        f"  damaged  'x' in x: it has 3 bytes where {written} were written",
        f"  aside    {os.path.join('.damaged', 'x')}",
    ]


def test_one_damaged_value_in_a_pack_costs_that_one_alone(path):
    make(path)
    expected = content(path)
    flip(path, ".pack-1", 5)
    bad = tree(path)[".pack-1"]
    report = repair(path)
    assert keys(report.damaged) == [0]
    assert relative(path, report.aside) == [".damaged/.pack-1"]
    assert tree(path)[".damaged/.pack-1"] == bad
    assert ".pack-1" not in tree(path)
    del expected[0]
    opens_and_works(path, expected)


@pytest.mark.parametrize("size", [0, 1, 700, -1])
def test_a_pack_cut_short_keeps_what_is_before(path, size):
    make(path)
    expected = content(path)
    full = os.path.join(path, ".pack-1")
    cut(path, ".pack-1", size % os.path.getsize(full) if size else 0)
    report = repair(path)
    for key in keys(report.damaged):
        del expected[key]
    assert len(expected) == report.keys == 102 - len(report.damaged)
    assert len(report.damaged) == {0: 100, 1: 100, -1: 1}.get(size, len(report.damaged))
    opens_and_works(path, expected)


def test_a_pack_that_is_gone_costs_its_values(path):
    make(path)
    expected = {key: value for key, value in content(path).items() if isinstance(key, str)}
    os.unlink(os.path.join(path, ".pack-1"))
    report = repair(path)
    assert {*keys(report.missing)} == {*range(100)}
    assert not report.aside
    opens_and_works(path, expected)


def test_all_values_damaged_leaves_an_empty_chest(path):
    make(path)
    for name in ("x", "y", ".pack-1"):
        cut(path, name, 0)
    assert repair(path).keys == 0
    opens_and_works(path, {})
    assert {*tree(path)} >= {".damaged/x", ".damaged/y", ".damaged/.pack-1"}


def test_folders_go_along_and_empty_ones_go(path):
    with Chest(path=path) as c:
        c["a", "b", "c"] = "v" * 5000
    flip(path, "_a/_b/c")
    report = repair(path)
    assert relative(path, report.aside) == [".damaged/_a/_b/c"]
    assert not os.path.exists(os.path.join(path, "_a"))
    opens_and_works(path, {})


def test_what_was_moved_aside_before_stays(path):
    with Chest(path=path) as c:
        for n in range(3):
            c["x"] = f"{n}" * 5000
            c.flush()
            (name,) = {*tree(path)} - {".keys"} - {n for n in tree(path) if n[0] == "."}
            cut(path, name, n)
            with Chest(path=path) as d:
                assert relative(path, repair(path).aside) == [
                    ".damaged/x" + (f"~{n}" if n else "")
                ]
                assert not {**d}
    assert [*map(len, (tree(path)[f".damaged/x{end}"] for end in ("", "~1", "~2")))] == [0, 1, 2]


def test_foreign_files_stay_where_they_are(path, tmp_path):
    make(path)
    os.mkdir(os.path.join(path, "folder"))
    for name in ("notes.txt", "folder/x", ".pack-55"):
        with open(os.path.join(path, name), "w") as file:
            file.write("mine")
    cut(path, "x", 0)
    report = repair(path)
    assert relative(path, report.stray) == [".pack-55", "folder/x", "notes.txt"]
    after = tree(path)
    assert all(after[name] == b"mine" for name in ("notes.txt", "folder/x", ".pack-55"))


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_nothing_outside_is_touched_through_links(path, tmp_path):
    with Chest(path=path) as c:
        c["a", "b"], c["x"] = "v" * 5000, "x" * 5000
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b").write_text("theirs")
    (outside / "x").write_text("theirs")
    shutil.rmtree(os.path.join(path, "_a"))
    os.symlink(outside, os.path.join(path, "_a"))
    os.unlink(os.path.join(path, "x"))
    os.symlink(outside / "x", os.path.join(path, "x"))
    report = repair(path)
    assert {*keys(report.damaged)} == {("a", "b"), "x"}
    assert relative(path, report.aside) == [".damaged/x"]
    assert os.path.islink(os.path.join(path, ".damaged", "x"))
    assert {p.name: p.read_text() for p in outside.iterdir()} == {"b": "theirs", "x": "theirs"}
    opens_and_works(path, {})


def test_a_folder_in_the_place_of_a_file_stays(path):
    make(path)
    os.unlink(os.path.join(path, "x"))
    os.mkdir(os.path.join(path, "x"))
    with open(os.path.join(path, "x", "theirs"), "w") as file:
        file.write("theirs")
    assert keys(repair(path).missing) == ["x"]
    assert tree(path)["x/theirs"] == b"theirs"


def test_nothing_is_loaded(path, monkeypatch):
    with Chest(path=path) as c:
        c["x"], c["y"] = Bomb(), "y" * 5000
        c.flush()
    flip(path, "y")
    monkeypatch.setattr(Bomb, "armed", True)
    assert repair(path).keys == 1


def test_keys_that_need_a_class_are_kept_and_never_loaded(path, vanishing):  # noqa: F811
    make_with_classes(path, vanishing)
    expected = content(path)
    del sys.modules["vanishing"]
    cut(path, "x", 0)
    report = repair(path)
    assert keys(report.damaged) == ["x"]
    sys.modules["vanishing"] = sys.modules[__name__]
    globals()["Key"] = vanishing
    del expected["x"]
    opens_and_works(path, expected)


def make_with_classes(path, cls):
    with Chest(path=path) as c:
        c["x"] = "x" * 5000
        c[cls("own file")], c[dt.date(2026, 1, 1)] = "o" * 5000, "d" * 5000
        c.flush()
        for n in range(70):
            c[n], c[cls(f"packed {n}")] = f"{n}", f"packed {n}"


def test_damaged_values_of_keys_that_need_a_class_go_too(path, vanishing):  # noqa: F811
    make_with_classes(path, vanishing)
    expected = content(path)
    with Chest(path=path) as c:
        names = [os.path.relpath(c.key_to_filename(vanishing("own file")), path)]
        first = min(c._memory.ledger.packed_in({".pack-1"}), key=lambda pair: pair[1])[0]
    flip(path, names[0])
    flip(path, ".pack-1", 3)
    report = repair(path)
    assert report.keys == len(expected) - 2
    shown = {repr(key) for key in keys(report.damaged)}
    assert shown == {"<vanishing.Key('own file')>", repr(first)}
    assert isinstance(report.damaged[-1].key, (PickledKey, int))
    del expected[vanishing("own file")], expected[first]
    opens_and_works(path, expected)
    assert repair(path).ok


def test_a_damaged_value_alone_of_a_key_that_needs_a_class(path):
    with Chest(path=path) as c:
        c["x"], c[dt.date(2026, 1, 1)] = "x" * 5000, "d" * 5000
        name = c.key_to_filename(dt.date(2026, 1, 1))
    flip(path, os.path.basename(name))
    report = repair(path)
    (problem,) = report.damaged
    assert repr(problem.key).startswith("<datetime.date(")
    opens_and_works(path, {"x": "x" * 5000})


def test_an_open_of_ones_own_has_to_be_given(path):
    def open_reversed(path, mode="r"):
        return gzip.open(path, mode)

    make(path, open=open_reversed)
    expected = content(path, open=open_reversed)
    flip(path, "x", -6)
    before = tree(path)
    with pytest.raises(ValueError, match="open_reversed"):
        repair(path)
    assert tree(path) == before
    assert keys(repair(path, open=open_reversed).damaged) == ["x"]
    del expected["x"]
    opens_and_works(path, expected, open=open_reversed)


# -- refusals -------------------------------------------------------------------------------------


def test_where_there_is_no_chest_nothing_is_made(path, tmp_path):
    for place in (path, str(tmp_path)):
        with pytest.raises(FileNotFoundError):
            repair(place)
    assert not os.path.exists(path)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match="path is empty"):
        repair("")


def test_what_cannot_be_written_is_an_error(path, monkeypatch):
    make(path)
    cut(path, "x", 0)
    before = tree(path)
    monkeypatch.setattr(chest.repairs.os, "access", lambda *_: False)
    with pytest.raises(ReadOnlyError):
        repair(path)
    assert tree(path) == before


def test_a_file_that_cannot_be_read_now_is_not_given_up(path, monkeypatch):
    make(path)
    before = tree(path)

    def refuse(*_):
        raise PermissionError(13, "not now")

    monkeypatch.setattr(chest.repairs.Store, "check_value", refuse)
    with pytest.raises(PermissionError):
        repair(path)
    assert tree(path) == before


@pytest.mark.parametrize("version", [2, 3, 9])
def test_an_index_of_a_newer_version_is_refused(path, version):
    make(path)
    with open(os.path.join(path, ".keys"), "r+b") as file:
        file.seek(6)
        file.write(bytes([version]))
    before = tree(path)
    with pytest.raises(CorruptIndexError, match="newer version"):
        repair(path)
    assert tree(path) == before


@pytest.mark.parametrize("data", [b"[1, 2", b"something of somebody else's", b"\x80\x05K\x01."])
def test_a_file_that_is_no_index_at_all_is_refused(path, data):
    os.mkdir(path)
    with open(os.path.join(path, ".keys"), "wb") as file:
        file.write(data)
    with pytest.raises(CorruptIndexError, match="no index") as caught:
        repair(path)
    assert "repair" not in str(caught.value)
    assert tree(path) == {".keys": data}


@pytest.mark.parametrize("use", [lambda path: Chest(path=path), repair])
def test_nothing_that_is_no_file_is_repaired_or_advised_to_be(path, use):
    Chest({"x": 1}, path=path).close()
    index = os.path.join(path, ".keys")
    os.rename(index, path + " moved")
    os.symlink(path + " moved", index)
    with pytest.raises(CorruptIndexError, match="it is a link") as caught:
        use(path)
    assert not caught.value.repairable
    assert "repair" not in str(caught.value)
    assert os.path.islink(index)


def test_a_failing_disk_loses_nothing(path, monkeypatch):
    make(path)
    expected = content(path)
    flip(path, ".pack-1", 5)
    monkeypatch.setattr(chest.staging, "write_all", refuse_to_write)
    with pytest.raises(OSError, match="full"):
        repair(path)
    monkeypatch.undo()
    assert ".pack-1" in tree(path)
    repair(path)
    del expected[0]
    opens_and_works(path, expected)


def refuse_to_write(*_):
    raise OSError(28, "full")


# -- the index ------------------------------------------------------------------------------------


def make_log(path, commits=6):
    """Each commit sets one value of its own, and the last ones replace and delete."""
    states = [{}]
    with Chest(path=path) as c:
        for n in range(commits):
            c[f"k{n}"] = f"{n}" * 5000
            if n == commits - 1:
                c["k0"] = "replaced" * 1000
                del c["k1"]
            c.flush()
            states.append({**c})
    with open(os.path.join(path, ".keys"), "rb") as file:
        return states, file.read()


def ends(data):
    """Where each frame ends."""
    found, end = [HEAD], HEAD
    while end < len(data):
        end += 8 + int.from_bytes(data[end : end + 4], "little")
        found.append(end)
    return found


def put(path, data):
    with open(os.path.join(path, ".keys"), "wb") as file:
        file.write(data)


@pytest.mark.parametrize("damage", ["flip", "cut", "zero"])
def test_damage_at_any_byte_of_the_index_leaves_what_the_other_frames_say(path, tmp_path, damage):
    states, data = make_log(path, 4)
    starts = ends(data)
    rng = random.Random(3)
    places = {*range(24), *starts[1:-1], *(s + 1 for s in starts[1:-1]), len(data) - 1}
    places |= {s + 5 for s in starts[:-1]} | {*rng.sample(range(len(data)), 25)}
    for place in sorted(places):
        copy = str(tmp_path / "copy")
        shutil.copytree(path, copy)
        bad = {
            "flip": data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :],
            "cut": data[:place],
            "zero": data[:place] + bytes(len(data) - place),
        }[damage]
        put(copy, bad)
        if bad == data or salvage(bad).is_newer:
            shutil.rmtree(copy)
            continue
        report = repair(copy)
        assert report.index, place
        assert not report.ok
        assert relative(copy, report.aside)[0] == ".damaged/.keys"
        assert tree(copy)[".damaged/.keys"] == bad
        kept = content(copy)
        whole = sum(end <= place for end in starts[1:])  # frames before the damage
        before = {k: v for k, v in states[whole].items() if k not in ("k0", "k1")}
        assert kept.items() >= before.items()
        assert all(value in (states[-1].get(k), states[3].get(k)) for k, value in kept.items())
        if damage == "flip" and place < HEAD:
            assert kept == states[-1], place
        elif damage == "flip":
            lost = {*states[whole + 1]} - {*states[whole]}
            assert {*kept} >= {*states[-1]} - lost - {"k0", "k1"}, place
        opens_and_works(copy, kept)
        assert repair(copy).ok
        shutil.rmtree(copy)


def test_the_frames_behind_the_damage_count_too(path):
    states, data = make_log(path)
    middle = ends(data)[2]
    for place in (middle, middle + 3, middle + 4, middle + 30):
        put(path, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        found = salvage(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert len(found.payloads) == 5
        assert found.faults == [f"the frame at byte {middle} is not as written"]
    report = repair(path)
    assert report.keys == 4
    del states[-1]["k2"]
    assert relative(path, report.stray) == ["k2"]
    opens_and_works(path, states[-1])


def test_a_bad_byte_costs_a_share_of_the_keys_also_after_a_compaction(path):
    with Chest({n: str(n) for n in range(9000)}, path) as c:
        c.compact()
    data = tree(path)[".keys"]
    put(path, data[:-999] + bytes([data[-999] ^ 1]) + data[-998:])
    report = repair(path)
    assert len(report.index) == 1
    assert 9000 > report.keys >= 9000 - 4096
    kept = content(path)
    assert kept == {n: str(n) for n in kept}
    opens_and_works(path, kept)


def test_a_frame_inside_a_damaged_one_is_not_believed():
    planted = frame(encode([([0], Puts(["planted"], ["f"], [0], [4], [1]))], first=True))
    outer = frame(encode([([1], Puts([planted], ["g"], [0], [4], [1]))], first=True))
    last = frame(encode([([2], Puts(["last"], ["h"], [0], [4], [1]))], first=True))
    assert outer.find(planted) > 0
    place = len(outer) - 3
    bad = outer[:place] + bytes([outer[place] ^ 1]) + outer[place + 1 :]
    data = bad + last
    head = MAGIC + encode_length(HEAD + len(data)).to_bytes(8, "little")
    assert salvage(head + data).payloads == [last[8:]]


def test_a_key_as_of_before_the_damage_comes_back_as_it_was(path):
    with Chest(path=path) as c:
        for n in range(200):
            c[n] = f"first {n}"
        c.flush()
        c[7] = "second"
        del c[8]
        c.flush()
        c[9] = "third"
    data = tree(path)[".keys"]
    middle = ends(data)[1]
    put(path, data[: middle + 9] + b"?" + data[middle + 10 :])
    report = repair(path)
    assert report.index
    kept = content(path)
    assert (kept[7], kept[8], kept[9]) == ("first 7", "first 8", "third")
    opens_and_works(path, kept)


def test_an_empty_or_blank_index_becomes_an_empty_chest(path):
    for data in (b"", b"\0" * 3, b"\0" * 4096, MAGIC, MAGIC[:5]):
        shutil.rmtree(path, ignore_errors=True)
        make(path)
        put(path, data)
        report = repair(path)
        assert report.keys == 0
        assert report.index
        assert relative(path, report.stray) == [".pack-1", "x", "y"]
        opens_and_works(path, {})
        assert {".pack-1", "x", "y"} <= {*tree(path)}


def test_what_a_crash_left_behind_a_damaged_frame_is_swept(path):
    _, data = make_log(path)
    left = encode([([99], Puts(["new"], ["left"], [0], [4], [1]))], first=True)
    with open(os.path.join(path, "left"), "wb") as file:
        file.write(b"half")
    stream_digest = chest.serialize.digest_bytes(b"half")
    left = encode([([99], Puts(["new"], ["left"], [0], [4], [stream_digest]))], first=True)
    bad = data[:40] + b"??" + data[42:] + frame(left)
    put(path, bad)
    report = repair(path)
    assert "left" not in tree(path)
    assert "new" not in content(path)
    assert report.index


def test_a_damaged_json_chest_keeps_its_serializer(path):
    make(path, **JSON)
    expected = content(path, **JSON)
    data = tree(path)[".keys"]
    put(path, data[:-1] + bytes([data[-1] ^ 1]))
    report = repair(path)
    kept = content(path, **JSON)
    assert report.index
    assert kept.items() <= expected.items()
    opens_and_works(path, kept, **JSON)
    with Chest(path=path, **JSON) as c:
        assert [*c._memory.ledger.serializers] == ["json.dump"]


def test_a_damaged_index_keeps_keys_that_need_a_class_as_they_are(path, vanishing):  # noqa: F811
    make_with_classes(path, vanishing)
    with Chest(path=path) as c:
        c["last"] = 1
    expected = content(path)
    data = tree(path)[".keys"]
    put(path, data[:-1] + bytes([data[-1] ^ 1]))
    del sys.modules["vanishing"]
    report = repair(path)
    assert report.index
    sys.modules["vanishing"] = types.SimpleNamespace(Key=vanishing)
    del expected["last"]
    opens_and_works(path, expected)


def test_a_frame_that_no_ledger_takes_is_a_fault(path):
    make_log(path)
    twice = Puts(["k", "k"], ["f", "g"], [0, 0], [4, 4], [1, 1])
    data = tree(path)[".keys"] + frame(encode([([7, 8], twice)], first=True))
    put(path, MAGIC + encode_length(len(data)).to_bytes(8, "little") + data[HEAD:])
    with pytest.raises(CorruptIndexError):
        Chest(path=path)
    report = repair(path)
    assert report.keys == 5
    assert len(report.index) == 1
    opens_and_works(path, content(path))


# -- others that have it open ---------------------------------------------------------------------


def test_others_that_have_the_chest_open_go_on(path):
    make(path)
    with Chest(path=path) as c, Chest(path=path, readonly=True) as reader:
        assert c["x"][0] == reader["x"][0] == "x"
        c["unsaved"] = 1
        flip(path, "y")
        data = tree(path)[".keys"]
        flip(path, ".keys", len(data) - 1)
        report = repair(path)
        assert report.index
        assert "y" not in c
        assert "y" not in reader
        assert c["unsaved"] == 1
        c.flush()
        assert reader["unsaved"] == 1
        c._check_is_sound = c.verify()
        assert c._check_is_sound.ok


def test_a_damaged_head_hides_the_new_index_from_nobody(path):
    make_log(path)
    with Chest(path=path) as c:
        assert len(c) == 5
        with open(os.path.join(path, ".keys"), "r+b") as file:
            file.write(b"??")
        assert repair(path).keys == 5
        assert tree(path)[".keys"].startswith(MAGIC)
        with Chest(path=path) as d:
            d["new"] = 1
        assert c["new"] == 1


def test_a_repair_waits_for_a_transaction_of_another_process(path):
    make(path)
    flip(path, "x")
    code = (
        "import sys, time\n"
        "from chest import Chest\n"
        "with Chest(path=sys.argv[1]) as c, c.transaction():\n"
        "    c['late'] = [1] * 10\n"
        "    print('in', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-c", code, path], **pipes)
    try:
        child.stdout.readline()
        done = []
        thread = threading.Thread(target=lambda: done.append(repair(path)))
        thread.start()
        time.sleep(0.3)
        assert not done
        child.stdin.write(b"\n")
        child.stdin.close()
        thread.join(20)
        assert keys(done[0].damaged) == ["x"]
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert content(path)["late"] == [1] * 10


def test_a_repair_inside_a_transaction_of_this_thread_is_an_error(path):
    make(path)
    with Chest(path=path) as c, c.transaction():
        with pytest.raises(OSError, match="another chest of this thread"):
            repair(path)


def test_a_repair_that_is_killed_can_be_done_again(path, tmp_path):
    make(path)
    expected = content(path)
    flip(path, ".pack-1", 5)
    cut(path, "x", 1)
    data = tree(path)[".keys"]
    with Chest(path=path) as c:
        c["last"] = 1
    put(path, tree(path)[".keys"][:-1] + b"?")
    del data
    code = (
        "import sys, os, itertools\n"
        "from chest import repair\n"
        "count = itertools.count()\n"
        "at = int(sys.argv[2])\n"
        "def die(event, args):\n"
        "    kinds = ('os.rename', 'os.mkdir', 'os.remove', 'os.truncate', 'open', 'os.link')\n"
        "    if event in kinds and next(count) == at:\n"
        "        os._exit(9)\n"
        "sys.addaudithook(die)\n"
        "repair(sys.argv[1])\n"
    )
    del expected[0], expected["x"]
    steps = 0
    while True:
        copy = str(tmp_path / "copy")
        shutil.copytree(path, copy)
        child = subprocess.run([sys.executable, "-c", code, copy, str(steps)], check=False)
        repair(copy)
        assert content(copy) == expected
        assert repair(copy).ok
        shutil.rmtree(copy)
        if child.returncode == 0:
            break
        assert child.returncode == 9
        steps += 1
    assert steps > 20


# -- old directories ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected", "options"), test_old.OLD)
def test_a_sound_old_chest_stays_old(path, name, expected, options):
    test_old.old(name, path)
    before = tree(path)
    assert repair(path).ok
    assert tree(path) == before


@pytest.mark.parametrize(("name", "expected", "options"), test_old.OLD)
def test_a_damaged_old_chest_keeps_what_is_whole(path, name, expected, options):
    test_old.old(name, path)
    with Chest(path=path, **options) as c:
        pairs = [(k, c._memory.ledger.entry(row).file) for k, row in c._memory.ledger.stored()]
    (first, file), (second, gone) = pairs[:2]
    cut(path, file, os.path.getsize(os.path.join(path, file)) - 1)
    os.unlink(os.path.join(path, gone))
    if not all(map(is_plain, expected)):
        with pytest.raises(KeyTypeError, match="open this old chest with pickle"):
            repair(path)
        return
    report = repair(path)
    assert keys(report.damaged) == [first]
    assert keys(report.missing) == [second]
    assert test_old.is_modern(path)
    expected = {key: value for key, value in expected.items() if key not in (first, second)}
    opens_and_works(path, expected, **options)
    with Chest(path=path, **options) as c:
        assert [*c._memory.ledger.serializers] == [name.partition("_")[0] + ".dump"] or not JSON


def test_plain_keys_of_an_old_chest_are_read_whatever_protocol_wrote_them(path):
    pairs = [("x", "x"), (b"b", "b"), ((1, b""), "t"), (frozenset([1]), "f"), ("gone", "gone")]
    values = {name: [name] * 9 for _, name in pairs[:-1]}
    for protocol in range(6):
        shutil.rmtree(path, ignore_errors=True)
        test_old.make(path, pairs, values, lambda obj, n=protocol: pickle.dumps(obj, n))
        cut(path, "t", 12)
        report = repair(path)
        assert keys(report.damaged) == [(1, b"")]
        assert keys(report.missing) == ["gone"]
        opens_and_works(path, {"x": ["x"] * 9, b"b": ["b"] * 9, frozenset([1]): ["f"] * 9})


def test_an_old_chest_with_keys_that_need_a_class_is_refused_and_stays(path):
    values = {"x": 1, "y": 2}
    test_old.make(path, [(dt.date(2026, 1, 1), "x"), ("y", "y")], values)
    assert repair(path).ok
    os.unlink(os.path.join(path, "y"))
    before = tree(path)
    with pytest.raises(KeyTypeError):
        repair(path)
    assert tree(path) == before


def test_no_code_of_an_old_index_runs(path):
    test_old.make(path, [(Bomb(), "x")], {"x": 1})
    Bomb.armed = True
    try:
        assert repair(path) == Report(path, 1, len(pickle.dumps(1)), repaired=True)
    finally:
        Bomb.armed = False


def test_json_is_the_serializer_of_an_old_json_chest(path):
    test_old.make(path, [["x", "x"], ["y", "y"]], {"x": 1, "y": 2}, test_old.json_dumps)
    os.unlink(os.path.join(path, "y"))
    repair(path)
    with Chest(path=path, **JSON) as c:
        assert {**c} == {"x": 1}
        assert {*c._memory.ledger.serializers} == {"json.dump"}
    assert json.loads(tree(path)["x"]) == 1


def test_a_file_that_another_key_has_by_now_stays_where_it_is(path):
    with Chest(path=path, key_to_filename=str) as c:
        c[1] = "of the int"
        c.flush()
        del c[1]
        c.flush()
        end = os.path.getsize(os.path.join(path, ".keys"))
        c["1"] = "of the str"
        c.flush()
        assert os.path.basename(c.key_to_filename("1")) == "1"
    flip(path, ".keys", end - 3)  # in the frame that deleted the other one
    for _ in range(2):
        repair(path)
        with Chest(path=path, key_to_filename=str) as c:
            assert dict(c) == {"1": "of the str"}
            assert c.verify().ok
