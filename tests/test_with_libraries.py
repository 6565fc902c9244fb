"""Other libraries that are handed a chest as their dict, or that serialize its values."""

import asyncio
import operator
import pickle
import subprocess
import sys
import threading
import tracemalloc
from copy import deepcopy
from pathlib import Path

import cachetools
import cloudpickle
import dask
import dask.array
import dask.threaded
import distributed
import joblib
import msgpack
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
import toolz
import xarray
import zarr

from chest import Chest, nbytes

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _no_leaks():
    """Let other libraries keep threads and files, as they do: other tests look for ours."""


# -- dask -----------------------------------------------------------------------------------------


def test_the_threaded_scheduler_keeps_its_results_in_a_chest(path):
    graph = {("x", n): (operator.add, n, 1) for n in range(20)}
    graph["sum"] = (sum, [("x", n) for n in range(20)])
    with Chest(path=path, available_memory=0) as c:
        assert dask.threaded.get(graph, ["sum", ("x", 3)], cache=c) == (210, 4)
        assert c["sum"] == 210
        c._check()


def test_a_configured_chest_holds_an_array_that_is_larger_than_its_budget(path):
    total = dask.array.arange(1_000_000, chunks=10_000, dtype="f8")
    table = dask.array.outer(total[:20_000], total[:200]).rechunk((2000, 200))
    with Chest(path=path, available_memory="2 MB") as c:
        with dask.config.set(cache=c, scheduler="threads"):
            assert table.sum().compute() == np.arange(20_000.0).sum() * np.arange(200.0).sum()
        assert c.stats().spills > 0
        c._check()


@pytest.mark.filterwarnings("default")
def test_a_worker_keeps_its_results_in_a_chest_and_its_monitor_makes_room(path):
    async def work():
        async with (
            distributed.Scheduler(port=0, dashboard_address=":0") as scheduler,
            distributed.Worker(
                scheduler.address,
                data=(Chest, {"path": path, "available_memory": 1e9}),
                memory_limit="1 GB",
            ) as worker,
            distributed.Client(scheduler.address, asynchronous=True) as client,
        ):
            futures = [client.submit(np.full, 100_000, n, pure=False) for n in range(20)]
            await distributed.wait(futures)
            assert type(worker.data) is Chest
            assert len(worker.data.fast) == 20
            worker.monitor.get_process_memory = lambda: 800_000_000 if worker.data.fast else 0
            while worker.data.fast:
                await asyncio.sleep(0.01)
            metrics = await worker.get_metrics()
            disk = metrics["spilled_bytes"]["disk"]
            assert disk == worker.data.stats().stored_bytes > 20 * 800_000
            del worker.monitor.get_process_memory
            total = await client.submit(lambda arrays: sum(a[0] for a in arrays), futures)
            assert total == sum(range(20))

    with dask.config.set({"distributed.worker.memory.monitor-interval": "10 ms"}):
        asyncio.run(work())


def test_a_cluster_reduces_an_array_that_is_larger_than_all_of_its_memory():
    run = [sys.executable, str(EXAMPLES / "dask_cluster.py")]
    said = subprocess.run(run, capture_output=True, text=True, timeout=200, check=False)
    assert said.returncode == 0, said.stderr
    first, second, third = said.stdout.splitlines()
    assert first.startswith("2,400,000,000 bytes in 2 workers of 300,000,000")
    assert int(second.partition(" ")[0].replace(",", "")) > 1_800_000_000
    assert third == "mean: 149,999,999.5"


@pytest.mark.filterwarnings("default")
def test_a_worker_that_is_started_by_hand_works_until_its_scheduler_ends():
    async def work():
        async with distributed.Scheduler(port=0, dashboard_address=":0") as scheduler:
            run = [sys.executable, str(EXAMPLES / "dask_worker.py"), scheduler.address]
            with subprocess.Popen(run) as worker:
                try:
                    async with distributed.Client(
                        scheduler.address, asynchronous=True, set_as_default=False
                    ) as client:
                        await client.wait_for_workers(1, timeout=60)
                        data = await client.run(lambda dask_worker: str(type(dask_worker.data)))
                        assert [*data.values()] == ["<class 'chest.core.Chest'>"]
                        assert await client.submit(sum, [1, 2, 3]) == 6
                        await client.shutdown()
                    assert await asyncio.to_thread(worker.wait, timeout=60) == 0
                finally:
                    worker.kill()

    asyncio.run(work())


