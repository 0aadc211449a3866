"""train_dit/train.py as a user runs it, resumed, and with bad input."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models import modeling_utils
from safetensors.torch import load_file

from vtp_diffusion import AutoencoderVTP, LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.data.latent_shards import write_metadata, write_shard
from vtp_diffusion.evaluation import validation
from vtp_diffusion.generation.objective import FlowMatchingObjective, training_inputs
from vtp_diffusion.generation.transformer_config import build_transformer
from vtp_diffusion.models.latent_space import autoencoder_identity

ROOT = Path(__file__).parents[2]
NAMES = ["cat", "dog", "fish"]


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


def make_autoencoder(folder, seed=0):
    torch.manual_seed(seed)
    sides = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in
             (("hidden_size", 16), ("num_layers", 1), ("num_attention_heads", 2))}  # fmt: skip
    vae = AutoencoderVTP(
        sample_size=16,
        patch_size=4,
        latent_channels=3,
        rope_dtype="float32",
        latents_mean=[1.0, 2.0, 3.0],
        latents_std=[0.5, 1.0, 2.0],
        **sides,
    )
    vae.save_pretrained(folder)
    return vae


def make_latents(folder, vae, shape=(3, 4, 4)):
    folder.mkdir()
    random = torch.Generator().manual_seed(1)
    latents, flipped = (torch.randn(30, *shape, generator=random).bfloat16() for _ in range(2))
    for index, rows in enumerate((slice(0, 20), slice(20, 30))):
        labels = torch.arange(30)[rows] % len(NAMES)
        write_shard(folder / f"latents_{index:05d}.safetensors", latents[rows], flipped[rows], labels)
    metadata = {
        "autoencoder": autoencoder_identity(vae),
        "num_samples": 30,
        "label_names": NAMES,
        "license": "cc-by-sa-4.0",
        "attribution": "Drawn by a friend.",
        "mean": [],
        "std": [],
    }
    write_metadata(folder, metadata)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with vae/ and latents/."""
    folder = tmp_path_factory.mktemp("made")
    make_latents(folder / "latents", make_autoencoder(folder / "vae"))
    return folder


def arguments(output, made, *more):
    return [
        f"--output_dir={output}", f"--vae={made / 'vae'}", f"--latents={made / 'latents'}", "--model.num_layers=1",
        "--model.num_attention_heads=2", "--model.attention_head_dim=8", "--max_train_steps=6", "--train_batch_size=4",
        "--learning_rate=1e-2", "--lr_scheduler=cosine", "--ema_decay=0.8", "--checkpointing_steps=3",
        "--validation_steps=3", "--validation.num_inference_steps=2", "--log_steps=1", "--class_dropout_prob=0.3",
        "--report_to=none", *([] if "--validation.labels" in more else ["--validation.labels", "cat", "2"]), *more,
    ]  # fmt: skip


def weights(path):
    return load_file(path / "transformer" / "diffusion_pytorch_model.safetensors")


