"""Any serializer, any opener; a wrong byte is reported; nothing but ``load`` reads a value."""

import array
import ast
import builtins
import bz2
import csv
import errno
import functools
import gzip
import io
import json
import lzma
import marshal
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from fractions import Fraction

import lz4.frame
import numpy as np
import pytest

import chest.saving
from chest import (
    Chest,
    CorruptIndexError,
    CorruptValueError,
    SerializerError,
    files,
    serialize,
)
from chest.frames import write_log
from chest.serialize import Serializer, changeable, dump_pickle

OPENERS = {
    "gzip": gzip.open,
    "bz2": bz2.open,
    "lzma": lzma.open,
    "lz4": lz4.frame.open,
    "partial": functools.partial(gzip.open, compresslevel=1),
}


class Box:
    def __init__(self, content):
        self.content = content

    def __eq__(self, other):
        return self.content == other.content

    __hash__ = None


def same(a, b):
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in b)
    if isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b) if isinstance(b, np.ndarray) else a == b


# -- serializers -----------------------------------------------------------------------------------


class LambdaPickler(pickle.Pickler):
    """What packages do that pickle more than pickle does."""

    def reducer_override(self, obj):
        if isinstance(obj, types.FunctionType) and obj.__name__ == "<lambda>":
            return make_lambda, (marshal.dumps(obj.__code__),)
        return NotImplemented


def make_lambda(code):
    return types.FunctionType(marshal.loads(code), {})


def dump_with_lambdas(obj, file):
    LambdaPickler(file, protocol=5).dump(obj)


def dump_repr(obj, file):
    file.write(repr(obj))


def load_literal(file):
    return ast.literal_eval(file.read())


def dump_zip(obj, file):
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in obj.items():
            archive.writestr(name, content)


def load_zip(file):
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def dump_patching(obj, file):
    """Write the length over a placeholder at the start, when it is known."""
    file.write(bytes(8))
    file.write(obj)
    end = file.tell()
    file.seek(0)
    file.write((end - 8).to_bytes(8, "little"))


def load_counted(file):
    return file.read(int.from_bytes(file.read(8), "little"))


def dump_by_name(obj, file):
    with open(file.name, "wb") as again:
        again.write(obj)


def load_by_name(file):
    with open(file.name, "rb") as again:
        return again.read()


def dump_by_replacement(obj, file):
    with open(file.name + ".new", "wb") as new:
        new.write(obj)
    os.replace(file.name + ".new", file.name)


def dump_closing(obj, file):
    file.write(obj)
    file.close()


def load_closing(file):
    content = file.read()
    file.close()
    return content


def dump_by_descriptor(obj, file):
    file.write(b"head ")
    file.flush()
    os.write(file.fileno(), obj)
    file.seek(0, os.SEEK_END)
    file.write(b" tail")


def load_between(file):
    content = file.read()
    assert content.startswith(b"head ")
    assert content.endswith(b" tail")
    return content[5:-5]


def dump_by_child(obj, file):
    file.write(obj)
    file.flush()
    code = "import sys; sys.stdout.buffer.write(b' and more')"
    subprocess.run([sys.executable, "-c", code], stdout=file, check=True)


def dump_wrapped(obj, file):
    wrapper = io.TextIOWrapper(file, "utf-16")
    wrapper.write(obj)
    wrapper.flush()
    wrapper.detach()


def load_wrapped(file):
    with io.TextIOWrapper(file, "utf-16") as wrapper:
        return wrapper.read()


def dump_csv(obj, file):
    csv.writer(file).writerows(obj)


def load_csv(file):
    return list(csv.reader(file))


def dump_lines(obj, file):
    file.writelines(f"{line}\n" for line in obj)


def load_lines(file):
    return [line.rstrip("\n") for line in file]


def dump_printing(obj, file):
    for each in obj:
        print(each, file=file)


def dump_pieces(obj, file):
    for byte in obj:
        assert file.write(bytes([byte])) == 1


def dump_buffers(obj, file):
    """Write what is bytes-like without being bytes."""
    assert file.write(bytearray(obj[:2])) == 2
    assert file.write(memoryview(obj[2:4])) == 2
    rest = array.array("B", obj[4:])
    assert file.write(rest) == len(rest)


def dump_nothing(obj, file):
    pass


class Methods:
    """A serializer may be an object with state."""

    def dump(self, obj, file):
        pickle.dump(obj, file)

    def load(self, file):
        return pickle.load(file)

    __call__ = dump


SHORT, LONG = b"content", bytes(range(256)) * 300
TEXTS = ["text", "\r\n é 😀 \udc80" * 6000]
JSONS = [[1, {"a": [None, True, 1.5, "é\r\n\udc80"]}], list(range(15_000))]
WORDS = ["first", "second é", ""]
PICKLED = [Box([1, "a"]), [Box(n) for n in range(4000)], np.arange(18_000.0), bytes(140_000)]

