"""Make a damaged directory a sound chest again, with every value that is as it was written.

Nothing is loaded, and nothing that is damaged is deleted: it is moved to the folder ``.damaged``.
"""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Iterable

from chest.columns import Pickled, encode
from chest.directory import INDEX, Directory
from chest.errors import CorruptIndexError, ReadOnlyError
from chest.frames import HEAD, MAGIC, encode_length
from chest.index import Index
from chest.options import absolute, looking
from chest.outside import adopt, open_outside
from chest.pickled import PickledKey
from chest.progress import Progress, counting
from chest.report import Problem, Report
from chest.salvage import salvage
from chest.serialize import Open
from chest.store import Store
from chest.verify import check_values, strays


def repair(
    path: str | os.PathLike[str], *, open: Open | None = None, progress: Progress = None
) -> Report:
    """Make a damaged directory a sound chest again, with every value that is as it was written.

    Values that are damaged or gone are taken out of the index. If the index itself is damaged, what
    its undamaged frames say counts: keys that were set or deleted in the others may be missing, or
    be as they were before. What is damaged moves to the folder ``.damaged`` of the directory.
    Nothing is loaded, so no code from the directory runs. Others that write wait meanwhile.

    Parameters
    ----------
    path : str or path-like
        The directory.
    open : callable, optional
        What the chest was given as ``open``, if it is none of gzip's, bz2's, lzma's or lz4's.
    progress : bool or callable, optional
        True shows how far it is, a callable is called with the numbers of keys done and of keys in
        all, as by `Chest.verify`. It must not write to the directory, whose lock is held.

    Returns
    -------
    Report
        What was wrong. It is `ok` if nothing was; then nothing was changed.

    Raises
    ------
    FileNotFoundError
        If there is no chest.
    CorruptIndexError
        If ``.keys`` is no index of a chest at all, or of a newer version.
    ReadOnlyError
        If the directory cannot be written.
    ValueError
        If `open` is needed.

    Examples
    --------
    >>> from chest import Chest, repair
    >>> c = Chest({'x': 1, 'y': 2})
    >>> c.flush()
    >>> with open(c.key_to_filename('x'), 'wb') as file:
    ...     _ = file.write(b'something else')
    >>> print(repair(c.path))
    1 value kept, 5 bytes: 1 damaged
      damaged  'x' in x: it has more than the 5 bytes that were written
      aside    .damaged/x
    >>> list(c)
    ['y']
    """
    full = str(absolute(path))
    report = Report(full, repaired=True)
    with open_outside(full, open or builtins.open) as (reading, faults):
        adopt(reading)
        demand_writable(reading.directory)
    if faults:
        _repair_index(reading.directory, faults, report)
    store = Store(full, reading.serializer, looking(full, readonly=False), reopen=True)
    try:
        with store.writing():
            with counting(progress, "repair") as tally:
                check_values(store, report, tally)
            if not report.ok:
                _drop(store, report)
            report.stray += strays(store)
    finally:
        store.close()
    return report


def demand_writable(directory: Directory) -> None:
    """Raise ReadOnlyError if a directory cannot be written."""
    if not os.access(directory.path, os.W_OK) or not os.access(directory.index, os.W_OK):
        raise ReadOnlyError(directory.path, "write the index")


def _repair_index(directory: Directory, faults: list[str], report: Report) -> None:
    """Put an index in the place of a damaged one that has what can be read of it."""
    data = _read(directory.index)
    if not salvage(data).is_index:
        raise CorruptIndexError(directory.index, faults[0], repairable=False)
    report.index += faults
    report.aside += filter(None, [directory.set_aside(INDEX, shutil.copyfile)])
    _heal_head(directory.index, data)
    index = Index(directory.index, readonly=False, fsync=True)
    try:
        with index.locked():
            found = salvage(_read(directory.index))
            scratch = directory.staging_path()
            try:
                index.replace(found.payloads, scratch)
            finally:
                directory.remove_staged([scratch])
            index.refresh()
            for payload in found.uncommitted:  # the next commit sweeps what they name
                index.append(payload)
            index.leave()
    finally:
        index.close()


def _read(path: str) -> bytes:
    with builtins.open(path, "rb") as file:
        return file.read()


def _heal_head(path: str, data: bytes) -> None:
    """Write what has to be at the start of every index, so that it can be locked and replaced."""
    with builtins.open(path, "r+b") as file:
        if len(data) < HEAD:
            file.write(MAGIC + encode_length(HEAD).to_bytes(8, "little"))
        elif not data.startswith(MAGIC):
            file.write(MAGIC)


def _drop(store: Store, report: Report) -> None:
    """Take what is damaged or missing out of the index, and move it aside; needs the lock."""
    problems = [*report.damaged, *report.missing]
    names = {os.path.relpath(problem.path, store.directory.path) for problem in problems}
    names = {name.replace(os.sep, "/") for name in names}
    packs = names & store.ledger.packs.keys()
    for problem in problems:
        if not isinstance(problem.key, PickledKey):
            store.ledger.delete(problem.key)
    store.repack_at_once(packs - store.ledger.unreadable_files())
    _delete_unreadable(store, problems)
    # Others may be alive in a pack that cannot be moved, or have the name of a file by now.
    alive = store.ledger.files()
    store.ledger.obsolete = [e for e in store.ledger.obsolete if e.file not in alive]
    for name in sorted(names - alive):
        report.aside += filter(None, [store.directory.set_aside(name)])
    store.tidy()


def _delete_unreadable(store: Store, problems: Iterable[Problem]) -> None:
    """Commit the deletion of keys that cannot be read."""
    pickles = [problem.key.data for problem in problems if isinstance(problem.key, PickledKey)]
    if pickles:
        left = store.ledger.left()
        store.index.append(encode([], first=True, left=left, deleted=[*map(Pickled, pickles)]))
        store.index.publish()
        store.catch_up()
