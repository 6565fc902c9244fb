"""What can go wrong carries its data, survives pickling, and says in one line what to do."""

import copy
import errno
import pickle
import subprocess
import sys

import pytest

import chest
from chest import (
    Chest,
    ChestClosedError,
    ChestError,
    CorruptIndexError,
    CorruptValueError,
    KeyTypeError,
    ReadOnlyError,
    SerializerError,
    UnsavedError,
)

ERRORS = {
    "closed": (ChestClosedError, {"path": "/the/path"}),
    "closed, temporary": (ChestClosedError, {"path": None}),
    "read-only": (ReadOnlyError, {"path": "/the/path", "action": "set a value"}),
    "key": (KeyTypeError, {"key": ("the", "key"), "reason": "the reason"}),
    "index": (
        CorruptIndexError,
        {"path": "/the/path", "reason": "the reason", "recoverable": 3, "repairable": True},
    ),
    "index, for good": (
        CorruptIndexError,
        {"path": "/the/path", "reason": "the reason", "recoverable": 0, "repairable": False},
    ),
    "value": (
        CorruptValueError,
        {"key": ("the", "key"), "path": "/the/path", "reason": "the reason"},
    ),
    "serializer": (
        SerializerError,
        {
            "key": ("the", "key"),
            "path": "/the/path",
            "reason": "the reason",
            "serializer": "this.load",
            "written_with": ("one.dump", "another.dump"),
        },
    ),
    "unsaved": (
        UnsavedError,
        {"keys": [("the", "key"), 1], "causes": [ValueError("the reason"), OSError(28, "full")]},
    ),
}
ADVICE = {
    ChestClosedError: "open it again",
    ReadOnlyError: "readonly=True",
    KeyTypeError: "stored",
    CorruptIndexError: "backup",
    CorruptValueError: "set or delete",
    SerializerError: "dump, load and open",
    UnsavedError: "flush again",
}


def comparable(data):
    """Make exceptions, which are equal only to themselves, comparable."""
    return {
        name: [(type(each), each.args) for each in value] if name == "causes" else value
        for name, value in data.items()
    }


@pytest.fixture(params=ERRORS)
def case(request):
    kind, data = ERRORS[request.param]
    return kind(**data), data


def test_every_class_is_public_and_has_its_test():
    public = {
        each
        for name in chest.__all__
        if isinstance(each := getattr(chest, name), type) and issubclass(each, Exception)
    }
    assert public == {kind for kind, _ in ERRORS.values()} | {ChestError}


def test_every_error_is_a_chest_error(case):
    assert isinstance(case[0], ChestError)
    assert issubclass(ChestError, Exception)


@pytest.mark.parametrize(
    ("kind", "bases"),
    [
        (ChestClosedError, {ValueError}),
        (KeyTypeError, {TypeError}),
        (ReadOnlyError, {TypeError}),
        (CorruptIndexError, set()),
        (CorruptValueError, set()),
        (SerializerError, set()),
        (UnsavedError, set()),
    ],
)
def test_each_is_what_its_page_says_and_nothing_else(kind, bases):
    usual = {ValueError, TypeError, LookupError, OSError, RuntimeError, EOFError, AttributeError}
    assert {each for each in usual if issubclass(kind, each)} == bases


def test_its_data_are_attributes(case):
    error, data = case
    assert comparable({name: getattr(error, name) for name in data}) == comparable(data)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_survives_pickling(case, protocol):
    error, data = case
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert comparable({name: getattr(again, name) for name in data}) == comparable(data)
    assert str(again) == str(error)


def test_it_survives_copying(case):
    error, _ = case
    assert str(copy.copy(error)) == str(copy.deepcopy(error)) == str(error)


def test_what_was_noted_on_it_survives_pickling(case):
    error, _ = case
    error.add_note("noted")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["noted"]


def test_it_says_what_where_and_what_to_do(case):
    error, data = case
    text = str(error)
    assert ADVICE[type(error)] in text
    for name in ("path", "action", "reason", "serializer"):
        assert str(data.get(name, "")) in text
    for name in data.get("written_with", ()):
        assert name in text
    for key in [data["key"]] if "key" in data else data.get("keys", ()):
        assert repr(key) in text


def test_it_is_one_line(case):
    error, _ = case
    assert len(str(error).splitlines()) == 1
    assert str(error) == str(error).strip()


LINES = "first line\nsecond line\r\n\n  third line"


class Lines:
    """A key whose repr has several lines, as that of an array has."""

    def __repr__(self):
        return LINES


class Nameless:
    def __repr__(self):
        raise ValueError("no name")


STRANGE = [
    Lines(), ("a", Lines()), LINES, "x" * 100_000, tuple(range(10_000)), Nameless(),
    ("a", Nameless()), b"\n\r", 10**4000,
]  # fmt: skip


