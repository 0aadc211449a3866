"""Blocks whose backward passes are written out against the ones autograd makes, and the Triton programs against the
formulae."""

import fused_formulae
import pytest
import torch
from torch import nn
from triton_interpreter import run_interpreted

from vtp_diffusion.models.fused_vtp import cuda_kernels, use_large_products
from vtp_diffusion.models.vtp_blocks import VTPBlock, VTPDecoderBlock, VTPRMSNorm, rotary_tables

BATCH, LENGTH, WIDTH, HEADS = 6, 9, 64, 2


def block_and_inputs(kind=VTPBlock, norm=VTPRMSNorm, kept=False):
    torch.manual_seed(0)
    block = kind(WIDTH, HEADS, False, norm(WIDTH), norm(WIDTH))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    cos, sin = rotary_tables(3, 3, WIDTH // HEADS, torch.float32)
    subsets = (torch.tensor([4, 0, 5]), torch.tensor([1, 3, 2])) if kept else (None, None)
    return block, torch.randn(BATCH, LENGTH, WIDTH), (cos, sin, *subsets)


def result_and_gradients(call, block, x, rest, dtype=torch.float32, stream=None):
    torch.manual_seed(1)
    x = x.detach().clone().to(stream or dtype).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = call(x, *rest)
    block.zero_grad()
    (result.float() * torch.randn(result.shape).to(x.device)).sum().backward()
    return [result.detach(), x.grad, *(parameter.grad.clone() for parameter in block.parameters())]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind, norm", [(VTPBlock, VTPRMSNorm), (VTPDecoderBlock, nn.LayerNorm)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_fused_block_has_the_results_and_gradients_of_a_plain_one(monkeypatch, compiled, kind, norm, kept):
    torch.compiler.reset()  # other tests' programs of these blocks count towards a limit
    block, x, rest = block_and_inputs(kind, norm, kept)
    plain = result_and_gradients(block, block, x, rest)
    use_large_products(block, fused_formulae)  # which are for any device
    fused, called = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block, []
    for name in () if compiled else ("norm_backward", "swiglu_backward", "rotate_back"):
        formula = getattr(fused_formulae, name)
        monkeypatch.setattr(fused_formulae, name, lambda *a, n=name, f=formula: called.append(n) or f(*a))
    for first, second in zip(plain, result_and_gradients(fused, block, x, rest), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5 * first.abs().max().item())
    norms = ["norm_backward"] * 2 if norm is VTPRMSNorm else []
    assert compiled or sorted(called) == [*norms, "rotate_back", "swiglu_backward"]


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])  # decoder and encoder
def test_in_bfloat16_a_fused_block_is_no_further_from_float32_than_a_plain_one(stream):
    block, x, rest = block_and_inputs(kept=True)
    exact = result_and_gradients(block, block, x, rest)
    plain = result_and_gradients(block, block, x, rest, torch.bfloat16, stream)
    use_large_products(block, fused_formulae)  # which are for any device
    fused = result_and_gradients(block, block, x, rest, torch.bfloat16, stream)
    for reference, first, second in zip(exact, plain, fused, strict=True):
        assert second.dtype == first.dtype and plain[0].dtype == stream
        errors = [((value.float() - reference).norm() / reference.norm()).item() for value in (first, second)]
        assert errors[1] < 1.5 * errors[0] + 1e-6 and 0 < errors[1] < 0.05


def test_large_products_keep_no_more_for_the_backward_pass():
    """A part of a product keeps all of it in memory: 6 GiB of VTP Large, if values came with queries."""
    kept = []
    for large, programs in ((False, None), (True, None), (True, fused_formulae)):
        torch.manual_seed(0)
        block, x = VTPBlock(64, 2, False, VTPRMSNorm(64), VTPRMSNorm(64)), torch.randn(8, 64, 64).bfloat16()
        if large:
            use_large_products(block, programs)
        step = torch.compile(block.forward, backend="aot_eager_decomp_partition", fullgraph=True)
        weights, sizes = {p.untyped_storage().data_ptr() for p in block.parameters()}, {}

        def keep(tensor, weights=weights, sizes=sizes):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), hooks:
            step(x.requires_grad_(), torch.ones(64, 32), torch.zeros(64, 32))
        kept.append(sum(sizes.values()))
    assert max(kept[1:]) <= kept[0] * 1.01


