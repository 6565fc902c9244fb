"""The file `.keys`: its bytes, what counts of it, its lock, and its replacement."""

import io
import os
import struct
from zlib import crc32

import pytest
from filelock import lock_descriptor, unlock_descriptor

import chest.head
import chest.index
import chest.reading
from chest import Chest, CorruptIndexError, UnsavedError
from chest.frames import encode_length, frame, write_log
from chest.index import Index

MAGIC = b"chest\x00\x01\n"
MOVED = 0x80  # in the last byte of the head


@pytest.fixture
def keys(tmp_path):
    """The path of an empty log."""
    name = str(tmp_path / ".keys")
    write_log(name, [], fsync=False)
    return name


@pytest.fixture
def opened(keys):
    """Open the log as often as wanted."""
    made = []

    def kept(file):
        made.append(file)
        return file


    def make(*, readonly=False):
        made.append(Index(keys, readonly=readonly, fsync=False))
        return made[-1]

    yield make
    while made:  # maps of the head live as long as the index does
        made.pop().close()


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, data, mode="wb"):
    with open(path, mode) as file:
        file.write(data)


def word(length):
    return length | (crc32(length.to_bytes(6, "little")) & 0x7FFF) << 48


def head(length):
    return MAGIC + struct.pack("<Q", word(length))


def framed(payload):
    return struct.pack("<II", len(payload), crc32(payload)) + payload


def commit(index, *payloads):
    with index.locked():
        index.refresh()
        for payload in payloads:
            index.append(payload)
        index.publish()
        index.acknowledge()


def tree(path):
    """Everything below a directory, with its content."""
    return {
        os.path.join(folder, name): read(os.path.join(folder, name))
        for folder, _, names in os.walk(path)
        for name in names
    }


def abandon(chest):
    """Let go of a chest that cannot be closed."""
    chest._finalizer.detach()
    chest._memory._end()


# -- the bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "spelled"),
    [
        (16, "1000000000003823"),
        (17, "1100000000009d70"),
        (220, "dc0000000000f77d"),
        (2**32, "000000000100e210"),
        (2**48 - 1, "ffffffffffff006d"),
    ],
)
def test_the_length_word_is_the_length_with_a_checksum_above_it(length, spelled):
    assert encode_length(length).to_bytes(8, "little") == bytes.fromhex(spelled)
    assert encode_length(length) == word(length)


def test_a_new_index_is_a_head_of_16_bytes(path):
    with Chest(path=path):
        assert read(os.path.join(path, ".keys")) == head(16)


def test_a_frame_is_length_checksum_and_payload():
    assert frame(b"payload") == b"\x07\0\0\0" + crc32(b"payload").to_bytes(4, "little") + b"payload"


def test_commits_are_frames_end_to_end_and_the_head_says_where_they_end(keys, opened):
    commit(opened(), b"one", b"two")
    commit(opened(), b"", b"three" * 1000)
    frames = b"".join(map(framed, [b"one", b"two", b"", b"three" * 1000]))
    assert read(keys) == head(16 + len(frames)) + frames


def test_each_commit_of_a_chest_is_a_frame_behind_the_last(path):
    name = os.path.join(path, ".keys")
    with Chest(path=path) as c:
        sizes = []
        for n in range(3):
            c["x"] = n
            c.flush()
            sizes.append(len(read(name)))
    data = read(name)
    assert data.startswith(head(len(data)))
    ends = [16]
    while ends[-1] < len(data):
        size, checksum = struct.unpack_from("<II", data, ends[-1])
        payload = data[ends[-1] + 8 : ends[-1] + 8 + size]
        assert crc32(payload) == checksum
        ends.append(ends[-1] + 8 + size)
    assert ends[1:] == sizes


# c["x"] = [1, 2, 3], c["a", 1] = "one" and del c["x"], each in a commit of its own.
GOLDEN = bytes.fromhex(
    "636865737400010a360100000000a36c5d0000002504fd7c80059552000000000000002888898c067069636b"
    "6c65944e86945d945d945d9486945d94285d948c017894615d9486944b005d946808614b008c014994430416"
    "0000009486948c0151944308af2a7149bd2db39494869474946174942e85000000c4dd1f318005957a000000"
    "000000002888898c067069636b6c65944e86945d945d945d9486945d94285d948c0161944b018694615d9486"
    "944b015d948c235f612f39653465393135653031336234626662633964373431656662383734346133309461"
    "4b008c0149944304120000009486948c0151944308c0ad480f71f5cf8d94869474946174942e2c00000062c6"
    "1e3180059521000000000000002888898c067069636b6c65944e86945d945d948c017894615d9486945d9474"
    "942e"
)
GOLDEN_VALUE = bytes.fromhex("80059507000000000000008c036f6e65942e")


