"""Splits, classes and images of a folder, by one rule for every program.

Names that begin with a dot are hidden and ignored. For the rest:

- Splits. If every sub-folder is called train, validation (or val) or test, and no images lie beside them, they are
  splits. With any other sub-folder they are classes: bus, car, train and truck are four classes.
- Classes. Sub-folders are classes, those of all splits together, ordered by name, or numerically if all names are
  numbers. The images of a class lie directly in its folder; a class without images is an error.
- No classes. If images lie directly in the folder or split, and none in sub-folders, all are of one class, "image".
- The held-out split is validation, or test if there is no validation; a folder without splits has none.

Other entries are counted and named. Lists of images or labels (`LISTS`) are not read but refused.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .image_files import is_image_name

SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "dataset.json")
READING_THREADS = 16  # for hashing files
WHOLE = "whole"  # the one part of a folder that has no splits


@dataclass
class FolderLayout:
    """What a folder holds.

    Attributes:
        classes: names in NFC, in the order of their indices; ["image"] for a folder without classes.
        images: split, or `WHOLE`, -> (file, class index) of each image.
        left_out: files and folders that are neither images nor classes.
    """

    folder: Path
    classes: list[str]
    images: dict[str, list[tuple[Path, int]]]
    left_out: list[Path]

    def has(self, split: str) -> bool:
        return split == "all" or self._part(split) in self.images

    def _part(self, split: str) -> str:
        if WHOLE in self.images and split == "train":
            return WHOLE
        return "test" if split == "validation" and "validation" not in self.images else split

    def of_split(self, split: str, advice: str = "") -> list[tuple[Path, int]]:
        """(file, class index) of train, validation or all. Raises: ValueError, which ends with `advice`, if the folder
        has no such split."""
        if not self.has(split):
            there = f"it holds {', '.join(self.images)}" if WHOLE not in self.images else "its images are not split"
            raise ValueError(
                f"{self.folder} has no {split} split: {there}. Expected sub-folders train and validation (or test) "
                f"and no others{advice}"
            )
        parts = self.images if split == "all" else [self._part(split)]
        return [pair for part in parts for pair in self.images[part]]

    def describe(self) -> str:
        """One line for the console: "photos: 4 classes, 8 images, no held-out split"."""
        counts = [f"{len(pairs)} {part} images".replace(f" {WHOLE}", "") for part, pairs in self.images.items()]
        words = ["1 class" if len(self.classes) == 1 else f"{len(self.classes)} classes", *counts]
        words += [] if self.has("validation") else ["no held-out split"]
        if self.left_out:
            names = [path.relative_to(self.folder).as_posix() for path in self.left_out]
            words.append(f"{len(names)} other entries left out ({', '.join(names[:3])}{', ...' * (len(names) > 3)})")
        return f"{self.folder}: {', '.join(words)}"


@dataclass
class _Content:
    """The visible entries of one folder, by name."""

    images: list[Path]
    folders: list[Path]
    others: list[Path]


def read_layout(folder: str | Path) -> FolderLayout:
    """The layout of a folder of images.

    Raises: ValueError naming the folder: no images; images beside classes; a class or a split without images; two
        names for one split or class; a broken link; a list that would be ignored.
    """
    folder = Path(folder)
    roots = _roots(folder, top := _look(folder))
    content = {split: top if root == folder else _look(root) for split, root in roots.items()}
    classes = {split: _by_name(part.folders) for split, part in content.items()}
    names = sorted_names({name for part in classes.values() for name in part})
    inside = {split: {name: _look(path) for name, path in part.items()} for split, part in classes.items()}
    filled = {name for part in inside.values() for name, found in part.items() if found.images}
    loose = [path for part in content.values() for path in part.images]
    left_out = [] if roots.keys() == {WHOLE} else list(top.others)
    left_out += [path for part in content.values() for path in part.others]
    if loose and filled:
        raise ValueError(f"{folder} holds classes ({_few(filled)}) and, beside them, images: {loose[0]}")
    if loose:
        left_out += [path for part in content.values() for path in part.folders]
        images = {split: [(path, 0) for path in part.images] for split, part in content.items()}
        return _checked(FolderLayout(folder, ["image"], images, left_out))
    for name in names:
        if name not in filled:
            _refuse_class(folder, name, [part[name] for part in inside.values() if name in part])
    left_out += [path for part in inside.values() for found in part.values() for path in found.folders + found.others]
    images = {
        split: [(path, label) for label, name in enumerate(names) if name in part for path in part[name].images]
        for split, part in inside.items()
    }
    return _checked(FolderLayout(folder, names, images, left_out))


def content_hashes(paths: Sequence[Path]) -> list[str]:
    """A hash of each file's content, because names and sizes do not show other pixels; "" if it is not a file. All
    bytes are read: about a minute for the 140 GB of ImageNet's training images on a fast disk."""

    def content(path: Path) -> str:
        if not path.is_file():
            return ""
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]

    with ThreadPoolExecutor(READING_THREADS) as threads:
        return list(threads.map(content, paths))


