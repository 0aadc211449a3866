"""Training inputs of LightningDiT: latents from shards or encoded online, mirror images, refusals."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from test_latent_shards import kl, vtp, write

from vtp_diffusion.data.batches import AugmentationConfig, StepBatchSampler
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.data.images import from_uint8
from vtp_diffusion.data.latent_shards import LatentDataset, write_metadata
from vtp_diffusion.generation import latent_inputs
from vtp_diffusion.generation.latent_inputs import (
    OnlineLatents,
    check_latents,
    class_names,
    draw_flips,
    empty_classes_note,
    stored_latents,
)
from vtp_diffusion.models.latent_space import autoencoder_identity, encode_raw

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for k in range(7):
        path = folder / ("cat" if k < 4 else "dog") / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return DataConfig(source=str(folder), resolution=16)


def all_batches(batches):
    batches = list(batches)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def test_mirroring_depends_on_the_position_alone():
    def flips(batch_size, steps, rank=0, world_size=1):
        sampler = StepBatchSampler(100, batch_size, 3, 0, steps, rank, world_size)
        return [draw_flips(sampler, step, True) for step in range(steps)]

    whole = np.concatenate(flips(40, 5))
    ranks = [flips(20, 5, rank, 2) for rank in range(2)]
    assert np.array_equal(whole, np.concatenate([part for pair in zip(*ranks, strict=True) for part in pair]))
    assert 60 < whole.sum() < 140
    assert not draw_flips(StepBatchSampler(100, 40, 3, 0, 5), 0, False).any()


@pytest.mark.parametrize(("keep", "threads"), [(True, 0), (False, 0), (False, 2)])
def test_an_epoch_of_shards_holds_every_latent_once(keep, threads, tmp_path):
    everything = write(tmp_path)
    dataset, sampler = LatentDataset(tmp_path), StepBatchSampler(8, 4, 0, 0, 2)
    read = all_batches(stored_latents(dataset, sampler, True, CPU, keep, threads))
    order, flips = (
        [*sampler.batch(0), *sampler.batch(1)],
        [*draw_flips(sampler, 0, True), *draw_flips(sampler, 1, True)],
    )
    assert sorted(order) == list(range(8)) and 0 < sum(flips) < 8
    names = ["latents_flip" if flip else "latents" for flip in flips]
    assert torch.equal(read["latents"], torch.stack([everything[n][k] for n, k in zip(names, order, strict=True)]))
    assert torch.equal(read["labels"], everything["labels"][order])


def test_latents_that_exceed_memory_are_announced(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    dataset, sampler = LatentDataset(tmp_path), StepBatchSampler(8, 4, 0, 0, 1)
    for free, words in ((10**12, ""), (100, "GiB of memory are available: most rows come from the disk")):
        monkeypatch.setattr(latent_inputs, "available_memory", lambda free=free: free)
        next(stored_latents(dataset, sampler, True, CPU, keep_on_device=False))
        said = capsys.readouterr().out
        assert words in said and bool(words) == bool(said)


@pytest.mark.parametrize("keep", [True, False])
def test_online_latents_are_those_of_the_images(images, keep):
    vae, dataset = vtp(), open_dataset(images)
    online = OnlineLatents(dataset, vae, images, AugmentationConfig())
    assert online.shape == (4, 2, 2) and len(online) == 7 and online.id2label == {0: "cat", 1: "dog"}
    sampler = StepBatchSampler(7, 7, 0, 0, 2)
    batches = list(online.batches(sampler, True, CPU, keep))
    for step, batch in enumerate(batches):
        order, flips = sampler.batch(step), torch.from_numpy(draw_flips(sampler, step, True))
        pixels = from_uint8(torch.stack([dataset[k]["image"] for k in order]))
        pixels = torch.where(flips[:, None, None, None], pixels.flip(3), pixels)
        with torch.no_grad():
            assert torch.allclose(batch["latents"], encode_raw(vae, pixels), atol=1e-5)
        assert batch["labels"].tolist() == [dataset.labels[k] for k in order]
        assert not batch["latents"].requires_grad
    half = next(online.batches(sampler, True, CPU, keep, precision="bf16"))["latents"]
    difference = (half - batches[0]["latents"]).abs().max()
    assert half.dtype == torch.float32 and 0 < difference < 0.1


def test_online_augmentation_is_new_each_epoch_and_keyed_by_the_position(images):
    online = OnlineLatents(open_dataset(images), vtp(), images, AugmentationConfig(shift=4))
    whole = all_batches(online.batches(StepBatchSampler(7, 14, 0, 0, 1), False, CPU))["latents"]
    parts = [all_batches(online.batches(StepBatchSampler(7, 7, 0, k, 1), False, CPU))["latents"] for k in range(2)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
    order = np.argsort(StepBatchSampler(7, 14, 0, 0, 1).batch(0), kind="stable")  # each image twice
    pairs = whole[order].unflatten(0, (7, 2))
    assert (pairs[:, 0] - pairs[:, 1]).abs().amax((1, 2, 3)).gt(1e-3).sum() >= 6


def test_online_data_is_identified_by_images_and_autoencoder(images):
    dataset = open_dataset(images)
    one, same, other = (OnlineLatents(dataset, vtp(seed), images, AugmentationConfig()) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    weighted = copy.copy(dataset)
    weighted._described = "+other weights"
    drawn_otherwise = OnlineLatents(weighted, vtp(), images, AugmentationConfig())
    assert drawn_otherwise.fingerprint not in (one.fingerprint, other.fingerprint)
    with pytest.raises(ValueError, match="data.resolution is 20, which AutoencoderVTP cannot encode"):
        OnlineLatents(dataset, vtp(), DataConfig(source=images.source, resolution=20), AugmentationConfig())


def test_latents_of_other_images_are_refused(tmp_path):
    vae = kl()  # halves the sides, 4 channels
    write(tmp_path, latents=torch.zeros(5, 4, 8, 8), latents_flip=torch.zeros(5, 4, 8, 8), counts=(5,))
    check_latents(LatentDataset(tmp_path), vae, DataConfig(resolution=16))
    check_latents(LatentDataset(tmp_path), vae, None)
    with pytest.raises(ValueError, match=r"are \(4, 8, 8\), of images of 32 pixels .* makes \(4, 16, 16\)"):
        check_latents(LatentDataset(tmp_path), vae, DataConfig(resolution=32))
    metadata = {"autoencoder": autoencoder_identity(vae), "num_samples": 5, "label_names": ["a", "b", "c"]}
    metadata |= {"mean": [], "std": [], "resolution": 16, "data": {"source": "mine", "limit": None}}
    write_metadata(tmp_path, metadata)
    shipped = DataConfig(source="imagenet", resolution=16, limit=9)  # a configuration names images of its own
    check_latents(LatentDataset(tmp_path), vae, shipped)
    metadata |= {"crop": "random crop"}
    write_metadata(tmp_path, metadata)
    with pytest.raises(ValueError, match="have crop random crop, the configuration says ADM centre crop"):
        check_latents(LatentDataset(tmp_path), vae, DataConfig(resolution=16))
    with pytest.raises(ValueError, match="have resolution 16, the configuration says 32"):
        check_latents(LatentDataset(tmp_path), vae, DataConfig(resolution=32))


def test_labels_beyond_the_number_of_classes_are_refused(tmp_path):
    write(tmp_path)  # labels 0, 1, 2
    dataset = LatentDataset(tmp_path)
    assert class_names(dataset, None) == class_names(dataset, 3) == {0: "0", 1: "1", 2: "2"}
    assert class_names(dataset, 5) == {k: str(k) for k in range(5)}
    assert empty_classes_note(dataset, class_names(dataset, 3)) is None
    note = empty_classes_note(dataset, class_names(dataset, 5))
    assert note == "warning: no image of 2 of 5 classes, which will be noise when sampled: 3, 4"
    with pytest.raises(ValueError, match="model.num_classes is 2, but the data's labels go from 0 to 2"):
        class_names(dataset, 2)
