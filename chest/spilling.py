"""What must leave memory, and when.

Writing happens under the lock, in the thread that overfills the chest: that is the back-pressure.
What cannot be written stays in memory, and is counted there.
"""

from __future__ import annotations

import logging
import math
import operator
import time
from collections import deque
from collections.abc import Hashable, Iterable
from itertools import compress, filterfalse, repeat
from typing import Any

from chest.columns import gather
from chest.errors import UnsavedError, say, show
from chest.eviction import SLACK
from chest.hands import are_lent
from chest.progress import Tally
from chest.saving import Saving
from chest.serialize import changeable
from chest.upkeep import RETRY

logger = logging.getLogger("chest")

OUTDATED = 32 << 20  # bytes on disk that may wait for a commit that frees them
MUCH = 128 << 20  # bytes that do not wait for the next operation where nobody was given a value
TRIES = 3  # in a row, in which nothing left
WRITE_STEP = 1 << 20  # bytes written at a time beyond what must be, so that no set stalls


class Spilling(Saving):
    """The values in memory, which leave it when they take too much."""

    def set(self, key: Hashable, value: Any) -> None:
        """Store a value, and make room if it takes too much."""
        size = self.measure(value)
        if type(key) is str and not changeable(value) and self._set_fixed(key, value, size):
            return
        with self.lock, self:
            self.begin("set a value")
            _ = self.in_memory(key)  # what it does as it dies comes when all this is done
            self.put(key, value, size)
            if self.eviction.total > self.available:
                self._spill(key)
                if self.in_memory(key) is value and changeable(value):
                    self._hands.swap(key, value)  # hooks may have read others
            if self._outdated > OUTDATED:
                self._free_disk()

    def begin_to_delete(self, action: str) -> None:
        """Start an operation that deletes a key, as `begin` does; needs the lock.

        What is deleted may be set under another key next. So what was deleted before is committed
        now, and nothing where a value is in nobody's hands but the user's.
        """
        self.begin(action)
        if self._outdated > OUTDATED:
            self._free_disk()
            self.begin(action)  # for it may have torn what is in memory, and failed

    def end_deletion(self) -> None:
        """Free at once what a deletion left, if that is much; needs the lock."""
        if self._outdated > MUCH:
            self._free_disk()

    def clear(self) -> None:
        """Delete every key without reading a value; needs the lock."""
        super().clear()
        if self._outdated > OUTDATED:
            self._free_disk()

    def _free_disk(self) -> None:
        """Commit everything where that makes what is on disk much less.

        That is more than what has to be written for it. Nobody asked for it, and so nobody is told
        of an error but the log.
        """
        busy = self.in_transaction or self._is_recording
        if busy or self._outdated <= OUTDATED + self._to_write():
            return
        if time.monotonic() < self._free_after:
            return
        try:
            self._free_after = math.inf  # hooks come here, too, and what is collected as garbage
            dirty = [*self.dirty]
            sizes = [self.eviction.size(key) for key in dirty if key in self.eviction]
            self._mean = sum(sizes) / max(len(sizes), 1)
            if self._outdated > OUTDATED + self._to_write():
                self._save_to_free()
            self._free_after = 0
        except Exception as error:  # noqa: BLE001 -- what opens and dumps is theirs; it is said
            message = "what was replaced or deleted still takes room on disk: %s"
            self._say_once(("outdated", type(error)), message, say(error))
        finally:
            if self._free_after:  # it did not succeed, and to try takes time
                self._free_after = time.monotonic() + RETRY

    def _save_to_free(self) -> None:
        aside = {*self.eviction.aside()}
        with self:
            unsaved = self._save([*filterfalse(aside.__contains__, [*self.dirty])], stop=True)
            unsaved = self._set_aside(unsaved)
            self._outdated = self._shrunk
            self._report(unsaved)

    def _to_write(self) -> float:
        """Return about how many bytes in memory the disk does not hold, in one step."""
        return min(self._mean * len(self.dirty), self.eviction.total)

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Make `value`, of `size` bytes, the value of `key`, resident and dirty; needs the lock."""
        if key not in self.ledger.rows:
            self._check_key(key)
            self._add(key)
            self._note(key)
            self._count_outdated(-self.dirty.get(key, 0))
            self.dirty[key] = 0
            uses: float = 1
            if key in self.inmem:  # another handle deleted it, and that is taken in just now
                self._discard(key)
        else:
            if type(key) is not str:
                self._check_key(key)
            self._note(key)
            uses = max(self.eviction.uses(key), 1)
            self._soil(key, size)
            self._discard(key)
        self._enter(key, value, size, uses)
        if changeable(value):
            self._hold(key, value)
        else:
            self._settle(self._hands.empty())

    def _set_fixed(self, key: str, value: Any, size: int) -> bool:
        """Set a value that cannot change, where little is to do for it.

        This is `put` for small records by the million, step by step what it does.
        """
        try:
            self.lock.acquire()
            ledger, eviction = self.ledger, self.eviction
            if (
                self.head[1] != self.seen
                or self._hands.held
                or (self._hands.kept and self._hands.is_time(is_hit=True))
                or eviction.total + size > self.available
                or self.readonly
                or self._outdated > OUTDATED
                or ledger.changed  # by another handle: `put` knows what that has in memory
            ):
                return False
            if key not in ledger.rows:
                self._add(key)
                new = True
            elif key in self._fixed and eviction.reuse(key, size):
                new = False
            else:
                return False
            if new:
                self.dirty[key] = 0
            elif key not in self.dirty:
                self._soil(key, size)
            self.inmem[key] = value
            if self._fixed is not self.inmem:
                self._fixed[key] = value
            if new:
                eviction.enroll(key, size)
            return True
        except BaseException as error:
            if self.holds_lock():
                self.__exit__(type(error), error, error.__traceback__)
            raise
        finally:
            try:  # noqa: SIM105 -- `suppress` is a call, where interrupts come
                self.lock.release()
            except RuntimeError:
                pass  # it was interrupted before it had the lock

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
        if self._is_recording:
            return  # this comes in the midst of a commit, after which there is the next operation
        if self.eviction.total > self.available:
            self._say_that_it_spills()
        if key in self.eviction and self.eviction.size(key) > self.available:
            self._report(self._evict([key]))
        tries = 0
        while self.eviction.total > self.available and tries < TRIES:
            keys, before = self._choose(), self._to_leave()
            if not keys:
                return
            self._report(self._evict(keys))
            # What its own pickling changes is still to be written: the next operation goes on.
            tries = 0 if self._to_leave() < before else tries + 1

    def _to_leave(self) -> tuple[int, int]:
        """Return what a step of spilling makes less: what is in memory, or can still leave it."""
        return self.eviction.total, -len(self.eviction.aside())

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
        with self._hands.watched(keys):  # hooks may take other values in hand
            return self._evict_watched(keys)

    def _evict_watched(self, keys: list[Any]) -> dict[Any, Exception]:
        if not self._loose and not self.dirty and self.options.on_overflow is None:
            self._let_go(keys)
            self.eviction.stay(filter(self.inmem.__contains__, keys))
            return {}
        loose = [*filter(self._loose.__contains__, keys)] if self._loose else []
        hands = self._hands
        # Before they are dumped: who has one may change it at any moment, and then let go of it.
        lent = [*compress(loose, are_lent(gather(self.inmem, loose), 1))]
        refused, unsaved = None, dict[Any, Exception]()
        try:
            self._find_changed(loose)
            writes = [*filter(self.dirty.__contains__, keys)]
            try:
                unsaved = self._save(writes, stop=True)
            except OSError as error:  # what is not dirty leaves all the same
                refused = error
        except BaseException:
            self.eviction.stay(key for key in keys if key in self.eviction)
            raise
        unsaved = self._set_aside(unsaved)
        if loose:  # what a hook set in the place of a value that cannot change stays, if it can
            left = filterfalse(self.dirty.__contains__, filter(self._loose.__contains__, loose))
            watched = self._hands is hands  # if not, a hook cleared the chest and set these since
            self._let_go_loose([*left], lent if watched else loose)
        self._let_go(keys)
        there = filter(self.inmem.__contains__, keys)
        self.eviction.stay([*filterfalse(unsaved.__contains__, there)])
        if self.options.on_overflow is not None:
            for key in keys:
                if key not in unsaved and not (refused and key in self.inmem):
                    self.options.on_overflow(key)
        if refused is not None:
            raise refused
        return unsaved

    def _set_aside(self, unsaved: dict[Any, Exception]) -> dict[Any, Exception]:
        """Let what could not be written not be tried again soon; return what of it is dirty."""
        unsaved = {key: error for key, error in unsaved.items() if key in self.dirty}
        for key in unsaved:
            self.eviction.set_aside(key, self.eviction.discard(key))
            self._count_outdated(-self.dirty[key])
            self.dirty[key] = 0
        return unsaved

    def _let_go(self, keys: list[Any]) -> None:
        """Let go of those values that are clean and cannot change, all in a few steps."""
        keys = self._let_go_of_referable(self._sure(keys))
        hits = {} if self._fixed is self.inmem else self._fixed
        for part in (hits, self._fresh, self.inmem, self._touched, self._as_loaded):
            if part:
                deque(map(part.pop, keys, repeat(None)), maxlen=0)
        self.eviction.discard_all(keys)
        self.meter.spills += len(keys)

    def _let_go_loose(self, keys: list[Any], lent: list[Any]) -> None:
        """Let go of values that can change, all in a few steps but for those that are lent."""
        values = gather(self.inmem, keys)  # they die when all this is done
        size_of = self.eviction.size
        self._hands.keep_some(keys, values, size_of, map({*lent}.__contains__, keys))
        for part in (self._loose, self._touched, self.inmem):
            deque(map(part.pop, keys, repeat(None)), maxlen=0)
        # Once more: some may have been handed out meanwhile, and others set anew.
        handed = are_lent(values)
        gone = [*filterfalse(self.inmem.__contains__, keys)]
        handed = [*map(operator.and_, handed, map({*gone}.__contains__, keys))]
        self._hands.keep_some(keys, values, size_of, handed)
        self.eviction.discard_all(gone)
        self.meter.spills += len(gone)
        if self._as_loaded:
            forgotten = filterfalse(self._hands.knows, gone)
            deque(map(self._as_loaded.pop, forgotten, repeat(None)), maxlen=0)

    def _let_go_of_referable(self, keys: list[Any]) -> list[Any]:
        """Let go of values to which there may be weak references; return the keys of the others."""
        kinds = {*map(type, gather(self.inmem, keys))}
        referable = {kind for kind in kinds if kind.__weakrefoffset__}
        if not referable:
            return keys
        some = [key for key in keys if type(self.inmem[key]) in referable]
        for key in some:
            if self._sure([key]):
                value = self.inmem[key]
                self._hands.remember(key, value, fixed=True)
                self._leave(key)
                self.meter.spills += 1
                del value  # it may die here, and set others
        return self._sure(keys)

    def _sure(self, keys: Iterable[Any]) -> list[Any]:
        """Return those of `keys` whose values are resident, are clean, and cannot change."""
        keys = filter(self.inmem.__contains__, keys)
        for others in (self.dirty, self._loose):
            if others:
                keys = filterfalse(others.__contains__, keys)
        return [*keys]

    def _say_that_it_spills(self) -> None:
        if "spill" not in self.meter.said:
            self.meter.said.add("spill")
            logger.info("values leave memory for %s", self.path)

    def _report(self, unsaved: dict[Any, Exception]) -> None:
        for key, error in unsaved.items():
            kinds = (type(self.inmem.get(key)), type(error))
            message = "the value of key %s stays in memory, it cannot be written: %s"
            self._say_once(kinds, message, show(key), say(error))

    def evict(self) -> int:
        """Let go of what should leave next; return how many bytes became free, -1 if none did."""
        with self.lock, self:
            self.begin()
            before = self.eviction.total
            self._report(self._evict([*self.eviction.cheapest()]))
            return max(before - self.eviction.total, 0) or -1  # a hook may set others

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
            if key not in self.inmem:
                self._has_changed(key)  # while it was lent
            if key in self.inmem:
                unsaved = self._evict([key])
                if unsaved:
                    raise UnsavedError([*unsaved], [*unsaved.values()])

    def flush(self, tally: Tally | None = None) -> None:
        """Write every value that the disk does not hold, and commit; values stay in memory.

        Parameters
        ----------
        tally : Tally, optional
            Counts the values that are written; the last when they are committed.

        Raises
        ------
        UnsavedError
            Naming every key that could not be saved; all others are.
        """
        with self.lock, self:
            self.begin()
            if not self.readonly:
                self._flush(tally)

    def _flush(self, tally: Tally | None = None) -> None:
        self._hands.open_ended()
        self._look_at_lent(every=True)
        self._revive_changed()
        keys = [*self.dirty]
        if tally is not None:
            tally.begin(len(keys))
        unsaved = self._save(keys, stop=False, tally=tally)
        unsaved = {key: error for key, error in unsaved.items() if key in self.dirty}
        self.eviction.stay(key for key in self.eviction.aside() if key not in unsaved)
        if unsaved:
            raise UnsavedError([*unsaved], [*unsaved.values()])
        self.make_room()
        if tally is not None:
            tally.finish()
