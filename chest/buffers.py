"""Pickles read and hashed before any of them is unpickled, without a second pass for arrays.

A wrong bit in a pickle can ask for any amount of memory, so nothing is unpickled that is not known
to be what was written. What is small is kept until then. So are large bytes and the buffers of
arrays, which protocol 5 writes outside of all frames: they are read straight to where they stay,
and the unpickler gets them aside. Every other large pickle has to be read again.
"""

from __future__ import annotations

import pickle
import re
import sys
from typing import IO, Any

from chest.streams import HashingReader

# What protocol 5 writes of large bytes and bytearrays, outside of all frames; those of an array
# after a frame that ends with the function that makes an array of a buffer.
_BYTEARRAY8, _BINBYTES8, _BINBYTES = b"\x96", b"\x8e", b"B"
_SIZES = {_BYTEARRAY8: 8, _BINBYTES8: 8, _BINBYTES: 4}  # bytes that say how large the buffer is
_NEXT_BUFFER, _READONLY_BUFFER, _MEMOIZE = b"\x97", b"\x98", b"\x94"
_PROTOCOL, _FRAME = b"\x80\x05", b"\x95"
_HEAD = 11  # bytes of a pickle before its first frame's content
_MAKES_ARRAY = re.compile(rb"numpy\._?core\.numeric\x94\x8c\x0b_frombuffer\x94\x93\x94\(\Z")


class PickleReader(HashingReader):
    """A pickle of which everybody knows how long it should be; nobody knows yet whether it is.

    Parameters
    ----------
    file : binary file
    length : int
        How many bytes it should have.
    room : int
        How many bytes to keep, beside large buffers.

    Attributes
    ----------
    whole : bool
        Whether all of it was kept, so that `load` can be called.
    """

    def __init__(self, file: IO[bytes], length: int, room: int) -> None:
        super().__init__(file)
        self._left = length
        self._room = room
        self._parts: list[bytes] = []  # for the unpickler
        self._frames: list[bytes] = []  # the content of frames
        self._buffers: list[Any] = []
        self._apart = hasattr(file, "readinto")
        self.whole = False

    def finish(self, limit: int = sys.maxsize) -> tuple[int, int]:
        """Read to the end, or one byte beyond `limit`; return the length and the digest."""
        if self._apart and self._take(len(_PROTOCOL)) == _PROTOCOL:
            while self._take_frame() or self._take_buffer():
                pass
        if self._left <= self._room:
            self._take(self._left)
            self.whole = not self._left
        return super().finish(limit)

    def _take(self, size: int) -> bytes:
        """Read, and keep, so many bytes; fewer where they go beyond the length."""
        data = self._read_all(min(size, self._left))
        self._room -= len(data)
        self._parts.append(data)
        return data

    def _read_all(self, size: int) -> bytes:
        data = self.read(size)
        while len(data) < size and (more := self.read(size - len(data))):
            data += more
        self._left -= len(data)
        return data

    def _take_frame(self) -> bool:
        """Take a frame if one is next; else one opcode at most."""
        if self._room < 1 or self._take(1) != _FRAME:
            return False
        size = int.from_bytes(self._take(8), "little")
        if size > min(self._left, self._room):
            return False
        self._frames.append(self._take(size))
        return True

    def _take_buffer(self) -> bool:
        """Take a buffer, after its opcode, if that is what comes now."""
        opcode = self._parts[-1]
        if opcode not in _SIZES:
            return False
        size = int.from_bytes(self._take(_SIZES[opcode]), "little")
        if size > self._left:
            return False
        self._buffers.append(self._read_buffer(opcode, size))
        self._parts[-2:] = [_NEXT_BUFFER]
        return True

    def _read_buffer(self, opcode: bytes, size: int) -> Any:
        numpy = sys.modules.get("numpy")
        frame = self._frames[-1] if self._frames else b""
        for_array = numpy and _MAKES_ARRAY.search(frame, max(len(frame) - 64, 0))
        if opcode != _BYTEARRAY8 and not for_array:
            return self._read_all(size)
        # Memory of numpy's comes in huge pages, a bytearray page fault by page fault.
        buffer: Any = numpy.empty(size, "u1") if numpy and for_array else bytearray(size)
        self._left -= self.readinto(buffer)
        if for_array:
            buffer.flags.writeable = opcode == _BYTEARRAY8
        return buffer

    def load(self) -> Any:
        """Unpickle what was read, once it is known to be what was written."""
        return pickle.loads(b"".join(self._parts), buffers=self._buffers)

    def gives_again(self, value: object) -> bool:
        """Tell whether to dump `value`, which was loaded from this, is sure to give it again.

        That is known of plain arrays alone: from their pickle without the buffer, since a buffer
        gives itself again.
        """
        numpy = sys.modules.get("numpy")
        if numpy is None or len(self._buffers) != 1 or type(value) is not numpy.ndarray:
            return False
        aside: list[pickle.PickleBuffer] = []
        stream = pickle.dumps(value, 5, buffer_callback=aside.append)
        fetches = _NEXT_BUFFER + (_READONLY_BUFFER if aside and aside[0].raw().readonly else b"")
        before, _, after = stream[_HEAD:].partition(fetches)
        return [before, _MEMOIZE + after] == self._frames
