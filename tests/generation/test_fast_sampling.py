"""Fast sampling: the fused forward pass against the plain one."""

from dataclasses import replace

import lightning_dit_formulae
import pytest
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


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"patch_size": 2}, {"base_head_layer": 1}])
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
