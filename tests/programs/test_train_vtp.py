"""train_vtp/train.py as a user runs it, resumed, and with bad input."""

import functools
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_training import TIMING, log_of

from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.data.images import from_uint8

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """On the CPU, where runs repeat bit for bit, and as in a new process: accelerate keeps its state between runs."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)


def load_program(name):
    spec = importlib.util.spec_from_file_location(f"program_{name}", ROOT / name / "train.py")
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program  # dataclasses look their annotations up there
    spec.loader.exec_module(program)
    return program


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with train/ and validation/, images of random blocks."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("validation", 6)):
        (folder / split).mkdir()
        for i in range(count):
            blocks = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize((16, 16), Image.Resampling.NEAREST).save(folder / split / f"{i:02d}.png")
    return folder


def arguments(output, pictures, *more):
    sides = [
        f"--model.{part}_{name}"
        for part in ("encoder", "decoder")
        for name in ("hidden_size=16", "num_layers=1", "num_attention_heads=2")
    ]
    return [
        f"--output_dir={output}", f"--data.source={pictures}", "--data.resolution=16", "--model.patch_size=4",
        "--model.latent_channels=3", *sides, "--reconstruction.lpips=0", "--reconstruction.latent_noise=0.2",
        "--augmentation.flip=0.5", "--augmentation.shift=1", "--max_train_steps=6", "--train_batch_size=4",
        "--learning_rate=1e-2", "--lr_scheduler=cosine", "--ema_decay=0.8", "--checkpointing_steps=3",
        "--validation_steps=3", "--log_steps=1", "--report_to=none", *more,
    ]  # fmt: skip


def test_the_tiny_configuration_runs_as_a_user_runs_it(tmp_path):
    command = [sys.executable, ROOT / "train_vtp" / "train.py", "--config", ROOT / "train_vtp/configs/tiny.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output_dir", "run"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "step 15: held_out_psnr " in done.stdout and "\nheld_out: psnr " in done.stdout
    assert "the autoencoder is in run/vae" in done.stdout
    end = "written: run, run/vae, run/vtp, run/results.json; next: python train_dit/extract_latents.py --vae run/vae"
    assert done.stdout.splitlines()[-1].startswith(end)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 30 and {"train", "held_out"} <= results.keys()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == [
        "step-00000015.png",
        "step-00000030.png",
    ]


def test_the_saved_autoencoder_normalises_its_training_images(tmp_path, pictures):
    load_program("train_vtp").main(arguments(tmp_path / "run", pictures))
    autoencoder = AutoencoderVTP.from_pretrained(tmp_path / "run" / "vae")
    dataset = open_dataset(DataConfig(source=str(pictures), resolution=16), "train")
    images = from_uint8(torch.stack([item["image"] for item in dataset]))
    with torch.no_grad():
        latents = autoencoder.encode(torch.cat([images, images.flip(3)])).latent
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    averaged = load_file(tmp_path / "run/checkpoint-6/vae_ema/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in autoencoder.state_dict().items())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["train"]["images"] == 20 and results["held_out"]["images"] == 6
    assert results["latents_mean"] == autoencoder.config.latents_mean and results["latent_statistics_images"] == 20


def test_the_autoencoder_is_written_before_what_takes_longest(tmp_path, pictures, monkeypatch):
    program, few = load_program("train_vtp"), ("--max_train_steps=1", "--lr_scheduler=constant")
    monkeypatch.setattr(program, "STATISTICS_IMAGES", 7)
    measured = iter([program.measure])  # in the validation; not in the end
    with monkeypatch.context() as patch, pytest.raises(OSError, match="ended"):
        patch.setattr(program, "measure", lambda *given: next(measured, ended)(*given))
        program.main(arguments(tmp_path / "run", pictures, *few))
    statistics = AutoencoderVTP.from_pretrained(tmp_path / "run" / "vae").config.latents_mean
    program.main(arguments(tmp_path / "run", pictures, *few))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["latents_mean"] == statistics and results["latent_statistics_images"] == 7
    last = log_of(tmp_path / "run")[-1]  # measured in the same way, without the statistics
    assert all(last[f"held_out_{name}"] == results["held_out"][name] for name in ("psnr", "effective_rank"))


def ended(*given):
    raise OSError("ended")


@pytest.mark.parametrize("more", [(), ("--keep_on_device=false", "--gradient_accumulation_steps=2")])
def test_a_resumed_run_gives_the_same_autoencoder(tmp_path, pictures, more):
    program = load_program("train_vtp")
    program.main(arguments(tmp_path / "straight", pictures, *more))
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "vae")
    (tmp_path / "resumed" / "checkpoint-6").rename(tmp_path / "resumed" / ".unfinished-checkpoint-6")
    program.main(arguments(tmp_path / "resumed", pictures, *more))
    first, second = (
        load_file(tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors") for name in ("straight", "resumed")
    )
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_what_ends_a_validation_costs_no_step_and_resuming_makes_up_for_it(tmp_path, pictures, monkeypatch):
    """Log and checkpoint, its random state too, are those of a run that went through."""
    program = load_program("train_vtp")
    program.main(arguments(tmp_path / "straight", pictures))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr("PIL.Image.Image.save", functools.partial(fail, OSError("no room")))  # the picture: at the end
        program.main(arguments(tmp_path / "ended", pictures))
    assert [path.name for path in (tmp_path / "ended").glob("checkpoint-*")] == ["checkpoint-3"]
    program.main(arguments(tmp_path / "ended", pictures))
    logs = [
        [{key: value for key, value in line.items() if key not in TIMING} for line in log_of(tmp_path / name)]
        for name in ("straight", "ended")
    ]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 3, 4, 5, 6, 6] and logs[0] == logs[1]
    for name in ("vae/diffusion_pytorch_model.safetensors", "objective.safetensors", "random_state_0.pt"):
        straight, ended = ((tmp_path / run / "checkpoint-6" / name).read_bytes() for run in ("straight", "ended"))
        assert straight == ended, name


def fail(error, *arguments, **settings):
    raise error


def test_compiling_leaves_the_losses_as_they_are(tmp_path, pictures, monkeypatch):
    """Without a graph break; traced and differentiated as for a GPU, but not turned into machine code (a minute)."""
    program = load_program("train_vtp")
    program.main(arguments(tmp_path / "plain", pictures, "--max_train_steps=3"))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    program.main(arguments(tmp_path / "compiled", pictures, "--max_train_steps=3", "--compile"))
    plain, compiled = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("plain", "compiled")
    )
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_two_processes_share_the_work(tmp_path, pictures):
    """Under distributed training every trained parameter needs a gradient; the data are read once, not twice."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [ROOT / "train_vtp" / "train.py", *arguments("run", pictures, "--train_batch_size=8")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second finds everything done
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoint-6" / "random_state_1.pt").is_file()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["images_per_step"] == 8 and results["train"]["images"] == 20
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 3, 4, 5, 6, 6]  # once each, and two validations


