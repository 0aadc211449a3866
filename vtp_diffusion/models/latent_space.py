"""The latent space of any autoencoder: raw latents, statistics, identity."""

import hashlib
import json
from typing import Any

import torch
from diffusers import ModelMixin

from ..data.images import finite_to_uint8, from_uint8


def encode_raw(vae: ModelMixin, images: torch.Tensor) -> torch.Tensor:
    """Raw latents (B, C, h, w) in float32, before the statistics or the scaling of the autoencoder.

    Args: `images`: (B, 3, H, W) in [-1, 1], whatever range the autoencoder itself works in.
    """
    images = images.to(vae.dtype)
    if type(vae).__name__ == "AutoencoderRAE":  # takes [0, 1]
        images = images / 2 + 0.5
    encoded = vae.encode(images)
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    latents = latents.float()
    return vae.denormalize_latents(latents) if hasattr(vae, "denormalize_latents") else latents


def latent_statistics(vae: ModelMixin) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (1, C, 1, 1), float32, such that a generator sees (raw - mean) / std.

    `AutoencoderVTP` has them in its configuration; of other autoencoders they are `shift_factor` and
    1 / `scaling_factor` (`AutoencoderRAE` normalises inside `encode`, so that its latents are used as they come).

    Raises:
        ValueError: an AutoencoderVTP without statistics.
    """
    config = vae.config
    if hasattr(vae, "denormalize_latents"):
        if config.latents_mean is None:
            raise ValueError(
                "the autoencoder has no latent statistics (latents_mean, latents_std): set them with "
                "pipelines/convert.py vtp --latent-statistics latents.json"
            )
        values = config.latents_mean, config.latents_std
    elif type(vae).__name__ == "AutoencoderRAE":
        values = [0.0], [1.0]
    else:
        values = [getattr(config, "shift_factor", None) or 0.0], [1 / config.scaling_factor]
    mean, std = (torch.tensor(value, dtype=torch.float32).view(1, -1, 1, 1) for value in values)
    return mean, std


def autoencoder_identity(vae: ModelMixin, decoder: bool = True) -> dict[str, str]:
    """Class and hashes of configuration and "weights", over what decides raw latents and the decoder. Without the
    decoder the last is called "encoder": where it is the same, latents are, as before and after stage 2 of VTP.

    Latent statistics and scaling factors don't decide them (except in `AutoencoderRAE`, which applies its own), so
    they may be set after an extraction. Weights are hashed as bfloat16: a model that was saved so is still the same.
    """
    free = {"sample_size"}
    if hasattr(vae, "denormalize_latents"):
        free |= {"latents_mean", "latents_std"}
    elif type(vae).__name__ != "AutoencoderRAE":
        free |= {"scaling_factor", "shift_factor"}
    config = {key: value for key, value in vae.config.items() if key not in free and not key.startswith("_")}
    weights = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith("decoder.") and not decoder:
            continue
        weights.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        weights.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {
        "class": type(vae).__name__,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "weights" if decoder else "encoder": weights.hexdigest()[:16],
    }


def check_latents_fit(metadata: dict[str, Any] | None, vae: ModelMixin) -> None:
    """Refuse latents that another autoencoder made; one with another decoder would make the same ones. Shards of
    upstream have no metadata and cannot be checked.

    Raises: ValueError naming both autoencoders.
    """
    made = None if metadata is None else metadata["autoencoder"]
    given = {} if made is None else autoencoder_identity(vae, decoder="encoder" not in made)
    if any(made.get(name) != value for name, value in given.items()):
        raise ValueError(
            f"the latents were made by the autoencoder {made}, the one given is {given}: extract them again or give "
            "the autoencoder that made them"
        )


@torch.inference_mode()
def reconstruct(vae: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """uint8 images (B, 3, H, W) through any diffusers autoencoder, the mode of its latents, and back to uint8.

    Raises: ValueError if what comes back is not finite, or has another size, as from sides that are no multiple of the
        autoencoder's.
    """
    x = from_uint8(images).to(vae.device, vae.dtype)
    if type(vae).__name__ == "AutoencoderRAE":  # the one of diffusers whose images are in [0, 1]
        x = vae((x + 1) / 2).sample * 2 - 1
    else:
        x = vae(x).sample
    if x.shape != images.shape:
        raise ValueError(
            f"{type(vae).__name__} turns images {tuple(images.shape)} into {tuple(x.shape)}, expected the same size"
        )
    return finite_to_uint8(x).to(images.device)
