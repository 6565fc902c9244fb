"""Directories made by somebody else: names that lead out, things that are no files, huge numbers.

Proved for each of them, whatever is asked of the chest (to get, delete and replace values, to clear
and to drop it): that ends soon and in little memory, with the right values or with an error that
says which file is to blame; nothing outside of the directory is touched, and nothing in it that
the chest did not write; what is beside the trap is as good as before.
"""

import gzip
import json
import os
import pickle
import random
import shutil
from contextlib import ExitStack, contextmanager, suppress
from itertools import product

import pytest
from damage import FULL, SEED, in_time, little_memory, measured_peak, read, tree, write
from xxhash import xxh3_64_intdigest

from chest import Chest, ChestError, CorruptIndexError, CorruptValueError
from chest.columns import Entry, Puts, encode
from chest.frames import MAGIC, encode_length, frame, write_log

if os.name != "posix":
    pytest.skip("links, pipes and devices are POSIX", allow_module_level=True)

JSON = {"dump": json.dump, "load": json.load}
GZIP = {"open": gzip.open}
KINDS = [{}, JSON, GZIP]
CLEAR = (ChestError, OSError)
ROOM = 256 << 20
SOON = 20  # seconds: what hangs, hangs for ever
OLD = os.path.join(os.path.dirname(os.path.dirname(__file__)), "old_chests")

