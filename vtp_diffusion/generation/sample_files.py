"""Generated images on disk, by number: written by any number of processes, continued after a kill, packed at the end.

A file with its final name is complete; others are made again. The result does not depend on the number of processes.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..data.image_files import is_whole_png
from ..data.images import to_pil
from ..data.npz import NpzImages, write_npz
from ..runtime.config import setting_differences
from ..runtime.disk import is_unfinished, read_json, write_json, writing

KEPT = "Finished images are kept: the same command continues"
SETTINGS_NAME, LABELS_NAME = "settings.json", "labels.json"
PART_IMAGES = 256  # images in a part of an npz: SIGKILL loses at most one part per process


def check_same_run(there: dict | None, settings: dict, place: Path) -> None:
    """Raises: ValueError naming every setting in which the run whose images are there differs."""
    if there and "configurations" in settings:  # of which older runs say nothing
        there = {"configurations": settings["configurations"]} | there
    if lines := setting_differences(there or {}, settings):
        raise ValueError(f"{place} holds another run's images:\n" + "\n".join(lines))


def _is_ours(path: Path) -> bool:
    """Whether a file can be left over from a run that was killed before its first image."""
    return is_unfinished(path) or path.name == ".lock"


class _SampleFiles:
    """What a folder of PNG files and an npz have in common.

    Args:
        path: where the images are to be.
        folder: where the files of single images, or of parts, are until the end.
        settings: everything that decides the images, `num_images` included.
    """

    def __init__(self, path: str | Path, folder: Path, settings: dict):
        self.path, self.folder, self.settings, self.count = Path(path), folder, settings, settings["num_images"]
        file = self.folder / SETTINGS_NAME
        if file.is_file():
            check_same_run(read_json(file), settings, self.path)
        elif self.folder.exists() and not (self.folder.is_dir() and all(map(_is_ours, self.folder.iterdir()))):
            raise ValueError(
                f"{self.folder} holds other files, no {SETTINGS_NAME}: expected a new folder, or this run's"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other runs; for one process. Raises: ValueError naming a run that has locked it."""
        from ..runtime import folder_lock

        self.folder.mkdir(parents=True, exist_ok=True)
        folder_lock.acquire(self.folder)
        try:
            yield
        finally:
            folder_lock.release(self.folder, remove=True)
            if self.folder.is_dir() and not any(self.folder.iterdir()):  # nothing was made
                self.folder.rmdir()

    def _claim(self) -> None:
        """Write settings.json, with the first images, so that bad settings leave nothing behind. Several processes may
        do so at once."""
        file = self.folder / SETTINGS_NAME
        if not file.exists():
            write_json(file, self.settings)

    def keep(self) -> None:
        """Write what `write` has not written yet: for every process that is interrupted."""

    def finish(self, labels: list[int], names: Mapping[str, str]) -> None:
        """For one process, when all have written.

        Args: `labels`: class of each image; `names`: index, as text -> name of a class, as of a pipeline's id2label.
        Raises: ValueError if images are missing.
        """
        if missing := self.missing():
            raise ValueError(f"{self.path}: {len(missing)} of {self.count} images are missing, the first {missing[0]}")


