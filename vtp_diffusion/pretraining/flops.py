"""Useful floating-point operations of pre-training, for its MFU: what the objectives ask for, not what is recomputed,
padded or done for the sake of speed."""

from torch import nn

from ..metrics.trunks import ConvolutionalTrunk
from ..models.autoencoder_vtp import AutoencoderVTP
from ..models.stochastic_depth import num_kept
from .joint import VTPForPreTraining


def linear_parameters(module: nn.Module) -> int:
    """Weights of all matrix products of a token."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def transformer_flops(module: nn.Module, tokens: int, width: int, share: float = 1.0) -> float:
    """Forward pass of a stack of blocks on one sequence: 2 operations a weight and token, and 4 · tokens² · width a
    layer for attention (a causal mask is counted as if it hid nothing).

    Args: `share`: of the samples that go through a residual branch.
    """
    blocks = module.blocks
    return share * (2 * linear_parameters(blocks) * tokens + 4 * tokens**2 * width * len(blocks))


def encoder_flops(autoencoder: AutoencoderVTP, size: int, share: float = 1.0) -> float:
    """Forward pass of the encoder on one image of `size` pixels a side."""
    config = autoencoder.config
    patches = (size // config.patch_size) ** 2
    embedding = 2 * patches * config.encoder_hidden_size * config.in_channels * config.patch_size**2
    return embedding + transformer_flops(autoencoder.encoder, patches + 1, config.encoder_hidden_size, share)


def decoder_flops(autoencoder: AutoencoderVTP, size: int) -> float:
    """Forward pass of the bottleneck and the pixel decoder on one image."""
    config, decoder = autoencoder.config, autoencoder.decoder
    patches = (size // config.patch_size) ** 2
    ends = 2 * patches * linear_parameters(nn.ModuleList([autoencoder.bottleneck, decoder.proj_in, decoder.proj_out]))
    return ends + transformer_flops(decoder, patches, config.decoder_hidden_size)


def trunk_flops(trunk: ConvolutionalTrunk, size: int) -> float:
    """Forward pass of LPIPS's VGG16 on one image: its convolutions have stride 1, its pools halve."""
    operations, side = 0.0, size
    for layer in trunk.modules():
        if isinstance(layer, nn.MaxPool2d):
            side //= 2
        elif isinstance(layer, nn.Conv2d):
            operations += 2 * layer.weight.numel() * side**2
    return operations


def training_flops(objective: VTPForPreTraining, resolution: int) -> dict[str, float]:
    """Operations of one step divided by the images of its batch, objective by objective.

    A pass with its gradients counts as three forward passes, the teacher as one; of LPIPS, which is frozen, there are
    two forward passes and the gradient with respect to one image. Masked patches are counted at the mean of the ratio.
    """
    autoencoder, result = objective.autoencoder, {}
    for name, part in objective.objectives.items():
        config = part.config
        kept = num_kept(10_000, config.stochastic_depth) / 10_000
        if name == "contrastive":
            text = part.model.text_model
            length, width = text.positional_embedding.shape
            tower = transformer_flops(text, length, width) + 2 * text.text_projection.numel()
            project = 2 * part.model.visual_projection.weight.numel()
            result[name] = 3 * (encoder_flops(autoencoder, resolution, kept) + tower + project)
        elif name == "self_supervision":
            crops, size = config.crops, config.crops.global_size or resolution
            patches = (size // autoencoder.config.patch_size) ** 2
            masked = config.masked_crops * crops.global_crops * sum(config.mask_ratio) / 2 * patches
            head = 2 * linear_parameters(part.head)
            student = crops.global_crops * encoder_flops(autoencoder, size, kept)
            student += crops.local_crops * encoder_flops(autoencoder, crops.local_size, kept)
            student += head * (crops.global_crops + crops.local_crops + masked)
            teacher = crops.global_crops * (encoder_flops(autoencoder, size) + head) + head * masked
            result[name] = config.share * (3 * student + teacher)
        else:
            passes = encoder_flops(autoencoder, resolution, kept) + decoder_flops(autoencoder, resolution)
            perceptual = 0.0 if part.perceptual is None else trunk_flops(part.perceptual.trunk, resolution)
            result[name] = config.share * 3 * (passes + perceptual)
    return result
