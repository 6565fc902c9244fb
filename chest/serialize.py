"""Values to streams and back.

A serializer is a pair ``dump(obj, file)`` and ``load(file)`` with the ``open`` that makes the
files. What ``dump`` writes, text or binary, is the *stream*; its xxh3_64 digest tells whether a
file still holds what was written, and whether a value changed since.

``open`` is always asked for a binary file. Text is encoded as UTF-8 here, so that one digest
serves both, and nobody has to say which of the two a serializer writes.

Nothing but the chest's ``load`` ever looks into a stream: with a ``load`` that is not pickle's,
no pickle is read.
"""

from __future__ import annotations

import builtins
import errno
import functools
import io
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import chain, islice, repeat
from typing import IO, Any

import xxhash

from chest.buffers import PickleReader
from chest.directory import keep_from_children
from chest.errors import FULL
from chest.files import demand_file, read_whole, write_new
from chest.streams import HashingReader, HashingWriter

SMALL = 128 * 1024  # bytes; below, a stream is made and read in one piece
KEPT = 4 << 20  # bytes of a pickle that are kept until it is known to be right
KEPT_INFLATED = 64 << 20  # the same, of one that takes long to be read once more
GROWN, ROOM = 16, 64 << 20  # times, and bytes, by which a file may exceed the stream in it

Dump = Callable[[Any, IO[Any]], object]
Load = Callable[[IO[Any]], Any]
Open = Callable[..., IO[Any]]

digest_bytes = xxhash.xxh3_64_intdigest

_PROTOCOL = repeat(5)
_PICKLE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib"}
_DISK_ERRNOS = FULL | {errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE}
_ATOMS = {
    str,
    bytes,
    int,
    float,
    bool,
    complex,
    type(None),
    type(...),
    type(NotImplemented),
    range,
    Decimal,
    Fraction,
}


class DamagedError(Exception):
    """A stream is not the one that was written; the caller knows of which key."""


class _Storing(threading.local):
    """The serializers with which this thread dumps values; what is dumped may want to know."""

    def __init__(self) -> None:
        self.active: list[Serializer] = []


storing = _Storing()


class UnloadableError(Exception):
    """A stream is the one that was written, and ``load`` refuses it."""


def dump_pickle(obj: object, file: IO[bytes]) -> None:
    """Dump `obj` as a pickle of protocol 5, the default of every chest."""
    pickle.dump(obj, file, protocol=5)


def changeable(value: Any) -> bool:
    """Tell whether `value` could change without being assigned anew.

    Examples
    --------
    >>> changeable([1]), changeable((1, "a")), changeable((1, []))
    (True, False, True)
    """
    kind = type(value)
    if kind in _ATOMS:
        return False
    if kind is tuple or kind is frozenset:
        if _ATOMS.issuperset(map(type, value)):
            return False
        try:
            return any(map(changeable, value))
        except RecursionError:
            return True
    return not _is_frozen_array(value)


def any_changeable(values: Sequence[Any]) -> bool:
    """Tell whether any of `values` could change, for many of one kind in one step."""
    parts = chain.from_iterable(values) if {*map(type, values)} == {tuple} else values
    return not _ATOMS.issuperset(map(type, parts)) and any(map(changeable, values))


def _is_frozen_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return False
    if isinstance(value, numpy.generic):
        return not isinstance(value, numpy.void)
    while type(value) is numpy.ndarray:
        if value.flags.writeable or value.dtype.hasobject:
            return False
        value = value.base
    return value is None or type(value) is bytes


