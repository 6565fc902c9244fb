"""zarr 2 takes a chest itself as its store; zarr 3 is in test_with_libraries."""

import numpy as np
import pytest

from chest import Chest

zarr = pytest.importorskip("zarr")
pytestmark = pytest.mark.skipif(zarr.__version__ >= "3", reason="zarr 3 takes no mapping")


@pytest.fixture(autouse=True)
def _no_leaks():
    """Let zarr keep what it keeps: other tests look for ours."""


def test_a_group_with_an_array_that_is_larger_than_memory(path):
    field = np.random.default_rng(1).random((500, 500))
    with Chest(path=path, available_memory="500 kB") as c:
        root = zarr.group(store=c)
        root.attrs["unit"] = "K"
        root.create_dataset("a/t", data=field, chunks=(100, 100))
        root.create_dataset("gone", data=field)
        del root["gone"]
        zarr.consolidate_metadata(c)
        assert c.stats().spills > 0
        assert c.stats().resident_bytes <= 500_000
        c._check()
    with Chest(path=path, available_memory="500 kB") as c:
        root = zarr.open_consolidated(c, mode="r")
        assert dict(root.attrs) == {"unit": "K"}
        assert [*root["a"]] == ["t"]
        assert (root["a/t"][...] == field).all()
        assert not [key for key in c if key.startswith("gone")]
        root = zarr.open_group(store=c)
        root["a/t"][50:150] += 1
        root["a/t"].attrs["mean"] = 0.5
        root.move("a", "b")
    field[50:150] += 1
    with Chest(path=path, available_memory="500 kB") as c:
        root = zarr.open_group(store=c, mode="r")
        assert (root["b/t"][...] == field).all()
        assert dict(root["b/t"].attrs) == {"mean": 0.5}
        assert not [key for key in c if key.startswith("a")]
        c._check()
