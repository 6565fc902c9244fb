"""Workloads of small values: in memory, and by the hundred thousand through little memory."""

from __future__ import annotations

import gc
import pickle
import random
import statistics
import sys
import timeit

from benchmarks.steps import (
    ALIVE,
    apart,
    clock,
    each,
    fill,
    name,
    read,
    resident,
    row,
    size_of_row,
    timed,
)
from benchmarks.systems import PROTOCOL, used

ENDLESS = 1e12  # bytes: everything stays in memory


def hits(system_class, folder, keys, gets, repeats):
    """Get values that are in memory."""
    system = system_class(folder, ENDLESS)
    ALIVE.append(system)
    fill(system, row, range(keys), 100, 60)
    mapping = system.map
    wanted = random.Random(1).choices(list(map(name, range(keys))), k=gets)
    times = []
    for _ in range(repeats):
        start = clock()
        for key in wanted:
            mapping[key]
        times.append((clock() - start) / gets)
    yield "hit", statistics.median(times), "s"
    memory = getattr(mapping, "_memory", None)
    if memory is not None:
        check = generation_check(memory, gets, repeats)
        yield "generation check", check, "s"
        yield "share of it", check / statistics.median(times), ""


def generation_check(memory, number, repeats):
    """Return the seconds that a hit takes to see that no other process has committed."""

    def measure(statement):
        timer = timeit.Timer(statement, "memory = given", globals={"given": memory})
        return statistics.median(timer.repeat(repeats, number)) / number

    statement = "head, seen, _, _ = memory.quick\nif head[1] != seen: raise ValueError"
    return measure(statement) - measure("pass")


def sets(system_class, folder, keys):
    """Set small tuples that all fit into memory."""
    system = system_class(folder, ENDLESS)
    ALIVE.append(system)
    yield "set", each(fill(system, row, range(keys), 100, 60)), "s"
    yield "set again", each(fill(system, row, range(keys), 100, 60)), "s"


def tuples(system_class, folder, keys, gets, seconds):
    """Put tuples through a tenth of their size, read them back, and open them anew."""
    some = range(0, keys, max(keys // 1000, 1))
    size = statistics.mean(map(size_of_row, some))
    pickled = statistics.mean(len(pickle.dumps(row(n), PROTOCOL)) for n in some)
    start = resident()
    system = system_class(folder, keys * size / 10)
    count, spent = fill(system, row, range(keys), int(size), seconds)
    yield "set", spent / count, "s"
    spent += timed(system.flush)
    if system.lasts:
        yield "set and flush", spent / count, "s"
    if count < keys:
        yield note(count, keys, seconds)
        if system.caches:  # more than a tenth fits
            return
    yield from memory("memory a key", start, count)
    numbers = random.Random(2).choices(range(count), k=gets)
    yield "random get", each(read(system, check_row, numbers, int(size), seconds)), "s"
    if hasattr(system.map, "items"):
        yield "iteration", iterate(system.map.items(), count, seconds), "s"
    else:
        yield "iteration", iterate(((k, system.map[k]) for k in system.map), count, seconds), "s"
    yield from memory("after reading", start, count)
    if not system.lasts:
        return
    yield "disk a key", used(folder) / count, "B"
    yield "disk / pickles", system.disk() / count / pickled, ""
    yield from reopened(system, name(numbers[0]))


def check_row(number, value):
    if value != row(number):
        raise ValueError(f"{name(number)} holds {value}")


def note(count, keys, seconds):
    return "note", f"set {count:,} of {keys:,} keys in {seconds} seconds", ""


def memory(what, start, count):
    if start is not None:
        yield what, (resident() - start) / count, "B"


def iterate(items, count, seconds):
    """Return the seconds for one step of an iteration, which ends when time is up."""
    gc.collect()
    step = 0
    start = clock()
    for step, _ in enumerate(items, 1):
        if step % 1000 == 0 and clock() - start > seconds:
            break
    else:
        if step != count:
            raise ValueError(f"{step} pairs instead of {count}")
    return (clock() - start) / step


def reopen(system_class, folder, keys, seconds):
    """Open what holds many keys in a fresh process, and get one value."""
    system = system_class(folder, keys * size_of_row(keys) / 10)
    count, _ = fill(system, row, range(keys), size_of_row(keys), seconds)
    if count < keys:
        yield note(count, keys, seconds)
    else:
        yield from reopened(system, name(keys // 2))


def reopened(system, key):
    system.close()
    [(spent, files)] = apart([(first_get, (type(system), system.path, system.budget, key))])
    yield "reopen", spent, "s"
    if files:  # a library in C opens them unseen
        yield "files read", files, ""


def first_get(_barrier, system_class, path, budget, key):
    """Return the seconds from opening to the first value, and how many files were opened."""
    system_class(path + "-empty", budget)  # all modules are imported now
    opened = set()
    sys.addaudithook(lambda event, args: event == "open" and opened.add(str(args[0])))
    start = clock()
    system = system_class(path, budget)
    system.map[key]
    spent = clock() - start
    return spent, sum(file.startswith(path) for file in opened)


def flush(system_class, folder, keys, repeats, seconds):
    """Change one value among many that are all in memory, and flush."""
    draw = random.Random(8).randrange
    for kind, make in (("tuple", row), ("list", lambda n: list(row(n)))):
        for many in keys:
            system = system_class(f"{folder}/{kind}-{many}", ENDLESS)
            count, _ = fill(system, make, range(many), 100, seconds)
            if count < many:
                yield note(count, many, seconds)
                break
            system.flush()
            gc.collect()  # not before each: that would leave the caches of the processor cold
            times, start = [], clock()
            while len(times) < repeats and clock() - start < seconds:
                times.append(change_one(system, draw(many)))
            yield f"{kind} of {many:,}", statistics.median(times), "s"
            system.close()


def change_one(system, number):
    mapping, key = system.map, name(number)
    if system.forgets:
        for each_key in mapping:
            mapping[each_key]
    value = mapping[key]
    start = clock()
    if isinstance(value, tuple):
        mapping[key] = (*value, 1)
    else:
        value.append(1)
        if not system.notices:
            mapping[key] = value
    system.flush()
    return clock() - start


def overwrite(system_class, folder, keys, size, times, seconds):
    """Set the same keys again and again, then delete every other one."""
    noise = random.Random(3).randbytes(2 * size)
    system = system_class(folder, keys * size / 10)
    draw = random.Random(4).randrange

    def make(_):
        return noise[(at := draw(size)) : at + size]

    count, _ = fill(system, make, range(keys), size, seconds)
    if count < keys:
        yield note(count, keys, seconds)
    numbers = (draw(count) for _ in range(count * times))
    yield "overwrite", each(fill(system, make, numbers, size, seconds)), "s"
    mapping = system.map
    start = clock()
    for n in range(0, count, 2):
        del mapping[name(n)]
    system.flush()
    yield "delete", (clock() - start) / len(range(0, count, 2)), "s"
    yield "disk", used(folder), "B"
    yield "disk / live", used(folder) / (count // 2 * size), ""