def test_an_index_written_by_version_1_0_0_is_read(path):
    os.makedirs(os.path.join(path, "_a"))
    write(os.path.join(path, ".keys"), GOLDEN)
    write(os.path.join(path, "_a", "9e4e915e013b4bfbc9d741efb8744a30"), GOLDEN_VALUE)
    with Chest(path=path) as c:
        assert dict(c) == {("a", 1): "one"}
        c._check()


# -- what counts ----------------------------------------------------------------------------------


def test_all_that_was_committed_is_read_once(opened):
    writer, reader = opened(), opened()
    assert reader.refresh() == (True, [])
    commit(writer, b"one")
    commit(writer, b"two", b"three")
    assert reader.refresh() == (False, [b"one", b"two", b"three"])
    assert reader.refresh() == (False, [])
    assert opened().refresh() == (True, [b"one", b"two", b"three"])


def test_one_integer_tells_whether_another_handle_committed(opened):
    writer, reader = opened(), opened(readonly=True)
    reader.refresh()
    assert reader.head[1] == reader.seen
    commit(writer, b"one")
    assert reader.head[1] != reader.seen
    assert writer.head[1] == writer.seen
    reader.refresh()
    assert reader.head[1] == reader.seen


def test_what_is_appended_counts_when_it_is_published(keys, opened):
    writer, reader = opened(), opened()
    with writer.locked():
        writer.refresh()
        writer.append(b"one")
        writer.append(b"two")
        assert not writer.published
        assert reader.refresh() == (True, [])
        assert read(keys).startswith(head(16))
        writer.publish()
        assert writer.published
        assert reader.refresh() == (False, [b"one", b"two"])


def test_own_frames_come_back_unless_they_are_acknowledged(opened):
    writer = opened()
    with writer.locked():
        writer.refresh()
        writer.append(b"one")
        writer.publish()
        assert writer.refresh() == (False, [b"one"])
    commit(writer, b"two")
    assert writer.refresh() == (False, [])


def test_frames_beyond_the_length_can_be_cut(keys, opened):
    writer = opened()
    commit(writer, b"one")
    before = read(keys)
    with writer.locked():
        writer.refresh()
        writer.append(b"two")
        writer.append(b"three")
        assert writer.overhangs()
        writer.cut()
    assert read(keys) == before
    commit(writer, b"four")
    assert opened().refresh() == (True, [b"one", b"four"])


def test_what_a_crash_left_beyond_the_length_is_told_and_never_read(keys, opened):
    commit(opened(), b"one")
    write(keys, framed(b"two") + framed(b"three") + framed(b"half")[:-1], "ab")
    index = opened()
    assert index.refresh() == (True, [b"one"])
    assert index.overhangs()
    assert index.uncommitted() == [b"two", b"three"]


def test_nothing_overhangs_after_a_commit(opened):
    writer, reader = opened(), opened()
    commit(writer, b"one")
    reader.refresh()
    assert not writer.overhangs()
    assert not reader.overhangs()


def test_the_next_commit_takes_the_place_of_what_lies_beyond(keys, opened):
    write(keys, framed(b"never committed"), "ab")
    commit(opened(), b"one")
    assert opened().refresh() == (True, [b"one"])
    assert read(keys).startswith(head(16 + 11) + framed(b"one"))


def test_a_system_that_writes_less_than_asked_is_asked_again(keys, opened, monkeypatch):
    class Slow(io.FileIO):
        def write(self, data):
            return super().write(memoryview(data)[:3])

        def read(self, size=-1):
            return super().read(min(size, 5) if self.tell() >= 16 else size)

    monkeypatch.setattr(chest.head, "FileIO", Slow)
    commit(opened(), b"a longer payload", b"another")
    assert opened().refresh() == (True, [b"a longer payload", b"another"])
    assert read(keys)[16:] == framed(b"a longer payload") + framed(b"another")


