"""What packagers are told, in more than one place, is the same in all."""

import re
from pathlib import Path

import pytest

import chest

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "conda.recipe" / "meta.yaml"
NAMES = {"python-xxhash": "xxhash"}  # as conda calls what PyPI calls otherwise

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the tests are not in a source tree"
)


def required():
    """The requirements of setup.py, by name."""
    text = (ROOT / "setup.py").read_text("utf-8")
    found = re.search(r"install_requires=\[(.*?)\]", text, re.DOTALL)[1]
    pairs = re.findall(r'"([a-z0-9]+)(>=[\d.]+)?"', found)
    python = re.search(r'python_requires="(.*?)"', text)[1]
    return {**dict(pairs), "python": python}


def test_the_recipe_for_conda_wants_what_setup_py_wants():
    run = RECIPE.read_text("utf-8").partition("  run:\n")[2].partition("\n\n")[0]
    pairs = re.findall(r"    - (\S+)(?: (\S+))?", run)
    assert len(pairs) == 4
    assert {NAMES.get(name, name): bound for name, bound in pairs} == required()


def test_the_version_is_the_same_everywhere():
    assert f'version: "{chest.__version__}"' in RECIPE.read_text("utf-8")
    changes = (ROOT / "CHANGELOG.rst").read_text("utf-8")
    assert re.search(r"^(\S+) - \d{4}-\d\d-\d\d$", changes, re.MULTILINE)[1] == chest.__version__
