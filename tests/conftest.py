"""What every test may use, and what is checked after every test."""

from __future__ import annotations

import gc
import glob
import os
import sys
import tempfile
import threading
import zlib
from contextlib import contextmanager, nullcontext

import pytest

SHARE = 6  # of the tests that are one of very many, each Python runs one in so many


def pytest_collection_modifyitems(config, items):
    """Leave out most of the tests marked as one of many; ``CHEST_MANY=all`` runs them all."""
    if os.environ.get("CHEST_MANY") == "all":
        return
    turn = sys.version_info.minor % SHARE

    def left_out(item):
        many = item.get_closest_marker("many") is not None
        return many and zlib.crc32(item.name.encode()) % SHARE != turn

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]


def pytest_collection_finish():
    """Spare the garbage collector what the libraries and the tests themselves are made of.

    That is a hundred times what a test makes, and many tests collect again and again.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Let go of the timer of each test: a fork looks at every thread, also of those ended."""
    result = yield
    item.__dict__.pop("cancel_timeout", None)
    return result


@pytest.fixture
def path(tmp_path):
    """Where a chest may be; nothing is there yet."""
    return str(tmp_path / "chest")


@pytest.fixture(scope="session", autouse=True)
def _own_temp_dir(tmp_path_factory):
    """Give this run, and its children, a directory for temporary chests that no one else uses."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("temporary"))
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(autouse=True)
def _measured(request):
    """Keep coverage out of tests that repeat; give it back what a test that traces took from it."""
    repeats = request.node.get_closest_marker("repeats") is not None
    with _unmeasured() if repeats else nullcontext():
        before = sys.gettrace()
        yield
        sys.settrace(before)


@contextmanager
def _unmeasured():
    """Pause coverage, if it runs, in this process and in its children."""
    coverage = "coverage" in sys.modules and sys.modules["coverage"].Coverage.current()
    if not coverage:
        yield
        return
    coverage.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_START", raising=False)  # by which children start it
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield
    patches = coverage.get_option("run:patch")
    coverage.set_option("run:patch", [])  # they are still there, and would be made again
    coverage.start()
    coverage.set_option("run:patch", patches)


@pytest.fixture(autouse=True)
def _no_leaks(request):
    """Fail a test that leaves an open file, a thread or a temporary chest behind.

    Warnings are errors by the settings in pyproject.toml; collecting the garbage brings up those
    that are due.
    """
    failures = request.session.testsfailed
    before = _resources()
    yield
    if request.session.testsfailed > failures:  # the traceback keeps what the test had open
        return
    if _resources() - before:
        gc.collect()
    left = _resources() - before
    assert not left, f"left behind: {sorted(left)}"


def _resources():
    threads = {f"thread {thread.name}" for thread in threading.enumerate()}
    chests = set(glob.glob(os.path.join(tempfile.gettempdir(), "*.chest")))
    return threads | chests | _open_files()


def _open_files():
    if not os.path.isdir("/proc/self/fd"):
        return set()
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
        if target.startswith("/"):  # pipes and sockets belong to the test runner
            found.add(f"descriptor {number} of {target}")
    return found