@pytest.fixture
def full(monkeypatch):
    """Where this list holds an error, writes of the word in the head raise it."""
    errors = []

    class File(io.FileIO):
        def write(self, data):
            if errors and self.tell() == 8:
                raise errors[0]
            return super().write(data)

    monkeypatch.setattr(chest.head, "FileIO", File)
    return errors


FULL = OSError(28, "No space left on device")


def test_a_word_that_the_disk_refuses_commits_nothing(keys, opened, full):
    index, reader = opened(), opened(readonly=True)
    commit(index, b"one")
    before = read(keys)
    full.append(FULL)
    with pytest.raises(OSError, match="No space") as caught:
        commit(index, b"two")
    assert caught.value.filename == keys
    assert not is_locked(keys)
    assert read(keys)[: len(before)] == before
    assert reader.refresh() == (True, [b"one"])
    full.clear()
    with index.locked():
        index.refresh()
        index.cut()
    assert read(keys) == before
    commit(index, b"three")
    assert reader.refresh() == (False, [b"three"])


def test_a_chest_on_a_full_disk_goes_on_where_there_is_room_again(path, full):
    with Chest({"x": [1]}, path=path) as c:
        c.flush()
        c["x"].append(2)
        full.append(FULL)
        with pytest.raises(UnsavedError, match="No space"):
            c.flush()
        with Chest(path=path, readonly=True) as reader:
            assert dict(reader) == {"x": [1]}
        full.clear()
        assert c == {"x": [1, 2]}
        c.flush()
        with Chest(path=path, readonly=True) as reader:
            assert dict(reader) == {"x": [1, 2]}


def test_a_replacement_whose_mark_the_disk_refuses_leaves_everything_as_it_was(keys, opened, full):
    index = opened()
    commit(index, b"one")
    before = read(keys)
    full.append(FULL)
    with pytest.raises(OSError, match="No space"):
        replace(index, b"all")
    full.clear()
    assert read(keys) == before
    commit(index, b"two")
    assert opened().refresh() == (True, [b"one", b"two"])


def test_a_mark_that_the_disk_does_not_let_go_of_hides_nothing(keys, opened, full, monkeypatch):
    index = opened()
    commit(index, b"one")

    def refuse(*args):
        full.append(FULL)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            replace(index, b"all")
    assert read(keys)[15] & MOVED
    assert opened().refresh() == (True, [b"one"])
    full.clear()
    commit(index, b"two")
    assert opened().refresh() == (True, [b"one", b"two"])
    assert not read(keys)[15] & MOVED


def test_a_word_seen_while_it_is_written_is_waited_for(keys, opened, monkeypatch):
    commit(opened(), *[b"one"] * 30)
    whole = read(keys)
    torn = whole[:9] + head(16)[9:16] + whole[16:]
    write(keys, torn, "r+b")
    index, waits = opened(readonly=True), []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            write(keys, whole, "r+b")

    with monkeypatch.context() as patch:
        patch.setattr(chest.index.time, "sleep", sleep)
        assert index.refresh() == (True, [b"one"] * 30)
    assert len(waits) == 2


def test_the_head_can_be_looked_at_while_the_index_is_closed(opened):
    index = opened()
    index.refresh()
    seen, looked_at = index.seen, index.head
    index.close()
    assert looked_at[1] == seen


# -- damage ---------------------------------------------------------------------------------------


def three_commits(path):
    with Chest(path=path) as c:
        for value, key in enumerate(["x", ("a", "b"), 7]):
            c[key] = value
            c.flush()
        del c["x"]
    return read(os.path.join(path, ".keys"))


def test_a_wrong_byte_anywhere_is_an_error_and_changes_nothing(path):
    data = three_commits(path)
    for place in range(len(data)):
        # The upper bit of the head's last byte says MOVED: that is no damage.
        wrong = data[place] ^ (0x01 if place == 15 else 0x81)
        write(os.path.join(path, ".keys"), data[:place] + bytes([wrong]) + data[place + 1 :])
        before = tree(path)
        with pytest.raises(CorruptIndexError) as caught:
            Chest(path=path)
        assert caught.value.path == os.path.join(path, ".keys")
        assert tree(path) == before


