"""Where evaluated images come from: a folder, an npz, a data set, or a pipeline that makes them when they are read."""

import copy
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data.batches import READ_AHEAD, read_ahead
from ..data.image_datasets import DataConfig, ImageDataset, open_dataset
from ..data.image_files import DECODING_ERRORS, IMAGE_SUFFIXES, read_image
from ..generation.sampling import pipeline_identity, sample_numbers
from ..runtime.processes import gather_objects, reading_processes, this_process

# 32-bit integers and floats have no agreed range that could be brought to 8 bits
REFUSED_MODES = ("I", "F")
HASH_BYTES = 16
PIECE = 64  # images that a process reads at once: the first batch is there the sooner, and no process ends last alone


class ImageSource(Protocol):
    """Images of one size by index.

    Attributes:
        size: height and width.
        settings: what made them, or None.
    """

    size: tuple[int, int]
    settings: dict | None

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """uint8 (B, 3, H, W)."""
        ...


class FolderImages:
    """Image files of one folder, all of one size, in the order of their names. Nothing is cropped or resized.

    Files that are not 8-bit RGB are converted by `vtp_diffusion.data.image_files.as_rgb`: greys and palettes to RGB,
    transparency onto white; of 16 bits the upper 8 are kept. `converted` counts them by mode, RGB of 16
    bits as "RGB;16". 32-bit integers and floats are refused.

    A folder that `pipelines/generate.py` wrote says in settings.json how many images it is to hold.

    Raises:
        ValueError: no image files; folders of images beside them; one that cannot be read, has another size or a
            refused mode, named; fewer or more images than the folder's settings say.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files = _image_files(self.folder)
        folders = sorted(path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not self.files:
            hint = ": it holds folders, of which each is a set of images here" if folders else ""
            raise ValueError(f"{folder} holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))}){hint}")
        for inner in folders:
            if images := _image_files(inner):
                raise ValueError(
                    f"{folder} holds {len(self.files)} images and, beside them, a folder of images, {inner.name} "
                    f"({len(images)} of them), which would not be measured: expected one folder for one set"
                )
        # headers only, all of them now: an error after hours of work would be no use
        with ThreadPoolExecutor(16) as pool:
            headers = list(pool.map(_header, self.files))
        self.size = headers[0][:2]
        for path, header in zip(self.files, headers, strict=True):
            if header[:2] != self.size:
                raise ValueError(
                    f"{path} is {header[1]}x{header[0]}, expected {self.size[1]}x{self.size[0]} as "
                    f"{self.files[0].name}: images of several sizes cannot be measured together"
                )
        self.converted = dict(Counter(mode for *_, mode in headers if mode != "RGB"))
        file = self.folder / "settings.json"
        self.settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        self._check_complete()

    def _check_complete(self) -> None:
        count = (self.settings or {}).get("num_images", len(self.files))
        if count != len(self.files):
            raise ValueError(
                f"{self.folder} holds {len(self.files)} images, its settings.json says {count}: "
                "it is incomplete (run the same pipelines/generate.py again) or holds images of something else"
            )

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        pixels = np.empty((len(indices), *self.size, 3), np.uint8)
        for k, index in enumerate(indices):
            pixels[k] = np.asarray(read_image(self.files[index]))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _image_files(folder: Path) -> list[Path]:
    files = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in files if not path.name.startswith("."))


def _header(path: Path) -> tuple[int, int, str]:
    """Height, width and mode, without decoding."""
    try:
        with Image.open(path) as image:
            if image.mode in REFUSED_MODES:
                raise ValueError(f"its pixels are of mode {image.mode!r}, expected 8 or 16 bits")
            # Pillow has no RGB of 16 bits: it gives their upper 8, and only the layout of the file tells
            deep = image.mode == "RGB" and any(";16" in str(tile[3]) for tile in image.tile)
            return image.height, image.width, "RGB;16" if deep else image.mode
    except DECODING_ERRORS as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


class DatasetImages:
    """A data set of `vtp_diffusion.data.image_datasets`: already cropped to its resolution, with labels."""

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
        """How many of these images are smaller in their files than they are measured, by what any process has read of
        them; all of them must ask. Enlarged ones are blurred, which a distance to sharp ones sees."""
        found = gather_objects(self.dataset.enlarged[list(indices)])  # what is in memory every process has read
        return int(torch.stack(found).any(0).sum())


def open_measured(config: DataConfig, split: str) -> DatasetImages:
    """A data set whose images are counted: those that cannot be read, where that is allowed, are left out before
    anything is chosen or measured, and `dataset.skipped` holds their keys. Raises what `open_dataset` raises."""
    dataset = open_dataset(config, split)
    return DatasetImages(_without_unreadable(dataset) if config.skip_unreadable else dataset)


def _without_unreadable(dataset: ImageDataset) -> ImageDataset:
    """The images that can be read, each under its own index.

    Training replaces an unreadable image by its neighbour, which would be measured twice here. Which ones those are is
    only known once all were decoded: unless the data set is in memory, this takes as long as reading it.
    """

    def is_readable(index: int) -> bool:
        return dataset[index]["key"] == dataset.keys[index]

    found = read_ahead(is_readable, range(len(dataset)), num_threads=reading_processes())
    shown = tqdm(found, total=len(dataset), desc="checking images", leave=False, disable=this_process()[0] > 0)
    readable = [index for index, good in enumerate(shown) if good]
    measured = copy.copy(dataset)
    measured.skip_unreadable = False  # one that is damaged from now on is named, not replaced
    measured.keep_readable(readable)
    return measured


class PipelineImages:
    """Images of a class-conditional pipeline, made when they are read; image k comes from a generator seeded with
    seed + k, whatever is read with it.

    Args:
        labels: class of each image.
        batch_size: images made at once.
        settings: of the sampler: num_inference_steps, guidance_scale, guidance_interval, guidance_channels.
    """

    def __init__(self, pipe: DiffusionPipeline, labels: Sequence[int], seed: int, batch_size: int, **settings):
        self.pipe, self.labels, self.seed, self.batch_size = pipe, list(labels), seed, batch_size
        self.sampler = settings
        self.size = pipeline_image_size(pipe)
        self.settings = settings | {"seed": seed, "num_images": len(labels)} | pipeline_identity(pipe)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        batches = []
        for start in range(0, len(indices), self.batch_size):
            numbers = indices[start : start + self.batch_size]
            batches.append(sample_numbers(self.pipe, self.labels, numbers, self.seed, **self.sampler))
        return torch.cat(batches)


def pipeline_image_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """Height and width of a pipeline's images."""
    dit = pipe.transformer.config
    latents = torch.zeros(1, dit.in_channels, dit.sample_size, dit.sample_size, device=pipe.device)
    with torch.inference_mode():
        return tuple(pipe.decode_latents(latents).shape[2:])


