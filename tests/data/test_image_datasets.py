"""Image data sets."""

import functools
import io
import os
import pickle
import re
import tarfile
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import vtp_diffusion.data.image_datasets as data
from vtp_diffusion.data.batches import ReadableBatches, collate_images, read_batches
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.data.image_files import (
    UnreadableImageError,
    center_crop,
    read_image,
)
from vtp_diffusion.data.shard_files import check_source
from vtp_diffusion.data.streaming import StreamingImages


def picture(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def make_folder(folder, names):
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    return folder


def folder_config(folder, **changes):
    return DataConfig(source=str(folder), resolution=16, **changes)


@pytest.fixture
def from_disk(monkeypatch):
    """Data sets are read image by image, as large ones are."""
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)


# --- pixels ---


def test_the_orientation_is_a_setting_that_the_fingerprint_tells_and_damaged_exif_data_do_no_harm(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    picture(0, (16, 16)).save(tmp_path / "0.png", exif=exif)
    turned, plain = (open_dataset(folder_config(tmp_path, exif_orientation=on)) for on in (True, False))
    assert torch.equal(turned[0]["image"], plain[0]["image"].flip(1, 2)) and turned.fingerprint != plain.fingerprint
    picture(1, (16, 16)).save(tmp_path / "0.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(read_image(tmp_path / "0.png"), picture(1, (16, 16)))


def test_the_size_limit_of_images_is_an_option_up_and_down(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture(0, (30, 30)).save(tmp_path / "0.png")
    with pytest.raises(UnreadableImageError, match="0.png cannot be read .* exceeds limit of 200 pixels"):
        open_dataset(folder_config(tmp_path))
    with pytest.raises(UnreadableImageError, match="it has 30 x 30 pixels, expected at most max_pixels, 899"):
        open_dataset(folder_config(tmp_path, max_pixels=899))
    assert len(open_dataset(folder_config(tmp_path, max_pixels=900))) == 1


# --- folders ---


def test_sub_folders_are_classes(tmp_path):
    dataset = open_dataset(folder_config(make_folder(tmp_path, ["b/0.png", "a/1.jpg", "b/2.png", "a/.hidden.png"])))
    assert dataset.label_names == ["a", "b"] and dataset.labels == [0, 1, 1]
    assert dataset.keys == ["a/1.jpg", "b/0.png", "b/2.png"]
    item = dataset[1]
    assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, 16, 16)
    assert {key: item[key] for key in ("label", "caption", "key")} == {"label": 1, "caption": "b", "key": "b/0.png"}
    expected = torch.from_numpy(np.array(center_crop(picture(0), 16))).permute(2, 0, 1)
    assert torch.equal(item["image"], expected)
    assert torch.equal(dataset.weights, torch.ones(3))


def test_a_flat_folder_is_one_class_and_has_no_splits(tmp_path):
    config = folder_config(make_folder(tmp_path, ["1.png", "0.png"]))
    assert open_dataset(config).keys == ["0.png", "1.png"] and open_dataset(config).labels == [0, 0]
    assert open_dataset(config, "all").fingerprint == open_dataset(config, "train").fingerprint
    with pytest.raises(ValueError, match="has no validation split: its images are not split"):
        open_dataset(config, "validation")


def test_splits_of_a_folder(tmp_path):
    config = folder_config(make_folder(tmp_path, ["train/a/0.png", "train/b/1.png", "validation/b/2.png"]))
    assert [open_dataset(config, split).keys for split in ("train", "validation", "all")] == [
        ["train/a/0.png", "train/b/1.png"],
        ["validation/b/2.png"],
        ["train/a/0.png", "train/b/1.png", "validation/b/2.png"],
    ]
    assert open_dataset(config, "all").labels == [0, 1, 1]


def test_held_out_images_have_the_class_numbers_of_the_training_images(tmp_path):
    names = ["train/a/0.png", "train/b/1.png", "validation/b/2.png", "validation/c/3.png"]
    held_out = open_dataset(folder_config(make_folder(tmp_path, names)), "validation")
    assert held_out.label_names == ["a", "b", "c"] and [item["label"] for item in held_out] == [1, 2]


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["a/0.png", "1.png"], "train", "holds classes .a. and, beside them, images"),
        (["train/a/0.png"], "validation", "has no validation split: it holds train"),
        (["notes.d/a/b/0.png"], "train", "holds no images"),
        (["0.png"], "test", "split is 'test', expected train, validation or all"),
    ],
)
def test_folders_that_are_not_understood(names, split, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_dataset(folder_config(make_folder(tmp_path, names)), split)


@pytest.mark.parametrize("source", ["", "/no/such", "./x", "~/x", "a/b/c", "a/", "a b", "there/x", "there.tar"])
def test_a_folder_that_is_not_there_is_refused_without_a_look_at_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there.tar").touch()
    (tmp_path / "parquet").touch()  # no builder's name is read as a path
    for known in ("openmoji", "imagenet-1k", "owner/name.v2", "parquet", "there"):
        check_source(known, "source")
    with pytest.raises(ValueError, match=f"source is {re.escape(repr(source))}, which is not a folder"):
        DataConfig(source=source)


def test_limit_is_spread_over_the_whole_set(tmp_path):
    config = folder_config(make_folder(tmp_path, [f"{k}.png" for k in range(9)]), limit=3)
    assert open_dataset(config).keys == ["0.png", "3.png", "6.png"]


def test_the_fingerprint_tells_content_and_resolution(tmp_path):
    config = folder_config(make_folder(tmp_path, ["0.png", "1.png"]))
    fingerprints = {open_dataset(config).fingerprint, open_dataset(DataConfig(source=str(tmp_path))).fingerprint}
    (tmp_path / "1.png").unlink()
    assert len(fingerprints | {open_dataset(config).fingerprint}) == 3


def test_a_file_name_that_is_no_utf_8_is_read(tmp_path):
    make_folder(tmp_path, [os.fsdecode(b"cat/\xff.png"), "dog/1.png"])
    dataset = open_dataset(folder_config(tmp_path))
    assert dataset.labels == [0, 1] and os.fsencode(dataset.keys[0]) == b"cat/\xff.png"


def test_batches_from_memory_and_from_disk_are_the_same(tmp_path, monkeypatch):
    config = folder_config(make_folder(tmp_path, ["a/0.png", "b/1.png"]))
    kept = open_dataset(config)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    read = pickle.loads(pickle.dumps(open_dataset(config)))  # as a worker process gets it
    for one, other in zip(kept.__getitems__([1, 0]), read.__getitems__([1, 0]), strict=True):
        assert torch.equal(one.pop("image"), other.pop("image")) and one == other


# --- unreadable images ---


@pytest.fixture
def damaged(tmp_path):
    make_folder(tmp_path, ["0.png", "1.png", "2.png"])
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:300])
    return tmp_path


