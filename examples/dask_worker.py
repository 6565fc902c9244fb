"""Run a worker of dask, on any host, that keeps its results in a chest, which spills them to disk.

Start ``dask scheduler`` on one host, this on each that shall work, with the address that the
scheduler tells, and give the same address to ``dask.distributed.Client``::

    python dask_worker.py tcp://HOST:8786

Needs ``pip install 'dask[distributed]'``.
"""

import asyncio
import sys

from dask.distributed import Nanny

from chest import Chest


async def main(scheduler: str) -> None:
    """Work until the scheduler ends."""
    data = (Chest, {"available_memory": "30%"})
    async with Nanny(scheduler, data=data) as worker:
        await worker.finished()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
