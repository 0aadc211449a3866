"""Encode a data set once, into latent shards for train_dit/train.py.

    accelerate launch train_dit/extract_latents.py --vae runs/vtp-openmoji/vae --output_dir runs/latents-openmoji \\
        --data.source openmoji --data.resolution 128 --copies 16 --augmentation.shift 4
    accelerate launch train_dit/extract_latents.py --vae vtp-large --output_dir latents/vtp-large \\
        --data.source imagenet --data.resolution 256 --mixed_precision bf16 --compile --num_workers 12
    python train_dit/extract_latents.py --vae vtp-large --output_dir latents/mine --data.source FOLDER \\
        --data.resolution 256

The same command continues after the last complete shard, with any number of processes. `--copies N` writes N copies of
an image: the first unchanged, the others changed as --augmentation says (an image of weight w gets round(N·w) copies,
at least one). Latents of the mirror images are always written too. Shards hold raw latents. latents.json, written
last, after all shards are verified, holds their statistics and origin; `pipelines/convert.py vtp --latent-statistics`
reads it. Upstream's loader reads the folder too, with the statistics in latents_stats.pt. On a GPU, --dtype bfloat16
with --mixed_precision bf16 --compile --num_workers 12 is fastest.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vtp_diffusion.data.batches import NUM_DRAWS, AugmentationConfig, ReadableBatches, augment_images
from vtp_diffusion.data.channel_statistics import ChannelStatistics
from vtp_diffusion.data.image_datasets import open_dataset
from vtp_diffusion.data.image_files import CROP
from vtp_diffusion.data.images import from_uint8
from vtp_diffusion.data.latent_shards import (
    LATENT_DTYPES,
    METADATA_NAME,
    LatentDataset,
    begin_extraction,
    check_shard,
    is_finished,
    read_hashes,
    read_skipped,
    verify_shard,
    write_metadata,
    write_shard,
    write_statistics,
)
from vtp_diffusion.data.openmoji import LICENSE, read_attribution
from vtp_diffusion.generation.latent_inputs import latent_shape
from vtp_diffusion.generation.pipeline_checks import check_distinct_names
from vtp_diffusion.models.image_size import EncodedDataConfig, settle_resolution
from vtp_diffusion.models.latent_space import autoencoder_identity, encode_raw
from vtp_diffusion.models.loading import load_autoencoder
from vtp_diffusion.runtime import folder_lock
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, config_to_dict, parse_config, setting
from vtp_diffusion.runtime.processes import gather_objects, join_processes
from vtp_diffusion.runtime.programs import print_end
from vtp_diffusion.runtime.reproducibility import autocast, stream_seed
from vtp_diffusion.training.compilation import compile_modules

Sample = tuple[int, int]  # image, copy
FREE = ("output_dir", "batch_size", "num_workers", "compile")  # settings that do not change the latents
# Of the data: images that are skipped are recorded, and the fingerprint has the orientation.
MAY_CHANGE = tuple(field.name for field in fields(EncodedDataConfig) if field.metadata["may_change"])


@dataclass(kw_only=True)
class Config(Settings):
    """Settings of this program."""

    vae: str = setting(help="folder of a diffusers autoencoder")
    output_dir: str = setting(help="folder for the shards")
    data: EncodedDataConfig = setting(default_factory=EncodedDataConfig)
    split: Literal["train", "validation", "all"] = setting("train", "split of the data")
    augmentation: AugmentationConfig = setting(default_factory=AugmentationConfig)
    copies: int | None = setting(
        None, "copies of an image of weight 1, all but the first augmented; none: 1, and no augmentation", at_least=1
    )
    batch_size: int = setting(128, "images encoded at a time", at_least=1)
    shard_size: int = setting(10_000, "latents a shard", at_least=1)
    dtype: Literal["float32", "float16", "bfloat16"] = setting("bfloat16", "precision of the shards")
    mixed_precision: Literal["no", "fp16", "bf16"] = setting("no", "precision of the encoder's matrix products")
    compile: bool = setting(False, "torch.compile the encoder, a VTP's block by block")
    num_workers: int = setting(0, "processes that read images ahead", at_least=0)
    seed: int = setting(0, "of the augmentation", at_least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.copies is None and self.augmentation != AugmentationConfig():
            raise ValueError(
                "augmentation is given without copies, expected --copies 2 or more: the first copy is never changed"
            )
        self.copies = self.copies or 1


def plan_samples(weights: list[float], copies: int) -> list[Sample]:
    """Every sample, in the order of the shards."""
    return [(index, copy) for index, weight in enumerate(weights) for copy in range(max(1, round(weight * copies)))]


def read_shards(config: Config, dataset, shards: list[list[Sample]], pinned: bool) -> Iterator[tuple]:
    """Iterator over the batches of all shards, for `encode_shard`; a batch never spans two shards."""
    batches = [
        [index for index, _ in samples[start : start + config.batch_size]]
        for samples in shards
        for start in range(0, len(samples), config.batch_size)
    ]
    options = {"num_workers": config.num_workers, "pin_memory": pinned}
    return iter(DataLoader(ReadableBatches(dataset), sampler=batches, batch_size=None, **options))


def compiled_encoder(vae) -> Callable:
    """`encode_raw`, compiled. Of an autoencoder that names its repeated blocks only these are, once for all alike:
    half a minute, where the whole unrolled encoder takes minutes."""
    if not vae._repeated_blocks:
        return torch.compile(encode_raw)
    compile_modules(vae, vae._repeated_blocks)
    return encode_raw


@torch.no_grad()
def encode_shard(config: Config, vae, encode, dataset, samples: list[Sample], batches: Iterator, bar) -> tuple:
    """Latents, mirrored latents and labels of one shard, and the keys of images that cannot be read."""
    parts, labels, skipped, dtype = ([], []), [], [], LATENT_DTYPES[config.dtype]
    for start in range(0, len(samples), config.batch_size):
        batch, (kept, images) = samples[start : start + config.batch_size], next(batches)
        bar.update(len(batch))
        skipped += [dataset.keys[index] for k, (index, _) in enumerate(batch) if k not in kept]
        if not kept:
            continue
        # encode all of them: another batch size would be compiled again
        images = changed_images(config, images, batch, vae.device)
        for latents, source in zip(parts, (images, images.flip(3)), strict=True):
            latents.append(encode(vae, source).to(dtype).cpu()[kept])
        labels += [dataset.labels[batch[k][0]] for k in kept]
    if not labels:
        raise ValueError(f"none of the {len(samples)} images of a shard can be read, the first is {skipped[0]}")
    return torch.cat(parts[0]), torch.cat(parts[1]), torch.tensor(labels), skipped


def changed_images(config: Config, images: torch.Tensor, samples: list[Sample], device) -> torch.Tensor:
    """uint8 images (B, 3, R, R) -> float32 in [-1, 1] on the device, all copies but the first changed."""
    images = images.to(device, non_blocking=True)
    plain = from_uint8(images)
    if all(copy == 0 for _, copy in samples):
        return plain
    # drawn on the CPU and keyed by the sample: the same on every device and for any number of processes
    generators = [torch.Generator().manual_seed(stream_seed("copies", config.seed, *sample)) for sample in samples]
    draws = torch.stack([torch.rand(NUM_DRAWS, generator=generator) for generator in generators]).to(device)
    first = torch.tensor([copy == 0 for _, copy in samples], device=device)[:, None, None, None]
    return torch.where(first, plain, augment_images(images, config.augmentation, draws=draws))


def encode_missing(
    config: Config, accelerator, vae, dataset, shards: list[list[Sample]], paths: list[Path]
) -> tuple[list[int], list[int]]:
    """Write this process's share of the missing shards. Returns the indices of the shards that this process found and
    checked, and of those that it wrote."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    written = [path.is_file() for path in paths]
    found = [k for k, there in enumerate(written) if there][rank::processes]
    for k in found:
        check_shard(paths[k], len(shards[k]), LATENT_DTYPES[config.dtype])
    accelerator.wait_for_everyone()  # all have listed the shards before any writes one
    todo = [k for k, there in enumerate(written) if not there][rank::processes]
    count = sum(len(shards[k]) for k in todo)
    encode = compiled_encoder(vae) if config.compile else encode_raw
    batches = read_shards(config, dataset, [shards[k] for k in todo], pinned=accelerator.device.type == "cuda")
    bar = tqdm(total=count, desc="encoding", disable=not accelerator.is_main_process)
    with bar, ThreadPoolExecutor(1) as writer:  # a shard is written while the next one is encoded
        writing = None
        for k in todo:
            with autocast(accelerator.device, config.mixed_precision):
                shard = encode_shard(config, vae, encode, dataset, shards[k], batches, bar)
            if writing is not None:
                writing.result()
            writing = writer.submit(write_shard, paths[k], *shard, first=k * config.shard_size)
        if writing is not None:
            writing.result()
    return found, todo


