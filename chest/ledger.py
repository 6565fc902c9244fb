"""Key to entry: what the committed frames add up to, and what is not committed yet.

A key leads to a row (see `chest.rows`): about 120 bytes a key, its str included, and replaying a
frame of new keys is one ``dict.update``. Who looks something up while frames come in finds the old
state or the new one.

Every key has a *serial*, its place in the order in which keys were first set. Frames come in the
order in which values left memory; the serials bring the keys of a reopened chest into the order
that its users know.
"""

from __future__ import annotations

import operator
import pickle
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from itertools import filterfalse, groupby, repeat
from typing import Any

from chest.aliases import ALIKE, UNSAVED, may_differ
from chest.blocks import Steps, block
from chest.columns import NUMBERS, Keys, Pickled, Puts, encode, gather, is_plain
from chest.replay import LEAST, SHARING, Replay

FRAME_KEYS = 4096  # so many keys at most does a bad byte in the index cost
BLOCK = 4096  # bytes that a file takes in steps of


class Ledger(Replay):
    """All keys of a chest, with the entries of those that are stored.

    Parameters
    ----------
    trusted : bool
        Whether keys may be unpickled.
    """

    def __init__(self, trusted: bool) -> None:
        super().__init__(trusted)
        self._ties = False  # whether keys have one number, which several handles gave

    # -- what the chest does ---------------------------------------------------------------------

    def add(self, key: Hashable) -> None:
        """Take in a key that is not there; at the end of the order."""
        serial = self._next_serial
        self._next_serial = serial + 1  # first: an interrupt may skip a number, not give it twice
        if type(key) not in ALIKE and may_differ(key):
            self._names[~serial] = key
        self.rows.setdefault(key, ~serial)  # what is collected as garbage may have committed it

    def delete(self, key: Hashable, *, last: bool = False) -> None:
        """Delete `key`; the next commit will say so.

        With `last` it was the last of them a moment ago. To find that takes a dict as many steps
        as were deleted behind it with ``del``; what its `popitem` takes is forgotten.
        """
        name = self.spelled(key)  # first: what is collected as garbage there may commit
        row = self.rows[key]  # asks for the hash even where there is no key: see dict.__delitem__
        if row >= 0:
            self._deleted[name] = row
        if last and next(reversed(self.rows)) is key:
            self.rows.popitem()
        else:
            del self.rows[key]
        if row < 0:
            self._names.pop(row, None)

    def delete_unread(self, key: Hashable) -> None:
        """Delete what the index has for a key that is new here: its class may have come since."""
        key = self.spelled(key)
        try:
            name = self._written([key], [UNSAVED])[0]
        except Exception:  # noqa: BLE001 -- a key that cannot be pickled is in no index
            return
        if type(name) is Pickled and name.data in self.unreadable:
            self._names[self.unreadable[name.data]] = name.data
            self._deleted[key] = self.unreadable.pop(name.data)

    def clear(self) -> None:
        """Delete every key; the next commit will say so in one word."""
        if self._cleared is None:
            cleared, deleted = self.rows, self._deleted
        else:
            cleared, deleted = self._cleared, self._deleted | dict(self.stored())
        names = self._names_of_stored()
        # No call from here on: an interrupt finds all of it or nothing.
        self._cleared, self._deleted, self.rows, self._names = cleared, deleted, {}, names

    @block
    def dropping(self) -> Steps:
        """Delete every key; they are back if the block fails before it has committed that."""
        before = self.rows, self._deleted, self._cleared, self._names
        self.clear()
        try:
            yield
        except BaseException:
            if self._cleared is not None:
                self.rows, self._deleted, self._cleared, self._names = before
            raise

    def mend(self) -> None:
        """Put right what an interrupt left half done: a key is what `rows` says."""
        if self._cleared is self.rows:
            self._cleared = None
        stored = dict(self.stored())
        self._deleted = {key: row for key, row in self._deleted.items() if key not in stored}

    def doomed(self) -> int:
        """Return how many bytes those stored values have whose deletion no commit has told yet."""
        rows = [*self._deleted.values(), *(self._cleared or {}).values()]
        return sum(self.room(row) for row in rows if row >= 0)

    def room(self, row: int) -> int:
        """Return about how many bytes on disk a stored value takes at most, with its record."""
        own = 0 if self._files[row] in self.packs else BLOCK
        keys = len(self.rows) + len(self._deleted) + len(self._cleared or ())
        return self._lengths[row] + own + self.needed // keys

    def room_of_all(self) -> int:
        """Return about how many bytes all that is stored takes, were each value in its own file."""
        return sum(self._lengths) - self.retired + BLOCK * len(self.rows) + self.needed

    @property
    def pending(self) -> bool:
        """Whether there is a deletion that no commit has told yet."""
        cleared = self._cleared is not None and (self._cleared or self.unreadable)
        return bool(self._deleted or cleared)

    def digest(self, key: Hashable) -> int:
        """Return the digest of the stored value of `key`, -1 if no commit holds one."""
        row = self.rows[key]
        return -1 if row < 0 else self._digests[row]

    def digests(self, keys: Collection[Any]) -> Sequence[int]:
        """Return the digests of the stored values of keys that a commit holds."""
        return gather(self._digests, gather(self.rows, keys))

    def files(self) -> set[str]:
        """Return every file that the committed state names."""
        rows = [*self.rows.values(), *self.unreadable.values(), *self._deleted.values()]
        rows += (self._cleared or {}).values()
        return {self._files[row] for row in rows if row >= 0}

    def unreadable_files(self) -> set[str]:
        """Return the files of keys that cannot be read."""
        return {self._files[row] for row in self.unreadable.values()}

    def is_packed(self, key: Hashable) -> bool:
        """Tell whether the stored value of `key` lies in a pack."""
        row = self.rows.get(key, UNSAVED)
        return row >= 0 and self._files[row] in self.packs

    def packed_in(self, names: Collection[str]) -> list[tuple[Any, int]]:
        """Return the keys whose stored values lie in certain packs, with their rows."""
        files = self._files
        return [(key, row) for key, row in self.stored() if files[row] in names]

    # -- commits ---------------------------------------------------------------------------------

    def encode(
        self, blocks: Iterable[Puts], serializer: tuple[str, bool | None], *, first: bool = True
    ) -> tuple[list[bytes], dict[Any, Any]]:
        """Return the payloads that record what is put and every deletion that is pending.

        With ``first=False`` they go on with the commit that earlier payloads began. Beside them
        are the names of those keys that are put and of which the index has one: see `_names`.
        """
        names: dict[Any, Any] = {}
        written = []
        for puts in blocks:
            keys = self._written(puts.keys, gather(self.rows, puts.keys))
            if not ALIKE.issuperset(map(type, keys)):
                named = zip(puts.keys, keys, strict=True)
                names.update(
                    (key, name.data if type(name) is Pickled else name)
                    for key, name in named
                    if type(name) is Pickled or type(name) in NUMBERS
                )
            written.append((self._serials_of(puts.keys), puts._replace(keys=keys)))
        batches = _in_batches(written)
        start = encode(
            next(batches, []),
            first=first,
            cleared=self._cleared is not None,
            serializer=serializer,
            left=self.left() if first else (),
            deleted=self._told(),
        )
        return [start, *map(encode, batches)], names

    def _told(self) -> list[Any]:
        """Return what a commit has to tell as deleted: not what another handle has told."""
        rows = {key: row for key, row in self._deleted.items() if row >= 0}
        return self._written([*rows], rows.values())

    def _serials_of(self, keys: list[Any]) -> list[int]:
        rows = gather(self.rows, keys)
        if max(rows, default=0) < 0:  # all are new
            return [*map(operator.invert, rows)]
        if min(rows, default=0) >= 0:
            return [*gather(self._serials, rows)]
        return [~row if row < 0 else self._serials[row] for row in rows]

    def committed_rows(self) -> dict[Any, int]:
        """Return the keys that are stored as of the last commit, with their rows."""
        if not self._deleted and self._cleared is None:
            rows = self.rows.copy()
            return rows if min(rows.values(), default=0) >= 0 else dict(self.stored())
        # Not the keys that no commit holds: they may be named otherwise.
        cleared = {key: row for key, row in (self._cleared or {}).items() if row >= 0}
        rows = {**cleared, **self._deleted, **dict(self.stored())}
        return {key: row for key, row in rows.items() if row >= 0}

    def revert(self) -> None:
        """Forget what is pending: keys that were added go, those that were deleted are back."""
        self.rows, self._names = self.committed_rows(), self._names_of_stored()
        self._deleted, self._cleared = {}, None
        self._in_order = False

    def _committed(self) -> tuple[list[Any], list[int]]:
        """Return the keys that the last commit left, as the index has them, and their rows."""
        committed = self.committed_rows()
        # Where there are no names, all are plain: to ask each of them would take long.
        keys = self._written([*committed], committed.values()) if self._names else [*committed]
        keys = [*keys, *map(Pickled, self.unreadable)]
        return keys, [*committed.values(), *self.unreadable.values()]

    def snapshot(self) -> list[bytes]:
        """Return payloads that record the committed state alone, and nothing of the past."""
        keys, rows = self._committed()
        files, places = gather(self._files, rows), gather(self._places, rows)
        packs = [*map({name: name for name in self.packs}.get, files, repeat(""))]
        order = sorted(range(len(keys)), key=[*zip(packs, places, strict=True)].__getitem__)
        blocks = []
        for pack, group in groupby(order, packs.__getitem__):
            some = [*group]
            numbers = gather(rows, some)
            columns = (self._places, self._lengths, self._digests)
            puts = Puts(
                [*gather(keys, some)],
                pack or [*gather(files, some)],
                *(gather(column, numbers) for column in columns),
            )
            blocks.append(([*gather(self._serials, numbers)], puts))
        names = [encode([], serializer=name) for name in self.serializers.items()]
        start = encode([], first=True, left=self.left())
        return [start, *names, *map(encode, _in_batches(blocks))]

    def least(self) -> int:
        """Return how many bytes a log of the committed state needs, or less; sooner than that."""
        keys, rows = self._committed()
        names = [*filterfalse(self.packs.__contains__, gather(self._files, rows))]
        spelled = pickle.dumps((Keys.of(keys)[:2], names), 5)
        # What is there again takes five bytes here, and may take two where there is less before it.
        nbytes = len(spelled) - 3 * spelled.count(pickle.LONG_BINGET)
        return max(nbytes, 0) + LEAST * len(rows)

    def committed(
        self,
        blocks: Collection[Puts],
        serializer: tuple[str, bool | None],
        payloads: Sequence[bytes],
        names: dict[Any, Any],
    ) -> None:
        """Take in the chest's own commit, which `encode` has recorded."""
        base, left = len(self._files), self.left()
        retired = [*self._deleted.values(), *(self._cleared or {}).values()]
        gone = self._bytes_of_deleted(Keys.of(self._told()), self._deleted.values())
        if self._cleared is not None:
            retired += self.unreadable.values()
            self.unreadable, self.needed = {}, 0
        self._deleted, self._cleared = {}, None
        pickles = [name for name in names.values() if type(name) is bytes]
        again = [*filter(self.unreadable.__contains__, pickles)]
        gone += self._bytes_of_replaced(gather(self.unreadable, again))
        self._note_read(again)
        for puts in blocks:
            rows = self._add_rows(*puts[1:], self._serials_of(puts.keys))
            if names:
                named = zip(map(names.get, puts.keys), rows, strict=True)
                self._names.update((row, name) for name, row in named if name is not None)
            gone += self._replace(puts.keys, rows)
        self._retire(retired)
        self._keep_files([file for puts in blocks for file in _files_of(puts)])
        if self._ties:  # keys that no commit holds come behind others
            self._in_order = False
        self.serializers[serializer[0]] = serializer[1]
        kinds = {kind for puts in blocks for kind in map(type, puts.keys)}
        whole = SHARING.isdisjoint(kinds) and not left
        nbytes = self._bytes_of_records(payloads, len(blocks)) if whole else 0
        self._weigh(nbytes, len(self._files) - base, gone)

    def inherit(self, old: Ledger) -> None:
        """Take over what is pending in `old`, which knew the same chest from an older index.

        `changed` becomes what differs from what was known there.
        """
        changed = {**old.changed}
        for key, row in old.stored():
            mine = self.rows.get(key, UNSAVED)
            if mine < 0 or self._digests[mine] != old._digests[row]:
                changed.setdefault(key, old._digests[row])
        self.changed = changed
        self.take_pending(old)
        self.unsure = old.unsure

    def take_pending(self, old: Ledger) -> None:
        """Take over the deletions and the new keys of `old`, if they are not taken over yet."""
        old._delete_all(old._cleared or {})
        for key, row in old._deleted.items():
            # Neither set again there, nor here since that was taken over.
            if row >= 0 and self.rows.get(key, UNSAVED) >= 0 and key not in old.rows:
                self.delete(key)
        for key, row in old._unsaved():
            if key not in self.rows:
                if row in old._names:
                    self._names[row] = old._names[row]
                self.rows[key] = row
                self._in_order = False
        self._next_serial = max(self._next_serial, old._next_serial)

    # -- order -------------------------------------------------------------------------------------

    def sort(self) -> None:
        """Bring the keys into the order in which they were first set."""
        if not self._in_order:
            keys, rows = [*self.rows], [*self.rows.values()]
            serials = self._serials_of(keys)
            order = sorted(range(len(keys)), key=serials.__getitem__)
            self._ties = len({*serials}) < len(keys)
            if self._ties:  # nobody knows who was first
                times = Counter(serials)
                named = [*map(self._named, keys, rows)]
                spelled = [times[serials[n]] > 1 and _spell(named[n]) for n in range(len(keys))]
                order.sort(key=lambda n: (serials[n], rows[n] < 0, spelled[n]))
            self.rows = dict(zip(gather(keys, order), gather(rows, order), strict=True))
            self._in_order = True

    def check(self) -> None:
        """Assert every invariant."""
        columns = (self._places, self._lengths, self._digests, self._serials)
        assert {*map(len, columns)} == {len(self._files)}, "columns of different lengths"
        assert all(~row < self._next_serial for _, row in self._unsaved())
        assert all(row < len(self._files) for row in self.rows.values())
        assert not self._deleted.keys() & dict(self.stored()).keys(), "stored and deleted"


def _files_of(puts: Puts) -> list[str]:
    return [] if isinstance(puts.files, str) else puts.files


def _in_batches(blocks: Iterable[tuple[list[int], Puts]]) -> Iterator[list[tuple[Any, Puts]]]:
    """Yield blocks, cut so that those of one frame are not too large."""
    batch: list[tuple[Any, Puts]] = []
    room = FRAME_KEYS
    for serials, puts in blocks:
        for start in range(0, len(serials), FRAME_KEYS):
            part = range(start, min(start + FRAME_KEYS, len(serials)))
            if batch and len(part) > room:
                yield batch
                batch, room = [], FRAME_KEYS
            whole = len(part) == len(serials)
            some = puts if whole else puts.pick(part)
            batch.append((serials[part.start : part.stop], some))
            room -= len(part)
    if batch:
        yield batch


def _spell(key: Any) -> str:
    """Return a text that orders keys in the same way always, and for everybody."""
    if type(key) is Pickled:
        key = key.data
    return f"{type(key).__name__} {key!r}" if is_plain(key) else ""
