"""Chests in several processes: pickled, forked, killed, and all at once on one directory.

``CHEST_SOAK=60`` lets the processes of the last test go on for that many seconds; its seed is
printed, and ``CHEST_SEED=1234`` chooses it.
"""

from __future__ import annotations

import copy
import errno
import gc
import json
import logging
import mmap
import operator
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from multiprocessing import Pipe, get_all_start_methods
from pathlib import Path

import pytest

import chest
import chest.directory
import chest.head
import chest.index
import chest.reading
import chest.sizes
import chest.upkeep
from chest import Chest, ChestClosedError, ReadOnlyError, UnsavedError

ROOT = Path(chest.__file__).parent.parent
SOAK = float(os.environ.get("CHEST_SOAK", "2.5"))
SHORT = "/tmp" if os.path.isdir("/tmp") else None
METHODS = get_all_start_methods()
PICKLING = [method for method in METHODS if method != "fork"]  # also what a Process is given

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
# Since Python 3.12 each fork of a process with threads is warned of; they are what is tested.
DROPPED = "ignore:a chest was not closed:ResourceWarning"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings(DROPPED),
]


# -- children of the test itself -----------------------------------------------------------------


class Elsewhere:
    """A forked child that does what it is told, with the chest ``c`` and other names of its own."""

    def __init__(self, names):
        self._pipe, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._pipe.close()
            _obey(theirs, names)
        theirs.close()

    def __call__(self, code):
        self.start(code)
        return self.result()

    def start(self, code):
        self._pipe.send(code)

    def result(self):
        assert self._pipe.poll(30), "the child does not answer"
        done, value = self._pipe.recv()
        if not done:
            raise value
        return value

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self):
        self._pipe.close()
        _, status = os.waitpid(self.pid, 0)
        self.pid = None
        return os.waitstatus_to_exitcode(status)


def _obey(pipe, names):
    while True:
        try:
            code = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            try:
                answer = True, eval(code, names)
            except SyntaxError:
                answer = True, exec(code, names)
        except BaseException as error:
            answer = False, error
        pipe.send(answer)


@pytest.fixture
def elsewhere():
    """Start children; whichever are left at the end of the test are killed."""
    children = []

    def start(path=None, **names):
        names |= {"Chest": Chest, "os": os, "sys": sys}
        children.append(Elsewhere(names))
        if path is not None:
            children[-1](f"c = Chest(path={os.fspath(path)!r})")
        return children[-1]

    yield start
    for child in children:
        if child.pid is not None:
            child.kill()


running = set()


@contextmanager
def forked(function):
    """Run a function in a child that ends without a word if it returns; give its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    running.add(pid)
    try:
        yield pid
    finally:
        if pid in running:
            os.kill(pid, signal.SIGKILL)
            exit_of(pid)


def exit_of(pid):
    """Wait for a child; return its exit code, negative for a signal."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            running.discard(pid)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    raise AssertionError("the child does not end")


def in_child(function):
    """Run a function in a forked child, which has to return."""
    with forked(function) as pid:
        assert exit_of(pid) == 0


def strays(path):
    """Return the files that a killed process may leave for an hour, and remove them."""
    left = [name for name in os.listdir(path) if name.startswith(".new-")]
    for name in left:
        os.unlink(os.path.join(path, name))
    return left


# -- children that are programs ------------------------------------------------------------------

TASKS = """
    import multiprocessing
    import os
    import sys
    import threading

    from chest import Chest

    PATH = os.environ["CHEST_TEST_PATH"]
    of_all = Chest(path=PATH + "-global")

    class Named(Chest):
        def __init__(self, name, path):
            super().__init__(path=path)
            self.name = name

    def use(c, named, within):
        assert c == {"x": [1]}
        assert (c.available_memory, c.note, c.closed) == (1000, "mine", False)
        assert (type(named), named.name, named["n"]) == (Named, "n", 1)
        assert within["chests"][0] == c
        c["x"].append(2)
        c["set"] = [3]
        named["set"] = [4]
        of_all["set"] = [5]

    def use_temporary(t):
        assert t == {"t": [1]}
        t["set"] = [2]

    def put(c, key, end):
        c[key] = [key]
        end()

    def end_normally():
        pass

    def leave():
        sys.exit(0)

    def leave_with_status():
        raise SystemExit(3)

    def die():
        os._exit(4)

    def outlive(c):
        go = threading.Event()

        def later():
            go.wait(0.3)  # nobody sets it: the main thread is gone by then
            c["of a thread"] = [6]

        threading.Thread(target=later).start()

    def fork(c):
        pid = os.fork()
        c["of a fork" if pid == 0 else "of a child"] = [7]
        if pid == 0:
            if os.fork() == 0:
                c["of a fork's fork"] = [8]
                sys.exit()
            os.wait()
            sys.exit()
        assert os.waitpid(pid, 0)[1] == 0

    def lend(method):
        context = multiprocessing.get_context(method)
        context.Process(target=wait_and_read, args=[Chest({"lent": [9]})]).start()

    def wait_and_read(t):
        threading.Event().wait(0.3)
        print(t["lent"], os.path.isdir(t.path), flush=True)

    def begin(c):
        global given
        given = c

    def keep(n):
        given["kept", n] = [n]
        return len(given)

    def give_back(n):
        global mine
        mine = Chest({"n": [n]})
        return mine

    def read(t):
        return dict(t)
    """


@pytest.fixture
def run(tmp_path):
    """Run a script in a new process, as a main module whose functions are in `tasks`.

    It knows `PATH`, and `METHOD` to start others. Temporary chests must be gone when it has ended,
    and nothing may have been told on stderr.
    """
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "tasks.py").write_text(textwrap.dedent(TASKS))
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    path = str(tmp_path / "chest")

    def run(script, *, method=None, first="", said="", status=0):
        file = folder / "script.py"
        body = textwrap.indent(textwrap.dedent(script), "    ")
        file.write_text(
            f"{first}\nimport multiprocessing, os, pickle, sys, threading\n"
            f"from chest import Chest\nimport tasks\n\nPATH = {path!r}\n"
            f"if __name__ == '__main__':\n    context = multiprocessing.get_context({method!r})\n"
            "    def started(target, *args):\n"
            "        process = context.Process(target=target, args=args)\n"
            "        process.start()\n"
            "        return process\n\n"
            "    def exit_of(target, *args):\n"
            "        process = started(target, *args)\n"
            "        process.join()\n"
            f"        return process.exitcode\n\n{body}"
        )
        command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning"]
        command += ["-W", DROPPED, str(file)]
        # A short name: a server of forks has a socket there.
        with tempfile.TemporaryDirectory(prefix="c", dir=SHORT) as temporary:
            mine = {"TMPDIR": temporary, "PYTHONPATH": modules, "CHEST_TEST_PATH": path}
            env = {**os.environ, **mine}
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50)
            assert (done.returncode, done.stderr) == (status, ""), done.stderr
            # In any order: some scripts start processes that run side by side.
            assert sorted(done.stdout.splitlines()) == sorted(said.splitlines())
            assert [name for name in os.listdir(temporary) if name.endswith(".chest")] == []

    return run


# -- pickling ------------------------------------------------------------------------------------


class Labelled(Chest):
    """Chests with an attribute, and another signature than that of `Chest`."""

    def __init__(self, label):
        super().__init__()
        self.label = label


def count_one(value):
    return 1


class Recorder:
    """Notes the keys that it is called with, and stays itself when pickled."""

    keys = []

    def __call__(self, key):
        self.keys.append(key)

    def __eq__(self, other):
        return isinstance(other, Recorder)

    __hash__ = None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_flushed_and_loads_as_another_handle(path, protocol):
    with Chest({"x": [1]}, path) as c:
        c["x"].append(2)
        data = pickle.dumps(c, protocol)
        with Chest(path=path, readonly=True) as reader:
            assert reader == {"x": [1, 2]}
        with pickle.loads(data) as d:
            assert d is not c
            assert d.lock is not c.lock
            assert (d.path, d, d.inmem) == (c.path, {"x": [1, 2]}, {"x": [1, 2]})
            d["y"] = [3]
            assert "y" not in c
            d.flush()
            assert c["y"] == [3]
            assert c.key_to_filename("y") == d.key_to_filename("y")
        assert not c.closed
        c._check()


def test_what_is_loaded_has_the_same_options(path):
    options = {
        "available_memory": 1e6,
        "dump": json.dump,
        "load": json.load,
        "key_to_filename": operator.methodcaller("lower"),
        "on_miss": Recorder(),
        "on_overflow": Recorder(),
        "nbytes": count_one,
        "writeback": False,
        "fsync": True,
        "mode": "t",
    }
    with Chest(path=path, **options) as c:
        c["X"] = [1]
        c["Y"] = [1]
        with pickle.loads(pickle.dumps(c)) as d:
            assert d["X"] == [1]
            assert Recorder.keys == ["X"]
            assert os.path.basename(d.key_to_filename("Z")) == "z"
            mine, theirs = c._arguments(), d._arguments()
            del mine["key_to_filename"], theirs["key_to_filename"]
            assert theirs == mine
            assert d.memory_usage == 1
            d["X"].append(2)  # not to be found: writeback=False
            d.flush()
            assert Path(d.key_to_filename("X")).read_text() == "[1]"
    Recorder.keys.clear()


