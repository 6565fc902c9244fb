"""Index Python's own standard library, in far less memory than the index takes.

Every word of the sources leads to the list of places where it stands, and each list grows in
place, in a chest that may keep only a small part of them in memory. Then the chest is closed,
opened again, asked for a few words, and compared with an ordinary dict.
"""

import argparse
import os
import re
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, MutableMapping

from chest import Chest, nbytes

Place = tuple[str, int]  # file and line
Index = MutableMapping[str, list[Place]]

LEFT_OUT = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
QUERIES = ["yield", "heapq", "spam"]

words_of = re.compile(r"[A-Za-z_]\w*").findall


def main() -> None:
    """Build, reopen, query, compare, and say what was done."""
    options = parse_arguments()
    root = os.path.abspath(options.directory)
    files = list(find_sources(root))[: options.limit]
    count: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="index-") as path:
        start = time.perf_counter()
        with Chest[str, list[Place]](
            path=path,
            available_memory=options.budget * 1e6,
            on_overflow=lambda _: count.update(["spilled"]),
            on_miss=lambda _: count.update(["read"]),
        ) as chest:
            for name in progress(files):
                add_file(chest, root, name)
                count["bytes"] = max(count["bytes"], chest.memory_usage)
        seconds = time.perf_counter() - start

        plain: dict[str, list[Place]] = {}
        for name in files:
            add_file(plain, root, name)
        with Chest[str, list[Place]](path=path, available_memory=options.budget * 1e6) as chest:
            found = ", ".join(f"{word} in {len(chest.get(word, []))} lines" for word in QUERIES)
            identical = list(chest) == list(plain) and chest == plain

        places = sum(map(len, plain.values()))
        size = sum(map(nbytes, plain.values()))
        print(f"{len(plain):,} words at {places:,} places of {len(files)} files: {seconds:.0f} s")
        print(f"in memory up to {count['bytes'] / 1e6:.1f} MB, as a dict {size / 1e6:.1f} MB")
        print(f"on disk {bytes_below(path) / 1e6:.1f} MB")
        print(f"values spilled {count['spilled']:,} times, read back {count['read']:,} times")
        print(f"reopened: {found}; {'' if identical else 'NOT '}identical to a dict")
    sys.exit(not identical)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; every option has a default."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=4, metavar="MB", help="default: %(default)s")
    parser.add_argument("--limit", type=int, metavar="FILES", help="index only so many files")
    parser.add_argument("directory", nargs="?", default=sysconfig.get_path("stdlib"))
    return parser.parse_args()


def find_sources(root: str) -> Iterator[str]:
    """Yield the Python sources below `root`, by names relative to it, always in the same order."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - LEFT_OUT)
        for name in sorted(names):
            if name.endswith(".py"):
                yield os.path.relpath(os.path.join(folder, name), root)


def add_file(index: Index, root: str, name: str) -> None:
    """Add every word of a file to an index, once for each line."""
    with open(os.path.join(root, name), encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            for word in dict.fromkeys(words_of(line)):
                index.setdefault(word, []).append((name, number))


def progress(files: list[str]) -> Iterator[str]:
    """Yield the files, drawing a bar to stderr."""
    for done, name in enumerate(files):
        bar = "#" * (40 * done // len(files))
        print(f"\r[{bar:40}] {done} of {len(files)} files", end="", file=sys.stderr, flush=True)
        yield name
    print(f"\r{'':79}\r", end="", file=sys.stderr)


def bytes_below(path: str) -> int:
    """Return how many bytes the files in a directory take."""
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)


if __name__ == "__main__":
    main()
