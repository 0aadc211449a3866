"""Stage 2: the pixel decoder is fine-tuned against a discriminator, with a frozen encoder.

Stage 2 of VTP (arXiv:2512.13687) freezes the encoder and fine-tunes the pixel decoder with a GAN loss. The paper names
neither discriminator nor weights: those here, the hinge loss and the adaptive weight are VQGAN's (arXiv:2012.09841).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..runtime.config import Settings, setting
from ..training.config import TrainingConfig
from ..training.optimisation import parameter_groups
from .discriminators import FeatureDiscriminator, PatchDiscriminator
from .joint import num_processes, total
from .reconstruction import ReconstructionObjective

if TYPE_CHECKING:
    from ..models.autoencoder_vtp import AutoencoderVTP

ADAPTIVE_EPSILON = 1e-6  # delta of VQGAN's equation 7
ADAPTIVE_LIMIT = 1e4  # largest adaptive weight, as in VQGAN's code
LECAM_DECAY = 0.99  # of the averaged logits; arXiv:2104.03310

Losses = dict[str, torch.Tensor]


@dataclass(kw_only=True)
class AdversarialConfig(Settings):
    """The discriminator and its part in the loss."""

    discriminator: Literal["patch", "features", "none"] = setting(
        "patch",
        "its input: patches of pixels, or features of the frozen encoder; none: there is none, the decoder learns to "
        "reconstruct and the other settings do nothing",
    )
    weight: float = setting(0.8, "weight of its loss, times VQGAN's adaptive weight; VQGAN: 0.8", at_least=0)
    start_step: int = setting(
        0, "the decoder gets the adversarial loss from this step on; the discriminator learns at once", at_least=0
    )
    learning_rate: float = setting(2e-4, "peak learning rate; the schedule is the decoder's", above=0)
    adam_beta1: float = setting(0.5, "AdamW of the discriminator, first moment (VQGAN's)", at_least=0, below=1)
    adam_beta2: float = setting(0.9, "AdamW of the discriminator, second moment (VQGAN's)", at_least=0, below=1)
    r1: float = setting(0.0, "gamma of the gradient penalty on originals (patch only)", at_least=0)
    lecam: float = setting(0.0, "weight of LeCam regularisation, for little data", at_least=0)
    patch_channels: int = setting(64, "patch: channels of the first layer", at_least=1)
    patch_layers: int = setting(3, "patch: strided layers", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.r1 > 0 and self.discriminator == "features":
            raise ValueError(
                f"adversarial.r1 is {self.r1} with discriminator {self.discriminator!r}, expected 0: attention "
                "kernels have no second derivative; the heads are spectrally normalised instead"
            )


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(mean max(0, 1 - D(x)) + mean max(0, 1 + D(x'))) / 2 (Lim and Ye, arXiv:1705.02894; the half is VQGAN's).

    Args: `real`, `fake`: logits of any shape.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def lecam_penalty(real: torch.Tensor, fake: torch.Tensor, mean_real: float, mean_fake: float) -> torch.Tensor:
    """E[(D(x) - a_fake)^2] + E[(D(x') - a_real)^2], the a being moving averages of the other side's logits (Tseng et
    al., arXiv:2104.03310, eq. 3)."""
    return (real - mean_fake).square().mean() + (fake - mean_real).square().mean()


def r1_penalty(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """E |grad_x D(x)|^2 / 2 on originals (Mescheder et al., arXiv:1801.04406, eq. 9), D being an image's mean logit.

    Args: `logits`: (B, M), with a graph to `images` (B, 3, H, W).
    """
    (gradient,) = torch.autograd.grad(logits.mean(1).sum(), images, create_graph=True)
    return 0.5 * gradient.square().sum((1, 2, 3)).mean()


def adaptive_weight(
    decoded: torch.Tensor, last_layer: nn.Parameter, reconstruction: torch.Tensor, adversarial: torch.Tensor
) -> torch.Tensor:
    """|grad L_rec| / (|grad L_adv| + 1e-6) at the decoder's last layer, at most 1e4 (arXiv:2012.09841, eq. 7).

    The gradients are averaged over processes before their norms are taken: all get the weight that one process with
    all images would have.

    Args:
        decoded: (B, 3, H, W), with a graph to `last_layer`; the graph is retained.
        reconstruction, adversarial: gradients of the two losses with respect to `decoded`.
    """
    norms = []
    for gradient in (reconstruction, adversarial):
        (at_layer,) = torch.autograd.grad(decoded, last_layer, gradient.to(decoded.dtype), retain_graph=True)
        norms.append((total(at_layer.float()) / num_processes()).norm())
    return (norms[0] / (norms[1] + ADAPTIVE_EPSILON)).clamp(max=ADAPTIVE_LIMIT)


class AdversarialDecoding(nn.Module):
    """Trains a decoder of the frozen encoder's latents, and a discriminator if there is one, in the same step.

    The decoder minimises reconstruction + weight · adaptive weight · (-E D(x')), the discriminator the hinge loss and
    its regularisation. One backward pass serves both: the gradient of the decoder's loss is taken with respect to the
    pixels, so that it does not reach the discriminator's parameters, and the discriminator sees detached pixels.

    Args:
        autoencoder: everything but its decoder is frozen here.
        reconstruction: the first stage's objective, for its losses and the noise on latents.
        config: of the adversarial part.
    """

    def __init__(
        self, autoencoder: AutoencoderVTP, reconstruction: ReconstructionObjective, config: AdversarialConfig
    ):
        super().__init__()
        self.autoencoder, self.reconstruction, self.config = autoencoder, reconstruction, config
        autoencoder.requires_grad_(False)
        autoencoder.decoder.requires_grad_(True)
        if config.discriminator == "patch":
            self.discriminator = PatchDiscriminator(config.patch_channels, config.patch_layers)
        elif config.discriminator == "features":
            self.discriminator = FeatureDiscriminator(autoencoder)
        else:
            self.discriminator = None
        self.register_buffer("mean_real", torch.zeros(()))  # averaged logits
        self.register_buffer("mean_fake", torch.zeros(()))

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        """Both networks' groups, as `TrainingRun` takes them."""
        own = {
            "network": "discriminator",
            "lr_scale": self.config.learning_rate / config.learning_rate,
            "betas": (self.config.adam_beta1, self.config.adam_beta2),
        }
        groups = parameter_groups(self.autoencoder, config.adam_weight_decay)
        if self.discriminator is None:
            return groups
        heads = self.discriminator.heads if self.config.discriminator == "features" else self.discriminator
        return groups + [group | own for group in parameter_groups(heads, config.adam_weight_decay)]

    def forward(
        self,
        images: torch.Tensor,
        adversarial: bool,
        noise: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
    ) -> Losses:
        """Named scalars; "loss" is to be differentiated: for each network its gradient is that of the network's loss.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            adversarial: whether the decoder gets the adversarial loss.
            noise, noise_level: as `ReconstructionObjective.draw_noise` gives them.
        """
        with torch.no_grad():
            latents = self.autoencoder.encode(images).latent.float()
            if noise is not None:
                latents = self.reconstruction.disturb(latents, noise, noise_level)
        decoded = self.autoencoder.decode(latents).sample.float()
        if self.discriminator is None:
            return self.reconstruction.compare(decoded, images)
        pixels = decoded.detach().requires_grad_()
        losses = self.reconstruction.compare(pixels, images)
        fake = self.discriminator(pixels).float()
        verdict = -fake.mean()
        with torch.autocast(images.device.type, enabled=False):  # backward passes have the dtypes of the forward ones
            (reconstruction_gradient,) = torch.autograd.grad(losses["loss"], pixels)
            (adversarial_gradient,) = torch.autograd.grad(verdict, pixels, retain_graph=True)
            balance = adaptive_weight(
                decoded, self.autoencoder.decoder.proj_out.weight, reconstruction_gradient, adversarial_gradient
            )
        weight = self.config.weight * balance if adversarial else torch.zeros_like(balance)
        gradient = reconstruction_gradient + weight * adversarial_gradient
        # zero, but with the gradient of the decoder's loss: no second backward pass of LPIPS and the discriminator
        carrier = ((decoded - decoded.detach()) * gradient).sum()
        judged = self._judge(images, fake)
        value = losses.pop("loss").detach() + weight * verdict.detach()
        losses = {name: value.detach() for name, value in losses.items()}
        losses |= {"adversarial": verdict.detach(), "adaptive_weight": balance}
        losses |= {f"discriminator/{name}": value for name, value in judged.items()}
        return losses | {"loss": carrier + value + judged["loss"]}

    def _judge(self, images: torch.Tensor, fake: torch.Tensor) -> Losses:
        """The discriminator's losses on originals and on the logits (B, M) of decoded images, and its accuracy."""
        config = self.config
        images = images.detach().requires_grad_(config.r1 > 0)
        real = self.discriminator(images).float()
        judged = {"loss": hinge_loss(real, fake)}
        if config.lecam > 0:
            judged["lecam"] = lecam_penalty(real, fake, self.mean_real, self.mean_fake)
            for average, logits in ((self.mean_real, real), (self.mean_fake, fake)):
                mean = total(logits.mean()) / num_processes()
                # a NaN would stay in the average for ever
                average.lerp_(torch.where(mean.isfinite(), mean, average), 1 - LECAM_DECAY)
        if config.r1 > 0:
            with torch.autocast(images.device.type, enabled=False):
                judged["r1"] = r1_penalty(real, images)
        judged["loss"] = judged["loss"] + sum(getattr(config, k) * v for k, v in judged.items() if k != "loss")
        real, fake = real.detach(), fake.detach()
        accuracy = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        return judged | {"accuracy": accuracy, "real": real.mean(), "fake": fake.mean()}