def test_a_pickled_reader_stays_a_reader(path):
    with Chest({"x": [1]}, path):
        pass
    with Chest(path=path, readonly=True) as c, pickle.loads(pickle.dumps(c)) as d:
        assert d["x"] == [1]
        with pytest.raises(ReadOnlyError):
            d["y"] = 1


def test_a_subclass_keeps_its_attributes_and_needs_no_arguments():
    with Labelled("mine") as c:
        c["x"] = [1]
        c.more = [c.label]
        with pickle.loads(pickle.dumps(c)) as d:
            assert (type(d), d.label, d.more, d) == (Labelled, "mine", ["mine"], {"x": [1]})
            assert d.more is not c.more
        c.drop()


def test_a_chest_pickles_inside_other_objects_and_once(path):
    with Chest({"x": [1]}, path) as c:
        first, within = pickle.loads(pickle.dumps([c, {"again": (c, c)}]))
        assert within["again"] == (first, first)
        assert within["again"][0] is within["again"][1] is first
        assert first == c
        first.close()


def test_what_cannot_be_saved_cannot_be_pickled(path):
    with Chest({"x": [1], "f": lambda: 1}, path) as c:
        with pytest.raises(UnsavedError) as caught:
            pickle.dumps(c)
        assert caught.value.keys == ["f"]
        del c["f"]
        with pickle.loads(pickle.dumps(c)) as d:
            assert d == {"x": [1]}


@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_closed_chest_cannot_be_pickled(path, end):
    c = Chest({"x": [1]}, path)
    getattr(c, end)()
    with pytest.raises(ChestClosedError):
        pickle.dumps(c)


@pytest.mark.parametrize("gone", ["dropped", "removed", "emptied"])
def test_a_pickle_of_a_chest_that_is_gone_says_so_and_makes_nothing(tmp_path, path, gone):
    with Chest({"x": [1]}, path) as c:
        data = pickle.dumps(c)
    if gone == "dropped":
        Chest(path=path).drop()
    else:
        shutil.rmtree(path)
    if gone == "emptied":
        os.mkdir(path)
    with pytest.raises(FileNotFoundError, match="dropped") as caught:
        pickle.loads(data)
    assert caught.value.filename == path
    assert [*tmp_path.rglob("*")] == ([Path(path)] if gone == "emptied" else [])


def test_a_deep_copy_is_temporary_and_independent(path):
    inner = [1]
    with Chest({"x": inner, "y": [inner]}, path, 1e6) as c, copy.deepcopy(c) as d:
        assert d == c
        assert (d.path != c.path, d.available_memory) == (True, 1e6)
        assert d["x"] is not c["x"]
        d["x"].append(2)
        c["y"] = [3]
        del d["y"]
        d.flush()
        assert (c, d) == ({"x": [1], "y": [3]}, {"x": [1, 2]})
        where = d.path
    assert not os.path.exists(where)


def test_a_lent_temporary_chest_outlives_its_handle_but_not_its_drop():
    c = Chest({"x": [1]})
    data, path = pickle.dumps(c), c.path
    c.close()
    with pickle.loads(data) as d:
        assert d == {"x": [1]}
    del c, d
    gc.collect()
    e = pickle.loads(data)
    assert (e.path, e) == (path, {"x": [1]})
    e.drop()
    assert not os.path.exists(path)
    with pytest.raises(FileNotFoundError):
        pickle.loads(data)


@pytest.mark.parametrize("early", ["", "import weakref; weakref.finalize(weakref, int)"])
def test_a_lent_temporary_chest_goes_in_silence_at_the_end_of_the_program(run, early):
    """Also where the functions to be called at exit come in another order."""
    run(
        """
        c = Chest({'x': [1]})
        d = pickle.loads(pickle.dumps(c))
        e = pickle.loads(pickle.dumps(d))
        c['c'], d['d'], e['e'] = 1, 2, 3
        del e
        print(sorted(c), d['e'])
        """,
        first=early,
        said="['c', 'e', 'x'] 3\n",
    )


def test_a_chest_that_holds_itself_is_saved_and_found_again(run):
    """As a handle on its own directory; not one of these steps may go round in circles."""
    run(
        """
        c = Chest(path=PATH)
        c['a'] = c['b'] = c
        c['list'], c['x'] = [c, c], [1]
        c.flush()
        c['x'].append(2)
        c.flush()
        with c.transaction():
            c['y'] = 3
        c.available_memory = 0
        c.close()
        c = Chest(path=PATH, available_memory=0)
        a = c['a']
        a['z'] = 4
        a.flush()
        print(c['x'], c['y'], c['z'], c['list'][0]['x'])
        """,
        said="[1, 2] 3 4 [1, 2]\n",
    )


def test_two_chests_that_hold_each_other_are_saved(run):
    run(
        """
        a, b = Chest(path=PATH + '-a'), Chest(path=PATH + '-b')
        a['b'], b['a'], a['more'], b['more'] = b, a, [b, b], [a, a]
        a['x'], b['x'] = 'in a', 'in b'
        a.flush()
        b.flush()
        a.flush()
        print(Chest(path=PATH + '-a')['b']['x'], Chest(path=PATH + '-b')['a']['x'])
        """,
        said="in b in a\n",
    )


# -- other processes, however they are started ---------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_chests_are_handed_to_a_process_and_what_it_sets_is_saved(run, method):
    run(
        """
        c = Chest({'x': [1]}, PATH, 1000)
        c.note = 'mine'
        named = tasks.Named('n', PATH + '-named')
        named['n'] = 1
        for chest in c, named:
            chest.flush()  # fork pickles no argument
        context.set_forkserver_preload(['tasks']) if hasattr(os, 'fork') else None
        assert exit_of(tasks.use, c, named, {'chests': [c]}) == 0
        print(c['x'], c['set'], named['set'], tasks.of_all['set'])
        """,
        method=method,
        said="[1, 2] [3] [4] [5]\n",
    )


@pytest.mark.parametrize("method", PICKLING)
def test_a_temporary_chest_is_handed_to_a_process(run, method):
    run(
        """
        t = Chest({'t': [1]})
        assert exit_of(tasks.use_temporary, t) == 0
        print(dict(t))
        """,
        method=method,
        said="{'t': [1], 'set': [2]}\n",
    )


@pytest.mark.parametrize("method", METHODS)
def test_what_a_process_sets_is_saved_however_it_ends_normally(run, method):
    run(
        """
        c = Chest(path=PATH)
        ends = [tasks.leave, tasks.leave_with_status, tasks.die]
        processes = [started(tasks.put, c, end.__name__, end) for end in ends]
        processes.append(started(tasks.outlive, c))
        if hasattr(os, 'fork'):
            processes.append(started(tasks.fork, c))
        for process in processes:
            process.join()
        print([process.exitcode for process in processes][:4])
        print(*sorted(c), sep=', ')
        """,
        method=method,
        said="[0, 3, 4, 0]\n"
        + ", ".join(
            ["leave", "leave_with_status"]
            + ["of a child", "of a fork", "of a fork's fork"] * hasattr(os, "fork")
            + ["of a thread\n"]
        ),
    )


@pytest.mark.parametrize("method", METHODS)
def test_pools_and_queues_take_chests(run, method):
    run(
        """
        from concurrent.futures import ProcessPoolExecutor

        c = Chest({'x': [1]}, PATH)
        c.flush()  # fork pickles no argument
        with context.Pool(1, tasks.begin, [c]) as pool:
            print(pool.map(tasks.keep, range(3), 3))
            print(pool.apply(tasks.read, [c])['x'])
            t = pool.apply(tasks.give_back, [1])
            print(t['n'], os.path.isdir(t.path))
            pool.close()
            pool.join()
        print(os.path.isdir(t.path))
        t.close()
        with ProcessPoolExecutor(1, context, tasks.begin, [c]) as pool:
            print([*pool.map(tasks.keep, range(3, 6))])
        queue = context.SimpleQueue()
        queue.put({'c': c})
        print(len(queue.get()['c']), len(c))
        queue.close()
        """,
        method=method,
        said="[2, 3, 4]\n[1]\n[1] True\nFalse\n[5, 6, 7]\n7 7\n",
    )


@pytest.mark.parametrize("first", ["", "import multiprocessing.util"])
@pytest.mark.parametrize("method", PICKLING)
def test_a_lent_temporary_chest_stays_while_its_owner_waits_for_who_has_it(run, method, first):
    """At the end of the program, and at that of a child; neither joins what it started."""
    run(
        """
        c = Chest({'lent': [1]})
        started(tasks.wait_and_read, c)
        assert exit_of(tasks.lend, context.get_start_method()) == 0
        """,
        method=method,
        first=first,
        said="[1] True\n[9] True\n",
    )


@needs_fork
def test_forks_of_forks_save_what_they_set(run):
    run(
        """
        c = Chest({'parent': [1]}, PATH)
        for generation in range(4):
            pid = os.fork()
            if pid:
                assert os.waitpid(pid, 0)[1] == 0
                break
            c[generation] = [generation]
        if generation:
            sys.exit()
        print(sorted(c, key=str))
        """,
        said="[0, 1, 2, 3, 'parent']\n",
    )


@needs_fork
@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit()", "exit_of(int)", "del c, t"])
def test_what_the_parent_did_not_flush_is_not_saved_by_its_child(run, end):
    run(
        f"""
        c, t = Chest({{'x': [1], 'y': [1]}}, PATH), Chest({{'t': [1]}})
        c.flush()
        t.flush()
        c['x'].append(2)
        c['new'], t['new'] = [2], [2]
        del c['y']
        pid = os.fork()
        if pid == 0:
            assert (c, t) == ({{'x': [1], 'y': [1]}}, {{'t': [1]}})
            {end}
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        with Chest(path=PATH) as d:
            print(dict(d))
        c._check()
        t._check()
        print(c['x'], t['new'])
        """,
        said="{'x': [1], 'y': [1]}\n[1, 2] [2]\n",
    )


