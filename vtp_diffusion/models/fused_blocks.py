"""Parts of a transformer block whose backward pass takes one pass over memory where autograd and the compiler take
several: norm with the residual around it, projections with the rotation behind them, SwiGLU.

What is saved is reading gradients again to add them up for biases and scales, and gradients once more where they meet.
"""

import importlib
import importlib.util
from types import ModuleType

import torch
import torch.nn.functional as F

HALF_HEADS = (16, 32, 64, 128)  # halves of heads that `rotate_` knows: powers of two


programs: ModuleType | None = None  # what computes the backward passes, see `load_programs`


def load_programs() -> None:
    """Look for Triton, which PyTorch for CUDA brings along; without it nothing here is used."""
    global programs
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        # not an import statement: an exported pipeline comes with this module, but without Triton's programs
        programs = importlib.import_module(f"{__package__}.fused_kernels")


def can_fuse(x: torch.Tensor) -> bool:
    """Whether a backward pass is to come, on a device whose programs were loaded."""
    return torch.is_grad_enabled() and programs is not None and (x.is_cuda or programs.ANY_DEVICE)


def can_rotate(cos: torch.Tensor) -> bool:
    """Whether `rotate_` knows the table (S, head_dim) of a rotary embedding: not those in bfloat16 arithmetic."""
    return cos.dtype == torch.float32 and cos.shape[1] // 2 in HALF_HEADS


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast computes products of x, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension in float32, cast back before the scale: see `VTPRMSNorm`."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


class NormBesideResidual(torch.autograd.Function):
    """x and its `rms_norm`, for a residual update: their gradients meet here.

    Args: x (B, S, D), weight (D,), eps; `kept` (K,) int64, samples to norm; `place` as of `norm_backward`. Or None.
    Returns: x (B, S, D) and the norm (K, S, D) in `dtype`.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, dtype, kept, place):
        ctx.save_for_backward(x, weight, place)
        ctx.eps = eps
        normed = rms_norm(x if kept is None else x.index_select(0, kept), weight, eps)
        return x.clone(), normed.to(dtype)  # the compiler makes nothing of the copy

    @staticmethod
    def backward(ctx, residual, grad):
        x, weight, place = ctx.saved_tensors
        x_grad, weight_grad = programs.norm_backward(x, weight, ctx.eps, grad, residual, place)
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
        programs.rotate_(projected, cos, sin)
        return projected.unflatten(-1, (3, -1, cos.shape[1])).unbind(2)

    @staticmethod
    def backward(ctx, query, key, value):
        x, weight, cos, sin = ctx.saved_tensors
        grad, bias_grad = programs.rotate_back(query, key, value, cos, sin)
        return grad @ weight, grad.flatten(0, 1).T @ x.flatten(0, 1), bias_grad.to(ctx.bias_dtype), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * value (arXiv:2002.05202), the halves of product (..., 2 I) + bias (2 I,): (..., I)."""

    @staticmethod
    def forward(ctx, product, bias):
        ctx.save_for_backward(product, bias)
        return programs.swiglu(product, bias)

    @staticmethod
    def backward(ctx, grad):
        product, bias = ctx.saved_tensors
        product_grad, bias_grad = programs.swiglu_backward(product, bias, grad)
        return product_grad, bias_grad.to(bias.dtype)
