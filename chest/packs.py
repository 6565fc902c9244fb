"""Packs: append-only files of the streams of small values, end to end.

A pack is named ``.pack-<n>``, with rising numbers. Small values that leave memory together are
appended to the newest one; where there are many, they fill packs of their own, which get their
names at the commit. Nothing in a pack is ever written over. A pack goes when none of its values
is alive, and one with little alive is copied into a new one (see `chest.store`).

Packs are read through descriptors that stay open, not through maps: where a file is cut short by
somebody, a read from it is short and can be told from damage, while a map would kill the process.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Container, Iterable
from functools import partial
from io import FileIO
from itertools import accumulate

from chest.directory import Directory, remove_quietly
from chest.errors import locating
from chest.filenames import pack_number
from chest.files import demand_file, demand_own, is_there, own_size
from chest.serialize import digest_bytes

PACK_BYTES = 64 << 20  # a pack of so many bytes is full
PACKED = 4096  # bytes; larger streams get files of their own
MANY = 64  # values that have to leave memory together for a pack
OPEN_PACKS = 64  # kept open for reading
LONGEST = 2 * PACK_BYTES  # bytes that are read in one go, whatever an index says
FURTHEST = 1 << 48  # bytes; no pack goes so far


def write_all(file: FileIO, streams: Iterable[bytes]) -> int:
    """Write to an unbuffered file, which may take less than asked; return how many bytes."""
    data = memoryview(b"".join(streams))
    left = data
    while left:
        left = left[file.write(left) :]
    return len(data)


class _Reader(FileIO):
    """A file that closes when the last thread is done with it."""

    def __init__(self, path: str) -> None:
        demand_file(path)
        super().__init__(path)
        self.read_at: Callable[[int, int], bytes]  # length, place
        if hasattr(os, "pread"):
            self.read_at = partial(os.pread, self.fileno())
        else:
            self.read_at = partial(_read_at, path)

    # No function of Python: an interrupt as that begins would leave the file open for ever.
    __del__ = FileIO.close


def _read_at(path: str, length: int, place: int) -> bytes:
    with FileIO(path) as file:  # with a position of its own
        file.seek(place)
        return file.read(length)


class Packs:
    """The packs of a directory.

    Parameters
    ----------
    directory : Directory
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._open: dict[str, _Reader] = {}
        self._highest = 0

    # -- reading; needs no lock ------------------------------------------------------------------

    def read(self, name: str, place: int, length: int) -> bytes:
        """Return `length` bytes from `place`, less where the pack ends before.

        Raises
        ------
        OSError
            If the pack is gone, or the system refuses.
        """
        file = self._open.get(name) or self._reader(name)
        length = min(length, max(os.fstat(file.fileno()).st_size - place, 0), LONGEST)
        data = file.read_at(length, place) if length else b""
        while 0 < len(data) < length:
            more = file.read_at(length - len(data), place + len(data))
            if not more:
                break
            data += more
        return data

    def peek(self, name: str, place: int, length: int, digest: int) -> bytes | None:
        """Return a stream if its pack is open and holds it as it was written, else None."""
        file = self._open.get(name)
        if file is None or length > PACKED or place >= FURTHEST:
            return None
        try:
            data = file.read_at(length, place)
        except OSError:
            return None  # to read it tells
        return data if digest_bytes(data) == digest and len(data) == length else None

    def read_span(
        self, name: str, place: int, lengths: array[int], digests: array[int]
    ) -> list[bytes] | None:
        """Return the streams that lie end to end from `place`, None if not all are as written."""
        try:
            data = self.read(name, place, sum(lengths))
        except OSError:
            return None
        starts = accumulate(lengths, initial=0)
        streams = [data[start : start + n] for n, start in zip(lengths, starts, strict=False)]
        return streams if list(map(digest_bytes, streams)) == digests.tolist() else None

    def _reader(self, name: str) -> _Reader:
        file = _Reader(self._directory.full_path(name))
        if len(self._open) >= OPEN_PACKS:  # closed when the last thread is done with them
            self._open = {}
        self._open[name] = file
        return file

    def forget(self, name: str) -> None:
        """Open a pack anew for the next reading: another one may have its name by now."""
        self._open.pop(name, None)

    def keep(self, names: Container[str]) -> None:
        """Close all but these, else the disk space of packs that were removed stays taken."""
        for name in [*self._open]:
            if name not in names:
                self.forget(name)

    # -- writing; needs the lock of the index ----------------------------------------------------

    def size(self, name: str) -> int:
        """Return how many bytes a pack has, 0 if it is gone or something else has its name."""
        return own_size(self._directory.full_path(name))

    def append(self, name: str, place: int, streams: Iterable[bytes], *, fsync: bool) -> None:
        """Write values to the end of a pack, which is at `place`; a new pack begins with 0.

        Raises
        ------
        OSError
            If the disk refuses; the caller owes it to `cut`.
        """
        path = self._directory.full_path(name)
        with FileIO(path, "r+" if place else "x") as file:
            demand_own(file, path)
            file.seek(place)
            write_all(file, streams)
            if fsync:
                os.fsync(file.fileno())

    def cut(self, name: str, place: int) -> None:
        """Remove what lies from `place` on, with the pack if that is all of it."""
        path = self._directory.full_path(name)
        if place == 0:
            remove_quietly(path)
            self.forget(name)
        elif self.size(name) > place:
            with locating(path), FileIO(path, "r+") as file:
                demand_own(file, path)
                file.truncate(place)

    def new_name(self, known: Iterable[str]) -> str:
        """Return a name that is higher than those `known`, and that nobody uses."""
        self._highest = max(self._highest, *map(pack_number, known), 0)
        while True:
            self._highest += 1
            name = f".pack-{self._highest}"
            if not is_there(self._directory.full_path(name)):
                return name
