"""Where evaluated images come from: a folder, an npz, a data set, or a pipeline that makes them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ..data import IMAGE_SUFFIXES, ImageDataset, read_image

LabelRule = Literal["random", "balanced", "reference"]


class ImageSource(Protocol):
    """Images of one size by index: `len`, and `read(indices)` -> uint8 (B, 3, H, W)."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> torch.Tensor: ...


class ArrayImages:
    """Images in memory, uint8 (N, 3, H, W), and the settings that made them where they are known."""

    def __init__(self, images: torch.Tensor, settings: dict | None = None):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected uint8 (N, 3, H, W)")
        self.images, self.settings = images, settings

    @classmethod
    def from_npz(cls, path: str | Path) -> "ArrayImages":
        """The npz of ADM's evaluator: key `arr_0`, uint8 (N, H, W, 3); `settings` as `save_npz` writes them."""
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file:
                raise ValueError(f"{path} holds {', '.join(file)}: expected arr_0, uint8 (N, H, W, 3)")
            array = file["arr_0"]
            settings = json.loads(str(file["settings"])) if "settings" in file else None
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise ValueError(f"{path}: arr_0 is {array.dtype} {array.shape}, expected uint8 (N, H, W, 3)")
        return cls(torch.from_numpy(array).permute(0, 3, 1, 2), settings)

    def save_npz(self, path: str | Path) -> None:
        """Write what `from_npz` reads, compressed. A file that is there is replaced once all is written."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        array = self.images.permute(0, 2, 3, 1).contiguous().numpy()
        np.savez_compressed(unfinished, arr_0=array, settings=np.array(json.dumps(self.settings)))
        unfinished.rename(path)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        return self.images[list(indices)]


class FolderImages:
    """Image files of one folder, all of one size, in the order of their names. Nothing is cropped or resized.

    Raises:
        ValueError: no image files; on reading, one that cannot be read or has another size, named.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        files = (p for p in self.folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
        self.files = sorted(files)
        if not self.files:
            raise ValueError(f"{folder} holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self.shape = self._read(self.files[0]).shape

    @staticmethod
    def _read(path: Path) -> torch.Tensor:
        return torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        images = []
        for index in indices:
            image = self._read(self.files[index])
            if image.shape != self.shape:
                raise ValueError(
                    f"{self.files[index]} is {image.shape[2]}x{image.shape[1]}, expected "
                    f"{self.shape[2]}x{self.shape[1]} as {self.files[0].name}"
                )
            images.append(image)
        return torch.stack(images)


class DatasetImages:
    """A data set of `vtp_diffusion.data`: already cropped to its resolution, with labels."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset
        self.labels: list[int] = dataset.labels

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.stack([item["image"] for item in self.dataset.__getitems__(list(indices))])


def read_batches(source: ImageSource, indices: Sequence[int], batch_size: int) -> Iterator[torch.Tensor]:
    """Images of the given indices, `batch_size` at a time, uint8 (B, 3, H, W)."""
    for start in range(0, len(indices), batch_size):
        yield source.read(indices[start : start + batch_size])


def draw_labels(
    rule: LabelRule, count: int, num_classes: int, seed: int, reference: Sequence[int] | None = None
) -> list[int]:
    """Class labels of `count` generated images; label k does not depend on `count`.

    Args:
        rule: "random" draws classes uniformly (as ADM, DiT, SiT and LightningDiT do), "balanced" goes through them in
            turn (VAR, MAR, RAE; lowers FID on ImageNet by about 0.1), "reference" draws from `reference`'s labels.
    """
    generator = np.random.default_rng(seed)
    if rule == "random":
        return generator.integers(0, num_classes, count).tolist()
    if rule == "balanced":
        return [k % num_classes for k in range(count)]
    if rule != "reference":
        raise ValueError(f"labels {rule!r} is unknown; known: random, balanced, reference")
    if not reference or not all(0 <= label < num_classes for label in reference):
        raise ValueError(f"labels 'reference' needs a labelled reference with labels from 0 to {num_classes - 1}")
    return np.asarray(reference)[generator.integers(0, len(reference), count)].tolist()


def sample_images(
    pipe: DiffusionPipeline, labels: Sequence[int], seed: int, batch_size: int, progress=None, **settings
) -> ArrayImages:
    """Images of a class-conditional pipeline; image k comes from a generator seeded with seed + k.

    Args:
        progress: called with the number of images that were finished, after each batch.
        settings: passed on: num_inference_steps, guidance_scale, guidance_interval, guidance_channels.
    """
    batches = []
    for start in range(0, len(labels), batch_size):
        chunk = list(labels[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(chunk))]
        # PIL images are 8-bit already, through the package's one conversion
        images = pipe(chunk, generator=generators, output_type="pil", **settings).images
        batches.append(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]))
        if progress is not None:
            progress(len(chunk))
    return ArrayImages(torch.cat(batches), settings | {"seed": seed, "num_images": len(labels)})
