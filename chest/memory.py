"""What must leave memory, and when to commit.

Writing happens under the lock, in the thread that overfills the chest: that is the back-pressure.
What cannot be written stays in memory, and is counted there.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import pickle
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from chest.columns import is_plain
from chest.directory import remove_quietly
from chest.errors import ChestClosedError, KeyTypeError, ReadOnlyError, UnsavedError, say, show
from chest.hands import Hands
from chest.ledger import UNSAVED
from chest.options import Options
from chest.processes import keep_until_end
from chest.residents import MISSING, TRIES, Closed, Residents
from chest.serialize import Serializer, UndumpableError, changeable, storing
from chest.store import Staged, Store

logger = logging.getLogger("chest")

LAST_WAIT = 1.0  # seconds to wait at the end of the program for a transaction to end
SLACK = 16  # one part in so many of the budget is made free at a time
WRITE_STEP = 1 << 20  # bytes written at a time beyond what must be, so that no set stalls


class Memory(Residents):
    """The values in memory, with their way to the disk."""

    def set(self, key: Hashable, value: Any) -> None:
        """Store a value, and make room if it takes too much."""
        size = self.measure(value)
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
            keys = self.eviction.cheapest()
            if not keys:
                break
            chosen += keys
            for key in keys:
                size = self.eviction.size(key)
                freed += size
                if key in self.dirty:
                    written += size
        return chosen

    def _evict(self, keys: list[Any]) -> dict[Any, Exception]:
        """Let resident values go; return those that cannot be written, which stay."""
        with self._hands.pinned():  # hooks may take other values in hand
            return self._evict_pinned(keys)

    def _evict_pinned(self, keys: list[Any]) -> dict[Any, Exception]:
        held = [key for key in keys if key in self._loose]
        for key in held:  # before they are dumped: from now on each hand that lets go of it tells
            self._hands.leave(key, self.inmem[key], soon=True)
        try:
            unsaved = self._save([key for key in keys if self._must_write(key)], stop=True)
        except BaseException:
            self.eviction.stay(key for key in keys if key in self.eviction)
            self._stay_in_hand(held)
            raise
        unsaved = {key: error for key, error in unsaved.items() if key in self.dirty}
        for key in keys:
            if key in unsaved:
                self.eviction.set_aside(key, self.eviction.discard(key))
            elif key in self.inmem and key not in self.dirty:
                value = self.inmem[key]
                self._leave(key)
                self._hands.leave(key, value)  # once more: it may have been handed out meanwhile
                if self._as_loaded and not self._hands.knows(key):
                    self._as_loaded.pop(key, None)
            elif key in self.inmem:
                self.eviction.stay([key])
        self._stay_in_hand(held)
        if self.options.on_overflow is not None:
            for key in keys:
                if key not in unsaved:
                    self.options.on_overflow(key)
        return unsaved

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
            self._commit({}, {})

    def _save(self, keys: list[Any], *, stop: bool) -> dict[Any, Exception]:
        """Write values and commit; return those that cannot be written, with the reasons.

        With `stop`, the first refusal of the disk is raised and nothing is committed; without it
        it counts as a reason like others.
        """
        staged: dict[Any, Staged] = {}
        values: dict[Any, Any] = {}
        unsaved: dict[Any, Exception] = {}
        try:
            for key in keys:
                if key not in self.inmem:
                    continue  # what was pickled before it deleted or spilled it
                try:
                    values[key] = self.inmem[key]
                    staged[key] = self._stage(key, values[key])
                except UndumpableError as error:
                    unsaved[key] = error.cause
                except OSError as error:
                    if stop:
                        raise
                    unsaved[key] = error
            try:
                self._commit_or_stage_again(staged, values)
            except OSError as error:
                if stop or not staged:
                    raise
                unsaved.update(dict.fromkeys(staged, error))
        finally:
            for key, value in staged.items():
                if key in unsaved or key in self.dirty:
                    remove_quietly(value.path)
        return unsaved

    def _stage(self, key: Hashable, value: Any) -> Staged:
        if not is_plain(key):
            try:
                pickle.loads(pickle.dumps(key, 5))
            except Exception as error:
                raise UndumpableError(KeyTypeError(key, f"its pickle fails: {error}")) from error
        return self.store.stage(value, self.eviction.size(key))

    def _commit_or_stage_again(self, staged: dict[Any, Staged], values: dict[Any, Any]) -> None:
        """Commit; staging files that somebody took for abandoned are written again, once."""
        try:
            self._commit(staged, values)
        except FileNotFoundError:
            for key, value in staged.items():
                remove_quietly(value.path)
                staged[key] = self._stage(key, values[key])
            self._commit(staged, values)

    def _commit(self, staged: dict[Any, Staged], values: dict[Any, Any]) -> None:
        """Publish staged values, and what was deleted."""
        if not staged and not self.ledger.pending:
            return
        store = self.store
        with store.writing():
            self._absorb()
            for key in list(staged):
                if key not in self.dirty or self.inmem.get(key) is not values[key]:
                    remove_quietly(staged.pop(key).path)  # a hook replaced or deleted it meanwhile
            store.commit(staged)
            self._look(store)
            for key in staged:
                self._as_loaded.pop(key, None)
                del self.dirty[key]
            store.tidy()
            self._look(store)
        logger.debug("committed %d values to %s", len(staged), self.path)

    def adopt(self, staged: dict[Any, Staged], *, overwrite: bool) -> None:
        """Publish files that are not from values in memory, in place of what the keys held."""
        if staged:
            with self.lock, self:
                self._adopt(staged, overwrite)

    def _adopt(self, staged: dict[Any, Staged], overwrite: bool) -> None:
        store = self.store
        added: list[Any] = []
        try:
            with store.writing():
                self._absorb()
                if not overwrite:
                    for key in self.ledger.rows.keys() & staged.keys():
                        remove_quietly(staged.pop(key).path)
                for key in staged:
                    if key not in self.ledger.rows:
                        self.ledger.add(key)
                        added.append(key)
                store.commit(staged)
                self._look(store)
                for key in staged:
                    self._forget(key)
                store.tidy()
                self._look(store)
        except BaseException:
            for key in added:
                if self.ledger.rows.get(key) == UNSAVED:
                    self.ledger.delete(key)
            raise

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
        if not isolate:
            self._fixed.update(self._fresh)
            self._fresh = {}
        self.fixed = {} if isolate else self._fixed
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
        self.inmem = self.fixed = self._fixed = self.ledger = self.eviction = self.mark = closed
        self.dirty, self._loose, self._hands = {}, {}, Hands()
        if self._store is not None:
            self._store.close()
            self._store = None
        self._torn = False
        self.head, self.seen = (0, 0), 0

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
        assert self.fixed is self._fixed or self.in_transaction
        assert self.dirty.keys() <= self.inmem.keys(), "a dirty value is not resident"
        assert self.inmem.keys() <= rows.keys(), "a resident value has no key"
        unsaved = {key for key, row in rows.items() if row == UNSAVED}
        assert unsaved <= self.dirty.keys(), "a value is nowhere"
        self._hands.check(rows, self.inmem)
        self.ledger.check()
        if self._store is not None:
            self._store.check()


def _drop(path: str, serializer: Serializer, options: Options) -> None:
    Store(path, serializer, options, reopen=True).drop()
