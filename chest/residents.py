"""The values in memory: which they are, and how one enters and leaves.

A value is *resident* when it is in `inmem`; *dirty* when the disk does not hold it in this form.
One that is neither resident nor dead may be changed, too: see `chest.hands`.

What is built upon this, each layer on the one before: `chest.changes`, `chest.loading`,
`chest.saving`, `chest.spilling`, `chest.memory`.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable
from traceback import clear_frames
from types import TracebackType
from typing import Any, NoReturn, Self

from chest.aliases import UNSAVED
from chest.columns import is_plain
from chest.errors import FULL, ChestClosedError, KeyTypeError, locating, say, told
from chest.eviction import SLACK, Eviction
from chest.hands import Hands
from chest.ledger import Ledger
from chest.loads import Loads
from chest.options import Options
from chest.serialize import Serializer, changeable
from chest.sizes import nbytes as default_nbytes
from chest.stats import Meter
from chest.store import Store

logger = logging.getLogger("chest")

OPENING_BYTES = 4096  # about what a directory with an empty index takes
PLAIN_KEYS = "str, bytes, int, float, bool, None, and tuples and frozensets of these can be"
NEVER = -1  # what the head never holds: every operation finds a difference, and catches up

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
        # Whether a hook, or whatever is not pickle itself, has to see each value that is read.
        self.reads_alone = options.on_miss is not None or not serializer.direct
        self.transactions = 0  # begun so far: who looks without the lock looks again if one began
        self._make_lock()
        self._start()
        if self.path is not None:
            self._open_store(self.path)

    def _make_lock(self) -> None:
        self.lock = threading.RLock()
        self._loads = Loads(self.lock)

    def holds_lock(self) -> bool:
        """Tell whether this thread has the lock."""
        return self._loads.holds_lock()

    def _start(self) -> None:
        """Hold nothing in memory, and know nothing of the directory yet."""
        self.meter = Meter()
        self.readonly = self.options.readonly
        self._torn = False  # by an interrupt in the midst of an operation
        self._outdated = 0  # bytes by which a commit would make what is on disk less
        self._mean = 0.0  # bytes of what is dirty, when it was last counted
        self._free_after = 0.0  # the time before which nothing is committed for that
        self.in_transaction = False
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
        self.dirty: dict[Any, int] = {}  # with the bytes that the disk holds beyond their sizes
        self._shrunk = 0  # the sum of these
        self._hands = Hands(self.available / SLACK)
        self.eviction = Eviction(self.available)
        self._arm()

    def set_budget(self, available: float) -> None:
        """Let values take so many bytes from now on; needs the lock."""
        self.eviction.set_budget(available)  # first: it raises where the chest is closed
        self.available = available
        self._hands.room = available / SLACK

    def _arm(self) -> None:
        """Let hits look at what is current: they take all that they need in one step."""
        fixed: Any = {} if self.in_transaction else self._fixed
        self.quick = (self.head, self.seen, fixed, self.meter.counting(self.eviction.marks.add))

    def __enter__(self) -> Self:
        """Begin what has to be mended if it is interrupted; under the lock."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None and (not issubclass(kind, Exception) or issubclass(kind, _ANYWHERE)):
            self._tear()
            clear_frames(traceback)  # which may hold a lock, or much memory, as long as it lives

    def _tear(self) -> None:
        """Have the next operation mend everything."""
        self._torn = True
        self.seen = NEVER
        self.quick = (self.head, NEVER, *self.quick[2:])

    def _mend(self) -> None:
        """Put right what an interrupt left half done.

        What `inmem`, `dirty` and the ledger say counts, and each of them is changed in one step;
        all else follows from them.
        """
        if self._store is not None:
            self._store.is_recording = False
        self.ledger.mend()
        rows = self.ledger.rows
        self.inmem = {key: value for key, value in self.inmem.items() if key in rows}
        for key in [key for key, row in rows.items() if row < 0]:
            if key not in self.inmem:
                self.ledger.delete(key)
            self.dirty.setdefault(key, 0)
        self.dirty = {key: more for key, more in self.dirty.items() if key in self.inmem}
        self._as_loaded = {key: d for key, d in self._as_loaded.items() if key in rows}
        self._hands.mend(rows, self.inmem)
        self._loads.mend()
        loose = self._loose
        self._touched, self._fixed, self._fresh, self._loose = {}, {}, {}, {}
        self.eviction = Eviction(self.available)
        self._arm()
        for key, value in self.inmem.items():
            size = self.measure(value)
            self._enter(key, value, size, 1)
            if key in loose:  # what it could do when it came counts
                self._keep_loose(key, value)
            if key in self.dirty:
                self.dirty[key] = self._surplus(key, size)
        self._shrunk = sum(self.dirty.values())
        self._outdated = self.ledger.doomed() + self._shrunk
        if self._store is not None and self._store.untidy:  # nobody knows how much that is
            self._outdated = sys.maxsize
        if self._free_after == math.inf:
            self._free_after = 0.0
        self._torn = False

    def start_anew(self) -> None:
        """Become a new handle on the directory: in a forked child, where all is the parent's."""
        if self.closed:
            return
        if self._store is not None:
            self._store.index.abandon()
            self._store.packs.keep(())  # else those that are removed stay on disk
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
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        except BaseException:
            self.path, self._store = None, None
            shutil.rmtree(path)
            raise
        return store

    def _open_store(self, path: str, *, reopen: bool = False) -> Store:
        try:
            with locating(path):
                store = Store(path, self.serializer, self.options, reopen=reopen)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise told(error, path, OPENING_BYTES) from error
        store.ledger.inherit(self.ledger)
        self.path, self._store, self.readonly = path, store, store.readonly
        self._look(store)
        return store

    def _look(self, store: Store) -> None:
        """Take over what `store` has new."""
        if self.ledger is not store.ledger:
            with store.recording():
                old, self.ledger = self.ledger, store.ledger
                self.ledger.take_pending(old)  # what a hook did since it was inherited
        self.head = store.index.head
        self.seen = NEVER if self.in_transaction or self._torn else store.index.seen
        self._arm()
        store.index.publishing = -1

    # -- values that come and go -------------------------------------------------------------------

    def _check_key(self, key: Hashable) -> None:
        if not self.serializer.trusts_pickle and not is_plain(key):
            raise KeyTypeError(key, f"only {PLAIN_KEYS}, when the values are not pickles")

    def _enter(self, key: Hashable, value: Any, size: int, uses: float) -> None:
        """Make a value resident."""
        if changeable(value):
            self._keep_loose(key, value)
        elif self.in_transaction:
            self.inmem[key] = value
            self._fresh[key] = value  # a hit that began before may be looking at `_fixed`
        else:
            self._keep_fixed(key, value)
        self._hands.forget(key)  # only now: an interrupt before that would leave it nowhere
        self.eviction.enroll(key, size, uses)

    def _keep_fixed(self, key: Hashable, value: Any) -> None:
        self.inmem[key] = value
        if self._fixed is not self.inmem:
            self._fixed[key] = value

    def _keep_loose(self, key: Hashable, value: Any) -> None:
        self._loose[key] = None
        self._hide(key)
        self.inmem[key] = value

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

    def in_memory(self, key: Hashable) -> Any:
        """Return the value of a key that is resident or alive elsewhere, `MISSING` if none is."""
        return self.inmem[key] if key in self.inmem else self._hands.get(key, MISSING)

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

    def stores_like(self, other: Residents) -> bool:
        """Tell whether files of one chest can be files of the other."""
        mine, theirs = self.serializer, other.serializer
        return (mine.name, mine.load, mine.open) == (theirs.name, theirs.load, theirs.open)

    def _add(self, key: Hashable) -> None:
        """Take in a key that is not there."""
        ledger = self.ledger
        ledger.add(key)
        if self.ledger is not ledger and key not in self.ledger.rows:  # read anew amid that
            self.ledger.add(key)

    def delete(self, key: Hashable, *, last: bool = False) -> None:
        """Delete a key without reading its value; needs the lock."""
        self._demand_quiet()
        _ = self.in_memory(key)  # what a value does as it dies comes when all this is done
        with self:
            self._hide(key)  # first, so that no hit finds what `in` does not
            ledger = self.ledger
            row = ledger.rows.get(key, UNSAVED)
            if row < 0 and ledger.unreadable and key in ledger.rows:
                ledger.delete_unread(key)
            ledger.delete(key, last=last)
            if self.ledger is not ledger and key in self.ledger.rows:  # read anew amid that
                self.ledger.delete(key)
            self._outdated += ledger.room(row) if row >= 0 else 0
            self._forget(key)

    def _demand_quiet(self) -> None:
        if self._store is not None:
            self._store.demand_quiet()

    @property
    def _is_recording(self) -> bool:
        return self._store is not None and self._store.is_recording

    def _soil(self, key: Hashable, size: int) -> None:
        """Mark a value as one that the disk does not hold, which has something else for its key."""
        more = self._surplus(key, size)
        self._count_outdated(more - self.dirty.get(key, 0))
        self.dirty[key] = more

    def _surplus(self, key: Hashable, size: int) -> int:
        """Return how many bytes more than `size` the disk holds for a key."""
        row = self.ledger.rows[key]
        return max(self.ledger.length(row) - size, 0) if row >= 0 else 0

    def _count_outdated(self, more: int) -> None:
        self._shrunk += more
        self._outdated += more

    def _forget(self, key: Hashable) -> None:
        if more := self.dirty.pop(key, 0):
            self._count_outdated(-more)
        self._as_loaded.pop(key, None)
        self._leave(key)
        self._hands.forget(key)

    def clear(self) -> None:
        """Delete every key without reading a value; needs the lock."""
        self._demand_quiet()
        _ = self.inmem, self._hands  # what values do as they die comes when all this is done
        with self:
            self._fixed = {}  # first, so that no hit finds what `in` does not
            self._arm()
            ledger = self.ledger
            room = ledger.room_of_all()
            ledger.clear()
            if self.ledger is not ledger:  # a hook had it read anew amid that
                self.ledger.clear()
            self._empty()
            self._outdated = room

    # -- for the subclasses ------------------------------------------------------------------------

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
        level = logging.DEBUG if what in self.meter.said else logging.WARNING
        self.meter.said.add(what)
        logger.log(level, message, *args)
