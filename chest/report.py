"""What `Chest.verify` and `chest.repair` found."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from chest.errors import show


@dataclass(frozen=True)
class Problem:
    """A value that is not there as it was written.

    Attributes
    ----------
    key : hashable
        Its key; a `chest.pickled.PickledKey` if that cannot be read.
    path : str
        The file that holds it, or should.
    reason : str
        What is wrong.
    """

    key: Hashable
    path: str
    reason: str


@dataclass
class Report:
    """What is in a directory, and what is wrong there.

    Attributes
    ----------
    path : str or None
        The directory; None for a temporary chest that has none yet.
    keys : int
        How many values were read; of a repair, how many are kept.
    nbytes : int
        How many bytes these have, as they were dumped.
    index : list of str
        What is wrong with ``.keys``.
    damaged, missing : list of Problem
        Values that are not as written, or gone. A repair took them out of the index.
    stray : list of str
        Paths of files that the index does not name: other people's, or left by what no commit
        knows. They do no harm.
    aside : list of str
        Paths to which a repair moved what is damaged.
    repaired : bool
        Whether this is what a repair did.
    ok : bool
        Whether every value is there as it was written, and the index too; strays may be there.

    Examples
    --------
    >>> print(Report('results', keys=3, nbytes=1234))
    3 values, 1,234 bytes: all as written
    """

    path: str | None
    keys: int = 0
    nbytes: int = 0
    index: list[str] = field(default_factory=list)
    damaged: list[Problem] = field(default_factory=list)
    missing: list[Problem] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    repaired: bool = False

    @property
    def ok(self) -> bool:
        """Whether every value, and the index, is there as it was written."""
        return not (self.index or self.damaged or self.missing)

    def __str__(self) -> str:
        return "\n".join([f"{self._counts()}: {self._verdict()}", *self._lines()])

    def _counts(self) -> str:
        kept = " kept" if self.repaired and not self.ok else ""
        return f"{self.keys:,} value{'s' * (self.keys != 1)}{kept}, {self.nbytes:,} bytes"

    def _verdict(self) -> str:
        if self.ok:
            return "all as written"
        parts = [f"{len(self.damaged):,} damaged"] * bool(self.damaged)
        parts += [f"{len(self.missing):,} missing"] * bool(self.missing)
        parts += ["the index is damaged"] * bool(self.index)
        return ", ".join(parts)

    def _lines(self) -> Iterator[str]:
        for reason in self.index:
            yield f"  index    .keys: {reason}"
        for kind, problems in (("damaged", self.damaged), ("missing", self.missing)):
            for problem in problems:
                where = self._relative(problem.path)
                yield f"  {kind}  {show(problem.key)} in {where}: {problem.reason}"
        for kind, paths in (("stray  ", self.stray), ("aside  ", self.aside)):
            for path in paths:
                yield f"  {kind}  {self._relative(path)}"

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self.path) if self.path else path
