"""Where measured images come from, and what is remembered of them when they are gone."""

import json
import os
import struct
import zlib
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from two_processes import run_on_two

import vtp_diffusion.data.image_datasets
from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.data.image_files import list_images, read_image
from vtp_diffusion.data.npz import ImageSpool, NpzImages, write_npz
from vtp_diffusion.evaluation import sources
from vtp_diffusion.evaluation.one_pass import FeaturesConfig, Wanted, rebatched, record_images, record_source
from vtp_diffusion.evaluation.sources import (
    FolderImages,
    PipelineImages,
    hashed_batches,
    image_batches,
    image_hashes,
    open_measured,
    open_reference,
)
from vtp_diffusion.generation.sample_files import SampleFolder, SampleNpz
from vtp_diffusion.metrics.features import Extractor, FeatureNetwork
from vtp_diffusion.metrics.frechet import jackknife_group
from vtp_diffusion.metrics.networks import feature_network, network_name, weight_files
from vtp_diffusion.runtime.config import parse_config
from vtp_diffusion.runtime.processes import reading_processes


def pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)


class Means(FeatureNetwork):
    """Mean colours of the four quarters."""

    name, distance_name, dim, preprocessing = "means", "FD-means", 12, "none"

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_by_row_in_any_order_and_by_any_process(save, tmp_path):
    images = pixels(9)
    save(tmp_path / "x.npz", images, settings=np.array(json.dumps({"seed": 3})))
    source = NpzImages(tmp_path / "x.npz")
    assert (len(source), source.size, source.settings) == (9, (6, 8), {"seed": 3})
    for rows in ([4, 1, 8, 1], [0], [7, 8]):
        assert np.array_equal(source.read(rows).permute(0, 2, 3, 1), images[rows])
    assert source._mapped is None or isinstance(source._mapped, np.memmap), "the file was read into memory"
    batches = hashed_batches(source, list(range(9)), 2, num_workers=2)
    found, hashes = zip(*batches, strict=True)
    assert np.array_equal(torch.cat(found).permute(0, 2, 3, 1), images)
    assert sum(hashes, []) == image_hashes(torch.from_numpy(images).permute(0, 3, 1, 2))


