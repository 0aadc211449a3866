"""Files of a collection that are named like held-out ones."""

import pytest

from vtp_diffusion.data.shard_files import held_out_note


@pytest.mark.parametrize("held_out", ["test-00000-of-00001.parquet", "validation/1.parquet", "Val.1.parquet"])
def test_files_that_are_named_like_held_out_ones_are_told(held_out, tmp_path):
    for name in ("train-00000-of-00001.parquet", "testament.parquet", held_out):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def files(pattern):
        return [str(path) for path in tmp_path.rglob(pattern)]

    note = held_out_note(files("*.parquet"))
    assert f"1 of the 3 data_files are named like held-out ones, such as {tmp_path / held_out}, and are" in note
    assert held_out_note(files("t*a*.parquet")) is None
    assert held_out_note(files(held_out)) is None, "asked for"