SERIALIZERS = {
    "pickle by default": ({}, PICKLED),
    "pickle": ({"dump": pickle.dump, "load": pickle.load}, PICKLED),
    "pickle with its mode": ({"mode": "b"}, PICKLED),
    "protocol 2": (
        {"dump": functools.partial(pickle.dump, protocol=2), "load": pickle.load},
        PICKLED,
    ),
    "protocol 0": (
        {"dump": functools.partial(pickle.dump, protocol=0), "load": pickle.load},
        PICKLED[:2],
    ),
    "load with options": (
        {"load": functools.partial(pickle.load, fix_imports=False, encoding="latin-1")},
        PICKLED,
    ),
    "a pickler of its own": (
        {"dump": dump_with_lambdas, "load": pickle.load},
        PICKLED,
    ),
    "pickle in functions": (
        {"dump": lambda obj, file: pickle.dump(obj, file), "load": lambda file: pickle.load(file)},
        PICKLED,
    ),
    "methods": ({"dump": Methods().dump, "load": Methods().load}, PICKLED),
    "callable object": ({"dump": Methods(), "load": Methods().load}, PICKLED),
    "json": ({"dump": json.dump, "load": json.load}, JSONS),
    "json with mode t": ({"dump": json.dump, "load": json.load, "mode": "t"}, JSONS),
    "json with mode b": ({"dump": json.dump, "load": json.load, "mode": "b"}, JSONS),
    "json that is not ASCII": (
        {"dump": functools.partial(json.dump, ensure_ascii=False), "load": json.load},
        [["é 😀", 1], ["é"] * 12_000],
    ),
    "marshal": ({"dump": marshal.dump, "load": marshal.load}, [(1, [b"a", "é"]), [1.5] * 9000]),
    "repr": ({"dump": dump_repr, "load": load_literal}, [(1, {2}), "\r\n\udc80é", [1] * 25_000]),
    "repr with mode t": (
        {"dump": dump_repr, "load": load_literal, "mode": "t"},
        [(1, {2}), "\r\n\udc80é", [1] * 25_000],
    ),
    "text": ({"dump": lambda obj, file: file.write(obj), "load": lambda file: file.read()}, TEXTS),
    "csv": ({"dump": dump_csv, "load": load_csv}, [[["a", "b\r\nc"], ["d", "é"]]]),
    "lines": ({"dump": dump_lines, "load": load_lines}, [WORDS, WORDS * 4000]),
    "lines with mode t": ({"dump": dump_lines, "load": load_lines, "mode": "t"}, [WORDS]),
    "print": ({"dump": dump_printing, "load": load_lines}, [WORDS, WORDS * 4000]),
    "bytes": (
        {"dump": lambda obj, file: file.write(obj), "load": lambda file: file.read()},
        [SHORT, LONG, b""],
    ),
    "bytes one by one": ({"dump": dump_pieces, "load": lambda file: file.read()}, [SHORT]),
    "buffers": ({"dump": dump_buffers, "load": lambda file: file.read()}, [SHORT, LONG]),
    "numpy.save": (
        {"dump": lambda obj, file: np.save(file, obj), "load": np.load},
        [np.arange(5), np.arange(9000)],
    ),
    "numpy.savez": (
        {"dump": lambda obj, file: np.savez(file, **obj), "load": lambda f: dict(np.load(f))},
        [{"a": np.arange(5), "b": np.eye(3)}, {"a": np.arange(9000)}],
    ),
    "numpy.tofile": (
        {"dump": lambda obj, file: obj.tofile(file), "load": lambda file: np.fromfile(file, "i8")},
        [np.arange(5), np.arange(9000)],
    ),
    "zip": ({"dump": dump_zip, "load": load_zip}, [{"a": SHORT, "b": LONG}]),
    "seeks": ({"dump": dump_patching, "load": load_counted}, [SHORT, LONG]),
    "by name": ({"dump": dump_by_name, "load": load_by_name}, [SHORT, LONG]),
    "by replacing the file": ({"dump": dump_by_replacement, "load": load_by_name}, [SHORT, LONG]),
    "closes the file": ({"dump": dump_closing, "load": load_closing}, [SHORT, LONG]),
    "by descriptor": ({"dump": dump_by_descriptor, "load": load_between}, [SHORT, LONG]),
    "by a child process": (
        {"dump": dump_by_child, "load": lambda file: file.read().removesuffix(b" and more")},
        [SHORT],
    ),
    "wraps the file": ({"dump": dump_wrapped, "load": load_wrapped}, TEXTS[:1]),
}
PAIRS = [(name, n) for name, (_, values) in SERIALIZERS.items() for n in range(len(values))]
COMPRESSIBLE = [
    "pickle by default", "protocol 2", "pickle in functions", "json", "json with mode t", "marshal",
    "repr", "lines", "bytes", "numpy.save",
]  # fmt: skip


