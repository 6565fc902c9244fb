"""What must leave memory, and when to commit.

Writing happens under the lock, in the thread that overfills the chest: that is the back-pressure.
What cannot be written stays in memory, and is counted there.
"""

from __future__ import annotations

import errno
import logging
import math
import operator
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import compress, filterfalse, repeat
from typing import Any

from chest.columns import all_plain, is_plain
from chest.errors import ChestClosedError, KeyTypeError, ReadOnlyError, UnsavedError, say, show
from chest.hands import Hands
from chest.ledger import UNSAVED
from chest.options import Options
from chest.packs import MANY, PACKED
from chest.processes import keep_until_end
from chest.residents import MISSING, STEP, TRIES, Closed, Residents
from chest.serialize import Serializer, UndumpableError, changeable, storing
from chest.staging import Batch
from chest.store import Store, told

logger = logging.getLogger("chest")

LAST_WAIT = 1.0  # seconds to wait at the end of the program for a transaction to end
SLACK = 16  # one part in so many of the budget is made free at a time
WRITE_STEP = 1 << 20  # bytes written at a time beyond what must be, so that no set stalls


class Memory(Residents):
    """The values in memory, with their way to the disk."""

    def set(self, key: Hashable, value: Any) -> None:
        """Store a value, and make room if it takes too much."""
        size = self.measure(value)
        if type(key) is str and not changeable(value) and self._add(key, value, size):
            return
        with self.lock, self:
            self.begin("set a value")
            self.put(key, value, size)
            self.make_room(key)

    def make_room(self, key: Hashable | None = None) -> None:
        """Spill until the values in memory take no more than the budget.

        Parameters
        ----------
        key : hashable, optional
            If its value alone takes more than the budget, that leaves first.

        Raises
        ------
        OSError
            If the disk refuses; what could not be written stays in memory.
        """
        with self.lock, self:
            self._spill(key)

    # Loops are not where the lock is taken: CPython 3.12 and 3.13 leave some backward jumps out of
    # a `with`, so that an interrupt would leave the lock held.

    def _spill(self, key: Hashable | None) -> None:
        if key in self.eviction and self.eviction.size(key) > self.available:
            self._report(self._evict([key]))
        while self.eviction.total > self.available:
            keys = self._choose()
            if not keys:
                return
            self._report(self._evict(keys))

    def _choose(self) -> list[Any]:
        """Return the keys that should leave next, for some slack more than must be."""
        chosen: list[Any] = []
        over = self.eviction.total - self.available
        slack = self.available / SLACK
        freed = written = 0
        while freed < over or (freed < over + slack and written < WRITE_STEP):
            sizes = self.eviction.cheapest()
            if not sizes:
                break
            chosen += sizes
            freed += sum(sizes.values())
            if self.dirty:
                written += sum(compress(sizes.values(), map(self.dirty.__contains__, sizes)))
        return chosen

    def _evict(self, keys: list[Any]) -> dict[Any, Exception]:
        """Let resident values go; return those that cannot be written, which stay."""
        with self._hands.pinned():  # hooks may take other values in hand
            return self._evict_pinned(keys)

    def _evict_pinned(self, keys: list[Any]) -> dict[Any, Exception]:
        if not self._loose and not self.dirty and self.options.on_overflow is None:
            self._let_go(keys)
            return {}
        held = [*filter(self._loose.__contains__, keys)] if self._loose else []
        for key in held:  # before they are dumped: from now on each hand that lets go of it tells
            self._hands.leave(key, self.inmem[key], soon=True)
        try:
            changed = {key for key in held if self._must_write(key)}
            unsaved = self._save([k for k in keys if k in self.dirty or k in changed], stop=True)
        except BaseException:
            self.eviction.stay(key for key in keys if key in self.eviction)
            self._stay_in_hand(held)
            raise
        unsaved = {key: error for key, error in unsaved.items() if key in self.dirty}
        for key in unsaved:
            self.eviction.set_aside(key, self.eviction.discard(key))
        clean = [*filterfalse(self.dirty.__contains__, filter(self.inmem.__contains__, keys))]
        self._let_go([*filterfalse(self._loose.__contains__, clean)] if held else clean)
        for key in held:
            if key in self.inmem and key not in self.dirty:
                self._let_go_of(key)
        left = filter(self.inmem.__contains__, keys)
        self.eviction.stay([*filterfalse(unsaved.__contains__, left)])
        self._stay_in_hand(held)
        if self.options.on_overflow is not None:
            for key in keys:
                if key not in unsaved:
                    self.options.on_overflow(key)
        return unsaved

    def _let_go(self, keys: list[Any]) -> None:
        """Let go of values that cannot change, all in a few steps."""
        kinds = {*map(type, map(self.inmem.__getitem__, keys))}
        if any(kind.__weakrefoffset__ for kind in kinds):
            for key in keys:
                self._let_go_of(key)
            return
        hits = {} if self._fixed is self.inmem else self._fixed
        for part in (hits, self._fresh, self.inmem, self._touched, self._as_loaded):
            if part:
                deque(map(part.pop, keys, repeat(None)), maxlen=0)
        self.eviction.discard_all(keys)

    def _let_go_of(self, key: Hashable) -> None:
        value = self.inmem[key]
        self._leave(key)
        self._hands.leave(key, value)  # once more: it may have been handed out meanwhile
        if self._as_loaded and not self._hands.knows(key):
            self._as_loaded.pop(key, None)

    def _stay_in_hand(self, keys: list[Any]) -> None:
        for key in keys:
            if key in self.inmem:
                self._hands.forget(key)

    def move_to_disk(self, key: Hashable) -> None:
        """Write a value if need be, and let it go from memory.

        Raises
        ------
        KeyError
            If there is no such key.
        UnsavedError
            If it cannot be written.
        OSError
            If the disk refuses.
        """
        with self.lock, self:
            self.begin()
            if key not in self.ledger.rows:
                raise KeyError(key)
            if key in self.inmem:
                unsaved = self._evict([key])
                if unsaved:
                    raise UnsavedError([*unsaved], [*unsaved.values()])

    def flush(self) -> None:
        """Write every value that the disk does not hold, and commit; values stay in memory.

        Raises
        ------
        UnsavedError
            Naming every key that could not be saved; all others are.
        """
        with self.lock, self:
            self.begin()
            if not self.readonly:
                self._flush()

    def _flush(self) -> None:
        self._settle(self._hands.open_ended())
        self._revive_changed()
        unsaved = self._save([*self.dirty], stop=False)
        unsaved = {key: error for key, error in unsaved.items() if key in self.dirty}
        self.eviction.stay(key for key in self.eviction.aside() if key not in unsaved)
        if unsaved:
            raise UnsavedError([*unsaved], [*unsaved.values()])
        self.make_room()

    def commit_deletions(self) -> None:
        """Commit what was deleted, without writing a value."""
        with self.lock, self:
            self.begin("write the index")
            if self.ledger.pending:
                self._commit(Batch(self.store.directory), {})

    def _save(self, keys: list[Any], *, stop: bool) -> dict[Any, Exception]:
        """Write values and commit; return those that cannot be written, with the reasons.

        With `stop`, the first refusal of the disk is raised and nothing is committed; without it
        it counts as a reason like others.
        """
        if not keys and not self.ledger.pending:
            return {}
        try:
            batch = Batch(self.store.directory)
        except OSError as error:  # a temporary directory cannot be made
            if stop:
                raise
            return dict.fromkeys(keys, error)
        values: dict[Any, Any] = {}
        unsaved: dict[Any, Exception] = {}
        try:
            self._stage(keys, batch, values, unsaved, stop)
            staged = batch.keys()
            try:
                self._commit_or_stage_again(batch, values, unsaved, stop)
            except OSError as error:
                if stop or not staged:
                    raise
                unsaved.update(dict.fromkeys(staged, error))
        finally:
            batch.discard()
        return unsaved

    def _commit_or_stage_again(
        self, batch: Batch, values: dict[Any, Any], unsaved: dict[Any, Exception], stop: bool
    ) -> None:
        """Commit; staging files that somebody took for abandoned are written again, once."""
        try:
            self._commit(batch, values)
        except FileNotFoundError:
            staged = batch.keys()
            batch.discard()
            self._stage(staged, batch, values, unsaved, stop)
            self._commit(batch, values)

    def _stage(
        self,
        keys: list[Any],
        batch: Batch,
        values: dict[Any, Any],
        unsaved: dict[Any, Exception],
        stop: bool,
    ) -> None:
        """Dump values to where a commit takes them from, so many at a time."""
        for start in range(0, len(keys), STEP):
            # What is not resident was deleted or spilled by what was pickled before.
            step = [*filter(self.inmem.__contains__, keys[start : start + STEP])]
            values.update(zip(step, map(self.inmem.__getitem__, step), strict=True))
            if not all_plain(step):
                step = [key for key in step if _is_storable(key, unsaved)]
            streams = self._streams(step, values)
            if not _all_small(streams.values()):
                small = {}
                for key, stream in streams.items():
                    if isinstance(stream, UndumpableError):
                        unsaved[key] = stream.cause
                    elif stream and len(stream) <= PACKED:
                        small[key] = stream
                    else:
                        self._stage_alone(key, values[key], stream, batch, unsaved, stop)
                streams = small
            try:
                batch.add([*streams], [*streams.values()])
            except OSError as error:
                if stop:
                    raise told(error, self.store.directory.path, STEP * PACKED) from error
                unsaved.update(dict.fromkeys(streams, error))
        if len(batch) < MANY:
            for key in [key for key in batch.streams if not self.ledger.is_packed(key)]:
                stream = batch.streams.pop(key)
                self._stage_alone(key, values[key], stream, batch, unsaved, stop)

    def _streams(self, keys: list[Any], values: dict[Any, Any]) -> dict[Any, Any]:
        """Dump values: what comes of the small ones, None for those that need a file."""
        if not self.serializer.packs:
            return dict.fromkeys(keys)
        small = self.eviction.small(keys)
        dumped = self.serializer.dumps_all([*map(values.__getitem__, small)])
        streams = dict(zip(small, dumped, strict=True))
        return streams if small is keys else {key: streams.get(key) for key in keys}

    def _stage_alone(
        self,
        key: Hashable,
        value: Any,
        stream: bytes | None,
        batch: Batch,
        unsaved: dict[Any, Exception],
        stop: bool,
    ) -> None:
        """Stage a value in a file of its own."""
        try:
            if stream is None:
                batch.files[key] = self.store.stage(value, self.eviction.size(key))
            else:
                batch.files[key] = self.store.stage_stream(stream)
        except UndumpableError as error:
            unsaved[key] = error.cause
        except OSError as error:
            if stop:
                raise
            unsaved[key] = error

    def _commit(self, batch: Batch, values: dict[Any, Any]) -> None:
        """Publish staged values, and what was deleted."""
        if not batch and not self.ledger.pending:
            return  # nothing could be staged
        store = self.store
        with store.writing():
            self._absorb()
            # What a hook replaced or deleted meanwhile is history.
            same = all(map(operator.is_, map(self.inmem.get, values), values.values()))
            if not same or not values.keys() <= self.dirty.keys():
                get, dirty = self.inmem.get, self.dirty
                batch.remove({k for k, v in values.items() if get(k) is not v or k not in dirty})
            store.commit(batch)
            self._look(store)
            saved = batch.keys()
            if self._as_loaded:
                deque(map(self._as_loaded.pop, saved, repeat(None)), maxlen=0)
            deque(map(self.dirty.pop, saved), maxlen=0)
            if not self.dirty:
                self.dirty.clear()  # a dict that was large takes long to be looked through
            store.tidy()
            self._look(store)
        logger.debug("committed %d values to %s", len(saved), self.path)

    def adopt(self, batch: Batch, *, overwrite: bool) -> None:
        """Publish streams that are not from values in memory, in place of what the keys held."""
        if batch:
            with self.lock, self:
                self._adopt(batch, overwrite)

    def _adopt(self, batch: Batch, overwrite: bool) -> None:
        store = self.store
        added: list[Any] = []
        try:
            with store.writing():
                self._absorb()
                if not overwrite:
                    batch.remove(self.ledger.rows.keys() & batch.keys())
                keys = batch.keys()
                for key in keys:
                    if key not in self.ledger.rows:
                        self.ledger.add(key)
                        added.append(key)
                store.commit(batch)
                self._look(store)
                for key in keys:
                    self._forget(key)
                store.tidy()
                self._look(store)
        except BaseException:
            for key in added:
                if self.ledger.rows.get(key, 0) < 0:
                    self.ledger.delete(key)
            raise

    def file_of(self, key: Hashable) -> str:
        """Return the path of the file of a key; a value in a pack gets one now.

        Raises
        ------
        ReadOnlyError
            If it would have to get one.
        CorruptValueError
            If what the pack holds is not as written.
        """
        with self.lock, self:
            self.begin()
            directory = self.store.directory
            row = self.ledger.rows.get(key, UNSAVED)
            if row < 0:
                return directory.full_path(directory.name_for(key))
            if self.ledger.is_packed(key):
                self._unpack(key)
                row = self.ledger.rows[key]
            return directory.full_path(self.ledger.entry(row).file)

    def _unpack(self, key: Hashable) -> None:
        if self.readonly:
            raise ReadOnlyError(str(self.path), "give a value a file of its own")
        store = self.store
        batch = Batch(store.directory)
        try:
            with store.writing():
                self._absorb()
                if self.ledger.is_packed(key):
                    stream = store.stream(key, self.ledger.entry(self.ledger.rows[key]))
                    batch.files[key] = store.stage_stream(stream)
                    store.commit(batch)
                    self._look(store)
                    store.tidy()
                    self._look(store)
        finally:
            batch.discard()

    # -- transactions ----------------------------------------------------------------------------

    @contextmanager
    def transaction(self, timeout: float | None) -> Iterator[None]:
        """Let the block have the directory for itself, and commit what it did, or nothing of it.

        Raises
        ------
        TimeoutError
            If others have it for longer than `timeout` seconds.
        UnsavedError
            If there is a value that cannot be written, before or after.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with self._lock_until(deadline):
            if self.in_transaction:  # part of the one around it
                yield
                return
            self.begin("start a transaction")
            store = self.store
            left = None if timeout is None else max(deadline - time.monotonic(), 0)
            try:
                with self, store.writing(left):
                    self._absorb()
                    self.flush()
                    try:
                        store.begin_transaction()
                        self._isolate(True)
                        yield
                        if store is self._store:  # not in a child that was forked meanwhile
                            self.flush()
                            store.end_transaction()
                            self._isolate(False)
                            store.tidy()
                            self._look(store)
                    except BaseException:
                        if store is self._store:
                            self._roll_back(store)
                        raise
            finally:
                self._give_up(store, torn=False)
            self._make_room()

    @contextmanager
    def _lock_until(self, deadline: float) -> Iterator[None]:
        lock = self.lock
        if deadline == math.inf:
            with lock:
                yield
            return
        seconds = min(max(deadline - time.monotonic(), 0), threading.TIMEOUT_MAX)
        try:
            if not lock.acquire(timeout=seconds):
                message = "another thread is using the chest, and did not end in time"
                raise TimeoutError(errno.ETIMEDOUT, message, self.path)
            yield
        finally:
            try:  # noqa: SIM105 -- no call before: interrupts come with calls
                lock.release()
            except RuntimeError:
                pass  # another thread has it

    def _isolate(self, isolate: bool) -> None:
        """Let no other thread see what is in memory, or all of them again."""
        self.in_transaction = isolate
        self._inside = set()
        if isolate:
            self.part()
        else:
            self._fixed.update(self._fresh)
            self._fresh = {}
        self._look(self.store)
        self.transactions += isolate  # last: who began to look before looks again

    def _roll_back(self, store: Store) -> None:
        """Take back what a transaction did, also in memory."""
        try:
            if self._torn:
                self._mend()
            # What another thread has in hand, it alone can have changed: nothing of the
            # transaction, and not to be lost.
            others = self._hands.of_others()
            theirs = {key for key, value in others if self.in_memory(key) is value} - self._inside
            for key in {*self.dirty, *self._changed_in_place()} - theirs:
                self._forget(key)
            store.roll_back()
            self._look(store)
            changed = self.ledger.changed
            for key in list(changed):
                value = self.in_memory(key)
                if key in theirs and value is not MISSING:
                    self._revive(key, value)
                else:
                    self._forget(key)
                del changed[key]
            self._isolate(False)
        except BaseException:
            self._give_up(store, torn=True)
            raise

    def _give_up(self, store: Store, *, torn: bool) -> None:
        """Begin anew if a roll-back was torn, or did not come: there is no half of one."""
        if store is self._store and (torn or self.in_transaction or store.in_transaction):
            store.close()
            self._start()

    def _changed_in_place(self) -> list[Any]:
        alive = {**dict(self._hands.alive()), **{key: self.inmem[key] for key in self._loose}}
        clean = ((key, value) for key, value in alive.items() if key not in self.dirty)
        return [k for k, value in clean if self._differs(k, value, self.ledger.digest(k))]

    def _refuse_in_transaction(self, action: str) -> None:
        if self.in_transaction:
            raise RuntimeError(f"cannot {action} inside a transaction: leave its block first")

    def _report(self, unsaved: dict[Any, Exception]) -> None:
        for key, error in unsaved.items():
            kinds = (type(self.inmem.get(key)), type(error))
            message = "the value of key %s stays in memory, it cannot be written: %s"
            self._say_once(kinds, message, show(key), say(error))

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Save what is not saved, or remove a temporary directory; then let go of everything.

        Raises
        ------
        UnsavedError
            Naming every key that could not be saved; the chest stays open.
        """
        with self.lock, self:
            if self.closed:
                self._end()  # what an interrupt left of that
                return
            self._refuse_in_transaction("close the chest")
            if self._is_temporary():
                self.drop()
                return
            if self._store is not None:  # else nothing was done since the process was forked
                self._flush_all()
            self._end()

    def _flush_all(self) -> None:
        self.flush()
        for _ in range(TRIES):
            if self.dirty or self.ledger.pending:  # a hook of the flush set something
                self.flush()

    def drop(self) -> None:
        """Remove the directory, but for files of others; then let go of everything."""
        with self.lock, self:
            if self.closed:
                raise ChestClosedError(self.path)
            if self.readonly:
                raise ReadOnlyError(str(self.path), "drop the chest")
            self._refuse_in_transaction("drop the chest")
            if self.path is not None and (self.options.path or self._owner == os.getpid()):
                self.store.drop()
            self._end()

    def _is_temporary(self) -> bool:
        """Tell whether the directory, if there is one, goes with this chest."""
        mine = self.path is None or (self._owner == os.getpid() and not self._lent)
        return self.options.path is None and mine

    def lend(self) -> str:
        """Save everything, so that another process can open the directory, and return its path.

        A temporary one stays from now on until this process ends.

        Raises
        ------
        TypeError
            If a temporary one would be stored in a chest, and be gone when that is opened again.
        UnsavedError
        """
        with self.lock:
            if self.closed and storing.active and self.options.path:
                return self.options.path  # no more than a reference
            if self.closed:
                raise ChestClosedError(self.path)
            if storing.active and self._is_temporary():
                raise TypeError("a temporary chest cannot be stored in a chest: give it a path")
            path = self.store.directory.path
            if self.serializer not in storing.active:  # else it is part of a value of its own
                self.flush()
            if self._is_temporary():
                options = replace(self.options, path=path)
                keep_until_end(path, partial(_drop, path, self.serializer, options))
                self._lent = True
            return path

    def finish(self) -> None:
        """Close when nobody can be told any more: at the end of the chest or of the program."""
        if self.closed:
            return
        try:
            if self.in_transaction:
                self._end_transaction()
            if not self._close_elsewhere():
                self.close()
        except KeyboardInterrupt:  # there is no other time
            self.close()
            raise
        except Exception as error:  # noqa: BLE001 -- nobody is left to catch it, so it is said
            if self._is_temporary() and self._store is not None:
                self._store.erase()
            message = "the chest at %s could not be closed: %s"
            logger.error(message, self.path, say(error))  # noqa: TRY400 -- one line, no traceback
            self._end()

    def _end_transaction(self) -> None:
        """Roll back a transaction whose block nobody leaves any more.

        Raises
        ------
        TimeoutError
            If it is that of a thread that the end of the program stopped.
        """
        with self._lock_until(time.monotonic() + LAST_WAIT):
            if self.in_transaction and self._store is not None:
                self._roll_back(self._store)
                self._store.index.release()

    def _close_elsewhere(self) -> bool:
        """Let another thread wait, where garbage is collected in the midst of another's commit."""
        waits = self._store is not None and self._store.index.held_here()
        if waits:
            threading.Thread(target=self.finish).start()
        return waits

    def _end(self) -> None:
        self.closed = True
        closed: Any = Closed(self.path)
        self.inmem = self._fixed = self.ledger = self.eviction = closed
        self.dirty, self._loose, self._hands = {}, {}, Hands()
        if self._store is not None:
            self._store.close()
            self._store = None
        self._torn = False
        self.head, self.seen = (0, 0), 0
        self.quick = (self.head, self.seen, closed, closed)

    # -- for tests -------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert every invariant."""
        with self.lock:
            self._check()

    def _check(self) -> None:
        rows = self.ledger.rows
        self.eviction.check(self.inmem)
        fixed = {key: id(value) for key, value in self.inmem.items() if not changeable(value)}
        assert {key: id(value) for key, value in self._fixed.items()} == fixed
        assert self._loose.keys() == self.inmem.keys() - fixed.keys()
        assert self.quick == (self.head, self.seen, self.quick[2], self.eviction.marks.add)
        assert self.quick[2] is self._fixed or self.in_transaction
        assert self.dirty.keys() <= self.inmem.keys(), "a dirty value is not resident"
        assert self.inmem.keys() <= rows.keys(), "a resident value has no key"
        unsaved = {key for key, row in rows.items() if row < 0}
        assert unsaved <= self.dirty.keys(), "a value is nowhere"
        self._hands.check(rows, self.inmem)
        self.ledger.check()
        if self._store is not None:
            self._store.check()


def _all_small(streams: Collection[Any]) -> bool:
    """Tell whether all of these may be in a pack."""
    sizes = map(len, streams) if {*map(type, streams)} == {bytes} else ()
    shortest, longest = (min(found), max(found)) if (found := [*sizes]) else (0, 0)
    return shortest > 0 and longest <= PACKED


def _is_storable(key: Hashable, unsaved: dict[Any, Exception]) -> bool:
    """Tell whether a key can be pickled and read back; if not, note why."""
    if not is_plain(key):
        try:
            pickle.loads(pickle.dumps(key, 5))
        except Exception as error:  # noqa: BLE001 -- whatever its class does
            unsaved[key] = KeyTypeError(key, f"its pickle fails: {error}")
            return False
    return True


def _drop(path: str, serializer: Serializer, options: Options) -> None:
    Store(path, serializer, options, reopen=True).drop()
