"""Every example of the documentation runs; those of the README are doctests."""

import gc
import re
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import pytest

from chest import Chest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^\.\. code:: python\n\n((?:(?:    .*)?\n)+)", re.MULTILINE)


@pytest.fixture(autouse=True)
def _no_leaks():
    """Let other libraries keep threads and files, as they do: other tests look for ours."""


def examples():
    """Yield what stands in the documentation, with its place."""
    for file in sorted(DOCS.glob("*.rst")):
        text = file.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text + "\n"):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(dedent(match[1]), id=f"{file.stem}-{line}")


@pytest.mark.filterwarnings("ignore:a chest was not closed:ResourceWarning")
@pytest.mark.parametrize("example", [*examples()])
def test_an_example_runs(example, tmp_path, monkeypatch):
    for library in re.findall(r"^ *(?:import|from) (\w+)", example, re.MULTILINE):
        pytest.importorskip(library)
    if "import zarr" in example and pytest.importorskip("zarr").__version__ < "3":
        pytest.skip("this is for zarr 3")
    monkeypatch.chdir(tmp_path)
    example = example.replace("_000", "00").replace("/data/", "")  # smaller, and here
    shown = []
    with Chest({"count": 1}, path="given") as c:
        names = {
            "Chest": Chest, "c": c, "pairs": [("x", 1)], "job": "job",
            "compute": lambda job: [job], "window": SimpleNamespace(show=shown.append),
        }  # fmt: skip
        exec(compile(example, "example", "exec"), names)
        if not names["c"].closed:
            names["c"]["key"] = [1]
            names["c"].close()
        names.clear()
        gc.collect()  # here, where the warning of a chest that is not closed is let through
    if "window" in example:
        assert shown[-1] == 1


def test_there_are_examples():
    assert len([*examples()]) >= 10