def test_what_the_functions_do_not_know_is_computed_as_before():
    block, x, rest = block_and_inputs()
    use_large_products(block, fused_formulae)  # which are for any device
    called = []
    block.attn.to_v.register_forward_hook(lambda *_: called.append(True))
    rounded = rotary_tables(3, 3, WIDTH // HEADS, torch.bfloat16)
    block(x, *rounded)  # bfloat16 arithmetic of the released weights
    assert called == [True]
    with torch.no_grad():
        block(x, *rest)
    assert called == [True, True]
    block(x, *rest)
    assert called == [True, True]


PROGRAM = """
import torch
import fused_formulae
from vtp_diffusion.models import vtp_kernels

torch.manual_seed(0)
vtp_kernels.PROGRAMS = 4  # so that a program has several rounds of its loop


def same(first, second, limit=1e-5):
    for a, b in zip(first, second, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        error = ((a.float() - b.float()).norm() / b.float().norm()).item()
        assert error < limit, error


for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):  # Triton's interpreter cuts bits off
    # 350 rows are no multiple of the rows of a part, 300 columns no multiple of those of a program
    values = torch.randn(70, 5, 600).to(dtype), torch.randn(600), torch.randn(70, 5, 300).to(dtype)
    same([vtp_kernels.swiglu(*values[:2])], [fused_formulae.swiglu(*values[:2])], limit)
    same(vtp_kernels.swiglu_backward(*values), fused_formulae.swiglu_backward(*values), limit)
    x, weight = torch.randn(5, 3, 48).to(dtype), torch.randn(48)
    residual = torch.randn(5, 3, 48).to(dtype)
    for kept, place in ((5, None), (2, torch.tensor([2, 0, 2, 1, 2]))):
        for inside in {dtype, torch.bfloat16}:  # the gradient of a branch under autocast, beside a float32 stream
            values = x, weight, 1e-5, torch.randn(kept, 3, 48).to(inside), residual, place
            same(vtp_kernels.norm_backward(*values), fused_formulae.norm_backward(*values), limit)
    for heads in (2, 20):  # fewer and more than a program's
        cos, sin = torch.randn(2, 3, 32)
        x = torch.randn(5, 3, 3 * heads * 32).to(dtype)
        first, second = x.clone(), x.clone()
        vtp_kernels.rotate_(first, cos, sin)
        fused_formulae.rotate_(second, cos, sin)
        assert not torch.equal(first, x)
        same([first], [second], limit)
        # apart as they come from attention, in either order of tokens and heads in memory
        alike = [torch.randn(5, heads, 3, 32).to(dtype).transpose(1, 2) for _ in range(3)]
        mixed = [alike[0].contiguous(), alike[1], alike[2]]
        for parts in (alike, mixed):
            values = *parts, cos, sin
            same(vtp_kernels.rotate_back(*values), fused_formulae.rotate_back(*values), limit)

print("all equal")
"""


def test_kernels_agree_with_their_formulae():
    why = "this version of torch has no way to Triton's interpreter"  # 2.11 has none, 2.14 has
    run_interpreted(PROGRAM, "wrap_triton only works on functions annotated", why)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kept", [False, True])
def test_compiled_kernels_are_no_further_from_float32_than_the_compiler_s(kept):
    block, x, rest = block_and_inputs(kept=kept)
    block, x, rest = block.cuda(), x.cuda(), [None if value is None else value.cuda() for value in rest]
    results = [result_and_gradients(block, block, x, rest)]
    for programs in (None, cuda_kernels()):
        use_large_products(block, programs)
        torch.compiler.reset()
        call = torch.compile(block.forward, dynamic=False)
        results.append(result_and_gradients(call, block, x, rest, torch.bfloat16, torch.float32))
    for reference, plain, fused in zip(*results, strict=True):
        errors = [((value.float() - reference).norm() / reference.norm()).item() for value in (plain, fused)]
        assert errors[1] < 1.5 * errors[0] + 1e-6 and 0 < errors[1] < 0.05
