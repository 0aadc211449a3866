"""The class and the caption in a row of a table, and columns that hold neither."""

import datasets
import pytest

from vtp_diffusion.data.row_values import NUMBERS, check_kind, class_name


def test_columns_that_cannot_be_read_are_named():
    number, text = datasets.Value("int64"), datasets.Value("string")
    for feature in (datasets.Sequence(text), [text], {"label": number}):
        with pytest.raises(ValueError, match="label_column 'kind' holds .*, expected class indices or names"):
            check_kind(feature, "label_column 'kind'", "class indices or names")
    with pytest.raises(ValueError, match=r"image_column 'kind' holds Value.'int64'.*, expected images"):
        check_kind(number, "image_column 'kind'", "images", NUMBERS)
    for feature in (number, text, datasets.ClassLabel(names=["cat"]), None):
        check_kind(feature, "kind", "class indices or names")
    for feature in (datasets.Image(), {"bytes": datasets.Value("binary"), "path": text}, text):
        check_kind(feature, "kind", "images", NUMBERS)


def test_names_of_classes_have_one_form():
    assert class_name(" cafe\u0301\n") == "caf\u00e9"
