"""Workloads that follow a trace of values from 1 KB to 4 MB, of which a tenth fits into memory.

All keys are set first. Then come the gets and sets of the trace, and only they count.
"""

from __future__ import annotations

import itertools
import random

import numpy as np

from benchmarks.policies import POLICIES
from benchmarks.steps import ALIVE, clock, name, transferred

SMALLEST, LARGEST = 1_000, 4_000_000  # bytes
READ = 1e-4  # seconds that any read from the disk of the model takes, however small
BANDWIDTH = 1e9  # bytes that it reads in a second


def follow(system_class, folder, trace, keys, steps):
    """Follow a trace; say what was found in memory, what was moved, and how long it took."""
    draw = random.Random(6)
    sizes = [int(SMALLEST * (LARGEST / SMALLEST) ** draw.random()) for _ in range(keys)]
    budget = sum(sizes) / 10
    operations = list(itertools.islice(TRACES[trace](draw, sizes, budget), steps))
    run = simulate if system_class in POLICIES.values() else measure
    reads, moved, spent = run(system_class, folder, sizes, budget, operations)

    gets = [n for n, sets in operations if not sets]
    missed = sum(sizes[n] for n in reads)
    yield "hit ratio", 1 - len(reads) / len(gets), ""
    yield "byte hit ratio", 1 - missed / sum(sizes[n] for n in gets), ""
    yield "time reading", len(reads) * READ + missed / BANDWIDTH, "s"
    if moved is not None:
        yield "moved", moved, "B"
    if spent is not None:
        yield "wall time", spent, "s"


def measure(system_class, folder, sizes, budget, operations):
    reads = []
    system = system_class(folder, budget, on_read=lambda key: reads.append(int(key[4:])))
    ALIVE.append(system)
    mapping = system.map
    noise = np.random.default_rng(7).integers(0, 256, LARGEST, np.uint8)
    for n, size in enumerate(sizes):
        mapping[name(n)] = noise[:size].copy()
    reads.clear()
    start, spent = transferred(), 0.0
    for n, sets in operations:
        key = name(n)
        if sets:
            value = noise[-sizes[n] :].copy()
            before = clock()
            mapping[key] = value
        else:
            before = clock()
            value = mapping[key]
        spent += clock() - before
        if value.nbytes != sizes[n]:
            raise ValueError(f"{key} has {value.nbytes} bytes instead of {sizes[n]}")
        del value
    return reads, None if start is None else transferred() - start, spent


def simulate(policy_class, _folder, sizes, budget, operations):
    policy = policy_class(budget)
    dirty = set()
    reads, written = [], 0
    for n, size in enumerate(sizes):
        dirty.difference_update(policy.use(n, size))
        dirty.add(n)
    for n, sets in operations:
        if not sets and n not in policy.sizes:
            reads.append(n)
        gone = policy.use(n, sizes[n])
        written += sum(sizes[left] for left in gone if left in dirty)
        dirty.difference_update(gone)
        if sets:
            dirty.add(n)
    return reads, written + sum(sizes[n] for n in reads), None


# Each of these yields (number of a key, whether it is set) without end.


def ranks(draw, count):
    """Yield ranks for ever, the first most often."""
    weights = list(itertools.accumulate(1 / (rank + 1) ** 0.9 for rank in range(count)))
    while True:
        yield from draw.choices(range(count), cum_weights=weights, k=1000)


def shuffled(draw, sizes):
    return draw.sample(range(len(sizes)), len(sizes))


def zipf(draw, sizes, _budget):
    order = shuffled(draw, sizes)
    return ((order[rank], False) for rank in ranks(draw, len(sizes)))


def overwrites(draw, sizes, budget):
    """Zipf, where every fifth step sets."""
    for n, _ in zipf(draw, sizes, budget):
        yield n, draw.random() < 0.2


def scans(draw, sizes, budget):
    """Zipf, with one in six steps in scans over a fifth of the keys."""
    steps = zipf(draw, sizes, budget)
    stretch = max(len(sizes) // 5, 1)
    for first in itertools.cycle(range(0, len(sizes), stretch)):
        yield from itertools.islice(steps, 5 * stretch)
        yield from ((n, False) for n in range(first, min(first + stretch, len(sizes))))


def loop(draw, sizes, budget):
    """One after the other, as many as take twice the budget."""
    order = shuffled(draw, sizes)
    totals = itertools.accumulate(sizes[n] for n in order)
    among = [n for n, total in zip(order, totals, strict=True) if total <= 2 * budget]
    return itertools.cycle((n, False) for n in among)


def shifting(draw, sizes, _budget):
    """Zipf, where every key in its turn becomes the most wanted one, and then the least."""
    order = shuffled(draw, sizes)
    for step, rank in enumerate(ranks(draw, len(sizes))):
        yield order[(rank + step // 20) % len(order)], False


TRACES = {f.__name__: f for f in (zipf, overwrites, scans, loop, shifting)}
