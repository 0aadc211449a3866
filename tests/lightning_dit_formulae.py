"""The kernels of lightning_dit_kernels.py as formulae of PyTorch, in float32: what those are tested against."""

import torch

from vtp_diffusion.models.rotary_lightning_dit import rotate_interleaved


def to_float8(x):
    rows = x.float()
    factors = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (rows / factors).to(torch.float8_e4m3fn), factors.flatten(0, -2)


def residual_norm(x, update, bias, gate, weight, shift, scale, eps, dtype, inplace=False):
    total = x if update is None else (x.float() + gate.float() * (update.float() + bias.float()))
    normed = factors = None
    if weight is not None:
        values = total.float()
        normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight.float()
        normed = normed * (1 + scale.float()) + shift.float()
        normed, factors = to_float8(normed) if dtype == torch.float8_e4m3fn else (normed.to(dtype), None)
    return x.copy_(total) if inplace else total.to(x.dtype), normed, factors


def residual_norm_backward(x, update, bias, gate, weight, scale, eps, total_grad, result_grad):
    grad, sums = total_grad.float(), torch.zeros(len(x), 4, x.shape[-1], device=x.device)
    if weight is not None:
        values, given = x.float(), result_grad.float()
        inverse = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
        values = values * inverse
        sums[:, 0], sums[:, 1] = (given * values).sum(1), given.sum(1)
        given = given * weight.float() * (1 + scale.float())
        grad = grad + inverse * (given - values * (given * values).mean(-1, keepdim=True))
    update_grad = None
    if update is not None:
        sums[:, 2] = (grad * (update.float() + bias.float())).sum(1)
        sums[:, 3] = grad.sum(1)
        update_grad = (gate.float() * grad).to(update.dtype)
    return grad.to(x.dtype), update_grad, sums


def swiglu(product, float8):
    gate, value = product.float().chunk(2, dim=-1)
    result = torch.nn.functional.silu(gate) * value
    return to_float8(result) if float8 else (result.to(product.dtype), None)


def rotate_(x, cos, sin, norms=None, eps=0.0):
    for k, part in enumerate(x.unflatten(-1, (3, -1, cos.shape[1])).unbind(2)[:2]):  # (B, N, heads, d), views
        values = part.float()
        if norms is not None:
            values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * norms[k].float()
        part.copy_(rotate_interleaved(values, cos, sin))


def rotate_back(query, key, value, cos, sin):
    parts = [rotate_interleaved(part.float(), cos, -sin) for part in (query, key)]
    result = torch.cat([part.flatten(2) for part in (*parts, value.float())], dim=-1)
    return result.to(query.dtype), result.flatten(0, 1).sum(0)


def norm_and_rotate(x, cos, sin, weights, eps):
    result = x.clone()
    rotate_(result, cos, sin, weights.unbind(0), eps)
    return result[..., : x.shape[-1] // 3 * 2]


def norm_and_rotate_back(query, key, value, cos, sin, x, weights, eps):
    grads, weight_grads = [], []
    for k, (grad, values) in enumerate(
        zip((query, key), x.unflatten(-1, (3, *query.shape[2:])).unbind(2), strict=False)
    ):
        grad, values = rotate_interleaved(grad.float(), cos, -sin), values.float()
        inverse = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
        values = values * inverse
        weight_grads.append((grad * values).flatten(0, 2).sum(0))
        grad = grad * weights[k].float()
        grads.append(inverse * (grad - values * (grad * values).mean(-1, keepdim=True)))
    result = torch.cat([part.flatten(2) for part in (*grads, value.float())], dim=-1)
    return result.to(query.dtype), result.flatten(0, 1).sum(0), torch.stack(weight_grads)
