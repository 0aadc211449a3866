"""Files of a collection that are named like held-out ones."""

import pytest

from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.data.shard_files import held_out_note


@pytest.mark.parametrize("held_out", ["test-00000-of-00001.parquet", "validation/1.parquet", "Val.1.parquet"])
def test_files_that_are_named_like_held_out_ones_are_told(held_out, tmp_path):
    for name in ("train-00000-of-00001.parquet", "testament.parquet", held_out):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    note = held_out_note(DataConfig(source="parquet", data_files=f"{tmp_path}/**"))
    assert f"1 of the 3 data_files are named like held-out ones, such as {tmp_path / held_out}, and are" in note
    assert held_out_note(DataConfig(source="parquet", data_files=f"{tmp_path}/t*a*.parquet")) is None
    assert held_out_note(DataConfig(source="parquet", data_files=str(tmp_path / held_out))) is None, "asked for"
