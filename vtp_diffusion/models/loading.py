"""Loading a saved autoencoder of any class, with one message for whatever is wrong with its folder."""

from pathlib import Path
from typing import Any

from ..runtime.disk import read_json

LARGEST_SETTING = 2**31  # of a config.json: a larger number is a mistake, and layers are built by number


def load_autoencoder(folder: str | Path) -> Any:
    """The diffusers autoencoder in a folder, frozen and in eval mode.

    Raises:
        ValueError: naming the folder: it holds no model, another one than an autoencoder, a configuration that
            describes none, or weights that are damaged or do not fit.
        OSError: weights that cannot be read.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not the folder of a diffusers autoencoder: it has no config.json")
    for name, value in read_json(file).items():
        if isinstance(value, int) and abs(value) > LARGEST_SETTING:
            raise ValueError(f"{file}: {name} is {str(value)[:40]}, expected at most {LARGEST_SETTING}")
    from diffusers import AutoModel
    from diffusers.utils import is_accelerate_available

    try:
        # the default of low_cpu_mem_usage, which warns where accelerate is not installed
        model = AutoModel.from_pretrained(str(folder), low_cpu_mem_usage=is_accelerate_available())
    except (TypeError, AttributeError, LookupError, RuntimeError) as error:  # what constructors make of odd values
        raise ValueError(
            f"{folder} cannot be loaded: {file.name} describes no model, or other weights than are there "
            f"({type(error).__name__}: {error})"
        ) from error
    if not hasattr(model, "encode"):
        raise ValueError(f"{folder} holds a {type(model).__name__}, expected an autoencoder")
    return model.eval().requires_grad_(False)
