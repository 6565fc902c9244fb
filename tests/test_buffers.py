"""Pickles are read once, hashed, and only then unpickled."""

import io
import pickle

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from chest.buffers import PickleReader

ARRAY = np.arange(20_000, dtype="i4").reshape(100, 200)
FROZEN = ARRAY.copy()
FROZEN.flags.writeable = False
VALUES = {
    "array": ARRAY,
    "read-only array": FROZEN,
    "column order": np.asfortranarray(ARRAY),
    "arrays": {"a": ARRAY, "b": ARRAY + 1, "c": FROZEN, "again": ARRAY},
    "bytes": b"x" * 100_000,
    "bytearray": bytearray(b"y") * 100_000,
    "mixed": [b"x" * 70_000, bytearray(70_000), ARRAY, "s" * 70_000, b"z" * 70_000, 1],
    "text": "é" * 70_000,
    "many": [(n, str(n)) for n in range(30_000)],
    "objects": np.array([None, "a"] * 9000, dtype=object),
    "small": 1,
}


class Slow(io.BytesIO):
    """A file that gives less than it is asked for."""

    def read(self, size=-1):
        return super().read(min(size, 1000))

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer)[:1000])


class Narrow:
    """A file that can be read, and nothing else."""

    def __init__(self, data):
        self.read = io.BytesIO(data).read


@pytest.mark.parametrize("file", [io.BytesIO, Slow, Narrow])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_is_read_is_what_was_pickled(value, file, protocol):
    data = pickle.dumps(value, protocol)
    source = PickleReader(file(data), len(data), 1 << 22)
    assert source.finish(len(data)) == (len(data), xxh3_64_intdigest(data))
    assert source.whole
    read = source.load()
    assert type(read) is type(value)
    assert pickle.dumps(read, protocol) == pickle.dumps(pickle.loads(data), protocol)
    assert source.gives_again(read) in (False, protocol == 5 and type(value) is np.ndarray)
    if protocol == 5 and value is ARRAY and file is io.BytesIO:
        assert source.gives_again(read)
        assert read.flags.writeable


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_beyond_the_room_nothing_is_kept(value):
    data = pickle.dumps(value, 5)
    for room in (0, 1, 12, 200, len(data) - 1):
        source = PickleReader(io.BytesIO(data), len(data), room)
        assert source.finish(len(data)) == (len(data), xxh3_64_intdigest(data))
        assert sum(map(len, source._parts)) <= room + 16
        assert not source.whole or pickle.dumps(source.load(), 5) == data


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_no_more_is_read_than_one_byte_too_many(value):
    data = pickle.dumps(value, 5)
    for length in {0, 1, 2, 3, 11, 12, 150, len(data) // 2, len(data) - 1}:
        found, _ = PickleReader(io.BytesIO(data), length, 1 << 22).finish(length)
        assert found == min(length + 1, len(data))
    found, digest = PickleReader(io.BytesIO(data), 1 << 40, 1 << 22).finish(1 << 40)
    assert (found, digest) == (len(data), xxh3_64_intdigest(data))
