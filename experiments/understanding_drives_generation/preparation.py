"""What run.py prepares before it trains: images from an archive, a share of them, an encoder of random weights."""

import json
import shutil
import tarfile
from pathlib import Path

from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.data.openmoji import METADATA_NAME, is_held_out, openmoji_folder, read_metadata
from vtp_diffusion.runtime.disk import replacing

PARQUET = ("train.parquet", "test.parquet")  # what fashion.py writes
FEWER_SEED = 1  # another hash than the one that holds out


def is_fashion(images: Path | None) -> bool:
    """Whether a folder is one that fashion.py wrote."""
    return images is not None and (images / PARQUET[0]).is_file()


def open_data(data: str | None, folder: Path) -> Path | None:
    """The cache folder with the images; an archive is unpacked into `folder`."""
    if data is None or Path(data).is_dir():
        return None if data is None else Path(data)
    if not (images := folder / "data").is_dir():
        with replacing(images) as unfinished, tarfile.open(data) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 has it, 3.11.2 not
            archive.extractall(unfinished)
    return images


def write_fewer(images: Path | None, folder: Path, share: float, resolution: int) -> None:
    """Write a share of the training images into a new folder.

    Args: `images`: cache folder of OpenMoji's layout, of which every held-out concept is kept, and by a hash of their
        base a share of the others; or what fashion.py wrote, of whose training images a share is kept, by a hash of
        their position. `resolution`: of the cache.
    """
    if is_fashion(images):
        from pyarrow import array, parquet

        train = PARQUET[0]
        with replacing(folder) as unfinished:
            shutil.copytree(images, unfinished)
            table = parquet.read_table(images / train)
            kept = [is_held_out(str(k), share, FEWER_SEED) for k in range(len(table))]
            parquet.write_table(table.filter(array(kept)), unfinished / train)
        return
    whole, data = openmoji_folder(resolution, images), DataConfig(source="openmoji")
    rows = read_metadata(whole)
    kept = [
        row
        for row in rows
        if is_held_out(row["base"], data.holdout, data.holdout_seed) or is_held_out(row["base"], share, FEWER_SEED)
    ]
    with replacing(folder) as unfinished:
        fewer = unfinished / whole.name
        shutil.copytree(whole, fewer)
        (fewer / METADATA_NAME).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def write_random_network(folder: Path, resolution: int) -> None:
    """An encoder with random weights, a control: a difference that it shows as well says nothing about content."""
    import torch

    from vtp_diffusion import AutoencoderVTP

    torch.manual_seed(0)
    size = {"hidden_size": 192, "num_layers": 4, "num_attention_heads": 3}
    encoder = {f"encoder_{name}": value for name, value in size.items()}
    decoder = {"decoder_hidden_size": 32, "decoder_num_layers": 1, "decoder_num_attention_heads": 1}
    with replacing(folder) as unfinished:
        AutoencoderVTP(sample_size=resolution, patch_size=8, **encoder, **decoder).save_pretrained(unfinished)
