"""Opening folders of saved models and pipelines, with one message for whatever is wrong with their files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from ..runtime.disk import read_json

if TYPE_CHECKING:
    from .autoencoder_vtp import AutoencoderVTP
    from .vtp_model import VTPModel

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


def _read_settings(file: Path) -> dict[str, Any]:
    """A model's config.json. Raises: ValueError naming the file and a setting above `LARGEST_SETTING`."""
    settings = read_json(file)
    for name, value in settings.items():
        if isinstance(value, int) and abs(value) > LARGEST_SETTING:
            raise ValueError(f"{file}: {name} is {str(value)[:40]}, expected at most {LARGEST_SETTING}")
    return settings


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
    _read_settings(file)
    from diffusers import AutoModel

    model = load_saved(AutoModel, str(folder))
    if not hasattr(model, "encode"):
        raise ValueError(f"{folder} holds a {type(model).__name__}, expected an autoencoder")
    return model.eval().requires_grad_(False)


def load_vtp(folder: str | Path) -> AutoencoderVTP | VTPModel:
    """A saved `AutoencoderVTP` or `VTPModel`, or the `VTPModel` of a released checkpoint, in eval mode.

    Args:
        folder: folder of a saved model, or what `VTPModel.from_released` takes.

    Raises: ValueError naming the folder: it holds something else, an invalid configuration, or weights that are
        damaged or do not fit. OSError: weights that cannot be read.
    """
    from .autoencoder_vtp import AutoencoderVTP
    from .vtp_model import VTPModel

    file = Path(folder) / "config.json"
    if not Path(folder).exists():
        return VTPModel.from_released(str(folder))
    if not file.is_file():
        raise ValueError(f"{folder} holds no model: expected the folder of an AutoencoderVTP or VTPModel, config.json")
    name = _read_settings(file).get("_class_name")
    if name is None:
        return VTPModel.from_released(str(folder))
    saved_classes = {"AutoencoderVTP": AutoencoderVTP, "VTPModel": VTPModel}
    if name not in saved_classes:
        raise ValueError(f"{folder} holds a {name}, expected {' or '.join(saved_classes)}")
    return load_saved(saved_classes[name], folder).eval()


def load_encoder(folder: str | Path) -> AutoencoderVTP:
    """The autoencoder of the model that `load_vtp` loads."""
    model = load_vtp(folder)
    return getattr(model, "autoencoder", model)


def find_autoencoder(folder: str | Path) -> Path:
    """The folder of an AutoencoderVTP: `folder` itself, or vae/ in it if it is a run folder of the first stage.

    Raises: ValueError: it is neither, or the first stage has not finished.
    """
    folder = Path(folder)
    for path in (folder, folder / "vae"):
        config = path / "config.json"
        if config.is_file():
            name = read_json(config).get("_class_name")
            if name != "AutoencoderVTP":
                raise ValueError(f"{path} holds a {name}, expected an AutoencoderVTP")
            return path
    if any(folder.glob("checkpoint-*")):
        raise ValueError(f"{folder} holds checkpoints but no vae/: the same command that began that run finishes it")
    raise ValueError(f"{folder} holds neither config.json nor vae/: expected an autoencoder or a run of train_vtp")
