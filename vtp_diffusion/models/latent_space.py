"""The latent space of any diffusers autoencoder: image range, raw latents, statistics, identity.

Differences between classes of autoencoders are handled only here: `AutoencoderVTP` applies its statistics in `encode`
and undoes them in `decode`; `AutoencoderRAE` takes images in [0, 1] and normalises inside `encode` and `decode`; the
others have `scaling_factor` and perhaps `shift_factor`, which their callers apply.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.images import finite_to_uint8, from_uint8


def owns_statistics(vae: nn.Module) -> bool:
    """Whether `encode` normalises latents by statistics in the configuration: `AutoencoderVTP`."""
    return hasattr(vae, "denormalize_latents")


def normalises_inside(vae: nn.Module) -> bool:
    """Whether images are in [0, 1] and latents need no scaling by the caller: `AutoencoderRAE`."""
    return type(vae).__name__ == "AutoencoderRAE"


def encode_raw(vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Raw latents (B, C, h, w) in float32, before the statistics or the scaling of the autoencoder.

    Args: `images`: (B, 3, H, W) in [-1, 1], whatever range the autoencoder itself works in.
    """
    images = images.to(vae.dtype)
    if owns_statistics(vae):
        return vae.encode_raw(images).float()
    encoded = vae.encode(images / 2 + 0.5 if normalises_inside(vae) else images)
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    return latents.float()


def latent_statistics(vae: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (1, C, 1, 1), float32, such that a generator sees (raw - mean) / std.

    Raises: ValueError for an `AutoencoderVTP` without statistics, or another autoencoder with such.
    """
    config = vae.config
    if owns_statistics(vae):
        if config.latents_mean is None:
            raise ValueError(
                "the autoencoder has no latent statistics (latents_mean, latents_std): set them with "
                "pipelines/convert.py vtp --latent-statistics latents.json"
            )
        values = config.latents_mean, config.latents_std
    elif normalises_inside(vae):
        values = [0.0], [1.0]
    elif getattr(config, "latents_mean", None) is not None:
        raise ValueError(
            f"the {type(vae).__name__} has latents_mean and latents_std, which are not applied to this class: "
            "expected scaling_factor and shift_factor alone"
        )
    else:
        values = [getattr(config, "shift_factor", None) or 0.0], [1 / config.scaling_factor]
    mean, std = (torch.tensor(value, dtype=torch.float32).view(1, -1, 1, 1) for value in values)
    return mean, std


def decode_to_images(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents as a generator sees them (B, C, h, w) -> images (B, 3, H, W) around [-1, 1], float32."""
    latents = latents.to(vae.dtype)
    if normalises_inside(vae):
        return vae.decode(latents).sample.float() * 2 - 1
    if not owns_statistics(vae):
        latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
    return vae.decode(latents).sample.float()


@torch.inference_mode()
def reconstruct(vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Encode and decode uint8 images (B, 3, H, W) with any diffusers autoencoder, by the mode of its latents.

    Raises: ValueError if the result is not finite, or has another size because sides are not multiples of the patch.
    """
    x = from_uint8(images).to(vae.device, vae.dtype)
    x = vae((x + 1) / 2).sample * 2 - 1 if normalises_inside(vae) else vae(x).sample
    if x.shape != images.shape:
        raise ValueError(
            f"{type(vae).__name__} turns images {tuple(images.shape)} into {tuple(x.shape)}, expected the same size"
        )
    return finite_to_uint8(x).to(images.device)


def config_sha256(part: Any, free: Collection[str] = ()) -> str:
    """Hash of the configuration of a model or a scheduler, without some settings and what diffusers adds of itself."""
    config = {key: value for key, value in part.config.items() if key not in free and not key.startswith("_")}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def autoencoder_identity(vae: nn.Module, decoder: bool = True) -> dict[str, str]:
    """Class of an autoencoder and hashes of its configuration and its weights. Without `decoder`, "encoder"
    replaces "weights": where it is equal, latents are, as before and after VTP's stage 2, which trains the decoder.

    Latent statistics and scaling factors are left out (except for `AutoencoderRAE`, which applies its own): they don't
    change raw latents and may be set after an extraction. Weights are hashed as bfloat16, so that a model keeps its
    identity when it is saved in that precision.
    """
    free = {"sample_size"}
    if owns_statistics(vae):
        free |= {"latents_mean", "latents_std"}
    elif not normalises_inside(vae):
        free |= {"scaling_factor", "shift_factor"}
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
        "config": config_sha256(vae, free),
        "weights" if decoder else "encoder": weights.hexdigest()[:16],
    }


def check_latents_fit(folder: str | Path, metadata: dict[str, Any] | None, vae: nn.Module) -> None:
    """Refuse latents of another autoencoder; only the decoder may differ, if the metadata hold the encoder's hash.
    Upstream's shards have no metadata and cannot be checked.

    Args: `folder`, `metadata`: of the latents.
    Raises: ValueError naming the folder, that of the autoencoder, and what differs.
    """
    made = None if metadata is None else metadata["autoencoder"]
    given = {} if made is None else autoencoder_identity(vae, decoder="encoder" not in made)
    different = [name for name, value in given.items() if made.get(name) != value]
    if different:
        kind = "encoder" if "encoder" in made else "autoencoder"
        words = {
            "class": f"its class is {made['class']}, not {given['class']}",
            "config": "its config.json is another",
        }
        faults = " and ".join(words.get(name, f"the weights of the {kind} differ") for name in different)
        place = vae.config.get("_name_or_path") or "memory"
        raise ValueError(
            f"the latents in {folder} were made by another {kind} than that in {place}: {faults}. Give the one that "
            "made them, or extract them again"
        )
