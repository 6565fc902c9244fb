"""The memory of a chest, whole: transactions, and its end."""

from __future__ import annotations

import errno
import logging
import math
import os
import sys
import threading
import time
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

from chest.blocks import Steps, block
from chest.errors import ChestClosedError, ReadOnlyError, say
from chest.hands import Hands
from chest.loading import TRIES
from chest.options import Options
from chest.processes import LAST_WAIT, just_forked, keep_until_end
from chest.progress import Tally
from chest.reading import demand
from chest.report import Report
from chest.residents import MISSING, Closed
from chest.serialize import Serializer, changeable, storing
from chest.spilling import Spilling
from chest.store import Store
from chest.verify import verify

logger = logging.getLogger("chest")


class Memory(Spilling):
    """The values in memory, with their way to the disk and back."""

    # -- transactions ------------------------------------------------------------------------------

    @block
    def transaction(self, timeout: float | None) -> Steps:
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
            if self.head[1] != self.seen:
                self.catch_up()
            if self.in_transaction:  # part of the one around it
                yield
                return
            self.begin("start a transaction")
            store, me = self.store, threading.get_ident()
            left = None if timeout is None else max(deadline - time.monotonic(), 0)
            try:
                with self, store.writing(left):
                    self._absorb()
                    self._flush_all()
                    if store is self._store:  # else this is a child that was forked meanwhile
                        self._isolate_and_flush()
                    try:
                        if store is self._store:
                            store.begin_transaction()
                            self._look(store)
                        yield
                        if store is self._store:
                            self._publish(store)
                    except BaseException:
                        if store is self._store:
                            self._fail(store, me)
                        raise
            finally:
                if not store.index.pinned:
                    self._give_up(store, torn=False)
            self._make_room()

    def _publish(self, store: Store) -> None:
        """Commit what a transaction did."""
        self.flush()
        store.end_transaction()
        self._isolate(False)
        store.tidy()
        self._look(store)

    def _fail(self, store: Store, thread: int) -> None:
        """Roll back, at once or as soon as it can be done.

        A block that is suspended in a generator is left when somebody collects that as garbage: in
        the midst of what its thread is doing with the chest, or in another thread.
        """
        if thread != threading.get_ident() and thread not in sys._current_frames():
            self._loads.take_over()
        if self.holds_lock() and store.index.blocks == 1:
            self._roll_back(store)
        else:
            store.index.pin()

    @block
    def _lock_until(self, deadline: float) -> Steps:
        lock, loads, entered = self.lock, self._loads, False
        seconds = min(max(deadline - time.monotonic(), 0), threading.TIMEOUT_MAX)
        try:
            if not lock.acquire(timeout=seconds):
                message = "another thread is using the chest, and did not end in time"
                raise TimeoutError(errno.ETIMEDOUT, message, self.path)
            entered = True
            yield
        finally:
            try:
                lock.release()
            except RuntimeError:  # another thread has it
                if entered:
                    loads.unreleased.append(None)
            loads.release_what_is_left()

    def _isolate_and_flush(self) -> None:
        """Isolate, and save what other threads changed in place while the flush before went on."""
        try:
            self._isolate(True)
            if threading.active_count() > 1 or self._hands.of_others():
                self.flush()
        except BaseException:
            self._isolate(False)
            raise

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
            doomed = {*self.dirty, *self._changed_in_place()} - theirs
            _ = [*map(self.in_memory, doomed)]  # they may use the chest as they die
            for key in doomed:
                self._forget(key)
            store.roll_back()
            self._look(store)
            for key in self.inmem.keys() - self.ledger.rows.keys():  # set by a hook meanwhile
                self._forget(key)
            changed = self.ledger.changed
            for key in list(changed):
                value = self.in_memory(key)
                if key in theirs and value is not MISSING:
                    self._revive(key, value)
                else:
                    self._forget(key)
                del changed[key]
            self._outdated = self._shrunk
            self._isolate(False)
            store.index.release()
        except BaseException:
            self._give_up(store, torn=True)
            raise

    def _give_up(self, store: Store, *, torn: bool) -> None:
        """Begin anew if a roll-back was torn, or did not come: there is no half of one."""
        if store is self._store and (torn or self.in_transaction or store.in_transaction):
            store.close()
            self._start()

    def _changed_in_place(self) -> list[Any]:
        alive = dict(self._hands.alive())  # first: what dies there may delete others
        loose = [*filter(self.inmem.__contains__, self._loose.copy())]
        alive.update((key, self.inmem[key]) for key in loose)
        clean = ((key, value) for key, value in alive.items() if key not in self.dirty)
        return [k for k, value in clean if self._differs(k, value)]

    def _refuse_in_transaction(self, action: str) -> None:
        if self.in_transaction:
            self.catch_up()
        if self.in_transaction:
            raise RuntimeError(f"cannot {action} inside a transaction: leave its block first")

    # -- upkeep ------------------------------------------------------------------------------------

    def verify(self, tally: Tally | None = None) -> Report:
        """Read every value that is committed, and tell which are not as they were written."""
        with self.lock:
            if self.closed:
                raise ChestClosedError(self.path)
            path = self.path
        if path is None:
            return Report(None)
        demand(path)
        return verify(path, self.serializer, self.options, tally)

    def compact(self) -> int:
        """Save everything, and remove what is out of date; return how many bytes that freed."""
        with self.lock, self:
            self.begin("compact the chest")
            self._refuse_in_transaction("compact the chest")
            if self.path is None:  # nothing was written yet
                return 0
            self._flush()
            with self._writing():
                self._absorb()
                freed = self.store.compact()
                self._look(self.store)
            return freed

    # -- the end -----------------------------------------------------------------------------------

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
            self._demand_quiet()
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
            mine = self.path is not None and (self.options.path or self._owner == os.getpid())
            store = self.store if mine else None
            try:
                if store is not None:
                    store.drop()
                self._end()
            except BaseException:
                if store is not None and store.index.closed:  # all but an empty folder is gone
                    self._end()
                    raise
                if store is not None:  # what is on disk may be gone, or not
                    self._look(store)
                self._tear()
                raise

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

    def drop_open(self) -> None:
        """Close a chest that nobody refers to any more."""
        used = self._store is not None and not self.closed and not just_forked()
        forgotten = used and self.options.path is not None
        try:
            self.finish()
        finally:
            if forgotten:
                message = f"a chest was not closed: close it, or use `with`: {self.options.path}"
                warnings.warn(message, ResourceWarning, stacklevel=2)

    def finish(self) -> None:
        """Close when nobody can be told any more: at the end of the chest or of the program."""
        if self.closed:
            return
        if just_forked():  # it is the parent's
            if self._store is not None:
                self._store.index.abandon()
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

    def _close_elsewhere(self) -> bool:
        """Let another thread wait, where garbage is collected in the midst of another's commit.

        At the end of the program `chest.processes` finishes what that thread did not.
        """
        waits = self._store is not None and self._store.index.busy_here()
        if waits:
            threading.Thread(target=self.finish, daemon=True).start()
        return waits

    def _end(self) -> None:
        self.closed = True
        self.readonly = False  # what is asked of it from now on meets `closed`
        closed: Any = Closed(self.path)
        self.inmem = self._fixed = self.ledger = self.eviction = closed
        self.dirty, self._shrunk, self._loose, self._hands = {}, 0, {}, Hands()
        if self._store is not None:
            self._store.close()
            self._store = None
        self._torn = False
        self.head, self.seen = (0, 0), 0
        self.quick = (self.head, self.seen, closed, closed)

    # -- for tests ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert every invariant."""
        with self.lock:
            self._check()

    def _check(self) -> None:
        rows = self.ledger.rows
        self.eviction.check(self.inmem)
        fixed = {key: id(v) for key, v in self.inmem.items() if key not in self._loose}
        assert {key: id(value) for key, value in self._fixed.items()} == fixed
        assert not any(changeable(self.inmem[key]) for key in fixed), "it may change"
        assert self._loose.keys() <= self.inmem.keys()
        mark = getattr(self.quick[3], "args", self.quick[3:])
        assert (self.quick[:2], mark) == ((self.head, self.seen), (self.eviction.marks.add,))
        assert self.quick[2] is self._fixed or self.in_transaction
        assert self.dirty.keys() <= self.inmem.keys(), "a dirty value is not resident"
        assert self._outdated >= self._shrunk == sum(self.dirty.values())
        assert self.inmem.keys() <= rows.keys(), "a resident value has no key"
        unsaved = {key for key, row in rows.items() if row < 0}
        assert unsaved <= self.dirty.keys(), "a value is nowhere"
        self._hands.check(rows, self.inmem)
        self.ledger.check()
        if self._store is not None:
            self._store.check()


def _drop(path: str, serializer: Serializer, options: Options) -> None:
    Store(path, serializer, options, reopen=True).drop()
