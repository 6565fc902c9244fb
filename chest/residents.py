"""The values in memory, and how they come there.

A value is *resident* when it is in `inmem`; *dirty* when the disk does not hold it in this form.
One that is neither resident nor dead may be changed, too: see `chest.hands`.

Reading a value file does not hold the lock, so that values load side by side; one value is loaded
once, however many threads ask for it.
"""

from __future__ import annotations

import logging
import math
import operator
import os
import pickle
import shutil
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from itertools import compress, count, filterfalse
from typing import Any, NoReturn, Self

from chest.columns import Entry, is_plain
from chest.errors import (
    ChestClosedError,
    CorruptValueError,
    KeyTypeError,
    ReadOnlyError,
    say,
)
from chest.eviction import Eviction
from chest.hands import Hands
from chest.ledger import UNSAVED, Ledger
from chest.loads import Loads
from chest.options import Options
from chest.serialize import SMALL, Serializer, UndumpableError, changeable, digest_bytes
from chest.sizes import nbytes as default_nbytes
from chest.store import Store, told

logger = logging.getLogger("chest")

PLAIN_KEYS = "str, bytes, int, float, bool, None, and tuples and frozensets of these can be"
TEMPORARY_BYTES = 4096  # about what a directory with an empty index takes
NEVER = -1  # what the head never holds: every operation finds a difference, and catches up
TRIES = 3  # times that a value is read which others replace in the meantime
STEP = 1024  # values dumped at a time
TOUCHES = 64  # how often a value is handed out between two looks at its size

MISSING: Any = object()

_ANYWHERE = (MemoryError, RecursionError)  # exceptions that can come at any instruction

_left_to_parent: list[Any] = []


class Closed:
    """Stands in for the parts of a closed chest: whatever is asked of it raises."""

    def __init__(self, path: str | None) -> None:
        self._path = path

    def __getattr__(self, name: str) -> NoReturn:
        raise ChestClosedError(self._path)

    def _refuse(self, *_: object) -> NoReturn:
        raise ChestClosedError(self._path)

    __getitem__ = __contains__ = __iter__ = __len__ = __call__ = _refuse