def test_a_folder_without_held_out_images_claims_none(tmp_path, pictures, capsys):
    load_program("train_vtp").main(arguments(tmp_path / "run", pictures / "train", "--max_train_steps=1"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "held_out" not in results and 1 < results["train"]["effective_rank"] <= 16
    assert "no held-out images: training images are measured, and no k-NN accuracy" in capsys.readouterr().out
    lines = (tmp_path / "run" / "log.jsonl").read_text()
    assert "train_psnr" in lines and "train_effective_rank" in lines  # without others, a collapse has to show here


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.patch_size=5"], "data.resolution is 16, expected a multiple of model.patch_size, 5"),
        (["--reconstruction.lpips=1"], "LPIPS needs a trunk"),
        (["--model.encoder_width=5"], "unknown option"),
        (["--data.resolution=0"], "resolution is 0"),
        (["--model.latent_channels=0"], "model.latent_channels is 0, expected a positive number"),
        (["--model.encoder_num_layers=-1"], "model.encoder_num_layers is -1, expected a positive number"),
        (["--text.text_num_attention_heads=0"], "text.text_num_attention_heads is 0, expected a positive number"),
        (["--adam_weight_decay_end=-5"], "adam_weight_decay_end is -5.0, expected 0 or a positive number"),
        (["--contrastive.weight=nan"], "--contrastive.weight is nan, expected a finite number"),
        (["--validation_images=0"], "validation_images is 0"),
        (["--latent_statistics_images=0"], "latent_statistics_images is 0"),
        (["--zero_shot_templates", "{}", "a photo"], "zero_shot_templates: 'a photo' has no {} for the name"),
        (["--zero_shot_templates"], "zero_shot_templates is empty"),
        (["--train_batch_size=24"], "has 20 training images, expected at least train_batch_size, 24: a batch would"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(tmp_path, pictures, more, message):
    with pytest.raises(ValueError, match=message):
        load_program("train_vtp").main(arguments(tmp_path / "run", pictures, *more))
    assert not (tmp_path / "run").exists()


def test_steps_left_out_are_counted_and_a_run_of_nothing_else_exports_nothing(tmp_path, pictures, capsys, monkeypatch):
    program, calls = load_program("train_vtp"), iter(range(6))
    compare = program.ReconstructionObjective.compare

    def once_broken(*arguments):
        factor = math.nan if next(calls) == 2 else 1.0
        return {name: factor * value for name, value in compare(*arguments).items()}

    with monkeypatch.context() as patch:
        patch.setattr(program.ReconstructionObjective, "compare", once_broken)
        program.main(arguments(tmp_path / "run", pictures))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["skipped_steps"] == 1
    assert f"is in {tmp_path}/run/vae; 1 steps were skipped, since their gradients" in capsys.readouterr().out
    for _ in range(2):  # the same command again has no better end
        with pytest.raises(ValueError, match="all 6 steps up to step 6 were skipped, .* Nothing is .* exported"):
            program.main(arguments(tmp_path / "none", pictures, "--reconstruction.l1=1e38"))
    assert not {"vae", "results.json"} & {path.name for path in (tmp_path / "none").iterdir()}


def test_an_unreadable_image_stops_the_run_or_is_left_out(tmp_path, pictures, monkeypatch, capsys):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    (folder / "train" / "03.png").write_bytes(b"not a picture")
    program = load_program("train_vtp")
    with pytest.raises(ValueError, match="03.png cannot be .*. --data.skip_unreadable leaves such images out"):
        program.main(arguments(tmp_path / "run", folder))
    more = ("--data.skip_unreadable", "--max_train_steps=1")
    program.main(arguments(tmp_path / "run", folder, *more))
    assert "train: unreadable images, left out: 1 (train/03.png)\n" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["train"]["images"] == 19 and results["left_out"] == {"unreadable": 1}
    monkeypatch.setattr("vtp_diffusion.data.image_datasets.IN_MEMORY_BYTES", 0)
    more += (
        "--max_train_steps=2",
        "--checkpointing_steps=1",
        "--validation_steps=2",
        "--train_batch_size=20",
        "--keep_on_device=false",
        "--dataloader_num_workers=1",
    )
    program.main(arguments(tmp_path / "read", folder, *more))
    assert "step 1: left_out/unreadable 1\n" in capsys.readouterr().out
    results = json.loads((tmp_path / "read" / "results.json").read_text())
    assert results["left_out"] == {"unreadable": 1} and results["held_out"]["unreadable"] == 0
    assert results["train"]["first_unreadable"] == ["train/03.png"]
    assert json.loads((tmp_path / "read" / "log.jsonl").read_text().splitlines()[-1])["left_out/unreadable"] == 1
