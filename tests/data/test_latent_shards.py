"""Latent shards: writing, reading, refusing, statistics; what an autoencoder's raw latents are."""

import json
import pickle
import resource
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.data.channel_statistics import ChannelStatistics
from vtp_diffusion.data.latent_shards import (
    METADATA_NAME,
    PLAN_NAME,
    LatentDataset,
    read_skipped,
    verify_shard,
    write_metadata,
    write_shard,
    write_statistics,
)
from vtp_diffusion.models.latent_space import autoencoder_identity, check_latents_fit, encode_raw, latent_statistics

SHAPE = (4, 2, 3)
NAMES = ["cat", "dog", "fish"]


def random(count, seed, dtype=torch.bfloat16, shape=SHAPE):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write(folder, counts=(5, 3), **changes):
    """Shards of upstream's layout and name; returns everything in them."""
    folder.mkdir(exist_ok=True)
    parts = []
    for index, count in enumerate(counts):
        shard = {"latents": random(count, index), "latents_flip": random(count, 10 + index)}
        parts.append(shard | {"labels": torch.arange(count) % len(NAMES)})
        save_file(parts[-1] | changes, folder / f"latents_rank00_shard{index:03d}.safetensors")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def complete(folder, count=8):
    metadata = {"autoencoder": {}, "num_samples": count, "label_names": NAMES, "mean": [0.0], "std": [1.0]}
    write_metadata(folder, metadata)
    return metadata


def vtp(seed=0, **changes):
    torch.manual_seed(seed)
    sides = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             (("hidden_size", 16), ("num_layers", 1), ("num_attention_heads", 2))}  # fmt: skip
    settings = {"sample_size": 16, "patch_size": 8, "latent_channels": 4, "rope_dtype": "float32"}
    return AutoencoderVTP(**sides | settings | changes).eval()


def kl(**changes):
    torch.manual_seed(0)
    settings = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4, "sample_size": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**settings | blocks | changes).eval()


def dc(**changes):
    torch.manual_seed(0)
    sides = ("encoder", "decoder")
    settings = {"latent_channels": 4, "attention_head_dim": 4}
    settings |= {f"{side}_block_types": ("ResBlock",) * 2 for side in sides}
    settings |= {f"{side}_block_out_channels": (4, 4) for side in sides}
    settings |= {f"{side}_layers_per_block": (1, 1) for side in sides}
    settings |= {f"{side}_qkv_multiscales": ((), ()) for side in sides}
    return AutoencoderDC(**settings | changes).eval()


def rae(**changes):
    pytest.importorskip("transformers")  # its encoder
    from diffusers import AutoencoderRAE

    torch.manual_seed(0)
    encoder = {"hidden_size": 64, "patch_size": 8, "num_hidden_layers": 1, "input_size": 16}
    decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    settings = {f"encoder_{key}": value for key, value in encoder.items()}
    settings |= {f"decoder_{key}": value for key, value in decoder.items()}
    return AutoencoderRAE(**settings | {"patch_size": 8} | changes).eval()


def pictures(count=2):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


# --- reading ---


def test_upstream_shards(tmp_path):
    everything = write(tmp_path)
    dataset = LatentDataset(tmp_path)
    assert len(dataset) == 8 and dataset.shape == SHAPE and dataset.metadata is None
    assert dataset.id2label == {0: "0", 1: "1", 2: "2"} and dataset.labels.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert dataset.num_bytes == 2 * 8 * 24 * 2
    order = [7, 0, 5, 4, 0]  # both shards, out of order, one twice
    batch = dataset.__getitems__(order)
    assert all(torch.equal(batch[name], everything[name][order]) for name in everything)
    assert torch.equal(dataset[6]["latents"], everything["latents"][6]) and dataset[6]["labels"] == 1
    assert batch["latents"].dtype == torch.bfloat16 and batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("index", [-1, 8])
def test_indices_out_of_range(index, tmp_path):
    write(tmp_path)
    with pytest.raises(IndexError, match="of 8 latents"):
        LatentDataset(tmp_path).__getitems__([0, index])


