"""Fused blocks of LightningDiT against the plain ones, and the Triton kernels against the formulae."""

import math
from types import SimpleNamespace

import fused_formulae
import lightning_dit_formulae
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from triton_interpreter import run_interpreted

from vtp_diffusion import LightningDiTTransformer2DModel
from vtp_diffusion.models.fused_lightning_dit import FusedBlock, fuse_training
from vtp_diffusion.models.rotary_lightning_dit import rotate_interleaved

FILLED = {"num_attention_heads": 1, "attention_head_dim": 16}  # SwiGLU has 42 columns, filled up to 48


def network_and_inputs(heads=2, size=12, **changes):
    torch.manual_seed(0)
    architecture = {"sample_size": 4, "in_channels": 4, "num_layers": 2, "num_classes": 3}
    network = LightningDiTTransformer2DModel(
        **architecture | {"num_attention_heads": heads, "attention_head_dim": size} | changes
    ).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network, (torch.randn(3, 4, 4, 4), torch.rand(3), torch.tensor([0, 3, 1]))


def result_and_gradients(network, inputs, autocast=False):
    network.zero_grad()
    latents = inputs[0].detach().clone().requires_grad_()
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=autocast):
        results = network(latents, *inputs[1:], return_dict=False)
    result = torch.cat([part.flatten(1) for part in results], dim=1)
    weights = torch.linspace(-1, 1, result.numel(), device=result.device).view_as(result)
    (result.float() * weights).sum().backward()
    return [result.detach(), latents.grad, *(parameter.grad.clone() for parameter in network.parameters())]


@pytest.mark.parametrize(
    ("changes", "norm"), [({}, None), ({"qk_norm": True}, None), ({"qk_norm": True}, nn.LayerNorm), (FILLED, None)]
)
def test_fused_blocks_have_the_results_and_gradients_of_plain_ones(changes, norm):
    network, inputs = network_and_inputs(**changes)
    if norm is not None:  # that kernels do not know
        network.blocks[0].attn.norm_q = norm(12)
    plain = result_and_gradients(network, inputs)
    for block in network.blocks:
        block.fused = FusedBlock(lightning_dit_formulae, fused_formulae)
    for first, second in zip(plain, result_and_gradients(network, inputs), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5 * first.abs().max().item())


def test_backward_pass_of_norm_and_rotation_is_that_of_autograd_in_float64():
    torch.manual_seed(0)
    x, weights, angles = torch.randn(2, 5, 3 * 2 * 12), torch.randn(2, 12), torch.randn(5, 6).repeat_interleave(2, -1)
    weights[0, 3] = 0  # the norm cannot be undone here
    cos, sin, eps = angles.cos(), angles.sin(), 1e-6
    grads = torch.randn(3, 2, 5, 2, 12)
    exact = [value.double().requires_grad_() for value in (x, weights)]
    query, key, value = exact[0].unflatten(-1, (3, 2, 12)).unbind(2)
    query, key = (
        rotate_interleaved(nn.functional.rms_norm(part, (12,), weight, eps), cos.double(), sin.double())
        for part, weight in zip((query, key), exact[1], strict=True)
    )
    for found, part in zip(
        lightning_dit_formulae.norm_and_rotate(x, cos, sin, weights, eps).chunk(2, -1), (query, key), strict=True
    ):
        torch.testing.assert_close(found, part.flatten(2).float(), rtol=1e-5, atol=1e-5)
    torch.autograd.backward((query, key, value), list(grads.double()))
    found = lightning_dit_formulae.norm_and_rotate_back(*grads, cos, sin, x, weights, eps)
    for value, expected in zip(found, (exact[0].grad, exact[0].grad.sum((0, 1)), exact[1].grad), strict=True):
        torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("autocast", "changes"), [(False, {}), (True, {}), (True, {"qk_norm": True}), (True, FILLED)])
