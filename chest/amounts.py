"""Amounts of memory as people write them: ``'2 GB'``, ``'500 MiB'``, ``'25%'``."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PREFIXES = "kmgtp"
_AMOUNT = re.compile(r"([\d.]+(?:e[+-]?\d+)?)\s*(%|(?:([kmgtp])(i?))?b?)", re.IGNORECASE)
_LIMIT, _LIMIT_V1 = "memory.max", "memory.limit_in_bytes"  # of control groups, versions 2 and 1


def parse_amount(text: str) -> float:
    """Return how many bytes a text says.

    Parameters
    ----------
    text : str
        A number and a unit: ``B`` or none, ``kB`` to ``PB`` (powers of 1000), ``KiB`` to ``PiB``
        (powers of 1024), with or without the ``B``, in letters of any case; or ``%`` of the memory
        that this process may have.

    Raises
    ------
    ValueError
        If it is anything else, or more than all of the memory.
    OSError
        If it is a share, and the system does not tell how much memory there is.

    Examples
    --------
    >>> parse_amount('2 GB'), parse_amount('1.5KiB')
    (2000000000.0, 1536.0)
    """
    found = _AMOUNT.fullmatch(text.strip())
    try:
        if found is None:
            raise ValueError(text)
        number = float(found[1])
    except ValueError:
        message = f"{text!r} is no amount of memory: write it like '2 GB', '500 MiB' or '25%'"
        raise ValueError(message) from None
    if found[2] == "%":
        if number > 100:
            raise ValueError(f"{text!r} is more than there is")
        return number / 100 * machine_memory()
    power = _PREFIXES.index(found[3].lower()) + 1 if found[3] else 0
    return float(number * (1024 if found[4] else 1000) ** power)


def machine_memory() -> int:
    """Return how many bytes of memory this process may have, the limit of its container included.

    Raises
    ------
    OSError
        If the system does not tell.
    """
    return int(min([_installed(), *_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]))


def _installed() -> int:
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return int(importlib.import_module("psutil").virtual_memory().total)
    except ImportError as error:
        message = "how much memory there is, only psutil can tell here: install it, or give bytes"
        raise OSError(message) from error


def _limits(memberships: Path, root: Path) -> Iterator[float]:
    """Yield the limits of the control groups that this process is in, and of all above them."""
    lines: list[str] = []
    with suppress(OSError):
        lines = memberships.read_text("utf-8").splitlines()
    for line in lines:
        _, kinds, name = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        base, file = (root / "memory", _LIMIT_V1) if kinds else (root, _LIMIT)
        group = base / name.lstrip("/")
        for folder in [group, *group.parents]:
            with suppress(OSError, ValueError):  # none there, or "max"
                yield int((folder / file).read_text("utf-8"))
            if folder == base:
                break
