"""A readable, safe, portable file name for any key.

Identifiers keep their name, tuples become directories, and all else gets a digest of its type
and value, the same in every run of Python. Names are relative, with ``/`` on every system.

Two keys may share a name, which is rare; two names may differ only by case, or want a file where
another wants a directory (``'_a'`` and ``('a', 'b')``). Whoever creates the file looks for that.
"""

from __future__ import annotations

import os
import pickle
import re
from contextlib import suppress
from enum import Enum

from xxhash import xxh3_128_hexdigest

PART_LENGTH = 100  # characters, with the leading underscore
PATH_LENGTH = 200  # characters
LEVELS = 8
NESTING = 16  # of tuples and frozensets; what goes deeper is told apart by its pickle
SAFE_PART_BYTES = 255  # in UTF-8; what file systems take
SAFE_BYTES = 1000

_RESERVED = r"(?:con|prn|aux|nul|clock\$|con(?:in|out)\$|(?:com|lpt)[0-9¹²³]) *(?:[./]|\Z)"
_PART = rf"(?!{_RESERVED})(?!\.)[^/\\:\x00-\x1f\x7f-\x9f\ud800-\udfff]+(?<![. ])"

_readable = re.compile(rf"(?!{_RESERVED})[_a-z][_a-z0-9]*", re.ASCII | re.IGNORECASE).fullmatch
_safe = re.compile(rf"{_PART}(?:/{_PART})*", re.IGNORECASE).fullmatch
_pack = re.compile(r"\.pack-([1-9][0-9]{0,17})", re.ASCII).fullmatch
_address = re.compile(r"\bat 0x[0-9a-f]+", re.IGNORECASE).search
_unspeakable = re.compile(r"[\0\ud800-\udfff]").search
_words = re.compile(r"\w+|\W").findall


def key_to_filename(key: object) -> str:
    """Return the relative path of the file for `key`; never raise.

    Examples
    --------
    >>> key_to_filename("x"), key_to_filename(("a", "b", "c"))
    ('x', '_a/_b/c')
    >>> key_to_filename(1)
    '9e4e915e013b4bfbc9d741efb8744a30'
    """
    with suppress(Exception):  # what says that it is a tuple need not be one: mocks say so
        if isinstance(key, tuple) and 2 <= len(key) <= LEVELS:
            parents = ["_" + _name(member, PART_LENGTH - 1) for member in key[:-1]]
            path = "/".join([*parents, _name(key[-1], PART_LENGTH)])
            if len(path) <= PATH_LENGTH:
                return path
    return _name(key, PART_LENGTH)


def _name(key: object, length: int) -> str:
    with suppress(Exception):
        if isinstance(key, str) and _readable(name := str.__str__(key)) and len(name) <= length:
            return name
    return digest_name(key)


def digest_name(key: object) -> str:
    """Return 32 hexadecimal digits that name `key` where its readable name cannot; never raise."""
    for spell in (_spell, _spell_as_pickle, _spell_type):
        with suppress(Exception):  # the methods of a key may do anything
            return _digest(spell(key))
    return _digest("")


def _digest(text: str) -> str:
    return xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _spell(value: object, depth: int = 0) -> str:
    if depth > NESTING:
        raise RecursionError("nested too deeply")
    match value:
        case tuple() | frozenset():
            members = [_digest(_spell(member, depth + 1)) for member in value]
            text = " ".join(members if isinstance(value, tuple) else sorted(members))
        case bytes() | memoryview():
            text = bytes(value).hex()
        case _:
            text = _spell_atom(value)
    return _spell_type(value) + text


def _spell_atom(value: object) -> str:
    match value:
        case str():
            return str.__str__(value)
        case Enum():
            return str(value._name_)
        case int():
            return hex(value)  # unlike repr, for any number of digits
    if _address(text := repr(value)):
        raise ValueError("this repr is another one in the next run")
    # sets print their members in an order that is another one in the next run
    return "".join(sorted(_words(text))) if "{" in text else text


def _spell_as_pickle(value: object) -> str:
    return _spell_type(value) + pickle.dumps(value, protocol=5).hex()


def _spell_type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__} "


def pack_number(name: object) -> int:
    """Return the number of the pack that has this name, 0 if it is not the name of a pack.

    Examples
    --------
    >>> pack_number(".pack-12"), pack_number("x")
    (12, 0)
    """
    found = _pack(name) if isinstance(name, str) else None
    return int(found[1]) if found else 0


def stays_inside(name: object) -> bool:
    """Tell whether `name`, on this system, is a file below the directory that it is relative to."""
    if not isinstance(name, str) or _unspeakable(name) or (os.sep != "/" and os.sep in name):
        return False
    parts = name.split("/")
    return not os.path.splitdrive(name)[0] and all(part and part[0] != "." for part in parts)


def is_safe_filename(name: object) -> bool:
    """Tell whether `name`, whoever made it, is a relative path on every system, hidden on none.

    Examples
    --------
    >>> list(map(is_safe_filename, ["_a/b~1", "../x", "/x", "C:x", ".keys", "con.txt"]))
    [True, False, False, False, False, False]
    """
    if not isinstance(name, str) or len(name) > SAFE_BYTES or not _safe(name):
        return False
    encoded = name.encode()
    return len(encoded) <= SAFE_BYTES and max(map(len, encoded.split(b"/"))) <= SAFE_PART_BYTES
