"""Directories that chest 0.2.3 wrote.

Their ``.keys`` is a list of pairs of key and file name, written with the serializer of the values.
Whoever opens one reads it as it is; the first commit puts an index of today in its place.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from chest.columns import Entry, encode
from chest.errors import CorruptIndexError
from chest.filenames import is_safe_filename
from chest.serialize import UNKNOWN, Serializer, UnloadableError


def read_old_index(path: str, serializer: Serializer) -> bytes:
    """Return the payload of a frame that says what the old index at `path` says.

    Raises
    ------
    CorruptIndexError
        If it cannot be read with `serializer`, or is not such an index.
    """
    try:
        with serializer.open(path, mode="rb") as file:
            content = serializer.read_from(file, UNKNOWN, 0)
        pairs = [(_hashable(key), name) for key, name in content]
    except (UnloadableError, TypeError, ValueError, EOFError) as error:
        reason = f"it is no index of this version, nor one of 0.2.3 for {serializer.name} ({error})"
        raise CorruptIndexError(path, reason) from error
    for _, name in pairs:
        if not is_safe_filename(name):
            raise CorruptIndexError(path, f"it names a file outside, {name!r}")
    entries = {key: Entry(name, 0, UNKNOWN, 0) for key, name in pairs}
    return encode([(key, n, entry) for n, (key, entry) in enumerate(entries.items())], first=True)


def _hashable(key: Any) -> Hashable:
    """Turn the lists that JSON made of tuples back into tuples."""
    return tuple(map(_hashable, key)) if isinstance(key, list) else key
