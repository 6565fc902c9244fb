r"""The format of the index file ``.keys``: frames behind a head of 16 bytes.

::

    magic   8 bytes   b'chest\x00\x01\n'
    length  8 bytes   little-endian; bits 0-47 the committed length, 48-62 a checksum of it,
                      bit 63 MOVED: this file was or is being replaced by a shorter one
    frames  ...       u32 length of the payload, u32 crc32 of the payload, payload

No payload is empty, so that a hole, which reads as zeros, is no frame.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from io import FileIO
from zlib import crc32

from chest.errors import locating

MAGIC = b"chest\x00\x01\n"
HEAD = 16
WORD = 8  # bytes: the last of the head
FRAME_HEAD = 8
MOVED = 1 << 63
STEP = 8 << 20  # bytes read in one go, if a single frame has not more
_LENGTH = (1 << 48) - 1


def _checksum(length: int) -> int:
    return crc32(length.to_bytes(6, "little")) & 0x7FFF


def encode_length(length: int) -> int:
    """Return the word that stands for a committed length of `length` bytes."""
    return length | _checksum(length) << 48


def decode_length(word: int) -> int:
    """Return the committed length that a word stands for, -1 if it fails its checksum."""
    length = word & _LENGTH
    return length if (word & ~MOVED) == encode_length(length) else -1


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
        if not length or end > len(data) or crc32(payload) != checksum:
            return
        yield end, payload
        start = end


def read_frames(file: FileIO, start: int, end: int) -> tuple[list[bytes], int]:
    """Return the payloads of the frames from `start` on, and where the last whole one ends.

    Not all is read at once: a file with holes may seem to be of any length.
    """
    payloads: list[bytes] = []
    size = STEP
    while start < end:
        data = _read(file, start, min(start + size, end))
        if frames := [*split_frames(data)]:
            payloads += [payload for _, payload in frames]
            start += frames[-1][0]
            size = STEP
            continue
        needed = FRAME_HEAD + int.from_bytes(data[:4], "little")
        if needed <= size or start + needed > end:
            break
        size = needed
    return payloads, start


def _read(file: FileIO, start: int, end: int) -> bytes:
    file.seek(start)
    parts = []
    while start < end and (part := file.read(end - start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def log_size(payloads: Collection[bytes]) -> int:
    """Return how many bytes a log of `payloads` alone has."""
    return HEAD + FRAME_HEAD * len(payloads) + sum(map(len, payloads))


def write_log(path: str, payloads: list[bytes], *, fsync: bool) -> None:
    """Write a new log of `payloads` to the new file `path`."""
    data = b"".join(map(frame, payloads))
    with locating(path), open(path, "xb") as file:
        file.write(MAGIC + encode_length(HEAD + len(data)).to_bytes(WORD, "little") + data)
        if fsync:
            file.flush()
            os.fsync(file.fileno())
