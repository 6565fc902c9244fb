"""What a chest tells about itself: to people, in notebooks, and to the workers of dask.

And what looks after it: `verify` and `compact`.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Collection, Iterator, Sized
from heapq import nlargest
from typing import Any

from chest.errors import ChestClosedError, ChestError, say, show
from chest.memory import Memory
from chest.progress import Progress, counting
from chest.report import Report
from chest.stats import Stats

logger = logging.getLogger("chest")

LARGEST = 10  # values that a notebook shows

# Both in light and in dark: half-transparent, on the colours of the notebook.
_BAR = '<div style="background:#8884;width:20em;height:.8em"><div style="background:#3b82f6;\
width:{:.0%};height:100%"></div></div>'
_ROW = '<tr><td style="text-align:left">{}</td><td>{:,}</td><td>{}</td></tr>'


class Status(Sized):
    """The part of a chest that tells what is in it, what it did, and whether it is sound."""

    _memory: Memory

    def stats(self) -> Stats:
        """Return what this chest did so far, and what it holds.

        Hits are counted from the first call on, and take about twice as long from then on.

        Raises
        ------
        ChestClosedError
            If the chest is closed.
        """
        memory = self._memory
        with memory.lock:
            memory.begin_to_tell()
            meter, ledger = memory.meter, memory.ledger
            lengths = [ledger.length(row) for _, row in ledger.stored()]
            packed = sum(map(memory.store.packs.size, ledger.packs)) if ledger.packs else 0
            return Stats(
                hits=meter.hits or 0,
                misses=meter.misses,
                loads=meter.loads,
                spills=meter.spills,
                writes=meter.writes,
                bytes_read=meter.bytes_read,
                bytes_written=meter.bytes_written,
                read_seconds=meter.read_seconds,
                write_seconds=meter.write_seconds,
                resident_keys=len(memory.inmem),
                resident_bytes=memory.eviction.total,
                stored_keys=len(lengths),
                stored_bytes=sum(lengths),
                packs=len(ledger.packs),
                waste=max(packed - sum(ledger.packs.values()), 0),
            )

    def reset_stats(self) -> None:
        """Let `stats` count from zero again."""
        with self._memory.lock:
            self._memory.begin_to_tell()
            self._memory.meter.reset()

    def verify(self, *, progress: Progress = None) -> Report:
        """Read every value that is committed, and tell which are not as they were written.

        Nothing becomes resident, nothing is loaded, and no lock is held, so that others may go on.
        Values that no flush or spill has written yet are not looked at.

        Parameters
        ----------
        progress : bool or callable, optional
            True shows how far it is, with tqdm if that is installed. A callable is called with two
            numbers, of keys done and of keys in all: at the start and after each value.

        Returns
        -------
        Report
            It prints well, and its ``ok`` tells whether all is as written.

        Raises
        ------
        OSError
            If the system refuses to let the directory be read, or the chest there was dropped.

        Examples
        --------
        >>> from chest import Chest
        >>> c = Chest({'x': 1})
        >>> c.flush()
        >>> print(c.verify())
        1 value, 5 bytes: all as written
        """
        with counting(progress, "verify") as tally:
            return self._memory.verify(tally)

    def compact(self) -> int:
        """Flush, write the index and the packs anew without what is out of date, and remove that.

        Commits do so by themselves where much is out of date; this leaves nothing of it.

        Returns
        -------
        int
            How many bytes that freed on disk.

        Raises
        ------
        UnsavedError
            If a value cannot be written.
        OSError
            If the disk refuses; nothing is lost.
        """
        return self._memory.compact()

    # -- as the data of a worker of dask.distributed -----------------------------------------------

    @property
    def fast(self) -> Collection[Any]:
        """The keys whose values are in memory and can leave it."""
        with self._memory.lock:
            stuck = self._memory.eviction.aside()
            keys = self._memory.inmem.keys()
            return keys - stuck if stuck else keys

    @property
    def slow(self) -> Collection[Any]:
        """The keys whose values are on disk alone."""
        with self._memory.lock:
            self._memory.begin()
            return self._memory.ledger.rows.keys() - self._memory.inmem.keys()

    def evict(self) -> int:
        """Let what should leave memory next do so, a large value or many small ones.

        Returns
        -------
        int
            How many bytes became free; -1 if nothing could leave, which is logged.
        """
        try:
            return self._memory.evict()
        except (ChestError, OSError) as error:
            logger.warning("nothing leaves memory: %s", say(error))
            return -1

    @property
    def spilled_total(self) -> tuple[int, int]:
        """How many bytes the values that are on disk alone have, in memory and on disk.

        What they had in memory is not known any more: it is taken for what they have on disk.
        """
        with self._memory.lock:
            away = self.slow  # first: it takes in what others did
            ledger = self._memory.ledger
            total = sum(ledger.length(ledger.rows[key]) for key in away)
        return total, total

    @property
    def cumulative_metrics(self) -> dict[tuple[str, str], float]:
        """What was read and written so far, by activity and unit; see `stats`."""
        meter = self._memory.meter
        return {
            ("disk-read", "bytes"): meter.bytes_read,
            ("disk-read", "count"): meter.loads,
            ("disk-read", "seconds"): meter.read_seconds,
            ("disk-write", "bytes"): meter.bytes_written,
            ("disk-write", "count"): meter.writes,
            ("disk-write", "seconds"): meter.write_seconds,
        }

    # -- to people -------------------------------------------------------------------------------

    def __repr__(self) -> str:
        memory = self._memory
        where = memory.path or "no directory yet"
        if memory.closed:
            return f"<closed chest at {where}>"
        try:
            keys, nbytes = len(self), memory.eviction.total
        except ChestClosedError:  # by another thread
            return f"<closed chest at {where}>"
        except (ChestError, OSError) as error:  # a debugger or a traceback asks for no more errors
            return f"<chest at {where}: {say(error)}>"
        return (
            f"<chest at {where}: {keys:,} keys, {nbytes:,} of "
            f"{memory.available:,.0f} bytes in memory>"
        )

    def _repr_html_(self) -> str:
        """Return a small picture for notebooks: how full memory is, and the largest values."""
        title = html.escape(repr(self)[1:-1])
        memory = self._memory
        if memory.closed:
            return f"<div>{title}</div>"
        with memory.lock:
            memory.begin()
            share = min(memory.eviction.total / memory.available, 1) if memory.available else 0
            stored = [memory.ledger.length(row) for _, row in memory.ledger.stored()]
            rows = "".join(
                _ROW.format(html.escape(show(key)[:60]), size, "memory" if there else "disk")
                for size, there, key in nlargest(LARGEST, self._sizes(), key=lambda row: row[0])
            )
        head = "<tr><th>largest values</th><th>bytes</th><th>where</th></tr>"
        disk = f"<div>on disk: {len(stored):,} values, {sum(stored):,} bytes</div>"
        return f"<div>{title}{_BAR.format(share)}{disk}<table>{head}{rows}</table></div>"

    def _sizes(self) -> Iterator[tuple[int, bool, Any]]:
        memory = self._memory
        for key, row in memory.ledger.rows.items():
            there = key in memory.inmem
            yield memory.eviction.size(key) if there else memory.ledger.length(row), there, key
