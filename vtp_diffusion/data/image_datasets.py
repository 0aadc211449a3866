"""Image data sets with one interface: OpenMoji, folders of images, and any collection of the `datasets` library.

Every item is `{"image": uint8 (3, R, R), "label": int, "caption": str, "key": str}`; the crop is ADM's by default.
"""

import functools
import hashlib
import json
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch.utils.data import Dataset

from ..runtime.config import Settings, setting
from ..runtime.optional_packages import require
from ..runtime.processes import from_main, print_once
from .batches import spread_evenly
from .collection_columns import CollectionReader, collection_classes, collection_labels
from .folders import content_hashes, read_layout, sorted_names
from .image_files import SKIP_HINT, UnreadableImageError, center_crop, read_image
from .images import pil_to_uint8
from .openmoji import description, is_held_out, openmoji_folder, read_metadata
from .row_values import check_caption
from .shard_files import HELD_OUT, check_columns, check_source, known_by_content, load_collection

OPENMOJI_LABELS = ("subcategory", "category")
SKIN_TONE_WEIGHT = 0.2  # the five skin tones of one drawing count as one image
IN_MEMORY_BYTES = 2**30
Crop = Callable[[Image.Image, int], Image.Image]


@dataclass(kw_only=True)
class DataConfig(Settings):
    """Which images, and how large."""

    source: str = setting("openmoji", "openmoji, a folder, or a hub id / builder of `datasets` (parquet, webdataset)")
    resolution: int = setting(256, "side of the square images in pixels", at_least=1)
    name: str | None = setting(None, "`datasets`: name of the configuration")
    data_files: str | None = setting(None, "`datasets`: files or pattern, for builders")
    validation_files: str | None = setting(None, "`datasets`: held-out files, beside data_files", may_change=True)
    image_column: str = setting("image", "`datasets`: column of the images")
    label_column: str | None = setting(
        None, "`datasets`: column of the class (none: one class for all); openmoji: subcategory (none) or category"
    )
    caption_column: str | None = setting(None, "`datasets`: column of the text")
    holdout: float = setting(0.1, "share of OpenMoji's base emoji in the validation split", at_least=0, below=1)
    holdout_seed: int = setting(0, "seed that chooses the held-out base emoji", at_least=0)
    limit: int | None = setting(None, "largest number of images, spread over the whole set", at_least=1)
    # may change, because the fingerprint of the images holds it: a resumed run notices
    exif_orientation: bool = setting(True, "rotate by EXIF data, as viewers and `datasets` do", may_change=True)
    max_pixels: int | None = setting(
        None, "larger images count as unreadable; none: Pillow's limit, 178,956,970", may_change=True, at_least=1
    )
    # may change, because it has no effect until a run fails at an unreadable image
    skip_unreadable: bool = setting(False, "count and leave out images that cannot be read", may_change=True)
    streaming: bool = setting(False, "`datasets`: read the training shards as a stream, without an index")
    shuffle_buffer: int = setting(1000, "streaming: most samples that a worker shuffles together", at_least=1)
    shuffle_gib: float = setting(16.0, "streaming: most GiB of encoded samples that a node shuffles", above=0)
    stream_restart: bool = setting(
        False, "streaming: with other numbers of processes or workers, resume at an epoch's start", may_change=True
    )
    skip_empty_captions: bool = setting(False, "streaming: leave samples without text out of all objectives")
    cache_dir: str | None = setting(
        None, "folder for rendered OpenMoji; none: VTP_DIFFUSION_CACHE or the user's cache folder", may_change=True
    )

    def __post_init__(self):
        super().__post_init__()
        check_source(self.source, "source")
        if self.streaming and self.limit is not None:
            raise ValueError(f"limit is {self.limit} with streaming, expected none: set max_train_steps instead")
        own_reader = self.source == "openmoji" or Path(self.source).is_dir()
        if self.streaming and own_reader:
            raise ValueError(
                f"source is {self.source!r} with streaming, expected a builder or a hub id of `datasets`, such as "
                "webdataset or parquet with data_files"
            )
        for name in ("validation_files", "name", "data_files", "caption_column") if own_reader else ():
            if (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name} is {value!r} with source {self.source!r}, expected none: only a builder of `datasets` or "
                    "a hub id takes it"
                )
        if self.stream_restart and not self.streaming:
            raise ValueError("stream_restart is true without streaming, expected false: nothing is read as a stream")
        self._check_effect(own_reader)
        if self.validation_files is not None:
            self._check_validation_files()
        if self.skip_empty_captions and not (self.streaming and self.caption_column):
            given = f"streaming {str(self.streaming).lower()} and caption_column {self.caption_column or 'none'}"
            raise ValueError(f"skip_empty_captions is true with {given}, expected true and a column")

    def _check_effect(self, own_reader: bool) -> None:
        """Refuse settings that the source would ignore."""
        ignored = {name: own_reader and self.source != "openmoji" for name in ("image_column", "label_column")}
        ignored |= {name: self.source != "openmoji" for name in ("holdout", "holdout_seed")}
        for name, unused in ignored.items():
            value, default = getattr(self, name), getattr(DataConfig, name)
            if unused and value != default:
                folder = "; the classes of a folder are its sub-folders" * (name == "label_column")
                expected = "none" if default is None else default
                raise ValueError(
                    f"{name} is {value!r} with source {self.source!r}, where it has no effect: expected the default, "
                    f"{expected}{folder}. If a configuration sets it, add --data.{name} {expected}"
                )

    def _check_validation_files(self) -> None:
        given = f"validation_files is {self.validation_files!r}"
        if self.data_files is None:
            raise ValueError(f"{given}, expected none without data_files")
        files, held_out = (glob(pattern, recursive=True) for pattern in (self.data_files, self.validation_files))
        both = sorted(set(files) & set(held_out))
        if both or self.data_files == self.validation_files:
            raise ValueError(f"{given}, expected no file of data_files: {(both or [self.data_files])[0]} is in both")


