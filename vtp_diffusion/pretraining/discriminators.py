"""Networks that tell decoded images from originals: patches of pixels, or features of the frozen encoder."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

if TYPE_CHECKING:
    from ..models.autoencoder_vtp import AutoencoderVTP


NORM_GROUPS = 32
FEATURE_LAYERS = 4  # layers of the encoder that are judged, spread evenly over its depth


def _group_norm(channels: int) -> nn.GroupNorm:
    # The papers have BatchNorm, with which an image's logits depend on its batch and on the number of processes.
    return nn.GroupNorm(math.gcd(NORM_GROUPS, channels), channels)


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., arXiv:1611.07004) as VQGAN uses it (arXiv:2012.09841): strided 4x4 convolutions, one
    logit for every overlapping patch (70x70 pixels with three layers). The norm is GroupNorm instead of BatchNorm.

    Args: `channels`: of the first layer; they double up to eightfold; `layers`: convolutions of stride 2.
    """

    def __init__(self, channels: int = 64, layers: int = 3):
        super().__init__()
        width = channels
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for k in range(1, layers + 1):
            wider = channels * min(2**k, 8)
            stride = 2 if k < layers else 1
            blocks += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), _group_norm(wider), nn.LeakyReLU(0.2)]
            width = wider
        self.layers = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, 1, 1))
        self.apply(_initialise)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> logits (B, M), positive where a patch looks original."""
        return self.layers(images).flatten(1)


def smallest_image(layers: int) -> int:
    """Pixels a side that a `PatchDiscriminator` needs for one logit: strided layers halve it, two others take one."""
    return 3 * 2**layers


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):  # as pix2pix and VQGAN
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class FeatureHead(nn.Module):
    """Head of StyleGAN-T (arXiv:2301.09515, section 3.2) on a grid of tokens, spectrally normalised. StyleGAN-T
    convolves the sequence with a kernel of 9, this head the grid with 3x3; GroupNorm replaces its norm over parts of
    the batch."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = self._block(channels, 1)
        self.second = self._block(channels, 3)
        self.last = spectral_norm(nn.Conv2d(channels, 1, 1))

    @staticmethod
    def _block(channels: int, kernel: int) -> nn.Sequential:
        convolution = spectral_norm(nn.Conv2d(channels, channels, kernel, padding=kernel // 2))
        return nn.Sequential(convolution, _group_norm(channels), nn.LeakyReLU(0.2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, D, h, w) -> logits (B, h·w)."""
        hidden = self.first(tokens)
        hidden = (self.second(hidden) + hidden) * math.sqrt(0.5)
        return self.last(hidden).flatten(1)


class FeatureDiscriminator(nn.Module):
    """Heads on a frozen backbone (Projected GANs, arXiv:2111.01007; StyleGAN-T, arXiv:2301.09515). The backbone is the
    tokenizer's own encoder, where RAE (arXiv:2510.11690) takes DINO.

    Reasons: VTP's encoder, a vision transformer trained by self-distillation and contrast, is similar to DINO; it
    comes with the tokenizer; and no network of the evaluation takes part in training, since a distance measured with
    the discriminator's backbone overstates the improvement (Kynkäänniemi et al., arXiv:2203.06026). An encoder trained
    for reconstruction alone has no semantic features: use patches then.

    Args: `autoencoder`: its encoder must be frozen; it is shared, not copied.
    """

    def __init__(self, autoencoder: AutoencoderVTP):
        super().__init__()
        self.autoencoder = autoencoder
        depth = autoencoder.config.encoder_num_layers
        count = min(FEATURE_LAYERS, depth)
        self.taps = [depth * (k + 1) // count - 1 for k in range(count)]
        self.heads = nn.ModuleList(FeatureHead(autoencoder.config.encoder_hidden_size) for _ in self.taps)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> logits (B, layers · h · w), positive where they look original."""
        patch = self.autoencoder.spatial_compression_ratio
        grid = (images.shape[2] // patch, images.shape[3] // patch)
        layers = self.autoencoder.encode_features(images, num_layers=self.autoencoder.config.encoder_num_layers)
        logits = []
        for head, tap in zip(self.heads, self.taps, strict=True):
            tokens = layers[tap].patch_tokens.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
            logits.append(head(tokens))
        return torch.cat(logits, dim=1)
