"""Distances between pixels."""

import torch

from ..data.images import finite_to_uint8, from_uint8


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (B,) in dB, float64, of uint8 images (B, C, H, W): 10 log10(255^2 / MSE).

    One value per image, infinite where both are equal. A mean PSNR is the mean of these, not the PSNR of a mean error.
    """
    if x.shape != y.shape or x.dtype != torch.uint8 or y.dtype != torch.uint8:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and y {y.dtype} {tuple(y.shape)}, expected uint8 of equal shapes"
        )
    error = (x.double() - y.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


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