def test_an_unreadable_image_is_named(damaged):
    with pytest.raises(UnreadableImageError, match="1.png cannot be read as an image"):
        open_dataset(folder_config(damaged))


def test_an_unreadable_image_stops_reading_when_it_is_met(damaged, from_disk):
    dataset = open_dataset(folder_config(damaged))
    assert dataset[0]["key"] == "0.png"
    with pytest.raises(UnreadableImageError, match="1.png"):
        dataset[1]


def test_skipped_images_are_counted_and_left_out(damaged):
    dataset = open_dataset(folder_config(damaged, skip_unreadable=True))
    assert dataset.keys == ["0.png", "2.png"] and dataset.skipped == ["1.png"]
    assert len(dataset) == len(dataset.labels) == len(dataset.weights) == 2


def test_from_disk_a_skipped_image_gives_way_to_the_next(damaged, from_disk):
    dataset = open_dataset(folder_config(damaged, skip_unreadable=True))
    assert [item["key"] for item in dataset.__getitems__([0, 1, 2, 1])] == ["0.png", "2.png", "2.png", "2.png"]
    assert dataset.skipped == ["1.png"]
    assert dataset.item_or_none(1) is None and dataset.item_or_none(2)["key"] == "2.png"
    assert [item["key"] for item in dataset] == ["0.png", "2.png", "2.png"], "iteration ends"


