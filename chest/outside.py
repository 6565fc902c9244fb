"""A directory seen from outside: opened without being told what wrote it, and without trust.

What an index says about serializers chooses among a few that are known; it imports nothing. Keys
that need a class are not read.
"""

from __future__ import annotations

import builtins
import importlib
import json
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from chest.options import looking
from chest.pickled import holds_json, read_plain
from chest.reading import Reading
from chest.salvage import open_anyhow
from chest.serialize import Load, Open, Serializer

OPENERS = {f"{module}.open": module for module in ("gzip", "bz2", "lzma", "lz4.frame")}
LOADERS: dict[str, Load] = {
    "pickle": pickle.load,
    "pickle.dump": pickle.load,
    "cloudpickle.cloudpickle.dump": pickle.load,
    "json.dump": json.load,
}
_WITH = " with open="


def _refuse(*_: object) -> None:
    raise TypeError("this chest is only looked at")


@contextmanager
def open_outside(
    path: str, open: Open = builtins.open
) -> Iterator[tuple[Reading, list[str]]]:
    """Open a directory for reading; give it with what is wrong with its index.

    Raises
    ------
    OSError
        If there is no chest, or the system refuses.
    """
    serializer = Serializer(_refuse, read_plain, open, None)
    reading, faults = open_anyhow(path, serializer, looking(path))
    try:
        yield reading, faults
    finally:
        reading.close()


def adopt(reading: Reading) -> None:
    """Let the serializer of a directory that was opened pass for the one that wrote it.

    Raises
    ------
    ValueError
        If its files were written with an ``open`` that nobody knows here, or with several.
    """
    serializer, names = reading.serializer, reading.ledger.serializers
    if not names:
        serializer.name = "json.dump" if _is_old_json(reading.directory.index) else "pickle"
        return
    if serializer.open is builtins.open:
        serializer.open = find_opener(names)
    serializer.name, serializer.text = [*names.items()][-1]


def _is_old_json(path: str) -> bool:
    with builtins.open(path, "rb") as file:
        return holds_json(file.read())


def find_opener(names: Iterable[str]) -> Open:
    """Return the ``open`` of the serializers with these names; raises as `adopt` does."""
    openers = {name.partition(_WITH)[2] for name in names}
    if openers <= {""}:
        return builtins.open
    name = openers.pop()
    if openers or name not in OPENERS:
        known = " or ".join(sorted({name, *openers} - {""}))
        raise ValueError(f"its files are opened with {known}: give that as `open`, in Python")
    found: Open = importlib.import_module(OPENERS[name]).open
    return found


def trusting(plain: Serializer) -> Serializer:
    """Return a serializer like one that was adopted, which loads what that only passes for.

    Raises
    ------
    ValueError
        If its ``load`` is not known here.
    """
    name = plain.name.partition(_WITH)[0]
    if name not in LOADERS:
        raise ValueError(f"its values were written with {name}: open it in Python")
    serializer = Serializer(_refuse, LOADERS[name], plain.open, None)
    serializer.name, serializer.text = plain.name, plain.text
    return serializer
