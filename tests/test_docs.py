"""Every example of the documentation is a doctest; ``.ci/run`` runs them all."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.rst", ROOT / "CONTRIBUTING.rst", *sorted((ROOT / "docs").glob("*.rst"))]
BLOCK = re.compile(r"^\.\. code[\w-]*:: *(?:python|py.*)\n\n +(.*)$", re.MULTILINE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_example_has_prompts(file):
    starts = BLOCK.findall(file.read_text(encoding="utf-8"))
    assert [start for start in starts if not start.startswith(">>> ")] == []


def test_there_are_examples():
    assert sum(len(BLOCK.findall(file.read_text(encoding="utf-8"))) for file in FILES) >= 15
