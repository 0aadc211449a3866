"""The training objective of a generator and what it is called with: latents, noise, times and labels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from ..runtime.config import Settings, setting
from .flow_matching import (
    dimension_shift,
    drop_labels,
    flow_matching_loss,
    interpolate,
    sample_times,
    shift_times,
    sums_by_time,
)

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel
    from ..training.loop import TrainingRun

TimeShift = float | Literal["dimensions"]


@dataclass(kw_only=True)
class FlowMatchingConfig(Settings):
    """Settings of the objective."""

    class_dropout_prob: float = setting(0.1, "share of labels replaced by the null class", at_least=0, at_most=1)
    time_distribution: Literal["logit_normal", "uniform"] = setting(
        "logit_normal", "distribution of the training times, before time_shift"
    )
    time_mu: float = setting(-0.5, "mu of the logit-normal times; -0.75 in VTP-Large's training")
    time_sigma: float = setting(1.25, "sigma of the logit-normal times; 1.0 in VTP-Large's training", above=0)
    time_shift: TimeShift = setting(
        1.0, "shift s of the training times, 1 is none; dimensions: by the size of the latents, as in RAE", above=0
    )
    cosine_loss: bool = setting(True, "add 1 - cosine similarity of the velocities")

    @property
    def times_text(self) -> str:
        """The distribution of the times, as a model card names it."""
        if self.time_distribution == "uniform":
            return "uniform"
        return f"logit-normal ({self.time_mu}, {self.time_sigma})"


def resolve_shift(value: TimeShift, latent_shape: tuple[int, int, int]) -> float:
    """A time shift s as a number; "dimensions" follows from the shape (C, h, w) of the latents."""
    return dimension_shift(math.prod(latent_shape)) if value == "dimensions" else value


class FlowMatchingObjective(nn.Module):
    """Velocity loss of LightningDiT (arXiv:2501.01423): mean squared error, plus 1 - cosine similarity."""

    def __init__(self, transformer: LightningDiTTransformer2DModel, cosine_loss: bool):
        super().__init__()
        self.transformer, self.cosine_loss = transformer, cosine_loss

    def forward(
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The mean losses of a batch, and the sums of squared errors by time (bins, 2).

        Args: `latents`, `noise`: (B, C, h, w); `times`: (B,) in [0, 1]; `labels`: (B,), dropped already.
        """
        return self.losses(latents, noise, times, labels)

    def losses(self, latents, noise, times, labels) -> dict[str, torch.Tensor]:
        """`forward` without accelerate's wrapper: the function that is compiled."""
        has_base = self.transformer.config.base_head_layer is not None
        predictions = self.transformer(
            interpolate(latents, noise, times), times, labels, return_dict=False, return_base=has_base
        )
        scale, losses, total = self.transformer.target_scale(times), {}, 0.0
        for name, prediction in zip(("", "base_"), predictions, strict=False):
            squared_errors, cosines = flow_matching_loss(prediction, latents, noise, scale)  # (B,), (B,)
            if not name:
                losses["squared_error_by_time"] = sums_by_time(squared_errors.detach(), times)
            losses[f"{name}squared_error"], losses[f"{name}cosine"] = squared_errors.mean(), cosines.mean()
            total = total + losses[f"{name}squared_error"] + (losses[f"{name}cosine"] if self.cosine_loss else 0.0)
        return losses | {"loss": total}


def draw_inputs(
    config: FlowMatchingConfig, latent_shape: tuple[int, int, int], count: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """All random inputs of `count` samples, on the generator's device: `noise` (B, C, h, w), `times` (B,), and `drop`
    (B,) uniform in [0, 1), which decides whose label is dropped."""
    place = {"generator": generator, "device": generator.device}
    noise = torch.randn(count, *latent_shape, **place)
    if config.time_distribution == "uniform":
        times = torch.rand(count, **place)
    else:
        times = sample_times(count, config.time_mu, config.time_sigma, **place)
    shift = resolve_shift(config.time_shift, latent_shape)
    return {"noise": noise, "times": shift_times(times, shift), "drop": torch.rand(count, **place)}


def training_inputs(
    run: TrainingRun,
    config: FlowMatchingConfig,
    batches: Iterator[dict[str, torch.Tensor]],
    vae: ModelMixin,
    latent_shape: tuple[int, int, int],
    null: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """The objective's inputs, micro-step by micro-step; everything random is keyed by the position in the run, for any
    number of processes.

    Args:
        batches: raw `latents` (B, C, h, w), `labels` (B,) of each micro-step, on the device.
        vae: the autoencoder that made them, whose statistics normalise them.
        null: the label that stands for no class.
    """
    from ..models.latent_space import latent_statistics

    mean, std = (s.to(run.device) for s in latent_statistics(vae))  # (1, C, 1, 1)
    for micro_step, batch in zip(run.micro_steps, batches, strict=True):
        random = run.draw(micro_step, lambda count, generator: draw_inputs(config, latent_shape, count, generator))
        yield batch | {
            "latents": (batch["latents"].float() - mean) / std,
            "noise": random["noise"],
            "times": random["times"],
            "labels": drop_labels(batch["labels"], config.class_dropout_prob, null, random=random["drop"]),
        }
