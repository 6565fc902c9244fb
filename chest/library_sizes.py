"""How arrays, tables and other views of memory are taken apart, to be sized.

An opener returns a value's own bytes, and the collections its parts are in. The classes of numpy,
pandas, pyarrow, torch and ctypes are found by package and name: nothing needs to be imported, or
installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from sys import getsizeof
from typing import Any

Group = tuple[Any, Any]  # a collection, after the type whose methods reach its parts
Opened = tuple[int, list[Group]]  # a value's own bytes, and where its parts are
Opener = Callable[[Any], Opened]


def _read(field: Any, value: Any) -> Any:
    try:
        return field.__get__(value)
    except (AttributeError, ValueError):  # a slot never set, a memoryview released
        return None


class Fields:
    """What descriptors read from a value; a list would add references, which are counted."""

    def __init__(self, fields: tuple[Any, ...], value: Any) -> None:
        self.fields = fields
        self.value = value

    def __len__(self) -> int:
        return len(self.fields)

    def __iter__(self) -> Iterator[Any]:
        return (_read(field, self.value) for field in self.fields)


_OF_VIEW = vars(memoryview)["obj"]


def viewed(view: memoryview) -> Any:
    """Return whose memory a memoryview shows; None if it was released."""
    return _read(_OF_VIEW, view)


def _open_memoryview(value: Any) -> Opened:
    return getsizeof(value), [(Fields, Fields((_OF_VIEW,), value))]


def _open_array(value: Any) -> Opened:
    if type(value.base).__name__ == "PyCapsule":  # memory of some library written in C
        return getsizeof(value) + value.nbytes, []
    if value.base is not None:
        return getsizeof(value), [(Fields, Fields((type(value).base,), value))]
    return getsizeof(value), [(type(c), c) for c in _cells(sys.modules["numpy"].asarray(value))]


def _cells(array: Any) -> list[Any]:
    """Find the Python objects in an array, also in the fields of a structured one."""
    if not array.dtype.hasobject:
        return []
    if array.dtype.names is None:
        return [array.flat]
    return [cells for name in array.dtype.names for cells in _cells(array[name])]


# Bytes that these take beside what they hold, as a process grows.
_FRAME, _SERIES, _INDEX, _RANGE = 1200, 1000, 500, 100


class _Columns(Sequence[Any]):
    """Those columns of a DataFrame that are more than plain numbers, each made when drawn."""

    def __init__(self, frame: Any, places: list[int]) -> None:
        self.frame = frame
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        return self.frame.iloc[:, self.places[i]].array


def _open_frame(frame: Any) -> Opened:
    dtypes = list(frame.dtypes)
    plain = sys.modules["numpy"].dtype
    numbers = [isinstance(dtype, plain) and dtype.kind != "O" for dtype in dtypes]
    width = sum(dtype.itemsize for dtype in compress(dtypes, numbers))
    columns = _Columns(frame, [i for i, number in enumerate(numbers) if not number])
    return _FRAME + width * len(frame), [(list, [frame.index, frame.columns]), (_Columns, columns)]


def _open_index(index: Any) -> Opened:
    if hasattr(index, "levels"):
        codes = sum(codes.nbytes for codes in index.codes)
        return _INDEX + codes, [(list, list(index.levels))]
    if hasattr(index, "categories"):
        nbytes, parts = _open_column(index.array)
        return _INDEX + nbytes, parts
    own = _RANGE if hasattr(index, "step") else _INDEX
    parts = _open_column(index.array)[1] if index.dtype.kind == "O" else []
    return own + index.memory_usage(), parts


def _open_column(array: Any) -> Opened:
    if hasattr(array, "categories"):
        return array.codes.nbytes, [(list, [array.categories])]
    if array.dtype.name == "object" or getattr(array.dtype, "storage", None) == "python":
        cells = sys.modules["numpy"].asarray(array).flat
        return array.nbytes, [(type(cells), cells)]
    return array.nbytes, []


_TENSOR = 500  # bytes that a tensor takes beside its numbers, as a process grows
_PARTS = {  # methods that have the numbers of a sparse tensor, which has no storage
    "torch.sparse_coo": ("_indices", "_values"),
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}


def _open_tensor(tensor: Any) -> Opened:
    names = _PARTS.get(str(tensor.layout), ("untyped_storage",))
    parts = [getattr(tensor, name)() for name in names]
    if tensor.is_leaf and tensor.grad is not None:  # others have none, and warn of the question
        parts.append(tensor.grad)
    return _TENSOR, [(list, parts)]


NAMED: dict[tuple[str, str], Opener] = {
    **{
        ("pyarrow", name): lambda value: (value.get_total_buffer_size(), [])
        for name in ("Array", "ChunkedArray", "RecordBatch", "Table")
    },
    ("numpy", "ndarray"): _open_array,
    ("numpy", "void"): _open_array,
    ("pandas", "DataFrame"): _open_frame,
    ("pandas", "Series"): lambda value: (_SERIES, [(list, [value.index, value.array])]),
    ("pandas", "Index"): _open_index,
    ("pandas", "ExtensionArray"): _open_column,
    ("pyarrow", "Buffer"): lambda value: (value.size, []),
    ("torch", "Tensor"): _open_tensor,
    ("torch", "UntypedStorage"): lambda value: (value.nbytes(), []),
    ("builtins", "memoryview"): _open_memoryview,
    ("_ctypes", "_CData"): lambda value: (getsizeof(value) + memoryview(value).nbytes, []),
}
# Their attributes are what has been counted already, and their __sizeof__ looks at every string.
SEALED = {"pandas", "pyarrow", "torch"}
