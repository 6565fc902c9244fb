"""What has the name of a file is looked at before it is opened."""

import os

import pytest

from chest.files import (
    NO_FILE,
    demand_file,
    demand_own,
    is_own,
    own_size,
    read_whole,
    starts_with,
    write_new,
)

needs_links = pytest.mark.skipif(os.name != "posix", reason="links and pipes are POSIX")


@pytest.fixture
def file(tmp_path):
    """A file of four bytes."""
    (tmp_path / "file").write_bytes(b"four")
    return str(tmp_path / "file")


@pytest.fixture(params=["pipe", "folder", "device", "cycle"])
def thing(tmp_path, request):
    """Something that is no file."""
    path = str(tmp_path / "thing")
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": lambda: os.mkdir(path),
        "device": lambda: os.symlink("/dev/zero", path),
        "cycle": lambda: os.symlink(path, path),
    }[request.param]()
    return path


def test_a_file_is_one_also_behind_a_link(file, tmp_path):
    assert demand_file(file) == own_size(file) == 4
    assert is_own(file)
    assert starts_with(file, b"fo")
    assert not starts_with(file, b"of")
    assert read_whole(file, 4) == b"four"
    assert read_whole(file, 3) == b"four"
    assert read_whole(file, 2) == b"fou"
    if os.name == "posix":
        link = str(tmp_path / "link")
        os.symlink(file, link)
        assert demand_file(link) == 4
        assert own_size(link) == 0
        assert not is_own(link)
        assert not starts_with(link, b"fo")


@needs_links
def test_what_is_no_file_is_not_opened(thing):
    for look in (demand_file, lambda path: read_whole(path, 4)):
        with pytest.raises(FileNotFoundError, match=NO_FILE) as caught:
            look(thing)
        assert caught.value.filename == thing
    assert own_size(thing) == 0
    assert not is_own(thing)
    assert not starts_with(thing, b"")


def test_what_is_not_there_is_told(tmp_path):
    path = str(tmp_path / "nothing")
    assert own_size(path) == 0
    assert not starts_with(path, b"")
    for look in (demand_file, is_own):
        with pytest.raises(FileNotFoundError):
            look(path)
    with pytest.raises(FileNotFoundError, match=NO_FILE):
        demand_file(str(tmp_path / ("a" * 5000)))


@needs_links
def test_what_was_opened_through_a_link_is_not_written(file, tmp_path):
    link = str(tmp_path / "link")
    os.symlink(file, link)
    with open(file, "r+b", buffering=0) as opened:
        demand_own(opened, file)
        with pytest.raises(FileNotFoundError, match=NO_FILE):
            demand_own(opened, link)
    other = tmp_path / "other"
    other.write_bytes(b"")
    with open(other, "r+b", buffering=0) as opened:
        with pytest.raises(FileNotFoundError, match=NO_FILE):
            demand_own(opened, file)


def test_a_new_file_takes_the_place_of_none(file):
    with pytest.raises(FileExistsError):
        write_new(file, b"new")
    assert read_whole(file, 4) == b"four"
