"""A chest's directory, to be read: opened, caught up with, and its values loaded."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

from chest.blocks import Steps, block
from chest.columns import Entry, FrameError
from chest.directory import INDEX, Directory, make_folders, sync_folder
from chest.errors import CorruptIndexError, CorruptValueError, SerializerError, locating
from chest.files import NO_FILE, is_there
from chest.frames import write_log
from chest.index import Index
from chest.ledger import Ledger
from chest.old import read_old_index
from chest.options import Options
from chest.packs import Packs
from chest.serialize import DamagedError, Serializer, UnloadableError, difference, digest_bytes

TRIES = 100  # times to open a directory that others drop and make


class Reading:
    """What a chest has on disk, as far as it is read; see `chest.store.Store`.

    Attributes
    ----------
    is_recording : bool
        What the directory holds is just being changed, or taken in.
    """

    def __init__(
        self, path: str, serializer: Serializer, options: Options, *, reopen: bool = False
    ) -> None:
        self.serializer = serializer
        self.directory = Directory(path, options.namer)
        self.packs = Packs(self.directory)
        self._fsync = options.fsync
        self.is_recording = False
        if reopen:
            demand(path)
        for tries in count(1):
            try:
                self._open(options)
                break
            except FileNotFoundError:  # somebody is dropping the chest there
                if reopen or options.readonly or tries == TRIES:
                    raise
        self.ledger = Ledger(serializer.trusts_pickle)
        try:
            self.catch_up()
        except BaseException:
            self.close()
            raise

    def _open(self, options: Options) -> None:
        """Open the index, and make what there is not."""
        path = self.directory.path
        if not options.readonly and not os.path.isdir(path):
            make_folders(path)
            if self._fsync:
                _sync_parents(path)
        self.readonly = options.readonly or not self._make_writable()
        self.index = Index(self.directory.index, readonly=self.readonly, fsync=options.fsync)

    def _make_writable(self) -> bool:
        """Make the index if there is none; tell whether it and the directory can be written."""
        if not is_there(self.directory.index):
            self._demand_no_packs()
            staged = self.directory.staging_path()
            try:
                write_log(staged, [], fsync=self._fsync)
                _link_or_rename(staged, self.directory.index)
            finally:
                self.directory.remove_staged([staged])
            return True
        return os.access(self.directory.path, os.W_OK) and os.access(self.directory.index, os.W_OK)

    def _demand_no_packs(self) -> None:
        """Begin no new chest where packs tell of one that has lost its index."""
        pack = self.directory.find_pack()
        # Another process may have made, or dropped, a chest meanwhile.
        if pack and not is_there(self.directory.index) and is_there(pack):
            reason = f"it is gone, and {os.path.basename(pack)} has values of a chest"
            raise CorruptIndexError(self.directory.index, reason, repairable=False)

    def close(self) -> None:
        """Let go of the index."""
        self.index.close()

    @block
    def recording(self) -> Steps:
        """Have whoever deletes or commits in the block refused by `demand_quiet`."""
        if self.is_recording:  # part of the one around it, which ends it
            yield
            return
        self.is_recording = True
        try:
            yield
        finally:
            self.is_recording = False

    def demand_quiet(self) -> None:
        """Refuse what would make history of what is being recorded.

        Raises
        ------
        RuntimeError
            If a key that is pickled for it, what names its file, or a dying value is who asks.
        """
        if self.is_recording:
            who = "what pickles a key, names its file or is collected as garbage amid a commit"
            raise RuntimeError(f"{who} must not delete keys or commit itself")

    def catch_up(self, *, look: bool = False) -> None:
        """Take in what others committed; ``ledger.changed`` tells of keys that had other values.

        Parameters
        ----------
        look : bool
            Trust nothing that is mapped: look at the directory.

        Raises
        ------
        CorruptIndexError
        """
        try:
            with self.recording():
                anew, payloads = self.index.refresh(look=look)
                if anew:
                    self._apply_anew(payloads)
                else:
                    for payload in payloads:
                        self.ledger.apply(payload)
        except BaseException as error:
            self.index.rewind()  # what was read and not taken in must be read again
            if isinstance(error, FrameError):
                raise CorruptIndexError(self.index.path, str(error)) from error
            raise
        self.packs.keep({name for name, alive in self.ledger.packs.items() if alive})
        if self.serializer.text is None:
            self.serializer.text = self.ledger.serializers.get(self.serializer.name)

    def _apply_anew(self, payloads: list[bytes]) -> None:
        ledger = Ledger(self.serializer.trusts_pickle)
        if self.index.foreign:
            ledger.take(read_old_index(self.directory, self.serializer))
        for payload in payloads:
            ledger.apply(payload)
        ledger.inherit(self.ledger)
        self.ledger = ledger

    def read(self, key: Any, entry: Entry, file: Any = None) -> tuple[Any, bool]:
        """Load a value, from `file` if it is open already.

        Returns
        -------
        value : object
        again : bool
            Whether to dump it is sure to give the same stream again. If not, nobody knows.

        Raises
        ------
        CorruptValueError
            If the file is gone or not as written.
        SerializerError
            If it is as written, and cannot be loaded.
        OSError
            If the system refuses.
        """
        path = self.directory.full_path(entry.file)
        with self._telling(key, path):
            if entry.file in self.ledger.packs:
                return self.serializer.loads(self._read_packed(entry)), False
            if file is not None:
                return self.serializer.read_from(file, entry.length, entry.digest)
            return self.serializer.read(path, entry.length, entry.digest)

    def check_value(self, key: Any, entry: Entry) -> None:
        """Read the bytes of a value without loading it; raises as `read` does."""
        path = self.directory.full_path(entry.file)
        with self._telling(key, path):
            if entry.file in self.ledger.packs:
                self._read_packed(entry)
            else:
                self.serializer.check(path, entry.length, entry.digest)

    def stream(self, key: Any, entry: Entry) -> bytes:
        """Return the stream of a value that lies in a pack; raises as `read` does."""
        with self._telling(key, self.directory.full_path(entry.file)):
            return self._read_packed(entry)

    def _read_packed(self, entry: Entry) -> bytes:
        name, place, length, digest = entry
        data = self.packs.read(name, place, length)
        if len(data) != length or digest_bytes(data) != digest:
            self.packs.forget(name)  # another pack may have the name by now
            data = self.packs.read(name, place, length)
            if len(data) != length or digest_bytes(data) != digest:
                raise DamagedError(difference(length, len(data)))
        return data

    @contextmanager
    def _telling(self, key: Any, path: str) -> Iterator[None]:
        """Tell whose value it is that cannot be read."""
        try:
            with locating(path):
                yield
        except UnloadableError as error:
            names = tuple(self.ledger.serializers)
            raise SerializerError(key, path, str(error), self.serializer.name, names) from error
        except DamagedError as error:
            names = tuple(self.ledger.serializers)
            if names and self.serializer.name not in names:
                mine = self.serializer.name
                raise SerializerError(key, path, str(error), mine, names) from error
            raise CorruptValueError(key, path, str(error)) from error
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            reason = NO_FILE if error.strerror == NO_FILE else "the file is gone"
            raise CorruptValueError(key, path, reason) from error


def demand(path: str) -> None:
    """Raise FileNotFoundError if there is no chest in a directory where one was."""
    if not is_there(os.path.join(path, INDEX)):
        message = "the chest there was dropped, or was temporary, or is on another machine"
        raise FileNotFoundError(errno.ENOENT, message, path)


def _sync_parents(path: str) -> None:
    """Make sure that a new directory, and those made for it, survive a power cut."""
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        with suppress(PermissionError):  # not made here
            sync_folder(path)


def _link_or_rename(source: str, target: str) -> None:
    """Give a file another name, unless somebody has done so before."""
    try:
        os.link(source, target)
    except (FileExistsError, FileNotFoundError):
        return  # made by somebody; or removed, and the next look finds that
    except OSError:  # the file system has no links
        if not is_there(target):
            os.rename(source, target)
