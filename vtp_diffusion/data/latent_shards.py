"""Latent shards on disk: what `train_dit/extract_latents.py` writes and `train_dit/train.py` reads.

A shard is a safetensors file with `latents` and `latents_flip` (N, C, h, w), the raw latents of images and of their
mirror images, and `labels` (N,). `ImgLatentDataset` of hustvl/LightningDiT reads it too, with the statistics in
latents_stats.pt. latents.json says which autoencoder made the latents and how. A folder with plan.json but without
latents.json is an unfinished extraction.
"""

import hashlib
import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from ..runtime import folder_lock
from ..runtime.config import setting_differences
from ..runtime.disk import is_unfinished, read_json, replacing, write_json
from ..runtime.random_reads import RandomReads, allow_open_files, read_rows
from .channel_statistics import ChannelStatistics
from .row_values import MAX_CLASSES

METADATA_NAME = "latents.json"
PLAN_NAME = "plan.json"  # settings of an extraction, written when it begins
STATISTICS_NAME = "latents_stats.pt"  # mean and standard deviation for upstream's loader
LATENT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHARD_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LABEL_DTYPES = ("I64", "I32")
_TENSORS = ("latents", "latents_flip", "labels")
_NOTES = "shard"  # the only key of a shard's metadata: safetensors writes several in no fixed order


def write_shard(
    path: Path,
    latents: torch.Tensor,
    latents_flip: torch.Tensor,
    labels: torch.Tensor,
    skipped: Sequence[str] = (),
    first: int | None = None,
) -> None:
    """Write one shard atomically: a shard that exists is complete. The same values give the same bytes. Its metadata
    hold a SHA-256 and the moments of each channel.

    Args:
        skipped: keys of this shard's samples whose images cannot be read.
        first: index of the shard's first sample over all shards, skipped samples included. `LatentDataset` uses it to
            find missing, duplicate or overlapping shards.
    Raises: ValueError for values that are not finite (float16 ends at 65504), before anything is written. OSError if
        the file cannot be written.
    """
    for name, values in (("latents", latents), ("latents_flip", latents_flip)):
        if not values.isfinite().all():
            raise ValueError(f"{path}: {name} in {values.dtype} hold values that are not finite")
    tensors = {"latents": latents, "latents_flip": latents_flip, "labels": labels}
    notes = {"skipped": list(skipped)} | ({} if first is None else {"first": first})
    notes["moments"] = ChannelStatistics.of(latents, latents_flip).moments()
    notes["sha256"] = _sha256(notes, tensors)
    with replacing(path, "Complete shards are kept: the same command continues after them") as unfinished:
        save_file(tensors, unfinished, metadata={_NOTES: json.dumps(notes)})


def _sha256(notes: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Hash of a shard's metadata and tensors; older shards have no moments."""
    says = [notes.get("skipped"), notes.get("first"), *([notes["moments"]] if "moments" in notes else [])]
    digest = hashlib.sha256(json.dumps(says).encode())
    for name in _TENSORS:
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_notes(header: dict[str, Any]) -> dict[str, Any]:
    """skipped, first, moments and sha256 of a shard; version 0.1 wrote only the first two, upstream none."""
    metadata = header.get("__metadata__", {})
    if _NOTES in metadata:
        return json.loads(metadata[_NOTES])
    return {name: json.loads(metadata[name]) for name in ("skipped", "first") if name in metadata}


def check_content(path: Path, required: bool = False) -> None:
    """Read a shard and compare it with the SHA-256 in its metadata.

    Args: `required`: refuse a shard without one, as version 0.1 and other programs write.
    Raises: ValueError naming the shard.
    """
    notes = _read_notes(_read_header(path))
    if "sha256" not in notes:
        if required:
            raise ValueError(f"{path} has no SHA-256 in it: version 0.1 or another program wrote it. Extract it anew")
        return
    with safe_open(path, framework="pt") as file:
        found = _sha256(notes, {name: file.get_tensor(name) for name in _TENSORS})
    if found != notes["sha256"]:
        raise ValueError(f"{path} is damaged: its content is not what was written. Delete it and extract again")


def write_statistics(folder: Path, mean: Sequence[float], std: Sequence[float]) -> None:
    """Write latents_stats.pt as upstream's loader wants it: float32 tensors (1, C, 1, 1) `mean` and `std`."""
    path, content = folder / STATISTICS_NAME, io.BytesIO()
    torch.save({"mean": torch.tensor(mean).view(1, -1, 1, 1), "std": torch.tensor(std).view(1, -1, 1, 1)}, content)
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.getvalue())


