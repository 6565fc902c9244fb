"""The value files of a chest: written once under a name nobody uses, read, and removed.

A value is first written to a *staging* file, and gets its final name under the lock of the index.
No file is ever written over, and only files that the index named are removed.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from io import FileIO
from itertools import count
from typing import Any, TypeVar

from chest.errors import CorruptIndexError, locating, say, show
from chest.filenames import digest_name, is_safe_filename, pack_number, stays_inside
from chest.files import is_link, is_there, starts_with

INDEX = ".keys"
PICKLE = b"\x80\x05"  # how a pickle of protocol 5 begins
ASIDE = ".damaged"  # the folder of what a repair moved
ABANDONED = 3600  # seconds after which the staging file of another process is nobody's
NAME_BYTES = 240  # in UTF-8; leaves room for what makes a name unique
TRIES = 9

F = TypeVar("F")

logger = logging.getLogger("chest")

_is_staging = re.compile(r"\.new-[0-9a-f]{16}-[0-9]+").fullmatch
_staging: weakref.WeakSet[Any] = weakref.WeakSet()


def keep_from_children(file: F) -> F:
    """Return a file that is being staged, to which a child forked meanwhile writes nothing."""
    with suppress(TypeError):  # a file of somebody's own that cannot be remembered
        _staging.add(file)
    return file


def _let_go() -> None:
    """Let a forked child write nowhere where it would write to its parent's files."""
    files = [file for file in _staging if not getattr(file, "closed", True)]
    if files:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for file in files:
            with suppress(ValueError, OSError, AttributeError):  # no file of the system
                os.dup2(nowhere, file.fileno())
        os.close(nowhere)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class Directory:
    """The files below one directory.

    Parameters
    ----------
    path : str
        Absolute.
    namer : callable
        Key to the file name it should have.
    """

    def __init__(self, path: str, namer: Callable[..., str]) -> None:
        self.path = path
        self.index = os.path.join(path, INDEX)
        self._namer = namer
        self._namer_failed = False  # which is told of once
        self._token = secrets.token_hex(8)
        self._numbers = count()
        self._stuck: set[str] = set()  # staging files that could not be removed yet

    def full_path(self, name: str) -> str:
        """Return the path of the file that the index calls `name`.

        Raises
        ------
        CorruptIndexError
            If that is not a file of this directory.
        """
        if not stays_inside(name) and not pack_number(name):
            raise CorruptIndexError(self.index, f"it names a file outside, {name!r}")
        return self._join(name)

    def staging_path(self) -> str:
        """Return the path of a file that does not exist."""
        return self._join(f".new-{self._token}-{next(self._numbers)}")

    def staged(self, path: str) -> bool:
        """Tell whether a path is one that `staging_path` gave here, not in a forked child."""
        return path.startswith(self._join(f".new-{self._token}-"))

    def remove_staged(self, paths: Iterable[str]) -> None:
        """Remove staging files, and those that could not be removed before."""
        for path in [*paths, *self._stuck]:
            try:
                remove_quietly(path)
                self._stuck.discard(path)
            except OSError:
                self._stuck.add(path)

    def name_for(self, key: object) -> str:
        """Return the name that the file of `key` should have."""
        try:
            name = self._namer(key)
        except Exception as error:  # noqa: BLE001 -- the user's function; no value is lost for it
            if not self._namer_failed:
                self._namer_failed = True
                message = "a digest names the file of %s, as key_to_filename failed: %s"
                logger.warning(message, show(key), say(error))
            return digest_name(key)
        if is_safe_filename(name) and len(name.rpartition("/")[2].encode()) <= NAME_BYTES:
            return name
        return digest_name(key)

    def exists(self, name: str) -> bool:
        """Tell whether a file or folder has `name`, or would have it if case did not count."""
        return any(is_there(self._join(way)) for way in {name, name.lower()})

    def has_folder(self, name: str) -> bool:
        """Tell whether `name` is a folder, and not a link to one."""
        full = self._join(name)
        return os.path.isdir(full) and not is_link(full)

    def place(self, staged: str, name: str) -> None:
        """Give a staging file its final name."""
        full = self._join(name)
        if "/" in name:
            make_folders(os.path.dirname(full))
        os.rename(staged, full)

    def remove(self, names: Iterable[str]) -> list[str]:
        """Remove files and the folders that they leave empty; return those that stay."""
        return [name for name in names if not self._remove(name)]

    def _remove(self, name: str) -> bool:
        full = self.full_path(name)
        try:
            if self.leads_out(name):
                return True  # it is somebody else's by now
            os.unlink(full)
        except FileNotFoundError:
            pass
        except OSError:  # open elsewhere on Windows, or no longer ours to remove: tried again
            if _may_be_there(full):
                return False
        folder = os.path.dirname(full)
        while folder != self.path and _remove_folder(folder):
            folder = os.path.dirname(folder)
        return True

    def find_pack(self) -> str:
        """Return the path of a pack with pickles in it, nothing if there is none."""
        packs = (self._join(name) for name in os.listdir(self.path) if pack_number(name))
        return next((path for path in packs if starts_with(path, PICKLE)), "")

    def leads_out(self, name: str) -> bool:
        """Tell whether a folder on the way to a file is a link."""
        folders = name.split("/")[:-1]
        ways = ("/".join(folders[: n + 1]) for n in range(len(folders)))
        return any(is_link(self._join(way)) for way in ways)

    def missing_folders(self, names: Iterable[str]) -> set[str]:
        """Return those folders on the way to `names` that are not there."""
        missing: set[str] = set()
        for name in names:
            folder = name.rpartition("/")[0]
            while folder and folder not in missing and not os.path.isdir(self._join(folder)):
                missing.add(folder)
                folder = folder.rpartition("/")[0]
        return missing

    def _join(self, name: str) -> str:
        return os.path.join(self.path, name)

    def remove_abandoned(self) -> None:
        """Remove the staging files that others abandoned; those that stay are tried again later."""
        self.remove_staged(map(self._join, self.staging()))

    def remove_staging(self) -> None:
        """Remove every staging file."""
        for name in self.staging(every=True):
            remove_quietly(self._join(name))

    def staging(self, *, every: bool = False) -> list[str]:
        """Return the names of the staging files that others abandoned, or of all of them."""
        names = filter(_is_staging, os.listdir(self.path))
        return [name for name in names if every or _age(self._join(name)) > ABANDONED]

    def size(self, names: Iterable[str]) -> int:
        """Return how many bytes files have, together; those that are gone have none."""
        total = 0
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                total += os.lstat(self._join(name)).st_size
        return total

    def files(self) -> set[str]:
        """Return the names of all files that are there, but for what a repair moved aside."""
        found: set[str] = set()
        for folder, folders, names in os.walk(self.path):
            start = os.path.relpath(folder, self.path).replace(os.sep, "/") + "/"
            if start == "./":
                start = ""
                folders[:] = [name for name in folders if name != ASIDE]
            found.update(start + name for name in names)
        return found

    def set_aside(self, name: str, move: Callable[[str, str], object] = os.rename) -> str | None:
        """Move a damaged file to the folder for these; return its new path, None if none is there.

        Parameters
        ----------
        name : str
        move : callable
            From one path to another.
        """
        full = self._join(name)
        if self.leads_out(name) or not is_there(full) or self.has_folder(name):
            return None
        place = self._join(f"{ASIDE}/{name}")
        make_folders(os.path.dirname(place))
        target = next(way for suffix in _suffixes() if not is_there(way := place + suffix))
        move(full, target)
        return target

    def sync(self, names: Iterable[str]) -> None:
        """Make sure that the names of these files survive a power cut."""
        folders = {os.path.dirname(self._join(name)) for name in names}
        for folder in folders - {self.path}:
            above = folder
            while above != self.path:
                sync_folder(above)
                above = os.path.dirname(above)
        sync_folder(self.path)