class ImageDataset(Dataset):
    """Images by index.

    Args:
        references: one per image, for `read`: a path or an index.
        read: reference -> PIL image; raises UnreadableImageError naming the image.
        resolution: side of the cropped images.
        keys, labels, captions: (N,) each.
        label_names: one per class; its index if names are not known.
        weights: (N,) how often an image should be drawn, or copied, relative to others.
        fingerprint: identifies the content and the crop.
        skip_unreadable: in place of an image that cannot be read, give the next readable one with its label and key:
            an index always gives the same item. A data set kept in memory drops such images instead.
        classes_named: whether `label_names` are names and not only indices.
        whole: whether the source is a folder or a collection without a held-out split.
        variants: (N,) bool, whether an image is a variant of another one, such as an emoji with a skin tone. These are
            trained on, and left out where images are counted: of references and probes. None: there are none.
        described: hash of what `fingerprint` leaves out and training learns from.
        older_fingerprints: by which earlier versions knew the same images.

    Attributes:
        training_fingerprint: `fingerprint` and `described`: what a resumed run must find.
        skipped: keys of the unreadable images that this process and its workers have met so far.
        enlarged: (N,) whether an image is smaller than the crop; known for images read so far.
    """

    def __init__(self, references, read, resolution, keys, labels, captions, label_names, weights, fingerprint,
                 skip_unreadable=False, classes_named=True, whole=False, variants=None, described="",
                 older_fingerprints=()):  # fmt: skip
        self.references, self.read, self.resolution = references, read, resolution
        self.keys, self.labels, self.captions, self.label_names = keys, labels, captions, label_names
        self.weights, self.fingerprint, self.skip_unreadable = weights, fingerprint, skip_unreadable
        self.classes_named, self.whole, self._dropped, self.crop = classes_named, whole, list[str](), center_crop
        self.variants = torch.zeros(len(references), dtype=torch.bool) if variants is None else variants
        self._described, self.older_fingerprints = described, older_fingerprints
        # in shared memory, because the workers of a loader set them
        self._unreadable = torch.zeros(len(references), dtype=torch.bool).share_memory_()  # (N,)
        self.enlarged = torch.zeros(len(references), dtype=torch.bool).share_memory_()
        self._pixels: torch.Tensor | None = None  # (N, 3, R, R) of a small set that was read as a whole
        if len(references) == 0:
            raise ValueError("the data set holds no images")

    def __len__(self) -> int:
        return len(self.references)

    @property
    def training_fingerprint(self) -> str:
        return self.fingerprint + self._described

    def __getitem__(self, index: int) -> dict[str, Any]:
        for offset in range(len(self)):
            # the index itself is not wrapped: one beyond the end is an IndexError, which ends iteration
            item = self.item_or_none((index + offset) % len(self) if offset else index)
            if item is not None:
                return item
        raise ValueError(f"none of the {len(self)} images can be read")

    def item_or_none(self, index: int) -> dict[str, Any] | None:
        """The item of this very image; None if it cannot be read and `skip_unreadable` is true."""
        pixels = self._read(index) if self._pixels is None else self._pixels[index]
        if pixels is None:
            return None
        return {
            "image": pixels,  # (3, R, R)
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
        """Read every image now, and with `skip_unreadable` drop those that cannot be read."""
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
        self._pixels = torch.stack(pixels)
        return self

    def keep_readable(self, readable: list[int]) -> None:
        """Keep only the images at these indices, in order; `skipped` has the keys of the others.

        Raises: ValueError naming a class of which no image is left.
        """
        left_out = set(range(len(self))).difference(readable)
        if not left_out:
            return
        lost = {self.labels[index] for index in left_out}.difference(self.labels[index] for index in readable)
        if lost:
            raise ValueError(f"no image of the class {self.label_names[min(lost)]!r} can be read")
        self._dropped = [self.keys[index] for index in sorted(left_out)]
        self._unreadable = torch.zeros(len(readable), dtype=torch.bool).share_memory_()
        self.enlarged = self.enlarged[readable].share_memory_()
        self.weights, self.variants = self.weights[readable], self.variants[readable]
        for name in ("references", "keys", "labels", "captions"):
            values = getattr(self, name)
            setattr(self, name, [values[index] for index in readable])

    def _read(self, index: int) -> torch.Tensor | None:
        try:
            image = self.read(self.references[index])
        except UnreadableImageError as error:
            if not self.skip_unreadable:
                raise UnreadableImageError(f"{error}. {SKIP_HINT}") from error
            self._unreadable[index] = True
            return None
        if min(image.size) < self.resolution:
            self.enlarged[index] = True
        return pil_to_uint8(self.crop(image, self.resolution))


def open_dataset(
    config: DataConfig,
    split: Literal["train", "validation", "all"] = "train",
    crop: Crop = center_crop,
    or_all: bool = False,
    advice: str = "",
    quiet: bool = False,
) -> ImageDataset:
    """Open a data set and print what was found. Every process has to call this: only the main one lists a folder.

    OpenMoji is split by base emoji, a folder as `folders.py` says. A collection of `datasets` has its own splits;
    "validation" is `validation_files` if given, else its validation or test split. Classes have the same indices in
    all splits and under any `limit`.

    Args:
        crop: (image, resolution) -> square image.
        or_all: open all images if the source lacks the split.
        advice: end of the message about a split that is lacking: what to do in the program that asks for it.
        quiet: print nothing of OpenMoji or a folder, because it was printed for another split.
    Raises:
        ValueError: a source, split or column that does not exist, or no images.
        UnreadableImageError: an image of a small set, which is read now, cannot be decoded.
    """
    if split not in ("train", "validation", "all"):
        raise ValueError(f"split is {split!r}, expected train, validation or all")
    if config.streaming:
        raise ValueError("streaming is true, expected false: images are read by index here; a stream has no length")
    if config.source == "openmoji":
        dataset = _open_openmoji(config, split)
        if not quiet:
            print_once(f"openmoji, {split}: {len(dataset)} images, {len(dataset.label_names)} classes")
    elif Path(config.source).is_dir():
        dataset = _open_folder(config, split, or_all, advice, quiet)
    else:
        dataset = _open_collection(config, split, or_all, advice)
        classes = f"{len(dataset.label_names)} classes" if config.label_column else "1 class (label_column is none)"
        print_once(f"{config.source}, {split}: {len(dataset)} images, {classes}")
    empty = sorted(set(range(len(dataset.label_names))).difference(dataset.labels)) if config.limit is not None else []
    if empty and not quiet:
        names = reprlib.repr([dataset.label_names[index] for index in empty])
        print_once(
            f"warning: limit {config.limit} leaves {len(dataset)} images, and none of {len(empty)} classes: {names}"
        )
    if crop is not center_crop:
        dataset.crop, dataset.fingerprint = crop, f"{dataset.fingerprint}-{crop.__name__}"
        dataset.older_fingerprints = [f"{known}-{crop.__name__}" for known in dataset.older_fingerprints]
    if len(dataset) * 3 * config.resolution**2 <= IN_MEMORY_BYTES:
        dataset.keep_in_memory()
    return dataset


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
        raise ValueError(f"holdout is {config.holdout}, which leaves no images in OpenMoji's {split} split")
    rows = spread_evenly(rows, config.limit)
    return ImageDataset(
        references=[folder / row["file_name"] for row in rows],
        read=read_image,
        resolution=config.resolution,
        keys=[row["key"] for row in rows],
        labels=[names.index(row[column]) for row in rows],
        captions=[row["caption"] for row in rows],
        label_names=names,
        weights=torch.tensor([row.get("weight", SKIN_TONE_WEIGHT if row["skin_tone"] else 1.0) for row in rows]),
        fingerprint=_fingerprint(folder.name, config.resolution, [row["key"] for row in rows]),
        skip_unreadable=config.skip_unreadable,
        variants=torch.tensor([row["skin_tone"] for row in rows]),
        described=from_main(lambda: description(folder, rows)),
    )


def _open_folder(config: DataConfig, split: str, or_all: bool, advice: str, quiet: bool) -> ImageDataset:
    def look() -> tuple[list[str], list[str], list[int], str, bool]:
        """Classes, keys, labels, fingerprint, and whether there is no held-out split."""
        layout = read_layout(config.source)
        part = "all" if or_all and not layout.has(split) else split
        pairs = spread_evenly(layout.of_split(part, advice), config.limit)
        if not quiet:
            print_once(layout.describe())
        paths, labels = [path for path, _ in pairs], [label for _, label in pairs]
        keys = [path.relative_to(layout.folder).as_posix() for path in paths]
        known = [f"{key}:{label}:{h}" for key, label, h in zip(keys, labels, content_hashes(paths), strict=True)]
        found = _fingerprint("folder", config.resolution, known, config.exif_orientation), not layout.has("validation")
        return layout.classes, keys, labels, *found

    classes, keys, labels, fingerprint, whole = from_main(look)
    folder, named = Path(config.source), classes != ["image"]
    return ImageDataset(
        references=[folder / key for key in keys],
        read=functools.partial(read_image, orient=config.exif_orientation, max_pixels=config.max_pixels),
        resolution=config.resolution,
        keys=keys,
        labels=labels,
        captions=[classes[label] if named else "" for label in labels],
        label_names=classes,
        weights=torch.ones(len(labels)),
        fingerprint=fingerprint,
        skip_unreadable=config.skip_unreadable,
        whole=whole,
    )


def _open_collection(config: DataConfig, split: str, or_all: bool, advice: str) -> ImageDataset:
    collection, opened, builder = load_collection(config, split, or_all, advice)
    table = require("datasets", "train").concatenate_datasets([collection[name] for name in opened])
    check_columns(config, table.column_names)
    if len(table) == 0:
        raise ValueError(f"{config.source}: the {split} split holds no images")
    rows = spread_evenly(range(len(table)), config.limit)
    chosen = table if len(rows) == len(table) else table.select(rows)
    found = collection_classes(table, collection, opened, config)
    labels, names, named = collection_labels(chosen, found, config)
    texts = list(chosen[config.caption_column]) if config.caption_column else [""] * len(rows)
    where = f"{config.source}: {config.caption_column} of sample"
    captions = [check_caption(text, f"{where} {row}") for row, text in zip(rows, texts, strict=True)]
    reader = CollectionReader(table, config)
    content = known_by_content(builder, opened, table, config.image_column)

    def fingerprint(*known: str) -> str:
        return _fingerprint(config.source, config.resolution, [*known, *map(str, rows)], config.exif_orientation)

    by_datasets = fingerprint(table._fingerprint)  # of files, paths and times are in it
    described = json.dumps([[names[label] for label in labels], captions])  # names of folders may be labels
    return ImageDataset(
        references=rows,
        read=reader,
        resolution=config.resolution,
        keys=[f"{row:08d}" for row in rows],
        labels=labels,
        captions=captions,
        label_names=names,
        weights=torch.ones(len(rows)),
        fingerprint=by_datasets if content is None else fingerprint(content, config.image_column),
        skip_unreadable=config.skip_unreadable,
        classes_named=named,
        whole=config.validation_files is None and not any(name in collection for name in HELD_OUT),
        described="" if content is None else "+" + hashlib.sha256(described.encode()).hexdigest()[:16],
        older_fingerprints=() if content is None else (by_datasets,),
    )


def _fingerprint(source: str, resolution: int, keys: list[str], turned: bool = False) -> str:
    """`turned`: images are rotated by EXIF data. If not, the fingerprint is as before that option existed."""
    known = [source, str(resolution), *keys, *["EXIF orientation"] * turned]
    return hashlib.sha256("\n".join(known).encode(errors="surrogateescape")).hexdigest()[:16]
