"""Workloads of several processes in one folder."""

from __future__ import annotations

import statistics
import time

from benchmarks.steps import apart, clock, name, row

BUDGET = 1e9
PATIENCE = 30  # seconds
PAUSE = 0.001  # seconds from one flush to the next set, so that the reader is waiting by then


def own_keys(system_class, folder, processes, keys, every):
    """Let each process set keys of its own, and flush every so often."""
    for count in processes:
        path = f"{folder}/{count}"
        system_class(path, BUDGET).close()
        workers = [
            (set_own, (system_class, path, me * keys, keys, every, count * keys))
            for me in range(count)
        ]
        times = apart(workers)
        spent = max(end for _, end in times) - min(start for start, _ in times)
        yield f"{count} processes", count * keys / spent, "/s"


def set_own(barrier, system_class, path, first, keys, every, in_all):
    system = system_class(path, BUDGET)
    barrier.wait()
    start = clock()
    for n in range(first, first + keys):
        system.map[name(n)] = row(n)
        if (n + 1) % every == 0:
            system.flush()
    end = clock()
    barrier.wait()
    if len(system.map) != in_all:
        raise ValueError(f"{len(system.map)} keys instead of {in_all}")
    barrier.wait()
    system.close()
    return start, end


def counter(system_class, folder, processes, increments):
    """Let processes add to one number, each addition by itself."""
    system_class(folder, BUDGET).close()
    times = apart([(count_up, (system_class, folder, increments))] * processes)
    system = system_class(folder, BUDGET)
    if system.map["counter"] != processes * increments:
        raise ValueError(f"{system.map['counter']} instead of {processes * increments}")
    system.close()
    spent = max(end for _, end in times) - min(start for start, _ in times)
    yield "increments", processes * increments / spent, "/s"


def count_up(barrier, system_class, path, increments):
    system = system_class(path, BUDGET)
    barrier.wait()
    start = clock()
    for _ in range(increments):
        system.increment("counter")
    end = clock()
    system.close()
    return start, end


def latency(system_class, folder, keys):
    """Let one process wait for each key, from when another one begins to flush it."""
    system_class(folder, BUDGET).close()
    flushed, seen = apart([(f, (system_class, folder, keys)) for f in (flush_each, poll_each)])
    delays = [max(there - here, 0) for here, there in zip(flushed, seen, strict=True)]
    yield "until seen", statistics.median(delays), "s"


def flush_each(barrier, system_class, path, keys):
    system = system_class(path, BUDGET)
    barrier.wait()
    times = []
    for n in range(keys):
        time.sleep(PAUSE)
        system.map[name(n)] = row(n)
        times.append(clock())
        system.flush()
    barrier.wait()
    system.close()
    return times


def poll_each(barrier, system_class, path, keys):
    system = system_class(path, BUDGET)
    mapping = system.map
    barrier.wait()
    times = []
    for n in range(keys):
        key = name(n)
        start = clock()
        while key not in mapping:
            if clock() - start > PATIENCE:
                raise TimeoutError(f"{key} was not seen for {PATIENCE} seconds")
        times.append(clock())
    barrier.wait()
    system.close()
    return times
