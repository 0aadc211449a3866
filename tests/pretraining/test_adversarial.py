"""The decoder's stage: closed forms of its losses, two networks in one step."""

import pytest
import torch
from torch import nn

from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.pretraining.adversarial import (
    AdversarialConfig,
    AdversarialDecoding,
    adaptive_weight,
    hinge_loss,
    lecam_penalty,
    r1_penalty,
)
from vtp_diffusion.pretraining.discriminators import FeatureDiscriminator, PatchDiscriminator, smallest_image
from vtp_diffusion.pretraining.reconstruction import ReconstructionConfig, ReconstructionObjective
from vtp_diffusion.training.config import TrainingConfig


def tiny_autoencoder(**changes):
    torch.manual_seed(0)
    sides = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in
             (("hidden_size", 16), ("num_layers", 2), ("num_attention_heads", 2))}  # fmt: skip
    statistics = {"latents_mean": [0.1, 0.0, -0.1], "latents_std": [0.5, 1.0, 2.0]}
    settings = {"sample_size": 16, "patch_size": 4, "latent_channels": 3, "rope_dtype": "float32"}
    return AutoencoderVTP(**(settings | sides | statistics | changes)).eval()


def tiny_objective(**changes):
    settings = {"patch_channels": 8, "patch_layers": 2} | changes
    autoencoder = tiny_autoencoder()
    reconstruction = ReconstructionObjective(ReconstructionConfig(lpips=0, l2=0.5), None)
    torch.manual_seed(1)
    return AdversarialDecoding(autoencoder, reconstruction, AdversarialConfig(**settings))


def some_images(count=3):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


# --- closed forms ---


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_smallest_image_of_a_patch_discriminator_has_one_logit(layers):
    discriminator, side = PatchDiscriminator(2, layers), smallest_image(layers)
    assert discriminator(torch.zeros(2, 3, side, side)).shape == (2, 1)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        discriminator(torch.zeros(2, 3, side - 1, side - 1))


def test_hinge():
    real, fake = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([[-2.0, 0.0, 3.0]])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3))


def test_lecam():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])
    expected = ((1 + 2) ** 2 + (3 + 2) ** 2) / 2 + ((-1 - 4) ** 2 + (0 - 4) ** 2) / 2
    assert lecam_penalty(real, fake, mean_real=4.0, mean_fake=-2.0).item() == pytest.approx(expected)


def test_r1_of_a_linear_and_of_a_quadratic_discriminator():
    images, weights = some_images().requires_grad_(), torch.randn(2, 3, 16, 16)
    linear = torch.einsum("bchw,mchw->bm", images, weights)  # gradient of the mean logit: the mean of the weights
    assert r1_penalty(linear, images).item() == pytest.approx(0.5 * weights.mean(0).square().sum().item(), rel=1e-5)
    scale = torch.tensor(3.0, requires_grad=True)
    penalty = r1_penalty(scale * images.square().sum((1, 2, 3))[:, None], images)  # gradient 2 · scale · x
    norm = images.detach().square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(penalty.detach(), 0.5 * 4 * 9 * norm)
    penalty.backward()  # it is differentiated again: d/ds of 2 s² |x|² is 4 s |x|²
    torch.testing.assert_close(scale.grad, 4 * 3 * norm)


def test_adaptive_weight_is_the_ratio_of_norms_at_the_last_layer():
    """x' = h W: the gradient of a loss at W is h^T g, for any gradient g at x'."""
    hidden, layer = torch.randn(5, 4), nn.Parameter(torch.randn(4, 6))
    first, second = torch.randn(5, 6), 0.01 * torch.randn(5, 6)
    weight = adaptive_weight(hidden @ layer, layer, first, second)
    torch.testing.assert_close(weight, (hidden.T @ first).norm() / ((hidden.T @ second).norm() + 1e-6))
    assert adaptive_weight(hidden @ layer, layer, first, torch.zeros(5, 6)) == 1e4
    assert layer.grad is None


# --- both networks ---


@pytest.mark.parametrize("settings", [{"r1": 0.5, "lecam": 0.1}, {"discriminator": "features"}])
def test_one_backward_pass_gives_both_networks_their_own_gradients(settings):
    """Against two plain passes: the decoder's whole loss backwards, then the discriminator's on detached images."""
    objective, images = tiny_objective(**settings).eval(), some_images()  # eval: no power iteration between passes
    objective.mean_real.fill_(0.3)
    losses = objective(images, adversarial=True)
    losses["loss"].backward()
    got = {name: p.grad.clone() for name, p in objective.named_parameters() if p.requires_grad}
    objective.zero_grad()
    objective.mean_real.fill_(0.3)
    objective.mean_fake.fill_(0.0)

    autoencoder, discriminator, config = objective.autoencoder, objective.discriminator, objective.config
    decoded = autoencoder(images).sample
    reconstruction = objective.reconstruction.compare(decoded, images)["loss"]
    verdict = -discriminator(decoded).mean()
    last = autoencoder.decoder.proj_out.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, verdict)]
    balance = norms[0] / (norms[1] + 1e-6)
    (reconstruction + config.weight * balance * verdict).backward()
    expected = {f"autoencoder.decoder.{name}": p.grad.clone() for name, p in autoencoder.decoder.named_parameters()}
    objective.zero_grad()
    originals = images.clone().requires_grad_()
    real, fake = discriminator(originals), discriminator(decoded.detach())
    judged = hinge_loss(real, fake)
    if config.lecam:
        judged = judged + config.lecam * lecam_penalty(real, fake, 0.3, 0.0)
    if config.r1:
        judged = judged + config.r1 * r1_penalty(real, originals)
    judged.backward()
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    expected |= {name: p.grad for name, p in trained.items() if name.startswith("discriminator.")}
    assert got.keys() == expected.keys() == trained.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(losses["adaptive_weight"], balance, rtol=1e-4, atol=1e-6)
    total = reconstruction + config.weight * balance * verdict + judged
    torch.testing.assert_close(losses["loss"], total)


