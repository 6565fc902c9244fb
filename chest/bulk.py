"""Many values at once: through memory, into it, and from one chest to another."""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import islice, repeat
from operator import sub
from threading import Thread
from time import perf_counter
from typing import IO, Any

from chest.aliases import UNSAVED
from chest.columns import Entry
from chest.errors import CorruptValueError, UnsavedError
from chest.files import demand_file
from chest.ledger import Ledger
from chest.memory import Memory
from chest.progress import BEAT, Tally
from chest.residents import MISSING
from chest.serialize import any_changeable, changeable
from chest.staging import Batch, Staged

MAX_OPEN_FILES = 512
THREADS = 8
WINDOW = 1024  # values read ahead
LINKS = 1024  # values taken over in one commit

OpenMany = Callable[..., AbstractContextManager[Iterable[IO[Any]]]]


def stream(memory: Memory, keys: Iterable[Any], _chest: object) -> Iterator[tuple[Any, Any]]:
    """Yield the pairs of those `keys` that are there, pushing nothing out of memory.

    The chest stays open for as long as this goes on, even if nobody else has it.

    Values in packs are read ahead, in the order in which they lie there, and those that cannot
    change are not made resident. Each pair is as of the moment when it is yielded.
    """
    keys = iter(keys)
    size, rest = WINDOW, list[Any]()
    while rest or (rest := list(islice(keys, WINDOW))):
        window, rest = rest[:size], rest[size:]
        seen, ledger = memory.seen, memory.ledger
        values, loose = _read_ahead(memory, ledger, window)
        size = min(2 * size, WINDOW)
        todo = iter(window)
        values.reverse()
        for key in todo:
            value = values.pop()  # nobody has it but who is handed it
            # Without a commit it is neither deleted, nor set, nor is there a transaction.
            same = memory.ledger is ledger and memory.head[1] == memory.seen == seen
            ahead = same and value is not MISSING and key in ledger.rows and key not in memory.inmem
            if ahead and (key not in loose or memory.hand_out(key, value, ledger, *loose[key])):
                yield key, value
                continue
            try:
                current = memory.peek(key)
            except KeyError:
                continue
            yield key, current
            if not same:  # what was read ahead may be history: the more often, the less is read
                left = [*todo]
                size, rest = min(2 * (len(window) - len(left)), WINDOW), left + rest


def _read_ahead(
    memory: Memory, ledger: Ledger, keys: list[Any]
) -> tuple[list[Any], dict[Any, tuple[int, int | None]]]:
    """Read values that lie in packs.

    Returns
    -------
    values : list
        With `MISSING` for all others.
    loose : dict
        For those that can change, their rows and their digests as loaded.
    """
    nothing = [MISSING] * len(keys)
    resident = sum(map(memory.inmem.__contains__, keys))
    if memory.reads_alone or memory.head[1] != memory.seen or 2 * resident > len(keys):
        return nothing, {}
    started = perf_counter()
    rows = list(map(ledger.rows.get, keys, repeat(UNSAVED)))
    streams = _packed(memory, ledger, rows)
    found = streams if all(streams) else [*filter(None, streams)]
    try:
        values = list(map(pickle.loads, found))
    except Exception:  # noqa: BLE001 -- a pickle raises anything; it is read alone next
        return nothing, {}
    memory.meter.read(len(found), sum(map(len, found)), perf_counter() - started)
    if found is not streams:
        loaded = iter(values)
        values = [next(loaded) if stream else MISSING for stream in streams]
    if not any_changeable(values):
        return values, {}
    some = [n for n, value in enumerate(values) if value is not MISSING and changeable(value)]
    found, its = [values[n] for n in some], [rows[n] for n in some]
    digests = memory.digests_as_loaded(ledger, found, its)
    return values, {keys[n]: (rows[n], d) for n, d in zip(some, digests, strict=True)}


def _packed(memory: Memory, ledger: Ledger, rows: list[int]) -> list[bytes]:
    """Return the streams of those of these rows whose values lie in packs; of others b"".

    They are read in the order in which they lie there.
    """
    if rows[0] >= 0 and rows == [*range(rows[0], rows[0] + len(rows))]:
        return _read_run(memory, ledger, range(rows[0], rows[-1] + 1))
    order = sorted(range(len(rows)), key=rows.__getitem__)  # rows come as their packs grow
    rows = [rows[n] for n in order]
    steps = enumerate(map(sub, rows[1:], rows), 1)
    streams: list[bytes] = []
    for end in [*(n for n, step in steps if step != 1 or rows[n] == 0), len(rows)]:
        streams += _read_run(memory, ledger, range(rows[len(streams)], rows[end - 1] + 1))
    found = dict(zip(order, streams, strict=True))
    return [found[n] for n in range(len(rows))]


