"""The values in memory, and how they come there.

A value is *resident* when it is in `inmem`; *dirty* when the disk does not hold it in this form.
One that is neither resident nor dead may be changed, too: see `chest.hands`.

Reading a value file does not hold the lock, so that values load side by side; one value is loaded
once, however many threads ask for it.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, NoReturn

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
from chest.options import Options
from chest.serialize import SMALL, Serializer, UndumpableError, changeable
from chest.sizes import nbytes as default_nbytes
from chest.store import Store, told

logger = logging.getLogger("chest")

PLAIN_KEYS = "str, bytes, int, float, bool, None, and tuples and frozensets of these can be"
TEMPORARY_BYTES = 4096  # about what a directory with an empty index takes
TOUCHES = 64  # how often a value is handed out between two looks at its size

MISSING: Any = object()


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
    Every method takes the lock itself, but for those that say that they need it. `inmem`, `mark`,
    `head` and `seen` may be used without it.
    """

    def __init__(self, options: Options, serializer: Serializer, available: float) -> None:
        self.lock = threading.RLock()
        self.options = options
        self.serializer = serializer
        self.available = available
        self.inmem: dict[Any, Any] = {}
        self.fixed: dict[Any, Any] = {}  # of these the values that cannot change
        self._touched: dict[Any, tuple[int, int]] = {}  # of the others
        self._as_loaded: dict[Any, int | None] = {}
        self.dirty: dict[Any, None] = {}
        self.eviction = Eviction(self.available)
        self.mark = self.eviction.marks.add
        self.head: Any = (0, 0)
        self.seen = 0
        self.readonly = options.readonly
        self.closed = False
        self.path = options.path
        self.ledger = Ledger(serializer.trusts_pickle)
        self._store: Store | None = None
        self._pid = os.getpid()
        self._hands = Hands()
        self._loading: dict[Any, int] = {}
        self._loaded = threading.Condition(self.lock)
        self._reported: set[Any] = set()
        if self.path is not None:
            self._open_store(self.path)

    @property
    def store(self) -> Store:
        """What is on disk; a temporary directory is made now."""
        return self._store or self._open_temporary()

    def _open_temporary(self) -> Store:
        if self.closed:
            raise ChestClosedError(self.path)
        path = tempfile.mkdtemp(".chest")
        try:
            return self._open_store(path)
        except OSError as error:
            message = told(error, path, TEMPORARY_BYTES)
            os.rmdir(path)
            raise message from error

    def _open_store(self, path: str) -> Store:
        store = Store(path, self.serializer, self.options)
        store.ledger.inherit(self.ledger)
        self.path, self._store, self.readonly = path, store, store.readonly
        self._look(store)
        return store

    # -- other handles ---------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Take in what another handle on the directory committed."""
        with self.lock:
            if self.head[1] != self.seen:
                self._absorb(self.store.catch_up())

    def _look(self, store: Store) -> None:
        """Take over what `store` has new."""
        self.ledger = store.ledger
        self.head, self.seen = store.index.head, store.index.seen

    def _absorb(self, changed: dict[Any, int]) -> None:
        """Bring memory in line with keys that others replaced or deleted."""
        self._look(self.store)
        for key, digest in changed.items():
            value = self.in_memory(key)
            if key in self.dirty:
                keep = True
            elif value is MISSING or not self._differs(key, value, digest):
                keep = False
            else:
                keep = True
                self._revive(key, value)
            if keep and key not in self.ledger.rows:
                self.ledger.add(key)
            if not keep:
                self._forget(key)

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
        if self.readonly and action is not None:
            raise ReadOnlyError(str(self.path), action)

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Make `value`, of `size` bytes, the value of `key`, resident and dirty; needs the lock."""
        if key not in self.ledger.rows:
            self._check_key(key)
            self.ledger.add(key)
        elif type(key) is not str:
            self._check_key(key)
        uses = self.eviction.uses(key)
        self.dirty[key] = None
        self._leave(key)
        self._enter(key, value, size, max(uses, 1))
        if changeable(value):
            self._hold(key, value)
        else:
            self._settle(self._hands.empty())

    def _check_key(self, key: Hashable) -> None:
        if not self.serializer.trusts_pickle and not is_plain(key):
            raise KeyTypeError(key, f"only {PLAIN_KEYS}, when the values are not pickles")

    def _enter(self, key: Hashable, value: Any, size: int, uses: int) -> None:
        """Make a value resident."""
        self._hands.forget(key)
        self.inmem[key] = value
        if not changeable(value):
            self.fixed[key] = value
        self.eviction.enroll(key, size, uses)

    def _leave(self, key: Hashable) -> Any:
        """Let go of a value, if it is resident, and return it."""
        self.fixed.pop(key, None)
        self._touched.pop(key, None)
        value = self.inmem.pop(key, MISSING)
        self.eviction.discard(key)
        return value

    def get(self, key: Hashable) -> Any:
        """Return the value of a key; where it is resident, without a lock."""
        value = self.inmem.get(key, MISSING)
        if value is MISSING:
            return self.fetch(key)
        self.mark(key)
        size, touches = self._touched.get(key, (_shallow_size(value), 0))
        if touches == TOUCHES or size != _shallow_size(value):
            self._measure_again(key, value)
        else:
            self._touched[key] = (size, touches + 1)
        if not self._hands.try_hold(key, value):
            with self.lock:
                self._hold(key, value)
        # Another thread may have spilled it before it was in the hand.
        return value if self.inmem.get(key, MISSING) is value else self.fetch(key)

    def _measure_again(self, key: Hashable, value: Any) -> None:
        """Count a value that is in use with the size that it has by now."""
        size = self.measure(value)
        with self.lock:
            if self.inmem.get(key, MISSING) is not value:
                return
            if size == self.eviction.size(key):
                self._touched[key] = (_shallow_size(value), 0)
                return
            if len(self._touched) > 2 * len(self.inmem) + TOUCHES:  # left by threads that raced
                self._touched = {}
            self._touched.pop(key, None)
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
        nested = self.lock._is_owned()  # type: ignore[attr-defined]  # as Condition asks it
        with self.lock:
            self.begin()
        while True:
            entry = self._begin_load(key, nested, stream)
            if not isinstance(entry, Entry):
                return entry[0]
            try:
                value = self._load(key, entry)
                crowded = stream and entry.length > self.available - self.eviction.total
                size = entry.length if crowded else self.measure(value)
                digest = self._digest_as_loaded(value, entry)
            finally:
                self._end_load(key)
            with self.lock:
                if self._wants(key, entry):
                    if digest != entry.digest:
                        self._as_loaded[key] = digest
                    self._admit(key, value, size, uses, stream)
                    return value

    def _begin_load(self, key: Hashable, nested: bool, stream: bool) -> Entry | tuple[Any]:
        """Return where to read the value from, or the value itself in a tuple.

        A thread that holds the lock already reads for itself what another one is reading: to wait
        would let go of a lock that somebody relies on.
        """
        me = threading.get_ident()
        with self.lock:
            while True:
                if key in self.inmem:
                    self.mark(key)
                    value = self.inmem[key]
                    if key not in self.fixed:
                        self._hold(key, value)  # which may make room, and let go of it
                    return (value,)
                value = self._hands.get(key, MISSING)
                if value is not MISSING:
                    self._admit(key, value, self.measure(value), 0, stream=stream)
                    return (value,)
                row = self.ledger.rows.get(key, UNSAVED)
                if row == UNSAVED:
                    raise KeyError(key)
                if self._loading.setdefault(key, me) == me or nested:
                    return self.ledger.entry(row)
                self._loaded.wait()

    def _load(self, key: Hashable, entry: Entry) -> Any:
        if self.options.on_miss is not None:
            self.options.on_miss(key)
        try:
            return self.store.read(key, entry)
        except CorruptValueError:
            with self.lock:
                self.catch_up()
                row = self.ledger.rows.get(key, UNSAVED)
                if row != UNSAVED and self.ledger.entry(row) == entry:
                    raise
            return None  # another handle replaced it meanwhile: the caller looks again

    def _end_load(self, key: Hashable) -> None:
        with self.lock:
            self._loading.pop(key, None)
            self._loaded.notify_all()

    def _admit(self, key: Hashable, value: Any, size: int, uses: int, stream: bool) -> None:
        """Make a stored value resident if it may be, and put it in this thread's hand."""
        room = self.available - self.eviction.total if stream else self.available
        released = self._hands.hold(key, value)
        if size <= room:
            self._enter(key, value, size, uses)
        else:
            self._hands.leave(key, value)
        # Only now: both may commit, and then find that another handle replaced or deleted the key.
        self._settle(released)
        self._make_room()

    def offer(self, key: Hashable, entry: Entry, value: Any) -> None:
        """Make a value resident that was read from `entry`, unless that is history."""
        size = self.measure(value)
        digest = self._digest_as_loaded(value, entry)
        with self.lock:
            if self._wants(key, entry):
                if digest != entry.digest:
                    self._as_loaded[key] = digest
                self._admit(key, value, size, uses=1, stream=False)

    def _wants(self, key: Hashable, entry: Entry) -> bool:
        """Tell whether what was read from `entry` is the value, and the only copy of it."""
        row = self.ledger.rows.get(key, UNSAVED)
        current = row != UNSAVED and self.ledger.entry(row) == entry
        return current and self.in_memory(key) is MISSING

    def has(self, key: Hashable) -> bool:
        """Tell whether there is such a key."""
        if self.head[1] != self.seen:
            self.catch_up()
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
        self._settle(self._hands.hold(key, value))

    def _settle(self, released: list[tuple[Any, Any]]) -> None:
        """Make those values resident and dirty that changed while they were in hand."""
        changed = []
        for n, (key, value) in enumerate(released):
            try:
                if self._differs(key, value, self.ledger.digest(key)):
                    self._revive(key, value)
                    changed.append(key)
            except BaseException:  # an interrupt: nobody knows, so they count as changed
                for pair in released[n:]:
                    self._revive(*pair)
                raise
        for key in changed:
            self._make_room(key)

    def _revive(self, key: Hashable, value: Any) -> None:
        """Make a value that changed in place resident and dirty."""
        self.dirty[key] = None
        if key not in self.inmem:
            self._enter(key, value, self.measure(value), 1)

    def _revive_changed(self) -> None:
        """Find every value that changed in place, in memory and alive elsewhere."""
        for key in [key for key in self.inmem if key not in self.dirty]:
            self._must_write(key)
        for key, value in self._hands.alive():
            if self._hands.get(key) is value and self._differs(key, value, self.ledger.digest(key)):
                self._revive(key, value)

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
        changed = self._differs(key, self.inmem[key], self.ledger.digest(key))
        if changed:
            self.dirty[key] = None
        return changed

    # -- keys that go ----------------------------------------------------------------------------

    def delete(self, key: Hashable) -> None:
        """Delete a key without reading its value; needs the lock."""
        self.ledger.delete(key)
        self._forget(key)

    def _forget(self, key: Hashable) -> None:
        self.dirty.pop(key, None)
        self._as_loaded.pop(key, None)
        self._leave(key)
        self._hands.forget(key)

    def clear(self) -> None:
        """Delete every key without reading a value; needs the lock."""
        self.ledger.clear()
        self.fixed, self.inmem, self.dirty = {}, {}, {}
        self._touched, self._as_loaded, self._hands = {}, {}, Hands()
        self.eviction = Eviction(self.available)
        self.mark = self.eviction.marks.add

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