def test_logits_that_are_not_finite_leave_the_averages_as_they_were():
    objective, images = tiny_objective(lecam=0.1), some_images()
    objective(images, adversarial=True)
    before = objective.mean_real.clone(), objective.mean_fake.clone()
    objective(images * torch.nan, adversarial=True)
    assert (objective.mean_real, objective.mean_fake) == before and before[0] != 0


def test_before_its_start_the_verdict_does_not_reach_the_decoder_but_the_discriminator_learns():
    objective, images = tiny_objective(), some_images()
    objective(images, adversarial=False)["loss"].backward()
    got = objective.autoencoder.decoder.proj_in.weight.grad.clone()
    objective.zero_grad()
    objective.reconstruction.compare(objective.autoencoder(images).sample, images)["loss"].backward()
    torch.testing.assert_close(got, objective.autoencoder.decoder.proj_in.weight.grad)
    objective(images, adversarial=False)["loss"].backward()
    matrices = [p for p in objective.discriminator.parameters() if p.ndim > 1]  # the last bias is in equilibrium
    assert all(p.grad.abs().sum() > 0 for p in matrices)


def test_without_a_discriminator_the_decoder_learns_what_it_learns_before_a_verdict_counts():
    grads, images = [], some_images()
    for settings in ({}, {"discriminator": "none"}):
        objective = tiny_objective(**settings)
        losses = objective(images, adversarial=False)
        losses["loss"].backward()
        grads.append([p.grad for p in objective.autoencoder.decoder.parameters()])
    assert objective.discriminator is None and set(losses) == {"l1", "l2", "loss"}
    assert all(map(torch.equal, *grads))
    groups = objective.parameter_groups(TrainingConfig(output_dir="x", adam_weight_decay=0.1))
    assert [group.get("network") for group in groups] == [None, None]


def test_only_the_decoder_of_the_autoencoder_is_trained_and_groups_have_their_own_settings():
    objective = tiny_objective(discriminator="features", learning_rate=4e-4)
    trained = [name for name, p in objective.autoencoder.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("decoder.") for name in trained)
    groups = objective.parameter_groups(TrainingConfig(output_dir="x", learning_rate=1e-4, adam_weight_decay=0.1))
    assert [group.get("network") for group in groups] == [None, None, "discriminator", "discriminator"]
    assert groups[2]["lr_scale"] == pytest.approx(4) and groups[2]["betas"] == (0.5, 0.9)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in objective.parameters() if p.requires_grad)


def test_bfloat16_gives_nearly_the_same_weight_and_finite_gradients():
    objective, images = tiny_objective(), some_images()
    plain = objective(images, adversarial=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = objective(images, adversarial=True)
    assert rounded["adaptive_weight"].dtype == torch.float32
    assert rounded["adaptive_weight"].item() == pytest.approx(plain["adaptive_weight"].item(), rel=0.1)
    rounded["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["patch", "features"])
def test_a_discriminator_learns_to_tell_images_apart(kind):
    torch.manual_seed(0)
    autoencoder = tiny_autoencoder().requires_grad_(False)
    discriminator = PatchDiscriminator(8, 2) if kind == "patch" else FeatureDiscriminator(autoencoder)
    smooth, rough = some_images(8) * 0.05, some_images(8)
    trained = [p for p in discriminator.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        hinge_loss(discriminator(rough), discriminator(smooth)).backward()
        optimizer.step()
    assert (discriminator(rough) > 0).float().mean() > 0.8 and (discriminator(smooth) < 0).float().mean() > 0.8
    # an image's verdict does not depend on the others of its batch
    torch.testing.assert_close(discriminator.eval()(rough)[:1], discriminator(rough[:1]), rtol=1e-4, atol=1e-4)


def test_a_patch_logit_sees_seventy_pixels():
    """The receptive field of PatchGAN with three strided layers (arXiv:1611.07004). Norms off: they see everything."""
    discriminator = PatchDiscriminator(8, 3)
    discriminator.layers = nn.Sequential(*(m for m in discriminator.layers if not isinstance(m, nn.GroupNorm)))
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    discriminator(images).view(14, 14)[7, 7].backward()
    rows = images.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight is -1.0, expected 0 or a positive"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected a positive"),
        ({"adam_beta1": 1.0}, "adam_beta1 is 1.0, expected a number in"),
        ({"r1": 1.0, "discriminator": "features"}, "no second derivative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdversarialConfig(**settings)
