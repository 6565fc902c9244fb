"""`Chest`, a dictionary that spills to disk.

A chest is used like a dict. Values stay in memory until they take more than `available_memory`;
then the large and the cold ones are written to files in the directory of the chest, and read back
when they are asked for. A chest with a path is there again when it is opened the next time.

What is promised: a commit is all or nothing; a value that cannot be written stays in memory; a
value that is read is the one that was stored, or an error says that it is not; a value that you
hold on to stays the chest's own. What is not: a part of a list or dict that you hold on to while
other values are set or read is part of a copy by then, so get it again before you change it.
"""

from __future__ import annotations

import builtins
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from copy import deepcopy
from itertools import zip_longest
from operator import length_hint
from types import TracebackType
from typing import Any, Self, TypeVar, cast, overload
from uuid import uuid4

from chest.bulk import OpenMany, link, prefetch, stream
from chest.filenames import key_to_filename
from chest.memory import Memory
from chest.options import DEFAULT_AVAILABLE_MEMORY, Options, absolute, budget
from chest.processes import enlist
from chest.progress import Progress, Tally, counting, is_progress
from chest.reading import demand
from chest.serialize import Dump, Load, Open, Serializer, dump_pickle
from chest.sizes import nbytes
from chest.status import Status
from chest.views import ChestItems, ChestKeys, ChestValues

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
T = TypeVar("T")


_MISSING: Any = object()


