"""LightningDiT's blocks for training on a GPU: everything between two matrix products is one Triton kernel forward and
one backward. No torch.compile is needed. Under autocast the results are those of the plain blocks, up to rounding."""

import contextlib
import importlib.util
import subprocess
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .fused_vtp import RotatedProjections, SwiGLU, compute_dtype, joined_parameters
from .transformer_lightning_dit import (
    LightningDiTAttention,
    LightningDiTBlock,
    LightningDiTSwiGLU,
    LightningDiTTransformer2DModel,
)

# In order of preference: on an H100, cuDNN is the fastest with 72 channels per head.
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
NONE = (None, None, None)  # no update of the residual stream, or no norm of it
COLUMNS = 16  # SwiGLU's inner width is padded to a multiple of this


def why_not_fused(network: nn.Module, device: torch.device) -> str | None:
    """Why a network does not run in fused kernels on a device; None if it does."""
    if type(network).__name__ != "LightningDiTTransformer2DModel":
        return f"the network is a {type(network).__name__}, not a LightningDiT"
    return why_no_kernels(device)


def why_no_kernels(device: torch.device) -> str | None:
    """Why the fused kernels do not run on a device; None if they do."""
    if device.type != "cuda":
        return f"the device is {device}, not a CUDA GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return _why_kernels_fail(device)


def _why_kernels_fail(device: torch.device) -> str | None:
    """Runs a small kernel, because Triton may lack a C compiler or not support the GPU."""
    from triton.errors import TritonError

    try:
        from . import lightning_dit_kernels

        lightning_dit_kernels.swiglu(torch.ones(1, 1, 32, device=device), float8=False)
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return f"Triton's kernels do not run here ({str(error).strip().partition(chr(10))[0][:200]})"
    return None


def fuse_training(network: LightningDiTTransformer2DModel, recompute: bool = False) -> None:
    """Let `FusedBlock` run the blocks of a network when gradients are enabled. The layers inside are then not called:
    hooks on them have no effect."""
    from . import lightning_dit_kernels, vtp_kernels

    fused = FusedBlock(lightning_dit_kernels, vtp_kernels, recompute)
    for block in network.blocks:
        block.fused = fused


