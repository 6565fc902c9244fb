"""Amounts of memory as text, and how much there is."""

import sys
import types

import pytest

from chest import Chest, amounts
from chest.amounts import machine_memory, parse_amount


@pytest.mark.parametrize(("text", "expected"), [
    ("0", 0),
    ("512", 512),
    ("512B", 512),
    ("1 kB", 1000),
    ("1KB", 1000),
    ("2 GB", 2e9),
    ("2gb", 2e9),
    (" 2.5 M ", 2.5e6),
    ("1e6", 1e6),
    ("1e-3 GB", 1e6),
    (".5 TB", 5e11),
    ("500 MiB", 500 * 2**20),
    ("1 kib", 1024),
    ("1Ti", 2**40),
    ("1 PiB", 2**50),
])
def test_what_a_text_says(text, expected):
    assert parse_amount(text) == expected
    with Chest(available_memory=text) as c:
        assert c.available_memory == expected
        assert type(c.available_memory) is float


@pytest.mark.parametrize(
    "text",
    ["", " ", "GB", "-1 GB", "2 GBs", "2 XB", "two", "1,5 GB", "1 2", ".", "1.2.3", "nan", "inf GB",
     "2 iB", "50%%", "-1%", "100.5%", "2 G%", "e5"],
)  # fmt: skip
def test_a_text_that_says_no_amount_is_refused_and_nothing_changes(text):
    with pytest.raises(ValueError, match=NO_AMOUNT):
        Chest(available_memory=text)
    with Chest(available_memory=1000) as c:
        with pytest.raises(ValueError, match=NO_AMOUNT):
            c.available_memory = text
        assert c.available_memory == 1000


@pytest.mark.parametrize("amount", [b"2 GB", [1], 1j])
def test_what_is_no_amount_at_all_is_refused_by_name(amount):
    with pytest.raises(TypeError, match=r"available_memory is .*: it has to be a number of bytes"):
        Chest(available_memory=amount)


def test_a_number_that_no_float_can_be_is_refused_by_name():
    with pytest.raises(ValueError, match=r"available_memory is .*: it has to be a number of bytes"):
        Chest(available_memory=10**400)


def test_a_budget_that_is_set_as_text_makes_values_leave(tmp_path):
    with Chest({n: bytes(100) for n in range(1000)}, tmp_path / "chest") as c:
        c.available_memory = "10 kB"
        assert c.memory_usage <= 10_000
        c._check()


def test_a_share_is_one_of_what_the_process_may_have(monkeypatch):
    monkeypatch.setattr(amounts, "machine_memory", lambda: 8_000_000_000)
    assert parse_amount("25%") == 2e9
    assert parse_amount("12.5 %") == 1e9
    assert parse_amount("100%") == 8e9
    assert parse_amount("0%") == 0


def test_there_is_some_memory_and_not_more_than_the_system_tells():
    assert 2**24 < machine_memory() <= amounts._installed()


NO_AMOUNT = r"amount of memory|more than there is"
GROUP = "user.slice/job-1"


@pytest.fixture
def groups(tmp_path):
    """Make a tree of control groups from a dict of file names and what is in them."""

    def make(memberships, files):
        (tmp_path / "cgroup").write_text(memberships)
        for name, content in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return [*amounts._limits(tmp_path / "cgroup", tmp_path / "fs")]

    return make


@pytest.mark.parametrize(("memberships", "files", "expected"), [
    pytest.param("", {}, [], id="none"),
    pytest.param("0::/\n", {}, [], id="no limit at the root"),
    pytest.param("0::/\n", {"memory.max": "max\n"}, [], id="max"),
    pytest.param("0::/\n", {"memory.max": "5000\n"}, [5000], id="in a container"),
    pytest.param(
        f"0::/{GROUP}\n",
        {f"{GROUP}/memory.max": "max\n", "user.slice/memory.max": "7000\n"},
        [7000],
        id="of the group above",
    ),
    pytest.param(
        f"0::/{GROUP}\n",
        {f"{GROUP}/memory.max": "3000\n", "user.slice/memory.max": "7000\n"},
        [3000, 7000],
        id="both",
    ),
    pytest.param(
        f"12:cpu,cpuacct:/x\n4:memory:/{GROUP}\n",
        {
            f"memory/{GROUP}/memory.limit_in_bytes": "4000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cpu,cpuacct/x/memory.limit_in_bytes": "1\n",
        },
        [4000, 9223372036854771712],
        id="of the first version",
    ),
    pytest.param(
        "4:memory:/docker/0123\n0::/\n",
        {"memory/memory.limit_in_bytes": "6000\n"},
        [6000],
        id="of the first version, in a container",
    ),
])  # fmt: skip
def test_the_limits_of_control_groups(groups, memberships, files, expected):
    assert groups(memberships, files) == expected


def test_the_smallest_limit_counts(monkeypatch):
    monkeypatch.setattr(amounts, "_limits", lambda *_: iter([2e9, 1e9, 9e18]))
    monkeypatch.setattr(amounts, "_installed", lambda: 8_000_000_000)
    assert machine_memory() == 1_000_000_000
    with Chest(available_memory="50%") as c:
        assert c.available_memory == 5e8


@pytest.mark.parametrize("installed", [True, False])
def test_without_sysconf_psutil_tells_or_an_error_says_what_to_do(monkeypatch, installed):
    monkeypatch.delattr(amounts.os, "sysconf")
    monkeypatch.setattr(amounts, "_limits", lambda *_: iter([]))
    module = types.ModuleType("psutil")
    module.virtual_memory = lambda: types.SimpleNamespace(total=4_000_000_000)
    monkeypatch.setitem(sys.modules, "psutil", module if installed else None)
    if installed:
        assert parse_amount("25%") == 1e9
        return
    with pytest.raises(OSError, match="psutil"):
        Chest(available_memory="25%")
    with Chest(available_memory="2 GB") as c:
        assert c.available_memory == 2e9