def test_our_shards_bring_names(tmp_path):
    write(tmp_path)
    metadata = complete(tmp_path)
    dataset = LatentDataset(tmp_path)
    assert dataset.id2label == dict(enumerate(NAMES)) and dataset.metadata == metadata


def test_worker_processes_read_the_same(tmp_path):
    everything = write(tmp_path)
    dataset = LatentDataset(tmp_path)
    assert pickle.loads(pickle.dumps(dataset))._open == {}
    loader = DataLoader(dataset, batch_sampler=[[0, 6], [5, 1]], num_workers=1, collate_fn=dict)
    batches = list(loader)
    assert torch.equal(torch.cat([batch["latents"] for batch in batches]), everything["latents"][[0, 6, 5, 1]])


def test_the_fingerprint_tells_the_files(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    write(tmp_path / "c", (5, 4))
    write(tmp_path / "d", latents=random(5, 7), counts=(5,))
    write(tmp_path / "e", latents=random(5, 8), counts=(5,))
    a, b, c, d, e = (LatentDataset(tmp_path / name).fingerprint for name in "abcde")
    assert a == b != c and d != e


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="holds no latent shards"):
        LatentDataset(tmp_path)


def test_an_unfinished_extraction_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / PLAN_NAME).write_text("{}")
    with pytest.raises(ValueError, match="has not finished: run the same command again"):
        LatentDataset(tmp_path)
    assert len(LatentDataset(tmp_path, unfinished=True)) == 8
    complete(tmp_path)
    assert len(LatentDataset(tmp_path)) == 8


@pytest.mark.parametrize("kept", [0.5, 0.01])
def test_a_truncated_shard_is_named(kept, tmp_path):
    write(tmp_path)
    path = tmp_path / "latents_rank00_shard001.safetensors"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match="shard001.safetensors is not a complete safetensors file"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_flip": random(4, 0)}, r"shard000.*latents_flip \[4, 4, 2, 3\]"),
        ({"latents_flip": random(5, 0, torch.float32)}, "latents_flip .* in F32"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels \[4\]"),
        ({"labels": torch.zeros(5)}, "labels are F32, expected I64 or I32"),
        ({"labels": torch.tensor([0, 1, -1, 0, 0])}, "labels go from -1 to 1, expected 0"),
        ({"latents": torch.zeros(5, 4, 6)}, r"expected \(N, C, h, w\) in 16 or 32 bits"),
        ({"latents": torch.zeros(5, *SHAPE, dtype=torch.float64)}, r"expected \(N, C, h, w\) in 16 or 32 bits"),
    ],
)
def test_shards_that_do_not_fit_together(changes, message, tmp_path):
    write(tmp_path, (5,), **changes)
    with pytest.raises(ValueError, match=message):
        LatentDataset(tmp_path)


def test_mixed_shards_and_missing_keys(tmp_path):
    write(tmp_path)
    other = {name: random(3, 0, shape=(4, 3, 3)) for name in ("latents", "latents_flip")}
    save_file(other | {"labels": torch.zeros(3, dtype=torch.int64)}, tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match=r"z.safetensors holds latents \(4, 3, 3\) in BF16, .*holds \(4, 2, 3\)"):
        LatentDataset(tmp_path)
    save_file({"latents": random(3, 0)}, tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match="z.safetensors lacks labels, latents_flip; it holds latents"):
        LatentDataset(tmp_path)


def test_what_latents_json_promises_is_checked(tmp_path):
    write(tmp_path)
    complete(tmp_path, count=9)
    with pytest.raises(ValueError, match="holds 8 latents, latents.json says 9"):
        LatentDataset(tmp_path)
    metadata = complete(tmp_path)
    (tmp_path / METADATA_NAME).write_text(json.dumps(metadata | {"label_names": NAMES[:2]}))
    with pytest.raises(ValueError, match="labels go from 0 to 2, expected 0 to 1"):
        LatentDataset(tmp_path)


