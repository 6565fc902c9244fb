"""Workloads of arrays that take eight times the memory that there is for them."""

from __future__ import annotations

import random

import numpy as np

from benchmarks.steps import clock, each, fill, read


def arrays(system_class, folder, count, size, seconds):
    """Write arrays, and read them back from a folder that is opened anew."""
    base = np.random.default_rng(1).random(size // 8)

    def make(n):
        array = base.copy()
        array[0] = n
        return array

    def check(n, array):
        if array.nbytes != size or array[0] != n or array[-1] != base[-1]:
            raise ValueError(f"array {n} is not what was stored")

    budget = count * size / 8
    system = system_class(folder, budget)
    done, spent = fill(system, make, range(count), size, seconds)
    start = clock()
    system.flush()
    yield "write", (spent + clock() - start) / done, "s"
    order = list(range(done))
    for how in ("read in order", "read at random"):
        system.close()
        del system
        system = system_class(folder, budget)
        yield how, each(read(system, check, order, size, seconds)), "s"
        random.Random(5).shuffle(order)
    system.close()