@pytest.mark.parametrize(("name", "n"), PAIRS)
def test_what_any_serializer_wrote_comes_back(path, name, n):
    options, values = SERIALIZERS[name]
    with Chest(path=path, available_memory=0, **options) as c:
        c["k"] = values[n]
        c["next"] = values[0]
        assert not c.inmem
        assert same(c["k"], values[n])
        c._check()
    with Chest(path=path, **options) as c:
        assert same(c["k"], values[n])
        assert same(c["next"], values[0])
        c._check()


@pytest.mark.parametrize("name", COMPRESSIBLE)
@pytest.mark.parametrize("opener", OPENERS)
def test_what_any_opener_wrote_comes_back(path, name, opener):
    options, values = SERIALIZERS[name]
    options = {**options, "open": OPENERS[opener]}
    with Chest(path=path, available_memory=0, **options) as c:
        c["small"], c["large"] = values[0], values[-1]
        assert not c.inmem
        assert same(c["small"], values[0])
        c._check()
    with Chest(path=path, **options) as c:
        assert same(c["small"], values[0])
        assert same(c["large"], values[-1])


@pytest.mark.parametrize("opener", OPENERS)
def test_an_opener_makes_the_files_that_its_own_tools_read(path, opener):
    with Chest({"k": ["x"] * 1000}, path=path, open=OPENERS[opener]) as c:
        c.flush()
        with OPENERS[opener](c.key_to_filename("k"), "rb") as file:
            assert pickle.load(file) == ["x"] * 1000


def test_files_are_plain_pickles(path):
    with Chest({"small": [1], "large": list(range(60_000))}, path=path) as c:
        c.flush()
        for key in c:
            with open(c.key_to_filename(key), "rb") as file:
                assert pickle.load(file) == c[key]


def test_files_are_plain_json(path):
    with Chest({"k": {"a": [1, None]}}, path=path, dump=json.dump, load=json.load) as c:
        c.flush()
        with open(c.key_to_filename("k"), encoding="utf-8") as file:
            assert file.read() == '{"a": [1, null]}'


def test_more_than_pickle_can_be_stored(path):
    with Chest(path=path, available_memory=0, dump=dump_with_lambdas) as c:
        c["k"] = [lambda x: x + 1]
        c["next"] = []
        assert not c.inmem
        assert c["k"][0](2) == 3
    with Chest(path=path, dump=dump_with_lambdas) as c:
        assert c["k"][0](2) == 3


def test_a_change_is_noticed_with_every_serializer(path):
    for name in ("json", "repr", "lines", "print"):
        options, _ = SERIALIZERS[name]
        with Chest(path=f"{path} {name}", available_memory=0, **options) as c:
            c["k"] = ["a"]
            c["next"] = ["b"]
            c["k"].append("c")
            c["next"] = ["d"]
            assert c["k"] == ["a", "c"], name


def test_whether_a_chest_holds_text_is_known_when_it_is_opened_again(path):
    options = {"dump": dump_repr, "load": load_literal}
    with Chest({"k": [1]}, path=path, **options):
        pass
    asked = []

    def load(file):
        asked.append(isinstance(file, io.TextIOBase))
        return load_literal(file)

    with Chest(path=path, dump=dump_repr, load=load) as c:
        assert c["k"] == [1]
    assert asked == [True]


def test_two_handles_agree_on_text(path):
    options = {"dump": dump_repr, "load": load_literal}
    with Chest(path=path, **options) as reader, Chest(path=path, **options) as writer:
        writer["k"] = [1]
        writer.flush()
        assert reader["k"] == [1]


def test_a_pickle_chest_opened_with_another_pickle_loader_is_read(path):
    with Chest({"k": Box(1)}, path=path):
        pass
    for load in (pickle.load, functools.partial(pickle.load), lambda file: pickle.load(file)):
        with Chest(path=path, load=load) as c:
            assert c["k"] == Box(1)


def test_a_chest_that_went_on_with_another_serializer_keeps_what_both_can_read(path):
    with Chest({"old": [1]}, path=path, dump=functools.partial(pickle.dump, protocol=2)):
        pass
    with Chest({"new": [2]}, path=path) as c:
        assert dict(c) == {"old": [1], "new": [2]}


def test_the_file_that_dump_gets_has_a_name(path):
    names = []

    def dump(obj, file):
        names.append(os.path.dirname(file.name))
        pickle.dump(obj, file)

    with Chest({"k": [1]}, path=path, dump=dump) as c:
        c.flush()
    assert {*names} == {path}


