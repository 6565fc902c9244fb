"""What must leave memory, and when to commit.

Writing happens under the lock, in the thread that overfills the chest: that is the back-pressure.
What cannot be written stays in memory, and is counted there.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Hashable
from typing import Any

from chest.columns import is_plain
from chest.directory import remove_quietly
from chest.errors import ChestClosedError, KeyTypeError, ReadOnlyError, UnsavedError, say, show
from chest.hands import Hands
from chest.ledger import UNSAVED
from chest.residents import Closed, Residents
from chest.serialize import UndumpableError, changeable
from chest.store import Staged

logger = logging.getLogger("chest")

SLACK = 16  # one part in so many of the budget is made free at a time
WRITE_STEP = 1 << 20  # bytes written at a time beyond what must be, so that no set stalls


class Memory(Residents):
    """The values in memory, with their way to the disk."""

    def set(self, key: Hashable, value: Any) -> None:
        """Store a value, and make room if it takes too much."""
        size = self.measure(value)
        with self.lock:
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
        with self.lock:
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
        try:
            unsaved = self._save([key for key in keys if self._must_write(key)], stop=True)
        except BaseException:
            self.eviction.stay(key for key in keys if key in self.eviction)
            raise
        unsaved = {key: error for key, error in unsaved.items() if key in self.dirty}
        for key in keys:
            if key in unsaved:
                self.eviction.set_aside(key, self.eviction.discard(key))
            elif key in self.inmem and key not in self.dirty:
                self._hands.leave(key, self._leave(key))
                if self._as_loaded and not self._hands.knows(key):
                    self._as_loaded.pop(key, None)
            elif key in self.inmem:
                self.eviction.stay([key])
        if self.options.on_overflow is not None:
            for key in keys:
                if key not in unsaved:
                    self.options.on_overflow(key)
        return unsaved

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
        with self.lock:
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
        with self.lock:
            self.begin()
            if self.readonly:
                return
            self._settle(self._hands.open_ended())
            self._revive_changed()
            unsaved = self._save([*self.dirty], stop=False)
            unsaved = {key: error for key, error in unsaved.items() if key in self.dirty}
            for key in self.eviction.aside():
                if key not in unsaved:
                    self.eviction.stay([key])
            if unsaved:
                raise UnsavedError([*unsaved], [*unsaved.values()])
            self.make_room()

    def commit_deletions(self) -> None:
        """Commit what was deleted, without writing a value."""
        with self.lock:
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
        with store.writing() as changed:
            self._absorb(changed)
            for key in list(staged):
                if key not in self.dirty or self.inmem.get(key) is not values[key]:
                    remove_quietly(staged.pop(key).path)  # a hook replaced or deleted it meanwhile
            store.commit(staged)
            self._look(store)
            for key in staged:
                del self.dirty[key]
                self._as_loaded.pop(key, None)
        logger.debug("committed %d values to %s", len(staged), self.path)

    def adopt(self, staged: dict[Any, Staged]) -> None:
        """Publish files that are not from values in memory, in place of what the keys held."""
        if not staged:
            return
        with self.lock:
            store = self.store
            added: list[Any] = []
            try:
                with store.writing() as changed:
                    self._absorb(changed)
                    for key in staged:
                        if key not in self.ledger.rows:
                            self.ledger.add(key)
                            added.append(key)
                    store.commit(staged)
                    self._look(store)
            except BaseException:
                for key in added:
                    if self.ledger.rows.get(key) == UNSAVED:
                        self.ledger.delete(key)
                raise
            for key in staged:
                self._forget(key)

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
        with self.lock:
            if self.closed:
                return
            if self.options.path is None:
                self.drop()
            else:
                self.flush()
                self._end()

    def drop(self) -> None:
        """Remove the directory, but for files of others; then let go of everything."""
        with self.lock:
            if self.closed:
                raise ChestClosedError(self.path)
            if self.readonly:
                raise ReadOnlyError(str(self.path), "drop the chest")
            if self._store is not None and self._pid == os.getpid():
                self._store.drop()
            self._end()

    def finish(self) -> None:
        """Close when nobody can be told any more: at the end of the chest or of the program."""
        if self.closed:
            return
        if self._pid != os.getpid():  # a forked child: its parent's values are not its own
            self._end()
            return
        try:
            if not self._close_elsewhere():
                self.close()
        except Exception as error:  # noqa: BLE001 -- nobody is left to catch it, so it is said
            message = "the chest at %s could not be closed: %s"
            logger.error(message, self.path, say(error))  # noqa: TRY400 -- one line, no traceback
            self._end()

    def _close_elsewhere(self) -> bool:
        """Let another thread wait, where garbage is collected in the midst of another's commit."""
        waits = self._store is not None and self._store.index.held_here()
        if waits:
            threading.Thread(target=self.finish).start()
        return waits

    def _end(self) -> None:
        self.closed = True
        if self._store is not None:
            self._store.close()
            self._store = None
        self.head, self.seen = (0, 0), 0
        closed: Any = Closed(self.path)
        self.inmem = self.fixed = self.ledger = self.eviction = self.mark = closed
        self.dirty, self._hands = {}, Hands()

    # -- for tests -------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert every invariant."""
        with self.lock:
            rows = self.ledger.rows
            self.eviction.check(self.inmem)
            fixed = {key: id(value) for key, value in self.inmem.items() if not changeable(value)}
            assert {key: id(value) for key, value in self.fixed.items()} == fixed
            assert self.dirty.keys() <= self.inmem.keys(), "a dirty value is not resident"
            assert self.inmem.keys() <= rows.keys(), "a resident value has no key"
            unsaved = {key for key, row in rows.items() if row == UNSAVED}
            assert unsaved <= self.dirty.keys(), "a value is nowhere"
            self._hands.check(rows, self.inmem)
            self.ledger.check()
            if self._store is not None:
                self._store.check()
