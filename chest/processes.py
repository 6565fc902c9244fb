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
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from chest.errors import say

logger = logging.getLogger("chest")


class Handle(Protocol):
    """A chest, as far as processes are concerned."""

    def start_anew(self) -> None:
        """Become a new handle on the directory, in a forked child."""

    def finish(self) -> None:
        """Save what is not saved, and close."""


_handles: weakref.WeakSet[Handle] = weakref.WeakSet()
_kept: dict[str, Callable[[], object]] = {}
_finalizer: Any = None
_ready = False


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
        _finalizer = util.Finalize(None, _end, exitpriority=0)


def keep_until_end(path: str, remove: Callable[[], object]) -> None:
    """Call `remove` when this process ends, for the directory `path`."""
    _kept[path] = remove


@atexit.register
def _end() -> None:
    """Finish every chest; then remove what was kept for other processes."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    for handle in list(_handles):
        handle.finish()
    if _kept and "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            if not child.daemon:
                child.join()
    while _kept:
        path, remove = _kept.popitem()
        try:
            remove()
        except Exception as error:  # noqa: BLE001 -- nobody is left to catch it, so it is said
            if os.path.lexists(path):
                logger.warning("the temporary chest at %s was not removed: %s", path, say(error))


def _after_fork() -> None:
    global _finalizer
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