def test_the_tiny_configuration_runs_as_a_user_runs_it(tmp_path, made):
    config = ROOT / "train_dit/configs/tiny.yaml"
    command = [sys.executable, ROOT / "train_dit" / "train.py", "--config", config, "--output_dir", "run"]
    command += ["--vae", made / "vae", "--latents", made / "latents", "--validation.labels", "cat", "fish"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{made / 'latents'}: 30 latents of 3 x 4 x 4, {len(NAMES)} classes\ntraining: " in done.stdout
    assert "the pipeline is in run/pipeline" in done.stdout
    end = "written: run, run/pipeline; next: python pipelines/generate.py --pipeline run/pipeline --num_images 16"
    end += " --output samples.png --guidance_scale 2.0"
    assert done.stdout.splitlines()[-1].startswith(end)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 40 and lines[-1]["loss"] < lines[0]["loss"]
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == [
        "step-00000020.png",
        "step-00000040.png",
    ]
    assert list((tmp_path / "run" / "logs").glob("events*"))


def test_the_pipeline_holds_the_ema_weights_and_a_card(tmp_path, made):
    load_program("train_dit").main(arguments(tmp_path / "run", made, "--shift=0.5"))
    saved = weights(tmp_path / "run" / "pipeline")
    averaged = load_file(tmp_path / "run/checkpoint-6/transformer_ema/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in saved.items())
    pipeline = LightningDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.scheduler.config.shift == 2.0 and pipeline.transformer.config.class_dropout_prob == 0.3
    assert pipeline.vae.config.latents_mean == [1.0, 2.0, 3.0]
    images = pipeline(class_labels=["dog", 0], num_inference_steps=2).images
    assert [image.size for image in images] == [(16, 16)] * 2
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "# LightningDiT on VTP latents" in card and "- vtp\n" in card
    assert card.startswith("---\n") and "30 latents of training images; 6 steps of 4 latents," in card
    assert "license: cc-by-sa-4.0" in card and "Drawn by a friend." in card and "TODO" not in card
    load_program("train_dit").main(arguments(tmp_path / "run", made, "--shift=0.5"))
    assert (tmp_path / "run" / "pipeline" / "README.md").read_text() == card, "of a run that had ended already"


def test_another_autoencoder_is_trained_on_and_named_in_the_card(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=3, scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    make_latents(tmp_path / "latents", vae)
    load_program("train_dit").main(arguments(tmp_path / "run", tmp_path, "--max_train_steps=1"))
    pipeline = LightningDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert isinstance(pipeline.vae, AutoencoderKL) and pipeline.vae.config.scaling_factor == 0.5
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "# LightningDiT on AutoencoderKL latents" in card and "VTP" not in card and "- vtp\n" not in card


def test_the_pipeline_can_be_saved_in_half_the_size(tmp_path, made, monkeypatch):
    warned = []
    monkeypatch.setattr(modeling_utils.logger, "warning", warned.append)
    load_program("train_dit").main(arguments(tmp_path / "run", made, "--save_dtype=bfloat16", "--max_train_steps=1"))
    assert {value.dtype for value in weights(tmp_path / "run" / "pipeline").values()} == {torch.bfloat16}
    assert warned == []


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--keep_on_device=false", "--dataloader_num_workers=1", "--gradient_accumulation_steps=2"),
        ("--gradient_checkpointing", "--mixed_precision=bf16", "--random_flip=false", "--cosine_loss=false"),
    ],
)
def test_a_resumed_run_gives_the_same_weights_and_draws_none(tmp_path, made, monkeypatch, more):
    program = load_program("train_dit")
    program.main(arguments(tmp_path / "straight", made, *more))
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "pipeline")
    (tmp_path / "resumed" / "checkpoint-6").rename(tmp_path / "resumed" / ".unfinished-checkpoint-6")
    monkeypatch.setattr(LightningDiTTransformer2DModel, "initialize_weights", lambda self: pytest.fail("drawn"))
    program.main(arguments(tmp_path / "resumed", made, *more))
    for part in ("checkpoint-6", "pipeline"):
        first, second = (weights(tmp_path / name / part) for name in ("straight", "resumed"))
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
    first, second = ((tmp_path / name / "samples/step-00000006.png").read_bytes() for name in ("straight", "resumed"))
    assert first == second


def test_what_ends_a_validation_costs_no_step_and_resuming_makes_up_for_it(tmp_path, made, monkeypatch):
    """Not the guide either, which is that of the same step."""
    program, more = load_program("train_dit"), ("--guide.step=3", "--max_train_steps=4", "--lr_scheduler=constant")
    program.main(arguments(tmp_path / "straight", made, *more))

    def full(*settings):
        raise OSError("no room")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(validation, "sample_grid", full)
        program.main(arguments(tmp_path / "ended", made, *more))
    assert [path.name for path in (tmp_path / "ended").glob("checkpoint-*")] == ["checkpoint-3"]
    program.main(arguments(tmp_path / "ended", made, *more))
    for name in ("samples/step-00000003.png", "samples/step-00000004.png", "checkpoint-4/random_state_0.pt"):
        straight, ended = ((tmp_path / run / name).read_bytes() for run in ("straight", "ended"))
        assert straight == ended, name


