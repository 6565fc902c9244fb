"""Files that hash what passes through them, for ``dump`` to write to and ``load`` to read from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import xxhash

STEP = 1 << 20  # bytes hashed and passed on at a time: they stay in the processor's cache


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
        with self._noting_refusals():
            while self._file is not None and step.nbytes:
                step = step[self._file.write(step) :]

    @contextmanager
    def _noting_refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as refused:
            self.refused = refused
            raise

    def writelines(self, lines: Iterable[Any]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Pass on what was written, for those who go on with the file's descriptor."""
        with self._noting_refusals():
            if self._file is not None:
                self._file.flush()

    def digest(self) -> int:
        """Return the digest of what was written."""
        return self._hash.intdigest()

    def __getattr__(self, name: str) -> Any:
        self.bypassed = True
        return getattr(self._file, name)


class HashingReader:
    """What ``pickle.load`` reads from: hashes what passes through."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = xxhash.xxh3_64()
        self.length = 0

    def _passed(self, data: Any, length: int) -> None:
        self._hash.update(data)
        self.length += length

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes."""
        data = self._file.read(size)
        self._passed(data, len(data))
        return data

    def readline(self) -> bytes:
        """Read one line."""
        data = self._file.readline()
        self._passed(data, len(data))
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, as far as the file goes; return how many bytes were read."""
        view = memoryview(buffer).cast("B")
        start = 0
        while start < view.nbytes:
            step = view[start : start + STEP]
            n = self._file.readinto(step)  # type: ignore[attr-defined]
            if not n:
                break
            self._passed(step[:n], n)
            start += n
        return start

    def finish(self) -> tuple[int, int]:
        """Read to the end; return the length and the digest of the whole stream."""
        while self.read(STEP):
            pass
        return self.length, self._hash.intdigest()