# -- after a fork --------------------------------------------------------------------------------


@needs_fork
def test_a_child_has_none_of_the_descriptors_of_its_parent(path):
    with Chest({"x": [1]}, path) as c, Chest({"t": [1]}) as t, Chest(path=path, readonly=True) as r:
        t.flush()
        numbers = [int(n) for n in os.listdir("/proc/self/fd")] if os.path.isdir("/proc") else []
        ours = {n for n in numbers if ".keys" in _target(n)}
        assert len(ours) == 6 or not numbers

        def look():
            assert not {n for n in numbers if ".keys" in _target(n)}
            assert (len(c), len(t), len(r)) == (0, 1, 0)
            assert c["x"] is None

        with forked(lambda: (c.flush(), look())) as pid:  # so far c has nothing on disk
            assert exit_of(pid) == 1
        c.flush()

        def look_again():
            assert not {n for n in numbers if ".keys" in _target(n)}
            assert (c, t, r) == ({"x": [1]}, {"t": [1]}, {"x": [1]})

        in_child(look_again)


def _target(number):
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


@needs_fork
def test_parent_and_child_read_and_write_at_the_same_time(path, elsewhere):
    """They share no file position, no lock, no names of staging files."""
    with Chest(path=path, available_memory=0) as c:
        child = elsewhere(c=c)
        child.start("for n in range(50): c['child', n % 7] = [n]; c['parent', n % 7, 'x'] = n")
        for n in range(50):
            c["parent", n % 7] = [n]
            c["child", n % 7, "x"] = n
        child.result()
        assert child("c.flush(), c._check()") == (None, None)
        assert child("dict(c)") == c
        c._check()
        assert {c["parent", n][0] for n in range(7)} == {*range(43, 50)}
        assert {c["child", n][0] for n in range(7)} == {*range(43, 50)}


@needs_fork
def test_a_fork_while_another_thread_has_every_lock_hangs_nobody(path, monkeypatch):
    """Of the chest, in a transaction and in a load; of the sizes; and the file lock for a while."""
    inside, leave = threading.Event(), threading.Event()
    find = chest.sizes._find

    class Slow:
        pass

    def find_slowly(kind):
        if kind is Slow:
            inside.set()
            leave.wait(30)
        return find(kind)

    monkeypatch.setattr(chest.sizes, "_find", find_slowly)
    with Chest({"x": [1]}, path) as c:

        def hold():
            with c.transaction():
                c["half"] = [1]
                chest.nbytes(Slow())

        thread = threading.Thread(target=hold)
        thread.start()
        assert inside.wait(30)
        read_end, write_end = os.pipe()

        def use():
            class Other:
                pass

            assert c == {"x": [1]}
            c["x"] += [2]
            chest.nbytes(Other())
            with pytest.raises(TimeoutError), c.transaction(timeout=0):
                pass
            os.write(write_end, b"!")
            c["child"] = [2]
            c.flush()  # waits until the parent's transaction is over

        with forked(use) as pid:
            assert os.read(read_end, 1) == b"!"
            leave.set()
            thread.join()
            assert exit_of(pid) == 0
        os.close(read_end)
        os.close(write_end)
        assert c == {"x": [1, 2], "half": [1], "child": [2]}
        c._check()


HOOKS = ["dump", "load", "on_miss", "on_overflow", "nbytes", "key_to_filename"]