def test_the_file_that_load_gets_is_that_of_the_value(path):
    def load(file):
        return os.path.basename(file.name), pickle.load(file)

    with Chest({"a": [1]}, path=path):
        pass
    with Chest(path=path, load=load) as c:
        assert c["a"] == ("a", [1])


def test_dump_may_write_nothing(path):
    options = {"dump": dump_nothing, "load": lambda file: file.read() or "nothing"}
    with Chest({"k": [1]}, path=path, **options):
        pass
    with Chest(path=path, **options) as c:
        assert c["k"] == "nothing"


# -- operating systems that do less than asked -----------------------------------------------------


class Seen:
    """A module as another one sees it, with some of its functions replaced."""

    def __init__(self, module, **replaced):
        self._module = module
        vars(self).update(replaced)

    def __getattr__(self, name):
        return getattr(self._module, name)


class Slow(io.FileIO):
    """Reads and writes at most 999 bytes at a time."""

    def write(self, data):
        return super().write(memoryview(data)[:999])

    def read(self, size=-1):
        return super().read(min(size, 999) if size >= 0 else 999)

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer)[:999])


@pytest.mark.parametrize("value", [[0] * 3000, list(range(60_000)), np.arange(20_000)])
def test_short_reads_and_writes_are_gone_on_with(path, value, monkeypatch):
    with Chest(path=path) as c:
        slow = Seen(builtins, open=lambda path, mode, **_: Slow(path, mode))
        for module in (files, serialize):
            monkeypatch.setattr(module, "builtins", slow)
        c["k"] = value
        c.flush()
    with Chest(path=path) as c:
        assert same(c["k"], value)
    monkeypatch.undo()
    with Chest(path=path) as c:
        assert same(c["k"], value)


@pytest.mark.parametrize("value", [[0] * 3000, list(range(60_000)), np.arange(20_000)])
def test_files_of_an_opener_may_do_less_than_asked(path, value):
    def open_slow(path, mode):
        return io.BufferedReader(Slow(path, mode)) if mode == "rb" else Slow(path, mode)

    with Chest({"k": value}, path=path, open=open_slow):
        pass
    with Chest(path=path, open=open_slow) as c:
        assert same(c["k"], value)


# -- damage ----------------------------------------------------------------------------------------


RANDOM = random.Random(0)
DAMAGED = {
    "pickle, small": ({}, [1, "text", {"a": 2.5}]),
    "pickle, large": ({}, [Box(n) for n in range(3000)]),
    "pickle, large list of numbers": ({}, [1.5] * 20_000),
    "pickle, large array": ({}, np.arange(20_000.0)),
    "pickle, large bytes": ({}, RANDOM.randbytes(140_000)),
    "pickle, in functions": (SERIALIZERS["pickle in functions"][0], [1, "text"]),
    "json, small": (SERIALIZERS["json"][0], [1, "text", {"a": 2.5}]),
    "json, large": (SERIALIZERS["json"][0], list(range(15_000))),
    "repr": (SERIALIZERS["repr"][0], [1, "é"]),
    "marshal": (SERIALIZERS["marshal"][0], [1, "text"]),
    "gzip": ({"open": gzip.open}, [1, "text"]),
    "gzip, large": ({"open": gzip.open}, RANDOM.randbytes(70_000)),
    "json in gzip": ({**SERIALIZERS["json"][0], "open": gzip.open}, [1, "text"]),
    "bz2": ({"open": bz2.open}, [1, "text"]),
    "lzma": ({"open": lzma.open}, [1, "text"]),
    "lz4": ({"open": lz4.frame.open}, [1, "text"]),
    "json in lz4": ({**SERIALIZERS["json"][0], "open": lz4.frame.open}, [1, "text"]),
}
COMPRESSED = {name for name, (options, _) in DAMAGED.items() if "open" in options}


def places(length):
    """Return every place in a small file, the ends of a large one and some between."""
    if length < 200:
        return range(length)
    between = RANDOM.sample(range(40, length - 40), 40)
    return [*range(40), *sorted(between), *range(length - 40, length)]


def flip(data, place, change):
    return data[:place] + bytes([data[place] ^ change]) + data[place + 1 :]


class Victim:
    """A chest with two values, one of which is going to be damaged."""

    def __init__(self, path, name):
        options, self.value = DAMAGED[name]
        self.compressed = name in COMPRESSED
        with Chest({"k": self.value, "other": [1]}, path=path, **options) as c:
            self.file = c.key_to_filename("k")
        with open(self.file, "rb") as file:
            self.data = file.read()
        self.chest = Chest(path=path, available_memory=0, **options)

    def become(self, data):
        with open(self.file, "wb") as file:
            file.write(data)

    def assert_told(self):
        """Assert that the damage is told; a compressed file may hold the same in other bytes."""
        try:
            found = self.chest["k"]
        except CorruptValueError as error:
            assert error.key == "k"
            assert error.path == self.file
            assert repr("k") in str(error)
            assert self.file in str(error)
            told = True
        else:
            assert self.compressed
            assert same(found, self.value)
            told = False
        assert self.chest["other"] == [1]
        return told


