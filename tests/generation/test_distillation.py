"""Few-step students: both targets against closed forms, the network with a second time, what is refused."""

from dataclasses import replace

import lightning_dit_formulae
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from test_pipeline_lightning_dit import tiny_pipeline, tiny_transformer
from tiny_training import tiny_config
from torch import nn

from vtp_diffusion import LightningDiTTransformer2DModel
from vtp_diffusion.data.latent_shards import LatentDataset, write_shard
from vtp_diffusion.generation import distillation
from vtp_diffusion.generation.distillation import DistillationConfig, TeacherConfig
from vtp_diffusion.generation.export import export_pipeline
from vtp_diffusion.generation.fast_sampling import FusedForward, speed_up
from vtp_diffusion.generation.sampler_config import SamplerConfig
from vtp_diffusion.generation.sampling import open_pipeline, sample_numbers
from vtp_diffusion.generation.transformer_config import ModelConfig, build_transformer
from vtp_diffusion.models.latent_space import latent_statistics
from vtp_diffusion.training.loop import TrainingRun
from vtp_diffusion.training.run_folder import RunFolder

STUDENT = {"steps": [1, 2, 4], "shift": 2.0, "guidance": {"guidance_scale": 2.5}}
GUIDED = {"guidance_scale": 2.5, "guidance_interval": (0.3, 0.9)}


def config(**changes):
    teacher = TeacherConfig(pipeline="teacher", num_inference_steps=8, solver="euler", **changes)
    return DistillationConfig(teacher=teacher)


def student_pipeline(**changes):
    network = tiny_transformer(student=STUDENT | changes)
    return tiny_pipeline(transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0))


class Gaussian:
    """Data ~ N(0, s²): x_t has the deviation d(t) = sqrt(t² s² + (1 - t)²), and x_r = x_t·d(r)/d(t)."""

    def __init__(self, s=0.4):
        self.s = s

    def deviation(self, t):
        return (t**2 * self.s**2 + (1 - t) ** 2).sqrt()[:, None, None, None]

    def velocity(self, x, t):
        wide = t[:, None, None, None]
        return x * (wide * self.s**2 - (1 - wide)) / self.deviation(t) ** 2

    def __call__(self, x, t, labels=None, return_dict=False, next_timestep=None):
        mean = x * (self.deviation(next_timestep) / self.deviation(t) - 1)
        wide = (next_timestep - t)[:, None, None, None]
        return (torch.where(wide.abs() < 1e-9, self.velocity(x, t), mean / wide),)