@pytest.mark.parametrize("key", STRANGE, ids=lambda key: type(key).__name__)
@pytest.mark.parametrize("kind", [KeyTypeError, CorruptValueError, SerializerError, UnsavedError])
def test_it_is_one_line_of_some_hundred_letters_whatever_the_key(kind, key):
    data = next(data for each, data in ERRORS.values() if each is kind)
    name = "keys" if kind is UnsavedError else "key"
    text = str(kind(**{**data, name: [key, key] if kind is UnsavedError else key}))
    assert len(text.splitlines()) == 1
    assert len(text) < 1500


@pytest.mark.parametrize(
    "kind", [KeyTypeError, CorruptIndexError, CorruptValueError, SerializerError]
)
def test_it_is_one_line_whatever_the_reason(kind):
    data = next(data for each, data in ERRORS.values() if each is kind)
    text = str(kind(**{**data, "reason": LINES}))
    assert len(text.splitlines()) == 1
    assert "first line" in text


class SilentError(Exception):
    def __str__(self):
        raise ValueError("no text")


@pytest.mark.parametrize(
    "cause", [ValueError(LINES), OSError(errno.ENOSPC, LINES), SilentError(), KeyError(LINES)]
)
def test_it_is_one_line_whatever_the_cause(cause):
    text = str(UnsavedError(["k"], [cause]))
    assert len(text.splitlines()) == 1
    assert type(cause).__name__ in text


@pytest.mark.parametrize("number", [1, 9, 10, 11, 1000])
def test_of_many_keys_the_first_ten_are_named(number):
    keys = [f"key{n:04}" for n in range(number)]
    error = UnsavedError(keys, [ValueError(f"cause{n:04}") for n in range(number)])
    text = str(error)
    assert [key for key in keys if key in text] == keys[:10]
    assert text.startswith(f"{number} of the values")
    assert (f"{number - 10} more" in text) == (number > 10)
    assert "cause0000" in text
    assert error.keys == keys
    assert len(error.causes) == number


def test_an_error_of_a_child_process_reads_as_it_was_written(path):
    program = (
        "import pickle, sys\nfrom chest import Chest\n"
        f"c = Chest(path={path!r})\nc['good'] = 1\nc['bad'] = lambda: 0\n"
        "try:\n    c.close()\nexcept Exception as error:\n"
        "    sys.stdout.buffer.write(pickle.dumps(error))\n    del c['bad']\n"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    error = pickle.loads(child.stdout)
    assert type(error) is UnsavedError
    assert error.keys == ["bad"]
    assert "lambda" in str(error)


def test_the_cause_of_damage_and_of_a_refused_load_is_chained(path):
    def refuse(file):
        raise ValueError("no")

    with Chest({"k": [1]}, path=path) as c:
        file = c.key_to_filename("k")
    with Chest(path=path, load=refuse) as c, pytest.raises(SerializerError) as info:
        c["k"]
    chain, error = [], info.value
    while error is not None:
        chain.append(error)
        error = error.__cause__
    assert isinstance(chain[-1], ValueError)
    with open(file, "r+b") as damaged:
        damaged.write(b"damage")
    with Chest(path=path) as c, pytest.raises(CorruptValueError) as info:
        c["k"]
    assert info.value.path == file


CLOSED = {
    "get": lambda c: c["k"],
    "set": lambda c: c.__setitem__("k", 1),
    "delete": lambda c: c.__delitem__("k"),
    "contains": lambda c: "k" in c,
    "len": len,
    "iterate": list,
    "values": lambda c: list(c.values()),
    "update": lambda c: c.update(k=1),
    "clear": lambda c: c.clear(),
    "flush": lambda c: c.flush(),
    "shrink": lambda c: c.shrink(),
    "memory": lambda c: c.memory_usage,
    "drop": lambda c: c.drop(),
}


@pytest.mark.parametrize("operation", CLOSED)
@pytest.mark.parametrize("temporary", [False, True], ids=["with a path", "temporary"])
def test_a_closed_chest_says_so(path, operation, temporary):
    c = Chest({"k": [1]}, path=None if temporary else path)
    c.close()
    with pytest.raises(ChestClosedError, match="is closed") as info:
        CLOSED[operation](c)
    assert info.value.path == (None if temporary else path)


CHANGES = {
    "set": lambda c: c.__setitem__("k", 1),
    "set a new key": lambda c: c.__setitem__("new", 1),
    "delete": lambda c: c.__delitem__("k"),
    "pop": lambda c: c.pop("k"),
    "popitem": lambda c: c.popitem(),
    "setdefault": lambda c: c.setdefault("new", 1),
    "update": lambda c: c.update(k=1),
    "clear": lambda c: c.clear(),
    "drop": lambda c: c.drop(),
}


@pytest.mark.parametrize("operation", CHANGES)
def test_a_chest_that_is_only_read_says_so(path, operation):
    with Chest({"k": [1]}, path=path):
        pass
    with Chest(path=path, readonly=True) as c:
        with pytest.raises(ReadOnlyError, match=r"cannot .*: the chest at .* is read") as info:
            CHANGES[operation](c)
        assert info.value.path == path
        assert info.value.action in str(info.value)
        assert dict(c) == {"k": [1]}
        c._check()