def test_damaged_and_unfit_npz_files(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", pixels(50))
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.npz is not an npz file, or is damaged"):
        NpzImages(tmp_path / "cut.npz")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with pytest.raises(ValueError, match="flipped.npz is damaged before image"):
        NpzImages(tmp_path / "flipped.npz").read([49])
    np.savez(tmp_path / "few.npz", pixels(2), settings=np.array(json.dumps({"num_images": 3})))
    with pytest.raises(ValueError, match="few.npz holds 2 images, its settings say 3: it is incomplete"):
        NpzImages(tmp_path / "few.npz")
    np.savez(tmp_path / "other.npz", images=pixels(2))
    with pytest.raises(ValueError, match=r"^\S*other.npz holds images: expected arr_0, uint8 \(N, H, W, 3\)$"):
        NpzImages(tmp_path / "other.npz")
    np.savez(tmp_path / "floats.npz", pixels(2) / 255)
    with pytest.raises(ValueError, match=r"arr_0 is float64 \(2, 6, 8, 3\), expected uint8 \(N, H, W, 3\)"):
        NpzImages(tmp_path / "floats.npz")


def test_writing_an_npz_in_pieces(tmp_path):
    images = pixels(9)
    spool = ImageSpool(tmp_path / "new" / "x.npz", 9, (6, 8))
    spool.create()
    for rows in ([5, 6, 7, 8], [0, 2], [1, 3, 4]):  # as several processes do
        spool.write(rows, images[rows])
    spool.pack(mu=np.arange(3.0))
    spool.publish()
    with np.load(tmp_path / "new" / "x.npz") as file:
        assert np.array_equal(file["arr_0"], images) and file["mu"].tolist() == [0, 1, 2]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.npz"]
    with pytest.raises(ValueError, match="8 images were given for .*y.npz, expected 9"):
        write_npz(tmp_path / "y.npz", 9, (6, 8), iter([images[:8]]))
    assert not (tmp_path / "y.npz").exists()


def rgb_png_of_16_bits(image):
    """A PNG of uint16 (H, W, 3), which Pillow reads but does not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = image.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)  # each begins with its filter, none
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_images_of_other_modes_are_converted_and_counted_or_refused(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    Image.fromarray(pixels(1)[0]).save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "b.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "c.png")
    Image.fromarray(np.dstack([np.stack([grey] * 3, 2), np.zeros((6, 8), np.uint8)])).save(tmp_path / "d.png")
    Image.fromarray(pixels(1)[0]).convert("P").save(tmp_path / "e.png")
    source = FolderImages(tmp_path)
    assert source.converted == {"L": 1, "I;16": 1, "RGBA": 1, "P": 1}
    images = source.read(range(5))
    assert np.array_equal(images[1, 2], grey) and np.array_equal(images[2, 0], grey), "16 bits keep their upper 8"
    assert (images[3] == 255).all(), "what is transparent is white"
    (tmp_path / "deep.png").write_bytes(rgb_png_of_16_bits(pixels(1)[0].astype(np.uint16) * 257))
    assert FolderImages(tmp_path).converted["RGB;16"] == 1
    assert np.array_equal(FolderImages(tmp_path).read([4])[0].permute(1, 2, 0), pixels(1)[0])
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="f.tif .* mode 'F', expected 8 or 16 bits"):
        FolderImages(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_files_are_the_same_from_one_process_or_several(workers, tmp_path):
    images = pixels(49)
    for k, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{k:04d}.png")
    source, order = FolderImages(tmp_path), list(range(len(images)))[::-1]
    found, hashes = zip(*hashed_batches(source, order, 9, workers), strict=True)
    for batches in (found, list(image_batches(source, order, 9, workers))):
        assert [len(batch) for batch in batches] == [9] * 5 + [4]
        assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1), images[::-1])
    assert list(hashes) == list(map(image_hashes, found))
    (tmp_path / "0003.png").write_bytes((tmp_path / "0003.png").read_bytes()[:60])
    batches = image_batches(source, order, 9, workers)
    assert np.array_equal(next(batches).permute(0, 2, 3, 1), images[:-10:-1])
    with pytest.raises(ValueError, match="0003.png cannot be read as an image"):
        list(batches)


def test_reading_leaves_cpus_to_others(monkeypatch):
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert reading_processes() == max(1, min(32, cpus - 1)) and reading_processes(limit=1) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cpus))
    assert reading_processes() == 1


@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_of_a_collection_that_are_unreadable_or_too_small(in_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if not in_memory:
        monkeypatch.setattr(vtp_diffusion.data.image_datasets, "IN_MEMORY_BYTES", 0)
    for k, side in enumerate((16, 15, 40)):
        Image.fromarray(pixels(1, k)[0]).resize((20, side)).save(tmp_path / f"{k}.png")
    rows = [{"bytes": (tmp_path / f"{k}.png").read_bytes(), "path": None} for k in range(3)]
    table = {"image": [rows[0], {"bytes": b"no image", "path": None}, rows[1], None, rows[2]]}
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(table, datasets.Features({"image": datasets.Image()})).to_parquet(str(file))
    config = DataConfig(source="parquet", data_files=str(file), resolution=16, skip_unreadable=True)
    source = open_measured(config, "train")
    assert (len(source), source.dataset.skipped) == (3, ["00000001", "00000003"])
    assert len({bytes(image.numpy()) for image in source.read(range(3))}) == 3
    assert source.count_enlarged(range(3)) == source.count_enlarged([1]) == 1 and source.count_enlarged([2]) == 0
    assert len(source.labels) == len(source.dataset.weights) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_too_small_are_counted_where_they_are_read(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(vtp_diffusion.data.image_datasets, "IN_MEMORY_BYTES", 0)
    for k, side in enumerate((15, 16, 12, 40)):
        Image.new("RGB", (20, side)).save(tmp_path / f"{k}.png")
    source = open_measured(DataConfig(source=str(tmp_path), resolution=16), "train")
    assert sum(map(len, image_batches(source, [0, 1], 1, workers))) == 2 and source.count_enlarged(range(4)) == 1
    assert sum(map(len, image_batches(source, [2, 3], 1, workers))) == 2 and source.count_enlarged(range(4)) == 2
    assert source.count_enlarged([3]) == 0


def look_together(rank):
    """What one of two processes knows of a set with a damaged image, what it has read of it, and folders it listed."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    data, read, listed = vtp_diffusion.data.image_datasets, [], []
    data.IN_MEMORY_BYTES = 0
    data.read_image = lambda path, **how: read.append(path.name) or read_image(path, **how)
    source = open_measured(DataConfig(source="set", resolution=16, skip_unreadable=True), "train")
    sources.list_images = lambda path: listed.append(str(path)) or list_images(path)
    images = FolderImages("equal")
    known = (source.dataset.keys, source.dataset.skipped, source.count_enlarged([0]), images.size, len(images))
    return known, sorted(read), listed


def test_processes_divide_the_search_for_unreadable_images_and_one_looks_into_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    for folder in ("set", "equal"):
        (tmp_path / folder).mkdir()
        for k in range(4):
            Image.new("RGB", (20, 15 if folder == "set" else 20)).save(tmp_path / folder / f"{k}.png")
    (tmp_path / "set" / "1.png").write_bytes(b"no picture")
    (known, *first), (same, *second) = run_on_two(look_together, tmp_path)
    assert known == same == (["0.png", "2.png", "3.png"], ["1.png"], 1, (20, 20), 4)
    assert first == [["0.png", "2.png"], ["equal"]]
    assert second == [["1.png", "3.png"], []]


def test_real_images_of_a_folder_without_splits_are_all_of_it(tmp_path):
    for k in range(3):
        Image.fromarray(pixels(1, k)[0]).resize((8, 8)).save(tmp_path / f"{k}.png")
    for split in ("train", "validation"):
        assert len(open_reference(DataConfig(), str(tmp_path), split, (8, 8))[1]) == 3
    with pytest.raises(ValueError, match="has no validation split"):
        open_measured(DataConfig(source=str(tmp_path), resolution=8), "validation")


def test_real_images_of_a_table_are_read_and_settings_checked_with_their_source(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Image.fromarray(pixels(1)[0]).save(tmp_path / "0.png")
    rows = {"image": [{"bytes": (tmp_path / "0.png").read_bytes(), "path": None}] * 3}
    file = str(tmp_path / "a.parquet")
    datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image()})).to_parquet(file)
    words = ["--reference", "parquet", "--data.data_files", file, "--output", "o"]
    data = parse_config(FeaturesConfig, words).data
    assert len(open_reference(data, "parquet", "train", (8, 8))[1]) == 3
    with pytest.raises(ValueError, match="data_files is .* with source 'openmoji', expected none"):
        open_reference(data, "openmoji", "train", (8, 8))


