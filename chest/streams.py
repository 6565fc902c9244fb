"""Files that hash what passes through them, for ``dump`` to write to and ``load`` to read from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import IO, Any

import xxhash

STEP = 1 << 22  # bytes hashed and passed on at a time: they stay in the cache of most processors


class HashingWriter:
    """What ``dump`` writes to: hashes, and passes on to a file if there is one.

    A ``dump`` that uses more of the file than ``write`` (its name, a seek) goes past the hash;
    then `bypassed` is set and the stream has to be read again for its digest.
    """

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file
        self._hash = xxhash.xxh3_64()
        self.length = 0
        self.text: bool | None = None
        self.bypassed = False
        self.refused: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes, or text as UTF-8; return how many of them, as files do."""
        if isinstance(data, str):
            self.text = True
            written = len(data)
            view = memoryview(data.encode("utf-8", "surrogatepass"))
        else:
            self.text = self.text or False
            view = memoryview(data).cast("B")
            written = view.nbytes
        for start in range(0, view.nbytes, STEP):
            step = view[start : start + STEP]
            self._hash.update(step)
            self._pass_on(step)
        self.length += view.nbytes
        return written

    def _pass_on(self, step: memoryview) -> None:
        try:
            while self._file is not None and step.nbytes:
                step = step[self._file.write(step) :]
        except OSError as refused:
            self.refused = refused
            raise

    def writelines(self, lines: Iterable[Any]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Pass on what was written, for those who go on with the file's descriptor."""
        try:
            if self._file is not None:
                self._file.flush()
        except OSError as refused:
            self.refused = refused
            raise

    def digest(self) -> int:
        """Return the digest of what was written."""
        return self._hash.intdigest()

    def __getattr__(self, name: str) -> Any:
        self.bypassed = True
        return getattr(self._file, name)


class HashingReader:
    """What ``pickle.load`` reads from: hashes what passes through.

    Attributes
    ----------
    length : int
        How many bytes passed.
    refused : OSError or None
        What a read ended with that the system refused.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file: Any = file  # with readinto, which `IO` does not know
        self._hash = xxhash.xxh3_64()
        self.length = 0
        self.refused: OSError | None = None

    def _ask(self, read: Callable[..., Any], *args: Any) -> Any:
        try:
            return read(*args)
        except OSError as refused:
            if refused.errno is not None:  # else a decompressor found it damaged
                self.refused = refused
            raise

    def _passed(self, data: Any, length: int) -> None:
        self._hash.update(data)
        self.length += length

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes."""
        data: bytes = self._ask(self._file.read, size)
        self._passed(data, len(data))
        return data

    def readline(self) -> bytes:
        """Read one line."""
        data: bytes = self._ask(self._file.readline)
        self._passed(data, len(data))
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, as far as the file goes; return how many bytes were read."""
        view = memoryview(buffer).cast("B")
        start = 0
        while start < view.nbytes:
            step = view[start : start + STEP]
            n = self._ask(self._file.readinto, step)
            if not n:
                break
            self._passed(step[:n], n)
            start += n
        return start

    def finish(self, limit: int = sys.maxsize) -> tuple[int, int]:
        """Read to the end, or one byte beyond `limit`; return the length and the digest."""
        while (left := limit + 1 - self.length) > 0 and (data := self._file.read(min(STEP, left))):
            self._passed(data, len(data))
        return self.length, self._hash.intdigest()
