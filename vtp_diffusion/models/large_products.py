"""Faster forms of the parts of a VTP, for compiled training: fewer and larger products, and on CUDA backward passes
that take one pass over memory where autograd and the compiler take several.

What the latter save is reading gradients again to add them up for biases and scales, and gradients once more where
they meet: at the norm with the residual around it, at the projections with the rotation behind them, in SwiGLU.
"""

import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .vtp_blocks import (
    AddedUpdate,
    VTPAttention,
    VTPBlock,
    VTPEmbeddings,
    VTPRMSNorm,
    VTPSwiGLU,
    places_of,
    residual_update,
    rms_norm,
)

HALF_HEADS = (16, 32, 64, 128)  # halves of heads that `rotate_` knows: powers of two


def cuda_kernels() -> ModuleType | None:
    """fused_kernels.py where there is CUDA, and Triton, which PyTorch for CUDA brings along; else None."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    from . import fused_kernels

    return fused_kernels


def use_large_products(model: nn.Module, programs: ModuleType | None) -> None:
    """Have the parts of a model computed by `LargeProducts`; for compiled training under autocast, which copies the
    weights in any case.

    The layers themselves are not called then: hooks on them, and adapters in their places, have no effect.

    Args: `programs`: see there.
    """
    products = LargeProducts(programs)
    for module in model.modules():
        if isinstance(module, VTPBlock | VTPAttention | VTPSwiGLU | VTPEmbeddings):
            module.products = products


class LargeProducts:
    """Queries and keys, and the two halves of SwiGLU, by one product each; patches by a product instead of a
    convolution: fewer kernels and fewer sums of gradients.

    Args: `programs`: what computes backward passes besides, as `cuda_kernels` gives it; None: autograd.
    """

    def __init__(self, programs: ModuleType | None):
        self.programs = programs

    def can_fuse(self, x: torch.Tensor) -> bool:
        """Whether a backward pass is to come, on a device that the programs are for."""
        return torch.is_grad_enabled() and self.programs is not None and (x.is_cuda or self.programs.ANY_DEVICE)

    def embed_patches(self, embeddings: VTPEmbeddings, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> (B, N, D)."""
        convolution = embeddings.patch_embed
        size = convolution.kernel_size[0]
        pixels = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=size, q=size)
        return F.linear(pixels, convolution.weight.flatten(1), convolution.bias)

    def update(
        self, hidden_states: torch.Tensor, norm: nn.Module, branch: Callable, kept: torch.Tensor | None
    ) -> torch.Tensor:
        """`residual_update` by branch(norm(hidden_states)); if the norm is root-mean-square, the gradients of both
        meet in one kernel."""
        if not (isinstance(norm, VTPRMSNorm) and self.can_fuse(hidden_states)):
            return residual_update(hidden_states, lambda x: branch(norm(x)), kept)
        place = None if kept is None else places_of(kept, len(hidden_states))
        dtype = compute_dtype(hidden_states)
        hidden_states, normed = NormBesideResidual.apply(
            hidden_states, norm.weight, norm.eps, dtype, kept, place, self.programs
        )
        update = branch(normed).to(hidden_states.dtype)
        return hidden_states + update if kept is None else AddedUpdate.apply(hidden_states, update, kept, place)

    def rotated_projections(
        self, attention: VTPAttention, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Queries and keys, rotated, and values, each (B, S, H, head_dim); None where the programs do not know the
        table of the rotation, such as one in bfloat16 arithmetic, or there is a norm before it."""
        known = rotary is not None and rotary[0].dtype == torch.float32 and rotary[0].shape[1] // 2 in HALF_HEADS
        if not known or attention.norm_q is not None or not self.can_fuse(x):
            return None
        weight, bias = joined_parameters(attention.to_q, attention.to_k, attention.to_v)
        dtype = compute_dtype(x)
        return RotatedProjections.apply(x.to(dtype), weight.to(dtype), bias, *rotary, self.programs)

    def projections(self, attention: VTPAttention, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values (B, S, D). Values come apart: they are kept for the backward pass, and would keep
        the others too."""
        return *joined_linear(x, attention.to_q, attention.to_k), attention.to_v(x)

    def swiglu(self, mlp: VTPSwiGLU, x: torch.Tensor) -> torch.Tensor:
        """What `mlp.w3` is called with, (..., I)."""
        if self.can_fuse(x):
            weight, bias = joined_parameters(mlp.w1, mlp.w2)
            return SwiGLU.apply(F.linear(x, weight), bias, self.programs)
        gate, value = joined_linear(x, mlp.w1, mlp.w2)
        return F.silu(gate) * value


def joined_parameters(*layers: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and biases of linear layers below each other."""
    return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])


def joined_linear(x: torch.Tensor, *layers: nn.Linear) -> tuple[torch.Tensor, ...]:
    """What each of the linear layers gives for x (..., D), from one product."""
    return F.linear(x, *joined_parameters(*layers)).split([layer.out_features for layer in layers], dim=-1)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast computes products of x, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class NormBesideResidual(torch.autograd.Function):
    """x and its `rms_norm`, for a residual update: their gradients meet here.

    Args: x (B, S, D), weight (D,), eps; `kept` (K,) int64, samples to norm; `place` as of `norm_backward`. Or None.
    Returns: x (B, S, D) and the norm (K, S, D) in `dtype`.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, dtype, kept, place, programs):
        ctx.save_for_backward(x, weight, place)
        ctx.eps, ctx.programs = eps, programs
        normed = rms_norm(x if kept is None else x.index_select(0, kept), weight, eps)
        # The compiler makes nothing of the copy. A conversion that changes nothing must not come last: compiled by
        # torch 2.11, the function then has gradients of zero.
        return x.clone(), normed if normed.dtype == dtype else normed.to(dtype)

    @staticmethod
    def backward(ctx, residual, grad):
        x, weight, place = ctx.saved_tensors
        x_grad, weight_grad = ctx.programs.norm_backward(x, weight, ctx.eps, grad, residual, place)
        return x_grad, weight_grad.to(weight.dtype), None, None, None, None, None


class RotatedProjections(torch.autograd.Function):
    """Queries, keys and values of x (B, S, D) from one product, queries and keys rotated: each (B, S, H, head_dim).

    Args: weight (3 D, D) in the dtype of x; bias (3 D,); cos, sin: tables (S, head_dim) float32.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, cos, sin, programs):
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.bias_dtype, ctx.programs = bias.dtype, programs
        projected = F.linear(x, weight, bias.to(x.dtype))
        programs.rotate_(projected, cos, sin)
        return projected.unflatten(-1, (3, -1, cos.shape[1])).unbind(2)

    @staticmethod
    def backward(ctx, query, key, value):
        x, weight, cos, sin = ctx.saved_tensors
        grad, bias_grad = ctx.programs.rotate_back(query, key, value, cos, sin)
        weight_grad = grad.flatten(0, 1).T @ x.flatten(0, 1)
        return grad @ weight, weight_grad, bias_grad.to(ctx.bias_dtype), None, None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * value (arXiv:2002.05202), the halves of product (..., 2 I) + bias (2 I,): (..., I)."""

    @staticmethod
    def forward(ctx, product, bias, programs):
        ctx.save_for_backward(product, bias)
        ctx.programs = programs
        return programs.swiglu(product, bias)

    @staticmethod
    def backward(ctx, grad):
        product, bias = ctx.saved_tensors
        product_grad, bias_grad = ctx.programs.swiglu_backward(product, bias, grad)
        return product_grad, bias_grad.to(bias.dtype), None