def test_a_folder_that_is_not_what_it_says(tmp_path):
    with pytest.raises(ValueError, match=r"holds no image files \([^)]*\)$"):
        FolderImages(tmp_path)
    (tmp_path / "of" / "classes").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds folders, expected the folder of one set of images"):
        FolderImages(tmp_path / "of")
    for k in range(3):
        Image.fromarray(pixels(1, k)[0]).save(tmp_path / f"{k:06d}.png")
    settings = {"label_ids": [5, 7], "num_images_per_label": 2, "num_images": 4}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="holds 3 images, its settings.json says 4: it is incomplete"):
        FolderImages(tmp_path)
    Image.fromarray(pixels(1)[0]).save(tmp_path / "of" / "a.png")
    assert len(FolderImages(tmp_path / "of")) == 1, "a folder without images is no set"
    Image.fromarray(pixels(1)[0]).save(tmp_path / "of" / "classes" / "b.png")
    with pytest.raises(ValueError, match=r"holds 1 images and, beside them, a folder of images, classes \(1 of them"):
        FolderImages(tmp_path / "of")


def test_a_damaged_png_of_an_earlier_run_is_made_again(tmp_path):
    files = SampleFolder(tmp_path / "out", {"num_images": 4})
    for number, image in enumerate(torch.from_numpy(pixels(3)).permute(0, 3, 1, 2)):
        files.write(number, image)
    for number, damage in (
        (0, lambda content: content[:-20]),
        (1, lambda content: content[:60] + b"x" + content[61:]),
    ):
        path = tmp_path / "out" / f"{number:06d}.png"
        path.write_bytes(damage(path.read_bytes()))
    assert files.missing() == [0, 1, 3]
    packed = SampleNpz(tmp_path / "x.npz", {"num_images": 2})
    for number, image in enumerate(torch.from_numpy(pixels(2)).permute(0, 3, 1, 2)):
        packed.write(number, image)
    assert packed.missing() == []
    part = tmp_path / "x.npz.parts" / "000000.npy"
    part.write_bytes(part.read_bytes()[:-1])
    assert packed.missing() == [0, 1]


