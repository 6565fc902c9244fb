"""The shell: ``python -m chest``."""

import datetime as dt
import gzip
import json
import os
import pickle
import subprocess
import sys

import pytest
import test_old
from test_verify import JSON, Bomb, cut, flip, tree

from chest import Chest, __version__
from chest.__main__ import main

BIG = len(pickle.dumps(bytes(200_000), 5))
SMALL = {("k", n): f"value {n}" for n in range(100)}


@pytest.fixture
def made(path):
    """A chest of each kind of key and file."""
    with Chest(path=path) as c:
        c.update(SMALL)
        c.flush()
        c["big"] = bytes(200_000)
        c["1"], c[1], c["data"] = "text", [1], b"\0raw"
        c[dt.date(2026, 1, 1)] = "dated"
    return path


def said(capsys, *args):
    """What a command prints, what it says, and its status."""
    status = main([*args])
    out, err = capsys.readouterr()
    return out, err, status


# -- commands that only look ----------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["info"]])
def test_a_summary_tells_what_is_there(made, capsys, command):
    before = tree(made)
    out, err, status = said(capsys, *command, made)
    assert (err, status) == ("", 0)
    facts = dict(line.split(None, 1) for line in out.splitlines())
    assert facts["chest"] == made
    assert facts["keys"] == "105, 1 of which need a class"
    stored = sum(os.path.getsize(os.path.join(made, name)) for name in before if name != ".keys")
    assert facts["values"] == f"{stored:,} bytes"
    assert facts["packs"].startswith("1, ")
    assert facts["packs"].endswith(" 0% waste")
    assert facts["serializer"] == "pickle"
    assert facts["format"] == "1"
    assert tree(made) == before


def test_the_waste_of_the_index_is_what_compacting_it_frees(path, capsys):
    with Chest({n: n for n in range(500)}, path=path) as c:
        c.flush()
        for n in range(300):
            c[n] = -n
            c.flush()
    index = os.path.join(path, ".keys")
    [line] = [line for line in said(capsys, path)[0].splitlines() if line.startswith("index")]
    before = os.path.getsize(index)
    said(capsys, "compact", path)
    freed = 1 - os.path.getsize(index) / before
    assert freed > 0.5
    assert line.endswith(f" {before:,} bytes, {freed:.0%} waste")
    assert " 0% waste" in said(capsys, path)[0].splitlines()[5]


def test_a_summary_of_an_old_and_of_a_json_chest(path, tmp_path, capsys):
    test_old.make(path, [("x", "x")], {"x": 1})
    out = said(capsys, path)[0]
    assert "0.2.3" in out
    assert " 0% waste" in out
    with Chest({"x": 1}, tmp_path / "json", **JSON):
        pass
    assert "json.dump" in said(capsys, str(tmp_path / "json"))[0]


def test_the_list_is_in_the_order_of_setting_or_by_size_or_key(made, capsys):
    with Chest(path=made) as c:
        expected = [repr(key) for key in c if not isinstance(key, dt.date)]
    out, _, status = said(capsys, "ls", made)
    listed = [line.split(None, 2) for line in out.splitlines()]
    assert status == 0
    assert [key for _, _, key in listed if key[0] != "<"] == expected
    assert [key for _, _, key in listed if key[0] == "<"] == [
        "<datetime.date(b'\\x07\\xea\\x01\\x01')>"
    ]
    by_size = said(capsys, "ls", "--sort", "size", made)[0].splitlines()
    assert by_size[0].split() == [f"{BIG:,}", "big", "'big'"]
    sizes = [int(line.split()[0].replace(",", "")) for line in by_size]
    assert sizes == sorted(sizes, reverse=True)
    out = said(capsys, "ls", "--sort", "key", made)[0]
    by_key = [line.split(None, 2)[2] for line in out.splitlines()]
    assert by_key == sorted(by_key)


def test_the_list_as_json(made, capsys):
    out, _, status = said(capsys, "ls", "--json", made)
    listed = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert len(listed) == 105
    assert {"key": "'big'", "bytes": BIG, "file": "big"} in listed


def test_what_only_looks_runs_nothing_and_changes_nothing(path, capsys):
    with Chest({"x": [1]}, path) as c:
        c[dt.date(2026, 1, 1)] = Bomb()
    before = tree(path)
    Bomb.armed = True
    try:
        for command in ["info"], ["ls"], ["verify"]:
            out, err, status = said(capsys, *command, path)
            assert (err, status) == ("", 0)
            assert out
    finally:
        Bomb.armed = False
    assert tree(path) == before


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "expected"), [
    ("1", "[1]\n"),
    ("'1'", "'text'\n"),
    ("('k', 7)", "'value 7'\n"),
    ("data", "\0raw"),
    ("'data'", "\0raw"),
])  # fmt: skip
def test_get_takes_a_literal_or_a_string(made, capsysbinary, key, expected):
    assert main(["get", made, key]) == 0
    assert capsysbinary.readouterr().out.decode() == expected


