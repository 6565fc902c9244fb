"""A process that is killed at any system call leaves the chest as of one of its commits.

A child does a fixed piece of work and is killed just before, in the middle of, or just after its
n-th call that changes the directory, the store into the head of the index among them; for
n = 1, 2, ... until it ends by itself; without ``CHEST_FAULTS=all`` each Python takes every third.
After each: the chest holds exactly what it held after some commit, not older than the last of which
the child told; it can be written and opened again, and after the next commit no file is stray and
none is missing. The same holds where the process that writes next is killed as well.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from itertools import count

import pytest
from disk import ALL, Disk, opened
from work import STEPS, Small, Work, check_usable, fits, make_others, read_back, seen, states

pytestmark = [
    pytest.mark.repeats,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.timeout(3000),
]


@pytest.fixture(autouse=True)
def _small():
    with Small():
        yield


class Kill:
    """Kills this process at the n-th moment of those before, in the middle of, and after calls."""

    def __init__(self, n):
        self.left = n

    def __call__(self, call):
        if not call.changes:
            return call.do()
        self._moment()
        if call.half is not None:
            self._moment(call.half)
        result = call.do()
        if ALL:  # else the next moment comes to the same, but for what was told in between
            self._moment()
        return result

    def _moment(self, first=None):
        self.left -= 1
        if self.left == 0:
            if first is not None:
                first()
            os.kill(os.getpid(), signal.SIGKILL)


def died(root, n, work):
    """Do some work in a child that is killed at moment n; return whether, and how much it told."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with Disk(root, Kill(n)):
                work(lambda: os.write(writer, b"."))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    told = b""
    while more := os.read(reader, 1000):
        told += more
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0, len(told)


def do_all(path, others):
    def work(tell):
        work = Work(path, others)
        for step in STEPS:
            work.do(step)
            tell()

    return work


def write_more(path):
    def work(tell):
        with opened(path) as c:
            c["between"] = "between"
            c.flush()
            tell()

    return work


def drop(path):
    def work(_):
        opened(path).drop()

    return work


def may_hold(found, known, told):
    """Tell whether a chest may hold this after so many steps of which was told."""
    if told == len(STEPS):
        return found == known[told]
    return fits(found, known[told], known[told + 1], STEPS[told].at_once)


def test_a_process_killed_at_any_call_leaves_the_chest_as_of_a_commit(tmp_path):
    known = [seen(state) for state in states()]
    others = make_others(str(tmp_path / "others"))
    root = tmp_path / "root"
    first, step = (1, 1) if ALL else (1 + sys.version_info.minor % 3, 3)  # three Pythons do all
    for n in count(first, step):
        root.mkdir()
        path = str(root / "chest")
        killed, told = died(root, n, do_all(path, others))
        found = read_back(path)
        assert may_hold(found, known, told), f"at point {n}, in step {told}"
        check_usable(path, found)
        shutil.rmtree(root)
        if not killed:
            break
    assert told == len(STEPS)
    print((n - first) // step, "crash points")
    assert n > 250


def test_a_second_crash_in_the_next_commit_changes_nothing(tmp_path):
    known = [seen(state) for state in states()]
    others = make_others(str(tmp_path / "others"))
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    points = 0
    for n in count(1, 1 if ALL else 23):
        os.mkdir(first)
        killed, told = died(first, n, do_all(os.path.join(first, "chest"), others))
        for m in count(1, 1 if ALL else 3):
            shutil.copytree(first, second)
            path = os.path.join(second, "chest")
            again, more = died(second, m, write_more(path))
            points += again
            found = read_back(path)
            rest = [pair for pair in found if pair[0] != "between"]
            assert may_hold(rest, known, told), f"at points {n} and {m}, in step {told}"
            assert len(found) - len(rest) >= more
            check_usable(path, found)
            shutil.rmtree(second)
            if not again:
                break
        shutil.rmtree(first)
        if not killed:
            break
    print(points, "pairs of crash points")
    assert points > 50


def test_a_process_killed_while_it_drops_a_chest_leaves_all_or_nothing(tmp_path):
    full = [seen(state) for state in states()][-3]
    others = make_others(str(tmp_path / "others"))
    root = tmp_path / "root"
    outcomes = []
    for n in count(1):
        root.mkdir()
        path = str(root / "chest")
        work = Work(path, others)
        for step in STEPS[:-2]:
            work.do(step)
        work.chest.close()
        killed, _ = died(root, n, drop(path))
        if not killed:
            break
        outcomes.append(found := read_back(path))
        assert found in (full, [])
        check_usable(path, found)
        shutil.rmtree(root)
    assert not os.path.exists(path)
    print(len(outcomes), "crash points")
    assert outcomes[0] == full
    assert outcomes[-1] == []
