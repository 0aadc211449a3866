"""What a LightningDiT is trained on, raw latents and labels: read from shards, or encoded from images in every step.

Either way half of the samples can be mirror images, and everything random is keyed by the position in the run.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..data.batches import (
    NUM_DRAWS,
    AugmentationConfig,
    Columns,
    ReusedMemory,
    StepBatchSampler,
    all_columns,
    augment_images,
    collate_images,
    fits_on_device,
    gathered_batches,
    read_ahead,
    read_batches,
)
from ..data.image_datasets import DataConfig, ImageDataset
from ..data.image_files import CROP, first_names
from ..data.images import to_device
from ..data.latent_shards import LatentDataset
from ..data.openmoji import LICENSE, read_attribution
from ..models.latent_space import (
    autoencoder_identity,
    check_latents_fit,
    encode_raw,
    latent_statistics,
)
from ..runtime.processes import print_once
from ..runtime.random_reads import available_memory
from ..runtime.reproducibility import autocast, draw_for_positions

if TYPE_CHECKING:
    from diffusers import ModelMixin

# random streams of `draw_for_positions`; stream 0 is the noise's
FLIP_STREAM, AUGMENTATION_STREAM = 1, 2


def draw_flips(sampler: StepBatchSampler, step: int, random_flip: bool) -> np.ndarray:
    """Which samples of a micro-step are mirrored, (B,) bool: half of them, or none.

    Drawn on the CPU, where they decide what is read.
    """
    if not random_flip:
        return np.zeros(sampler.batch_size, dtype=bool)
    drawn = draw_for_positions(
        lambda n, g: {"flip": torch.rand(n, generator=g)}, sampler.positions(step), sampler.seed, FLIP_STREAM
    )
    return (drawn["flip"] < 0.5).numpy()


def micro_steps(sampler: StepBatchSampler) -> range:
    """The micro-steps that iterating over a sampler gives, which `draw_flips` and `StepBatchSampler.batch` take."""
    return range(sampler.start_step, sampler.start_step + len(sampler))


def stored_latents(
    dataset: LatentDataset,
    sampler: StepBatchSampler,
    random_flip: bool,
    device: torch.device,
    keep_on_device: bool | None = None,
    num_threads: int = 0,
) -> Iterator[Columns]:
    """Batches of raw `latents` (B, C, h, w), as stored, and `labels` (B,) on the device."""
    steps = micro_steps(sampler)
    if fits_on_device(dataset.num_bytes, device, keep_on_device):
        columns = dataset.__getitems__(list(range(len(dataset))))
        for step, batch in zip(steps, gathered_batches(columns, sampler, device), strict=True):
            flips = to_device(torch.from_numpy(draw_flips(sampler, step, random_flip)), device)
            latents = torch.where(flips[:, None, None, None], batch["latents_flip"], batch["latents"])
            yield {"latents": latents, "labels": batch["labels"]}
        return
    if dataset.num_bytes > (free := available_memory()):
        print_once(
            f"{dataset.folder} holds {dataset.num_bytes / 2**30:,.1f} GiB of latents, {free / 2**30:,.1f} GiB of "
            "memory are available: most rows come from the disk, whose random reads may limit the speed of training"
        )
    # pinned memory is kept for the next batch by torch itself
    take = functools.partial(torch.empty, pin_memory=True) if device.type == "cuda" else ReusedMemory().take
    jobs = (
        (indices, draw_flips(sampler, step, random_flip), take((len(indices), *dataset.shape), dtype=dataset.dtype))
        for step, indices in zip(steps, sampler, strict=True)
    )
    for batch in read_ahead(lambda job: dataset.read(*job), jobs, num_threads):
        yield {"latents": batch["latents"].to(device, non_blocking=True), "labels": to_device(batch["labels"], device)}


class OnlineLatents:
    """Latents of images that are encoded during training, so that an image can be augmented differently every time.

    Training uses it like a `LatentDataset`.

    Args:
        images: the data set.
        vae: the autoencoder, frozen.
        config: of the images.
        augmentation: of the images, besides mirroring, which `batches` is told.
    Attributes: `shape`, `id2label`, `metadata`, `weights`, `fingerprint` and `older_fingerprints`, as those of
        `LatentDataset`.
    Raises: ValueError if the autoencoder does not take images of this size.
    """

    def __init__(self, images: ImageDataset, vae: ModelMixin, config: DataConfig, augmentation: AugmentationConfig):
        self.images, self.vae, self.augmentation = images, vae, augmentation
        self.shape = latent_shape(vae, config.resolution)
        self.weights = images.weights
        self.id2label = dict(enumerate(images.label_names))
        openmoji = config.source == "openmoji"
        self.metadata = {
            "license": LICENSE if openmoji else None,
            "attribution": read_attribution(config.resolution, config.cache_dir) if openmoji else None,
            "data": vars(config) | {"split": "train", "fingerprint": images.fingerprint},
        }
        identity = autoencoder_identity(vae)

        def fingerprint(name: str) -> str:
            origin = json.dumps({"images": name, "autoencoder": identity}, sort_keys=True)
            return hashlib.sha256(origin.encode()).hexdigest()[:16]

        self.fingerprint = fingerprint(images.training_fingerprint)
        self.older_fingerprints = [fingerprint(name) for name in images.older_fingerprints]

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self,
        sampler: StepBatchSampler,
        random_flip: bool,
        device: torch.device,
        keep_on_device: bool | None = None,
        num_workers: int = 0,
        precision: str = "no",
        compiled: bool = False,
    ) -> Iterator[Columns]:
        """Batches of raw `latents` (B, C, h, w), float32, and `labels` (B,) on the device, where the autoencoder is.

        Args:
            precision: of the autoencoder, see `autocast`.
            compiled: torch.compile the autoencoder's pass.
        """
        encode = torch.compile(encode_raw) if compiled else encode_raw
        pixels = len(self.images) * 3 * self.images.resolution**2
        collate = functools.partial(collate_images, columns=("image", "label"))
        if fits_on_device(pixels, device, keep_on_device):
            batches = gathered_batches(all_columns(self.images, collate), sampler, device)
        else:
            batches = read_batches(self.images, sampler, collate, device, num_workers)
        for step, batch in zip(micro_steps(sampler), batches, strict=True):
            images = self._changed(batch["image"], sampler, step, random_flip)
            with torch.no_grad(), autocast(device, precision):
                latents = encode(self.vae, images)
            yield {"latents": latents.float(), "labels": batch["label"]}

    def _changed(self, images: torch.Tensor, sampler: StepBatchSampler, step: int, random_flip: bool) -> torch.Tensor:
        """uint8 images (B, 3, R, R) -> augmented, float32 in [-1, 1]."""
        positions, seed = sampler.positions(step), sampler.seed
        drawn = draw_for_positions(
            lambda n, g: {"draws": torch.rand(n, NUM_DRAWS, generator=g)}, positions, seed, AUGMENTATION_STREAM
        )
        changed = augment_images(images, self.augmentation, draws=to_device(drawn["draws"], images.device))
        flips = to_device(torch.from_numpy(draw_flips(sampler, step, random_flip)), images.device)
        return torch.where(flips[:, None, None, None], changed.flip(3), changed)


@torch.no_grad()
def latent_shape(vae: ModelMixin, resolution: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of square images. Raises: ValueError if the autoencoder does not take that size."""
    blank = torch.zeros(1, 3, resolution, resolution, device=vae.device)
    try:
        return tuple(encode_raw(vae, blank).shape[1:])
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"data.resolution is {resolution}, which {type(vae).__name__} cannot encode: {error}"
        ) from error


