"""KeyboardInterrupt wherever Python can raise one.

A story is a list of steps on a chest; done to plain dicts, the same steps tell what has to come
out. One step is done under a trace that raises KeyboardInterrupt at its n-th point. Then the chest
must hold what that step found or what it was to leave, nothing else may be lost, no lock may be
held, and nothing may be left behind.

The tests take a sample, the same at every run. ``CHEST_INTERRUPTS=all`` takes every point, and
``CHEST_INTERRUPTS=2/5`` the second fifth of them.
"""

from __future__ import annotations

import _thread
import copy
import dis
import functools
import gc
import gzip
import inspect
import json
import logging
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import count

import pytest
from heapdict import heapdict

import chest.staging
import chest.store
import chest.upkeep
from chest import Chest
from chest.blocks import Block
from chest.eviction import Eviction
from chest.hands import Hands
from chest.index import Index
from chest.packs import MANY

fcntl = pytest.importorskip("fcntl")

POINTS = os.environ.get("CHEST_INTERRUPTS", "200")
STEPS = 5  # of each story, where not all points are taken
if not POINTS.isdigit():
    pytestmark = pytest.mark.timeout(0)
OLD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "old_chests")
OLD_CONTENT = runpy.run_path(os.path.join(OLD, "make.py"))["PICKLE"]
CHEST = os.path.dirname(chest.store.__file__) + os.sep
# Python code of others that a chest runs while it is half way through something.
OTHERS = (
    "contextlib.py", "heapdict.py", "tempfile.py",
    f"filelock{os.sep}_descriptor.py", f"filelock{os.sep}_unix.py", f"futures{os.sep}thread.py",
)  # fmt: skip
GONE = "no such key"


# -- where an interrupt can come ------------------------------------------------------------------


@functools.cache
def is_watched(code):
    return code.co_filename.startswith(CHEST) or code.co_filename.endswith(OTHERS)


@functools.cache
def operations(code):
    """The name of each instruction, and whether it is a RESUME that looks for signals."""
    found = {}
    for op in dis.get_instructions(code):
        found[op.offset] = op.opname, op.opname == "RESUME" and (op.arg & 3) < 2
    return found


def operation(frame):
    return operations(frame.f_code).get(frame.f_lasti, ("", False))


@functools.cache
def guard(code, offset):
    """Return the handler of errors that an instruction raises."""
    for entry in dis.Bytecode(code).exception_entries:
        if entry.start <= offset < entry.end:
            return entry.target
    return None


def is_called_by_c(frame):
    """Tell whether C code called this, in an instruction that looks for signals when it is done."""
    caller, name = operation(frame.f_back)[0], frame.f_code.co_name
    by_c = name in ("__init__", "__new__", "__call__", "__exit__")
    return caller == "CALL_FUNCTION_EX" or (caller == "CALL" and by_c)


class Interrupter:
    """Count the points at which a signal can raise KeyboardInterrupt; raise it at one of them.

    CPython 3.11 to 3.13 look for signals when they enter a function or go on with a generator, when
    they jump backwards, and when a call of C code is done: not in between. In particular not
    between ``RLock.__enter__`` and the block of its ``with``, but for an ``__exit__`` in Python
    there is a point before it.
    """

    def __init__(self, at=None, watches=is_watched):
        self.at = at
        self.points = []  # of each, the instructions of all calls that lead there
        self.where = None  # it was raised
        self._watches = watches
        self._calling = {}  # frames that called something, with the instruction

    def __enter__(self):
        gc.disable()  # what it finalizes would come at another point each time
        self._depth = len(_stack(sys._getframe(1)))
        sys._getframe().f_trace_opcodes = True  # before 3.13 too late if it is only set later
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error):
        sys.settrace(None)
        sys.setprofile(None)
        gc.enable()

    def _trace(self, frame, event, arg):
        if not frame.f_code.co_flags & inspect.CO_GENERATOR:  # those are run by what was called
            self._calling.pop(frame.f_back, None)
        if not self._watches(frame.f_code):
            return None
        frame.f_trace_opcodes = True
        if operation(frame) == ("RESUME", True):  # not where an error is thrown into a generator
            self._point("enter", frame, frame.f_lasti)
        return self._local

    def _local(self, frame, event, arg):
        if event == "return":
            if operation(frame)[0].startswith("RETURN") and is_called_by_c(frame):
                self._point("return", frame.f_back, frame.f_back.f_lasti)
        elif event == "line":
            frame.f_trace_opcodes = True  # in 3.13 nothing comes of it when it was just entered
        elif event == "opcode":
            name, _ = operation(frame)
            call = self._calling.pop(frame, None)
            # It would be raised by the call, which has to be in the same ``try``.
            if call is not None and guard(frame.f_code, call) == guard(frame.f_code, frame.f_lasti):
                self._point("made", frame, call)
            if name in ("CALL", "CALL_FUNCTION_EX"):
                self._calling[frame] = frame.f_lasti
            elif "JUMP_BACKWARD" in name and "NO_INTERRUPT" not in name:
                self._point("jump", frame, frame.f_lasti)
        return self._local

    def _profile(self, frame, event, arg):
        if event == "c_call":
            self._calling.pop(frame, None)
        elif event == "c_return" and self._watches(frame.f_code):
            self._point(f"{arg.__name__}()", frame, frame.f_lasti)

    def _point(self, what, frame, instruction):
        if self.where is not None:
            return
        self.points.append(None if self.at is not None else self._here(what, frame, instruction))
        if self.at == len(self.points) - 1:
            self.where = [f"{what} in", *_stack(frame)[: -self._depth]]
            self._calling.clear()  # what is in these frames would stay alive
            sys.settrace(None)
            sys.setprofile(None)
            raise KeyboardInterrupt

    def _here(self, what, frame, instruction):
        calls = [(frame.f_code, instruction)]
        while (frame := frame.f_back) is not None:
            calls.append((frame.f_code, frame.f_lasti))
        return *calls[: -self._depth], what