def test_one_of_the_two_latents_is_read(tmp_path):
    everything = write(tmp_path)
    dataset, order = LatentDataset(tmp_path), [7, 0, 5, 4, 0]
    mirrored = np.array([True, False, True, False, True])
    batch = dataset.read(order, mirrored)
    for k, (index, flip) in enumerate(zip(order, mirrored, strict=True)):
        assert torch.equal(batch["latents"][k], everything["latents_flip" if flip else "latents"][index])
    assert torch.equal(batch["labels"], everything["labels"][order])


# --- shards that are missing or double ---


def write_ours(folder, counts=(3, 3, 2)):
    starts = [sum(counts[:k]) for k in range(len(counts))]
    for k, (first, count) in enumerate(zip(starts, counts, strict=True)):
        labels = torch.arange(first, first + count) % len(NAMES)
        path = folder / f"latents_{k:05d}.safetensors"
        write_shard(path, random(count, k), random(count, 10 + k), labels, first=first)
    names = {path.name: count for path, count in zip(sorted(folder.glob("latents_*")), counts, strict=True)}
    metadata = complete(folder, sum(counts)) | {"shards": names}
    write_metadata(folder, metadata)
    return metadata


def test_missing_foreign_and_double_shards_of_ours_are_named(tmp_path):
    write_ours(tmp_path)
    assert len(LatentDataset(tmp_path)) == 8
    first, second, third = sorted(tmp_path.glob("latents_*"))
    third.rename(tmp_path / "kept")
    with pytest.raises(ValueError, match="shards are missing: latents_00002.safetensors"):
        LatentDataset(tmp_path)
    (tmp_path / "kept").rename(third)
    shutil.copy(first, tmp_path / "latents_00003.safetensors")
    with pytest.raises(ValueError, match="shards are not in latents.json: latents_00003.safetensors"):
        LatentDataset(tmp_path)
    (tmp_path / "latents_00003.safetensors").rename(second)
    with pytest.raises(ValueError, match="latents_00001.* begins with sample 0, expected 3: it is there twice"):
        LatentDataset(tmp_path)
    shutil.copy(third, second)
    with pytest.raises(ValueError, match="hold other counts of latents: latents_00001.safetensors"):
        LatentDataset(tmp_path)


def test_a_damaged_latents_json_is_named(tmp_path):
    metadata = write_ours(tmp_path)
    (tmp_path / METADATA_NAME).write_text("{")
    with pytest.raises(ValueError, match="latents.json is not JSON"):
        LatentDataset(tmp_path)
    write_metadata(tmp_path, {key: value for key, value in metadata.items() if key != "label_names"})
    with pytest.raises(ValueError, match="latents.json lacks label_names: expected what"):
        LatentDataset(tmp_path)


def test_a_gap_shows_without_latents_json_too(tmp_path):
    write_ours(tmp_path)
    (tmp_path / METADATA_NAME).unlink()
    (tmp_path / "latents_00001.safetensors").unlink()
    with pytest.raises(ValueError, match="latents_00002.* sample 6, expected 3: a shard before it is missing"):
        LatentDataset(tmp_path)


def test_a_double_shard_of_upstream_is_named(tmp_path):
    write(tmp_path, (5, 5, 3))
    middle = tmp_path / "latents_rank00_shard001.safetensors"
    shutil.copy(tmp_path / "latents_rank00_shard000.safetensors", middle)
    with pytest.raises(ValueError, match="shard001.* holds the same latents as latents_rank00_shard000.* there twice"):
        LatentDataset(tmp_path)


# --- writing ---


def test_a_shard_is_written_whole_or_not_at_all(tmp_path):
    labels = torch.arange(5)
    write_shard(tmp_path / "a.safetensors", random(5, 0), random(5, 1), labels, ["x.png"])
    assert read_skipped(tmp_path / "a.safetensors") == ["x.png"]
    assert torch.equal(LatentDataset(tmp_path)[3]["latents_flip"], random(5, 1)[3])
    broken = random(5, 2)
    broken[2, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="b.safetensors: latents_flip in torch.bfloat16 hold values .* not finite"):
        write_shard(tmp_path / "b.safetensors", random(5, 0), broken, labels)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    write(tmp_path / "upstream")
    assert read_skipped(tmp_path / "upstream" / "latents_rank00_shard000.safetensors") == []


