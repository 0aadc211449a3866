"""Latent diffusion on semantic visual tokenizers: VTP as a diffusers autoencoder, LightningDiT, and their pipeline.

Importing registers the classes with diffusers, so that `DiffusionPipeline.from_pretrained(folder)` finds them. Neither
diffusers, which takes several seconds, nor torch is imported before a class is asked for: a program can refuse a wrong
option at once.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from typing import Any

from .runtime import __version__  # noqa: F401

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


class _Registering:
    """An import hook (PEP 302) that registers as soon as diffusers is imported, by whomever."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "diffusers":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not cls)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                sys.meta_path.remove(cls)  # not before: many look for a package without importing it
                _register(sys.modules[name])  # diffusers puts another object in its place

            spec.loader.exec_module = execute_and_register
        return spec


if "diffusers" in sys.modules:
    _register(sys.modules["diffusers"])
else:
    sys.meta_path.insert(0, _Registering)
