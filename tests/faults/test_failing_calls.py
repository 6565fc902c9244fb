"""A system call that fails, once or for a while, loses nothing and is told.

The fixed work is done with its n-th system call failing, or all from the n-th on, with ENOSPC, EIO,
EMFILE and EACCES, each where the system may give it, a write after half of its bytes. While the
process lives, what the chest holds is what was set, and all of it can be read when the cause has
gone; what is told names the path, and for ENOSPC the bytes needed and free. Once the cause has
gone, the step succeeds, no file is stray, and a chest opened again holds the same.

The same on a file system that is really full, where one can be mounted.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from io import FileIO
from itertools import count

import numpy as np
import pytest
from disk import ALL, Disk, opened
from work import (
    AGES_AGO,
    STEPS,
    Small,
    Work,
    check_usable,
    make_others,
    plain,
    read_back,
    seen,
    small,
    states,
)

import chest.serialize
import chest.store
from chest import Chest, UnsavedError

pytestmark = [
    pytest.mark.repeats,
    pytest.mark.timeout(6000),
    pytest.mark.filterwarnings("ignore:a chest was not closed:ResourceWarning"),
]

MAKE = {"create", "mkdir", "rename", "replace", "link"}
REMOVE = {"unlink", "rmdir"}
LOOK = {"stat", "lstat", "listdir"}
CAN = {  # which calls may give which error
    errno.ENOSPC: MAKE | {"write"},
    errno.EIO: MAKE | REMOVE | LOOK | {"open", "write", "read", "truncate", "utime", "fsync"},
    errno.EMFILE: {"create", "open", "listdir", "map"},
    errno.EACCES: MAKE | REMOVE | LOOK | {"open", "utime"},
}
STRIDE = {errno.ENOSPC: 11, errno.EIO: 43, errno.EMFILE: 7, errno.EACCES: 17}  # if not all


@pytest.fixture(autouse=True)
def _small(caplog):
    logging.getLogger("chest").setLevel(logging.ERROR)
    with Small():
        yield
    logging.getLogger("chest").setLevel(logging.NOTSET)


class Fail:
    """Lets the n-th call that can fail with `number` fail, and all from there on if `lasting`."""

    def __init__(self, n, number, *, lasting):
        self.left = n
        self.number = number
        self.lasting = lasting
        self.failed = None

    def __call__(self, call):
        if call.name not in CAN[self.number]:
            return call.do()
        self.left -= 1
        if self.left == 0 and call.half is not None and len(call.args[1]) > 1:
            self.left = 1  # first a part is written, as systems do it
            return call.half()
        if self.left == 0 or (self.left < 0 and self.lasting):
            self.failed = self.failed or call
            raise call.error(self.number)
        return None if call.name == "fsync" else call.do()  # no power is cut here

    def stop(self):
        self.left, self.lasting = 0, False


def check_told(error, root, number):
    """Assert that an error says where, and what a full disk lacks."""
    for cause in error.causes if isinstance(error, UnsavedError) else [error]:
        assert cause.errno == number, repr(cause)
        assert root in str(cause), f"{cause!r} names no path"
        if number == errno.ENOSPC:
            assert re.search(r"about \d+ bytes needed, \d+ bytes are free", str(cause)), str(cause)


def staging_files(path):
    return [name for name in os.listdir(path) if name.startswith(".new-")]


class Trial:
    """The work with calls that fail."""

    def __init__(self, root, others, fail, known):
        self.root = root
        self.path = os.path.join(root, "chest")
        # So that fsync can fail, too.
        self.work = Work(self.path, others, fsync=fail.number == errno.EIO)
        self.fail = fail
        self.known = known
        self.failed_in = None
        self.counts = False  # the step is committed although it was told an error

    def run(self):
        with Disk(self.root, self.fail):
            for n in range(len(STEPS)):
                self._do(n)
            self.fail.stop()
        found = read_back(self.path)
        assert found == self.known[-1]
        check_usable(self.path, found)

    def _do(self, n):
        self.counts = False
        tries = 2 if self.fail.lasting else 1
        if any(self._does(n) for _ in range(tries)):
            return
        self.fail.stop()
        if self._is_open():
            assert seen(self.work.chest) in self._allowed(n)
        self.work.do(STEPS[n])
        if self._is_open():
            assert seen(self.work.chest) == self.known[n + 1]
            self._check_clean()

    def _does(self, n):
        try:
            self.work.do(STEPS[n])
        except (OSError, UnsavedError) as error:
            assert self.fail.failed is not None
            self.failed_in = STEPS[n].change.__name__
            check_told(error, self.root, self.fail.number)
            self.counts |= "it is committed" in str(error)
            self._check_live(self._allowed(n))
            return False
        self._check_live([self.known[n + 1]])
        return True

    def _allowed(self, n):
        """Return what a chest may hold after step n failed: all of a transaction, or nothing."""
        if STEPS[n].way != "transaction":
            return self.known[n : n + 2]
        return [self.known[n + self.counts]]

    def _check_live(self, allowed):
        """Assert that the chest holds one of some states, as far as it can be read by now."""
        if not self._is_open():
            return
        c = self.work.chest
        try:
            keys = [*c]
        except OSError as error:
            check_told(error, self.root, self.fail.number)
            return
        found = {}
        for key in keys:
            try:
                found[key] = plain(c[key])
            except OSError as error:
                check_told(error, self.root, self.fail.number)
        states = [dict(state) for state in allowed]
        assert any([*state] == keys and found.items() <= state.items() for state in states)

    def _check_clean(self):
        """Assert that nothing is stray after a next commit of the same chest."""
        c = self.work.chest
        c["extra"] = "extra"
        c.flush()
        staged = c._memory.store.directory.staged
        for name in staging_files(self.path):
            full = os.path.join(self.path, name)
            if not staged(full):  # by a handle that is closed: others wait for an hour
                os.unlink(full)
        c._check()
        del c["extra"]
        c.flush()
        c._check()

    def _is_open(self):
        return self.work.chest is not None and not self.work.chest.closed


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("number", CAN, ids=[errno.errorcode[number] for number in CAN])
def test_a_call_that_fails_loses_nothing(tmp_path, number, lasting):
    known = [seen(state) for state in states()]
    others = make_others(str(tmp_path / "others"))
    root = str(tmp_path / "root")
    tried = 0
    for n in count(1, 1 if ALL else STRIDE[number]):
        os.mkdir(root)
        fail = Fail(n, number, lasting=lasting)
        Trial(root, others, fail, known).run()
        shutil.rmtree(root)
        if fail.failed is None:
            break
        tried += 1
    print(tried, "failing calls")
    assert tried > 9


def test_writes_that_do_less_than_asked_lose_nothing(tmp_path):
    known = [seen(state) for state in states()]
    root = tmp_path / "root"
    root.mkdir()
    times = 0

    def act(call):
        nonlocal times
        if call.half is None or len(call.args[1]) < 2:
            return call.do()
        times += 1
        return call.half()

    work = Work(str(root / "chest"), make_others(str(tmp_path / "others")))
    with Disk(str(root), act):
        for n, step in enumerate(STEPS):
            work.do(step)
            assert read_back(work.path) == known[n + 1]
    print(times, "halves of writes")
    assert times > 500


# -- a file system that is full -------------------------------------------------------------------


class Full:
    """A file system that is full but for so many bytes, until `stop`."""

    number = errno.ENOSPC
    lasting = True

    def __init__(self, root, free):
        self.failed = None
        self._ballast = os.path.join(root, "ballast")
        left = shutil.disk_usage(root).free - free
        with open(self._ballast, "wb") as file:
            file.write(bytes(left))

    def __call__(self, call):
        try:
            return call.do()
        except OSError as error:
            if error.errno == self.number:
                self.failed = self.failed or call
            raise

    def stop(self):
        with suppress(FileNotFoundError):
            os.unlink(self._ballast)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of some megabytes, which only root can mount, and not everywhere."""
    root = str(tmp_path / "disk")
    os.mkdir(root)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", root]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield root
    subprocess.run(["umount", root], check=True)


