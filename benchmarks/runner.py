"""Run each workload with each system in a process of its own, the systems in turns."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from typing import Self

from benchmarks.old_chest import install
from benchmarks.results import CHEST, Results
from benchmarks.systems import missing
from benchmarks.workloads import WORKLOADS

OLD = "chest-0.2.3"
ROUNDS = 5
ENOUGH = 200  # seconds for one workload: a round that may end later is not begun
PATIENCE = 180  # seconds for one process

# Never the folder where this was started: chest may be another one there.
OWN = "import sys; sys.path[:] = {path!r}; from benchmarks.runner import child; child()"
OTHER = "import sys; sys.path += {path!r}; from benchmarks.runner import child; child()"


class Runner:
    """Measures, and collects the results; a context manager, for its temporary folder."""

    def __init__(self, quick: bool, systems: list[str]) -> None:
        self.quick = quick
        self.wanted = systems  # all, if empty
        self.results = Results(quick)
        self.pythons: dict[str, str] = {}
        self.path = [os.path.abspath(entry) for entry in sys.path]

    def __enter__(self) -> Self:
        self.work = tempfile.mkdtemp(prefix="chest-benchmarks-")
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def run(self, name: str) -> None:
        """Measure one workload, in rounds."""
        workload = WORKLOADS[name]
        lacking = [module for module in workload.needs if find_spec(module) is None]
        if lacking:
            self.results.note(f"{name} is left out: {lacking[0]} is not installed")
            return
        systems = [system for system in workload.systems.split() if self.has(system)]
        begun = time.perf_counter()
        for number in range(1 if self.quick else ROUNDS):
            spent = time.perf_counter() - begun
            if number and spent / number * (number + 1) > ENOUGH:
                break
            # In another order each time: who comes after whom matters to memory and disk.
            for system in random.Random(number).sample(systems, len(systems)):
                say(f"{name}, round {number + 1}: {system}")
                self.measure(name, system, number)
            self.results.rounds[name] = number + 1
        say("")

    def has(self, system: str) -> bool:
        """Whether a system takes part; say why not, once."""
        if self.wanted and system not in (*self.wanted, CHEST):
            return False
        if system not in self.pythons and system not in self.results.left_out:
            module = missing(system)
            if module:
                self.results.left_out[system] = f"{module} is not installed"
            elif system == OLD:
                self.install_old()
            else:
                self.pythons[system] = sys.executable
        return system in self.pythons

    def install_old(self) -> None:
        say("installing chest 0.2.3")
        try:
            self.pythons[OLD] = install(os.path.join(self.work, "venv"))
        except (OSError, subprocess.TimeoutExpired) as error:
            self.results.left_out[OLD] = str(error)

    def measure(self, name: str, system: str, number: int) -> None:
        """Run one process, take down what it reports, and remove what it left."""
        folder = tempfile.mkdtemp(dir=self.work)
        boot = (OTHER if system == OLD else OWN).format(path=self.path)
        # -E: a PYTHONPATH to this chest must not lead the other Python here, too.
        flags = ["-E", "-P"] if system == OLD else ["-P"]
        command = [self.pythons[system], *flags, "-c", boot, name, system, folder, str(self.quick)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=PATIENCE, cwd=folder
            )
            lines, error = done.stdout, done.returncode and (done.stderr or "it crashed")
        except subprocess.TimeoutExpired as late:
            lines, error = (late.stdout or b"").decode(), f"no end after {PATIENCE} seconds"
        for line in lines.splitlines():
            metric, value, unit = json.loads(line)
            if metric == "note":
                self.results.note(f"{name}, {system}: {value}")
            else:
                self.results.add(name, system, number, metric, value, unit)
        if error:
            self.results.note(f"{name}, {system} failed: {error.strip().splitlines()[-1]}")
        shutil.rmtree(folder, ignore_errors=True)


def say(text: str) -> None:
    """Show on the terminal what goes on now."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def child() -> None:
    """Measure one system once; write a JSON line for each result."""
    name, system, folder, quick = sys.argv[1:]
    report, sys.stdout = sys.stdout, sys.stderr
    failed = 0
    try:
        measure = WORKLOADS[name].bind(system, os.path.join(folder, "values"), quick == "True")
        for line in measure():
            print(json.dumps(line), file=report, flush=True)
    except Exception:  # noqa: BLE001 -- whatever goes wrong in a library is reported
        traceback.print_exc()
        failed = 1
    sys.stderr.flush()
    os._exit(failed)  # without saving at exit what nobody needs any more
