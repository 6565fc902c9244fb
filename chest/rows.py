"""Where values lie: a row for each value that a commit put, in columns.

The columns are arrays of integers, which take 32 bytes a row, and the names of the files. Rows are
only ever added, so that who looks at one while others come in finds what was there before.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from chest.columns import Entry


class Rows:
    """The rows of a chest, and what those leave behind that are needed no more.

    Attributes
    ----------
    obsolete : list of Entry
        What the last commit made obsolete, and whose files may still be there.
    unsure : list of Entry
        Obsolete as well; but nobody could tell whether the files are still those of the chest.
    folded : set of str
        The lower-case forms of the names in use that have capital letters, folders among them.
    packs : dict of str to int
        Every pack that is known, with the bytes of those of its values that are alive.
    retired : int
        How many bytes of values are needed no more since this was made.
    """

    def __init__(self) -> None:
        self.obsolete: list[Entry] = []
        self.unsure: list[Entry] = []
        self.folded: set[str] = set()
        self.packs: dict[str, int] = {}
        self.retired = 0
        self._files: list[str] = []
        self._places = array("Q")
        self._lengths = array("Q")
        self._digests = array("Q")
        self._serials = array("Q")

    def entry(self, row: int) -> Entry:
        """Return where the value of a row lies."""
        return Entry(self._files[row], self._places[row], self._lengths[row], self._digests[row])

    def length(self, row: int) -> int:
        """Return how many bytes the value of a row has on disk."""
        return self._lengths[row]

    def where(self, row: int) -> tuple[str, int, int, int]:
        """Return what `entry` does, as a plain tuple, which is made quicker."""
        return self._files[row], self._places[row], self._lengths[row], self._digests[row]

    def span(self, rows: range) -> tuple[str, int, array[int], array[int]] | None:
        """Return pack, place, lengths and digests of rows whose values lie there end to end."""
        first, last = rows[0], rows[-1]
        file, place = self._files[first], self._places[first]
        lengths = self._lengths[first : last + 1]
        if file not in self.packs or self._files[first : last + 1].count(file) != len(rows):
            return None
        if self._places[last] + lengths[-1] - place != sum(lengths):
            return None
        return file, place, lengths, self._digests[first : last + 1]

    def dead_packs(self) -> list[str]:
        """Return the packs of which the committed state needs nothing."""
        return [name for name, alive in self.packs.items() if not alive]

    def left(self) -> list[Entry]:
        """Return what is obsolete, with the packs of which nothing is needed."""
        dead = (Entry(name, 0, 0, 0) for name in self.dead_packs())
        return [*self.obsolete, *self.unsure, *dead]

    def forget_folders(self, names: Iterable[str]) -> None:
        """Note that folders have gone."""
        self.folded.difference_update(name.lower() for name in names)

    def _add_rows(
        self,
        files: str | list[str],
        places: Iterable[int],
        lengths: Iterable[int],
        digests: Iterable[int],
        serials: Iterable[int],
    ) -> range:
        """Add rows, for values in one pack or in files of their own; return their numbers."""
        base = len(self._files)
        self._places.extend(places)
        self._lengths.extend(lengths)
        self._digests.extend(digests)
        self._serials.extend(serials)
        if isinstance(files, str):
            alive = self._lengths[base:]
            self.packs[files] = self.packs.get(files, 0) + sum(alive)
            self._files += [files] * len(alive)
        else:
            self._note_capitals(files)
            self._files += files
            self._keep_files(files)
        return range(base, len(self._files))

    def _retire(self, rows: Iterable[int]) -> None:
        """Take note that the values of these rows are needed no more."""
        files, packs = self._files, self.packs
        for row in rows:
            file = files[row]
            self.retired += self._lengths[row]
            if file in packs:
                packs[file] -= self._lengths[row]
            else:
                self.obsolete.append(self.entry(row))
                self.folded.discard(file.lower())

    def _keep_files(self, names: list[str]) -> None:
        """Let no file go as obsolete whose name a value got anew, for somebody had removed it."""
        if self.obsolete and names:
            taken = {*names}
            self.obsolete = [entry for entry in self.obsolete if entry.file not in taken]

    def _note_capitals(self, names: list[str]) -> None:
        every = "/".join(names)
        if every == every.lower():
            return
        for name in names:
            way = name
            while way and way != way.lower():
                self.folded.add(way.lower())
                way = way.rpartition("/")[0]
