"""What committed frames add up to, replayed when a chest is opened and as others commit."""

from __future__ import annotations

import logging
import operator
import pickle
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from itertools import filterfalse, repeat
from typing import Any

from chest.aliases import UNSAVED, Aliases, may_differ
from chest.columns import (
    NUMBERS,
    Block,
    Entry,
    Frame,
    FrameError,
    Keys,
    Puts,
    decode,
    gather,
    is_plain,
)
from chest.errors import say
from chest.filenames import pack_number

FRAME = 80  # bytes of a frame, or of a block, beside its records and the name of the serializer
PLACED = 8  # bytes of a record at most for its place and serial, which may follow from others
LEAST = 12  # bytes of a record beside that, its key and the name of its file
SHARING = {tuple, frozenset}  # keys of these types may have parts that are written once for many

logger = logging.getLogger("chest")


class Replay(Aliases):
    """All keys of a chest, as frames and what is pending here make them.

    Parameters
    ----------
    trusted : bool
        Whether keys may be unpickled.

    Attributes
    ----------
    needed : int
        What is alive needs so many bytes of the log, or more; as far as that is known.
    serializers : dict of str to (bool or None)
        The serializers that wrote values, and whether each writes text.
    unreadable : dict of bytes to int
        Keys that cannot be read here, as they were pickled, with their rows.
    changed : dict
        Keys that others replaced or deleted, with the digests of the values they had here; for
        the user of the ledger to act on, and to take out.
    """

    def __init__(self, trusted: bool) -> None:
        super().__init__()
        self.trusted = trusted
        self.needed = 0
        self.serializers: dict[str, bool | None] = {}
        self.unreadable: dict[bytes, int] = {}
        self.changed: dict[Any, int] = {}
        self._next_serial = 0
        self._in_order = True
        self._deleted: dict[Any, int] = {}  # not committed yet: keys with the rows they had
        self._cleared: dict[Any, int] | None = None  # not committed yet: what `rows` was

    def apply(self, payload: bytes) -> None:
        """Take in what another handle committed, and add to `changed`; what is pending stays so.

        Raises
        ------
        FrameError
            If the payload is not a frame's.
        """
        frame = decode(payload, trusted=self.trusted)
        base = len(self._files)
        self._apply_head(frame)
        if frame.first:  # what earlier commits deleted, too, may come back as a new key
            self._deleted = {key: row for key, row in self._deleted.items() if row >= 0}
        if frame.cleared:
            self._apply_clear()
        if self._cleared is not None:  # from here on "everything" would be too much
            self._delete_all(self._cleared)
            self._cleared = None
        deleted, unread = self._read_keys(frame.deleted)
        rows = [self.rows.get(key, self._deleted.get(key, UNSAVED)) for key in deleted]
        rows += [self.unreadable.pop(data, UNSAVED) for data in unread]
        gone = self._bytes_of_deleted(frame.deleted, rows)
        self._retire(rows[len(deleted) :])
        for key in deleted:
            if key in self._deleted:  # stays deleted, whatever becomes of it there
                self._retire([self._deleted[key]])
                self._deleted[key] = UNSAVED
            row = self.rows.get(key, UNSAVED)
            if row >= 0:
                self._tell([(key, row)])
                del self.rows[key]
                self._retire([row])
        gone += sum(map(self._put, frame.blocks))
        kinds = {kind for block in frame.blocks for kind in block.keys.kinds}
        whole = SHARING.isdisjoint(kinds) and not frame.left
        nbytes = self._bytes_of_records([payload], len(frame.blocks)) if whole else 0
        self._weigh(nbytes, len(self._files) - base, gone)

    def _apply_head(self, frame: Frame) -> None:
        if frame.first:
            packs = [entry.file for entry in frame.left if pack_number(entry.file)]
            self.obsolete = [entry for entry in frame.left if entry.file not in packs]
            self.packs = dict.fromkeys(packs, 0) | {k: n for k, n in self.packs.items() if n}
        if frame.serializer is not None:
            name, text = frame.serializer
            self.serializers[name] = text

    def _apply_clear(self) -> None:
        self._tell(self.stored())
        gone = [*dict(self.stored()).values(), *self._deleted.values(), *self.unreadable.values()]
        gone += (self._cleared or {}).values()
        self._retire(gone)
        self._delete_all(self._cleared or {})
        self._deleted = dict.fromkeys(self._deleted, UNSAVED)
        self._cleared, self.unreadable = None, {}
        self.needed = 0
        self.rows = dict(self._unsaved())

    def _tell(self, rows: Iterable[tuple[Any, int]]) -> None:
        """Note that keys are about to be replaced or deleted, before an interrupt can come."""
        for key, row in rows:
            if row >= 0:
                self.changed.setdefault(key, self._digests[row])

    def _put(self, block: Block) -> int:
        """Add the rows of a block; return how many bytes of the log that made history."""
        self._note_order(block.serials)
        columns = (block.places, block.lengths, block.digests, block.serials)
        base = self._add_rows(block.pack or block.files, *columns).start
        again = [*filter(self.unreadable.__contains__, block.keys.pickled)]
        gone = self._bytes_of_replaced(gather(self.unreadable, again))
        keys, rows = self._block_keys(block, base)
        if not self._deleted:  # keys that are there keep their old rows as yet
            n = len(self.rows)
            deque(map(self.rows.setdefault, keys, rows), maxlen=0)
            if len(self.rows) == n + len(keys):
                return gone
        if len({*keys}) != len(keys):
            raise FrameError("it has a key twice")
        mine = {key for key in self._deleted if key in self.rows}  # and then set here
        gone += self._replace(keys, rows, tell=True)
        for key in self._deleted.keys() & keys if self._deleted else ():
            row = self._deleted.pop(key)
            gone += self._bytes_of_replaced([row])
            self._retire([row])
            if key not in mine:  # deleted here: stays so
                self._deleted[key] = self.rows.pop(key)
        return gone

    def _replace(self, keys: list[Hashable], rows: Sequence[int], *, tell: bool = False) -> int:
        """Let keys lead to new rows; with `tell`, note what was there before as changed.

        Returns
        -------
        int
            How many bytes of the log that made history.
        """
        if tell:
            self._respell(keys)
        if self._names:
            self._forget_names([row for row in map(self.rows.get, keys, repeat(0)) if row < 0])
        before = [*map(self.rows.get, keys, repeat(UNSAVED))]
        if max(before, default=UNSAVED) < 0:
            self.rows.update(zip(keys, rows, strict=True))
            return 0
        digests = self._digests
        if tell:  # a value that was only moved did not change
            old = zip(keys, before, rows, strict=True)
            self._tell((k, b) for k, b, n in old if b >= 0 and digests[b] != digests[n])
        self.rows.update(zip(keys, rows, strict=True))
        files, packs = self._files, self.packs
        triples = zip(keys, before, rows, strict=True)
        pairs = {key: (b, n) for key, b, n in triples if b >= 0 and b != n}
        gone = self._bytes_of_replaced([b for b, _ in pairs.values()])
        self._retire(b for b, n in pairs.values() if files[b] in packs or files[b] != files[n])
        self._forget_names(b for b, _ in pairs.values())
        return gone

    def _respell(self, keys: list[Hashable]) -> None:
        """Have keys that no commit held here as the commit of another handle names them."""
        unsaved = [key for key in keys if self.rows.get(key, 0) < 0]
        names = {k: k for k in unsaved if self.rows[k] in self._names or may_differ(k)}
        if names:  # in one step: an interrupt must not come where a key is missing
            self.rows = {names.get(key, key): row for key, row in self.rows.items()}

    def _block_keys(self, block: Block, base: int) -> tuple[list[Hashable], Sequence[int]]:
        plain, pickled, kinds = block.keys
        if not NUMBERS.isdisjoint(kinds):
            found = zip(range(base, base + len(plain)), plain, strict=True)
            self._names.update((row, key) for row, key in found if type(key) in NUMBERS)
        if not pickled:
            return plain, range(base, base + len(plain))
        rows = dict(zip(plain, range(base, base + len(plain)), strict=True))
        for row, data in enumerate(pickled, base + len(plain)):
            read, unread = self._read_keys(Keys([], [data]))
            if unread:
                self._retire([self.unreadable.get(data, UNSAVED)])
                self.unreadable[data] = row
            else:
                rows[read[0]] = row
                self._names[row] = data
        return list(rows), list(rows.values())

    def _read_keys(self, keys: Keys) -> tuple[list[Any], list[bytes]]:
        """Return the keys that can be read, in order, and the pickles of those that cannot."""
        known, unread = [*keys.plain], []
        for data in keys.pickled:
            try:
                known.append(_load_key(data, self.trusted))
                self._note_read([data])
            except Exception as error:  # noqa: BLE001 -- whatever a class that changed can raise
                unread.append(data)
                if self.trusted and data not in self.unreadable:
                    logger.warning("a key cannot be read, and is kept in the file: %s", say(error))
        return known, unread

    def _note_read(self, pickles: Iterable[bytes]) -> None:
        """Note that these keys are in `rows`: their class may have come since."""
        if self.unreadable:
            self._retire([self.unreadable.pop(data, UNSAVED) for data in pickles])

    def _note_order(self, serials: Sequence[int]) -> None:
        rising = serials.__class__ is range or all(map(operator.lt, serials, serials[1:]))
        if not rising or serials[0] < self._next_serial:
            self._in_order = False
        self._next_serial = max(self._next_serial, serials[-1] + 1 if rising else max(serials) + 1)

    # -- what is there -----------------------------------------------------------------------------

    def stored(self) -> Iterator[tuple[Any, int]]:
        """Yield the keys that a commit holds now, with their rows."""
        return ((key, row) for key, row in self.rows.copy().items() if row >= 0)

    def _unsaved(self) -> Iterator[tuple[Any, int]]:
        """Yield the keys that no commit holds now, with the complements of their serials."""
        return ((key, row) for key, row in self.rows.copy().items() if row < 0)

    def _delete_all(self, rows: dict[Any, int]) -> None:
        self._deleted.update((key, row) for key, row in rows.items() if row >= 0)

    def take(self, entries: dict[Any, Entry]) -> None:
        """Take in what an index of another format says."""
        if entries:
            rows = self._add_rows(*Puts.of(entries)[1:], range(len(entries)))
            self._names.update(
                (n, k) for n, k in zip(rows, entries, strict=True) if not is_plain(k)
            )
            self.rows.update(zip(entries, rows, strict=True))
        self._next_serial = len(entries)

    # -- how many bytes of the log are needed ------------------------------------------------------

    def _weigh(self, nbytes: int, put: int, gone: int) -> None:
        """Take note of what frames did to the number of bytes that are needed.

        Parameters
        ----------
        nbytes : int
            Bytes of their records, if none of them may be written once for several frames.
        put : int
            How many values they put.
        gone : int
            Bytes of earlier records that they make history, at most.
        """
        come = LEAST * put if gone else max(nbytes - PLACED * put, LEAST * put)
        self.needed = max(self.needed - gone, 0) + come

    def _bytes_of_records(self, payloads: Sequence[bytes], blocks: int) -> int:
        names = len(payloads) * max(map(len, self.serializers), default=0)
        return sum(map(len, payloads)) - FRAME * (len(payloads) + blocks) - names

    def _bytes_of_deleted(self, keys: Keys, rows: Collection[int]) -> int:
        """Return how many bytes the log needs no more, at most, without the records of keys."""
        spelled = map(pickle.dumps, [*keys.plain, *keys.pickled], repeat(3))  # without frames
        return sum(map(len, spelled)) + self._bytes_of_replaced(rows)

    def _bytes_of_replaced(self, rows: Collection[int]) -> int:
        """Return the same, where the keys have new records; beside those bytes that both have."""
        stored = [row for row in rows if row >= 0]
        names = filterfalse(self.packs.__contains__, gather(self._files, stored))
        return LEAST * len(stored) + sum(map(len, map(pickle.dumps, names, repeat(3))))


def _load_key(data: bytes, trusted: bool) -> Hashable:
    if not trusted:
        raise TypeError("it is a pickle, and this chest reads none")
    key: Hashable = pickle.loads(data)
    hash(key)
    return key