def test_a_full_disk_leaves_the_shards_that_are_there_and_names_the_next(tmp_path):
    labels, before = torch.arange(5) % len(NAMES), resource.getrlimit(resource.RLIMIT_FSIZE)
    write_shard(tmp_path / "a.safetensors", random(5, 0), random(5, 1), labels)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        for name, write_it in (
            ("b.safetensors", lambda: write_shard(tmp_path / "b.safetensors", random(5, 0), random(5, 1), labels)),
            ("latents_stats.pt", lambda: write_statistics(tmp_path, [0.0], [1.0])),
            (METADATA_NAME, lambda: complete(tmp_path)),
        ):
            with pytest.raises(OSError, match=f"{name} could not be written: .*File too large"):
                write_it()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["a.safetensors"]
    complete(tmp_path, 5)
    assert len(LatentDataset(tmp_path)) == 5


def test_verification_measures_what_it_read(tmp_path):
    """Shards without moments are measured, others say what they hold, and all are merged to the statistics of all."""
    everything, parts = write(tmp_path), []
    for k, rows in enumerate((slice(0, 5), slice(5, 8))):
        upstream, ours = tmp_path / f"latents_rank00_shard{k:03d}.safetensors", tmp_path / f"ours_{k}.safetensors"
        tensors = [everything[name][rows] for name in ("latents", "latents_flip", "labels")]
        write_shard(ours, *tensors)
        parts.append([verify_shard(path, tensors[2].tolist()).moments() for path in (upstream, ours)])
        assert parts[k][0] == parts[k][1]
    mean, std = ChannelStatistics.merged(ChannelStatistics.from_moments(part[0]) for part in parts).result()
    both = torch.cat([everything["latents"], everything["latents_flip"]]).double().transpose(0, 1).flatten(1)
    assert torch.allclose(torch.tensor(mean).double(), both.mean(1))
    assert torch.allclose(torch.tensor(std).double(), both.std(1, unbiased=False))


