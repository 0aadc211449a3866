"""train_dit/train.py: the losses by time and the quick distances in the log of a run."""

import json
from dataclasses import replace

import pytest
from PIL import Image
from test_train_dit import arguments, fresh_accelerate, load_program, made  # noqa: F401

from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.evaluation import validation
from vtp_diffusion.evaluation.convergence import read_convergence
from vtp_diffusion.metrics.features import FeatureNetwork
from vtp_diffusion.runtime.config import config_to_dict


def test_the_log_has_losses_by_time_and_a_distance_with_its_floor(tmp_path, made, monkeypatch):  # noqa: F811
    """The distance of a network of ours, which needs no weights: red and green of the mean colour."""
    (tmp_path / "images" / "grey").mkdir(parents=True)
    for k in range(10):
        Image.new("RGB", (20, 16), (25 * k, 250 - 20 * k, 7 * k)).save(tmp_path / "images" / "grey" / f"{k}.png")

    class MeanColour(FeatureNetwork):
        distance_name = "FD-colour"

        def outputs(self, images):
            return {"features": images.float().mean((2, 3))[:, :2]}

    monkeypatch.setattr(validation, "feature_network", lambda name, weights: MeanColour())
    source, count = f"--validation.distance.reference.source={tmp_path / 'images'}", "--validation.distance.num_images"
    load_program("train_dit").main(arguments(tmp_path / "run", made, source, f"{count}=5"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert all(len(line["squared_error_by_time"]) == 10 for line in losses)
    measured = {line["step"]: line for line in lines if "FD-colour" in line}
    assert list(measured) == [3, 6] and measured[6]["FD-colour_images"] == 5
    reference = f"10 images of {tmp_path / 'images'}"
    assert measured[6]["FD-colour_reference"] == read_convergence(tmp_path / "run")[0]["reference"] == reference
    assert f"\n- Distances during training are to {reference}.\n" in (tmp_path / "run/pipeline/README.md").read_text()
    assert measured[3]["FD-colour_floor"] == measured[6]["FD-colour_floor"] > 0
    assert measured[3]["FD-colour"] != measured[6]["FD-colour"]
    early, late = read_convergence(tmp_path / "run")
    assert (early["distance"], late["distance"]) == (measured[3]["FD-colour"], measured[6]["FD-colour"])
    assert late["images"] == 24 and late["flops"] == 2 * early["flops"] > 0 and late["epochs"] == 2 * early["epochs"]
    assert late["gpu_seconds"] > early["gpu_seconds"] > 0
    with pytest.raises(ValueError, match="num_images is 6: the floor takes twice as many real images, .* has 10"):
        load_program("train_dit").main(arguments(tmp_path / "two", made, source, f"{count}=6"))
    assert not (tmp_path / "two").exists()


def test_real_images_are_by_default_those_of_the_latents(tmp_path):
    for k, split in enumerate(("train", "train", "test")):
        (tmp_path / split / "grey").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (25 * k, 0, 0)).save(tmp_path / split / "grey" / f"{k}.png")
    config = DataConfig(source=str(tmp_path), resolution=16)
    made_of = config_to_dict(config) | {"split": "all", "fingerprint": open_dataset(config, "all").fingerprint}
    del made_of["cache_dir"]  # as in latents.json
    images, source = validation.open_real_images(None, 16, {"data": made_of})
    assert len(images) == 3 and source == str(tmp_path)
    (tmp_path / "test" / "grey" / "2.png").write_bytes((tmp_path / "train" / "grey" / "0.png").read_bytes())
    for changes, message in (({}, "holds other images now"), ({"source": "./gone"}, "cannot be opened: give --valid")):
        with pytest.raises(ValueError, match=f"without distance.reference: .* {message}"):
            validation.open_real_images(None, 16, {"data": made_of | changes})
    (tmp_path / "train" / "grey" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="0.png cannot be read .* --validation.distance.reference.skip_unreadable"):
        validation.open_real_images(config, 16, None)
    assert len(validation.open_real_images(replace(config, skip_unreadable=True), 16, None)[0]) == 1
