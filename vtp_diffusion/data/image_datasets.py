"""Image data sets with one interface: OpenMoji, folders of images, and any collection of the `datasets` library.

Every item is `{"image": uint8 (3, R, R), "label": int, "caption": str, "key": str}`, centre-cropped as ADM does.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..runtime.config import Settings, setting
from ..runtime.optional_packages import require
from .image_files import IMAGE_SUFFIXES, UnreadableImageError, center_crop, decode_image, read_image
from .openmoji import is_held_out, openmoji_folder, read_metadata

OPENMOJI_LABELS = ("subcategory", "category")
SKIN_TONE_WEIGHT = 0.2  # five variants of one drawing count as one
IN_MEMORY_BYTES = 2**30
SPLIT_FOLDERS = ("train", "validation")
BUILDERS = ("arrow", "csv", "imagefolder", "json", "pandas", "parquet", "webdataset")  # of `datasets`, without data


@dataclass(kw_only=True)
class DataConfig(Settings):
    """Which images, and how large."""

    source: str = setting(
        "openmoji", "openmoji, a folder of images, or a hub id / builder of `datasets` (parquet, webdataset)"
    )
    resolution: int = setting(256, "side of the square images in pixels", at_least=1)
    name: str | None = setting(None, "`datasets`: name of the configuration")
    data_files: str | None = setting(None, "`datasets`: files or pattern, for builders")
    validation_files: str | None = setting(None, "`datasets`: held-out files, beside data_files", may_change=True)
    image_column: str = setting("image", "`datasets`: column of the images")
    label_column: str | None = setting(
        None, "`datasets`: column of the class; openmoji: subcategory (none) or category"
    )
    caption_column: str | None = setting(None, "`datasets`: column of the text")
    holdout: float = setting(0.1, "share of OpenMoji's base emoji in the validation split", at_least=0, below=1)
    holdout_seed: int = setting(0, "which base emoji those are", at_least=0)
    limit: int | None = setting(None, "use only so many images, spread over the whole set", at_least=1)
    # Whether images that cannot be read are left out decides nothing until a run would end at one: it may change, and
    # so may where renderings are kept.
    skip_unreadable: bool = setting(False, "count and leave out images that cannot be read", may_change=True)
    streaming: bool = setting(False, "`datasets`: read the training shards as a stream, never as a whole")
    shuffle_buffer: int = setting(1000, "streaming: samples shuffled together", at_least=1)
    skip_empty_captions: bool = setting(
        False, "streaming: leave samples without a text out of every objective, not one"
    )
    cache_dir: str | None = setting(None, "where OpenMoji is rendered to; see the README", may_change=True)

    def __post_init__(self):
        super().__post_init__()
        if self.streaming and self.limit is not None:
            raise ValueError(f"limit is {self.limit} with streaming, expected none: max_train_steps decides")
        ours = self.source == "openmoji" or Path(self.source).is_dir()
        if self.streaming and ours:
            raise ValueError(
                f"source is {self.source!r} with streaming, expected a builder or a hub id of `datasets`, such as "
                "webdataset or parquet with data_files"
            )
        for name in ("validation_files", "name", "data_files", "caption_column") if ours else ():
            if (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name} is {value!r} with source {self.source!r}, expected none without a builder of `datasets` "
                    "or a hub id as source"
                )
        if self.validation_files is not None:
            self._check_validation_files()
        if self.skip_empty_captions and not (self.streaming and self.caption_column):
            given = f"streaming {str(self.streaming).lower()} and caption_column {self.caption_column or 'none'}"
            raise ValueError(f"skip_empty_captions is true with {given}, expected true and a column")

    def _check_validation_files(self) -> None:
        given = f"validation_files is {self.validation_files!r}"
        if self.data_files is None:
            raise ValueError(f"{given}, expected none without data_files")
        files, held_out = (glob(pattern, recursive=True) for pattern in (self.data_files, self.validation_files))
        both = sorted(set(files) & set(held_out))
        if both or self.data_files == self.validation_files:
            raise ValueError(f"{given}, expected none of data_files: {(both or [self.data_files])[0]} is in both")


class ImageDataset(Dataset):
    """Images by index.

    Args:
        references: one entry an image: a path, or an index into `read`.
        read: reference -> PIL image; raises UnreadableImageError naming the image.
        resolution: side of the cropped images.
        keys, labels, captions: (N,) each.
        label_names: one a class, its index where names are not known.
        weights: (N,) how often an image should be drawn, or copied, relative to others.
        fingerprint: identifies the content and the crop.
        skip_unreadable: an image that cannot be read gives way to the next one that can, label and key included: an
            index always gives the same item. A data set that is kept in memory leaves such images out instead.
        classes_named: whether `label_names` are more than indices.

    Attributes:
        skipped: keys of the images that could not be read, as far as this process and its workers have met them.
        enlarged: (N,) whether an image is smaller than the crop, likewise.
    """

    def __init__(self, references, read, resolution, keys, labels, captions, label_names, weights, fingerprint,
                 skip_unreadable=False, classes_named=True):  # fmt: skip
        self.references, self.read, self.resolution = references, read, resolution
        self.keys, self.labels, self.captions, self.label_names = keys, labels, captions, label_names
        self.weights, self.fingerprint, self.skip_unreadable = weights, fingerprint, skip_unreadable
        self.classes_named, self._dropped = classes_named, list[str]()
        # in shared memory, since it is the workers of a loader that read
        self._unreadable = torch.zeros(len(references), dtype=torch.bool).share_memory_()  # (N,)
        self.enlarged = torch.zeros(len(references), dtype=torch.bool).share_memory_()
        self._pixels: np.ndarray | None = None  # (N, R, R, 3) once everything was read, for small sets
        if len(references) == 0:
            raise ValueError("the data set holds no images")

    def __len__(self) -> int:
        return len(self.references)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, pixels = self._readable(index)
        return {
            "image": torch.from_numpy(pixels).permute(2, 0, 1),  # (3, R, R)
            "label": self.labels[index],
            "caption": self.captions[index],
            "key": self.keys[index],
        }

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]

    @property
    def skipped(self) -> list[str]:
        return [*self._dropped, *(self.keys[index] for index in self._unreadable.nonzero().flatten().tolist())]

    def keep_in_memory(self) -> "ImageDataset":
        """Read every image now, and drop those that cannot be read if that is wanted."""
        from tqdm.auto import tqdm

        pixels, readable = [], []
        for index in tqdm(range(len(self)), desc="reading images", leave=False):
            image = self._read(index)
            if image is not None:
                pixels.append(image)
                readable.append(index)
        if not readable:
            raise ValueError(f"none of the {len(self)} images can be read")
        self.keep_readable(readable)
        self._pixels = np.stack(pixels)
        return self

    def keep_readable(self, readable: list[int]) -> None:
        """Drop all images but those of these indices, in order; the keys of the others are `skipped`."""
        left_out = set(range(len(self))).difference(readable)
        if not left_out:
            return
        self._dropped = [self.keys[index] for index in sorted(left_out)]
        self._unreadable = torch.zeros(len(readable), dtype=torch.bool).share_memory_()
        self.enlarged = self.enlarged[readable].share_memory_()
        self.weights = self.weights[readable]
        for name in ("references", "keys", "labels", "captions"):
            values = getattr(self, name)
            setattr(self, name, [values[index] for index in readable])

    def _readable(self, index: int) -> tuple[int, np.ndarray]:
        if self._pixels is not None:
            return index, self._pixels[index]
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            pixels = self._read(candidate)
            if pixels is not None:
                return candidate, pixels
        raise ValueError(f"none of the {len(self)} images can be read")

    def _read(self, index: int) -> np.ndarray | None:
        try:
            image = self.read(self.references[index])
        except UnreadableImageError:
            if not self.skip_unreadable:
                raise
            self._unreadable[index] = True
            return None
        if min(image.size) < self.resolution:
            self.enlarged[index] = True
        return np.array(center_crop(image, self.resolution))


def open_dataset(config: DataConfig, split: Literal["train", "validation", "all"] = "train") -> ImageDataset:
    """Open a data set.

    Splits: OpenMoji is split by base emoji. A folder that holds train/ and validation/ is split so, another one is
    used whole whatever the split; its sub-folders are its classes. A collection of `datasets` has its own splits,
    "validation" being `validation_files` where given, or its validation or else its test split.

    Raises:
        ValueError: a source, split or column that does not exist, or no images.
        UnreadableImageError: an image of a small set, which is read at once, cannot be decoded.
    """
    if split not in ("train", "validation", "all"):
        raise ValueError(f"split is {split!r}, expected train, validation or all")
    if config.streaming:
        raise ValueError("streaming is true, expected false: images are read by index here; a stream has no length")
    if config.source == "openmoji":
        dataset = _open_openmoji(config, split)
    elif Path(config.source).is_dir():
        dataset = _open_folder(config, split)
    else:
        dataset = _open_collection(config, split)
    if len(dataset) * 3 * config.resolution**2 <= IN_MEMORY_BYTES:
        dataset.keep_in_memory()
    return dataset


def check_caption(value: Any, name: str) -> str:
    """A caption without the space around it, "" where there is none. Raises: ValueError naming what is no text."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is {str(value)[:80]!r} of type {type(value).__name__}, expected a text")
    return (value or "").strip()


