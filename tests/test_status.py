"""What a chest tells about itself."""

import html.parser
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from chest import Chest, ChestClosedError, CorruptIndexError
from chest.stats import Stats


class Opaque:
    """What cannot be pickled."""

    def __reduce__(self):
        raise TypeError("not this")


def made(c):
    """What was counted, without what time says and without what is there."""
    s = c.stats()
    return {"hits": s.hits, "misses": s.misses, "loads": s.loads, "spills": s.spills,
            "writes": s.writes, "read": s.bytes_read, "written": s.bytes_written}  # fmt: skip


ZERO = dict.fromkeys(["hits", "misses", "loads", "spills", "writes", "read", "written"], 0)


# -- what is counted ------------------------------------------------------------------------------


def test_a_new_chest_has_done_nothing(path):
    with Chest(path=path) as c:
        assert c.stats() == Stats(*[0] * 15)
    with Chest() as c:
        assert c.stats() == Stats(*[0] * 15)
        assert "no directory yet" in repr(c)


@pytest.mark.parametrize("value", [[1], "text", (1, 2), np.arange(3)], ids=repr)
def test_every_hit_is_counted_once_from_the_first_call_on(path, value):
    with Chest({"x": value, "y": value}, path=path) as c:
        c["x"]
        assert made(c) == ZERO
        for _ in range(3):
            c["x"]
        c["y"]
        c.get("y")
        c.get("z")
        with pytest.raises(KeyError):
            c["z"]
        assert made(c) == ZERO | {"hits": 5}
        c["x"] = value
        assert "x" in c
        assert made(c)["hits"] == 5
        with c.transaction():
            c["y"]
        c["y"]
        assert made(c)["hits"] == 7
        c._check()


def test_a_miss_is_a_load_and_a_load_a_number_of_bytes(path):
    large = np.arange(20_000.0)
    with Chest({"large": large, "list": [1], "text": "t"}, path=path):
        pass
    size = sum(os.path.getsize(os.path.join(path, name)) for name in ("large", "list", "text"))
    with Chest(path=path) as c:
        c.stats()
        for _ in range(2):
            for key in c:
                c[key]
        expected = ZERO | {"hits": 3, "misses": 3, "loads": 3, "read": size}
        assert made(c) == expected
        assert c.stats().read_seconds > 0
        assert c.stats().write_seconds == 0
        c.reset_stats()
        assert made(c) == ZERO
        assert c.stats().read_seconds == 0
        assert c.stats().stored_keys == 3


def test_packed_values_count_one_by_one_and_in_passes(path):
    values = {n: ("value", n) for n in range(200)}
    with Chest(values, path=path):
        pass
    size = os.path.getsize(os.path.join(path, ".pack-1"))
    with Chest(path=path) as c:
        for n in range(100):
            c[n]
        assert (made(c)["misses"], made(c)["loads"]) == (100, 100)
        c.reset_stats()
        with Chest(path=path) as other:
            assert dict(other.items()) == values
            assert made(other) == ZERO | {"loads": 200, "read": size}
        c.prefetch(values)
        assert (made(c)["misses"], made(c)["loads"]) == (0, 100)


def test_prefetch_through_open_many_counts(path):
    from contextlib import ExitStack, contextmanager

    @contextmanager
    def open_many(paths, mode):
        with ExitStack() as stack:
            yield [stack.enter_context(open(path, mode)) for path in paths]

    with Chest({n: [n] for n in range(5)}, path=path):
        pass
    with Chest(path=path, open_many=open_many) as c:
        c.prefetch(range(5))
        assert (made(c)["loads"], made(c)["misses"]) == (5, 0)
        assert made(c)["read"] == c.stats().stored_bytes


@pytest.mark.parametrize("kind", [list, tuple])
def test_what_leaves_memory_and_what_is_written_are_counted_apart(path, kind):
    with Chest(path=path) as c:
        c.update({n: kind([n]) for n in range(100)})
        c.flush()
        assert made(c) == ZERO | {"writes": 100, "written": c.stats().stored_bytes}
        assert c.stats().write_seconds > 0
        c.available_memory = 0
        assert made(c)["spills"] == 100
        assert made(c)["writes"] == 100
        c["new"] = kind([1])
        assert made(c)["spills"] == 101
        assert made(c)["writes"] == 101
        c.clear()
        c.flush()
        assert made(c)["writes"] == 101
        assert c.stats().stored_keys == 0
        assert c.stats().stored_bytes == 0


