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
from chest.directory import (
    INDEX,
    Directory,
    Names,
    make_folders,
    remove_quietly,
    sync_file,
    sync_folder,
)
from chest.errors import CorruptIndexError, CorruptValueError, KeyTypeError, SerializerError
from chest.filenames import is_safe_filename
from chest.index import Index, write_log
from chest.ledger import Ledger
from chest.old import read_old_index
from chest.options import Options
from chest.serialize import DamagedError, Serializer, UnloadableError

logger = logging.getLogger("chest")

TRIES = 100  # times to open a directory that others drop and make
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
    reopen : bool
        There was a chest: nothing is made.

    Raises
    ------
    OSError
        If the directory cannot be made, or is none, or holds no chest and may not be written.
    CorruptIndexError
        If its index cannot be read.
    """

    def __init__(
        self, path: str, serializer: Serializer, options: Options, *, reopen: bool = False
    ) -> None:
        self.serializer = serializer
        self.directory = Directory(path, options.namer)
        self._fsync = options.fsync
        self._swept_staging = False
        self._compact_from = COMPACT_RECORDS
        self._transaction: list[str] | None = None  # the files that it has written
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
    def writing(self, timeout: float | None = None) -> Iterator[None]:
        """Hold the lock, after catching up with what others committed before it was taken.

        Raises
        ------
        TimeoutError
            If another process holds it for longer than `timeout` seconds.
        """
        with self.index.locked(timeout):
            if self._transaction is None:
                self.catch_up()
            yield

    def commit(self, staged: dict[Any, Staged]) -> None:
        """Publish staged values and every deletion that is pending; needs the lock.

        In a transaction they are only written: its end publishes them.

        Raises
        ------
        OSError
            If the disk refuses; then nothing is published.
        """
        joins = self._transaction is not None
        if not self.index.is_locked:
            raise RuntimeError("a commit needs the lock of the index")
        if not joins:
            self._sweep()
        entries = self._entries(staged)
        files = [entry.file for entry in entries.values()]
        serializer = (self.serializer.name, self.serializer.text)
        written = self._transaction if self._transaction is not None else []
        before, listed = self.index.appended, len(written)
        payloads = self.ledger.encode(entries, serializer, first=before == 0)
        try:
            written += files
            for payload in payloads:
                self.index.append(payload)
            for key, entry in entries.items():
                self.directory.place(staged[key].path, entry.file)
            if not joins:
                self._publish(files)
        except BaseException as error:
            if self.index.abandoned:
                raise
            if joins or not self.index.published:
                self._take_back(files, before)
                del written[listed:]
            if isinstance(error, OSError):
                needed = sum(map(len, payloads))
                raise told(error, self.index.path, needed) from error
            raise
        try:
            self.ledger.committed(entries, serializer)
            if not joins:
                self.index.acknowledge()
        except BaseException:
            self.index.rewind()
            raise

    def _take_back(self, files: list[str], frames: int) -> None:
        """Remove what was written and is not published, down to so many frames."""
        if not self.directory.remove(files):
            self.index.cut(frames)
            return
        # What could not be removed is named by the frames: they stay for the next writer.
        self.index.rewind()
        if not frames:
            self.index.leave()

    def _publish(self, files: list[str]) -> None:
        if self._fsync:
            self.directory.sync(files)
        self.index.publish()

    def tidy(self) -> None:
        """Remove what commits made obsolete; needs the lock."""
        if self._transaction is not None:
            return
        self._remove(self.ledger.obsolete)
        self._compact_if_due()

    @property
    def in_transaction(self) -> bool:
        """Whether commits add up to one."""
        return self._transaction is not None

    def begin_transaction(self) -> None:
        """Let commits add up to one, until `end_transaction`; needs the lock, all the while."""
        self._sweep()
        self._transaction = []

    def end_transaction(self) -> None:
        """Publish what was written in the transaction.

        Raises
        ------
        OSError
            If the disk refuses: then it has to be rolled back.
        """
        if self.index.seen == -1:
            raise RuntimeError("the transaction is rolled back, for a commit was interrupted in it")
        if self.index.appended:
            self._publish(self._transaction or [])
            self.index.acknowledge()
        self._transaction = None

    def roll_back(self) -> None:
        """Take back what was written in the transaction; ``ledger.changed`` tells what it was."""
        files, self._transaction = self._transaction or [], None
        wrote = self.index.appended or self.index.seen == -1
        if self.index.appended and not self.index.published:
            self._take_back(files, 0)
        self.ledger.revert()
        if wrote:
            self.index.rewind()
            self.catch_up()

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
        if os.path.lexists(self.index.path):  # else an interrupt came after the last line
            with self.index.locked():
                self.catch_up()
                self.ledger.clear()
                self.commit({})  # so that a crash from here on leaves an empty chest
                self.tidy()
                self.directory.remove_staging(every=True)
                self.index.remove()
        self.close()
        try:
            os.rmdir(self.directory.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise

    def erase(self) -> None:
        """Remove every file that the chest wrote, where nobody can commit any more."""
        self.directory.remove([*self.ledger.files(), *(e.file for e in self.ledger.obsolete)])
        self.directory.remove_staging(every=True)
        remove_quietly(self.index.path)
        with suppress(OSError):  # there are files of others
            os.rmdir(self.directory.path)

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


def demand(path: str) -> None:
    """Raise FileNotFoundError if there is no chest in a directory where one was."""
    if not os.path.lexists(os.path.join(path, INDEX)):
        message = "the chest there was dropped, or was temporary, or is on another machine"
        raise FileNotFoundError(errno.ENOENT, message, path)


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
    except (FileExistsError, FileNotFoundError):
        return  # made by somebody; or removed, and the next look finds that
    except OSError:  # the file system has no links
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
