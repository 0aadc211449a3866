"""Stochastic depth (drop path, arXiv:1603.09382): samples that each branch keeps, drawn before the forward pass, and
the residual update of those alone."""

from collections.abc import Callable

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


def residual_update(hidden_states: torch.Tensor, branch: Callable, kept: torch.Tensor | None = None) -> torch.Tensor:
    """hidden_states + branch(hidden_states), or with stochastic depth (arXiv:1603.09382) on a subset of the batch.

    Only the K kept samples go through the branch, whose output is added to them B / K times: over a uniformly drawn
    subset the expectation is the whole update. DINOv2 (arXiv:2304.07193, section 5) saves its time so.

    Args: `hidden_states`: (B, S, D); `branch`: (K, S, D) -> (K, S, D); `kept`: (K,) int64 without repetition, or None.
    """
    if kept is None:
        return hidden_states + branch(hidden_states)
    place = places_of(kept, len(hidden_states))
    update = branch(_KeptSamples.apply(hidden_states, kept, place))
    return AddedUpdate.apply(hidden_states, update.to(hidden_states.dtype), kept, place)


def places_of(kept: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) int64: where each of so many samples is in `kept` (K,), K if it is not."""
    return kept.new_full((count,), len(kept)).scatter(0, kept, torch.arange(len(kept), device=kept.device))


def _spread(samples: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """(K, S, D) and places (B,) in it -> (B, S, D), zero where the place is K."""
    count = len(samples)
    rows = samples.index_select(0, place.clamp(max=count - 1))
    return torch.where((place < count)[:, None, None], rows, 0)


# Both below read rows where autograd would add them up: a kept sample is in one place, so nothing has to be summed,
# and compilation makes one kernel of it with what stands beside it.


class _KeptSamples(torch.autograd.Function):
    """x[kept]."""

    @staticmethod
    def forward(ctx, x, kept, place):
        ctx.save_for_backward(place)
        return x.index_select(0, kept)

    @staticmethod
    def backward(ctx, grad):
        return _spread(grad, *ctx.saved_tensors), None, None


class AddedUpdate(torch.autograd.Function):
    """x, to whose kept samples the update is added B / K times."""

    @staticmethod
    def forward(ctx, x, update, kept, place):
        ctx.save_for_backward(kept)
        ctx.factor = len(x) / len(kept)
        return x + ctx.factor * _spread(update, place)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return grad, ctx.factor * grad.index_select(0, kept), None, None
