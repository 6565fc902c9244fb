"""Index Python's own standard library in a fraction of the memory that the index takes.

Every word leads to the list of places where it stands, and each list grows in place, in a chest
that may keep only a small part of them in memory. Then the chest is closed, opened again, asked
for a few words, and compared with an ordinary dict.
"""

import argparse
import os
import re
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, MutableMapping

from chest import Chest, nbytes

Place = tuple[str, int]  # file and line
Index = MutableMapping[str, list[Place]]

SKIPPED = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
QUERIES = ["yield", "heapq", "spam"]
MB = 1e6

find_words = re.compile(r"[A-Za-z_]\w*").findall


def main() -> None:
    """Build the index in a chest, open it again, ask it, and compare it with a dict."""
    options = parse_arguments()
    root = os.path.abspath(options.directory)
    files = list(find_sources(root))[: options.limit]
    if not files:
        sys.exit(f"no Python sources in {root}")
    with tempfile.TemporaryDirectory(prefix="index-") as path:
        build(path, options.budget * MB, root, files)
        identical = compare(path, options.budget * MB, root, files)
    sys.exit(0 if identical else 1)


def parse_arguments() -> argparse.Namespace:
    """Read the command line, where every argument has a default."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", nargs="?", default=sysconfig.get_path("stdlib"))
    parser.add_argument("--budget", type=float, default=4, metavar="MB", help="default: 4")
    parser.add_argument("--limit", type=int, default=60, metavar="FILES", help="default: 60")
    return parser.parse_args()


def find_sources(root: str) -> Iterator[str]:
    """Yield the names of the Python sources below `root`, always in the same order."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED)
        for name in sorted(names):
            if name.endswith(".py"):
                yield os.path.relpath(os.path.join(folder, name), root)


def build(path: str, budget: float, root: str, files: list[str]) -> None:
    """Build the index in a chest at `path`, and say what that took."""
    spilled: Counter[str] = Counter()
    most = 0
    start = time.perf_counter()
    with Chest[str, list[Place]](
        path=path,
        available_memory=budget,
        on_overflow=lambda word: spilled.update([word]),
    ) as chest:
        for name in with_progress(files):
            add_file(chest, root, name)
            most = max(most, chest.memory_usage)
    seconds = time.perf_counter() - start
    print(f"{len(files)} files indexed in {seconds:.0f} s")
    print(f"in memory at most {most / MB:.1f} MB, on disk {bytes_below(path) / MB:.1f} MB")
    print(f"{spilled.total():,} spills, of the lists of {len(spilled):,} words")


def add_file(index: Index, root: str, name: str) -> None:
    """Add the words of a file to an index, each once for every line that it stands in."""
    with open(os.path.join(root, name), encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            for word in dict.fromkeys(find_words(line)):
                index.setdefault(word, []).append((name, number))


def compare(path: str, budget: float, root: str, files: list[str]) -> bool:
    """Open the chest again, ask it for a few words, and compare all of it with a dict."""
    plain: dict[str, list[Place]] = {}
    for name in files:
        add_file(plain, root, name)
    size = sum(map(nbytes, plain.values()))
    with Chest[str, list[Place]](path=path, available_memory=budget) as chest:
        lines = ", ".join(f"{word!r} in {len(chest.get(word, []))} lines" for word in QUERIES)
        identical = list(chest) == list(plain) and chest == plain
        print(f"opened again: {len(chest):,} words, {lines}")
    verdict = "identical" if identical else "NOT IDENTICAL"
    print(f"{verdict} to a dict, which takes {size / MB:.1f} MB in memory")
    return identical


def with_progress(files: list[str]) -> Iterator[str]:
    """Yield the files, and draw a bar to stderr."""
    for done, name in enumerate(files):
        bar = "#" * (40 * done // len(files))
        print(f"\r[{bar:.<40}] {done}/{len(files)}", end="", file=sys.stderr, flush=True)
        yield name
    print(f"\r[{'#' * 40}] {len(files)}/{len(files)}", file=sys.stderr)


def bytes_below(path: str) -> int:
    """Return how many bytes the files in a directory hold."""
    return sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(path)
        for name in names
    )


if __name__ == "__main__":
    main()