def begin_extraction(folder: Path, plan: dict[str, Any], older_fingerprints: Sequence[str] = ()) -> None:
    """Lock a folder for an extraction: an empty one, or one where the same extraction began.

    Args: `plan`: the settings that decide the shards' content; `older_fingerprints`: what earlier versions would have
        called its "fingerprint".
    Raises: ValueError if the folder holds other latents (naming what differs) or other files, or another process works
        in it.
    """
    path = folder / PLAN_NAME
    if path.is_file():
        there = read_json(path)
        begun = {"classes": plan.get("classes")} | there  # of which older plans say nothing
        if renamed := there.get("fingerprint") in older_fingerprints:
            begun["fingerprint"] = plan["fingerprint"]
        if "data" in plan:  # older plans have settings that may change
            begun["data"] = {name: value for name, value in begun["data"].items() if name in plan["data"]}
        if lines := setting_differences(begun, plan):
            raise ValueError(f"{folder} holds other latents:\n" + "\n".join(lines))
        folder_lock.acquire(folder)
        if renamed:
            write_json(path, there | {"fingerprint": plan["fingerprint"]})
        for entry in folder.iterdir():  # left by a killed attempt, also by safetensors itself
            if entry.is_file() and (is_unfinished(entry) or entry.name.startswith(".tmp")):
                entry.unlink()
        return
    # a kill while the plan is written leaves only its unfinished file in the folder
    if folder.exists() and not all(e.name == folder_lock.LOCK_NAME or is_unfinished(e) for e in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no {PLAN_NAME}: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    folder_lock.acquire(folder)
    write_json(path, plan)


def check_shard(path: Path, samples: int, dtype: torch.dtype) -> None:
    """Check a shard of an earlier attempt. Raises: ValueError if it is damaged, or has another number of samples or
    another dtype."""
    try:
        header, skipped = _read_header(path), len(read_skipped(path))
    except ValueError as error:
        raise ValueError(f"{error}: delete it, run again") from error
    count, found = header["labels"]["shape"][0] + skipped, _SHARD_DTYPES[header["latents"]["dtype"]]
    if count != samples or found != dtype:
        raise ValueError(
            f"{path} holds {count} samples in {found}, expected {samples} in {dtype}: delete it, run again"
        )
    check_content(path)


def verify_shard(path: Path, expected_labels: Sequence[int], checked: bool = False) -> ChannelStatistics:
    """Check a shard's SHA-256 and labels, and return the statistics of its latents and mirrored latents: those in its
    metadata, or computed now for an older shard without them.

    Args: `expected_labels`: one per sample, in order; `checked`: the SHA-256 has been compared already.
    Raises: ValueError naming the shard and what is wrong with it.
    """
    notes = _read_notes(_read_header(path))
    if not checked:
        check_content(path)
    with safe_open(path, framework="pt") as file:
        if file.get_tensor("labels").tolist() != list(expected_labels):
            raise ValueError(f"{path} holds other labels than the data set gives, or another number of them")
        if "moments" in notes:
            return ChannelStatistics.from_moments(notes["moments"])
        latents = {name: file.get_tensor(name) for name in ("latents", "latents_flip")}
    for name, values in latents.items():
        if not values.isfinite().all():
            raise ValueError(f"{path}: {name} hold values that are not finite")
    return ChannelStatistics.of(*latents.values())


def read_hashes(paths: Sequence[Path]) -> dict[str, str | None]:
    """Name of a shard -> the SHA-256 in its metadata, or None. The content is not read."""
    return {path.name: _read_notes(_read_header(path)).get("sha256") for path in paths}


def is_finished(folder: Path, paths: Sequence[Path]) -> bool:
    """Whether an extraction has finished and all its shards still exist with the hashes in latents.json."""
    metadata = folder / METADATA_NAME
    if not metadata.is_file() or not all(path.is_file() for path in paths):
        return False
    return _read_metadata(metadata).get("hashes") == read_hashes(paths)


def read_skipped(path: Path) -> list[str]:
    """Keys that `write_shard` noted as skipped."""
    return _read_notes(_read_header(path)).get("skipped", [])


def write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Write latents.json atomically."""
    write_json(folder / METADATA_NAME, metadata)


class LatentDataset(Dataset):
    """Shards of a folder as one data set; each process opens the files once.

    Each row is read into the batch, not from a memory map. With a map the kernel would also read what surrounds each
    row: hundreds of times as many bytes if the latents do not fit into memory.

    Args:
        folder: of the shards, ours or upstream's.
        unfinished: accept an unfinished extraction, for the extraction itself.
        verify: read every shard and compare it with its SHA-256.

    Attributes:
        shape: (C, h, w) of one latent.
        labels: (N,) int64.
        metadata: content of latents.json; None for shards of upstream's extraction.
        id2label: class index -> name; without latents.json, names are the indices from 0 to the largest label.
        num_bytes: of all latents together.
        fingerprint, older_fingerprints: identifies the files; none, as of `ImageDataset`.
        weights: None: every latent counts the same.
    Raises: ValueError: no shards, an unfinished extraction, a truncated shard, keys, types or shapes that do not fit
        together, labels out of range, missing, duplicate or overlapping shards, or other files or counts than
        latents.json says.
    """

    weights = None

    def __init__(self, folder: str | Path, unfinished: bool = False, verify: bool = False):
        self.folder = Path(folder)
        self.files = sorted(self.folder.glob("*.safetensors"))
        if not self.files:
            raise ValueError(f"{self.folder} holds no latent shards (*.safetensors): run train_dit/extract_latents.py")
        metadata = self.folder / METADATA_NAME
        if not unfinished and not metadata.is_file() and (self.folder / PLAN_NAME).is_file():
            raise ValueError(f"the extraction of {self.folder} has not finished: run the same command again")
        self._open: dict[int, RandomReads] = {}
        headers = [_read_header(path) for path in self.files]
        # (shards, 2): where latents and mirrored latents begin
        self._offsets = np.array([[header[name]["data_offsets"][0] for name in _TENSORS[:2]] for header in headers])
        allow_open_files(len(self.files))
        counts = self._check_headers(headers)
        self.ends = np.cumsum(counts)
        self.metadata = _read_metadata(metadata) if metadata.is_file() else None
        if self.metadata is not None:
            self._check_promises(counts)
        samples = [] if unfinished else self._check_order(headers, counts)
        self._check_finite()
        self.labels = torch.cat([self._shard(index)["labels"].long() for index in range(len(self.files))])
        self.id2label = self._check_labels()
        sizes = [f"{path.name}:{path.stat().st_size}:{count}" for path, count in zip(self.files, counts, strict=True)]
        sizes += [note["sha256"] for note in map(_read_notes, headers) if "sha256" in note]
        content = samples if self.metadata is None else self.metadata["mean"]
        for path in self.files if verify else ():
            check_content(path, required=True)
        self.older_fingerprints = ()
        self.fingerprint = hashlib.sha256("\n".join([*sizes, str(content)]).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """What it holds, for the console."""
        shape = " x ".join(map(str, self.shape))
        return f"{self.folder}: {len(self):,} latents of {shape}, {len(self.id2label)} classes"

    def _check_headers(self, headers: list[dict[str, Any]]) -> list[int]:
        """Latents in every shard; sets `shape`, `dtype` and `num_bytes`."""
        self.shape, dtype = tuple(headers[0]["latents"]["shape"][1:]), headers[0]["latents"]["dtype"]
        counts = []
        for path, header in zip(self.files, headers, strict=True):
            latents, flipped, labels = (header[name] for name in ("latents", "latents_flip", "labels"))
            count, *shape = latents["shape"]
            if tuple(shape) != self.shape or latents["dtype"] != dtype:
                raise ValueError(
                    f"{path} holds latents {tuple(shape)} in {latents['dtype']}, {self.files[0].name} holds "
                    f"{self.shape} in {dtype}"
                )
            if flipped["shape"] != latents["shape"] or labels["shape"] != [count] or flipped["dtype"] != dtype:
                raise ValueError(
                    f"{path}: latents {latents['shape']} in {dtype}, but latents_flip {flipped['shape']} in "
                    f"{flipped['dtype']} and labels {labels['shape']}"
                )
            counts.append(count)
        self.dtype = _SHARD_DTYPES[dtype]
        self.num_bytes = 2 * sum(counts) * int(np.prod(self.shape)) * self.dtype.itemsize
        return counts

    def _check_promises(self, counts: list[int]) -> None:
        """Compare with latents.json, which lists the shards and their sizes (in older files, only the total)."""
        found = dict(zip((path.name for path in self.files), counts, strict=True))
        promised = self.metadata.get("shards", found)
        for words, names in (
            ("are missing", promised.keys() - found.keys()),
            (f"are not in {METADATA_NAME}", found.keys() - promised.keys()),
            (
                "hold other counts of latents",
                {name for name in found.keys() & promised if found[name] != promised[name]},
            ),
        ):
            if names:
                raise ValueError(f"{self.folder}: shards {words}: {', '.join(sorted(names))}")
        if self.metadata["num_samples"] != len(self):
            raise ValueError(
                f"{self.folder} holds {len(self)} latents, {METADATA_NAME} says {self.metadata['num_samples']}"
            )

    def _check_order(self, headers: list[dict[str, Any]], counts: list[int]) -> list[str]:
        """Refuse missing, duplicate or overlapping shards, by the `first` in their metadata.

        Returns: for shards without it, such as upstream's, a hash of each one's labels and some latents; else nothing.
        """
        notes = [_read_notes(header) for header in headers]
        if all("first" in note for note in notes):
            expected = 0
            for path, note, count in zip(self.files, notes, counts, strict=True):
                if (first := note["first"]) != expected:
                    fault = "a shard before it is missing" if first > expected else "it is there twice or overlaps"
                    raise ValueError(f"{path} begins with sample {first}, expected {expected}: {fault}")
                expected = first + count + len(note["skipped"])
            return []
        seen: dict[str, Path] = {}
        for index, path in enumerate(self.files):
            shard = self._shard(index)
            ends = shard["latents"][[0, len(shard["labels"]) // 2, -1]]  # equal in a copied file
            digest = hashlib.sha256(ends.view(torch.uint8).numpy()).hexdigest() + str(shard["labels"].tolist())
            other = seen.setdefault(hashlib.sha256(digest.encode()).hexdigest(), path)
            if other != path:
                raise ValueError(f"{path} holds the same latents as {other.name}: a shard is there twice")
        return list(seen)

    def _check_finite(self) -> None:
        """Check three latents per shard: without this, training fails after many steps and names no file."""
        for index, path in enumerate(self.files):
            shard = self._shard(index)
            rows = [0, len(shard["labels"]) // 2, -1]
            for name in ("latents", "latents_flip"):
                if not shard[name][rows].isfinite().all():
                    raise ValueError(f"{path}: {name} hold values that are not finite: extract them again")

    def _check_labels(self) -> dict[int, str]:
        names = None if self.metadata is None else self.metadata["label_names"]
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        last = (MAX_CLASSES if names is None else len(names)) - 1
        if lowest < 0 or highest > last:
            raise ValueError(f"{self.folder}: labels go from {lowest} to {highest}, expected 0 to {last}")
        return dict(enumerate(names or [str(index) for index in range(highest + 1)]))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Raw `latents` and `latents_flip` (B, C, h, w) as stored, and `labels` (B,) int64, in the order asked for."""
        both = [self.read(indices, np.full(len(indices), flip)) for flip in (False, True)]
        return both[0] | {"latents_flip": both[1]["latents"]}

    def read(
        self, indices: Sequence[int], mirrored: np.ndarray, into: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """One latent per index, of the image or its mirror image: half as much reading as `__getitems__`.

        Args:
            mirrored: (B,) bool: take the latent of the mirror image.
            into: contiguous (B, C, h, w) of the same dtype to write to; it is the result.
        Returns: raw `latents` (B, C, h, w) as stored, and `labels` (B,) int64, in the order asked for.
        Raises: IndexError for an index out of range.
        """
        wanted = np.asarray(indices)
        if len(wanted) == 0 or wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"indices {indices} of {len(self)} latents")
        latents = torch.empty(len(wanted), *self.shape, dtype=self.dtype) if into is None else into
        rows = latents.flatten(1).view(torch.uint8).numpy()  # (B, bytes of a latent)
        shards = np.searchsorted(self.ends, wanted, side="right")
        places = wanted - np.concatenate([[0], self.ends])[shards]
        offsets = self._offsets[shards, mirrored.astype(int)] + places * rows.shape[1]
        read_rows([self._file(shard) for shard in shards.tolist()], offsets.tolist(), rows)
        return {"latents": latents, "labels": self.labels[torch.from_numpy(wanted)]}

    def _shard(self, index: int) -> dict[str, torch.Tensor]:
        with safe_open(self.files[index], framework="pt") as file:  # tensors are views of the mapped file
            return {name: file.get_tensor(name) for name in _TENSORS}

    def _file(self, index: int) -> RandomReads:
        if index not in self._open:
            self._open.setdefault(index, RandomReads(self.files[index]))  # if two threads open it, either will do
        return self._open[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # open files cannot be pickled for worker processes


def _read_metadata(path: Path) -> dict[str, Any]:
    """Content of latents.json. Raises: ValueError if it is damaged or lacks what training needs."""
    metadata = read_json(path, "Delete it and run the same extraction again")
    kinds = {"autoencoder": dict, "num_samples": int, "label_names": list, "mean": list, "std": list, "shards": dict}
    lacking = [name for name in kinds if name not in metadata and name != "shards"]
    wrong = [
        f"{name} is {metadata[name]!r:.40}"
        for name in kinds
        if not isinstance(metadata.get(name, kinds[name]()), kinds[name])
    ]
    if lacking or wrong:
        found = "; ".join([f"lacks {', '.join(lacking)}"] * bool(lacking) + wrong)
        raise ValueError(f"{path} {found}: expected what train_dit/extract_latents.py writes")
    return metadata


def _read_header(path: Path) -> dict[str, Any]:
    """Names, types and shapes of a shard without reading it, checked against its length."""
    if not path.is_file():  # opening a pipe would wait for a writer
        raise ValueError(f"{path} is a broken link, a pipe or something else that is not a file")
    try:
        with safe_open(path, framework="pt") as file:  # refuses a truncated file
            names = set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    missing = set(_TENSORS) - names
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it holds {', '.join(sorted(names))}")
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    if header["labels"]["shape"] == [0]:
        raise ValueError(f"{path} holds no latents")
    if header["latents"]["dtype"] not in _SHARD_DTYPES or len(header["latents"]["shape"]) != 4:
        raise ValueError(f"{path}: latents are {header['latents']}, expected (N, C, h, w) in 16 or 32 bits")
    for name in _TENSORS:  # made relative to the start of the file
        header[name]["data_offsets"] = [8 + length + offset for offset in header[name]["data_offsets"]]
    if header["labels"]["dtype"] not in _LABEL_DTYPES:
        raise ValueError(f"{path}: labels are {header['labels']['dtype']}, expected {' or '.join(_LABEL_DTYPES)}")
    return header
