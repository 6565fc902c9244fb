"""What was measured, round by round, and how chest compares within each round."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain

CHEST = "chest"


class Results:
    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.rounds: dict[str, int] = {}  # of each workload
        self.units: dict[tuple[str, str], str] = {}  # (workload, metric) -> unit
        self.values: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
        self.left_out: dict[str, str] = {}  # system -> why
        self.notes: list[str] = []

    def add(
        self, workload: str, system: str, number: int, metric: str, value: float, unit: str
    ) -> None:
        self.units[workload, metric] = unit
        self.values[workload, system, metric][number] = value

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def systems(self, workload: str, order: list[str]) -> list[str]:
        """Return the systems that reported something, in this order."""
        found = {system for name, system, _ in self.values if name == workload}
        return [system for system in order if system in found]

    def metrics(self, workload: str) -> list[str]:
        """Return what was reported, in the order of the system that reported the most."""
        found: dict[str, list[str]] = defaultdict(list)
        for name, system, metric in self.values:
            if name == workload:
                found[system].append(metric)
        fullest_first = sorted(found.values(), key=len, reverse=True)
        return list(dict.fromkeys(chain.from_iterable(fullest_first)))

    def median(self, workload: str, metric: str, system: str = CHEST) -> float | None:
        values = self.values.get((workload, system, metric))
        return statistics.median(values.values()) if values else None

    def ratio(self, workload: str, metric: str, peer: str) -> float | None:
        """Return the median of chest's cost divided by the peer's, each within one round."""
        mine = self.values.get((workload, CHEST, metric), {})
        theirs = self.values.get((workload, peer, metric), {})
        unit = self.units.get((workload, metric))
        if unit == "/s":
            mine, theirs = theirs, mine
        ratios = [mine[n] / theirs[n] for n in mine if theirs.get(n)]
        return statistics.median(ratios) if ratios and unit else None

    def ratios(self, peer: str) -> Iterator[float]:
        """Yield the ratios to one peer in everything that both can."""
        for workload, metric in self.units:
            ratio = self.ratio(workload, metric, peer)
            if ratio is not None:
                yield ratio