@needs_fork
@pytest.mark.parametrize("end", ["os._exit", "sys.exit"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_may_fork_and_the_child_use_the_chest(run, hook, end):
    """A child that leaves by sys.exit unwinds what its parent was in the midst of."""
    run(
        f"""
        import chest.core

        forks = []

        def fork():
            if forks:
                return
            forks.append(True)
            pid = os.fork()
            if pid == 0:
                assert c['x'] == [1]
                with Chest(path=PATH + '-other') as other:
                    other['seen'] = len(c)
                {end}(0)
            assert os.waitpid(pid, 0)[1] == 0

        def forking(function):
            def call(*args, **options):
                if ready:
                    fork()
                return function(*args, **options)
            return call

        ready = []
        plain = dict(
            dump=pickle.dump, load=pickle.load, on_miss=bool, on_overflow=bool,
            nbytes=chest.core.nbytes, key_to_filename=chest.core.key_to_filename,
        )
        plain[{hook!r}] = forking(plain[{hook!r}])
        c = Chest(path=PATH, available_memory=0, **plain)
        c['x'] = [1]
        ready.append(True)
        c['y'] = [2]
        c['z', 1] = [3] * 100_000
        print(c['y'], len(c['z', 1]), forks)
        c._check()
        with Chest(path=PATH) as d:
            print(d['y'], len(d['z', 1]))
        with Chest(path=PATH + '-other') as other:
            print(other['seen'] in (1, 2, 3))
        """,
        said="[2] 100000 [True]\n[2] 100000\nTrue\n",
    )


@needs_fork
@pytest.mark.parametrize("inside", ["transaction", "flush", "spill"])
def test_a_child_that_leaves_in_the_midst_of_a_commit_harms_nothing(path, monkeypatch, inside):
    """As one that a signal handler forked: its unwinding must not take back the parent's commit."""
    place, children = chest.directory.Directory.place, []

    def place_and_fork(self, staged, name):
        place(self, staged, name)
        pid = os.fork()
        if pid == 0:
            raise SystemExit(0)
        children.append(pid)
        assert exit_of(pid) == 0

    def work():
        with Chest({"x": [0], "old": [0]}, path) as c:
            c.flush()
            monkeypatch.setattr(chest.directory.Directory, "place", place_and_fork)
            match inside:
                case "transaction":
                    with c.transaction():
                        c.update(x=[1], y=[2], z=[3])
                        del c["old"]
                        c.flush()
                        c["x"] = [4]
                case "flush":
                    c.update(x=[4], y=[2], z=[3])
                    del c["old"]
                case "spill":
                    del c["old"]
                    c.available_memory = 0
                    c.update(x=[1], y=[2], z=[3])
                    c["x"] = [4]

    pid = os.fork()
    if pid == 0:  # so that those who leave end here, and not in pytest
        status = 1
        try:
            work()
            status = 0
        except SystemExit:
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert exit_of(pid) == 0
    with Chest(path=path) as c:
        assert c == {"x": [4], "y": [2], "z": [3]}
        c._check()


@needs_fork
def test_a_child_that_leaves_as_a_value_is_dumped_leaves_that_to_its_parent(run):
    run(
        """
        dumps = []

        def dump(value, file):
            dumps.append(value)
            pid = os.fork()
            if pid == 0:
                sys.exit()
            assert os.waitpid(pid, 0)[1] == 0
            pickle.dump(value, file)

        with Chest(path=PATH, dump=dump) as c:
            c['x'] = ['x' * 200_000]  # too large for a pack
            c.flush()
            print(len(dumps))
        """,
        said="1\n",
    )


@needs_fork
@pytest.mark.parametrize("where", ["inside", "at the end"])
def test_a_child_forked_in_a_transaction_is_not_part_of_it(path, elsewhere, where):
    with Chest({"x": [1]}, path) as c:
        with c.transaction():
            c["x"] = [2]
            c["new"] = [2]
            if where == "at the end":
                c.flush()
            child = elsewhere(c=c)
            assert child("dict(c)") == {"x": [1]}
            with pytest.raises(TimeoutError):
                child("with c.transaction(timeout=0): pass")
            child("c['child'] = [3]")
        assert child("dict(c)") == {"x": [2], "new": [2], "child": [3]}
        child("c.flush()")
        assert c == {"x": [2], "new": [2], "child": [3]}


FORKING = """
    import itertools, tempfile

    class Value:
        def __init__(self, x):
            self.x = x

        def __eq__(self, other):
            return type(other) is Value and self.x == other.x

        def __reduce__(self):
            fork_once('__reduce__')
            return made, (self.x,)

    def made(x):
        fork_once('as a value is made')
        return Value(x)

    def load(file):
        value = pickle.load(file)
        fork_once('load')
        return value

    def dump(value, file):
        fork_once('before dump')
        pickle.dump(value, file)
        fork_once('dump')

    def fork_once(where):
        global child
        if child is None and where == WHERE:
            child = os.fork()

    def transact(c):
        with c.transaction():
            c['a'] = Value(5)
            c['b'].x = 7
            c.move_to_disk('a')

    works = [
        lambda c: c['a'], lambda c: c[('packed', 3)], lambda c: [*c.items()],
        lambda c: c.setdefault('a', 1), lambda c: c.update(a=Value(2), q=Value(1)),
        lambda c: c.update(large=[0] * 20000), lambda c: c.move_to_disk('dirty'),
        lambda c: c.copy().close(), lambda c: setattr(c, 'available_memory', 0), Chest.flush,
        transact,
    ]
    forks = 0
    for own, work in itertools.product([{}, {'load': load, 'dump': dump}], works):
        child = 0
        path = tempfile.mkdtemp()
        with Chest(path=path, available_memory=3000, **own) as c:
            packed = {('packed', n): (n,) for n in range(100)}
            c.update(packed, a=Value(1), b=Value(2), gone=Value(3))
        c = Chest(path=path, available_memory=3000, **own)
        c['dirty'] = Value(4)
        child = None
        work(c)
        if child == 0:
            assert not c._memory.in_transaction and not c._memory.holds_lock()
            assert {'a', 'b', 'gone', *packed} <= {*c} and c['gone'] == Value(3)
            c['of the child'] = Value(8)
            c.close()
            with Chest(path=path) as c:
                assert c['of the child'] == Value(8)
            os._exit(0)
        assert child is None or os.waitpid(child, 0)[1] == 0
        forks += child is not None
        child = 0
        everything = dict(c)
        c.close()
        with Chest(path=path) as c:
            assert dict(c) == everything and c['dirty'] == Value(4)
            c._check()
            c.drop()
    print(forks)
"""


@needs_fork
@pytest.mark.parametrize(("where", "forks"), [
    ("__reduce__", 16), ("as a value is made", 8), ("load", 5), ("before dump", 9), ("dump", 9),
])
def test_a_fork_in_the_midst_of_anything_harms_neither_chest(run, where, forks):
    run(f"WHERE = {where!r}\n" + textwrap.dedent(FORKING), said=f"{forks}\n")


@needs_fork
def test_a_child_never_removes_the_temporary_directory_of_its_parent(run):
    run(
        """
        t, lent = Chest({'t': [1]}), Chest({'t': [2]})
        t.flush()
        pickle.dumps(lent)
        for end in t.close, t.drop, lent.close, sys.exit, lambda: os._exit(0):
            pid = os.fork()
            if pid == 0:
                end()
                sys.exit()
            assert os.waitpid(pid, 0)[1] == 0
            assert os.listdir(t.path) and os.listdir(lent.path)
        print(t['t'], lent['t'])
        """,
        said="[1] [2]\n",
    )


@needs_fork
def test_a_temporary_chest_of_a_child_goes_with_the_child(run):
    run(
        """
        t = Chest({'t': [1]})       # no directory yet: parent and child will have one each
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            mine, lent = Chest({'x': [1]}), Chest({'x': [2]})
            t['child'] = [2]
            pickle.dumps(lent)
            os.write(w, '\\n'.join([t.path, mine.path, lent.path]).encode())
            sys.exit()
        assert os.waitpid(pid, 0)[1] == 0
        paths = os.read(r, 10_000).decode().split('\\n')
        print([os.path.exists(path) for path in paths], t.path in paths, len(t))
        """,
        said="[False, False, False] False 1\n",
    )


# -- what one does, the others see ---------------------------------------------------------------


@needs_fork
def test_the_next_operation_sees_what_another_process_flushed(path, elsewhere):
    with Chest({"x": [1], "y": [1], "z": [1]}, path) as c:
        c.flush()
        other = elsewhere(path)
        other("c['x'] = [2]; c['new'] = [2]; del c['y']")
        assert c == {"x": [1], "y": [1], "z": [1]}
        looks = [
            ("get", lambda: c.get("x"), [2]),
            ("in", lambda: "y" in c, False),
            ("len", lambda: len(c), 3),
            ("iteration", lambda: [*c], ["x", "z", "new"]),
            ("values", lambda: [*c.values()], [[2], [1], [2]]),
            ("file name", lambda: os.path.basename(c.key_to_filename("x")), "x~1"),
        ]
        other("c.flush()")
        for name, look, expected in looks:
            with Chest(path=path) as c:  # each its first look, with the old state in memory
                assert look() == expected, name


@needs_fork
@pytest.mark.parametrize("look", ["get", "in", "len", "iter", "reversed", "pop", "setdefault"])
def test_any_operation_is_the_first_to_see_it(path, elsewhere, look):
    with Chest({"x": [1], "y": [1]}, path) as c:
        c.flush()
        other = elsewhere(path)
        other("c['x'] = [2]; del c['y']; c['z'] = 3; c.flush()")
        match look:
            case "get":
                assert c["x"] == [2]
            case "in":
                assert "y" not in c
            case "len":
                other("c['4th'] = 4; c.flush()")
                assert len(c) == 3
            case "iter":
                assert [*c] == ["x", "z"]
            case "reversed":
                assert [*reversed(c)] == ["z", "x"]
            case "pop":
                assert c.pop("x") == [2]
            case "setdefault":
                assert c.setdefault("z", 0) == 3
        assert "y" not in c.inmem


@needs_fork
def test_resident_values_that_another_process_replaced_or_deleted_are_dropped(path, elsewhere):
    big = "text" * 10_000
    with Chest({"replaced": big, "deleted": big, "stays": big}, path) as c:
        c.flush()
        full = c.memory_usage
        other = elsewhere(path)
        other("c['replaced'] = 1; del c['deleted']; c.flush()")
        assert len(c) == 2
        assert c.inmem == {"stays": big}
        assert c.memory_usage * 3 == full
        c._check()
        other("c.clear(); c.flush()")
        assert (len(c), c.memory_usage, c.inmem) == (0, 0, {})


@needs_fork
def test_what_one_has_not_flushed_stays_and_the_last_commit_wins(path, elsewhere):
    with Chest({key: [0] for key in "abcde"}, path) as c:
        c.flush()
        other = elsewhere(path)
        c["a"] = ["mine"]
        c["b"] = ["mine"]
        c["c"] = c["c"] + ["in place"]
        del c["d"]
        c["new"] = ["mine"]
        other("c['a'] = ['theirs']; del c['b']; c['c'].append('theirs'); c['d'] = ['theirs']")
        other("c['new'] = ['theirs']; c['e'] = ['theirs']; c.flush()")
        mine = {"a": ["mine"], "b": ["mine"], "c": [0, "in place"], "new": ["mine"]}
        assert c == {**mine, "e": ["theirs"]}
        assert other("c['a'], 'b' in c, 'd' in c") == (["theirs"], False, True)
        c.flush()
        assert other("dict(c)") == c == {**mine, "e": ["theirs"]}
        other("c['a'] = ['last']; c.flush()")
        assert c["a"] == ["last"]
        c._check()


@needs_fork
def test_a_change_in_place_outlives_what_another_process_committed(path, elsewhere):
    with Chest({"x": [0], "y": [0]}, path) as c:
        c.flush()
        other = elsewhere(path)
        c["x"].append("mine")
        c["y"].append("mine")
        other("c['x'] = ['theirs']; del c['y']; c.flush()")
        assert c == {"x": [0, "mine"], "y": [0, "mine"]}
        c.flush()
        assert other("dict(c)") == {"x": [0, "mine"], "y": [0, "mine"]}


@needs_fork
@pytest.mark.parametrize("waiting", [True, False])
def test_a_compacted_index_is_found_by_who_had_the_old_one_open(
    path, elsewhere, monkeypatch, waiting
):
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 0)
    with Chest({"x": [-1]}, path) as c, Chest(path=path) as d:
        c.flush()
        assert d["x"] == [-1]
        first = FileIO(os.path.join(path, ".keys"))  # so that no other gets its number
        d["mine"] = [1]
        if waiting:
            d.flush()
            assert c["mine"] == [1]
        other = elsewhere(path)
        for n in range(20):
            other(f"c['x'] = [{n}]; c.flush()")
            if waiting:
                d["mine"] = [n]
                d.flush()
                assert c["mine"] == [n]
        with first:
            assert not os.path.samestat(os.fstat(first.fileno()), os.stat(first.name))
        assert (c["x"], d["x"]) == ([19], [19])
        d.flush()
        assert c["mine"] == other("c['mine']") == d["mine"]
        c._check()


@needs_fork
def test_readers_never_see_anything_torn_or_older_while_others_overwrite(path, monkeypatch):
    """Two overwrite and compact all the time, with much and with no memory; three read."""
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 1000)
    rounds = 90

    def write(name, available):
        with Chest(path=path, available_memory=available) as c:
            for n in range(1, rounds + 1):
                for key in range(3):
                    c[name, key] = [n] * (n % 50 + 1)
                c[name, "text"] = f"{n} " * 100
                if n % 3 == 0:
                    c.flush()
                if n % 10 == 0:
                    with c.transaction():
                        c[name, 0] = [n]
            c[name, "end"] = [1]

    def read(options):
        last = {}
        with Chest(path=path, **options) as c:
            while not (("a", "end") in c and ("b", "end") in c):
                for key, value in [(key, c.get(key)) for key in c] + [*c.items()]:
                    if value is None:
                        raise AssertionError(f"{key} vanished")
                    n = int(value.split()[0]) if isinstance(value, str) else value[0]
                    assert value in (f"{n} " * 100, [n] * len(value)), f"{key} is torn: {value}"
                    assert n >= last.get(key, 0), f"{key} went back from {last[key]} to {n}"
                    last[key] = n
                    len(c)
            assert all(c[name, "text"] == f"{rounds} " * 100 for name in "ab")

    with Chest(path=path):
        pass
    readers = [{"available_memory": 0}, {"readonly": True}, {"available_memory": 3000}]
    actors = [lambda: write("a", 0), lambda: write("b", 1e9)]
    actors += [lambda options=options: read(options) for options in readers]
    side_by_side(*actors)
    with Chest(path=path) as c:
        c._check()


def side_by_side(*actors):
    """Run functions in children at once; none may fail."""
    if not actors:
        return
    with forked(actors[0]) as pid:
        side_by_side(*actors[1:])
        assert exit_of(pid) == 0