class SampleFolder(_SampleFiles):
    """A PNG file an image, 000000.png and so on, settings.json, and labels.json: file -> its class."""

    def __init__(self, path: str | Path, settings: dict):
        super().__init__(path, Path(path), settings)

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Numbers of the images that this process has to make, damaged files included. To be called before any process
        writes."""
        paths = [self.folder / f"{number:06d}.png" for number in range(self.count)]
        with ThreadPoolExecutor() as threads:
            whole = threads.map(is_whole_png, paths)
        return [number for number, good in enumerate(whole) if not good][rank::world_size]

    def write(self, number: int, image: torch.Tensor) -> None:
        """One image, uint8 (3, H, W)."""
        self._claim()
        unfinished = self.folder / f".{number:06d}.png"  # renamed when complete: a kill leaves no half image
        with writing(self.folder / f"{number:06d}.png", KEPT):
            to_pil(image[None])[0].save(unfinished)
            unfinished.rename(self.folder / f"{number:06d}.png")

    def finish(self, labels: list[int], names: Mapping[str, str]) -> None:
        super().finish(labels, names)
        named = ({"label": k} | ({"name": names[str(k)]} if str(k) in names else {}) for k in labels)
        write_json(self.folder / LABELS_NAME, {f"{number:06d}.png": row for number, row in enumerate(named)})


class SampleNpz(_SampleFiles):
    """An npz as ADM's evaluator reads it: `arr_0` uint8 (N, H, W, 3), `arr_1` the labels, `settings` JSON text.

    Until all images are there, FILE.npz.parts/ holds them in parts of 256. The npz is then joined from these, with one
    part in memory at a time, and the folder is removed.
    """

    def __init__(self, path: str | Path, settings: dict):
        path = Path(path)
        self.complete = path.exists()
        if self.complete:
            check_same_run(NpzImages(path).settings, settings, path)
        super().__init__(path, path.with_name(f"{path.name}.parts"), settings)
        self._pending: dict[int, list[torch.Tensor]] = {}

    def _part(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npy"

    def _numbers(self, index: int) -> range:
        return range(index * PART_IMAGES, min((index + 1) * PART_IMAGES, self.count))

    def _there(self, index: int) -> int:
        """Number of images in the file of a part: all, those before an interruption, or none if it is damaged."""
        if not self._part(index).is_file():
            return 0
        try:
            count = len(np.load(self._part(index), mmap_mode="r"))
        except (ValueError, EOFError):
            return 0
        return count if count <= len(self._numbers(index)) else 0

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Numbers of the images that this process has to make, in the order that `write` expects. To be called before
        any process writes."""
        parts = [] if self.complete else range(-(-self.count // PART_IMAGES))
        missing = [numbers for k in parts if (numbers := self._numbers(k)[self._there(k) :])]
        return [number for numbers in missing[rank::world_size] for number in numbers]

    def write(self, number: int, image: torch.Tensor) -> None:
        """The next image of a part, uint8 (3, H, W)."""
        index = number // PART_IMAGES
        if index not in self._pending:
            there = np.load(self._part(index)) if self._there(index) else []  # of an interrupted run
            self._pending[index] = [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in there]
        part = self._pending[index]
        if number != index * PART_IMAGES + len(part):
            raise ValueError(f"image {number} given, expected {index * PART_IMAGES + len(part)}")
        part.append(image)
        if len(part) == len(self._numbers(index)):
            self._save(index, self._pending.pop(index))

    def _save(self, index: int, images: list[torch.Tensor]) -> None:
        self._claim()
        unfinished = self.folder / f".{index:06d}.npy"
        with writing(self._part(index), KEPT):
            np.save(unfinished, torch.stack(images).permute(0, 2, 3, 1).contiguous().numpy())
            unfinished.rename(self._part(index))

    def keep(self) -> None:
        for index, images in self._pending.items():
            self._save(index, images)

    def finish(self, labels: list[int], names: Mapping[str, str]) -> None:
        super().finish(labels, names)
        if not self.complete:
            size = np.load(self._part(0), mmap_mode="r").shape[1:3]
            text = np.array(json.dumps(self.settings))
            write_npz(self.path, self.count, size, self._parts(), arr_1=np.array(labels), settings=text)
            self.complete = True
        for part in self.folder.iterdir() if self.folder.is_dir() else ():
            if part.name != SETTINGS_NAME:  # last: it tells the same command what is left to remove
                part.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _parts(self) -> Iterator[np.ndarray]:
        for index in range(-(-self.count // PART_IMAGES)):
            yield np.load(self._part(index), mmap_mode="r")  # memory-mapped: not copied
