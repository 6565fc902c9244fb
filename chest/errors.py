"""What can go wrong, one class each.

Every class carries its data as attributes, survives pickling, and says in one line what
happened, where, and what to do. ``ChestError`` is the base of all of them. On an open chest a
missing key is a plain ``KeyError(key)``, and a disk that refuses is the ``OSError`` it gave.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from reprlib import Repr
from typing import Any

DROPPED = "the chest there was dropped"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # there is no room, or none for this user

_repr = Repr()  # short, and it does not fail where a key's own repr does
_repr.maxstring = _repr.maxother = 120


def show(key: object) -> str:
    """Return a key as it stands in messages."""
    try:
        return " ".join(_repr.repr(key).split())
    except ValueError:  # an int that is too long for Python to turn it into text
        return f"<{type(key).__name__}>"


def say(error: BaseException) -> str:
    """Return what an error says, as one line of text: a log must not keep its traceback alive."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 -- it is somebody else's, and its type says enough
        text = "(no message)"
    return " ".join(f"{type(error).__name__}: {text}".split())


def told(error: OSError, path: str, needed: int) -> OSError:
    """Return `error` with what the user wants to know: where, how much, how much is free."""
    if not error.errno:
        return error
    if isinstance(error, FileNotFoundError) and not os.path.lexists(path):
        return FileNotFoundError(error.errno, DROPPED, path)
    there = path
    while not os.path.lexists(there) and there != os.path.dirname(there):
        there = os.path.dirname(there)  # it could not be made
    try:
        free = f"{shutil.disk_usage(there).free} bytes are free"
    except OSError:
        free = "free bytes unknown"
    message = f"{error.strerror} (about {needed} bytes needed, {free})"
    return type(error)(error.errno, message, path)


@contextmanager
def locating(path: str) -> Iterator[None]:
    """Have an error of the system name `path`, if it names none: those of descriptors do not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or not error.errno:
            raise
        raise type(error)(error.errno, error.strerror, path) from error


class ChestError(Exception):
    """Base of every error that is chest's own."""

    def __str__(self) -> str:
        return " ".join(self._text().split())

    def _text(self) -> str:
        return super().__str__()


class ChestClosedError(ChestError, ValueError):
    """The chest was closed or dropped, and can no longer be used.

    Parameters
    ----------
    path : str or None
        The directory of the chest; None for a temporary chest that never wrote.
    """

    def __init__(self, path: str | None) -> None:
        super().__init__(path)
        self.path = path

    def _text(self) -> str:
        return f"the chest at {self.path} is closed: open it again with Chest(path=...)"


class ReadOnlyError(ChestError, TypeError):
    """Something was to be changed in a chest that is only read.

    Parameters
    ----------
    path : str
        The directory of the chest.
    action : str
        What was asked for.
    """

    def __init__(self, path: str, action: str) -> None:
        super().__init__(path, action)
        self.path = path
        self.action = action

    def _text(self) -> str:
        return (
            f"cannot {self.action}: the chest at {self.path} is read-only; open it without "
            "readonly=True, in a directory that may be written"
        )


class KeyTypeError(ChestError, TypeError):
    """A key that this chest cannot store.

    Raised when the key is set. A chest whose serializer is not pickle stores only keys that need
    no class to be read: str, bytes, int, float, bool, None, and tuples and frozensets of such.

    Parameters
    ----------
    key : hashable
        The key.
    reason : str
        Why it cannot be stored.
    """

    def __init__(self, key: Hashable, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def _text(self) -> str:
        kind = type(self.key).__name__
        return f"the key {show(self.key)} of type {kind} cannot be stored: {self.reason}"


class CorruptIndexError(ChestError):
    """The index of a chest cannot be believed.

    Parameters
    ----------
    path : str
        The index file.
    reason : str
        What is wrong with it.
    recoverable : int
        How many commits stand undamaged before the fault.
    repairable : bool
        Whether `chest.repair` may help.
    """

    def __init__(
        self, path: str, reason: str, recoverable: int = 0, repairable: bool = True
    ) -> None:
        super().__init__(path, reason, recoverable, repairable)
        self.path = path
        self.reason = reason
        self.recoverable = recoverable
        self.repairable = repairable

    def _text(self) -> str:
        text = (
            f"the index {self.path} is damaged: {self.reason}; {self.recoverable} undamaged "
            "frames precede it; nothing was changed, restore the file from a backup"
        )
        return text + ", or save what can be read with chest.repair" * self.repairable


class CorruptValueError(ChestError):
    """A stored value is damaged or gone; every other value is as good as before.

    Parameters
    ----------
    key : hashable
        The key of the value.
    path : str
        The file that holds it.
    reason : str
        What is wrong with it.
    """

    def __init__(self, key: Hashable, path: str, reason: str) -> None:
        super().__init__(key, path, reason)
        self.key = key
        self.path = path
        self.reason = reason

    def _text(self) -> str:
        return (
            f"the value of key {show(self.key)} in {self.path} is damaged: {self.reason}; "
            "set or delete the key to go on without it"
        )


class SerializerError(ChestError):
    """A value that was written with another serializer, or that ``load`` refuses.

    Parameters
    ----------
    key : hashable
        The key of the value.
    path : str
        The file that holds it.
    reason : str
        What ``load`` said.
    serializer : str
        The name of the serializer in use.
    written_with : tuple of str
        The names of the serializers that wrote to this chest.
    """

    def __init__(
        self,
        key: Hashable,
        path: str,
        reason: str,
        serializer: str,
        written_with: tuple[str, ...],
    ) -> None:
        super().__init__(key, path, reason, serializer, written_with)
        self.key = key
        self.path = path
        self.reason = reason
        self.serializer = serializer
        self.written_with = written_with

    def _text(self) -> str:
        writers = ", ".join(self.written_with) or "an unknown serializer"
        return (
            f"the value of key {show(self.key)} in {self.path} cannot be loaded with "
            f"{self.serializer} ({self.reason}): this chest was written with {writers}; "
            "open it with the dump, load and open that wrote it"
        )


class UnsavedError(ChestError):
    """Some values could not be written; they stay in memory as long as the chest is open.

    Parameters
    ----------
    keys : list
        Every key that could not be saved.
    causes : list of exception
        What prevented each, in the same order.
    """

    def __init__(self, keys: list[Any], causes: list[BaseException]) -> None:
        super().__init__(keys, causes)
        self.keys = keys
        self.causes = causes

    def _text(self) -> str:
        named = ", ".join(map(show, self.keys[:10]))
        more = f" and {len(self.keys) - 10} more" if len(self.keys) > 10 else ""
        cause = self.causes[0]
        return (
            f"{len(self.keys)} of the values could not be saved: {named}{more}; the first because "
            f"of {say(cause)}; replace or delete them and flush again"
        )
