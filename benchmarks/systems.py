"""What is compared: one small class for each peer, used as its own documentation recommends.

Each opens a folder and has a mapping from text to values, `map`. Libraries are imported where they
are used, so that a process holds only the one that it measures. None of them waits for the disk
(fsync), since chest does not either unless it is asked to.
"""

from __future__ import annotations

import collections
import collections.abc
import io
import itertools
import mmap
import os
import pickle
import struct
from importlib.util import find_spec

PROTOCOL = 5


class System:
    needs = ()  # modules
    caches = False  # keeps values in memory by itself, up to the budget
    lasts = True  # is there again when the folder is opened again
    notices = False  # a change inside a value counts without setting it again
    forgets = False  # flushing empties the memory

    def __init__(self, path, budget, on_read=None):
        self.path = path
        self.budget = budget  # bytes of values in memory
        self.on_read = on_read  # called with each key that comes from disk, where that can be had
        os.makedirs(path, exist_ok=True)
        self.map = self.open()

    def open(self):
        """Return the mapping."""
        return self

    def commit(self):
        """Do what the documentation recommends after a batch of sets."""

    def flush(self):
        """Bring to disk whatever is not there yet."""
        self.commit()

    def close(self):
        self.flush()

    def disk(self):
        """Return how many bytes the values take on disk."""
        return used(self.path)

    def file(self, name):
        return os.path.join(self.path, name)


def used(path):
    """Return how many bytes of disk the files in and below a folder take."""
    total = 0
    for entry in os.scandir(path):
        if entry.is_dir(follow_symlinks=False):
            total += used(entry.path)
        else:
            status = entry.stat()
            total += status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size
    return total


# -- chest -------------------------------------------------------------------------------------


class Chest(System):
    caches = notices = True

    def open(self):
        from chest import Chest

        return Chest(path=self.path, available_memory=self.budget, on_miss=self.on_read)

    def flush(self):
        self.map.flush()

    def close(self):
        self.map.close()

    def disk(self):
        return used(self.path) - os.stat(self.file(".keys")).st_size

    def increment(self, key):
        with self.map.transaction():
            self.map[key] = self.map.get(key, 0) + 1


class OldChest(System):
    """chest 0.2.3, in a virtual environment of its own."""

    caches = forgets = True

    def open(self):
        for name in collections.abc.__all__:  # it looks for them where they were until Python 3.9
            setattr(collections, name, getattr(collections.abc, name))
        from chest import Chest

        on_read = self.on_read or (lambda _: None)
        return Chest(path=self.path, available_memory=self.budget, on_miss=on_read)

    def flush(self):
        self.map.flush()
        self.map.heap.clear()  # it leaves the keys there, and then the next eviction fails

    def disk(self):
        return used(self.path) - os.stat(self.file(".keys")).st_size


# -- in memory ---------------------------------------------------------------------------------


class Dict(System):
    caches = True
    lasts = False

    def open(self):
        return {}


class Cachetools(System):
    needs = ("cachetools", "chest")
    caches = True
    lasts = False

    def open(self):
        from cachetools import LRUCache

        from chest import nbytes

        return LRUCache(maxsize=self.budget, getsizeof=nbytes)


def weight():
    from chest import nbytes

    return lambda _, value: nbytes(value)


class ZictLRU(System):
    needs = ("zict", "chest")
    caches = True
    lasts = False

    def open(self):
        import zict

        return zict.LRU(self.budget, {}, weight=weight())


# -- on disk -----------------------------------------------------------------------------------


class Zict(System):
    """A Buffer over a File, with buffers out of band, as the workers of dask have it."""

    needs = ("zict", "chest")
    caches = True

    def open(self):
        import zict

        on_read = self.on_read
        return zict.Buffer(
            {}, zict.Func(self.dump, self.load, zict.File(self.path)), self.budget, weight(),
            slow_to_fast_callbacks=on_read and (lambda key, _: on_read(key)),
        )

    @staticmethod
    def dump(value):
        buffers = []
        head = pickle.dumps(value, PROTOCOL, buffer_callback=buffers.append)
        frames = [head, *(buffer.raw() for buffer in buffers)]
        lengths = [memoryview(frame).nbytes for frame in frames]
        return [struct.pack(f"<{len(frames) + 1}Q", len(frames), *lengths), *frames]

    @staticmethod
    def load(data):
        view = memoryview(data)
        count = struct.unpack_from("<Q", view)[0]
        lengths = struct.unpack_from(f"<{count}Q", view, 8)
        places = list(itertools.accumulate(lengths, initial=8 + 8 * count))
        head, *buffers = (view[a:b] for a, b in itertools.pairwise(places))
        return pickle.loads(head, buffers=buffers)

    def flush(self):
        self.map.evict_until_below_target(0)  # it has no other way to write everything


class Diskcache(System):
    needs = ("diskcache",)

    def open(self):
        from diskcache import Cache

        return Cache(self.path, eviction_policy="none", cull_limit=0)

    def close(self):
        self.flush()
        self.map.close()

    def increment(self, key):
        with self.map.transact():
            self.map[key] = self.map.get(key, 0) + 1


class DiskcacheTransact(Diskcache):
    """The same with a transaction for each batch of sets."""

    block = None

    def open(self):
        cache = super().open()
        self.block = cache.transact()
        self.block.__enter__()
        return cache

    def commit(self):
        self.flush()
        self.block = self.map.transact()
        self.block.__enter__()

    def flush(self):
        if self.block:
            self.block.__exit__(None, None, None)
            self.block = None


class Sqlitedict(System):
    needs = ("sqlitedict",)

    def open(self):
        from sqlitedict import SqliteDict

        return SqliteDict(self.file("values.sqlite"), autocommit=False, outer_stack=False)

    def commit(self):
        self.map.commit()

    def close(self):
        self.flush()
        self.map.close()


