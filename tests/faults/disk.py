"""A directory whose system calls pass through here, to be counted, refused or recorded.

Inside ``with Disk(root, actor)`` each call by which chest changes or reads what lies below `root`
becomes a `Call` that `actor` gets: it may do it, do half of it, or raise. The write of the word in
the head of the index, of which there is no half, is called a store. Chests have to be opened by
`opened` there, since chest takes an ``open`` of one's own for one that compresses.
"""

from __future__ import annotations

import builtins
import io
import mmap
import os
from dataclasses import dataclass, field
from io import FileIO
from typing import Any
from unittest import mock

import chest.directory
import chest.head
import chest.index
import chest.packs
import chest.staging
from chest import Chest
from chest.frames import HEAD, WORD

ALL = os.environ.get("CHEST_FAULTS") == "all"
CHANGES = {"create", "write", "truncate", "store", "rename", "replace", "link", "unlink"}
CHANGES |= {"mkdir", "rmdir", "utime"}

_by_path = ["replace", "rename", "link", "unlink", "truncate", "mkdir", "rmdir", "utime"]
_by_path += ["stat", "lstat", "listdir"]


def opened(path, **options):
    """Return a chest of which the disk sees every call."""
    return Chest(path=path, open=builtins.open, **options)


@dataclass
class Call:
    """A system call, and how it is done: the whole, or half of it where it is a write."""

    name: str
    path: str
    do: Any
    half: Any = None
    file: Any = None
    args: tuple[Any, ...] = field(default=())

    @property
    def changes(self):
        return self.name in CHANGES

    def error(self, number):
        """Return what it raises when it fails: calls on descriptors name no path."""
        by_descriptor = self.name in ("write", "store", "read", "map", "fsync", "truncate")
        return OSError(number, os.strerror(number), *([] if by_descriptor else [self.path]))


class Disk:
    """See above; `root` is a folder that does not move."""

    def __init__(self, root, actor):
        self.root = str(root)
        self.actor = actor
        self.open_files = {}  # by descriptor
        self._inside = False
        self._patches = []

    def call(self, name, path, do, **more):
        if self._inside or not os.fspath(path).startswith(self.root):
            return do()
        self._inside = True
        try:
            return self.actor(Call(name, os.fspath(path), do, **more))
        finally:
            self._inside = False

    def __enter__(self):
        disk = self
        open_plain = builtins.open

        class File(FileIO):
            def __init__(self, path, mode="r"):
                self.path = path
                name = "create" if set(mode) & set("xw") else "open"
                disk.call(name, path, lambda: FileIO.__init__(self, path, mode), file=self)
                disk.open_files[self.fileno()] = self

            def write(self, data):
                view = memoryview(data).cast("B")

                def half():
                    return FileIO.write(self, view[: len(view) // 2])

                def do():
                    return FileIO.write(self, view)

                args = self.tell(), bytes(view)
                if (args[0], len(view)) == (HEAD - WORD, WORD):
                    return disk.call("store", self.path, do, file=self, args=args)
                return disk.call("write", self.path, do, half=half, file=self, args=args)

            def truncate(self, size):
                def do():
                    return FileIO.truncate(self, size)

                return disk.call("truncate", self.path, do, file=self, args=(size,))

            def read(self, size=-1):
                return disk.call("read", self.path, lambda: FileIO.read(self, size))

            def readall(self):
                return disk.call("read", self.path, lambda: FileIO.readall(self))

            def readinto(self, buffer):
                return disk.call("read", self.path, lambda: FileIO.readinto(self, buffer))

        class Reader(chest.packs._Reader):
            def __init__(self, path):
                disk.call("open", path, lambda: super(Reader, self).__init__(path))
                plain = self.read_at
                self.read_at = lambda *args: disk.call("read", path, lambda: plain(*args))

        def open_any(path, mode="r", buffering=-1, *args, **more):
            mine = "b" in mode and isinstance(path, str) and path.startswith(disk.root)
            if not mine:
                return open_plain(path, mode, buffering, *args, **more)
            file = File(path, mode)
            if buffering == 0:
                return file
            return io.BufferedReader(file) if "r" in mode else io.BufferedWriter(file)

        map_plain = mmap.mmap

        def map_file(number, *args, **more):
            file = self.open_files.get(number)
            path = "" if file is None else file.path
            return disk.call("map", path, lambda: map_plain(number, *args, **more))

        fsync, open_folder = os.fsync, os.open

        def sync(number):
            file = disk.open_files[number]
            path = file if isinstance(file, str) else file.path
            return disk.call("fsync", path, lambda: fsync(number), file=file)

        def open_number(path, *args, **more):
            number = disk.call("open", path, lambda: open_folder(path, *args, **more))
            disk.open_files[number] = path
            return number

        self._patch(builtins, "open", open_any)
        self._patch(os, "fsync", sync)
        self._patch(os, "open", open_number)
        self._patch(mmap, "mmap", map_file)
        self._patch(chest.packs, "_Reader", Reader)
        for module in chest.head, chest.packs, chest.staging, chest.directory:
            self._patch(module, "FileIO", File)
        for name in _by_path:
            self._patch(os, name, self._by_path(name, getattr(os, name)))
        return self

    def _by_path(self, name, plain):
        def function(*args, **more):
            path = args[-1] if name in ("rename", "replace", "link") else args[0]
            if isinstance(path, int):
                return plain(*args, **more)
            return self.call(name, path, lambda: plain(*args, **more), args=args)

        return function

    def _patch(self, *args, **more):
        patch = mock.patch.object(*args, **more)
        patch.start()
        self._patches.append(patch)

    def __exit__(self, *error):
        while self._patches:
            self._patches.pop().stop()
