"""Faster computation of VTP's layers for compiled training: fewer and larger matrix products, and on CUDA backward
passes that read memory once where autograd and torch.compile read it several times.

The kernels cover a norm with the residual connection around it, the projections with the rotation after them, and
SwiGLU. Each computes the gradient of its input and, in the same pass, the sums for the gradients of biases and scales.
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

HALF_HEADS = (16, 32, 64, 128)  # half head sizes that `rotate_` supports: powers of two


def cuda_kernels() -> ModuleType | None:
    """vtp_kernels.py if there are CUDA and Triton, which comes with PyTorch for CUDA; else None."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    from . import vtp_kernels

    return vtp_kernels


def use_large_products(model: nn.Module, kernels: ModuleType | None) -> None:
    """Let `LargeProducts` compute the layers of a model; for compiled training under autocast, which copies the
    weights in any case.

    The layers themselves are then not called: hooks on them, and adapters that replace them, have no effect.

    Args: `kernels`: as of `LargeProducts`.
    """
    products = LargeProducts(kernels)
    for module in model.modules():
        if isinstance(module, VTPBlock | VTPAttention | VTPSwiGLU | VTPEmbeddings):
            module.products = products


class LargeProducts:
    """One product for queries and keys, one for both halves of SwiGLU, and a product in place of the patch
    convolution: fewer kernels and fewer sums of gradients.

    Args: `kernels`: module with the fused kernels, from `cuda_kernels`; None: backward passes are autograd's.
    """

    def __init__(self, kernels: ModuleType | None):
        self.kernels = kernels

    def can_fuse(self, x: torch.Tensor) -> bool:
        """Whether the kernels apply: gradients are enabled and they support the device of x."""
        return torch.is_grad_enabled() and self.kernels is not None and (x.is_cuda or self.kernels.ANY_DEVICE)

    def embed_patches(self, embeddings: VTPEmbeddings, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> (B, N, D)."""
        convolution = embeddings.patch_embed
        size = convolution.kernel_size[0]
        pixels = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=size, q=size)
        return F.linear(pixels, convolution.weight.flatten(1), convolution.bias)

    def update(
        self, hidden_states: torch.Tensor, norm: nn.Module, branch: Callable, kept: torch.Tensor | None
    ) -> torch.Tensor:
        """`residual_update` by branch(norm(hidden_states)). For RMSNorm, one kernel computes the backward pass of both
        the norm and the residual connection."""
        if not (isinstance(norm, VTPRMSNorm) and self.can_fuse(hidden_states)):
            return residual_update(hidden_states, lambda x: branch(norm(x)), kept)
        place = None if kept is None else places_of(kept, len(hidden_states))
        dtype = compute_dtype(hidden_states)
        hidden_states, normed = NormBesideResidual.apply(
            hidden_states, norm.weight, norm.eps, dtype, kept, place, self.kernels
        )
        update = branch(normed).to(hidden_states.dtype)
        return hidden_states + update if kept is None else AddedUpdate.apply(hidden_states, update, kept, place)

    def rotated_projections(
        self, attention: VTPAttention, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Rotated queries and keys, and values, each (B, S, H, head_dim). None if the kernels do not apply: rotary
        tables in bfloat16, another head size, a norm before the rotation, or no gradients."""
        known = rotary is not None and rotary[0].dtype == torch.float32 and rotary[0].shape[1] // 2 in HALF_HEADS
        if not known or attention.norm_q is not None or not self.can_fuse(x):
            return None
        weight, bias = joined_parameters(attention.to_q, attention.to_k, attention.to_v)
        dtype = compute_dtype(x)
        return RotatedProjections.apply(x.to(dtype), weight.to(dtype), bias, *rotary, self.kernels)

    def projections(self, attention: VTPAttention, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values (B, S, D). Values have a product of their own: the backward pass stores them, and
        as a part of a joint result they would keep all of it in memory."""
        return *joined_linear(x, attention.to_q, attention.to_k), attention.to_v(x)

    def swiglu(self, mlp: VTPSwiGLU, x: torch.Tensor) -> torch.Tensor:
        """The input of `mlp.w3`, (..., I)."""
        if self.can_fuse(x):
            weight, bias = joined_parameters(mlp.w1, mlp.w2)
            return SwiGLU.apply(F.linear(x, weight), bias, self.kernels)
        gate, value = joined_linear(x, mlp.w1, mlp.w2)
        return F.silu(gate) * value


def joined_parameters(*layers: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and biases of linear layers, concatenated along the outputs."""
    return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])


def joined_linear(x: torch.Tensor, *layers: nn.Linear) -> tuple[torch.Tensor, ...]:
    """The outputs of several linear layers for x (..., D), from one matrix product."""
    return F.linear(x, *joined_parameters(*layers)).split([layer.out_features for layer in layers], dim=-1)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast computes products of x; without autocast its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class NormBesideResidual(torch.autograd.Function):
    """x and its `rms_norm` for a residual update, so that one kernel computes the gradient of x from both.

    Args: x (B, S, D), weight (D,), eps; `kept` (K,) int64, samples to norm, and its `places_of`, or None: all samples.
    Returns: x (B, S, D) and the norm (K, S, D) in `dtype`.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, dtype, kept, place, kernels):
        ctx.save_for_backward(x, weight, place)
        ctx.eps, ctx.kernels = eps, kernels
        normed = rms_norm(x if kept is None else x.index_select(0, kept), weight, eps)
        # torch.compile removes the clone. The last operation must not be a conversion to the same dtype: compiled by
        # torch 2.11, the function then has zero gradients.
        return x.clone(), normed if normed.dtype == dtype else normed.to(dtype)

    @staticmethod
    def backward(ctx, residual, grad):
        x, weight, place = ctx.saved_tensors
        x_grad, weight_grad = ctx.kernels.norm_backward(x, weight, ctx.eps, grad, residual, place)
        return x_grad, weight_grad.to(weight.dtype), None, None, None, None, None


class RotatedProjections(torch.autograd.Function):
    """Queries, keys and values of x (B, S, D) from one product, queries and keys rotated: each (B, S, H, head_dim).

    Args: weight (3 D, D) in the dtype of x; bias (3 D,); cos, sin: tables (S, head_dim) float32.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, cos, sin, kernels):
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.bias_dtype, ctx.kernels = bias.dtype, kernels
        projected = F.linear(x, weight, bias.to(x.dtype))
        kernels.rotate_(projected, cos, sin)
        return projected.unflatten(-1, (3, -1, cos.shape[1])).unbind(2)

    @staticmethod
    def backward(ctx, query, key, value):
        x, weight, cos, sin = ctx.saved_tensors
        grad, bias_grad = ctx.kernels.rotate_back(query, key, value, cos, sin)
        weight_grad = grad.flatten(0, 1).T @ x.flatten(0, 1)
        return grad @ weight, weight_grad, bias_grad.to(ctx.bias_dtype), None, None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * value (arXiv:2002.05202), the halves of product (..., 2 I) + bias (2 I,): (..., I)."""

    @staticmethod
    def forward(ctx, product, bias, kernels):
        ctx.save_for_backward(product, bias)
        ctx.kernels = kernels
        return kernels.swiglu(product, bias)

    @staticmethod
    def backward(ctx, grad):
        product, bias = ctx.saved_tensors
        product_grad, bias_grad = ctx.kernels.swiglu_backward(product, bias, grad)
        return product_grad, bias_grad.to(bias.dtype), None
