r"""The index file ``.keys``: an append-only log of frames behind a head of 16 bytes.

::

    magic   8 bytes   b'chest\x00\x01\n'
    length  8 bytes   little-endian; bits 0-47 the committed length, 48-62 a checksum of it,
                      bit 63 MOVED: this file was or is being replaced by a shorter one
    frames  ...       u32 length of the payload, u32 crc32 of the payload, payload

The committed length says how much of the file counts. A frame is appended beyond it, and one
store of 8 bytes raises it: that store is the commit (the design of Bitcask, Sheehy and Smith
2010, with a commit mark). What lies beyond was never committed. Everybody maps the head, so that
a look at one integer in memory tells whether another process committed.

Writers hold the operating system's lock on the file itself; readers take none. The lock dies
with its process.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from zlib import crc32

from filelock import lock_descriptor, unlock_descriptor

from chest.errors import CorruptIndexError

MAGIC = b"chest\x00\x01\n"
HEAD = 16
FRAME_HEAD = 8
MOVED = 1 << 63
POLL = 0.002  # seconds between two tries to lock
_LENGTH = (1 << 48) - 1

_holders: dict[str, int] = {}  # which thread of this process holds the lock on which file
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_holders.clear)


def _checksum(length: int) -> int:
    return crc32(length.to_bytes(6, "little")) & 0x7FFF


def encode_length(length: int) -> int:
    """Return the word that stands for a committed length of `length` bytes."""
    return length | _checksum(length) << 48


def _native(word: int) -> int:
    """Turn a little-endian word into what this machine reads from memory, and back."""
    if sys.byteorder == "little":
        return word
    return int.from_bytes(word.to_bytes(8, "little"), "big")


def frame(payload: bytes) -> bytes:
    """Return `payload` with its length and its checksum before it."""
    return len(payload).to_bytes(4, "little") + crc32(payload).to_bytes(4, "little") + payload


def split_frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the end of each frame and its payload, as far as the frames in `data` are whole."""
    start = 0
    while start + FRAME_HEAD <= len(data):
        length = int.from_bytes(data[start : start + 4], "little")
        checksum = int.from_bytes(data[start + 4 : start + 8], "little")
        end = start + FRAME_HEAD + length
        payload = data[start + FRAME_HEAD : end]
        if end > len(data) or crc32(payload) != checksum:
            return
        yield end, payload
        start = end


