"""A chest's directory: the index, the ledger of what it says, and the value files.

The order of a commit is what makes it all or nothing: new files first, the index next, old files
last.

1. Values are staged: written to files that no index names.
2. Under the lock of the index, a frame that names their final names is appended beyond the
   committed length, and they are renamed.
3. The committed length is raised. That is the commit.
4. The files that it made obsolete are removed, still under the lock, so that nobody can have taken
   one of their names.

A crash before 3 leaves a frame beyond the committed length that names exactly the files to remove;
a crash after it leaves files of which the last commit tells that they are obsolete. Whoever next
takes the lock to write removes either.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, NamedTuple

from chest.columns import Entry, FrameError, is_plain, own_entries
from chest.directory import Directory, Names, make_folders, remove_quietly, sync_file, sync_folder
from chest.errors import CorruptIndexError, CorruptValueError, KeyTypeError, SerializerError
from chest.filenames import is_safe_filename
from chest.index import Index, write_log
from chest.ledger import Ledger
from chest.old import read_old_index
from chest.options import Options
from chest.serialize import DamagedError, Serializer, UnloadableError

logger = logging.getLogger("chest")

COMPACT_RECORDS = 1000  # a log of fewer dead records is not worth a new one


class Staged(NamedTuple):
    """A value in a file that no index names yet."""

    path: str
    length: int
    digest: int


class Store:
    """What a chest has on disk.

    Parameters
    ----------
    path : str
        The directory, absolute; made if it does not exist.
    serializer : Serializer
    options : Options

    Raises
    ------
    OSError
        If the directory cannot be made, or is none, or holds no chest and may not be written.
    CorruptIndexError
        If its index cannot be read.
    """

    def __init__(self, path: str, serializer: Serializer, options: Options) -> None:
        self.serializer = serializer
        self.directory = Directory(path, options.namer)
        self._fsync = options.fsync
        self._swept_staging = False
        self._compact_from = COMPACT_RECORDS
        if not options.readonly and not os.path.isdir(path):
            make_folders(path)
            if self._fsync:
                _sync_parents(path)
        self.readonly = options.readonly or not self._make_writable()
        self.index = Index(self.directory.index, readonly=self.readonly, fsync=options.fsync)
        self.ledger = Ledger(serializer.trusts_pickle)
        try:
            self.catch_up()
        except BaseException:
            self.close()
            raise

    def _make_writable(self) -> bool:
        """Make the index if there is none; tell whether it and the directory can be written."""
        if not os.path.lexists(self.directory.index):
            staged = self.directory.staging_path()
            try:
                write_log(staged, [], fsync=self._fsync)
                _link_or_rename(staged, self.directory.index)
            finally:
                remove_quietly(staged)
            return True
        return os.access(self.directory.path, os.W_OK) and os.access(self.directory.index, os.W_OK)

    def close(self) -> None:
        """Let go of the index."""
        self.index.close()

    # -- reading ---------------------------------------------------------------------------------

    def catch_up(self) -> dict[Any, int]:
        """Take in what others committed.

        Returns
        -------
        dict
            The keys that were stored and are now replaced or deleted, with their old digests.

        Raises
        ------
        CorruptIndexError
        """
        try:
            anew, payloads = self.index.refresh()
            changed = self._apply_anew(payloads) if anew else self._apply(payloads)
        except BaseException as error:
            self.index.rewind()  # what was read and not taken in must be read again
            if isinstance(error, FrameError):
                raise CorruptIndexError(self.index.path, str(error)) from error
            raise
        if self.serializer.text is None:
            self.serializer.text = self.ledger.serializers.get(self.serializer.name)
        return changed

    def _apply(self, payloads: list[bytes]) -> dict[Any, int]:
        changed: dict[Any, int] = {}
        for payload in payloads:
            changed = self.ledger.apply(payload) | changed
        return changed

    def _apply_anew(self, payloads: list[bytes]) -> dict[Any, int]:
        ledger = Ledger(self.serializer.trusts_pickle)
        if self.index.foreign:
            ledger.take(read_old_index(self.directory, self.serializer))
        for payload in payloads:
            ledger.apply(payload)
        changed = ledger.inherit(self.ledger)
        self.ledger = ledger
        return changed

    def path_of(self, row: int) -> str:
        """Return the path of the file that holds the value of a stored key."""
        return self.directory.full_path(self.ledger.entry(row).file)

    def read(self, key: Any, entry: Entry, file: Any = None) -> Any:
        """Load a value, from `file` if it is open already.

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
        try:
            if file is not None:
                return self.serializer.read_from(file, entry.length, entry.digest)
            return self.serializer.read(path, entry.length, entry.digest)
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
            raise CorruptValueError(key, path, "the file is gone") from error

    # -- writing ---------------------------------------------------------------------------------

    def stage(self, value: object, size: int) -> Staged:
        """Write a value of about `size` bytes where `commit` can take it from.

        Raises
        ------
        OSError
            If the disk refuses, told with path, needed and free bytes.
        UndumpableError
            If ``dump`` does.
        """
        path = self.directory.staging_path()
        try:
            length, digest = self.serializer.write(value, path, size)
            if self._fsync:
                sync_file(path)
        except OSError as error:
            remove_quietly(path)
            raise told(error, self.directory.path, size) from error
        except BaseException:
            remove_quietly(path)
            raise
        return Staged(path, length, digest)

    def stage_link(self, other: Store, entry: Entry) -> Staged:
        """Stage a value that another store holds, by a hard link where the system can.

        Raises
        ------
        OSError
            If it can neither be linked nor copied.
        """
        source = other.directory.full_path(entry.file)
        path = self.directory.staging_path()
        try:
            _link_or_copy(source, path)
            if self._fsync:
                sync_file(path)
        except BaseException:
            remove_quietly(path)
            raise
        if self.serializer.text is None:
            self.serializer.text = other.serializer.text
        return Staged(path, entry.length, entry.digest)

    @contextmanager
    def writing(self) -> Iterator[dict[Any, int]]:
        """Hold the lock, and give what others changed before it was taken, as `catch_up` does."""
        with self.index.locked():
            yield self.catch_up()

    def commit(self, staged: dict[Any, Staged]) -> None:
        """Publish staged values and every deletion that is pending; needs the lock.

        Raises
        ------
        OSError
            If the disk refuses; then nothing is published.
        """
        self._sweep()
        entries = self._entries(staged)
        serializer = (self.serializer.name, self.serializer.text)
        payloads = self.ledger.encode(entries, serializer)
        try:
            for payload in payloads:
                self.index.append(payload)
            for key, entry in entries.items():
                self.directory.place(staged[key].path, entry.file)
            if self._fsync:
                self.directory.sync(entry.file for entry in entries.values())
            self.index.publish()
        except BaseException as error:
            if not self.index.published:
                self.directory.remove(entry.file for entry in entries.values())
                self.index.cut()
            if isinstance(error, OSError):
                needed = sum(map(len, payloads))
                raise told(error, self.index.path, needed) from error
            raise
        try:
            self.ledger.committed(entries, serializer)
            self.index.acknowledge()
        except BaseException:
            self.index.rewind()
            raise
        self._remove(self.ledger.obsolete)
        self._compact_if_due()

    def _entries(self, staged: dict[Any, Staged]) -> dict[Any, Entry]:
        entries = {}
        names = Names(self.directory, self.ledger.folded)
        for key, (_, length, digest) in staged.items():
            entries[key] = Entry(names.choose(self.directory.name_for(key)), 0, length, digest)
        return entries

    def _sweep(self) -> None:
        """Remove what a crash left."""
        if self.index.foreign:
            self._modernize()
        if self.index.overhangs():
            live = self.ledger.files()
            left = [entry for entry in self._uncommitted() if entry.file not in live]
            self.directory.remove(entry.file for entry in left if not self._is_foreign(entry))
            self.index.cut()
        self._remove([entry for entry in self.ledger.obsolete if not self._is_foreign(entry)])
        if not self._swept_staging:
            self.directory.remove_staging()
            self._swept_staging = True

    def _uncommitted(self) -> list[Entry]:
        """Return what a commit was about to put when it died."""
        entries: list[Entry] = []
        for payload in self.index.uncommitted():
            with suppress(FrameError):  # whatever it is, no commit stands behind it
                entries += own_entries(payload)
        return [entry for entry in entries if is_safe_filename(entry.file)]

    def _is_foreign(self, entry: Entry) -> bool:
        """Tell whether a file that should have gone is another than the one that we wrote."""
        path = self.directory.full_path(entry.file)
        if not os.path.lexists(path):
            return False
        try:
            return self.serializer.measure(path) != (entry.length, entry.digest)
        except Exception:  # noqa: BLE001 -- what cannot be read, or decompressed, is not ours
            return True

    def _remove(self, entries: list[Entry]) -> None:
        """Remove obsolete files; what cannot be removed yet stays in the books."""
        if self.ledger.obsolete:
            stuck = set(self.directory.remove(entry.file for entry in entries))
            self.ledger.obsolete = [entry for entry in entries if entry.file in stuck]
            self.ledger.forget_folders(self.directory.missing_folders(e.file for e in entries))

    def _modernize(self) -> None:
        """Put an index of today in the place of that of chest 0.2.3."""
        ledger = Ledger(self.serializer.trusts_pickle)
        named = self.ledger.files()
        seen: set[str] = set()
        entries = {}
        for key, row in self.ledger.committed_rows().items():
            if not self.serializer.trusts_pickle and not is_plain(key):
                raise KeyTypeError(key, "open this old chest with pickle, or delete the key")
            entry = self.ledger.entry(row)
            if entry.file in seen:
                entry = self._copy_shared(entry, named)
            seen.add(entry.file)
            entries[key] = entry
        ledger.take(entries)
        self.index.replace(ledger.snapshot(), self.directory.staging_path())
        self.catch_up()

    def _copy_shared(self, entry: Entry, named: set[str]) -> Entry:
        """Give a value a file of its own that had one with another key."""
        for n in count(1):
            copy = entry._replace(file=f"{entry.file}~{n}")
            path = self.directory.full_path(copy.file)
            # One that is there already, and no other's, is from a try that a crash ended.
            if copy.file in named or (os.path.lexists(path) and self._is_foreign(copy)):
                continue
            named.add(copy.file)
            with suppress(FileNotFoundError):  # then both keys have lost their value
                shutil.copyfile(self.directory.full_path(entry.file), path)
            return copy
        raise AssertionError("there is always another number")

    def _compact_if_due(self) -> None:
        ledger = self.ledger
        dead = ledger.records - len(ledger.rows)
        if dead < max(len(ledger.rows), self._compact_from) or ledger.unreadable:
            return
        try:
            self.index.replace(ledger.snapshot(), self.directory.staging_path())
        except OSError as error:
            logger.warning("the index %s could not be compacted: %s", self.index.path, error)
            self._compact_from = 2 * dead
        else:
            self.catch_up()
            self._compact_from = COMPACT_RECORDS

    def drop(self) -> None:
        """Remove every file that the chest wrote, and the directory if nothing else is in it."""
        with self.index.locked():
            self.catch_up()
            self.ledger.clear()
            self.commit({})  # so that a crash from here on leaves an empty chest
            self.directory.remove_staging(every=True)
            os.unlink(self.index.path)
        self.close()
        try:
            os.rmdir(self.directory.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def check(self) -> None:
        """Assert that the directory holds what the index names, and nothing else."""
        root = self.directory.path
        found = {
            os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
            for folder, _, names in os.walk(root)
            for name in names
        }
        named = self.ledger.files() | {os.path.basename(self.directory.index)}
        assert found == named, f"stray: {found - named}, missing: {named - found}"


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


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
    except OSError:  # it is there already, or the file system has no links
        if not os.path.lexists(target):
            os.rename(source, target)


def told(error: OSError, path: str, needed: int) -> OSError:
    """Return `error` with what the user wants to know: where, how much, how much is free."""
    if not error.errno:
        return error
    try:
        free = f"{shutil.disk_usage(path).free} bytes are free"
    except OSError:
        free = "free bytes unknown"
    message = f"{error.strerror} (about {needed} bytes needed, {free})"
    return type(error)(error.errno, message, path)
