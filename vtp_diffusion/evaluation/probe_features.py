"""Features of a frozen encoder for a whole data set, computed once and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ..data.batches import READ_AHEAD, ReadableBatches
from ..data.image_datasets import ImageDataset
from ..data.images import from_uint8
from ..models.latent_space import autoencoder_identity
from ..runtime.config import setting_differences
from ..runtime.disk import read_json, remove_leftovers, replacing
from ..runtime.optional_packages import require
from ..runtime.reproducibility import stream_seed

if TYPE_CHECKING:
    from ..models.autoencoder_vtp import AutoencoderVTP

KEY_NAME = "key.json"  # written last: a folder that has it is complete
ARRAYS = ("class_tokens", "patch_means", "rows")


@dataclass
class ProbeFeatures:
    """Features of N images.

    Attributes:
        class_tokens: (N, L, D) float32, of the last L layers, shallow to deep, each after the final norm.
        patch_means: (N, D) float32, the last layer's patch tokens, averaged over positions.
        labels: (N,) int64.
        variants: (N,) bool, whether an image is a variant of another one; None: there are none.
    """

    class_tokens: np.ndarray
    patch_means: np.ndarray
    labels: torch.Tensor
    variants: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def without_variants(self) -> ProbeFeatures:
        """Without images that are variants of others (OpenMoji's skin tones), as in the reference of distances."""
        if self.variants is None or not bool(self.variants.any()):
            return self
        kept = ~self.variants
        arrays = (array[kept.numpy()] for array in (self.class_tokens, self.patch_means))
        return ProbeFeatures(*arrays, self.labels[kept])

    def inputs(self, layers: int, patches: bool, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """DINOv2's input (n, layers·D [+ D]) of a linear head, float32: the class tokens of the last `layers` layers,
        concatenated, followed by the mean patch token of the last layer if `patches`."""
        if not 1 <= layers <= self.class_tokens.shape[1]:
            raise ValueError(f"layers is {layers}, the features have the last {self.class_tokens.shape[1]}")
        rows = rows.numpy() if isinstance(rows, torch.Tensor) else rows
        parts = [self.class_tokens[rows, -layers:].reshape(-1, layers * self.class_tokens.shape[2])]
        if patches:
            parts.append(self.patch_means[rows])
        return torch.from_numpy(np.concatenate(parts, axis=1))


def cached_features(
    folder: str | Path,
    model: AutoencoderVTP,
    dataset: ImageDataset,
    num_layers: int,
    batch_size: int,
    device: torch.device | str,
    progress: Callable[[int], Any] = lambda count: None,
    num_workers: int = 0,
) -> ProbeFeatures:
    """The features in a folder, memory-mapped; if the folder does not exist, they are computed first.

    Images that cannot be read are left out if the data set allows it. Labels are taken from the data set, not from the
    folder, so that one folder serves several labellings of the same images.

    Args:
        folder: for one data set and one model; it takes N·(num_layers + 1)·D·4 bytes.
        num_layers: number of last layers whose class tokens are kept.
        progress: called with the number of images just read.
        num_workers: processes that read images.
    Raises: ValueError: the folder holds features of another model or of other images, or something else.
    """
    folder = Path(folder)
    key = {"model": autoencoder_identity(model), "data": dataset.fingerprint}
    key |= {"num_images": len(dataset), "num_layers": num_layers}
    if folder.exists():
        _check_key(folder, key, dataset.older_fingerprints)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        try:
            with replacing(folder) as unfinished:
                unfinished.mkdir()
                _read(unfinished, key, model, dataset, batch_size, device, progress, num_workers)
        except OSError:
            if not (folder / KEY_NAME).is_file():
                raise
            _check_key(folder, key, dataset.older_fingerprints)  # another process was faster
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    rows = torch.from_numpy(np.array(arrays["rows"]))
    labels, variants = torch.tensor(dataset.labels)[rows], dataset.variants[rows]
    return ProbeFeatures(arrays["class_tokens"], arrays["patch_means"], labels, variants)


def random_views(dataset: ImageDataset, views: int, seed: int) -> ImageDataset:
    """Random resized crops of every image, half of them mirrored, as DINOv2 and VTP train probes on. The N·views items
    are ordered by image; view v of image i depends only on (seed, i, v)."""

    def repeated(values: Sequence) -> list:
        return [value for value in values for _ in range(views)]

    crops = f"{views} random crops of seed {seed}"
    return ImageDataset(
        references=[(value, index, view) for index, value in enumerate(dataset.references) for view in range(views)],
        read=_RandomCrop(dataset.read, dataset.resolution, seed),
        resolution=dataset.resolution,
        keys=[f"{key}, view {view}" for key in dataset.keys for view in range(views)],
        labels=repeated(dataset.labels),
        captions=repeated(dataset.captions),
        label_names=dataset.label_names,
        weights=dataset.weights.repeat_interleave(views),
        fingerprint=f"{dataset.fingerprint}-{crops}",
        skip_unreadable=dataset.skip_unreadable,
        variants=dataset.variants.repeat_interleave(views),
        older_fingerprints=[f"{known}-{crops}" for known in dataset.older_fingerprints],
    )


class _RandomCrop:
    """Reads (reference, image, view) as a crop; a class, because worker processes need to pickle it."""

    def __init__(self, read: Callable[[Any], Image.Image], size: int, seed: int):
        self.read, self.size, self.seed = read, size, seed

    def __call__(self, sample: tuple[Any, int, int]) -> Image.Image:
        reference, *place = sample
        image, crop = self.read(reference), require("torchvision.transforms", "train").RandomResizedCrop
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator of the CPU
            torch.default_generator.manual_seed(stream_seed("probe crops", self.seed, *place))
            top, left, height, width = crop.get_params(image, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
            mirrored = torch.rand(()) < 0.5
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def _check_key(folder: Path, key: dict, older_fingerprints: Sequence[str]) -> None:
    file = folder / KEY_NAME
    if not file.is_file():
        raise ValueError(f"{folder} is there but holds no features (no {KEY_NAME}): give another folder")
    there = read_json(file)
    if there.get("data") in older_fingerprints:
        there["data"] = key["data"]
    if lines := setting_differences(there, key):
        raise ValueError(f"{folder} holds other features, remove it or give another folder:\n" + "\n".join(lines))


@torch.inference_mode()
def _read(
    folder: Path,
    key: dict,
    model: AutoencoderVTP,
    dataset: ImageDataset,
    batch_size: int,
    device: torch.device | str,
    progress: Callable[[int], Any],
    num_workers: int,
) -> None:
    """Read every image once; the arrays grow on disk, so that memory does not depend on their number."""
    model, count, width, written = model.to(device), len(dataset), model.config.encoder_hidden_size, 0
    shapes = {"class_tokens": (count, key["num_layers"], width), "patch_means": (count, width)}
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)
        for name, shape in shapes.items()
    }
    rows = []
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    loader = DataLoader(
        ReadableBatches(dataset),
        sampler=batches,
        batch_size=None,  # an item of the sampler is a batch already
        num_workers=num_workers,
        prefetch_factor=READ_AHEAD if num_workers else None,
        generator=torch.Generator(),  # reading must not move the global one
    )
    for batch, (places, pixels) in zip(batches, loader, strict=True):
        progress(len(batch))
        if not places:
            continue
        images = from_uint8(pixels[places]).to(device, model.dtype)
        layers = model.encode_features(images, num_layers=key["num_layers"])
        found = {
            "class_tokens": torch.stack([layer.cls_token for layer in layers], dim=1),  # (B, L, D)
            "patch_means": layers[-1].patch_tokens.float().mean(1),  # (B, D)
        }
        for name, values in found.items():
            if not values.isfinite().all():
                raise ValueError(f"{name} of the images from {dataset.keys[batch[0]]} on are not finite")
            arrays[name][written : written + len(places)] = values.float().cpu().numpy()
        rows += [batch[place] for place in places]
        written += len(places)
    if not rows:
        raise ValueError(f"none of the {count} images can be read")
    for name, array in arrays.items():
        array.flush()
        if written < count:  # images were left out
            np.save(folder / f"{name}.npy", np.array(array[:written]))
    np.save(folder / "rows.npy", np.array(rows))
    (folder / KEY_NAME).write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
