"""Prediction of the data, and guidance from a head inside the network."""

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from vtp_diffusion import LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.generation.flow_matching import flow_matching_loss, interpolate
from vtp_diffusion.generation.objective import FlowMatchingObjective

TINY = {"sample_size": 4, "in_channels": 4, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}


def tiny(**changes):
    torch.manual_seed(0)
    return LightningDiTTransformer2DModel(**TINY | {"num_classes": 3} | changes).eval()


def pipeline(transformer):
    pipe = LightningDiTPipeline(None, transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(count=5):
    torch.manual_seed(1)
    data, noise = torch.randn(2, count, 4, 4, 4)
    return data, noise, torch.tensor([0.0, 0.3, 0.9, 0.98, 1.0]), torch.tensor([0, 1, 2, 3, 0])


@torch.no_grad()
def test_a_prediction_of_the_data_is_given_as_a_velocity():
    data, noise, t, labels = inputs()
    network = tiny(prediction="data")
    x_t, seen = interpolate(data, noise, t), []
    network.proj_out.register_forward_hook(lambda module, given, output: seen.append(output))
    velocity = network(x_t, t, labels).sample
    predicted = network.unpatchify(seen[0])
    left = (1 - t).clamp(min=0.05)[:, None, None, None]
    torch.testing.assert_close(x_t + left * velocity, predicted)
    # the right answer costs nothing at any time, the clamped ones among them
    target = (data - x_t) / left
    errors, cosines = flow_matching_loss(target, data, noise, network.target_scale(t))
    assert errors.max() < 1e-10 and cosines[:4].abs().max() < 1e-5


def test_what_is_predicted_decides_nothing_of_the_weights():
    assert tiny(prediction="data").state_dict().keys() == tiny().state_dict().keys()
    for value in ("noise", None):
        with pytest.raises(ValueError, match="prediction is .*, expected velocity or data"):
            tiny(prediction=value)


@torch.no_grad()
def test_the_base_head_is_a_network_that_ends_there():
    data, _, t, labels = inputs()
    network = tiny(base_head_layer=2)
    sample, base = network(data, t, labels, return_base=True)
    assert torch.equal(sample, network(data, t, labels).sample)
    short = tiny(num_layers=2)
    state = {key: value for key, value in network.state_dict().items() if not key.startswith(("base_", "blocks.2."))}
    heads = {key.removeprefix("base_"): value for key, value in network.state_dict().items() if "base_" in key}
    short.load_state_dict(state | heads)
    assert torch.equal(base, short(data, t, labels).sample)
    for layer in (0, 3, 4):
        with pytest.raises(ValueError, match=f"base_head_layer is {layer}, expected a block before the last, 3"):
            tiny(base_head_layer=layer)


def test_both_heads_learn():
    network, (data, noise, t, labels) = tiny(base_head_layer=1), inputs()
    losses = FlowMatchingObjective(network, cosine_loss=True)(data, noise, t, labels)
    parts = ("squared_error", "cosine", "base_squared_error", "base_cosine")
    torch.testing.assert_close(losses["loss"], sum(losses[name] for name in parts))
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    sample, base = network(interpolate(data, noise, t), t, labels, return_base=True)
    for name, prediction in (("", sample), ("base_", base)):
        assert losses[f"{name}squared_error"] == flow_matching_loss(prediction, data, noise)[0].mean()


@torch.no_grad()
def test_internal_guidance_takes_one_pass_a_step(tmp_path):
    network, calls = tiny(base_head_layer=1), []
    pipe, noise = pipeline(network), torch.randn(2, 4, 4, 4)
    network.register_forward_hook(lambda module, given, output: calls.append(len(given[0])))
    options = {"latents": noise, "output_type": "latent", "num_inference_steps": 1}
    guided = pipe([0, 1], guidance="internal", guidance_scale=1.78, guidance_interval=(0.0, 0.9), **options).images
    assert calls == [2]
    full, base = network(noise, torch.zeros(2), torch.tensor([0, 1]), return_base=True)
    torch.testing.assert_close(guided, noise + base + 1.78 * (full - base))
    unguided = pipe([0, 1], guidance="internal", guidance_scale=1.78, guidance_interval=(0.5, 0.9), **options).images
    assert torch.equal(unguided, pipe([0, 1], **options).images)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded([0, 1], guidance="internal", guidance_scale=1.78, **options).images, guided)


@pytest.mark.parametrize(
    ("base", "given", "message"),
    [
        (None, {"guidance": "internal"}, "guidance is 'internal', expected auto, classifier_free: .* base_head_layer"),
        (1, {"guidance": "autoguidance"}, "guidance is 'autoguidance', expected auto, classifier_free, internal"),
        (1, {"guidance": 3}, "guidance is 3, expected auto"),
        (None, {"guidance": "internal", "guidance_scale": 0.5}, "guidance is 'internal', expected auto"),
        (1, {"guidance": "internal", "guidance_scale": 0.5}, "guidance_scale is 0.5, expected 1 or more"),
    ],
)
def test_guidance_that_cannot_be_had_is_refused(base, given, message):
    with pytest.raises(ValueError, match=message):
        pipeline(tiny(base_head_layer=base))([0], 2, output_type="latent", **given)
