"""What lies under a name: a file, or something else that somebody put there.

A pipe is waited for, a device gives bytes for ever, and what is written to a link is written
wherever it leads. So whatever opens a file looks first.
"""

from __future__ import annotations

import builtins
import errno
import os
from contextlib import suppress
from io import FileIO
from stat import S_ISLNK, S_ISREG

NO_FILE = "what has its name is no file"


def demand_file(path: str) -> int:
    """Look before a file is read; return how many bytes it has.

    Raises
    ------
    FileNotFoundError
        If there is none, or something else, or a link to something else.
    OSError
        If the system does not tell.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise FileNotFoundError(errno.ENOENT, NO_FILE, path) from error
        raise
    if not S_ISREG(status.st_mode):
        raise FileNotFoundError(errno.ENOENT, NO_FILE, path)
    return status.st_size


def is_there(path: str) -> bool:
    """Tell whether anything has a path, a link to nothing too.

    Raises
    ------
    OSError
        If the system does not tell: then the path must not pass for free.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_file(path: str) -> bool:
    """Tell whether `demand_file` finds one; raises OSError if the system does not tell."""
    try:
        demand_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_link(path: str) -> bool:
    """Tell whether what is there is a link; raises OSError if the system does not tell."""
    try:
        return S_ISLNK(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_own(path: str) -> bool:
    """Tell whether what is there is a file, and no link to one."""
    return S_ISREG(os.lstat(path).st_mode)


def starts_with(path: str, start: bytes) -> bool:
    """Tell whether a file that is there, and no link, begins with certain bytes."""
    with suppress(OSError):
        if is_own(path):
            with builtins.open(path, "rb") as file:
                return file.read(len(start)) == start
    return False


def own_size(path: str) -> int:
    """Return how many bytes a file has; 0 if there is none, or a link, or no file."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return 0
    return status.st_size if S_ISREG(status.st_mode) else 0


def demand_own(file: FileIO, path: str) -> None:
    """Look before something is written to a file that was there, and is open by now.

    Raises
    ------
    FileNotFoundError
        If it is no file, or elsewhere, since a link led there.
    OSError
        If the system does not tell.
    """
    status = os.lstat(path)
    if not (S_ISREG(status.st_mode) and os.path.samestat(status, os.fstat(file.fileno()))):
        raise FileNotFoundError(errno.ENOENT, NO_FILE, path)


def write_new(path: str, data: bytes) -> None:
    """Write a file that must not exist."""
    with builtins.open(path, "xb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]


def read_whole(path: str, length: int) -> bytes:
    """Read a small file that should have `length` bytes, and one more if there is one."""
    demand_file(path)
    # Not os.open: an interrupt may come before its descriptor has a name.
    with builtins.open(path, "rb", buffering=0) as file:
        data = file.read(length + 1)
        while 0 < len(data) < length:
            more = file.read(length + 1 - len(data))
            if not more:
                break
            data += more
        return data
