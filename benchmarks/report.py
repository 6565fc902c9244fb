"""Tables for the terminal, JSON for programs, pictures for the documentation."""

from __future__ import annotations

import json
import os
import platform
import textwrap
from importlib.metadata import PackageNotFoundError, version

from benchmarks.results import CHEST, Results
from benchmarks.systems import SYSTEMS
from benchmarks.targets import TARGETS
from benchmarks.workloads import WORKLOADS

WIDTH = 100
SCALES = {
    "s": [(1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")],
    "B": [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")],
    "/s": [(1e6, "M/s"), (1e3, "k/s"), (1, "/s")],
    "": [(1, "")],
}


def shown(value: float | None, unit: str = "") -> str:
    """Write a number with three digits that count and its unit."""
    if not value:
        return "" if value is None else "0"
    scales = SCALES[unit]
    scale, suffix = next((each for each in scales if abs(value) >= each[0]), scales[-1])
    number = value / scale
    digits = 0 if abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:,.{digits}f} {suffix}".rstrip()


def print_workload(results: Results, name: str) -> None:
    """Print a line for each system, a column for each metric, and chest's cost by theirs."""
    systems = systems_of(results, name)
    if not systems:
        return
    how = f"median of {results.rounds[name]} rounds" if results.rounds[name] > 1 else "one round"
    print(f"\n{name}: {title(results, name)}\n({how}; in brackets chest's cost by theirs)")
    columns = [["", *systems]]
    columns += (
        [metric, *(cell(results, name, metric, system) for system in systems)]
        for metric in results.metrics(name)
    )
    print_columns(columns)


def systems_of(results: Results, name: str) -> list[str]:
    return results.systems(name, WORKLOADS[name].systems.split())


def title(results: Results, name: str) -> str:
    return WORKLOADS[name].about + (", in small" if results.quick else "")


def cell(results: Results, name: str, metric: str, system: str) -> str:
    text = shown(results.median(name, metric, system), results.units[name, metric])
    ratio = None if system == CHEST else results.ratio(name, metric, system)
    return text if ratio is None else f"{text} ({shown(ratio)})"


def print_columns(columns: list[list[str]], width: int = WIDTH) -> None:
    """Print columns side by side as far as they fit, and then those that are left."""
    first, *rest = ([text.ljust(max(map(len, column))) for text in column] for column in columns)
    while rest:
        block, room = [first], width - len(first[0])
        while rest and (len(block) == 1 or len(rest[0][0]) + 2 <= room):
            room -= len(rest[0][0]) + 2
            block.append(rest.pop(0))
        print()
        for row in zip(*block, strict=True):
            print("  ".join(row).rstrip())


def print_targets(results: Results) -> None:
    rows = [("what", "target", "measured", "")]
    for each in judged(results):
        if each["measured"] is not None:
            verdict = "met" if each["met"] else "NOT MET"
            rows.append((each["what"], each["target"], each["shown"], verdict))
    if len(rows) == 1:
        return
    small = " (at smaller sizes than theirs)" if results.quick else ""
    print(f"\nTargets{small}")
    print_columns([list(column) for column in zip(*rows, strict=True)], 2 * WIDTH)
    print(f"\n{sum(row[3] == 'met' for row in rows)} of {len(rows) - 1} met")


def judged(results: Results) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for target in TARGETS:
        measured = target.measure(results)
        unit = "s" if target.target.endswith("ms") else ""
        found.append({
            "what": target.what,
            "target": target.target,
            "bound": target.bound,
            "measured": measured,
            "shown": shown(measured, unit),
            "met": target.met(measured),
        })
    return found


def print_notes(results: Results) -> None:
    print()
    left_out = [f"{system} is left out: {why}" for system, why in results.left_out.items()]
    for line in left_out + results.notes:
        print(textwrap.fill(line, WIDTH, subsequent_indent="    "))


def as_json(results: Results) -> dict[str, object]:
    """Return everything that was measured, as JSON holds it."""
    workloads: dict[str, object] = {}
    for name, rounds in results.rounds.items():
        workloads[name] = {
            "about": WORKLOADS[name].about,
            "rounds": rounds,
            "metrics": {
                metric: {
                    "unit": results.units[name, metric],
                    "systems": {
                        system: {
                            "median": results.median(name, metric, system),
                            "rounds": list(results.values[name, system, metric].values()),
                            "chest / it": results.ratio(name, metric, system),
                        }
                        for system in systems_of(results, name)
                        if (name, system, metric) in results.values
                    },
                }
                for metric in results.metrics(name)
            },
        }
    return {
        "quick": results.quick,
        "machine": machine(),
        "workloads": workloads,
        "targets": judged(results),
        "left out": results.left_out,
        "notes": results.notes,
    }


def machine() -> dict[str, object]:
    libraries = sorted({CHEST, *(name for system in SYSTEMS.values() for name in system.needs)})
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "libraries": {name: found for name in libraries if (found := installed(name))},
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_json(path: str, results: Results) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(as_json(results), file, indent=1)
        file.write("\n")


def draw(folder: str, results: Results) -> None:
    """Write a picture of each workload: a panel of bars for each metric that can be compared."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    os.makedirs(folder, exist_ok=True)
    mpl.rcParams.update({"svg.hashsalt": "chest", "svg.fonttype": "none", "font.size": 8})
    for name in results.rounds:
        systems = systems_of(results, name)
        metrics = [
            metric for metric in results.metrics(name)
            if sum((name, system, metric) in results.values for system in systems) > 2
        ]
        across = min(len(metrics), 3) or 1
        down = -(-len(metrics) // across)
        size = (3.2 * across, (0.2 * len(systems) + 0.7) * down)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title(results, name) + " (logarithmic)")
        for place, metric in enumerate(metrics, 1):
            panel(figure.add_subplot(down, across, place), results, name, metric, systems)
        figure.savefig(os.path.join(folder, f"{name}.svg"), metadata={"Date": None})


def panel(axes, results, name, metric, systems):
    values = {system: results.median(name, metric, system) for system in systems}
    values = {system: value for system, value in values.items() if value is not None}
    unit = results.units[name, metric]
    colors = ["#c0392b" if system == CHEST else "#9aa5b1" for system in values]
    bars = axes.barh(list(values), list(values.values()), color=colors)
    axes.bar_label(bars, [shown(value, unit) for value in values.values()], padding=2)
    if unit and min(values.values()) > 0:
        axes.set_xscale("log")
    axes.margins(x=0.3)
    axes.invert_yaxis()
    axes.set_title(metric + (" (more is better)" if unit == "/s" else ""), fontsize=8)
    axes.set_xticks([], minor=False)
    axes.set_xticks([], minor=True)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
