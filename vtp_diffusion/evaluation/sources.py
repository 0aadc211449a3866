"""Sources of images to evaluate: a folder, an npz, a data set, or a pipeline that samples them when they are read."""

import copy
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data.batches import READ_AHEAD, read_ahead
from ..data.image_datasets import Crop, DataConfig, ImageDataset, open_dataset
from ..data.image_files import center_crop, list_images, read_header, read_image
from ..data.npz import NpzImages, has_images
from ..data.shard_files import check_source
from ..runtime.disk import read_json
from ..runtime.processes import from_main, gather_objects, reading_processes, this_process
from ..runtime.reproducibility import random_stream

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HASH_BYTES = 16


class ImageSource(Protocol):
    """Images of one size by index.

    Attributes: `size`: height and width; `settings`: those of the sampler that made them, or None.
    """

    size: tuple[int, int]
    settings: dict | None

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """uint8 (B, 3, H, W)."""
        ...


class FolderImages:
    """Image files of one folder, all of one size, in the order of their names. Nothing is cropped or resized.

    Files that are not 8-bit RGB are converted by `data.image_files.as_rgb`; `converted` counts them by mode, RGB of 16
    bits as "RGB;16".

    Only the main process lists the folder and tells the others. `pipelines/generate.py` writes the number of images
    into settings.json, which is checked.

    Raises: ValueError: no image files; folders of images beside them; an image that cannot be read, has another size
        or a mode that has no 8-bit equivalent; another number of images than settings.json says.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files, self.size, self.converted, self.settings = from_main(self._look)

    def _look(self) -> tuple[list[Path], tuple[int, int], dict[str, int], dict | None]:
        """Files, size, `converted` and settings."""
        folder, files = self.folder, list_images(self.folder)
        folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not files:
            hint = ": it holds folders, expected the folder of one set of images" if folders else ""
            raise ValueError(f"{folder} holds no image files (of a format that Pillow reads){hint}")
        for inner in folders:
            if images := list_images(inner):
                raise ValueError(
                    f"{folder} holds {len(files)} images and, beside them, a folder of images, {inner.name} "
                    f"({len(images)} of them), which would not be measured: expected all images in one folder"
                )
        # check all headers now, not after hours of work
        with ThreadPoolExecutor(16) as pool:
            headers = list(pool.map(read_header, files))
        size = headers[0][:2]
        for path, header in zip(files, headers, strict=True):
            if header[:2] != size:
                raise ValueError(
                    f"{path} is {header[1]}x{header[0]}, expected {size[1]}x{size[0]} as "
                    f"{files[0].name}: images of several sizes cannot be measured together"
                )
        file = folder / "settings.json"
        settings = read_json(file) if file.is_file() else None
        count = (settings or {}).get("num_images", len(files))
        if count != len(files):
            raise ValueError(
                f"{folder} holds {len(files)} images, its settings.json says {count}: "
                "it is incomplete (run the same pipelines/generate.py again) or holds other images too"
            )
        return files, size, dict(Counter(mode for *_, mode in headers if mode != "RGB")), settings

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        pixels = np.empty((len(indices), *self.size, 3), np.uint8)
        for k, index in enumerate(indices):
            pixels[k] = np.asarray(read_image(self.files[index]))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


class DatasetImages:
    """A data set of `data.image_datasets`: already cropped to its resolution, with labels."""

    settings = None

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset
        self.labels: list[int] = dataset.labels
        self.size = (dataset.resolution, dataset.resolution)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.stack([item["image"] for item in self.dataset.__getitems__(list(indices))])

    def count_enlarged(self, indices: Sequence[int]) -> int:
        """How many of these images were enlarged because their files are smaller than the measured size. That blurs
        them, which a distance to sharp images notices. Counts what all processes have read: all must call this."""
        found = gather_objects(self.dataset.enlarged[list(indices)])  # several processes may have read the same image
        return int(torch.stack(found).any(0).sum())


def open_measured(
    config: DataConfig, split: str, crop: Crop = center_crop, or_all: bool = False, advice: str = ""
) -> DatasetImages:
    """A data set to measure. With `skip_unreadable` images that cannot be read are left out before anything is chosen
    or measured, and `dataset.skipped` holds their keys. All processes must call this. Raises what `open_dataset`
    raises."""
    dataset = open_dataset(config, split, crop, or_all, advice)
    return DatasetImages(_without_unreadable(dataset) if config.skip_unreadable else dataset)


def _without_unreadable(dataset: ImageDataset) -> ImageDataset:
    """The images that can be read, each under its own index.

    Training replaces an unreadable image by its neighbour, which would be measured twice here. To find the unreadable
    ones all images are decoded, and the processes share the work: this takes as long as reading the data set, unless
    it is in memory.
    """
    rank, processes = this_process()
    part = range(rank, len(dataset), processes)

    def is_readable(index: int) -> bool:
        return dataset.item_or_none(index) is not None

    found = read_ahead(is_readable, part, num_threads=reading_processes())
    shown = tqdm(found, total=len(part), desc="checking images", leave=False, disable=rank > 0)
    good = gather_objects([index for index, readable in zip(part, shown, strict=True) if readable])
    measured = copy.copy(dataset)
    measured.skip_unreadable = False  # an image that becomes unreadable later is an error
    measured.keep_readable(sorted(itertools.chain.from_iterable(good)))
    return measured


class PipelineImages:
    """Images of a class-conditional pipeline, sampled when they are read. The noise of image k depends only on the
    seed and k, not on the images of its batch.

    Args:
        labels: class of each image.
        batch_size: images sampled at once.
        settings: of the sampler: num_inference_steps, guidance_scale, guidance_interval, guidance_channels.
    """

    def __init__(self, pipe: "DiffusionPipeline", labels: Sequence[int], seed: int, batch_size: int, **settings):
        from ..generation.sampling import pipeline_identity

        self.pipe, self.labels, self.seed, self.batch_size = pipe, list(labels), seed, batch_size
        self.sampler = settings
        self.size = pipeline_image_size(pipe)
        self.settings = settings | {"seed": seed, "num_images": len(labels)} | pipeline_identity(pipe)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        from ..generation.sampling import sample_numbers

        batches = []
        for start in range(0, len(indices), self.batch_size):
            numbers = indices[start : start + self.batch_size]
            batches.append(sample_numbers(self.pipe, self.labels, numbers, self.seed, **self.sampler))
        return torch.cat(batches)


class ReconstructedImages:
    """Images of another source after an autoencoder, which encodes and decodes them when they are read."""

    settings = None

    def __init__(self, source: ImageSource, vae: torch.nn.Module):
        self.source, self.vae, self.size = source, vae, source.size

    def __len__(self) -> int:
        return len(self.source)

    @torch.inference_mode()
    def read(self, indices: Sequence[int]) -> torch.Tensor:
        from ..models.latent_space import reconstruct

        return reconstruct(self.vae, self.source.read(indices))


def pipeline_image_size(pipe: "DiffusionPipeline") -> tuple[int, int]:
    """Height and width of a pipeline's images."""
    dit = pipe.transformer.config
    latents = torch.zeros(1, dit.in_channels, dit.sample_size, dit.sample_size, device=pipe.device)
    with torch.inference_mode():
        return tuple(pipe.decode_latents(latents).shape[2:])


