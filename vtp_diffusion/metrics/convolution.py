"""Convolutions about as precise as float32's on tensor cores for TensorFloat-32, which multiply 11 bits of a number.

A number is split into the 11 bits that round it and the next 11: of the four products of two such pairs three are
added up, the smallest is left out (Ootomo and Yokota, arXiv:2203.03341). Tensor cores cut off their sums instead of
rounding them, which over a long sum would be the larger error; so they add up 16 or 32 channels of one place only, and
these sums are added as float32 outside of them, as in the same paper. What is still cut off makes results smaller, by
8e-8 of themselves on an H100 (a unit in the last place is up to 1.2e-7): layer after layer this adds up.

Importing this module needs Triton, which PyTorch for CUDA brings along. Its interpreter (TRITON_INTERPRET=1 in the
environment) runs the same program on a CPU, slowly, but multiplies all bits of a number.
"""

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn.functional import pad

CHANNELS = 16  # of inputs a multiple, else filled up with zeros
BLOCK_ROWS, BLOCK_OUT = 128, 64  # positions and output channels of a program: the fastest of 12 ways on an H100


@triton.jit
def _split(x):
    """What 11 bits hold of float32, rounded, and the rest."""
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return rounded, x - rounded


# one program for all layers: only what decides how wide memory is read is compiled anew
@triton.jit(
    do_not_specialize=[
        "positions", "height", "width", "out_height", "out_width", "kernel_width", "taps",
        "stride_y", "stride_x", "pad_y", "pad_x",
    ]
)  # fmt: skip
def _convolve(
    x, high, low, bias, y,
    positions, height, width, channels, out_height, out_width, out_channels, kernel_width, taps,
    stride_y, stride_x, pad_y, pad_x, x_image, x_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """max(convolution + bias, 0). x (B, H, W, C) with steps of `x_image` and `x_row` numbers from image to image and
    row to row; high and low (O, taps * C); y (positions = B * OH * OW, O)."""
    columns = tl.cdiv(out_channels, BLOCK_OUT)
    place = tl.program_id(0)
    m = (place // columns) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o = (place % columns) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    k = tl.arange(0, BLOCK_CHANNELS)
    left = m % out_width * stride_x - pad_x
    top = m // out_width % out_height * stride_y - pad_y
    corner = x + (m // (out_width * out_height)).to(tl.int64) * x_image + top * x_row + left * channels
    weights = o[:, None] * (taps * channels) + k[None, :]
    present = (o < out_channels)[:, None]
    steps = channels // BLOCK_CHANNELS  # of one tap
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for step in range(0, taps * steps):
        tap = step // steps
        down, right = tap // kernel_width, tap % kernel_width
        inside = (top + down >= 0) & (top + down < height) & (left + right >= 0) & (left + right < width)
        inside = (m < positions) & inside
        offset = down * x_row + right * channels + (step - tap * steps) * BLOCK_CHANNELS
        pixels = tl.load(corner[:, None] + (offset + k)[None, :], mask=inside[:, None], other=0.0)
        upper = tl.load(high + weights + step * BLOCK_CHANNELS, mask=present, other=0.0)
        lower = tl.load(low + weights + step * BLOCK_CHANNELS, mask=present, other=0.0)
        first, rest = _split(pixels)
        part = tl.dot(rest, upper.T, input_precision="tf32")  # the small ones first
        part = tl.dot(first, lower.T, part, input_precision="tf32")
        part = tl.dot(first, upper.T, part, input_precision="tf32")
        total += part
    total += tl.load(bias + o, mask=o < out_channels, other=0.0)[None, :]
    total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    written = (m < positions)[:, None] & (o < out_channels)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * out_channels + o[None, :], total, mask=written)


@torch.library.custom_op("vtp_diffusion::split_convolution", mutates_args=())
def split_convolution(
    x: torch.Tensor,
    high: torch.Tensor,
    low: torch.Tensor,
    bias: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> torch.Tensor:
    """ReLU of a convolution of x (B, C, H, W), float32, in channels-last memory: (B, O, OH, OW), in channels-last.

    Args:
        high, low: weights (O, KH * KW * C), split.
        bias: (O,).
    """
    x = x.contiguous(memory_format=torch.channels_last)
    y = _result(x, high, low, bias, kernel_size, stride, padding)
    (batch, channels, height, width), (out, *out_sides) = x.shape, y.shape[1:]
    positions, taps = batch * math.prod(out_sides), math.prod(kernel_size)
    grid = (triton.cdiv(positions, BLOCK_ROWS) * triton.cdiv(out, BLOCK_OUT),)
    # Triton launches on the current GPU, whichever the tensors are on
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        # steps in memory by the shape, not x.stride(): that of a dimension of 1 may be any
        _convolve[grid](
            x, high, low, bias, y,
            positions, height, width, channels, *out_sides, out, kernel_size[1], taps,
            *stride, *padding, height * width * channels, width * channels,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_OUT=BLOCK_OUT, BLOCK_CHANNELS=CHANNELS if channels % 32 else 32,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return y


@split_convolution.register_fake
def _result(x, high, low, bias, kernel_size, stride, padding) -> torch.Tensor:
    """Where the result goes, once the arguments are checked."""
    columns = math.prod(kernel_size) * x.shape[1]
    if x.dtype != torch.float32 or x.shape[1] % CHANNELS or high.shape[1] != columns or low.shape != high.shape:
        raise ValueError(
            f"a split convolution of {tuple(x.shape)} {x.dtype} by weights {tuple(high.shape)} and "
            f"{tuple(low.shape)}: expected float32, channels in multiples of {CHANNELS}, weights of {columns} columns"
        )
    sides = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(x.shape[2:], kernel_size, stride, padding, strict=True))
    shape = (x.shape[0], bias.shape[0], *sides)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


class SplitConvolution(nn.Module):
    """A convolution and the ReLU behind it, with the precision of float32, on tensor cores.

    Args:
        conv: without groups and dilation, padded by zeros, with bias, float32.

    Raises:
        ValueError: another one.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        if conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros" or conv.bias is None:
            raise ValueError(f"a split convolution has a bias, no groups, no dilation and zeros around it, got {conv}")
        if isinstance(conv.padding, str) or conv.weight.dtype != torch.float32:
            raise ValueError(f"a split convolution has float32 weights and padding by number, got {conv}")
        self.filling = -conv.in_channels % CHANNELS
        weight = pad(conv.weight.detach(), (0, 0, 0, 0, 0, self.filling)).permute(0, 2, 3, 1).flatten(1)
        high = ((weight.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
        self.register_buffer("high", high)
        self.register_buffer("low", weight - high)
        self.register_buffer("bias", conv.bias.detach())
        self.places = list(conv.kernel_size), list(conv.stride), list(conv.padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float32 to (B, O, OH, OW), both in channels-last memory."""
        if self.filling:
            x = pad(x, (0, 0, 0, 0, 0, self.filling))
        return split_convolution(x, self.high, self.low, self.bias, *self.places)
