"""Triton kernels of LightningDiT, forward and backward: all work between two matrix products in one pass over memory.
tests/lightning_dit_formulae.py has the same functions in PyTorch.

Importing this module needs Triton, which comes with PyTorch for CUDA; its interpreter (TRITON_INTERPRET=1 in the
environment) runs the kernels on a CPU, slowly.
"""

import torch
import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)  # of float8 e4m3
SMALLEST = tl.constexpr(1e-12)  # so that a row of zeros is not divided by 0
# In the backward kernels a program handles some tokens of one sample and keeps their sums in registers. All programs
# together have 4224 warps, 32 for each of an H100's 132 multiprocessors.
BACKWARD_WARPS, BACKWARD_STAGES = 4224, 3
TURN_PROGRAMS, TURN_STAGES = 4224, 3  # of `rotate_back`


def row_warps(width: int) -> int:
    """Warps per row of `width` columns. On an H100, 4 were the fastest at 1152, with 16 columns per thread. Up to 512
    columns, one warp has at most as many and need not wait for others."""
    return 1 if width <= 512 else 4


@triton.jit
def _residual_norm(
    x, update, bias, gate, total, weight, shift, scale, result, factors,
    length, width, gate_step, step, eps,
    UPDATE: tl.constexpr, NORM: tl.constexpr, FLOAT8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, update, total, result (B * length, width); gate (B, width) with row stride gate_step; shift, scale (B, width)
    with row stride step; bias and weight (width,); factors (B * length,). One program per row."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // length
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if UPDATE:
        change = tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
        change += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        values += tl.load(gate + sample * gate_step + column, mask=inside, other=0.0).to(tl.float32) * change
        tl.store(total + place, values.to(total.dtype.element_ty), mask=inside)
    if NORM:
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
def _residual_norm_backward(
    x, update, bias, gate, weight, scale, total_grad, result_grad, x_grad, update_grad, sums,
    length, width, parts, gate_step, step, eps,
    UPDATE: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x: the input of the norm; its gradient is x_grad. sums (B * parts, 4, width), over tokens, for the gradients of
    scale, shift, gate and bias: see `residual_norm_backward`. A program handles some rows of one sample."""
    sample, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    column = tl.arange(0, BLOCK)
    inside = column < width
    if UPDATE:
        offset = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        gates = tl.load(gate + sample * gate_step + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        slope = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        slope *= 1 + tl.load(scale + sample * step + column, mask=inside, other=0.0).to(tl.float32)
    scale_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    shift_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    gate_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in tl.range(part, length, parts, num_stages=STAGES):
        place = (sample * length + row) * width + column
        grad = tl.load(total_grad + place, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            given = tl.load(result_grad + place, mask=inside, other=0.0).to(tl.float32)
            inverse = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
            values *= inverse
            scale_sum += given * values
            shift_sum += given
            given *= slope
            grad += inverse * (given - values * (tl.sum(given * values, axis=0) / width))
            tl.store(x_grad + place, grad.to(x_grad.dtype.element_ty), mask=inside)
        if UPDATE:
            gate_sum += grad * (tl.load(update + place, mask=inside, other=0.0).to(tl.float32) + offset)
            bias_sum += grad
            tl.store(update_grad + place, (gates * grad).to(update_grad.dtype.element_ty), mask=inside)
    own = sums + tl.program_id(0).to(tl.int64) * 4 * width + column
    if NORM:
        tl.store(own, scale_sum, mask=inside)
        tl.store(own + width, shift_sum, mask=inside)
    if UPDATE:
        tl.store(own + 2 * width, gate_sum, mask=inside)
        tl.store(own + 3 * width, bias_sum, mask=inside)


@triton.jit
def _swiglu(product, result, factors, width, FLOAT8: tl.constexpr, BLOCK: tl.constexpr):
    """product (rows, 2 * width), result (rows, width), factors (rows,). One program per row."""
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
    """x, result (rows, width), factors (rows,). One program per row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.maximum(tl.max(tl.abs(values), axis=0), SMALLEST) / LARGEST
    tl.store(factors + row, factor)
    tl.store(result + row * width + column, (values / factor).to(result.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    x, cos, sin, weights, result,
    length, heads, step, result_step, eps,
    size: tl.constexpr, NORM: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Norm and rotate queries and keys, the first 2 * heads * size columns of x (rows, step), and write them to the
    same columns of result (rows, result_step), which may be x. cos, sin (length, size), the same for both channels of
    a pair; weights (2, size). One program per row of queries or of keys."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, 2 * PAIRS)
    there = (head < heads)[:, None] & (channel < size)[None, :]
    place = tl.program_id(1) * heads * size + head[:, None] * size + channel[None, :]
    values = tl.load(x + row * step + place, mask=there, other=0.0).to(tl.float32)
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
    turned = tl.reshape(turned, (HEADS, 2 * PAIRS)).to(result.dtype.element_ty)
    tl.store(result + row * result_step + place, turned, mask=there)


@triton.jit
def _rotate_back(
    query, key, value, cos, sin, x, weights, result, sums, norm_sums,
    length, heads, parts, batch_step, eps,
    size: tl.constexpr, row_step: tl.constexpr, head_step: tl.constexpr,
    NORM: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients query, key, value (B, length, heads, size) of equal strides -> result (B * length, 3 * heads * size):
    queries and keys are rotated back and, with NORM, go back through the norm of x (shaped as result) with weights
    (2, size). sums (B * parts, 3 * heads * size): of result; norm_sums (B * parts, 3, size): for the gradients of
    weights, zero for values. A program handles some rows of one sample, of query, key or value."""
    sample, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    which = tl.program_id(1)
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, 2 * PAIRS)
    pair = tl.arange(0, PAIRS)
    there = (head < heads)[:, None] & (channel < size)[None, :]
    source = query
    if which == 1:
        source = key
    if which == 2:
        source = value
    source += sample * batch_step + head[:, None] * head_step + channel[None, :]
    target = which * heads * size + head[:, None] * size + channel[None, :]
    total = tl.zeros((HEADS, 2 * PAIRS), dtype=tl.float32)
    if NORM:
        by_norm = tl.zeros((HEADS, 2 * PAIRS), dtype=tl.float32)
        known = (channel < size) & (which < 2)
        weight = tl.load(weights + which * size + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    for row in tl.range(part, length, parts, num_stages=STAGES):
        values = tl.load(source + row * row_step, mask=there, other=0.0).to(tl.float32)
        place = (sample * length + row) * (3 * heads * size) + target
        if NORM:  # at the top of the loop, so that Triton loads it ahead
            before = tl.load(x + place, mask=there & (which < 2), other=0.0).to(tl.float32)
        if which < 2:
            angle = row * size + 2 * pair
            turn_cos = tl.load(cos + angle, mask=2 * pair < size, other=0.0)[None, :]
            turn_sin = tl.load(sin + angle, mask=2 * pair < size, other=0.0)[None, :]
            first, second = tl.split(tl.reshape(values, (HEADS, PAIRS, 2)))
            turned = tl.join(first * turn_cos + second * turn_sin, second * turn_cos - first * turn_sin)
            values = tl.reshape(turned, (HEADS, 2 * PAIRS))
            if NORM:
                inverse = tl.rsqrt(tl.sum(before * before, axis=1) / size + eps)[:, None]
                normed = before * inverse
                by_norm += values * normed
                values *= weight
                values = inverse * (values - normed * (tl.sum(values * normed, axis=1) / size)[:, None])
        total += values
        tl.store(result + place, values.to(result.dtype.element_ty), mask=there)
    tl.store(sums + tl.program_id(0).to(tl.int64) * (3 * heads * size) + target, total, mask=there)
    if NORM:
        own = norm_sums + tl.program_id(0) * (3 * size) + which * size + channel
        tl.store(own, tl.sum(by_norm, axis=0), mask=channel < size)


def _outputs(shape: tuple[int, ...], like: torch.Tensor, float8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An empty result and, for float8, the factors of its rows (rows, 1)."""
    if not float8:
        return like.new_empty(shape), None
    result = like.new_empty(shape, dtype=torch.float8_e4m3fn)
    return result, like.new_empty(result.numel() // shape[-1], 1, dtype=torch.float32)


def residual_norm(
    x: torch.Tensor,
    update: torch.Tensor | None,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x + gate · (update + bias), and its root-mean-square norm scaled by 1 + scale and shifted.

    Args:
        x: (B, N, D); `update` (B, N, D), `bias` (D,), `gate` (B, 1, D); None for these three: the sum is x.
        weight: (D,), of the norm; `shift`, `scale` (B, 1, D); None for these three: no norm.
        dtype: of the norm; in torch.float8_e4m3fn each row is divided by a factor of its own.
        inplace: write the sum to x.
    Returns: the sum, the norm (B, N, D), and the factors (B · N, 1) of float8 rows; None for what was not computed.
    """
    batch, length, width = x.shape
    total = x if update is None or inplace else torch.empty_like(x)
    result, factors, float8 = None, None, dtype == torch.float8_e4m3fn
    if weight is not None:
        result, factors = _outputs(x.shape, x.new_empty(0, dtype=x.dtype if float8 else dtype), float8)
    given = x, update, bias, gate, total, weight, shift, scale, result, factors
    _residual_norm[(batch * length,)](
        *(x if value is None else value for value in given),
        length, width, 0 if gate is None else gate.stride(0), 0 if shift is None else shift.stride(0), eps,
        UPDATE=update is not None, NORM=weight is not None, FLOAT8=float8,
        BLOCK=triton.next_power_of_2(width), num_warps=row_warps(width),
    )  # fmt: skip
    return total, result, factors


def residual_norm_backward(
    x: torch.Tensor,
    update: torch.Tensor | None,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    total_grad: torch.Tensor,
    result_grad: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Backward pass of `residual_norm`.

    Args: x: the sum that it returned; `total_grad`, `result_grad`: gradients (B, N, D) of the sum and of the norm.
    Returns: gradients of x and of update (or None), and sums over tokens (B, 4, D), float32, of: result_grad times the
        norm before its weight, result_grad, the gradient of x times (update + bias), and the gradient of x. They give
        the gradients of scale and weight, shift, gate, and bias. Sums of an absent norm or update are not set.
    """
    batch, length, width = x.shape
    warps = row_warps(width)
    parts = min(length, max(1, BACKWARD_WARPS // warps // batch))
    x_grad = total_grad if weight is None else torch.empty_like(x)
    update_grad = None if update is None else torch.empty_like(update)
    sums = torch.empty(batch * parts, 4, width, device=x.device)
    given = x, update, bias, gate, weight, scale, total_grad, result_grad, x_grad, update_grad, sums
    _residual_norm_backward[(batch * parts,)](
        *(x if value is None else value for value in given),
        length, width, parts, 0 if gate is None else gate.stride(0), 0 if scale is None else scale.stride(0), eps,
        UPDATE=update is not None, NORM=weight is not None, BLOCK=triton.next_power_of_2(width),
        STAGES=BACKWARD_STAGES, num_warps=warps,
    )  # fmt: skip
    return x_grad, update_grad, sums.unflatten(0, (batch, parts)).sum(1)


def swiglu(product: torch.Tensor, float8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """silu(gate) · value (B, N, I), where gate and value are the halves of product (B, N, 2 I); with `float8` also the
    factors of the rows (B · N, 1), else None."""
    width = product.shape[-1] // 2
    result, factors = _outputs((*product.shape[:-1], width), product, float8)
    _swiglu[(result.numel() // width,)](
        product, result, product if factors is None else factors, width,
        FLOAT8=float8, BLOCK=triton.next_power_of_2(width), num_warps=row_warps(width),
    )  # fmt: skip
    return result, factors


def to_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (..., D) in float8, each divided by a factor, and the factors (rows, 1), float32."""
    result, factors = _outputs(x.shape, x, float8=True)
    width = x.shape[-1]
    _to_float8[(len(factors),)](
        x, result, factors, width, BLOCK=triton.next_power_of_2(width), num_warps=row_warps(width)
    )
    return result, factors


def rotate_(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """Norm (if `norms` are given) and rotate the queries and keys of x (B, N, 3 · heads · d) in place.

    Args: `cos`, `sin`: tables (N, d) of `lightning_dit_rotary_tables`; `norms`: weights (d,) of queries and keys.
    """
    _launch_rotate(x, cos, sin, None if norms is None else torch.stack(norms), eps, x)


def norm_and_rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weights: torch.Tensor, eps: float
) -> torch.Tensor:
    """As `rotate_`, but return queries and keys (B, N, 2 · heads · d): the backward pass needs x unchanged.

    Args: `weights`: (2, d), of the norms of queries and keys.
    """
    result = x.new_empty(*x.shape[:2], x.shape[2] // 3 * 2)
    _launch_rotate(x, cos, sin, weights, eps, result)
    return result


def _launch_rotate(x, cos, sin, weights, eps, result):
    batch, length, step = x.shape
    size = cos.shape[1]
    heads = step // (3 * size)
    _rotate[(batch * length, 2)](
        x, cos, sin, cos if weights is None else weights, result, length, heads, step, result.shape[2], eps,
        size=size, NORM=weights is not None, HEADS=triton.next_power_of_2(heads),
        PAIRS=triton.next_power_of_2(size) // 2, num_warps=min(2, row_warps(heads * size)),
    )  # fmt: skip


def rotate_back(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward pass of `rotate_` without norms: gradients of queries, keys and values (B, N, heads, d) -> gradient of
    x (B, N, 3 · heads · d), and its sum over samples and tokens, float32."""
    return _launch_rotate_back(query, key, value, cos, sin, None, None, 0.0)[:2]


def norm_and_rotate_back(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward pass of `norm_and_rotate`: as `rotate_back`, and also the gradients (2, d) of the weights, float32."""
    grad, sums, norm_sums = _launch_rotate_back(query, key, value, cos, sin, x, weights, eps)
    return grad, sums, norm_sums.sum(0)[:2]


def _launch_rotate_back(query, key, value, cos, sin, x, weights, eps):
    batch, length, heads, size = query.shape
    if not query.stride() == key.stride() == value.stride() or query.stride(3) != 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    parts = min(length, max(1, TURN_PROGRAMS // (3 * batch)))
    result = query.new_empty(batch, length, 3 * heads * size)
    sums = torch.empty(batch * parts, 3 * heads * size, device=query.device)
    norm_sums = sums if weights is None else torch.empty(batch * parts, 3, size, device=query.device)
    norm = (result, cos) if weights is None else (x, weights)  # placeholders without weights, not read
    _rotate_back[(batch * parts, 3)](
        query, key, value, cos, sin, *norm, result, sums, norm_sums,
        length, heads, parts, query.stride(0), eps, size=size, row_step=query.stride(1), head_step=query.stride(2),
        NORM=weights is not None, HEADS=triton.next_power_of_2(heads), PAIRS=triton.next_power_of_2(size) // 2,
        STAGES=TURN_STAGES, num_warps=row_warps(heads * size),
    )  # fmt: skip
    return result, sums.sum(0), norm_sums
