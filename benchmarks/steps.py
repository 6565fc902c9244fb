"""What the workloads are made of: filling, reading, sizes, and steps in processes of their own.

Making a value is never timed. A system that keeps no values in memory by itself has them kept for
it, as many as the budget allows: otherwise it would get the memory of one value for all of them.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import sys
import time
from collections import deque

SPAWN = multiprocessing.get_context("spawn")
CHUNK = 1 << 20  # bytes of values that are made at a time
BATCH = 1 << 25  # bytes between two commits, but never more than a thousand values

ALIVE = []  # systems that would only take time to save what is in their memory

clock = time.perf_counter


def name(n):
    return f"key-{n}"


def row(n):
    """Return a small tuple."""
    return (n, n / 7, f"name-{n}")


def size_of_row(n):
    value = row(n)
    return sys.getsizeof(value) + sum(map(sys.getsizeof, value))


def batched(iterable, count):
    iterator = iter(iterable)
    return iter(lambda: list(itertools.islice(iterator, count)), [])


def keeper(system, size):
    """Return a function that keeps the last values, if the system does not."""
    return deque(maxlen=0 if system.caches else int(system.budget // size)).append


def fill(system, make, numbers, size, seconds):
    """Set the values of these numbers; return how many, and the seconds that took.

    Parameters
    ----------
    make : function
        Number to value.
    size : int
        Bytes of a value, about.
    seconds : float
        When to stop.
    """
    mapping, keep = system.map, keeper(system, size)
    chunk = min(max(CHUNK // size, 1), 1000)
    commit_every = max(min(BATCH // size, 1000) // chunk, 1)
    count, spent = 0, 0.0
    for turn, some in enumerate(batched(numbers, chunk), 1):
        pairs = [(name(n), make(n)) for n in some]
        start = clock()
        for key, value in pairs:
            mapping[key] = value
            keep(value)
        if turn % commit_every == 0:
            system.commit()
        spent += clock() - start
        count += len(pairs)
        del pairs, value
        if spent > seconds:
            break
    return count, spent


def read(system, check, numbers, size, seconds):
    """Get the values of these numbers, and check some; return how many, and the seconds."""
    mapping, keep = system.map, keeper(system, size)
    count, spent = 0, 0.0
    for some in batched(numbers, min(max(CHUNK // size, 1), 1000)):
        keys = list(map(name, some))
        start = clock()
        for key in keys:
            value = mapping[key]
            keep(value)
        spent += clock() - start
        count += len(keys)
        check(some[-1], value)
        if spent > seconds:
            break
    return count, spent


def each(measured):
    """Return the seconds for one of what `fill` or `read` has measured."""
    count, spent = measured
    return spent / count


def timed(function, *args):
    gc.collect()
    start = clock()
    function(*args)
    return clock() - start


def resident():
    """Return the bytes of memory that this process takes, None where that is not told."""
    gc.collect()
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return None


def transferred():
    """Return the bytes that this process has read from and written to files, None if unknown."""
    try:
        with open("/proc/self/io") as file:
            numbers = dict(line.split(": ") for line in file)
    except FileNotFoundError:
        return None
    return int(numbers["rchar"]) + int(numbers["wchar"])


def apart(functions):
    """Run functions side by side, each in a process of its own; return what they return.

    Parameters
    ----------
    functions : list of (function, arguments)
        Each is called with a barrier of all of them, and then its arguments.
    """
    barrier = SPAWN.Barrier(len(functions), timeout=120)
    answers = SPAWN.SimpleQueue()
    processes = [
        SPAWN.Process(target=_answer, args=(answers, barrier, n, *each), daemon=True)
        for n, each in enumerate(functions)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        for _ in processes:
            number, answer, error = answers.get()
            if error:
                raise RuntimeError(error)
            found[number] = answer
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join()
    return [found[number] for number in sorted(found)]


def _answer(answers, barrier, number, function, arguments):
    try:
        answers.put((number, function(barrier, *arguments), None))
    except Exception as error:  # noqa: BLE001 -- sent on, for the waiting process to raise
        barrier.abort()
        answers.put((number, None, f"{type(error).__name__}: {error}"))
