"""The files that a collection of `datasets` is read from; checks that they exist and are complete."""

import hashlib
import os
import re
import shutil
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import Any

from ..runtime.disk import read_json, write_json
from ..runtime.optional_packages import require
from ..runtime.processes import from_main, print_once
from .collection_columns import images_outside
from .folders import content_hashes

BUILDERS = ("arrow", "csv", "imagefolder", "json", "pandas", "parquet", "webdataset")  # of `datasets`, need data_files

HELD_OUT = ("validation", "test")  # splits of a collection: the first that it has is the held-out one
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)  # NAME or OWNER/NAME
HELD_OUT_NAME = re.compile(r"(val|valid|validation|dev|test)([-_.]|$)", re.IGNORECASE)
COPIED = ("parquet", "webdataset")  # `datasets` copies these into Arrow files, about as large
DIGESTS = "content_digests.json"


def check_source(source: str, option: str) -> None:
    """Raises: ValueError for a source that looks like a folder but does not exist. `datasets` would ask the Hub,
    which takes long without a network."""
    if source == "openmoji" or source in BUILDERS or (source and Path(source).is_dir()):
        return
    if not HUB_ID.fullmatch(source) or Path(source.partition("/")[0]).exists():
        home = "; ~ is not expanded here" * source.startswith("~")
        raise ValueError(
            f"{option} is {source!r}, which is not a folder{home}. Expected one, openmoji, a builder of `datasets` "
            f"({', '.join(BUILDERS)}) or a Hub id, OWNER/NAME; the working directory is {Path.cwd()}"
        )


def split_files(config: Any, split: str) -> str | dict[str, str] | None:
    """The `data_files` argument of `datasets` for a split of a `DataConfig`. For "train" it does not depend on
    `validation_files`.

    Raises: ValueError for a builder of `datasets` without files (it would take those of the working directory), or a
        local pattern that matches no file.
    """
    for name in ("data_files", "validation_files") if config.source in BUILDERS else ():
        pattern = getattr(config, name)
        if name == "data_files" and pattern is None:
            raise ValueError(f"data_files is none with source {config.source!r}, expected files or a pattern of them")
        if pattern is not None and "://" not in pattern and not glob(pattern, recursive=True):
            raise ValueError(f"{name} is {pattern!r}, which matches no file; the working directory is {Path.cwd()}")
        for file in glob(pattern or "", recursive=True):
            if not Path(file).is_file() and not Path(file).is_dir():
                raise ValueError(f"{name}: {file} is a broken link, a pipe or something else that is not a file")
            _check_tar_end(file)
    if config.validation_files is None or split == "train":
        return config.data_files
    return {"train": config.data_files, "validation": config.validation_files}


def held_out_note(files: Sequence[str]) -> str | None:
    """A warning for files of one split of which some are named, or lie in a folder named, like held-out ones."""
    paths = [Path(file) for file in files]
    start = len(Path(os.path.commonpath([path.parent for path in paths] or ["."])).parts)
    named = [path for path in paths if any(HELD_OUT_NAME.match(part) for part in path.parts[start:])]
    if not 0 < len(named) < len(files):
        return None
    return (
        f"warning: {len(named)} of the {len(files)} data_files are named like held-out ones, such as {named[0]}, and "
        "are trained on with the others: --data.validation_files names held-out ones"
    )


def collection_builder(config: Any, split: str) -> Any:
    """The builder of `datasets` for a split. Raises: as `split_files`, and what `datasets` raises."""
    datasets, files = require("datasets", "train"), split_files(config, split)
    if config.source != "webdataset":
        return datasets.load_dataset_builder(config.source, config.name, data_files=files)
    from .webdataset_shards import Shards

    columns = dict.fromkeys(filter(None, (config.image_column, config.caption_column, config.label_column)))
    return Shards(dataset_name="webdataset", data_files=files, columns=tuple(columns))