def test_the_mean_velocity_of_a_gaussian_is_its_own_target():
    flow, labels = Gaussian(), torch.zeros(6, dtype=torch.long)
    t = torch.tensor([0.0, 0.001, 0.2, 0.4, 0.7, 0.9], dtype=torch.float64)
    r = torch.tensor([1.0, 0.5, 0.8, 1.0, 0.7, 1.0], dtype=torch.float64)  # 0.7: the instantaneous velocity
    x = torch.randn(6, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact, velocity = flow(x, t, next_timestep=r)[0], flow.velocity(x, t)
    target = distillation.mean_velocity_target(flow, x, t, r, labels, velocity)
    error = (target - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error[2:].max() < 1e-3 and error[:2].max() < 1e-2  # one-sided at t = 0: of first order
    assert torch.equal(target[4], velocity[4])
    wrong = 2 * velocity - target  # the sign of time that runs from data to noise
    assert (wrong - exact).flatten(1).norm(dim=1)[[0, 2, 3, 5]].min() > 0.1


@pytest.mark.parametrize("changes", [{}, GUIDED, {"guidance_scale": 1.5, "guidance": "internal"}])
def test_trajectories_are_the_teacher_s_samples_and_pairs_their_mean_velocities(changes):
    teacher, settings = tiny_pipeline(transformer=tiny_transformer(base_head_layer=1)), config(**changes)
    times = distillation.prepare_teacher(settings.teacher, teacher)
    noise = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = [0, 1, 2, 0, 1, 2]
    path = distillation.integrate(teacher, settings.teacher, labels, noise)
    sampled = teacher(labels, 8, latents=noise, output_type="latent", **changes).images
    assert torch.equal(path[0], noise) and torch.equal(path[-1], sampled)
    intervals = distillation.Intervals([1, 2, 4], times)
    draws = {"interval": torch.tensor([0.1, 0.34, 0.6, 0.7, 0.8, 0.99]), "place": torch.zeros(6)}
    pairs = distillation.chosen_pairs(path, intervals, draws)
    assert torch.equal(pairs["times"], times[[0, 0, 4, 0, 2, 6]])
    assert torch.equal(pairs["next_times"], times[[8, 4, 8, 2, 4, 8]])
    wide = (pairs["next_times"] - pairs["times"])[:, None, None, None]
    ends = path[[8, 4, 8, 2, 4, 8], range(6)]
    torch.testing.assert_close(pairs["latents"] + wide * pairs["target"], ends)
    # the last place of a quarter is one step of the teacher: Euler's mean velocity is its own
    last = distillation.chosen_pairs(path, intervals, draws | {"place": torch.full((6,), 0.999)})
    velocity = distillation.teacher_velocity(
        teacher, settings.teacher, last["latents"], last["times"], torch.tensor(labels)
    )
    torch.testing.assert_close(last["target"], velocity, rtol=1e-4, atol=1e-4)


def test_every_number_of_steps_is_chosen_as_often():
    intervals = distillation.Intervals([1, 4], torch.linspace(0, 1, 17))
    first, last = intervals.choose(torch.arange(1000) / 1000)
    assert ((last - first) == 16).float().mean() == 0.5 and set((last - first).tolist()) == {4, 16}
    assert [((first == k) & (last == k + 4)).sum().item() for k in (0, 4, 8, 12)] == [125] * 4


@torch.no_grad()
def test_a_student_begins_as_its_teacher():
    teacher = tiny_pipeline(transformer=tiny_transformer(base_head_layer=1, prediction="data"))
    student = distillation.build_student(config(guidance_scale=2.0), teacher)
    x, t, labels = torch.randn(3, 4, 4, 4), torch.tensor([0.0, 0.4, 0.9]), torch.tensor([0, 1, 2])
    expected = teacher.transformer(x, t, labels).sample
    for later in (None, t, torch.ones(3), 1.0):
        assert torch.equal(student(x, t, labels, next_timestep=later).sample, expected)
    guidance = {"guidance_scale": 2.0, "guidance": "auto", "guidance_interval": (0.0, 1.0)}
    assert student.config.student == {"steps": [1, 2, 4], "shift": 2.0, "guidance": guidance}
    with pytest.raises(ValueError, match="next_timestep is given, but this model is not a student"):
        teacher.transformer(x, t, labels, next_timestep=t)


@torch.no_grad()
def test_a_student_samples_by_its_mean_velocities_from_any_folder(tmp_path):
    pipe, noise = student_pipeline(), torch.randn(2, 4, 4, 4)
    x, labels, times = noise, torch.tensor([0, 1]), [0.0, 1 / 3, 1.0]  # of two steps, shifted by 1 / 2
    for t, r in zip(times, times[1:], strict=False):
        x = x + (r - t) * pipe.transformer(x, torch.tensor(t), labels, next_timestep=torch.tensor(r)).sample
    options = {"latents": noise, "output_type": "latent"}
    two = pipe([0, 1], num_inference_steps=2, **options).images
    torch.testing.assert_close(two, x)
    four = pipe([0, 1], **options).images
    assert torch.equal(four, pipe([0, 1], 4, **options).images) and not torch.equal(four, two)
    pipe.save_pretrained(tmp_path / "saved")
    export_pipeline(tmp_path / "saved", tmp_path / "exported")
    for folder in ("saved", "exported"):
        loaded = DiffusionPipeline.from_pretrained(tmp_path / folder)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded([0, 1], 2, **options).images, two)
        assert loaded.transformer.config.student == STUDENT
    assert "def check_student" in (tmp_path / "exported" / "pipeline.py").read_text()


@torch.no_grad()
def test_the_fused_forward_takes_the_second_time():
    network, x = tiny_transformer(student=STUDENT, attention_head_dim=12), torch.randn(3, 4, 4, 4)
    inputs, later = (x, torch.rand(3) / 2, torch.tensor([0, 3, 1])), torch.tensor([0.5, 0.8, 1.0])
    found = FusedForward(network, lightning_dit_formulae)(*inputs, next_timestep=later)[0]
    torch.testing.assert_close(found, network(*inputs, next_timestep=later).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_student_is_sped_up():
    pipe = student_pipeline()
    pipe.to("cuda", torch.bfloat16)
    options = {"latents": torch.randn(2, 4, 4, 4, device="cuda"), "output_type": "latent"}
    plain = [pipe([0, 1], n, **options).images for n in (1, 2, 1)]
    speed_up(pipe)
    for steps, expected in zip((1, 2, 1), plain, strict=True):
        torch.testing.assert_close(pipe([0, 1], steps, **options).images, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_inference_steps": 3}, "num_inference_steps is 3, expected one that this student learned: .1, 2, 4."),
        ({"guidance_scale": 2.0}, "guidance_scale is 2.0, expected 1: this student has guidance_scale 2.5"),
        ({"guidance": "internal"}, "guidance is 'internal', expected 'auto': this student has"),
        ({"guidance_interval": [0.2, 1.0]}, r"guidance_interval is \(0.2, 1.0\), expected \(0, 1\)"),
        ({"guidance_channels": 3}, "guidance_channels is 3, expected None"),
    ],
)
def test_what_a_student_was_not_trained_for_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        student_pipeline()([0], output_type="latent", **given)


def test_other_times_and_solvers_are_refused(tmp_path):
    pipe = student_pipeline(guidance=None)
    with pytest.raises(ValueError, match="guidance_scale is 2, expected 1: this student has guidance none baked in"):
        pipe([0], 4, guidance_scale=2)
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchHeunDiscreteScheduler(shift=2.0)):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match="expected FlowMatchEulerDiscreteScheduler with shift 2 and"):
            pipe([0], 4)
    student_pipeline().save_pretrained(tmp_path)
    unsaid = SamplerConfig()
    open_pipeline(tmp_path, unsaid, "cpu")
    assert unsaid.num_inference_steps == 4, "its own default, which results record"
    asked = SamplerConfig(num_inference_steps=2)
    opened = open_pipeline(tmp_path, asked, "cpu")  # as generate.py and eval/generation.py do
    assert sample_numbers(opened, [0, 1, 2], [0, 2], seed=0, **asked.sampler).shape == (2, 3, 32, 32)
    for changes, message in (
        ({"num_inference_steps": 50}, "num_inference_steps is 50, expected one"),
        ({"guidance_scale": 1.5}, "this student has .* baked in"),
        ({"guidance_scale": 1.5, "guidance": "internal"}, "this student has .* baked in"),
        ({"solver": "dopri5"}, "solver is dopri5 and time_shift None, expected pipeline"),
        ({"time_shift": 0.3}, "solver is pipeline and time_shift 0.3"),
    ):
        with pytest.raises(ValueError, match=message):
            open_pipeline(tmp_path, replace(asked, **changes), "cpu")


