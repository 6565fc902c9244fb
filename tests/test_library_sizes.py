"""What views, arrays, tables and tensors cost, against bytes that are known."""

import array
import ctypes
import gc
import mmap
import pickle
import random
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pytest

from chest.sizes import nbytes

MB = 1_000_000


def about(expected, rel=0.1):
    return pytest.approx(expected, rel=rel)


def words(n):
    rng = random.Random(n)
    return ["w" * rng.randrange(100) + str(i) for i in range(n)]


def strings_in(values):
    return sum(map(sys.getsizeof, values))


def test_buffers():
    data = bytearray(MB)
    assert nbytes(memoryview(data)) == about(MB, rel=0.01)
    assert nbytes(memoryview(data)[10:20]) == about(MB, rel=0.01)
    assert nbytes([data, memoryview(data)]) == about(MB, rel=0.01)
    released = memoryview(b"x")
    released.release()
    assert nbytes(released) < 500
    assert nbytes((ctypes.c_double * 10_000)()) == about(80_000, rel=0.01)
    assert nbytes(array.array("d", bytes(80_000))) == about(80_000)


def test_arrays():
    data = np.zeros(MB // 8)
    assert nbytes(data) == sys.getsizeof(data)
    assert nbytes(data[:3]) == about(MB, rel=0.01)
    assert nbytes(data[::-1].reshape(-1, 5).T) == about(MB, rel=0.01)
    assert nbytes([data[i:] for i in range(1000)]) == about(MB + 1000 * (128 + 8))
    assert nbytes([(np.zeros(1000)[1:], None) for _ in range(5000)]) == about(5000 * 8288)
    assert nbytes(np.array(5)) < 200
    assert nbytes(np.zeros((1000, 50), dtype="f4,i2")) == about(300_000, rel=0.01)
    assert nbytes(np.rec.array(np.zeros(1000, dtype="f4,i2"))) == about(6000)
    assert nbytes(np.array(["x" * 100] * 100)) == about(40_000, rel=0.01)
    assert nbytes([np.zeros(1000) for _ in range(5000)]) == about(5000 * 8112)


OBJECTS = np.array([bytes(5000)] * 3, dtype=object)


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(1000),
        np.zeros(1000)[5:],
        np.zeros((20, 50)).T,
        np.zeros((20, 50))[3].view("u1")[::2],
        np.zeros(100, dtype="f4,i2")["f0"],
        np.zeros(100, dtype=[("n", "f8"), ("o", "O")])["n"],
        np.frombuffer(bytes(8000)),
        np.frombuffer(bytearray(8000))[5:],
        pickle.loads(pickle.dumps(np.zeros(1000), 5)),
        np.asarray(memoryview(bytearray(8000))),
        np.zeros(1000).view(np.recarray),
        np.zeros(100, dtype="f4,i2").view(np.recarray).f0,
        OBJECTS,
        OBJECTS[1:],
    ],
    ids=range(14),
)
def test_an_array_by_itself_costs_what_it_costs_in_a_list(value):
    assert nbytes(value) == nbytes([value]) - sys.getsizeof([value])


def test_an_array_whose_memoryview_was_released_costs_what_is_known_of_it():
    value = np.frombuffer(bytearray(8000))
    value.base.release()
    assert 100 < nbytes(value) < 500


def test_an_array_of_a_class_with_attributes_costs_these_too():
    class Labelled(np.ndarray):
        pass

    value = Labelled(1000)
    value.label = bytes(5000)
    assert nbytes(value) == about(8000 + 5000)


def test_arrays_that_cost_little(tmp_path):
    assert nbytes(np.broadcast_to(np.arange(3), (10**6, 3))) < 1000
    assert nbytes(np.lib.stride_tricks.as_strided(np.zeros(1), (10**6,), (0,))) < 3000
    mapped = np.memmap(tmp_path / "map", mode="w+", shape=(MB,), dtype="u1")
    assert nbytes(mapped) < 5000
    assert nbytes(mapped[10:]) < 5000
    del mapped
    memory = mmap.mmap(-1, MB)
    view = np.frombuffer(memory, dtype="u1")
    assert nbytes(view) < 1000
    del view
    memory.close()


