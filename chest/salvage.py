"""What of a damaged index can be believed: every frame that is whole."""

from __future__ import annotations

from typing import Any, NamedTuple

from chest.columns import FrameError
from chest.errors import CorruptIndexError
from chest.files import is_own
from chest.frames import FRAME_HEAD, HEAD, MAGIC, decode_length, split_frames
from chest.ledger import Ledger
from chest.options import Options
from chest.reading import Reading
from chest.serialize import Serializer

NEWER = range(2, 32)  # what stands at byte 6 of the indexes of later versions
_PICKLE = b"\x80\x05"  # what the payload of every frame begins with


class Salvage(NamedTuple):
    """What is left of an index.

    Attributes
    ----------
    payloads : list of bytes
        Those of the frames that are whole, and committed as far as anybody can tell.
    uncommitted : list of bytes
        Those beyond the committed length.
    faults : list of str
        What is wrong with it.
    is_index, is_newer : bool
        Whether it is an index of this version, or of a later one, as far as anybody can tell.
    """

    payloads: list[bytes]
    uncommitted: list[bytes]
    faults: list[str]
    is_index: bool
    is_newer: bool


def salvage(data: bytes) -> Salvage:
    """Find what is left of the index with the content `data`."""
    end = _committed_length(data)
    faults = ["its first bytes are not those of an index"] * (not data.startswith(MAGIC))
    if end is None:
        faults.append("the committed length in its head fails its checksum")
    elif end > len(data):
        faults.append(f"it has {len(data)} bytes where {end} were committed")
    payloads, gaps = _whole_frames(data[:end])
    faults += [f"the frame at byte {gap} is not as written" for gap in gaps]
    uncommitted = [] if end is None else [p for _, p in split_frames(data[end:])]
    blank = MAGIC.startswith(data.rstrip(b"\0"))  # as a power cut leaves new files
    is_index = blank or data.startswith(MAGIC[:6]) or bool(payloads)
    is_newer = data[:6] == MAGIC[:6] and data[7:8] == MAGIC[7:8] and data[6] in NEWER
    return Salvage(payloads, uncommitted, faults, is_index, is_newer)


def _committed_length(data: bytes) -> int | None:
    length = decode_length(int.from_bytes(data[8:HEAD], "little"))
    return length if len(data) >= HEAD and length >= HEAD else None


def _whole_frames(data: bytes) -> tuple[list[bytes], list[int]]:
    """Return the payloads of all whole frames, and the places where there is something else."""
    payloads, gaps = [], []
    start = HEAD
    while start < len(data):
        payload = _payload(data, start)
        if payload is not None:
            payloads.append(payload)
            start += FRAME_HEAD + len(payload)
        else:
            gaps.append(start)
            start = _next_frame(data, start)
    return payloads, gaps


def _payload(data: bytes, start: int) -> bytes | None:
    """Return the payload of the frame that begins at `start`, None if none does."""
    end = start + FRAME_HEAD + int.from_bytes(data[start : start + 4], "little")
    if end > len(data) or data[start + FRAME_HEAD : start + FRAME_HEAD + 2] != _PICKLE:
        return None
    for _, payload in split_frames(data[start:end]):
        try:
            Ledger(trusted=False).apply(payload)
        except FrameError:
            return None
        return payload
    return None


def _next_frame(data: bytes, start: int) -> int:
    """Return where the next whole frame begins, behind a bad one at `start`."""
    end = start + FRAME_HEAD + int.from_bytes(data[start : start + 4], "little")
    if end == len(data) or _payload(data, end) is not None:
        return end
    place = start + FRAME_HEAD  # its length is wrong, so nobody knows what is inside it
    while (place := data.find(_PICKLE, place + 1)) != -1:
        if _payload(data, place - FRAME_HEAD) is not None:
            return place - FRAME_HEAD
    return len(data)


class _Wreck:
    """Passes for an `Index` that is read once."""

    foreign = False
    seen = 0

    def __init__(self, path: str) -> None:
        self.path = path
        if not is_own(path):
            raise CorruptIndexError(path, "it is a link, or no file at all", repairable=False)
        with open(path, "rb") as file:
            self.found = salvage(file.read())
        self._told = False

    def refresh(self, **_: bool) -> tuple[bool, list[bytes]]:
        """Return what was salvaged, the first time."""
        anew, self._told = not self._told, True
        return anew, self.found.payloads if anew else []

    def uncommitted(self) -> list[bytes]:
        """Return what lies beyond the committed length."""
        return self.found.uncommitted

    def rewind(self) -> None:
        """Have nothing to read again."""

    def close(self) -> None:
        """Have nothing open."""


class Salvaged(Reading):
    """What can be read of a chest whose index is damaged."""

    def _open(self, _: Options) -> None:
        self.readonly = True
        wreck: Any = _Wreck(self.directory.index)  # it passes for an index
        self.index = wreck


def open_anyhow(
    path: str, serializer: Serializer, options: Options
) -> tuple[Reading, list[str]]:
    """Open a directory to read what can be read of it; return what is wrong with its index, too.

    Raises
    ------
    OSError
        If there is no chest, or the system refuses.
    CorruptIndexError
        If its index is of a later version, or a link, or no file.
    """
    try:
        return Reading(path, serializer, options), []
    except CorruptIndexError as error:
        reading = Salvaged(path, serializer, options)
        wreck: Any = reading.index
        found: Salvage = wreck.found
        if found.is_newer:
            raise
        return reading, found.faults if found.is_index and found.faults else [error.reason]