def test_a_run_goes_on_with_clipping_and_from_where_its_data_was_moved_to(tmp_path, made):
    program = load_program("train_dit")
    program.main(arguments(tmp_path / "run", made, "--lr_scheduler=constant", "--max_train_steps=3"))
    shutil.copytree(made, tmp_path / "moved")
    program.main(arguments(tmp_path / "run", tmp_path / "moved", "--lr_scheduler=constant", "--max_grad_norm=0.5"))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line][-1] == 6

    file = tmp_path / "moved" / "latents" / "latents.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mean": [0.25] * 3}))  # of other samples
    there = f"{tmp_path / 'moved' / 'latents'}, fingerprint"
    with pytest.raises(ValueError, match=f"was trained with data of {there} .*, not of {there} "):
        program.main(arguments(tmp_path / "run", tmp_path / "moved", "--lr_scheduler=constant", "--max_train_steps=7"))


def test_compiling_leaves_the_losses_as_they_are(tmp_path, made, monkeypatch):
    """Without a graph break; traced and differentiated as for a GPU, but not turned into machine code (a minute)."""
    program = load_program("train_dit")
    program.main(arguments(tmp_path / "plain", made, "--max_train_steps=3"))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    program.main(arguments(tmp_path / "compiled", made, "--max_train_steps=3", "--compile"))
    plain, compiled = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("plain", "compiled")
    )
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_where_the_latents_lie_changes_nothing(tmp_path, made):
    program = load_program("train_dit")
    for keep in ("true", "false"):
        program.main(arguments(tmp_path / keep, made, f"--keep_on_device={keep}"))
    first, second = (weights(tmp_path / keep / "checkpoint-6") for keep in ("true", "false"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def open_inputs(output, made, *more):
    """What the program trains on, up to the first step: configuration, data, autoencoder, run and its inputs."""
    from vtp_diffusion.training.loop import TrainingRun
    from vtp_diffusion.training.run_folder import RunFolder

    program = load_program("train_dit")
    config = program.parse_config(program.Config, arguments(output, made, *more))
    vae = AutoencoderVTP.from_pretrained(config.vae)
    dataset = program.open_training_data(config, vae)
    transformer = build_transformer(config.model, dataset.shape, 3, config.class_dropout_prob)
    objective = FlowMatchingObjective(transformer, config.cosine_loss)
    run = TrainingRun(config, RunFolder(output, config), objective, transformer, "transformer", "data")
    batches = program.latent_batches(run, config, dataset)
    return program, config, dataset, vae, run, training_inputs(run, config, batches, vae, dataset.shape, null=3)


def test_inputs_are_normalised_dropped_and_flipped(tmp_path, made):
    """What the network sees: (raw - mean) / std of either the image or its mirror image, with its label or none."""
    _, _, dataset, vae, _, inputs = open_inputs(tmp_path / "run", made, "--train_batch_size=30")
    inputs = next(inputs)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    raw = inputs["latents"] * std + mean
    stored = dataset.__getitems__(list(range(30)))
    flips = 0
    for latent, label in zip(raw, inputs["labels"], strict=True):
        plain = (stored["latents"].float() - latent).abs().amax((1, 2, 3)) < 1e-5
        flipped = (stored["latents_flip"].float() - latent).abs().amax((1, 2, 3)) < 1e-5
        (index,) = (plain | flipped).nonzero()[:, 0].tolist()
        assert label in (3, stored["labels"][index])
        flips += int(flipped.any())
    assert 0 < flips < 30 and 0 < (inputs["labels"] == 3).sum() < 30


def test_times_can_be_uniform_and_shifted_by_the_size_of_the_latents(tmp_path, made):
    """s = sqrt(4096 / (3 x 4 x 4)) = 9.24 moves the median of the times from 0.5 to 0.9."""
    settings = ("--time_distribution=uniform", "--time_shift=dimensions", "--shift=dimensions")
    program, config, dataset, vae, run, inputs = open_inputs(tmp_path / "run", made, *settings)
    times = next(inputs)["times"]
    drawn = run.draw(0, lambda n, g: {"noise": torch.randn(n, 3, 4, 4, generator=g), "u": torch.rand(n, generator=g)})
    u, s = drawn["u"], (4096 / 48) ** 0.5
    torch.testing.assert_close(times, s * u / (1 + (s - 1) * u))
    pipeline = program.build_pipeline(config, vae, run.bare.transformer, dataset)
    assert pipeline.scheduler.config.shift == pytest.approx(1 / s)


def test_an_early_average_becomes_the_guide_of_the_pipeline(tmp_path, made):
    program = load_program("train_dit")
    program.main(arguments(tmp_path / "run", made, "--guide.step=3"))
    early = load_file(tmp_path / "run/checkpoint-3/transformer_ema/diffusion_pytorch_model.safetensors")
    guide = load_file(tmp_path / "run/pipeline/guidance_transformer/diffusion_pytorch_model.safetensors")
    assert early.keys() == guide.keys() and all(torch.equal(early[name], guide[name]) for name in early)
    pipeline = LightningDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.guidance_transformer is not None
    assert "EMA weights of step 3 (autoguidance" in (tmp_path / "run/pipeline/README.md").read_text()
    with pytest.raises(ValueError, match="guide.step is 2, .* goes on after step 6 and its guidance_tr.* of step 3:"):
        program.main(arguments(tmp_path / "run", made, "--guide.step=2"))
    (tmp_path / "run" / "guidance_transformer.json").unlink()  # as of a run that began before there was one
    program.main(arguments(tmp_path / "run", made, "--guide.step=3"))
    shutil.rmtree(tmp_path / "run" / "guidance_transformer")
    with pytest.raises(ValueError, match="guide.step is 3, but the run goes on after step 6"):
        program.main(arguments(tmp_path / "run", made, "--guide.step=3"))


def test_a_smaller_transformer_becomes_the_guide_of_the_pipeline(tmp_path, made):
    program = load_program("train_dit")
    program.main(arguments(tmp_path / "small", made, "--model.attention_head_dim=4", "--max_train_steps=1"))
    small = tmp_path / "small" / "pipeline" / "transformer"
    program.main(arguments(tmp_path / "run", made, f"--guide.transformer={small}", "--max_train_steps=1"))
    pipeline = LightningDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.guidance_transformer.config.attention_head_dim == 4
    other = json.loads((small / "config.json").read_text()) | {"num_classes": 7}
    (small / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="guide.transformer .* does not fit: num_classes 7 instead of 3"):
        program.main(arguments(tmp_path / "other", made, f"--guide.transformer={small}", "--max_train_steps=1"))
    student = {"steps": [1], "shift": 1.0, "guidance": None}
    (small / "config.json").write_text(json.dumps(other | {"num_classes": 3, "student": student}))
    with pytest.raises(ValueError, match="guide.transformer .* is a few-step student, expected another network"):
        program.main(arguments(tmp_path / "other", made, f"--guide.transformer={small}", "--max_train_steps=1"))
    assert not (tmp_path / "other").exists()


def test_training_can_start_from_a_saved_transformer(tmp_path, made):
    program = load_program("train_dit")
    program.main(arguments(tmp_path / "first", made))
    saved = tmp_path / "first" / "pipeline" / "transformer"
    still = ("--learning_rate=1e-12", "--max_train_steps=1")
    program.main(arguments(tmp_path / "run", made, f"--initial_transformer={saved}", *still))
    before, after = weights(tmp_path / "first" / "pipeline"), weights(tmp_path / "run" / "pipeline")
    assert all(torch.allclose(value, before[name], rtol=0, atol=1e-9) for name, value in after.items())
    wider = (f"--initial_transformer={saved}", "--model.attention_head_dim=16")
    with pytest.raises(ValueError, match="attention_head_dim 8 instead of 16"):
        program.main(arguments(tmp_path / "other", made, *wider))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--validation.labels", "unicorn"], "validation.labels .*'unicorn': .*such as cat, dog, fish"),
        (["--validation.labels", "3"], "validation.labels .* class index 3 does not exist"),
        (
            ["--validation.guidance=internal", "--validation.guidance_scale=2"],
            "validation.guidance is 'internal', expected auto, classifier_free",
        ),
        (["--model.patch_size=3"], "patch_size must divide sample_size"),
        (
            ["--validation.guidance=autoguidance", "--validation.guidance_scale=2"],
            "guide.step.* when training has ended",
        ),
        (["--class_dropout_prob=1.5"], "class_dropout_prob is 1.5"),
        (["--latents=/nonexistent"], "holds no latent shards"),
        (["--lerning_rate=1"], "did you mean --learning_rate"),
        (["--time_shift=0"], "time_shift is 0.0, expected a positive number"),
        (["--time_mu=nan"], "time_mu is nan, expected a finite number"),
        (["--learning_rate=nan"], "learning_rate is nan, expected a finite number"),
        (["--learning_rate=0"], "learning_rate is 0.0, expected a positive number"),
        (["--model.num_layers=0"], "model.num_layers is 0, expected a positive number"),
        (["--model.num_attention_heads=-2"], "model.num_attention_heads is -2, expected a positive number"),
        (["--seed=-1"], "seed is -1, expected 0 or a positive number"),
        (["--validation.guidance=internal"], "validation.guidance is 'internal', expected auto, classifier_free"),
        (["--validation.guidance_interval", "0", "0.5"], r"guidance_interval is \(0.0, 0.5\) with guidance_scale 1"),
        (["--guide.step=7"], "guide.step is 7, expected a step from 1 to 6"),
        (["--guide.step=1", "--guide.transformer=x"], "expected one of them"),
        (["--validation.distance.num_images=1"], "distance.num_images is 1"),
        (
            ["--validation.distance.num_images=2"],
            "the latents do not say which .* --validation.distance.reference.sou",
        ),
        (["--train_batch_size=5", "--gradient_accumulation_steps=2"], "expected a multiple of 1 processes x 2"),
        (["--fused", "--compile"], "fused is on, but compile is on"),
        (["--fused"], "fused is on, but the device is cpu, not a CUDA GPU"),
        (["--recompute"], "recompute is on, but the device is cpu, not a CUDA GPU"),
        (["--recompute", "--fused=false"], "recompute is on and fused is off"),
        (["--save_dtype=float16"], "expected one of float32, bfloat16"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(tmp_path, made, more, message):
    with pytest.raises(ValueError, match=message):
        load_program("train_dit").main(arguments(tmp_path / "run", made, *more))
    assert not (tmp_path / "run").exists()


def test_latents_of_another_autoencoder_are_refused(tmp_path, made):
    make_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(
        ValueError, match=f"made by another autoencoder than that in {tmp_path / 'other'}: the weights"
    ):
        load_program("train_dit").main(arguments(tmp_path / "run", made, f"--vae={tmp_path / 'other'}"))


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 4, 6), "4x6, expected square"), ((5, 4, 4), "have 5 channels, the autoencoder's 3")]
)
def test_latents_of_another_shape_are_refused(tmp_path, made, shape, message):
    make_latents(tmp_path / "latents", AutoencoderVTP.from_pretrained(made / "vae"), shape)
    with pytest.raises(ValueError, match=message):
        load_program("train_dit").main(arguments(tmp_path / "run", made, f"--latents={tmp_path / 'latents'}"))


