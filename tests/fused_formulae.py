"""The programs of vtp_kernels.py as formulae of PyTorch, in float32: what those are tested against."""

import torch

from vtp_diffusion.models.vtp_blocks import apply_rotary

ANY_DEVICE = True  # where it runs: see `LargeProducts.can_fuse`


def swiglu(product: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value, the halves of product (..., 2 I), which comes without it, + bias (2 I,): (..., I)."""
    gate, value = (product.float() + bias.float()).chunk(2, dim=-1)
    result = torch.nn.functional.silu(gate) * value
    return result if result.dtype == product.dtype else result.to(product.dtype)  # see `NormBesideResidual.forward`


def swiglu_backward(
    product: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward pass of `swiglu`: grad (..., I) -> gradients of product (..., 2 I) and bias (2 I,), this in float32."""
    gate, value = (product.float() + bias.float()).chunk(2, dim=-1)
    share, slope = gate.sigmoid(), grad.float()
    silu = gate * share
    result = torch.cat([slope * value * (share + silu * (1 - share)), slope * silu], dim=-1)
    return result.to(product.dtype), result.flatten(0, -2).sum(0)


def norm_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad: torch.Tensor,
    residual: torch.Tensor,
    place: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward pass of the root-mean-square norm of x, and of x besides.

    Args:
        x: (B, S, D); weight: (D,); grad: (K, S, D), of the norm of the kept samples; residual: (B, S, D), of x itself.
        place: (B,) int64, of a sample among the kept ones, K if it is not; None: all are kept in order.

    Returns: gradient of x (B, S, D), of the weight (D,) float32.
    """
    if place is not None:
        kept = place < len(grad)
        grad = torch.where(kept[:, None, None], grad.index_select(0, place.clamp(max=len(grad) - 1)), 0)
    values, slope = x.float(), grad.float()
    inverse = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    normed = values * inverse
    scaled = slope * weight.float()
    result = residual.float() + inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return result.to(x.dtype), (slope * normed.to(x.dtype).float()).flatten(0, 1).sum(0)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate queries and keys in x (B, S, 3 H D), queries, keys and values, in place: see `apply_rotary`.

    Args: `cos`, `sin`: tables (S, D) float32.
    """
    turned = x[..., : 2 * x.shape[-1] // 3].unflatten(-1, (-1, cos.shape[1]))  # (B, S, 2 H, D), a view
    turned.copy_(apply_rotary(turned, cos, sin))


def rotate_back(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward pass of `rotate_`, of gradients that come apart.

    Args: `query`, `key`, `value`: (B, S, H, D).
    Returns: gradient of x (B, S, 3 H D), and its sum over samples and tokens (3 H D,) float32.
    """
    parts = []
    for part in (query.float(), key.float()):
        turned, straight = part * sin[:, None], part * cos[:, None]
        first, second = turned.chunk(2, dim=-1)
        parts.append(straight + torch.cat([second, -first], dim=-1))
    result = torch.cat([part.flatten(2) for part in (*parts, value.float())], dim=-1)
    return result.to(query.dtype), result.flatten(0, 1).sum(0)
