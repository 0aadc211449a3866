"""OpenMoji from its package: what is drawn, how it is split, and that it is drawn once."""

import json

import numpy as np
import pytest
import torch

import vtp_diffusion.data.openmoji as openmoji
from vtp_diffusion.data.image_datasets import SKIN_TONE_WEIGHT, DataConfig, open_dataset
from vtp_diffusion.data.openmoji import (
    SKIN_TONES,
    default_cache_dir,
    is_held_out,
    list_openmoji,
    openmoji_folder,
    read_metadata,
)

SIDE = 8


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    openmoji_folder(SIDE, folder)
    return folder


@pytest.fixture(scope="module")
def rows():
    return list_openmoji()


@pytest.fixture(scope="module")
def splits(cache):
    config = DataConfig(resolution=SIDE, cache_dir=str(cache))
    return {split: open_dataset(config, split) for split in ("train", "validation", "all")}


def test_counts(rows):
    assert len(rows) == len({row["key"] for row in rows}) == 3778
    assert len({row["base"] for row in rows}) == sum(not row["skin_tone"] for row in rows) == 1903
    assert len({row["category"] for row in rows}) == 10
    assert len({row["subcategory"] for row in rows}) == 100 == 1 + max(row["label"] for row in rows)


def test_names(rows):
    by_key = {row["key"]: row for row in rows}
    names = ("base", "category", "subcategory", "caption", "skin_tone")
    assert [by_key["1F436"][name] for name in names] == [
        "1F436", "Animals & Nature", "animal-mammal", "dog face", False
    ]  # fmt: skip
    assert by_key["1F44B-1F3FD"]["caption"] == "waving hand sign, medium skin tone"
    two_people = by_key["1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FF"]
    assert two_people["caption"].endswith(", light and dark skin tone") and two_people["skin_tone"]
    assert two_people["base"] == "1F9D1-200D-1F91D-200D-1F9D1"
    for row in rows:
        same = row["key"].replace("-FE0F", "") == row["base"]
        assert row["caption"] and row["skin_tone"] == ("skin tone" in row["caption"]) == (not same)


def test_a_variant_has_the_class_of_its_base(rows):
    labels = {row["base"]: row["label"] for row in rows if not row["skin_tone"]}
    assert all(row["label"] == labels[row["base"]] for row in rows)
    tones = [row for row in rows if row["skin_tone"]]
    assert all(any(tone in row["key"] for tone in SKIN_TONES) for row in tones)


def test_the_folder_says_what_it_holds(cache, rows):
    folder = openmoji_folder(SIDE, cache)
    assert "CC BY-SA 4.0" in (folder / "ATTRIBUTION.txt").read_text()
    expected = [{key: value for key, value in row.items() if key != "svg"} for row in rows]
    assert [
        {key: value for key, value in row.items() if key != "file_name"} for row in read_metadata(folder)
    ] == expected
    assert len(list((folder / "images").iterdir())) == len(rows)
    assert [entry.name for entry in cache.iterdir()] == [folder.name]


def test_datasets_reads_the_folder_as_an_image_folder(cache, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    table = datasets.load_dataset("imagefolder", data_dir=str(openmoji_folder(SIDE, cache)), split="train")
    row = table.filter(lambda key: key == "1F436", input_columns="key")[0]
    assert row["image"].size == (SIDE, SIDE) and row["caption"] == "dog face"


def test_the_split_is_by_base_emoji(splits, rows):
    bases = {row["key"]: row["base"] for row in rows}
    held_out, trained = ({bases[key] for key in splits[name].keys} for name in ("validation", "train"))
    assert not held_out & trained and len(held_out | trained) == 1903
    assert 0.08 < len(held_out) / 1903 < 0.12
    assert sorted(splits["train"].keys + splits["validation"].keys) == sorted(splits["all"].keys)
    assert set(splits["train"].labels) == set(range(100)), "a class without a training image"


def test_the_split_is_a_function_of_base_and_seed():
    assert [is_held_out(base, 0.5, 0) for base in ("1F436", "1F600", "2764")] == [False, True, True]
    codes = [f"{code:04X}" for code in range(4000)]
    for share in (0.0, 0.1, 0.5):
        assert abs(sum(is_held_out(code, share, 3) for code in codes) / 4000 - share) < 0.03
    assert all(is_held_out(code, 0.5, 1) for code in codes if is_held_out(code, 0.1, 1)), (
        "a larger share holds a smaller"
    )
    assert any(is_held_out(code, 0.1, 1) != is_held_out(code, 0.1, 2) for code in codes)


def test_items_and_weights(splits):
    dataset = splits["all"]
    assert dataset.label_names == sorted(dataset.label_names) and len(dataset.label_names) == 100
    for index in (0, 1000, 3777):
        item = dataset[index]
        assert item["image"].shape == (3, SIDE, SIDE) and item["image"].dtype == torch.uint8
        assert item["key"] == dataset.keys[index] and item["caption"] == dataset.captions[index]
        assert dataset.weights[index] == pytest.approx(SKIN_TONE_WEIGHT if "skin tone" in item["caption"] else 1.0)
    images = torch.stack([item["image"] for item in dataset.__getitems__(range(1024))])
    # drawn on white, and neither blank nor of one colour
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].float().mean()
    assert corners > 245 and images.float().flatten(1).std(1).min() > 2
    assert len({dataset.fingerprint for dataset in splits.values()}) == 3
    assert dataset.training_fingerprint == dataset.fingerprint, "as of runs that began before there was a difference"
    assert dataset.variants.sum() == 3778 - 1903


