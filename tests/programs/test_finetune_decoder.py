"""train_vtp/finetune_decoder.py as a user runs it, resumed, on two processes, and with bad input."""

import functools
import importlib.util
import json
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

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "train_vtp" / "finetune_decoder.py"


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """On the CPU, where runs repeat bit for bit, and as in a new process: accelerate keeps its state between runs."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)


def load_program():
    spec = importlib.util.spec_from_file_location("program_finetune_decoder", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program  # dataclasses look their annotations up there
    spec.loader.exec_module(program)
    return program


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """pictures/ with train/ and validation/, and stage1/, a finished run of the first stage as far as it matters."""
    folder = tmp_path_factory.mktemp("inputs")
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("validation", 4)):
        (folder / "pictures" / split).mkdir(parents=True)
        for i in range(count):
            blocks = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            picture = Image.fromarray(blocks).resize((16, 16), Image.Resampling.NEAREST)
            picture.save(folder / "pictures" / split / f"{i:02d}.png")
    torch.manual_seed(0)
    sides = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in
             (("hidden_size", 16), ("num_layers", 1), ("num_attention_heads", 2))}  # fmt: skip
    statistics = {"latents_mean": [0.1, 0.0, -0.1], "latents_std": [0.5, 1.0, 2.0]}
    shape = {"sample_size": 16, "patch_size": 4, "latent_channels": 3, "rope_dtype": "float32"}
    AutoencoderVTP(**shape, **sides, **statistics).save_pretrained(folder / "stage1" / "vae")
    return folder


def arguments(output, inputs, *more):
    return [
        f"--output_dir={output}", f"--vae={inputs / 'stage1'}", f"--data.source={inputs / 'pictures'}",
        "--data.resolution=16", "--augmentation.flip=0.5", "--augmentation.shift=1", "--reconstruction.lpips=0",
        "--reconstruction.latent_noise=0.2", "--adversarial.patch_channels=4", "--adversarial.patch_layers=1",
        "--adversarial.start_step=1", "--adversarial.lecam=0.1", "--max_train_steps=4", "--train_batch_size=4",
        "--learning_rate=1e-2", "--lr_scheduler=cosine", "--ema_decay=0.8", "--checkpointing_steps=2",
        "--validation_steps=2", "--log_steps=1", "--report_to=none", *more,
    ]  # fmt: skip


def test_the_tiny_configuration_runs_as_a_user_runs_it(tmp_path):
    command = [sys.executable, PROGRAM, "--config", ROOT / "train_vtp/configs/finetune_decoder_tiny.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    vae = ROOT / "weights" / "openmoji-128" / "vae"
    done = subprocess.run(
        [*command, "--output_dir", "run", "--vae", vae], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "the autoencoder is in run/vae" in done.stdout and "held_out: psnr " in done.stdout
    written, _, then = done.stdout.splitlines()[-1].partition("; next: ")
    assert written == "written: run, run/vae, run/results.json, run/decoder_before_collapse.safetensors"
    assert then.startswith("python eval/reconstruction.py --vae run/vae --data.source openmoji --split validation")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["held_out"]["after"]["psnr"] != results["held_out"]["before"]["psnr"]
    assert results["encoder_unchanged"] is True and isinstance(results["collapse"], list)


def test_the_encoder_and_the_latent_statistics_stay_bit_for_bit_and_the_result_is_the_average(tmp_path, inputs):
    load_program().main(arguments(tmp_path / "run", inputs))
    before = AutoencoderVTP.from_pretrained(inputs / "stage1" / "vae")
    after = AutoencoderVTP.from_pretrained(tmp_path / "run" / "vae")
    old, new = before.state_dict(), after.state_dict()
    changed = {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"decoder"}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(before.encode(images).latent, after.encode(images).latent)
    assert before.config.latents_mean == after.config.latents_mean == [0.1, 0.0, -0.1]
    assert before.config.latents_std == after.config.latents_std
    averaged = load_file(tmp_path / "run/checkpoint-4/vae_ema/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in new.items())
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2, 2, 3, 4, 4]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert log[0]["held_out_psnr"] == results["held_out"]["before"]["psnr"]
    assert log[-1]["held_out_psnr"] == results["held_out"]["after"]["psnr"]


def test_a_collapse_ends_the_run_with_the_decoder_from_before(tmp_path, inputs, monkeypatch, capsys):
    program, words = load_program(), ("--validation_steps=1", "--checkpointing_steps=1", "--checkpoints_total_limit=9")

    measured = program.measure

    def run(psnrs, *more, name="run"):
        values = iter(psnrs)  # of the validations; what is measured in the end is measured
        monkeypatch.setattr(program, "measure", lambda *a: {"psnr": p} if (p := next(values, None)) else measured(*a))
        program.main(arguments(tmp_path / name, inputs, *words, *more))
        results = json.loads((tmp_path / name / "results.json").read_text())
        return results["steps"], results["steps_trained"]

    def is_average_of(step):
        weights = "diffusion_pytorch_model.safetensors"
        vae, average = (load_file(tmp_path / "run" / f / weights) for f in ("vae", f"checkpoint-{step}/vae_ema"))
        return all(torch.equal(value, average[name]) for name, value in vae.items())

    assert run([30.0, 29.0, 20.0]) == (1, 2) and is_average_of(1)
    assert "vae/ gets the decoder of step 1, before the signs" in capsys.readouterr().out
    assert run([]) == (1, 2) and is_average_of(1)  # the same command again comes to the same end
    assert run([20.0, 20.0], "--stop_on_collapse=false") == (4, 4) and is_average_of(4)
    assert run([]) == (1, 4) and is_average_of(1)  # and back
    # without the file the decoder is the one that was given
    longer = ("--lr_scheduler=constant", "--max_train_steps=5")
    run([30.0, 30.0, 30.0, 30.0, 30.0], *longer[:1], name="other")
    (tmp_path / "other" / program.SOUND).unlink()
    assert run([float("nan")], *longer, name="other") == (0, 5)
    given = AutoencoderVTP.from_pretrained(inputs / "stage1" / "vae").state_dict()
    vae = AutoencoderVTP.from_pretrained(tmp_path / "other" / "vae").state_dict()
    assert all(torch.equal(value, given[name]) for name, value in vae.items())


def test_an_image_reconstructed_exactly_is_no_collapse(tmp_path, inputs, capsys):
    shutil.copytree(inputs, tmp_path / "inputs")
    Image.new("RGB", (16, 16), "white").save(tmp_path / "inputs/pictures/validation/00.png")
    given = AutoencoderVTP.from_pretrained(inputs / "stage1" / "vae")
    torch.nn.init.constant_(given.decoder.proj_out.bias, 5.0)  # decodes everything to white
    given.save_pretrained(tmp_path / "inputs" / "stage1" / "vae")
    load_program().main(arguments(tmp_path / "run", tmp_path / "inputs"))
    results = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["steps"] == 4 and results["held_out"]["before"]["equal_images"] == 1
    first = log_of(tmp_path / "run")[0]
    assert first["held_out_psnr"] == results["held_out"]["before"]["psnr"] and first["held_out_equal_images"] == 1
    assert "PSNR falls" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--adversarial.discriminator=features", "--gradient_accumulation_steps=2"),
        ("--adversarial.discriminator=none",),
    ],
)
def test_a_resumed_run_gives_the_same_networks_and_optimisers(tmp_path, inputs, more):
    program = load_program()
    program.main(arguments(tmp_path / "straight", inputs, *more))
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "vae")
    (tmp_path / "resumed" / "checkpoint-4").rename(tmp_path / "resumed" / ".unfinished-checkpoint-4")
    program.main(arguments(tmp_path / "resumed", inputs, *more))
    weights = "diffusion_pytorch_model.safetensors"
    for name in (f"vae/{weights}", f"checkpoint-4/vae/{weights}", "checkpoint-4/objective.safetensors"):
        first, second = (load_file(tmp_path / run / name) for run in ("straight", "resumed"))
        assert first.keys() == second.keys() and len(first) > 0
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
    judged = not any("none" in word for word in more)
    assert {key.partition(".")[0] for key in first} == {"mean_real", "mean_fake", *["discriminator"] * judged}
    states = [torch.load(tmp_path / run / "checkpoint-4/optimizer.pt")["optimizer"] for run in ("straight", "resumed")]
    assert any("decoder" in name for name in states[0])
    assert any("discriminator" in name for name in states[0]) == judged
    for name, moments in states[0].items():
        assert all(torch.equal(value, states[1][name][key]) for key, value in moments.items())


def test_what_ends_a_validation_costs_no_step_and_resuming_makes_up_for_it(tmp_path, inputs, monkeypatch):
    """The decoder from before a collapse is what a validation writes: without it the validation was not made."""
    program = load_program()
    program.main(arguments(tmp_path / "straight", inputs))

    def full(tensors, path, metadata):
        raise OSError(f"no room at step {metadata['step']}")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room at step 2"):
        written = iter([program.save_file])  # that of step 0 is
        patch.setattr(program, "save_file", lambda *given, **named: next(written, full)(*given, **named))
        program.main(arguments(tmp_path / "ended", inputs))
    assert [path.name for path in (tmp_path / "ended").glob("checkpoint-*")] == ["checkpoint-2"]
    program.main(arguments(tmp_path / "ended", inputs))
    logs = [
        [(line["step"], line.get("loss"), line.get("held_out_psnr")) for line in log_of(tmp_path / name)]
        for name in ("straight", "ended")
    ]
    assert [step for step, _, _ in logs[0]] == [0, 1, 2, 2, 3, 4, 4] and logs[0] == logs[1]
    straight, ended = ((tmp_path / run / program.SOUND).read_bytes() for run in ("straight", "ended"))
    assert straight == ended


def test_compiling_leaves_the_losses_as_they_are(tmp_path, inputs, monkeypatch):
    """Traced and differentiated as for a GPU, but not turned into machine code (a minute)."""
    program = load_program()
    few = ("--max_train_steps=2", "--adversarial.r1=0.1")
    program.main(arguments(tmp_path / "plain", inputs, *few))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    program.main(arguments(tmp_path / "compiled", inputs, *few, "--compile", "--gradient_checkpointing"))
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
            if "loss" in line
        ]
        for name in ("plain", "compiled")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_shards_are_refused_before_anything_is_built(tmp_path, inputs, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for, expected none: the decoder and its"):
        load_program().main(arguments(tmp_path / "run", inputs))
    assert not (tmp_path / "run").exists()


def test_two_processes_give_the_losses_of_one(tmp_path, inputs):
    """The adaptive weight and LeCam's averages are those of the whole batch on every process."""
    few = ("--max_train_steps=3", "--reconstruction.latent_noise=0", "--adversarial.start_step=0")
    load_program().main(arguments(tmp_path / "one", inputs, *few))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, PROGRAM, *arguments("two", inputs, *few)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - TIMING - {"discriminator/accuracy"}:
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vae=nowhere"], "nowhere holds neither config.json nor vae/"),
        (["--data.resolution=18"], "data.resolution is 18, expected a multiple of the patch size"),
        (["--mixed_precision=fp16"], "mixed_precision is fp16, expected no or bf16"),
        (["--adversarial.start_step=4"], "adversarial.start_step is 4, expected less than max_train_steps, 4"),
        (["--adversarial.discriminator=dino"], "adversarial.discriminator is 'dino'"),
        (["--reconstruction.weight=0.1"], "reconstruction.weight is 0.1, expected 1"),
        (["--evaluation_images=0"], "evaluation_images is 0"),
        (["--adversarial.patch_layers=3"], "patch_layers is 3 with a data.resolution of 16, .* or 24 pixels"),
        (["--data.limit=3"], "has 3 training images, expected at least train_batch_size, 4: a batch would hold"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(tmp_path, inputs, more, message):
    with pytest.raises(ValueError, match=message):
        load_program().main(arguments(tmp_path / "run", inputs, *more))
    assert not (tmp_path / "run").exists()


def test_another_autoencoder_is_refused_on_resuming(tmp_path, inputs):
    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    program = load_program()
    program.main(arguments(tmp_path / "run", folder, "--max_train_steps=2"))
    other = AutoencoderVTP.from_pretrained(folder / "stage1" / "vae")
    torch.nn.init.zeros_(other.bottleneck.weight)
    other.save_pretrained(folder / "stage1" / "vae")
    with pytest.raises(
        ValueError, match="was trained with autoencoder weights of fingerprint .* the same autoencoder"
    ):
        program.main(arguments(tmp_path / "run", folder, "--max_train_steps=2"))
    (folder / "pictures" / "train" / "00.png").unlink()
    with pytest.raises(
        ValueError, match="was trained with data of .*pictures, fingerprint .* with the same data only"
    ):
        program.main(arguments(tmp_path / "run", folder, "--max_train_steps=2"))


@pytest.mark.parametrize("name", ["tiny", "openmoji", "large"])
def test_configurations_hold_nothing_unknown(name):
    program = load_program()
    config = program.parse_config(
        program.Config, ["--config", str(ROOT / f"train_vtp/configs/finetune_decoder_{name}.yaml")]
    )
    assert config.adversarial.start_step < config.max_train_steps


def test_shards_are_read_as_a_stream_and_resumed(tmp_path, inputs, monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = sorted((inputs / "pictures" / "train").glob("*.png"))
    for shard, part in enumerate((pictures[:6], pictures[6:])):
        images = [{"bytes": path.read_bytes(), "path": None} for path in part] + [{"bytes": b"broken", "path": None}]
        table = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
        table.to_parquet(str(tmp_path / f"{shard}.parquet"))
    more = ["--data.source=parquet", f"--data.data_files={tmp_path / '*.parquet'}", "--data.streaming"]
    more += ["--data.shuffle_buffer=3", "--data.skip_unreadable", "--evaluation_images=4"]
    program = load_program()
    program.main(arguments(tmp_path / "straight", inputs, *more))
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    (tmp_path / "resumed" / "checkpoint-4").rename(tmp_path / "resumed" / ".unfinished-checkpoint-4")
    program.main(arguments(tmp_path / "resumed", inputs, *more))
    first, second = (
        load_file(tmp_path / run / "checkpoint-4/objective.safetensors") for run in ("straight", "resumed")
    )
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    results = json.loads((tmp_path / "resumed" / "results.json").read_text())
    assert results["train"]["images"] == 4 and "held_out" not in results
    assert "--split train " in capsys.readouterr().out.splitlines()[-1]
    assert results["left_out"]["unreadable"] >= 1
    with pytest.raises(ValueError, match="keep_on_device is true with data.streaming, expected none or false"):
        program.main(arguments(tmp_path / "other", inputs, *more, "--keep_on_device=true"))
    with pytest.raises(ValueError, match="evaluation_images is none with data.streaming"):
        program.main(arguments(tmp_path / "other", inputs, *more[:-1]))
    with pytest.raises(ValueError, match="a stream is resumed with the same numbers"):
        program.main(arguments(tmp_path / "straight", inputs, *more, "--dataloader_num_workers=2"))