@pytest.fixture
def victim(path, request):
    victim = Victim(path, request.param)
    yield victim
    victim.chest._check()
    victim.chest.close()


each_victim = pytest.mark.parametrize("victim", DAMAGED, indirect=True)


@each_victim
def test_one_wrong_byte_is_told(victim):
    told = 0
    for place in places(len(victim.data)):
        victim.become(flip(victim.data, place, RANDOM.choice([1, 2, 16, 128, 255])))
        told += victim.assert_told()
    assert told > 0.4 * len(places(len(victim.data)))  # gzip names the file, in plain, at the start
    victim.become(victim.data)
    assert same(victim.chest["k"], victim.value)


@each_victim
def test_a_file_cut_short_is_told(victim):
    for length in places(len(victim.data)):
        victim.become(victim.data[:length])
        if not victim.assert_told():
            assert length > len(victim.data) - 30  # what follows the compressed stream
    victim.become(victim.data)


@each_victim
def test_a_file_with_more_in_it_is_told(victim):
    for more in (b"\0", b"x", b".", b"\n", bytes(100_000), b"x" * 100_000, victim.data):
        victim.become(victim.data + more)
        victim.assert_told()
    assert victim.assert_told()  # the same twice is not the same, in whatever format
    victim.become(victim.data)


@each_victim
def test_a_file_of_something_else_is_told(victim):
    for other in (b"", b"\0" * 10, b"x" * 100_000, RANDOM.randbytes(1000), b"[1]", pickle.dumps(1)):
        victim.become(other)
        assert victim.assert_told()
    victim.become(victim.data)


@each_victim
def test_a_file_that_has_gone_is_told(victim):
    os.rename(victim.file, victim.file + " elsewhere")
    assert victim.assert_told()
    os.rename(victim.file + " elsewhere", victim.file)
    assert same(victim.chest["k"], victim.value)


@each_victim
def test_a_folder_in_the_place_of_a_file_is_told(victim):
    os.unlink(victim.file)
    os.mkdir(victim.file)
    assert victim.assert_told()
    os.rmdir(victim.file)
    victim.become(victim.data)


def test_a_folder_of_values_that_has_gone_is_told(path):
    with Chest({("a", "b"): [1], "other": [2]}, path=path):
        pass
    shutil.rmtree(os.path.join(path, "_a"))
    with Chest(path=path) as c:
        with pytest.raises(CorruptValueError) as info:
            c["a", "b"]
        assert info.value.key == ("a", "b")
        assert c["other"] == [2]


READS = {
    "get an item": lambda c: c["k"],
    "get": lambda c: c.get("k", "default"),
    "setdefault": lambda c: c.setdefault("k", "default"),
    "pop": lambda c: c.pop("k", "default"),
    "values": lambda c: list(c.values()),
    "items": lambda c: list(c.items()),
    "compare": lambda c: c == {"k": [1], "other": [2]},
    "get from disk": lambda c: c.get_from_disk("k"),
    "prefetch": lambda c: c.prefetch(["k"]),
    "popitem": lambda c: c.popitem(),
}


@pytest.mark.parametrize("read", READS)
def test_every_way_to_read_a_damaged_value_tells_so(path, read):
    with Chest({"other": [2], "k": [1]}, path=path) as c:
        file = c.key_to_filename("k")
    with open(file, "r+b") as damaged:
        damaged.write(b"damage")
    with Chest(path=path) as c:
        with pytest.raises(CorruptValueError):
            READS[read](c)
        assert "k" in c
        assert c["other"] == [2]
        c._check()


@pytest.mark.parametrize("way", ["set", "delete", "clear"])
def test_one_goes_on_without_a_damaged_value(path, way):
    with Chest({"k": [1], "other": [2]}, path=path) as c:
        file = c.key_to_filename("k")
    with open(file, "r+b") as damaged:
        damaged.write(b"damage")
    with Chest(path=path) as c:
        if way == "set":
            c["k"] = ["new"]
        elif way == "delete":
            del c["k"]
        else:
            c.clear()
        c.flush()
        c._check()
    with Chest(path=path) as c:
        expected = {"set": {"k": ["new"], "other": [2]}, "delete": {"other": [2]}, "clear": {}}
        assert dict(c) == expected[way]


