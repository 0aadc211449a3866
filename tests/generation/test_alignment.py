"""Alignment of a generator's tokens with its tokenizer's features: the loss, its gradients, where it ends."""

import pytest
import torch
from test_internal_guidance import inputs, tiny
from test_latent_inputs import CPU, images  # noqa: F401
from test_latent_shards import kl, pictures, vtp

from vtp_diffusion.data.image_datasets import open_dataset
from vtp_diffusion.generation.alignment import Alignment, AlignmentConfig
from vtp_diffusion.generation.flow_matching import interpolate
from vtp_diffusion.generation.latent_inputs import AugmentationConfig, OnlineLatents, StepBatchSampler
from vtp_diffusion.generation.objective import FlowMatchingObjective
from vtp_diffusion.models.latent_space import encode_raw, encode_with_features


def aligned(transformer, **settings):
    torch.manual_seed(2)
    config = AlignmentConfig(**{"weight": 0.5, "projector_width": 8} | settings)
    return FlowMatchingObjective(transformer, True, Alignment(config, transformer, vtp()))


def test_features_and_latents_come_from_one_pass_of_the_encoder():
    vae, passes = vtp(), []
    with torch.no_grad():
        expected = encode_raw(vae, pictures()), vae.encode_features(pictures()).patch_tokens
        vae.encoder.register_forward_hook(lambda *_: passes.append(1))
        latents, features = encode_with_features(vae, pictures())
    assert len(passes) == 1 and torch.equal(latents, expected[0]) and torch.equal(features, expected[1])


@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_loss_is_that_of_its_formula(patch_size):
    network, (data, noise, t, labels) = tiny(patch_size=patch_size, base_head_layer=1), inputs()
    objective, features = aligned(network, layer=2), torch.randn(5, 16, 16)
    losses = objective(data, noise, t, labels, features)
    seen = []
    network.blocks[1].register_forward_hook(lambda module, given, output: seen.append(output))
    plain = objective(data, noise, t, labels)
    first, _, second, _, third = objective.alignment.projector
    projected = third(torch.nn.functional.silu(second(torch.nn.functional.silu(first(seen[0])))))
    grid = features.view(5, 4, 4, 16)
    if patch_size == 2:
        grid = sum(grid[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    wanted = grid.reshape(projected.shape)
    cosines = (projected * wanted).sum(2) / (projected.norm(dim=2) * wanted.norm(dim=2))
    torch.testing.assert_close(losses["alignment"], 1 - cosines.mean())
    torch.testing.assert_close(losses["loss"], plain["loss"] + 0.5 * losses["alignment"])
    assert "alignment" not in plain and losses["base_cosine"] == plain["base_cosine"]


def test_tokens_of_a_block_are_given_beside_the_prediction():
    network, (data, noise, t, labels) = tiny(base_head_layer=1), inputs()
    arguments = interpolate(data, noise, t), t, labels
    sample, tokens = network(*arguments, return_tokens=3)
    assert tokens.shape == (5, 16, 16) and torch.equal(sample, network(*arguments).sample)
    both = network(*arguments, return_base=True, return_tokens=3)
    assert torch.equal(both[1], network(*arguments, return_base=True)[1]) and torch.equal(both[2], tokens)
    with pytest.raises(ValueError, match="return_tokens is 4, expected a block from 1 to the last, 3"):
        network(*arguments, return_tokens=4)


def test_its_gradient_reaches_the_blocks_up_to_the_layer_and_not_the_encoder():
    network, vae, (data, noise, t, labels) = tiny(), vtp(sample_size=32), inputs()
    objective = aligned(network, layer=2)
    features = encode_with_features(vae, torch.randn(5, 3, 32, 32))[1].detach()
    objective(data, noise, t, labels, features)["alignment"].backward()
    reached = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    assert {name.rpartition("blocks.")[2][0] for name in reached if "blocks." in name} == {"0", "1"}
    assert len([name for name in reached if name.startswith("alignment.projector")]) == 6
    assert not any("_out." in name for name in reached if name.startswith("transformer.") and "blocks" not in name)
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert not any(name.startswith("alignment.vae") for name in objective.state_dict())


def test_features_are_computed_for_the_steps_that_need_them(images):  # noqa: F811
    config = AlignmentConfig(weight=1.0, until_step=2)
    online = OnlineLatents(open_dataset(images), vtp(), images, AugmentationConfig())
    batches = list(online.batches(StepBatchSampler(7, 2, 0, 1, 3), True, CPU, features=config.active))
    assert ["features" in batch for batch in batches] == [True, False, False]
    assert batches[0]["features"].shape == (2, 4, 16) and not batches[0]["features"].requires_grad
    assert AlignmentConfig(weight=1.0).active(10**6) and not AlignmentConfig().active(0)


def test_the_layer_is_one_of_the_blocks():
    assert [AlignmentConfig().block(depth) for depth in (1, 8, 12, 24)] == [1, 2, 4, 8]
    assert AlignmentConfig(layer=3).block(3) == 3
    with pytest.raises(ValueError, match="alignment.layer is 4, expected a block from 1 to the last, 3"):
        aligned(tiny(), layer=4)
    with pytest.raises(ValueError, match="AutoencoderKL has no features to align with: expected an AutoencoderVTP"):
        Alignment(AlignmentConfig(weight=0.5), tiny(), kl())
