"""What lies under a name: a file, or something else that somebody put there.

A pipe is waited for, a device gives bytes for ever, and what is written to a link is written
wherever it leads. So whatever opens a file looks first.
"""

from __future__ import annotations

import errno
import os
from io import FileIO
from stat import S_ISREG

NO_FILE = "what has its name is no file"


def demand_file(path: str) -> None:
    """Look before a file is read.

    Raises
    ------
    FileNotFoundError
        If something else is there, or a link to something else.
    OSError
        If the system does not tell.
    """
    if not S_ISREG(os.stat(path).st_mode):
        raise FileNotFoundError(errno.ENOENT, NO_FILE, path)


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
