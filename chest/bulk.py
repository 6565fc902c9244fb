"""Many values at once: into memory, and from one chest to another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from itertools import islice
from typing import IO, Any

from chest.columns import Entry
from chest.directory import remove_quietly
from chest.errors import CorruptValueError, UnsavedError
from chest.ledger import UNSAVED
from chest.memory import Memory
from chest.residents import MISSING
from chest.store import Staged

MAX_OPEN_FILES = 512
THREADS = 8
LINKS = 1024  # values taken over in one commit

OpenMany = Callable[..., AbstractContextManager[Iterable[IO[Any]]]]


def prefetch(memory: Memory, keys: Iterable[Any], open_many: OpenMany | None) -> None:
    """Read the values of `keys` into memory, in threads, until the budget is used up.

    Raises
    ------
    KeyError
        If there is no such key.
    """
    wanted = _fitting(memory, keys)
    if memory.lock._is_owned():  # type: ignore[attr-defined]  # threads would wait for this one
        for key, _ in wanted:
            memory.fetch(key, uses=1)
        return
    if open_many is None:
        _read_in_threads(memory, wanted)
        return
    while batch := wanted[:MAX_OPEN_FILES]:
        del wanted[:MAX_OPEN_FILES]
        paths = [memory.store.directory.full_path(entry.file) for _, entry in batch]
        try:
            with open_many(paths, mode="rb") as files:
                for (key, entry), file in zip(batch, files, strict=True):
                    memory.offer(key, entry, memory.store.read(key, entry, file))
        except (FileNotFoundError, CorruptValueError):  # damaged, or replaced meanwhile
            for key, _ in batch:
                with suppress(KeyError):
                    memory.fetch(key)


def _read_in_threads(memory: Memory, wanted: list[tuple[Any, Entry]]) -> None:
    """Read in threads what this one takes in, which may hold the lock."""
    read = memory.store.read
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := wanted[: 4 * THREADS]:
            del wanted[: 4 * THREADS]
            loads = [pool.submit(read, key, entry) for key, entry in batch]
            for (key, entry), load in zip(batch, loads, strict=True):
                try:
                    memory.offer(key, entry, load.result())
                except CorruptValueError:
                    with suppress(KeyError):
                        memory.fetch(key)  # damaged, or replaced by another handle


def _fitting(memory: Memory, keys: Iterable[Any]) -> list[tuple[Any, Entry]]:
    """Return the keys that have to be read, with their entries, as far as they fit."""
    chosen = []
    room = memory.available
    for key in keys:
        with memory.lock:
            memory.begin()
            row = memory.ledger.rows[key]
            if row == UNSAVED or memory.in_memory(key) is not MISSING:
                continue
            entry = memory.ledger.entry(row)
        room -= entry.length
        if room < 0:
            break
        if memory.options.on_miss is not None:
            memory.options.on_miss(key)
        chosen.append((key, entry))
    return chosen


def link(memory: Memory, other: Memory, overwrite: bool) -> None:
    """Take over the values of another chest as they lie on its disk, without loading one."""
    if memory is other:
        return
    with suppress(UnsavedError):  # those are set below, as the objects that they are
        other.flush()
    with memory.lock:
        memory.begin("update the chest")
    with other.lock:
        other.ledger.sort()
        keys = iter(list(other.ledger.rows))
    while batch := list(islice(keys, LINKS)):
        wanted = [key for key in batch if overwrite or not memory.has(key)]
        _link_batch(memory, other, wanted, overwrite)


def _link_batch(memory: Memory, other: Memory, keys: list[Any], overwrite: bool) -> None:
    staged: dict[Any, Staged] = {}
    try:
        for key in keys:
            linked = _stage(memory, other, key)
            if linked is not None:
                staged[key] = linked
                continue
            memory.adopt(staged, overwrite=overwrite)  # first those that come before in the order
            staged.clear()
            with suppress(KeyError):
                value = other.fetch(key)
                with memory.lock:
                    if overwrite or not memory.has(key):
                        memory.set(key, value)
        memory.adopt(staged, overwrite=overwrite)
    finally:
        for linked in staged.values():  # gone if they were taken over
            remove_quietly(linked.path)


def _stage(memory: Memory, other: Memory, key: Any) -> Staged | None:
    with other.lock:
        row = other.ledger.rows.get(key, UNSAVED)
        if row == UNSAVED or key in other.dirty:
            return None
        entry = other.ledger.entry(row)
    try:
        linked = memory.store.stage_link(other.store, entry)
    except OSError:
        return None  # replaced meanwhile, or damaged: getting the value tells
    with other.lock:
        other.begin()
        row = other.ledger.rows.get(key, UNSAVED)
        if row != UNSAVED and other.ledger.entry(row) == entry:
            return linked
    remove_quietly(linked.path)  # that name may be another value's by now
    return None