def verify(
    dataset, shards: list[list[Sample]], paths: list[Path], found: list[int], written: list[int]
) -> list[tuple[ChannelStatistics, list[str], int]]:
    """(statistics, keys of skipped images, count) of every shard, verified by the process that found or wrote it."""
    own = {}
    for k in (*found, *written):
        skipped = read_skipped(paths[k])
        missing = set(skipped)
        labels = [dataset.labels[index] for index, _ in shards[k] if dataset.keys[index] not in missing]
        own[k] = verify_shard(paths[k], labels, checked=k in found), skipped, len(labels)
    every = {k: value for part in gather_objects(own) for k, value in part.items()}
    return [every[k] for k in range(len(paths))]


def named_briefly(names: list[str]) -> str:
    """Names of classes in a line, with a hash of all of them."""
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    return f"{len(names)} from {names[0]} to {names[-1]} ({digest[:8]})"


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    accelerator, folder = join_processes(), Path(config.output_dir)
    if accelerator.is_main_process:
        folder_lock.check_free(folder)
    if config.dtype != "float32":
        torch.set_float32_matmul_precision("high")  # TF32 is more precise than the latents' dtype
    vae = load_autoencoder(config.vae)
    identity = autoencoder_identity(vae)
    vae.to(accelerator.device)
    settle_resolution(config.data, vae)
    latent_shape(vae, config.data.resolution)  # refuses images that don't suit the autoencoder, before any is read
    dataset = open_dataset(config.data, config.split, advice=". --split all takes all images")
    check_distinct_names(dict(enumerate(dataset.label_names)), f"data.source {config.data.source}")  # as train.py does
    samples = plan_samples(dataset.weights.tolist(), config.copies)
    shards = [samples[start : start + config.shard_size] for start in range(0, len(samples), config.shard_size)]
    settings = {key: value for key, value in config_to_dict(config).items() if key not in FREE}
    for name in MAY_CHANGE:
        settings["data"].pop(name)
    plan = settings | {"vae": identity, "fingerprint": dataset.training_fingerprint, "num_samples": len(samples)}
    plan["classes"] = named_briefly(dataset.label_names)  # a fingerprint of OpenMoji and other styles lacks them
    if accelerator.is_main_process:
        begin_extraction(folder, plan, dataset.older_fingerprints)
    accelerator.wait_for_everyone()

    paths = [folder / f"latents_{index:05d}.safetensors" for index in range(len(shards))]
    finished = gather_objects(accelerator.is_main_process and is_finished(folder, paths))[0]
    if not finished:
        found, written = encode_missing(config, accelerator, vae, dataset, shards, paths)
        verified = verify(dataset, shards, paths, found, written)
    if accelerator.is_main_process:
        if finished:
            print(f"{folder} is finished: every shard has the SHA-256 in {METADATA_NAME}. No shard was read again")
        else:
            identity |= autoencoder_identity(vae, decoder=False)
            finish(config, folder, dataset, paths, verified, identity)
        folder_lock.release(folder, remove=True)  # a finished folder should hold only latents
    accelerator.end_training()