@needs_fork
def test_many_processes_open_a_new_path_at_once(tmp_path):
    for turn in range(5):
        path = tmp_path / str(turn) / "new" / "chest"
        read_end, write_end = os.pipe()

        def work(n, path=path, start=read_end, others=write_end):
            os.close(others)
            os.read(start, 1)  # until everybody is there, and the pipe is closed
            with Chest(path=path) as c:
                c[n] = [n]

        def go(read_end=read_end, write_end=write_end):
            os.close(read_end)
            os.close(write_end)

        children = [lambda n=n: work(n) for n in range(6)]
        _start_all(children, go)
        with Chest(path=path) as c:
            assert sorted(c) == [*range(6)]
            c._check()


def _start_all(actors, go):
    if not actors:
        go()
        return
    with forked(actors[0]) as pid:
        _start_all(actors[1:], go)
        assert exit_of(pid) == 0


# -- waiting for the lock ------------------------------------------------------------------------


class Tell(logging.Handler):
    """Does something with each message."""

    def __init__(self, do):
        super().__init__()
        self.do = do

    def emit(self, record):
        self.do(record.getMessage())


@needs_fork
def test_who_waits_for_long_is_told_of_it_with_the_path(path, elsewhere, monkeypatch):
    monkeypatch.setattr(chest.index, "PATIENCE", 0.05)
    said, times = [], []
    with Chest({"x": [1]}, path) as c:
        c.flush()
        other = elsewhere(path)
        other("t = c.transaction(); t.__enter__(); c['y'] = [2]")

        def listen(message):
            said.append(message)
            times.append(time.monotonic())
            if len(said) == 3:  # and every time again
                other("t.__exit__(None, None, None)")

        handler = Tell(listen)
        logger = logging.getLogger("chest")
        logger.addHandler(handler)
        if_untold = threading.Timer(15, other.kill)
        if_untold.start()
        try:
            c["x"] = [2]
            c.flush()
        finally:
            if_untold.cancel()
            if_untold.join()
            logger.removeHandler(handler)
        assert len(said) == 3
        assert min(times[1] - times[0], times[2] - times[1]) > 0.04
        assert all(os.path.join(path, ".keys") in message for message in said)
        assert c == {"x": [2], "y": [2]}


@needs_fork
def test_nobody_waits_at_a_file_that_a_compaction_replaced(path, monkeypatch):
    """Also when a child, forked between the replacement and the closing, has the old file open."""
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 0)
    waits = threading.Event()
    done, forks = [], []
    try_lock, replace = chest.index.Index._try_lock, os.replace
    adopt = chest.index.Index._adopt
    read_end, write_end = os.pipe()
    with Chest({"x": [0]}, path) as c, Chest(path=path) as d:
        c.flush()
        len(d)

        def trying(self):
            took = try_lock(self)
            if not took:
                waits.set()
            return took

        def write():
            with d.transaction(timeout=20):
                d["d"] = [1]
            done.append(time.monotonic())

        def live_on():
            os.close(write_end)
            os.read(read_end, 1)

        def replacing(old, new):
            if not thread.is_alive() and not done:
                thread.start()
                assert waits.wait(20)
            replace(old, new)

        def adopting(self, *args):
            adopt(self, *args)
            if waits.is_set() and not forks and threading.current_thread() is not thread:
                pid = os.fork()
                if pid == 0:
                    live_on()
                    os._exit(0)
                forks.append(pid)

        thread = threading.Thread(target=write)
        monkeypatch.setattr(chest.index.Index, "_try_lock", trying)
        monkeypatch.setattr(chest.index.Index, "_adopt", adopting)
        monkeypatch.setattr(os, "replace", replacing)
        for n in range(5):
            c["x"] = [n]
            c.flush()
        thread.join(25)
        os.close(write_end)
        assert len(forks) == 1
        assert exit_of(forks[0]) == 0
        os.close(read_end)
        assert done, "waited for the child to end"
        assert c == {"x": [4], "d": [1]}


@pytest.mark.parametrize("method", ["_try_lock", "_wait_for_lock", "_unlock"])
def test_a_chest_that_is_collected_while_another_takes_the_lock_waits_its_turn(
    path, monkeypatch, method
):
    """The garbage collector may end a handle anywhere; its thread has the lock by then."""
    a, b = Chest(path=path), Chest(path=path)
    a["a"], b["b"] = [1], [2]
    handles = [b]
    del b
    real = getattr(chest.index.Index, method)

    def collecting(self, *args):
        before = real(self, *args) if method != "_unlock" else None
        threads.extend(set(threading.enumerate()) - threads_before)
        handles.clear()
        threads.extend(set(threading.enumerate()) - threads_before)
        return real(self, *args) if method == "_unlock" else before

    threads, threads_before = [], set(threading.enumerate())
    monkeypatch.setattr(chest.index.Index, method, collecting)
    a.flush()
    monkeypatch.undo()
    assert not handles
    for thread in set(threads):
        thread.join(20)
    assert a == {"a": [1], "b": [2]}
    a.close()


def test_a_key_that_goes_while_a_chest_takes_the_last_is_passed_over(path, monkeypatch):
    with Chest({"x": 1, "y": 2}, path) as c:
        c.flush()
        with Chest(path=path) as other:
            sort = chest.ledger.Ledger.sort

            def sort_and_delete(ledger):
                sort(ledger)
                if ledger is other._memory.ledger:
                    monkeypatch.setattr(chest.ledger.Ledger, "sort", sort)
                    del c["y"]
                    c.flush()

            monkeypatch.setattr(chest.ledger.Ledger, "sort", sort_and_delete)
            assert other.popitem() == ("x", 1)
            with pytest.raises(KeyError, match="empty"):
                other.popitem()


def test_a_chest_is_copied_however_old_its_files_are(path, tmp_path):
    with Chest({"x": [1], ("y", 1): [2]}, path) as c:
        c.flush()
        for key in c:
            os.utime(c.key_to_filename(key), (0, 0))
        with c.copy() as copied, Chest(path=tmp_path / "other") as other:
            other.update(c)
            assert dict(copied) == dict(other) == dict(c)


def test_who_only_reads_keeps_no_pack_open_that_is_gone(path, monkeypatch):
    monkeypatch.setattr(chest.store, "PACK_BYTES", 1 << 16)
    monkeypatch.setattr(chest.upkeep, "WASTE", 1 << 16)
    with Chest(path=path) as c, Chest(path=path, available_memory=1e4) as reader:
        for turn in range(20):
            c.update({n: bytes([turn]) * 1500 for n in range(100)})
            c.flush()
            assert [*reader.values()] == [bytes([turn]) * 1500] * 100
            gone = reader._memory.store.packs._open.keys() - {*os.listdir(path)}
            assert not gone


# -- processes that are killed -------------------------------------------------------------------

LOCATION = os.path.dirname(chest.__file__) + os.sep


def count_steps(action, before=lambda: None):
    """Return how many lines of chest a forked child runs through in an action."""
    read_end, write_end = os.pipe()

    def count():
        made = before()
        steps = _trace(lambda step: None, lambda: action(made))
        os.write(write_end, steps.to_bytes(8, "little"))
        os._exit(0)

    in_child(count)
    steps = int.from_bytes(os.read(read_end, 8), "little")
    os.close(read_end)
    os.close(write_end)
    assert steps > 100
    return steps


def _trace(at, action):
    """Call `at` with the number of each line of chest that an action runs through."""
    steps = 0

    def trace(frame, event, _):
        nonlocal steps
        if not frame.f_code.co_filename.startswith(LOCATION):
            return None
        if event == "line":
            steps += 1
            at(steps)
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return steps


