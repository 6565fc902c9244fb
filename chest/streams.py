"""Files that hash what passes through them, for ``dump`` to write to and ``load`` to read from."""

from __future__ import annotations

import pickle
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import IO, Any

import xxhash

STEP = 1 << 22  # bytes hashed and passed on at a time: they stay in the cache of most processors

# What protocol 5 writes for a numpy array: a frame that ends with the function that makes an array
# of a buffer, and then, outside of all frames, the buffer.
_BYTEARRAY8, _BINBYTES8, _BINBYTES = b"\x96", b"\x8e", b"B"
_SIZES = {_BYTEARRAY8: 8, _BINBYTES8: 8, _BINBYTES: 4}  # bytes that say how large the buffer is
_NEXT_BUFFER, _READONLY_BUFFER, _MEMOIZE = b"\x97", b"\x98", b"\x94"
_HEAD = 11  # bytes of a pickle before its first frame's content
_MAKES_ARRAY = re.compile(rb"numpy\._?core\.numeric\x94\x8c\x0b_frombuffer\x94\x93\x94\(\Z")


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


def _is_for_array(frame: bytes) -> bool:
    return "numpy" in sys.modules and _MAKES_ARRAY.search(frame, len(frame) - 64) is not None


class HashingReader:
    """What ``pickle.load`` reads from: hashes what passes through."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file: Any = file  # with readinto, which `IO` does not know
        self._hash = xxhash.xxh3_64()
        self._before = self._frame = b""  # what was read last; what was read before the buffer
        self._arrays = 0
        self._buffers: deque[Any] = deque()
        self.length = 0

    def _passed(self, data: Any, length: int) -> None:
        self._hash.update(data)
        self.length += length

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes."""
        data: bytes = self._file.read(size)
        self._passed(data, len(data))
        if size == 1 and data in _SIZES and _is_for_array(self._before):
            self._frame = self._before
            return self._read_aside(data)
        self._before = data
        return data

    def _read_aside(self, opcode: bytes) -> bytes:
        """Read the buffer of an array into memory of numpy's; return the opcode that fetches it.

        The unpickler would fill a fresh bytearray, page fault by page fault, where numpy asks the
        system for huge pages: that is several times as fast.
        """
        size = self.read(_SIZES[opcode])
        buffer = sys.modules["numpy"].empty(int.from_bytes(size, "little"), "u1")
        if self.readinto(buffer) < len(buffer):
            raise EOFError("the stream ends in the midst of an array")
        buffer.flags.writeable = opcode == _BYTEARRAY8
        self._buffers.append(buffer)
        self._arrays += 1
        return _NEXT_BUFFER

    def gives_again(self, value: object) -> bool:
        """Tell whether to dump `value`, which was loaded from this, is sure to give it again.

        That is known of plain arrays alone: from their pickle without the buffer, since a buffer
        gives itself again.
        """
        if self._arrays != 1 or type(value) is not sys.modules["numpy"].ndarray:
            return False
        aside: list[pickle.PickleBuffer] = []
        stream = pickle.dumps(value, 5, buffer_callback=aside.append)
        fetches = _NEXT_BUFFER + (_READONLY_BUFFER if aside and aside[0].raw().readonly else b"")
        before, _, after = stream[_HEAD:].partition(fetches)
        return (before, _MEMOIZE + after) == (self._frame, self._before)

    def readline(self) -> bytes:
        """Read one line."""
        data: bytes = self._file.readline()
        self._passed(data, len(data))
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, as far as the file goes; return how many bytes were read."""
        view = memoryview(buffer).cast("B")
        start = 0
        while start < view.nbytes:
            step = view[start : start + STEP]
            n = self._file.readinto(step)
            if not n:
                break
            self._passed(step[:n], n)
            start += n
        return start

    def buffers(self) -> Iterator[Any]:
        """Yield the buffers that were read aside, for the unpickler that reads this."""
        while True:
            yield self._buffers.popleft()

    def finish(self) -> tuple[int, int]:
        """Read to the end; return the length and the digest of the whole stream."""
        while data := self._file.read(STEP):
            self._passed(data, len(data))
        return self.length, self._hash.intdigest()