def _unwrap(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name(function: Any) -> str:
    function = _unwrap(function)
    module = getattr(function, "__module__", None) or type(function).__module__
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{module.removeprefix('_')}.{name}"


class Serializer:
    """Write values to files and read them back, with their digests.

    Parameters
    ----------
    dump, load : callable
        ``dump(obj, file)`` and ``load(file)``.
    open : callable
        ``open(path, mode=...)``; asked for ``'wb'`` and ``'rb'``.
    mode : {'t', 'b', None}
        Whether ``load`` gets a text or a binary file; None finds out by what ``dump`` writes.

    Attributes
    ----------
    name : str
        Recorded in the index, and told when a value cannot be loaded.
    text : bool or None
        Whether ``load`` gets a text file; None as long as nobody knows.
    trusts_pickle : bool
        Whether ``load`` is pickle's or one that runs pickles too, so that keys may be pickles.
    packs : bool
        Whether streams may lie in packs, which ``open`` does not see.
    direct : bool
        Whether ``dump``, ``load`` and ``open`` are those of every chest.
    """

    def __init__(self, dump: Dump, load: Load, open: Open, mode: str | None) -> None:
        self.dump = dump
        self.load = load
        self.open = open
        self.text = None if mode is None else "t" in mode
        self.name = "pickle" if dump is dump_pickle else _name(dump)
        if open is not builtins.open:
            self.name += f" with open={_name(open)}"
        loader = _unwrap(load)
        module = getattr(loader, "__module__", None) or ""
        self.trusts_pickle = module.partition(".")[0] in _PICKLE_MODULES
        self.packs = open is builtins.open
        self.direct = dump is dump_pickle and load is pickle.load and self.packs
        self._streams = loader is pickle.load  # reads front to back, never by name

    def write(self, value: object, path: str, size: int) -> tuple[int, int]:
        """Write `value` to the new file `path`; return its stream's length and digest.

        Parameters
        ----------
        value : object
        path : str
            The file must not exist; one that could not be finished is left to the caller.
        size : int
            About how many bytes the value takes.

        Raises
        ------
        OSError
            If the disk refused.
        Exception
            Whatever ``dump`` raised, wrapped in `UndumpableError`.
        """
        if self.direct and size < SMALL:
            data = self._dumped(value)
            write_new(path, data)
            return len(data), digest_bytes(data)
        with self._create(path) as file:
            sink = HashingWriter(file)
            self._dump_into(sink, value)
        if sink.bypassed:
            return self.measure(path)
        return sink.length, sink.digest()

    def _create(self, path: str) -> IO[Any]:
        if self.direct:
            return keep_from_children(builtins.open(path, "xb", buffering=0))
        return keep_from_children(self.open(path, mode="wb"))

    def _dumped(self, value: object) -> bytes:
        active = storing.active
        storing.active = [*active, self]
        try:
            return pickle.dumps(value, 5)
        except Exception as error:
            raise UndumpableError(error) from error
        finally:
            storing.active = active

    def dumps_all(self, values: Sequence[Any]) -> list[bytes | UndumpableError | None]:
        """Return the streams of values, or the errors in their places; None if it needs a file."""
        if not self.direct:
            return [self._dumps(value) for value in values]
        streams: list[Any] = []
        active = storing.active
        storing.active = [*active, self]
        try:
            while len(streams) < len(values):
                try:
                    # What comes before an error is in the list by then.
                    streams.extend(map(pickle.dumps, islice(values, len(streams), None), _PROTOCOL))
                    if len(streams) < len(values):  # a map takes it for the end
                        streams.append(UndumpableError(StopIteration("raised by a pickled object")))
                except Exception as error:  # noqa: BLE001 -- objects raise anything; it is returned
                    streams.append(UndumpableError(_without_frame(error)))
        finally:
            storing.active = active
        return streams

    def _dumps(self, value: Any) -> bytes | UndumpableError | None:
        file = io.BytesIO()
        sink = HashingWriter(file)
        try:
            self._dump_into(sink, value)
        except UndumpableError as error:
            return None if sink.bypassed else error
        return None if sink.bypassed else file.getvalue()

    def _dump_into(self, sink: HashingWriter, value: object) -> None:
        file: Any = sink  # it passes for one
        active = storing.active
        storing.active = [*active, self]
        try:
            self.dump(value, file)
        except Exception as error:
            if error is sink.refused or (sink.bypassed and _is_disk_error(error)):
                raise
            if sink.refused is not None:
                raise sink.refused from error
            raise UndumpableError(error) from error
        finally:
            storing.active = active
        if sink.refused is not None:  # ``dump`` kept to itself that the disk refused
            raise sink.refused
        if self.text is None:
            self.text = sink.text

    def digest(self, value: object, size: int) -> int | None:
        """Return the digest that `value` would be written with; None if only writing tells.

        Raises
        ------
        UndumpableError
            If ``dump`` does not take the value.
        """
        if self.direct and size < SMALL:
            return digest_bytes(self._dumped(value))
        sink = HashingWriter(None)
        try:
            self._dump_into(sink, value)
        except UndumpableError:
            if not sink.bypassed:
                raise
        return None if sink.bypassed else sink.digest()

    def measure(self, path: str, limit: int = sys.maxsize) -> tuple[int, int]:
        """Return the length, if not above `limit`, and the digest of the stream in `path`."""
        with self._open_file(path, limit) as file:
            return HashingReader(file).finish(limit)

    def _open_file(self, path: str, length: int) -> IO[Any]:
        if (size := demand_file(path)) > GROWN * length + ROOM:
            raise DamagedError(f"its file has {size} bytes, where {length} were written")
        return self.open(path, mode="rb")

    def check(self, path: str, length: int, digest: int) -> None:
        """Raise DamagedError if `path` does not hold the stream of that length and digest."""
        with self._open_file(path, length) as file:
            _check(HashingReader(file), length, digest)

    def read(self, path: str, length: int, digest: int) -> tuple[Any, bool]:
        """Load the value that `path` holds.

        Returns
        -------
        value : object
        again : bool
            Whether to dump it is sure to give the same stream again. If not, nobody knows.

        Raises
        ------
        DamagedError
            If the stream is not the one of that length and digest.
        UnloadableError
            If it is, and ``load`` raises.
        OSError
            If the file cannot be read.
        """
        if self.direct and length < SMALL:
            data = read_whole(path, length)
            if len(data) != length or digest_bytes(data) != digest:
                raise DamagedError(difference(length, len(data)))
            return _loaded(pickle.loads, data), False
        with self._open_file(path, length) as file:
            return self.read_from(file, length, digest)

    def read_from(self, file: IO[Any], length: int, digest: int) -> tuple[Any, bool]:
        """Load the value from an open binary file, at its start; as `read` does."""
        if self._streams:
            return self._stream_from(file, length, digest)
        _check(HashingReader(file), length, digest)
        file.seek(0)
        return self.read_unrecorded(file), False

    def loads(self, data: bytes) -> Any:
        """Load the value from a stream that is the right one.

        Raises
        ------
        UnloadableError
            If ``load`` raises.
        """
        if self.direct:
            return _loaded(pickle.loads, data)
        try:
            return self._load_unrecorded(io.BytesIO(data))
        except Exception:  # noqa: BLE001 -- ``load`` may want the name of a file, or more of it
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "stream")
                write_new(path, data)
                with builtins.open(path, "rb") as file:
                    return _loaded(self._load_unrecorded, file)

    def read_unrecorded(self, file: IO[Any]) -> Any:
        """Load a stream of which nobody recorded the digest.

        Raises
        ------
        UnloadableError
            If ``load`` raises, but for what the disk refuses.
        """
        try:
            return self._load_unrecorded(file)
        except Exception as error:
            if _is_disk_error(error):
                raise
            raise _unloadable(error) from error

    def _stream_from(self, file: IO[Any], length: int, digest: int) -> tuple[Any, bool]:
        source = PickleReader(file, length, KEPT if self.direct else KEPT_INFLATED)
        _check(source, length, digest)
        if source.whole:
            value = _loaded(PickleReader.load, source)
            return value, self.direct and source.gives_again(value)
        file.seek(0)
        again = HashingReader(file)  # for the disk may give something else now
        value = error = None
        try:
            value = pickle.load(again)
        except Exception as raised:
            if raised is again.refused:
                raise
            error = raised  # first find out whether the bytes are right
        _check(again, length, digest)
        if error is not None:
            raise _unloadable(error) from error
        return value, False

    def _load_from(self, file: IO[Any], text: bool | None) -> Any:
        if not text:
            return self.load(file)
        wrapper = io.TextIOWrapper(file, "utf-8", "surrogatepass", newline="")
        try:
            return self.load(wrapper)
        finally:
            if not file.closed:
                wrapper.detach()

    def _load_unrecorded(self, file: IO[Any]) -> Any:
        """Load a stream, also where nobody recorded whether it is text."""
        if self.text is not None or self.trusts_pickle:
            return self._load_from(file, self.text)
        try:
            return self.load(file)
        except Exception as error:  # a text loader says in many ways that it got bytes
            if _is_disk_error(error):
                raise
            file.seek(0)
            value = self._load_from(file, True)
            self.text = True  # only now: other threads load, too
            return value


