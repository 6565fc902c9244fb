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
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from typing import NamedTuple

from chest.blocks import Steps, block
from chest.columns import Entry, Puts
from chest.directory import Names, remove_quietly, sync_file
from chest.errors import FULL, told
from chest.filenames import pack_number
from chest.files import demand_file, is_there, write_new
from chest.options import Options
from chest.packs import PACK_BYTES
from chest.serialize import Serializer, digest_bytes
from chest.staging import Batch, Staged
from chest.upkeep import Upkeep


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


class Store(Upkeep):
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
        self._transaction: Written | None = None  # what it has written
        self.untidy = False  # whether what the last commit made obsolete may still be there
        super().__init__(path, serializer, options, reopen=reopen)

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
            return Staged(path, length, digest)
        except BaseException as error:
            if not self.index.abandoned:  # else it is the parent's
                self.directory.remove_staged([path])
            if isinstance(error, OSError):
                raise told(error, self.directory.path, size) from error
            raise

    def stage_link(self, other: Store, entry: Entry) -> Staged:
        """Stage a value that another store holds, by a hard link where the system can.

        Raises
        ------
        OSError
            If it can neither be linked nor copied.
        """
        self.write_like(other)
        source = other.directory.full_path(entry.file)
        path = self.directory.staging_path()
        try:
            _link_or_copy(source, path)
            if self._fsync:
                sync_file(path)
        except BaseException:
            self.directory.remove_staged([path])
            raise
        return Staged(path, entry.length, entry.digest)

    def write_like(self, other: Store) -> None:
        """Take note that streams of another store are committed here."""
        if self.serializer.text is None:
            self.serializer.text = other.serializer.text

    @block
    def writing(self, timeout: float | None = None) -> Steps:
        """Hold the lock, after catching up with what others committed before it was taken.

        Raises
        ------
        TimeoutError
            If another process holds it for longer than `timeout` seconds.
        RuntimeError
            Amid `recording`: what is being recorded would be taken for another's.
        """
        self.demand_quiet()
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
            If the disk refuses; then nothing is published, or the error says that it is.
        """
        if not self.index.is_locked:
            raise RuntimeError("a commit needs the lock of the index")
        joins = self._transaction is not None
        with self.recording():  # to the end: what is collected as garbage may come here, too
            if not joins:
                self._sweep()
            self._record(batch, joins)

    def _record(self, batch: Batch, joins: bool) -> None:
        serializer = (self.serializer.name, self.serializer.text)
        before = self.index.appended
        plan = self._plan(batch)
        payloads, names = self.ledger.encode(plan.puts, serializer, first=before == 0)
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
            self.ledger.committed(plan.puts, serializer, payloads, names)
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
        keys = self.ledger.spell([*batch.files])
        for key, (path, length, digest) in zip(keys, batch.files.values(), strict=True):
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
            keys = self.ledger.spell([*batch.streams])
            plan.puts.append(Puts(keys, name, places, lengths, digests))
            plan.new.packs[name] = place
            plan.grown.append((name, place))
        for pack in batch.packs:
            pack.close(fsync=self._fsync)
            name = self.packs.new_name(self.ledger.packs)
            if not (puts := pack.puts(name)).keys:
                continue  # all of them were taken back
            plan.puts.append(puts._replace(keys=self.ledger.spell(puts.keys)))
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
        if not self.index.is_current():
            self.index.rewind()
            return  # whose are the files there?
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
        if self._transaction is None:
            self.index.leave()

    def _publish(self, written: Written) -> None:
        if self._fsync:
            self.directory.sync([*written.files, *written.packs])
        self.untidy = True
        self.index.publish()

    def sweep(self) -> None:
        """Remove what an interrupt kept the last commit from removing; needs the lock."""
        try:
            with self.recording():
                self._sweep()
        except Exception:
            self.untidy = False  # to try that again would fail again
            raise
        self.tidy()

    def tidy(self) -> None:
        """Remove what commits made obsolete; needs the lock."""
        if self._transaction is not None:
            return
        try:
            with self.recording():
                self._remove(self.ledger.obsolete)
                self._remove_dead_packs()
                self._repack_if_due()
                self._compact_if_due()
        except Exception:
            self.untidy = False
            raise
        self.untidy = False

    @property
    def in_transaction(self) -> bool:
        """Whether commits add up to one."""
        return self._transaction is not None

    def begin_transaction(self) -> None:
        """Let commits add up to one, until `end_transaction`; needs the lock, all the while."""
        self.catch_up()  # once more: the compaction after a commit may have failed to
        with self.recording():
            self._sweep()
        self._transaction = Written([], {})

    def end_transaction(self) -> None:
        """Publish what was written in the transaction.

        Raises
        ------
        OSError
            If the disk refuses: then it has to be rolled back, which leaves what counts.
        """
        if self.index.seen == -1:
            raise RuntimeError("the transaction is rolled back, for a commit was interrupted in it")
        with self.recording():
            if self.index.appended and self._transaction is not None:
                try:
                    self._publish(self._transaction)
                except OSError:
                    if not self.index.abandoned and self.index.published:
                        self.index.acknowledge()
                        self._transaction = None
                    raise
                self.index.acknowledge()
            self._transaction = None

    def roll_back(self) -> None:
        """Take back what was written in the transaction; ``ledger.changed`` tells what it was."""
        with self.recording():  # a commit would publish what is taken back
            written, self._transaction = self._transaction or Written([], {}), None
            wrote = self.index.appended or self.index.seen == -1
            if self.index.appended and not self.index.published:
                self._take_back(written, 0)
            # The ledger has what was deleted under the names by which it was deleted.
            reads = wrote or self.ledger.pending
            self.ledger.revert()
            if reads:
                self.index.rewind()
                self.catch_up()

    def drop(self) -> None:
        """Remove every file that the chest wrote, and the directory if nothing else is in it."""
        self.demand_quiet()
        if is_there(self.index.path):  # else an interrupt came after the last line
            with self.index.locked():
                self.catch_up()
                with self.ledger.dropping():
                    try:  # so that a crash from here on leaves an empty chest
                        self.commit(Batch(self.directory))
                        self.tidy()
                    except OSError as error:
                        if error.errno not in FULL:
                            raise
                        self._erase_values()  # it may be these that fill the disk
                self.directory.remove_staging()
                self.index.remove()
        try:
            self.close()
        finally:  # also after an interrupt: nobody drops a chest that is closed
            try:
                os.rmdir(self.directory.path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    raise

    def erase(self) -> None:
        """Remove every file that the chest wrote, where nobody can commit any more."""
        self._erase_values()
        self.directory.remove_staging()
        remove_quietly(self.index.path)
        with suppress(OSError):  # there are files of others
            os.rmdir(self.directory.path)

    def _erase_values(self) -> None:
        obsolete = (entry.file for entry in self.ledger.obsolete)
        self.directory.remove([*self.ledger.files(), *self.ledger.packs, *obsolete])

    def check(self) -> None:
        """Assert that the directory holds what the index names, and nothing else."""
        found = self.directory.files()
        named = self.ledger.files() | {os.path.basename(self.directory.index)}
        assert found == named, f"stray: {found - named}, missing: {named - found}"


def _link_or_copy(source: str, target: str) -> None:
    demand_file(source)
    if not os.path.islink(source):  # else the other name would lead out, too
        with suppress(OSError):
            os.link(source, target)
            os.utime(target)  # else an old file would pass for one that somebody abandoned
            return
        remove_quietly(target)
    shutil.copyfile(source, target)