def test_a_full_disk_loses_nothing(tmp_path, small_disk):
    known = [seen(state) for state in states()]
    others = make_others(str(tmp_path / "others"))
    steps = set()
    sizes = [*range(0, 100_000, 4096), *range(100_000, 1_500_000, 4096 if ALL else 100_000)]
    for free in sizes:
        full = Full(small_disk, free)
        trial = Trial(small_disk, others, full, known)
        trial.run()
        steps.add(full.failed and (full.failed.name, trial.failed_in))
        shutil.rmtree(trial.path)
    print(len(sizes), "full disks, which refused in", steps)
    assert None in steps, "the largest of them has room for all"
    assert len(steps) > 3


# -- calls of one kind ----------------------------------------------------------------------------


class Refuse:
    """Lets calls of some kinds fail, so many times, after some that do not."""

    def __init__(self):
        self.on((), 0)

    def on(self, names, number, times=1, *, after=0, end=""):
        self.names, self.number, self.times = names, number, times
        self.after, self.end = after, end

    def __call__(self, call):
        if call.name in self.names and self.times > 0 and call.path.endswith(self.end):
            self.after -= 1
            if self.after >= 0:
                return call.do()
            self.times -= 1
            raise call.error(self.number)
        return call.do()


@pytest.fixture
def refuse(tmp_path):
    refuse = Refuse()
    with Disk(str(tmp_path), refuse):
        yield refuse