def test_any_wrong_bit_of_the_length_is_an_error(keys, opened):
    commit(opened(), b"one", b"two")
    data = read(keys)
    (right,) = struct.unpack_from("<Q", data, 8)
    for bit in range(63):
        write(keys, MAGIC + struct.pack("<Q", right ^ 1 << bit) + data[16:])
        with pytest.raises(CorruptIndexError, match="length"):
            opened().refresh()


def test_an_index_that_is_cut_short_is_an_error_never_an_empty_chest(path):
    data = three_commits(path)
    for length in range(len(data)):
        write(os.path.join(path, ".keys"), data[:length])
        before = tree(path)
        with pytest.raises(CorruptIndexError):
            Chest(path=path)
        assert tree(path) == before


@pytest.mark.parametrize("length", [0, 8, 15])
def test_a_length_that_ends_in_the_head_is_an_error(keys, opened, length):
    write(keys, head(length))
    with pytest.raises(CorruptIndexError):
        opened().refresh()


def test_a_length_that_ends_inside_a_frame_is_an_error(keys, opened):
    commit(opened(), b"one", b"two")
    data = read(keys)
    write(keys, head(len(data) - 1) + data[16:])
    with pytest.raises(CorruptIndexError, match="frame at byte 27"):
        opened().refresh()


def test_the_error_tells_how_many_frames_stand_undamaged(keys, opened):
    commit(opened(), b"one")
    commit(opened(), b"two")
    commit(opened(), b"three")
    data = read(keys)
    write(keys, data[:-1] + b"\0")
    with pytest.raises(CorruptIndexError) as caught:
        opened().refresh()
    assert caught.value.recoverable == 2


def test_the_error_tells_how_many_frames_precede_those_of_the_last_look(keys, opened):
    index = opened()
    commit(index, b"one", b"two")
    with index.locked():
        index.append(b"never")
        index.append(b"committed")
        index.cut()
    commit(opened(), b"three", b"four")
    write(keys, read(keys)[:-1] + b"\0")
    with pytest.raises(CorruptIndexError) as caught:
        index.refresh()
    assert caught.value.recoverable == 3


def test_an_open_chest_reports_damage_at_every_operation_and_goes_on_once_it_is_mended(path):
    name = os.path.join(path, ".keys")
    with Chest(path=path) as writer, Chest(path=path) as c:
        c["mine"] = 1
        writer["x"] = 2
        writer.flush()
        data = read(name)
        write(name, data[:-1] + b"\0", "r+b")
        for _ in range(2):
            with pytest.raises(CorruptIndexError):
                c["x"]
            with pytest.raises(CorruptIndexError):
                c.flush()
        write(name, data, "r+b")
        assert dict(c) == {"mine": 1, "x": 2}


def test_a_damaged_index_is_not_written_to_by_closing_the_chest(path):
    name = os.path.join(path, ".keys")
    with Chest(path=path) as writer:
        c = Chest(path=path)
        c["mine"] = 1
        writer["x"] = 2
        writer.flush()
        data = read(name)
        write(name, data[:-1] + b"\0", "r+b")
        before = tree(path)
        with pytest.raises(CorruptIndexError):
            c.close()
        assert tree(path) == before
        abandon(c)
        write(name, data, "r+b")


@pytest.mark.parametrize("start", [b"chest\x00\x02\n", b"chest\x00\xff\x00"])
def test_an_index_of_a_newer_version_is_refused(path, start):
    os.mkdir(path)
    write(os.path.join(path, ".keys"), start + bytes(100))
    before = tree(path)
    with pytest.raises(CorruptIndexError, match="newer version"):
        Chest(path=path)
    assert tree(path) == before


@pytest.mark.parametrize("content", [b"", b"chest", b"hello world\n", bytes(20), b"\x80\x05N."])
def test_a_file_that_is_no_index_is_an_error_never_an_empty_chest(path, content):
    os.mkdir(path)
    write(os.path.join(path, ".keys"), content)
    with pytest.raises(CorruptIndexError):
        Chest(path=path)
    assert tree(path) == {os.path.join(path, ".keys"): content}


# -- the lock -------------------------------------------------------------------------------------


def is_locked(path):
    with open(path, "rb") as file:
        if not lock_descriptor(file.fileno(), blocking=False):
            return True
        unlock_descriptor(file.fileno())
        return False


def test_the_lock_is_the_systems_on_the_file_itself(keys, opened):
    index = opened()
    assert not is_locked(keys)
    with index.locked():
        assert is_locked(keys)
    assert not is_locked(keys)
    assert os.listdir(os.path.dirname(keys)) == [".keys"]


