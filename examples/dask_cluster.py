"""Reduce an array that is four times larger than the memory of all workers of a dask cluster.

Each worker keeps its results in a chest of its own, which spills them to disk. Needs
``pip install 'dask[array,distributed]'``. For workers on several hosts, see ``dask_worker.py``.
"""

import logging

import dask.array as da
from dask.distributed import Client, LocalCluster, wait

from chest import Chest

WORKERS = 2
LIMIT = 300_000_000  # bytes of memory that a worker may take, its Python and libraries included
CHUNK = 625_000  # numbers; 5 MB


def main() -> None:
    """Compute a mean twice: as the array is made, and again from what the workers hold."""
    rows = 4 * WORKERS * LIMIT // (8 * CHUNK)
    with (
        LocalCluster(
            n_workers=WORKERS,
            threads_per_worker=1,
            memory_limit=LIMIT,
            data=(Chest, {"available_memory": "30 MB"}),
            dashboard_address=":0",
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster) as client,
    ):
        numbers = da.arange(rows * CHUNK, chunks=CHUNK, dtype="f8").persist()
        wait(numbers)
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        spilled = sum(worker["metrics"]["spilled_bytes"]["disk"] for worker in workers)
        print(f"{numbers.nbytes:,} bytes in {WORKERS} workers of {LIMIT:,} bytes each")
        print(f"{spilled:,} bytes of it are on disk")
        mean = float(numbers.mean().compute())
        if mean != (numbers.size - 1) / 2:
            raise SystemExit(f"the mean is {mean}")
        print(f"mean: {mean:,}")


if __name__ == "__main__":
    main()