def _roots(folder: Path, top: _Content) -> dict[str, Path]:
    """Split -> its folder, in the order of `SPLITS`; or `WHOLE` alone."""
    if top.images or not top.folders or any(path.name.lower() not in SPLITS for path in top.folders):
        return {WHOLE: folder}
    roots: dict[str, Path] = {}
    for path in sorted(top.folders, key=lambda path: list(SPLITS).index(path.name.lower())):
        split = SPLITS[path.name.lower()]
        if split in roots:
            raise ValueError(f"{folder} holds {roots[split].name} and {path.name}, two names of the {split} split")
        roots[split] = path
    return roots


def _look(folder: Path) -> _Content:
    with os.scandir(folder) as entries:
        seen = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    content = _Content([], [], [])
    for entry in seen:
        path = Path(entry.path)
        if entry.name in LISTS:
            raise ValueError(
                f"{path} would be ignored: the sub-folders of a folder are its classes. To read metadata files give "
                f"--data.source imagefolder --data.data_files '{folder}/**' --data.label_column NAME, else move it "
                "away"
            )
        if entry.is_dir():
            content.folders.append(path)
        elif is_image_name(entry.name):
            content.images.append(path)
        elif entry.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a broken link: expected an image or a folder")
        else:
            content.others.append(path)
    return content


def _by_name(folders: Iterable[Path]) -> dict[str, Path]:
    """Name in NFC -> folder. File systems store accents differently (NFC or NFD)."""
    named: dict[str, Path] = {}
    for path in folders:
        other = named.setdefault(unicodedata.normalize("NFC", path.name), path)
        if other != path:
            raise ValueError(f"{path} and {other} differ only in the Unicode encoding of their names: merge them")
    return named


def sorted_names(names: Iterable[str]) -> list[str]:
    """Class names in alphabetical order, or numerically if all are numbers: "10" comes after "2"."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isascii() and name.isdecimal() for name in names) else names


def _few(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3])


def _refuse_class(folder: Path, name: str, contents: list[_Content]) -> None:
    folders = [path.name for content in contents for path in content.folders]
    others = [path.name for content in contents for path in content.others]
    found = f"folders ({_few(folders)})" if folders else f"other files ({_few(others)})" if others else "nothing"
    hint = "; splits are called train, validation (or val) and test, with no other folder beside them" * bool(folders)
    raise ValueError(
        f"the class {name!r} of {folder} holds no images, but {found}: expected images of a format that Pillow reads, "
        f"directly in the folder of their class{hint}. Move it away if it is not a class"
    )


def _checked(layout: FolderLayout) -> FolderLayout:
    for split, pairs in layout.images.items():
        if not pairs:
            where = layout.folder if split == WHOLE else f"the {split} split of {layout.folder}"
            raise ValueError(f"{where} holds no images of a format that Pillow reads, in itself or one level below")
    return layout
