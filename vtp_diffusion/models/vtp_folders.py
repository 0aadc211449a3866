"""A VTP from its folder, whoever wrote it: `save_pretrained`, or upstream's release."""

import json
from pathlib import Path

from .autoencoder_vtp import AutoencoderVTP
from .vtp_model import VTPModel

SAVED_CLASSES = {"AutoencoderVTP": AutoencoderVTP, "VTPModel": VTPModel}


def load_vtp(folder: str | Path) -> AutoencoderVTP | VTPModel:
    """What a folder holds, in eval mode: a saved `AutoencoderVTP` or `VTPModel`, or a released checkpoint.

    Raises:
        ValueError: the folder holds something else, or weights that do not fit.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no model: expected the folder of an AutoencoderVTP or VTPModel (config.json)"
        )
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not the configuration of a model: {error}") from error
    if name is None:
        return VTPModel.from_released(str(folder))
    if name not in SAVED_CLASSES:
        raise ValueError(f"{folder} holds a {name}, expected {' or '.join(SAVED_CLASSES)}")
    return SAVED_CLASSES[name].from_pretrained(folder).eval()


def load_encoder(folder: str | Path) -> AutoencoderVTP:
    """The autoencoder of what `load_vtp` finds."""
    model = load_vtp(folder)
    return model.autoencoder if isinstance(model, VTPModel) else model
