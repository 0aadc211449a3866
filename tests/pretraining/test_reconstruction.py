"""Objectives of the tokenizer and what is measured on it."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.data.images import from_uint8, to_uint8
from vtp_diffusion.pretraining.joint import VTPForPreTraining
from vtp_diffusion.pretraining.reconstruction import (
    ReconstructionConfig,
    ReconstructionObjective,
    evaluate_reconstruction,
    measure_latent_statistics,
)


def tiny_autoencoder(**changes):
    torch.manual_seed(0)
    sides = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in
             (("hidden_size", 16), ("num_layers", 1), ("num_attention_heads", 2))}  # fmt: skip
    settings = {"sample_size": 16, "patch_size": 4, "latent_channels": 3, "rope_dtype": "float32"} | sides | changes
    return AutoencoderVTP(**settings)


def some_images(count=2, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class MeanDistance(nn.Module):
    """Stands where LPIPS stands: (x, y) -> (B,)."""

    def forward(self, x, y):
        return (x.mean((1, 2, 3)) - y.mean((1, 2, 3))).square()


def test_the_loss_is_the_weighted_sum_of_its_closed_forms():
    autoencoder, images = tiny_autoencoder(), some_images()
    config = ReconstructionConfig(l1=2.0, l2=0.5, gradient=3.0, lpips=0.25, lpips_trunk="given")
    losses = ReconstructionObjective(config, MeanDistance())(autoencoder, images)
    decoded = autoencoder(images).sample
    difference = decoded - images
    l1, l2 = difference.abs().mean(), difference.pow(2).mean()
    rows = (difference[:, :, 1:] - difference[:, :, :-1]).abs().mean()
    columns = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    distance = MeanDistance()(decoded, images).mean()
    expected = {"l1": l1, "l2": l2, "gradient": rows + columns, "lpips": distance}
    expected["loss"] = 2 * l1 + 0.5 * l2 + 3 * (rows + columns) + 0.25 * distance
    torch.testing.assert_close(losses, expected)


def test_noise_while_decoding_is_in_units_of_each_channels_spread():
    autoencoder, images = tiny_autoencoder(), some_images(4)
    objective = ReconstructionObjective(ReconstructionConfig(lpips=0, latent_noise=0.5), None)
    generator = torch.Generator().manual_seed(1)
    batch = SimpleNamespace(images=images, draw=lambda draw, stream: draw(len(images), generator))
    random = objective.draw_noise(batch, autoencoder)
    assert (
        random["noise"].shape == (4, 3, 4, 4) and 0 <= random["noise_level"].min() <= random["noise_level"].max() < 0.5
    )
    latents = autoencoder.encode(images).latent
    spread = torch.stack([latents[:, c].std() for c in range(3)])[None, :, None, None]
    noisy = latents + random["noise_level"][:, None, None, None] * spread * random["noise"]
    expected = (autoencoder.decode(noisy).sample - images).abs().mean()
    torch.testing.assert_close(objective(autoencoder, images, **random)["l1"], expected)
    assert objective(autoencoder, images)["l1"] != expected


def test_without_noise_nothing_is_drawn():
    objective = ReconstructionObjective(ReconstructionConfig(lpips=0), None)
    batch = SimpleNamespace(images=some_images())  # which could draw nothing
    assert objective.draw_noise(batch, tiny_autoencoder()) == {}


def test_every_weight_of_the_autoencoder_learns():
    model = VTPForPreTraining(
        tiny_autoencoder(), {"reconstruction": ReconstructionObjective(ReconstructionConfig(lpips=0), None)}
    )
    model(reconstruction={"images": some_images()})["loss"].backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in trained.values())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["autoencoder.encoder.embeddings.mask_token"]


def test_objectives_are_named_and_weighted():
    autoencoder, images = tiny_autoencoder(), some_images()
    objectives = {
        "reconstruction": ReconstructionObjective(ReconstructionConfig(lpips=0, weight=0.1), None),
        "squared": ReconstructionObjective(ReconstructionConfig(lpips=0, l1=0, l2=1, weight=2.0), None),
    }
    model = VTPForPreTraining(autoencoder, objectives)
    losses = model(reconstruction={"images": images}, squared={"images": images})
    assert set(losses) == {"loss", "reconstruction/l1", "squared/l1", "squared/l2"}
    expected = 0.1 * losses["reconstruction/l1"] + 2 * losses["squared/l2"]
    torch.testing.assert_close(losses["loss"], expected)
    with pytest.raises(ValueError, match="at least one objective"):
        VTPForPreTraining(autoencoder, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lpips": 1.0}, "LPIPS needs a trunk"),
        ({"lpips": 0.0, "lpips_trunk": "torchvision"}, "a trunk needs a positive weight"),
        ({"l1": -1.0, "lpips": 0.0}, "l1 is -1.0"),
        ({"l1": 0.0, "lpips": 0.0}, "one of l1, l2 and lpips"),
    ],
)
def test_weights_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionConfig(**settings)


def test_without_a_trunk_there_is_no_lpips_and_with_one_its_weight_is_1():
    assert ReconstructionConfig().lpips == 0 and ReconstructionConfig(lpips_trunk="torchvision").lpips == 1


def test_latent_statistics_normalise_the_latents():
    autoencoder, images = tiny_autoencoder(), some_images(5)
    mean, std = measure_latent_statistics(autoencoder, images.split(2))  # batches of different sizes count by image
    raw = autoencoder.encode(images).latent.double()
    torch.testing.assert_close(torch.tensor(mean, dtype=torch.double), raw.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(std, dtype=torch.double), raw.std((0, 2, 3), correction=0))
    autoencoder.register_to_config(latents_mean=mean, latents_std=std)
    normalised = autoencoder.encode(images).latent
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="normalises its latents already"):
        measure_latent_statistics(autoencoder, [images])


def test_evaluation_is_the_mean_over_images():
    autoencoder, images = tiny_autoencoder(), from_uint8(to_uint8(some_images(3)))
    measured = evaluate_reconstruction(autoencoder, images.split(2), MeanDistance())
    with torch.no_grad():
        decoded = from_uint8(to_uint8(autoencoder(images).sample))
    error = ((decoded - images) / 2).double().square().mean((1, 2, 3))
    assert measured["psnr"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-4)
    assert measured["lpips"] == pytest.approx(MeanDistance()(decoded, images).mean().item(), rel=1e-5)
    assert set(evaluate_reconstruction(autoencoder, [images])) == {"psnr"} and math.isfinite(measured["psnr"])
    with pytest.raises(ValueError, match="no images"):
        evaluate_reconstruction(autoencoder, [])


def test_images_that_equal_their_reconstructions_are_counted_and_left_out_of_the_mean():
    autoencoder, white = tiny_autoencoder(), torch.ones(1, 3, 16, 16)
    torch.nn.init.constant_(autoencoder.decoder.proj_out.bias, 5.0)  # decodes everything to white
    others = some_images(2)
    alone = evaluate_reconstruction(autoencoder, [others], MeanDistance())
    together = evaluate_reconstruction(autoencoder, [white, others], MeanDistance())
    assert together["psnr"] == alone["psnr"] and together["equal_images"] == 1 and "equal_images" not in alone
    assert together["lpips"] < alone["lpips"]  # of all images
    assert evaluate_reconstruction(autoencoder, [white]) == {"psnr": None, "equal_images": 1}
