"""How far long work has come."""

import builtins
import contextlib
import glob
import io
import os
import pickle
import sys
import threading
import types

import numpy as np
import pytest

import chest.bulk
import chest.progress
from chest import Chest, UnsavedError, repair

SMALL = {("k", n): f"value {n}" for n in range(3000)}
LARGE = {n: bytes([n]) * 200_000 for n in range(20)}


class Stop(Exception):
    """What a callable raises."""


# The last four are such as mean something to the chest where it meets them.
ERRORS = [Stop, FileNotFoundError, RuntimeError, KeyError, KeyboardInterrupt]


def stop_at(number, error=Stop):
    """A callable that raises when so many are done."""

    def tell(done, total):
        if done >= number:
            raise error("stop")

    return tell


def rises(told, total):
    """Tell whether this is from none to all, never back, and nothing twice."""
    done = [each for each, _ in told]
    return (
        told[0] == (0, total)
        and told[-1] == (total, total)
        and done == sorted({*done})
        and {each for _, each in told} == {total}
    )


# -- flush ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [SMALL, LARGE, {**SMALL, **LARGE}, {"x": [1]}], ids=len)
def test_a_flush_tells_from_none_to_all(path, data):
    told = []
    with Chest(data, path) as c:
        c.flush(progress=lambda *news: told.append(news))
    assert rises(told, len(data))
    assert len(told) >= len(data) / 1024


def test_each_value_with_a_file_of_its_own_is_told(path):
    told = []
    with Chest({**LARGE, "a": 1, "b": 2}, path) as c:
        c.flush(progress=lambda done, total: told.append(done))
    assert {*range(21)} <= {*told}


def test_all_is_told_when_it_is_committed_and_not_before(path):
    seen = {}
    with Chest(LARGE, path) as c, Chest(path=path) as other:
        c.flush(progress=lambda done, _: seen.update({done: len(other)}))
    assert seen == {**dict.fromkeys(range(20), 0), 20: 20}


def test_only_what_has_to_be_written_is_counted(path):
    told = []
    with Chest({"x": [1], "y": [2], "z": "text"}, path) as c:
        c.flush()
        c["x"].append(3)
        c.flush(progress=lambda *news: told.append(news))
    assert told == [(0, 1), (1, 1)]


def test_with_nothing_to_do_nothing_is_told(path):
    def fail(*_):
        raise AssertionError

    with Chest({"x": 1, "y": 2}, path) as c:
        c.flush()
        c.flush(progress=fail)
        del c["x"]
        c.flush(progress=fail)
        c.prefetch(["y"], progress=fail)
        c.prefetch([], progress=fail)
    with Chest(path=path, readonly=True) as c:
        assert [*c] == ["y"]
        c.flush(progress=fail)
    with Chest() as c:
        assert c.verify(progress=fail).ok


def test_what_cannot_be_written_is_not_told_as_done(path):
    told = []
    with Chest({"x": 1, "y": lambda: 0, "z": 2}, path) as c:
        with pytest.raises(UnsavedError):
            c.flush(progress=lambda *news: told.append(news))
        assert told[0] == (0, 3)
        assert told[-1][0] < 3
        del c["y"]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("number", [0, 1, 7, 19])
def test_what_is_raised_ends_a_flush_and_nothing_of_it_counts(path, number, error):
    with Chest({"old": 1, "gone": 2}, path) as c:
        c.flush()
        c.update(LARGE)
        c["old"] = [2]
        del c["gone"]
        with pytest.raises(error):
            c.flush(progress=stop_at(number, error))
        c._check()
        assert not glob.glob(os.path.join(path, ".new-*"))
        with Chest(path=path) as other:
            assert dict(other) == {"old": 1, "gone": 2}
        assert dict(c) == {**LARGE, "old": [2]}
    with Chest(path=path) as c:
        assert dict(c) == {**LARGE, "old": [2]}


def test_what_is_raised_when_all_is_committed_takes_nothing_back(path):
    with Chest(LARGE, path) as c:
        with pytest.raises(Stop):
            c.flush(progress=stop_at(20))
        c._check()
        with Chest(path=path) as other:
            assert dict(other) == LARGE


def remove_staged(path):
    """Do what somebody does who takes the files of a flush for abandoned: they are made again."""
    for name in glob.glob(os.path.join(path, ".new-*")):
        os.unlink(name)


def test_what_is_written_once_more_is_not_told_once_more(path):
    told = []

    def tell(done, _):
        told.append(done)
        if done == 19:
            remove_staged(path)

    with Chest(LARGE, path) as c:
        c.flush(progress=tell)
        assert told == [*range(21)]
    with Chest(path=path) as c:
        assert dict(c) == LARGE


