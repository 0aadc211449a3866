"""Reading files of tensors that may be damaged or foreign: no code in them runs, and errors name the file."""

import pickle
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# what torch's restricted reader raises for damaged files, and for pickles of anything but tensors and plain values
TORCH_FILE_ERRORS = (
    OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, AssertionError, struct.error,
    pickle.PickleError,
)  # fmt: skip


def read_torch(path: str | Path, mmap: bool = False) -> Any:
    """The content of a PyTorch file, on the CPU: tensors and plain values, never code.

    Args: `mmap`: map the tensors instead of reading them.
    Raises: ValueError naming the file if it is missing, damaged, or holds a pickle of something else.
    """
    if not Path(path).is_file():  # opening a pipe would wait for a writer
        raise ValueError(f"{path} is not a file, expected a PyTorch file of tensors")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except TORCH_FILE_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} cannot be read as a PyTorch file of tensors: it is damaged, or holds other objects, which are "
            f"not loaded ({type(error).__name__}: {reason})"
        ) from error


def read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file. Raises: ValueError with its path if it is truncated or another kind of file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