def test_arrays_over_other_memory():
    assert nbytes(np.frombuffer(bytes(MB), dtype="u1")) == about(MB, rel=0.01)
    assert nbytes(np.frombuffer(bytearray(MB), dtype="u1")[5:]) == about(MB, rel=0.01)
    assert nbytes(np.ctypeslib.as_array((ctypes.c_double * 1000)())) == about(8000, rel=0.1)
    assert nbytes(np.frombuffer(array.array("d", bytes(MB)))) == about(MB)


def test_array_over_memory_of_a_library():
    class PyCapsule:
        pass

    members = {"__module__": "numpy", "nbytes": MB, "base": PyCapsule()}
    stand_in = type("ndarray", (), members)  # types are looked up by these names
    assert nbytes(stand_in()) == about(MB, rel=0.01)


def test_object_arrays():
    strings = words(50_000)
    data = np.array(strings, dtype=object)
    assert nbytes(data) == about(data.nbytes + strings_in(strings))
    assert nbytes(data[::2]) == about(nbytes(data))
    assert nbytes(data.reshape(500, 100).T.copy()) == about(nbytes(data))
    assert nbytes(np.full(10**6, None)) == about(8 * MB, rel=0.01)
    nested = np.empty(2, dtype=object)
    nested[:] = [np.zeros(1000), nested]
    assert nbytes(nested) == about(8000, rel=0.1)


def test_structured_arrays_with_objects():
    data = np.zeros(10_000, dtype=[("n", "f8"), ("o", "O"), ("s", [("p", "O", (2,)), ("q", "i4")])])
    data["o"] = strings = words(10_000)
    data["s"]["p"] = [[bytes(50 + i % 9), bytes(80)] for i in range(10_000)]
    expected = data.nbytes + strings_in(strings) + 10_000 * (33 + 54 + 33 + 80)
    assert nbytes(data) == about(expected)
    assert nbytes(data[0]) == about(expected)


def test_masked_arrays():
    data = np.ma.array(np.zeros(10_000), mask=np.zeros(10_000, dtype=bool))
    assert nbytes(data) == about(90_000, rel=0.05)
    assert nbytes(data[5:]) == about(90_000, rel=0.05)


# pandas


def frame(n=20_000):
    return pd.DataFrame({"i": np.arange(n), "f": np.zeros(n), "b": np.zeros(n, dtype=bool)})


def test_frames_of_numbers():
    n = 20_000
    assert nbytes(frame()) == about(17 * n, rel=0.01)
    assert nbytes(frame()["f"]) == about(8 * n, rel=0.01)
    assert nbytes(pd.DataFrame(np.zeros((10, 5000)))) == about(400_000, rel=0.01)
    assert nbytes(pd.DataFrame()) < 2000
    assert nbytes(pd.RangeIndex(10**9)) < 1000
    assert nbytes(pd.Index(np.arange(n))) == about(8 * n, rel=0.01)
    assert nbytes([frame()["f"], frame()["i"]]) == about(16 * n, rel=0.01)


@pytest.mark.parametrize("make", [
    lambda: pd.Series(np.ones(10)),
    lambda: pd.Series(np.ones(10), index=[*"abcdefghij"]),
    lambda: pd.DataFrame(np.ones((20, 5))),
    lambda: pd.DataFrame({"a": np.ones(5), "b": np.ones(5)}),
    lambda: pd.Index(np.arange(10)),
])  # fmt: skip
def test_small_frames_and_columns_take_more_than_their_numbers(make):
    made = [make() for _ in range(10)]
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        made = [make() for _ in range(1000)]
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert nbytes(made) == about(grown, rel=0.4)


@pytest.mark.parametrize("dtype", [object, "string[python]", "category", None])
def test_columns_of_strings(dtype):
    strings = words(20_000)
    column = pd.Series(strings, dtype=dtype)
    expected = column.memory_usage(deep=True)
    assert nbytes(column) == about(expected)
    assert nbytes(pd.Index(column)) == about(expected)
    assert nbytes(pd.DataFrame({"a": column, "n": range(20_000)})) == about(expected + 160_000)
    assert nbytes(pd.Series(range(20_000), index=column)) == about(expected + 160_000)
    assert nbytes(column.array) == about(expected)


