"""Three directories written by the real chest 0.2.3, and what they hold.

They lie next to this file, made by hand, once, with CPython 3.9.18 (the last series on which
chest 0.2.3 runs), chest 0.2.3 and HeapDict 1.0.1::

    python3.9 -m venv old
    old/bin/pip install chest==0.2.3 heapdict==1.0.1
    old/bin/python tests/old_chests/make.py

``pickle``
    The defaults: values and index are pickles of protocol 1. Keys and paths of tuples: 0.2.3 put
    all parts but the last in directories with an underscore, flattened inner tuples, and named
    everything that is no identifier by the MD5 of its ``str``. The index names bytes and dates
    by globals (``_codecs.encode``, ``datetime.date``).
``json``
    ``dump=json.dump, load=json.load, mode='t'``: the index is a JSON list of [key, name] pairs,
    in the order in which the keys were set.
``json_int``
    The same with ints as keys: the pairs keep them as JSON numbers.

0.2.3 writes its index again when a chest is collected at the end of the interpreter, and empties
it if that fails, which it does for keys such as dates. So this leaves by ``os._exit``.
"""

from __future__ import annotations

import datetime as dt
import importlib
import importlib.metadata
import json
import os
import shutil
import sys
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))

PICKLE: dict[Any, Any] = {
    "x": [1, 2, 3],
    "_hidden": "a string",
    "nested": {"a": {"b": [1.5, None, True]}, "c": b"\x00\xff"},
    "two words": None,
    "7": "a string of digits as key",
    "é": "é",
    1: "one",
    -2: [],
    b"bytes": "a bytes key",
    dt.date(2014, 5, 1): {"since": dt.date(2014, 5, 1)},
    ("a", "b"): "a tuple",
    ("a", "b2", "c"): ["three", "parts"],
    ("a", 1): (1, 2),
    ("d", ("e", "f")): "a tuple in a tuple",
    ("one",): "a tuple of one",
}

JSON: dict[str, Any] = {
    "x": [1, 2, 3],
    "nested": {"a": {"b": [1.5, None, True]}},
    "two words": "é",
    "none": None,
}

JSON_INT: dict[int, Any] = {1: "one", 20: [2, 0], -3: None}


def make(name: str, data: dict[Any, Any], **options: Any) -> object:
    """Write `data` to the directory `name`; return the chest, which must not be collected."""
    path = os.path.join(HERE, name)
    shutil.rmtree(path, ignore_errors=True)
    chest = importlib.import_module("chest").Chest(path=path, **options)
    for key, value in data.items():
        chest[key] = value
    chest.flush()
    return chest


def main() -> None:
    """Write the three directories."""
    version = importlib.metadata.version("chest")
    if version != "0.2.3" or not sys.version.startswith("3.9."):
        raise SystemExit(f"needs chest 0.2.3 on Python 3.9, not {version} on {sys.version}")
    as_json = {"dump": json.dump, "load": json.load, "mode": "t"}
    alive = [
        make("pickle", PICKLE),
        make("json", JSON, **as_json),
        make("json_int", JSON_INT, **as_json),
    ]
    os._exit(0 if len(alive) == 3 else 1)


if __name__ == "__main__":
    main()
