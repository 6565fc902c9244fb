"""What chest has to reach, and whether it did. Ratios are the medians of those within rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.results import Results

Measure = Callable[[Results], float | None]
MS = 1e-3
MIB = 1 << 20


@dataclass(frozen=True)
class Target:
    what: str
    target: str  # to be read
    bound: float
    measure: Measure
    at_least: bool = False

    def met(self, measured: float | None) -> bool | None:
        if measured is None:
            return None
        return measured >= self.bound if self.at_least else measured <= self.bound


def time_of(workload: str, metric: str, *peers: str) -> Measure:
    """Return the largest of chest's times (or sizes) divided by those of the peers."""
    return lambda results: _most(results.ratio(workload, metric, peer) for peer in peers)


def speed_of(workload: str, metric: str, *peers: str, pick: Callable[..., float] = min) -> Measure:
    """Return the smallest, or the largest, of chest's speeds divided by those of the peers."""

    def measure(results: Results) -> float | None:
        ratios = [results.ratio(workload, metric, peer) for peer in peers]
        return None if None in ratios else pick(1 / ratio for ratio in ratios if ratio)

    return measure


def read_back(workload: str) -> Measure:
    """Return the smaller of chest's speeds, in order and at random, divided by those of raw."""
    both = [speed_of(workload, metric, "raw") for metric in BOTH[1:]]

    def measure(results: Results) -> float | None:
        return min((ratio for each in both if (ratio := each(results)) is not None), default=None)

    return measure


def worst(workloads: Iterable[str], metrics: Iterable[str], peers: Iterable[str]) -> Measure:
    """Return the largest ratio of times in any workload, metric and peer."""
    places = [(w, m, p) for w in workloads for m in metrics for p in peers]
    return lambda results: _most(results.ratio(*place) for place in places)


def value_of(workload: str, metric: str) -> Measure:
    return lambda results: results.median(workload, metric)


def _most(ratios: Iterable[float | None]) -> float | None:
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def _growth(results: Results) -> float | None:
    few = results.median("flush", "tuple of 1,000")
    many = results.median("flush", "tuple of 100,000")
    return many / few if few and many else None


def _bounded(results: Results) -> float | None:
    disk = results.median("overwrite", "disk")
    over = results.median("overwrite", "disk / live")
    return max(disk - 128 * MIB, 0) / (disk / over) if disk and over else None


def _reading(combine: Callable[[list[float]], float]) -> Measure:
    def measure(results: Results) -> float | None:
        found = [results.ratio(f"traces-{trace}", "time reading", "lru") for trace in TRACES]
        ratios = [ratio for ratio in found if ratio is not None]
        return combine(ratios) if len(ratios) == len(TRACES) else None

    return measure


TRACES = ("zipf", "overwrites", "scans", "loop", "shifting")
ARRAYS = ("arrays-8mb", "arrays-1mb")
BOTH = ("write", "read in order", "read at random")
OTHERS = ("rocksdict", "shelve", "sqlitedict", "diskcache", "diskcache-transact", "zict", "joblib")
TUPLES = "tuples-200k"

TARGETS = [
    Target("hit", "time <= 0.8 x cachetools", 0.8, time_of("hits", "hit", "cachetools")),
    Target("hit", "time <= 0.25 x zict.LRU", 0.25, time_of("hits", "hit", "zict.LRU")),
    Target("hit", "time <= 5 x dict", 5, time_of("hits", "hit", "dict")),
    Target("set of a small tuple", "time <= 1.3 x cachetools", 1.3,
           time_of("sets", "set", "cachetools")),
    Target("set of a small tuple", "time <= 0.65 x zict.LRU", 0.65,
           time_of("sets", "set", "zict.LRU")),
    Target("8 MB arrays: spill", "speed >= 0.8 x raw write", 0.8,
           speed_of("arrays-8mb", "write", "raw"), at_least=True),
    Target("8 MB arrays: read back", "speed >= 0.7 x raw readinto", 0.7,
           read_back("arrays-8mb"), at_least=True),
    Target("1 MB arrays: spill", "speed >= 0.9 x raw write", 0.9,
           speed_of("arrays-1mb", "write", "raw"), at_least=True),
    Target("1 MB arrays: read back", "speed >= 0.55 x raw readinto", 0.55,
           read_back("arrays-1mb"), at_least=True),
    Target("8 and 1 MB arrays", "faster than diskcache, joblib, shelve, sqlitedict", 1,
           worst(ARRAYS, BOTH, ("diskcache", "joblib", "shelve", "sqlitedict"))),
    Target("8 and 1 MB arrays", "time <= 0.5 x zict", 0.5, worst(ARRAYS, BOTH, ("zict",))),
    Target("small tuples: set", "time <= 4 x lmdb", 4, time_of(TUPLES, "set", "lmdb")),
    Target("small tuples: set", "speed >= 6 x sqlitedict", 6,
           speed_of(TUPLES, "set", "sqlitedict"), at_least=True),
    Target("small tuples: set", "speed >= 3 x diskcache", 3,
           speed_of(TUPLES, "set", "diskcache"), at_least=True),
    Target("small tuples: random get", "time <= 3.5 x lmdb", 3.5,
           time_of(TUPLES, "random get", "lmdb")),
    Target("small tuples: random get", "speed >= 20 x slower of diskcache, sqlitedict", 20,
           speed_of(TUPLES, "random get", "diskcache", "sqlitedict", pick=max), at_least=True),
    Target("small tuples: random get", "speed >= 4 x faster of diskcache, sqlitedict", 4,
           speed_of(TUPLES, "random get", "diskcache", "sqlitedict"), at_least=True),
    Target("small tuples: iteration", "time <= 2.5 x lmdb", 2.5,
           time_of(TUPLES, "iteration", "lmdb")),
    Target("small tuples: iteration", "faster than all others on disk", 1,
           time_of(TUPLES, "iteration", *OTHERS)),
    Target("small tuples: memory at 1,000,000", "<= 0.65 x dict", 0.65,
           time_of("tuples-1m", "memory a key", "dict")),
    Target("small tuples: disk", "<= 1.25 x their pickles", 1.25,
           value_of(TUPLES, "disk / pickles")),
    Target("flush, one tuple of 100,000", "<= 0.2 ms", 0.2 * MS,
           value_of("flush", "tuple of 100,000")),
    Target("flush, one tuple of 100,000", "as for 1,000 (<= 1.5 x)", 1.5, _growth),
    Target("flush, one list of 100,000", "time <= 2.5 x pickling all", 2.5,
           time_of("flush", "list of 100,000", "pickled-dict")),
    Target("reopen at 1,000,000, first get", "time <= 1.2 x pickle.load of the keys", 1.2,
           time_of("reopen", "reopen", "pickled-dict")),
    Target("reopen at 1,000,000, first get", "2 files read: .keys, and one with the value", 2,
           value_of("reopen", "files read")),
    Target("disk after overwriting", "<= 2 x live + 128 MiB", 2, _bounded),
    Target("time reading, mean of 5 traces", "<= 0.9 x LRU", 0.9,
           _reading(lambda ratios: sum(ratios) / len(ratios))),
    Target("time reading, worst of 5 traces", "<= 1 x LRU", 1, _reading(max)),
    Target("flush until others see it", "<= 1 ms", 1 * MS, value_of("latency", "until seen")),
    Target("chest 0.2.3", "faster in every row", 1,
           lambda results: _most(results.ratios("chest-0.2.3"))),
]