def test_batches_without_replacements(damaged, from_disk):
    batches = ReadableBatches(open_dataset(folder_config(damaged, skip_unreadable=True)))
    places, pixels = batches[[1, 2, 0]]
    assert places == [1, 2] and torch.equal(pixels[[1, 2]], torch.stack([batches[[k]][1][0] for k in (2, 0)]))
    assert len(pixels) == 3 and batches[[1]][0] == []
    with pytest.raises(UnreadableImageError, match="1.png"):
        ReadableBatches(open_dataset(folder_config(damaged)))[[0, 1]]


def test_what_workers_could_not_read_is_known_where_they_were_started(damaged, from_disk):
    dataset = open_dataset(folder_config(damaged, skip_unreadable=True))
    for _ in range(2):  # counted once
        batches = read_batches(dataset, [[0, 1], [1, 2]], collate_images, torch.device("cpu"), num_workers=2)
        assert [len(batch["image"]) for batch in batches] == [2, 2]
        assert dataset.skipped == ["1.png"]


def test_nothing_readable(tmp_path):
    (tmp_path / "0.png").write_text("not an image")
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        open_dataset(folder_config(tmp_path, skip_unreadable=True))


# --- collections of `datasets` ---


@pytest.fixture
def offline(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def as_bytes(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_parquet(datasets, path, labels, feature):
    rows = {
        "picture": [{"bytes": as_bytes(picture(k)), "path": None} for k in range(len(labels))],
        "kind": labels,
        "text": [f"picture {k}" for k in range(len(labels))],
    }
    features = {"picture": datasets.Image(), "kind": feature, "text": datasets.Value("string")}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(str(path))


def parquet_config(path, **changes):
    columns = {"image_column": "picture", "label_column": "kind", "caption_column": "text"}
    settings = {"source": "parquet", "data_files": str(path), "resolution": 16}
    return DataConfig(**(settings | columns | changes))


def test_parquet(tmp_path, offline):
    write_parquet(offline, tmp_path / "a.parquet", [1, 0, 1], offline.ClassLabel(names=["cat", "dog"]))
    dataset = open_dataset(parquet_config(tmp_path / "a.parquet"))
    assert dataset.label_names == ["cat", "dog"] and dataset.labels == [1, 0, 1]
    item = dataset[2]
    assert item["caption"] == "picture 2" and item["label"] == 1
    assert torch.equal(item["image"], torch.from_numpy(np.array(center_crop(picture(2), 16))).permute(2, 0, 1))
    assert open_dataset(parquet_config(tmp_path / "a.parquet", limit=2, label_column=None)).labels == [0, 0]


def test_room_for_the_copy_of_parquet_is_looked_for_before_it_is_made(tmp_path, offline, monkeypatch, capsys):
    file, cache = tmp_path / "a.parquet", tmp_path / "cache"
    write_parquet(offline, file, [0], offline.Value("int64"))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: namedtuple("Disk", "free")(1))
        with pytest.raises(ValueError, match=f"'{file}'.* 0.0 GB into {cache}/.* 0.0 GB are free.* HF_DATASETS_CACHE"):
            open_dataset(parquet_config(file))
    assert not list(cache.rglob("*.arrow"))
    said = []
    for _ in range(2):  # the second time it is there
        open_dataset(parquet_config(file))
        said.append(capsys.readouterr().out.count(f"copies 0.0 GB into {cache}"))
    assert said == [1, 0]


def test_class_names_and_indices_in_a_column(tmp_path, offline, capsys):
    write_parquet(offline, tmp_path / "names.parquet", ["dog", "cat", "dog"], offline.Value("string"))
    dataset = open_dataset(parquet_config(tmp_path / "names.parquet"))
    assert "warning" not in capsys.readouterr().out
    assert dataset.label_names == ["cat", "dog"] and dataset.labels == [1, 0, 1] and dataset.classes_named
    write_parquet(offline, tmp_path / "lines.parquet", ["dog", "cat\n", "cat"], offline.Value("string"))
    dataset = open_dataset(parquet_config(tmp_path / "lines.parquet"))
    assert dataset.label_names == ["cat", "dog"] and dataset.labels == [1, 0, 0]
    write_parquet(offline, tmp_path / "numbers.parquet", [2, 0], offline.Value("int64"))
    dataset = open_dataset(parquet_config(tmp_path / "numbers.parquet"))
    assert dataset.label_names == ["0", "1", "2"] and not dataset.classes_named
    warning = "kind of parquet has the labels [0, 2], so the classes [1] have no images. Number them from 0"
    assert warning in capsys.readouterr().out
    write_parquet(offline, tmp_path / "unknown.parquet", [0, -1], offline.Value("int64"))
    with pytest.raises(ValueError, match="parquet, row 1: kind is -1, expected class indices or names"):
        open_dataset(parquet_config(tmp_path / "unknown.parquet"))
    write_parquet(offline, tmp_path / "none.parquet", ["cat", "dog", None], offline.Value("string"))
    with pytest.raises(ValueError, match="parquet, row 2: kind is None, expected class indices or names"):
        open_dataset(parquet_config(tmp_path / "none.parquet", limit=1))


@pytest.mark.parametrize(
    ("names", "labels", "nothing"),
    [(["a", "b"], [1, 0], -1), (["a", "b"], [1, 0], None), (None, ["b", "a"], None), (["0", "1"], [1, 0], None)],
)
def test_splits_that_are_not_opened_may_lack_labels(names, labels, nothing, offline, monkeypatch):
    index = offline.ClassLabel(names=names) if names == ["a", "b"] else offline.Value("int64")
    features = {"image": offline.Image(), "label": index if names else offline.Value("string")}
    images = [{"bytes": as_bytes(picture(k)), "path": None} for k in range(2)]
    tables = {
        split: offline.Dataset.from_dict({"image": images, "label": kinds}, offline.Features(features))
        for split, kinds in (("train", labels), ("validation", labels), ("test", [nothing] * 2))
    }
    nowhere = SimpleNamespace(config=SimpleNamespace(data_files=None))
    monkeypatch.setattr(data, "load_collection", lambda config, split, *more: (tables, [split], nowhere))
    config = DataConfig(source="owner/imagenet-1k", label_column="label", resolution=16)
    for split in ("train", "validation"):
        dataset = open_dataset(config, split)
        assert dataset.labels == [1, 0] and dataset.label_names == (names or ["a", "b"])
    monkeypatch.setattr(data, "load_collection", lambda *settings: (tables, list(tables), nowhere))
    with pytest.raises(ValueError, match=f"owner/imagenet-1k, row 4: label is {nothing}, expected class indices or"):
        open_dataset(config, "all")


def test_classes_of_a_column_have_one_number_in_all_splits_and_under_any_limit(tmp_path, offline):
    write_parquet(offline, tmp_path / "a.parquet", ["b", "a", "c"], offline.Value("string"))
    write_parquet(offline, tmp_path / "b.parquet", ["aa", "c", "b"], offline.Value("string"))
    config = parquet_config(tmp_path / "a.parquet", validation_files=str(tmp_path / "b.parquet"))
    assert open_dataset(config).label_names == ["a", "b", "c"]
    held_out = open_dataset(config, "validation")
    assert held_out.label_names == ["a", "b", "c", "aa"] and held_out.labels == [3, 2, 1]
    assert open_dataset(parquet_config(tmp_path / "a.parquet", limit=1)).label_names == ["a", "b", "c"]


@pytest.mark.parametrize("label", [10**7, 10**15])
def test_labels_that_can_be_no_classes_are_refused(label, tmp_path, offline):
    write_parquet(offline, tmp_path / "a.parquet", [0, label], offline.Value("int64"))
    with pytest.raises(ValueError, match=f"kind is {label}, expected class indices or names, below 1,048,576"):
        open_dataset(parquet_config(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=f"kind is {label}, expected a class index"):
        StreamingImages(parquet_config(tmp_path / "a.parquet", streaming=True)).take(2)


def test_webdataset_from_disk_in_a_worker(tmp_path, offline, from_disk):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for k in range(3):
            for suffix, content in (("png", as_bytes(picture(k))), ("cls", str(k % 2).encode())):
                entry = tarfile.TarInfo(f"{k}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    columns = {"image_column": "png", "label_column": "cls"}
    config = DataConfig(source="webdataset", data_files=str(tmp_path / "a.tar"), resolution=16, **columns)
    dataset = pickle.loads(pickle.dumps(open_dataset(config)))
    assert dataset.labels == [0, 1, 0]
    assert torch.equal(dataset[1]["image"], torch.from_numpy(np.array(center_crop(picture(1), 16))).permute(2, 0, 1))


def test_image_folder_of_datasets_and_its_splits(tmp_path, offline):
    make_folder(tmp_path / "set", ["train/a/0.png", "train/b/1.png", "test/b/2.png"])
    pattern = str(tmp_path / "set" / "**" / "*.png")
    config = DataConfig(source="imagefolder", data_files=pattern, label_column="label", resolution=16)
    assert len(open_dataset(config, "all")) == 3 and open_dataset(config, "all").label_names == ["a", "b"]


def test_captions_beside_images(tmp_path, offline):
    """As docs/own_images.md has them."""
    make_folder(tmp_path / "photos", ["1.png", "0.png"])
    (tmp_path / "photos" / "metadata.csv").write_text("file_name,text\n0.png,a cat\n1.png,a dog\n")
    source = {"source": "imagefolder", "data_files": str(tmp_path / "photos" / "**")}
    dataset = open_dataset(DataConfig(**source, caption_column="text", resolution=16))
    for item, seed in zip(dataset, (1, 0) if dataset[0]["caption"] == "a cat" else (0, 1), strict=True):
        assert np.array_equal(item["image"].permute(1, 2, 0), center_crop(picture(seed), 16))


def test_held_out_files_of_a_builder(tmp_path, offline):
    write_parquet(offline, tmp_path / "a.parquet", [1, 0, 1], offline.Value("int64"))
    write_parquet(offline, tmp_path / "b.parquet", [2], offline.Value("int64"))
    config = parquet_config(tmp_path / "a.parquet", validation_files=str(tmp_path / "b.parquet"))
    assert [open_dataset(config, s).labels for s in ("train", "validation", "all")] == [[1, 0, 1], [2], [1, 0, 1, 2]]
    alone = open_dataset(parquet_config(tmp_path / "a.parquet"))
    assert alone.whole and not open_dataset(config).whole
    assert open_dataset(config).fingerprint == alone.fingerprint  # a run that was begun without may be given some
    with pytest.raises(ValueError, match="expected no file of data_files: .*b.parquet is in both"):
        parquet_config(tmp_path / "*.parquet", validation_files=str(tmp_path / "b.parquet"))
    for source in ("openmoji", str(tmp_path)):
        with pytest.raises(ValueError, match="expected none: only a builder of `datasets`"):
            parquet_config(tmp_path / "a.parquet", source=source, validation_files="b.parquet")


def test_settings_that_nothing_would_come_of_are_refused(tmp_path):
    for source in ("openmoji", str(tmp_path)):
        for name in ("name", "data_files", "caption_column"):
            with pytest.raises(ValueError, match=f"{name} is 'x' with source '{source}', expected none"):
                DataConfig(source=source, **{name: "x"})
    files = {"source": "webdataset", "data_files": "a.tar", "skip_empty_captions": True}
    with pytest.raises(ValueError, match="skip_empty_captions is true with streaming false and caption_column txt"):
        DataConfig(**files, caption_column="txt")
    with pytest.raises(ValueError, match="skip_empty_captions is true with streaming true and caption_column none"):
        DataConfig(**files, streaming=True)


def test_collections_that_are_not_understood(tmp_path, offline):
    write_parquet(offline, tmp_path / "a.parquet", [0], offline.Value("int64"))
    with pytest.raises(ValueError, match="no column 'colour' for the label; it has .'picture', 'kind', 'text'."):
        open_dataset(parquet_config(tmp_path / "a.parquet", label_column="colour"))
    with pytest.raises(ValueError, match="has no validation split; it has train; data.validation_files may name one"):
        open_dataset(parquet_config(tmp_path / "a.parquet"), "validation")
    alone = open_dataset(parquet_config(tmp_path / "a.parquet"), "validation", or_all=True)
    assert alone.whole and alone.labels == [0]
    with pytest.raises(ValueError, match="data_files is .*b.parquet', which matches no file"):
        open_dataset(parquet_config(tmp_path / "b.parquet"))
    with pytest.raises(ValueError, match="neither openmoji, nor a folder, nor a collection"):
        open_dataset(parquet_config(tmp_path / "a.parquet", source="webdataset"))


def test_an_unreadable_image_of_a_collection_is_named(tmp_path, offline):
    rows = {"image": [{"bytes": as_bytes(picture(0))[:200], "path": None}]}
    table = offline.Dataset.from_dict(rows, offline.Features({"image": offline.Image()}))
    table.to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UnreadableImageError, match="image 0 of parquet cannot be read"):
        open_dataset(DataConfig(source="parquet", data_files=str(tmp_path / "a.parquet"), resolution=16))


def test_missing_images_and_captions_that_are_no_text_are_named_or_counted(tmp_path, offline):
    images = [{"bytes": as_bytes(picture(k)), "path": None} for k in range(2)]
    rows = {"picture": [images[0], None, images[1]], "texts": [["a", "b"]] * 3, "text": ["a", "x", " b "]}
    features = {"picture": offline.Image(), "texts": [offline.Value("string")], "text": offline.Value("string")}
    offline.Dataset.from_dict(rows, offline.Features(features)).to_parquet(str(tmp_path / "a.parquet"))
    config = functools.partial(parquet_config, tmp_path / "a.parquet", label_column=None)
    with pytest.raises(UnreadableImageError, match="image 1 of parquet is missing"):
        open_dataset(config())
    assert open_dataset(config(skip_unreadable=True)).captions == ["a", "b"]
    with pytest.raises(ValueError, match="texts of sample 0 is .* of type list, expected a text"):
        open_dataset(config(caption_column="texts"))
    with pytest.raises(ValueError, match="texts of 00000/0000000. is .* of type list, expected a text"):
        StreamingImages(config(streaming=True, caption_column="texts")).take(3)
    with pytest.raises(UnreadableImageError, match="image 00000/00000001 of parquet is missing"):
        StreamingImages(config(streaming=True)).take(3)
    stream = StreamingImages(config(streaming=True, skip_unreadable=True))
    assert sorted(stream.take(3).captions) == ["a", "b"]


@pytest.mark.parametrize("settings", [{"resolution": 0}, {"holdout": 1.0}, {"limit": 0}])
def test_data_settings_out_of_range(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        DataConfig(**settings)
