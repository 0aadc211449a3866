"""generation/cost.py: what sampling costs, against a count of what is executed."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vtp_diffusion import LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.generation.cost import evaluation_flops, sampling_cost


def transformer(**changes):
    sizes = {"sample_size": 4, "patch_size": 2, "in_channels": 3, "num_layers": 2, "num_attention_heads": 2}
    return LightningDiTTransformer2DModel(**(sizes | {"attention_head_dim": 12, "num_classes": 5} | changes)).eval()


def pipeline(scheduler=FlowMatchEulerDiscreteScheduler, guide=None, **changes):
    return LightningDiTPipeline(
        vae=None, transformer=transformer(**changes), scheduler=scheduler(shift=2.0), guidance_transformer=guide
    )


def counted(pipe, **settings):
    """Of two images, halved; torch does not count attention in its kernel for CPUs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        pipe([0, 1], output_type="latent", **settings)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, {}),
        ({"guidance_scale": 2.0}, {}),
        ({"guidance_scale": 2.0, "guidance_interval": (0.2, 0.7)}, {}),
        ({"guidance_scale": 2.0}, {"guide": {"num_layers": 1}}),
        ({"guidance_scale": 2.0, "guidance": "internal"}, {"base_head_layer": 1}),
        ({"guidance_scale": 2.0}, {"scheduler": FlowMatchHeunDiscreteScheduler}),
        ({"num_inference_steps": 2}, {"student": {"steps": [2], "shift": 2.0, "guidance": None}}),
    ],
)
def test_operations_are_those_that_torch_counts(settings, parts):
    if "guide" in parts:
        parts = {"guide": transformer(**parts["guide"])}
    pipe, settings = pipeline(**parts), {"num_inference_steps": 5} | settings
    pipe.set_progress_bar_config(disable=True)
    assert sampling_cost(pipe, **settings)["flops_per_image"] == counted(pipe, **settings)


def test_an_adaptive_solver_has_no_known_number():
    assert sampling_cost(pipeline(), 5, solver="dopri5")["flops_per_image"] is None


def test_xl_has_the_published_operations():
    with torch.device("meta"):
        published = transformer(
            sample_size=16, patch_size=1, in_channels=64, num_layers=28, num_attention_heads=16, attention_head_dim=72
        )
    flops = evaluation_flops(published)
    assert flops == pytest.approx(237e9, rel=0.01), "LightningDiT-XL/1 of 256 tokens"


def test_active_parameters_are_all_but_those_of_other_classes_and_an_unasked_head():
    pipe = pipeline(base_head_layer=1)
    width, dit = 24, pipe.transformer
    everything = sum(p.numel() for p in dit.parameters()) - 5 * width  # of the 5 classes and none, one row is read
    head = sum(p.numel() for name, p in dit.named_parameters() if name.startswith("base_"))
    assert sampling_cost(pipe, 5, guidance_scale=2.0, guidance="internal")["active_parameters"] == everything
    assert sampling_cost(pipe, 5)["active_parameters"] == everything - head
    assert head > 0 and torch.is_tensor(dit.class_embed.weight)