def test_what_is_raised_is_not_taken_for_a_refusal_of_the_disk(path):
    told = []

    def tell(done, _):
        if told and max(told) == 83:  # of the values written again, 84 would be told
            raise FileNotFoundError
        told.append(done)
        if done == 83:
            remove_staged(path)

    data = {"bad": lambda: 0, "big": bytes(200_000), **dict.fromkeys(range(100), "small")}
    with Chest(data, path) as c:
        with pytest.raises(UnsavedError) as caught:
            c.flush(progress=tell)
        assert max(told) == 83
        assert caught.value.keys == ["bad"]
        del c["bad"]


def read(c):
    assert c[3] == LARGE[3]
    assert len(c) >= 20


def set_one(c):
    c["new"] = bytes(200_000)


def replace(c):
    c[19] = "another"


def delete(c):
    c.pop(19, None)
    c.pop(1, None)


def spill(c):
    c.move_to_disk(5)
    c.available_memory = 1_000_000


def transact(c):
    with c.transaction():
        c["count"] = c.get("count", 0) + 1


def clear(c):
    c.clear()


@pytest.mark.parametrize("data", [LARGE, {**LARGE, **SMALL}], ids=["large", "both"])
@pytest.mark.parametrize(
    "use", [read, set_one, replace, delete, spill, transact, clear, Chest.flush, Chest.verify]
)
def test_a_flush_may_tell_who_uses_the_chest(path, use, data):
    with Chest(data, path) as c, Chest(data) as twin:
        c.flush(progress=lambda *_: use(c))
        use(twin)
        if use is transact:
            twin["count"] = c["count"]
        c._check()
        assert dict(c) == dict(twin)
        expected = dict(twin)
    with Chest(path=path) as c:
        assert dict(c) == expected


@pytest.mark.parametrize(("data", "number"), [(LARGE, 1), (SMALL, 4)], ids=["large", "small"])
def test_what_is_to_be_written_next_may_be_deleted(path, data, number):
    key = [*data][number]

    def tell(done, _):
        if done == number:
            del c[key]

    with Chest(data, path) as c:
        c.flush(progress=tell)
        c._check()
        assert dict(c) == {k: value for k, value in data.items() if k != key}


def test_a_flush_in_a_transaction_tells_too(path):
    told = []
    with Chest(path=path) as c:
        with pytest.raises(Stop), c.transaction():
            c.update(LARGE)
            c.flush(progress=lambda *news: told.append(news))
            raise Stop
        assert rises(told, 20)
        assert dict(c) == {}


# -- prefetch -------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_all(paths, mode):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(builtins.open(path, mode)) for path in paths]


def nothing(key):
    pass


OPTIONS = {"threads": {}, "opened": {"open_many": open_all}, "hook": {"on_miss": nothing}}
kinds = pytest.mark.parametrize("options", OPTIONS.values(), ids=[*OPTIONS])


@kinds
def test_a_prefetch_tells_what_it_reads_in_the_thread_that_asked(path, options):
    told, threads = [], set()

    def tell(*news):
        told.append(news)
        threads.add(threading.get_ident())

    with Chest({**SMALL, **LARGE}, path):
        pass
    with Chest(path=path, **options) as c:
        assert c[3] == LARGE[3]
        c.prefetch([*LARGE, *[*SMALL][:100]], progress=tell)
        assert rises(told, 119)
        assert threads == {threading.get_ident()}
        assert len(c.inmem) == 120


def test_a_prefetch_counts_what_fits(path):
    told = []
    with Chest(LARGE, path):
        pass
    with Chest(path=path, available_memory=1_100_000) as c:
        c.prefetch(LARGE, progress=lambda *news: told.append(news))
    assert rises(told, 5)


def test_files_that_are_opened_together_are_told_together(path, monkeypatch):
    told = []
    monkeypatch.setattr("chest.bulk.MAX_OPEN_FILES", 8)
    with Chest(LARGE, path):
        pass
    with Chest(path=path, open_many=open_all) as c:
        c.prefetch(LARGE, progress=lambda *news: told.append(news))
    assert told == [(0, 20), (8, 20), (16, 20), (20, 20)]


def test_it_is_told_while_threads_read(path):
    first = threading.Event()

    def load(file):
        if not file.name.endswith(os.sep + "a"):
            assert first.wait(30)
        return pickle.load(file)

    def tell(done, total):
        if done:
            first.set()

    with Chest({"a": 1, "b": 2, "c": 3}, path):
        pass
    with Chest(path=path, load=load) as c:
        c.prefetch(["a", "b", "c"], progress=tell)
        assert dict(c.inmem) == {"a": 1, "b": 2, "c": 3}


