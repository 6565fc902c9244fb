"""The benchmarks run and count right; what they measure is another matter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # not installed

import benchmarks
from benchmarks import report
from benchmarks.policies import LRU, POLICIES, S3Fifo, Sieve
from benchmarks.results import Results
from benchmarks.runner import Runner
from benchmarks.systems import SYSTEMS, used
from benchmarks.targets import TARGETS
from benchmarks.workloads import WORKLOADS, chosen

ROOT = os.path.dirname(os.path.dirname(benchmarks.__file__))


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_line_measures_reports_and_writes_json(tmp_path):
    path = tmp_path / "hits.json"
    done = run("--quick", "--systems", "dict", "--json", str(path), "hits")
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(path.read_text("utf-8"))
    hits = report["workloads"]["hits"]
    hit = hits["metrics"]["hit"]
    assert report["quick"] is True
    assert hits["rounds"] == 1
    assert hit["unit"] == "s"
    assert hit["systems"].keys() == {"chest", "dict"}
    medians = {name: system["median"] for name, system in hit["systems"].items()}
    assert all(1e-9 < median < 1e-3 for median in medians.values())
    ratio = hit["systems"]["dict"]["chest / it"]
    assert ratio == pytest.approx(medians["chest"] / medians["dict"])
    [target] = [each for each in report["targets"] if each["target"] == "time <= 5 x dict"]
    assert target["measured"] == ratio
    assert target["met"] is (ratio <= 5)
    assert hits["metrics"]["generation check"]["systems"].keys() == {"chest"}
    for word in ("hits: ", "chest ", "dict ", "generation check", "Targets", "time <= 5 x dict"):
        assert word in done.stdout


@pytest.mark.parametrize("wrong", [["no-workload"], ["hits", "--systems", "dict,no-system"]])
def test_what_is_not_there_is_a_usage_error(wrong):
    done = run("--quick", *wrong)
    assert done.returncode == 2
    assert "'no-" in done.stderr
    assert done.stdout == ""


def test_the_first_part_of_a_name_means_all_that_start_so():
    assert chosen(["arrays", "hits"]) == ["arrays-8mb", "arrays-1mb", "arrays-64kb", "hits"]
    assert chosen([]) == list(WORKLOADS)


def test_what_is_not_installed_is_left_out_with_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(SYSTEMS["cachetools"], "needs", ("no_such_module",))
    with Runner(quick=True, systems=["dict", "cachetools"]) as runner:
        assert [name for name in WORKLOADS["hits"].systems.split() if runner.has(name)] == [
            "chest", "dict",
        ]
    report.print_notes(runner.results)
    assert "cachetools is left out: no_such_module is not installed" in capsys.readouterr().out


def test_a_system_that_fails_is_told_of_and_keeps_what_it_reported():
    with Runner(quick=True, systems=["dict"]) as runner:
        assert runner.has("dict")
        runner.measure("flush", "dict", 0)  # flushing does nothing there
        runner.measure("counter", "dict", 0)  # it cannot be closed and opened again
        runner.results.rounds = {"flush": 1, "counter": 1}
        assert os.listdir(runner.work) == []
    assert runner.results.median("flush", "list of 1,000", "dict") > 0
    [note] = runner.results.notes
    assert note.startswith("counter, dict failed: ")


def test_ratios_are_medians_of_those_within_one_round():
    results = Results(quick=False)
    for number, (mine, theirs) in enumerate([(1, 2), (30, 10), (8, 2)]):
        results.add("hits", "chest", number, "hit", mine, "s")
        results.add("hits", "dict", number, "hit", theirs, "s")
        results.add("counter", "chest", number, "increments", mine, "/s")
        results.add("counter", "lmdb", number, "increments", theirs, "/s")
    results.add("hits", "chest", 3, "hit", 100, "s")  # the other one failed
    assert results.ratio("hits", "hit", "dict") == 3
    assert results.ratio("counter", "increments", "lmdb") == pytest.approx(1 / 3)
    assert results.ratio("hits", "hit", "zict.LRU") is None
    assert results.median("hits", "hit") == 19


def test_targets_name_what_there_is():
    class Asked(Results):
        def ratio(self, workload, metric, peer):
            assert peer in WORKLOADS[workload].systems.split()
            return self.median(workload, metric)

        def median(self, workload, metric, system="chest"):
            assert metric in metrics_of(WORKLOADS[workload])
            return 0.5

    everything = Asked(quick=False)
    everything.units["hits", "hit"] = "s"
    for target in TARGETS:
        assert target.met(target.measure(everything)) in (True, False), target
        assert target.met(target.measure(Results(quick=False))) is None


def metrics_of(workload):
    """Return what stands in the source of a workload, and what it makes of its sizes."""
    source = Path(ROOT, "benchmarks", workload.run.partition(":")[0] + ".py").read_text("utf-8")
    if workload is WORKLOADS["flush"]:
        return {f"{kind} of {n:,}" for kind in ("tuple", "list") for n in workload.full["keys"]}
    return set(re.findall(r'"([^"\n]+)"', source))


def test_systems_of_all_workloads_are_known():
    for workload in WORKLOADS.values():
        assert set(workload.systems.split()) <= SYSTEMS.keys() | POLICIES.keys()


@pytest.mark.parametrize(("value", "unit", "text"), [
    (None, "s", ""),
    (0.0, "s", "0"),
    (1.234e-7, "s", "123 ns"),
    (0.00999, "s", "9.99 ms"),
    (12_340, "B", "12.3 kB"),
    (1e6, "/s", "1.00 M/s"),
    (1234.5, "", "1,234"),
])
def test_numbers_are_shown_with_three_digits(value, unit, text):
    assert report.shown(value, unit) == text


def test_used_counts_what_lies_in_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(100_000))
    assert 100_000 <= used(tmp_path) < 120_000


def left(policy, keys, size=1):
    return [gone for key in keys for gone in policy.use(key, size)]


def test_lru_lets_go_of_the_least_recently_used():
    policy = LRU(3)
    assert left(policy, "abcad") == ["b"]
    assert left(policy, "e") == ["c"]
    assert policy.total == len(policy.sizes) == 3
    assert policy.use("f", 2) == ["a", "d"]


def test_sieve_passes_over_what_was_used_and_goes_on_from_there():
    policy = Sieve(3)
    assert left(policy, "abcad") == ["b"]
    assert left(policy, "e") == ["c"]  # not a, which the hand has passed
    assert left(policy, "fg") == ["d", "e"]
    assert left(policy, "hi") == ["f", "g"]
    assert "a" in policy.sizes


def test_s3_fifo_keeps_what_is_used_through_a_scan():
    policy = S3Fifo(20)
    assert left(policy, "aaabbb") == []
    assert left(policy, range(100)) == list(range(82))
    assert {"a", "b"} <= policy.sizes.keys()
    left(policy, [80])  # a ghost: straight to the main queue
    assert 80 in policy.main
    assert policy.total == sum(policy.sizes.values()) <= 20


def test_a_simulation_counts_reads_and_bytes():
    traces = pytest.importorskip("benchmarks.traces", exc_type=ImportError)  # needs numpy
    get, put = False, True
    steps = [(0, get), (2, get), (1, get), (2, put), (0, get), (1, get)]
    reads, moved, _ = traces.simulate(LRU, None, [10, 20, 30], 50, steps)
    assert reads == [0, 1, 0, 1]
    written = 20 + 30  # first 1, unsaved from the start, and in the end 2
    assert moved == 10 + 20 + 10 + 20 + written
