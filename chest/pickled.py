"""Pickles that are looked at and not run: keys that need a class, and indexes of old chests."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from dataclasses import dataclass
from typing import IO, Any, Self


class _Name(type):
    """The type of what stands in for a class or function, which shows its name."""

    def __repr__(cls) -> str:
        return cls.__name__


class _Stub(metaclass=_Name):
    """What stands in for an object whose class is not imported."""

    _args: tuple[object, ...]
    _options: dict[str, object]
    _state: object

    def __new__(cls, *args: object, **options: object) -> Self:
        self = super().__new__(cls)
        self._args, self._options, self._state = args, options, None
        return self

    def __init__(self, *args: object, **options: object) -> None:
        """Take anything."""

    def __setstate__(self, state: object) -> None:
        self._state = state

    def __repr__(self) -> str:
        args = [*map(repr, self._args), *(f"{k}={v!r}" for k, v in self._options.items())]
        args += [repr(self._state)] * (self._state is not None)
        return f"{type(self).__name__}({', '.join(args)})"


def _encode(text: str, encoding: str) -> bytes:
    """Do what a pickle of protocol 2 asks for where it has bytes, and no more."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


# Where older protocols call Python itself to make plain keys.
_MAKERS: dict[str, Any] = {
    "_codecs.encode": _encode,
    "builtins.bytes": lambda: b"",  # of others, it would take any amount of memory
    "builtins.frozenset": frozenset,
}


class _Stubbing(pickle.Unpickler):
    """Reads a pickle without importing anything, or calling anything but stubs."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a new stub of that name."""
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")
        return _MAKERS.get(full) or _Name(full, (_Stub,), {})

    def persistent_load(self, pid: Any) -> Any:
        """Refuse what is not in the stream itself."""
        raise pickle.UnpicklingError(f"it holds a persistent id {pid!r}")


@dataclass(frozen=True, repr=False)
class PickledKey:
    """A key that needs a class, shown without importing that.

    Parameters
    ----------
    data : bytes
        Its pickle.

    Examples
    --------
    >>> import datetime, pickle
    >>> PickledKey(pickle.dumps(datetime.timedelta(1)))
    <datetime.timedelta(1, 0, 0)>
    """

    data: bytes

    def __repr__(self) -> str:
        try:
            return f"<{_Stubbing(io.BytesIO(self.data)).load()!r}>"
        except Exception:  # noqa: BLE001 -- what was made by hand can raise nearly anything
            return f"<a pickle of {len(self.data)} bytes>"


def read_plain(file: IO[Any]) -> Any:
    """Return what a file of JSON or a pickle holds, with stubs for what needs a class."""
    data = file.read()
    if isinstance(data, str):
        return json.loads(data)
    return json.loads(data) if holds_json(data) else _Stubbing(io.BytesIO(data)).load()


def holds_json(data: bytes) -> bool:
    """Tell whether bytes that are JSON or a pickle are JSON."""
    if data[:1] == b"\x80":
        return False
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def skim(file: IO[bytes]) -> None:
    """Read the one pickle, or the JSON, that a file holds, without running it.

    Raises
    ------
    ValueError
        If it is neither, or not all of it.
    """
    data = file.read()
    if holds_json(data):
        return
    try:
        for _ in pickletools.genops(data):
            pass
    except Exception as error:
        raise ValueError(f"it is no JSON, and no whole pickle ({error})") from error