class Residents(ABC):
    """What of a chest is in memory, and how it comes there.

    Parameters
    ----------
    options : Options
    serializer : Serializer
    available : float
        The budget, in bytes.

    Notes
    -----
    Every method takes the lock itself, but for those that say that they need it. `inmem`, `quick`,
    `head` and `seen` may be used without it.
    """

    def __init__(self, options: Options, serializer: Serializer, available: float) -> None:
        self.options = options
        self.serializer = serializer
        self.available = available
        self.closed = False
        self.path = options.path
        self._owner: int | None = None  # the process that made the temporary directory
        self._lent = False  # other processes may use that directory
        self._reported: set[Any] = set()
        self._make_lock()
        self._start()
        if self.path is not None:
            self._open_store(self.path)

    def _make_lock(self) -> None:
        self.lock = threading.RLock()
        self._loads = Loads(self.lock)

    def _start(self) -> None:
        """Hold nothing in memory, and know nothing of the directory yet."""
        self.readonly = self.options.readonly
        self._torn = False  # by an interrupt in the midst of an operation
        self.in_transaction = False
        self.transactions = 0  # begun so far: who looks without the lock looks again if one began
        self._inside: set[Any] = set()  # keys whose values a transaction may have changed
        self.ledger = Ledger(self.serializer.trusts_pickle)
        self._store: Store | None = None
        self.head: Any = (0, 0)
        self.seen = 0 if self.path is None else NEVER
        self._empty()

    def _empty(self) -> None:
        self.inmem: dict[Any, Any] = {}
        # Of `inmem`, the values that cannot change; `inmem` itself as long as it may be: `part`.
        self._fixed: dict[Any, Any] = {} if self.in_transaction else self.inmem
        self._fresh: dict[Any, Any] = {}  # those that a transaction set
        self._loose: dict[Any, None] = {}  # the keys of the others
        self._touched: dict[Any, tuple[int, int]] = {}
        self._as_loaded: dict[Any, int | None] = {}
        self.dirty: dict[Any, None] = {}
        self._hands = Hands()
        self.eviction = Eviction(self.available)
        self._arm()

    def _arm(self) -> None:
        """Let hits look at what is current: they take all that they need in one step."""
        fixed: Any = {} if self.in_transaction else self._fixed
        self.quick = (self.head, self.seen, fixed, self.eviction.marks.add)

    def __enter__(self) -> Self:
        """Begin what has to be mended if it is interrupted; under the lock."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and (not issubclass(kind, Exception) or issubclass(kind, _ANYWHERE)):
            self._torn = True
            self.seen = NEVER
            self.quick = (self.head, NEVER, *self.quick[2:])

    def _mend(self) -> None:
        """Put right what an interrupt left half done.

        What `inmem`, `dirty` and the ledger say counts, and each of them is changed in one step;
        all else follows from them.
        """
        if self._store is not None and not self.in_transaction:
            self._store.index.release()
        self.ledger.mend()
        rows = self.ledger.rows
        self.inmem = {key: value for key, value in self.inmem.items() if key in rows}
        for key in [key for key, row in rows.items() if row < 0]:
            if key not in self.inmem:
                self.ledger.delete(key)
            self.dirty[key] = None
        self.dirty = {key: None for key in self.dirty if key in self.inmem}
        self._as_loaded = {key: d for key, d in self._as_loaded.items() if key in rows}
        self._hands.mend(rows, self.inmem)
        self._loads.mend()
        self._touched, self._fixed, self._fresh, self._loose = {}, {}, {}, {}
        self.eviction = Eviction(self.available)
        self._arm()
        for key, value in self.inmem.items():
            self._enter(key, value, self.measure(value), 1)
        self._torn = False

    def start_anew(self) -> None:
        """Become a new handle on the directory: in a forked child, where all is the parent's."""
        if self.closed:
            return
        if self._store is not None:
            self._store.index.abandon()
        # Kept: to free what is shared with the parent would copy it, page by page.
        _left_to_parent.append((self.inmem, self.eviction, self._hands, self.ledger, self._store))
        self._make_lock()
        self._start()

    @property
    def store(self) -> Store:
        """What is on disk; a temporary directory is made now."""
        return self._store or self._open()

    def _open(self) -> Store:
        if self.closed:
            raise ChestClosedError(self.path)
        if self.path is not None:
            return self._open_store(self.path, reopen=True)
        path = tempfile.mkdtemp(".chest")
        try:
            store = self._open_store(path)
            self._owner = os.getpid()
        except OSError as error:
            message = told(error, path, TEMPORARY_BYTES)
            shutil.rmtree(path, ignore_errors=True)
            raise message from error
        except BaseException:
            self.path, self._store = None, None
            shutil.rmtree(path)
            raise
        return store

    def _open_store(self, path: str, *, reopen: bool = False) -> Store:
        store = Store(path, self.serializer, self.options, reopen=reopen)
        store.ledger.inherit(self.ledger)
        self.path, self._store, self.readonly = path, store, store.readonly
        self._look(store)
        return store

    # -- other handles ---------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Take in what another handle on the directory committed.

        While a thread is in a transaction, every operation comes here, and the others wait. So it
        does after an interrupt.
        """
        if self._is_publishing():
            return
        with self.lock, self:
            if self._torn:
                self._mend()
            if self.head[1] != self.seen and not self.in_transaction:
                self.store.catch_up()
                self._absorb()

    def _is_publishing(self) -> bool:
        """Tell whether the news are this very handle's, whose commit is not through yet."""
        store = self._store
        quiet = store is not None and not self.in_transaction and not self._torn
        return quiet and self.head[1] == store.index.publishing  # type: ignore[union-attr]

    def refresh(self) -> None:
        """Take in what others committed, also where the system tells late of it."""
        with self.lock, self:
            if self.closed:
                raise ChestClosedError(self.path)
            if self.path is not None and not self.in_transaction:
                self.store.catch_up(look=True)
                self._absorb()

    def _look(self, store: Store) -> None:
        """Take over what `store` has new."""
        self.ledger = store.ledger
        self.head = store.index.head
        self.seen = NEVER if self.in_transaction or self._torn else store.index.seen
        self._arm()
        store.index.publishing = -1

    def _absorb(self) -> None:
        """Bring memory in line with keys that others replaced or deleted."""
        self._look(self.store)
        changed = self.ledger.changed
        while changed:
            key, digest = next(iter(changed.items()))
            value = self.in_memory(key)
            keep = key in self.dirty or (value is not MISSING and self._differs(key, value, digest))
            if self.in_memory(key) is value:  # else what pickled it replaced it
                if keep and key not in self.ledger.rows:
                    self.ledger.add(key)
                if keep:
                    self._revive(key, value)
                else:
                    self._forget(key)
            changed.pop(key, None)

    @property
    def reads_alone(self) -> bool:
        """Whether a hook, or whatever is not pickle itself, has to see each value that is read."""
        return self.options.on_miss is not None or not self.serializer.direct

    # -- values that come ------------------------------------------------------------------------

    def begin(self, action: str | None = None) -> None:
        """Start an operation: catch up with other handles; needs the lock.

        Parameters
        ----------
        action : str or None
            What is going to be changed.
        """
        if self.head[1] != self.seen:
            self.catch_up()
        if self._hands.owed:
            self._settle_owed()
        if self.readonly and action is not None:
            raise ReadOnlyError(str(self.path), action)

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Make `value`, of `size` bytes, the value of `key`, resident and dirty; needs the lock."""
        if key not in self.ledger.rows:
            self._check_key(key)
            self.ledger.add(key)
        elif type(key) is not str:
            self._check_key(key)
        self._note(key)
        uses = self.eviction.uses(key)
        self.dirty[key] = None
        self._discard(key)
        self._enter(key, value, size, max(uses, 1))
        if changeable(value):
            self._hold(key, value)
        else:
            self._settle(self._hands.empty())

    def _add(self, key: str, value: Any, size: int) -> bool:
        """Add a new key with a value that cannot change, where that is all there is to do.

        This is `put` for small records by the million, step by step what it does.
        """
        try:
            self.lock.acquire()
            ledger, eviction = self.ledger, self.eviction
            if (
                self.head[1] != self.seen
                or key in ledger.rows
                or self._hands.held
                or eviction.total + size > self.available
                or self.readonly
            ):
                return False
            ledger.add(key)
            self.dirty[key] = None
            self.inmem[key] = value
            if self._fixed is not self.inmem:
                self._fixed[key] = value
            eviction.enroll(key, size)
            return True
        except BaseException as error:
            self.__exit__(type(error))
            raise
        finally:
            try:  # noqa: SIM105 -- no call before: interrupts come with calls
                self.lock.release()
            except RuntimeError:
                pass  # it was interrupted before it had the lock

    def _check_key(self, key: Hashable) -> None:
        if not self.serializer.trusts_pickle and not is_plain(key):
            raise KeyTypeError(key, f"only {PLAIN_KEYS}, when the values are not pickles")

    def _enter(self, key: Hashable, value: Any, size: int, uses: int) -> None:
        """Make a value resident."""
        self._hands.forget(key)
        if changeable(value):
            self._loose[key] = None
            self._hide(key)
            self.inmem[key] = value
            self.eviction.enroll(key, size, uses)
        elif self.in_transaction:
            self.inmem[key] = value
            self._fresh[key] = value  # a hit that began before may be looking at `_fixed`
            self.eviction.enroll(key, size, uses)
        else:
            self._enter_fixed(key, value, size, uses)

    def _enter_fixed(self, key: Hashable, value: Any, size: int, uses: int = 1) -> None:
        self.inmem[key] = value
        if self._fixed is not self.inmem:
            self._fixed[key] = value
        self.eviction.enroll(key, size, uses)

    def part(self) -> None:
        """Let `inmem` be a dict of its own from now on; needs the lock."""
        if self._fixed is self.inmem:
            self.inmem = self.inmem.copy()

    def _hide(self, key: Hashable) -> None:
        """Let hits not find a value."""
        self.part()
        self._fixed.pop(key, None)
        self._fresh.pop(key, None)

    def _discard(self, key: Hashable) -> None:
        """Take a value out of all that goes with `inmem`."""
        if self._fixed is not self.inmem:
            self._hide(key)
        self._loose.pop(key, None)
        self._touched.pop(key, None)
        self.eviction.discard(key)

    def _leave(self, key: Hashable) -> None:
        """Let go of a value, if it is resident."""
        self._discard(key)
        self.inmem.pop(key, None)

    def get(self, key: Hashable) -> Any:
        """Return the value of a key; where it is resident, without a lock."""
        if self.head[1] != self.seen:
            self.catch_up()
            value = self.quick[2].get(key, MISSING)
            if value is not MISSING:  # a hit, now that there is no news any more
                self.eviction.marks.add(key)
                return value
        value = self.inmem.get(key, MISSING)
        if value is MISSING:
            value = self._get_packed(key)
            return self.fetch(key) if value is MISSING else value
        self.eviction.marks.add(key)
        size, touches = self._touched.get(key, (_shallow_size(value), 0))
        if touches == TOUCHES or size != _shallow_size(value):
            self._measure_again(key, value)
        else:
            self._touched[key] = (size, touches + 1)
        released = self._hands.swap(key, value)
        if released is not None:
            self._hands.owed.append(released)
            self._if_free(self._settle_owed)
        # Another thread may have begun a transaction, or deleted it, or spilled it before it was in
        # the hand.
        same = self.inmem.get(key, MISSING) is value and key in self.ledger.rows
        return value if same and not self.in_transaction else self.fetch(key)

    def peek(self, key: Hashable) -> Any:
        """Return the value of a key; one that has to be read pushes no other out of memory."""
        if self.head[1] != self.seen:
            self.catch_up()
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
            try:  # noqa: SIM105 -- no call before: interrupts come with calls
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

    def fetch(self, key: Hashable, *, uses: int = 0, stream: bool = False) -> Any:
        """Return the value of a key, from wherever it is.

        Parameters
        ----------
        key : hashable
        uses : int
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
        for tries in count(1):
            entry = None
            try:
                entry = self._begin_load(key, stream)
                if not isinstance(entry, Entry):
                    return entry[0]
                value, again = self._load(key, entry, tell=tries == 1)
                if value is MISSING:
                    continue
                crowded = stream and entry.length > self.available - self.eviction.total
                size = entry.length if crowded else self.measure(value)
                digest = entry.digest if again else self._digest_as_loaded(value, entry)
                with self.lock, self:
                    taken = self._take_in(key, entry, value, size, digest, uses, stream)
                if taken or tries == TRIES:  # it was the value when the read began
                    return value
            finally:
                if entry.__class__ is not tuple:
                    # With no call before: interrupts come with calls.
                    self._loads.threads.pop(key, None)
                    with self.lock:
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
        stream = store.packs.peek(*where)
        if stream is None or self._loads.threads.setdefault(key, me) is not me:  # each is a new int
            return MISSING
        taken = False
        try:
            try:
                value = pickle.loads(stream)
            except Exception:  # noqa: BLE001 -- `fetch` tells
                return MISSING
            size = self.measure(value)
            fixed = not changeable(value)
            digest = where[3] if fixed else self._digest_as_loaded(value, Entry(*where))
            with self.lock:
                if self.ledger is not ledger or self.head[1] != self.seen:
                    return MISSING
                if (
                    fixed
                    and ledger.rows.get(key) == row
                    and key not in self.inmem
                    and key not in self._hands.left
                    and not self._hands.held
                    and self.eviction.total + size <= self.available
                ):
                    self._enter_fixed(key, value, size)
                    taken = True
                else:
                    taken = self._take_in(key, Entry(*where), value, size, digest, 1, False)
                self._loads.threads.pop(key, None)  # before anybody else gets the lock
        except BaseException as error:
            self.__exit__(type(error))
            raise
        finally:
            if self._loads.waiting or not taken:
                self._loads.threads.pop(key, None)
                with self.lock:
                    self._loads.tell()
        return value if taken else MISSING

    def _take_in(
        self,
        key: Hashable,
        entry: Entry,
        value: Any,
        size: int,
        digest: int | None,
        uses: int,
        stream: bool,
    ) -> bool:
        """Make a value resident that was read from `entry`, unless that is history."""
        if self._torn or not self._wants(key, entry):
            return False
        if digest != entry.digest:
            self._as_loaded[key] = digest
        self._loads.threads.pop(key, None)  # before anybody else gets the lock
        self._admit(key, value, size, uses, stream)
        return True

    def _begin_load(self, key: Hashable, stream: bool) -> Entry | tuple[Any]:
        """Return where to read the value from, or the value itself in a tuple.

        A thread that holds the lock already reads for itself what another one is reading: to wait
        would let go of a lock that somebody relies on. So does one that is reading already, in
        whose `load` this happens: the other may be waiting for it in turn.
        """
        me = threading.get_ident()
        locked = self.lock._is_owned()  # type: ignore[attr-defined]  # as Condition asks it
        with self.lock, self:
            nested = locked or me in self._loads.threads.values()
            while True:
                if self._torn:
                    self.catch_up()
                if key in self.inmem:
                    self.eviction.marks.add(key)
                    value = self.inmem[key]
                    if key in self._loose:
                        self._hold(key, value)  # which may make room, and let go of it
                    return (value,)
                value = self._hands.get(key, MISSING)
                row = self.ledger.rows.get(key, UNSAVED)
                if value is not MISSING:
                    size = self.measure(value)
                    same = self.in_memory(key) is MISSING or self.in_memory(key) is value
                    if same and key not in self.inmem and self.ledger.rows.get(key) == row:
                        self._admit(key, value, size, 0, stream=stream)
                        return (value,)
                    continue  # what measures it replaced or deleted it
                if row < 0:
                    raise KeyError(key)
                if self._loads.threads.setdefault(key, me) == me or nested:
                    return self.ledger.entry(row)
                self._loads.wait()

    def _load(self, key: Hashable, entry: Entry, *, tell: bool) -> tuple[Any, bool]:
        if tell and self.options.on_miss is not None:
            self.options.on_miss(key)
        try:
            return self.store.read(key, entry)
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
            return self.store.read(key, entry)
        except CorruptValueError:
            row = self.ledger.rows.get(key, UNSAVED)
            if row >= 0 and self.ledger.entry(row) == entry:
                raise
            return MISSING, False  # what opens or loads it replaced it

    def _admit(self, key: Hashable, value: Any, size: int, uses: int, stream: bool) -> None:
        """Make a stored value resident if it may be, and put it in this thread's hand."""
        room = self.available - self.eviction.total if stream else self.available
        self._note(key)
        hands = self._hands
        keep = size > room or changeable(value)
        released = hands.hold(key, value) if keep else hands.empty()
        if size <= room:
            self._enter(key, value, size, uses)
        else:
            hands.leave(key, value)
        # Only now: both may commit, and then find that another handle replaced or deleted the key.
        self._settle(released)
        self._make_room()

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

    def stores_like(self, other: Residents) -> bool:
        """Tell whether files of one chest can be files of the other."""
        mine, theirs = self.serializer, other.serializer
        return (mine.name, mine.load, mine.open) == (theirs.name, theirs.load, theirs.open)

    def measure(self, value: Any) -> int:
        """Return the size of a value in bytes; a size function that fails is told of once."""
        try:
            size = self.options.nbytes(value)
            if type(size) is int and size >= 0:
                return size
            if math.isfinite(size) and size >= 0:
                return int(size)
            raise ValueError(f"{size!r} is no number of bytes")
        except Exception as error:  # noqa: BLE001 -- theirs may do anything; no set fails for it
            kind = type(value)
            message = "the size of a %s is only estimated: %s"
            self._say_once(("nbytes", kind), message, kind.__name__, say(error))
        if self.options.nbytes is default_nbytes:
            return sys.getsizeof(value, 64)
        try:
            return default_nbytes(value)
        except Exception:  # noqa: BLE001 -- a sizer that was registered may do anything as well
            return sys.getsizeof(value, 64)

    # -- values that may have changed ------------------------------------------------------------

    def _hold(self, key: Hashable, value: Any) -> None:
        """Put a value in this thread's hand, and look at what was in it."""
        self._note(key)
        self._settle(self._hands.hold(key, value))

    def _note(self, key: Hashable) -> None:
        """Take note that a transaction may change a value."""
        if self.in_transaction:
            self._inside.add(key)

    def _settle_owed(self) -> None:
        while self._hands.owed:
            self._settle(self._hands.gone(self._hands.owed.popleft()))

    def _settle(self, released: list[tuple[Any, Any]]) -> None:
        """Make those values resident and dirty that changed while they were in hand."""
        if released:
            with self._hands.pinned():  # hooks may take other values in hand
                self._settle_pinned(released)

    def _settle_pinned(self, released: list[tuple[Any, Any]]) -> None:
        changed = []
        for n, (key, value) in enumerate(released):
            try:
                row = self.ledger.rows.get(key, UNSAVED)
                if row >= 0 and self._differs(key, value, self.ledger.digest(key)):
                    self._revive(key, value)
                    changed.append(key)
                else:
                    self._hands.settled(key, value)
            except BaseException:  # an interrupt: nobody knows, so they count as changed
                for pair in released[n:]:
                    self._revive(*pair)
                raise
        for key in changed:
            self._make_room(key)

    def _revive(self, key: Hashable, value: Any) -> None:
        """Make a value that changed in place resident and dirty, if its key is still there."""
        size = 0 if key in self.inmem else self.measure(value)
        if key not in self.ledger.rows or self.in_memory(key) is not value:
            return  # what measured or pickled it replaced or deleted it
        self.dirty[key] = None
        if key not in self.inmem:
            self._enter(key, value, size, 1)

    def _revive_changed(self) -> None:
        """Find every value that changed in place, in memory and alive elsewhere."""
        if not self.options.writeback:
            return
        clean = [*filterfalse(self.dirty.__contains__, self._loose)]
        large = self.eviction.large() if clean else set()
        for start in range(0, len(clean), STEP):
            keys = clean[start : start + STEP]
            for key in self._suspects(keys, large) if self.serializer.direct else keys:
                self._must_write(key)
        for key, value in self._hands.alive():
            if self._hands.get(key) is value and self._differs(key, value, self.ledger.digest(key)):
                self._revive(key, value)

    def _suspects(self, keys: list[Any], large: set[Hashable]) -> list[Any]:
        """Return those of `keys` that have to be looked at one by one: no others have changed.

        Small values are pickled and compared in few steps.
        """
        small = [*filterfalse(large.__contains__, keys)] if large else keys
        try:
            expected: Iterable[Any] = self.ledger.digests(small)
            if self._as_loaded:
                expected = map(self._as_loaded.get, small, expected)
            expected = [*expected]
            streams: Any = self.serializer.dumps_all([*map(self.inmem.__getitem__, small)])
            changed = [*compress(small, map(operator.ne, expected, map(digest_bytes, streams)))]
        except (KeyError, TypeError):  # what is pickled deletes others, or cannot be
            return keys
        return changed if small is keys else [*changed, *filter(large.__contains__, keys)]

    def in_memory(self, key: Hashable) -> Any:
        """Return the value of a key that is resident or alive elsewhere, `MISSING` if none is."""
        return self.inmem[key] if key in self.inmem else self._hands.get(key, MISSING)

    def _differs(self, key: Hashable, value: Any, digest: int) -> bool:
        """Tell whether a clean value is not what was stored with `digest`."""
        if not self._may_change(value):
            return False
        size = self.eviction.size(key) if key in self.eviction else SMALL
        expected = self._as_loaded.get(key, digest)
        try:
            now = self.serializer.digest(value, size)
            if now is None:
                staged = self.store.stage(value, size)
                os.unlink(staged.path)
                now = staged.digest
        except UndumpableError:
            return expected is not None
        except OSError:
            return True  # who writes it will be told
        return now != expected

    def _may_change(self, value: Any) -> bool:
        return self.options.writeback and not self.readonly and changeable(value)

    def _digest_as_loaded(self, value: Any, entry: Entry) -> int | None:
        """Return the digest that a value has that was just loaded, None if it has none.

        Often that of its file. But the same value may have several pickles: sets of str have
        another order in every process, and another protocol or class may have written it.
        """
        if not self._may_change(value):
            return entry.digest
        try:
            digest = self.serializer.digest(value, entry.length)
        except UndumpableError:
            return None
        return entry.digest if digest is None else digest

    def _must_write(self, key: Hashable) -> bool:
        if key in self.dirty or key not in self.inmem:
            return key in self.dirty
        value = self.inmem[key]
        changed = self._differs(key, value, self.ledger.digest(key))
        if changed and self.inmem.get(key, MISSING) is value:
            self.dirty[key] = None
        return changed

    # -- keys that go ----------------------------------------------------------------------------

    def delete(self, key: Hashable) -> None:
        """Delete a key without reading its value; needs the lock."""
        with self:
            self._hide(key)  # first, so that no hit finds what `in` does not
            self.ledger.delete(key)
            self._forget(key)

    def _forget(self, key: Hashable) -> None:
        self.dirty.pop(key, None)
        self._as_loaded.pop(key, None)
        self._leave(key)
        self._hands.forget(key)

    def clear(self) -> None:
        """Delete every key without reading a value; needs the lock."""
        with self:
            self._fixed = {}  # first, so that no hit finds what `in` does not
            self._arm()
            self.ledger.clear()
            self._empty()

    # -- for the subclass ------------------------------------------------------------------------

    @abstractmethod
    def make_room(self, key: Hashable | None = None) -> None:
        """Spill until the budget is kept; `key` by itself if it alone is too large for it."""

    def _make_room(self, key: Hashable | None = None) -> None:
        """Make room as far as the disk lets us: a read never fails for the lack of it."""
        try:
            self.make_room(key)
        except OSError as error:
            self._say_once(("disk", error.errno), "values stay in memory: %s", say(error))

    def _say_once(self, what: Hashable, message: str, *args: object) -> None:
        level = logging.DEBUG if what in self._reported else logging.WARNING
        self._reported.add(what)
        logger.log(level, message, *args)


def _shallow_size(value: Any) -> int:
    """Return what tells at once that a container grew; 0 where nothing does."""
    if type(value) in (list, dict, set, bytearray):
        return sys.getsizeof(value)
    return 0