def test_a_record_keeps_statistics_of_all_features_of_some_and_no_images():
    images = torch.from_numpy(pixels(23)).permute(0, 3, 1, 2)
    images[11] = images[4]
    extractor = Extractor(Means(), "cpu")
    features = Means()(images)
    wanted = {"means": {"features": Wanted(groups=4, max_features=7)}}

    def passing(batch_size):
        for start in range(0, 23, batch_size):
            part = images[start : start + batch_size]
            yield range(start, start + len(part)), part, image_hashes(part)

    records = [record_images(passing(size), 23, {"means": extractor}, wanted, seed=0) for size in (5, 23)]
    for found in records:
        record = found.outputs["means"]["features"]
        torch.testing.assert_close(record.features, features[torch.from_numpy(record.kept)])
        assert len(record.kept) == 7 and [group.count for group in record.groups] == [6, 6, 6, 5]
        torch.testing.assert_close(record.statistics.covariance, torch.cov(features.double().T))
        members = torch.from_numpy(jackknife_group(23, 4, seed=0) == 1)
        torch.testing.assert_close(record.groups[1].mean, features[members].double().mean(0))
        assert (found.duplicates, found.example) == (1, (4, 11))
    assert records[0].sha256 == records[1].sha256
    with pytest.raises(ValueError, match="23 of 24 images were read"):
        record_images(passing(5), 24, {"means": extractor}, wanted, seed=0)


