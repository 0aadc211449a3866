"""The fused forward pass against the plain one, and its Triton kernels against the formulae."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import sampling_formulae
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vtp_diffusion import LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.generation.fast_sampling import FusedForward, prepare_sampling, slow_down, speed_up
from vtp_diffusion.generation.sampler_config import SamplerConfig

TINY = {"sample_size": 4, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12}


def network_and_inputs(**changes):
    torch.manual_seed(0)
    network = LightningDiTTransformer2DModel(**TINY | {"num_classes": 3} | changes).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.RMSNorm):
            torch.nn.init.normal_(module.weight)
    return network, (torch.randn(3, 4, 4, 4), torch.rand(3), torch.tensor([0, 3, 1]))


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"patch_size": 2}])
def test_the_fused_forward_is_the_network_s(changes):
    network, inputs = network_and_inputs(**changes)
    with torch.no_grad():
        expected = network(*inputs).sample
        found = FusedForward(network, sampling_formulae)(*inputs)
        network.fuse_qkv_projections()
        joined = FusedForward(network, sampling_formulae)(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joined, expected, rtol=1e-5, atol=1e-5)


PROGRAM = """
import torch
import sampling_formulae
from vtp_diffusion.models import sampling_kernels

torch.manual_seed(0)


def same(first, second, limit):
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
            error = ((a.float() - b.float()).norm() / b.float().norm()).item()
            assert error < limit, (error, limit)


FLOAT8 = 6e-2  # of three bits; Triton's interpreter cuts off what a GPU rounds
for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
    for float8 in (False, True):
        near = FLOAT8 if float8 else limit
        x, update = torch.randn(2, 2, 3, 40).to(dtype)
        modulation = torch.randn(2, 1, 6 * 40).to(dtype).chunk(6, dim=-1)
        for change in ((None, None), (update, modulation[2])):
            first, second = x.clone(), x.clone()
            rest = *change, torch.randn(40).to(dtype), *modulation[3:5], 1e-6, float8
            same(sampling_kernels.norm_modulate(first, *rest), sampling_formulae.norm_modulate(second, *rest), near)
            same([first], [second], limit)
            assert torch.equal(first, x) == (change[0] is None)
        product = torch.randn(2, 3, 80).to(dtype)
        same(sampling_kernels.swiglu(product, float8), sampling_formulae.swiglu(product, float8), near)
    same(sampling_kernels.to_float8(x), sampling_formulae.to_float8(x), FLOAT8)
    for heads, size in ((3, 12), (2, 16)):
        cos, sin = torch.randn(2, 3, size // 2).repeat_interleave(2, dim=-1)
        norms = torch.randn(2, size).to(dtype).unbind(0)
        for given in (None, norms):
            x = torch.randn(2, 3, 3 * heads * size).to(dtype)
            first, second = x.clone(), x.clone()
            sampling_kernels.rotate_(first, cos, sin, given, 1e-6)
            sampling_formulae.rotate_(second, cos, sin, given, 1e-6)
            same([first], [second], limit)
            assert not torch.equal(first, x)

print("all equal")
"""


def test_kernels_agree_with_their_formulae():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "all equal" in done.stdout, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("qk_norm", [False, True])
def test_on_a_gpu_the_fused_forward_is_no_further_from_float32_than_the_plain_one(qk_norm):
    network, inputs = network_and_inputs(num_attention_heads=4, attention_head_dim=72, qk_norm=qk_norm)
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
    with pytest.raises(ValueError, match="sped up: the pipeline is on cpu, not on a CUDA GPU"):
        speed_up(pipe)
    config = SamplerConfig(num_inference_steps=2)
    assert prepare_sampling(pipe, config) == "sampling on cpu: float32"
    assert "forward" not in vars(network)
    for asked in ({"fast": True}, {"fp8": True}):
        with pytest.raises(ValueError, match="the pipeline is on cpu"):
            prepare_sampling(pipe, replace(config, **asked))
    with pytest.raises(ValueError, match="fp8 is on and fast is off"):
        replace(config, fp8=True, fast=False)