def refuse(*args, **kwargs):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_disk_that_cannot_be_read_is_no_damage(path, monkeypatch):
    with Chest({"k": [1]}, path=path):
        pass
    with Chest(path=path) as c:
        with monkeypatch.context() as patch:
            for module in (files, serialize):
                patch.setattr(module, "builtins", Seen(builtins, open=refuse))
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                c["k"]
        assert c["k"] == [1]
        c._check()


@pytest.mark.parametrize("method", ["open", "read", "readinto"])
@pytest.mark.parametrize("name", ["pickle by default", "json", "repr", "marshal", "numpy.save"])
def test_a_file_that_cannot_be_read_is_no_damage(path, name, method):
    options, values = SERIALIZERS[name]
    refusing = []

    class Refusing(io.FileIO):
        def read(self, size=-1):
            return refuse() if "read" in refusing else super().read(size)

        def readinto(self, buffer):
            return refuse() if "readinto" in refusing else super().readinto(buffer)

    def open_file(path, mode):
        if "w" in mode:
            return open(path, mode)
        if "open" in refusing:
            refuse()
        file = Refusing(path, mode)
        return file if method == "read" else io.BufferedReader(file)

    with Chest({"k": values[-1]}, path=path, open=open_file, **options):
        pass
    with Chest(path=path, open=open_file, **options) as c:
        refusing.append(method)
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            c["k"]
        refusing.clear()
        assert same(c["k"], values[-1])
        c._check()


# -- another serializer ----------------------------------------------------------------------------


OTHERS = {
    "json, read as pickle": (SERIALIZERS["json"][0], {}, ["json.dump", "pickle"]),
    "pickle, read as json": ({}, SERIALIZERS["json"][0], ["pickle", "json"]),
    "marshal, read as pickle": (SERIALIZERS["marshal"][0], {}, ["marshal.dump", "pickle"]),
    "pickle, read as marshal": ({}, SERIALIZERS["marshal"][0], ["pickle", "marshal"]),
    "repr, read as json": (SERIALIZERS["repr"][0], SERIALIZERS["json"][0], ["dump_repr", "json"]),
    "json, read as repr": (
        SERIALIZERS["json"][0],
        SERIALIZERS["repr"][0],
        ["json.dump", "dump_repr"],
    ),
    "gzip, read without": ({"open": gzip.open}, {}, ["gzip.open", "pickle"]),
    "read with gzip": ({}, {"open": gzip.open}, ["pickle", "gzip.open"]),
    "gzip, read as bz2": ({"open": gzip.open}, {"open": bz2.open}, ["gzip.open", "bz2.open"]),
    "json in gzip, read without": (
        {**SERIALIZERS["json"][0], "open": gzip.open},
        SERIALIZERS["json"][0],
        ["json.dump", "gzip.open"],
    ),
}


@pytest.mark.parametrize("value", [("a", None), [("a", None)] * 7000], ids=["small", "large"])
@pytest.mark.parametrize("case", OTHERS)
def test_a_value_of_another_serializer_names_both(path, case, value):
    wrote, reads, names = OTHERS[case]
    with Chest({"k": value}, path=path, **wrote) as c:
        file = c.key_to_filename("k")
    with Chest(path=path, **reads) as c:
        with pytest.raises(SerializerError) as info:
            c["k"]
        assert info.value.key == "k"
        assert info.value.path == file
        assert all(name in str(info.value) for name in names)
        c._check()
    with Chest(path=path, **wrote) as c:
        assert c["k"] == json.loads(json.dumps(value)) or c["k"] == value


def test_the_names_are_attributes(path):
    with Chest({"k": [1]}, path=path, dump=functools.partial(json.dump, indent=1), load=json.load):
        pass
    with Chest(path=path) as c, pytest.raises(SerializerError) as info:
        c["k"]
    assert info.value.written_with == ("json.dump",)
    assert info.value.serializer == "pickle"


def test_a_value_whose_class_has_gone_costs_that_value_alone(path, monkeypatch):
    with Chest({"k": Box(1), "other": [2]}, path=path):
        pass
    with Chest(path=path) as c:
        with monkeypatch.context() as patch:
            patch.delattr(sys.modules[__name__], "Box")
            with pytest.raises(SerializerError, match=r"AttributeError.*Box"):
                c["k"]
            assert c["other"] == [2]
            c["new"] = [3]
            c.flush()
        assert c["k"] == Box(1)
        c._check()


RAISED = [
    KeyError("k"), ValueError("no"), TypeError("no"), AttributeError("no"), IndexError("no"),
    EOFError(), StopIteration(), RecursionError(), ImportError("no"), OSError("no"),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "no"), pickle.UnpicklingError("no"), Exception(),
    FileNotFoundError(2, "another file"), AssertionError(),
]  # fmt: skip