pytestmark = [pytest.mark.repeats, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Read ahead in one thread: each takes much address space."""
    monkeypatch.setattr("chest.bulk.THREADS", 1)


@pytest.fixture
def outside(tmp_path):
    """A folder beside the chest, with what is nobody's business."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "victim").write_text("precious")
    Chest({"theirs": [1]}, path=str(folder / "chest")).close()
    return str(folder)


# -- what is asked of a chest ---------------------------------------------------------------------


def get_each(c):
    """Get every value; what cannot be had is told for each."""
    told = []
    for key in list(c):
        try:
            c[key]
        except CLEAR as error:
            assert named(error)
            told.append(error)
    if told:
        raise told[0]


def get_together(c):
    dict(c.items())


def read_ahead(c):
    c.prefetch(list(c))


def delete(c):
    for key in list(c):
        del c[key]
    c.flush()


def replace(c):
    for key in list(c):
        c[key] = ["new"]
    c.flush()


def clear(c):
    c.clear()
    c.flush()


def add(c):
    c["added"] = ["new"]
    c.flush()


def drop(c):
    c.drop()


READING = [get_each, get_together, read_ahead]
WRITING = [delete, replace, clear, add, drop]


def asked(ask, path, *, readonly=False, **options):
    """Ask something of the chest there; return the error that it ends in, if it is a clear one."""
    with little_memory(ROOM), measured_peak() as grown:
        caught = None
        try:
            with in_time(SOON):
                c = Chest(path=path, readonly=readonly, **options)
                try:
                    ask(c)
                finally:
                    let_go(c)
        except CLEAR as error:
            caught = error
    assert grown[0] < ROOM / 2
    return caught


def let_go(c):
    try:
        c.close()
    except BaseException as error:
        c._finalizer.detach()
        c._memory._end()
        if not isinstance(error, CLEAR):
            raise


def named(error):
    return getattr(error, "path", None) or error.filename


# -- things that are no files ---------------------------------------------------------------------


def pipe(full, outside):
    os.mkfifo(full)


def endless(full, outside):
    os.symlink("/dev/zero", full)


def empty_device(full, outside):
    os.symlink("/dev/null", full)


def folder(full, outside):
    os.mkdir(full)


def full_folder(full, outside):
    os.mkdir(full)
    write(os.path.join(full, "mine"), b"mine")


def link_out(full, outside):
    os.symlink(os.path.join(outside, "victim"), full)


def link_to_folder(full, outside):
    os.symlink(outside, full)


def link_to_nothing(full, outside):
    os.symlink(os.path.join(outside, "nothing"), full)


def cycle(full, outside):
    os.symlink(full + "~", full)
    os.symlink(full, full + "~")


THINGS = [pipe, endless, empty_device, folder, full_folder]
THINGS += [link_out, link_to_folder, link_to_nothing, cycle]
PLACES = {  # with the keys of the values there
    "x": ["x"],
    "large": ["large"],
    "_a/b": [("a", "b")],
    "_a": [("a", "b")],
    ".pack-1": [str(n) for n in range(64)],
}


def fill(path, options):
    """Make a chest with a value of each kind, and return what it holds."""
    with Chest(path=path, **options) as c:
        c.update({"x": [1], ("a", "b"): [2], "large": ["large" * 15_000]})
        c.flush()
        if options is not GZIP:
            c.update((key, [key]) for key in PLACES[".pack-1"])
            c.flush()
    with Chest(path=path, **options) as c:
        return dict(c)


def trap(path, place, thing, outside):
    full = os.path.join(path, place)
    if os.path.isdir(full):
        shutil.rmtree(full)
    else:
        os.unlink(full)
    thing(full, outside)


traps = pytest.mark.parametrize(("thing", "place"), [*product(THINGS, PLACES)])


@traps
def test_what_is_no_file_costs_the_value_there_alone(path, outside, thing, place):
    tried = 0
    for options in KINDS:
        if (place, options) == (".pack-1", GZIP):
            continue
        expected = fill(path, options)
        trap(path, place, thing, outside)
        before, untouched = tree(path), tree(outside)
        blamed = os.path.join(path, place)
        for readonly, ask in product([False, True], READING):
            error = asked(ask, path, readonly=readonly, **options)
            assert blamed in named(error)
            assert isinstance(error, CorruptValueError)
            tried += 1
        assert tree(path) == before
        assert tree(outside) == untouched
        with Chest(path=path, readonly=True, **options) as c:
            assert [*c] == [*expected]
            for key in set(expected).difference(PLACES[place]):
                assert c[key] == expected[key]
        shutil.rmtree(path)
    print(f"{tried} points")


@traps
def test_what_is_no_file_is_removed_itself_alone(path, outside, thing, place):
    untouched = tree(outside)
    for ask in WRITING:
        expected = fill(path, {})
        write(os.path.join(path, "theirs"), b"theirs")
        trap(path, place, thing, outside)
        error = asked(ask, path)
        assert tree(outside) == untouched
        assert read(os.path.join(path, "theirs")) == b"theirs"
        if thing is full_folder:
            assert read(os.path.join(path, place, "mine")) == b"mine"
        assert error is None
        if ask is not drop:
            with Chest(path=path) as c:
                if ask is replace:
                    assert dict(c) == {key: ["new"] for key in expected}
                assert len(c) == {delete: 0, clear: 0, add: 68}.get(ask, 67)
        shutil.rmtree(path)
    print(f"{len(WRITING)} points")


def link_to_another(full, outside):
    os.symlink(os.path.join(outside, "chest", ".keys"), full)


@pytest.mark.parametrize("options", KINDS[:2])
@pytest.mark.parametrize("thing", [*THINGS, link_to_another])
def test_what_is_no_file_is_no_index(path, outside, thing, options):
    fill(path, options)
    trap(path, ".keys", thing, outside)
    before, untouched = tree(path), tree(outside)
    asks = [(False, ask) for ask in READING + WRITING] + [(True, ask) for ask in READING]
    for readonly, ask in asks:
        error = asked(ask, path, readonly=readonly, **options)
        assert tree(outside) == untouched
        assert tree(path) == before
        assert os.path.join(path, ".keys") in named(error)
    print(f"{len(asks)} points")


# -- names that lead out --------------------------------------------------------------------------

NAMES = [
    "", ".", "..", "/", "//x", "../outside/victim", "{outside}/victim", "x/../../outside/victim",
    "./mine", "sub/./mine", "sub//mine", "mine/", "mine/x", "mine\0", ".keys", ".hidden",
    "sub/.hidden", ".new-0123456789abcdef-0", ".pack-0", ".pack-01", ".pack-1/x", "link/victim",
    "link/chest/.keys", "link/..", "a" * 300, "a/" * 300 + "b",
]  # fmt: skip
MINE = ["mine", ".hidden", "sub/mine", "sub/.hidden", ".pack-0", ".pack-01", ".pack-9", "x~1"]


def crafted(path, outside, payloads=(), beyond=()):
    """Make a directory with such an index, files of others, and a link that leads out."""
    os.makedirs(os.path.join(path, "sub"))
    for name in MINE:
        write(os.path.join(path, name), b"mine")
    os.symlink(outside, os.path.join(path, "link"))
    index = os.path.join(path, ".keys")
    write_log(index, list(payloads), fsync=False)
    with open(index, "ab") as file:
        file.writelines(map(frame, beyond))


def entry(name, data=b"precious"):
    return Entry(name, 0, len(data), xxh3_64_intdigest(data))


def putting(name):
    return encode([([0, 1], Puts.of({"k": entry(name), "l": entry(name)}))])


def with_a_value(path, outside, name):
    crafted(path, outside, [putting(name)])


def with_leavings(path, outside, name):
    crafted(path, outside, [encode([], first=True, left=[entry(name)])])


def with_a_commit_that_died(path, outside, name):
    crafted(path, outside, [], [putting(name)])


def with_an_old_index(path, outside, name):
    crafted(path, outside)
    write(os.path.join(path, ".keys"), json.dumps([["k", name]]).encode())


@pytest.mark.parametrize("ask", READING + WRITING)
@pytest.mark.parametrize(
    "make", [with_a_value, with_leavings, with_a_commit_that_died, with_an_old_index]
)
def test_no_name_leads_out(path, outside, make, ask):
    untouched = tree(outside)
    for name in NAMES:
        make(path, outside, name.format(outside=outside))
        error = asked(ask, path, **JSON)
        assert tree(outside) == untouched
        assert {read(os.path.join(path, name)) for name in MINE} == {b"mine"}
        assert error is None or str(error)
        shutil.rmtree(path)
    print(f"{len(NAMES)} points")


@pytest.mark.parametrize("ask", WRITING)
def test_a_value_that_two_old_keys_share_is_copied_inside(path, outside, ask):
    crafted(path, outside)
    write(os.path.join(path, ".keys"), b'[["k", "link/victim"], ["l", "link/victim"]]')
    untouched = tree(outside)
    asked(ask, path, **JSON)
    assert tree(outside) == untouched


@pytest.mark.parametrize("ask", [get_each, delete, drop])
def test_a_name_that_cannot_be_spelled_is_a_wrong_one(path, outside, ask):
    with_a_value(path, outside, "\ud800")
    assert isinstance(asked(ask, path, **JSON), CorruptIndexError)


@pytest.mark.parametrize("ask", [delete, replace, drop])
def test_a_name_of_a_thousand_folders_is_removed_like_any_other(path, outside, ask):
    with_a_value(path, outside, "a/" * 2000 + "b")
    error = asked(ask, path, **JSON)
    assert error is None or isinstance(error, CorruptIndexError)


def test_what_a_commit_left_is_another_file_by_now(path, outside):
    for make in (with_leavings, with_a_commit_that_died):
        for name in ("mine", "sub/mine"):
            make(path, outside, name)
            assert asked(add, path) is None
            assert read(os.path.join(path, name)) == b"mine"
            shutil.rmtree(path)


@pytest.mark.parametrize("make", [with_leavings, with_a_commit_that_died])
@pytest.mark.parametrize("thing", THINGS)
def test_what_a_commit_left_is_no_file_by_now(path, outside, make, thing):
    untouched = tree(outside)
    for ask in WRITING:
        make(path, outside, "left")
        thing(os.path.join(path, "left"), outside)
        assert asked(ask, path) is None
        # A link to the very bytes that were written passes for ours; it goes itself alone.
        assert os.path.lexists(os.path.join(path, "left")) or thing is link_out
        assert tree(outside) == untouched
        shutil.rmtree(path)


# -- numbers that are huge ------------------------------------------------------------------------

HUGE = [1 << 28, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


@pytest.mark.parametrize("ask", READING)
@pytest.mark.parametrize("number", HUGE)
def test_the_length_of_a_value_is_compared_before_it_is_believed(path, outside, number, ask):
    crafted(path, outside, [encode([([0], Puts(["k"], ["x~1"], [0], [number], [0]))])])
    for options in KINDS:
        error = asked(ask, path, **options)
        assert isinstance(error, CorruptValueError) or (error is None and ask is read_ahead)


COLUMNS = [*product([[0]], [[n] for n in HUGE])]
COLUMNS += [([n, 0], [n, n]) for n in HUGE] + [([n], [4]) for n in HUGE]


@pytest.mark.parametrize(("places", "lengths"), COLUMNS)
def test_places_and_lengths_in_packs_are_compared_before_they_are_believed(
    path, outside, places, lengths
):
    keys = ["k", "l"][: len(places)]
    puts = Puts(keys, ".pack-9", places, lengths, [0] * len(keys))
    crafted(path, outside, [encode([(range(len(keys)), puts)])])
    for options, ask in product([{}, JSON], READING):
        error = asked(ask, path, **options)
        assert isinstance(error, CorruptValueError) or (error is None and ask is read_ahead)


def dag():
    key = (1,)
    for _ in range(60):
        key = (key, key)
    block = (([key], []), 0, ["f"], 0, ("I", bytes(4)), ("I", bytes(4)))
    return pickle.dumps((True, False, None, [], ([], []), [block]), 5)


LONG = (1 << 40).to_bytes(8, "little")
PAYLOADS = {
    "bytes": b"\x80\x05\x8e" + LONG,
    "bytearray": b"\x80\x05\x96" + LONG,
    "text": b"\x80\x05\x8d" + LONG,
    "frame": b"\x80\x05\x95" + LONG,
    "integer": b"\x80\x05\x8b\xff\xff\xff\x7f",
    "digits": b"\x80\x05I" + b"9" * 100_000 + b"\n.",
    "nested tuples": b"\x80\x05)" + b"\x85" * 100_000 + b".",
    "nested lists": b"\x80\x05" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "marks": b"\x80\x05" + b"(" * 100_000 + b".",
    "memo": b"\x80\x05Nr" + (0xA00000).to_bytes(4, "little") + b".",
    "memo in text": b"\x80\x05Np10485760\n.",
    "shared": dag(),
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_a_frame_takes_no_more_than_its_size(path, outside, payload):
    crafted(path, outside, [payload])
    for options, readonly in product([{}, JSON], [False, True]):
        error = asked(get_each, path, readonly=readonly, **options)
        assert isinstance(error, CorruptIndexError)


@pytest.mark.parametrize("ask", [get_each, add, drop])
@pytest.mark.parametrize("length", [1 << 30, (1 << 48) - 1])
def test_a_committed_length_beyond_the_file_is_an_error(path, outside, length, ask):
    crafted(path, outside)
    head = MAGIC + encode_length(length).to_bytes(8, "little")
    for start in (b"", b"\xf0\xff\xff\x3f" + bytes(4)):  # of a frame that goes as far
        write(os.path.join(path, ".keys"), head + start)
        assert isinstance(asked(ask, path), CorruptIndexError)


def stretch(path, name):
    """Let a file seem to go on for a terabyte, as a program that seeks may leave it."""
    os.truncate(os.path.join(path, name), 1 << 40)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("name", ["x", "large", ".pack-1", ".keys"])
def test_a_file_that_seems_endless(path, name, options):
    if options is GZIP and name == ".pack-1":
        pytest.skip("there are no packs")
    expected = fill(path, options)
    stretch(path, name)
    for ask in (get_each, add):
        error = asked(ask, path, **options)
        harmless = name in (".pack-1", ".keys") or ask is add
        assert error is None if harmless else os.path.join(path, name) in named(error)
    with Chest(path=path, readonly=True, **options) as c:
        assert {*c} == {*expected, "added"}


def test_a_file_that_inflates_to_much_more_than_was_written(path):
    fill(path, GZIP)
    write(os.path.join(path, "x"), gzip.compress(bytes(1 << 24)) * 1000)
    assert isinstance(asked(get_each, path, **GZIP), CorruptValueError)


# -- an index of something else -------------------------------------------------------------------

OTHERS = {
    "text": b"keys\n",
    "zeros": bytes(4096),
    "program": b"\x7fELF\x02\x01\x01" + bytes(100),
    "sqlite": b"SQLite format 3\0" + bytes(84),
    "compressed": gzip.compress(b"keys"),
    "newer": b"chest\x00\x02\n" + encode_length(16).to_bytes(8, "little"),
    "newer magic": b"chest\x00\x01\r" + encode_length(16).to_bytes(8, "little"),
    "a number": b"7",
    "a dict": b'{"k": "x"}',
    "names alone": b'["k", "x"]',
    "names that are lists": b'[["k", ["x"]]]',
    "triples": b'[["k", "x", 1]]',
    "keys without a hash": b'[[{"a": 1}, "x"]]',
    "nested": b"[" * 200_000,
    "digits": b"9" * 100_000,
    "no UTF-8": b'["\xff"]',
    "a pickle": pickle.dumps([("k", "x")]),
    "a pickle that runs code": b"cos\nmkdir\n(S'ran'\ntR.",
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_an_index_of_another_kind_is_told_and_nothing_touched(path, outside, content, monkeypatch):
    crafted(path, outside)
    monkeypatch.chdir(outside)
    write(os.path.join(path, ".keys"), content)
    before, untouched = tree(path), tree(outside)
    asks = [(False, ask) for ask in READING + WRITING] + [(True, ask) for ask in READING]
    for readonly, ask in asks:
        error = asked(ask, path, readonly=readonly, **JSON)
        assert isinstance(error, CorruptIndexError)
        assert error.path == os.path.join(path, ".keys")
        assert error.path in str(error)
        assert tree(path) == before
        assert tree(outside) == untouched
    print(f"{len(asks)} points")


@pytest.mark.parametrize("ask", WRITING)
@pytest.mark.parametrize("thing", [*THINGS[1:]])
def test_things_in_an_old_chest_are_removed_themselves_alone(path, outside, thing, ask):
    shutil.copytree(os.path.join(OLD, "json"), path)
    write(os.path.join(path, "mine"), b"mine")
    os.unlink(os.path.join(path, "x"))
    thing(os.path.join(path, "x"), outside)
    untouched = tree(outside)
    asked(ask, path, **JSON)
    assert tree(outside) == untouched
    assert read(os.path.join(path, "mine")) == b"mine"


# -- what is not the chest's ----------------------------------------------------------------------


def test_files_of_others_stay_whatever_the_chest_does(path, outside):
    """At random; every name that the chest may want is somebody's, now and then."""
    turns = 20_000 if FULL else 1000
    chance = random.Random(SEED)
    wanted = ["x", "x~1", "x~2", "_a", "_a/b", "_a/b~1", "_a~1", "y", ".pack-2", ".pack-5", "sub/z"]
    makers = [make_file, pipe, link_out, link_to_nothing]
    theirs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chest.upkeep.COMPACT_BYTES", 2000)
        patch.setattr("chest.upkeep.WASTE", 1000)
        expected = {}
        c = Chest(path=path)
        for _ in range(turns):
            match chance.randrange(9):
                case 0 | 1:
                    key = chance.choice(["x", "y", ("a", "b"), ("a", "c"), "a"])
                    c[key] = expected[key] = [chance.random()]
                case 2:
                    many = {("m", n): (n, chance.random()) for n in range(chance.randrange(100))}
                    c.update(many)
                    expected.update(many)
                case 3 if expected:
                    key = chance.choice([*expected])
                    del c[key], expected[key]
                case 4:
                    name = chance.choice(wanted)
                    full = os.path.join(path, name)
                    with suppress(FileExistsError, NotADirectoryError):
                        os.makedirs(os.path.dirname(full), exist_ok=True)
                        if not os.path.lexists(full):
                            chance.choice(makers)(full, outside)
                            theirs[name] = os.lstat(full).st_ino
                case 5 if chance.random() < 0.1:
                    c.clear()
                    expected.clear()
                case 6 if chance.random() < 0.1:
                    c.drop()
                    c = Chest(path=path)
                    expected.clear()
                case 7:
                    c.close()
                    c = Chest(path=path)
                case _:
                    c.flush()
                    for name, number in theirs.items():
                        assert os.lstat(os.path.join(path, name)).st_ino == number
        assert dict(c) == expected
        c.drop()
    left = {name for name, content in tree(path).items() if content != "folder"}
    assert left == {*theirs}
    assert read(os.path.join(outside, "victim")) == b"precious"
    print(f"{turns} points, {len(theirs)} files of others, seed {SEED}")


def make_file(full, outside):
    write(full, b"theirs")


# -- whoever else looks at the directory ----------------------------------------------------------


@pytest.mark.parametrize("place", ["x", "large"])
@pytest.mark.parametrize("thing", THINGS)
def test_another_chest_takes_no_more_over_than_values(path, tmp_path, outside, thing, place):
    expected = fill(path, {})
    trap(path, place, thing, outside)
    untouched = tree(outside)
    times = os.stat(os.path.join(outside, "victim")).st_mtime_ns
    with Chest(path=str(tmp_path / "other")) as other, in_time(SOON):
        with Chest(path=path) as c, pytest.raises(CorruptValueError):
            other.update(c)
            other[place]  # the copy of a file elsewhere is a damaged value
        if place in other:
            del other[place]
        assert dict(other).items() <= expected.items()
        assert not any(os.path.islink(entry.path) for entry in os.scandir(other.path))
    assert tree(outside) == untouched
    assert os.stat(os.path.join(outside, "victim")).st_mtime_ns == times


@pytest.mark.parametrize("thing", THINGS)
def test_what_is_opened_by_the_hundred_is_looked_at_first(path, outside, thing):
    @contextmanager
    def open_many(paths, mode):
        with ExitStack() as stack:
            yield [stack.enter_context(open(path, mode)) for path in paths]

    fill(path, {})
    trap(path, "x", thing, outside)

    def ahead(c):
        with suppress(CorruptValueError):
            c.prefetch(list(c))
        get_each(c)

    assert isinstance(asked(ahead, path, open_many=open_many), CorruptValueError)


def test_what_a_commit_left_in_a_pack_is_not_cut_through_a_link(path, outside):
    victim = os.path.join(outside, "victim")
    puts = [Puts([key], ".pack-1", [place], [4], [0]) for key, place in (("k", 0), ("l", 4))]
    committed, died = (encode([([n], put)], first=True) for n, put in enumerate(puts))
    crafted(path, outside, [committed], [died])
    os.symlink(victim, os.path.join(path, ".pack-1"))
    assert asked(add, path) is None
    assert read(victim) == b"precious"
