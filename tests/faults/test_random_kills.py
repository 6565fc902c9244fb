"""A process that is killed at any moment takes nothing with it that it had been told is saved.

Four processes write to one directory: small values of their own, packs and arrays, each batch in
one commit, which is told afterwards. One of them is the test itself. It kills another at a random
moment, and then finds of each what it had told, or what it has committed since; all of it right,
and from one commit.
"""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
import pytest
from disk import ALL
from work import Small, check_usable, plain, seen

from chest import Chest

pytestmark = [
    pytest.mark.repeats,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.timeout(3000),
]

WORKERS = 3  # and the test itself
KILLS = 200 if ALL else 20
LONGEST = 0.1  # seconds until the next kill


@pytest.fixture(autouse=True)
def _small():
    with Small():
        yield


def batch(worker, n):
    """Return what the n-th batch of a worker sets, and what it deletes."""
    choice = random.Random(f"{worker} {n}")
    kind = choice.choice(["few", "pack", "pack", "array"])
    sets = {(worker, "batch"): n}
    if kind == "few":
        sets |= {(worker, f"x{i}"): [n, i] for i in choice.sample(range(8), 3)}
    elif kind == "pack":
        start = choice.randrange(100)
        sets |= {(worker, f"small {i}"): f"{n} {i}" * 9 for i in range(start, start + 90)}
    else:
        sets[worker, f"array {n % 3}"] = np.full(12_500, n)
    return sets, [(worker, f"x{choice.randrange(8)}"), (worker, f"small {choice.randrange(190)}")]


class History:
    """What a worker has in the chest after each of its batches."""

    def __init__(self, worker):
        self.worker = worker
        self.n = 0
        self.state = {(worker, "batch"): 0}

    def after(self, n):
        """Return what is there after batch `n`, which is none before that of the last call."""
        while self.n < n:
            self.n += 1
            sets, deleted = batch(self.worker, self.n)
            self.state.update((key, plain(value)) for key, value in sets.items())
            for key in deleted:
                self.state.pop(key, None)
        assert self.n == n, "older than what was there before"
        return self.state


class Worker:
    """A child that writes batch after batch."""

    def __init__(self, path, number):
        self.path = path
        self.number = number
        self.history = History(number)
        self.told = 0
        self.start()

    def start(self):
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._line = b""
        test = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._write(writer, test)
            finally:
                os._exit(1)
        os.close(writer)

    def _write(self, writer, test):
        c = Chest(path=self.path)
        n = c.setdefault((self.number, "batch"), 0)
        while os.getppid() == test:
            n += 1
            sets, deleted = batch(self.number, n)
            c.update(sets)
            for key in deleted:
                c.pop(key, None)
            c.flush()
            os.write(writer, b"%d\n" % n)

    def listen(self):
        """Take note of what it has told."""
        try:
            while more := os.read(self._reader, 1 << 16):
                self._line += more
        except BlockingIOError:
            pass
        *whole, self._line = self._line.split(b"\n")
        if whole:
            self.told = int(whole[-1])

    def kill(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.pid = 0
            self.listen()
            os.close(self._reader)
            assert status == -signal.SIGKILL, status

    def check(self, found):
        """Check what was found of this one's after it told what it has told."""
        if found:
            n = found[self.number, "batch"]
            assert n >= self.told
            assert found == self.history.after(n)
        else:
            assert self.told == 0


def test_what_was_told_is_there_after_a_kill_at_any_moment(tmp_path):
    choice = random.Random(8)
    path = str(tmp_path / "chest")
    with Chest(path=path) as c:
        c["kills"] = 0
    workers = [Worker(path, number) for number in range(WORKERS)]
    try:
        for n in range(KILLS):
            time.sleep(choice.random() * LONGEST)
            victim = choice.choice(workers)
            victim.kill()
            for worker in workers:
                if worker is not victim:
                    worker.listen()
            with Chest(path=path) as c:
                with c.transaction():
                    assert c["kills"] == n
                    c["kills"] = n + 1
                    found = {key: plain(value) for key, value in c.items()}
            assert found.pop("kills") == n + 1
            for worker in workers:
                mine = {key: value for key, value in found.items() if key[0] == worker.number}
                worker.check(mine)
            victim.start()
    finally:
        for worker in workers:
            worker.kill()
    with Chest(path=path) as c:
        found = seen(c)
    check_usable(path, found)
    print(KILLS, "kills,", sum(worker.told for worker in workers), "commits")
