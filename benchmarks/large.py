"""Workloads of arrays that take eight times the memory that there is for them."""

from __future__ import annotations

import itertools
import os
import random

import numpy as np

from benchmarks.steps import apart, clock, each, fill, read


def arrays(system_class, folder, count, size, seconds):
    """Write arrays, and read them back in new processes.

    A process that has written has memory to give, and what it gives back to the system depends on
    how it ended; a new one has to get all of it from there.
    """
    base = numbers(size)

    def make(n):
        array = base.copy()
        array[0] = n
        return array

    warm(f"{folder}-warm", count * 3 // 2, size)
    budget = count * size / 8
    system = system_class(folder, budget)
    done, spent = fill(system, make, range(count), size, seconds)
    start = clock()
    system.flush()
    yield "write", (spent + clock() - start) / done, "s"
    system.close()
    order = list(range(done))
    for how in ("read in order", "read at random"):
        [spent] = apart([(read_back, (system_class, folder, budget, order, size, seconds))])
        yield how, spent, "s"
        random.Random(5).shuffle(order)


def warm(path, count, size):
    """Let the system take the memory for so many arrays in files, and give it back.

    What no process has touched for seconds the host of a virtual machine may have to give first,
    and that takes ten times as long as to write to it. Which memory a file gets is chance.
    """
    with open(path, "wb", buffering=0) as file:
        file.writelines(itertools.repeat(bytes(size), count))
    os.remove(path)


def numbers(size):
    return np.random.default_rng(1).random(size // 8)


def read_back(_barrier, system_class, folder, budget, order, size, seconds):
    """Return the seconds to read one array, once memory was taken for those read before: `warm`."""
    last = numbers(size)[-1]

    def check(n, array):
        if array.nbytes != size or array[0] != n or array[-1] != last:
            raise ValueError(f"array {n} is not what was stored")

    system = system_class(folder, budget)
    first = len(order) // 8
    read(system, check, order[:first], size, seconds)
    spent = each(read(system, check, order[first:], size, seconds))
    system.close()
    return spent