def sample(steps, count):
    """Return so many steps, spread evenly, at places that change with each call's size."""
    count = min(count, steps)
    return [1 + n * (steps - 1) // (count - 1) for n in range(count)]


def was_killed(pid, step, steps):
    """Tell whether a child was killed at a step, which the last few steps may be too late for.

    What the garbage collector finalizes in the midst makes some lines more or less.
    """
    status = exit_of(pid)
    assert status == -signal.SIGKILL or (status == 0 and step > 0.95 * steps), status
    return status != 0


BEFORE = {"x": [0], "y": [0], "old": [0], ("a", "b"): [0]}


def commit(c):
    c.update(x=[1], new=[1] * 30_000)
    c["a", "b"] = [1]
    del c["old"]
    c.flush()


def compact(c):
    c.update(x=[1], new=[1])
    c["a", "b"] = [1]
    del c["old"]
    chest.upkeep.COMPACT_BYTES = 0
    c.flush()


def transact(c):
    with c.transaction():
        c["x"] = [1]
        c.flush()
        c["new"] = [1]
        c["a", "b"] = [1]
        del c["old"]


AFTER = {
    commit: {"x": [1], "y": [0], ("a", "b"): [1], "new": [1] * 30_000},
    compact: {"x": [1], "y": [0], ("a", "b"): [1], "new": [1]},
    transact: {"x": [1], "y": [0], ("a", "b"): [1], "new": [1]},
    Chest.drop: {},
}


@pytest.fixture
def fresh(tmp_path):
    """Make the same small chest again and again."""
    folder = tmp_path / "template"
    with Chest(BEFORE, folder):
        pass
    with Chest(path=folder) as c:  # some history
        for n in range(3):
            c["x"] = [n]
            c.flush()
        c["x"] = [0]
    numbers = iter(range(10**6))

    def make():
        path = tmp_path / f"chest-{next(numbers)}"
        shutil.copytree(folder, path)
        return str(path)

    return make


def found_after(path):
    """Return what is in a chest after a crash, which somebody writes to at once."""
    with Chest(path=path) as c:
        with c.transaction(timeout=5):
            found = dict(c)
            c["written"] = [1]
        assert dict(c) == {**found, "written": [1]}
        strays(path)
        c._check()
    return found


@needs_fork
@pytest.mark.repeats
@pytest.mark.parametrize("action", AFTER)
def test_who_is_killed_at_any_step_blocks_nobody_and_does_all_or_nothing(fresh, action):
    path = fresh()
    steps = count_steps(action, lambda: Chest(path=path))
    seen = []
    for step in sample(steps, 45):
        path = fresh()
        with Chest(path=path) as bystander:
            len(bystander)

            def act(path=path, step=step):
                c = Chest(path=path)
                _trace(lambda now: now == step and os.kill(os.getpid(), 9), lambda: action(c))

            with forked(act) as pid:
                killed = was_killed(pid, step, steps)
            found = found_after(path)
            assert found in ((BEFORE, AFTER[action]) if killed else (AFTER[action],)), step
            seen.append(found == BEFORE)
            assert bystander == {**found, "written": [1]}
    assert seen == sorted(seen, reverse=True), "it was undone once it was done"
    assert len({*seen}) == 2


@needs_fork
@pytest.mark.repeats
@pytest.mark.parametrize("action", AFTER)
def test_a_child_that_lives_on_keeps_no_lock_of_a_parent_that_was_killed(fresh, action):
    """Forked at any step of what its parent does, just before that is killed."""
    path = fresh()
    steps = count_steps(action, lambda: Chest(path=path))
    ready_end, told_end = os.pipe()
    for step in sample(steps, 80 if action is compact else 30):
        path = fresh()
        read_end, write_end = os.pipe()

        def act(path=path, step=step, read_end=read_end, write_end=write_end):
            def fork_and_die(now):
                if now != step:
                    return
                if os.fork() == 0:
                    sys.settrace(None)
                    os.close(write_end)
                    os.write(told_end, b"x")
                    os.read(read_end, 1)  # until somebody else has written
                    os._exit(0)
                os.kill(os.getpid(), signal.SIGKILL)

            c = Chest(path=path)
            _trace(fork_and_die, lambda: action(c))

        with forked(act) as pid:
            killed = was_killed(pid, step, steps)
        assert not killed or os.read(ready_end, 1) == b"x"
        assert found_after(path) in (BEFORE, AFTER[action]), step
        os.close(read_end)
        os.close(write_end)  # one child at a time: each has the memory of this process
    os.close(ready_end)
    os.close(told_end)


@needs_fork
def test_a_child_forked_in_a_compaction_has_no_lock_of_the_new_index(path, monkeypatch):
    """Its parent goes on for a while, and is killed before it unlocks."""
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 0)
    replace, adopt = os.replace, chest.index.Index._adopt
    read_end, write_end = os.pipe()
    ready_end, told_end = os.pipe()

    def replacing(old, new):
        pid = os.fork()
        if pid == 0:
            os.close(write_end)
            os.write(told_end, b"x")
            os.read(read_end, 1)
            os._exit(0)
        replace(old, new)
        chest.index.Index._adopt = adopting

    def adopting(self, *args):
        adopt(self, *args)
        os.kill(os.getpid(), signal.SIGKILL)

    def act():
        os.replace = replacing
        with Chest(path=path) as c:
            for n in range(5):
                c["x"] = [n]
                c.flush()

    with Chest({"x": [-1]}, path) as c:
        c.flush()
        first = FileIO(os.path.join(path, ".keys"))  # so that no other gets its number
        with forked(act) as pid:
            assert exit_of(pid) == -signal.SIGKILL
        assert os.read(ready_end, 1) == b"x"
        with first:
            assert not os.path.samestat(os.fstat(first.fileno()), os.stat(first.name))
        with c.transaction(timeout=5):
            c["y"] = [1]
        assert c["y"] == [1]
    for end in read_end, write_end, ready_end, told_end:
        os.close(end)


@needs_fork
@pytest.mark.repeats
def test_who_is_killed_while_it_makes_a_chest_is_in_nobodys_way(tmp_path):
    def open_it(path):
        Chest({"x": [1]}, path).close()

    steps = count_steps(lambda _: open_it(tmp_path / "counted" / "deep"))
    for step in sample(steps, 35):
        path = tmp_path / str(step) / "deep"

        def act(path=path, step=step):
            _trace(lambda now: now == step and os.kill(os.getpid(), 9), lambda: open_it(path))

        with forked(act) as pid:
            assert exit_of(pid) == -signal.SIGKILL
        assert found_after(path) in ({}, {"x": [1]})


# -- dropped by another process ------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("compacted", [False, True])
def test_what_another_process_dropped_is_empty_for_readers(path, elsewhere, monkeypatch, compacted):
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 0 if compacted else 100_000)
    with Chest(path=path, available_memory=0) as c:
        c["x"] = [1]
        other = elsewhere(path)
        assert len(c) == 1
        other("for n in range(5): c['x'] = [n]; c.flush()")
        other("c.drop()")
        assert (len(c), [*c], "x" in c, c.get("x"), dict(c)) == (0, [], False, None, {})
        with pytest.raises(KeyError):
            c["x"]
        with pytest.raises(ChestClosedError):
            other("c['x']")
        assert not os.path.exists(path)
        other(f"c = Chest(path={path!r}); c['y'] = [2]; c.flush()")
        assert dict(c) == {"y": [2]}
        c["z"] = [3]
        assert other("dict(c)") == {"y": [2], "z": [3]}
        c._check()


@needs_fork
@pytest.mark.parametrize("large", [False, True])
def test_writing_where_another_process_dropped_all_is_a_clear_error(path, elsewhere, large):
    other = elsewhere(path)
    with Chest({"x": [1]}, path) as c:
        c.flush()
        other("c.drop()")
        c["y"] = bytes(200_000) if large else 1
        c.update({n: n for n in range(100)})
        for act in (c.flush, c.compact, c.transaction().__enter__, lambda: pickle.dumps(c)):
            with pytest.raises((FileNotFoundError, UnsavedError), match="dropped") as caught:
                act()
            assert "bytes needed" not in str(caught.value)
        with pytest.raises(FileNotFoundError, match="dropped"):
            c.verify()
        assert len(c) == 101
        c.drop()


@needs_fork
def test_writing_to_what_another_process_dropped_is_a_clear_error(path, elsewhere):
    other = elsewhere(path)
    with Chest({"x": [1]}, path) as c:
        c.flush()
        Path(path, "foreign").touch()  # keeps the directory
        other("c.drop()")
        c["y"] = [2]
        with pytest.raises(UnsavedError, match="dropped") as caught:
            c.flush()
        assert isinstance(caught.value.causes[0], FileNotFoundError)
        assert c["y"] == [2]
        with pytest.raises(FileNotFoundError, match="dropped"), c.transaction():
            pass
        other(f"c = Chest(path={path!r}); c['z'] = [3]; c.flush()")
        c.flush()  # there is a chest again
        Path(path, "foreign").unlink()
        assert other("dict(c)") == c == {"y": [2], "z": [3]}
        c._check()
        assert strays(path) == []


def test_two_handles_drop_the_same_chest(path, monkeypatch):
    """The other one has removed the directory just before this one would."""
    c = Chest({"x": [1]}, path)
    rmdir = os.rmdir

    def removing(folder):
        rmdir(folder)
        rmdir(folder)

    monkeypatch.setattr(os, "rmdir", removing)
    c.drop()
    assert c.closed
    assert not os.path.exists(path)


def test_a_chest_made_anew_while_a_writer_takes_the_lock_of_the_dropped_one(path, monkeypatch):
    """The writer must not write under the lock of a file that is gone."""
    looks = []
    with Chest({"x": [1]}, path) as c:
        c.flush()
        Path(path, "foreign").touch()
        c["x"] = [2]
        Chest(path=path).drop()
        real_stat, real_exists = os.stat, os.path.lexists

        def between(*_):
            """Make the chest after one of the looks at the path that come with the lock."""
            if len(looks) == turn:
                looks.append(None)
                monkeypatch.undo()
                with Chest({"x": [3], "y": [4]}, path):
                    pass
                patch()
            elif len(looks) < turn:
                looks.append(None)

        def stat(name, *args, **options):
            try:
                return real_stat(name, *args, **options)
            finally:
                if name == index:
                    between()

        def lexists(name):
            answer = real_exists(name)
            if name == index:
                between()
            return answer

        def patch():
            monkeypatch.setattr(os, "stat", stat)
            monkeypatch.setattr(os.path, "lexists", lexists)

        index = os.path.join(path, ".keys")
        for turn in range(4):
            looks.clear()
            c["x"] = [2]
            patch()
            told = False
            try:
                c.flush()
            except UnsavedError as error:
                told = True
                assert "dropped" in str(error)
            finally:
                monkeypatch.undo()
            with Chest(path=path) as new:
                expected = [2] if not told else [3] if len(looks) > turn else None
                assert new.get("x") == expected
                c.flush()
                assert new.get("x") == [2]
                Path(path, "foreign").unlink()
                new._check()
                Path(path, "foreign").touch()
                new.drop()
        Path(path, "foreign").unlink()
        with Chest(path=path):
            c.flush()