def _read_run(memory: Memory, ledger: Ledger, rows: range) -> list[bytes]:
    """Read the streams of some rows in a row, at once where they lie end to end in a pack."""
    if rows[0] < 0:
        return [b""] * len(rows)
    span = ledger.span(rows)
    streams = span and memory.store.packs.read_span(*span)
    if streams is None and len(rows) > 1:
        half = len(rows) // 2
        return _read_run(memory, ledger, rows[:half]) + _read_run(memory, ledger, rows[half:])
    return streams or [b""]


def prefetch(
    memory: Memory, keys: Iterable[Any], open_many: OpenMany | None, tally: Tally | None = None
) -> None:
    """Read the values of `keys` into memory until the budget is used up; files in threads.

    Parameters
    ----------
    memory : Memory
    keys : iterable
    open_many : callable or None
    tally : Tally, optional
        Counts the values that are read, in this thread.

    Raises
    ------
    KeyError
        If there is no such key.
    """
    wanted = _fitting(memory, keys)
    if tally is not None:
        tally.begin(len(wanted))
    packs = memory.ledger.packs
    alone = memory.is_waited_for() or memory.options.on_miss is not None
    here = [key for key, entry in wanted if alone or entry.file in packs]
    wanted = [(key, entry) for key, entry in wanted if not alone and entry.file not in packs]
    _fetch_each(memory, iter(here), None if tally is None else tally.step)
    if open_many is None:
        _fetch_in_threads(memory, [key for key, _ in wanted], tally)
    while open_many is not None and (batch := wanted[:MAX_OPEN_FILES]):
        del wanted[:MAX_OPEN_FILES]
        _fetch_opened(memory, batch, open_many)
        if tally is not None:
            tally.reach(tally.done + len(batch))
    if tally is not None:
        tally.finish()


def _fetch_opened(memory: Memory, batch: list[tuple[Any, Entry]], open_many: OpenMany) -> None:
    """Read values of files that are opened together."""
    paths = [memory.store.directory.full_path(entry.file) for _, entry in batch]
    try:
        for path in paths:
            demand_file(path)
        with open_many(paths, mode="rb") as files:
            for (key, entry), file in zip(batch, files, strict=True):
                if memory.options.on_miss is not None:
                    memory.options.on_miss(key)
                memory.offer(key, entry, *memory.read(key, entry, file))
    except (FileNotFoundError, CorruptValueError):  # damaged, or replaced meanwhile
        _fetch_each(memory, iter([key for key, _ in batch]))


def _fetch_in_threads(memory: Memory, keys: list[Any], tally: Tally | None) -> None:
    """Read values in threads of their own; raise the first error of theirs.

    The threads are no pool of `concurrent.futures`: an interrupt can leave that waiting for ever.
    """
    todo = iter(keys)
    errors: list[BaseException] = []
    read: list[None] = []  # one for each value: who is told shall be so in the thread that asked
    note = None if tally is None else partial(read.append, None)
    work = partial(_fetch_or_stop, memory, todo, errors, note)
    threads = [Thread(target=work, daemon=True) for _ in range(min(THREADS, len(keys)))]
    try:
        for thread in threads:
            thread.start()
        _wait(threads, read, tally)
    finally:
        deque(todo, maxlen=0)  # they stop where an interrupt came
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]


def _wait(threads: list[Thread], read: list[None], tally: Tally | None) -> None:
    before = 0 if tally is None else tally.done
    for thread in threads:
        while tally is not None and thread.is_alive():
            thread.join(BEAT)
            tally.reach(before + len(read))
        thread.join()


def _fetch_each(
    memory: Memory, keys: Iterator[Any], note: Callable[[], object] | None = None
) -> None:
    """Read values; `note` is called after each."""
    for key in keys:
        try:
            memory.fetch(key, uses=1)
        except KeyError:
            if memory.has(key):  # then a hook raised it, and the key was not deleted meanwhile
                raise
        if note is not None:
            note()


def _fetch_or_stop(
    memory: Memory,
    todo: Iterator[Any],
    errors: list[BaseException],
    note: Callable[[], object] | None,
) -> None:
    try:
        _fetch_each(memory, todo, note)
    except BaseException as error:  # noqa: BLE001 -- whatever it is, `_fetch_in_threads` raises it
        errors.append(error)
        deque(todo, maxlen=0)
    finally:
        memory.open_hand()


