"""What becomes of the chests of a process when it forks, and when it ends.

A forked child has its parent's memory, and with it every chest of the parent: values that are not
its own to save, locks that nobody in it will release, a file position that it shares. So there
each chest becomes a new handle on its directory.

A child of `multiprocessing` ends without the functions of `atexit`. What it put into chests is
saved by a finalizer of `multiprocessing` instead.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from chest.errors import say

logger = logging.getLogger("chest")

LAST = -100  # the exit priority of what `multiprocessing` does when no child is alive any more
LAST_WAIT = 1.0  # seconds to wait at the end of the program for threads, and for transactions


class Handle(Protocol):
    """A chest, as far as processes are concerned."""

    closed: bool
    in_transaction: bool

    def start_anew(self) -> None:
        """Become a new handle on the directory, in a forked child."""

    def finish(self) -> None:
        """Save what is not saved, and close."""


_handles: weakref.WeakSet[Handle] = weakref.WeakSet()
_kept: dict[str, Callable[[], object]] = {}
_finalizer: Any = None
_ready = False
_pid = os.getpid()


def just_forked() -> bool:
    """Tell whether this is a forked child in which chests are still those of its parent.

    Whatever runs in it before, as a garbage collection, must not touch them.
    """
    return os.getpid() != _pid


def enlist(handle: Handle) -> None:
    """Look after a chest when this process forks or ends."""
    global _ready
    _handles.add(handle)
    util = sys.modules.get("multiprocessing.util")
    if util is None or _ready:
        return
    _ready = True
    util.register_after_fork(_handles, _end_with_multiprocessing)
    if _is_child():
        _end_with_multiprocessing()


def _is_child() -> bool:
    return sys.modules["multiprocessing"].parent_process() is not None


def _end_with_multiprocessing(_: object = None) -> None:
    """Save everything when a child of `multiprocessing` ends; its start forgets earlier calls."""
    global _finalizer
    if _finalizer is None or not _finalizer.still_active():
        util = sys.modules["multiprocessing.util"]
        _finalizer = util.Finalize(None, _finish, exitpriority=0)
        util.Finalize(None, _remove_kept, exitpriority=LAST)


def keep_until_end(path: str, remove: Callable[[], object]) -> None:
    """Call `remove` when this process ends, for the directory `path`."""
    _kept[path] = remove


@atexit.register
def _end() -> None:
    """Finish every chest; then remove what was kept for other processes."""
    _finish()
    util = sys.modules.get("multiprocessing.util")
    if _kept and util is not None and not util.is_exiting():
        util.Finalize(None, _remove_kept, exitpriority=LAST)
    else:
        _remove_kept()


def _finish() -> None:
    """Finish every chest, those first whose transactions others may wait for.

    In a child of `multiprocessing` threads may go on. They are waited for, but not for ever: those
    of a pool end only later.
    """
    handles = [handle for handle in _handles if not handle.closed]
    until = time.monotonic() + LAST_WAIT
    for thread in threading.enumerate() if handles else ():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(until - time.monotonic(), 0))
    for handle in sorted(handles, key=lambda handle: not handle.in_transaction):
        handle.finish()


def _remove_kept() -> None:
    while _kept:
        path, remove = _kept.popitem()
        try:
            remove()
        except Exception as error:  # noqa: BLE001 -- nobody is left to catch it, so it is said
            if os.path.lexists(path):
                logger.warning("the temporary chest at %s was not removed: %s", path, say(error))


def _after_fork() -> None:
    global _finalizer, _pid
    _pid = os.getpid()
    _kept.clear()  # they are the parent's to remove
    _finalizer = None
    for handle in list(_handles):
        handle.start_anew()
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.register_after_fork(_handles, _end_with_multiprocessing)
        if _is_child():  # and this is a child of it, which multiprocessing does not know
            _end_with_multiprocessing()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