class UndumpableError(Exception):
    """``dump`` refuses a value; `cause` is what it raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


def _without_frame(error: Exception) -> Exception:
    """Have an error keep the frame alive no more in which it was caught, with all that is there."""
    caught = error.__traceback__
    return error.with_traceback(caught and caught.tb_next)


def _loaded(function: Callable[[Any], Any], source: Any) -> Any:
    try:
        return function(source)
    except Exception as error:
        raise _unloadable(error) from error


def _unloadable(error: Exception) -> Exception:
    return error if isinstance(error, MemoryError) else UnloadableError(_said(error))


def _check(source: HashingReader | PickleReader, length: int, digest: int) -> None:
    """Read to the end, and see whether it is what was written."""
    try:
        found = source.finish(length)
    except Exception as damage:  # each decompressor has an error of its own for damaged files
        if isinstance(damage, OSError) and damage.errno is not None:
            raise
        raise DamagedError(_said(damage)) from damage
    if found != (length, digest):
        raise DamagedError(difference(length, found[0]))


def difference(expected: int, found: int) -> str:
    """Say how a stream of `found` bytes, which should have `expected`, is wrong."""
    if found > expected:
        return f"it has more than the {expected} bytes that were written"
    if expected != found:
        return f"it has {found} bytes where {expected} were written"
    return "its bytes are not those that were written"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _is_disk_error(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_ERRNOS