class Chest(Status, MutableMapping[K, V]):
    """A dictionary that spills to disk.

    Parameters
    ----------
    data : mapping or iterable of pairs, optional
        What the chest holds at first; copied.
    path : str or path-like, optional
        The directory; made if need be, for the user alone. Without one the chest is temporary:
        its directory is made when a value first leaves memory, and removed with the chest.
    available_memory : float or str, optional
        How many bytes the values in memory may take; 1e9 if not given. As text with a unit, ``'2
        GB'`` or ``'500 MiB'``, or as a share of the memory of this machine or container, ``'25%'``.
    dump, load : callable, optional
        ``dump(obj, file)`` and ``load(file)``, as of pickle (the default, with protocol 5) or
        json; text or binary.
    key_to_filename : callable, optional
        Key to the name of its file, relative to the directory.
    on_miss, on_overflow : callable, optional
        Called with each key that is read from disk, or that left memory.
    open : callable, optional
        ``open(path, mode=...)`` for the value files, as ``gzip.open``.
    open_many : callable, optional
        ``open_many(paths, mode=...)``, a context manager that gives open files, for `prefetch`.
    mode : {'t', 'b'}, optional
        Whether `load` wants a text or a binary file; found out if not given.
    nbytes : callable, optional
        Value to its size in bytes.
    writeback : bool, optional
        Whether values may be changed in place. If False, only what is set is written, and values
        are not compared with what the disk holds when they leave memory.
    fsync : bool, optional
        Whether each commit survives a power cut, at the price of waiting for the disk.
    readonly : bool, optional
        Write nothing. A directory that cannot be written is opened so by itself.

    Attributes
    ----------
    inmem : dict
        The values in memory; to look at, not to change.
    lock : threading.RLock
        Held by whatever changes the chest.
    dump, load, open, open_many, mode
        As given.

    Raises
    ------
    OSError
        If the directory cannot be made or read.
    CorruptIndexError
        If its index cannot be read; nothing is changed then.
    ValueError
        If an option makes no sense.

    Notes
    -----
    Any number of threads may use a chest. Values in memory are got without a lock; each of the
    other operations is atomic. A chest that is pickled is flushed, and loads as a new chest on the
    same directory; in a forked child, each chest becomes such a new one.

    Methods by purpose:

    * a dict: all of its methods, in the order in which keys were first set
    * memory: `memory_usage`, `available_memory`, `inmem`, `shrink`, `move_to_disk`,
      `get_from_disk`, `prefetch`
    * disk: `path`, `key_to_filename`, `flush`, `write_keys`, `verify`, `compact`, `close`,
      `closed`, `drop`
    * several processes: `transaction`, `refresh`
    * what it does: `stats`, `reset_stats`
    * as the data of a worker of dask.distributed: `fast`, `slow`, `evict`, `spilled_total`,
      `cumulative_metrics`

    Examples
    --------
    >>> c = Chest(available_memory=1000)
    >>> c['x'] = list(range(1000))
    >>> c['x'][:3], c.memory_usage
    ([0, 1, 2], 0)
    """

    def __init__(
        self,
        data: Mapping[K, V] | Iterable[tuple[K, V]] | None = None,
        path: str | os.PathLike[str] | None = None,
        available_memory: float | str | None = DEFAULT_AVAILABLE_MEMORY,
        dump: Dump = dump_pickle,
        load: Load = pickle.load,
        key_to_filename: Callable[[Any], str] = key_to_filename,
        on_miss: Callable[[Any], object] | None = None,
        on_overflow: Callable[[Any], object] | None = None,
        open: Open = builtins.open,
        open_many: OpenMany | None = None,
        mode: str | None = None,
        *,
        nbytes: Callable[[Any], int] = nbytes,
        writeback: bool = True,
        fsync: bool = False,
        readonly: bool = False,
    ) -> None:
        if mode not in (None, "t", "b"):
            raise ValueError(f"mode is {mode!r}: it has to be 't', 'b' or None")
        if readonly and path is None:
            raise ValueError("readonly=True needs the path of the chest to read")
        self.dump = dump
        self.load = load
        self.open = open
        self.open_many = open_many
        self.mode = mode
        serializer = Serializer(dump, load, open, mode)
        options = Options(
            path=absolute(path),
            namer=key_to_filename,
            nbytes=nbytes,
            writeback=writeback,
            fsync=fsync,
            readonly=readonly,
            on_miss=on_miss,
            on_overflow=on_overflow,
        )
        self._memory = Memory(options, serializer, budget(available_memory))
        # Not __del__: this runs once, also at exit, and not when a value resurrects the chest.
        self._finalizer = weakref.finalize(self, self._memory.drop_open)
        self._finalizer.atexit = False  # see `chest.processes`
        enlist(self._memory)
        if data is not None:
            self.update(data)

    @classmethod
    def fromkeys(cls, iterable: Iterable[K], value: Any = None) -> Self:
        """Return a new temporary chest with keys from `iterable`, each with `value`."""
        new = cls()
        for key in iterable:
            new[key] = value
        return new

    # -- the mapping -----------------------------------------------------------------------------

    def __getitem__(self, key: K) -> V:
        head, seen, fixed, mark = self._memory.quick
        if head[1] == seen:
            try:
                value: V = fixed[key]
            except KeyError:
                pass
            else:
                mark(key)
                return value
        del head  # the traceback of what is raised from here on shall not keep the map open
        found: V = self._memory.get(key)
        return found

    def __setitem__(self, key: K, value: V) -> None:
        self._memory.set(key, value)

    def __delitem__(self, key: K) -> None:
        with self.lock:
            self._memory.begin_to_delete("delete a key")
            self._memory.delete(key)
            self._memory.end_deletion()

    def __contains__(self, key: object) -> bool:
        begun = self._memory.transactions
        found = key in self._rows
        if begun == self._memory.transactions and (found or self._memory.is_current()):
            return found
        return self._memory.has(key)

    def __len__(self) -> int:
        begun = self._memory.transactions
        size = len(self._rows)
        if begun == self._memory.transactions and self._memory.is_current():
            return size
        return len(self._in_order())

    def __iter__(self) -> Iterator[K]:
        return (key for key in self._in_order() if key in self)

    def __reversed__(self) -> Iterator[K]:
        return (key for key in reversed(self._in_order()) if key in self)

    def _in_order(self) -> list[K]:
        with self.lock:
            self._memory.begin()
            self._memory.ledger.sort()  # what others committed comes in another order
            return list(self._memory.ledger.rows)

    @property
    def _rows(self) -> dict[Any, int]:
        memory = self._memory
        if memory.head[1] != memory.seen:
            memory.catch_up()
        return memory.ledger.rows

    @overload
    def pop(self, key: K, /) -> V: ...
    @overload
    def pop(self, key: K, default: T, /) -> V | T: ...
    def pop(self, key: K, default: Any = _MISSING, /) -> Any:
        """Remove `key` and return its value, or `default` if there is no such key."""
        try:
            self[key]  # so that a read does not hold the lock
            with self.lock:
                return self._take(key)
        except KeyError:
            if default is _MISSING:
                raise
            return default

    def _take(self, key: Any, *, last: bool = False) -> Any:
        self._memory.begin_to_delete("pop a key")
        value = self[key]
        self._memory.delete(key, last=last)
        return value

    def popitem(self) -> tuple[K, V]:
        """Remove and return the pair whose key was set last.

        Raises
        ------
        KeyError
            If the chest is empty.
        """
        with self.lock:
            return self._pop_last()

    def _pop_last(self) -> tuple[K, V]:
        while (key := self._last()) is not _MISSING:
            try:
                return key, self._take(key, last=True)
            except KeyError:
                if key in self:  # a hook raised it, not another process that deleted the key
                    raise
        raise KeyError("popitem(): the chest is empty")

    def _last(self) -> Any:
        self._memory.begin_to_delete("pop a key")
        self._memory.ledger.sort()
        return next(reversed(self._memory.ledger.rows), _MISSING)

    def setdefault(self, key: K, default: Any = None) -> Any:
        """Return the value of `key`, which becomes `default` if there is no such key."""
        try:
            return self[key]
        except KeyError:
            with self.lock:
                try:
                    if key in self:
                        return self[key]  # set meanwhile
                except KeyError:
                    if key in self:
                        raise  # a hook raised it, not another process that deleted the key
                self[key] = default
                return default

    def clear(self) -> None:
        """Remove every key, without reading a value."""
        with self.lock:
            self._memory.begin("clear the chest")
            self._memory.clear()

    def update(self, other: Any = _MISSING, /, overwrite: bool = True, **more: Any) -> None:
        """Set the pairs of a mapping, an iterable of pairs or another chest, and keywords.

        Values of a chest with the same serializer are linked, or copied where that fails, file by
        file, and never loaded.

        Parameters
        ----------
        other : mapping, iterable of pairs, or Chest
        overwrite : bool
            Whether keys that are there already get the new value.
        progress : bool or callable, optional
            With `other`: True shows how far it is, with tqdm if that is installed. A callable is
            called with two numbers, of keys done and of keys in all: at the start, after each, or
            each 1,024 of a chest, and in the end. Not where `other` does not know its length.
        **more
            Further pairs; also `progress`, if it is anything else or there is no `other`.
        """
        progress = None
        if other is not _MISSING and is_progress(more.get("progress", _MISSING)):
            progress = more.pop("progress")
        with counting(progress, "update") as tally:
            if other is _MISSING:
                pass
            elif isinstance(other, Chest) and self._memory.stores_like(other._memory):
                link(self._memory, other._memory, overwrite, tally)
            else:
                if tally is not None:
                    tally.begin(length_hint(other))
                self._set_all(_pairs(other), overwrite, tally)
            if tally is not None:
                tally.finish()
        self._set_all(more.items(), overwrite)

    def _set_all(
        self, pairs: Iterable[tuple[Any, Any]], overwrite: bool, tally: Tally | None = None
    ) -> None:
        for key, value in pairs:
            if overwrite:
                self[key] = value
            else:
                self._set_if_new(key, value)
            if tally is not None:
                tally.step()

    def _set_if_new(self, key: Any, value: Any) -> None:
        with self.lock:
            if key not in self:
                self[key] = value

    def copy(self) -> Chest[K, V]:
        """Return a temporary chest with the same keys and values, and the same options."""
        new: Chest[K, V] = Chest(**self._arguments())
        new.update(self)
        return new

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Chest[K, V]:
        new: Chest[K, V] = Chest(**self._arguments())
        memo[id(self)] = new
        for key, value in self._stream(self._in_order()):
            new[deepcopy(key, memo)] = deepcopy(value, memo)
        return new

    def _arguments(self) -> dict[str, Any]:
        """Return what makes another chest like this one, elsewhere."""
        options = self._memory.options
        return {
            "available_memory": self.available_memory,
            "dump": self.dump,
            "load": self.load,
            "key_to_filename": options.namer,
            "on_miss": options.on_miss,
            "on_overflow": options.on_overflow,
            "open": self.open,
            "open_many": self.open_many,
            "mode": self.mode,
            "nbytes": options.nbytes,
            "writeback": options.writeback,
            "fsync": options.fsync,
        }

    def __or__(self, other: Any) -> Chest[Any, Any]:
        if not isinstance(other, Mapping):
            return NotImplemented
        new = self.copy()
        new.update(other)
        return new

    def __ror__(self, other: Any) -> Chest[Any, Any]:
        if not isinstance(other, Mapping):
            return NotImplemented
        new = self.copy()
        new.clear()
        new.update(other)
        new.update(self)
        return new

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        if len(self) != len(other):
            return False
        keys = self._in_order()
        theirs = other._stream(keys) if isinstance(other, Chest) else _pairs_of(other, keys)
        both = zip_longest(self._stream(keys), theirs, fillvalue=(_MISSING, _MISSING))
        for (key, value), (same, its) in both:
            if same is not key or not (its is value or its == value):
                return False
        return True

    __hash__ = None  # type: ignore[assignment]  # unhashable as a dict; object's is a method

    # -- views -----------------------------------------------------------------------------------

    def keys(self) -> ChestKeys[K]:
        """Return a view of the keys."""
        return ChestKeys(self)

    def values(self) -> ChestValues[V]:
        """Return a view of the values; iterating pushes nothing out of memory.

        Change a value before you take the next: where it does not fit in memory, it is a copy then.
        """
        return ChestValues(self)

    def items(self) -> ChestItems[K, V]:
        """Return a view of the pairs; iterating pushes nothing out of memory.

        Change a value before you take the next: where it does not fit in memory, it is a copy then.
        """
        return ChestItems(self)

    def _stream(self, keys: Iterable[K]) -> Iterator[tuple[K, V]]:
        """Yield the pairs of those `keys` that are there, pushing nothing out of memory."""
        return stream(self._memory, keys, self)

    # -- memory ----------------------------------------------------------------------------------

    @property
    def inmem(self) -> dict[K, V]:
        """The values in memory; to look at, not to change."""
        with self.lock:
            self._memory.part()
            return self._memory.inmem

    @property
    def lock(self) -> threading.RLock:
        """The lock that whatever changes the chest holds."""
        return self._memory.lock

    @property
    def memory_usage(self) -> int:
        """How many bytes the values in memory take."""
        return self._memory.eviction.total

    @property
    def available_memory(self) -> float:
        """How many bytes they may take; what is too much when it is set leaves at once."""
        return self._memory.available

    @available_memory.setter
    def available_memory(self, available: float | str | None) -> None:
        with self.lock:
            amount = budget(available)
            self._memory.set_budget(amount)
            self._memory.make_room()

    def shrink(self) -> None:
        """Spill until the values in memory take no more than `available_memory`.

        Raises
        ------
        OSError
            If the disk refuses; what could not be written stays in memory.
        """
        self._memory.make_room()

    def move_to_disk(self, key: K) -> None:
        """Write the value of `key` if need be, and let it go from memory.

        Raises
        ------
        KeyError
            If there is no such key.
        UnsavedError
            If the value cannot be written.
        OSError
            If the disk refuses.
        """
        self._memory.move_to_disk(key)

    def get_from_disk(self, key: K) -> None:
        """Read the value of `key` into memory, if it is not there and fits.

        Raises
        ------
        KeyError
            If there is no such key.
        """
        self._memory.fetch(key)

    def prefetch(self, keys: K | Iterable[K], *, progress: Progress = None) -> None:
        """Read values into memory, in threads, until the budget is used up.

        Parameters
        ----------
        keys : a key, or an iterable of keys
        progress : bool or callable, optional
            True shows how far it is, with tqdm if that is installed. A callable is called with two
            numbers, of keys done and of keys in all that are to be read: at the start, in the end,
            and in between after each value, or ten times a second while threads read.

        Raises
        ------
        KeyError
            If there is no such key.
        """
        one = not isinstance(keys, Iterable) or isinstance(keys, (str, bytes))
        if one or (isinstance(keys, Hashable) and keys in self):
            keys = [cast(K, keys)]
        with counting(progress, "prefetch") as tally:
            prefetch(self._memory, cast(Iterable[K], keys), self.open_many, tally)

    # -- disk ------------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """The directory; that of a temporary chest is made when this is asked for."""
        with self.lock:
            if self._memory.closed:
                return str(self._memory.path)
            return self._memory.store.directory.path

    def key_to_filename(self, key: K) -> str:
        """Return the path of the file that holds, or that will hold, the value of `key`.

        A value that shares a file with others gets one of its own.

        Raises
        ------
        ReadOnlyError
            If it would have to get one, and the chest is read-only.
        OSError
            If the disk refuses.
        """
        return self._memory.file_of(key)

    def flush(self, *, progress: Progress = None) -> None:
        """Write every value that the disk does not hold yet, and commit; values stay in memory.

        Parameters
        ----------
        progress : bool or callable, optional
            True shows how far it is, with tqdm if that is installed. A callable is called with two
            numbers, of keys done and of keys in all whose values are to be written: at the start,
            after each value that has a file of its own, after each thousand of small ones, and
            when all is committed. It may use the chest. What it raises ends the flush: before the
            commit nothing of it counts, and all stays in memory.

        Raises
        ------
        UnsavedError
            Naming every key that could not be saved; all others are.
        """
        with counting(progress, "flush") as tally:
            self._memory.flush(tally)

    def write_keys(self) -> None:
        """Commit deletions without writing values; what was spilled is committed already."""
        self._memory.commit_deletions()

    def refresh(self) -> None:
        """Take in what other processes committed.

        Every operation does so by itself. This is for file systems of other machines, where the
        news may come late.
        """
        self._memory.refresh()

    def transaction(self, timeout: float | None = None) -> AbstractContextManager[None]:
        """Let a ``with`` block have the directory for itself: all that it does counts, or nothing.

        What is not saved yet is committed first, and what others committed is taken in. No other
        process or thread can write until the end of the block. Then its changes are committed
        together; an exception takes them back, in memory too. A transaction inside another one is
        part of it. What spills inside takes room on disk, so the work may be larger than memory.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for others at most.

        Raises
        ------
        TimeoutError
            If others write, or are in a transaction, for longer.
        UnsavedError
            If a value cannot be written: at the start nothing is done, at the end all is taken
            back.
        OSError
            If the disk refuses; all is taken back.

        Notes
        -----
        Threads that use the chest meanwhile wait, as do those that write to its directory through
        another `Chest`: so do not wait for them inside the block. With ``writeback=True`` every
        list, dict and array in memory is compared with the disk at the start and at the end.

        Examples
        --------
        >>> c = Chest({'balance': 100})
        >>> with c.transaction():
        ...     c['balance'] -= 30
        >>> c['balance']
        70
        """
        return self._memory.transaction(timeout)

    @property
    def closed(self) -> bool:
        """Whether the chest was closed or dropped."""
        return self._memory.closed

    def close(self) -> None:
        """Save everything and let go of it; a temporary chest is removed instead.

        Raises
        ------
        UnsavedError
            Naming every key that could not be saved; all others are, and the chest stays open.
        """
        self._memory.close()
        self._finalizer.detach()

    def drop(self) -> None:
        """Remove the chest from disk, and close it; files that are not its own stay."""
        self._memory.drop()
        self._finalizer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> tuple[str, dict[str, Any], bool, dict[str, Any]]:
        path = self._memory.lend()
        own = {k: v for k, v in self.__dict__.items() if k not in ("_memory", "_finalizer")}
        return path, self._arguments(), self._memory.options.readonly, own

    def __setstate__(self, state: tuple[str, dict[str, Any], bool, dict[str, Any]]) -> None:
        path, arguments, readonly, own = state
        demand(path)
        Chest.__init__(self, path=path, readonly=readonly, **arguments)
        self.__dict__.update(own)

    def __dask_tokenize__(self) -> str:
        """Return what tells dask if it has met this content: never, for it may have changed."""
        return uuid4().hex

    def _check(self) -> None:
        """Assert every invariant, for tests."""
        self._memory.check()


def _pairs(other: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(other, Mapping):
        return other.items()
    if hasattr(other, "keys"):
        keys = other.keys()  # a mapping of somebody's own need not be iterable itself
        return ((key, other[key]) for key in keys)
    return ((key, value) for key, value in other)


def _pairs_of(mapping: Mapping[Any, Any], keys: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the pairs of those `keys` that are there."""
    for key in keys:
        value = mapping.get(key, _MISSING)
        if value is not _MISSING:
            yield key, value
