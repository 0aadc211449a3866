"""Webdataset shards with upper-case suffixes, dots in names, or images of several formats in one shard.

The builder of `datasets` takes everything after a name's first dot as the column, and needs the same columns in every
sample. Here the columns are known: a file belongs to a column if its name ends in it, in any case, and the rest of the
name is the key of the sample. A sample without the image column takes an image of another format instead.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
from datasets.packaged_modules.webdataset.webdataset import WebDataset

EMPTY = datasets.Value("null")


@dataclass
class ShardsConfig(datasets.BuilderConfig):
    """`columns`: suffixes of the files to read, the image's first."""

    columns: tuple[str, ...] = ()


class Shards(WebDataset):
    """The builder of `datasets` with other rules for the sample and column of a file name."""

    BUILDER_CONFIG_CLASS = ShardsConfig

    def _split_generators(self, dl_manager: Any) -> list:
        splits = super()._split_generators(dl_manager)  # infers types from the first samples
        for column in self.config.columns:
            if self.info.features.get(column, EMPTY) == EMPTY:
                count = self.NUM_EXAMPLES_FOR_FEATURES_INFERENCE
                raise ValueError(
                    f"webdataset has no column {column!r}: none of the first {count} samples has a file .{column}"
                )
        return splits

    def _get_pipeline_from_tar(self, tar_path: str, tar_iterator: Iterable[tuple[str, Any]]) -> Iterator[dict]:
        sample: dict[str, Any] = {}
        other = None  # an image of another format than the image column's
        for path, file in tar_iterator:
            found = self._key_and_column(path, sample.get("__key__"))
            if found is None:
                continue
            key, column, exact = found
            if sample and sample["__key__"] != key:
                yield self._complete(sample, other)
                sample, other = {}, None
            sample |= {"__key__": key, "__url__": tar_path}
            if exact and column in sample:
                raise ValueError(f"{tar_path} holds two files of {key!r} for column {column}, the second is {path}")
            if exact:
                decode = self.DECODERS.get(column.rpartition(".")[2], bytes)
                sample[column] = decode(file.read())
            elif other is None:
                other = file.read()
        if sample:
            yield self._complete(sample, other)

    def _complete(self, sample: dict[str, Any], other: bytes | None) -> dict[str, Any]:
        image = self.config.columns[0]
        lacking = {column: None for column in self.config.columns if column not in sample}
        return lacking | ({image: other} if image in lacking else {}) | sample

    def _key_and_column(self, path: str, current: str | None) -> tuple[str, str, bool] | None:
        """(key of the sample, column, whether the suffix is the column's) of a file; None if it is not read."""
        folder, slash, name = path.rpartition("/")
        parts = name.split(".")
        image = self.config.columns[0]
        for k in range(1, len(parts)):
            key, suffix = folder + slash + ".".join(parts[:k]), ".".join(parts[k:]).lower()
            if not parts[0] or (k > 1 and folder + slash + parts[0] == current):
                return None  # hidden, or another file of the current sample, such as a mask: 1.mask.png
            for column in self.config.columns:
                if suffix == column.lower():
                    return key, column, True
        suffix = parts[-1].lower()
        if len(parts) == 2 and suffix in self.IMAGE_EXTENSIONS and image.lower() in self.IMAGE_EXTENSIONS:
            return folder + slash + parts[0], image, False
        return None
