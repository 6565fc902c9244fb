"""How far long work has come, told to a callable or shown to people.

It is shown with tqdm if that is installed, else as a line of text; to stderr, as tqdm does. Where
nobody watches that, in a log or a pipe, it is one line when all is done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

BEAT = 0.1  # seconds between two words to people

Tell = Callable[[int, int], object]  # keys done, keys in all
Progress = Tell | bool | None


def is_progress(value: object) -> bool:
    """Tell whether something can be meant as an option `progress`."""
    return value is None or isinstance(value, bool) or callable(value)


def counting(progress: Progress, what: str) -> AbstractContextManager[Tally | None]:
    """Return what counts the keys of work called `what`, in a ``with`` block; None for nobody.

    Parameters
    ----------
    progress : bool or callable or None
        True shows it, a callable is called with the numbers of keys done and of keys in all.
    what : str
    """
    if callable(progress):
        return Tally(progress)
    # There is none in a program without a console, and one that is closed takes no text.
    if not progress or sys.stderr is None or getattr(sys.stderr, "closed", False):
        return nullcontext()
    return Tally(_Shown(what))


class Tally:
    """Counts keys that are done, and tells: from 0 up to all, nothing twice, nothing if none.

    Parameters
    ----------
    tell : callable
        Called in the thread that counts, with the numbers of keys done and of keys in all.

    Attributes
    ----------
    done : int
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._total = 0
        self.done = 0

    def begin(self, total: int) -> None:
        """Say how many there are."""
        self._total = total
        if total:
            self._tell(0, total)

    def reach(self, done: int) -> None:
        """Count so many as done; what was told is not taken back."""
        if self.done < done <= self._total:
            self.done = done
            self._tell(done, self._total)

    def step(self) -> None:
        """Count one more."""
        self.reach(self.done + 1)

    def finish(self) -> None:
        """Count all as done."""
        self.reach(self._total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self._tell, _Shown):
            self._tell.close()


class _Shown:
    """Shows people how far it is, from the first time that there is something to show."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._shown: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._shown is None:
            self._shown = _show(self._what, total)
        self._shown.update(done - self._shown.n)

    def close(self) -> None:
        """Leave what was shown last."""
        if self._shown is not None:
            self._shown.close()


def _show(what: str, total: int) -> Any:
    """Return a bar of tqdm, or a line that is used in the same way."""
    # Notebooks are watched though they are no terminals, so `disable=None` of tqdm is not enough.
    is_terminal = getattr(sys.stderr, "isatty", bool)  # a stand-in for stderr may have no more
    watched = is_terminal() or "ipykernel" in sys.modules  # than `write`
    if watched:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            return tqdm(total=total, desc=what, unit=" keys")
    return _Line(what, total, watched=watched)


class _Line:
    """A line of text: written over as it goes on if somebody watches, else written in the end."""

    def __init__(self, what: str, total: int, *, watched: bool) -> None:
        self.n = 0
        self._what, self._total, self._watched = what, total, watched
        self._file = sys.stderr
        self._next = 0.0
        self._written = False

    def update(self, more: int) -> None:
        """Count so many more, and show it if it is time."""
        self.n += more
        due = self._watched and time.monotonic() >= self._next
        if due or self.n == self._total:
            self._next = time.monotonic() + BEAT
            text = f"{self._what}: {self.n:,} of {self._total:,} keys"
            self._write("\r" * self._watched + text)
            self._written = True

    def close(self) -> None:
        """End the line."""
        if self._written:
            self._write("\n")

    def _write(self, text: str) -> None:
        self._file.write(text)
        if self._watched:
            self._file.flush()