def test_the_lock_may_be_nested(keys, opened):
    index = opened()
    with index.locked():
        with index.locked():
            pass
        assert is_locked(keys)
    assert not is_locked(keys)


def test_the_lock_is_let_go_of_after_an_error(keys, opened):
    index = opened()
    with pytest.raises(ZeroDivisionError):
        with index.locked():
            raise ZeroDivisionError
    assert not is_locked(keys)
    with index.locked():
        assert is_locked(keys)


def test_a_commit_holds_the_lock_until_it_is_done(path, monkeypatch):
    held = []

    class Watching(Index):
        def publish(self):
            held.append(is_locked(self.path))
            super().publish()

    monkeypatch.setattr(chest.reading, "Index", Watching)
    with Chest({"x": 1}, path=path) as c:
        c.flush()
        held.append(is_locked(os.path.join(path, ".keys")))
    assert held == [True, False]


def test_a_readonly_index_is_read_while_another_holds_the_lock(opened):
    writer, reader = opened(), opened(readonly=True)
    commit(writer, b"one")
    with writer.locked():
        assert reader.refresh() == (True, [b"one"])


# -- replacement ----------------------------------------------------------------------------------


def replace(index, *payloads):
    with index.locked():
        index.refresh()
        index.replace([*payloads], index.path + ".scratch")


def test_a_replaced_log_consists_of_the_new_payloads_alone(keys, opened):
    index = opened()
    commit(index, b"one", b"two")
    replace(index, b"all")
    assert read(keys) == head(16 + 11) + framed(b"all")
    assert index.refresh() == (True, [b"all"])
    commit(index, b"more")
    assert opened().refresh() == (True, [b"all", b"more"])
    assert os.listdir(os.path.dirname(keys)) == [".keys"]


def test_the_old_log_says_that_it_was_moved(keys, opened):
    index = opened()
    commit(index, b"one")
    with open(keys, "rb") as old:
        replace(index, b"all")
        assert old.read(16)[15] & MOVED
    assert not read(keys)[15] & MOVED


def test_a_reader_of_the_old_log_finds_the_new_one(opened):
    index, reader = opened(), opened(readonly=True)
    commit(index, b"one")
    reader.refresh()
    replace(index, b"all")
    commit(index, b"more")
    assert reader.head[1] != reader.seen
    assert reader.refresh() == (True, [b"all", b"more"])
    assert reader.head[1] == reader.seen


def test_a_writer_with_the_old_log_commits_to_the_new_one(opened):
    index, other = opened(), opened()
    commit(index, b"one")
    other.refresh()
    replace(index, b"all")
    commit(other, b"more")
    assert index.refresh() == (True, [b"all", b"more"])


def test_the_lock_goes_with_the_replacement(keys, opened):
    index = opened()
    with index.locked():
        index.refresh()
        index.replace([b"all"], index.path + ".scratch")
        assert is_locked(keys)
    assert not is_locked(keys)


def test_a_mark_left_by_a_replacement_that_died_hides_nothing(keys, opened):
    commit(opened(), b"one")
    mark_moved(keys)
    writer, reader = opened(), opened(readonly=True)
    assert reader.refresh() == (True, [b"one"])
    assert reader.head[1] != reader.seen, "the mark has to be looked at until it is gone"
    assert reader.refresh() == (False, [])
    commit(writer, b"two")
    assert not read(keys)[15] & MOVED
    assert reader.refresh() == (False, [b"two"])
    assert reader.head[1] == reader.seen


def mark_moved(path):
    data = read(path)
    write(path, data[:15] + bytes([data[15] | MOVED]) + data[16:], "r+b")


def test_a_chest_marked_as_moved_by_a_compaction_that_died_is_as_it_was(path):
    with Chest({"x": 1}, path=path):
        pass
    mark_moved(os.path.join(path, ".keys"))
    with Chest(path=path, readonly=True) as reader, Chest(path=path) as c:
        assert dict(reader) == dict(c) == {"x": 1}
        c["y"] = 2
        c.flush()
        assert dict(reader) == {"x": 1, "y": 2}
    assert not read(os.path.join(path, ".keys"))[15] & MOVED