def test_what_is_recomputed_is_not_kept_and_changes_no_bit(autocast, changes):
    network, inputs = network_and_inputs(**changes)
    norms, found = [], []

    def residual_norm(*arguments):
        results = lightning_dit_formulae.residual_norm(*arguments)
        if results[1] is not None:
            norms.append(StorageWeakRef(results[1].untyped_storage()))
        return results

    kernels = SimpleNamespace(**vars(lightning_dit_formulae) | {"residual_norm": residual_norm})
    for recompute in (False, True):
        for block in network.blocks:
            block.fused = FusedBlock(kernels, fused_formulae, recompute)
        norms.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = network(*inputs, return_dict=False)[0].sum()
        assert len(norms) == 4 and all(norm.expired() == recompute for norm in norms)
        loss.backward()
        assert len(norms) == (8 if recompute else 4)
        found.append(result_and_gradients(network, inputs, autocast))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}])
def test_under_autocast_fused_blocks_are_no_further_from_float32_than_plain_ones(changes):
    network, _ = network_and_inputs(**changes)
    # of several: gradients of keys' biases nearly cancel, and what is left of one is mostly rounding
    draws = [(torch.randn(3, 4, 4, 4), torch.rand(3), torch.tensor([0, 3, 1])) for _ in range(4)]

    def all_results(**options):
        every = [result_and_gradients(network, inputs, **options) for inputs in draws]
        return [torch.stack(values) for values in zip(*every, strict=True)]

    exact, plain = all_results(), all_results(autocast=True)
    for block in network.blocks:
        block.fused = FusedBlock(lightning_dit_formulae, fused_formulae)
    check_errors(exact, plain, all_results(autocast=True))


def check_errors(exact, plain, fused):
    """No further from `exact` altogether, and about so in each tensor: small ones are mostly rounding."""
    squares = []
    for reference, *both in zip(exact, plain, fused, strict=True):
        assert both[1].dtype == both[0].dtype
        errors = [(value.float() - reference).square().sum().item() for value in both]
        squares.append([*errors, reference.square().sum().item()])
        assert errors[1] < 9 * errors[0] + 1e-9 * squares[-1][2]
    first, second, size = (math.sqrt(sum(column)) for column in zip(*squares, strict=True))
    assert 0 < second < 1.2 * first < 0.1 * size, (first, second, size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"num_attention_heads": 4, "attention_head_dim": 64}])
def test_on_a_gpu_kernels_are_no_further_from_float32_than_plain_blocks(changes):
    network, inputs = network_and_inputs(heads=16, size=72, **changes)
    network, inputs = network.cuda(), [value.cuda() for value in inputs]
    for parameter in network.parameters():
        parameter.data.mul_(0.1)  # std 0.02
    exact, plain = result_and_gradients(network, inputs), result_and_gradients(network, inputs, autocast=True)
    fuse_training(network)
    fused = result_and_gradients(network, inputs, autocast=True)
    check_errors(exact, plain, fused)
    fuse_training(network, recompute=True)
    assert all(map(torch.equal, fused, result_and_gradients(network, inputs, autocast=True)))


def test_kernels_that_do_not_run_are_a_reason(monkeypatch):
    pytest.importorskip("triton")
    from vtp_diffusion.models import fused_lightning_dit, lightning_dit_kernels

    network, _ = network_and_inputs()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert fused_lightning_dit.why_not_fused(network, cpu) == "the device is cpu, not a CUDA GPU"
    assert "is a Linear, not a LightningDiT" in fused_lightning_dit.why_not_fused(nn.Linear(1, 1), gpu)

    def fails(*arguments, **options):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(lightning_dit_kernels, "swiglu", fails)
    found = fused_lightning_dit._why_kernels_fail(cpu)
    assert found == "Triton's kernels do not run here (Failed to find C compiler.)"