def test_a_student_is_no_start_of_ordinary_training(tmp_path):
    network = tiny_transformer(student=STUDENT)
    network.save_pretrained(tmp_path)
    model = ModelConfig(num_layers=2, num_attention_heads=2, attention_head_dim=8)
    with pytest.raises(ValueError, match="initial_transformer .* does not fit: student {.*} instead of None"):
        build_transformer(model, (4, 4, 4), 3, 0.1, str(tmp_path))


def test_a_teacher_keeps_to_the_times_of_its_student():
    times = [distillation.prepare_teacher(TeacherConfig(pipeline="", solver=solver), tiny_pipeline())
             for solver in ("euler", "unipc", "pipeline")]  # fmt: skip
    assert torch.equal(times[0], times[1]) and torch.equal(times[0], times[2])
    assert times[0][0] == 0 and times[0][8] == pytest.approx(1 / 3) and times[0][-1] == 1
    heun = tiny_pipeline(scheduler=FlowMatchHeunDiscreteScheduler(shift=2.0))
    with pytest.raises(ValueError, match="teacher.solver pipeline .FlowMatchHeun.* other times than Euler's"):
        distillation.prepare_teacher(TeacherConfig(pipeline="", solver="pipeline"), heun)
    with pytest.raises(ValueError, match=r"student_steps is \[3\], expected divisors of .*num_inference_steps, 16"):
        DistillationConfig(teacher=TeacherConfig(pipeline=""), student_steps=[3])


