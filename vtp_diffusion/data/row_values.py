"""The class and the caption in a row of a table, checked."""

import unicodedata
from collections.abc import Sequence
from typing import Any

MAX_CLASSES = 2**20  # a larger label is a mistake, such as an identifier; names for so many classes would fill memory

NESTED = ("list", "struct", "dict", "{", "[", "List", "LargeList", "Sequence")
NUMBERS = ("int", "uint", "float", "double", "bool")


def is_class_index(label: Any) -> bool:
    """Whether `label` is a class index, and not implausibly large."""
    return type(label) is int and 0 <= label < MAX_CLASSES


def class_name(label: str) -> str:
    """A class name as text files and other systems may write it, in one form: NFC, without surrounding space."""
    return unicodedata.normalize("NFC", label).strip()


def check_label(label: Any, name: str, expected: str = "class indices or names") -> int:
    """`label` as a class index. Raises: ValueError if it `is_class_index` not."""
    if not is_class_index(label):
        raise ValueError(f"{name} is {str(label)[:80]}, expected {expected}, below {MAX_CLASSES:,}")
    return label


def check_kind(feature: Any, name: str, expected: str, refused: Sequence[str] = NESTED) -> None:
    """Raises: ValueError for a column of `datasets` that holds what cannot be read. Args: `refused`: beginnings of its
    types in words."""
    kind = str(getattr(feature, "dtype", feature))
    if feature is not None and kind.startswith(tuple(refused)):
        raise ValueError(f"{name} holds {str(feature)[:80]}, expected {expected}")


def check_caption(value: Any, name: str) -> str:
    """A caption without surrounding space, "" if there is none. Raises: ValueError for anything but text."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is {str(value)[:80]!r} of type {type(value).__name__}, expected a text")
    return (value or "").strip()