PROGRAM = """
import torch
import lightning_dit_formulae
from vtp_diffusion.models import lightning_dit_kernels

torch.manual_seed(0)
# so that a program has several rounds of its loop
lightning_dit_kernels.BACKWARD_WARPS, lightning_dit_kernels.TURN_PROGRAMS = 4, 12


def same(first, second, limit):
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
            error = ((a.float() - b.float()).norm() / b.float().norm()).item()
            assert error < limit, (error, limit)


FLOAT8 = 0.1  # three bits, which Triton's interpreter cuts off where a GPU rounds
for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
    for float8 in (False, True):
        near = FLOAT8 if float8 else limit
        target = torch.float8_e4m3fn if float8 else dtype
        x, update, total_grad, result_grad = torch.randn(4, 2, 3, 40).to(dtype)
        modulation = torch.randn(2, 1, 6 * 40).to(dtype).chunk(6, dim=-1)
        norm = torch.randn(40).to(dtype), *modulation[3:5]
        gated = update, torch.randn(40).to(dtype), modulation[2]
        for change, normed in (([None] * 3, norm), (gated, norm), (gated, [None] * 3)):
            rest = *change, *normed, 1e-6, target
            for inplace in (False, True):
                first, second = x.clone(), x.clone()
                found = lightning_dit_kernels.residual_norm(first, *rest, inplace)
                same(found, lightning_dit_formulae.residual_norm(second, *rest, inplace), near)
                same([first], [second], limit)
                assert torch.equal(first, x) == (change[0] is None or not inplace)
            grads = total_grad, None if normed[0] is None else result_grad
            values = x, *change, normed[0], normed[2], 1e-6, *grads
            found = lightning_dit_kernels.residual_norm_backward(*values)
            expected = lightning_dit_formulae.residual_norm_backward(*values)
            same(found[:2], expected[:2], limit)
            kept = [k for k in range(4) if expected[2][:, k].any()]
            same([found[2][:, kept]], [expected[2][:, kept]], limit)
            assert len(kept) == 2 * (normed[0] is not None) + 2 * (change[0] is not None)
        product = torch.randn(2, 3, 80).to(dtype)
        found = lightning_dit_kernels.swiglu(product, float8)
        same(found, lightning_dit_formulae.swiglu(product, float8), near)
        wide = torch.nn.functional.pad(product.unflatten(-1, (2, 40)), (0, 8)).flatten(-2)
        filled = lightning_dit_kernels.swiglu(wide, float8)
        same([filled[0][..., :40], filled[1]], found, 1e-9)
        assert not filled[0][..., 40:].float().any()
    same(lightning_dit_kernels.to_float8(x), lightning_dit_formulae.to_float8(x), FLOAT8)
    for heads, size in ((3, 12), (2, 16)):
        cos, sin = torch.randn(2, 3, size // 2).repeat_interleave(2, dim=-1)
        norms = torch.randn(2, size).to(dtype).unbind(0)
        for given in (None, norms):
            x = torch.randn(2, 3, 3 * heads * size).to(dtype)
            first, second = x.clone(), x.clone()
            lightning_dit_kernels.rotate_(first, cos, sin, given, 1e-6)
            lightning_dit_formulae.rotate_(second, cos, sin, given, 1e-6)
            same([first], [second], limit)
            assert not torch.equal(first, x)
        normed = torch.stack(norms), 1e-6
        values = torch.randn(2, 3, 3 * heads * size).to(dtype), cos, sin, *normed
        found = lightning_dit_kernels.norm_and_rotate(*values)
        same([found], [lightning_dit_formulae.norm_and_rotate(*values)], limit)
        # apart as they come from attention, in either order of tokens and heads in memory
        alike = [torch.randn(2, heads, 3, size).to(dtype).transpose(1, 2) for _ in range(3)]
        for parts in (alike, [alike[0].contiguous(), *alike[1:]]):
            values = *parts, cos, sin
            same(lightning_dit_kernels.rotate_back(*values), lightning_dit_formulae.rotate_back(*values), limit)
            values = *values, torch.randn(2, 3, 3 * heads * size).to(dtype), *normed
            found = lightning_dit_kernels.norm_and_rotate_back(*values)
            same(found, lightning_dit_formulae.norm_and_rotate_back(*values), limit)

print("all equal")
"""


def test_kernels_agree_with_their_formulae():
    why = "this version of Triton's interpreter cannot count with new NumPy's numbers"  # 3.6 with 2.5
    run_interpreted(PROGRAM, "only 0-dimensional arrays can be converted", why)