def test_a_share_that_holds_nothing_out_is_named(cache):
    with pytest.raises(ValueError, match="holdout is 0.0, which leaves no images in OpenMoji's validation split"):
        open_dataset(DataConfig(resolution=SIDE, cache_dir=str(cache), holdout=0.0), "validation")


def test_a_complete_folder_needs_no_packages(cache, monkeypatch):
    def refuse(name, extra):
        raise ImportError(name)

    monkeypatch.setattr(openmoji, "require", refuse)
    assert len(open_dataset(DataConfig(resolution=SIDE, cache_dir=str(cache)), "all")) == 3778
    with pytest.raises(ImportError, match="resvg_py"):
        openmoji_folder(SIDE + 1, cache)


def test_an_interrupted_rendering_leaves_nothing_and_is_repeated(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(openmoji, "list_openmoji", lambda: rows[:20])
    rasterise = openmoji._rasterise

    def interrupted(svg, resolution):
        if svg == rows[15]["svg"]:
            raise KeyboardInterrupt
        return rasterise(svg, resolution)

    monkeypatch.setattr(openmoji, "_rasterise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        openmoji_folder(SIDE, tmp_path)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(openmoji, "_rasterise", rasterise)
    (tmp_path / ".openmoji-killed").mkdir()  # what a killed process left is in nobody's way
    assert len(read_metadata(openmoji_folder(SIDE, tmp_path))) == 20


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    folder = tmp_path / f"openmoji-{openmoji.OPENMOJI_VERSION}-{SIDE}"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists without metadata.jsonl"):
        openmoji_folder(SIDE, tmp_path)
    assert [entry.name for entry in folder.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="a positive number of pixels, got 0"):
        openmoji_folder(0, tmp_path)


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.delenv("VTP_DIFFUSION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "vtp_diffusion"
    monkeypatch.setenv("VTP_DIFFUSION_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"


def test_a_known_drawing(rows, tmp_path, monkeypatch):
    large_red_circle = [row for row in rows if row["key"] == "1F534"]
    monkeypatch.setattr(openmoji, "list_openmoji", lambda: large_red_circle)
    folder = openmoji_folder(32, tmp_path)
    dataset = open_dataset(DataConfig(resolution=32, cache_dir=str(tmp_path)), "all")
    red, green, blue = np.asarray(dataset[0]["image"])[:, 16, 16]
    assert red > 200 and green < 100 and blue < 100
    assert json.loads((folder / "metadata.jsonl").read_text())["caption"] == "large red circle"


def test_labels_are_subcategories_or_categories(cache):
    """Both ways of labelling the same images, which keep their fingerprint."""
    fine, coarse = (
        open_dataset(DataConfig(resolution=SIDE, cache_dir=str(cache), label_column=column), "validation")
        for column in (None, "category")
    )
    assert (len(fine.label_names), len(coarse.label_names)) == (100, 10) and fine.fingerprint == coarse.fingerprint
    assert coarse.label_names[coarse.labels[0]] in read_metadata(openmoji_folder(SIDE, cache))[0].values()
    with pytest.raises(ValueError, match="label_column is 'name', expected subcategory or category"):
        open_dataset(DataConfig(resolution=SIDE, cache_dir=str(cache), label_column="name"))