class Names:
    """Chooses the names of the files of one commit: no two alike, on any system; needs the lock.

    Parameters
    ----------
    directory : Directory
    folded : set of str
        The lower-case forms of names in use that have capital letters.
    """

    def __init__(self, directory: Directory, folded: set[str]) -> None:
        self._directory = directory
        self._folded = folded
        self._files: set[str] = set()
        self._folders: dict[str, str] = {}  # by lower-case form

    def choose(self, name: str) -> str:
        """Return `name`, or one like it that is free."""
        folder, slash, last = name.rpartition("/")
        start = self._choose_folder(folder) + slash if slash else ""
        name = next(filter(self._free, (start + last + suffix for suffix in _suffixes())))
        self._files.add(name.lower())
        return name

    def _choose_folder(self, name: str) -> str:
        parent, slash, last = name.rpartition("/")
        start = self._choose_folder(parent) + slash if slash else ""
        for suffix in _suffixes():
            name = start + last + suffix
            lower = name.lower()
            if self._folders.get(lower) == name:
                return name
            known = lower in self._folders or lower in self._files
            if not known and (self._directory.has_folder(name) or self._free(name)):
                self._folders[lower] = name
                return name
        raise AssertionError("there is always another suffix")

    def _free(self, name: str) -> bool:
        lower = name.lower()
        used = lower in self._files or lower in self._folders or lower in self._folded
        return not used and not self._directory.exists(name)


def _suffixes() -> Iterator[str]:
    yield ""
    for n in range(1, TRIES):
        yield f"~{n}"
    while True:
        yield f"~{secrets.token_hex(4)}"


def _may_be_there(path: str) -> bool:
    try:
        return is_there(path)
    except OSError:
        return True


def _remove_folder(path: str) -> bool:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True  # and the one above may be empty
    except OSError:  # not empty
        return False
    return True


def make_folders(path: str) -> None:
    """Make a folder and those above it that are not there, for the user alone.

    Raises
    ------
    OSError
        If one cannot be made, or something else has its name.
    """
    if not os.path.isdir(path):
        if (folder := os.path.dirname(path)) != path:
            make_folders(folder)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):
                raise


def remove_quietly(path: str) -> None:
    """Remove a file that may be gone already."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def _age(path: str) -> float:
    try:
        return time.time() - os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


def sync_file(path: str) -> None:
    """Make sure that the content of a file survives a power cut."""
    with locating(path), FileIO(path, "r+") as file:
        os.fsync(file.fileno())


def sync_folder(path: str) -> None:
    """Make sure that the names in a folder survive a power cut, where the system can."""
    if os.name == "nt":
        return
    opened: list[int] = []
    try:
        # In one call: an interrupt may come before a descriptor has a name.
        opened.extend(map(os.open, [path], [os.O_RDONLY]))
        with locating(path):
            os.fsync(opened[0])
    finally:
        for fd in opened:
            os.close(fd)