@pytest.mark.parametrize("error", [PermissionError(13, "no"), KeyboardInterrupt()], ids=repr)
def test_a_replacement_that_fails_leaves_everything_as_it_was(keys, opened, monkeypatch, error):
    index, reader = opened(), opened()
    commit(index, b"one")
    reader.refresh()
    before = read(keys)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raising(error))
        with pytest.raises(type(error)):
            replace(index, b"all")
    assert read(keys) == before
    assert not is_locked(keys)
    commit(index, b"two")
    assert reader.refresh() == (False, [b"two"])


def raising(error):
    def function(*args, **options):
        raise error

    return function


def test_a_replacement_that_cannot_be_locked_leaves_everything_as_it_was(keys, opened, monkeypatch):
    index = opened()
    commit(index, b"one")
    before = read(keys)
    with monkeypatch.context() as patch:
        patch.setattr(chest.index, "lock_descriptor", fails_second_time(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            replace(index, b"all")
    assert read(keys) == before
    assert not is_locked(keys)


def test_a_replacement_that_fails_lets_go_of_the_new_file_though_nobody_can_look(
    keys, opened, monkeypatch
):
    index = opened()
    commit(index, b"one")
    real = os.lstat

    def lstat(path, **options):
        if path == keys and made:
            raise OSError(5, "Input/output error", path)
        return real(path, **options)

    made = []

    def kept(file):
        made.append(file)
        return file

    open_really = chest.head.open_file
    with monkeypatch.context() as patch:
        for module in chest.head, chest.index:
            patch.setattr(module, "open_file", lambda *args: kept(open_really(*args)))
        patch.setattr(os, "replace", raising(OSError(5, "Input/output error")))
        patch.setattr(os, "lstat", lstat)
        with pytest.raises(OSError, match="Input/output"):
            replace(index, b"all")
    assert [file.closed for file in made] == [True, True]  # of which one was for the map
    commit(index, b"two")
    assert opened().refresh() == (True, [b"one", b"two"])


def fails_second_time(error):
    calls = []

    def function(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return lock_descriptor(*args, **options)

    return function


def test_an_interrupt_just_after_the_replacement_hides_the_new_log_from_nobody(
    opened, monkeypatch
):
    index, reader = opened(), opened(readonly=True)
    commit(index, b"one")
    reader.refresh()
    real = os.replace

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            replace(index, b"all")
    commit(opened(), b"more")
    assert reader.refresh() == (True, [b"all", b"more"])
    commit(index, b"last")
    assert reader.refresh() == (False, [b"last"])


def test_an_index_that_is_replaced_while_it_is_opened_is_opened_anew(keys, opened, monkeypatch):
    commit(opened(), b"one")
    opening, modes = chest.head.open_file, []

    def replace_before_the_second(name, mode):
        modes.append(mode)
        if len(modes) == 2:
            write(keys + "-new", read(keys))
            os.replace(keys + "-new", keys)
        return opening(name, mode)

    monkeypatch.setattr(chest.head, "open_file", replace_before_the_second)
    index = opened()
    assert len(modes) == 4
    assert index.refresh() == (True, [b"one"])
    commit(index, b"two")
    assert opened().refresh() == (True, [b"one", b"two"])


@pytest.mark.parametrize("act", [Index.cut, Index.overhangs, lambda index: index.append(b"new")])
def test_what_was_not_read_is_not_taken_for_uncommitted(keys, opened, act):
    commit(opened(), b"one", b"two")
    before = read(keys)
    index = opened()
    with index.locked(), pytest.raises(RuntimeError, match="was not read"):
        act(index)
    assert read(keys) == before
    assert index.refresh() == (True, [b"one", b"two"])


def test_a_lock_that_could_not_be_let_go_of_is_no_obstacle_to_who_has_it(path, monkeypatch):
    real, failed = chest.index.unlock_descriptor, []

    def unlock(descriptor):
        if len(failed) < 2:  # it is tried twice
            failed.append(descriptor)
            raise OSError(5, "Input/output error")
        real(descriptor)

    with Chest(path=path) as c:
        c["x"] = 1
        with monkeypatch.context() as patch:
            patch.setattr(chest.index, "unlock_descriptor", unlock)
            c.flush()
        assert len(failed) == 2
        c["y"] = 2
        c.flush()
        with Chest(path=path) as other:
            other["z"] = 3
            other.flush()
        assert dict(c) == {"x": 1, "y": 2, "z": 3}
