"""npz files that are damaged, locked or say more than they hold are refused by name, before anything is measured."""

import io
import struct
import zipfile
from collections import Counter

import numpy as np
import pytest

from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.data.npz import NpzImages
from vtp_diffusion.evaluation.references import read_statistics
from vtp_diffusion.evaluation.sources import open_reference
from vtp_diffusion.metrics.features import FeatureNetwork

IMAGES = np.zeros((4, 8, 8, 3), np.uint8)


def claim(path, rows, hidden=b"\x07" * 10_000):
    """An npz whose header claims so many images of the four that are stored; another entry follows."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": (rows, 8, 8, 3), "fortran_order": False, "descr": "|u1"})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", file.getvalue() + IMAGES.tobytes())
        archive.writestr("hidden.npy", hidden)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def lock(path):
    """Set the bit that says an entry is encrypted, in its own header and in the directory."""
    content = path.read_bytes()
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.index(mark) + offset
        content = content[:place] + struct.pack("<H", 1) + content[place + 2 :]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: claim(path, 6), r"arr_0 has shape \(6, 8, 8, 3\) in its header, but 768 bytes of data"),
        (lambda path: claim(path, 10**18), "arr_0 has shape .* but 768 bytes of data"),
        (lambda path: flip(path, 400), "damaged.*: Bad CRC-32"),
        (lock, "arr_0.npy is encrypted, expected an npz as numpy writes it"),
        (lambda path: np.savez(path, mu=np.zeros(3)), "holds mu: expected arr_0"),
        (lambda path: np.savez(path, np.array([None])), "is not an npz file, or is damaged|arr_0 is object"),
        (lambda path: np.savez(path, IMAGES, settings=np.array("{")), "is not an npz file, or is damaged"),
        (lambda path: path.write_bytes(b""), "is not an npz file, or is damaged"),
    ],
)
def test_images(spoil, message, tmp_path):
    np.savez(tmp_path / "x.npz", IMAGES)
    spoil(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=f"x.npz.*{message}|x.npz: ({message})"):
        NpzImages(tmp_path / "x.npz")


class Three(FeatureNetwork):
    name, distance_name, dim, preprocessing = "inception", "FD", 3, "none"

    def describe(self):
        return {"name": self.name, "sha256": "", "preprocessing": self.preprocessing}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: flip(path, 130), "is damaged in its entry (mu|sigma): Bad CRC-32"),
        (lock, "mu.npy is encrypted"),
        (lambda path: np.savez(path, mu=np.zeros(3)), "holds mu without sigma: expected both"),
        (lambda path: np.savez(path, sigma=np.eye(3)), "holds sigma: expected arr_0, or mu and sigma"),
        (lambda path: np.savez(path, mu=np.array([None] * 3), sigma=np.eye(3)), "entry mu: Object arrays"),
        (
            lambda path: np.savez(path, mu=np.zeros(3), sigma=np.eye(3), settings=np.array("[]")),
            "settings is not the JSON object",
        ),
    ],
)
def test_statistics(spoil, message, tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert read_statistics(tmp_path / "x.npz", Three())["features"].dim == 3
    spoil(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=message):
        read_statistics(tmp_path / "x.npz", Three())


def test_images_of_a_reference_are_read_once_however_many_networks_measure_them(tmp_path, monkeypatch):
    counts, read = Counter(), zipfile.ZipExtFile.read

    def counted(file, size=-1):
        content = read(file, size)
        counts[file.name] += len(content)
        return content

    path = tmp_path / "x.npz"
    np.savez(path, IMAGES.repeat(500, 0), mu=np.zeros(3), sigma=np.eye(3))
    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    for _ in range(2):
        assert read_statistics(path, Three())["features"].dim == 3
    assert counts["arr_0.npy"] == 0 < counts["sigma.npy"]
    images, base, variants = open_reference(DataConfig(), str(path), "train", (8, 8))
    assert (len(images), len(base), variants) == (2000, 2000, [])
    assert counts["arr_0.npy"] < 1.01 * 500 * IMAGES.nbytes
    flip(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="damaged before image"):
        open_reference(DataConfig(), str(path), "train", (8, 8))
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    assert open_reference(DataConfig(), str(path), "train", (8, 8)) is None