def load_or_raise(error):
    def load(file):
        content = pickle.load(file)
        if content == [1]:
            raise error
        return content

    return load


@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_what_load_raises_is_told_as_what_it_is(path, error):
    with Chest({"other": [2], "k": [1]}, path=path, dump=pickle.dump):
        pass
    with Chest(path=path, dump=pickle.dump, load=load_or_raise(error)) as c:
        with pytest.raises(SerializerError) as info:
            c["k"]
        assert info.value.key == "k"
        assert type(error).__name__ in str(info.value)
        assert c["other"] == [2]
        c._check()


@pytest.mark.parametrize("error", [KeyError("k"), ValueError("no"), TypeError("no")], ids=repr)
@pytest.mark.parametrize("read", READS)
def test_no_way_to_read_takes_what_load_raises_for_a_missing_key(path, read, error):
    with Chest({"other": [2], "k": [1]}, path=path, dump=pickle.dump):
        pass
    with Chest(path=path, dump=pickle.dump, load=load_or_raise(error)) as c:
        with pytest.raises(SerializerError):
            READS[read](c)
        assert list(c) == ["other", "k"]
        c._check()


class Moody:
    """Can be loaded only as long as it is told so."""

    error = None

    def __setstate__(self, state):
        if Moody.error is not None:
            raise Moody.error
        vars(self).update(state)


@pytest.mark.parametrize("error", RAISED, ids=repr)
@pytest.mark.parametrize("size", [10, 200_000])
def test_what_a_value_raises_when_it_is_loaded_never_comes_out_as_it_is(
    path, size, error, monkeypatch
):
    value = Moody()
    value.content = bytes(size)
    with Chest({"k": value}, path=path):
        pass
    with Chest(path=path) as c:
        monkeypatch.setattr(Moody, "error", error)
        with pytest.raises(SerializerError) as info:
            c["k"]
        assert info.value.key == "k"
        monkeypatch.undo()
        assert c["k"].content == bytes(size)


# -- nobody's code ---------------------------------------------------------------------------------


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)

    def __hash__(self):
        return 1


@pytest.fixture
def trace(tmp_path):
    """A folder that a `Hostile` makes; the test fails if it is there at the end."""
    folder = str(tmp_path / "trace")
    yield folder
    assert not os.path.exists(folder), "a pickle was run"


TRUSTING_NOTHING = ["json", "json with mode t", "json with mode b", "repr", "marshal"]
each_distrustful = pytest.mark.parametrize("name", TRUSTING_NOTHING)


def test_a_hostile_pickle_would_be_noticed(tmp_path):
    folder = str(tmp_path / "trace")
    pickle.loads(pickle.dumps(Hostile(folder)))
    assert os.path.isdir(folder)


@each_distrustful
@pytest.mark.parametrize("padding", [0, 200_000], ids=["small", "large"])
def test_a_hostile_value_file_is_not_run(path, trace, name, padding):
    options, values = SERIALIZERS[name]
    with Chest({"k": values[0], "other": values[0]}, path=path, **options) as c:
        file = c.key_to_filename("k")
    with open(file, "wb") as hostile:
        hostile.write(pickle.dumps((bytes(padding), Hostile(trace))))
    with Chest(path=path, **options) as c:
        with pytest.raises(CorruptValueError):
            c["k"]
        assert same(c["other"], values[0])


@each_distrustful
def test_a_hostile_pickle_with_an_index_to_match_is_not_run(path, trace, name):
    with Chest({"k": Hostile(trace)}, path=path):
        pass
    with Chest(path=path, **SERIALIZERS[name][0]) as c, pytest.raises(SerializerError):
        c["k"]


@each_distrustful
@pytest.mark.parametrize("content", [pickle.dumps, lambda obj: pickle.dumps([("k", obj)])])
def test_a_hostile_index_in_the_old_format_is_not_run(path, trace, name, content):
    os.mkdir(path)
    with open(os.path.join(path, ".keys"), "wb") as index:
        index.write(content(Hostile(trace)))
    before = os.listdir(path)
    with pytest.raises(CorruptIndexError):
        Chest(path=path, **SERIALIZERS[name][0])
    assert os.listdir(path) == before


@pytest.mark.parametrize("name", ["pickle by default", "gzip", *TRUSTING_NOTHING])
@pytest.mark.parametrize("wrap", [lambda obj: obj, lambda obj: (True, False, None, [], obj, [])])
def test_a_hostile_frame_is_not_run(path, trace, name, wrap):
    options = {"open": gzip.open} if name == "gzip" else SERIALIZERS[name][0]
    os.mkdir(path)
    payload = pickle.dumps(wrap(Hostile(trace)), 5)
    write_log(os.path.join(path, ".keys"), [payload], fsync=False)
    with pytest.raises(CorruptIndexError):
        Chest(path=path, **options)


