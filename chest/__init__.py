"""A dictionary that spills to disk: ``from chest import Chest``."""

from chest.core import Chest
from chest.errors import (
    ChestClosedError,
    ChestError,
    CorruptIndexError,
    CorruptValueError,
    KeyTypeError,
    ReadOnlyError,
    SerializerError,
    UnsavedError,
)
from chest.repairs import repair
from chest.report import Problem, Report
from chest.sizes import nbytes

__version__ = "1.0.0"

__all__ = [
    "Chest",
    "ChestClosedError",
    "ChestError",
    "CorruptIndexError",
    "CorruptValueError",
    "KeyTypeError",
    "Problem",
    "ReadOnlyError",
    "Report",
    "SerializerError",
    "UnsavedError",
    "nbytes",
    "repair",
]
