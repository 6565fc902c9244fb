"""How values are written: dumped, staged, and published by a commit."""

from __future__ import annotations

import logging
import operator
from collections import deque
from collections.abc import Collection, Hashable, Iterable
from itertools import repeat
from time import perf_counter
from typing import Any

from chest.aliases import UNSAVED
from chest.columns import SURE, as_read, gather
from chest.errors import KeyTypeError, ReadOnlyError
from chest.eviction import Eviction
from chest.loading import Loading
from chest.packs import MANY, PACKED
from chest.progress import Tally
from chest.serialize import UndumpableError
from chest.staging import STREAM_BYTES, Batch
from chest.store import Store

STEP = 1024  # values dumped at a time

logger = logging.getLogger("chest")


class Saving(Loading):
    """The values in memory, and what writes them."""

    def commit_deletions(self) -> None:
        """Commit what was deleted, without writing a value."""
        with self.lock, self:
            self.begin("write the index")
            if self.ledger.pending:
                self._commit(Batch(self.store.directory), {})
            self._tidy()

    def _tidy(self) -> None:
        """Remove what an interrupt kept the last commit from removing."""
        busy = self.in_transaction or self._is_recording
        if self._store is not None and self._store.untidy and not busy:
            with self._writing():
                self._absorb()
                self._store.sweep()
                self._look(self._store)

    def _save(
        self, keys: list[Any], *, stop: bool, tally: Tally | None = None
    ) -> dict[Any, Exception]:
        """Write values and commit; return those that cannot be written, with the reasons.

        With `stop`, the first refusal of the disk is raised and nothing is committed; without it
        it counts as a reason like others.
        """
        if not keys and not self.ledger.pending:
            self._tidy()
            return {}
        try:
            batch = Batch(self.store.directory, tally)
        except OSError as error:  # a temporary directory cannot be made
            if stop:
                raise
            return dict.fromkeys(keys, error)
        values: dict[Any, Any] = {}
        unsaved: dict[Any, Exception] = {}
        started = perf_counter()
        try:
            self._stage(keys, batch, values, unsaved, stop)
            self._stage_in_one_step(batch, values, unsaved, stop)
            staged = batch.keys()
            try:
                self._commit_or_stage_again(batch, values, unsaved, stop)
            except OSError as error:
                if stop or not staged:
                    raise
                unsaved.update(dict.fromkeys(staged, error))
        finally:
            batch.discard()
            self.meter.write_seconds += perf_counter() - started
        return unsaved

    def _commit_or_stage_again(
        self, batch: Batch, values: dict[Any, Any], unsaved: dict[Any, Exception], stop: bool
    ) -> None:
        """Commit; staging files that somebody took for abandoned are written again, once."""
        try:
            self._commit(batch, values)
        except FileNotFoundError:
            staged = batch.keys()
            batch.discard()
            self._stage(staged, batch, values, unsaved, stop)
            self._commit(batch, values)

    def _stage(
        self,
        keys: list[Any],
        batch: Batch,
        values: dict[Any, Any],
        unsaved: dict[Any, Exception],
        stop: bool,
    ) -> None:
        """Dump values to where a commit takes them from, so many at a time."""
        start, some = 0, 4
        while start < len(keys):
            batch.tell()
            # What is not resident was deleted or spilled by what was pickled before.
            step = [*filter(self.inmem.__contains__, keys[start : start + some])]
            start += some
            values.update(zip(step, gather(self.inmem, step), strict=True))
            spelled = self.ledger.spell(step)
            if not SURE.issuperset(map(type, spelled)):
                pairs = zip(step, spelled, strict=True)
                is_pickled = self.ledger.is_pickled
                storable = [k for k, name in pairs if is_pickled(k) or _is_storable(name, unsaved)]
                step = [*filter(self.inmem.__contains__, storable)]
            dumped = self._streams(step, values)
            streams = self._stage_large(dumped, values, batch, unsaved, stop)
            # Who knows how large they are: sizes are what `nbytes` says.
            some = min(4 * some, STEP) if _nbytes(dumped) < STREAM_BYTES else max(some // 4, 1)
            try:
                batch.add([*streams], [*streams.values()])
            except OSError as error:
                if stop:
                    raise
                unsaved.update(dict.fromkeys(streams, error))
        if len(batch) < MANY:
            for key in [key for key in batch.streams if not self.ledger.is_packed(key)]:
                stream = batch.streams.pop(key)
                self._stage_alone(key, values[key], stream, batch, unsaved, stop)

    def _stage_in_one_step(
        self, batch: Batch, values: dict[Any, Any], unsaved: dict[Any, Exception], stop: bool
    ) -> None:
        """Dump into memory what another thread changed as it was dumped into a file."""
        for key in [key for key, error in unsaved.items() if type(error) is RuntimeError]:
            if key in self.inmem:
                (stream,) = self.serializer.dumps_all([values[key]])
                if not isinstance(stream, UndumpableError):
                    del unsaved[key]
                    self._stage_alone(key, values[key], stream, batch, unsaved, stop)

    def _stage_large(
        self,
        streams: dict[Any, Any],
        values: dict[Any, Any],
        batch: Batch,
        unsaved: dict[Any, Exception],
        stop: bool,
    ) -> dict[Any, bytes]:
        """Stage what needs files, and note what cannot be dumped; return the other streams."""
        if _all_small(streams.values()):
            return streams
        small = {}
        for key, stream in streams.items():
            batch.tell()
            if key not in self.inmem:
                continue  # what was pickled or told since deleted it
            if isinstance(stream, UndumpableError):
                unsaved[key] = stream.cause
            elif stream and len(stream) <= PACKED:
                small[key] = stream
            else:
                self._stage_alone(key, values[key], stream, batch, unsaved, stop)
        return small

    def _streams(self, keys: list[Any], values: dict[Any, Any]) -> dict[Any, Any]:
        """Dump values: what comes of the small ones, None for those that need a file."""
        if not self.serializer.packs:
            return dict.fromkeys(keys)
        small = self.eviction.small(keys)
        dumped = self.serializer.dumps_all(gather(values, small))
        streams = dict(zip(small, dumped, strict=True))
        return streams if small is keys else {key: streams.get(key) for key in keys}

    def _stage_alone(
        self,
        key: Hashable,
        value: Any,
        stream: bytes | None,
        batch: Batch,
        unsaved: dict[Any, Exception],
        stop: bool,
    ) -> None:
        """Stage a value in a file of its own."""
        try:
            if stream is None:
                batch.files[key] = self.store.stage(value, self.eviction.size(key))
            else:
                batch.files[key] = self.store.stage_stream(stream)
        except UndumpableError as error:
            unsaved[key] = error.cause
        except OSError as error:
            if stop:
                raise
            unsaved[key] = error

    def _commit(self, batch: Batch, values: dict[Any, Any]) -> None:
        """Publish staged values, and what was deleted."""
        if not batch and not self.ledger.pending:
            return  # nothing could be staged
        store = self.store
        with self._writing():
            self._absorb()
            with store.recording():
                # What a hook replaced or deleted meanwhile is history.
                same = all(map(operator.is_, map(self.inmem.get, values), values.values()))
                if not same or not values.keys() <= self.dirty.keys():
                    get, dirty = self.inmem.get, self.dirty
                    gone = {k for k, v in values.items() if get(k) is not v or k not in dirty}
                    batch.remove(gone)
                store.commit(batch)
            self._look(store)
            saved = batch.keys()
            self.meter.writes += len(saved)
            self.meter.bytes_written += batch.nbytes
            # What gave a key its file's name, or pickled a key, may have set another value since.
            if not all(map(operator.is_, map(self.inmem.get, saved), gather(values, saved))):
                saved = [key for key in saved if self.inmem.get(key) is values[key]]
            if self._as_loaded:
                deque(map(self._as_loaded.pop, saved, repeat(None)), maxlen=0)
            # What is collected as garbage may have saved them once more by now.
            self._shrunk -= sum(map(self.dirty.pop, saved, repeat(0)))
            self._outdated = self._shrunk
            if not self.dirty:
                self.dirty.clear()  # a dict that was large takes long to be looked through
            store.tidy()
            self._look(store)
        logger.debug("committed %d values to %s", len(saved), self.path)

    def adopt(self, batch: Batch, keys: Iterable[Any], *, overwrite: bool) -> None:
        """Publish streams that are not from values in memory, in place of what the keys held.

        Parameters
        ----------
        batch : Batch
        keys : iterable
            The keys in the order that they shall have, others among them.
        overwrite : bool
        """
        if batch:
            with self.lock, self:
                self._adopt(batch, keys, overwrite)

    def _adopt(self, batch: Batch, keys: Iterable[Any], overwrite: bool) -> None:
        store = self.store
        added: list[Any] = []
        try:
            with self._writing():
                self._absorb()
                if not overwrite:
                    batch.remove(self.ledger.rows.keys() & batch.keys())
                keys = [*filter({*batch.keys()}.__contains__, keys)]
                for key in keys:
                    if key not in self.ledger.rows:
                        self.ledger.add(key)
                        added.append(key)
                store.commit(batch)
                try:
                    self._forget_all(store, keys)
                except BaseException:  # an interrupt: what is in memory is history all the same
                    self._tear()
                    self.eviction = Eviction(self.available)  # this one may be torn, too
                    self._forget_all(store, keys)
                    raise
                self._outdated = self._shrunk
                store.tidy()
                self._look(store)
        except BaseException:
            for key in added:
                if self.ledger.rows.get(key, 0) < 0:
                    self.ledger.delete(key)
            raise

    def _forget_all(self, store: Store, keys: Iterable[Any]) -> None:
        self._look(store)
        for key in keys:
            self._forget(key)

    def file_of(self, key: Hashable) -> str:
        """Return the path of the file of a key; a value in a pack gets one now.

        Raises
        ------
        ReadOnlyError
            If it would have to get one.
        CorruptValueError
            If what the pack holds is not as written.
        """
        with self.lock, self:
            self.begin()
            directory = self.store.directory
            if self.ledger.is_packed(key):
                self._unpack(key)
            row = self.ledger.rows.get(key, UNSAVED)
            spelled = self.ledger.spelled(key)
            name = directory.name_for(spelled) if row < 0 else self.ledger.entry(row).file
            return directory.full_path(name)

    def _unpack(self, key: Hashable) -> None:
        if self.readonly:
            raise ReadOnlyError(str(self.path), "give a value a file of its own")
        store = self.store
        batch = Batch(store.directory)
        try:
            with self._writing():
                self._absorb()
                if self.ledger.is_packed(key):
                    with store.recording():
                        stream = store.stream(key, self.ledger.entry(self.ledger.rows[key]))
                        batch.files[key] = store.stage_stream(stream)
                        store.commit(batch)
                    self._look(store)
                    self._outdated = self._shrunk
                    store.tidy()
                    self._look(store)
        finally:
            batch.discard()


def _nbytes(streams: dict[Any, Any]) -> int:
    return sum(len(stream) for stream in streams.values() if type(stream) is bytes)


def _all_small(streams: Collection[Any]) -> bool:
    """Tell whether all of these may be in a pack."""
    sizes = map(len, streams) if {*map(type, streams)} == {bytes} else ()
    shortest, longest = (min(found), max(found)) if (found := [*sizes]) else (0, 0)
    return shortest > 0 and longest <= PACKED


def _is_storable(key: Hashable, unsaved: dict[Any, Exception]) -> bool:
    """Tell whether a key comes back from the index as one that is equal to it; if not, note why."""
    try:
        found = as_read(key)
        same = hash(found) == hash(key) and (found,) == (key,)
    except Exception as error:  # noqa: BLE001 -- its class raises anything; it is told to the user
        unsaved[key] = KeyTypeError(key, f"its pickle fails: {error}")
        return False
    if not same:
        why = "it is not equal to its own copy, so that nobody could find it (of nan, use math.nan)"
        unsaved[key] = KeyTypeError(key, why)
    return same