def test_a_read_of_a_large_value_that_fails_once_is_told_as_what_it_is(path, refuse):
    with opened(path) as c:
        c["x"] = np.arange(50_000)
        c["y"] = []  # lets go of the other
        c.move_to_disk("x")
        refuse.on({"read"}, errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            c["x"]


def test_a_staged_pack_that_cannot_be_written_is_told_in_full(path, refuse):
    with opened(path) as c:
        c.update(small(0, 300, "text " * 20))
        refuse.on({"write"}, errno.ENOSPC)
        with pytest.raises(UnsavedError) as caught:
            c.flush()
        check_told(caught.value, path, errno.ENOSPC)


@pytest.mark.parametrize(("name", "number"), [("write", errno.ENOSPC), ("read", errno.EIO)])
def test_a_chest_that_cannot_be_opened_says_where(path, refuse, name, number):
    refuse.on({name}, number)
    with pytest.raises(OSError, match=os.path.basename(path)):
        opened(path)


def test_staging_files_that_could_not_be_removed_go_with_the_next_commit(path, refuse):
    with opened(path) as c:
        c["x"], c["y"] = 1, 2
        refuse.on({"rename", "unlink"}, errno.EACCES, 9)
        with pytest.raises((OSError, UnsavedError)):
            c.flush()
        assert staging_files(path)
        refuse.on((), 0)
        c.flush()
        assert not staging_files(path)


def test_a_staged_pack_is_closed_where_nothing_can_be_removed(path, refuse):
    with opened(path) as c:
        c["x"] = bytes(200_000)
        c.update(small(0, 300, "text " * 20))
        refuse.on({"stat", "unlink"}, errno.EIO, 9)
        with pytest.raises((OSError, UnsavedError)):
            c.flush()
        refuse.on((), 0)
        files = [thing for thing in gc.get_objects() if isinstance(thing, FileIO)]
        left = [file for file in files if not file.closed and ".new-" in str(file.name)]
        for file in left:
            file.close()
        assert not left


def fill(c):
    c.update(small(0, 300, "text "))
    c.update({"a folder/x": [1], "y": bytes(100_000)})
    c.flush()
    del c["small 7"]
    c["z"] = "not written"


def refuse_for_good(refuse, number):
    refuse.on({"write", "store", "create", "mkdir"}, number, sys.maxsize)


def test_a_chest_can_be_dropped_on_a_full_disk(path, refuse):
    c = opened(path)
    fill(c)
    refuse_for_good(refuse, errno.ENOSPC)
    c.drop()
    assert c.closed
    assert not os.path.exists(path)


def test_a_temporary_chest_on_a_full_disk_leaves_nothing(tmp_path, refuse, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with opened(None) as c:
        fill(c)
        assert os.listdir(tmp_path)
        refuse_for_good(refuse, errno.EDQUOT)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["write", "store", "unlink", "rmdir", "fsync"])
def test_a_drop_that_fails_leaves_all_or_nothing(path, refuse, name):
    ends = set()
    for n in range(4):
        c = opened(path, fsync=name == "fsync")
        fill(c)
        before = dict(c)
        refuse.on({name}, errno.EIO, sys.maxsize, after=n)
        try:
            c.drop()
            ends.add("dropped")
        except OSError:
            ends.add("failed")
        refuse.on((), 0)
        if c.closed:
            ends.add("closed")
        else:
            ends.add("whole" if c else "empty")
            left = dict(c)
            # Where a commit has deleted all, what no commit held may be there yet.
            assert left == before or (name != "write" and left in ({}, {"z": "not written"}))
            c["after"] = 1
            c.flush()  # removes what could not be removed
            c._check()
            c.close()
            with Chest(path=path) as c:
                assert c == left | {"after": 1}
                c._check()
                c.drop()
        shutil.rmtree(path, ignore_errors=True)
    print(name, ends)
    assert "failed" in ends


@pytest.mark.parametrize("unsaved", [False, True])
def test_a_drop_that_fails_after_another_handle_compacted(path, refuse, unsaved):
    with opened(path) as c:
        fill(c)
        c.flush()
        with Chest(path=path) as other:
            other["other"] = 1
            other.flush()
            other.compact()
        if unsaved:
            c["unsaved"] = [1]
        refuse.on({"unlink"}, errno.EACCES, end=".keys")
        with pytest.raises(PermissionError):
            c.drop()
        assert dict(c) == {}
        assert c.get("x") is None
        c["after"] = 1
        c.flush()
        c._check()
    with Chest(path=path) as c:
        assert dict(c) == {"after": 1}


def test_a_drop_that_is_interrupted_after_its_commit_leaves_nothing(path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    with Chest(path=path) as c:
        fill(c)
        monkeypatch.setattr(chest.store.Store, "tidy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            c.drop()
        monkeypatch.undo()
        assert not c
        c["x"] = 1
    with Chest(path=path) as c:
        assert dict(c) == {"x": 1}
        c._check()


def test_a_chest_that_cannot_be_looked_for_is_not_said_to_be_dropped(path, refuse):
    with Chest(path=path) as c:
        c["x"] = 1
        stored = pickle.dumps(c)
    refuse.on({"lstat"}, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        pickle.loads(stored).close()


def dump_lines(value, file):
    file.writelines(b"%d\n" % number for number in value)


def load_lines(file):
    return [int(line) for line in file]


@pytest.mark.parametrize("options", [{}, {"dump": dump_lines, "load": load_lines}])
def test_each_read_that_fails_is_told_as_what_it_is(path, refuse, options, monkeypatch):
    monkeypatch.setattr(chest.serialize, "KEPT", 1000)  # so that it is read again to be loaded
    with opened(path, **options) as c:
        c["x"] = list(range(50_000))
        for after in count():
            c["y"] = []  # lets go of the other
            c.move_to_disk("x")
            c.flush()
            refuse.on({"read"}, errno.EIO, after=after)
            told = None
            try:
                assert c["x"] == [*range(50_000)]
            except OSError as error:
                told = error
            if refuse.times:
                break
            check_told(told, path, errno.EIO)
        assert after > 3


def test_a_read_from_an_open_pack_that_fails_says_where(path, refuse):
    with opened(path) as c:
        c.update({n: [n] for n in range(200)})
    with opened(path) as c:
        assert c[0] == [0]
        refuse.on({"read"}, errno.EIO, 2)
        with pytest.raises(OSError, match="Input/output error") as caught:
            c[1]
        check_told(caught.value, path, errno.EIO)
        assert c[1] == [1]


def test_a_new_index_that_cannot_be_read_says_where(path, refuse):
    with opened(path) as c, opened(path) as other:
        c.update({n: n for n in range(50)})
        c.flush()
        assert len(other) == 50
        c.clear()
        c.compact()
        refuse.on({"read"}, errno.EIO)
        with pytest.raises(OSError, match="Input/output error") as caught:
            len(other)
        check_told(caught.value, path, errno.EIO)
        assert not other


@pytest.mark.parametrize("name", ["read", "truncate"])
def test_what_a_crash_left_and_cannot_be_swept_is_told_with_where(path, refuse, name):
    with opened(path) as c:
        c["x"] = 1
    with open(os.path.join(path, ".keys"), "ab") as file:
        file.write(bytes(50))
    with opened(path) as c:
        c["y"] = 2
        refuse.on({name}, errno.EIO)
        with pytest.raises(UnsavedError) as caught:
            c.flush()
        check_told(caught.value, path, errno.EIO)


def test_a_commit_that_cannot_be_taken_back_says_where(path, refuse):
    with opened(path) as c:
        c.update(small(0, 100, "first"))
        c.flush()
        c.update(small(100, 200, "second"))
        refuse.on({"write", "truncate"}, errno.EIO, 9)
        with pytest.raises(UnsavedError) as caught:
            c.flush()
        check_told(caught.value, path, errno.EIO)
        refuse.on((), 0)
        c.flush()
        c._check()


@pytest.mark.parametrize("after", range(4))
def test_a_transaction_that_cannot_be_synced_says_where(path, refuse, after):
    with opened(path, fsync=True) as c:
        c["x"] = 1
        c.flush()
        refuse.on({"fsync"}, errno.EIO, after=after)
        with pytest.raises((OSError, UnsavedError)) as caught, c.transaction():
            c["x"] = 2
        check_told(caught.value, path, errno.EIO)
        assert c["x"] == read_back(path)[0][1]
        c["y"] = 3
        c.flush()
        c._check()


@pytest.mark.parametrize(("name", "number"), [("write", errno.ENOSPC), ("read", errno.EIO)])
def test_a_compaction_that_fails_says_where(path, refuse, name, number):
    with opened(path) as c:
        c.update(small(0, 200, "text " * 20))
        c.flush()
        for key in small(0, 10, ""):  # too few for what is done unasked
            del c[key]
        c.flush()
        for after in count():
            refuse.on({name}, number, 2, after=after)  # a read that fails is tried value by value
            told = None
            try:
                c.compact()
            except OSError as error:
                told = error
            if refuse.times == 2:
                break
            check_told(told, path, number)
        assert after > 1
        c._check()


def test_taking_over_packed_values_on_a_full_disk_is_told_in_full(tmp_path, path, refuse):
    with opened(str(tmp_path / "others")) as others, opened(path) as c:
        others.update(small(0, 400, "text " * 20))
        others.flush()
        c.flush()
        refuse.on({"write"}, errno.ENOSPC)
        with pytest.raises(OSError, match="No space left") as caught:
            c.update(others)
        check_told(caught.value, path, errno.ENOSPC)
        c.update(others)
        assert c == others


def test_what_others_left_and_cannot_be_removed_keeps_nobody_from_writing(path, refuse):
    with opened(path) as c:
        c["x"] = 1
    stray = os.path.join(path, f".new-{0:016}-0")
    open(stray, "wb").close()
    os.utime(stray, AGES_AGO)
    with opened(path) as c:
        refuse.on({"unlink"}, errno.EACCES, 9, end=stray)
        c["y"] = 2
        c.flush()
        assert staging_files(path)
        refuse.on((), 0)
        c["z"] = 3
        c.flush()
        assert not staging_files(path)


def test_what_sticks_in_a_transaction_is_swept_when_that_was_rolled_back(path, refuse):
    with opened(path) as c:
        with suppress(RuntimeError), c.transaction():  # it is rolled back, for a commit failed
            c["x"], c["y"] = [1], [2]
            refuse.on({"rename", "unlink"}, errno.EACCES, 9, after=1)
            with pytest.raises(UnsavedError):
                c.flush()
            refuse.on({"unlink"}, errno.EACCES, 9, end="/x")
            c.flush()
        assert not c
        assert "x" in os.listdir(path)
        refuse.on((), 0)
        c["z"] = 3
        c.flush()
        c._check()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_name_that_cannot_be_looked_for_is_not_taken(path):
    with Chest(path=path) as c:
        c["x"] = 1

    def act(call):
        if call.name == "lstat" and call.path.endswith("/x"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), call.path)
        if call.name == "store":
            os._exit(9)
        return call.do()

    pid = os.fork()
    if pid == 0:
        try:
            with Disk(path, act):
                c = opened(path)
                c["x"] = 2
                c.flush()
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    with Chest(path=path) as c:
        assert c["x"] == 1
