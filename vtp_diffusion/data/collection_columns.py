"""The classes of a collection of `datasets`, and its images by row."""

import reprlib
from typing import Any

from PIL import Image

from ..runtime.optional_packages import require
from ..runtime.processes import print_once
from .folders import sorted_names
from .image_files import decode_image
from .row_values import NUMBERS, check_kind, check_label, class_name, is_class_index


def collection_labels(table, found: list[str] | list[int], config: Any) -> tuple[list[int], list[str], bool]:
    """(labels, class names, whether the names are more than indices) of a table. `found`: as `collection_classes`."""
    column = config.label_column
    if column is None:
        return [0] * len(table), ["image"], True
    labels = list(table[column])
    if isinstance(found[0], str):
        indices = {name: index for index, name in enumerate(found)}
        return [indices[class_name(label)] for label in labels], found, True
    names = getattr(table.features[column], "names", None)
    if names is None and (missing := sorted(set(range(max(found) + 1)).difference(found))):
        print_once(
            f"warning: {column} of {config.source} has the labels {reprlib.repr(sorted(set(found)))}, so the classes "
            f"{reprlib.repr(missing)} have no images. Number them from 0 without gaps, or store their names as text"
        )
    return labels, names or [str(index) for index in range(max(found) + 1)], names is not None


def collection_classes(table, collection, opened: list[str], config: Any) -> list[str] | list[int]:
    """The names, or the indices, in the label column of all splits. Names are in alphabetical order, those of the
    training split first: it is often opened alone. Only the `opened` splits, which make up the table, have to be
    labelled: the labels of a test split are often all -1 or null.

    Raises: ValueError naming the row of a label that is missing or no class.
    """
    column, splits = config.label_column, dict[str, list]()
    for name in sorted(collection, key=lambda name: name != "train") if column else ():
        part = collection[name]
        check_kind(part.features.get(column), f"{config.source}: label_column {column!r}", "class indices or names")
        values = part.unique(column) if column in part.column_names else [None]
        splits[name] = values if name in opened else [value for value in values if value not in (None, -1)]
    named = any(isinstance(value, str) for values in splits.values() for value in values)

    def is_class(label: Any) -> bool:
        return isinstance(label, str) if named else is_class_index(label)

    if wrong := [(f", {name}", value) for name, values in splits.items() for value in values if not is_class(value)]:
        rows = ((f", row {row}", label) for row, label in enumerate(table[column]) if not is_class(label))
        where, label = next(rows, wrong[0])  # not in the table: in a split that is not opened
        check_label(label, f"{config.source}{where}: {column}")
    found = list[Any]()
    for values in splits.values():
        normal = {class_name(value) for value in values} if named else values
        found += sorted_names(normal.difference(found)) if named else values
    return found


def images_outside(table, column: str) -> set[str]:
    """Paths of the images that a table only names. Their bytes are not in it."""
    from pyarrow import compute, types

    images = table.data.column(column)
    if types.is_struct(images.type):  # files that others wrote may lack a field
        fields = {field.name for field in images.type}
        if "path" not in fields:
            return set()
        if "bytes" in fields:
            images = images.filter(compute.is_null(compute.struct_field(images, "bytes")))
        images = compute.struct_field(images, "path")
    elif not types.is_string(images.type):  # bytes alone
        return set()
    return {path.rpartition("::")[2] for path in images.drop_null().to_pylist()}


class CollectionReader:
    """Row -> image of a table of `datasets`. A class, not a closure: worker processes unpickle it."""

    def __init__(self, table, config: Any):
        column, datasets = config.image_column, require("datasets", "train")
        check_kind(table.features[column], f"{config.source}: image_column {column!r}", "images", NUMBERS)
        self.table, self.config = table.cast_column(column, datasets.Image(decode=False)), config

    def __call__(self, row: int) -> Image.Image:
        value, name = self.table[row][self.config.image_column], f"image {row} of {self.config.source}"
        return decode_image(value, name, self.config.exif_orientation, self.config.max_pixels)
