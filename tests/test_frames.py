"""Frames are read as far as they are whole, whatever a file says of its length."""

import os
from io import FileIO

import pytest

import chest.frames
from chest.frames import (
    HEAD,
    MOVED,
    decode_length,
    encode_length,
    frame,
    log_size,
    read_frames,
    split_frames,
    write_log,
)

PAYLOADS = [b"one", b"two" * 50, b"x", b"three" * 7]


@pytest.fixture
def log(path):
    """A log of some frames, open."""
    write_log(path, PAYLOADS, fsync=False)
    assert os.path.getsize(path) == log_size(PAYLOADS)
    with FileIO(path, "r+") as file:
        yield file


def test_lengths_come_back_and_other_words_are_none():
    for length in (0, 16, 1 << 40, (1 << 48) - 1):
        assert decode_length(encode_length(length)) == length
        assert decode_length(encode_length(length) | MOVED) == length
        assert decode_length(encode_length(length) ^ 1) == -1
        assert decode_length(encode_length(length) ^ (1 << 48)) == -1


@pytest.mark.parametrize("step", [1, 8, 10, 40, 10_000])
def test_frames_are_read_in_steps(log, step, monkeypatch):
    monkeypatch.setattr(chest.frames, "STEP", step)
    size = os.fstat(log.fileno()).st_size
    assert read_frames(log, HEAD, size) == (PAYLOADS, size)
    for end in range(HEAD, size):
        payloads, reached = read_frames(log, HEAD, end)
        assert payloads == PAYLOADS[: len(payloads)]
        assert reached == HEAD + sum(len(frame(payload)) for payload in payloads) <= end


def test_a_hole_is_no_frame_and_is_not_read(log):
    size = os.fstat(log.fileno()).st_size
    assert [*split_frames(bytes(64))] == []
    os.truncate(log.fileno(), 1 << 40)
    assert read_frames(log, HEAD, 1 << 40) == (PAYLOADS, size)


def test_what_was_cut_off_is_not_waited_for(log):
    size = os.fstat(log.fileno()).st_size
    os.truncate(log.fileno(), size - 1)
    assert read_frames(log, HEAD, size) == (PAYLOADS[:-1], size - len(frame(PAYLOADS[-1])))