def _open_openmoji(config: DataConfig, split: str) -> ImageDataset:
    folder = openmoji_folder(config.resolution, config.cache_dir)
    rows = read_metadata(folder)
    column = config.label_column or OPENMOJI_LABELS[0]
    if column not in OPENMOJI_LABELS:
        raise ValueError(f"label_column is {column!r}, expected {' or '.join(OPENMOJI_LABELS)} for openmoji")
    names = sorted_names({row[column] for row in rows})
    wanted = {"train": (False,), "validation": (True,), "all": (False, True)}[split]
    rows = [row for row in rows if is_held_out(row["base"], config.holdout, config.holdout_seed) in wanted]
    if not rows:
        raise ValueError(f"holdout is {config.holdout}, a share that leaves no images in OpenMoji's {split} split")
    rows = _limited(rows, config.limit)
    return ImageDataset(
        references=[folder / row["file_name"] for row in rows],
        read=read_image,
        resolution=config.resolution,
        keys=[row["key"] for row in rows],
        labels=[names.index(row[column]) for row in rows],
        captions=[row["caption"] for row in rows],
        label_names=names,
        weights=torch.tensor([SKIN_TONE_WEIGHT if row["skin_tone"] else 1.0 for row in rows]),
        fingerprint=_fingerprint(folder.name, config.resolution, [row["key"] for row in rows]),
        skip_unreadable=config.skip_unreadable,
    )