# -- zarr and xarray ------------------------------------------------------------------------------


def test_zarr_stores_its_chunks_in_a_chest(path):
    numbers = np.random.default_rng(1).random((300, 300))
    with Chest(path=path, available_memory="50 kB") as c:
        store = zarr.storage.MemoryStore(store_dict=c)
        root = zarr.create_group(store=store)
        array = root.create_array("numbers", shape=numbers.shape, chunks=(100, 100), dtype="f8")
        array[:] = numbers
        array[50:150, 50:150] += 1
        assert c.memory_usage <= 50_000
    numbers[50:150, 50:150] += 1
    with Chest(path=path) as c:
        again = zarr.open_group(zarr.storage.MemoryStore(store_dict=c), mode="r")
        assert (again["numbers"][:] == numbers).all()
        c._check()


@pytest.mark.filterwarnings("default")
def test_xarray_writes_a_dataset_through_zarr_and_reads_it_back(path):
    data = xarray.Dataset(
        {"t": (("x", "y"), np.arange(2000.0).reshape(40, 50))}, coords={"x": np.arange(40)}
    )
    with Chest(path=path, available_memory=5000) as c:
        data.to_zarr(zarr.storage.MemoryStore(store_dict=c), consolidated=False)
    with Chest(path=path) as c:
        store = zarr.storage.MemoryStore(store_dict=c, read_only=True)
        xarray.testing.assert_identical(xarray.open_zarr(store, consolidated=False).load(), data)


# -- memoizing ------------------------------------------------------------------------------------


def test_toolz_memoizes_into_a_chest(path):
    calls = []
    with Chest(path=path, available_memory=0) as c:

        @toolz.memoize(cache=c)
        def square(number):
            calls.append(number)
            return [number**2]

        assert [square(n) for n in (3, 4, 3, 4, 3)] == [[9], [16], [9], [16], [9]]
        assert calls == [3, 4]
    with Chest(path=path) as c:
        assert len(c) == 2


