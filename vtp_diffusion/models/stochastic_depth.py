"""Stochastic depth (drop path, arXiv:1603.09382): samples that each branch keeps, drawn before the forward pass."""

import torch


def num_kept(count: int, rate: float) -> int:
    """Samples of `count` whose branch is computed at a drop rate, at least one (DINOv2's rule)."""
    return max(int(count * (1 - rate)), 1)


def draw_kept(count: int, num_layers: int, rate: float, generator: torch.Generator) -> torch.Tensor | None:
    """A random subset of `count` samples for the two branches of every layer: (layers, 2, K) int64 on the generator's
    device; None at rate 0. The rate is the same in all layers, as in DINOv2's published configuration."""
    if rate == 0:
        return None
    noise = torch.rand(num_layers, 2, count, generator=generator, device=generator.device)
    return noise.argsort(dim=-1)[..., : num_kept(count, rate)]