@each_distrustful
def test_a_hostile_key_is_not_run(path, tmp_path, name):
    folder = tmp_path / "trace"
    with pytest.MonkeyPatch.context() as patch, Chest(path=path) as c:
        patch.setattr(chest.saving, "_is_storable", lambda *_: True)
        c["plain"] = 1
        c[Hostile(str(folder))] = 2
        c.flush()
    if folder.exists():
        folder.rmdir()  # whoever trusts pickle may run it
    with Chest(path=path, **SERIALIZERS[name][0]) as c:
        assert list(c) == ["plain"]
        c["another"] = [1]
        c.flush()
    with Chest(path=path, **SERIALIZERS[name][0]) as c:
        assert list(c) == ["plain", "another"]
    assert not folder.exists()


# -- Serializer ------------------------------------------------------------------------------------


def test_what_can_change():
    frozen = np.arange(3)
    frozen.flags.writeable = False
    view = np.arange(3)[:]
    view.flags.writeable = False  # its base can be written still
    objects = np.array([[]], dtype=object)
    objects.flags.writeable = False
    fixed = [
        "a", b"a", 1, 1.5, True, None, 1j, (), (1, ("a",)), frozenset({1, (2,)}), range(3), ...,
        Fraction(1, 2), np.float64(1), np.str_("a"), frozen, frozen[1:], np.frombuffer(b"a", "u1"),
    ]  # fmt: skip
    changing = [
        [], {}, set(), bytearray(), object(), Box(1), (1, []), frozenset({(1, Hostile(""))}),
        np.arange(3), view, objects, np.zeros(1, "i4,i4")[0], array.array("b"), lambda: 0,
        np.frombuffer(bytearray(b"abc"), "u1"), type("Text", (str,), {})("a"), iter(()),
    ]  # fmt: skip
    assert [value for value in fixed if changeable(value)] == []
    assert [type(value) for value in changing if not changeable(value)] == []


def test_a_tuple_nested_deeper_than_python_goes_counts_as_changing():
    value = ()
    for _ in range(10 * sys.getrecursionlimit()):
        value = (value,)
    assert changeable(value)


DIGESTED = [
    [1, "a"], b"x" * 70_000, "é" * 70_000, [b"x" * 70_000, "y" * 200_000], list(range(100_000)),
    {str(n): [n] for n in range(10_000)}, np.arange(100_000), [np.arange(9)] * 10, bytearray(10**6),
    [Box(n) for n in range(5000)], ("x" * 65_000, b"y" * 65_536, "z"),
]  # fmt: skip


@pytest.mark.parametrize("value", DIGESTED, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("size", [0, 10**9], ids=["in one piece", "as a stream"])
def test_a_digest_is_that_of_the_file_whichever_way_it_is_written(tmp_path, value, size):
    serializer = Serializer(dump_pickle, pickle.load, open, None)
    path = str(tmp_path / "value")
    length, digest = serializer.write(value, path, size)
    assert serializer.digest(value, 0) == serializer.digest(value, 10**9) == digest
    assert serializer.measure(path) == (length, digest)
    assert os.path.getsize(path) == length
    assert same(serializer.read(path, length, digest)[0], value)


@pytest.mark.parametrize(
    ("dump", "name"),
    [
        (dump_pickle, "pickle"),
        (pickle.dump, "pickle.dump"),
        (json.dump, "json.dump"),
        (functools.partial(functools.partial(json.dump, indent=1), sort_keys=True), "json.dump"),
        (marshal.dump, "marshal.dump"),
        (dump_repr, f"{__name__}.dump_repr"),
        (Methods().dump, f"{__name__}.Methods.dump"),
        (Methods(), f"{__name__}.Methods"),
    ],
)
def test_a_serializer_has_the_name_of_its_dump(dump, name):
    assert Serializer(dump, pickle.load, open, None).name == name


@pytest.mark.parametrize(
    ("load", "trusts"),
    [
        (pickle.load, True),
        (functools.partial(pickle.load, encoding="latin-1"), True),
        (json.load, False),
        (functools.partial(json.load), False),
        (marshal.load, False),
        (load_literal, False),
        (Methods().load, False),
        (np.load, False),
    ],
)
def test_only_the_loaders_of_pickle_are_trusted_with_keys(load, trusts):
    assert Serializer(dump_pickle, load, open, None).trusts_pickle is trusts


def test_many_threads_write_and_read_side_by_side(path):
    with Chest(path=path, available_memory=0, dump=dump_repr, load=load_literal) as c:
        errors = []

        def work(n):
            try:
                for i in range(20):
                    c[f"k{n}"] = [n, i]
                    assert c[f"k{n}"] == [n, i]
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        c._check()
