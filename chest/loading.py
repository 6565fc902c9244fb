"""How values come back into memory.

Reading a value file does not hold the lock, so that values load side by side; one value is loaded
once, however many threads ask for it.
"""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Callable, Hashable
from itertools import count
from time import perf_counter
from typing import Any

from chest.aliases import UNSAVED
from chest.changes import Changes
from chest.columns import Entry
from chest.errors import CorruptValueError
from chest.eviction import READ_ONCE
from chest.index import Index
from chest.ledger import Ledger
from chest.residents import MISSING
from chest.serialize import changeable

TRIES = 3  # times that a value is read which others replace in the meantime
TOUCHES = 64  # how often a value is handed out between two looks at its size


class Loading(Changes):
    """The values in memory, and those that come back from the disk when they are asked for."""

    # -- values that are in memory -----------------------------------------------------------------

    def get(self, key: Hashable) -> Any:
        """Return the value of a key; where it is resident, without a lock."""
        if self.head[1] != self.seen:
            self.catch_up()
            value = self.quick[2].get(key, MISSING)
            if value is not MISSING:  # a hit, now that there is no news any more
                self.quick[3](key)
                return value
        value = self.inmem.get(key, MISSING)
        if value is MISSING:
            value = self._get_packed(key)
            value = self.fetch(key) if value is MISSING else value
            self.meter.misses += 1
            return value
        self.quick[3](key)
        size, touches = self._touched.get(key, (_shallow_size(value), 0))
        if touches == TOUCHES or size != _shallow_size(value):
            self._measure_again(key, value)
        else:
            self._touched[key] = (size, touches + 1)
        self._hands.swap(key, value)
        if self._hands.kept and self._hands.is_time(is_hit=True):
            self._if_free(self._look_at_lent)
            self._hands.swap(key, value)  # hooks may have read others
        # Another thread may have begun a transaction, or deleted it, or spilled it before it was in
        # the hand.
        ledger = self.ledger
        same = self.inmem.get(key, MISSING) is value and key in ledger.rows
        same = same and key not in ledger.changed  # by another handle, whose news are taken in now
        return value if same and not self.in_transaction else self.fetch(key)

    def peek(self, key: Hashable) -> Any:
        """Return the value of a key; one that has to be read pushes no other out of memory."""
        if self.head[1] != self.seen:
            self.catch_up()
        value = self.quick[2].get(key, MISSING)
        if value is not MISSING:
            self.quick[3](key)
            return value
        return self.get(key) if key in self.inmem else self.fetch(key, stream=True)

    def _measure_again(self, key: Hashable, value: Any) -> None:
        """Count a value that is in use with the size that it has by now."""
        self._if_free(self._count_again, key, value, self.measure(value))

    def _if_free(self, step: Callable[..., None], *args: Any) -> None:
        """Take a step under the lock, if no other thread has it: a hit waits for nobody."""
        try:
            if self.lock.acquire(blocking=False):
                with self:
                    step(*args)
        finally:
            try:  # noqa: SIM105 -- `suppress` is a call, where interrupts come
                self.lock.release()
            except RuntimeError:
                pass  # another thread has it

    def _count_again(self, key: Hashable, value: Any, size: int) -> None:
        if self._torn or self.inmem.get(key, MISSING) is not value:
            return
        self._touched[key] = (_shallow_size(value), 0)
        if size == self.eviction.size(key):
            return
        if len(self._touched) > 2 * len(self.inmem) + TOUCHES:  # left by threads that raced
            self._touched = {}
        uses = self.eviction.uses(key)
        self.eviction.discard(key)
        self.eviction.enroll(key, size, uses)
        self._hold(key, value)
        self._make_room()

    # -- values that are read ----------------------------------------------------------------------

    def fetch(self, key: Hashable, *, uses: float = READ_ONCE, stream: bool = False) -> Any:
        """Return the value of a key, from wherever it is.

        Parameters
        ----------
        key : hashable
        uses : float
            How often it counts as used when it has to be read.
        stream : bool
            Make it resident only where nothing has to leave for it.

        Raises
        ------
        KeyError
            If there is no such key.
        CorruptValueError, SerializerError
        """
        with self.lock, self:
            self.begin()
        me, threads = threading.get_ident(), self._loads.threads
        for tries in count(1):
            entry = None
            try:
                entry = self._begin_load(key, stream, me)
                if not isinstance(entry, Entry):
                    return entry[0]
                value, again = self._load(key, entry, tell=tries == 1)
                if value is MISSING:
                    continue
                crowded = stream and entry.length > self.available - self.eviction.total
                size = entry.length if crowded else self.measure(value)
                digest = entry.digest if again else self._digest_as_loaded(value, entry)
                with self.lock, self:
                    found = self._take_in(key, entry, value, size, digest, uses, stream)
                if found is not MISSING:
                    return found
                if tries == TRIES:  # it was the value when the read began
                    return value
            finally:
                if entry.__class__ is not tuple:
                    # With no call before: interrupts come with calls.
                    try:
                        if threads[key] is me:
                            threads.pop(key, None)
                    except KeyError:
                        pass  # another thread mended
                    self._loads.tell()
        return MISSING

    def _get_packed(self, key: Hashable) -> Any:
        """Return the value of a key from a pack that is open; `MISSING` where there is more to do.

        This is `fetch` for small records by the million, step by step what it does.
        """
        ledger, store, me = self.ledger, self._store, threading.get_ident()
        row = ledger.rows.get(key, UNSAVED)
        if row < 0 or store is None or self.reads_alone or self.head[1] != self.seen:
            return MISSING
        where = ledger.where(row)
        started = perf_counter()
        stream = store.packs.peek(*where)
        if stream is None:
            return MISSING
        taken, threads = False, self._loads.threads
        try:
            if threads.setdefault(key, me) is not me:
                return MISSING
            try:
                value = pickle.loads(stream)
            except Exception:  # noqa: BLE001 -- a pickle raises anything; `fetch` reads it again
                return MISSING
            self.meter.read(1, len(stream), perf_counter() - started)
            taken = self._take_packed(key, value, row, where, ledger)
        finally:
            if not taken:
                try:  # with no call before: interrupts come with calls
                    if threads[key] is me:
                        threads.pop(key, None)
                except KeyError:
                    pass  # it was taken out
            self._loads.tell()
        return value if taken else MISSING

    def _take_packed(
        self,
        key: Hashable,
        value: Any,
        row: int,
        where: tuple[str, int, int, int],
        ledger: Ledger,
    ) -> bool:
        """Make a value resident that a row of a ledger leads to, unless there are news."""
        size = self.measure(value)
        fixed = not changeable(value)
        digest = where[3] if fixed else self._digest_as_loaded(value, Entry(*where))
        with self.lock:
            try:
                if self._hands.kept and self._hands.is_time():
                    self._look_at_lent()
                if self.ledger is not ledger or self.head[1] != self.seen:
                    return False
                if (
                    ledger.rows.get(key) == row
                    and key not in self.inmem
                    and not self._hands.knows(key)
                    and self.eviction.total + size <= self.available
                    and not (fixed and self._hands.held)
                ):
                    if fixed:
                        self._keep_fixed(key, value)
                        self.eviction.enroll(key, size, READ_ONCE)
                    else:
                        if digest != where[3]:
                            self._note_as_loaded(key, digest)
                        self._keep_loose(key, value)
                        self.eviction.enroll(key, size, READ_ONCE)
                        self._hold(key, value)
                    taken = fixed or self.in_memory(key) is value
                else:
                    entry = Entry(*where)
                    found = self._take_in(key, entry, value, size, digest, READ_ONCE, False)
                    taken = found is value
                self._loads.threads.pop(key, None)  # before anybody else gets the lock
                return taken
            except BaseException as error:
                self.__exit__(type(error), error, error.__traceback__)
                raise

    def _take_in(
        self,
        key: Hashable,
        entry: Entry,
        value: Any,
        size: int,
        digest: int | None,
        uses: float,
        stream: bool,
    ) -> Any:
        """Make a value resident that was read from `entry`, as `_admit`; `MISSING` if history."""
        if self._torn or not self._wants(key, entry):
            return MISSING
        if digest != entry.digest:
            self._note_as_loaded(key, digest)
        return self._admit(key, value, size, uses, stream)

    def hand_out(
        self, key: Hashable, value: Any, ledger: Ledger, row: int, digest: int | None
    ) -> bool:
        """Put a value in this thread's hand that was read ahead from a row; False if it is history.

        It is what `fetch` does last, where it streams.
        """
        entry = ledger.entry(row)
        crowded = entry.length > self.available - self.eviction.total
        size = entry.length if crowded else self.measure(value)
        with self.lock, self:
            self.begin()
            if self.ledger is not ledger or ledger.rows.get(key) != row:
                return False
            found = self._take_in(key, entry, value, size, digest, READ_ONCE, stream=True)
            return found is value

    def _begin_load(self, key: Hashable, stream: bool, me: int) -> Entry | tuple[Any]:
        """Return where to read the value from, or the value itself in a tuple.

        A thread that holds the lock already reads for itself what another one is reading: to wait
        would let go of a lock that somebody relies on. So does one that is reading already, in
        whose `load` this happens: the other may be waiting for it in turn.
        """
        locked = self.holds_lock()
        with self.lock, self:
            if self._store is None:  # this is a child that was forked as the value was read
                self.begin()
            nested = locked or me in self._loads.threads.copy().values()
            while True:
                if self._torn:
                    self.catch_up()
                if key in self.inmem:
                    self.eviction.marks.add(key)
                    value = self.inmem[key]
                    if key in self._loose:
                        self._hold(key, value)  # which may make room, and let go of it
                        if self.in_memory(key) is not value:
                            continue
                    return (value,)
                value = self._hands.get(key, MISSING)
                row = self.ledger.rows.get(key, UNSAVED)
                if value is not MISSING and row >= 0:
                    if not changeable(value) and self._has_changed(key):
                        continue
                    size = self.measure(value)
                    same = self.in_memory(key) is MISSING or self.in_memory(key) is value
                    if same and key not in self.inmem and self.ledger.rows.get(key) == row:
                        return (self._admit(key, value, size, READ_ONCE, stream=stream),)
                    continue  # what measures it replaced or deleted it
                if row < 0:
                    raise KeyError(key)
                if self._loads.threads.setdefault(key, me) == me or nested:
                    return self.ledger.entry(row)
                self._loads.wait(key)

    def _load(self, key: Hashable, entry: Entry, *, tell: bool) -> tuple[Any, bool]:
        if tell and self.options.on_miss is not None:
            self.options.on_miss(key)
        try:
            return self.read(key, entry)
        except CorruptValueError:
            with self.lock:
                self.catch_up()
                row = self.ledger.rows.get(key, UNSAVED)
                if row >= 0 and self.ledger.entry(row) == entry:
                    return self._read_locked(key, entry)
            return MISSING, False  # another handle replaced it meanwhile: the caller looks again

    def _read_locked(self, key: Hashable, entry: Entry) -> tuple[Any, bool]:
        """Read once more, now that no other thread can replace a value and set it back."""
        try:
            return self.read(key, entry)
        except CorruptValueError:
            self.catch_up()
            row = self.ledger.rows.get(key, UNSAVED)
            if row >= 0 and self.ledger.entry(row) == entry:
                raise
            return MISSING, False  # another handle, or what opens or loads it, replaced it

    def _admit(self, key: Hashable, value: Any, size: int, uses: float, stream: bool) -> Any:
        """Make a stored value resident if it may be, and put it in this thread's hand.

        Return what is to be handed out: a copy, if that is what a hook had the chest read since.
        """
        row, ledger = self.ledger.rows.get(key, UNSAVED), self.ledger
        loose = changeable(value)
        fits = size <= self.available
        if stream:  # what is resident has the room, and small values come back many at a time
            fits = size <= self.available - self.eviction.total
            fits = fits and (loose or not self.ledger.is_packed(key))
        self._note(key)
        if fits:
            self._enter(key, value, size, uses)
        elif loose:
            self._hands.keep(key, value, size)
        else:
            self._hands.remember(key, value, fixed=True)
        self._settle(self._hands.hold(key, value) if loose else self._hands.empty())
        # Only now: it may commit, and then find that another handle replaced or deleted the key.
        self._make_room()
        if not loose:
            return value
        if self.in_memory(key) is MISSING and key in self.ledger.rows:  # hooks read too much
            same = self.ledger is ledger and ledger.rows.get(key, UNSAVED) == row
            if (same or not self._differs(key, value)) and self.in_memory(key) is MISSING:
                self._hands.keep(key, value, size)
        if (here := self.in_memory(key)) is MISSING:
            return value  # it is history
        self._hands.swap(key, here)
        return here

    def read(self, key: Hashable, entry: Entry, file: Any = None) -> tuple[Any, bool]:
        """Load a value, as `Reading.read` does, and count it."""
        started = perf_counter()
        found = self.store.read(key, entry, file)
        self.meter.read(1, entry.length, perf_counter() - started)
        return found

    def is_waited_for(self) -> bool:
        """Tell whether other threads may wait for this one: it has a lock, or is in a hook."""
        is_reading = threading.get_ident() in self._loads.threads.copy().values()
        return is_reading or self.holds_lock() or Index.busy_here()

    def open_hand(self) -> None:
        """Look at what this thread has in hand, for it is about to end."""
        with self.lock, self:
            self._settle(self._hands.empty())

    def offer(self, key: Hashable, entry: Entry, value: Any, again: bool) -> None:
        """Make a value resident that was read from `entry`, unless that is history."""
        size = self.measure(value)
        digest = entry.digest if again else self._digest_as_loaded(value, entry)
        with self.lock, self:
            self._take_in(key, entry, value, size, digest, 1, False)

    def _wants(self, key: Hashable, entry: Entry) -> bool:
        """Tell whether what was read from `entry` is the value, and the only copy of it."""
        row = self.ledger.rows.get(key, UNSAVED)
        current = row >= 0 and self.ledger.entry(row) == entry
        return current and self.in_memory(key) is MISSING

    def has(self, key: Hashable) -> bool:
        """Tell whether there is such a key."""
        with self.lock:
            self.begin()
            return key in self.ledger.rows


def _shallow_size(value: Any) -> int:
    """Return what tells at once that a container grew; 0 where nothing does."""
    if type(value) in (list, dict, set, bytearray):
        return sys.getsizeof(value)
    return 0