def test_cachetools_memoizes_into_a_chest_that_is_its_lock_as_well(path):
    calls = []
    with Chest(path=path, available_memory=0) as c:

        @cachetools.cached(c, lock=c.lock)
        def work(*args, **options):
            calls.append((args, options))
            return [len(calls)]

        assert work() == work() == [1]
        assert work(1, b=2) == work(1, b=2) == [2]
        assert len(calls) == 2
        assert () in c
        c.flush()
        work.cache_clear()
        assert len(c) == 0
        assert work() == [3]
        threads = [threading.Thread(target=work, args=(n % 3,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(c) == 4


# -- serializers ----------------------------------------------------------------------------------


def dump_msgpack(obj, file):
    file.write(msgpack.packb(obj))


def load_msgpack(file):
    return msgpack.unpackb(file.read())


PLAIN = {"list": [1, 2.5, None, "text"], "dict": {"a": [True, {"b": "é"}]}}


@pytest.mark.parametrize(("dump", "load"), [
    pytest.param(joblib.dump, joblib.load, id="joblib"),
    pytest.param(cloudpickle.dump, cloudpickle.load, id="cloudpickle"),
    pytest.param(dump_msgpack, load_msgpack, id="msgpack"),
])  # fmt: skip
def test_a_serializer_of_choice(path, dump, load):
    with Chest(deepcopy(PLAIN), path, dump=dump, load=load) as c:
        c.available_memory = 0
        assert not c.inmem
        c["list"].append("more")
    with Chest(path=path, dump=dump, load=load) as c:
        assert dict(c) == PLAIN | {"list": [1, 2.5, None, "text", "more"]}
        c._check()


def test_cloudpickle_stores_what_pickle_refuses(path):
    with Chest(path=path, dump=cloudpickle.dump, load=cloudpickle.load, available_memory=0) as c:
        c["f"] = lambda x: x + 1
        assert not c.inmem
    with Chest(path=path, dump=cloudpickle.dump, load=cloudpickle.load) as c:
        assert c["f"](1) == 2


# -- values ---------------------------------------------------------------------------------------


def table(rows):
    words = pd.array([f"word {n}" for n in range(rows)], dtype="string[pyarrow]")
    return pd.DataFrame({"a": np.arange(rows), "b": np.arange(rows) / 3, "c": words})


def sparse(rows):
    return scipy.sparse.random(rows, 200, density=0.05, format="csr", rng=1)


VALUES = {
    "array": (lambda: np.arange(300_000.0), lambda v: v.nbytes, np.array_equal),
    "columns": (
        lambda: np.asfortranarray(np.arange(300_000.0).reshape(600, 500)),
        lambda v: v.nbytes,
        np.array_equal,
    ),
    "frame": (
        lambda: table(50_000),
        lambda v: int(v.memory_usage(index=True, deep=True).sum()),
        pd.DataFrame.equals,
    ),
    "arrow": (
        lambda: pa.table({"x": np.arange(200_000), "y": [str(n) for n in range(200_000)]}),
        lambda v: v.nbytes,
        lambda a, b: a.equals(b),
    ),
    "sparse": (
        lambda: sparse(5000),
        lambda v: v.data.nbytes + v.indices.nbytes + v.indptr.nbytes,
        lambda a, b: (a != b).nnz == 0,
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were_and_their_sizes_are_right(path, name):
    make, size, equal = VALUES[name]
    value = make()
    assert 0.9 * size(value) <= nbytes(value) <= 1.1 * size(value)
    with Chest({name: value}, path) as c:
        pass
    with Chest(path=path) as c:
        found = c[name]
        assert type(found) is type(value)
        assert equal(found, value)
        assert 0.9 * size(value) <= c.memory_usage <= 1.1 * size(value)
        if name in ("array", "columns"):
            assert found.flags.writeable
            assert found.flags.f_contiguous == value.flags.f_contiguous
            found[0] = -1
        if name == "frame":
            found.iloc[0, 0] = -1
    with Chest(path=path) as c:
        assert equal(c[name], value) is (name not in ("array", "columns", "frame"))


@pytest.mark.parametrize("name", ["array", "frame", "sparse"])
def test_large_buffers_are_neither_joined_nor_copied_on_their_way(path, name):
    value = {"array": np.arange(2_000_000.0), "frame": pd.DataFrame(np.ones((200_000, 10))),
             "sparse": sparse(100_000)}[name]  # fmt: skip
    size = len(pickle.dumps(value, 5))
    with Chest({name: value}, path) as c:
        tracemalloc.start()
        try:
            c.flush()
            writing = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    del value
    with Chest(path=path) as c:
        tracemalloc.start()
        try:
            c[name]
            reading = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert writing < 6_000_000
    assert reading < size + 6_000_000  # a step of reading, and no second copy


def test_tensors_of_torch_spill_and_come_back_writeable(path):
    torch = pytest.importorskip("torch")
    tensors = {n: torch.rand(100, 1000) for n in range(20)}
    tensors["half"] = torch.rand(1000).to(torch.bfloat16)
    tensors["turned"] = torch.rand(300, 20).T
    with Chest(tensors, path, available_memory="2 MB") as c:
        assert c.memory_usage == pytest.approx(5 * 400_500, rel=0.2)
        assert c.stats().spills > 0
    with Chest(path=path, available_memory="2 MB") as c:
        for key, tensor in tensors.items():
            assert c[key].dtype == tensor.dtype
            assert torch.equal(c[key], tensor)
            c[key].mul_(2)
        c._check()
    with Chest(path=path) as c:
        assert all(torch.equal(c[key], 2 * tensor) for key, tensor in tensors.items())


def test_a_model_of_torch_comes_back_as_good_as_it_was(path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(300, 200)
    with Chest({"model": model, "state": model.state_dict()}, path, available_memory=0) as c:
        assert not c.inmem
    with Chest(path=path) as c:
        rows = torch.rand(5, 300)
        assert torch.equal(c["model"](rows), model(rows))
        c["model"].load_state_dict(c["state"])
        assert c["model"].weight.requires_grad


def test_dask_takes_no_chest_for_what_it_was(path):
    base = pytest.importorskip("dask.base")
    with Chest({"x": 1}, path) as c:
        before = base.tokenize(c)
        c["x"] = 2
        assert base.tokenize(c) != before
