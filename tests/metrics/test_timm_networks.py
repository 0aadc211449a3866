"""Networks of timm as feature networks: timm's own forward, preprocessing, weights, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_timm import make_small, save_weights

from vtp_diffusion.metrics.features import Extractor
from vtp_diffusion.metrics.networks import feature_network
from vtp_diffusion.metrics.timm_networks import TIMM_NETWORKS, timm_model

timm = pytest.importorskip("timm")
SIDES = {"convnextv2_b": 224, "dinov2_l": 256, "mae_l": 224, "siglip2_so400m": 224, "clip_l": 256}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


def pictures(count, seed=0):
    """uint8 (N, 3, 40, 48), smooth."""
    noise = torch.randn(count, 3, 5, 6, generator=torch.Generator().manual_seed(seed)) * 60 + 128
    return torch.nn.functional.interpolate(noise, (40, 48), mode="bilinear").clamp(0, 255).to(torch.uint8)


def by_pillow(images, side):
    """Bicubic and antialiased in float32, a channel at a time."""
    channels = [
        np.asarray(Image.fromarray(channel.float().numpy()).resize((side, side), Image.Resampling.BICUBIC))
        for image in images
        for channel in image
    ]
    return torch.from_numpy(np.stack(channels)).unflatten(0, (len(images), 3))


@pytest.mark.parametrize("name", SIDES)
def test_features_are_those_of_timm(name, tmp_path):
    network = feature_network(name, save_weights(tmp_path, name))
    images = pictures(3)
    found = Extractor(network, "cpu")(images)["features"]
    assert network.side == SIDES[name] and found.shape == (3, network.dim) == (3, 12)
    resized = network.resized(images)
    assert torch.allclose(resized, by_pillow(images, SIDES[name]), atol=0.02)
    configuration = timm.get_pretrained_cfg(TIMM_NETWORKS[name].weights)
    mean, std = (torch.tensor(values)[:, None, None] for values in (configuration.mean, configuration.std))
    with torch.no_grad():
        tokens = network.model.forward_features((resized / 255 - mean) / std)
        if name == "convnextv2_b":
            expected = network.model.head.global_pool(tokens).flatten(1)
        else:
            expected = network.model.forward_head(tokens, pre_logits=True)
    assert expected.std(0).min() > 1e-4, "images that all look alike prove nothing"
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_architectures_are_those_of_the_paper(monkeypatch):
    monkeypatch.undo()
    expected = {"convnextv2_b": (1024, 87.7), "siglip2_so400m": (1152, 427.9), "mae_l": (1024, 303.3)}
    for name, (features, millions) in expected.items():
        with torch.device("meta"):
            model = timm_model(name)
        assert model.num_features == features
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_patches_of_14_fill_256_pixels_by_padding(tmp_path):
    network = feature_network("clip_l", save_weights(tmp_path, "clip_l"))
    assert network.model.forward_features(torch.zeros(1, 3, 256, 256)).shape[1] == 1 + 19 * 19


def test_results_say_what_the_network_saw(tmp_path):
    file = save_weights(tmp_path, "dinov2_l")
    described = feature_network("dinov2-l", file).describe()
    assert described["distance"] == "FD-DINOv2-L" and described["file"] == file.name
    assert described["preprocessing"].startswith("bicubic, antialiased, to 256x256, float32, not rounded; (x / 255 - ")
    assert described["preprocessing"].endswith("; class token")
    assert feature_network("siglip2_so400m", save_weights(tmp_path, "siglip2_so400m")).preprocessing.endswith(
        "/ (0.5, 0.5, 0.5); attention pooling"
    )


def test_weights_with_a_classifier_are_the_same_network(tmp_path):
    torch.manual_seed(0)
    network = TIMM_NETWORKS["convnextv2_b"]
    whole = timm.create_model(network.weights, pretrained=False, num_classes=7, **network.architecture)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    found = feature_network("convnextv2_b", tmp_path / "whole.pth").model.state_dict()
    assert torch.equal(found["stem.0.weight"], whole.state_dict()["stem.0.weight"]) and "head.fc.weight" not in found


def test_weights_of_others_are_refused(tmp_path):
    for name, other in (("dinov2_l", "clip_l"), ("clip_l", "mae_l"), ("convnextv2_b", "mae_l")):
        with pytest.raises(ValueError, match=rf"{other}.safetensors does not hold {name} \(timm's "):
            feature_network(name, save_weights(tmp_path, other))
    model = timm_model("clip_l").state_dict()
    model["pos_embed"] = torch.zeros(1, 577, 12)  # of 336 pixels
    torch.save(model, tmp_path / "clip_336.pth")
    with pytest.raises(ValueError, match=r"clip_336.pth does not hold clip_l .*pos_embed \(1, 577, 12\), not "):
        feature_network("clip_l", tmp_path / "clip_336.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth does not hold mae_l"):
        feature_network("mae_l", tmp_path / "list.pth")


def test_missing_weights_are_named_with_the_place_they_belong_to(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=rf"mae_l are not in {tmp_path}: fill it with `hf download timm/vit_large"):
        feature_network("mae_l")
    with pytest.raises(ValueError, match="weights of mae_l: none.pth is not a file"):
        feature_network("mae_l", "none.pth")


def test_a_batch_is_resized_once_for_networks_of_one_rule(tmp_path):
    networks = {name: feature_network(name, save_weights(tmp_path, name)) for name in SIDES}
    extractors, shared, images = {n: Extractor(x, "cpu") for n, x in networks.items()}, {}, pictures(2)
    together = {name: extractor(images, shared)["features"] for name, extractor in extractors.items()}
    rules = [key[-1] for key in shared if isinstance(key[-1], str)]
    assert sorted(rule[:32] for rule in rules) == [f"bicubic, antialiased, to {s}x{s}" for s in (224, 256)]
    for name, extractor in extractors.items():
        assert torch.equal(together[name], extractor(images)["features"])
