"""Triton kernels for fused_vtp.py. Their backward passes sum the gradients of biases and scales while the values
are in registers; autograd and torch.compile would read them from memory again. tests/fused_formulae.py has the same
functions in PyTorch.

Importing this module needs Triton, which comes with PyTorch for CUDA; its interpreter (TRITON_INTERPRET=1 in the
environment) runs the kernels on a CPU, slowly.
"""

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

ANY_DEVICE = False  # CUDA only
PROGRAMS = 1056  # launched together: eight on each of an H100's 132 multiprocessors; SwiGLU launches twice as many
# Block sizes, warps per program and pipeline stages (iterations loaded ahead): the fastest of some 100 combinations on
# an H100 at the sizes of VTP Large.
FORWARD_ROWS, FORWARD_COLUMNS, FORWARD_WARPS = 8, 512, 8
SWIGLU_ROWS, SWIGLU_COLUMNS, SWIGLU_WARPS, SWIGLU_STAGES = 32, 128, 8, 4
NORM_WARPS, NORM_STAGES = 2, 2
ROTATED_ROWS, ROTATED_HEADS, ROTATED_WARPS, ROTATED_STAGES = 4, 16, 8, 1


@triton.jit
def _swiglu(
    product, bias, result,
    rows, inner,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """product (rows, 2 * inner); bias (2 * inner,); result (rows, inner)."""
    blocks = tl.cdiv(inner, BLOCK_COLUMNS)
    row = tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < inner
    there = (row < rows)[:, None] & inside[None, :]
    wide = row.to(tl.int64)[:, None] * (2 * inner) + column[None, :]
    gate = tl.load(product + wide, mask=there, other=0.0).to(tl.float32)
    value = tl.load(product + wide + inner, mask=there, other=0.0).to(tl.float32)
    gate += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    value += tl.load(bias + inner + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    narrow = row.to(tl.int64)[:, None] * inner + column[None, :]
    tl.store(result + narrow, (gate * tl.sigmoid(gate) * value).to(result.dtype.element_ty), mask=there)


@triton.jit
def _swiglu_backward(
    product, bias, grad, result, sums,
    rows, inner, rows_each,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """product, result (rows, 2 * inner); bias (2 * inner,); grad (rows, inner); sums (parts, 2 * inner)."""
    part = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < inner
    gate_bias = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    value_bias = tl.load(bias + inner + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    gate_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    value_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in tl.range(part * rows_each, tl.minimum((part + 1) * rows_each, rows), BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)
        there = (row < rows)[:, None] & inside[None, :]
        narrow = row.to(tl.int64)[:, None] * inner + column[None, :]
        wide = row.to(tl.int64)[:, None] * (2 * inner) + column[None, :]
        gate = tl.load(product + wide, mask=there, other=0.0).to(tl.float32) + gate_bias
        value = tl.load(product + wide + inner, mask=there, other=0.0).to(tl.float32) + value_bias
        slope = tl.load(grad + narrow, mask=there, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        gate_grad = slope * value * (share + silu * (1 - share))
        value_grad = slope * silu
        gate_sum += gate_grad
        value_sum += value_grad
        tl.store(result + wide, gate_grad.to(result.dtype.element_ty), mask=there)
        tl.store(result + wide + inner, value_grad.to(result.dtype.element_ty), mask=there)
    place = sums + part * (2 * inner) + column
    tl.store(place, tl.sum(gate_sum, axis=0), mask=inside)
    tl.store(place + inner, tl.sum(value_sum, axis=0), mask=inside)


@triton.jit
def _norm_backward(
    x, weight, grad, residual, place, result, sums,
    length, kept, width, parts, eps,
    SUBSET: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x, residual, result (samples * length, width); sums (programs, width); grad (kept * length, width), where the
    gradient of sample b is number place[b], or zero if that is not below `kept`. A program handles some of the rows of
    one sample."""
    sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    column = tl.arange(0, BLOCK_COLUMNS)
    inside = column < width
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    source = sample
    if SUBSET:
        source = tl.load(place + sample).to(tl.int32)
    present = inside & (source < kept)
    total = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float32)
    for row in tl.range(part, length, parts, num_stages=STAGES):
        own = (sample.to(tl.int64) * length + row) * width + column
        values = tl.load(x + own, mask=inside, other=0.0).to(tl.float32)
        through = tl.load(residual + own, mask=inside, other=0.0).to(tl.float32)
        theirs = (source.to(tl.int64) * length + row) * width + column
        slope = tl.load(grad + theirs, mask=present, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
        normed = values * inverse
        scaled = slope * scale
        along = tl.sum(scaled * normed, axis=0) / width
        tl.store(
            result + own, (through + inverse * (scaled - normed * along)).to(result.dtype.element_ty), mask=inside
        )
        total += slope * normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(sums + (sample * parts + part) * width + column, total, mask=inside)


@triton.jit
def _rotate(
    x, cos, sin,
    rows, length, heads, step,
    HALF: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Rotates the first heads * 2 * HALF columns of x (rows, step), in place. cos, sin (length, 2 * HALF) float32."""
    blocks = tl.cdiv(heads, BLOCK_HEADS)
    row = tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head = tl.program_id(0) % blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    channel = tl.arange(0, HALF)
    angle = (row % length)[:, None, None] * (2 * HALF) + channel[None, None, :]
    there = (row < rows)[:, None, None] & (head < heads)[None, :, None]
    first_place = (
        x + row.to(tl.int64)[:, None, None] * step + head[None, :, None] * (2 * HALF) + channel[None, None, :]
    )
    first = tl.load(first_place, mask=there, other=0.0).to(tl.float32)
    second = tl.load(first_place + HALF, mask=there, other=0.0).to(tl.float32)
    rotated = first * tl.load(cos + angle) - second * tl.load(sin + angle)
    tl.store(first_place, rotated.to(x.dtype.element_ty), mask=there)
    rotated = second * tl.load(cos + angle + HALF) + first * tl.load(sin + angle + HALF)
    tl.store(first_place + HALF, rotated.to(x.dtype.element_ty), mask=there)


@triton.jit
def _rotate_back(
    query, key, value, cos, sin, result, sums,
    rows, length, heads, rows_each, sample_step, token_step, head_step,
    HALF: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of rotated queries and keys, and of values, (B, length, heads, 2 * HALF) with the given strides ->
    result (rows = B * length, 3 * heads * 2 * HALF) and its partial sums over rows (parts, 3 * heads * 2 * HALF)."""
    blocks = tl.cdiv(heads, BLOCK_HEADS)
    kind, part = tl.program_id(0) // blocks, tl.program_id(1)
    head = tl.program_id(0) % blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    channel = tl.arange(0, HALF)
    columns = 3 * heads * 2 * HALF
    target = (kind * heads + head)[None, :, None] * (2 * HALF) + channel[None, None, :]
    source = query
    if kind == 1:
        source = key
    if kind == 2:
        source = value
    first_sum = tl.zeros((BLOCK_ROWS, BLOCK_HEADS, HALF), dtype=tl.float32)
    second_sum = tl.zeros((BLOCK_ROWS, BLOCK_HEADS, HALF), dtype=tl.float32)
    for start in tl.range(part * rows_each, tl.minimum((part + 1) * rows_each, rows), BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)
        there = (row < rows)[:, None, None] & (head < heads)[None, :, None]
        token = (row // length).to(tl.int64) * sample_step + (row % length).to(tl.int64) * token_step
        place = source + token[:, None, None] + head[None, :, None] * head_step + channel[None, None, :]
        first = tl.load(place, mask=there, other=0.0).to(tl.float32)
        second = tl.load(place + HALF, mask=there, other=0.0).to(tl.float32)
        if kind < 2:
            angle = (row % length)[:, None, None] * (2 * HALF) + channel[None, None, :]
            back = first * tl.load(cos + angle) + second * tl.load(sin + angle + HALF)
            second = second * tl.load(cos + angle + HALF) - first * tl.load(sin + angle)
            first = back
        first_sum += first
        second_sum += second
        out = result + row.to(tl.int64)[:, None, None] * columns + target
        tl.store(out, first.to(result.dtype.element_ty), mask=there)
        tl.store(out + HALF, second.to(result.dtype.element_ty), mask=there)
    target = sums + part * columns + (kind * heads + head)[:, None] * (2 * HALF) + channel[None, :]
    there = (head < heads)[:, None] & (channel < HALF)[None, :]
    tl.store(target, tl.sum(first_sum, axis=0), mask=there)
    tl.store(target + HALF, tl.sum(second_sum, axis=0), mask=there)


def _parts(rows: int, block_rows: int, blocks: int, programs: int) -> tuple[int, int]:
    """(number of parts to divide the rows into, rows per part: a multiple of `block_rows`), for about `programs`
    programs of which `blocks` share the columns of each part."""
    wanted = max(1, programs // blocks)
    each = triton.cdiv(triton.cdiv(rows, wanted), block_rows) * block_rows
    return triton.cdiv(rows, each), each


@triton_op("vtp_diffusion::swiglu", mutates_args=())
def swiglu(product: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """silu(gate) · value (..., I), where gate and value are the halves of product (..., 2 I) + bias (2 I,)."""
    product, inner = product.contiguous(), product.shape[-1] // 2
    rows = product.numel() // (2 * inner)
    result = product.new_empty(*product.shape[:-1], inner)
    wrap_triton(_swiglu)[(triton.cdiv(inner, FORWARD_COLUMNS) * triton.cdiv(rows, FORWARD_ROWS),)](
        product, bias, result, rows, inner,
        BLOCK_ROWS=FORWARD_ROWS, BLOCK_COLUMNS=FORWARD_COLUMNS, num_warps=FORWARD_WARPS,
    )  # fmt: skip
    return result


@triton_op("vtp_diffusion::swiglu_backward", mutates_args=())
def swiglu_backward(
    product: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `swiglu`'s product, (..., 2 I), and bias, (2 I,) float32."""
    product, grad, inner = product.contiguous(), grad.contiguous(), grad.shape[-1]
    rows = grad.numel() // inner
    blocks = triton.cdiv(inner, SWIGLU_COLUMNS)
    parts, each = _parts(rows, SWIGLU_ROWS, blocks, 2 * PROGRAMS)
    result = torch.empty_like(product)
    sums = torch.empty(parts, 2 * inner, device=grad.device)
    wrap_triton(_swiglu_backward)[(blocks, parts)](
        product, bias, grad, result, sums, rows, inner, each,
        BLOCK_ROWS=SWIGLU_ROWS, BLOCK_COLUMNS=SWIGLU_COLUMNS, STAGES=SWIGLU_STAGES, num_warps=SWIGLU_WARPS,
    )  # fmt: skip
    return result, sums.sum(0)


@triton_op("vtp_diffusion::norm_backward", mutates_args=())
def norm_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad: torch.Tensor,
    residual: torch.Tensor,
    place: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `NormBesideResidual`'s x, (B, S, D), and weight, (D,) float32; `place` as of `places_of`."""
    x, grad, residual = x.contiguous(), grad.contiguous(), residual.contiguous()
    samples, length, width = x.shape
    parts = min(length, max(1, PROGRAMS // samples))  # programs per sample
    result, sums = torch.empty_like(x), torch.empty(samples * parts, width, device=x.device)
    wrap_triton(_norm_backward)[(samples * parts,)](
        x, weight, grad, residual, x if place is None else place, result, sums,
        length, len(grad), width, parts, eps,
        SUBSET=place is not None, BLOCK_COLUMNS=triton.next_power_of_2(width), STAGES=NORM_STAGES,
        num_warps=NORM_WARPS,
    )  # fmt: skip
    return result, sums.sum(0)


@triton_op("vtp_diffusion::rotate_", mutates_args=("x",))
def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate queries and keys, the first two thirds of x (B, S, 3 H D), in place. Raises: ValueError unless x is
    contiguous."""
    if not x.is_contiguous():
        raise ValueError(f"x {tuple(x.shape)} has strides {x.stride()}, expected it contiguous")
    batch, length, step = x.shape
    rows, half, heads = batch * length, cos.shape[1] // 2, 2 * step // 3 // cos.shape[1]
    wrap_triton(_rotate)[(triton.cdiv(heads, ROTATED_HEADS) * triton.cdiv(rows, ROTATED_ROWS),)](
        x, cos, sin, rows, length, heads, step,
        HALF=half, BLOCK_ROWS=ROTATED_ROWS, BLOCK_HEADS=ROTATED_HEADS, num_warps=ROTATED_WARPS,
    )  # fmt: skip


@triton_op("vtp_diffusion::rotate_back", mutates_args=())
def rotate_back(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (B, S, H, D) behind `rotate_` -> gradient of x (B, S, 3 H D) and its sum over tokens, float32."""
    batch, length, heads, size = query.shape
    if not query.stride() == key.stride() == value.stride() or query.stride(3) != 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    rows, blocks = batch * length, 3 * triton.cdiv(heads, ROTATED_HEADS)
    parts, each = _parts(rows, ROTATED_ROWS, blocks, PROGRAMS)
    result = query.new_empty(batch, length, 3 * heads * size)
    sums = torch.empty(parts, result.shape[-1], device=query.device)
    wrap_triton(_rotate_back)[(blocks, parts)](
        query, key, value, cos, sin, result, sums,
        rows, length, heads, each, *query.stride()[:3],
        HALF=size // 2, BLOCK_ROWS=ROTATED_ROWS, BLOCK_HEADS=ROTATED_HEADS, STAGES=ROTATED_STAGES,
        num_warps=ROTATED_WARPS,
    )  # fmt: skip
    return result, sums.sum(0)
