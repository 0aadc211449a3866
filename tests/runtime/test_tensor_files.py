"""Files of tensors that may be damaged."""

import pytest
import torch
from safetensors.torch import save_file

from vtp_diffusion.runtime.tensor_files import read_safetensors, read_torch


@pytest.mark.parametrize(("read", "save"), [(read_safetensors, save_file), (read_torch, torch.save)])
def test_a_file_is_read_as_it_was_written_or_refused_by_name(tmp_path, read, save):
    tensors, file = {"weight": torch.arange(6.0).view(2, 3)}, tmp_path / "weights"
    save(tensors, file)
    assert torch.equal(read(file)["weight"], tensors["weight"])
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{file} "):
        read(file)
