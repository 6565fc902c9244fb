"""What the tests of damage share: files as bytes, little memory, how much is tried."""

from __future__ import annotations

import os
import random
import signal
from contextlib import contextmanager, suppress

try:
    import resource
except ImportError:  # Windows
    resource = None

FULL = os.environ.get("CHEST_FAULTS") == "all"
SEED = 20261126


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, data):
    """Make a file hold `data`; in place, since ext4 writes out what is cut to nothing first."""
    with open(path, "r+b" if os.path.exists(path) else "xb") as file:
        file.write(data)
        if os.path.isfile(path) and os.fstat(file.fileno()).st_size:
            file.truncate()


def tree(path):
    """Return the files below `path` with what they hold, and whatever is none as what it is."""
    found = {}
    for folder, folders, names in os.walk(path):
        for name in folders + names:
            full = os.path.join(folder, name)
            if os.path.islink(full):
                content = "link to " + os.readlink(full)
            elif os.path.isfile(full):
                content = read(full)
            else:
                content = "folder" if os.path.isdir(full) else "special"
            found[os.path.relpath(full, path).replace(os.sep, "/")] = content
    return found


def some(points, n):
    """Return all of `points` in the long form, else `n` of them, the same in every run."""
    points = list(points)
    return points if FULL or len(points) <= n else sorted(random.Random(SEED).sample(points, n))


@contextmanager
def little_memory(room):
    """Let this process ask the system for no more than `room` bytes, address space included."""
    if resource is None or not os.path.exists("/proc/self/statm"):
        yield
        return
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def measured_peak():
    """Yield a list that gets, at the end, by how many bytes of memory this process grew at most."""
    with suppress(OSError):  # the most so far is forgotten
        write("/proc/self/clear_refs", b"5")
    before = _peak()
    grown = []
    yield grown
    grown.append(_peak() - before)


def _peak():
    with suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return 0


class Hung(BaseException):
    """Something took too long."""


@contextmanager
def in_time(seconds):
    """Raise `Hung` where something waits or works for longer than that."""

    def interrupt(number, frame):
        raise Hung(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again where cleaning up waits, too
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
