"""The file ``.keys``, open, with its head in memory.

Everybody maps the head, so that a look at one integer in memory tells whether another process
committed. A file that takes the place of another is adopted in one step: who looks meanwhile, and
a child that is forked, finds the old one or the new.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from contextlib import suppress
from io import FileIO

from filelock import unlock_descriptor

from chest.errors import DROPPED, CorruptIndexError, locating
from chest.files import is_own
from chest.frames import HEAD, MAGIC

_open_files: weakref.WeakSet[FileIO] = weakref.WeakSet()


def _let_go() -> None:
    """Close every file in a forked child: each would keep a lock of its parent alive."""
    for file in list(_open_files):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def open_file(path: str, mode: str) -> FileIO:
    """Open a file that is closed in children that are forked."""
    file = FileIO(path, mode)
    _open_files.add(file)
    return file


class _ReplacedError(Exception):
    """The path leads to another file than a moment ago."""


class Head:
    """The open file of one index.

    Parameters
    ----------
    path : str
        The file ``.keys``; it must exist.
    readonly : bool
        Open it for reading only.

    Attributes
    ----------
    head : memoryview
        The head as two integers; ``head[1]`` is the word to compare with `seen`.
    seen : int
        The word as of the last look.
    foreign : bool
        The file is not of this format: the index of an old chest, to be replaced.
    frames : int
        How many are committed, as far as they were read.
    abandoned : bool
        This is a child that was forked in the midst of something: the index is its parent's.

    Raises
    ------
    OSError
        If the file cannot be opened.
    CorruptIndexError
        If the file is of a newer format, or is no file.
    """

    def __init__(self, path: str, *, readonly: bool) -> None:
        self.path = path
        self._readonly = readonly
        self.abandoned = False
        self._take_next(None)
        self._open()

    def _open(self) -> None:
        while True:
            if not is_own(self.path):
                reason = "it is a link, or no file at all"
                raise CorruptIndexError(self.path, reason, repairable=False)
            try:
                file = open_file(self.path, "rb" if self._readonly else "r+b")
                self._adopt(file, *self._examine(file, self.path))
                break
            except _ReplacedError:
                continue
        self._take_next(None)

    def _take_next(self, file: FileIO | None) -> None:
        """Note what is about to take the place of the file, for a child forked in between."""
        self._next: FileIO | None = file
        self._next_map: mmap.mmap | None = None
        self._next_head: memoryview[int] | None = None

    def _examine(self, file: FileIO, path: str) -> tuple[bool, tuple[int, int]]:
        """Do all that can fail before a file of this path is adopted; if it does, close it."""
        try:
            self._take_next(file)
            foreign = self._is_foreign(file)
            self._next_map = None if foreign else self._map_head(file, path)
            status = os.fstat(file.fileno())
            return foreign, (status.st_dev, status.st_ino)
        except BaseException:
            with suppress(OSError):
                unlock_descriptor(file.fileno())  # a child may have it open, too
            file.close()
            self._take_next(None)  # or the map stays open
            raise

    def _adopt(self, file: FileIO, foreign: bool, identity: tuple[int, int]) -> None:
        mapped = self._next_map
        self._next_head = head = memoryview(mapped or bytearray(HEAD)).cast("Q")
        # No call from here on: an interrupt finds the old file or the new one.
        # The old map is let go of, never closed: another thread may be looking at it.
        self._map = mapped
        self.head = head
        self._file = file
        self._identity = identity
        self.foreign = foreign
        self._read_to = HEAD
        self.frames = 0
        self._ends: list[int] = []  # of the frames appended since
        self._fresh = True
        self.seen = -1 if foreign else 0  # nobody tells when an old index is replaced: look

    def _is_foreign(self, file: FileIO) -> bool:
        with locating(self.path):
            start = file.read(HEAD)
        if not start.startswith(MAGIC[:6]):
            return True
        if len(start) < HEAD or not start.startswith(MAGIC):
            reason = f"its first bytes are {start!r}: cut short, or of a newer version of chest"
            raise CorruptIndexError(self.path, reason)
        return False

    def _reopen(self) -> None:
        old = self._file
        try:
            self._open()
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, DROPPED, self.path) from error
        old.close()

    def _map_head(self, file: FileIO, path: str) -> mmap.mmap:
        """Map the head of the file by an opening of its own, which nobody locks.

        A map keeps what it was made of open, and with it a lock: also in a child that another
        thread forks before anybody knows of the map.
        """
        with open_file(path, file.mode) as twin:
            if not os.path.samestat(os.fstat(twin.fileno()), os.fstat(file.fileno())):
                raise _ReplacedError
            try:
                return mmap.mmap(twin.fileno(), HEAD, access=mmap.ACCESS_READ)
            except OSError as error:
                message = f"{error.strerror}: a chest needs a file system with shared memory maps"
                raise OSError(error.errno, message, self.path) from error

    def close(self) -> None:
        """Close the file; the map goes when nobody looks at it any more."""
        if not self._file.closed and not self._readonly:
            unlock_descriptor(self._file.fileno())  # an interrupt may have left it locked
        self._file.close()
        self.head = memoryview(bytes(HEAD)).cast("Q")
        self._map = None

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._file.closed

    def abandon(self) -> None:
        """Close file and map in a forked child: each would keep a lock of its parent alive."""
        self.abandoned = True
        for head in self.head, self._next_head:  # first: amid `_adopt` the maps are not theirs
            if head is not None:
                head.release()
        for part in self._map, self._next_map, self._file, self._next:
            if part is not None:
                part.close()  # nobody looks at it: a child begins with one thread

    def _is_replaced(self) -> bool:
        """Tell whether the path leads to another file; False if to none, for the chest is gone."""
        try:
            return not self._is_current()
        except FileNotFoundError:
            return False

    def is_current(self) -> bool:
        """Tell whether the path leads to this file, as far as the system tells."""
        try:
            return self._is_current()
        except OSError as error:
            return not isinstance(error, FileNotFoundError)

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, DROPPED, self.path) from error

    def _give_up_next(self) -> None:
        if self._next is not None and not self._next.closed:
            unlock_descriptor(self._next.fileno())
            self._next.close()
        self._take_next(None)
