"""Triton kernels of a LightningDiT's evaluation without gradients: one pass over memory for what stands between two
matrix products. tests/sampling_formulae.py has the same functions in PyTorch.

Importing this module needs Triton, which PyTorch for CUDA brings along; its interpreter (TRITON_INTERPRET=1 in the
environment) runs the kernels on a CPU, slowly.
"""

import torch
import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)  # of float8 e4m3
SMALLEST = tl.constexpr(1e-12)  # scale of a row of zeros
ROW_WARPS, ROTATE_WARPS = 4, 8


@triton.jit
def _norm_modulate(
    x, update, gate, weight, shift, scale, result, factors,
    length, width, gate_step, step, eps,
    UPDATE: tl.constexpr, FLOAT8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, update, result (B * length, width); gate, shift, scale (B, width) with steps between rows; weight (width,);
    factors (B * length,). A program has one row."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // length
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if UPDATE:
        change = tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
        values += tl.load(gate + sample * gate_step + column, mask=inside, other=0.0).to(tl.float32) * change
        tl.store(x + place, values.to(x.dtype.element_ty), mask=inside)
    values *= tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    values *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    values *= 1 + tl.load(scale + sample * step + column, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(shift + sample * step + column, mask=inside, other=0.0).to(tl.float32)
    if FLOAT8:
        factor = tl.maximum(tl.max(tl.abs(values), axis=0), SMALLEST) / LARGEST
        tl.store(factors + row, factor)
        values = values / factor
    tl.store(result + place, values.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(product, result, factors, width, FLOAT8: tl.constexpr, BLOCK: tl.constexpr):
    """product (rows, 2 * width), result (rows, width), factors (rows,). A program has one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * 2 * width + column
    gate = tl.load(product + place, mask=inside, other=0.0).to(tl.float32)
    values = gate * tl.sigmoid(gate) * tl.load(product + place + width, mask=inside, other=0.0).to(tl.float32)
    if FLOAT8:
        factor = tl.maximum(tl.max(tl.abs(values), axis=0), SMALLEST) / LARGEST
        tl.store(factors + row, factor)
        values = values / factor
    tl.store(result + row * width + column, values.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _to_float8(x, result, factors, width, BLOCK: tl.constexpr):
    """x, result (rows, width), factors (rows,). A program has one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.maximum(tl.max(tl.abs(values), axis=0), SMALLEST) / LARGEST
    tl.store(factors + row, factor)
    tl.store(result + row * width + column, (values / factor).to(result.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    x, cos, sin, weights,
    length, heads, size, step, eps,
    NORM: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The queries and then the keys at the start of x (rows, step), heads * size each, normed and rotated in place.
    cos, sin (length, size): both of a pair have the same; weights (2, size). A program has one row of either."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, 2 * PAIRS)
    there = (head < heads)[:, None] & (channel < size)[None, :]
    start = x + row * step + tl.program_id(1) * heads * size
    place = start + head[:, None] * size + channel[None, :]
    values = tl.load(place, mask=there, other=0.0).to(tl.float32)
    if NORM:
        weight = weights + tl.program_id(1) * size
        scale = tl.load(weight + channel, mask=channel < size, other=0.0).to(tl.float32)
        values *= tl.rsqrt(tl.sum(values * values, axis=1) / size + eps)[:, None] * scale[None, :]
    pair = tl.arange(0, PAIRS)
    angle = (row % length) * size + 2 * pair
    turn_cos = tl.load(cos + angle, mask=2 * pair < size, other=0.0)[None, :]
    turn_sin = tl.load(sin + angle, mask=2 * pair < size, other=0.0)[None, :]
    first, second = tl.split(tl.reshape(values, (HEADS, PAIRS, 2)))
    turned = tl.join(first * turn_cos - second * turn_sin, second * turn_cos + first * turn_sin)
    tl.store(place, tl.reshape(turned, (HEADS, 2 * PAIRS)).to(x.dtype.element_ty), mask=there)


def _outputs(shape: tuple[int, ...], like: torch.Tensor, float8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An empty result and, for float8, the factors of its rows (rows, 1)."""
    if not float8:
        return like.new_empty(shape), None
    result = like.new_empty(shape, dtype=torch.float8_e4m3fn)
    return result, like.new_empty(result.numel() // shape[-1], 1, dtype=torch.float32)


def norm_modulate(
    x: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    float8: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Adds gate · update to x (B, N, D), in place, and gives the sum's root-mean-square norm, scaled by 1 + scale and
    shifted.

    Args: `update` (B, N, D) and `gate` (B, 1, D), or None for both; `weight` (D,); `shift`, `scale` (B, 1, D).
    Returns: (B, N, D) and None, or with `float8` the rows in float8 and the factors (B · N, 1) that give them back.
    """
    batch, length, width = x.shape
    result, factors = _outputs(x.shape, x, float8)
    _norm_modulate[(batch * length,)](
        x, x if update is None else update, x if gate is None else gate, weight, shift, scale, result,
        x if factors is None else factors,
        length, width, 0 if gate is None else gate.stride(0), shift.stride(0), eps,
        UPDATE=update is not None, FLOAT8=float8, BLOCK=triton.next_power_of_2(width), num_warps=ROW_WARPS,
    )  # fmt: skip
    return result, factors


def swiglu(product: torch.Tensor, float8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """silu(gate) · value, the halves of product (B, N, 2 I): (B, N, I), with `float8` as of `norm_modulate`."""
    width = product.shape[-1] // 2
    result, factors = _outputs((*product.shape[:-1], width), product, float8)
    _swiglu[(result.numel() // width,)](
        product, result, product if factors is None else factors, width,
        FLOAT8=float8, BLOCK=triton.next_power_of_2(width), num_warps=ROW_WARPS,
    )  # fmt: skip
    return result, factors


def to_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (..., D) in float8 and the factors (rows, 1), float32, that give them back."""
    result, factors = _outputs(x.shape, x, float8=True)
    width = x.shape[-1]
    _to_float8[(len(factors),)](x, result, factors, width, BLOCK=triton.next_power_of_2(width), num_warps=ROW_WARPS)
    return result, factors


def rotate_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: tuple[torch.Tensor, torch.Tensor] | None, eps: float
) -> None:
    """Norm (if there are weights of norms) and rotate, in place, queries and keys of x (B, N, 3 · heads · d).

    Args: `cos`, `sin`: tables (N, d) of `lightning_dit_rotary_tables`; `norms`: weights (d,) of queries and keys.
    """
    batch, length, step = x.shape
    size = cos.shape[1]
    heads = step // (3 * size)
    weights = cos if norms is None else torch.stack(norms)
    _rotate[(batch * length, 2)](
        x, cos, sin, weights, length, heads, size, step, eps,
        NORM=norms is not None, HEADS=triton.next_power_of_2(heads), PAIRS=triton.next_power_of_2(size) // 2,
        num_warps=ROTATE_WARPS,
    )  # fmt: skip
