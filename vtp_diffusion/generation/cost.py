"""What sampling costs: floating-point operations an image, and the parameters that a token passes through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..training.rates import forward_flops
from .pipeline_checks import is_guided

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel

COST = ("flops_per_image", "active_parameters")


def evaluation_flops(transformer: LightningDiTTransformer2DModel) -> int:
    """Floating-point operations of one evaluation of one image, as `forward_flops` counts them."""
    config = transformer.config
    latents = torch.empty(1, config.in_channels, config.sample_size, config.sample_size)
    return forward_flops(transformer, latents, torch.empty(1), torch.zeros(1, dtype=torch.int64))


def head_flops(config: Any) -> int:
    """Floating-point operations of the output layer; internal guidance adds a second one, the base head."""
    width = config.num_attention_heads * config.attention_head_dim
    return 2 * (config.sample_size**2 * config.in_channels * width + 2 * width**2)


def active_parameters(transformer: Any, internal: bool = False) -> int:
    """Parameters that take part in one evaluation: all but the embeddings of other classes and, unless guidance is
    `internal`, the base head."""
    unused = () if internal else ("base_",)
    sizes = {name: p.numel() for name, p in transformer.named_parameters() if not name.startswith(("class_", *unused))}
    return sum(sizes.values()) + transformer.config.num_attention_heads * transformer.config.attention_head_dim


def evaluation_counts(
    pipe: DiffusionPipeline, num_inference_steps: int, interval: tuple[float, float]
) -> tuple[int, int]:
    """Evaluations of the transformer for an image, and how many of them lie in an interval of guidance."""
    count = len(pipe._set_timesteps(num_inference_steps, pipe.device))
    times = [1 - sigma for sigma in pipe.scheduler.sigmas.tolist()[:count]]
    return count, sum(is_guided(t, interval) for t in times)


def sampling_cost(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance: str = "auto",
    solver: str | None = None,
    **others: Any,
) -> dict[str, int | None]:
    """`COST` of sampling with a pipeline: its transformer's evaluations, guidance included. Decoding is not counted.

    Args: as of the pipeline's call. With solver "dopri5", which chooses its own steps, flops_per_image is None.
    """
    config, weaker = pipe.transformer.config, pipe.guidance_transformer
    found = dict(zip(COST, (None, active_parameters(pipe.transformer, guidance == "internal")), strict=True))
    if solver == "dopri5":
        return found
    count, inside = evaluation_counts(pipe, num_inference_steps, guidance_interval)
    asked = guidance_scale != 1 and getattr(config, "student", None) is None  # a student's guidance is baked in
    guided = inside if asked else 0
    if guidance == "internal":
        second = head_flops(config)
    else:
        second = evaluation_flops(pipe.transformer if weaker is None or guidance == "classifier_free" else weaker)
    return found | {"flops_per_image": count * evaluation_flops(pipe.transformer) + guided * second}
