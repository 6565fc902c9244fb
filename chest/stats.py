"""What a chest did so far, and what it holds: counted here, told by `Chest.stats`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any


class Meter:
    """What went from memory to disk and back since it was made.

    Attributes
    ----------
    hits : int or None
        How many values were got from memory; None as long as nobody asked, for counting takes as
        long as a hit.
    misses, loads, spills, writes : int
        How many values were got from disk; read from it, also ahead; let go from memory; written.
    bytes_read, bytes_written : int
    read_seconds, write_seconds : float
        Loading included, and dumping.
    said : set
        What users were told of already.
    """

    def __init__(self) -> None:
        self.hits: int | None = None
        self.said: set[Any] = set()
        self.reset()

    def reset(self) -> None:
        """Count from zero again."""
        if self.hits is not None:
            self.hits = 0
        self.misses = self.loads = self.spills = self.writes = 0
        self.bytes_read = self.bytes_written = 0
        self.read_seconds = self.write_seconds = 0.0

    def counting(self, mark: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return what marks a key that is hit, and counts it if hits are counted."""
        return mark if self.hits is None else partial(self._hit, mark)

    # No call comes amid an addition, and so no other thread.

    def _hit(self, mark: Callable[[Any], None], key: Any) -> None:
        self.hits = (self.hits or 0) + 1
        mark(key)

    def read(self, values: int, nbytes: int, seconds: float) -> None:
        """Count values that were read from disk."""
        self.loads += values
        self.bytes_read += nbytes
        self.read_seconds += seconds


@dataclass(frozen=True)
class Stats:
    """What `Chest.stats` returns: what this handle did, and what the chest holds.

    Attributes
    ----------
    hits : int
        Values got from memory since `Chest.stats` or `Chest.reset_stats` was first called.
    misses : int
        Values got that had to be read from disk. All that follows counts from the beginning, or
        from the last `Chest.reset_stats`.
    loads : int
        Values read from disk: misses, and what was read ahead or passed by.
    spills : int
        Values that left memory.
    writes : int
        Values written to disk.
    bytes_read, bytes_written : int
        Without what the index takes.
    read_seconds, write_seconds : float
        With the time for loading and dumping; threads that read at one time count each.
    resident_keys, resident_bytes : int
        What is in memory now, and its size as ``nbytes`` tells it.
    stored_keys, stored_bytes : int
        What is on disk, in memory as well or not.
    packs : int
        Files that hold many small values each.
    waste : int
        Bytes in these that belong to no key any more.

    Examples
    --------
    >>> from chest import Chest
    >>> with Chest({'x': 'some text'}) as c:
    ...     c.flush()
    ...     print(c.stats())  # doctest: +ELLIPSIS
    hits                         0
    misses                       0
    loads                        0
    spills                       0
    writes                       1
    bytes_read                   0
    bytes_written               24
    ...
    """

    hits: int
    misses: int
    loads: int
    spills: int
    writes: int
    bytes_read: int
    bytes_written: int
    read_seconds: float
    write_seconds: float
    resident_keys: int
    resident_bytes: int
    stored_keys: int
    stored_bytes: int
    packs: int
    waste: int

    def __str__(self) -> str:
        pairs = [(field.name, getattr(self, field.name)) for field in fields(self)]
        texts = [(name, f"{value:,.3f}" if type(value) is float else f"{value:,}")
                 for name, value in pairs]  # fmt: skip
        return "\n".join(f"{name:<15}{text:>15}" for name, text in texts)
