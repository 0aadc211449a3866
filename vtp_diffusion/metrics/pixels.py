"""PSNR, and the structural similarity of Wang, Bovik, Sheikh and Simoncelli (IEEE TIP 13(4), 2004)."""

import torch
import torch.nn.functional as F

SIDE, SIGMA = 11, 1.5  # of the Gaussian window
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
LUMA = (0.299, 0.587, 0.114)  # BT.601, as the paper's grey images are usually made
SSIM_SETTINGS = (
    "on luma (BT.601) of 8-bit images, Gaussian window 11x11 of sigma 1.5, windows inside the image only, K 0.01 and "
    "0.03, population moments, full resolution"
)


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (B,) in dB, float64, of uint8 images (B, C, H, W): 10 log10(255^2 / MSE).

    One value per image, infinite where both are equal. A mean PSNR is the mean of these, not the PSNR of a mean error.
    """
    if x.shape != y.shape or x.dtype != torch.uint8 or y.dtype != torch.uint8:
        raise ValueError(f"got {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}, expected uint8 of one shape")
    error = (x.double() - y.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


def ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean SSIM (B,), float64, of uint8 images (B, 3, H, W), on their luma: equations 13 to 17 of the paper.

    Windows lie inside the image (no padding), moments are weighted by an 11x11 Gaussian of sigma 1.5 and not corrected
    for their degrees of freedom, and images are not made smaller first. Other choices give other numbers:
    `SSIM_SETTINGS` says all this in words.

    Raises: ValueError: other types or shapes, or images smaller than the window.
    """
    if x.shape != y.shape or x.dtype != torch.uint8 or y.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and y {y.dtype} {tuple(y.shape)}, expected uint8 (B, 3, H, W), equal"
        )
    if min(x.shape[2:]) < SIDE:
        raise ValueError(f"images are {x.shape[2]}x{x.shape[3]}, SSIM needs at least {SIDE}x{SIDE}")
    weights = torch.tensor(LUMA, dtype=torch.float64, device=x.device)[None, :, None, None]
    x, y = ((images.double() * weights).sum(1, keepdim=True) for images in (x, y))  # (B, 1, H, W)
    mean_x, mean_y = _window(x), _window(y)
    variance_x = _window(x * x) - mean_x.square()
    variance_y = _window(y * y) - mean_y.square()
    covariance = _window(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return (luminance * structure).mean((1, 2, 3))


def _window(images: torch.Tensor) -> torch.Tensor:
    """Gaussian means (B, 1, H - 10, W - 10)."""
    offsets = torch.arange(SIDE, dtype=torch.float64, device=images.device) - SIDE // 2
    kernel = torch.exp(-offsets.square() / (2 * SIGMA**2))
    kernel = kernel / kernel.sum()
    return F.conv2d(F.conv2d(images, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
