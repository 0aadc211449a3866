"""Axial rotary embeddings (RoPE, arXiv:2104.09864): VTP's, in float32 or in the bfloat16 arithmetic that the released
weights were trained with, and LightningDiT's."""

import math

import torch

ROTARY_BASE = 100.0
ROTARY_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def rotary_periods(head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Periods 100^(2i / (head_dim/2)), i < head_dim/4, of the rotary embedding: (head_dim/4,) in dtype.

    Released checkpoints hold the bfloat16 ones as `rope_embed.periods`.
    """
    step = round_to_bfloat16 if dtype == torch.bfloat16 else torch.Tensor.float
    exponents = step(2.0 * torch.arange(head_dim // 4, dtype=torch.float32, device=device) / (head_dim // 2))
    return step(ROTARY_BASE**exponents).to(dtype)


def rotary_tables(
    height: int, width: int, head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the axial rotary embedding of a grid of patches.

    Patch centres are scaled to [-1, 1] per side; with the periods 100^(2i / (head_dim/2)), i < head_dim/4, the angles
    are 2π · coordinate / period, heights then widths, tiled twice for the half-split rotation.

    In bfloat16 every step is rounded, as in the arithmetic the released weights were trained with.

    Args:
        height, width: sides of the grid in patches.
        head_dim: channels of a head, a multiple of 4.
        dtype: torch.bfloat16 or torch.float32, of the arithmetic and of the tables.
        device: where to compute them.

    Returns:
        cos and sin, each (height · width, head_dim), row by row.
    """
    step = round_to_bfloat16 if dtype == torch.bfloat16 else torch.Tensor.float
    periods = rotary_periods(head_dim, dtype, device).float()  # (head_dim/4,)
    rows, columns = (
        step(step(torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side) for side in (height, width)
    )
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
    grid = step(2.0 * grid - 1.0)
    angles = step(step(2.0 * math.pi * grid)[:, :, None] / periods)  # (N, 2, head_dim/4)
    angles = angles.flatten(1).tile(2)  # (N, head_dim)
    return step(angles.cos()).to(dtype), step(angles.sin()).to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotation of x (B, S, H, D) by tables (S, D), in the arithmetic of the tables' dtype.

    With bfloat16 tables x itself is rounded to bfloat16, and so is every step, whatever the dtype of x: the released
    weights were trained so.
    """
    cos, sin = cos[:, None], sin[:, None]  # (S, 1, D)
    if cos.dtype == x.dtype:
        return x * cos + _rotate_half(x) * sin
    step = round_to_bfloat16 if cos.dtype == torch.bfloat16 else torch.Tensor.float
    cos, sin = cos.float(), sin.float()
    rounded = step(x.float())
    return step(step(rounded * cos) + step(_rotate_half(rounded) * sin)).to(x.dtype)


def round_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest bfloat16 value, ties to even, kept in float32; the gradient passes unchanged.

    torch.compile drops a cast to bfloat16 and back inside a fused kernel, which changes the rotary angles by up to
    0.016 rad. Integer arithmetic on the bits is never dropped.
    """
    bits = x.detach().view(torch.int32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
    # The difference is exact in float32, so the sum is the rounded value; a NaN stays one.
    return x + (rounded - x).detach()


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def lightning_dit_rotary_tables(
    grid: int, head_dim: int, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (N, head_dim) of the axial rotary embedding on integer grid positions, float32.

    The first half of a head encodes the row, the second half the column; theta = 10000; neighbouring channels form a
    pair (RoFormer, arXiv:2104.09864, on two axes).
    """
    axis_dim = head_dim // 2
    frequencies = 10000.0 ** (-torch.arange(0, axis_dim, 2, dtype=torch.float32, device=device) / axis_dim)
    positions = torch.arange(grid, dtype=torch.float32, device=device)
    angles = (positions[:, None] * frequencies).repeat_interleave(2, dim=-1)  # (grid, head_dim / 2)
    rows = angles[:, None].expand(grid, grid, axis_dim)
    columns = angles[None].expand(grid, grid, axis_dim)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (N, head_dim)
    return angles.cos(), angles.sin()


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), … of each head. `x`: (B, N, heads, d); tables: (N, d). float32 inside."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    quarter_turn = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x * cos[:, None] + quarter_turn * sin[:, None]).to(x.dtype)