def check_real_images(source: str, option: str) -> None:
    """Raises: ValueError if a source of `open_reference` is a folder that is not there."""
    if not source.endswith(".npz"):
        check_source(source, option)


def open_reference(
    data: DataConfig, source: str, split: str, size: tuple[int, int]
) -> tuple[ImageSource, list[int], list[int]] | None:
    """Real images of the given height and width, the indices of base images, and those of variants (OpenMoji's skin
    tones). None if the source holds statistics only.

    Args: `source`: an npz, a folder, openmoji, or a `datasets` collection; `data`: how it is read.
    """
    if source.endswith(".npz"):
        if not has_images(source):
            return None
        images = NpzImages(source)
        if images.size != size:
            raise ValueError(f"{source} holds images of {images.size}, expected {size}, the size of what is measured")
        return images, list(range(len(images))), []
    if size[0] != size[1]:
        raise ValueError(f"the generated images are {size}: a data set can only be cropped to squares")
    data = DataConfig(**vars(data) | {"source": source, "resolution": size[0]})
    # a folder without splits is used whole, also as the validation split
    images = open_measured(data, split, or_all=split == "validation")
    is_variant = images.dataset.variants
    base, variants = (torch.nonzero(chosen).flatten().tolist() for chosen in (~is_variant, is_variant))
    return images, base, variants