def _open_folder(config: DataConfig, split: str) -> ImageDataset:
    folder = Path(config.source)
    splits = [name for name in SPLIT_FOLDERS if (folder / name).is_dir()]
    if splits and split != "all" and split not in splits:
        raise ValueError(f"{folder} has no {split} split: it holds {', '.join(splits)}")
    roots = [folder / name for name in splits if split in (name, "all")] or [folder]
    folders = (entry for root in roots for entry in root.iterdir() if entry.is_dir() and _images(entry))
    classes = sorted_names({entry.name for entry in folders})
    loose = [path for root in roots for path in _images(root)]
    if classes and loose:
        raise ValueError(f"{folder} holds classes ({', '.join(classes[:3])}) and, beside them, images: {loose[0]}")
    pairs = [(path, 0) for path in loose] or [
        (path, label)
        for root in roots
        for label, name in enumerate(classes)
        if (root / name).is_dir()
        for path in _images(root / name)
    ]
    if not pairs:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{folder} holds no images ({suffixes}), in itself or one level below")
    pairs = _limited(pairs, config.limit)
    keys = [path.relative_to(folder).as_posix() for path, _ in pairs]
    sizes = [path.stat().st_size for path, _ in pairs]
    return ImageDataset(
        references=[path for path, _ in pairs],
        read=read_image,
        resolution=config.resolution,
        keys=keys,
        labels=[label for _, label in pairs],
        captions=[classes[label] if classes else "" for _, label in pairs],
        label_names=classes or ["image"],
        weights=torch.ones(len(pairs)),
        fingerprint=_fingerprint("folder", config.resolution, [f"{k}:{s}" for k, s in zip(keys, sizes, strict=True)]),
        skip_unreadable=config.skip_unreadable,
    )