def _stack(frame):
    calls = []
    while frame is not None:
        code = frame.f_code
        calls.append(f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return calls


# -- what is done ---------------------------------------------------------------------------------


class Box:
    """An ordinary object, that can change and be referred to weakly."""

    def __init__(self, *items):
        self.items = list(items)

    def __eq__(self, other):
        return isinstance(other, Box) and self.items == other.items

    __hash__ = None

    def __repr__(self):
        return f"Box{self.items}"


class World:
    """Chests on one directory: `c`, which is interrupted, and `other`."""

    def __init__(self, path, *, old=None, **options):
        if old is not None:
            shutil.copytree(old[0], path)
        self.path = path
        self.temporary = path + "-temporary"
        os.mkdir(self.temporary)
        tempfile.tempdir = self.temporary
        self.options = {"available_memory": 3000} | options
        self.chests = []
        self.c = self.open()
        self.other = self.open()

    def open(self, **options):
        return self.keep(Chest(**{"path": self.path} | self.options | options))

    def keep(self, chest):
        self.chests.append(chest)
        return chest

    def make(self, data, **options):
        return self.keep(Chest(data, **options))

    def die(self):
        """Let go of everything without saving it."""
        for each in self.chests:
            each._finalizer.detach()
            if each.closed:
                each.close()  # once more, should the first time not have come to its end
            else:
                each._memory._end()
        self.chests = []


class Plain(dict):
    """A dict with the methods of a chest that change nothing one can see."""

    closed = False

    def nothing(self, *args, **kwargs):
        pass

    flush = close = move_to_disk = prefetch = shrink = refresh = write_keys = nothing
    get_from_disk = __exit__ = nothing

    def __enter__(self):
        return self

    @contextmanager
    def transaction(self, timeout=None):
        before = copy.deepcopy(dict(self))
        try:
            yield
        except ZeroDivisionError:
            self.clear()
            self.update(before)
            raise

    def update(self, other=(), overwrite=True, **more):
        for key, value in dict(other, **more).items():
            if overwrite or key not in self:
                self[key] = value


class Twin:
    """The world as it should be."""

    def __init__(self, options):
        self.c = self.other = Plain(options.get("old", (None, {}))[1])

    def open(self, data=()):
        self.c.update(data)
        return self.c

    def keep(self, chest):
        return chest

    def make(self, data, **options):
        return Plain(data)


def piecewise(step):
    """Mark a step that is one call and several changes, one key after the other."""
    step.is_piecewise = True
    return step


def by_others(step):
    """Mark a step that is not interrupted."""
    step.is_by_others = True
    return step


# Each ``yield`` comes between two operations; of them only the one that is interrupted may have
# happened or not.


def start(w):
    w.c["number"] = 1
    yield
    w.c["text"] = "t" * 300
    yield
    w.c["list"] = [1, 2]
    yield
    w.c["large"] = b"l" * 140_000
    yield
    w.c["box"] = Box(1)
    yield
    w.c["a", "b"] = "folder"
    yield
    for n in range(6):
        w.c[f"small{n}"] = [n] * 20
        yield
    w.c.flush()
    w.c["list"].append(3)  # not saved, and clean as far as anybody knows
    yield
    w.c["unsaved"] = {"u": 1}


@by_others
def begun(w):
    return start(w)


def start_with_json(w):
    for n in range(6):
        w.c[f"small{n}"] = [n, "x" * 300]
        yield
    w.c["list"] = [1, 2]
    yield
    w.c["large"] = "l" * 140_000
    yield
    w.c["a", "b"] = "folder"
    yield
    w.c.flush()
    w.c["list"].append(3)


def set_and_spill(w):
    w.c["new"] = "n" * 2000


def set_a_list(w):
    w.c["new list"] = [0] * 100


def set_large(w):
    w.c["new large"] = bytearray(160_000)


def set_again(w):
    w.c["number"] = 2
    yield
    w.c["text"] = "again"


def overwrite(w):
    w.c["text"] = "T" * 500


def overwrite_large(w):
    w.c["large"] = b"L" * 140_000


def overwrite_list(w):
    w.c["list"] = [4]


def change_in_place(w):
    w.c["small0"].append(1)
    yield
    w.c["small1"].append(1)
    yield
    w.c["box"].items.append(2)


def change_what_left(w):
    w.c["list"].append(5)
    yield
    w.c.move_to_disk("list")
    w.c["small5"].append(5)


def change_old(w):
    w.c["x"].append(4)


def hit(w):
    w.c["number"]
    w.c["list"]
    w.c["unsaved"]


def miss(w):
    w.c["large"]
    w.c["small3"]
    w.c["small4"]


def miss_what_is_not_there(w):
    with suppress(KeyError):
        w.c["nowhere"]
    w.c.get("nowhere")


def fill(w):
    for n in range(4):
        w.c[f"fill{n}"] = [n] * 60
        yield


def read_everything(w):
    for key in list(w.c):
        w.c[key]


def delete(w):
    del w.c["text"]


def delete_unsaved(w):
    w.c["fleeting"] = [1]
    yield
    del w.c["fleeting"]


def pop(w):
    w.c.pop("large")


def popitem(w):
    w.c.popitem()


def setdefault(w):
    w.c.setdefault("default", [1])


def setdefault_there(w):
    w.c.setdefault("list", []).append(6)


def grow(w):
    for n in range(3):
        w.c["list"].extend([n] * 30)
        yield


def flush(w):
    w.c.flush()


def move(w):
    for key in ("list", "number", "unsaved"):
        if key in w.c:
            w.c.move_to_disk(key)


def clear(w):
    w.c.clear()


def look(w):
    list(w.c)
    len(w.c)
    assert "nowhere" not in w.c
    dict(w.c.items())


def shrink(w):
    w.c.available_memory = 1000
    w.c.available_memory = 3000


def write_keys(w):
    w.c.write_keys()


@by_others
def start_records(w):
    w.c.update({n: [n, "x" * 20] for n in range(MANY + 20)})
    w.c.flush()
    w.c.available_memory = 1500


def change_each(w):
    for value in w.c.values():
        value.append(1)
        yield


# -- other chests


@by_others
def others_commit(w):
    w.other["theirs"] = w.other.get("theirs", []) + [3]
    w.other["their text"] = "t" * len(w.other["theirs"])
    w.other.pop("short", None)
    w.other.flush()
    w.other["short"] = 1
    w.other.flush()


@by_others
def others_clear(w):
    w.c.flush()  # all of it goes
    w.other.clear()
    w.other["theirs"] = [4]
    w.other.flush()


@by_others
def others_compact(w):
    for n in range(12):
        w.other["often"] = n
        w.other.flush()


def look_at_theirs(w):
    w.c.get("theirs")
    w.c.get("their text")
    w.c.get("short")


def set_often(w):
    w.c["often"] = ["x"] * len(w.c)
    yield
    w.c.flush()


@piecewise
def update(w):
    w.c.update({"p": 1, "q": [2], "list": [7], "large": b"M" * 140_000})


@piecewise
def update_from_chest(w):
    w.c.update(w.make({"r": b"r" * 100, "s": [3] * 10, "list": [8], "box": Box(9)}))


@piecewise
def update_from_stored(w):
    source = w.make({"r": b"r" * 100, "s": [3] * 10, "list": [8], "t": b"t" * 132_000})
    source.flush()
    w.c.update(source, overwrite=False)


def copy_away(w):
    w.c.copy()


def prefetch(w):
    w.c.prefetch([key for key in ("small1", "small2", "list") if key in w.c])


def prefetch_with_open_many(w):
    w.c.open_many = open_many
    prefetch(w)


@contextmanager
def open_many(paths, mode):
    with ExitStack() as stack:
        yield [stack.enter_context(open(path, mode)) for path in paths]


# -- transactions


def transact(w):
    with w.c.transaction():
        w.c["number"] = 10
        w.c["list"].append(10)
        w.c["in it"] = "n" * 1500
        w.c["box"] = Box(10)
        w.c.pop("text", None)
        w.c["large"] = b"X" * 140_000


def transact_with_json(w):
    with w.c.transaction():
        w.c["list"].append(10)
        w.c["in it"] = "n" * 3500
        w.c.pop("small2")


def transact_and_clear(w):
    with w.c.transaction(timeout=5):
        w.c["number"] = 11
        w.c.clear()
        w.c["only"] = [11]


def transact_and_give_up(w):
    with suppress(ZeroDivisionError):
        with w.c.transaction():
            w.c["number"] = 12
            w.c["list"].append(12)
            w.c["in it"] = "N" * 2500
            w.c.pop("small1", None)
            raise ZeroDivisionError


def transact_in_transaction(w):
    with w.c.transaction():
        w.c["number"] = 13
        with w.c.transaction():
            w.c["box"].items.append(13)
            w.c.flush()
        w.c["late"] = 13


# -- beginning and end


def close(w):
    w.c.close()


def reopen(w):
    w.c.close()
    w.c = w.open()


def use_with(w):
    w.c.flush()
    with w.open() as c:
        c["with"] = [1]


@piecewise
def open_with_data(w):
    w.c.close()
    w.c = w.open(data={"d": 1, "e": [2], "f": b"f" * 140_000})


def temporary(w):
    c = w.make({"x": [1] * 100, "y": b"y" * 140_000}, available_memory=500)
    c["x"]
    c.close()


def temporary_with(w):
    with w.make({"x": [1] * 100}, available_memory=0) as c:
        c["x"].append(1)
        c.flush()


STORIES = {
    "memory": ({}, [
        start, set_and_spill, set_a_list, set_large, change_in_place, hit, miss, set_again,
        overwrite, overwrite_large, fill, change_what_left, overwrite_list, read_everything,
        miss_what_is_not_there, setdefault, setdefault_there, shrink, move, grow, look, flush,
    ]),
    "keys that go": ({}, [
        begun, delete, delete_unsaved, write_keys, pop, popitem, set_again, flush, set_large,
        change_in_place, clear, set_again, flush, fill, clear, flush, look,
    ]),
    "records": ({}, [
        start_records, look, change_each, read_everything, set_a_list, change_each, flush,
        copy_away, look, update_from_stored,
    ]),
    "other chests": ({}, [
        begun, others_commit, look_at_theirs, change_in_place, set_and_spill, others_commit,
        miss, others_commit, look, others_clear, look, begun, update, update_from_chest,
        others_commit, update_from_stored, others_commit, prefetch, copy_away, move,
        prefetch_with_open_many, others_commit, flush,
    ]),
    "compaction": ({}, [
        begun, set_often, others_compact, look, set_often, delete, set_often, clear, set_often,
        set_often, others_compact, others_commit, set_often, set_often, set_often,
    ]),
    "transactions": ({}, [
        begun, transact, others_commit, transact_and_give_up, change_in_place,
        transact_in_transaction, fill, transact_and_clear, begun, transact,
    ]),
    "beginning and end": ({}, [
        begun, reopen, change_in_place, use_with, reopen, open_with_data, temporary,
        temporary_with, change_in_place, close,
    ]),
    "json, with fsync": ({"dump": json.dump, "load": json.load, "fsync": True}, [
        start_with_json, set_and_spill, overwrite_list, read_everything, fill, flush,
        transact_with_json, reopen,
    ]),
    "gzip": ({"open": gzip.open}, [
        begun, set_large, change_in_place, fill, read_everything, flush, reopen,
    ]),
    "old chest": ({"old": (os.path.join(OLD, "pickle"), OLD_CONTENT)}, [
        look, change_old, set_again, delete, flush, read_everything, transact_and_clear, reopen,
    ]),
    "no memory": ({"available_memory": 0}, [
        start, change_in_place, setdefault, setdefault_there, miss, hit, change_what_left,
        set_again, pop, transact, flush, update_from_stored, look, reopen, look,
    ]),
}  # fmt: skip
COMMITTING = {flush, reopen, set_often}  # at the end, everything
WAYS = ["go on", "keep", "close", "keep", "go on", "die"]


# -- doing it, and looking at what is left --------------------------------------------------------


class Broken(AssertionError):
    """A promise that was not kept: which, and how."""

    def __init__(self, what, how=""):
        super().__init__(f"{what}: {how}")
        self.what = what


@contextmanager
def promise(what):
    """Say which promise it was when something goes wrong."""
    try:
        yield
    except Broken:
        raise
    except Exception as error:
        raise Broken(what, f"{type(error).__name__}: {error}") from error


def do(step, w):
    """Do a step, and yield after each of its operations."""
    done = step(w)
    if done is not None:
        yield from done
    yield


class Story:
    """A story as it should go: what there is after each operation."""

    def __init__(self, name):
        self.options, self.steps = STORIES[name]
        self.moments = []  # of each step, what there was before it and after each operation
        twin = Twin(self.options)
        for step in self.steps:
            seen = [copy.deepcopy(twin.c)]
            seen += [copy.deepcopy(twin.c) for _ in do(step, twin)]
            self.moments.append(seen)

    def chapters(self):
        """Return the numbers of the steps that can be interrupted."""
        return [n for n, step in enumerate(self.steps) if not hasattr(step, "is_by_others")]

    def tell(self, folder, chapter):
        """Do all steps before one, uninterrupted."""
        w = World(os.path.join(folder, "chest"), **self.options)
        for step in self.steps[:chapter]:
            for _ in do(step, w):
                pass
        return w

    def points(self, folder, chapter):
        """Return the points of a step by place; of those in a loop the first two and the last."""
        w = self.tell(folder, chapter)
        with Interrupter() as interrupter:
            for _ in do(self.steps[chapter], w):
                pass
        w.die()
        turns = defaultdict(list)
        for n, point in enumerate(interrupter.points):
            turns[point].append(n)
        places = defaultdict(list)
        for point, each in turns.items():
            places[point[0], point[-1]] += sorted({*each[:2], each[-1]})
        return list(places.values())

    def interrupt(self, folder, chapter, at, way):
        """Raise at one point of a step, and look at what is left; return where that was.

        ``way`` tells how it goes on. With "keep" the traceback stays alive, as in an interactive
        Python, and with it whatever was on its way.
        """
        w = self.tell(folder, chapter)
        with silent() as lost:
            try:
                interrupter, done, kept = self._interrupt(w, chapter, at)
                if interrupter.where is None:
                    return None  # threads took other turns than when the points were counted
                if way != "keep" or is_before_an_exit(interrupter.where):
                    kept.clear()
                moments = self.moments[chapter]
                expected = moments[done : done + 2] if done + 1 < len(moments) else moments[-1:]
                try:
                    if len(expected) == 1 and not (lost or is_finalizer(interrupter.where)):
                        raise Broken("the interrupt gets out")
                    if way == "die":
                        self._examine_the_dead(w, chapter, expected)
                    else:
                        piecewise = hasattr(self.steps[chapter], "is_piecewise")
                        examine(w, expected, piecewise, way, kept, interrupter.where)
                except Broken as broken:
                    broken.where = interrupter.where
                    raise
            finally:
                w.die()
        return interrupter.where

    def _interrupt(self, w, chapter, at):
        done, kept = 0, []
        interrupter = Interrupter(at)
        try:
            with interrupter:
                for _ in do(self.steps[chapter], w):
                    done += 1
        except KeyboardInterrupt as error:
            kept.append(error)
        except Exception as error:
            broken = Broken("the interrupt gets out", f"{type(error).__name__}: {error}")
            broken.where = interrupter.where
            raise broken from error
        return interrupter, done, kept

    def _examine_the_dead(self, w, chapter, expected):
        """Look at what the next process finds, when this one ends without a last commit."""
        w.die()
        demand_closed(w.path)
        since = max((n for n in range(chapter) if self.steps[n] in COMMITTING), default=None)
        seen = [Plain()] if since is None else [self.moments[since][-1]]
        seen += [each for n in range((since or -1) + 1, chapter) for each in self.moments[n]]
        seen += [*self.moments[chapter][: -len(expected)], *expected]
        with promise("a new chest can read what was committed"), w.open() as c:
            found = content(c)
            wrong = {
                key: short(found.get(key, GONE))
                for key in {*found, *(key for each in seen for key in each)}
                if not any(found.get(key, GONE) == each.get(key, GONE) for each in seen)
            }
            if wrong:
                raise Broken("what was committed is there", wrong)
            c["last"] = 1
            c.flush()
            c._check()


@contextmanager
def silent():
    """Give what was raised where Python can only print it, as in a finalizer."""
    lost = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda told: lost.append(told.exc_type)
    try:
        yield lost
    finally:
        sys.unraisablehook = hook


def is_finalizer(where):
    """Tell whether nobody could have been told."""
    return any(call.endswith(" finish") for call in where)


def is_before_an_exit(where):
    """Tell whether a transaction was not left: it is when the traceback goes.

    Python looks for signals as it enters ``__exit__``, before the first line of it. Of all other
    blocks the operation around them clears the frames.
    """
    if where[0] != "enter in" or not re.match(r"(blocks|contextlib)\.py:.* __exit__", where[1]):
        return False
    return not where[2:] or re.match(r"test_interrupts\.py:|memory\.py:.* transaction$", where[2])


def is_unknown(where):
    """Tell whether a temporary directory was not known yet, or known to nobody any more."""
    ends = r"tempfile.py:.* mkdtemp|memory.py:.* drop_open"
    return any(re.match(ends, call) for call in where[1:4])


def examine(w, expected, piecewise, way, kept, where):
    """Look at what an interrupt left, first with the chest that met it, then with a new one."""
    c, other = w.c, w.other
    if is_before_an_exit(where) and not c.closed:
        len(c)  # what was left in a transaction is taken back with the next operation
    with promise("no lock is held"):
        assert not c.lock._is_owned(), "that of the chest"
        assert not other.lock._is_owned(), "that of the other chest"
        assert can_lock(w.path), "that of the file"
        with other.transaction(timeout=0.1):
            other["probe"] = 1
    for each in w.chests:
        if each is not c and each is not other:
            with promise("a chest on the side can be closed"):
                each.close()
    if not c.closed and way != "close":
        with promise("every value can be read"):
            found = in_a_thread(content, c)
        compare("what the chest holds", found, expected, piecewise)
        with promise("it can be flushed"):
            c["later"] = [1]
            c.flush()
        found["later"] = [1]
        expected, piecewise = [found], False
        with promise("every invariant holds after a flush"):
            c._check()
        compare("what another chest sees", content(other), expected)
        compare("what the chest holds after a flush", content(c), expected)
    with promise("it can be closed"):
        c.close()
    with promise("the other can be closed"):
        other.close()
    kept.clear()
    demand_closed(w.path)
    with promise("it can be opened again"):
        with w.open() as again:
            compare("what a new chest finds", content(again), expected, piecewise)
            again["last"] = 1
            again.flush()
            again._check()
    left = os.listdir(w.temporary)
    if left and not is_unknown(where):
        raise Broken("no temporary directory stays", left)


def demand_closed(path):
    for thread in threading.enumerate():  # a chest may be closed in another one
        if thread.name.endswith("(finish)"):
            thread.join(3)
    left = open_files(path)
    if left:
        gc.collect()
        left = open_files(path)
    if left:
        raise Broken("no file stays open", left)


def can_lock(path):
    """Tell whether a process that opens the index could lock it."""
    fd = os.open(os.path.join(path, ".keys"), os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(fd)


def in_a_thread(function, *args):
    """Call a function in another thread: it must not wait for this one."""
    results = []

    def call():
        try:
            results.append(function(*args))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(3)
    if not results:
        raise TimeoutError("another thread waits for ever")
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def content(c):
    found = {key: c[key] for key in list(c)}
    found.pop("probe", None)
    return found


def compare(what, found, expected, piecewise=False):
    if found in expected:
        orders = [list(each) for each in expected if each == found]
        if list(found) not in orders and "theirs" not in found:
            raise Broken(what + ", in order", f"{list(found)}, not {orders}")
        return
    before, after = expected[0], expected[-1]
    wrong = {
        key: [short(each.get(key, GONE)) for each in (found, before, after)]
        for key in {*found, *before, *after}
        if found.get(key, GONE) not in (before.get(key, GONE), after.get(key, GONE))
    }
    if wrong or not piecewise:
        raise Broken(what, wrong or "half of what the operation does")


def short(value):
    return repr(value)[:40]


def open_files(path):
    folder = "/proc/self/fd"
    found = []
    for number in os.listdir(folder) if os.path.isdir(folder) else ():
        with suppress(OSError):
            target = os.readlink(f"{folder}/{number}")
            if target.startswith(path):
                found.append(target)
    return found


# -- whether signals are looked for there ---------------------------------------------------------


class Signal(int):
    """A number of a signal, that is sent by looking at `send`: no call of this module's."""

    send = property(_thread.interrupt_main)


class Small:
    def __init__(self):
        self.lock = threading.RLock()
        self.items = []

    def add(self, n):
        with self.lock:
            self.items.append(n)

    @contextmanager
    def block(self):
        try:
            yield self
        finally:
            self.add(-1)


def countdown(n):
    while n > 0:
        n -= 1
        yield n


def use_everything():
    with Small().block() as small:
        for n in countdown(2):
            small.add(n)
    numbers = sorted(small.items, key=lambda n: -n)
    for _ in range(2):
        try:
            numbers.remove(7)
        except ValueError:
            numbers += [*countdown(1)]
    return max(*numbers, *list(countdown(2))), set(numbers), [n for n in numbers if n]


def is_small(code):
    return code.co_filename in (__file__, contextmanager.__code__.co_filename)


def place(code, instruction):
    """Return a line: the instructions differ a little from version to version."""
    lines = [line for start, end, line in code.co_lines() if start <= instruction < end]
    return code.co_qualname, *lines


def send_signal_at(n):
    """Send a signal at the n-th instruction; return whether there are so many, and the place."""
    passed = 0

    def trace(frame, event, arg):
        nonlocal passed
        if not is_small(frame.f_code):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            passed += 1
            if passed == n:
                sys.settrace(None)
                return Signal(2).send  # the last thing: here nobody looks for it any more
        return trace

    try:
        sys._getframe().f_trace_opcodes = True
        sys.settrace(trace)
        use_everything()
        sys.settrace(None)
    except KeyboardInterrupt as error:
        last = error.__traceback__
        while last.tb_next is not None:
            last = last.tb_next
        return True, (last.tb_frame.f_code, last.tb_lasti)
    return passed >= n, None


@pytest.fixture
def _signals():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_signals")
def test_the_points_are_those_where_a_signal_raises():
    with Interrupter(watches=is_small) as interrupter:
        use_everything()
    points = {place(*point[0]) for point in interrupter.points}
    places = set()
    with silent():
        for n in count(1):
            sent, where = send_signal_at(n)
            if not sent:
                break
            if where is not None and is_small(where[0]) and where[0].co_name != "send_signal_at":
                places.add(place(*where))
    assert len(places) > 20
    assert places - points == set()
    # More only here: where it begins and ends, and where a generator is made but not begun.
    assert {name for name, *_ in points - places} <= {
        "use_everything", "_GeneratorContextManagerBase.__init__",
        "Interrupter.__enter__", "Interrupter.__exit__",
    }  # fmt: skip


# -- the tests ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _small_log(monkeypatch):
    """Let the index be compacted often, and temporary chests be where the story wants them."""
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 500)
    monkeypatch.setattr(tempfile, "tempdir", tempfile.gettempdir())
    monkeypatch.setattr(os, "fsync", os.fstat)  # as good to be interrupted at, and faster
    logging.getLogger("chest").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("chest").setLevel(logging.NOTSET)


def sample(story, folders):
    """Yield the points to take, as step, number and the way to go on."""
    choice = random.Random(1)
    chapters = story.chapters()
    part = None
    if POINTS == "all" or "/" in POINTS:
        part, parts = map(int, (POINTS if "/" in POINTS else "1/1").split("/"))
    else:
        chapters = sorted(choice.sample(chapters, min(STEPS, len(chapters))))
    for chapter in chapters:
        places = story.points(next(folders), chapter)
        if part is None:
            each = int(POINTS) // (STEPS * len(STORIES))
            places = choice.sample(places, min(each, len(places)))
            points = [choice.choice(place) for place in places]
        else:
            points = [point for place in places for point in place if point % parts == part % parts]
        for point in sorted(points):
            yield chapter, point, WAYS[point % len(WAYS)]


@pytest.fixture
def folders(tmp_path):
    return (str(path) for n in count() if not (path := tmp_path / str(n)).mkdir())


@pytest.mark.parametrize("name", STORIES)
def test_an_interrupt_leaves_nothing_lost_locked_or_left_behind(name, folders):
    story = Story(name)
    broken = []
    for chapter, point, way in sample(story, folders):
        folder = next(folders)
        try:
            story.interrupt(folder, chapter, point, way)
        except Broken as error:
            step = story.steps[chapter].__name__
            where = "\n        ".join(error.where[:8])
            broken.append(f"{error}\n    {step}, {point}, {way}: {where}")
        finally:
            shutil.rmtree(folder)
    assert not broken, f"{len(broken)} points:\n" + "\n".join(broken[:10])


# -- at one place ----------------------------------------------------------------------------------


@contextmanager
def interrupted_after(name, caller, times=1):
    """Interrupt this thread where a C function returns to a function, the n-th time."""

    def profile(frame, event, arg):
        nonlocal times
        if event == "c_return" and arg.__name__ == name and frame.f_code.co_name == caller:
            times -= 1
            if not times:
                sys.setprofile(None)
                raise KeyboardInterrupt

    try:
        sys.setprofile(profile)
        yield
    finally:
        sys.setprofile(None)


def test_who_is_interrupted_before_a_packed_value_is_read_keeps_no_other_from_it(path):
    values = {str(n): f"value {n}" for n in range(200)}
    with Chest(values, path):
        pass
    with Chest(path=path) as c:
        c["0"], c["1"]  # from here on the pack is open
        with pytest.raises(KeyboardInterrupt), interrupted_after("setdefault", "_get_packed"):
            c["7"]
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(c.__getitem__, "7").result(10) == "value 7"
        c._check()


def test_who_is_interrupted_while_it_waits_for_another_load_has_the_lock_again(path):
    reading, leave = threading.Event(), threading.Event()

    def load(file):
        value = pickle.load(file)
        reading.set()
        assert leave.wait(10)
        return value

    with Chest({"slow": [1]}, path):
        pass
    with Chest(path=path, load=load, dump=pickle.dump) as c, ThreadPoolExecutor(1) as pool:
        other = pool.submit(c.__getitem__, "slow")
        assert reading.wait(10)
        with pytest.raises(KeyboardInterrupt), interrupted_after("_release_save", "wait"):
            c["slow"]
        leave.set()
        assert other.result(10) == [1]
        c._check()


@pytest.mark.parametrize("name", ["start", "join", "start_new_thread"])
@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_prefetch_that_is_interrupted_ends(path, name, times):
    with Chest({n: [n] * 1000 for n in range(40)}, path):
        pass
    before = threading.enumerate()
    with Chest(path=path) as c:
        with suppress(KeyboardInterrupt):
            for caller in ("_fetch_in_threads", "start"):
                with interrupted_after(name, caller, times):
                    c.prefetch(range(40))
        assert dict(c) == {n: [n] * 1000 for n in range(40)}
        c._check()
    for thread in threading.enumerate():
        if thread not in before:
            thread.join(10)


def test_an_interrupt_around_a_transaction_locks_nobody_out_while_its_traceback_lives(path):
    with ExitStack() as stack:
        c = stack.enter_context(Chest({"n": 0}, path))
        other = stack.enter_context(Chest(path=path))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        stack.enter_context(silent())  # of files that were just opened
        c.flush()
        kept, tried = [], set()
        for at in count(0, 1 if POINTS == "all" else 4):
            interrupter = Interrupter(at)
            before = c["n"]
            try:
                with interrupter, c.transaction():
                    c["n"] = before + 1
            except KeyboardInterrupt as error:
                kept.append(error)
            if interrupter.where is None:
                break
            if is_before_an_exit(interrupter.where):
                kept.clear()
            elif interrupter.where[1:]:  # else it was in the test
                tried.add(interrupter.where[1])
            assert pool.submit(c.__getitem__, "n").result(10) in (before, before + 1)
            c["handled"] = at
            c.flush()
            with other.transaction(timeout=1):
                assert other["handled"] == at, interrupter.where
                assert other["n"] in (before, before + 1)
            c._check()
        assert c["n"] == before + 1
        kept.clear()
        gc.collect()
    assert len(tried) > 20
    assert any(place.endswith(" __enter__") and place.startswith("blocks.py") for place in tried)


def test_an_interrupt_as_a_block_or_a_compaction_ends_locks_nobody_out(folders):
    """Neither others while its traceback lives, nor this chest later on."""

    def compact(interrupter):
        path, kept = next(folders), []
        with Chest({"n": [0]}, path) as c, Chest(path=path) as other:
            c.flush()
            c["n"] = [1]
            try:
                with interrupter:
                    c.compact()
            except KeyboardInterrupt as error:
                kept.append(error)
            with other.transaction(timeout=0):
                other["probe"] = 1
        with Chest(path=path) as c:
            assert dict(c) == {"n": [1], "probe": 1}, interrupter.where
            c._check()

    def is_one(code, *callers):
        return code is Block.__exit__.__code__ or Index.replace.__code__ in (code, *callers)

    with silent():
        compact(counting := Interrupter())
        points = [[code for code, _ in calls] for *calls, _ in counting.points]
        chosen = [n for n, codes in enumerate(points) if is_one(*codes)]
        assert len(chosen) > 50
        for at in chosen:
            compact(Interrupter(at))


def test_an_update_that_is_interrupted_after_its_commit_leaves_no_old_value_in_memory(path):
    with Chest({"a": "old", "b": "old"}, path) as c, Chest({"a": "new", "b": "new"}) as new:
        c.flush()
        new.flush()
        with pytest.raises(KeyboardInterrupt), interrupted_after("pop", "_forget"):
            c.update(new)
        assert dict(c) == {"a": "new", "b": "new"}
        c["a"] = "newer"
        c.flush()  # which removes the old files
        c._check()


@pytest.mark.parametrize("change", ["set", "replace", "get"])
def test_a_change_in_hand_outlives_an_interrupt_as_its_value_becomes_resident(path, change):
    do = {
        "set": lambda c: c.update(b=2),
        "replace": lambda c: c.update(a="new"),
        "get": lambda c: c["a"],
    }[change]
    interrupted = 0
    for times in count(1):
        with Chest({"a": [1]}, path, available_memory=0) as c:
            c["a"] = [1]
            c.flush()
            c["a"].append(times)  # it is in hand alone
            c.available_memory = 1000
            try:
                with interrupted_after("pop", "_keep_no_more", times):
                    do(c)
            except KeyboardInterrupt:
                interrupted += 1
            else:
                break
            assert c["a"] in ([1, times], "new")
            c._check()
    assert interrupted


@pytest.mark.parametrize("where", [("close", "close"), ("rmdir", "drop")])
def test_a_drop_that_is_interrupted_at_its_end_leaves_a_closed_chest(path, where):
    with Chest({"a": [1]}, path) as c:
        c.flush()
        with pytest.raises(KeyboardInterrupt), interrupted_after(*where):
            c.drop()
        assert c.closed
    assert not os.path.exists(path)
    with Chest(path=path) as c:
        assert dict(c) == {}


@pytest.mark.parametrize("name", ["open", "extend"])
def test_a_folder_whose_sync_is_interrupted_does_not_stay_open(path, name):
    with Chest({"a": [1]}, path, fsync=True) as c:
        with suppress(KeyboardInterrupt), interrupted_after(name, "sync_folder"):
            c.flush()
        assert path not in open_files(path)
        c.flush()
        c._check()


def test_an_interrupt_as_a_pack_is_begun_leaves_no_file(path, monkeypatch):
    def interrupted(file):
        monkeypatch.undo()
        raise KeyboardInterrupt

    with Chest({n: n for n in range(100)}, path) as c, silent():
        c.flush()
        c.update({n: -n for n in range(50)})
        monkeypatch.setattr(chest.staging, "keep_from_children", interrupted)
        with pytest.raises(KeyboardInterrupt):
            c.compact()
        c._check()
        assert not [name for name in os.listdir(path) if name.startswith(".new")]


def test_an_interrupt_as_the_watch_of_hands_ends_leaves_none():
    hands = Hands()
    with pytest.raises(KeyboardInterrupt), interrupted_after("pop", "watched"):
        with hands.watched(["a"]):
            hands.swap("a", [1])
    for n in range(3):
        hands.swap("a", [n])
    assert not hands._dropped


def test_no_interrupt_comes_as_a_pack_is_closed(path):
    def profile(frame, event, arg):
        if event == "call" and frame.f_code.co_name == "__del__":
            raise KeyboardInterrupt

    with Chest({n: n for n in range(100)}, path):
        pass
    with Chest(path=path) as c, silent():
        assert c[1] == 1  # from here on the pack is open
        c.update({n: -n for n in range(50)})
        sys.setprofile(profile)
        try:
            c.compact()
        finally:
            sys.setprofile(None)
        assert not [name for name in open_files(path) if "deleted" in name]


def interrupt_next(monkeypatch, owner, name):
    """Interrupt this thread as it calls a method the next time, before that does anything."""
    method = getattr(owner, name)

    def interrupted(*args, **options):
        monkeypatch.setattr(owner, name, method)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)


