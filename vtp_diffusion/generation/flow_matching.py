"""Flow matching (rectified flow): path, velocity, loss and times, time running from noise (t = 0) to data (t = 1).

Equations follow "Flow Straight and Fast" (Liu et al., arXiv:2209.03003) and "Flow Matching" (Lipman et al.,
arXiv:2210.02747) in LightningDiT's orientation (Yao et al., arXiv:2501.01423). Nothing here knows about networks.
"""

import math

import torch


def _per_sample(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One time a sample, so that it broadcasts over the rest of its shape."""
    return t.reshape(-1, *([1] * (like.ndim - 1)))  # (B,) -> (B, 1, ..., 1)


def sample_times(
    num_samples: int,
    mu: float = 0.0,
    sigma: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw logit-normal times t = sigmoid(N(mu, sigma)) (Esser et al., arXiv:2403.03206, eq. 19).

    Returns: (num_samples,) float32 in (0, 1). A negative `mu` puts more weight on noisy inputs.
    Raises: ValueError if `sigma` is not positive.
    """
    if sigma <= 0:
        raise ValueError(f"sigma of the logit-normal times must be positive, got {sigma}")
    normal = torch.randn(num_samples, generator=generator, device=device, dtype=torch.float32)
    return torch.sigmoid(mu + sigma * normal)


def shift_times(t: torch.Tensor, shift: float) -> torch.Tensor:
    """t' = s·t / (1 + (s - 1)·t): LightningDiT's time shift.

    s < 1 spends more steps near the noise; s = 1 changes nothing. With sigma = 1 - t this is a flow-matching
    scheduler's shift of 1/s.
    Raises: ValueError if `shift` is not positive.
    """
    if shift <= 0:
        raise ValueError(f"the time shift must be positive, got {shift}")
    return shift * t / (1 + (shift - 1) * t)


def scheduler_shift(shift: float) -> float:
    """The `shift` of diffusers' flow-matching schedulers for a time shift s of `shift_times`, and the other way round:
    1/s, since their times run from data to noise. Raises: ValueError if it is not a positive, finite number."""
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"the shift is {shift}, expected a positive, finite number")
    return 1 / shift


def dimension_shift(num_dimensions: int, base: int = 4096) -> float:
    """Time shift s for latents of C·h·w dimensions: sqrt(base / dimensions), as RAE defines it (Zheng et al.,
    arXiv:2510.11690, section 4, after Esser et al., arXiv:2403.03206).

    The same noise hides less in more dimensions, since these are redundant; so more noise is needed. RAE counts time
    from data to noise and there shifts by sqrt(m / n), m the dimensions of all tokens together (the patch size does
    not matter) and n = 4096; in our orientation that is `shift_times` with the inverse.

    Raises: ValueError if there are no dimensions.
    """
    if num_dimensions < 1:
        raise ValueError(f"latents have at least 1 dimension, got {num_dimensions}")
    return math.sqrt(base / num_dimensions)


def interpolate(data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = t·data + (1 - t)·noise. `data`, `noise`: (B, ...), `t`: (B,). Returns (B, ...)."""
    t = _per_sample(t, data)
    return t * data + (1 - t) * noise


def velocity(data: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """dx_t/dt = data - noise, the same at every t."""
    return data - noise


def flow_matching_loss(
    prediction: torch.Tensor, data: torch.Tensor, noise: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms of LightningDiT's loss (arXiv:2501.01423, section 3.3), one value a sample.

    Args: `prediction`, `data`, `noise`: (B, C, H, W); `scale`: (B,), factor on the target velocity, None is 1.
    Returns: the mean squared velocity error (B,) and the mean over positions of 1 - cosine similarity over channels
    (B,), both in float32. Training minimises the sum of their means.
    Raises: ValueError if the shapes differ.
    """
    if not prediction.shape == data.shape == noise.shape:
        raise ValueError(
            "prediction, data and noise must have one shape, got "
            f"{tuple(prediction.shape)}, {tuple(data.shape)}, {tuple(noise.shape)}"
        )
    prediction, target = prediction.float(), velocity(data, noise).float()
    if scale is not None:
        target = target * _per_sample(scale, target)
    squared_error = (prediction - target).square().flatten(1).mean(1)
    cosine = 1 - torch.nn.functional.cosine_similarity(prediction, target, dim=1)  # (B, H, W)
    return squared_error, cosine.flatten(1).mean(1)


def sums_by_time(values: torch.Tensor, t: torch.Tensor, num_bins: int = 10) -> torch.Tensor:
    """Sums and counts of `values` (B,) whose time `t` (B,) lies in the k-th of equal parts of [0, 1].

    Returns: (num_bins, 2) float32. Such tables add up over batches and processes, as means do not.
    """
    part = (t * num_bins).long().clamp(0, num_bins - 1)
    member = (part[:, None] == torch.arange(num_bins, device=t.device)).float()  # (B, num_bins)
    return torch.stack([(member * values.float()[:, None]).sum(0), member.sum(0)], dim=1)


def drop_labels(
    labels: torch.Tensor,
    probability: float,
    num_classes: int,
    generator: torch.Generator | None = None,
    random: torch.Tensor | None = None,
) -> torch.Tensor:
    """Replace each label by the null class `num_classes` with the given probability, which is what lets one network
    learn the unconditional velocity as well (classifier-free guidance, Ho and Salimans, arXiv:2207.12598).

    Args: `labels`: (B,) int. `random`: (B,) uniform in [0, 1), what decides; None draws it from `generator`.
    Returns: (B,) of the same type.
    Raises: ValueError if `probability` is outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"the class dropout probability must lie in [0, 1], got {probability}")
    if random is None:
        random = torch.rand(labels.shape, generator=generator, device=labels.device)
    return torch.where(random < probability, torch.full_like(labels, num_classes), labels)