def load_collection(config: Any, split: str, or_all: bool, advice: str) -> tuple[Any, list[str], Any]:
    """A collection of `datasets` (name -> table), the names of its tables that make up `split`, and its builder."""
    datasets = require("datasets", "train")
    try:
        builder = collection_builder(config, split)
        from_main(lambda: announce_copy(builder, config.data_files))
        one_split = config.source in BUILDERS and config.validation_files is None
        if one_split and (note := held_out_note(builder.config.data_files["train"])):
            print_once(note)
        builder.download_and_prepare()
        collection = builder.as_dataset()
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError, tarfile.TarError) as error:
        raise ValueError(
            f"source {config.source!r}, data_files {config.data_files or 'none'}, is neither openmoji, nor a folder, "
            "nor a collection that `datasets` can load: "
            f"{error}{f' ({error.__cause__})' if error.__cause__ else ''}"
        ) from error
    if split == "all":
        return collection, list(collection), builder
    found = [name for name in (HELD_OUT if split == "validation" else ("train",)) if name in collection]
    if not found and not or_all:
        hint = "; data.validation_files may name one" if split == "validation" else ""
        raise ValueError(f"{config.source} has no {split} split; it has {', '.join(collection)}{hint}{advice}")
    return collection, found[:1] or list(collection), builder


def known_by_content(builder: Any, opened: Sequence[str], table: Any, image_column: str) -> str | None:
    """What tells images by the content of their files, wherever these lie and whenever they were written; None if
    they are not all in files of this machine. Every process has to call this.

    Args: `opened`: splits that make up `table`.
    """
    by_split = builder.config.data_files or {}
    files = {file for name in opened for file in by_split.get(name, ())}
    if not files or not images_outside(table, image_column).issubset(files):
        return None
    digests = from_main(lambda: kept_digests(builder))
    found = [digests.get(name) for name in opened]
    return None if None in found else " ".join(found)


def kept_digests(builder: Any) -> dict[str, str | None]:
    """Split -> hash of its files, of their names below their common folder and of all their bytes; None if one is not
    a file of this machine.

    It is kept beside the tables that `datasets` has prepared of these files: it tells what these hold, and the files
    are read once. For files with other paths or times `datasets` prepares other tables.
    """
    kept = Path(builder.cache_dir) / DIGESTS
    if kept.is_file():
        return read_json(kept)
    digests = {name: _digest([Path(file) for file in files]) for name, files in builder.config.data_files.items()}
    with suppress(OSError):  # a cache that several users share may be read-only
        write_json(kept, digests)
    return digests


def _digest(files: list[Path]) -> str | None:
    if not all(file.is_file() for file in files):
        return None
    folder = os.path.commonpath([file.parent for file in files])
    names = [file.relative_to(folder).as_posix() for file in files]
    known = [f"{name}:{content}" for name, content in zip(names, content_hashes(files), strict=True)]
    return hashlib.sha256("\n".join(known).encode(errors="surrogateescape")).hexdigest()[:32]


def check_columns(config: Any, known: list[str]) -> tuple[str | None, ...]:
    """(image, label, caption) columns that a configuration names, or None. Raises: ValueError if one is missing."""
    columns = {"image": config.image_column, "label": config.label_column, "caption": config.caption_column}
    for use, column in columns.items():
        if column is not None and column not in known:
            raise ValueError(f"{config.source} has no column {column!r} for the {use}; it has {known}")
    return tuple(columns.values())


def announce_copy(builder: Any, data_files: str) -> None:
    """Print the size and place of the copy of the shards that `datasets` is about to make in its cache.

    Raises: ValueError if the disk has too little space.
    """
    folder = Path(builder.cache_dir)
    files = [file for names in (builder.config.data_files or {}).values() for file in names if Path(file).is_file()]
    if builder.dataset_name not in COPIED or folder.exists() or not files:
        return
    size, disk = sum(Path(file).stat().st_size for file in files), folder
    while not disk.exists():
        disk = disk.parent
    needed, free = size / 1e9, shutil.disk_usage(disk).free / 1e9
    if needed > free:
        raise ValueError(
            f"data_files is {data_files!r}: `datasets` copies its {needed:,.1f} GB into {folder}, where "
            f"{free:,.1f} GB are free. Make room, set the environment variable HF_DATASETS_CACHE to a folder on a "
            "larger disk, or read them with data.streaming true, which copies nothing"
        )
    print(
        f"{data_files}: `datasets` copies {needed:,.1f} GB into {folder}, once for files with these times, which "
        "cp -p and rsync -t keep; HF_DATASETS_CACHE sets the folder"
    )


def _check_tar_end(file: str) -> None:
    """Raises: ValueError for a truncated tar file: one cut between two members looks complete to tarfile."""
    if not file.endswith(".tar"):
        return
    with open(file, "rb") as tar:
        size = tar.seek(0, 2)
        tar.seek(-min(512, size), 2)
        if size % 512 or tar.read().strip(b"\0"):
            raise ValueError(f"{file} is truncated: it does not end as a tar file does. Copy or pack it again")