def padded_swiglu(mlp: LightningDiTSwiGLU, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight (2 I, D) and bias (2 I,) of `w12`, and weight (D, I) of `w3`, the weights in `dtype`. I is padded with
    zeros to a multiple of 16, which does not change the result.

    Float8 products need such a size, and kernels load rows of 682 columns 2 bytes at a time, of 688 columns 16."""
    first, bias, last = mlp.w12.weight.to(dtype), mlp.w12.bias, mlp.w3.weight.to(dtype)
    if missing := -mlp.w3.in_features % COLUMNS:
        first = F.pad(first.unflatten(0, (2, -1)), (0, 0, 0, missing)).flatten(0, 1)
        bias = F.pad(bias.unflatten(0, (2, -1)), (0, missing)).flatten()
        last = F.pad(last, (0, missing))
    return first, bias, last


class FusedBlock:
    """The forward pass of a `LightningDiTBlock`.

    Args:
        kernels: lightning_dit_kernels.py; `swiglu_kernels`: vtp_kernels.py; or what has their functions.
        recompute: compute norms and activations (but no matrix products) again in the backward pass instead of storing
            them: 31 bytes per token and channel instead of 40.
    """

    def __init__(self, kernels: ModuleType, swiglu_kernels: ModuleType, recompute: bool = False):
        self.kernels, self.swiglu_kernels, self.recompute = kernels, swiglu_kernels, recompute

    def __call__(
        self,
        block: LightningDiTBlock,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = block.modulation(conditioning)
        norm1, norm2 = (block.norm1, shift_attn, scale_attn), (block.norm2, shift_mlp, scale_mlp)
        hidden_states, normed = self._add_and_norm(hidden_states.contiguous(), *NONE, *norm1)
        with self._recomputing(normed, self._norm, hidden_states, *norm1, normed.dtype):
            update, bias = self._attention(block.attn, normed, rotary)
        hidden_states, normed = self._add_and_norm(hidden_states, update, bias, gate_attn, *norm2)
        first, bias, last = padded_swiglu(block.mlp, normed.dtype)
        with self._recomputing(normed, self._norm, hidden_states, *norm2, normed.dtype):
            product = F.linear(normed, first)  # (B, N, 2 I)
        activated = SwiGLU.apply(product, bias, self.swiglu_kernels)
        with self._recomputing(activated, self.swiglu_kernels.swiglu, product, bias):
            update = F.linear(activated, last)
        return self._add_and_norm(hidden_states, update, block.mlp.w3.bias, gate_mlp, *NONE)[0]

    def _recomputing(self, tensor: torch.Tensor, make: Callable, *arguments) -> contextlib.AbstractContextManager:
        """With `recompute`, a context in which autograd does not store `tensor`: backward calls `make(*arguments)`."""
        if not self.recompute:
            return contextlib.nullcontext()
        place = tensor.untyped_storage().data_ptr()
        kept = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]

        def pack(saved: torch.Tensor) -> torch.Tensor | torch.Size:
            return saved.shape if saved.untyped_storage().data_ptr() == place else saved

        def unpack(packed: torch.Tensor | torch.Size) -> torch.Tensor:
            return packed if isinstance(packed, torch.Tensor) else make(*kept).view(packed)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _norm(self, x, norm, shift, scale, dtype):
        return self.kernels.residual_norm(x, *NONE, norm.weight, shift, scale, norm.eps, dtype)[1]

    def _add_and_norm(self, x, update, bias, gate, norm, shift, scale):
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        arguments = x, update, bias, gate, weight, shift, scale, eps, compute_dtype(x), self.kernels
        return ResidualNorm.apply(*arguments)

    def _attention(self, attention: LightningDiTAttention, x: torch.Tensor, rotary: tuple) -> tuple[torch.Tensor, ...]:
        """(B, N, D) -> attention's output (B, N, D) before its bias, and the bias (D,)."""
        out, norms = attention.to_out[0], (attention.norm_q, attention.norm_k)
        if {type(norm) for norm in norms} not in ({nn.Identity}, {nn.RMSNorm}):  # other norms have no kernel
            return attention(x, rotary=rotary), torch.zeros_like(out.bias)
        weight, bias = joined_parameters(attention.to_q, attention.to_k, attention.to_v)
        projections = x, weight.to(x.dtype), bias, *rotary, self.kernels
        if isinstance(norms[0], nn.RMSNorm):
            weights = torch.stack([norm.weight for norm in norms])  # (2, head_dim)
            query, key, value = NormedProjections.apply(*projections, weights, norms[0].eps)
        else:
            query, key, value = RotatedProjections.apply(*projections)
        with sdpa_kernel(ATTENTION, set_priority=True):
            attended = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
        return F.linear(attended.transpose(1, 2).flatten(2), out.weight.to(x.dtype)), out.bias


class ResidualNorm(torch.autograd.Function):
    """x + gate · (update + bias), and its modulated norm: see `residual_norm` in lightning_dit_kernels.py. One kernel
    computes the backward pass of both."""

    @staticmethod
    def forward(ctx, x, update, bias, gate, weight, shift, scale, eps, dtype, kernels):
        total, normed, _ = kernels.residual_norm(x, update, bias, gate, weight, shift, scale, eps, dtype)
        ctx.save_for_backward(None if weight is None else total, update, bias, gate, weight, scale)
        ctx.eps, ctx.kernels = eps, kernels
        return total, normed

    @staticmethod
    def backward(ctx, total_grad, result_grad):
        total, update, bias, gate, weight, scale = ctx.saved_tensors
        total_grad = total_grad.contiguous()
        x = total_grad if total is None else total
        result_grad = None if result_grad is None else result_grad.contiguous()
        x_grad, update_grad, sums = ctx.kernels.residual_norm_backward(
            x, update, bias, gate, weight, scale, ctx.eps, total_grad, result_grad
        )
        bias_grad = gate_grad = weight_grad = shift_grad = scale_grad = None
        if update is not None:
            gate_grad = sums[:, 2:3].to(gate.dtype)  # (B, 1, D)
            bias_grad = (sums[:, 3:] * gate).sum((0, 1)).to(bias.dtype)
        if weight is not None:
            by_norm, shift_grad = sums[:, :1], sums[:, 1:2].to(scale.dtype)
            scale_grad = (by_norm * weight).to(scale.dtype)
            weight_grad = (by_norm * (1 + scale)).sum((0, 1)).to(weight.dtype)
        return x_grad, update_grad, bias_grad, gate_grad, weight_grad, shift_grad, scale_grad, None, None, None


class NormedProjections(torch.autograd.Function):
    """`RotatedProjections` with RMSNorm of queries and keys, of `weights` (2, head_dim), before the rotation. The
    projections are stored for the backward pass: a norm cannot be inverted where its weight is zero."""

    @staticmethod
    def forward(ctx, x, weight, bias, cos, sin, kernels, weights, eps):
        projected = F.linear(x, weight, bias.to(x.dtype))  # (B, N, 3 D)
        turned = kernels.norm_and_rotate(projected, cos, sin, weights, eps)  # (B, N, 2 D)
        ctx.save_for_backward(x, weight, cos, sin, projected, weights)
        ctx.bias_dtype, ctx.eps, ctx.kernels = bias.dtype, eps, kernels
        value = projected.unflatten(-1, (3, -1, cos.shape[1])).select(2, 2)
        return *turned.unflatten(-1, (2, -1, cos.shape[1])).unbind(2), value

    @staticmethod
    def backward(ctx, query, key, value):
        x, weight, cos, sin, projected, weights = ctx.saved_tensors
        grad, bias_grad, norm_grads = ctx.kernels.norm_and_rotate_back(
            query, key, value, cos, sin, projected, weights, ctx.eps
        )
        weight_grad = grad.flatten(0, 1).T @ x.flatten(0, 1)
        norm_grads = norm_grads.to(weights.dtype)
        return grad @ weight, weight_grad, bias_grad.to(ctx.bias_dtype), None, None, None, norm_grads, None