def chosen_images(num_images: int | None, count: int, seed: int, found: str) -> list[int]:
    """Indices of the images that are measured, in order: all `count` of them (None), or a random subset.

    A subset is random because folders are sorted by class: the first images would be those of the first classes.

    Args: `found`: text for the error: which images there are and how many.
    Raises: ValueError: `num_images` is larger than `count`.
    """
    wanted = count if num_images is None else num_images
    if wanted > count:
        raise ValueError(f"num_images is {wanted}, but {found}")
    if wanted == count:
        return list(range(count))
    return sorted(random_stream("chosen images", seed).permutation(count)[:wanted].tolist())


def subset_rule(chosen: Sequence[int], count: int, seed: int) -> str:
    """How `chosen_images` chose, in words for result files."""
    return "all" if len(chosen) == count else f"a random subset of {count}, seed {seed}"


def image_faults(sources: dict[str, tuple[ImageSource, Sequence[int]]]) -> dict[str, dict]:
    """Unreadable and enlarged images of every source that is a data set, after all processes have read their part. All
    processes must call this.

    Images smaller than the measured size are no error: a model of 32 px may well have been trained on images of 28.

    Args: `sources`: name -> images, and the indices of those that are measured.
    Returns: "skipped": name -> keys of images that cannot be read and are left out; "enlarged": name -> number of
        images that were enlarged.
    """
    datasets = {name: source for name, source in sources.items() if isinstance(source[0], DatasetImages)}
    return {
        "skipped": {name: images.dataset.skipped for name, (images, _) in datasets.items()},
        "enlarged": {name: images.count_enlarged(kept) for name, (images, kept) in datasets.items()},
    }


def fault_lines(skipped: list[str], enlarged: int, resolution: int) -> Iterator[str]:
    """Lines about unreadable and enlarged images, for programs that measure one data set."""
    if skipped:
        yield f"{len(skipped)} more cannot be read and are left out, the first is {skipped[0]}"
    if enlarged:
        yield f"{enlarged} of them are smaller than {resolution} px and were enlarged"


def image_hashes(images: torch.Tensor) -> list[bytes]:
    """A hash of the pixels of each uint8 image (B, 3, H, W); equal for equal images of one size."""
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()  # no copy: images are in this layout already
    return [hashlib.blake2b(image.data, digest_size=HASH_BYTES).digest() for image in pixels]


class _Batches(Dataset):
    """Batches of a source as items: images (B, H, W, 3)."""

    def __init__(self, source: ImageSource, indices: Sequence[int], batch_size: int):
        self.source = source
        self.batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> torch.Tensor:
        return self.source.read(self.batches[k]).permute(0, 2, 3, 1)

    def read_by(self, num_workers: int, pin_memory: bool) -> DataLoader:
        own = isinstance(self.source, PipelineImages | ReconstructedImages)  # which need the device
        workers = 0 if own else min(num_workers, len(self))
        return DataLoader(
            self,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=READ_AHEAD if workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # reading must not move the global one
        )


class _HashedBatches(_Batches):
    """Batches with the hashes of their images, computed where they are read."""

    def __getitem__(self, k: int) -> tuple[torch.Tensor, list[bytes]]:
        pixels = super().__getitem__(k)
        return pixels, image_hashes(pixels.permute(0, 3, 1, 2))


def image_batches(
    source: ImageSource, indices: Sequence[int], batch_size: int, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[torch.Tensor]:
    """Images of the given indices, `batch_size` at a time, uint8 (B, 3, H, W).

    Args:
        num_workers: processes that read ahead; pipelines and autoencoders always run in this process.
        pin_memory: read into pinned memory, for asynchronous copies to a GPU.
    """
    for pixels in _Batches(source, indices, batch_size).read_by(num_workers, pin_memory):
        yield pixels.permute(0, 3, 1, 2)


def hashed_batches(
    source: ImageSource, indices: Sequence[int], batch_size: int, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[tuple[torch.Tensor, list[bytes]]]:
    """As `image_batches`, each batch with the hashes of its images, as of `image_hashes`."""
    for pixels, hashes in _HashedBatches(source, indices, batch_size).read_by(num_workers, pin_memory):
        yield pixels.permute(0, 3, 1, 2), hashes
