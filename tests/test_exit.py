"""What becomes of a chest when its program ends, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import chest
from chest import Chest

ROOT = Path(chest.__file__).parent.parent

needs_fork = [os.fork] if hasattr(os, "fork") else []


DROPPED = "ignore:a chest was not closed:ResourceWarning"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script in a new process that knows `PATH`; return what it printed.

    The script finds a module `held` next to itself, and is in a directory that holds nothing else
    but the chest. Temporary chests must be gone when it has ended.
    """
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "held.py").write_text(
        "from typing import NamedTuple\n\nclass Point(NamedTuple):\n    x: int\n    y: int\n"
    )
    monkeypatch.syspath_prepend(folder)
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": modules}

    def run(script, *, status=0, first=""):
        file = folder / "script.py"
        file.write_text(
            f"{first}\nimport sys\nfrom chest import Chest\n\nPATH = {str(tmp_path / 'chest')!r}\n"
            + textwrap.dedent(script)
        )
        command = [sys.executable, "-W", "error", "-W", DROPPED, str(file)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stderr
        assert os.listdir(temporary) == []
        return done

    yield run
    sys.modules.pop("held", None)


SAVED = {
    "module level": """
        c = Chest(path=PATH)
        c['x'] = [1, 2, 3]
        """,
    "little memory": """
        c = Chest(path=PATH, available_memory=0)
        c['x'] = [1, 2]
        c['x'].append(3)
        """,
    "changed in place": """
        c = Chest(path=PATH)
        c['x'] = [1]
        c.flush()
        c['x'] += [2, 3]
        """,
    "last reference goes in a function": """
        def work():
            c = Chest(path=PATH)
            c['x'] = [1, 2, 3]

        work()
        with Chest(path=PATH, readonly=True) as c:
            assert c == {'x': [1, 2, 3]}
        """,
    "reference cycle": """
        class Owner:
            pass

        owner = Owner()
        owner.chest = Chest(path=PATH)
        owner.self = owner
        owner.chest['x'] = [1, 2, 3]
        del owner
        """,
    "a view refers to the chest": """
        items = Chest([('x', [1, 2, 3])], PATH).items()
        """,
    "with block": """
        with Chest(path=PATH) as c:
            c['x'] = [1, 2, 3]
        """,
    "held by another module": """
        import held

        held.chest = Chest(path=PATH)
        held.chest['x'] = [1, 2, 3]
        """,
    "held by sys": """
        sys.chest = Chest(path=PATH)
        sys.chest['x'] = [1, 2, 3]
        """,
    "held by a thread": """
        import threading

        def work(c):
            c['x'] = [1, 2, 3]

        thread = threading.Thread(target=work, args=[Chest(path=PATH)])
        thread.start()
        """,
    "set at exit": """
        import atexit

        c = Chest(path=PATH)
        atexit.register(lambda: c.update(x=[1, 2, 3]))
        """,
    "set in a generator that never ends": """
        def work():
            with Chest(path=PATH) as c:
                c['x'] = [1, 2, 3]
                yield c

        generator = work()
        next(generator)
        """,
    "closed and closed again": """
        c = Chest(path=PATH)
        c['x'] = [1, 2, 3]
        c.close()
        c.close()
        """,
    "json": """
        import json

        old = Chest(path=PATH)
        old['x'] = [1, 2, 3]
        c = Chest(path=PATH + '-json', dump=json.dump, load=json.load)
        c['x'] = [1, 2, 3]
        """,
}


@pytest.mark.parametrize("script", SAVED)
def test_a_chest_is_saved_when_the_program_ends(path, run, script):
    done = run(SAVED[script])
    assert (done.stdout, done.stderr) == ("", "")
    with Chest(path=path) as c:
        assert c == {"x": [1, 2, 3]}
        c._check()


@pytest.mark.parametrize(("code", "status"), [("", 0), ("0", 0), ("3", 3)])
def test_a_chest_is_saved_by_sys_exit(path, run, code, status):
    done = run(
        f"""
        c = Chest(path=PATH)
        c['x'] = [1]
        sys.exit({code})
        """,
        status=status,
    )
    assert (done.stdout, done.stderr) == ("", "")
    with Chest(path=path) as c:
        assert c == {"x": [1]}


def test_a_chest_is_saved_after_an_exception_nobody_caught(path, run):
    done = run(
        """
        c = Chest(path=PATH)
        c['x'] = [1]
        d = Chest(available_memory=0)
        d['x'] = [2]
        1 / 0
        """,
        status=1,
    )
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert done.stderr.count("Error") == 1
    with Chest(path=path) as c:
        assert c == {"x": [1]}


def test_a_chest_in_a_frame_of_the_traceback_is_saved(path, run):
    done = run(
        """
        def work():
            with Chest(path=PATH) as c, Chest(available_memory=0) as d:
                c['x'] = [1]
                d['x'] = [2]
                raise KeyboardInterrupt

        try:
            work()
        except KeyboardInterrupt as error:
            kept = error
        c = Chest(path=PATH)
        c['y'] = [2]
        """
    )
    assert (done.stdout, done.stderr) == ("", "")
    with Chest(path=path) as c:
        assert c == {"x": [1], "y": [2]}


def test_what_only_classes_can_read_is_saved_as_key_and_as_value(path, run):
    done = run(
        """
        import collections, datetime, decimal, enum, fractions, pathlib, uuid

        import numpy as np

        import held

        c = Chest(path=PATH)
        things = [
            datetime.date(2026, 1, 1),
            datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
            datetime.timedelta(1),
            uuid.UUID(int=1),
            decimal.Decimal('1.5'),
            fractions.Fraction(1, 3),
            pathlib.PurePosixPath('a/b'),
            np.float32(0.5),
            np.int64(3),
            np.datetime64('2026-01-01'),
            held.Point(1, 2),
            b'bytes',
            (1, 'a'),
            frozenset({1}),
            int,
        ]
        for thing in things:
            c[thing] = thing
        c['array'] = np.arange(10)
        c['large'] = np.arange(100_000)
        c['structured'] = np.zeros(2, dtype=[('a', 'i4'), ('b', 'U3')])
        c['objects'] = np.array([{1}, None])
        c['deque'] = collections.deque([1], maxlen=2)
        """
    )
    assert (done.stdout, done.stderr) == ("", "")
    with Chest(path=path) as c:
        import held
        import numpy as np

        keys = list(c)
        assert len(keys) == 20
        for key in keys[:15]:
            assert c[key] == key
            assert type(c[key]) is type(key)
        assert held.Point(1, 2) in c
        assert c["array"].sum() == 45
        assert np.array_equal(c["large"], np.arange(100_000))
        assert c["structured"].dtype.names == ("a", "b")
        assert list(c["objects"]) == [{1}, None]
        assert c["deque"].maxlen == 2


def test_a_reader_that_ends_changes_nothing(path, run):
    with Chest({b"bytes": [1], 1.5: [2], "x": [3]}, path):
        pass
    before = {file.name: file.read_bytes() for file in Path(path).iterdir()}
    done = run(
        """
        c = Chest(path=PATH)
        print(len(c), c['x'], c[b'bytes'])
        """
    )
    assert (done.stdout, done.stderr) == ("3 [3] [1]\n", "")
    assert {file.name: file.read_bytes() for file in Path(path).iterdir()} == before


@pytest.mark.parametrize(
    "end",
    [
        "",
        "sys.exit()",
        "c.close()",
        "c.drop()",
        "c.close(); c.close()",
        "del c",
        "c.cycle = c; del c",
        "sys.chest = c",
        "c.available_memory = 1e9; c['self'] = c",
    ],
)
def test_a_temporary_directory_is_gone_when_the_program_has_ended(run, end):
    done = run(
        f"""
        import os

        c = Chest(available_memory=0)
        c['x'] = [1]
        c['a', 'b'] = [2]
        print(sorted(os.listdir(c.path)))
        {end}
        """
    )
    assert (done.stdout, done.stderr) == ("['.keys', '_a', 'x']\n", "")


def test_a_temporary_chest_writes_nothing_when_it_ends(run):
    done = run(
        """
        import pickle

        def dump(obj, file):
            print('dumped', obj)
            pickle.dump(obj, file)

        c = Chest(dump=dump)
        c['x'] = 1
        c.flush()
        c['y'] = 2
        c['f'] = lambda: 1
        """
    )
    assert (done.stdout, done.stderr) == ("dumped 1\n", "")


def test_what_cannot_be_saved_at_exit_is_told_once_on_stderr_and_all_else_is_saved(path, run):
    done = run(
        """
        c = Chest(path=PATH)
        c['before'] = [1]
        c['function'] = lambda: 1
        c['after'] = [2]
        """
    )
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "'function'" in done.stderr
    assert path in done.stderr
    assert "Traceback" not in done.stderr
    with Chest(path=path) as c:
        assert c == {"before": [1], "after": [2]}
        c._check()


def test_what_was_replaced_by_what_cannot_be_saved_stays_as_it_was(path, run):
    done = run(
        """
        with Chest(path=PATH) as c:
            c['x'] = [1]
        c = Chest(path=PATH)
        c['x'] = lambda: 1
        """
    )
    assert "'x'" in done.stderr
    with Chest(path=path) as c:
        assert c == {"x": [1]}


def test_several_chests_end_together(tmp_path, run):
    done = run(
        """
        import os

        chests = [Chest(path=f'{PATH}-{n}') for n in range(3)]
        chests += [Chest(available_memory=0) for n in range(3)]
        for n, c in enumerate(chests):
            c['x'] = [n]
        """
    )
    assert (done.stdout, done.stderr) == ("", "")
    for n in range(3):
        with Chest(path=tmp_path / f"chest-{n}") as c:
            assert c == {"x": [n]}


def test_two_handles_on_one_directory_end_together(path, run):
    done = run(
        """
        a, b = Chest(path=PATH), Chest(path=PATH)
        a['x'] = [1]
        b['y'] = [2]
        """
    )
    assert (done.stdout, done.stderr) == ("", "")
    with Chest(path=path) as c:
        assert c == {"x": [1], "y": [2]}


@pytest.mark.parametrize("end", ["", "del c, d", "d.close()", "d.drop()"])
@pytest.mark.parametrize("fork", needs_fork)
def test_a_forked_child_neither_saves_nor_removes_what_its_parent_has(path, run, fork, end):
    done = run(
        f"""
        import os

        c, d = Chest(path=PATH), Chest(available_memory=0)
        c['x'], d['x'] = [1], [2]
        child = os.fork()
        if child == 0:
            {end}
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0
        print(d['x'], sorted(os.listdir(d.path)), os.listdir(PATH))
        """
    )
    assert (done.stdout, done.stderr) == ("[2] ['.keys', 'x'] ['.keys']\n", "")
    with Chest(path=path) as c:
        assert c == {"x": [1]}


@pytest.mark.parametrize("fork", needs_fork)
def test_a_forked_child_that_raises_leaves_its_parent_alone(path, run, fork):
    done = run(
        """
        import os

        c, d = Chest(path=PATH), Chest(available_memory=0)
        c['x'], d['x'] = [1], [2]
        child = os.fork()
        if child == 0:
            raise SystemExit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        c['y'] = [3]
        print(d['x'])
        """
    )
    assert (done.stdout, done.stderr) == ("[2]\n", "")
    with Chest(path=path) as c:
        assert c == {"x": [1], "y": [3]}


@pytest.mark.parametrize("fork", needs_fork)
def test_a_forked_child_sees_what_its_parent_stored(path, run, fork):
    done = run(
        """
        import os

        c = Chest(path=PATH, available_memory=0)
        c['x'] = [1]
        c['y'] = [2]
        child = os.fork()
        if child == 0:
            print(c['x'], c['y'], flush=True)
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0
        """
    )
    assert (done.stdout, done.stderr) == ("[1] [2]\n", "")


def test_a_program_that_dies_keeps_what_was_flushed(path, run):
    done = run(
        """
        import os

        c = Chest(path=PATH)
        c['x'] = [1]
        c.flush()
        c['y'] = [2]
        os._exit(7)
        """,
        status=7,
    )
    assert (done.stdout, done.stderr) == ("", "")
    with Chest(path=path) as c:
        assert c == {"x": [1]}
        c._check()


# -- nothing waits for ever -----------------------------------------------------------------------

ENDS = {
    "a manager, and a chest that was sent to a process": """
        import pickle
        from multiprocessing.managers import SyncManager

        if __name__ == "__main__":
            manager = SyncManager(("127.0.0.1", 0))  # the name of a socket may be too long
            manager.start()
            c = Chest({'x': 1})
            pickle.dumps(c)
            saved = Chest({'x': 1}, PATH)
        """,
    "a child with a pool of threads": """
        import multiprocessing
        from concurrent.futures import ThreadPoolExecutor

        def work():
            global pool, c
            pool = ThreadPoolExecutor(2)
            pool.submit(int).result()
            c = Chest({'x': 1}, PATH)

        if __name__ == "__main__":
            child = multiprocessing.get_context("spawn").Process(target=work)
            child.start()
            child.join()
            assert child.exitcode == 0
        """,
    "a thread that stays in a transaction": """
        import logging
        import threading

        logging.getLogger("chest").setLevel("CRITICAL")
        a = Chest(path=PATH)
        others = [Chest(path=PATH) for _ in range(4)]
        inside = threading.Event()

        def stay():
            with a.transaction():
                inside.set()
                threading.Event().wait()

        threading.Thread(target=stay, daemon=True).start()
        inside.wait()
        for c in others:
            c['x'] = 1
        """,
}


@pytest.mark.parametrize("script", ENDS.values(), ids=ENDS)
def test_a_program_ends_whoever_goes_on(path, run, script):
    assert run(script).stderr == ""
    with Chest(path=path) as c:
        assert c == {"x": 1}


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("fork", needs_fork)
def test_what_is_collected_right_after_a_fork_is_the_parents(path, run, fork, busy):
    """Another library's function runs in the child before that of chest."""
    done = run(
        f"""
        import threading

        gc.disable()

        class Owner:
            pass

        def make():
            owner = Owner()
            owner.me = owner
            owner.chest = Chest({{'x': 1}}, PATH)
            return owner.chest.lock

        lock = make()
        leave = threading.Event()
        inside = threading.Event()

        def hold():
            with lock:
                inside.set()
                leave.wait()

        if {busy}:
            threading.Thread(target=hold).start()
            inside.wait()
        child = os.fork()
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(dict(Chest(path=PATH, readonly=True)))
        leave.set()
        """,
        first="import gc, os; os.register_at_fork(after_in_child=gc.collect)",
    )
    assert (done.stdout, done.stderr) == ("{}\n", "")
    with Chest(path=path) as c:
        assert c == {"x": 1}
