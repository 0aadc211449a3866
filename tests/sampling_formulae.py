"""The kernels of sampling_kernels.py as formulae of PyTorch, in float32: what those are tested against."""

import torch

from vtp_diffusion.models.rotary import rotate_interleaved


def to_float8(x):
    rows = x.float()
    factors = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (rows / factors).to(torch.float8_e4m3fn), factors.flatten(0, -2)


def norm_modulate(x, update, gate, weight, shift, scale, eps, float8):
    values = x.float()
    if update is not None:
        values = values + gate.float() * update.float()
        x.copy_(values)
    normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight.float()
    result = normed * (1 + scale.float()) + shift.float()
    return to_float8(result) if float8 else (result.to(x.dtype), None)


def swiglu(product, float8):
    gate, value = product.float().chunk(2, dim=-1)
    result = torch.nn.functional.silu(gate) * value
    return to_float8(result) if float8 else (result.to(product.dtype), None)


def rotate_(x, cos, sin, norms, eps):
    for k, part in enumerate(x.unflatten(-1, (3, -1, cos.shape[1])).unbind(2)[:2]):  # (B, N, heads, d), views
        values = part.float()
        if norms is not None:
            values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * norms[k].float()
        part.copy_(rotate_interleaved(values, cos, sin))
