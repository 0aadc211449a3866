"""Floating-point operations of the networks that objectives pass images through, for their MFU."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from ..metrics.trunks import ConvolutionalTrunk
    from ..models.autoencoder_vtp import AutoencoderVTP


def linear_parameters(module: nn.Module) -> int:
    """Number of weights of all linear layers."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def transformer_flops(module: nn.Module, tokens: int, width: int, drop_path: float = 0.0) -> float:
    """Forward pass of a stack of blocks on one sequence: 2 operations a weight and token, and 4 · tokens² · width a
    layer for attention (a causal mask is counted as if it hid nothing).

    Args: `drop_path`: share of samples that a residual branch leaves out.
    """
    blocks = module.blocks
    return (1 - drop_path) * (2 * linear_parameters(blocks) * tokens + 4 * tokens**2 * width * len(blocks))


def encoder_flops(autoencoder: "AutoencoderVTP", size: int, drop_path: float = 0.0) -> float:
    """Forward pass of the encoder on one image of `size` pixels a side."""
    config = autoencoder.config
    patches = (size // config.patch_size) ** 2
    embedding = 2 * patches * config.encoder_hidden_size * config.in_channels * config.patch_size**2
    return embedding + transformer_flops(autoencoder.encoder, patches + 1, config.encoder_hidden_size, drop_path)


def decoder_flops(autoencoder: "AutoencoderVTP", size: int) -> float:
    """Forward pass of the bottleneck and the pixel decoder on one image."""
    config, decoder = autoencoder.config, autoencoder.decoder
    patches = (size // config.patch_size) ** 2
    ends = 2 * patches * linear_parameters(nn.ModuleList([autoencoder.bottleneck, decoder.proj_in, decoder.proj_out]))
    return ends + transformer_flops(decoder, patches, config.decoder_hidden_size)


def trunk_flops(trunk: "ConvolutionalTrunk", size: int) -> float:
    """Forward pass of LPIPS's VGG16 on one image: its convolutions have stride 1, its pools halve."""
    operations, side = 0.0, size
    for layer in trunk.modules():
        if isinstance(layer, nn.MaxPool2d):
            side //= 2
        elif isinstance(layer, nn.Conv2d):
            operations += 2 * layer.weight.numel() * side**2
    return operations