def sorted_names(names: Iterable[str]) -> list[str]:
    """Names of classes in alphabetical order; if all are numbers, in theirs: "10" comes after "2"."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isascii() and name.isdecimal() for name in names) else names


def _images(folder: Path) -> list[Path]:
    files = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))


def _open_collection(config: DataConfig, split: str) -> ImageDataset:
    table = _load_collection(config, split)
    columns = {"image": config.image_column, "label": config.label_column, "caption": config.caption_column}
    for use, column in columns.items():
        if column is not None and column not in table.column_names:
            raise ValueError(f"{config.source} has no column {column!r} for the {use}; it has {table.column_names}")
    if len(table) == 0:
        raise ValueError(f"{config.source}: the {split} split holds no images")
    rows = _limited(list(range(len(table))), config.limit)
    chosen = table if len(rows) == len(table) else table.select(rows)
    labels, names, named = _collection_labels(chosen, config)
    texts = list(chosen[config.caption_column]) if config.caption_column else [""] * len(rows)
    where = f"{config.source}: {config.caption_column} of sample"
    return ImageDataset(
        references=rows,
        read=_CollectionReader(table, config.image_column, config.source),
        resolution=config.resolution,
        keys=[f"{row:08d}" for row in rows],
        labels=labels,
        captions=[check_caption(text, f"{where} {row}") for row, text in zip(rows, texts, strict=True)],
        label_names=names,
        weights=torch.ones(len(rows)),
        fingerprint=_fingerprint(config.source, config.resolution, [table._fingerprint, *map(str, rows)]),
        skip_unreadable=config.skip_unreadable,
        classes_named=named,
    )


def split_files(config: DataConfig, split: str) -> str | dict[str, str] | None:
    """`data_files` as `datasets` is given them for a split: training alone is the same with `validation_files`.

    Raises: ValueError where a builder of `datasets` is given no files, for which it would take those of the working
        directory, or a local pattern that matches none.
    """
    for name in ("data_files", "validation_files") if config.source in BUILDERS else ():
        pattern = getattr(config, name)
        if name == "data_files" and pattern is None:
            raise ValueError(f"data_files is none with source {config.source!r}, expected files or a pattern of them")
        if pattern is not None and "://" not in pattern and not glob(pattern, recursive=True):
            raise ValueError(f"{name} is {pattern!r}, which matches no file; the working directory is {Path.cwd()}")
    if config.validation_files is None or split == "train":
        return config.data_files
    held_out = {"validation": config.validation_files}
    return held_out if split == "validation" else {"train": config.data_files} | held_out


def _load_collection(config: DataConfig, split: str):
    """The table of `datasets` that holds a split."""
    datasets, files = require("datasets", "train"), split_files(config, split)
    try:
        collection = datasets.load_dataset(config.source, config.name, data_files=files)
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError, tarfile.TarError) as error:
        raise ValueError(
            f"source {config.source!r} is neither openmoji, nor a folder, nor a collection that `datasets` can load: "
            f"{error}"
        ) from error
    choices = {"train": ["train"], "validation": ["validation", "test"], "all": list(collection)}[split]
    found = [name for name in choices if name in collection]
    if not found:
        hint = "; data.validation_files may name one" if split == "validation" else ""
        raise ValueError(f"{config.source} has no {split} split; it has {', '.join(collection)}{hint}")
    return datasets.concatenate_datasets([collection[name] for name in (found if split == "all" else found[:1])])


def _collection_labels(table, config: DataConfig) -> tuple[list[int], list[str], bool]:
    """(labels, names of the classes, whether these are more than indices) of a table, whose labels are class indices,
    or names, which are numbered in alphabetical order."""
    if config.label_column is None:
        return [0] * len(table), ["image"], True
    labels = list(table[config.label_column])
    if all(isinstance(label, str) for label in labels):
        names = sorted_names(set(labels))
        indices = {name: index for index, name in enumerate(names)}
        return [indices[label] for label in labels], names, True
    wrong = [label for label in labels if not isinstance(label, int) or isinstance(label, bool) or label < 0]
    if wrong:
        raise ValueError(f"{config.source}: {config.label_column} is {wrong[0]!r}, expected class indices or names")
    names = getattr(table.features[config.label_column], "names", None)
    return labels, names or [str(index) for index in range(max(labels) + 1)], names is not None


class _CollectionReader:
    """Row -> image of a table of `datasets`; an object and not a closure, since it travels to worker processes."""

    def __init__(self, table, column: str, source: str):
        datasets = require("datasets", "train")
        self.table, self.column, self.source = table.cast_column(column, datasets.Image(decode=False)), column, source

    def __call__(self, row: int) -> Image.Image:
        return decode_image(self.table[row][self.column], f"image {row} of {self.source}")

    def file(self, row: int) -> str | io.BytesIO:
        """The image as it is stored; nothing where there is none."""
        value = self.table[row][self.column] or {"bytes": b"", "path": None}
        return value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])


def _limited(rows: list, limit: int | None) -> list:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[k * len(rows) // limit] for k in range(limit)]


def _fingerprint(source: str, resolution: int, keys: list[str]) -> str:
    return hashlib.sha256("\n".join([source, str(resolution), *keys]).encode()).hexdigest()[:16]
