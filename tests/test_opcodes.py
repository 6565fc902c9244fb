"""The opcodes of a frame are looked at before it is read."""

import pickle

import pytest

from chest.columns import FrameError, decode, encode
from chest.opcodes import demand_plain

PLAIN = [
    None, True, 0, 255, 65535, -1, 1 << 40, 1 << 70, -(1 << 3000), 1.5, float("nan"),
    "", "a", "é" * 63, "b" * 127, "c" * 128, "d" * 255, "e" * 256, "f" * 70_000, "\ud800",
    b"", b"x" * 255, b"y" * 256, b"z" * 70_000, (), ("a",), (1, 2), (1, 2, 3), ("a",) * 9,
    frozenset(), frozenset({"a", ("b", 1)}), [], ["a"], ["same", "same", ("same",)],
]  # fmt: skip


@pytest.mark.parametrize("protocol", [4, 5])
def test_whatever_a_frame_has_is_plain(protocol):
    for value in [*PLAIN, PLAIN, [PLAIN * 300, [f"key{n}" for n in range(70_000)]]]:
        demand_plain(pickle.dumps(value, protocol))


@pytest.mark.parametrize(
    "pickled",
    [
        b"", b".", b"N.", b"\x80", b"\x80\x05", b"\x80\x05N", b"\x80\x05N..", b"\x80\x05.N",
        b"\x80\x05Nr\x00\x00\x00\x10.", b"\x80\x05Nq\x00.", b"\x80\x05Np7\n.", b"\x80\x05I7\n.",
        b"\x80\x05\x8c\x05abc.", b"\x80\x05X\xff\xff\xff\xffa.", b"\x80\x05\x8b\xff\xff\xff\x7f.",
        b"\x80\x05\x8e" + b"\xff" * 8 + b".", b"\x80\x05\x95" + bytes(8),
        pickle.dumps({"a": 1}), pickle.dumps({"a"}), pickle.dumps(bytearray(b"a"), 5),
    ],
)  # fmt: skip
def test_what_no_frame_has_is_refused(pickled):
    with pytest.raises(ValueError, match=r"no index has|no pickle"):
        demand_plain(pickled)
    with pytest.raises(FrameError):
        decode(pickled)


def test_a_long_str_does_not_hide_what_comes_after_it():
    hostile = b"r\x00\x00\x00\x10"
    for length in (1, 127, 128, 255, 256, 70_000):
        good = pickle.dumps("s" * length, 5)
        demand_plain(good)
        with pytest.raises(ValueError, match="no index has"):
            demand_plain(good[:-1] + hostile + b".")
        inside = pickle.dumps("s" * length + hostile.decode() * 2, 5)
        demand_plain(inside)


def test_a_trusted_frame_is_the_same_frame():
    payload = encode([], first=True, deleted=["x", ("a", 1)])
    assert decode(payload, trusted=True) == decode(payload)
