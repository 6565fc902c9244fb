"""What a directory needs unasked: to be swept, and to be written anew where most is history."""

from __future__ import annotations

import logging
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from itertools import count, groupby

from chest.columns import Entry, FrameError, is_plain, own_entries
from chest.directory import INDEX
from chest.errors import KeyTypeError, locating, told
from chest.filenames import digest_name, is_safe_filename, pack_number
from chest.files import is_file, is_there, own_size
from chest.frames import log_size
from chest.ledger import Ledger
from chest.options import Options
from chest.packs import PACK_BYTES
from chest.reading import Reading
from chest.serialize import Serializer, digest_bytes
from chest.staging import Batch

logger = logging.getLogger("chest")

RETRY = 10  # seconds until what failed is tried again, where nobody asked for it
COMPACT_BYTES = 60 << 10  # a log of fewer bytes is not worth a new one
WASTE = 16 << 20  # bytes by which the dead in packs may exceed the living
COPIED = 1 << 20  # bytes of a pack that are read at a time, to copy what is alive of them


class Upkeep(Reading, ABC):
    """What a chest has on disk, kept clean and small.

    Notes
    -----
    Everything needs the lock of the index, and that nobody else commits meanwhile: `recording`.
    """

    def __init__(
        self, path: str, serializer: Serializer, options: Options, *, reopen: bool = False
    ) -> None:
        self._swept_staging = False
        self._compact_after = 0.0  # the time before which it is not tried again: it failed
        self._tolerated = 0  # bytes retired before waste in packs is looked for
        super().__init__(path, serializer, options, reopen=reopen)

    @abstractmethod
    def commit(self, batch: Batch) -> None:
        """Publish what a batch holds and every deletion that is pending."""

    def _apply_anew(self, payloads: list[bytes]) -> None:
        super()._apply_anew(payloads)
        self._tolerated = 0

    def _sweep(self) -> None:
        """Remove what a crash left."""
        if self.index.foreign:
            self._modernize()
        if self.index.overhangs():
            self._remove_uncommitted()
            self.index.cut()
        self._remove_dead_packs()
        ledger = self.ledger
        if ledger.unsure:  # a name may have been used again
            live = ledger.files()
            ledger.unsure = [entry for entry in ledger.unsure if entry.file not in live]
        left = dict.fromkeys([*ledger.obsolete, *ledger.unsure])  # others may be unsure as well
        ledger.obsolete, ledger.unsure = self._sort_out(left)
        self._remove(ledger.obsolete)
        if not self._swept_staging:
            self.directory.remove_abandoned()
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
        ours, unsure = self._sort_out(left)
        stuck = self.directory.remove(entry.file for entry in ours)
        self.ledger.unsure += unsure
        self.ledger.obsolete += [entry for entry in ours if entry.file in stuck]

    def _is_foreign(self, entry: Entry) -> bool | None:
        """Tell whether a file that should have gone is another than ours; None if nobody can."""
        path = self.directory.full_path(entry.file)
        try:
            if not is_there(path):
                return False
            return self.serializer.measure(path, entry.length) != (entry.length, entry.digest)
        except FileNotFoundError:
            return True  # something that is no file
        except OSError as error:
            return None if error.errno else True  # a decompressor's error has none
        except Exception:  # noqa: BLE001 -- decompressors raise anything at what we did not write
            return True

    def _sort_out(self, entries: Iterable[Entry]) -> tuple[list[Entry], list[Entry]]:
        """Return those of obsolete files that are ours, and those of which nobody can tell now."""
        foreign = [(entry, self._is_foreign(entry)) for entry in entries]
        ours = [entry for entry, is_foreign in foreign if is_foreign is False]
        return ours, [entry for entry, is_foreign in foreign if is_foreign is None]

    def _remove(self, entries: list[Entry]) -> None:
        """Remove obsolete files; what cannot be removed yet stays in the books."""
        if not self.ledger.obsolete:
            return
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
        excess = 0
        try:
            sizes = {name: self.packs.size(name) for name in packs}
            excess = sum(sizes.values()) - 2 * sum(packs.values())
            if excess >= WASTE:
                excess = 0
                self.repack({name for name, alive in packs.items() if 2 * alive < sizes[name]})
        except OSError as error:
            logger.warning("the packs in %s could not be compacted: %s", self.directory.path, error)
            self.catch_up()  # it counts if all that failed is the last fsync
        self._remove_dead_packs()
        # Of a byte that is retired there is one more dead and one less alive.
        self._tolerated = self.ledger.retired + (WASTE - excess) // 2

    def repack(self, names: set[str]) -> None:
        """Copy what is alive in certain packs to others; the last of them are left to be removed.

        The worst come first, and each commit takes as many as fill half a pack, or one: for until
        they are gone, the disk holds both.

        Raises
        ------
        OSError
            If the disk refuses.
        """
        alive = {name: self.ledger.packs[name] for name in names}
        some: set[str] = set()
        for name in sorted(names, key=alive.__getitem__):
            if some and sum(map(alive.__getitem__, some)) + alive[name] > PACK_BYTES // 2:
                self.repack_at_once(some)
                self._remove_dead_packs()
                some = set()
            some.add(name)
        self.repack_at_once(some)

    def repack_at_once(self, names: set[str]) -> None:
        """Do that in one commit, and remove nothing."""
        batch = Batch(self.directory)
        rows = self.ledger.packed_in(names)
        entries = sorted((self.ledger.entry(row), n) for n, (_, row) in enumerate(rows))
        try:
            for _, group in groupby(entries, lambda pair: (pair[0].file, pair[0].place // COPIED)):
                some = [*group]
                streams = self._read_living([entry for entry, _ in some])
                # What is cut short stays where it is, and so do the digests: reading tells.
                whole = [n for n, (entry, _) in enumerate(some) if len(streams[n]) == entry.length]
                keys = [rows[some[n][1]][0] for n in whole]
                digests = [some[n][0].digest for n in whole]
                batch.write(keys, [streams[n] for n in whole], digests)
            self.commit(batch)
        finally:
            batch.discard()

    def compact(self) -> int:
        """Write log and packs anew where they hold anything out of date, and remove what is.

        Returns
        -------
        int
            How many bytes that freed.

        Raises
        ------
        OSError
            If the disk refuses; then nothing is lost.
        """
        with self.recording():
            before = self._nbytes_of_upkeep()
            self._compact()
            return before - self._nbytes_of_upkeep()

    def _compact(self) -> None:
        self._sweep()
        self.directory.remove_abandoned()
        packs = self.ledger.packs
        wasted = {name for name, alive in packs.items() if alive < self.packs.size(name)}
        wasted -= self.ledger.unreadable_files()  # whose keys cannot be written
        if wasted:
            self.repack(wasted)
        self._remove(self.ledger.obsolete)
        self._remove_dead_packs()
        payloads = self.ledger.snapshot()
        if log_size(payloads) < self.directory.size([INDEX]):
            self._replace_index(payloads)
            self.catch_up()

    def _nbytes_of_upkeep(self) -> int:
        """Return how many bytes all files have but those of values that are alive."""
        names = {INDEX, *self.ledger.packs, *(entry.file for entry in self.ledger.obsolete)}
        for payload in self.index.uncommitted():
            with suppress(FrameError):
                names.update(entry.file for entry in own_entries(payload))
        return self.directory.size(names.union(self.directory.staging()))

    def _read_living(self, entries: list[Entry]) -> list[bytes]:
        """Return the streams that lie near each other in a pack, b"" for what is gone."""
        streams = self._read_near(entries)
        damaged = [n for n, entry in enumerate(entries) if digest_bytes(streams[n]) != entry.digest]
        if damaged:
            self.packs.forget(entries[0].file)  # another one may have the name by now
            again = self._read_near(entries)
            for n in damaged:
                streams[n] = again[n]
        return streams

    def _read_near(self, entries: list[Entry]) -> list[bytes]:
        name, start = entries[0].file, entries[0].place
        # Where a pack was cut short and grew again, what is lost lies in the midst of others.
        end = max(entry.place + entry.length for entry in entries)
        try:
            with locating(self.directory.full_path(name)):
                data = self.packs.read(name, start, end - start)
        except FileNotFoundError:
            data = b""
        except OSError:  # which may be of a sector that nothing alive is in
            if len(entries) == 1:
                raise
            return [self._read_near([entry])[0] for entry in entries]
        places = [entry.place - start for entry in entries]
        return [data[n : n + entry.length] for n, entry in zip(places, entries, strict=True)]

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
        self._replace_index(ledger.snapshot())
        self.catch_up()

    def _replace_index(self, payloads: list[bytes]) -> None:
        scratch = self.directory.staging_path()
        try:
            self.index.replace(payloads, scratch)
        except OSError as error:
            raise told(error, self.index.path, log_size(payloads)) from error
        finally:
            self.directory.remove_staged([scratch])

    def _copy_shared(self, entry: Entry, named: set[str]) -> Entry:
        """Give a value a file of its own that had one with another key."""
        outside = self.directory.leads_out(entry.file)
        start = digest_name(entry.file) if outside else entry.file
        source = self.directory.full_path(entry.file)
        for n in count(1):
            copy = entry._replace(file=f"{start}~{n}")
            path = self.directory.full_path(copy.file)
            there = is_there(path)
            # One that is there already, and no other's, is from a try that a crash ended.
            taken = there and (not own_size(path) or self._is_foreign(copy) is not False)
            if copy.file in named or taken:
                continue
            named.add(copy.file)
            if not there and is_file(source):  # else both keys have lost their value
                try:
                    shutil.copyfile(source, path)
                except BaseException:
                    self.directory.remove([copy.file])
                    raise
            return copy
        raise AssertionError("there is always another number")

    def _compact_if_due(self) -> None:
        """Write the log anew where it takes more than twice what it needs.

        To find that out takes time. So it is asked only where what came and went since may have
        brought it that far; and the log stays where it would not be shorter by a sixth.
        """
        size, ledger = self.index.length, self.ledger
        if size <= max(2 * ledger.needed, COMPACT_BYTES) or time.monotonic() < self._compact_after:
            return
        ledger.needed = least = ledger.least()
        if size <= 2 * least:
            return
        payloads = ledger.snapshot()
        if 6 * log_size(payloads) > 5 * size:
            ledger.needed = log_size(payloads)
            return
        try:
            self._replace_index(payloads)
            self.catch_up()
            self.ledger.needed = least
        except OSError as error:  # what was committed counts; who looks next catches up
            logger.warning("the index %s could not be compacted: %s", self.index.path, error)
            self._compact_after = time.monotonic() + RETRY
