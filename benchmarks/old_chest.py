"""A virtual environment with chest 0.2.3, for a process that imports it instead of this one."""

from __future__ import annotations

import os
import subprocess
import sys


def install(folder: str) -> str:
    """Return the Python of a new virtual environment that has chest 0.2.3.

    Raises
    ------
    OSError
        If it cannot be made, as without a network.
    """
    python = os.path.join(folder, "Scripts" if os.name == "nt" else "bin", "python")
    for command in (
        [sys.executable, "-m", "venv", folder],
        [python, "-m", "pip", "install", "--quiet", "chest==0.2.3", "heapdict"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise OSError(" ".join(["cannot install chest 0.2.3:", *last]))
    return python
