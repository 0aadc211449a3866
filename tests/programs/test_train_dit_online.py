"""train_dit/train.py on images, the autoencoder in the loop; and on data that does not fit its configuration."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_latent_shards import kl, rae
from test_train_dit import arguments, fresh_accelerate, load_program, make_autoencoder, weights  # noqa: F401

from vtp_diffusion import LightningDiTPipeline


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with vae/ and images/ of two classes."""
    folder = tmp_path_factory.mktemp("made")
    make_autoencoder(folder / "vae")
    for k in range(10):
        path = folder / "images" / ("cat", "dog")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return folder


def online(output, made, *more):
    source = ("--latents=none", f"--data.source={made / 'images'}", "--data.resolution=16", "--augmentation.shift=4")
    return arguments(output, made, *source, "--validation.labels", "cat", *more)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(
    "more",
    [(), ("--keep_on_device=false", "--dataloader_num_workers=1", "--mixed_precision=bf16")],
)
def test_a_resumed_online_run_gives_the_same_weights(tmp_path, made, more):
    program = load_program("train_dit")
    program.main(online(tmp_path / "straight", made, *more))
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "pipeline")
    (tmp_path / "resumed" / "checkpoint-6").rename(tmp_path / "resumed" / ".unfinished-checkpoint-6")
    program.main(online(tmp_path / "resumed", made, *more))
    first, second = (weights(tmp_path / name / "checkpoint-6") for name in ("straight", "resumed"))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert losses(tmp_path / "straight") == losses(tmp_path / "resumed")
    pipeline = LightningDiTPipeline.from_pretrained(tmp_path / "resumed" / "pipeline")
    assert pipeline.get_label_ids(["dog"]) == [1] and pipeline.vae.config.latents_mean == [1.0, 2.0, 3.0]
    assert "10 training images, encoded in every step" in (tmp_path / "resumed/pipeline/README.md").read_text()


def test_images_left_out_are_named_and_another_autoencoder_is_refused_as_one(tmp_path, made, capsys, monkeypatch):
    monkeypatch.setattr("vtp_diffusion.data.image_datasets.IN_MEMORY_BYTES", 0)
    shutil.copytree(made / "images", tmp_path / "images")
    (tmp_path / "images" / "dog" / "3.png").write_bytes(b"no image")
    program, words = load_program("train_dit"), online(tmp_path / "run", made, "--max_train_steps=3")
    words += [f"--data.source={tmp_path / 'images'}", "--data.skip_unreadable", "--keep_on_device=false"]
    program.main(words)
    assert "unreadable images, left out: 1 (dog/3.png)\n" in capsys.readouterr().out
    torch.manual_seed(1)
    vae = make_autoencoder(tmp_path / "vae")
    vae.encoder.norm.weight.data.mul_(2)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="trained with images and autoencoder of .*images, fingerprint"):
        program.main([*words, f"--vae={tmp_path / 'vae'}"])


def test_online_training_divided_and_compiled(tmp_path, made, monkeypatch):
    """Micro-steps and the compiler (traced without a graph break, not turned into machine code) change no loss."""
    program = load_program("train_dit")
    more = ("--max_train_steps=3",)
    program.main(online(tmp_path / "plain", made, *more))
    program.main(online(tmp_path / "divided", made, *more, "--gradient_accumulation_steps=2"))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    program.main(online(tmp_path / "compiled", made, *more, "--compile"))
    expected = losses(tmp_path / "plain")
    assert len(set(expected)) == 3
    for name in ("divided", "compiled"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("make", "channels"), [(kl, 4), (rae, 64)])
def test_other_tokenizers_are_trained_on_equal_terms(tmp_path, made, make, channels):
    make().save_pretrained(tmp_path / "vae")
    load_program("train_dit").main(online(tmp_path / "run", made, f"--vae={tmp_path / 'vae'}", "--max_train_steps=2"))
    pipeline = LightningDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.transformer.config.in_channels == channels
    assert pipeline(class_labels=["dog"], num_inference_steps=2).images[0].size == (16, 16)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.resolution=18"], "data.resolution is 18, which AutoencoderVTP cannot encode: Images are 18x18"),
        (["--model.base_head_layer=1"], "model.base_head_layer is 1, expected a block before the last, 1"),
        (["--model.num_classes=1"], "model.num_classes is 1, but the data's labels go from 0 to 1"),
        (["--validation.distance.num_images=6"], "twice as many real images, .*/images has 10"),
        (["--latents=somewhere"], "augmentation changes images while training online"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(tmp_path, made, more, message):
    with pytest.raises(ValueError, match=message):
        load_program("train_dit").main(online(tmp_path / "run", made, *more))
    with pytest.raises(ValueError, match="latents is none: training online needs data"):
        load_program("train_dit").main([*arguments(tmp_path / "run", made), "--latents=none"])
    assert not (tmp_path / "run").exists()
