"""Latent diffusion on semantic visual tokenizers: VTP as a diffusers autoencoder, LightningDiT, and their pipeline.

Importing registers the classes with diffusers, so that `DiffusionPipeline.from_pretrained(folder)` finds them.
"""

import diffusers

# diffusers' loader looks these base classes up as attributes of the library a component names (here: this package).
from diffusers import BaseGuidance, DiffusionPipeline, ModelMixin, SchedulerMixin  # noqa: F401
from diffusers.pipelines import pipeline_loading_utils as _loading

from .generation.pipeline_lightning_dit import LightningDiTPipeline
from .models.autoencoder_vtp import AutoencoderVTP
from .models.transformer_lightning_dit import LightningDiTTransformer2DModel
from .models.vtp_model import VTPModel
from .runtime import __version__  # noqa: F401

__all__ = ["AutoencoderVTP", "LightningDiTPipeline", "LightningDiTTransformer2DModel", "VTPModel"]

# With this entry save_pretrained writes ["vtp_diffusion", class], the form that loads from a folder and from the Hub.
_loading.LOADABLE_CLASSES.setdefault(__name__, {})
for _class in (AutoencoderVTP, LightningDiTPipeline, LightningDiTTransformer2DModel, VTPModel):
    if not hasattr(diffusers, _class.__name__):  # a class of that name in a future diffusers is not shadowed
        setattr(diffusers, _class.__name__, _class)
