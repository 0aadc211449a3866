"""The npz files of ADM's evaluator, read and written without holding all images in memory.

An npz is a zip archive of npy files. An uncompressed one (`np.savez`) is mapped into memory; a compressed one
(`np.savez_compressed`) is decompressed as it is read, from front to back.
"""

import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..runtime.disk import remove_leftovers, replacing, sync_folder, writing

IMAGES_KEY = "arr_0"
READ_BYTES = 1 << 24
LOCAL_HEADER_BYTES = 30  # of a zip entry, without its name and extra field


# what zipfile and numpy raise for damaged files and unknown compression
DAMAGE_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, lzma.LZMAError)


def has_images(path: str | Path) -> bool:
    """Whether an npz of a reference holds images and not only statistics. Only the file's directory is read.

    Raises: ValueError naming the file: not an npz, or without images and without statistics.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an npz file, or is damaged: expected {IMAGES_KEY}, or mu and sigma, or both")
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    if not {IMAGES_KEY, "mu", "ref_mu"}.intersection(names):
        raise ValueError(f"{path} holds {', '.join(names) or 'nothing'}: expected {IMAGES_KEY}, or mu and sigma")
    return IMAGES_KEY in names


def open_npz(path: str | Path) -> dict[str, np.ndarray | None]:
    """The arrays of an npz, name -> array, with None for its images: `NpzImages` reads and checks those.

    Raises: ValueError naming the file: as `has_images`, damaged or encrypted.
    """
    has_images(path)
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            _check_plain(path, entry)
            if name == IMAGES_KEY:
                arrays[name] = None
                continue
            try:
                with archive.open(entry) as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
                    while file.read(READ_BYTES):  # the checksum is compared at the end
                        pass
            except DAMAGE_ERRORS as error:
                raise ValueError(f"{path} is damaged in its entry {name}: {error}") from error
    return arrays


def _check_plain(path: str | Path, entry: zipfile.ZipInfo) -> None:
    if entry.flag_bits & 1:
        raise ValueError(f"{path}: {entry.filename} is encrypted, expected an npz as numpy writes it")


def read_header(file) -> tuple[tuple[int, ...], np.dtype]:
    """Read the header of an npy file: shape and dtype. `file` is open at its beginning.

    Raises: ValueError: not an npy file, or one in Fortran order.
    """
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = reader(file)
    if fortran_order:
        raise ValueError("the array is stored in Fortran order, expected C order")
    return shape, dtype


class NpzImages:
    """Images of an npz, read by row on demand.

    Args: `path`: an npz with `arr_0`, uint8 (N, H, W, 3), and optionally `settings`, JSON text of how they were made.
    Raises: ValueError: the file is not an npz, damaged, or holds other arrays or fewer images than its settings say.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with zipfile.ZipFile(path) as archive:
                entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        except DAMAGE_ERRORS as error:
            raise ValueError(f"{path} is not an npz file, or is damaged: {error}") from error
        if IMAGES_KEY not in entries:
            raise ValueError(
                f"{path} holds {', '.join(entries) or 'nothing'}: expected {IMAGES_KEY}, uint8 (N, H, W, 3)"
            )
        self._entry, self.settings = entries[IMAGES_KEY], None
        _check_plain(path, self._entry)
        try:
            with zipfile.ZipFile(path) as archive:
                with archive.open(self._entry) as file:
                    self.shape, dtype = read_header(file)
                    self._header_bytes = file.tell()
                if "settings" in entries:
                    with archive.open(entries["settings"]) as file:
                        self.settings = json.loads(str(np.lib.format.read_array(file, allow_pickle=False)))
        except DAMAGE_ERRORS as error:
            raise ValueError(f"{path} is not an npz file, or is damaged: {error}") from error
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3:
            raise ValueError(f"{path}: {IMAGES_KEY} is {dtype} {self.shape}, expected uint8 (N, H, W, 3)")
        count = (self.settings or {}).get("num_images", len(self))
        if count != len(self):
            raise ValueError(f"{path} holds {len(self)} images, its settings say {count}: it is incomplete")
        stored, claimed = self._entry.file_size - self._header_bytes, int(np.prod(self.shape, dtype=object))
        if stored != claimed:
            raise ValueError(f"{path}: {IMAGES_KEY} has shape {self.shape} in its header, but {stored} bytes of data")
        self._check_pixels()
        self._mapped: np.memmap | None = None
        self._stream: tuple[int, object, int] | None = None  # process, open entry, next row

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.shape[1:3]

    def _check_pixels(self) -> None:
        """Read all images once: zipfile compares the checksum at the end, which reading by row never reaches."""
        done = 0
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self._entry) as file:
                while chunk := file.read(READ_BYTES):
                    done += len(chunk)
        except DAMAGE_ERRORS as error:
            image = min(len(self), 1 + done // max(1, int(np.prod(self.shape[1:]))))
            raise ValueError(f"{self.path} is damaged before image {image} of {len(self)}: {error}") from error

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """uint8 (B, 3, H, W) of the given rows. Compressed files are fast only for increasing rows."""
        if self._entry.compress_type == zipfile.ZIP_STORED:
            images = self._map()[list(indices)]
        else:
            found = {index: self._decompress(index) for index in sorted(set(indices))}
            images = np.stack([found[index] for index in indices])
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def _map(self) -> np.memmap:
        if self._mapped is None:
            with open(self.path, "rb") as file:
                file.seek(self._entry.header_offset)
                header = file.read(LOCAL_HEADER_BYTES)
            name, extra = (int.from_bytes(header[start : start + 2], "little") for start in (26, 28))
            offset = self._entry.header_offset + LOCAL_HEADER_BYTES + name + extra + self._header_bytes
            self._mapped = np.memmap(self.path, np.uint8, "r", offset, self.shape)
        return self._mapped

    def _decompress(self, index: int) -> np.ndarray:
        process, file, position = self._stream or (None, None, 0)
        if process != os.getpid() or position > index:  # worker processes must not share the file's position
            file, position = zipfile.ZipFile(self.path).open(self._entry), 0
            file.read(self._header_bytes)
        size = int(np.prod(self.shape[1:]))
        for _ in range(index - position):
            file.read(size)
        pixels = file.read(size)
        self._stream = os.getpid(), file, index + 1
        return np.frombuffer(pixels, np.uint8).reshape(self.shape[1:])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_mapped": None, "_stream": None}


def write_npz(
    path: str | Path, count: int, size: tuple[int, int], batches: Iterable[np.ndarray], **arrays: np.ndarray
) -> None:
    """Write batches of images, as they are made, and other arrays into an npz that ADM's evaluator reads.

    An existing file is replaced at the end. Images are stored uncompressed, so that they can be mapped.

    Args:
        count, size: number of images, their height and width.
        batches: uint8 (B, H, W, 3).
        arrays: name -> array, beside `arr_0`.
    Raises: ValueError: the batches hold another number, size or dtype of images.
    """
    path, written = Path(path), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    with replacing(path) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(f"{IMAGES_KEY}.npy", "w", force_zip64=True) as file:
            header = {"shape": (count, *size, 3), "fortran_order": False, "descr": "|u1"}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in batches:
                if batch.dtype != np.uint8 or batch.shape[1:] != (*size, 3):
                    raise ValueError(f"got {batch.dtype} {batch.shape}, expected uint8 (B, {size[0]}, {size[1]}, 3)")
                file.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
        if written != count:
            raise ValueError(f"{written} images were given for {path}, expected {count}")


class ImageSpool:
    """A file that collects images from several processes, each writing its own rows, until they are packed as npz.

    Args:
        path: the npz to write at the end; the spool is a hidden file beside it.
        count, size: number of images, their height and width.
    """

    def __init__(self, path: str | Path, count: int, size: tuple[int, int]):
        self.path, self.count, self.size = Path(path), count, size
        self.file, self._packed = (self.path.with_name(f".{self.path.name}.{kind}") for kind in ("images", "packed"))

    def create(self) -> None:
        """Reserve the file. Called by one process, before any of them writes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.count * self.size[0] * self.size[1] * 3
        with writing(self.file), open(self.file, "wb") as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # else a full disk would kill the process later (SIGBUS)
                os.posix_fallocate(file.fileno(), 0, size)

    def write(self, rows: Sequence[int], images: np.ndarray) -> None:
        """uint8 images (B, H, W, 3) to their rows."""
        mapped = np.memmap(self.file, np.uint8, "r+", shape=(self.count, *self.size, 3))
        mapped[list(rows)] = images
        mapped.flush()

    def pack(self, **arrays: np.ndarray) -> None:
        """Write the npz under a hidden name, with other arrays beside `arr_0`. Called by one process, last."""
        mapped = np.memmap(self.file, np.uint8, "r", shape=(self.count, *self.size, 3))
        rows = max(1, READ_BYTES // max(1, mapped[0].size))
        batches = (mapped[k : k + rows] for k in range(0, self.count, rows))
        write_npz(self._packed, self.count, self.size, batches, **arrays)

    def publish(self) -> None:
        """Give the packed npz its name, and remove the spool."""
        self._packed.rename(self.path)
        sync_folder(self.path.parent)
        self.file.unlink()