def test_a_deletion_that_is_interrupted_as_it_looks_at_what_was_lent(path, monkeypatch):
    with Chest({"a": [1], "b": [2], "c": 3}, path, available_memory=0) as c:
        value = c["a"]
        value.append("change")
        c["b"]
        del value
        interrupt_next(monkeypatch, Eviction, "enroll")
        with pytest.raises(KeyboardInterrupt):
            del c["c"]
        assert dict(c) == {"a": [1, "change"], "b": [2], "c": 3}
        c._check()


@pytest.mark.parametrize("step", ["due", "alone", "watched", "kept_small", "forget", "_discount"])
def test_what_was_lent_is_kept_at_an_interrupt(path, monkeypatch, step):
    """Nobody else refers to it."""
    with Chest(path=path, available_memory=0) as c:
        c.setdefault("box", Box(1)).items.append(2)
        before = getattr(Hands, step)
        interrupt_next(monkeypatch, Hands, step)
        with suppress(KeyboardInterrupt):
            c["x"] = [1]
            c["y"] = [1]
            c["x"]
        assert getattr(Hands, step) is before
        gc.collect()
        assert c["box"] == Box(1, 2)
        c._check()


def test_what_is_lent_and_handed_out_again_is_kept_at_an_interrupt(path, monkeypatch):
    with Chest({"a": [1], "b": [2]}, path, available_memory=0) as c:
        value = c["a"]
        value.append("change")
        interrupt_next(monkeypatch, Hands, "_discount")
        with pytest.raises(KeyboardInterrupt):
            c["a"]
        assert c["a"] == [1, "change"]
        c._check()


def test_an_update_that_is_interrupted_as_a_heap_changes_tells_of_nothing_else(path, monkeypatch):
    with Chest({"a": bytes(140_000), "b": bytes(160_000)}) as other, Chest(path=path) as c:
        c.update({"a": bytes(180_000), "b": bytes(180_000), "c": bytes(180_000)})
        popitem = heapdict.popitem

        def interrupted(self):
            monkeypatch.setattr(heapdict, "popitem", popitem)
            self.heap.clear()
            raise KeyboardInterrupt

        monkeypatch.setattr(heapdict, "popitem", interrupted)
        with pytest.raises(KeyboardInterrupt):
            c.update(other)
        assert dict(c) == {**other, "c": bytes(180_000)}
        c._check()
