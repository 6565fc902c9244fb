"""The files of a chest: their names, what is removed, and that nothing else is ever touched."""

import os
import pickle
import re
import shutil
import stat
import time
from contextlib import suppress

import pytest
from xxhash import xxh3_64_intdigest

from chest import Chest, CorruptIndexError, UnsavedError
from chest.columns import Entry, Puts, encode
from chest.directory import Directory
from chest.filenames import digest_name
from chest.frames import write_log

HOUR = 3600
TOKEN = "0123456789abcdef"


def names(path):
    """Every file and folder below a directory but the index, relative, with slashes."""
    return {
        os.path.relpath(os.path.join(folder, name), path).replace(os.sep, "/")
        for folder, folders, files in os.walk(path)
        for name in (*folders, *files)
    } - {".keys"}


def is_portable(path):
    """Whether no two names differ in case only."""
    return len({name.lower() for name in names(path)}) == len(names(path))


def write(path, content):
    with open(path, "w", encoding="utf-8") as file:
        file.write(content)


def tree(path):
    """Everything below a directory: the content of files, the targets of links."""
    found = {}
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            full = os.path.join(folder, name)
            if os.path.islink(full):
                found[full] = os.readlink(full)
            elif os.path.isfile(full):
                with open(full, "rb") as file:
                    found[full] = file.read()
    return found