class GuidedGaussian(LightningDiTTransformer2DModel):
    """The velocity of latents ~ N(0, 0.4²), without a class of N(0, 0.6²). Scale 2: x_1 is x_0·0.4²/0.6."""

    def forward(self, x, t, labels, return_dict=True):
        classes, none = Gaussian(0.4).velocity(x, t), Gaussian(0.6).velocity(x, t)
        return (torch.where((labels == self.config.num_classes)[:, None, None, None], none, classes),)


class Factor(ModelMixin, ConfigMixin):
    """A student x·f(t, r), which can be that of a Gaussian."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, x, t, labels, return_dict=False, next_timestep=None):
        return (x * self.layers(torch.stack([t, next_timestep - t], 1))[:, :, None, None],)


@pytest.mark.parametrize("trajectory_steps", [0, 600])
def test_each_stage_by_itself_learns_the_guided_flow_of_a_gaussian(tmp_path, trajectory_steps):
    """The first that of the teacher's few Euler steps, the second the exact one."""
    torch.manual_seed(0)
    pipe = tiny_pipeline(transformer=GuidedGaussian(4, 1, 4, 1, 1, 8, 3).eval())
    teacher = TeacherConfig(pipeline="", num_inference_steps=8, solver="euler", guidance_scale=2.0)
    settings = DistillationConfig(teacher=teacher, trajectory_steps=trajectory_steps)
    changes = {"train_batch_size": 16, "max_train_steps": 600, "learning_rate": 3e-2, "lr_scheduler": "cosine"}
    training = tiny_config(tmp_path / "run", **changes, checkpointing_steps=600, log_steps=600)
    write_shard(tmp_path / "latents_00000.safetensors", *torch.zeros(2, 64, 4, 4, 4), torch.arange(64) % 3)
    dataset, student = LatentDataset(tmp_path), Factor()
    objective = distillation.MeanVelocityObjective(student)
    run = TrainingRun(training, RunFolder(training.output_dir, training), objective, student, "transformer", "data")

    def batches(steps):
        mean, std = latent_statistics(pipe.vae)
        random = torch.Generator().manual_seed(0)
        for _ in steps:
            latents = 0.4 * torch.randn(16, 4, 4, 4, generator=random)
            yield {"latents": latents * std + mean, "labels": torch.zeros(16, dtype=torch.long)}

    times = distillation.prepare_teacher(teacher, pipe)
    inputs = distillation.distillation_inputs(run, settings, pipe, times, dataset, batches)
    for step in run.steps():
        run.optimise(step, inputs)
    noise = torch.ones(1, 4, 4, 4)
    euler = distillation.integrate(pipe, teacher, [0], noise)[-1].mean().item()
    wanted = euler if trajectory_steps else 0.4**2 / 0.6
    assert abs(euler - 0.4**2 / 0.6) > 0.04
    for steps in (1, 2, 4):
        x = noise
        for t, r in zip(times[:: 8 // steps], times[8 // steps :: 8 // steps], strict=False):
            x = x + (r - t) * student(x, t[None], None, next_timestep=r[None])[0]
        assert x.mean().item() == pytest.approx(wanted, abs=0.02)
