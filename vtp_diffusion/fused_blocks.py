"""Parts of a transformer block whose backward pass takes one pass over memory where autograd and the compiler take
several: norm with the residual around it, projections with the rotation behind them, SwiGLU.

What is saved is reading gradients again to add them up for biases and scales, and gradients once more where they meet.
On CUDA the programs are those of fused_kernels.py; elsewhere the formulae here, which they are tested against.
"""

import importlib.util

import torch
import torch.nn.functional as F

HALF_HEADS = (16, 32, 64, 128)  # halves of heads that `rotate_` knows: powers of two


def can_fuse(x: torch.Tensor) -> bool:
    """Whether there is anything to gain from the functions here on this device, now."""
    return torch.is_grad_enabled() and _has_kernels(x)


def can_rotate(cos: torch.Tensor) -> bool:
    """Whether `rotate_` knows the table (S, head_dim) of a rotary embedding: not those in bfloat16 arithmetic."""
    return cos.dtype == torch.float32 and cos.shape[1] // 2 in HALF_HEADS


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast computes products of x, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _has_kernels(x: torch.Tensor) -> bool:
    return x.is_cuda and importlib.util.find_spec("triton") is not None


@torch.library.custom_op("vtp_diffusion::swiglu_backward", mutates_args=())
def swiglu_backward(
    product: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward pass of silu(gate) * value, the halves of product + bias.

    Args:
        product: (..., 2 I), without the bias; bias: (2 I,); grad: (..., I), of the result.

    Returns: gradient of the product (..., 2 I), the result once more (..., I), gradient of the bias (2 I,) float32.
    """
    gate, value = (product.float() + bias.float()).chunk(2, dim=-1)
    share = gate.sigmoid()
    silu = gate * share
    slope = grad.float()
    result = torch.cat([slope * value * (share + silu * (1 - share)), slope * silu], dim=-1)
    return result.to(product.dtype), (silu * value).to(product.dtype), result.flatten(0, -2).sum(0)


@swiglu_backward.register_fake
def _(product, bias, grad):
    return (
        product.new_empty(product.shape),
        grad.new_empty(grad.shape),
        bias.new_empty(bias.shape, dtype=torch.float32),
    )


@swiglu_backward.register_kernel("cuda")
def _(product, bias, grad):
    from .fused_kernels import swiglu_backward as kernel

    return kernel(product, bias, grad)


@torch.library.custom_op("vtp_diffusion::norm_backward", mutates_args=())
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


@norm_backward.register_fake
def _(x, weight, eps, grad, residual, place):
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)


@norm_backward.register_kernel("cuda")
def _(x, weight, eps, grad, residual, place):
    from .fused_kernels import norm_backward as kernel

    return kernel(x, weight, eps, grad, residual, place)


@torch.library.custom_op("vtp_diffusion::rotate_", mutates_args=("x",))
def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate queries and keys in x (B, S, 3 H D), queries, keys and values, in place: see `apply_rotary`.

    Args: `cos`, `sin`: tables (S, D) float32.
    """
    turned = x[..., : 2 * x.shape[-1] // 3].unflatten(-1, (-1, cos.shape[1]))  # (B, S, 2 H, D), a view
    first, second = turned.float().chunk(2, dim=-1)
    half = torch.cat([-second, first], dim=-1)
    turned.copy_(turned.float() * cos[:, None] + half * sin[:, None])


@rotate_.register_kernel("cuda")
def _(x, cos, sin):
    from .fused_kernels import rotate_ as kernel

    kernel(x, cos, sin)


@torch.library.custom_op("vtp_diffusion::rotate_back", mutates_args=())
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


@rotate_back.register_fake
def _(query, key, value, cos, sin):
    batch, length, heads, size = query.shape
    columns = 3 * heads * size
    return query.new_empty(batch, length, columns), query.new_empty(columns, dtype=torch.float32)


@rotate_back.register_kernel("cuda")
def _(query, key, value, cos, sin):
    from .fused_kernels import rotate_back as kernel

    return kernel(query, key, value, cos, sin)


class NormBesideResidual(torch.autograd.Function):
    """x and its root-mean-square norm (see VTPRMSNorm), for a residual update: their gradients meet here.

    Args: x (B, S, D), weight (D,), eps; `kept` (K,) int64, samples to norm; `place` as of `norm_backward`. Or None.
    Returns: x (B, S, D) and the norm (K, S, D) in `dtype`.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, dtype, kept, place):
        ctx.save_for_backward(x, weight, place)
        ctx.eps = eps
        chosen = (x if kept is None else x.index_select(0, kept)).float()
        normed = chosen * torch.rsqrt(chosen.square().mean(dim=-1, keepdim=True) + eps)
        return x.clone(), (normed.to(x.dtype) * weight).to(dtype)  # the compiler makes nothing of the copy

    @staticmethod
    def backward(ctx, residual, grad):
        x, weight, place = ctx.saved_tensors
        x_grad, weight_grad = norm_backward(x, weight, ctx.eps, grad, residual, place)
        return x_grad, weight_grad.to(weight.dtype), None, None, None, None


class RotatedProjections(torch.autograd.Function):
    """Queries, keys and values of x (B, S, D) from one product, queries and keys rotated: each (B, S, H, head_dim).

    Args: weight (3 D, D) in the dtype of x; bias (3 D,); cos, sin: tables (S, head_dim) float32.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, cos, sin):
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.bias_dtype = bias.dtype
        projected = F.linear(x, weight, bias.to(x.dtype))
        rotate_(projected, cos, sin)
        return projected.unflatten(-1, (3, -1, cos.shape[1])).unbind(2)

    @staticmethod
    def backward(ctx, query, key, value):
        x, weight, cos, sin = ctx.saved_tensors
        grad, bias_grad = rotate_back(query, key, value, cos, sin)
        return grad @ weight, grad.flatten(0, 1).T @ x.flatten(0, 1), bias_grad.to(ctx.bias_dtype), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * value, then a product: (..., 2 I) -> (..., D).

    Args: product (..., 2 I) without its bias (2 I,); weight (D, I) in the dtype of the product; bias_out (D,).
    """

    @staticmethod
    def forward(ctx, product, bias, weight, bias_out):
        ctx.save_for_backward(product, bias, weight)
        ctx.bias_dtype = bias_out.dtype
        gate, value = (product.float() + bias).chunk(2, dim=-1)
        return F.linear((F.silu(gate) * value).to(product.dtype), weight, bias_out.to(product.dtype))

    @staticmethod
    def backward(ctx, grad):
        product, bias, weight = ctx.saved_tensors
        result, hidden, bias_grad = swiglu_backward(product, bias, grad @ weight)
        rows = grad.flatten(0, -2)
        return result, bias_grad.to(bias.dtype), rows.T @ hidden.flatten(0, -2), rows.float().sum(0).to(ctx.bias_dtype)