def test_get_tells_that_there_is_no_such_key(made, capsys):
    out, err, status = said(capsys, "get", made, "nothing")
    assert (out, status) == ("", 2)
    assert "no key 'nothing'" in err
    with Chest(path=made) as c:
        del c[1]
    assert "quote it twice" in said(capsys, "get", made, "1")[1]


def test_get_reads_compressed_and_json_values(tmp_path, capsys):
    for n, options in enumerate([{"open": gzip.open}, JSON]):
        path = str(tmp_path / str(n))
        with Chest({"x": [1, "two"]}, path, **options):
            pass
        assert said(capsys, "get", path, "x") == ("[1, 'two']\n", "", 0)


def test_get_of_a_damaged_value_names_it(made, capsys):
    flip(made, "big", 500)
    out, err, status = said(capsys, "get", made, "big")
    assert (out, status) == ("", 1)
    assert "'big'" in err


# -- verify, repair, compact ----------------------------------------------------------------------


def test_damage_is_found_moved_aside_and_gone(made, capsys):
    out, _, status = said(capsys, "verify", made)
    assert out.startswith("105 values")
    assert status == 0
    flip(made, "big", 500)
    out, _, status = said(capsys, "verify", made)
    assert "1 damaged" in out
    assert status == 1
    out, _, status = said(capsys, "repair", made)
    assert os.path.join(".damaged", "big") in out
    assert status == 1
    assert said(capsys, "verify", made)[2] == 0
    assert said(capsys, "repair", made)[2] == 0
    with Chest(path=made) as c:
        assert "big" not in c
        assert SMALL.items() <= dict(c).items()


def test_compact_frees_what_is_out_of_date_and_then_nothing(made, capsys):
    with Chest(path=made) as c:
        for n in range(50):
            del c["k", n]
        expected = dict(c)
    out, _, status = said(capsys, "compact", made)
    assert status == 0
    assert int(out.partition(" ")[0].replace(",", "")) > 50 * len(pickle.dumps("value 1", 5)) - 50
    assert said(capsys, "compact", made)[0] == "0 bytes freed\n"
    with Chest(path=made) as c:
        assert dict(c) == expected
        c._check()


def test_a_damaged_index_is_shown_as_far_as_it_can_be_read(made, capsys):
    cut(made, ".keys", os.path.getsize(os.path.join(made, ".keys")) - 3)
    out, err, status = said(capsys, "ls", made)
    assert "('k', 0)" in out
    assert "the index is damaged" in err
    out = said(capsys, made)[0]
    assert "bytes" in out
    assert "waste" not in next(line for line in out.splitlines() if line.startswith("index"))
    assert status == 1
    assert said(capsys, "compact", made)[2] == 1
    assert said(capsys, "repair", made)[2] == 1
    assert said(capsys, "verify", made)[2] == 0


def test_a_terminal_is_told_how_far_it_is(made, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert said(capsys, "verify", made)[1] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for command in "verify", "repair":
        out, err, status = said(capsys, command, made)
        assert status == 0
        assert err.endswith(f"\r{command}: 105 of 105 keys\n")
        assert "of 105" not in out


def test_an_interrupt_ends_it_without_a_traceback(made, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("chest.__main__.examine", interrupt)
    assert said(capsys, "verify", made) == ("", "", 130)


# -- wrong use ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["info", "ls", "verify", "repair", "compact"])
def test_where_there_is_no_chest_nothing_is_made(tmp_path, capsys, command):
    out, err, status = said(capsys, command, str(tmp_path / "none"))
    assert (out, status) == ("", 2)
    assert "there is no chest in" in err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("args", [["get", "."], ["ls", ".", "--sort", "color"], ["ls"], []])
def test_wrong_usage_is_told(capsys, args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert "usage: python -m chest" in capsys.readouterr().err


def test_help_and_version(capsys):
    for args in ["--help"], ["ls", "--help"], ["--version"]:
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 0
        assert capsys.readouterr().out.startswith(("usage: python -m chest", __version__))


def test_a_directory_with_the_name_of_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with Chest({"x": 1}, "ls"):
        pass
    assert said(capsys, "./ls")[2] == 0
    assert said(capsys, "ls", "ls")[0].endswith("'x'\n")


def test_as_a_program_that_ends_quietly_where_nobody_reads_on(made):
    run = [sys.executable, "-m", "chest", "ls", made]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0
    done = subprocess.run([*run[:3], made], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "105, 1 of which" in done.stdout
