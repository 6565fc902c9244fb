"""With ``fsync=True`` a power cut at any moment leaves what was told, and no wrong value.

What the fixed work does to its directory is recorded: creations, writes, stores into the
head, truncations, renames, links, removals, and each fsync of a file or a folder. From that the
states are built that a file system may leave at any moment. What was synced is there. Of all else
each part is there or lost, whatever became of those before it; of a write there may also be any
number of sectors, or only its length, and zeros. A rename is one such part. That is less than the
usual file systems promise.

Where there are too many such states, a sample is taken. In each of them the chest opens, and holds
exactly what it held after a commit, not older than the last that was told; it can be written, and
opened again. No error is allowed for, not even one that tells of damage.

Without ``fsync`` anything may be lost. Then no value is wrong, and errors are those of chest.
"""

from __future__ import annotations

import os
import random
import shutil
from itertools import product

import pytest
from disk import ALL, Disk, opened
from work import STEPS, Small, Work, check_usable, fits, make_others, plain, read_back, seen, states

from chest import ChestError

pytestmark = [pytest.mark.repeats, pytest.mark.timeout(6000)]

SECTOR = 512
SAMPLE = 300 if ALL else 30  # states of each moment
FOLDER = -1


@pytest.fixture(autouse=True)
def _small():
    with Small():
        yield


class Recorder:
    """Does every call, and notes what it changes.

    Attributes
    ----------
    events : list of tuple
        ``("data", file, place, bytes)``, ``("size", file, size)``, ``("names", {path: file or
        None})``, ``("sync", file)``, ``("sync folder", path)`` and ``("told", step)``; a file is a
        number, `FOLDER` a folder.
    """

    def __init__(self):
        self.events = []
        self._names = {}
        self._files = 0

    def __call__(self, call):
        done = call.do()
        note = getattr(self, "_" + call.name, None)
        if note is not None:
            note(call, done)
        return done

    def told(self, step):
        self.events.append(("told", step))

    def _new(self):
        self._files += 1
        return self._files

    def _change(self, names):
        self._names.update(names)
        self.events.append(("names", names))

    def _create(self, call, _):
        call.file.number = self._new()
        self._change({call.path: call.file.number})

    def _open(self, call, _):
        if call.file is not None:
            call.file.number = self._names[call.path]

    def _write(self, call, done):
        place, data = call.args
        self.events.append(("data", call.file.number, place, data[:done]))

    def _store(self, call, _):
        self.events.append(("data", call.file.number, *call.args))

    def _truncate(self, call, _):
        number = self._names[call.path] if call.file is None else call.file.number
        self.events.append(("size", number, call.args[-1]))

    def _rename(self, call, _):
        source, target = call.args
        self._change({source: None, target: self._names[source]})

    _replace = _rename

    def _link(self, call, _):
        source, target = call.args
        if source not in self._names:  # a file from elsewhere, which nobody synced
            self._names[source] = self._new()
            with open(source, "rb") as file:
                self.events.append(("data", self._names[source], 0, file.read()))
        self._change({target: self._names[source]})

    def _unlink(self, call, _):
        self._change({call.path: None})

    _rmdir = _unlink

    def _mkdir(self, call, _):
        self._change({call.path: FOLDER})

    def _fsync(self, call, _):
        folder = isinstance(call.file, str)
        self.events.append(("sync folder", call.file) if folder else ("sync", call.file.number))


class FileSystem:
    """What is safe of the changes so far, and what is pending."""

    def __init__(self, root):
        self.root = root
        self.data = {}  # number of a file to its bytes
        self.names = {}
        self.pending = []  # "data", "size" and "names" events

    def take(self, event):
        match event:
            case "sync", number:
                self._settle(lambda change: change[0] != "names" and change[1] == number)
            case "sync folder", folder:
                self._settle(lambda change: change[0] == "names" and folder in _folders(change[1]))
            case "told", _:
                pass
            case _:
                self.pending.append(event)

    def _settle(self, is_meant):
        """Make pending changes safe."""
        left = []
        for change in self.pending:
            if not is_meant(change):
                left.append(change)
            elif change[0] == "names":
                self.names.update(change[1])
                for kind, *rest in left:  # what was before in the same place is history
                    if kind == "names":
                        for path in change[1]:
                            rest[0].pop(path, None)
            else:
                self.data[change[1]] = changed(self.data.get(change[1], b""), change, "whole")
        self.pending = left

    def states(self, choice):
        """Yield directories, as dicts of path to bytes or None for a folder, that may be left."""
        ways = [ways_of(change) for change in self.pending]
        total = 1
        for some in ways:
            total = min(total * len(some), SAMPLE + 1)
        if total <= SAMPLE:
            chosen = product(*ways)
        else:
            chosen = [[some[0] for some in ways], [some[-1] for some in ways]]
            chosen += [self._pick(ways, choice) for _ in range(SAMPLE - 2)]
        for these in chosen:
            yield self._built(these)

    @staticmethod
    def _pick(ways, choice):
        """Choose one way for each change: all alike but for a few, or each by itself."""
        if choice.random() < 0.5:
            return [choice.choice(some) for some in ways]
        end, few = choice.choice([0, -1]), choice.choice([0.05, 0.3])
        return [choice.choice(some) if choice.random() < few else some[end] for some in ways]

    def _built(self, chosen):
        names, data = dict(self.names), dict(self.data)
        for change, way in zip(self.pending, chosen, strict=True):
            if way != "lost":
                if change[0] == "names":
                    names.update(change[1])
                else:
                    data[change[1]] = changed(data.get(change[1], b""), change, way)
        found = {}
        for path in sorted(path for path, number in names.items() if number is not None):
            above = os.path.dirname(path)
            if above == self.root or above in found:
                found[path] = None if names[path] == FOLDER else data.get(names[path], b"")
        return found


