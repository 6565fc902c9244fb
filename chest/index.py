"""The index file ``.keys``: an append-only log; `chest.frames` has its format.

The committed length says how much of the file counts. A frame is appended beyond it, and one
write of 8 bytes raises it: that write is the commit (the design of Bitcask, Sheehy and Smith
2010, with a commit mark). What lies beyond was never committed.

Writers hold the operating system's lock on the file itself; readers take none. The lock dies
with its process.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import sys
import threading
import time
from contextlib import suppress

from filelock import lock_descriptor, unlock_descriptor

from chest.blocks import Steps, block
from chest.errors import DROPPED, CorruptIndexError, locating
from chest.files import is_there
from chest.frames import (
    HEAD,
    MOVED,
    WORD,
    decode_length,
    encode_length,
    frame,
    read_frames,
    write_log,
)
from chest.head import Head, open_file

POLL = 0.002  # seconds between two tries to lock, or two looks at a word that is not whole
LOOKS = 5  # at a word that is not whole, until it is damaged
PATIENCE = 60.0  # seconds of waiting for the lock after which, and every time, it is said
NOBODY = (0, (0, 0))

logger = logging.getLogger("chest")

# Which threads of this process hold, or wait for, the lock on which files (device, inode).
_holders: set[tuple[int, tuple[int, int]]] = set()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_holders.clear)


def _native(word: int) -> int:
    """Turn a little-endian word into what this machine reads from memory, and back."""
    if sys.byteorder == "little":
        return word
    return int.from_bytes(word.to_bytes(8, "little"), "big")


class Index(Head):
    """The log of one chest.

    Parameters
    ----------
    path : str
        The file ``.keys``; it must exist.
    readonly : bool
        Open it for reading only.
    fsync : bool
        Make each commit survive a power cut.

    Attributes
    ----------
    is_locked : bool
        This index holds the lock.
    publishing : int
        The word that `publish` or `replace` is about to store or has stored, until the chest has
        looked or the lock goes; else -1.

    Raises
    ------
    OSError
        If the file cannot be opened.
    CorruptIndexError
        If the file is of a newer format, or is no file.
    """

    def __init__(self, path: str, *, readonly: bool, fsync: bool) -> None:
        self._fsync = fsync
        self.is_locked = False
        self._holds: set[object] = set()  # what ends the lock when the last of them is gone
        self._entry = NOBODY
        self.publishing = -1
        super().__init__(path, readonly=readonly)

    def close(self) -> None:
        """Close the file; the map goes when nobody looks at it any more."""
        super().close()
        self.is_locked = False
        _holders.discard(self._entry)

    def refresh(self, *, look: bool = False) -> tuple[bool, list[bytes]]:
        """Return what was committed since the last call.

        Parameters
        ----------
        look : bool
            Look at the directory for a new file, too, and not only where the head tells of one.

        Returns
        -------
        anew : bool
            The payloads are those of a new file: everything known before is void.
        payloads : list of bytes

        Raises
        ------
        CorruptIndexError
            If the committed part is not what was written.
        """
        moved = _native(self.head[1]) & MOVED
        if (look or self.foreign or moved) and self._is_replaced():
            try:
                self._reopen()
            except FileNotFoundError:
                moved = MOVED
        if moved and not is_there(self.path):  # dropped; a new one may come to be there
            self._fresh, self.seen = True, _native(self.head[1] & ~_native(MOVED))
            return True, []
        if self.foreign:
            anew, self._fresh = self._fresh, False
            return anew, []
        before = anew, start, _ = self._fresh, self._read_to, self._file
        word = self._whole_word()
        try:
            end = self._decode(word)
            if anew:
                self.frames = 0
            payloads = self._read(HEAD if anew else start, end)
        except CorruptIndexError:
            if before == (self._fresh, self._read_to, self._file):
                raise
        # What was collected as garbage meanwhile, and uses the chest, may have come here, too.
        if before != (self._fresh, self._read_to, self._file):
            return self.refresh(look=look)
        self._fresh = False
        self._read_to, self._ends = end, []
        self.frames += len(payloads)
        # Without MOVED: as long as it is set, every look finds a difference and comes here.
        self.seen = _native(word & ~MOVED)
        return anew, payloads

    def _whole_word(self) -> int:
        """Return the word of the head; while another process writes it, parts may be old yet."""
        for _ in range(LOOKS):
            word = _native(self.head[1])
            if decode_length(word) >= 0:
                break
            time.sleep(POLL)
        return word

    def _store(self, word: int) -> None:
        """Write the word of the head, for everybody to see in memory; needs the lock.

        Not by way of the map: where the disk is full, a file system that copies on write refuses a
        write with an error, and ends the process for a store.
        """
        with locating(self.path):
            self._write(HEAD - WORD, word.to_bytes(WORD, "little"))

    def _decode(self, word: int) -> int:
        length = decode_length(word)
        if length < self._read_to:
            raise self._damage("the committed length in its head fails its checksum")
        if length > self._size():
            raise self._damage(f"it has {self._size()} bytes, where {length} were committed")
        return length

    def _size(self) -> int:
        with locating(self.path):
            return os.fstat(self._file.fileno()).st_size

    def _read(self, start: int, end: int) -> list[bytes]:
        with locating(self.path):
            payloads, reached = read_frames(self._file, start, end)
        if reached != end:
            self.frames += len(payloads)
            raise self._damage(f"the frame at byte {reached} is not as written")
        return payloads

    def _damage(self, reason: str) -> CorruptIndexError:
        return CorruptIndexError(self.path, reason, self.frames)

    @block
    def locked(self, timeout: float | None = None) -> Steps:
        """Hold the lock on the file that `path` names; may be nested.

        Parameters
        ----------
        timeout : float or None
            Seconds to wait for it at most.

        Raises
        ------
        TimeoutError
            If another process holds it for longer.
        FileNotFoundError
            If the file is gone.
        OSError
            If the file system has no locks; with EDEADLK if another index of this thread holds
            it: to wait would be for ever.
        """
        hold = object()
        try:
            self._holds.add(hold)
            if not self.is_locked:
                self._lock(timeout)
            yield
        finally:
            try:
                self._holds.discard(hold)
            finally:
                try:
                    self._unlock()
                except BaseException:  # an interrupt: nobody else could write for ever
                    self._unlock()
                    raise

    @property
    def blocks(self) -> int:
        """How many blocks of `locked` have not ended."""
        return len(self._holds) - self.pinned

    def pin(self) -> None:
        """Hold the lock until `release`, whatever blocks end."""
        self._holds.add(self)

    @property
    def pinned(self) -> bool:
        """Whether the lock waits for `release`."""
        return self in self._holds

    def held_here(self) -> bool:
        """Tell whether this thread holds the lock, or waits for it, with this or another index."""
        return (threading.get_ident(), self._identity) in _holders

    @staticmethod
    def busy_here() -> bool:
        """Tell whether this thread holds the lock of any index, or waits for it."""
        me = threading.get_ident()
        return any(thread == me for thread, _ in _holders.copy())

    def _lock(self, timeout: float | None) -> None:
        held = self.held_here()
        if self.is_locked:  # by what was collected as garbage meanwhile
            return
        if held:
            message = "another chest of this thread is committing there"
            raise OSError(errno.EDEADLK, message, self.path)
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while True:
            self._enter_holders()
            if self._wait_for_lock(deadline) and self._is_current():
                break
            unlock_descriptor(self._file.fileno())
            self._reopen()
        self.is_locked = True

    def _enter_holders(self) -> None:
        """Enter this thread, before it has the lock: a finalizer may run at any moment."""
        _holders.discard(self._entry)
        self._entry = threading.get_ident(), self._identity
        _holders.add(self._entry)

    def _wait_for_lock(self, deadline: float) -> bool:
        """Wait for the lock; return False at once if the path leads to another file by now."""
        started = said = time.monotonic()
        while not self._try_lock():
            if self._is_replaced():
                return False
            now = time.monotonic()
            if now >= deadline:
                message = "another process or thread is writing there, and did not end in time"
                raise TimeoutError(errno.ETIMEDOUT, message, self.path)
            if now - said >= PATIENCE:
                said = now
                message = "waiting for %.0f seconds for another process to end its commit at %s"
                logger.warning(message, now - started, self.path)
            time.sleep(min(POLL, deadline - now))
        return True

    def _try_lock(self) -> bool:
        try:
            return bool(lock_descriptor(self._file.fileno(), blocking=False))
        except OSError as error:
            message = f"{error.strerror}: to write, a chest needs a file system that locks files"
            raise OSError(error.errno, message, self.path) from error

    def release(self) -> None:
        """Let go of the lock, however many blocks hold it."""
        self._holds.clear()
        self._unlock()

    def _unlock(self) -> None:
        if self._holds:
            return
        self.publishing = -1  # where something failed just after, the news are yet to be taken in
        self.is_locked = False
        try:
            if not self._file.closed:
                unlock_descriptor(self._file.fileno())
        finally:
            _holders.discard(self._entry)
            _holders.discard((self._entry[0], self._identity))  # left by an interrupted `replace`
            self._entry = NOBODY

    @property
    def length(self) -> int:
        """How many bytes of the file are committed, as of the last look."""
        return self._read_to

    def rewind(self) -> None:
        """Make the next `refresh` read everything again."""
        self._fresh = True
        self.seen = -1

    def overhangs(self) -> bool:
        """Tell whether something lies beyond the committed length, which a crash left."""
        self._demand_read()
        return self._size() > self._read_to

    def uncommitted(self) -> list[bytes]:
        """Return the payloads beyond the committed length; needs the lock."""
        with locating(self.path):
            return read_frames(self._file, self._read_to, self._size())[0]

    def cut(self, frames: int = 0) -> None:
        """Remove what lies beyond the committed length and `frames` more; needs the lock."""
        self._demand_read()
        del self._ends[frames:]
        with locating(self.path):
            self._file.truncate(self._written_to)

    def _demand_read(self) -> None:
        """Refuse to take for uncommitted what was not read yet, for a `refresh` failed."""
        if self._read_to < decode_length(_native(self.head[1])):
            raise RuntimeError(f"the index {self.path} was not read up to its committed length")

    def demand_current(self) -> None:
        """Raise FileNotFoundError if somebody removed the file, though it is locked."""
        if not self.is_current():
            raise FileNotFoundError(errno.ENOENT, DROPPED, self.path)

    def leave(self) -> None:
        """Leave what was appended to the next writer, to sweep what it names; needs the lock."""
        self._ends = []

    def append(self, payload: bytes) -> None:
        """Write a frame beyond the committed length; needs the lock and a `refresh` under it."""
        self._demand_read()
        data, place = frame(payload), self._written_to
        self._ends.append(place + len(data))
        self._write(place, data)

    def _write(self, place: int, data: bytes) -> None:
        view = memoryview(data)
        self._file.seek(place)
        while view:
            view = view[self._file.write(view) :]

    def publish(self) -> None:
        """Commit the frames appended since the last time; needs the lock.

        Raises
        ------
        OSError
            If the disk refuses; where `published` is true then, the commit counts.
        """
        self.demand_current()
        self._sync()
        word = encode_length(self._written_to)
        self.publishing = _native(word)
        self._store(word)
        try:
            self._sync()
        except OSError as error:  # others may have read it by now
            message = f"{error.strerror}: it is committed, but may be lost if the power fails"
            raise OSError(error.errno, message, self.path) from error

    def _sync(self) -> None:
        if self._fsync:
            with locating(self.path):
                os.fsync(self._file.fileno())

    @property
    def appended(self) -> int:
        """How many frames lie beyond the committed length that this index wrote."""
        return len(self._ends)

    @property
    def _written_to(self) -> int:
        return self._ends[-1] if self._ends else self._read_to

    @property
    def published(self) -> bool:
        """Whether what was appended is committed."""
        return bool(self.head[1] == _native(encode_length(self._written_to)))

    def acknowledge(self) -> None:
        """Take what was published as seen; without this, `refresh` returns it."""
        self.seen = self.head[1]
        self._read_to = self._written_to
        self.frames += len(self._ends)
        self._ends = []

    def replace(self, payloads: list[bytes], scratch: str) -> None:
        """Make the log consist of `payloads` alone; needs the lock, which goes with it.

        Parameters
        ----------
        payloads : list of bytes
        scratch : str
            A file name nobody uses, in the same directory; the file is the caller's to remove.

        Raises
        ------
        OSError
            If it could not be done; the log is then as it was.
        """
        ahead = NOBODY
        try:
            write_log(scratch, payloads, fsync=self._fsync)
            new = open_file(scratch, "r+b")
            self._take_next(new)
            lock_descriptor(new.fileno(), poll_interval=POLL)
            examined = self._examine(new, scratch)
            self.publishing = _native(_native(self.head[1]) | MOVED)
            self.demand_current()
            self._set_moved(True)
            ahead = threading.get_ident(), examined[1]
            _holders.add(ahead)  # or another index of this thread would wait for itself
            os.replace(scratch, self.path)
        except BaseException:
            self.publishing = -1
            _holders.discard(ahead)
            self._give_up_next()  # first: the system may refuse to tell what comes next
            if not self._is_replaced():  # an interrupt may come after the replacement
                with suppress(OSError):  # the next commit does it
                    self._set_moved(False)
            raise
        old = self._file
        try:
            self._adopt(new, *examined)
        finally:
            if self._file is new:  # also if an interrupt came as `_adopt` ended
                self._take_next(None)
                self._enter_holders()
                unlock_descriptor(old.fileno())  # a forked child may have it open, too
                old.close()
            else:
                _holders.discard(ahead)
                self._give_up_next()  # which is locked, if an interrupt came before it began

    def remove(self) -> None:
        """Remove the file; needs the lock. Others go on to the next one that gets its name."""
        with suppress(OSError):  # a full disk is no reason to keep it; who commits finds it gone
            self._set_moved(True)
        os.unlink(self.path)

    def _set_moved(self, moved: bool) -> None:
        if not self.foreign:
            word = _native(self.head[1])
            self._store(word | MOVED if moved else word & ~MOVED)
