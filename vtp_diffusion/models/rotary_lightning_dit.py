"""LightningDiT's axial rotary embedding (RoPE, arXiv:2104.09864) on integer grid positions."""

import torch


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