def _folders(names):
    """Return the folders that have to be synced for a change of names: that of what is new."""
    new = {path for path, number in names.items() if number is not None}
    return {os.path.dirname(path) for path in new or names}


def ways_of(change):
    """Return in which ways a change may be left, from not at all to as a whole."""
    if change[0] != "data" or len(change[3]) <= 8:
        return ["lost", "whole"]
    sectors = len(change[3]) // SECTOR
    torn = sorted({0, sectors // 2, sectors} - {len(change[3]) / SECTOR})
    return ["lost", *(n * SECTOR for n in torn), "whole"]


def changed(data, change, way):
    """Return what a file holds after a change; of a torn write the rest is zeros."""
    if change[0] == "size":
        return data[: change[2]].ljust(change[2], b"\0")
    _, _, place, new = change
    if way != "whole":
        new = new[:way] + data[place + way : place + len(new)]
        new = new.ljust(len(change[3]), b"\0")
    return data.ljust(place, b"\0")[:place] + new + data[place + len(new) :]


def build(state, old_root, root):
    os.mkdir(root)
    for path, data in state.items():
        path = root + path.removeprefix(old_root)
        if data is None:
            os.mkdir(path)
        else:
            with open(path, "wb") as file:
                file.write(data)


def record(path, others, **options):
    """Return what the work does to the folder above `path`, for the time being."""
    recorder = Recorder()
    with Disk(os.path.dirname(path), recorder):
        work = Work(path, others, **options)
        for n, step in enumerate(STEPS):
            work.do(step)
            recorder.told(n + 1)
    return recorder.events


class Cuts:
    """Every moment of some work, and the directories that may be left then; counts them."""

    def __init__(self, tmp_path, **options):
        self._root = str(tmp_path / "root")
        self._copy = str(tmp_path / "copy")
        os.mkdir(self._root)
        others = make_others(str(tmp_path / "others"))
        self._events = record(os.path.join(self._root, "chest"), others, **options)
        self._events.append(("told", len(STEPS)))
        self.moments = 0
        self.tried = set()

    def __iter__(self):
        """Yield how much was told, and the path of a chest after a power cut."""
        system, choice, told = FileSystem(self._root), random.Random(3), 0
        for event in self._events:
            if ALL or event[0] in ("sync", "sync folder", "told"):
                self.moments += 1
                for state in system.states(choice):
                    mark = told, hash(tuple(state.items()))
                    if mark not in self.tried:
                        self.tried.add(mark)
                        build(state, self._root, self._copy)
                        yield told, os.path.join(self._copy, "chest")
                        shutil.rmtree(self._copy)
            system.take(event)
            if event[0] == "told":
                told = event[1]

    def __str__(self):
        return f"{len(self.tried)} states of {self.moments} moments"


def test_a_power_cut_at_any_moment_leaves_what_was_told(tmp_path):
    known = [seen(state) for state in states()]
    cuts = Cuts(tmp_path, fsync=True)
    for n, (told, path) in enumerate(cuts):
        found = read_back(path)
        after = min(told + 1, len(STEPS))
        at_once = told == after or STEPS[told].at_once
        assert fits(found, known[told], known[after], at_once), f"in step {told}, state {n}"
        if n % 5 == 0:
            check_usable(path, found, clean=False)
    print(cuts)
    assert len(cuts.tried) > 1000


def test_without_fsync_no_value_is_wrong_after_a_power_cut(tmp_path):
    once = {}
    for state in states():
        for key, value in seen(state):
            once.setdefault(key, []).append(value)
    cuts = Cuts(tmp_path)
    right = wrong = unopened = 0
    for _, path in cuts:
        try:
            with opened(path) as c:
                for key in c:
                    try:
                        assert plain(c[key]) in once[key]
                        right += 1
                    except ChestError:
                        wrong += 1
        except ChestError:
            unopened += 1
    print(f"{cuts}: {right} values are right, {wrong} told as wrong; {unopened} chests as well")
    assert right
    assert wrong
    assert unopened
