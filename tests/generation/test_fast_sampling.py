"""Fast sampling: the fused forward pass against the plain one."""

from dataclasses import replace
from inspect import signature

import lightning_dit_formulae
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vtp_diffusion import LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.generation import fast_sampling
from vtp_diffusion.generation.fast_sampling import (
    FusedForward,
    GraphedForward,
    prepare_sampling,
    slow_down,
    speed_up,
    why_not,
)
from vtp_diffusion.generation.sampler_config import SamplerConfig
from vtp_diffusion.models import fused_lightning_dit

TINY = {"sample_size": 4, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12}


def network_and_inputs(**changes):
    torch.manual_seed(0)
    network = LightningDiTTransformer2DModel(**TINY | {"num_classes": 3} | changes).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.RMSNorm):
            torch.nn.init.normal_(module.weight)
    return network, (torch.randn(3, 4, 4, 4), torch.rand(3), torch.tensor([0, 3, 1]))


FILLED = {"num_attention_heads": 1, "attention_head_dim": 16}  # SwiGLU has 42 columns, filled up to 48


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"patch_size": 2}, {"base_head_layer": 1}, FILLED])
def test_the_fused_forward_is_the_network_s(changes):
    network, inputs = network_and_inputs(**changes, prediction="data" if "patch_size" in changes else "velocity")
    base = "base_head_layer" in changes
    with torch.no_grad():
        expected = network(*inputs, return_dict=False, return_base=base)
        found = FusedForward(network, lightning_dit_formulae)(*inputs, base)
        network.fuse_qkv_projections()
        joined = FusedForward(network, lightning_dit_formulae)(*inputs, base)
    assert len(found) == 1 + base
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joined, expected, rtol=1e-5, atol=1e-5)


def float8_product(x, weight, scale_a, scale_b, bias, out_dtype, use_fast_accum):
    """What `torch._scaled_mm` computes of rows scaled one by one."""
    assert x.dtype == weight.dtype == torch.float8_e4m3fn
    product = (x.float() * scale_a) @ (weight.float() * scale_b)
    return (product if bias is None else product + bias.float()).to(out_dtype)


def test_float8_products_of_a_padded_swiglu_are_those_of_its_own_columns(monkeypatch):
    network, inputs = network_and_inputs(**FILLED)
    with torch.no_grad():
        exact = network(*inputs).sample
    network.bfloat16()
    monkeypatch.setattr(torch, "_scaled_mm", float8_product)
    found = {}
    for columns in (16, 1):
        monkeypatch.setattr(fused_lightning_dit, "COLUMNS", columns)
        forward = FusedForward(network, lightning_dit_formulae, fp8=True)
        sizes = [size for product in forward.products[0].values() for size in product.weight.shape]
        assert any(size % 16 for size in sizes) == (columns == 1)
        with torch.no_grad():
            (found[columns],) = forward(inputs[0].bfloat16(), *inputs[1:])
    torch.testing.assert_close(found[16], found[1], rtol=0.01, atol=0.01)  # sums in another order
    assert ((found[16].float() - exact).norm() / exact.norm()).item() < 0.1


def test_float8_takes_any_swiglu_and_tokens_of_16_columns_each(monkeypatch):
    monkeypatch.setattr(fast_sampling, "why_not_fused", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    refusal = "its tokens have 24 channels, and float8 products take multiples of 16: leave fp8 off"
    for changes, reason in (({}, refusal), (FILLED, None)):
        network = network_and_inputs(**changes)[0].bfloat16()
        pipe = LightningDiTPipeline(vae=None, transformer=network, scheduler=FlowMatchEulerDiscreteScheduler())
        assert why_not(pipe, fp8=True) == reason


def test_a_network_sped_up_takes_its_arguments_in_the_same_order(monkeypatch):
    student = {"steps": [1], "shift": 1.0, "guidance": None}
    network, inputs = network_and_inputs(student=student, base_head_layer=1)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    graphed = GraphedForward(network, FusedForward(network, lightning_dit_formulae))
    names = [list(signature(forward).parameters) for forward in (network.forward, graphed.__call__)]
    assert names[0] == names[1]
    arguments = *inputs, False, True, torch.ones(3)
    expected, found = network(*arguments), graphed(*arguments)  # with gradients
    assert len(found) == 2 and all(map(torch.equal, found, expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("qk_norm", "size"), [(False, 72), (True, 72), (True, 64)])  # of 64: 682 columns of SwiGLU
def test_on_a_gpu_the_fused_forward_is_no_further_from_float32_than_the_plain_one(qk_norm, size):
    network, inputs = network_and_inputs(num_attention_heads=4, attention_head_dim=size, qk_norm=qk_norm)
    network, inputs = network.cuda(), [value.cuda() for value in inputs]
    pipe = LightningDiTPipeline(vae=None, transformer=network, scheduler=FlowMatchEulerDiscreteScheduler())
    with torch.no_grad():
        exact = network(*inputs).sample
        network.bfloat16()
        inputs[0] = inputs[0].bfloat16()
        errors = {"plain": network(*inputs).sample}
        for name, fp8 in (("fused", False), ("float8", True)):
            speed_up(pipe, fp8)
            errors[name] = network(*inputs).sample
            assert torch.equal(network(*inputs).sample, errors[name])  # replayed
            slow_down(pipe)
        assert torch.equal(network(*inputs).sample, errors["plain"])
    errors = {name: ((value.float() - exact).norm() / exact.norm()).item() for name, value in errors.items()}
    assert 0 < errors["fused"] < 1.2 * errors["plain"] and errors["fused"] < errors["float8"] < 0.1, errors


def test_what_cannot_be_sped_up_says_why():
    network, _ = network_and_inputs()
    pipe = LightningDiTPipeline(vae=None, transformer=network, scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="sped up: the device is cpu, not a CUDA GPU"):
        speed_up(pipe)
    config = SamplerConfig(num_inference_steps=2)
    assert prepare_sampling(pipe, config) == "sampling on cpu: float32"
    assert "forward" not in vars(network)
    for asked in ({"fast": True}, {"fp8": True}):
        with pytest.raises(ValueError, match="the device is cpu"):
            prepare_sampling(pipe, replace(config, **asked))
    with pytest.raises(ValueError, match="fp8 is on and fast is off"):
        replace(config, fp8=True, fast=False)
