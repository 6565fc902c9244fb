"""Everything a package index needs to know about chest; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def read(name: str) -> str:
    """Read a text file that lies next to this one, or below."""
    return (HERE / name).read_text(encoding="utf-8")


def version() -> str:
    """Find ``__version__`` without importing the package, whose dependencies may be missing."""
    pattern = r"""^__version__ = ["']([^"']+)["']"""
    found = re.search(pattern, read("chest/__init__.py"), re.MULTILINE)
    if found is None:
        raise RuntimeError("no line __version__ = '...' in chest/__init__.py")
    return found[1]


TEST = [
    "cachetools",
    "cloudpickle",
    "coverage>=7.13",
    "dask[array,distributed]",
    "hypothesis",
    "joblib",
    "lz4",
    "msgpack",
    "numpy",
    "pandas",
    "pyarrow",
    "pytest>=8",
    "pytest-timeout",
    "scipy",
    "toolz",
    "tqdm",
    "xarray",
    "zarr>=3",
]
BENCH = [
    "cachetools",
    "diskcache",
    "joblib",
    "lmdb",
    "matplotlib",
    "numpy",
    "rocksdict",
    "sqlitedict",
    "zict",
]
# Upper bounds where a new release brings new complaints about old code.
DEV = [
    *TEST,
    "build",
    "check-manifest",
    "mypy>=1.18,<3",
    "nox",
    "ruff>=0.13,<0.18",
    "sphinx>=8",
    "twine>=6.1",
]

setup(
    name="chest",
    version=version(),
    description="A dictionary that spills to disk",
    long_description=read("README.rst"),
    long_description_content_type="text/x-rst",
    author="the chest developers",
    url="https://pypi.org/project/chest/",
    license_expression="BSD-3-Clause",
    license_files=["LICENSE.txt"],
    keywords=["dict", "mapping", "cache", "spill", "out-of-core", "disk", "persistence", "numpy"],
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Database",
        "Topic :: Scientific/Engineering",
        "Topic :: Software Development :: Libraries :: Python Modules",
        "Typing :: Typed",
    ],
    packages=["chest"],
    package_data={"chest": ["py.typed"]},
    zip_safe=False,
    python_requires=">=3.11",
    install_requires=[
        "filelock>=3.30",  # lock_descriptor
        "heapdict",
        "xxhash>=3",
    ],
    extras_require={
        "progress": ["tqdm"],
        "psutil": ["psutil"],
        "test": TEST,
        "bench": BENCH,
        "dev": DEV,
    },
)
