"""What a chest was made with."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chest.amounts import parse_amount
from chest.filenames import key_to_filename
from chest.sizes import nbytes

DEFAULT_AVAILABLE_MEMORY = 1e9  # bytes


@dataclass(frozen=True)
class Options:
    """The options of a chest that are not about its serializer.

    Attributes
    ----------
    path : str or None
        The directory, absolute; None for a temporary one, made when a value first leaves memory.
    namer : callable
        Key to file name.
    nbytes : callable
        Value to bytes.
    writeback : bool
        Whether values may change without being set.
    fsync : bool
        Whether each commit survives a power cut.
    readonly : bool
        Write nothing.
    on_miss, on_overflow : callable or None
        Called with a key that is read from disk, or left memory.
    """

    path: str | None
    namer: Callable[[Any], str]
    nbytes: Callable[[Any], int]
    writeback: bool
    fsync: bool
    readonly: bool
    on_miss: Callable[[Any], object] | None
    on_overflow: Callable[[Any], object] | None


def looking(path: str, *, readonly: bool = True) -> Options:
    """Return the options with which a directory is looked at, or repaired."""
    return Options(
        path=path,
        namer=key_to_filename,
        nbytes=nbytes,
        writeback=False,
        fsync=not readonly,
        readonly=readonly,
        on_miss=None,
        on_overflow=None,
    )


def absolute(path: str | os.PathLike[str] | None) -> str | None:
    """Return the absolute form of a path that a user gave.

    Raises
    ------
    ValueError
        If it is empty.
    """
    if path is None:
        return None
    name = os.fsdecode(path)
    if not name:
        raise ValueError("path is empty: give the directory of the chest, or None")
    return os.path.abspath(name)


def budget(available: float | str | None) -> float:
    """Return a budget in bytes that a user gave, as text or number; the default for None.

    Raises
    ------
    ValueError
        If it is negative, not a number, or a text that says no amount.
    TypeError
        If it is neither a text nor of a kind that numbers are.
    OSError
        If it is a share of the memory, and the system does not tell how much there is.
    """
    if available is None:
        return DEFAULT_AVAILABLE_MEMORY
    if isinstance(available, str):
        return parse_amount(available)
    message = f"available_memory is {available!r}: it has to be a number of bytes, or like '2 GB'"
    try:
        if math.isnan(available) or available < 0:
            raise ValueError(message)
    except TypeError:
        raise TypeError(message) from None
    except OverflowError:
        raise ValueError(message) from None
    return available
