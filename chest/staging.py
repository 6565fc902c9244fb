"""Values on their way into a commit: written where no index names them yet.

Large values, and few small ones, are staged in files of their own. Many small ones are kept as
streams until the commit appends them to a pack; beyond a few megabytes they are written to staged
packs, so that a commit of any size takes little memory.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Collection, Sequence
from contextlib import suppress
from io import FileIO
from itertools import accumulate, chain
from typing import Any, NamedTuple

from chest.columns import Puts
from chest.directory import Directory, keep_from_children
from chest.errors import locating, told
from chest.packs import PACK_BYTES, write_all
from chest.progress import Tally
from chest.serialize import digest_bytes

STREAM_BYTES = 4 << 20  # of small values, kept in memory before they are written to a staged pack


GONE = object()  # stands in for a key that was taken back
_GONE = id(GONE)


class Staged(NamedTuple):
    """A value in a file that no index names yet."""

    path: str
    length: int
    digest: int


class StagedPack:
    """A pack that no index names yet.

    Parameters
    ----------
    path : str
        Of the staging file, which must not exist.

    Attributes
    ----------
    keys : list
        Those whose values it holds, in order; a key that was taken back is `GONE`.
    lengths, digests : array of int
        Of all of them.
    nbytes : int
        The sum of the lengths.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.keys: list[Any] = []
        self.lengths = array("Q")
        self.digests = array("Q")
        self.nbytes = 0
        self._file = keep_from_children(FileIO(path, "x"))

    def append(self, keys: Sequence[Any], streams: Sequence[bytes], digests: Sequence[int]) -> None:
        """Write values.

        Raises
        ------
        OSError
            If the disk refuses; then it holds what it held before.
        """
        self._file.seek(self.nbytes)
        nbytes = write_all(self._file, streams)
        self.keys += keys
        self.lengths.extend(map(len, streams))
        self.digests.extend(digests)
        self.nbytes += nbytes

    def puts(self, name: str) -> Puts:
        """Return what puts the values when this becomes the pack `name`."""
        places = array("Q", accumulate(self.lengths[:-1], initial=0))
        puts = Puts(self.keys, name, places, self.lengths, self.digests)
        if _GONE in map(id, self.keys):
            puts = puts.pick([row for row, key in enumerate(self.keys) if key is not GONE])
        return puts

    def close(self, *, fsync: bool) -> None:
        """Be done with writing."""
        if fsync and not self._file.closed:
            with locating(self.path):
                os.fsync(self._file.fileno())
        self._file.close()


class Batch:
    """The values of one commit.

    Parameters
    ----------
    directory : Directory
    tally : Tally, optional
        Who wants to know how many values are in it.

    Attributes
    ----------
    files : dict of key to Staged
    streams : dict of key to bytes
        Small values that have yet to be written.
    packs : list of StagedPack
    """

    def __init__(self, directory: Directory, tally: Tally | None = None) -> None:
        self._directory = directory
        self._tally = tally
        self._owner = os.getpid()
        self.files: dict[Any, Staged] = {}
        self.streams: dict[Any, bytes] = {}
        self.packs: list[StagedPack] = []
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self.files) + len(self.streams) + sum(len(pack.keys) for pack in self.packs)

    @property
    def nbytes(self) -> int:
        """How many bytes the streams have."""
        staged = sum(file.length for file in self.files.values())
        packed = sum(pack.nbytes for pack in self.packs)
        return staged + packed + sum(map(len, self.streams.values()))

    def keys(self) -> list[Any]:
        """Return every key."""
        packed = chain.from_iterable(pack.keys for pack in self.packs)
        return [*self.files, *self.streams, *(key for key in packed if key is not GONE)]

    def add(self, keys: Sequence[Any], streams: Sequence[bytes]) -> None:
        """Add small values.

        Raises
        ------
        OSError
            If the disk refuses; then none of them is added.
        """
        nbytes = self._nbytes + sum(map(len, streams))
        if nbytes < STREAM_BYTES:
            self.streams.update(zip(keys, streams, strict=True))
            self._nbytes = nbytes
        else:
            self.write([*self.streams, *keys], [*self.streams.values(), *streams])
            self.streams, self._nbytes = {}, 0

    def write(
        self, keys: Sequence[Any], streams: Sequence[bytes], digests: Sequence[int] | None = None
    ) -> None:
        """Write small values to a staged pack.

        Raises
        ------
        OSError
            If the disk refuses, told with path, needed and free bytes; then none of them is added.
        """
        try:
            if not self.packs or self.packs[-1].nbytes >= PACK_BYTES:
                self._begin_pack()
            self.packs[-1].append(keys, streams, digests or list(map(digest_bytes, streams)))
        except OSError as error:
            raise told(error, self._directory.path, sum(map(len, streams))) from error

    def _begin_pack(self) -> None:
        path = self._directory.staging_path()
        try:
            self.packs.append(StagedPack(path))
        except BaseException:  # an interrupt: nobody else knows of the file yet
            self._remove([path])
            raise

    def remove(self, keys: Collection[Any]) -> None:
        """Take back values that are history."""
        for key in keys:
            self.streams.pop(key, None)
            if key in self.files:
                self._remove([self.files.pop(key).path])
        if keys:
            for pack in self.packs:
                pack.keys = [GONE if key in keys else key for key in pack.keys]

    def discard(self) -> None:
        """Remove every staging file; what was committed has other names by now."""
        for pack in self.packs:
            with suppress(OSError):
                pack.close(fsync=False)
        staged = [file.path for file in self.files.values()]
        self._remove(staged + [pack.path for pack in self.packs])
        self.files, self.streams, self.packs, self._nbytes = {}, {}, [], 0
        self._tally = None  # what is staged once more was told

    def tell(self) -> None:
        """Tell how many values it has; whoever is told may do anything with the chest."""
        if self._tally is not None:
            self._tally.reach(len(self))

    def _remove(self, paths: list[str]) -> None:
        # In a forked child, what was staged before is the parent's.
        mine, staged = self._owner == os.getpid(), self._directory.staged
        self._directory.remove_staged(path for path in paths if mine or not staged(path))