@kinds
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("number", [0, 1, 20])
def test_what_is_raised_ends_a_prefetch(path, options, number, error):
    with Chest(LARGE, path):
        pass
    with Chest(path=path, **options) as c:
        with pytest.raises(error):
            c.prefetch(LARGE, progress=stop_at(number, error))
        c._check()
        assert dict(c) == LARGE


@kinds
@pytest.mark.parametrize("use", [read, replace, delete, transact, clear, Chest.flush, spill])
def test_a_prefetch_may_tell_who_uses_the_chest(path, options, use):
    with Chest(LARGE, path):
        pass
    with Chest(path=path, **options) as c, Chest(LARGE) as twin:
        c.prefetch(LARGE, progress=lambda *_: use(c))
        use(twin)
        if use is transact:
            twin["count"] = c["count"]
        c._check()
        assert dict(c) == dict(twin)


def test_damage_is_told_as_ever(path):
    with Chest(LARGE, path) as c:
        c.flush()
        name = c.key_to_filename(7)
    with open(name, "r+b") as file:
        file.truncate(5)
    for options in OPTIONS.values():
        told = []
        with Chest(path=path, **options) as c:
            with pytest.raises(chest.CorruptValueError):
                c.prefetch(LARGE, progress=lambda *news, told=told: told.append(news))
        assert told[-1][0] < 20


# -- verify and repair ----------------------------------------------------------------------------


def test_a_verification_tells_each_value(path):
    told = []
    with Chest({**LARGE, "a": 1}, path) as c:
        c.flush()
        c["b"] = 2
        report = c.verify(progress=lambda *news: told.append(news))
    assert report.ok
    assert told == [(n, 21) for n in range(22)]


def test_what_is_raised_ends_a_verification(path):
    with Chest(LARGE, path) as c:
        c.flush()
        with pytest.raises(Stop):
            c.verify(progress=stop_at(4))
        assert c.verify().keys == 20
        c._check()


@pytest.mark.parametrize("use", [read, set_one, replace, delete, transact, clear, Chest.flush])
def test_a_verification_may_tell_who_uses_the_chest(path, use):
    def tell(*_):
        use(c)
        c.flush()

    with Chest(LARGE, path) as c:
        c.flush()
        assert c.verify(progress=tell).ok
        c._check()


def test_a_repair_tells_and_shows(path, capsys):
    told = []
    with Chest(LARGE, path):
        pass
    repair(path, progress=lambda *news: told.append(news))
    assert told == [(n, 20) for n in range(21)]
    repair(path, progress=True)
    assert capsys.readouterr() == ("", "repair: 20 of 20 keys\n")


# -- update ---------------------------------------------------------------------------------------


def test_an_update_tells_each_pair():
    told = []
    with Chest() as c:
        c.update({"x": 1, "y": 2}, z=3, progress=lambda *news: told.append((*news, len(c))))
        assert told == [(0, 2, 0), (1, 2, 1), (2, 2, 2)]
        assert dict(c) == {"x": 1, "y": 2, "z": 3}
        told.clear()
        c.update([("x", 4), ("w", 5)], overwrite=False, progress=lambda *news: told.append(news))
        assert told == [(0, 2), (1, 2), (2, 2)]
        assert dict(c) == {"x": 1, "y": 2, "z": 3, "w": 5}


def test_an_update_from_a_chest_tells_each_batch(path, tmp_path, monkeypatch):
    monkeypatch.setattr(chest.bulk, "LINKS", 8)
    told = []
    with Chest(LARGE, path) as c, Chest(path=str(tmp_path / "other")) as other:
        other.update(c, progress=lambda *news: told.append((*news, len(other))))
        assert told == [(0, 20, 0), (8, 20, 8), (16, 20, 16), (20, 20, 20)]
        assert other == c


def test_an_update_with_what_does_not_know_its_length_tells_nothing():
    def fail(*_):
        raise AssertionError

    with Chest() as c:
        c.update(((n, n) for n in range(3)), progress=fail)
        c.update((), progress=fail)
        c.update({}, progress=True)
        assert dict(c) == {0: 0, 1: 1, 2: 2}


def test_what_is_raised_ends_an_update_and_what_was_set_stays():
    with Chest() as c:
        with pytest.raises(Stop):
            c.update(LARGE, progress=stop_at(7, Stop))
        assert [*c] == [*LARGE][:7]
        c._check()


@pytest.mark.parametrize("value", [True, None, print, 5, "half", np.zeros(2)])
def test_progress_is_a_key_of_an_update_where_it_cannot_be_meant(value):
    with Chest() as c:
        c.update(a=1, progress=value, b=2)
        assert [*c] == ["a", "progress", "b"]
        assert c["progress"] is value
    with Chest() as c:
        c.update({"x": 1}, progress=value)
        meant = value is None or value is True or value is print
        assert [*c] == (["x"] if meant else ["x", "progress"])


