"""Which opcodes the pickle of a frame may consist of, looked at before it is read.

The unpickler makes its memo as large as a single opcode says, and asks keys for their hash where
they stand in a set or dict. The frames of a chest need neither, nor names or persistent ids.
"""

from __future__ import annotations

import re

_SHORT = 128  # bytes of a str, below which no step of Python is taken for it
_LENGTHS = {  # opcodes with data behind: how many bytes say how much
    0x8C: 1, 0x58: 4, 0x8D: 8,  # str
    0x43: 1, 0x42: 4, 0x8E: 8,  # bytes
    0x8A: 1, 0x8B: 4,  # int
}  # fmt: skip
_FIXED = {0x95: 9}  # the head of a pickle's own frames
_REFUSED = b"\x93ciPQ"  # names and persistent ids: the unpickler says which, and goes no further
_END = 0x2E

_str = b"|".join(b"%b.{%d}" % (re.escape(bytes([n])), n) for n in range(_SHORT))
_run = re.compile(
    rb"(?:\x94|[(\]\x85-\x87\x91aetN\x88\x89)]|[Kh].|M..|[Jj].{4}|G.{8}|\x8c(?:%b)"
    rb"|\x8a(?:\x05.{5}|\x08.{8}|\x09.{9})){1,4096}" % _str,
    re.DOTALL,
).match


def demand_plain(payload: bytes) -> None:
    """Look whether a pickle has but the opcodes that a frame needs.

    Raises
    ------
    ValueError
        If it has another one, or ends in the midst of one.
    """
    place, end = len(b"\x80\x05"), len(payload) - 1
    if payload[:1] != b"\x80":
        raise ValueError("it is no pickle")
    while place < end:
        if run := _run(payload, place):
            place = run.end()
        opcode = payload[place] if place <= end else _END
        if opcode in _LENGTHS:
            start = place + 1 + _LENGTHS[opcode]
            place = start + int.from_bytes(payload[place + 1 : start], "little")
        elif opcode in _FIXED:
            place += _FIXED[opcode]
        elif opcode in _REFUSED:
            return
        elif opcode == _END or not run:
            break
    if place != end or payload[place] != _END:
        raise ValueError(f"it has an opcode at byte {place} that no index has")