@pytest.mark.parametrize("call", ["mkdir", "open", "link", "access"])
def test_a_chest_opens_while_another_process_drops_the_one_at_its_path(path, monkeypatch, call):
    """Wherever the drop comes in between: here, once, after the first such call."""
    tries = []

    def drop():
        if not tries and os.path.lexists(path):
            tries.append(call)
            if os.path.lexists(os.path.join(path, ".keys")):
                monkeypatch.undo()
                Chest(path=path).drop()
            else:
                shutil.rmtree(path)

    def once(function):
        def wrapped(name, *args, **options):
            inside = os.fspath(name).startswith(path) if not isinstance(name, int) else False
            result = function(name, *args, **options)
            if inside and call != "open":
                drop()
            return result

        return wrapped

    if call == "open":
        write_log = chest.reading.write_log

        def writing(*args, **options):
            write_log(*args, **options)
            drop()

        monkeypatch.setattr(chest.reading, "write_log", writing)
    else:
        monkeypatch.setattr(os, call, once(getattr(os, call)))
    c = Chest(path=path)
    monkeypatch.undo()
    with c:
        c["x"] = [1]
    with Chest(path=path) as c:
        assert c == {"x": [1]}
        c._check()


def test_a_new_chest_never_takes_the_place_of_another_one(path, monkeypatch):
    """The link failed, for there was a chest; that is dropped, and there is a third one by now."""
    link, exists = os.link, os.path.lexists
    index = os.path.join(path, ".keys")

    def linking(source, target):
        monkeypatch.undo()
        with Chest(path=path):
            pass
        monkeypatch.setattr(os.path, "lexists", looking)
        link(source, target)

    def looking(name):
        monkeypatch.undo()
        os.unlink(index)  # the last that a drop does
        answer = exists(name)
        with Chest({"precious": [1]}, path):
            pass
        return answer

    monkeypatch.setattr(os, "link", linking)
    Chest(path=path).close()
    monkeypatch.undo()
    with Chest({"x": [1]}, path) as c:
        assert os.path.exists(os.path.join(path, "precious")) == ("precious" in c)
        c.flush()
        c._check()


@needs_fork
def test_dropping_and_opening_all_the_time_damages_nothing(path, monkeypatch):
    """Whatever goes wrong is a clear error; what a chest names is always there."""
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 500)

    def work(name):
        c = None
        gc.disable()
        for n in range(300):
            try:
                if c is None:
                    c = Chest(path=path)
                match (n + ord(name)) % 5:
                    case 0:
                        c[name] = [n] * 10
                        c.flush()
                    case 1:
                        list(c)
                    case 2:
                        dict(c.items())
                    case 3:
                        with c.transaction(timeout=30):
                            c[name, "t"] = n
                    case 4 if name in "ab":
                        c.drop()
                        c = None
            except (FileNotFoundError, UnsavedError) as error:
                causes = error.causes if isinstance(error, UnsavedError) else [error]
                assert all(isinstance(cause, FileNotFoundError) for cause in causes), causes
                traceback.clear_frames(error.__traceback__)
                with suppress(FileNotFoundError, UnsavedError):
                    if c is not None:
                        c.close()
                c = None

    logging.getLogger("chest").setLevel(logging.CRITICAL)
    try:
        side_by_side(*[lambda name=name: work(name) for name in "abcd"])
    finally:
        logging.getLogger("chest").setLevel(logging.NOTSET)
    with Chest(path=path) as c:
        c["x"] = [1]
        dict(c)
        c.flush()
        strays(path)
        c._check()


# -- file systems that cannot --------------------------------------------------------------------


def no_locks(*_, **__):
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_file_system_without_locks_is_a_clear_error(path, monkeypatch):
    with Chest({"x": [1]}, path) as c:
        c.flush()
        monkeypatch.setattr(chest.index, "lock_descriptor", no_locks)
        c["y"] = [2]
        with pytest.raises(UnsavedError, match="locks files") as caught:
            c.flush()
        cause = caught.value.causes[0]
        assert (cause.errno, cause.filename) == (errno.ENOLCK, os.path.join(path, ".keys"))
        with pytest.raises(OSError, match="locks files"), c.transaction():
            pass
        with pytest.raises(OSError, match="locks files"):
            c.drop()
        with pytest.raises(OSError, match="locks files"):
            c.available_memory = 0
        with Chest(path=path) as reader:
            assert dict(reader) == {"x": [1]}
        assert c == {"x": [1], "y": [2]}
        monkeypatch.undo()
    with Chest(path=path) as c:
        assert c == {"x": [1], "y": [2]}
        c._check()


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EACCES])
def test_a_file_system_without_maps_is_a_clear_error(path, monkeypatch, number):
    def no_maps(*_, **__):
        raise OSError(number, os.strerror(number))

    with Chest({"x": [1]}, path) as c:
        c.flush()
        with monkeypatch.context() as patch:
            patch.setattr(chest.head.mmap, "mmap", no_maps)
            for options in {}, {"readonly": True}:
                with pytest.raises(OSError, match="shared memory maps") as caught:
                    Chest(path=path, **options)
                assert caught.value.filename == os.path.join(path, ".keys")
                assert caught.value.errno == number
            temporary = Chest({"t": [1]})
            with pytest.raises(UnsavedError, match="shared memory maps"):
                temporary.flush()
            assert temporary == {"t": [1]}
        temporary.flush()
        temporary.close()
        assert c == {"x": [1]}
    assert not [name for name in os.listdir(tempfile.gettempdir()) if name.endswith(".chest")]


# -- all of it at once ---------------------------------------------------------------------------

WORKERS = 5
KEYS = 4  # of each worker, and a pair that is always set together
STATES = ("stopped", "started", "committed", "deleted")


class Shared:
    """Numbers that all processes see, also those of a process that was killed.

    Of each key: the last count that its owner began to set, the last that it knows to be
    committed, and the last that was a deletion. Of each worker: how often it began to count up the
    total, and how often it knows that it did.
    """

    def __init__(self):
        self._map = mmap.mmap(-1, 8 * (1 + WORKERS * (3 * (KEYS + 2) + 2)))
        self._numbers = memoryview(self._map).cast("q")

    def _place(self, state, worker, n):
        return 1 + worker * (3 * (KEYS + 2) + 2) + (STATES.index(state) - 1) * (KEYS + 2) + n

    def get(self, state, worker, n):
        return self._numbers[self._place(state, worker, n)]

    def set(self, state, worker, n, count):
        self._numbers[self._place(state, worker, n)] = count

    def totals(self, worker):
        start = 1 + worker * (3 * (KEYS + 2) + 2) + 3 * (KEYS + 2)
        return self._numbers[start : start + 2]

    @property
    def stopped(self):
        return bool(self._numbers[0])

    def stop(self):
        self._numbers[0] = 1

    def close(self):
        self._numbers.release()
        self._map.close()


def made(count):
    """Return the value that stands for a count; nothing else may ever be seen."""
    size = count * 7919 % 400
    match count % 3:
        case 0:
            return [count] * (size + 1)
        case 1:
            return f"{count} " * (size + 1)
    return {"count": count, "data": bytes(size * (100 if count % 10 == 2 else 1))}


def count_in(value):
    """Return what count a value stands for; fail if it is torn."""
    match value:
        case list():
            count = value[0]
        case str():
            count = int(value.split()[0])
        case _:
            count = value["count"]
    assert value == made(count), f"torn: {str(value)[:200]}"
    return count


class RolledBackError(Exception):
    """What ends a transaction that must leave no trace."""