def test_other_files_in_the_output_folder_are_left_alone(tmp_path, made):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no run"):
        load_program("train_dit").main(arguments(tmp_path / "run", made))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_generator_with_a_base_head_is_trained_and_guides_itself(tmp_path, made):
    options = ("--model.num_layers=2", "--model.base_head_layer=1", "--model.prediction=data", "--max_train_steps=2")
    load_program("train_dit").main(arguments(tmp_path / "run", made, *options, "--log_steps=1"))
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    parts = ("squared_error", "cosine", "base_squared_error", "base_cosine")
    assert line["loss"] == pytest.approx(sum(line[name] for name in parts), rel=1e-5)
    pipeline = LightningDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.transformer.config.prediction == "data" and pipeline.transformer.config.base_head_layer == 1
    assert len(pipeline([0, 1], 2, guidance="internal", guidance_scale=1.5, output_type="pt").images) == 2


def test_a_run_with_muon_goes_on_bit_for_bit(tmp_path, made, monkeypatch):
    options = ("--optimizer=muon", "--lr_scheduler=constant", "--adam_weight_decay=0.1")
    program = load_program("train_dit")
    program.main(arguments(tmp_path / "straight", made, *options))
    program.main(arguments(tmp_path / "parts", made, *options, "--max_train_steps=3"))
    program.main(arguments(tmp_path / "parts", made, *options))
    straight, parts = (weights(tmp_path / name / "pipeline") for name in ("straight", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in straight.items())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="optimizer is muon, which takes whole matrices"):
        program.main(arguments(tmp_path / "sharded", made, *options))