def image_hashes(images: torch.Tensor) -> list[bytes]:
    """A hash of the pixels of each uint8 image (B, 3, H, W); equal for equal images of one size."""
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()  # as images from files and pipelines lie in memory
    return [hashlib.blake2b(image.data, digest_size=HASH_BYTES).digest() for image in pixels]


class _Pieces(Dataset):
    """Parts of batches, read into places of shared memory that are used again and again: fresh memory costs a page
    fault for every 4 KiB, in the process that writes and in the one that reads, and the latter is only one. Piece k
    goes to place k % P.

    Args:
        pieces: indices of each.
        places: uint8 (P, n, H, W, 3).
        hashed: an item is the hashes of a piece, or else empty.

    Attributes: `held`: (P,) int64, shared, the piece that a place was last used for.
    """

    def __init__(self, source: ImageSource, pieces: list[Sequence[int]], places: torch.Tensor, hashed: bool):
        self.source, self.pieces, self.places, self.hashed = source, pieces, places, hashed
        self.held = torch.full((len(places),), -1).share_memory_()

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, k: int) -> list[bytes]:
        pixels, images = self.source.read(self.pieces[k]), self.images(k)
        self.held[k % len(self.held)] = k
        images.copy_(pixels)
        return image_hashes(images) if self.hashed else []

    def images(self, k: int) -> torch.Tensor:
        """Where piece k is, (B, 3, H, W), once it is read and until piece k + P is."""
        return self.places[k % len(self.places), : len(self.pieces[k])].permute(0, 3, 1, 2)


def read_batches(
    source: ImageSource,
    indices: Sequence[int],
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    hashed: bool = False,
) -> Iterator[torch.Tensor] | Iterator[tuple[torch.Tensor, list[bytes]]]:
    """Images of the given indices, `batch_size` at a time, uint8 (B, 3, H, W).

    Args:
        num_workers: processes that read ahead; a pipeline makes its images in this one.
        pin_memory: into memory that is copied to a GPU while other work goes on.
        hashed: give (images, their hashes).
    """
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    if num_workers and batches and not isinstance(source, PipelineImages):
        read = _read_by_processes(source, batches, num_workers, pin_memory, hashed)
    else:
        read = _read_here(source, batches, pin_memory, hashed)
    return read if hashed else (images for images, _ in read)


def _read_here(
    source: ImageSource, batches: list[Sequence[int]], pin_memory: bool, hashed: bool
) -> Iterator[tuple[torch.Tensor, list[bytes]]]:
    for batch in batches:
        images = source.read(batch)
        if pin_memory:
            images = images.pin_memory()
        yield images, image_hashes(images) if hashed else []


def _read_by_processes(
    source: ImageSource, batches: list[Sequence[int]], num_workers: int, pin_memory: bool, hashed: bool
) -> Iterator[tuple[torch.Tensor, list[bytes]]]:
    pieces = [batch[start : start + PIECE] for batch in batches for start in range(0, len(batch), PIECE)]
    workers = min(num_workers, len(pieces))
    # the loader asks for a piece when it gives the one that comes READ_AHEAD * workers before it: one place more, and
    # that one can be copied in the meantime
    shape = (READ_AHEAD * workers + 1, max(map(len, pieces)), *source.size, 3)
    places = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(math.prod(shape)), 0, shape)
    dataset = _Pieces(source, pieces, places, hashed)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=READ_AHEAD,
        generator=torch.Generator(),  # reading must not move the global one
    )
    return _one_ahead(_joined(dataset, iter(loader), [len(batch) for batch in batches], pin_memory))


def _joined(
    dataset: _Pieces, arriving: Iterator[list[bytes]], sizes: list[int], pin_memory: bool
) -> Iterator[tuple[torch.Tensor, list[bytes]]]:
    """Batches of the given sizes, copied out of the places of their pieces."""
    numbered = enumerate(arriving)
    for size in sizes:
        shape = (size, *dataset.source.size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory).permute(0, 3, 1, 2)
        filled, hashes = 0, []
        while filled < size:
            k, found = next(numbered)
            piece = dataset.images(k)
            images[filled : filled + len(piece)].copy_(piece)
            if dataset.held[k % len(dataset.held)] != k:  # it rests on the order in which the loader asks
                raise RuntimeError(f"piece {k} of the images was overwritten before it was used: a fault in reading")
            filled, hashes = filled + len(piece), hashes + found
        yield images, hashes


def _one_ahead(batches: Iterator) -> Iterator:
    """The same batches, each joined by a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch
