"""What goes around a ``with`` block, as the steps of a generator.

As `contextlib.contextmanager` does it, but for interrupts: one that comes just when a generator
there has reached its ``yield`` leaves it in the block for as long as the traceback lives, with
whatever lock it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import wraps
from types import TracebackType
from typing import ParamSpec

P = ParamSpec("P")
Steps = Generator[None, None, None]


class BlockFailedError(Exception):
    """What steps meet at their ``yield`` when something was raised in the block."""


class Block:
    """Goes through `steps` to their one ``yield``, and on when the block is left."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def __enter__(self) -> None:
        try:
            next(self._steps)
        except StopIteration:
            raise RuntimeError("this block was entered before: begin another one") from None
        except BaseException:
            self._steps.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                next(self._steps, None)
            else:
                self._steps.throw(BlockFailedError())
        except BlockFailedError:
            pass  # what the block raised goes on by itself
        finally:
            self._steps.close()


def block(steps: Callable[P, Steps]) -> Callable[P, Block]:
    """Make a generator function one whose calls stand in ``with`` statements."""

    @wraps(steps)
    def _begin(*args: P.args, **kwargs: P.kwargs) -> Block:
        return Block(steps(*args, **kwargs))

    return _begin
