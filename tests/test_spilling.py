"""What was replaced or deleted leaves the disk without a spill, a flush or a close, too."""

import logging
import os

import pytest
from test_memory import Stubborn, refusing

import chest.spilling
from chest import Chest

N, SIZE, LIMIT = 100, 1000, 10_000


@pytest.fixture(autouse=True)
def scarce(monkeypatch):
    """A disk of which little may be taken by what is out of date."""
    monkeypatch.setattr(chest.spilling, "OUTDATED", LIMIT)


@pytest.fixture(params=[0, 5000, 1e9])
def filled(path, request):
    """A chest whose values are on disk, half of them in packs."""
    with Chest(path=path, available_memory=request.param) as c:
        for n in range(0, N, 2):
            c[n] = bytes([n]) * SIZE
            c.flush()
        c.update({n: bytes([n]) * SIZE for n in range(1, N, 2)})
        c.flush()
        yield c
        c._check()


in_memory = pytest.mark.parametrize("filled", [1e9], indirect=True)  # where nothing else commits


def on_disk(c):
    names = [name for name in os.listdir(c.path) if name != ".keys"]
    return sum(os.path.getsize(os.path.join(c.path, name)) for name in names)


def alive(c):
    return sum(map(len, map(bytes, c.values())))


def committed(c):
    with Chest(path=c.path, readonly=True) as other:
        return dict(other)


def test_deleting_alone_frees_the_disk(filled):
    c, packed = filled, N // 2 * SIZE
    for n in range(N):
        before = c.memory_usage
        del c[n]
        assert on_disk(c) < alive(c) + before + LIMIT + 3 * SIZE + packed
    assert on_disk(c) < LIMIT + 2 * SIZE


@pytest.mark.parametrize("take", [Chest.pop, Chest.popitem])
def test_so_does_taking_values_out(filled, take):
    c = filled
    for n in range(N):
        take(c, *([n] if take is Chest.pop else []))
    assert on_disk(c) < LIMIT + 2 * SIZE


def test_clearing_alone_frees_the_disk(filled):
    filled.clear()
    assert on_disk(filled) == 0
    assert committed(filled) == {}


def test_replacing_by_what_takes_less_frees_the_disk(path):
    with Chest({n: bytes([n]) * SIZE for n in range(N)}, path, open=open_like_builtin) as c:
        c.flush()
        for n in range(N):
            c[n] = [n]
        assert on_disk(c) < LIMIT + c.memory_usage + 2 * SIZE
        c._check()
        assert dict(c) == {n: [n] for n in range(N)}


def open_like_builtin(path, mode):
    """Open a file, and keep the chest from packs, which would keep what is dead for a while."""
    return open(path, mode)


def test_a_commit_waits_until_more_is_out_of_date_than_is_in_memory(path):
    with Chest({n: bytes([n]) * SIZE for n in range(N)}, path) as c:
        c.flush()
        length = os.path.getsize(c.path + "/.keys")
        for turn in range(3):
            for n in range(N):
                c[n] = [turn] * SIZE
        assert os.path.getsize(c.path + "/.keys") == length


@in_memory
def test_a_value_that_is_renamed_is_on_disk_at_every_moment(filled):
    c = filled
    values = sorted(c.values())
    for n in range(N):
        c[f"new {n}"] = bytearray(c.pop(n))
        assert sorted(map(bytes, committed(c).values())) == values
    assert on_disk(c) < 2 * N * SIZE
    c.flush()
    assert committed(c) == {f"new {n}": bytearray([n]) * SIZE for n in range(N)}


@pytest.mark.parametrize("fails", [True, False])
def test_a_transaction_keeps_what_it_may_have_to_give_back(filled, fails):
    c, before = filled, dict(filled)

    class Fails(Exception):
        pass

    with pytest.raises(Fails):
        with c.transaction():
            for n in range(N):
                del c[n]
            c.clear()
            c["x"] = []
            assert committed(c) == before
            if fails:
                raise Fails
        assert committed(c) == {"x": []}
        assert on_disk(c) < SIZE
        raise Fails
    assert dict(c) == (before if fails else {"x": []})


@in_memory
@pytest.mark.parametrize("how", ["open", "write"])
def test_a_disk_that_refuses_is_told_of_once_and_nothing_is_lost(filled, how, caplog):
    c = filled
    with refusing(how):
        for n in range(N - 1):
            if n % 3:
                del c[n]
            else:
                c[n] = [n]
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 1
    assert "still takes room on disk" in told[0]
    assert c.path in told[0]
    c._check()
    expected = {n: [n] for n in range(0, N - 1, 3)} | {N - 1: bytes([N - 1]) * SIZE}
    assert dict(c) == expected
    c.flush()
    assert committed(c) == expected
    assert on_disk(c) < 10_000


def test_what_cannot_be_written_keeps_nothing_else_from_the_disk(filled, caplog):
    c = filled
    value = Stubborn(ValueError("no"))
    c["bad"] = value
    for n in range(N):
        c[n] = [n]
    for n in range(0, N, 2):
        del c[n]
    assert on_disk(c) < LIMIT + 3 * SIZE + 50 * N
    assert c["bad"] is value
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 1
    assert "'bad' stays in memory" in told[0]
    c._check()
    del c["bad"]