class Shelve(System):
    def open(self):
        import shelve

        return shelve.open(self.file("shelf"), protocol=PROTOCOL)

    def flush(self):
        self.map.sync()

    def close(self):
        self.map.close()


class Joblib(System):
    needs = ("joblib",)

    def __setitem__(self, key, value):
        self.joblib.dump(value, self.file(key))

    def __getitem__(self, key):
        return self.joblib.load(self.file(key))

    def __delitem__(self, key):
        os.remove(self.file(key))

    def items(self):
        return ((name, self[name]) for name in os.listdir(self.path))

    def open(self):
        import joblib

        self.joblib = joblib
        return self


class Lmdb(System):
    """A write transaction for each batch, one read transaction for all reads, buffers not bytes."""

    needs = ("lmdb",)
    reader = writer = None

    def open(self):
        import lmdb

        self.env = lmdb.open(self.path, map_size=2**33, sync=False, max_spare_txns=1)
        return self

    def __setitem__(self, key, value):
        if self.writer is None:
            self.begin_to_write()
        self.writer.put(key.encode(), pickle.dumps(value, PROTOCOL))

    def __getitem__(self, key):
        if self.reader is None:
            self.commit()
            self.reader = self.env.begin(buffers=True)
        return pickle.loads(self.reader.get(key.encode()))

    def __delitem__(self, key):
        if self.writer is None:
            self.begin_to_write()
        self.writer.delete(key.encode())

    def begin_to_write(self):
        if self.reader is not None:
            self.reader.abort()
            self.reader = None
        self.writer = self.env.begin(write=True)

    def __contains__(self, key):
        with self.env.begin() as reader:
            return reader.get(key.encode()) is not None

    def __len__(self):
        return self.env.stat()["entries"]

    def items(self):
        with self.env.begin(buffers=True) as reader:
            for key, data in reader.cursor():
                yield str(key, "utf-8"), pickle.loads(data)

    def commit(self):
        if self.writer is not None:
            self.writer.commit()
            self.writer = None

    def close(self):
        self.commit()
        self.env.close()

    def increment(self, key):
        with self.env.begin(write=True) as writer:
            data = writer.get(key.encode())
            number = pickle.loads(data) if data else 0
            writer.put(key.encode(), pickle.dumps(number + 1, PROTOCOL))


class Rocksdict(System):
    """It compresses, and so takes less disk than its values."""

    needs = ("rocksdict",)

    def open(self):
        from rocksdict import Rdict

        return Rdict(self.path)

    def flush(self):
        self.map.flush()

    def close(self):
        self.map.close()


# -- the limits --------------------------------------------------------------------------------


class Raw(System):
    """The bytes of an array and nothing else: one write, one readinto into fresh memory."""

    needs = ("numpy",)

    def open(self):
        import numpy as np

        self.empty = np.empty
        return self

    def __setitem__(self, key, array):
        with open(self.file(key), "wb", buffering=0) as file:
            file.write(memoryview(array).cast("B"))

    def __getitem__(self, key):
        with open(self.file(key), "rb", buffering=0) as file:
            array = self.empty(os.fstat(file.fileno()).st_size // 8)
            file.readinto(memoryview(array).cast("B"))
        return array


class PickleFiles(System):
    """A pickle in a file for each value."""

    def __setitem__(self, key, value):
        with open(self.file(key), "wb") as file:
            pickle.dump(value, file, PROTOCOL)

    def __getitem__(self, key):
        with open(self.file(key), "rb") as file:
            return pickle.load(file)


class PickleLog(System):
    """Pickles end to end in one file, their places in a dict: what small values take at least."""

    lasts = False

    def open(self):
        self.log = io.BufferedRandom(io.FileIO(self.file("log"), "w+"), 1 << 20)
        self.places = {}
        self.end = 0
        return self

    def __setitem__(self, key, value):
        data = pickle.dumps(value, PROTOCOL)
        self.log.write(data)
        self.places[key] = self.end
        self.end += len(data)

    def __getitem__(self, key):
        return pickle.loads(self.view[self.places[key]:])

    def items(self):
        return ((key, pickle.loads(self.view[place:])) for key, place in self.places.items())

    def flush(self):
        self.log.flush()
        self.view = memoryview(mmap.mmap(self.log.fileno(), 0, access=mmap.ACCESS_READ))


class PickledDict(System):
    """A dict: to flush it is to pickle its values, to close and open it to pickle its keys."""

    caches = True

    def open(self):
        if not os.path.exists(self.file("keys")):
            return {}
        with open(self.file("keys"), "rb") as file:
            return pickle.load(file)

    def flush(self):
        return list(map(pickle.dumps, self.map.values()))

    def close(self):
        with open(self.file("keys"), "wb") as file:
            pickle.dump(dict.fromkeys(self.map), file, PROTOCOL)


SYSTEMS = {
    "chest": Chest,
    "chest-0.2.3": OldChest,
    "dict": Dict,
    "cachetools": Cachetools,
    "zict.LRU": ZictLRU,
    "zict": Zict,
    "diskcache": Diskcache,
    "diskcache-transact": DiskcacheTransact,
    "sqlitedict": Sqlitedict,
    "shelve": Shelve,
    "joblib": Joblib,
    "lmdb": Lmdb,
    "rocksdict": Rocksdict,
    "raw": Raw,
    "pickle-files": PickleFiles,
    "pickle-log": PickleLog,
    "pickled-dict": PickledDict,
}


def missing(name):
    """Return the first module that a system needs and that is not installed, or None."""
    needs = SYSTEMS[name].needs if name in SYSTEMS else ()
    return next((module for module in needs if find_spec(module) is None), None)