@pytest.fixture
def outside(tmp_path):
    """A directory beside the chest, with a file that is not its own."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "victim").write_text("precious")
    return str(folder)


# -- where values lie -----------------------------------------------------------------------------


def test_a_value_is_a_plain_pickle_at_the_name_of_its_key(path):
    with Chest({"x": [1], ("a", "b", "c"): {2}}, path=path) as c:
        c.flush()
        assert names(path) == {"x", "_a", "_a/_b", "_a/_b/c"}
        for key in c:
            with open(c.key_to_filename(key), "rb") as file:
                assert pickle.load(file) == c[key]


def test_new_directories_are_for_the_user_alone(path):
    with Chest({("a", "b", "c"): 1}, path=os.path.join(path, "deeper")) as c:
        c.flush()
        made = [path, c.path, os.path.join(c.path, "_a"), os.path.join(c.path, "_a", "_b")]
        modes = [stat.S_IMODE(os.stat(folder).st_mode) for folder in made]
    assert modes == [0o700 if os.name == "posix" else 0o777] * 4


def test_a_directory_may_be_moved(path, tmp_path):
    with Chest({"x": 1, ("a", "b"): 2}, path=path):
        pass
    moved = str(tmp_path / "elsewhere" / "moved")
    os.mkdir(os.path.dirname(moved))
    shutil.move(path, moved)
    with Chest(path=moved) as c:
        assert dict(c) == {"x": 1, ("a", "b"): 2}
        c["x"] = 3
        c.flush()
        c._check()
    assert not os.path.exists(path)


def test_a_staging_path_is_never_given_twice(path):
    one, two = Directory(path, str), Directory(path, str)
    given = [directory.staging_path() for _ in range(3) for directory in (one, two)]
    assert len(set(given)) == 6


# -- names of the users own -----------------------------------------------------------------------

UNSAFE = [
    "", ".", "..", "../x", "../outside/victim", "/", "/x", "x/", "a//b", "a/../b", "./x", "C:x",
    "a\\b", "..\\x", ".keys", ".x", "a/.x", "con", "a/NUL.txt", "x.", "x ", "x\n", "a\0b", "\ud800",
    None, 5, b"x", ("a",), "x" * 241, "é" * 121, "/".join(["x" * 100] * 11),
]  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_a_name_that_is_not_safe_is_replaced_by_a_digest(path, outside, name):
    given = os.path.join(outside, "victim") if name == "/x" else name
    before = tree(outside)
    with Chest(path=path, key_to_filename=lambda key: given) as c:
        c["k"], c["l"] = [1], [2]
        c.flush()
        c._check()
        assert names(path) == {digest_name("k"), digest_name("l")}
        del c["l"]
        c["k"] = [3]
    with Chest(path=path) as c:
        assert dict(c) == {"k": [3]}
    assert tree(outside) == before


def test_a_function_that_fails_to_name_a_key_is_told_of_once_and_loses_nothing(path, caplog):
    def fail(key):
        raise ZeroDivisionError("by nothing")

    with Chest({"k": 1, "l": 2}, path=path, key_to_filename=fail) as c:
        c.flush()
        assert names(path) == {digest_name("k"), digest_name("l")}
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"k": 1, "l": 2}
    [message] = [record.getMessage() for record in caplog.records]
    assert "'k'" in message
    assert "ZeroDivisionError: by nothing" in message


SAFE = ["x" * 240, "é" * 120, "a/b/c", "a b.txt", "Ünïcode/名前"]


@pytest.mark.parametrize("name", SAFE, ids=ascii)
def test_a_safe_name_is_taken_as_it_is(path, name):
    with Chest({"k": 1}, path=path, key_to_filename=lambda key: name) as c:
        c.flush()
        assert name in names(path)
        c._check()
    with Chest(path=path) as c:
        assert c["k"] == 1


@pytest.mark.parametrize("name", ["same", "Same", "a/same", "A/b/same"])
def test_keys_that_get_one_name_get_files_of_their_own(path, name):
    values = {n: [n] for n in range(12)}
    with Chest(path=path, key_to_filename=lambda key: name) as c:
        c.update({n: values[n] for n in range(6)})
        c.flush()
        for n in range(6, 12):
            c[n] = values[n]
            c.flush()
        c._check()
        files = [c.key_to_filename(n)[len(path) + 1 :].replace(os.sep, "/") for n in values]
        assert files[:9] == [name, *[f"{name}~{n}" for n in range(1, 9)]]
        assert all(re.fullmatch(name + "~[0-9a-f]{8}", file) for file in files[9:])
        assert is_portable(path)
        del c[3]
        c[5] = values[5] = "new"
        c.flush()
        c._check()
    del values[3]
    with Chest(path=path) as c:
        assert dict(c) == values
        c.clear()
    assert os.listdir(path) == [".keys"]


# -- names that clash -----------------------------------------------------------------------------


def each_in_its_own_commit(c, keys):
    for key in keys:
        c[key] = key
        c.flush()


def all_in_one_commit(c, keys):
    c.update({key: key for key in keys})
    c.flush()


def each_by_another_handle(c, keys):
    for key in keys:
        with Chest({key: key}, path=c.path):
            pass


def each_by_another_handle_that_was_there_before(c, keys):
    others = [Chest(path=c.path) for _ in keys]
    for other, key in zip(others, keys, strict=True):
        other[key] = key
        other.close()


WAYS = [
    each_in_its_own_commit,
    all_in_one_commit,
    each_by_another_handle,
    each_by_another_handle_that_was_there_before,
]
CLASHES = {
    "case": ["Abc", "abc", "aBC", "ABC"],
    "case of folders": [("A", "x"), ("a", "x"), ("a", "X"), ("A", "y")],
    "a file where a folder is wanted": ["_a", ("a", "b")],
    "and in another case": ["_a", ("A", "b")],
    "and in the other": ["_A", ("a", "b")],
    "a file deeper": [("a", "_b"), ("a", "b", "c"), ("a", "_B")],
    "all": ["_a", "_A", ("a", "b"), ("A", "b"), ("A", "B"), ("a", "_b"), ("A", "b", "c")],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("keys", CLASHES.values(), ids=CLASHES)
def test_no_two_names_clash_or_differ_in_case_only(path, keys, reverse, way):
    keys = keys[::-1] if reverse else keys
    with Chest(path=path) as c:
        way(c, keys)
        assert is_portable(path), sorted(names(path))
        assert len(c) == len(keys)
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {key: key for key in keys}
        for key in keys[::2]:
            c[key] = "new"
        c.flush()
        assert is_portable(path), sorted(names(path))
        for key in keys[1:]:
            del c[key]
        c.flush()
        c._check()
        assert [*c.items()] == [(keys[0], "new")]


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_a_name_in_another_case_may_be_used_once_the_first_is_gone(path, reverse):
    first, second = ["abc", "Abc"] if reverse else ["Abc", "abc"]
    with Chest({first: 1}, path=path) as c:
        c.flush()
        del c[first]
        c.flush()
        c[second] = 2
        c.flush()
        assert names(path) == {second}


def test_a_folder_that_went_with_its_last_file_comes_back_under_its_name(path):
    with Chest(path=path) as c:
        for n in range(3):
            c["A", "b"] = n
            c.flush()
            assert names(path) == {"_A", "_A/b"}
            del c["A", "b"]
            c.flush()
            assert names(path) == set()


# -- files of others ------------------------------------------------------------------------------


def make_file(full):
    write(full, "foreign")


def make_folder(full):
    os.mkdir(full)
    write(os.path.join(full, "inside"), "foreign")


def make_link(full):
    os.symlink("nowhere", full)


@pytest.mark.parametrize("make", [make_file, make_folder, make_link])
@pytest.mark.parametrize("wanted", ["x", "X", "_a", "_a/b"])
def test_whatever_has_the_name_already_stays_as_it_is(path, make, wanted):
    os.makedirs(os.path.dirname(os.path.join(path, wanted)))
    make(os.path.join(path, wanted))
    before = tree(path)
    with Chest(path=path) as c:
        for n in range(2):
            c["x"], c["X"], c["a", "b"] = n, n, n
            c.flush()
            assert tree(path).items() > before.items()
        c.clear()
    after = tree(path)
    del after[os.path.join(path, ".keys")]
    assert after == before


FOREIGN = ["notes", ".hidden", "x~1", "_a/mine", f".new-{TOKEN}", ".new-short-1", "new-1", ".keys2"]


def test_foreign_files_stay_wherever_they_lie(path):
    with Chest({("a", "b"): 1, "x": 2}, path=path) as c:
        c.flush()
        for name in FOREIGN:
            write(os.path.join(path, name), "foreign")
            os.utime(os.path.join(path, name), (0, 0))
        c["x"] = 3
        c.flush()
        c.clear()
        c.flush()
        assert names(path) == {*FOREIGN, "_a"}
        c.drop()
    assert names(path) == {*FOREIGN, "_a"}
    assert not os.path.exists(os.path.join(path, ".keys"))


def test_a_dropped_chest_leaves_no_directory(path):
    c = Chest({"x": 1, ("a", "b"): 2}, path=path)
    c.flush()
    write(os.path.join(path, f".new-{TOKEN}-0"), "of another process")
    c.drop()
    assert not os.path.exists(path)


def test_a_link_in_the_place_of_a_value_is_removed_itself_alone(path, outside):
    before = tree(outside)
    with Chest({"x": 1}, path=path) as c:
        c.flush()
        os.unlink(os.path.join(path, "x"))
        os.symlink(os.path.join(outside, "victim"), os.path.join(path, "x"))
        del c["x"]
        c.flush()
    assert tree(outside) == before


def test_a_folder_that_is_a_link_is_not_written_through(path, outside):
    os.mkdir(path)
    os.symlink(outside, os.path.join(path, "_a"))
    before = tree(outside)
    with Chest({("a", "b"): 1}, path=path) as c:
        c.flush()
        assert names(path) == {"_a", "_a~1", "_a~1/b"}
        c.clear()
    assert tree(outside) == before
    assert os.path.islink(os.path.join(path, "_a"))


def test_a_folder_that_became_a_link_is_not_removed_from(path, outside):
    with Chest({("a", "victim"): 1}, path=path) as c:
        c.flush()
        shutil.rmtree(os.path.join(path, "_a"))
        os.symlink(outside, os.path.join(path, "_a"))
        before = tree(outside)
        del c["a", "victim"]
        c.flush()
        assert tree(outside) == before


def test_a_file_made_under_the_name_of_a_deleted_value_stays(path):
    with Chest({"x": 1, "y": 1}, path=path) as c:
        c.flush()
        del c["x"]
        c["y"] = 2
    assert names(path) == {"y~1"}
    write(os.path.join(path, "x"), "foreign")
    write(os.path.join(path, "y"), "foreign")
    with Chest({"z": 1}, path=path) as c:
        c.flush()
        assert names(path) == {"x", "y", "y~1", "z"}


def test_such_a_file_stays_for_other_handles_too(path):
    with Chest({"x": 1}, path=path) as c, Chest(path=path) as other:
        c.flush()
        assert "x" in other
        del c["x"]
        c.flush()
        assert "x" not in other
        write(os.path.join(path, "x"), "foreign")
        other["z"] = 1
        other.flush()
        assert names(path) == {"x", "z"}


# -- files that are removed -----------------------------------------------------------------------


def test_a_replaced_value_is_removed_and_its_name_free_again(path):
    with Chest({"x": 0}, path=path) as c:
        seen = []
        for n in range(4):
            c["x"] = n
            c.flush()
            seen.append(names(path))
    assert seen == [{"x"}, {"x~1"}, {"x"}, {"x~1"}]


def test_folders_that_become_empty_are_removed(path):
    with Chest({("a", "b", "c"): 1, ("a", "d"): 2}, path=path) as c:
        c.flush()
        del c["a", "b", "c"]
        c.flush()
        assert names(path) == {"_a", "_a/d"}
        del c["a", "d"]
        c.flush()
        assert names(path) == set()


def refuse(monkeypatch, *refused):
    """Let the system refuse to remove files, as Windows does while others have them open."""
    real = os.unlink

    def unlink(full, **options):
        if os.path.basename(full) in refused:
            raise PermissionError(13, "in use", full)
        real(full, **options)

    monkeypatch.setattr(os, "unlink", unlink)


def refuse_to_tell(monkeypatch, *refused):
    """Let the system not say whether files are there."""
    real = os.lstat

    def lstat(full, **options):
        if os.path.basename(full) in refused:
            raise PermissionError(13, "not yours", full)
        return real(full, **options)

    monkeypatch.setattr(os, "lstat", lstat)


@pytest.mark.parametrize("who", ["itself", "another handle", "whoever opens it next"])
@pytest.mark.parametrize("told", [True, False])
def test_a_file_that_cannot_be_removed_yet_is_removed_by_a_later_commit(
    path, monkeypatch, who, told
):
    with Chest({"x": 1, "y": 2}, path=path) as c, Chest(path=path) as other:
        c.flush()
        with monkeypatch.context() as patch:
            refuse(patch, "x")
            if not told:
                refuse_to_tell(patch, "x")
            del c["x"]
            c.flush()
            c["y"] = 3
            c.flush()
            assert names(path) == {"x", "y~1"}
        if who == "whoever opens it next":
            c.close()
            other.close()
            c = Chest(path=path)
        writer = other if who == "another handle" else c
        writer["z"] = 4
        writer.flush()
        assert names(path) == {"y~1", "z"}
        c.close()


def test_several_that_cannot_tell_of_a_file_tell_each_other_once(path, monkeypatch):
    with Chest({"x": 1, "y": 2}, path=path) as c, Chest(path=path) as other:
        c.flush()
        with monkeypatch.context() as patch:
            refuse(patch, "x")
            refuse_to_tell(patch, "x")
            del c["x"]
            for n in range(8):
                writer = (c, other)[n % 2]
                writer["y"] = n
                writer.flush()
                assert len(writer._memory.ledger.left()) == 1
        c["y"] = 8
        c.flush()
        assert "x" not in names(path)


def test_nothing_is_removed_by_a_way_of_which_nobody_can_tell(path, tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    with Chest({("a", "b"): "v" * 9000}, path=path) as c:
        c.flush()
        folder, name = os.path.split(c.key_to_filename(("a", "b")))
        os.rename(folder, str(tmp_path / "moved"))
        os.symlink(outside, folder)
        write(str(outside / name), "foreign")
        del c["a", "b"]
        with monkeypatch.context() as patch:
            refuse_to_tell(patch, os.path.basename(folder))
            c.flush()
        assert (outside / name).read_text() == "foreign"


def test_where_the_system_tells_of_no_folder_none_is_made(path, monkeypatch):
    def stat(full, *args, **options):
        raise OSError(12, "Cannot allocate memory", full)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        with pytest.raises(OSError):
            Chest(path=os.path.join(path, "a", "b"))
    assert not os.path.exists(path)


def test_a_name_that_was_never_there_is_not_removed_once_it_is_in_use(path, monkeypatch):
    real = os.rename

    def rename(source, target, **options):
        if os.path.basename(target) == "x":
            raise OSError(5, "the disk fails", target)
        real(source, target, **options)

    with Chest({"y": 1}, path=path) as c:
        c.flush()
        c["x"] = "x" * 5000
        with monkeypatch.context() as patch:
            refuse(patch, "x")
            with monkeypatch.context() as also:
                also.setattr(os, "rename", rename)
                with pytest.raises(UnsavedError):
                    c.flush()
            c.flush()
        for n in range(3):
            c["y"] = n
            c.flush()
        c._check()
    with Chest(path=path) as c:
        assert c["x"] == "x" * 5000


def test_staging_files_that_were_abandoned_are_removed_after_an_hour(path):
    now = time.time()
    os.mkdir(path)
    for number, age in enumerate([HOUR + 100, HOUR - 100, 0, -HOUR]):
        full = os.path.join(path, f".new-{TOKEN}-{number}")
        write(full, "half a value")
        os.utime(full, (now - age, now - age))
    with Chest({"x": 1}, path=path) as c:
        assert f".new-{TOKEN}-0" in names(path), "opening alone removes nothing"
        c.flush()
        assert names(path) == {f".new-{TOKEN}-{n}" for n in (1, 2, 3)} | {"x"}
        c.drop()
    assert not os.path.exists(path)


def test_a_staging_file_that_goes_while_it_is_looked_at_is_no_error(path, monkeypatch):
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: [*real(folder), f".new-{TOKEN}-0"])
    with Chest({"x": 1}, path=path) as c:
        c.flush()
        c._check()


# -- an index that names files outside ------------------------------------------------------------


def entry(name, content="precious"):
    data = content.encode()
    return Entry(name, 0, len(data), xxh3_64_intdigest(data))


def block(keys, entry):
    return [([0] * len(keys), Puts.of(dict.fromkeys(keys, entry)))] if keys else []


OUTSIDE = ["../outside/victim", "{outside}/victim", "x/../../outside/victim", "link/victim", "link"]


@pytest.fixture
def hostile(path, outside):
    """Write an index made by somebody else, beside a link that leads out."""

    def write_index(name, *, put=(), left=(), beyond=()):
        name = name.format(outside=outside)
        os.mkdir(path)
        os.symlink(outside, os.path.join(path, "link"))
        index = os.path.join(path, ".keys")
        committed = encode(block(put, entry(name)), left=[entry(name)] * len(left))
        write_log(index, [committed], fsync=False)
        write_log(index + "2", [encode(block(beyond, entry(name)))], fsync=False)
        with open(index + "2", "rb") as source, open(index, "ab") as target:
            target.write(source.read()[16:])
        os.unlink(index + "2")

    return write_index


@pytest.mark.parametrize("name", OUTSIDE[:3])
def test_a_value_outside_the_directory_is_not_read(hostile, path, name):
    hostile(name, put="k")
    with pytest.raises(CorruptIndexError, match="outside"):
        with Chest(path=path, dump=str, load=lambda file: file.read()) as c:
            c["k"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_deleting_a_value_outside_the_directory_removes_nothing_there(hostile, path, outside, name):
    hostile(name, put="k")
    before = tree(outside)
    with suppress(CorruptIndexError):
        with Chest(path=path) as c:
            del c["k"]
            c.flush()
            c["x"] = 1
            c.flush()
    assert tree(outside) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_replacing_and_dropping_it_removes_nothing_there(hostile, path, outside, name):
    hostile(name, put="kl")
    before = tree(outside)
    c = None
    with suppress(CorruptIndexError):
        c = Chest(path=path)
        c["k"] = 1
        c.flush()
    with suppress(CorruptIndexError):
        c.drop()
    assert tree(outside) == before
    if c is not None and not c.closed:
        c._finalizer.detach()
        c._memory._end()


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_obsolete_file_outside_the_directory_is_not_removed(hostile, path, outside, name):
    hostile(name, left=[1])
    before = tree(outside)
    with suppress(CorruptIndexError):
        with Chest(path=path) as c:
            c["x"] = 1
            c.flush()
    assert tree(outside) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_was_never_committed_is_swept_inside_the_directory_alone(
    hostile, path, outside, name
):
    hostile(name, beyond="k")
    before = tree(outside)
    with Chest(path=path) as c:
        c["x"] = 1
        c.flush()
        assert dict(c) == {"x": 1}
    assert tree(outside) == before
