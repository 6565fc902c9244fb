"""Look at, check, repair and shrink a chest from the shell: ``python -m chest PATH``."""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from chest import __version__
from chest.aliases import UNSAVED
from chest.errors import ChestError, CorruptIndexError, CorruptValueError
from chest.frames import log_size
from chest.options import absolute, looking
from chest.outside import adopt, open_outside, trusting
from chest.progress import counting
from chest.reading import Reading
from chest.repairs import demand_writable, repair
from chest.store import Store
from chest.verify import committed, examine

FINE, DAMAGED, FAILED, INTERRUPTED = 0, 1, 2, 130
EPILOG = (
    "exit status: 0 if all is well, 1 if something is damaged, 2 if it cannot be done. "
    "A directory with the name of a command is given as ./ls."
)

Arguments = argparse.Namespace


# -- commands that only look -----------------------------------------------------------------------


def _info(args: Arguments) -> int:
    with open_outside(args.path) as (reading, faults):
        if not reading.ledger.serializers:
            adopt(reading)
        for name, value in _facts(reading, whole=not faults):
            print(f"{name:<11} {value}")
    return _tell_faults(faults)


def _facts(reading: Reading, *, whole: bool) -> Iterator[tuple[str, str]]:
    ledger, directory = reading.ledger, reading.directory
    lengths = [ledger.entry(row).length for _, row in committed(ledger)]
    packs, files = [*ledger.packs], ledger.files().difference(ledger.packs)
    packed, alive = directory.size(packs), sum(ledger.packs.values())
    hidden = f", {len(ledger.unreadable):,} of which need a class" * bool(ledger.unreadable)
    waste = f", {max(packed - alive, 0) / packed:.0%} waste" if packed else ""
    size = os.path.getsize(directory.index)
    history = max(1 - log_size(ledger.snapshot()) / size, 0) if whole else 0
    yield "chest", directory.path
    yield "keys", f"{len(lengths):,}{hidden}"
    yield "values", f"{sum(lengths):,} bytes"
    yield "files", f"{len(files):,}, {directory.size(files):,} bytes"
    yield "packs", f"{len(packs):,}, {packed:,} bytes{waste}"
    yield "index", f"{size:,} bytes" + f", {history:.0%} waste" * whole
    yield "serializer", ", ".join(ledger.serializers) or reading.serializer.name
    yield "format", "0.2.3" if reading.index.foreign else "1"


def _tell_faults(faults: list[str]) -> int:
    for fault in faults:
        _say(f"the index is damaged: {fault}; what can be read of it is shown")
    return DAMAGED if faults else FINE


def _ls(args: Arguments) -> int:
    with open_outside(args.path) as (reading, faults):
        ledger = reading.ledger
        ledger.sort()
        listed = [(repr(key), ledger.entry(row)) for key, row in committed(ledger)]
        if args.sort == "size":
            listed.sort(key=lambda each: -each[1].length)
        elif args.sort == "key":
            listed.sort()
        for key, entry in listed:
            if args.json:
                print(json.dumps({"key": key, "bytes": entry.length, "file": entry.file}))
            else:
                print(f"{entry.length:>15,}  {entry.file:<32}  {key}")
    return _tell_faults(faults)


# -- commands that read values ---------------------------------------------------------------------


def _get(args: Arguments) -> int:
    with open_outside(args.path) as (reading, _):
        adopt(reading)
        rows = reading.ledger.rows
        key = _key(args.key)
        row = rows.get(key, UNSAVED)
        if row < 0:
            hint = f"; there is {args.key!r}, a string: quote it twice" if args.key in rows else ""
            _say(f"there is no key {key!r}{hint}")
            return FAILED
        reading.serializer = trusting(reading.serializer)
        value, _ = reading.read(key, reading.ledger.entry(row))
    if isinstance(value, (bytes, bytearray)):
        sys.stdout.flush()
        sys.stdout.buffer.write(value)
    else:
        print(repr(value))
    return FINE


def _key(text: str) -> Any:
    try:
        key = ast.literal_eval(text)
        hash(key)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return key


def _verify(args: Arguments) -> int:
    with open_outside(args.path) as (reading, faults):
        adopt(reading)
        with counting(sys.stderr.isatty(), "verify") as tally:
            report = examine(reading, faults, tally)
    print(report)
    return FINE if report.ok else DAMAGED


# -- commands that write ---------------------------------------------------------------------------


def _repair(args: Arguments) -> int:
    report = repair(args.path, progress=sys.stderr.isatty())
    print(report)
    return FINE if report.ok else DAMAGED


def _compact(args: Arguments) -> int:
    with open_outside(args.path) as (reading, faults):
        adopt(reading)
        demand_writable(reading.directory)
    if faults:
        raise CorruptIndexError(reading.directory.index, faults[0])
    serializer = trusting(reading.serializer)
    store = Store(args.path, serializer, looking(args.path, readonly=False), reopen=True)
    try:
        with store.writing():
            print(f"{store.compact():,} bytes freed")
    finally:
        store.close()
    return FINE


# -- the command line ------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[Callable[[Arguments], int], str, str]] = {
    "info": (_info, "say what is there; the command if none is given", ""),
    "ls": (_ls, "list the keys", "Keys stand as Python literals; one that needs a class, in <>."),
    "get": (
        _get,
        "print the value of a key, bytes as they are",
        "A pickled value is loaded, and can run any code: see Security in the README.",
    ),
    "verify": (_verify, "read every value, and say what is damaged", "Nothing is loaded."),
    "repair": (
        _repair,
        "make a damaged chest a sound one, with all values that are as written",
        "Nothing is loaded. What is damaged moves to the folder .damaged; the status is then 1.",
    ),
    "compact": (
        _compact,
        "remove what is out of date from the index and the packs",
        "Keys that need a class are loaded, if the values are pickles.",
    ),
}


def _parser() -> argparse.ArgumentParser:
    about = "Look at, check, repair and shrink a chest, a dictionary on disk."
    parser = argparse.ArgumentParser("python -m chest", description=about, epilog=EPILOG)
    parser.usage = "%(prog)s [COMMAND] PATH ..."
    parser.add_argument("--version", action="version", version=__version__)
    prog = parser.prog
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, prog=prog)
    for name, (function, summary, more) in COMMANDS.items():
        text = f"{summary[0].upper()}{summary[1:]}. {more}".strip()
        command = commands.add_parser(name, help=summary, description=text, epilog=EPILOG)
        command.set_defaults(function=function)
        command.add_argument("path", metavar="PATH", help="the directory of the chest")
        if name == "get":
            about = "a Python literal, else a string: 1, \"'1'\", \"('a', 2)\", x"
            command.add_argument("key", metavar="KEY", help=about)
        elif name == "ls":
            about = "largest first, or by the text of the key, instead of the order of setting"
            command.add_argument("--sort", choices=["size", "key"], help=about)
            command.add_argument("--json", action="store_true", help="a JSON object a line")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] not in {*COMMANDS, "-h", "--help", "--version"}:
        given = ["info", *given]
    args = _parser().parse_args(given)
    try:
        args.path = absolute(args.path)
        status: int = args.function(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return FINE
    except KeyboardInterrupt:
        return INTERRUPTED
    except (CorruptIndexError, CorruptValueError) as error:
        _say(str(error))
        return DAMAGED
    except FileNotFoundError as error:
        _say(f"there is no chest in {args.path} ({error.filename} is not there)")
        return FAILED
    except (OSError, ValueError, ChestError) as error:
        _say(str(error))
        return FAILED
    return status


def _say(text: str) -> None:
    sys.stderr.write(f"chest: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