def _fitting(memory: Memory, keys: Iterable[Any]) -> list[tuple[Any, Entry]]:
    """Return the keys that have to be read, with their entries, as far as they fit."""
    chosen = []
    room = memory.available
    for key in keys:
        with memory.lock:
            memory.begin()
            row = memory.ledger.rows[key]
            if row < 0 or memory.in_memory(key) is not MISSING:
                continue
            entry = memory.ledger.entry(row)
        room -= entry.length
        if room < 0:
            break
        chosen.append((key, entry))
    return chosen


def link(memory: Memory, other: Memory, overwrite: bool, tally: Tally | None = None) -> None:
    """Take over the values of another chest as they lie on its disk, without loading one."""
    if memory is other:
        return
    with suppress(UnsavedError):  # those are set below, as the objects that they are
        other.flush()
    with memory.lock:
        memory.begin("update the chest")
    with other.lock:
        other.ledger.sort()
        every = list(other.ledger.rows)
    if tally is not None:
        tally.begin(len(every))
    keys = iter(every)
    while batch := list(islice(keys, LINKS)):
        wanted = [key for key in batch if overwrite or not memory.has(key)]
        _link_batch(memory, other, wanted, overwrite)
        if tally is not None:
            tally.reach(tally.done + len(batch))


def _link_batch(memory: Memory, other: Memory, keys: list[Any], overwrite: bool) -> None:
    batch = Batch(memory.store.directory)
    streams = _streams(other, keys)
    try:
        for key in keys:
            if key in streams:
                batch.add([key], [streams[key]])
                memory.store.write_like(other.store)
            elif not _stage(memory, other, key, batch):
                # First those that come before in the order.
                memory.adopt(batch, keys, overwrite=overwrite)
                batch.discard()
                with suppress(KeyError):
                    _set(memory, key, other.fetch(key), overwrite)
        memory.adopt(batch, keys, overwrite=overwrite)
    finally:
        batch.discard()


def _streams(other: Memory, keys: list[Any]) -> dict[Any, bytes]:
    """Return the streams of those values of another chest that lie in packs, as of its disk."""
    with other.lock:
        other.begin()
        ledger = other.ledger
        packed = [*filter(ledger.is_packed, keys)]
        rows = [ledger.rows[key] for key in packed]
    streams = _packed(other, ledger, rows) if packed else []
    with other.lock:
        other.begin()
        found = zip(packed, rows, streams, strict=True) if other.ledger is ledger else ()
        now, dirty = ledger.rows, other.dirty
        # The others were replaced meanwhile, or are not on disk: they are looked at one by one.
        return {k: data for k, row, data in found if data and now.get(k) == row and k not in dirty}


def _set(memory: Memory, key: Any, value: Any, overwrite: bool) -> None:
    with memory.lock:
        if overwrite or not memory.has(key):
            memory.set(key, value)


def _stage(memory: Memory, other: Memory, key: Any, batch: Batch) -> bool:
    """Stage a value as the other chest's disk holds it; tell whether that was possible."""
    with other.lock:
        row = other.ledger.rows.get(key, UNSAVED)
        if row < 0 or key in other.dirty:
            return False
        entry = other.ledger.entry(row)
        packed = other.ledger.is_packed(key)
    try:
        if packed:
            stream = other.store.stream(key, entry)
        else:
            batch.files[key] = memory.store.stage_link(other.store, entry)
    except (OSError, CorruptValueError):
        return False  # replaced meanwhile, or damaged: getting the value tells
    with other.lock:
        other.begin()
        row = other.ledger.rows.get(key, UNSAVED)
        same = row >= 0 and other.ledger.entry(row) == entry
        same = same and (packed or _is_as_named(memory, batch.files[key], other, entry))
    if same and packed:
        batch.add([key], [stream])
        memory.store.write_like(other.store)
    elif not same:
        batch.remove([key])  # that name may be another value's by now
    return same


def _is_as_named(memory: Memory, staged: Staged, other: Memory, entry: Entry) -> bool:
    """Tell whether what was linked is what the entry names: it may have been replaced, and back."""
    try:
        source = other.store.directory.full_path(entry.file)
        if os.path.samefile(source, staged.path):
            return True
        return memory.serializer.measure(staged.path) == (entry.length, entry.digest)
    except Exception:  # noqa: BLE001 -- gone, or no stream: then it is got as a value
        return False
