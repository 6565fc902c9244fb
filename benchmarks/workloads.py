"""What is measured: each workload with its sizes and with the systems that take part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from benchmarks.policies import POLICIES
from benchmarks.systems import SYSTEMS

Measured = tuple[str, Any, str]  # what, how much, and of what unit: s, B, /s, or none


@dataclass(frozen=True)
class Workload:
    about: str
    run: str  # module:function, imported by the process that measures
    systems: str
    full: dict[str, Any]
    quick: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # modules

    def bind(self, system: str, folder: str, quick: bool) -> Callable[[], Iterator[Measured]]:
        """Return what measures one system once."""
        module, name = self.run.split(":")
        run = getattr(import_module(f"benchmarks.{module}"), name)
        sizes = self.quick if quick else self.full
        return partial(run, (SYSTEMS | POLICIES)[system], folder, **self.fixed, **sizes)


IN_MEMORY = "chest dict cachetools zict.LRU chest-0.2.3"
LARGE = (
    "chest raw pickle-files zict diskcache joblib shelve sqlitedict lmdb rocksdict chest-0.2.3"
)
SMALL = (
    "chest dict pickle-log lmdb rocksdict shelve sqlitedict diskcache diskcache-transact zict "
    "joblib chest-0.2.3"
)

WORKLOADS = {
    "hits": Workload(
        "getting values that are in memory", "small:hits", IN_MEMORY,
        full={"keys": 1000, "gets": 100_000, "repeats": 7},
        quick={"keys": 1000, "gets": 20_000, "repeats": 3},
    ),
    "sets": Workload(
        "setting small tuples that stay in memory, sized by the same function",
        "small:sets", IN_MEMORY, full={"keys": 100_000}, quick={"keys": 20_000},
    ),
    "arrays-8mb": Workload(
        "128 arrays of 8 MB through an eighth of their size", "large:arrays", LARGE,
        fixed={"size": 8_000_000, "seconds": 10}, full={"count": 128}, quick={"count": 8},
        needs=("numpy",),
    ),
    "arrays-1mb": Workload(
        "1,000 arrays of 1 MB through an eighth of their size", "large:arrays", LARGE,
        fixed={"size": 1_000_000, "seconds": 10}, full={"count": 1000}, quick={"count": 100},
        needs=("numpy",),
    ),
    "arrays-64kb": Workload(
        "5,000 arrays of 64 KB through an eighth of their size", "large:arrays", LARGE,
        fixed={"size": 65_536, "seconds": 10}, full={"count": 5000}, quick={"count": 200},
        needs=("numpy",),
    ),
    "tuples-200k": Workload(
        "200,000 small tuples through a tenth of their size", "small:tuples", SMALL,
        full={"keys": 200_000, "gets": 50_000, "seconds": 4},
        quick={"keys": 10_000, "gets": 5_000, "seconds": 1},
    ),
    "tuples-1m": Workload(
        "1,000,000 small tuples through a tenth of their size", "small:tuples",
        "chest dict pickle-log lmdb rocksdict",
        full={"keys": 1_000_000, "gets": 50_000, "seconds": 15},
        quick={"keys": 50_000, "gets": 5_000, "seconds": 2},
    ),
    "flush": Workload(
        "flushing one changed value among many in memory", "small:flush",
        "chest pickled-dict lmdb shelve sqlitedict diskcache chest-0.2.3",
        full={"keys": (1_000, 10_000, 100_000), "repeats": 9, "seconds": 10},
        quick={"keys": (1_000, 5_000), "repeats": 3, "seconds": 2},
    ),
    "reopen": Workload(
        "opening what holds 1,000,000 keys, and the first get", "small:reopen",
        "chest pickled-dict lmdb",
        full={"keys": 1_000_000, "seconds": 30}, quick={"keys": 20_000, "seconds": 3},
    ),
    "overwrite": Workload(
        "overwriting 20,000 values of 2 KB ten times, deleting half of them", "small:overwrite",
        "chest lmdb rocksdict shelve sqlitedict diskcache zict chest-0.2.3",
        fixed={"size": 2000, "times": 10},
        full={"keys": 20_000, "seconds": 8}, quick={"keys": 1_000, "seconds": 1},
    ),
    "processes": Workload(
        "4 and 8 processes with 2,000 keys each in one folder, flushing every 10",
        "sharing:own_keys", "chest lmdb sqlitedict diskcache",
        fixed={"every": 10},
        full={"processes": (4, 8), "keys": 2000}, quick={"processes": (4,), "keys": 200},
    ),
    "counter": Workload(
        "4 processes adding to one number 1,000 times each, in transactions",
        "sharing:counter", "chest lmdb diskcache",
        fixed={"processes": 4}, full={"increments": 1000}, quick={"increments": 100},
    ),
    "latency": Workload(
        "until a process that polls sees a key that another one flushes",
        "sharing:latency", "chest lmdb diskcache", full={"keys": 500}, quick={"keys": 100},
    ),
} | {
    f"traces-{trace}": Workload(
        f"{about}, 1 KB to 4 MB, a tenth fits", "traces:follow",
        "chest zict chest-0.2.3 " + " ".join(POLICIES),
        fixed={"trace": trace}, needs=("numpy",),
        full={"keys": 1000, "steps": 10_000}, quick={"keys": 150, "steps": 600},
    )
    for trace, about in (
        ("zipf", "Zipf"),
        ("overwrites", "Zipf with overwrites"),
        ("scans", "Zipf with scans"),
        ("loop", "a loop over twice the memory"),
        ("shifting", "a shifting Zipf"),
    )
}


def chosen(names: list[str]) -> list[str]:
    """Return the workloads of these names; ``arrays`` is all that start so, nothing is all.

    Raises
    ------
    ValueError
        If there is no such workload.
    """
    found: dict[str, None] = {}
    for name in names or WORKLOADS:
        some = [each for each in WORKLOADS if each == name or each.startswith(name + "-")]
        if not some:
            raise ValueError(f"no workload {name!r}; there are {', '.join(WORKLOADS)}")
        found.update(dict.fromkeys(some))
    return list(found)
