"""The images of this experiment in its second form: Fashion-MNIST as two parquet files.

    python experiments/understanding_drives_generation/fashion.py --idx /usr/share/datasets/fashion-mnist \\
        --output runs/fashion

Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv:1708.07747) is 70,000 grey photographs of 28 pixels in 10 classes of
equal size. Its four IDX files are in the Debian package `dataset-fashion-mnist` and in the repository
zalandoresearch/fashion-mnist. Two black pixels on every side make the images 32 pixels wide; nothing is resized.
train.parquet holds the 60,000 training images and test.parquet the 10,000 others, each with its label and a caption,
the name of the class in a sentence.
"""

import gzip
import io
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vtp_diffusion.data.openmoji import ATTRIBUTION_NAME
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import replacing
from vtp_diffusion.runtime.optional_packages import require

CLASSES = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
SIDE, BORDER = 28, 2  # pixels
PARTS = {"train": "train", "test": "t10k"}  # file that is written -> beginning of the files that are read
MAGIC = {1: 0x801, 3: 0x803}  # dimensions -> how an IDX file of bytes begins
LICENCE = (
    "Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist), copyright 2017 Zalando SE, MIT License.\n"
    "Black was added around the images.\n"
)


@dataclass(kw_only=True)
class Config(Settings):
    """Settings of this program."""

    idx: str = setting(help="folder of the four files NAME-idx3-ubyte.gz and NAME-idx1-ubyte.gz")
    output: str = setting("runs/fashion", "folder for the parquet files")


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """The bytes of a compressed IDX file, of so many dimensions. Raises: ValueError naming the file."""
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read: {error}; expected a file of Fashion-MNIST") from error
    start = 4 * (1 + dimensions)
    magic, *shape = np.frombuffer(content[:start].ljust(start, b"\0"), ">u4").tolist()
    if magic != MAGIC[dimensions] or len(content) != start + math.prod(shape):
        raise ValueError(f"{file} is no IDX file of {dimensions} dimensions, or a damaged one")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_part(folder: Path, name: str) -> list[dict]:
    """Image, label and caption of every row of the training or the test set. Raises: ValueError: other files."""
    files = folder / f"{name}-images-idx3-ubyte.gz", folder / f"{name}-labels-idx1-ubyte.gz"
    images, labels = read_idx(files[0], 3), read_idx(files[1], 1)
    if images.shape != (len(labels), SIDE, SIDE) or labels.max(initial=0) >= len(CLASSES):
        raise ValueError(
            f"{folder}: images of {name} are {images.shape} with {len(labels)} labels up to {labels.max(initial=0)}, "
            f"expected (N, {SIDE}, {SIDE}) with N labels below {len(CLASSES)}"
        )
    padded = np.pad(images, ((0, 0), (BORDER, BORDER), (BORDER, BORDER)))
    return [row(image, CLASSES[label]) for image, label in zip(padded, labels, strict=True)]


def row(image: np.ndarray, label: str) -> dict:
    """Image, label and caption as a table has them."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    article = "" if label == "trousers" else "an " if label[0] in "aeiou" else "a "
    return {"image": {"bytes": file.getvalue()}, "label": label, "caption": f"a photo of {article}{label}"}


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    folder, datasets = Path(config.output), require("datasets", "train")
    if folder.exists():
        raise ValueError(f"{folder} is there already: remove it, or give another --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as unfinished:
        unfinished.mkdir()
        for part, name in PARTS.items():
            rows = read_part(Path(config.idx), name)
            datasets.Dataset.from_list(rows).to_parquet(unfinished / f"{part}.parquet")
            print(f"{len(rows)} images in {folder / part}.parquet")
        (unfinished / ATTRIBUTION_NAME).write_text(LICENCE, encoding="utf-8")


if __name__ == "__main__":
    run(main)
