"""Read every value of a directory, and tell which are not as they were written.

Nothing is loaded and no lock is taken: values are read as other handles go on, and one that seems
damaged is looked at again as of the last commit.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from chest.aliases import UNSAVED
from chest.columns import Entry, FrameError, own_entries
from chest.directory import INDEX
from chest.errors import CorruptIndexError, CorruptValueError, SerializerError
from chest.ledger import Ledger
from chest.options import Options
from chest.pickled import PickledKey, read_plain, skim
from chest.progress import Tally
from chest.reading import Reading
from chest.report import Problem, Report
from chest.salvage import open_anyhow
from chest.serialize import Serializer


def verify(
    path: str, serializer: Serializer, options: Options, tally: Tally | None = None
) -> Report:
    """Check the directory `path`.

    Raises
    ------
    OSError
        If there is no chest, or the system refuses to let it be read.
    """
    reading, faults = open_anyhow(path, serializer, replace(options, readonly=True))
    try:
        return examine(reading, faults, tally)
    finally:
        reading.close()


def examine(reading: Reading, faults: list[str], tally: Tally | None = None) -> Report:
    """Check a directory that is open, whose index has certain faults."""
    report = Report(reading.directory.path, index=faults)
    check_values(reading, report, tally)
    report.stray += strays(reading)
    return report


def check_values(reading: Reading, report: Report, tally: Tally | None = None) -> None:
    """Read every committed value; add to `report`."""
    ledger = reading.ledger
    todo = sorted(committed(ledger), key=lambda pair: ledger.where(pair[1])[:2])
    if tally is not None:
        tally.begin(len(todo))
    for key, row in todo:
        length = _check(reading, key, ledger.entry(row), report)
        if length is not None:
            report.keys += 1
            report.nbytes += length
        if tally is not None:
            tally.step()


def committed(ledger: Ledger) -> Iterator[tuple[Any, int]]:
    """Yield all keys that a commit holds, also those that cannot be read, with their rows."""
    yield from ledger.stored()
    yield from ((PickledKey(data), row) for data, row in ledger.unreadable.items())


def _current(reading: Reading, key: Any) -> Entry | None:
    """Return where the value of a key lies as of the last commit."""
    reading.catch_up(look=True)
    ledger = reading.ledger
    if isinstance(key, PickledKey):
        row = ledger.unreadable.get(key.data, UNSAVED)
    else:
        row = ledger.rows.get(key, UNSAVED)
    return None if row < 0 else ledger.entry(row)


def _check(reading: Reading, key: Any, entry: Entry, report: Report) -> int | None:
    """Read a value, add it to `report` if it is not as written; else return its length."""
    current: Entry | None = entry
    while current is not None:
        entry = current
        ledger, seen = reading.ledger, reading.index.seen
        found = _fault(reading, key, entry)
        if found is None:
            return entry.length
        try:
            current = _current(reading, key)
        except CorruptIndexError as error:  # it was sound when this began
            report.index = [error.reason]
            current, ledger, seen = entry, reading.ledger, reading.index.seen
        # After a commit the same entry may be another one's, which was replaced and set back.
        if current == entry and reading.ledger is ledger and reading.index.seen == seen:
            missing, problem = found
            (report.missing if missing else report.damaged).append(problem)
            return None
    return None  # deleted meanwhile


def _fault(reading: Reading, key: Any, entry: Entry) -> tuple[bool, Problem] | None:
    """Return whether a value is missing, and what is wrong with it; None if nothing is."""
    try:
        reading.check_value(key, entry)
        if reading.index.foreign:
            _check_unrecorded(reading, key, entry)
    except (CorruptValueError, SerializerError) as error:
        missing = isinstance(error.__cause__, OSError)
        return missing, Problem(key, error.path, error.reason)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False, Problem(key, reading.directory.full_path(entry.file), str(error))
    return None


def _check_unrecorded(reading: Reading, key: Any, entry: Entry) -> None:
    """Look into a value of an old chest, of which nobody recorded the digest."""
    serializer, path = reading.serializer, reading.directory.full_path(entry.file)
    if serializer.load not in (pickle.load, json.load, read_plain):
        reading.read(key, entry)
        return
    with serializer.open(path, mode="rb") as file:
        try:
            skim(file)
        except ValueError as error:
            raise CorruptValueError(key, path, str(error)) from error


def strays(reading: Reading) -> list[str]:
    """Return the paths of files that neither the index nor a commit under way names."""
    found = _unnamed(reading)
    if found:  # a commit may have begun in a new index just then
        found &= _unnamed(reading)
    return sorted(os.path.join(reading.directory.path, name) for name in found)


def _unnamed(reading: Reading) -> set[str]:
    # In this order: what was on its way into a commit is named by it when that is looked at.
    found = reading.directory.files() - {INDEX}
    _catch_up_if_sound(reading)
    for payload in reading.index.uncommitted():
        with suppress(FrameError):
            found -= {entry.file for entry in own_entries(payload)}
    _catch_up_if_sound(reading)
    ledger = reading.ledger
    found -= ledger.files()
    found -= {*ledger.packs, *(entry.file for entry in ledger.obsolete)}
    found -= {*reading.directory.staging(every=True)} - {*reading.directory.staging()}
    return {*filter(reading.directory.exists, found)}


def _catch_up_if_sound(reading: Reading) -> None:
    with suppress(CorruptIndexError):  # what was read of it before is all that there is
        reading.catch_up(look=True)
