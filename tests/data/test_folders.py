"""The one rule for folders of images: splits, classes, what is left out, and what is refused by name."""

import os
import unicodedata

import pytest
from PIL import Image

from vtp_diffusion.data import image_datasets
from vtp_diffusion.data.folders import read_layout
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset


def make(folder, names):
    """Images of one pixel, other files, and folders (names that end in /)."""
    for k, name in enumerate(names):
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if name.endswith((".txt", ".jsonl", ".json", ".db")):
            path.write_text("{}")
        elif not name.endswith("/"):
            Image.new("RGB", (1, 1), (k, 0, 0)).save(path)
    return folder


@pytest.mark.parametrize(
    ("names", "classes", "line"),
    [
        (["bus/0.png", "car/0.png", "train/0.png", "truck/0.png"], ["bus", "car", "train", "truck"],
         "4 classes, 4 images, no held-out split"),
        (["train/a/0.png", "val/a/0.png"], ["a"], "1 class, 1 train images, 1 validation images"),
        (["train/b/0.png", "train/b/1.png", "test/a/0.png"], ["a", "b"], "2 classes, 2 train images, 1 test images"),
        (["a/0.png", ".ipynb_checkpoints/0.png", "a/.1.png", ".DS_Store.txt"], ["a"],
         "1 class, 1 images, no held-out split"),
        (["a/0.avif", "b/0.ppm", "c/0.jp2", "d/0.TGA"], ["a", "b", "c", "d"], "4 classes, 4 images"),
        ([f"{k}/0.png" for k in range(11)], [str(k) for k in range(11)], "11 classes"),
        (["0.png", "old/notes.txt", "read me.txt"], ["image"],
         "1 class, 1 images, no held-out split, 2 other entries left out (read me.txt, old)"),
        (["a/0.png", "a/Thumbs.db", "a/more/1.png"], ["a"], "2 other entries left out (a/more, a/Thumbs.db)"),
    ],
)  # fmt: skip
def test_layouts(names, classes, line, tmp_path):
    layout = read_layout(make(tmp_path, names))
    assert layout.classes == classes and line in layout.describe()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/0.png", "b/sub/1.png"], r"class 'b' of .* holds no images, but folders \(sub\)"),
        (["a/0.png", "b/"], "class 'b' of .* holds no images, but nothing"),
        (["a/0.png", "b/1.h5.txt"], r"class 'b' of .* holds no images, but other files \(1.h5.txt\)"),
        (["train/a/0.png", "other/a/0.png"], "class 'other' of .* splits are called train, validation .or val. and"),
        (["train/a/0.png", "validation/"], "the validation split of .* holds no images"),
        (["validation/a/0.png", "val/a/0.png", "train/a/0.png"], "validation and val, two names of the validation"),
        (["a/0.png", "1.png"], "holds classes .a. and, beside them, images: .*1.png"),
        (["train/a/0.png", "validation/1.png"], "holds classes .a. and, beside them, images: .*1.png"),
        (["a/0.png", "metadata.jsonl"], "metadata.jsonl would be ignored.* --data.source imagefolder"),
        (["00000/0.png", "dataset.json"], "dataset.json would be ignored"),
        (["notes.txt"], "holds no images of a format that Pillow reads"),
    ],
)
def test_folders_that_are_refused(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_layout(make(tmp_path, names))


def test_classes_have_one_number_in_all_splits_and_under_any_limit(tmp_path, capsys):
    make(tmp_path, ["train/a/0.png", "train/b/0.png", "train/c/0.png", "val/b/0.png", "val/c/0.png"])
    for split, limit in (("train", None), ("train", 1), ("validation", None), ("validation", 1), ("all", 2)):
        dataset = open_dataset(DataConfig(source=str(tmp_path), resolution=1, limit=limit), split)
        assert dataset.label_names == ["a", "b", "c"]
        assert [dataset.label_names[label] for label in dataset.labels] == [key.split("/")[1] for key in dataset.keys]
    assert "3 classes, 3 train images, 2 validation images" in capsys.readouterr().out


def test_names_are_equal_however_their_accents_are_stored(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    layout = read_layout(make(tmp_path / "two", [f"train/{composed}/0.png", f"val/{decomposed}/1.png"]))
    assert layout.classes == [composed] and layout.of_split("validation")[0][1] == 0
    with pytest.raises(ValueError, match="differ only in the Unicode encoding"):
        read_layout(make(tmp_path / "one", [f"{composed}/0.png", f"{decomposed}/1.png"]))


def test_a_folder_without_splits_has_nothing_held_out(tmp_path, monkeypatch):
    config, looks = DataConfig(source=str(make(tmp_path, ["a/0.png", "a/1.png"])), resolution=1), []
    monkeypatch.setattr(image_datasets, "read_layout", lambda folder: looks.append(folder) or read_layout(folder))
    assert open_dataset(config, "train").whole
    assert len(open_dataset(config, "validation", or_all=True)) == 2
    assert looks == [str(tmp_path)] * 2, "once for each data set"
    assert len(open_dataset(config, "all")) == 2
    with pytest.raises(ValueError, match="has no validation split: its images are not split.* others. Do this$"):
        open_dataset(config, "validation", advice=". Do this")


def test_links_to_nothing_and_pipes_are_named(tmp_path):
    make(tmp_path, ["a/0.png"])
    for name, create in (("link.png", lambda path: path.symlink_to("gone")), ("pipe.png", os.mkfifo)):
        create(tmp_path / "a" / name)
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image: it is a broken link, a pipe"):
            open_dataset(DataConfig(source=str(tmp_path), resolution=1))
        skipping = open_dataset(DataConfig(source=str(tmp_path), resolution=1, skip_unreadable=True))
        assert skipping.skipped == [f"a/{name}"] and len(skipping) == 1
        (tmp_path / "a" / name).unlink()
    (tmp_path / "b").symlink_to("gone")
    with pytest.raises(ValueError, match="b is a broken link: expected an image or a folder"):
        read_layout(tmp_path)


def test_other_pixels_of_one_size_are_other_data(tmp_path):
    config = DataConfig(source=str(tmp_path), resolution=1)
    prints = []
    for value in (0, 1):
        Image.new("RGB", (1, 1), (value, 0, 0)).save(tmp_path / "0.bmp")
        prints.append((open_dataset(config).fingerprint, (tmp_path / "0.bmp").stat().st_size))
    assert prints[0][0] != prints[1][0] and prints[0][1] == prints[1][1]


def test_a_class_of_which_no_image_can_be_read_is_named(tmp_path):
    make(tmp_path, ["a/0.png", "b/1.png"])
    (tmp_path / "b" / "1.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="no image of the class 'b' can be read"):
        open_dataset(DataConfig(source=str(tmp_path), resolution=1, skip_unreadable=True))


@pytest.mark.parametrize("setting", [{"label_column": "x"}, {"holdout": 0.2}, {"image_column": "x"}])
def test_settings_that_a_folder_does_not_look_at_are_refused(setting, tmp_path):
    name = next(iter(setting))
    with pytest.raises(ValueError, match=f"{name} is .* where it has no effect.* add --data.{name} (none|image|0.1)$"):
        DataConfig(source=str(tmp_path), **setting)


def test_a_limit_that_leaves_a_class_without_images_says_so(tmp_path, capsys):
    folder = make(tmp_path, ["cat/0.png", "cat/1.png", "dog/2.png", "owl/3.png"])
    assert open_dataset(DataConfig(source=str(folder), resolution=16, limit=2)).labels == [0, 1]
    assert "warning: limit 2 leaves 2 images, and none of 1 classes: ['owl']\n" in capsys.readouterr().out
    open_dataset(DataConfig(source=str(folder), resolution=16, limit=4))
    assert "warning" not in capsys.readouterr().out