def test_other_columns():
    n = 20_000
    values = {
        "Int64": pd.array(range(n), dtype="Int64"),
        "category": pd.Categorical(["a", "b"] * (n // 2)),
        "tz": pd.date_range("2000", periods=n, tz="UTC"),
        "period": pd.period_range("2000", periods=n, freq="h"),
        "interval": pd.interval_range(0, n),
        "sparse": pd.arrays.SparseArray([0] * n),
    }
    whole = pd.DataFrame(values)
    assert nbytes(whole) == about(whole.memory_usage(deep=True).sum())
    for name in values:
        expected = 1000 + whole[name].memory_usage(deep=True)
        assert nbytes(whole[name]) == about(expected, rel=0.15)


def test_multi_index():
    index = pd.MultiIndex.from_product([[f"key{i}" * 9 for i in range(1000)], range(50)])
    assert nbytes(index) == about(index.memory_usage(deep=True), rel=0.15)


def test_many_columns_of_strings():
    many = pd.DataFrame({i: pd.Series(words(20), dtype=object) for i in range(400)})
    assert nbytes(many) == about(many.memory_usage(deep=True).sum())


# Other libraries


def test_pyarrow():
    pa = pytest.importorskip("pyarrow")
    data = pa.array(np.arange(100_000))
    assert nbytes(data) == about(800_000, rel=0.01)
    assert nbytes(data[:10]) == about(800_000, rel=0.01)
    table = pa.table({"a": data, "s": ["x" * 50] * 100_000})
    assert nbytes(table) == about(800_000 + 54 * 100_000, rel=0.02)
    assert nbytes([table["s"]]) == about(54 * 100_000, rel=0.02)
    assert nbytes(table.to_batches()[0]) == about(table.nbytes, rel=0.02)
    assert nbytes(pa.py_buffer(bytes(MB))) == about(MB, rel=0.01)
    assert nbytes(data.to_numpy()) == about(800_000, rel=0.01)
    column = pd.Series(["x" * 50] * 1000, dtype="string[pyarrow]")
    assert nbytes(column) == about(column.memory_usage(deep=True))


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "dia", "lil", "dok"])
def test_scipy_sparse(form):
    sparse = pytest.importorskip("scipy.sparse")
    matrix = sparse.diags_array([1.0] * 5000).asformat(form)
    known = {"csr": 80_004, "csc": 80_004, "coo": 80_000, "bsr": 80_004, "dia": 40_004}
    assert nbytes(matrix) == about(known.get(form, nbytes(matrix)), rel=0.05)
    assert nbytes(matrix) > 40_000


def test_torch():
    torch = pytest.importorskip("torch")
    data = torch.zeros(250_000)
    assert nbytes(data) == about(MB, rel=0.01)
    assert nbytes(data[:10]) == about(MB, rel=0.01)  # a view holds all
    assert nbytes(torch.zeros(1000).expand(1000, 1000)) < 5000
    assert nbytes(list(data.reshape(1000, -1))) == about(1.5 * MB, rel=0.1)
    assert nbytes([torch.tensor(n) for n in range(1000)]) == about(520_000)  # as a process grows


def test_the_gradient_of_a_tensor_of_torch():
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(500, 500)
    assert nbytes(layer) == about(MB, rel=0.02)
    result = layer(torch.ones(1, 500))
    assert nbytes(result) < 5000  # it has no gradient, and asking would warn
    result.sum().backward()
    assert nbytes(layer) == about(2 * MB, rel=0.02)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize(("form", "known"), [
    ("sparse", 60_000), ("sparse_csr", 60_008), ("sparse_csc", 60_008),
    ("sparse_bsr", 60_008), ("sparse_bsc", 60_008),
])  # fmt: skip
def test_sparse_torch(form, known):
    torch = pytest.importorskip("torch")
    blocks = [(1, 1)] if form.startswith("sparse_bs") else []
    value = getattr(torch.eye(3000), f"to_{form}")(*blocks).clone()  # whose parts are no views
    assert nbytes(value) == about(known)

