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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate, count
from typing import Any, NamedTuple

from chest.columns import Entry, FrameError, Puts, is_plain, own_entries
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
from chest.filenames import is_safe_filename, pack_number
from chest.index import Index, write_log
from chest.ledger import Ledger
from chest.old import read_old_index
from chest.options import Options
from chest.packs import PACK_BYTES, Packs
from chest.serialize import (
    DamagedError,
    Serializer,
    UnloadableError,
    difference,
    digest_bytes,
    write_new,
)
from chest.staging import Batch, Staged

logger = logging.getLogger("chest")

TRIES = 100  # times to open a directory that others drop and make
COMPACT_RECORDS = 1000  # a log of fewer dead records is not worth a new one
WASTE = 64 << 20  # bytes by which the dead in packs may exceed the living
COPIED = 4096  # values that are copied at a time


class Written(NamedTuple):
    """What commits wrote: files, and packs with the lengths that they had before."""

    files: list[str]
    packs: dict[str, int]


class Plan(NamedTuple):
    """What a commit does: what the index will say, what is new, which staging files are moved."""

    puts: list[Puts]
    new: Written
    moves: list[tuple[str, str]]
    grown: list[tuple[str, int]]  # at most one pack, with the length that it has


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
        self.packs = Packs(self.directory)
        self._fsync = options.fsync
        self._swept_staging = False
        self._compact_from = COMPACT_RECORDS
        self._transaction: Written | None = None  # what it has written
        self._tolerated = 0  # bytes retired from packs before waste is looked for
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
        self._tolerated = 0

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
        return self._stage(size, lambda path: self.serializer.write(value, path, size))

    def stage_stream(self, stream: bytes) -> Staged:
        """Write the stream of a value where `commit` can take it from; raises as `stage` does."""

        def write(path: str) -> tuple[int, int]:
            write_new(path, stream)
            return len(stream), digest_bytes(stream)

        return self._stage(len(stream), write)

    def _stage(self, size: int, write: Callable[[str], tuple[int, int]]) -> Staged:
        path = self.directory.staging_path()
        try:
            length, digest = write(path)
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
        self.write_like(other)
        return Staged(path, entry.length, entry.digest)

    def write_like(self, other: Store) -> None:
        """Take note that streams of another store are committed here."""
        if self.serializer.text is None:
            self.serializer.text = other.serializer.text

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

    def commit(self, batch: Batch) -> None:
        """Publish what a batch holds and every deletion that is pending; needs the lock.

        In a transaction they are only written: its end publishes them.

        Raises
        ------
        OSError
            If the disk refuses; then nothing is published.
        """
        if not self.index.is_locked:
            raise RuntimeError("a commit needs the lock of the index")
        joins = self._transaction is not None
        if not joins:
            self._sweep()
        plan = self._plan(batch)
        serializer = (self.serializer.name, self.serializer.text)
        before = self.index.appended
        payloads = self.ledger.encode(plan.puts, serializer, first=before == 0)
        try:
            self._note(plan.new)
            for payload in payloads:
                self.index.append(payload)
            self._write(plan, batch)
            if not joins:
                self._publish(plan.new)
        except BaseException as error:
            if self.index.abandoned:
                raise
            if joins or not self.index.published:
                self._take_back(plan.new, before)
            if isinstance(error, OSError):
                needed = sum(map(len, payloads)) + sum(map(len, batch.streams.values()))
                raise told(error, self.index.path, needed) from error
            raise
        try:
            self.ledger.committed(plan.puts, serializer)
            if not joins:
                self.index.acknowledge()
        except BaseException:
            self.index.rewind()
            raise

    def _note(self, written: Written) -> None:
        """Note what a roll-back of the transaction has to take back."""
        if self._transaction is not None:
            self._transaction.files.extend(written.files)
            for name, place in written.packs.items():
                self._transaction.packs.setdefault(name, place)

    def _plan(self, batch: Batch) -> Plan:
        """Decide where everything goes."""
        plan = Plan([], Written([], {}), [], [])
        names = Names(self.directory, self.ledger.folded)
        entries = {}
        for key, (path, length, digest) in batch.files.items():
            entries[key] = Entry(names.choose(self.directory.name_for(key)), 0, length, digest)
            plan.moves.append((path, entries[key].file))
        if entries:
            plan.puts.append(Puts.of(entries))
            plan.new.files.extend(name for _, name in plan.moves)
        if batch.streams:
            name, place = self._pack_with_room()
            streams = batch.streams.values()
            lengths = list(map(len, streams))
            places = list(accumulate(lengths[:-1], initial=place))
            digests = list(map(digest_bytes, streams))
            plan.puts.append(Puts([*batch.streams], name, places, lengths, digests))
            plan.new.packs[name] = place
            plan.grown.append((name, place))
        for pack in batch.packs:
            pack.close(fsync=self._fsync)
            name = self.packs.new_name(self.ledger.packs)
            if not (puts := pack.puts(name)).keys:
                continue  # all of them were taken back
            plan.puts.append(puts)
            plan.moves.append((pack.path, name))
            plan.new.packs[name] = 0
        return plan

    def _pack_with_room(self) -> tuple[str, int]:
        """Return the newest pack with its length, or a new one where that is full."""
        newest = max(self.ledger.packs, key=pack_number, default="")
        size = self.packs.size(newest) if newest else 0
        if 0 < size < PACK_BYTES:
            return newest, size
        return self.packs.new_name(self.ledger.packs), 0

    def _write(self, plan: Plan, batch: Batch) -> None:
        for path, name in plan.moves:
            self.directory.place(path, name)
        for name, place in plan.grown:
            self.packs.append(name, place, batch.streams.values(), fsync=self._fsync)

    def _take_back(self, written: Written, frames: int) -> None:
        """Remove what was written and is not published, down to so many frames."""
        stuck = self.directory.remove(written.files)
        for name, place in written.packs.items():
            try:
                self.packs.cut(name, place)
            except OSError:
                stuck.append(name)
        if not stuck:
            self.index.cut(frames)
            return
        # What could not be removed is named by the frames: they stay for the next writer.
        self.index.rewind()
        if not frames:
            self.index.leave()

    def _publish(self, written: Written) -> None:
        if self._fsync:
            self.directory.sync([*written.files, *written.packs])
        self.index.publish()

    def tidy(self) -> None:
        """Remove what commits made obsolete; needs the lock."""
        if self._transaction is not None:
            return
        self._remove(self.ledger.obsolete)
        self._remove_dead_packs()
        self._repack_if_due()
        self._compact_if_due()

    @property
    def in_transaction(self) -> bool:
        """Whether commits add up to one."""
        return self._transaction is not None

    def begin_transaction(self) -> None:
        """Let commits add up to one, until `end_transaction`; needs the lock, all the while."""
        self._sweep()
        self._transaction = Written([], {})

    def end_transaction(self) -> None:
        """Publish what was written in the transaction.

        Raises
        ------
        OSError
            If the disk refuses: then it has to be rolled back.
        """
        if self.index.seen == -1:
            raise RuntimeError("the transaction is rolled back, for a commit was interrupted in it")
        if self.index.appended and self._transaction is not None:
            self._publish(self._transaction)
            self.index.acknowledge()
        self._transaction = None

    def roll_back(self) -> None:
        """Take back what was written in the transaction; ``ledger.changed`` tells what it was."""
        written, self._transaction = self._transaction or Written([], {}), None
        wrote = self.index.appended or self.index.seen == -1
        if self.index.appended and not self.index.published:
            self._take_back(written, 0)
        self.ledger.revert()
        if wrote:
            self.index.rewind()
            self.catch_up()

    def _sweep(self) -> None:
        """Remove what a crash left."""
        if self.index.foreign:
            self._modernize()
        if self.index.overhangs():
            self._remove_uncommitted()
            self.index.cut()
        self._remove_dead_packs()
        self._remove([entry for entry in self.ledger.obsolete if not self._is_foreign(entry)])
        if not self._swept_staging:
            self.directory.remove_staging()
            self._swept_staging = True

    def _remove_uncommitted(self) -> None:
        """Remove what a commit had written when it died."""
        live = self.ledger.files()
        entries: list[Entry] = []
        for payload in self.index.uncommitted():
            with suppress(FrameError):  # whatever it is, no commit stands behind it
                entries += own_entries(payload)
        left = []
        for entry in entries:
            if pack_number(entry.file):
                self.packs.cut(entry.file, entry.place if entry.file in live else 0)
            elif is_safe_filename(entry.file) and entry.file not in live:
                left.append(entry)
        self.directory.remove(entry.file for entry in left if not self._is_foreign(entry))

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

    def _remove_dead_packs(self) -> None:
        for name in self.ledger.dead_packs():
            if not self.directory.remove([name]):
                del self.ledger.packs[name]
                self.packs.forget(name)

    def _repack_if_due(self) -> None:
        """Copy what is alive out of packs with little of that, where the dead take too much."""
        packs = self.ledger.packs
        if self.ledger.retired < self._tolerated:
            return
        sizes = {name: self.packs.size(name) for name in packs}
        excess = sum(sizes.values()) - 2 * sum(packs.values())
        if excess >= WASTE:
            self._repack({name for name, alive in packs.items() if 2 * alive < sizes[name]})
            excess = 0
        # Of a byte that is retired there is one more dead and one less alive.
        self._tolerated = self.ledger.retired + (WASTE - excess) // 2

    def _repack(self, names: set[str]) -> None:
        batch = Batch(self.directory)
        rows = self.ledger.packed_in(names)
        entries = sorted((self.ledger.entry(row), n) for n, (_, row) in enumerate(rows))
        try:
            for start in range(0, len(entries), COPIED):
                some = entries[start : start + COPIED]
                streams = [self.packs.read(*entry[:3]) for entry, _ in some]
                # What is cut short stays where it is, and so do the digests: reading tells.
                whole = [n for n, (entry, _) in enumerate(some) if len(streams[n]) == entry.length]
                keys = [rows[some[n][1]][0] for n in whole]
                digests = [some[n][0].digest for n in whole]
                batch.write(keys, [streams[n] for n in whole], digests)
            self.commit(batch)
        except OSError as error:
            logger.warning("the packs in %s could not be compacted: %s", self.directory.path, error)
        finally:
            batch.discard()
        self._remove_dead_packs()

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
                # So that a crash from here on leaves an empty chest.
                self.commit(Batch(self.directory))
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
        obsolete = (entry.file for entry in self.ledger.obsolete)
        self.directory.remove([*self.ledger.files(), *self.ledger.packs, *obsolete])
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
