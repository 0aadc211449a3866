"""eval/generation.py, run as a user runs it."""

import errno
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageDraw

import vtp_diffusion.data.image_datasets
from vtp_diffusion import AutoencoderVTP, LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.data import npz
from vtp_diffusion.evaluation.one_pass import FeaturesConfig
from vtp_diffusion.evaluation.protocols import PROTOCOLS
from vtp_diffusion.metrics import inception

ROOT = Path(__file__).parents[2]


def command(*words):
    return [str(ROOT / "eval" / "generation.py"), *map(str, words), "--device", "cpu"]


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Runs the program in this process (importing takes longer than everything else) and returns what it printed."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", command(*words))
        monkeypatch.setenv("VTP_DIFFUSION_TRACEBACK", "1")  # else an error would become a message and an exit
        runpy.run_path(sys.argv[0], run_name="__main__")
        return capsys.readouterr().out

    return run


def shapes(count, seed):
    """Discs and boxes of random place and colour on white, uint8 (N, 32, 32, 3)."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        image = Image.new("RGB", (32, 32), "white")
        left, top = generator.integers(2, 12, 2).tolist()
        draw = ImageDraw.Draw(image)
        shape = draw.ellipse if generator.random() < 0.5 else draw.rectangle
        shape((left, top, left + 16, top + 16), fill=tuple(generator.integers(0, 200, 3).tolist()))
        images.append(np.array(image))
    return np.stack(images)


def save_folder(folder, images):
    folder.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{k:03d}.png")
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    np.savez(path, shapes(40, seed=0))
    return path


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in size.items()}
    vae = AutoencoderVTP(sample_size=32, patch_size=8, latent_channels=4, rope_dtype="float32", **sizes)
    transformer = LightningDiTTransformer2DModel(
        sample_size=4, in_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=3
    )
    folder = tmp_path_factory.mktemp("pipeline") / "untrained"
    LightningDiTPipeline(
        vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0)
    ).save_pretrained(folder)
    return folder


def test_good_samples_copies_and_an_untrained_network(evaluate, reference, pipeline, tmp_path):
    images = shapes(12, seed=1)
    images[:3] = shapes(40, seed=0)[5:8]  # three copies
    folder = save_folder(tmp_path / "images", images)
    held_out = tmp_path / "held_out.npz"
    np.savez(held_out, shapes(12, seed=2))
    output, pairs = tmp_path / "results" / "r.json", tmp_path / "pairs.png"
    printed = evaluate(
        "--images", folder, "--reference", reference, "--floor_images", held_out, "--control", pipeline,
        "--num_images", 12, "--num_inference_steps", 2, "--feature_network", "efficientnet_lite0",
        "--nearest_neighbours", pairs, "--output", output,
    )  # fmt: skip
    results = json.loads(output.read_text())
    good, control = results["distances"]
    assert (good["images"], control["images"]) == ("generated", "control")
    assert good["distance"] == "FD-EffLite0" and "FD-EffLite0" in printed and good["num_features"] == 320
    assert "FD-EffLite0 of generated (12 images, 320 features), FD-EffLite0 of control (12 images, 320" in printed
    assert good["floor"]["kind"] == "held-out" and good["floor"]["sizes"] == [12, 40]
    assert good["floor"]["real_deviation"] is good["floor"]["generated_deviation"] is None, "both sides are whole"
    assert good["value"] < 2 * good["floor"]["real"] < control["value"]
    assert results["counts"] == {
        "reference": 40, "floor": 12, "generated": 12, "control": 12, "reference_without_variants": 40
    }  # fmt: skip
    assert results["networks"][0]["sha256"].startswith("57934424")
    assert results["settings"]["labels"] == "random" and results["settings"]["num_inference_steps"] == 2
    found = results["near_duplicates"]
    assert found["generated"]["near_duplicates"] >= 3 and found["control"]["near_duplicates"] == 0
    assert list(found)[3:] == ["generated", "floor", "control", "reference"], "the order of a set changes"
    with Image.open(pairs) as picture:
        assert picture.width > 8 * 32


def test_copies_are_looked_for_beside_real_images_that_were_decoded_too(evaluate, reference, pipeline, tmp_path):
    """By the pipeline's own autoencoder, or by that of --autoencoder."""
    common = ("--reference", reference, "--feature_network", "efficientnet_lite0", "--num_images", 4)
    common += ("--nearest_neighbours", tmp_path / "pairs.png")
    sampling = ("--num_inference_steps", 2, "--save_images", tmp_path / "samples")
    outputs = [tmp_path / name for name in ("sampled.json", "saved.json", "unknown.json")]
    printed = evaluate("--images", pipeline, *common, *sampling, "--output", outputs[0])
    saved = ("--images", tmp_path / "samples" / "generated.npz", *common)
    evaluate(*saved, "--autoencoder", pipeline, "--output", outputs[1])
    evaluate(*saved, "--output", outputs[2])
    found = [json.loads(output.read_text())["near_duplicates"] for output in outputs]
    assert found[0]["decoded_reference"] == found[1]["decoded_reference"] and "decoded_reference" not in found[2]
    assert found[0]["decoded_reference"]["num_images"] == 40 and "decoded_reference" in printed
    for words, message in (
        ((*saved, "--autoencoder", tmp_path), "is not the folder of a diffusers autoencoder"),
        ((*saved[:-2], "--autoencoder", pipeline), "autoencoder is for nearest_neighbours and metrics memorisation"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(*words, "--output", outputs[0])


def test_a_disk_too_full_for_the_samples_costs_no_results(evaluate, reference, pipeline, tmp_path, monkeypatch):
    def full(*arguments, **arrays):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(npz, "write_npz", full)
    output = tmp_path / "results.json"
    with pytest.raises(OSError, match="no space left"):
        evaluate(
            "--images", pipeline, "--reference", reference, "--feature_network", "efficientnet_lite0",
            "--num_images", 3, "--num_inference_steps", 2, "--save_images", tmp_path / "samples", "--output", output,
        )  # fmt: skip
    assert json.loads(output.read_text())["counts"]["generated"] == 3


def test_a_pipeline_is_sampled_the_same_whatever_the_batch(evaluate, reference, pipeline, tmp_path):
    values = []
    for batch_size in (2, 5):
        output = tmp_path / f"{batch_size}.json"
        evaluate(
            "--images", pipeline, "--reference", reference, "--num_images", 5, "--num_inference_steps", 2,
            "--guidance_scale", 2, "--labels", "balanced", "--feature_network", "efficientnet_lite0",
            "--batch_size", batch_size, "--output", output,
        )  # fmt: skip
        row = json.loads(output.read_text())["distances"][0]
        assert row["floor"]["kind"] == "halves" and row["floor"]["sizes"] == [5, 5]
        values.append(row["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_saved_samples_give_the_same_numbers_and_say_what_made_them(evaluate, reference, pipeline, tmp_path):
    common = ("--reference", reference, "--feature_network", "efficientnet_lite0")
    sampling = ("--num_images", 4, "--num_inference_steps", 2, "--guidance_scale", 2, "--seed", 3)
    sampling += ("--guidance_channels", 1)
    folder, first, again = tmp_path / "samples", tmp_path / "first.json", tmp_path / "again.json"
    evaluate(
        "--images", pipeline, "--control", "untrained", *common, *sampling, "--save_images", folder, "--output", first
    )  # fmt: skip
    evaluate(
        "--images", folder / "generated.npz", "--control", folder / "control.npz", *common, "--seed", 3,
        "--output", again,
    )  # fmt: skip
    with pytest.raises(ValueError, match="generated.npz is there already, expected a folder without it"):
        evaluate("--images", pipeline, *common, *sampling, "--save_images", folder, "--output", tmp_path / "3.json")
    with pytest.raises(ValueError, match="save_images .* cannot be written"):
        evaluate("--images", pipeline, *common, *sampling, "--save_images", first, "--output", tmp_path / "3.json")
    first, again = json.loads(first.read_text()), json.loads(again.read_text())
    values = [[row["value"] for row in results["distances"]] for results in (first, again)]
    assert values[0] == pytest.approx(values[1], rel=1e-6) and first["sampling"] == again["sampling"]
    made, control = first["sampling"]["generated"], first["sampling"]["control"]
    assert (made["guidance_scale"], made["seed"], made["num_inference_steps"]) == (2, 3, 2)
    assert made["guidance_channels"] == 1
    assert made["weights"]["vae"] == control["weights"]["vae"]
    assert made["weights"]["transformer"] != control["weights"]["transformer"]


def test_a_protocol_is_followed_and_named_with_what_sampling_costs(evaluate, pipeline, tmp_path, monkeypatch):
    weights, output = inception.save_random_inception(tmp_path / "random.pth", seed=0), tmp_path / "r.json"
    monkeypatch.setattr(inception, "INCEPTION_SHA256_PREFIX", inception.file_sha256(weights)[:8])
    monkeypatch.setitem(PROTOCOLS, "imf", replace(PROTOCOLS["imf"], num_images=3))
    np.savez(tmp_path / "imf.npz", ref_mu=np.zeros(2048), ref_sigma=np.eye(2048))
    words = ("--images", pipeline, "--reference", tmp_path / "imf.npz", "--protocol", "imf", "--weights", weights)
    words += ("--num_inference_steps", 2, "--output", output)
    printed = evaluate(*words)
    assert "protocol imf: reference imagenet_256_fid_stats.npz, num_images 3, labels random" in printed
    assert "FID (imf)" in printed and "FLOPs an image" in printed
    results = json.loads(output.read_text())
    (row,) = results["distances"]
    assert results["protocol"]["name"] == "imf" and results["sampling"]["generated"]["rounding"] == "half up"
    assert row["num_images"] == 3 and row["flops_per_image"] > row["active_parameters"] > 0
    with pytest.raises(ValueError, match="labels is balanced, but protocol imf fixes random"):
        evaluate(*words, "--labels", "balanced")


def test_a_folder_as_reference_is_cropped_to_the_images(reference, tmp_path):
    large = np.repeat(np.repeat(shapes(6, seed=3), 2, axis=1), 2, axis=2)
    output = tmp_path / "r.json"
    words = command(
        "--images", reference, "--reference", save_folder(tmp_path / "large", large), "--num_images", 6,
        "--feature_network", "efficientnet_lite0", "--output", output,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert "FD-EffLite0" in done.stdout
    results = json.loads(output.read_text())
    assert results["settings"]["seed"] == 0 and not {"solver", "batch_size", "labels"} & set(results["settings"])
    assert results["image_size"] == [32, 32] and results["counts"]["reference"] == 6
    assert results["enlarged"] == {"reference": 0} and "enlarged" not in done.stdout


def test_a_reference_is_made_once_and_read_back(evaluate, reference, tmp_path):
    folder = save_folder(tmp_path / "real", shapes(30, seed=0))
    network = ("--feature-network", "efficientnet-lite0")
    printed = evaluate(
        "reference", "--reference", folder, "--resolution", 32, *network, "--output", tmp_path / "r.npz"
    )
    assert "statistics of 30 images on efficientnet_lite0 and 30 of the images" in printed
    with np.load(tmp_path / "r.npz") as file:
        assert file["mu"].shape == (320,) and file["sigma"].shape == (320, 320) and len(file["arr_0"]) == 30
        np.savez(tmp_path / "statistics.npz", **{key: file[key] for key in ("mu", "sigma", "settings")})
        np.savez(tmp_path / "none.npz", mu=file["mu"], sigma=-file["sigma"], settings=file["settings"])
    images = save_folder(tmp_path / "images", shapes(12, seed=1))
    results = {}
    for name in ("real", "r.npz", "statistics.npz"):
        output = tmp_path / f"{name}.json"
        words = ("--images", images, "--reference", tmp_path / name, "--num_workers", 2 if name == "real" else 0)
        printed = evaluate(*words, *network, "--output", output)
        results[name] = json.loads(output.read_text())
    assert "no floor: the reference holds statistics only" in printed
    assert results["real"]["images_sha256"] == results["r.npz"]["images_sha256"], "read by others, or here"
    (by_folder,), (by_file,), (by_statistics,) = (result["distances"] for result in results.values())
    assert by_folder["value"] == pytest.approx(by_file["value"], rel=1e-5)
    assert by_folder["value"] == pytest.approx(by_statistics["value"], rel=1e-5)
    assert by_folder["spread"]["value"] == pytest.approx(by_file["spread"]["value"], rel=1e-3)
    assert by_folder["floor"] == by_file["floor"] and by_statistics["floor"] is None
    for rows in ("kernel_distances", "scores"):
        assert results["real"][rows] == results["r.npz"][rows] and results["statistics.npz"][rows] == []
    names = [row["score"] for row in results["real"]["scores"]]
    assert names == [f"{score} (EffLite0)" for score in ("precision", "recall", "density", "coverage")]
    assert results["real"]["kernel_distances"][0]["distance"] == "KD-EffLite0"
    assert "not measured: precision of generated on efficientnet_lite0: the reference holds statistics" in printed
    with pytest.raises(ValueError, match=r"none.npz: mu and sigma: the covariance holds variances below 0"):
        evaluate("--images", images, "--reference", tmp_path / "none.npz", *network, "--output", tmp_path / "x.json")
    with pytest.raises(ValueError, match="statistics of features of efficientnet_lite0 .* feature network is vgg16"):
        evaluate(
            "--images", images, "--reference", tmp_path / "r.npz", "--feature_network", "vgg16",
            "--output", tmp_path / "x.json",
        )  # fmt: skip


def test_images_that_are_there_twice_are_refused(evaluate, reference, tmp_path, monkeypatch):
    images = shapes(8, seed=1)
    images[6] = images[2]
    words = ("--images", save_folder(tmp_path / "images", images), "--reference", reference)
    words += ("--feature_network", "efficientnet_lite0", "--output", tmp_path / "r.json")
    with monkeypatch.context() as patch:
        patch.setattr("vtp_diffusion.metrics.features.Extractor.__call__", None)  # is not reached: networks take hours
        with pytest.raises(ValueError, match="the generated images hold one twice: 006.png equals 002.png"):
            evaluate(*words)
    assert not (tmp_path / "r.json").exists()
    printed = evaluate(*words, "--allow_duplicates")
    assert "generated: images that equal an earlier one: 1" in printed
    assert json.loads((tmp_path / "r.json").read_text())["duplicates"] == {"generated": 1, "reference": 0}
    assert "are those of the reference" not in printed
    assert "the generated images are those of the reference" in evaluate("--images", reference, *words[2:])
    some = np.concatenate([shapes(8, seed=1), shapes(40, seed=0)[:3]])
    printed = evaluate("--images", save_folder(tmp_path / "some", some), *words[2:])
    assert "3 of the generated images are those of the reference, pixel for pixel" in printed
    assert json.loads((tmp_path / "r.json").read_text())["shared_images"] == {"generated": {"reference": 3}}


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_a_reference_that_are_unreadable_or_too_small_are_counted(
    in_memory, evaluate, reference, tmp_path, monkeypatch
):
    folder = save_folder(tmp_path / "real", shapes(8, seed=0))
    Image.fromarray(shapes(1, seed=9)[0, :20, :31]).save(folder / "008.png")  # smaller than what is measured
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:60])
    if not in_memory:
        monkeypatch.setattr(vtp_diffusion.data.image_datasets, "IN_MEMORY_BYTES", 0)
    printed = evaluate(
        "--images", reference, "--num_images", 5, "--reference", folder, "--data.skip_unreadable", "true",
        "--feature_network", "efficientnet_lite0", "--output", tmp_path / "r.json",
    )  # fmt: skip
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["distances"][0]["num_reference"] == results["counts"]["reference"] == 8
    assert results["duplicates"]["reference"] == 0, "no image is measured in the place of another"
    assert results["skipped"] == {"reference": ["002.png"]}
    assert "reference: images that cannot be read, left out: 1 (the first is 002.png)" in printed
    assert results["enlarged"] == {"reference": 1} and "and were enlarged: 1" in printed


def test_a_device_that_is_not_there():
    messages = {"gpu": "cuda:INDEX or mps, got 'gpu'", "cuda:99": "device is cuda:99, but torch .* finds"}
    for device, message in messages.items():
        with pytest.raises(ValueError, match=message):
            FeaturesConfig(reference="real", output="r.json", device=device)


def test_two_processes_measure_what_one_does(evaluate, reference, pipeline, tmp_path):
    words = (
        "--images", pipeline, "--reference", reference, "--num_images", 7, "--num_inference_steps", 1,
        "--batch_size", 2, "--feature_batch_size", 3, "--feature_network", "efficientnet_lite0",
    )  # fmt: skip
    output = tmp_path / "two.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, *command(*words, "--save_images", tmp_path / "two", "--output", output)],
        capture_output=True, text=True, env=os.environ | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written:") == 1, "not two processes but twice one"
    evaluate(*words, "--save_images", tmp_path / "one", "--output", tmp_path / "one.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    assert one["images_sha256"] == two["images_sha256"]
    for rows in ("distances", "kernel_distances", "scores"):
        assert len(one[rows]) == len(two[rows]) > 0
        for a, b in zip(one[rows], two[rows], strict=True):
            assert a["value"] == pytest.approx(b["value"], rel=1e-5, abs=1e-9)
    kept = [np.load(tmp_path / name / "generated.npz")["arr_0"] for name in ("one", "two")]
    assert np.array_equal(*kept) and len(kept[0]) == 7
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["generated.npz"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "r.txt"], "output must be a FILE.json, got r.txt"),
        (["--feature_network", "clip"], "feature network 'clip' is unknown; known: vgg16"),
        (["--weights", "some.pth"], "weights must be NETWORK=FILE with one of vgg16"),
        (
            ["--feature_network", "inception", "--weights", "inception=none.pth"],
            "6726825d.pth there, or name",
        ),
        (["--output", "/dev/null/r.json"], "output /dev/null/r.json cannot be written"),
        (["--nearest_neighbours", "/dev/null/p.png"], "nearest_neighbours /dev/null/p.png cannot be written"),
        (["--num_images", "2"], "num_images is 2, expected 3 or more"),
        (
            ["--guidance_scale", "3", "--solver", "heun", "--labels", "balanced"],
            "guidance_scale, solver, labels: settings of sampling, but neither",
        ),
        (["--num_images", "41"], "num_images is 41, but the generated images are 40"),
        (["--save_images", "samples"], "neither"),
        (["--control", "untrained"], "resets the network of a pipeline"),
        (["--images", "missing"], "missing is neither a folder of images, nor an npz"),
        (["--data.source", "folder"], "data.source and data.resolution are decided by reference"),
        (["--nearest_neighbours", "pairs"], "nearest_neighbours must be a FILE.png"),
        (["--feature_batch_size", "0"], "feature_batch_size is 0, expected a positive number"),
        (["--reference", "missing.npz"], "reference missing.npz is not there"),
        (["--weights", "vgg16=none.safetensors", "--feature_network", "vgg16"], "none.safetensors"),
        (["--weights", "clip_l=x", "--feature_network", "vgg16"], "weights are given for clip_l, measured are vgg16"),
        (["--reference", "/missing"], "reference is '/missing', which is not a folder"),
        (["--floor_images", "./missing"], "floor_images is './missing', which is not a folder"),
    ],
)
def test_bad_input(words, message, evaluate, reference, tmp_path):
    defaults = {"--images": str(reference), "--reference": str(reference), "--output": str(tmp_path / "r.json")}
    defaults |= {"--feature_network": "efficientnet_lite0"}
    defaults |= dict(zip(words[::2], words[1::2], strict=True))
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(*(word for pair in defaults.items() for word in pair))
    assert not list(tmp_path.iterdir())


def test_a_misspelled_subcommand_is_named(evaluate):
    with pytest.raises(
        ValueError, match="'refrence' is no part of this program, nor an option; did you mean reference."
    ):
        evaluate("refrence", "--reference", "openmoji", "--output", "a.npz")


def test_statistics_of_several_networks_are_refused_by_the_output_that_was_given(evaluate, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"output must be a FILE.npz, got {tmp_path / 'a.json'}")):
        evaluate("reference", "--reference", "openmoji", "--output", tmp_path / "a.json")


def test_a_pipeline_needs_a_number_and_settings_that_suit_it(evaluate, reference, pipeline, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="num_images must say how many images to sample"):
        evaluate("--images", pipeline, "--reference", reference, "--output", tmp_path / "r.json")
    monkeypatch.setattr("vtp_diffusion.evaluation.sources.open_reference", None)  # may take hours: is not reached
    words = ("--images", pipeline, "--reference", reference, "--num_images", 3, "--output", tmp_path / "r.json")
    with pytest.raises(ValueError, match="guidance_channels is 5, expected 1 to 4"):
        evaluate(*words, "--guidance_channels", 5)
    for solver in ("pipeline", "dopri5"):
        with pytest.raises(ValueError, match=f"{pipeline}: guidance is 'autoguidance', expected auto"):
            evaluate(*words, "--guidance", "autoguidance", "--guidance_scale", 2, "--solver", solver)