# -- what is shown --------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch, capsys):
    # Of the class: the test itself has another object for stderr than its fixtures.
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True)
    monkeypatch.setattr(chest.progress, "BEAT", 0)


@pytest.fixture
def no_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)


class Bar:
    """Stands in for tqdm."""

    made = []

    def __init__(self, **options):
        self.options, self.n, self.closed = options, 0, False
        self.made.append(self)

    def update(self, more):
        self.n += more

    def close(self):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    """The bars that a tqdm of ours made."""
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=Bar))
    return Bar.made


WORK = {
    "flush": lambda c, how: c.flush(progress=how),
    "verify": lambda c, how: (c.flush(), c.verify(progress=how)),
    "prefetch": lambda c, how: (move_out(c), c.prefetch([*c], progress=how)),
}
works = pytest.mark.parametrize("name", WORK)


def move_out(c):
    for key in c:
        c.move_to_disk(key)


@works
def test_a_terminal_sees_a_line_that_ends(path, capsys, terminal, no_tqdm, name):
    with Chest(LARGE, path) as c:
        WORK[name](c, True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"\r{name}: 0 of 20 keys\r")
    assert err.endswith(f"\r{name}: 20 of 20 keys\n")
    assert err.count("\n") == 1


def test_a_terminal_is_not_written_to_all_the_time(path, capsys, monkeypatch, terminal, no_tqdm):
    monkeypatch.setattr(chest.progress, "BEAT", 1000)
    with Chest(LARGE, path) as c:
        c.flush(progress=True)
    assert capsys.readouterr().err == "\rflush: 0 of 20 keys\rflush: 20 of 20 keys\n"


@works
def test_elsewhere_it_is_one_line_in_the_end(path, capsys, bars, name):
    with Chest(LARGE, path) as c:
        WORK[name](c, True)
        assert capsys.readouterr() == ("", f"{name}: 20 of 20 keys\n")
        c.flush(progress=True)  # nothing to do
        WORK[name](c, False)
        WORK[name](c, None)
    assert capsys.readouterr() == ("", "")
    assert bars == []


@works
def test_tqdm_is_used_where_it_is_installed(path, capsys, terminal, bars, name):
    with Chest(LARGE, path) as c:
        WORK[name](c, True)
        (bar,) = bars
        assert bar.options == {"total": 20, "desc": name, "unit": " keys"}
        assert (bar.n, bar.closed) == (20, True)
        c.flush(progress=True)  # nothing to do
        assert len(bars) == 1
    assert capsys.readouterr() == ("", "")


def test_a_notebook_counts_as_a_terminal(path, monkeypatch, bars):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    with Chest({"x": 1}, path) as c:
        c.flush(progress=True)
    assert [bar.n for bar in bars] == [1]


def test_a_bar_or_line_is_ended_by_an_error_too(path, capsys, terminal, bars, monkeypatch):
    with Chest({"x": lambda: 0, "y": bytes(200_000)}, path) as c:
        with pytest.raises(UnsavedError):
            c.flush(progress=True)
        assert bars[0].closed
        assert bars[0].n < 2
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
        with pytest.raises(UnsavedError):
            c.flush(progress=True)
        del c["x"]
    assert capsys.readouterr().err == "\rflush: 0 of 1 keys\n"


def test_without_stderr_nothing_is_shown(path, monkeypatch):
    with Chest({"x": 1}, path) as c:
        monkeypatch.setattr(sys, "stderr", None)
        c.flush(progress=True)
        monkeypatch.undo()


@works
def test_tqdm_itself(path, capsys, terminal, name):
    tqdm = pytest.importorskip("tqdm")
    monitored, tqdm.tqdm.monitor_interval = tqdm.tqdm.monitor_interval, 0  # by a thread of its own
    try:
        with Chest(LARGE, path) as c:
            WORK[name](c, True)
    finally:
        tqdm.tqdm.monitor_interval = monitored
    out, err = capsys.readouterr()
    assert out == ""
    assert f"\r{name}: 100%" in err
    assert "20/20" in err
    assert err.endswith(" keys/s]\n")
    assert err.count("\n") == 1


def test_a_stand_in_for_stderr_gets_a_line_and_a_closed_one_none(monkeypatch):
    written = []
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(write=written.append))
    with Chest({"x": 1, "y": 2}) as c:
        c.flush(progress=True)
        assert "".join(written) == "flush: 2 of 2 keys\n"
        closed = io.StringIO()
        closed.close()
        monkeypatch.setattr(sys, "stderr", closed)
        c["z"] = 3
        c.flush(progress=True)
        assert c.verify().keys == 3
