"""Key to entry: what the committed frames add up to, and what is not committed yet.

A key leads to a row, and a row into columns, which are arrays of integers: about 120 bytes a key,
its str included, and replaying a frame of new keys is one ``dict.update``. Rows are only ever
added, so that who looks something up while frames come in finds the old state or the new one.

Every key has a *serial*, its place in the order in which keys were first set. Frames come in the
order in which values left memory; the serials bring the keys of a reopened chest into the order
that its users know.
"""

from __future__ import annotations

import logging
import operator
import pickle
from array import array
from collections.abc import Hashable, Iterable, Iterator
from itertools import islice
from typing import Any

from chest.columns import Block, Entry, Frame, Keys, decode, encode

UNSAVED = -1  # the row of a key whose value no commit holds
FRAME_KEYS = 1 << 16

logger = logging.getLogger("chest")


class Ledger:
    """All keys of a chest, with the entries of those that are stored.

    Parameters
    ----------
    trusted : bool
        Whether keys may be unpickled.

    Attributes
    ----------
    rows : dict
        Every key, in order, with its row or `UNSAVED`; replaced as a whole when cleared.
    records : int
        How many records the frames held; where it is far above ``len(rows)`` the log wants
        compacting.
    serializers : dict of str to (bool or None)
        The serializers that wrote values, and whether each writes text.
    obsolete : list of Entry
        What the last commit made obsolete, and whose files may still be there.
    folded : set of str
        The lower-case forms of the names in use that have capital letters, folders among them.
    unreadable : dict of bytes to int
        Keys that cannot be read here, as they were pickled, with their rows.
    changed : dict
        Keys that others replaced or deleted, with the digests of the values they had here; for
        the user of the ledger to act on, and to take out.
    """

    def __init__(self, trusted: bool) -> None:
        self.trusted = trusted
        self.rows: dict[Any, int] = {}
        self.records = 0
        self.serializers: dict[str, bool | None] = {}
        self.obsolete: list[Entry] = []
        self.folded: set[str] = set()
        self.unreadable: dict[bytes, int] = {}
        self.changed: dict[Any, int] = {}
        self._files: list[str] = []
        self._places = array("Q")
        self._lengths = array("Q")
        self._digests = array("Q")
        self._serials = array("Q")
        self._next_serial = 0
        self._in_order = True
        self._new: dict[Any, int] = {}  # serials of the keys that are UNSAVED
        self._deleted: dict[Any, int] = {}  # not committed yet: keys with the rows they had
        self._cleared: dict[Any, int] | None = None  # not committed yet: what `rows` was

    # -- what the chest does ---------------------------------------------------------------------

    def add(self, key: Hashable) -> None:
        """Take in a key that is not there; at the end of the order."""
        self._new[key] = self._next_serial
        self._next_serial += 1
        self.rows[key] = UNSAVED

    def delete(self, key: Hashable) -> None:
        """Delete `key`; the next commit will say so."""
        row = self.rows[key]  # asks for the hash even where there is no key: see dict.__delitem__
        if row != UNSAVED:
            self._deleted[key] = row
        del self.rows[key]
        self._new.pop(key, None)

    def clear(self) -> None:
        """Delete every key; the next commit will say so in one word."""
        if self._cleared is None:
            cleared, deleted = self.rows, self._deleted
        else:
            cleared, deleted = self._cleared, self._deleted | dict(self.stored())
        # No call from here on: an interrupt finds all of it or nothing.
        self._cleared, self._deleted, self.rows, self._new = cleared, deleted, {}, {}

    def mend(self) -> None:
        """Put right what an interrupt left half done: a key is what `rows` says."""
        if self._cleared is self.rows:
            self._cleared = None
        stored = dict(self.stored())
        self._deleted = {key: row for key, row in self._deleted.items() if key not in stored}
        unsaved = [key for key, row in self.rows.items() if row == UNSAVED]
        for key in unsaved:
            if key not in self._new:
                self._new[key] = self._next_serial
                self._next_serial += 1
        self._new = {key: self._new[key] for key in unsaved}

    def _delete_all(self, rows: dict[Any, int]) -> None:
        self._deleted.update((key, row) for key, row in rows.items() if row != UNSAVED)

    @property
    def pending(self) -> bool:
        """Whether there is a deletion that no commit has told yet."""
        cleared = self._cleared is not None and (self._cleared or self.unreadable)
        return bool(self._deleted or cleared)

    def entry(self, row: int) -> Entry:
        """Return where the value of a row lies."""
        return Entry(self._files[row], self._places[row], self._lengths[row], self._digests[row])

    def digest(self, key: Hashable) -> int:
        """Return the digest of the stored value of `key`, -1 if no commit holds one."""
        row = self.rows[key]
        return -1 if row == UNSAVED else self._digests[row]

    def stored(self) -> Iterator[tuple[Any, int]]:
        """Yield the keys that a commit holds, with their rows."""
        return ((key, row) for key, row in self.rows.items() if row != UNSAVED)

    def files(self) -> set[str]:
        """Return every file that the committed state names."""
        rows = [*self.rows.values(), *self.unreadable.values(), *self._deleted.values()]
        rows += (self._cleared or {}).values()
        return {self._files[row] for row in rows if row != UNSAVED}

    # -- commits ---------------------------------------------------------------------------------

    def encode(
        self, puts: dict[Any, Entry], serializer: tuple[str, bool | None], *, first: bool = True
    ) -> list[bytes]:
        """Return the payloads that record `puts` and every deletion that is pending.

        With ``first=False`` they go on with the commit that earlier payloads began.
        """
        items = ((key, self._serial(key), entry) for key, entry in puts.items())
        start = encode(
            list(islice(items, FRAME_KEYS)),
            first=first,
            cleared=self._cleared is not None,
            serializer=serializer,
            left=self.obsolete if first else (),
            deleted=self._deleted,
        )
        return [start, *_encode_rest(items)]

    def _serial(self, key: Hashable) -> int:
        row = self.rows[key]
        return self._new[key] if row == UNSAVED else self._serials[row]

    def committed_rows(self) -> dict[Any, int]:
        """Return the keys that are stored as of the last commit, with their rows."""
        rows = {**(self._cleared or {}), **self._deleted, **dict(self.stored())}
        return {key: row for key, row in rows.items() if row != UNSAVED}

    def revert(self) -> None:
        """Forget what is pending: keys that were added go, those that were deleted are back."""
        self.rows = self.committed_rows()
        self._new, self._deleted, self._cleared = {}, {}, None
        self._in_order = False

    def snapshot(self) -> list[bytes]:
        """Return payloads that record the committed state alone, and nothing of the past."""
        rows = self.committed_rows()
        items = ((key, self._serials[row], self.entry(row)) for key, row in rows.items())
        names = [encode([], serializer=name) for name in self.serializers.items()]
        return [encode([], first=True, left=self.obsolete), *names, *_encode_rest(items)]

    def committed(self, puts: dict[Any, Entry], serializer: tuple[str, bool | None]) -> None:
        """Take in the chest's own commit, which `encode` has recorded."""
        gone = [*self._deleted.values(), *(self._cleared or {}).values()]
        if self._cleared is not None:
            gone += self.unreadable.values()
            self.unreadable = {}
        self.records += len(self._deleted)
        self._deleted, self._cleared = {}, None
        serials = array("Q", map(self._serial, puts))
        base = self._add_rows(list(puts.values()), serials)
        self._replace(list(puts), range(base, base + len(puts)))
        for row in gone:
            self._retire(row)
        self.serializers[serializer[0]] = serializer[1]

    def _add_rows(self, entries: list[Entry], serials: array[int]) -> int:
        """Add rows; return the number of the first."""
        base = len(self._files)
        self._files += [entry.file for entry in entries]
        self._places += array("Q", [entry.place for entry in entries])
        self._lengths += array("Q", [entry.length for entry in entries])
        self._digests += array("Q", [entry.digest for entry in entries])
        self._serials += serials
        self.records += len(entries)
        self._note_capitals(self._files[base:])
        return base

    def take(self, entries: dict[Any, Entry]) -> None:
        """Take in what an index of another format says."""
        base = self._add_rows(list(entries.values()), array("Q", range(len(entries))))
        self.rows.update(zip(entries, range(base, base + len(entries)), strict=True))
        self._next_serial = len(entries)

    def apply(self, payload: bytes) -> None:
        """Take in what another handle committed, and add to `changed`; what is pending stays so.

        Raises
        ------
        FrameError
            If the payload is not a frame's.
        """
        frame = decode(payload)
        self._apply_head(frame)
        if frame.first:  # what earlier commits deleted, too, may come back as a new key
            self._deleted = {key: row for key, row in self._deleted.items() if row != UNSAVED}
        if frame.cleared:
            self._apply_clear()
        if self._cleared is not None:  # from here on "everything" would be too much
            self._delete_all(self._cleared)
            self._cleared = None
        deleted, unread = self._read_keys(frame.deleted)
        for key in deleted:
            if key in self._deleted:  # stays deleted, whatever becomes of it there
                self._retire(self._deleted[key])
                self._deleted[key] = UNSAVED
            row = self.rows.get(key, UNSAVED)
            if row != UNSAVED:
                self._tell([(key, row)])
                del self.rows[key]
                self._retire(row)
        for data in unread:
            self._retire(self.unreadable.pop(data, UNSAVED))
        self.records += len(deleted)
        for block in frame.blocks:
            self._put(block)

    def _tell(self, rows: Iterable[tuple[Any, int]]) -> None:
        """Note that keys are about to be replaced or deleted, before an interrupt can come."""
        for key, row in rows:
            if row != UNSAVED:
                self.changed.setdefault(key, self._digests[row])

    def _apply_head(self, frame: Frame) -> None:
        if frame.first:
            self.obsolete = [*frame.left]
        if frame.serializer is not None:
            name, text = frame.serializer
            self.serializers[name] = text

    def _apply_clear(self) -> None:
        self._tell(self.stored())
        gone = [*dict(self.stored()).values(), *self._deleted.values(), *self.unreadable.values()]
        gone += (self._cleared or {}).values()
        for row in gone:
            self._retire(row)
        self._delete_all(self._cleared or {})
        self._deleted = dict.fromkeys(self._deleted, UNSAVED)
        self._cleared, self.unreadable = None, {}
        self.rows = dict.fromkeys(self._new, UNSAVED)

    def inherit(self, old: Ledger) -> None:
        """Take over what is pending in `old`, which knew the same chest from an older index.

        `changed` becomes what differs from what was known there.
        """
        changed = {**old.changed}
        for key, row in old.stored():
            mine = self.rows.get(key, UNSAVED)
            if mine == UNSAVED or self.entry(mine) != old.entry(row):
                changed.setdefault(key, old.entry(row).digest)
        self.changed = changed
        old._delete_all(old._cleared or {})
        for key, row in old._deleted.items():
            if row != UNSAVED and key in self.rows:
                self.delete(key)
        for key, serial in old._new.items():
            if key not in self.rows:
                self.rows[key] = UNSAVED
                self._new[key] = serial
                self._in_order = False
        self._next_serial = max(self._next_serial, old._next_serial)
        self.sort()

    def _retire(self, row: int) -> None:
        if row != UNSAVED:
            entry = self.entry(row)
            self.obsolete.append(entry)
            self.folded.discard(entry.file.lower())

    def _put(self, block: Block) -> None:
        """Add the rows of a block."""
        base = len(self._files)
        self._note_order(block.serials)
        self._note_capitals(block.files)
        self._files += block.files
        self._places += block.places
        self._lengths += block.lengths
        self._digests += block.digests
        self._serials += block.serials
        self.records += len(block.files)
        keys, rows = self._block_keys(block, base)
        again = {key for key in self._deleted if key in self.rows}  # and then set here
        self._replace(keys, rows, tell=True)
        for key in self._deleted.keys() & keys if self._deleted else ():
            self._retire(self._deleted.pop(key))
            if key not in again:  # deleted here: stays so
                self._deleted[key] = self.rows.pop(key)

    def _replace(self, keys: list[Hashable], rows: Iterable[int], *, tell: bool = False) -> None:
        """Let keys lead to new rows; with `tell`, note what was there before as changed."""
        replaced: dict[Any, int] = {}
        if not self.rows.keys().isdisjoint(keys):
            replaced = {key: self.rows[key] for key in keys if key in self.rows}
        if tell:
            self._tell(replaced.items())
        self.rows.update(zip(keys, rows, strict=True))
        for key, row in replaced.items():
            self._new.pop(key, None)
            if row != UNSAVED and self._files[row] != self._files[self.rows[key]]:
                self._retire(row)

    def _block_keys(self, block: Block, base: int) -> tuple[list[Hashable], Iterable[int]]:
        plain, pickled = block.keys
        if not pickled:
            return plain, range(base, base + len(plain))
        rows = dict(zip(plain, range(base, base + len(plain)), strict=True))
        for row, data in enumerate(pickled, base + len(plain)):
            read, unread = self._read_keys(Keys([], [data]))
            if unread:
                self._retire(self.unreadable.get(data, UNSAVED))
                self.unreadable[data] = row
            else:
                rows[read[0]] = row
        return list(rows), rows.values()

    def _read_keys(self, keys: Keys) -> tuple[list[Any], list[bytes]]:
        """Return the keys that can be read, in order, and the pickles of those that cannot."""
        known, unread = [*keys.plain], []
        for data in keys.pickled:
            try:
                known.append(_load_key(data, self.trusted))
            except Exception as error:  # noqa: BLE001 -- whatever a class that changed can raise
                unread.append(data)
                if self.trusted and data not in self.unreadable:
                    logger.warning("a key cannot be read, and is kept in the file: %r", error)
        return known, unread

    # -- order and names -------------------------------------------------------------------------

    def _note_order(self, serials: array[int]) -> None:
        rising = all(map(operator.lt, serials, islice(serials, 1, None)))
        if not rising or serials[0] < self._next_serial:
            self._in_order = False
        self._next_serial = max(self._next_serial, max(serials) + 1)

    def sort(self) -> None:
        """Bring the keys into the order in which they were first set."""
        if not self._in_order:
            self.rows = dict(sorted(self.rows.items(), key=lambda item: self._serial(item[0])))
            self._in_order = True

    def forget_folders(self, names: Iterable[str]) -> None:
        """Note that folders have gone."""
        self.folded.difference_update(name.lower() for name in names)

    def _note_capitals(self, names: list[str]) -> None:
        every = "/".join(names)
        if every == every.lower():
            return
        for name in names:
            while name and name != name.lower():
                self.folded.add(name.lower())
                name = name.rpartition("/")[0]  # noqa: PLW2901 -- the folder above

    def check(self) -> None:
        """Assert every invariant."""
        columns = (self._places, self._lengths, self._digests, self._serials)
        assert {*map(len, columns)} == {len(self._files)}, "columns of different lengths"
        assert self._new.keys() == {key for key, row in self.rows.items() if row == UNSAVED}
        assert all(row < len(self._files) for row in self.rows.values())
        assert not self._deleted.keys() & dict(self.stored()).keys(), "stored and deleted"


def _load_key(data: bytes, trusted: bool) -> Hashable:
    if not trusted:
        raise TypeError("it is a pickle, and this chest reads none")
    key: Hashable = pickle.loads(data)
    hash(key)
    return key


def _encode_rest(items: Iterator[tuple[Any, int, Entry]]) -> Iterator[bytes]:
    while batch := list(islice(items, FRAME_KEYS)):
        yield encode(batch)