def test_verification_refuses(tmp_path):
    labels, first = write(tmp_path, (5,))["labels"].tolist(), tmp_path / "latents_rank00_shard000.safetensors"
    for wrong in (labels[:4], [*labels[:4], 7]):
        with pytest.raises(ValueError, match="shard000.safetensors holds other labels than the data set gives"):
            verify_shard(first, wrong)
    broken = random(5, 0)
    broken[0] = float("nan")
    write(tmp_path, (5,), latents=broken)
    with pytest.raises(ValueError, match="shard000.safetensors: latents hold values that are not finite"):
        verify_shard(first, labels)
    write_shard(tmp_path / "a.safetensors", random(5, 0), random(5, 1), torch.tensor(labels))
    content = bytearray((tmp_path / "a.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="a.safetensors is damaged"):
        verify_shard(tmp_path / "a.safetensors", labels)


# --- autoencoders ---


def test_raw_latents_of_vtp_do_not_depend_on_its_statistics():
    plain, images = vtp(), pictures()
    normalising = vtp().with_latent_statistics([1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 2.0, 4.0])
    with torch.no_grad():
        raw = encode_raw(plain, images)
        assert torch.equal(raw, plain.encode(images).latent)
        assert torch.allclose(encode_raw(normalising, images), raw, atol=1e-5)
        mean, std = latent_statistics(normalising)
        assert mean.shape == (1, 4, 1, 1)
        assert torch.allclose((raw - mean) / std, normalising.encode(images).latent, atol=1e-5)
    with pytest.raises(ValueError, match="the autoencoder has no latent statistics"):
        latent_statistics(plain)


def test_kl_and_dc_latents_are_shifted_and_scaled():
    images = pictures()
    vae = kl(scaling_factor=0.5, shift_factor=0.1)
    deep = dc(scaling_factor=0.25)
    with torch.no_grad():
        raw = encode_raw(vae, images)
        assert torch.equal(raw, vae.encode(images).latent_dist.mode())
        mean, std = latent_statistics(vae)
        assert torch.allclose((raw - mean) / std, (raw - 0.1) * 0.5)
        raw = encode_raw(deep, images)
        assert torch.equal(raw, deep.encode(images).latent)
        mean, std = latent_statistics(deep)
        assert torch.allclose((raw - mean) / std, raw * 0.25)


def test_rae_takes_images_from_zero_to_one_and_normalises_itself():
    vae, images = rae(scaling_factor=0.5), pictures()
    with torch.no_grad():
        raw = encode_raw(vae, images)
        assert torch.equal(raw, vae.encode(images / 2 + 0.5).latent)
        mean, std = latent_statistics(vae)
        assert torch.equal((raw - mean) / std, raw)  # the pipeline decodes them as they come
    identity = autoencoder_identity(vae)
    vae.register_to_config(scaling_factor=1.0)  # applied inside encode: other latents
    assert autoencoder_identity(vae) != identity


def test_the_identity_is_of_what_decides_raw_latents(tmp_path):
    vae = vtp()
    identity = autoencoder_identity(vae)
    assert identity == autoencoder_identity(vtp()) and identity["class"] == "AutoencoderVTP"
    assert identity == autoencoder_identity(vtp().with_latent_statistics([0.0] * 4, [2.0] * 4))
    assert identity == autoencoder_identity(vtp(sample_size=32))
    vae.to(torch.bfloat16).save_pretrained(tmp_path)  # as a pipeline may be shipped
    assert identity == autoencoder_identity(AutoencoderVTP.from_pretrained(tmp_path))
    assert identity["weights"] != autoencoder_identity(vtp(seed=1))["weights"]
    other = autoencoder_identity(vtp(rope_dtype="bfloat16"))
    assert identity["weights"] == other["weights"] and identity["config"] != other["config"]
    assert autoencoder_identity(kl(scaling_factor=0.5)) == autoencoder_identity(kl(scaling_factor=1.0))


def test_latents_of_another_autoencoder_are_refused(tmp_path):
    metadata = {"autoencoder": autoencoder_identity(vtp())}
    check_latents_fit("l", metadata, vtp())
    check_latents_fit("l", None, vtp())  # upstream's shards say nothing
    kl().save_pretrained(tmp_path)
    message = (
        f"in l were made by another autoencoder than that in {tmp_path}: its class is AutoencoderVTP, not Autoenc"
    )
    with pytest.raises(ValueError, match=message):
        check_latents_fit("l", metadata, AutoencoderKL.from_pretrained(tmp_path))


def test_latents_fit_an_autoencoder_with_another_decoder():
    metadata = {"autoencoder": autoencoder_identity(vtp()) | autoencoder_identity(vtp(), decoder=False)}
    other = vtp()
    other.decoder.proj_out.weight.data.add_(1.0)
    check_latents_fit("l", metadata, other)
    with pytest.raises(
        ValueError, match="another encoder than that in memory: the weights of the encoder differ. Give"
    ):
        check_latents_fit("l", metadata, vtp(seed=1))
    del metadata["autoencoder"]["encoder"]  # as before it was written
    with pytest.raises(
        ValueError,
        match="another autoencoder than that in memory: the weights of the autoencoder differ.* extract them again",
    ):
        check_latents_fit("l", metadata, other)


def test_statistics_on_a_device_without_float64():
    class OnMps(torch.Tensor):
        """As on a GPU of Apple, which has no float64."""

        device = torch.device("mps")

        def double(self):
            raise TypeError("the MPS framework doesn't support float64")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    values, expected, statistics = random(5, 0, torch.float32), ChannelStatistics(), ChannelStatistics()
    expected.update(values)
    statistics.update(values.as_subclass(OnMps))
    assert statistics.result() == expected.result()