def test_what_is_there_is_told_in_keys_bytes_packs_and_waste(path):
    with Chest({n: ("value", n) for n in range(1000)} | {"large": bytes(200_000)}, path) as c:
        c["unsaved"] = [1]
        s = c.stats()
        assert (s.resident_keys, s.resident_bytes) == (1002, c.memory_usage)
        assert (s.stored_keys, s.stored_bytes, s.packs, s.waste) == (0, 0, 0, 0)
        c.flush()
        s = c.stats()
        whole = os.path.getsize(os.path.join(path, ".pack-1"))
        large = os.path.getsize(os.path.join(path, "large"))
        assert (s.stored_keys, s.packs, s.waste) == (1002, 1, 0)
        files = [name for name in os.listdir(path) if name != ".keys"]
        assert s.stored_bytes == sum(os.path.getsize(os.path.join(path, name)) for name in files)
        for n in range(500):
            del c[n]
        c.flush()
        s = c.stats()
        assert s.stored_keys == 502
        assert 0 < s.waste < whole
        assert s.stored_bytes + s.waste == whole + large


def test_threads_lose_no_count_of_what_they_read(path):
    with Chest({n: [n] * 50 for n in range(400)}, path=path):
        pass
    with Chest(path=path) as c, ThreadPoolExecutor(4) as pool:
        c.stats()
        list(pool.map(c.__getitem__, range(400)))
        list(pool.map(c.__getitem__, range(400)))
        assert (made(c)["misses"], made(c)["hits"]) == (400, 400)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_counts_from_zero(path):
    with Chest({"x": [1]}, path=path) as c:
        c.flush()
        c.stats()
        c["x"]
        pid = os.fork()
        if pid == 0:
            os._exit(made(c) != ZERO or c["x"] != [1] or made(c)["misses"] != 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert made(c)["hits"] == 1


def test_a_closed_chest_tells_no_figures(path):
    c = Chest(path=path)
    c.close()
    for ask in (c.stats, c.reset_stats):
        with pytest.raises(ChestClosedError):
            ask()


def test_figures_print_one_to_a_line(path):
    with Chest({"x": "y" * 2000}, path=path) as c:
        c.flush()
        lines = str(c.stats()).splitlines()
    assert len(lines) == 15
    assert {len(line) for line in lines} == {30}
    assert "bytes_written            2,018" in lines
    assert [line.split()[0] for line in lines] == [*Stats.__dataclass_fields__]


# -- for a worker of dask -------------------------------------------------------------------------


def test_evict_lets_go_until_nothing_is_left(path):
    with Chest({n: np.full(20_000, n) for n in range(5)}, path=path) as c:
        assert len(c.fast) == 5
        assert len(c.slow) == 0
        used = c.memory_usage
        freed = []
        while c.fast:
            freed.append(c.evict())
        assert len(freed) == 5
        assert sum(freed) == used
        assert min(freed) > 0
        assert c.evict() == -1
        assert len(c.slow) == 5
        assert c.spilled_total == (c.stats().stored_bytes,) * 2
        assert all((c[n] == n).all() for n in range(5))
        c._check()


def test_what_cannot_be_written_is_not_fast_and_evict_says_so(path, caplog):
    with Chest({"x": Opaque()}, path=path) as c:
        assert len(c.fast) == 1
        assert c.evict() == -1
        assert not c.fast
        assert c.evict() == -1
        assert "x" in caplog.text
        assert isinstance(c["x"], Opaque)
        c["y"] = [1]
        assert {*c.fast} == {"y"}
        assert c.evict() > 0
        c._check()
        del c["x"]


def test_evict_raises_nothing_when_the_disk_refuses(path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with Chest({"x": np.arange(20_000)}, path=path) as c:
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", refuse)
            patch.setattr(os, "rename", refuse)
            patch.setattr(os, "replace", refuse)
            assert c.evict() == -1
        assert "No space left" in caplog.text
        assert "x" in c.inmem
        c._check()
        assert c.evict() > 0
    c.close()
    assert c.evict() == -1


def test_metrics_add_up(path):
    with Chest({n: [n] for n in range(10)}, path=path) as c:
        assert not any(c.cumulative_metrics.values())
        c.available_memory = 0
        [*c.values()]
        metrics = c.cumulative_metrics
        assert metrics["disk-read", "count"] == metrics["disk-write", "count"] == 10
        assert metrics["disk-read", "bytes"] == metrics["disk-write", "bytes"]
        assert metrics["disk-read", "seconds"] > 0


# -- for people -----------------------------------------------------------------------------------


class Text(html.parser.HTMLParser):
    """What a page says, cell by cell; every tag has to be closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells.append(data)


def test_a_notebook_shows_the_ten_largest_and_where_they_are(path):
    with Chest(path=path, available_memory=500_000) as c:
        for n in range(1, 21):
            c[f"<{n}>"] = bytes(10_000 * n)
        cells = Text(c._repr_html_()).cells
        assert cells[0] == repr(c)[1:-1]
        before = c.stats()
        stored = f"{before.stored_keys:,} values, {before.stored_bytes:,} bytes"
        assert cells[1:5] == [f"on disk: {stored}", "largest values", "bytes", "where"]
        rows = [cells[start : start + 3] for start in range(5, len(cells), 3)]
        assert len(rows) == 10
        assert [row[0] for row in rows] == [f"'<{n}>'" for n in range(20, 10, -1)]
        expected = {repr(key): "memory" if key in c.inmem else "disk" for key in c}
        assert all(where == expected[key] for key, _, where in rows)
        assert {where for _, _, where in rows} == {"memory", "disk"}
        c._repr_html_()
        assert c.stats() == before
    assert Text(c._repr_html_()).cells == [repr(c)[1:-1]]


@pytest.mark.parametrize("budget", [0, 1e9, float("inf")])
def test_a_notebook_shows_a_chest_of_any_budget(budget):
    with Chest({"x": [1]}, available_memory=budget) as c:
        assert Text(c._repr_html_()).cells[5] == "'x'"
    with Chest(available_memory=budget) as c:
        assert Text(c._repr_html_()).cells[2:] == ["largest values", "bytes", "where"]


def test_the_first_spill_is_told_with_the_path(path, caplog):
    caplog.set_level(logging.INFO, "chest")
    with Chest(path=path, available_memory=0) as c:
        c["x"] = [1]
        c["y"] = [1]
        told = [record for record in caplog.records if record.levelno == logging.INFO]
        assert len(told) == 1
        assert path in told[0].getMessage()


def test_a_chest_that_is_dropped_open_warns(path):
    dropped = [Chest({"x": [1]}, path=path)]
    with pytest.warns(ResourceWarning, match="close"):
        dropped.clear()
    with Chest(path=path, readonly=True) as c:
        assert c["x"] == [1]
    thread = threading.Thread(target=Chest)  # a temporary one is no loss
    thread.start()
    thread.join()


def test_what_is_spilled_is_told_though_another_handle_compacted(path):
    with Chest({"x": 1}, path) as c, Chest(path=path) as other:
        c.flush()
        other["y"] = 2
        other.flush()
        other.compact()
        assert c.spilled_total > (0, 0)


def test_a_chest_that_another_thread_closes_is_shown_as_closed(path, monkeypatch):
    c = Chest({"x": 1}, path)
    size = Chest.__len__

    def closing(self):
        found = size(self)
        self.close()
        return found

    monkeypatch.setattr(Chest, "__len__", closing)
    assert repr(c) == f"<closed chest at {path}>"


def test_a_chest_whose_index_is_damaged_is_shown_as_such(path):
    with Chest({"x": 1}, path) as c:
        c.flush()
        with open(os.path.join(path, ".keys"), "r+b", buffering=0) as file:
            head = file.read(16)
            file.seek(8)
            file.write(bytes([head[8] ^ 1]))
            with pytest.raises(CorruptIndexError):
                len(c)
            assert repr(c).startswith(f"<chest at {path}: CorruptIndexError: ")
            assert "\n" not in repr(c)
            file.seek(8)
            file.write(head[8:])
        assert "1 keys" in repr(c)


def test_a_hook_that_sets_more_than_left_makes_nothing_free():
    def set_more(key):
        if len(c) < 3:
            c["more", len(c)] = "x" * 5000

    with Chest({"a": "y" * 100}, on_overflow=set_more) as c:
        assert c.evict() == -1
        c._check()


class Odd(str):
    def __repr__(self):
        raise ValueError


def test_a_key_that_cannot_be_shown_spoils_no_picture():
    with Chest() as c:
        c[Odd("x")] = 1
        assert "largest values" in c._repr_html_()