@pytest.mark.parametrize("size", [3, 5, 23, 40])
def test_images_are_put_into_batches_of_another_size(size):
    images = torch.from_numpy(pixels(23)).permute(0, 3, 1, 2)
    hashes = image_hashes(images)
    places = [range(k, min(k + 5, 23)) for k in range(0, 23, 5)]
    parts = ((part, images[part.start : part.stop], hashes[part.start : part.stop]) for part in places)
    found = list(rebatched(parts, size))
    assert [len(positions) for positions, _, _ in found] == [size] * (23 // size) + [23 % size] * (23 % size > 0)
    assert [place for positions, _, _ in found for place in positions] == list(range(23))
    assert torch.equal(torch.cat([part for _, part, _ in found]), images)
    assert [digest for _, _, part in found for digest in part] == hashes


def test_a_pipeline_samples_in_batches_of_its_own_size():
    sampled, seen = [], []

    class Sampled(PipelineImages):
        size, batch_size = (8, 8), 3

        def __init__(self):
            self.labels = [0] * 8

        def read(self, indices):
            sampled.append(len(indices))
            return torch.from_numpy(pixels(8)).permute(0, 3, 1, 2)[list(indices)]

    class Watched(Means):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    config = SimpleNamespace(feature_batch_size=5, device="cpu", num_workers=0, seed=0)
    wanted = {"means": {"features": Wanted(groups=0, max_features=None)}}
    found = record_source(
        config, "generated", Sampled(), list(range(8)), {"means": Extractor(Watched(), "cpu")}, wanted
    )
    assert sampled == [3, 3, 2] and seen == [5, 3]
    expected = Means()(torch.from_numpy(pixels(8)).permute(0, 3, 1, 2))
    assert torch.equal(found.outputs["means"]["features"].features, expected)


def test_a_compiled_network_sees_batches_of_one_size_and_layout():
    seen = []

    class Watched(Means):
        def forward(self, images):
            seen.append((images.shape, images.stride()))
            return super().forward(images)

    images = torch.from_numpy(pixels(5)).permute(0, 3, 1, 2)
    with torch.compiler.set_stance("force_eager"):
        extractor = Extractor(Watched(), "cpu", compile=True, batch_size=4)
        found = torch.cat([extractor(batch)["features"] for batch in images.split(4)])
        extractor(images[:3].contiguous())  # as from data sets, whose images lie channel by channel
    assert len(set(seen)) == 1 and seen[0][0][0] == 4, seen
    assert torch.equal(found, Means()(images))
    with pytest.raises(ValueError, match="needs the batch_size"):
        Extractor(Means(), "cpu", compile=True)
    with pytest.raises(ValueError, match="feature mode 'faster' is unknown"):
        Extractor(Means(), "cpu", mode="faster")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_pads_a_last_batch_instead_of_timing_another_shape():
    seen = []

    class Watched(Means):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    images = torch.from_numpy(pixels(5)).permute(0, 3, 1, 2)
    extractor = Extractor(Watched(), "cuda")
    found = [extractor(batch)["features"].cpu() for batch in images.split(2)]
    assert seen == [2, 2, 2]
    torch.testing.assert_close(torch.cat(found), Means()(images))


def test_the_encoder_of_a_vtp_as_a_feature_network(tmp_path):
    torch.manual_seed(0)
    sides = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             (("hidden_size", 16), ("num_layers", 1), ("num_attention_heads", 2))}  # fmt: skip
    vae = AutoencoderVTP(sample_size=16, patch_size=8, latent_channels=3, rope_dtype="float32", **sides)
    vae.save_pretrained(tmp_path / "vae")
    network = feature_network(f"vtp:{tmp_path / 'vae'}")
    assert (network.dim, network.distance_name, network.kernel_distance_name) == (16, "FD-VTP-16", "KD-VTP-16")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8))
    expected = vae.encode_features(images.float() / 127.5 - 1).patch_tokens.mean(1)
    torch.testing.assert_close(Extractor(network, "cpu")(images)["features"], expected, rtol=1e-4, atol=1e-4)
    assert len(network.describe()["sha256"]) == 64 and network.score_name("recall") == "recall (VTP-16)"
    with pytest.raises(ValueError, match="expected the folder of an AutoencoderVTP or VTPModel"):
        feature_network(f"vtp:{tmp_path}")
    with pytest.raises(ValueError, match="names its own weights"):
        feature_network(f"vtp:{tmp_path / 'vae'}", "weights.pth")


def test_names_and_weights_on_the_command_line(tmp_path):
    assert network_name("efficientnet-lite0") == "efficientnet_lite0"
    file = tmp_path / "a=b.pth"
    file.write_bytes(b"")
    assert weight_files([str(file)], ["vgg16"]) == {"vgg16": str(file)}
    wanted = {"efficientnet_lite0": str(file)}
    assert weight_files([f"efficientnet-lite0={file}"], ["vgg16"], beside=["efficientnet_lite0"]) == wanted
    with pytest.raises(ValueError, match="weights are given for efficientnet_lite0, measured are vgg16"):
        FeaturesConfig(
            reference="openmoji", output="r", feature_network=["vgg16"], weights=[f"efficientnet-lite0={file}"]
        )
    for entry, networks in ((str(file), ["vgg16", "inception"]), ("none.pth", ["vgg16"]), (f"clip={file}", ())):
        with pytest.raises(ValueError, match="weights must be NETWORK=FILE"):
            weight_files([entry], networks)
