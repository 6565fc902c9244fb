"""The command line: ``python -m benchmarks [--quick] [WORKLOAD ...]``."""

from __future__ import annotations

import argparse
import signal
import sys

from benchmarks import report
from benchmarks.policies import POLICIES
from benchmarks.runner import Runner, say
from benchmarks.systems import SYSTEMS
from benchmarks.workloads import WORKLOADS, chosen


def main() -> None:
    """Measure what is asked for, and report it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure chest side by side with its peers and with what the hardware allows.",
        epilog="Workloads: " + ", ".join(WORKLOADS) + ". Systems: "
        + ", ".join([*SYSTEMS, *POLICIES]) + ". Folders are made where TMPDIR says.",
    )
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD",
                        help="or the first part of several; all, if none is given")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, one round")
    parser.add_argument("--systems", default="", metavar="A,B", help="only chest and these")
    parser.add_argument("--json", metavar="FILE", help="write all that was measured")
    parser.add_argument("--pictures", metavar="FOLDER", help="write SVGs (needs matplotlib)")
    options = parser.parse_args()
    try:
        names = chosen(options.workloads)
        systems = wanted(options.systems)
    except ValueError as error:
        parser.error(str(error))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # cleans up, as Ctrl-C does
    with Runner(options.quick, systems) as runner:
        for name in names:
            runner.run(name)
            report.print_workload(runner.results, name)
            sys.stdout.flush()
    results = runner.results
    report.print_targets(results)
    report.print_notes(results)
    if options.json:
        report.write_json(options.json, results)
    if options.pictures:
        report.draw(options.pictures, results)
    say("")
    if any(", chest failed" in note for note in results.notes):
        sys.exit(1)


def wanted(text: str) -> list[str]:
    systems = [system for system in text.split(",") if system]
    for system in systems:
        if system not in SYSTEMS | POLICIES:
            raise ValueError(f"no system {system!r}")
    return systems


if __name__ == "__main__":
    main()