def check_latents(dataset: LatentDataset, vae: ModelMixin, config: DataConfig | None) -> None:
    """Refuse latents that are not square, that another autoencoder made, or of images that were cropped otherwise.

    Args: `config`: of the images. Its resolution and orientation have to be those of the latents; its source is not
        compared, since shipped configurations name one. None: nothing is compared.
    Raises: ValueError naming what was found and what was expected, also if the autoencoder lacks its statistics.
    """
    channels, height, width = dataset.shape
    if height != width:
        raise ValueError(f"the latents in {dataset.folder} are {height}x{width}, expected square ones")
    expected = getattr(vae.config, "latent_channels", channels)
    if channels != expected:
        raise ValueError(f"the latents in {dataset.folder} have {channels} channels, the autoencoder's {expected}")
    check_latents_fit(dataset.folder, dataset.metadata, vae)
    latent_statistics(vae)  # refuses an autoencoder that should have them and does not
    if config is None:
        return
    recorded = (dataset.metadata or {}).get("data", {}) | (dataset.metadata or {})
    orientation = ("exif_orientation", config.exif_orientation)
    for name, wanted in (("resolution", config.resolution), ("crop", CROP), orientation):
        found = recorded.get(name, wanted)  # upstream's shards don't say
        if found != wanted:
            raise ValueError(f"the latents in {dataset.folder} have {name} {found}, the configuration says {wanted}")
    shape = latent_shape(vae, config.resolution)
    if dataset.shape != shape:
        raise ValueError(
            f"the latents in {dataset.folder} are {dataset.shape}, of images of {config.resolution} pixels (the "
            f"configuration's data.resolution) the autoencoder makes {shape}"
        )


def empty_classes_note(dataset: LatentDataset | OnlineLatents, names: dict[int, str]) -> str | None:
    """A line for classes of which nothing is trained on: a generator would draw them all the same."""
    labels = dataset.images.labels if isinstance(dataset, OnlineLatents) else dataset.labels.unique().tolist()
    empty = [names[index] for index in sorted(set(names).difference(labels))]
    if not empty:
        return None
    which = f"{len(empty)} of {len(names)} classes, which will be noise when sampled: {first_names(empty)}"
    return f"warning: no image of {which}"


def class_names(dataset: LatentDataset | OnlineLatents, num_classes: int | None) -> dict[int, str]:
    """Class index -> name for a generator of `num_classes` classes; None: as many as the data has.

    Raises: ValueError if the data has more classes.
    """
    names = dataset.id2label
    if num_classes is None or num_classes == len(names):
        return names
    if num_classes < len(names):
        raise ValueError(f"model.num_classes is {num_classes}, but the data's labels go from 0 to {len(names) - 1}")
    return {index: names.get(index, str(index)) for index in range(num_classes)}
