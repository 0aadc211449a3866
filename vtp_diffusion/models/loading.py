"""Opening folders of saved models and pipelines, with one message for whatever is wrong with their files."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..runtime.disk import read_json

LARGEST_SETTING = 2**31  # in a config.json; a larger number is a mistake and could build layers without end
# What diffusers and our constructors raise for settings of wrong types, sizes or combinations and for damaged weights.
FAULTS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, SafetensorError)


def inner_folder(folder: str | Path, file: str) -> str:
    """The end of a message about a folder without `file`: where it is, if the folder is that of a run."""
    inner = (Path(folder) / name for name in ("pipeline", "vae"))
    return "".join(f"; {place} is one" for place in inner if (place / file).is_file())


def load_saved(loader: Any, folder: str | Path, **options) -> Any:
    """`loader.from_pretrained(folder, **options)`. Raises: ValueError naming the folder; OSError."""
    if not (Path(folder) / loader.config_name).is_file():  # diffusers would ask the Hub for it
        hint = inner_folder(folder, loader.config_name)
        raise ValueError(f"{folder} has no {loader.config_name}, expected a folder as save_pretrained writes it{hint}")
    try:
        return loader.from_pretrained(folder, **options)
    except FAULTS as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        raise ValueError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error}): expected a folder as save_pretrained "
            "writes it, with the settings of its config.json and complete weights"
        ) from error


def load_autoencoder(folder: str | Path) -> Any:
    """The diffusers autoencoder in a folder, frozen and in eval mode.

    Raises: ValueError naming the folder: it holds no model, another model than an autoencoder, an invalid
        configuration, or weights that are damaged or do not fit. OSError: weights that cannot be read.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} is not the folder of a diffusers autoencoder: it has no config.json. train_vtp/train.py and "
            f"pipelines/convert.py make one{inner_folder(folder, 'config.json')}"
        )
    for name, value in read_json(file).items():
        if isinstance(value, int) and abs(value) > LARGEST_SETTING:
            raise ValueError(f"{file}: {name} is {str(value)[:40]}, expected at most {LARGEST_SETTING}")
    from diffusers import AutoModel

    model = load_saved(AutoModel, str(folder))
    if not hasattr(model, "encode"):
        raise ValueError(f"{folder} holds a {type(model).__name__}, expected an autoencoder")
    return model.eval().requires_grad_(False)
