"""Latent diffusion on semantic visual tokenizers: VTP as a diffusers autoencoder, LightningDiT, and their pipeline.

Importing registers the classes with diffusers, so that `DiffusionPipeline.from_pretrained(folder)` finds them. Neither
diffusers nor torch is imported before a class is asked for: a program can refuse a wrong option at once.
"""

import importlib
from typing import Any

from .runtime import __version__  # noqa: F401
from .runtime.import_hooks import after_import

_CLASSES = {
    "AutoencoderVTP": ".models.autoencoder_vtp",
    "LightningDiTPipeline": ".generation.pipeline_lightning_dit",
    "LightningDiTTransformer2DModel": ".models.transformer_lightning_dit",
    "VTPModel": ".models.vtp_model",
}
# diffusers' loader looks these base classes up as attributes of the library a component names (here: this package).
_BASES = ("BaseGuidance", "DiffusionPipeline", "ModelMixin", "SchedulerMixin")
__all__ = list(_CLASSES)


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        value = getattr(importlib.import_module(_CLASSES[name], __name__), name)
    elif name in _BASES:
        value = getattr(importlib.import_module("diffusers"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _register(diffusers: Any) -> None:
    """Our classes become attributes of diffusers, imported when they are asked for, and save_pretrained writes
    ["vtp_diffusion", class] of them, which loads from a folder and from the Hub."""

    class Diffusers(type(diffusers)):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:  # a class of that name in a future diffusers is not shadowed
                if name not in _CLASSES:
                    raise
            return getattr(importlib.import_module(__package__), name)

    diffusers.__class__ = Diffusers
    loading = importlib.import_module("diffusers.pipelines.pipeline_loading_utils")
    loading.LOADABLE_CLASSES.setdefault(__name__, {})


after_import("diffusers", _register)