def finish(config: Config, folder: Path, dataset, paths: list[Path], verified: list[tuple], identity: dict) -> None:
    """Write the statistics and last latents.json, which marks the folder as complete. `verified`: from `verify`."""
    LatentDataset(folder, unfinished=True)  # refuses shards of another shape or dtype, and other programs' shards
    mean, std = ChannelStatistics.merged(statistics for statistics, _, _ in verified).result()
    skipped = set(dataset.skipped).union(*(keys for _, keys, _ in verified))
    total = sum(count for _, _, count in verified)
    metadata = {
        "autoencoder": identity,
        "num_samples": total,
        "num_images": len(set(dataset.keys) - skipped),
        "dtype": config.dtype,
        "mixed_precision": config.mixed_precision,
        "resolution": config.data.resolution,
        "crop": CROP,
        "data": config_to_dict(config.data) | {"split": config.split, "fingerprint": dataset.fingerprint},
        "augmentation": vars(config.augmentation if config.copies > 1 else AugmentationConfig()),
        "copies": config.copies,
        "seed": config.seed,
        "skipped": sorted(skipped),
        "label_names": dataset.label_names,
        "license": LICENSE if config.data.source == "openmoji" else None,
        "attribution": read_attribution(config.data.resolution, config.data.cache_dir)
        if config.data.source == "openmoji"
        else None,
        "shards": {path.name: count for path, (_, _, count) in zip(paths, verified, strict=True)},
        "hashes": read_hashes(paths),
        "mean": mean,
        "std": std,
    }
    metadata["data"].pop("cache_dir")
    write_statistics(folder, mean, std)
    write_metadata(folder, metadata)
    print(f"{folder}: {total} latents, {len(skipped)} images skipped, {METADATA_NAME} written")
    print(f"over channels: mean {min(mean):.3f} to {max(mean):.3f}, deviation {min(std):.3f} to {max(std):.3f}")
    then = "train_dit/train.py --config NAME --vae {} --latents {} --output_dir runs/dit --validation.labels 0"
    print_end([folder], then, config.vae, folder)


if __name__ == "__main__":
    run(main)
