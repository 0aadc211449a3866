"""The size of images for a trained autoencoder, where none is given."""

from dataclasses import dataclass
from typing import Any

from ..data.image_datasets import DataConfig
from ..runtime.config import setting
from ..runtime.processes import print_once

# the default of diffusers' `AutoencoderKL`: where its configuration has that, probably nobody chose a size
UNCHOSEN = 32


@dataclass(kw_only=True)
class EncodedDataConfig(DataConfig):
    """Images for a trained autoencoder, which decides on their size if it is not given: see `settle_resolution`."""

    resolution: int | None = setting(None, "side of the square images in pixels; none: the autoencoder's", at_least=1)


def named_image_size(model: Any) -> tuple[str, int] | None:
    """Key and value, in pixels, of the image size in the configuration of an autoencoder or a VTPModel; None if it has
    no such size: of diffusers' `AutoencoderKL` neither a list nor `UNCHOSEN` is one. `AutoencoderRAE` calls it
    image_size; `AutoencoderDC` has neither."""
    unchosen = UNCHOSEN if type(model).__module__.startswith("diffusers.") else None
    sizes = {key: model.config.get(key) for key in ("sample_size", "image_size")}
    return next(((k, size) for k, size in sizes.items() if isinstance(size, int) and size not in (0, unchosen)), None)


def settle_resolution(data: DataConfig, model: Any) -> None:
    """Set the resolution of an `EncodedDataConfig` that has none: to the image size of the model, or to the default of
    `DataConfig` if that is not known. Prints that, or that a given resolution is another than the model's."""
    found, name = named_image_size(model), type(model).__name__
    if data.resolution is None and found is None:
        data.resolution = DataConfig.resolution
        line = f"data.resolution is {data.resolution}, the usual one: no image size of the {name} is known"
    elif data.resolution is None:
        data.resolution = found[1]
        line = f"data.resolution is {data.resolution}, which the {name} was saved with ({found[0]})"
    elif found is not None and found[1] != data.resolution:
        line = f"data.resolution is {data.resolution}, but the {name} was saved with {found[1]} ({found[0]})"
    else:
        return
    print_once(line)
