"""Who is reading which value from disk."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any

LOST = 1.0  # seconds between two looks at a load that another thread began


class Loads:
    """The values that are being read now.

    Parameters
    ----------
    lock : threading.RLock
        The lock of the chest.

    Attributes
    ----------
    threads : dict of key to int
        Which thread reads the value of a key. Each read has an int object of its own, and takes out
        no other: a read within a read, or one that waits for none, is not in here.
    waiting : int
        How many threads wait for what others read.
    unreleased : list
        One item for every time that a block ended in another thread than the one that has the lock,
        which alone can let go of it.
    """

    def __init__(self, lock: Any) -> None:
        self.threads: dict[Any, int] = {}
        self.waiting = 0
        self.unreleased: list[None] = []
        self._lock = lock
        self._ended = threading.Condition(lock)

    def holds_lock(self) -> bool:
        """Tell whether this thread has the lock of the chest, in the way that a Condition asks."""
        held: bool = self._lock._is_owned()
        return held

    def take_over(self) -> None:
        """Have the lock in the place of a thread that ended with it."""
        count, _ = self._lock._release_save()
        self._lock._acquire_restore((count, threading.get_ident()))

    def release_what_is_left(self) -> None:
        """Let go of the lock in the place of blocks that ended in other threads."""
        while self.unreleased and self.holds_lock():
            self.unreleased.pop()
            self._lock.release()

    def wait(self, key: Hashable) -> None:
        """Wait for the end of another load; needs the lock."""
        self.waiting += 1
        try:
            if key in self.threads:  # now that who takes it out looks for those who wait
                self._ended.wait(LOST)  # an interrupt may have come before it was told
        finally:
            # An interrupt in the condition may have come while it had let go of the lock.
            if not self.holds_lock():
                self._lock.acquire()
            self.waiting -= 1

    def tell(self) -> None:
        """Wake up those who wait, if any do: after an interrupt nobody should wait here."""
        if self.waiting:
            with self._lock:
                self._ended.notify_all()

    def mend(self) -> None:
        """Forget what an interrupt may have left; a load that goes on is not waited for."""
        self.threads.clear()
