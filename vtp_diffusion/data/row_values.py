"""The class and the caption in a row of a table, checked."""

from typing import Any

MAX_CLASSES = 2**20  # a larger label is a mistake, such as an identifier; names for so many classes would fill memory


def is_class_index(label: Any) -> bool:
    """Whether `label` is a class index, and not implausibly large."""
    return type(label) is int and 0 <= label < MAX_CLASSES


def check_label(label: Any, name: str, expected: str = "class indices or names") -> int:
    """`label` as a class index. Raises: ValueError if it `is_class_index` not."""
    if not is_class_index(label):
        raise ValueError(f"{name} is {str(label)[:80]}, expected {expected}, below {MAX_CLASSES:,}")
    return label


def check_caption(value: Any, name: str) -> str:
    """A caption without surrounding space, "" if there is none. Raises: ValueError for anything but text."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is {str(value)[:80]!r} of type {type(value).__name__}, expected a text")
    return (value or "").strip()