class Worker:
    """Owns some keys, changes them in all ways, and looks at those of the others."""

    def __init__(self, path, number, shared, seed):
        self.path = path
        self.number = number
        self.shared = shared
        self.choice = random.Random(seed)
        self.seen = {}
        self.began = {}  # the last count of each key, whether or not it came to be set
        self.done = {}  # the count that each key has, in memory at least
        self.c = None

    def __call__(self):
        self.reopen()
        self.begin()
        while not self.shared.stopped:
            self.step()
        self.flush()
        for n in range(KEYS + 2):
            self.look(self.number, n)
        self.c.close()

    def reopen(self):
        if self.c is not None:
            self.flush()
            self.c.close()
        available = self.choice.choice([0, 3000, 1e5, 1e9])
        self.c = Chest(path=self.path, available_memory=available)

    def begin(self):
        """Find the state that an earlier life left, and go on from there."""
        for n in range(KEYS + 2):
            self.done[n] = self.look(self.number, n)
            self.began[n] = self.shared.get("started", self.number, n)

    def look(self, worker, n):
        """Look at a key: no older than its last known commit, nor than what was seen before."""
        at_least = self.shared.get("committed", worker, n)
        value = self.c.get((worker, n))
        if value is None:
            at_most = self.shared.get("deleted", worker, n)
            assert at_most >= at_least, f"{worker, n} is lost: {at_least} was committed"
            count = at_least  # or more, if its deletion is not known to be committed
        else:
            count = count_in(value)
            at_most = self.shared.get("started", worker, n)
            assert at_least <= count <= at_most, f"{worker, n}: {at_least=} {count=} {at_most=}"
        before = self.seen.get((worker, n), 0)
        assert value is None or count >= before, f"{worker, n} went back from {before} to {count}"
        self.seen[worker, n] = max(count, before)
        return count

    def next_count(self, n):
        self.began[n] += 1
        self.shared.set("started", self.number, n, self.began[n])
        return self.began[n]

    def put(self, n):
        count = self.next_count(n)
        self.c[self.number, n] = made(count)
        self.done[n] = count

    def delete(self, n):
        if (self.number, n) in self.c:
            count = self.next_count(n)
            self.shared.set("deleted", self.number, n, count)
            del self.c[self.number, n]
            self.done[n] = count

    def flush(self):
        self.c.flush()
        self.committed()

    def committed(self):
        for n, count in self.done.items():
            self.shared.set("committed", self.number, n, count)

    def step(self):
        c, choice = self.c, self.choice
        n = choice.randrange(KEYS)
        match choice.randrange(20):
            case 0 | 1 | 2 | 3 | 4:
                self.put(n)
            case 5:
                self.delete(n)
            case 6 | 7 | 8:
                self.flush()
            case 9:
                self.put_pair()
            case 10:
                self.count_up()
            case 11:
                self.roll_back(n)
            case 12:
                with c.transaction():
                    self.look_at_pairs()
                self.committed()
            case 13 if choice.random() < 0.3:
                self.reopen()
            case 13 if choice.random() < 0.2:
                self.fork()
            case 14:
                for worker, k in [key for key in c if isinstance(key, tuple)]:
                    self.look(worker, k)
            case 15:
                with pickle.loads(pickle.dumps(c)) as d:
                    self.committed()
                    self.c, c = d, self.c
                    self.look(choice.randrange(WORKERS), n)
                    self.c = c
            case _:
                self.look(choice.randrange(WORKERS), choice.randrange(KEYS + 2))

    def put_pair(self):
        pair = KEYS, KEYS + 1
        last = max(self.began[n] for n in pair)  # who is killed in between counted one of them
        with self.c.transaction():
            for n in pair:
                self.began[n] = last
                self.put(n)
                self.c.flush() if self.choice.random() < 0.3 else None
        self.committed()

    def look_at_pairs(self):
        for worker in range(WORKERS):
            pair = [self.c.get((worker, n)) for n in (KEYS, KEYS + 1)]
            assert pair[0] == pair[1], f"half of a transaction of {worker}: {pair}"

    def count_up(self):
        totals = self.shared.totals(self.number)
        totals[0] += 1
        with self.c.transaction():
            self.c["total"] = self.c.get("total", 0) + 1
        totals[1] += 1
        self.committed()

    def roll_back(self, n):
        with suppress(RolledBackError), self.c.transaction():
            self.committed()  # the beginning flushes
            for key in [(self.number, n), "total"]:
                self.c[key] = {"rolled": "back"}
            if self.choice.random() < 0.5:
                self.c.flush()
            raise RolledBackError
        self.look(self.number, n)

    def fork(self):
        """Let a child look at everything, which must not see what this one has not flushed."""

        def look():
            for n in range(KEYS + 2):
                self.seen.pop((self.number, n), None)
            for worker in range(WORKERS):
                for n in range(KEYS + 2):
                    self.look(worker, n)

        with forked(look) as pid:
            assert exit_of(pid) == 0


def start_worker(path, number, shared, seed, folder):
    pid = os.fork()
    if pid:
        running.add(pid)
        return pid
    try:
        Worker(path, number, shared, seed)()
    except BaseException:
        Path(folder, f"{number}-{os.getpid()}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


@needs_fork
@pytest.mark.timeout(120 + 2 * SOAK)
def test_nothing_committed_is_lost_or_seen_torn_while_processes_are_killed(
    path, tmp_path, monkeypatch
):
    seed = int(os.environ.get("CHEST_SEED") or random.randrange(10**6))
    print("CHEST_SEED =", seed)
    choice = random.Random(seed)
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 3000)
    errors = tmp_path / "errors"
    errors.mkdir()
    shared = Shared()
    seeds = iter(range(seed, seed + 10**9))
    workers = [start_worker(path, n, shared, next(seeds), errors) for n in range(WORKERS)]
    until = time.monotonic() + SOAK
    try:
        while time.monotonic() < until and not os.listdir(errors):
            time.sleep(choice.random() * 0.3)
            number = choice.randrange(WORKERS)
            os.kill(workers[number], signal.SIGKILL)
            if exit_of(workers[number]) == -signal.SIGKILL:
                workers[number] = start_worker(path, number, shared, next(seeds), errors)
        shared.stop()
        ends = [exit_of(pid) for pid in workers if pid in running]
    finally:
        for pid in workers:
            if pid in running:
                os.kill(pid, signal.SIGKILL)
                exit_of(pid)
    for file in errors.iterdir():
        print(file.name, file.read_text()[:3000])
    assert os.listdir(errors) == []
    assert ends == [0] * WORKERS
    with Chest(path=path) as c:
        for worker in range(WORKERS):
            for n in range(KEYS + 2):
                count, value = shared.get("committed", worker, n), c.get((worker, n))
                if value is None:
                    assert count == 0 or count <= shared.get("deleted", worker, n)
                else:
                    assert count_in(value) == count
        totals = [shared.totals(worker) for worker in range(WORKERS)]
        assert sum(done for _, done in totals) <= c.get("total", 0) <= sum(n for n, _ in totals)
        for view in totals:
            view.release()
        c["end"] = None  # whoever writes next removes what was left
        c.flush()
        strays(path)
        c._check()
    shared.close()


# -- handles that the garbage collector ends -------------------------------------------------------


def garbage(path, **values):
    """Leave a chest that nobody refers to, to be collected."""

    class Owner:
        pass

    owner = Owner()
    owner.me = owner
    owner.chest = Chest(path=path)
    len(owner.chest)
    owner.chest.update(values)


@pytest.fixture
def _collected_when_told():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_collected_when_told")
@pytest.mark.parametrize("step", [(chest.index.Index, "_adopt"), (chest.store.Store, "commit")])
def test_a_handle_that_is_collected_amid_another_ones_commit_is_saved(path, step, monkeypatch):
    monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 0)
    owner, name = step
    real = getattr(owner, name)
    with Chest({"x": [0]}, path) as c:
        c.flush()
        garbage(path, y=["garbage"])
        for n in range(5):
            c["x"] = [n]
            c.flush()  # also to a new index, which the other handle has not seen

        def collect_first(self, *args):
            if self in (c._memory._store, c._memory._store.index):
                gc.collect()
            return real(self, *args)

        monkeypatch.setattr(owner, name, collect_first)
        for n in range(5):
            c["x"] = [n]
            c.flush()
        until = time.monotonic() + 20
        while "y" not in c and time.monotonic() < until:
            time.sleep(0.01)
        assert c == {"x": [4], "y": ["garbage"]}


@pytest.mark.usefixtures("_collected_when_told")
def test_two_threads_that_collect_each_others_handles_do_not_wait_for_each_other(
    tmp_path, monkeypatch
):
    paths = [str(tmp_path / name) for name in "ab"]
    with Chest(path=paths[0]) as a, Chest(path=paths[1]) as b:
        stores = [c._memory.store for c in (a, b)]
        others = [Chest({"left": 1}, path) for path in reversed(paths)]
        both = threading.Barrier(2)
        commit = chest.store.Store.commit

        def let_go_first(self, batch):
            if self in stores:
                both.wait(10)
                others[stores.index(self)] = None
            commit(self, batch)

        with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
            patch.setattr(chest.store.Store, "commit", let_go_first)
            a["x"] = b["x"] = 1
            for flushed in [pool.submit(c.flush) for c in (a, b)]:
                flushed.result(20)
        until = time.monotonic() + 20
        while not ("left" in a and "left" in b) and time.monotonic() < until:
            time.sleep(0.01)
        assert a == b == {"left": 1, "x": 1}


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("clear", [False, True])
def test_what_was_deleted_and_set_again_is_there_all_the_while(path, clear, compacted):
    with Chest({"x": "old", "y": 1}, path) as a, Chest(path=path) as b:
        a.flush()
        if clear:
            a.clear()
        else:
            del a["x"]
        a["x"] = "of a"
        b["x"] = "of b"
        b.flush()
        if compacted:
            b.compact()
        len(a)
        a.write_keys()
        assert b["x"] == "of b"
        assert a["x"] == "of a"
        a.flush()
        a._check()
        assert b["x"] == "of a"
        b._check()
        assert ("y" in b) is not clear


@pytest.mark.parametrize("compacts", [False, True])
@pytest.mark.parametrize("anew", [False, True])
def test_a_transaction_in_a_directory_that_was_removed_fails(path, monkeypatch, anew, compacts):
    if compacts:
        monkeypatch.setattr(chest.upkeep, "COMPACT_BYTES", 500)
    with Chest(path=path) as c:
        for n in range(30):
            c["x"] = n
            c.flush()
        with pytest.raises(FileNotFoundError, match="dropped"), c.transaction():
            c["y"] = [1]
            c.flush()
            shutil.rmtree(path)
            if anew:
                with Chest({"precious": 1, "y": 2}, path):
                    pass
        if anew:
            c.refresh()  # nobody tells of a new directory
            assert dict(c) == {"precious": 1, "y": 2}
            assert c.verify().ok
            c._check()
        else:
            c._memory.drop()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="nobody tells what is open")
def test_a_forked_child_keeps_no_pack_on_disk(path):
    with Chest({n: f"value {n}" for n in range(100)}, path) as c:
        c.flush()
        c.available_memory = 0
        assert c[5] == "value 5"
        child = os.fork()
        if not child:
            links = []
            for n in os.listdir("/proc/self/fd"):
                with suppress(OSError):  # that of the folder itself
                    links.append(os.readlink(f"/proc/self/fd/{n}"))
            os._exit(sum(".pack" in link for link in links) if links else 9)
        assert os.waitpid(child, 0)[1] == 0
        assert c[6] == "value 6"
