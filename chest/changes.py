"""What of a chest changed in place, or by other handles on its directory."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from itertools import compress, filterfalse
from typing import Any

from chest.aliases import UNSAVED
from chest.blocks import Steps, block
from chest.columns import Entry, gather
from chest.errors import ChestClosedError, ReadOnlyError
from chest.hands import Hands
from chest.ledger import Ledger
from chest.residents import MISSING, Residents
from chest.serialize import SMALL, UndumpableError, changeable, digest_bytes
from chest.store import Store

COMPARED = 256  # small values dumped at a time to be compared


class Changes(Residents):
    """The values in memory, brought in line with what happened to them elsewhere."""

    # -- by other handles --------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Take in what another handle on the directory committed.

        While a thread is in a transaction, every operation comes here, and the others wait. So it
        does after an interrupt.
        """
        if self._is_publishing():
            return
        with self.lock, self:
            if self._is_recording and self.store.index.blocks:
                return  # amid a commit of this thread, which to mend or to look would undo
            self._loads.release_what_is_left()
            if self._torn:
                self._mend()
            if self._store is not None and not self._store.index.blocks:
                self._end_left_transaction(self._store)
            if self.head[1] != self.seen and not self.in_transaction:
                self.store.catch_up()
                self._absorb()

    def is_current(self) -> bool:
        """Tell whether what others committed is taken in, as far as anybody can tell."""
        return self.head[1] == self.seen or self._is_publishing()

    def _is_publishing(self) -> bool:
        """Tell whether the news are this very handle's, whose commit is not through yet."""
        store = self._store
        if store is None or self.in_transaction or self._torn:
            return False
        news: bool = self.head[1] == store.index.publishing
        return news

    def refresh(self) -> None:
        """Take in what others committed, also where the system tells late of it."""
        with self.lock, self:
            if self.closed:
                raise ChestClosedError(self.path)
            if self.path is not None and not self.in_transaction and not self._is_recording:
                self.store.catch_up(look=True)
                self._absorb()

    def _absorb(self) -> None:
        """Bring memory in line with keys that others replaced or deleted."""
        changed = self.store.ledger.changed
        for key in [*changed]:
            if not (key in self._loose or key in self.dirty or self._hands.knows(key)):
                self._forget(key)  # before hits are let through again
                changed.pop(key, None)  # what dies there may come here first
        self._look(self.store)
        while changed := self.ledger.changed:
            for key in [*changed]:
                # Else what pickled another one came here, too.
                if key in changed and changed is self.ledger.changed:
                    self._absorb_one(key)
                    changed.pop(key, None)

    def _absorb_one(self, key: Hashable) -> None:
        value = self.in_memory(key)
        keep = key in self.dirty or (value is not MISSING and self._differs(key, value))
        if self.in_memory(key) is not value:
            return  # what pickled it replaced it
        if keep and key not in self.ledger.rows:
            self._add(key)
        if keep:
            self._revive(key, value)
            if key in self.dirty:  # of what is on disk now
                self._soil(key, self.eviction.size(key))
        else:
            self._forget(key)

    def begin(self, action: str | None = None) -> None:
        """Start an operation: catch up with other handles; needs the lock.

        Parameters
        ----------
        action : str or None
            What is going to be changed.
        """
        if self.head[1] != self.seen:
            self.catch_up()
        if self._loads.unreleased:
            self._loads.release_what_is_left()
        if self._hands.kept and self._hands.is_time():
            with self:
                self._look_at_lent()
        if self.readonly and action is not None:
            raise ReadOnlyError(str(self.path), action)

    def begin_to_tell(self) -> None:
        """Start an operation that tells figures, and count hits from now on; needs the lock."""
        if self.closed:
            raise ChestClosedError(self.path)
        self.begin()
        if self.meter.hits is None:
            self.meter.hits = 0
            self._arm()

    @block
    def _writing(self) -> Steps:
        """Hold the lock of the directory."""
        store = self.store
        with store.writing():
            try:
                yield
            finally:
                if store is self._store and store.index.blocks == 1:  # that is this one
                    self._end_left_transaction(store)

    def _end_left_transaction(self, store: Store) -> None:
        """Roll back a transaction whose block was left when that could not be done."""
        if store.index.pinned:
            self._roll_back(store)

    @abstractmethod
    def _roll_back(self, store: Store) -> None:
        """Take back what a transaction did, also in memory."""

    # -- in place ----------------------------------------------------------------------------------

    @property
    def _saves_changes(self) -> bool:
        return self.options.writeback and not self.readonly

    def _hold(self, key: Hashable, value: Any) -> None:
        """Put a value in this thread's hand, and look at what was in it."""
        self._note(key)
        if before := self._hands.hold(key, value):
            self._settle(before)
            self._hands.swap(key, value)  # hooks may have read others

    def _note(self, key: Hashable) -> None:
        """Take note that a transaction may change a value."""
        if self.in_transaction:
            self._inside.add(key)

    def _look_at_lent(self, *, every: bool = False) -> None:
        """Settle what nobody has any more, of some of the values that are lent or of `every`."""
        if not self._hands.settling:
            self._settle(self._hands.due(every=every))

    def _settle(self, keys: list[Any]) -> None:
        """Make values that changed while they were lent resident and dirty, let go of the others.

        What is pickled for it may come here, too, and leaves that to whom it interrupts.
        """
        hands = self._hands
        if hands.settling or not keys:
            return
        hands.settling = True
        try:
            with hands.watched(keys):
                changed = self._revive_or_let_go(hands, keys)
        finally:
            hands.settling = False
        for key in changed:
            self._make_room(key)

    def _revive_or_let_go(self, hands: Hands, keys: list[Any]) -> list[Any]:
        # What is referred to here is not let go of for good before this returns.
        keys = [*filterfalse(self.ledger.changed.__contains__, keys)]  # that comes next
        entries = {key: hands.kept[key] for key in keys if key in hands.kept}
        small = hands.kept_small(keys)
        pairs, others = self._compare([*small], [*small.values()])
        others += filterfalse(small.__contains__, keys)
        for key, value in pairs:
            self._revive(key, value)
        changed = [key for key, _ in pairs]
        del small, pairs  # else all of them are lent
        changed += [*filter(self._has_changed, others)]
        for key in filterfalse({*changed}.__contains__, entries):
            hands.let_go(key, entries[key])
        return changed

    def _has_changed(self, key: Hashable) -> bool:
        """Make a value resident and dirty if it changed while it was not; return whether it did."""
        value, row = self._hands.get(key, MISSING), self.ledger.rows.get(key, UNSAVED)
        if value is MISSING or row < 0:
            return False
        try:
            changed = self._differs(key, value)
        except Exception:
            self._revive(key, value)  # nobody knows
            raise
        if changed:
            self._revive(key, value)
        return changed

    def _revive(self, key: Hashable, value: Any) -> None:
        """Make a value that changed in place resident and dirty, if its key is still there."""
        size = 0 if key in self.inmem else self.measure(value)
        if key not in self.ledger.rows or self.in_memory(key) is not value:
            return  # what measured or pickled it replaced or deleted it
        self.dirty.setdefault(key, 0)
        if key not in self.inmem:
            self._enter(key, value, size, 1)

    def _revive_changed(self) -> None:
        """Find every value that changed in place, in memory and alive elsewhere."""
        if not self._saves_changes:
            return
        self._find_changed([*self._loose])
        for key, value in self._hands.alive():
            if self._hands.get(key) is value and self._differs(key, value):
                self._revive(key, value)

    def _find_changed(self, keys: list[Any]) -> None:
        """Mark those of these resident values dirty that changed in place."""
        if not self._saves_changes:
            return
        clean = [*filterfalse(self.dirty.__contains__, keys)] if self.dirty else keys
        small = self.eviction.small(clean)
        for start in range(0, len(small), COMPARED):
            some = small[start : start + COMPARED]
            try:
                values = gather(self.inmem, some)
            except KeyError:  # what was pickled deleted some, or let them leave
                some = [*filter(self.inmem.__contains__, some)]
                values = gather(self.inmem, some)
            changed, others = self._compare(some, values)
            for key, value in changed:
                if self.inmem.get(key, MISSING) is value:  # what was pickled may set others
                    self.dirty.setdefault(key, 0)
            for key in others:
                self._must_write(key)
        if small is not clean:
            for key in filterfalse({*small}.__contains__, clean):
                self._must_write(key)

    def _compare(
        self, small: list[Any], values: Sequence[Any]
    ) -> tuple[list[tuple[Any, Any]], list[Any]]:
        """Pickle small clean values, and compare them, in few steps.

        Returns
        -------
        changed : list
            The keys and values of those that changed in place.
        others : list
            Those of the keys that have to be looked at one by one.
        """
        if not self._saves_changes:
            return [], []
        if not self.serializer.direct or self.ledger.changed:
            return [], small
        try:
            expected: Iterable[Any] = self.ledger.digests(small)
            if self._as_loaded:
                expected = [*map(self._as_loaded.get, small, expected)]
            streams: Any = self.serializer.dumps_all(values)
            differ = map(operator.ne, expected, map(digest_bytes, streams))
            return [(small[n], values[n]) for n in compress(range(len(small)), differ)], []
        except (LookupError, TypeError):  # what is pickled deletes or sets others, or cannot be
            return [], small

    def _differs(self, key: Hashable, value: Any) -> bool:
        """Tell whether a clean value is not what was stored when it came.

        What it could do when it came counts, not what it is by now: an array that was changed may
        be read-only since.
        """
        fixed = key not in self._loose if key in self.inmem else self._hands.is_fixed(key)
        fixed = fixed and not changeable(value)  # by now; an array may have been either
        if fixed or not self._saves_changes:
            return False
        row, replaced = self.ledger.rows.get(key, UNSAVED), self.ledger.changed
        digest = replaced[key] if key in replaced else self.ledger.digest(key)
        stored = self.ledger.length(row) if row >= 0 else SMALL
        size = self.eviction.size(key) if key in self.eviction else stored
        expected = self._as_loaded.get(key, digest)
        try:
            now = self.serializer.digest(value, size)
            if now is None:
                staged = self.store.stage(value, size)
                self.store.directory.remove_staged([staged.path])
                now = staged.digest
        except UndumpableError:
            return expected is not None
        except OSError:
            return True  # who writes it will be told
        return now != expected

    def _digest_as_loaded(self, value: Any, entry: Entry) -> int | None:
        """Return the digest that a value has that was just loaded, None if it has none.

        Often that of its file. But the same value may have several pickles: sets of str have
        another order in every process, and another protocol or class may have written it.
        """
        if not (self._saves_changes and changeable(value)):
            return entry.digest
        try:
            digest = self.serializer.digest(value, entry.length)
        except UndumpableError:
            return None
        return entry.digest if digest is None else digest

    def digests_as_loaded(
        self, ledger: Ledger, values: list[Any], rows: list[int]
    ) -> list[int | None]:
        """Do that for small values of certain rows, in few steps."""
        if not self._saves_changes:
            return [ledger.entry(row).digest for row in rows]
        streams = self.serializer.dumps_all(values)
        return [digest_bytes(some) if isinstance(some, bytes) else None for some in streams]

    def _note_as_loaded(self, key: Hashable, digest: int | None) -> None:
        """Note the digest of a value that is about to be in memory; forget those of the gone."""
        known = self._as_loaded
        if len(known) > 2 * (len(self.inmem) + len(self._hands)) + COMPARED:
            here = self.inmem
            self._as_loaded = {k: d for k, d in known.items() if k in here or self._hands.knows(k)}
        self._as_loaded[key] = digest

    def _must_write(self, key: Hashable) -> bool:
        if key in self.dirty or key not in self.inmem or key not in self.ledger.rows:
            return key in self.dirty
        value = self.inmem[key]
        changed = self._differs(key, value)
        if changed and self.inmem.get(key, MISSING) is value:
            self.dirty.setdefault(key, 0)
        return changed