class Index:
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
    head : memoryview
        The head as two integers; ``head[1]`` is the word to compare with `seen`.
    seen : int
        The word as of the last `refresh` or `acknowledge`.
    foreign : bool
        The file is not of this format: the index of an old chest, to be replaced.

    Raises
    ------
    OSError
        If the file cannot be opened.
    CorruptIndexError
        If the file is of a newer format.
    """

    def __init__(self, path: str, *, readonly: bool, fsync: bool) -> None:
        self.path = path
        self._readonly = readonly
        self._fsync = fsync
        self._depth = 0
        self._open()

    def _open(self) -> None:
        self._adopt(FileIO(self.path, "rb" if self._readonly else "r+b"))

    def _adopt(self, file: FileIO) -> None:
        start = file.read(HEAD)
        self.foreign = not start.startswith(MAGIC[:6])
        if not self.foreign and (len(start) < HEAD or not start.startswith(MAGIC)):
            reason = f"its first bytes are {start!r}: cut short, or of a newer version of chest"
            file.close()
            raise CorruptIndexError(self.path, reason)
        if self.foreign:
            head = memoryview(bytearray(HEAD))
        else:
            access = mmap.ACCESS_READ if self._readonly else mmap.ACCESS_WRITE
            try:
                head = memoryview(mmap.mmap(file.fileno(), HEAD, access=access))
            except BaseException:
                file.close()
                raise
        # The old map is let go of, never closed: another thread may be looking at it.
        self.head = head.cast("Q")
        self._file = file
        self._read_to = HEAD
        self._written_to = HEAD
        self._frames = self._appended = 0
        self._fresh = True
        self.seen = -1 if self.foreign else 0  # nobody tells when an old index is replaced: look

    def close(self) -> None:
        """Close the file; the map goes when nobody looks at it any more."""
        self._file.close()
        self.head = memoryview(bytes(HEAD)).cast("Q")

    def refresh(self) -> tuple[bool, list[bytes]]:
        """Return what was committed since the last call.

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
        if (self.foreign or _native(self.head[1]) & MOVED) and not self._is_current():
            self._file.close()
            self._open()
        if self.foreign:
            anew, self._fresh = self._fresh, False
            return anew, []
        word = _native(self.head[1])
        end = self._decode(word)
        payloads = self._read(end)
        anew, self._fresh = self._fresh, False
        self._read_to = self._written_to = end
        self._frames += len(payloads)
        # Without MOVED: as long as it is set, every look finds a difference and comes here.
        self.seen = _native(word & ~MOVED)
        return anew, payloads

    def _decode(self, word: int) -> int:
        length = word & _LENGTH
        if (word & ~MOVED) != encode_length(length) or length < self._read_to:
            raise self._damage("the committed length in its head fails its checksum")
        return length

    def _read(self, end: int) -> list[bytes]:
        data = self._bytes(self._read_to, end)
        payloads, reached = [], 0
        for reached, payload in split_frames(data):  # noqa: B007 -- used after the loop
            payloads.append(payload)
        if reached != end - self._read_to:
            self._frames += len(payloads)
            raise self._damage(f"the frame at byte {self._read_to + reached} is not as written")
        return payloads

    def _bytes(self, start: int, end: int | None) -> bytes:
        self._file.seek(start)
        if end is None:
            return self._file.readall()
        parts = []
        while start < end and (part := self._file.read(end - start)):
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def _damage(self, reason: str) -> CorruptIndexError:
        return CorruptIndexError(self.path, reason, self._frames)

    def _is_current(self) -> bool:
        return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock on the file that `path` names; may be nested.

        Raises
        ------
        OSError
            With EDEADLK if another index of this thread holds it: to wait would be for ever.
        """
        if self._depth == 0:
            self._lock()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                _holders.pop(self.path, None)
                unlock_descriptor(self._file.fileno())

    def held_here(self) -> bool:
        """Tell whether this thread holds the lock, with this or another index."""
        return _holders.get(self.path) == threading.get_ident()

    def _lock(self) -> None:
        if self.held_here():
            message = "another chest of this thread is committing there"
            raise OSError(errno.EDEADLK, message, self.path)
        while True:
            lock_descriptor(self._file.fileno(), poll_interval=POLL)
            if self._is_current():
                break
            unlock_descriptor(self._file.fileno())
            self._file.close()
            self._open()
        _holders[self.path] = threading.get_ident()
        word = _native(self.head[1])
        if word & MOVED and not self.foreign:  # whoever set it died before the replacement
            self.head[1] = _native(word & ~MOVED)

    def rewind(self) -> None:
        """Make the next `refresh` read everything again."""
        self._fresh = True
        self._read_to = HEAD
        self._frames = 0
        self.seen = -1

    def overhangs(self) -> bool:
        """Tell whether something lies beyond the committed length, which a crash left."""
        return os.fstat(self._file.fileno()).st_size > self._read_to

    def uncommitted(self) -> list[bytes]:
        """Return the payloads beyond the committed length; needs the lock."""
        return [payload for _, payload in split_frames(self._bytes(self._read_to, None))]

    def cut(self) -> None:
        """Remove what lies beyond the committed length; needs the lock."""
        self._file.truncate(self._read_to)
        self._written_to = self._read_to
        self._appended = 0

    def append(self, payload: bytes) -> None:
        """Write a frame beyond the committed length; needs the lock and a `refresh` under it."""
        data = memoryview(frame(payload))
        self._file.seek(self._written_to)
        self._written_to += len(data)
        while data:
            data = data[self._file.write(data) :]
        self._appended += 1

    def publish(self) -> None:
        """Commit the frames appended since the last time; needs the lock."""
        if self._fsync:
            os.fsync(self._file.fileno())
        self.head[1] = _native(encode_length(self._written_to))
        if self._fsync:
            os.fsync(self._file.fileno())

    @property
    def published(self) -> bool:
        """Whether what was appended is committed."""
        return bool(self.head[1] == _native(encode_length(self._written_to)))

    def acknowledge(self) -> None:
        """Take what was published as seen; without this, `refresh` returns it."""
        self.seen = self.head[1]
        self._read_to = self._written_to
        self._frames += self._appended
        self._appended = 0

    def replace(self, payloads: list[bytes], scratch: str) -> None:
        """Make the log consist of `payloads` alone; needs the lock, which goes with it.

        Parameters
        ----------
        payloads : list of bytes
        scratch : str
            A file name nobody uses, in the same directory.

        Raises
        ------
        OSError
            If it could not be done; the log is then as it was.
        """
        new = None
        try:
            write_log(scratch, payloads, fsync=self._fsync)
            new = FileIO(scratch, "r+b")
            lock_descriptor(new.fileno(), poll_interval=POLL)
            self._set_moved(True)
            os.replace(scratch, self.path)
        except BaseException:
            if self._is_current():  # an interrupt may come after the replacement
                self._set_moved(False)
            if new is not None:
                new.close()
            with suppress(FileNotFoundError):
                os.unlink(scratch)
            raise
        old = self._file
        self._adopt(new)
        old.close()

    def _set_moved(self, moved: bool) -> None:
        if not self.foreign:
            word = _native(self.head[1])
            self.head[1] = _native(word | MOVED if moved else word & ~MOVED)


def write_log(path: str, payloads: list[bytes], *, fsync: bool) -> None:
    """Write a new log of `payloads` to the new file `path`."""
    data = b"".join(map(frame, payloads))
    with open(path, "xb") as file:
        file.write(MAGIC + encode_length(HEAD + len(data)).to_bytes(8, "little") + data)
        if fsync:
            file.flush()
            os.fsync(file.fileno())
