"""Directories that chest 0.2.3 wrote.

Their ``.keys`` is a list of pairs of key and file name, written with the serializer of the values.
Whoever opens one reads it as it is; the first commit puts an index of today in its place.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Any

from chest.columns import Entry
from chest.directory import Directory
from chest.errors import CorruptIndexError
from chest.filenames import stays_inside
from chest.files import is_file, starts_with
from chest.frames import MAGIC
from chest.serialize import Serializer, UnloadableError

MOST = 1 << 28  # bytes of such an index: that names some million files


def read_old_index(directory: Directory, serializer: Serializer) -> dict[Any, Entry]:
    """Return what the index of an old chest says, with the digests that its files have now.

    Raises
    ------
    CorruptIndexError
        If it cannot be read with `serializer`, or is not such an index.
    """
    try:
        if os.stat(directory.index).st_size > MOST:
            raise ValueError("it is larger than one ever was")
        with serializer.open(directory.index, mode="rb") as file:
            content = serializer.read_unrecorded(file)
        names = {_key(key): _name(name) for key, name in _pairs(content)}
        _demand_old(directory)
    except (UnloadableError, TypeError, ValueError, EOFError, MemoryError) as error:
        reason = f"it is no index of this version, nor one of 0.2.3 for {serializer.name} ({error})"
        raise CorruptIndexError(directory.index, reason) from error
    return {key: _measured(directory, serializer, name) for key, name in names.items()}


def _pairs(content: Any) -> list[Any]:
    if not isinstance(content, list) or not {*map(type, content)} <= {list, tuple}:
        raise TypeError("it is no list of pairs")
    return content


def _demand_old(directory: Directory) -> None:
    """Look for what 0.2.3 did not write: a value may have changed places with the index."""
    walk = os.walk(directory.path)
    paths = (os.path.join(folder, name) for folder, _, names in walk for name in names)
    named = (path for path in paths if not os.path.basename(path).startswith("."))
    newer = directory.find_pack() or next((p for p in named if starts_with(p, MAGIC)), "")
    # Another process may have put an index of today there meanwhile.
    if newer and not starts_with(directory.index, MAGIC):
        raise ValueError(f"{newer} is of this version")


def _key(key: Any) -> Hashable:
    """Turn the lists that JSON made of tuples back into tuples."""
    return tuple(map(_key, key)) if isinstance(key, list) else key


def _name(name: Any) -> str:
    if not stays_inside(name):
        raise ValueError(f"it names a file outside, {name!r}")
    return str(name)


def _measured(directory: Directory, serializer: Serializer, name: str) -> Entry:
    path = directory.full_path(name)
    if not is_file(path):
        return Entry(name, 0, 0, 0)  # asking for its value tells
    return Entry(name, 0, *serializer.measure(path))
