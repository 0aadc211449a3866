"""Few-step students: the mean velocity of a trained pipeline's flow, learned in two stages.

The mean velocity u(x, t, r) = (x_r - x_t) / (r - t) of MeanFlow (arXiv:2505.13447) takes x from time t to r in one
step. As in MF-RAE the first stage learns it from trajectories of the teacher. The second distils it from the teacher's
velocity v: the derivative of (r - t)·u = x_r - x_t along the flow, with r fixed, gives

    u = v + (r - t)·du/dt,    du/dt = (u(x + δv, t + δ, r) - u(x - δv, t - δ, r)) / 2δ

where finite differences replace a Jacobian-vector product. Time runs from noise (0) to data (1); MeanFlow's runs the
other way, where the sign before du/dt is a minus.

This equation holds for each r by itself. So both stages learn only the intervals that sampling uses: r is the end of
one, t any time inside it. That restriction is ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..models.latent_space import latent_statistics
from ..runtime.config import Settings, setting
from ..runtime.reproducibility import exact_float32
from .flow_matching import interpolate, sample_times, scheduler_shift, shift_times
from .pipeline_checks import is_guided
from .sampler_config import GuidanceConfig, SamplerConfig
from .sampling import pipeline_identity
from .solvers import use_solver

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..data.latent_shards import LatentDataset
    from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel
    from ..training.loop import TrainingRun

DELTA = 5e-3  # δ of the finite differences, as in MF-RAE
# A sample's weight is 1 / (its squared error + SCALE). With MF-RAE's 1e-3, samples with r = t, whose target has no
# noise, outweigh the intervals; without weights a few targets at times near 0 dominate, where du/dt can be very large.
SCALE = 1.0  # about the square of a velocity
EVERY = 2  # in the second stage every second sample has an interval, the others r = t; every fourth in MF-RAE
NOISE_STREAM = 3  # random stream of the trajectories' noise; the others are in latent_inputs.py


@dataclass(kw_only=True)
class TeacherConfig(GuidanceConfig):
    """The trained pipeline, and how it is sampled: its guidance is what the student learns."""

    pipeline: str = setting(help="folder of a saved pipeline", may_change=True)
    num_inference_steps: int = setting(16, "steps of a trajectory", at_least=2)
    solver: Literal["pipeline", "euler", "unipc"] = setting(
        "unipc", "solver of the trajectories; pipeline: the teacher's scheduler"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "precision of the teacher; auto: bfloat16 on a GPU that has it, else float32"
    )

    @property
    def sampler(self) -> SamplerConfig:
        """These settings as every program that samples has them: for `prepare_sampling` and the precision."""
        return SamplerConfig(**{name: value for name, value in vars(self).items() if name != "pipeline"})


@dataclass(kw_only=True)
class DistillationConfig(Settings):
    """Settings of both stages."""

    teacher: TeacherConfig = setting(default_factory=TeacherConfig)
    student_steps: list[int] = setting(
        default_factory=lambda: [1, 2, 4], help="numbers of steps that the student is to sample in", at_least=1
    )
    trajectory_steps: int = setting(2000, "optimiser steps of the first stage; the rest are the second", at_least=0)
    trajectory_reuse: int = setting(8, "optimiser steps on the same trajectories, each at other times", at_least=1)
    time_mu: float = setting(-0.5, "mu of the logit-normal times in the second stage where r = t")
    time_sigma: float = setting(1.0, "sigma of the logit-normal times", above=0)

    def __post_init__(self):
        super().__post_init__()
        steps = self.teacher.num_inference_steps
        if not self.student_steps or any(steps % n for n in self.student_steps):
            raise ValueError(
                f"student_steps is {self.student_steps}, expected divisors of teacher.num_inference_steps, {steps}: a "
                "step of the student spans whole steps of its teacher"
            )


def check_teacher(config: DistillationConfig, teacher: DiffusionPipeline, dataset: LatentDataset) -> None:
    """Raises: ValueError if the teacher cannot be distilled, or has other latents or classes than the data."""
    from .latent_inputs import check_latents

    given, network = config.teacher, teacher.transformer.config
    folder = f"teacher.pipeline {given.pipeline}"
    if network.get("student") is not None:
        raise ValueError(f"{folder} is a few-step student itself, expected the pipeline that it was made from")
    if teacher.vae is None:
        raise ValueError(f"{folder} has no vae, expected a pipeline that makes images")
    shape = (network.in_channels, network.sample_size, network.sample_size)
    if shape != dataset.shape:
        raise ValueError(f"{folder} works on latents {shape}, those in {dataset.folder} are {dataset.shape}")
    check_latents(dataset, teacher.vae, None)
    names, theirs = dataset.id2label, teacher.config.id2label or {}
    if len(names) > network.num_classes:
        raise ValueError(f"{folder} has {network.num_classes} classes, the latents in {dataset.folder} {len(names)}")
    for index, name in names.items() if dataset.metadata is not None else ():
        if theirs.get(str(index), name) != name:
            raise ValueError(
                f"{folder} calls class {index} {theirs[str(index)]!r}, the latents in {dataset.folder} {name!r}: "
                "expected the same classes"
            )
    scale, kind = given.guidance_scale, given.guidance
    unguided = kind == "classifier_free" or (kind == "auto" and teacher.guidance_transformer is None)
    if scale != 1 and unguided and network.class_dropout_prob == 0:
        raise ValueError(
            f"teacher.guidance_scale is {scale}, but {folder} was trained with class_dropout_prob 0 and has no "
            "prediction without a class: expected 1, or another teacher.guidance"
        )
    try:
        given.check_pipeline(teacher, given.num_inference_steps)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be sampled as teacher.* says: {error}") from error


def prepare_teacher(config: TeacherConfig, teacher: DiffusionPipeline) -> torch.Tensor:
    """Give the teacher its solver.

    Returns: the times of its trajectories, (steps + 1,) from 0 to 1, the same as those of Euler's method.
    Raises: ValueError if the solver has other times.
    """
    use_solver(teacher, config.solver)
    teacher._set_timesteps(config.num_inference_steps, torch.device("cpu"))
    times = 1 - teacher.scheduler.sigmas.float().cpu()
    shift = scheduler_shift(teacher_shift(teacher))
    expected = shift_times(torch.linspace(0, 1, config.num_inference_steps + 1), shift)
    if times.shape != expected.shape or not torch.allclose(times, expected, atol=1e-4):
        raise ValueError(
            f"teacher.solver {config.solver} ({type(teacher.scheduler).__name__}) has other times than Euler's "
            "method: expected euler or unipc"
        )
    return expected


def teacher_shift(teacher: DiffusionPipeline) -> float:
    """The shift of its scheduler, as diffusers counts it."""
    return teacher.scheduler.config.get("flow_shift", teacher.scheduler.config.get("shift"))


def teacher_fingerprint(teacher: DiffusionPipeline) -> str:
    """Identifies the weights and the shift that a student learns from, and the constants of its losses."""
    identity = {"weights": pipeline_identity(teacher)["weights"], "shift": teacher_shift(teacher)}
    identity |= {"losses": [DELTA, SCALE, EVERY]}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def build_student(config: DistillationConfig, teacher: DiffusionPipeline) -> LightningDiTTransformer2DModel:
    """A copy of the teacher's network with a second time input, which has no effect until it is trained."""
    network, given = teacher.transformer, config.teacher
    guidance = None if given.guidance_scale == 1 else given.guidance_arguments | {"guidance": given.guidance}
    student = {"steps": sorted(set(config.student_steps)), "shift": teacher_shift(teacher), "guidance": guidance}
    settings = {name: value for name, value in network.config.items() if not name.startswith("_")}
    settings |= {"student": student, "base_head_layer": None, "class_dropout_prob": 0.0}
    model = type(network)(**settings)
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith("base_")}
    added = {name: value for name, value in model.state_dict().items() if name.startswith("interval_embed.")}
    model.load_state_dict(weights | added)
    return model.eval()


class MeanVelocityObjective(nn.Module):
    """Squared error of a student's mean velocity, weighted sample by sample: see `SCALE`."""

    def __init__(self, transformer: LightningDiTTransformer2DModel):
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        latents: torch.Tensor,
        times: torch.Tensor,
        next_times: torch.Tensor,
        labels: torch.Tensor,
        target: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The mean losses. Args: `latents`, `target`: (B, C, h, w); `times`, `next_times`, `labels`: (B,)."""
        prediction = self.transformer(latents, times, labels, return_dict=False, next_timestep=next_times)[0]
        errors = (prediction.float() - target).square().flatten(1).mean(1)  # (B,)
        return {"squared_error": errors.mean(), "loss": (errors / (errors.detach() + SCALE)).mean()}


class Intervals:
    """The time intervals of the student's steps. Their ends are indices into the teacher's times.

    Args: `steps`: the student's numbers of steps; `times`: (T + 1,) of a trajectory, on the device of the draws.
    """

    def __init__(self, steps: list[int], times: torch.Tensor):
        last = len(times) - 1
        ends = [(k * last // n, (k + 1) * last // n, 1 / (n * len(steps))) for n in steps for k in range(n)]
        self.times, table = times, torch.tensor(ends, dtype=torch.float64)
        self.ends = table[:, :2].long().to(times.device)  # (K, 2)
        self.cumulative = table[:, 2].cumsum(0).to(times.device, torch.float32)

    def choose(self, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Uniform numbers (B,) in [0, 1) -> indices (B,) of the two ends; all numbers of steps are equally likely."""
        chosen = torch.searchsorted(self.cumulative, uniform.contiguous(), right=True).clamp(max=len(self.ends) - 1)
        return self.ends[chosen].unbind(1)


def draw_places(count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random numbers, uniform in [0, 1), that choose an interval and a time in it."""
    place = {"generator": generator, "device": generator.device}
    return {"interval": torch.rand(count, **place), "place": torch.rand(count, **place)}


@torch.no_grad()
def integrate(teacher: DiffusionPipeline, config: TeacherConfig, labels: list[int], noise: torch.Tensor):
    """Trajectories (T + 1, B, C, h, w) from noise (B, C, h, w) to samples, guided as the configuration says."""
    points = [noise]

    def keep(pipe, step, timestep, tensors):
        points.append(tensors["latents"])
        return {}

    teacher(
        labels,
        config.num_inference_steps,
        latents=noise,
        output_type="latent",
        callback_on_step_end=keep,
        **config.guidance_arguments,
    )
    return torch.stack(points)


def chosen_pairs(
    trajectories: torch.Tensor, intervals: Intervals, draws: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Inputs of the first stage from trajectories (T + 1, B, C, h, w): the point at a time of the trajectory inside an
    interval, the end of that interval, and as target the mean velocity between the two."""
    first, last = intervals.choose(draws["interval"])
    here = (first + (draws["place"] * (last - first)).long()).clamp(max=last - 1)
    rows, times = torch.arange(len(here), device=here.device), intervals.times
    start, end = trajectories[here, rows], trajectories[last, rows]
    t, r = times[here], times[last]
    return {"latents": start, "times": t, "next_times": r, "target": (end - start) / _wide(r - t)}


@torch.no_grad()
def teacher_velocity(
    teacher: DiffusionPipeline, config: TeacherConfig, latents: torch.Tensor, times: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The guided velocity (B, C, h, w) of latents at (B,) times."""
    scale: float | torch.Tensor = config.guidance_scale
    if scale != 1:
        scale = _wide(torch.where(is_guided(times, config.guidance_interval), scale, 1.0))
    return teacher._velocity(latents, times, labels, scale, None, config.guidance)


@torch.no_grad()
def mean_velocity_target(
    student: Callable[..., Any],
    latents: torch.Tensor,
    times: torch.Tensor,
    next_times: torch.Tensor,
    labels: torch.Tensor,
    velocity: torch.Tensor,
) -> torch.Tensor:
    """v + (r - t)·du/dt, du/dt by finite differences of the student along the teacher's velocity (B, C, h, w).

    In exact float32: the two points are so close that in a lower precision rounding would hide the difference. At
    t = 0 and t = 1 the difference is one-sided.
    """
    after, before = (times + DELTA).clamp(max=1), (times - DELTA).clamp(min=0)
    places = [latents + _wide(after - times) * velocity, latents - _wide(times - before) * velocity]
    with exact_float32():
        means = student(
            torch.cat(places),
            torch.cat([after, before]),
            labels.repeat(2),
            return_dict=False,
            next_timestep=next_times.repeat(2),
        )[0]
    ahead, behind = means.float().chunk(2)
    return velocity + _wide((next_times - times) / (after - before)) * (ahead - behind)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def distillation_inputs(
    run: TrainingRun,
    config: DistillationConfig,
    teacher: DiffusionPipeline,
    times: torch.Tensor,
    dataset: LatentDataset,
    batches: Callable[[range], Iterator[dict[str, torch.Tensor]]],
) -> Iterator[dict[str, torch.Tensor]]:
    """The objective's inputs, micro-step by micro-step, of both stages; everything random is keyed by the position in
    the run.

    Args:
        times: of the teacher's trajectories, from `prepare_teacher`.
        batches: micro-steps -> raw `latents` (B, C, h, w) and `labels` (B,) of each, on the device.
    """
    todo, border = run.micro_steps, config.trajectory_steps * run.config.gradient_accumulation_steps
    first = range(todo.start, max(todo.start, min(todo.stop, border)))
    second = range(max(todo.start, border), todo.stop)
    intervals = Intervals(sorted(set(config.student_steps)), times.to(run.device))
    return chain(
        _trajectory_inputs(run, config, teacher, intervals, dataset, first),
        _mean_velocity_inputs(run, config, teacher, intervals, batches(second), second),
    )


def _trajectory_inputs(
    run: TrainingRun,
    config: DistillationConfig,
    teacher: DiffusionPipeline,
    intervals: Intervals,
    dataset: LatentDataset,
    micro_steps: range,
) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of the first stage. A resumed run integrates its trajectories again, from the same noise."""
    sampler, count = run.batch_sampler(len(dataset), dataset.weights), run.config.gradient_accumulation_steps
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # micro-step that they began at -> trajectories, labels

    def draw_noise(count, generator):
        return {"noise": torch.randn(count, *dataset.shape, generator=generator, device=generator.device)}

    for micro_step in micro_steps:
        step, part = divmod(micro_step, count)
        begun = (step - step % config.trajectory_reuse) * count + part
        if begun not in kept:
            kept = {other: value for other, value in kept.items() if other // count == begun // count}
            noise = run.draw(begun, draw_noise, NOISE_STREAM)["noise"]
            labels = dataset.labels[sampler.batch(begun)]
            kept[begun] = integrate(teacher, config.teacher, labels.tolist(), noise), labels.to(run.device)
        trajectories, labels = kept[begun]
        pairs = chosen_pairs(trajectories, intervals, run.draw(micro_step, draw_places))
        yield pairs | {"labels": labels}


def _mean_velocity_inputs(
    run: TrainingRun,
    config: DistillationConfig,
    teacher: DiffusionPipeline,
    intervals: Intervals,
    batches: Iterator[dict[str, torch.Tensor]],
    micro_steps: range,
) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of the second stage. One in `EVERY` samples has an interval, the others r = t. In a quarter of the cases
    t is the beginning of the interval, where sampling evaluates the student, else uniform in it."""
    mean, std = (s.to(run.device) for s in latent_statistics(teacher.vae))  # (1, C, 1, 1)
    network = teacher.transformer.config
    shape = network.in_channels, network.sample_size, network.sample_size

    def draw(count, generator):
        place = {"generator": generator, "device": generator.device}
        return draw_places(count, generator) | {
            "noise": torch.randn(count, *shape, **place),
            "times": sample_times(count, config.time_mu, config.time_sigma, **place),
        }

    # A graph of the teacher's pass is recorded now, before threads that read batches use the device.
    blank = torch.zeros(run.micro_batch_size, *shape, device=run.device)
    teacher_velocity(teacher, config.teacher, blank, blank[:, 0, 0, 0], blank[:, 0, 0, 0].long())
    for micro_step, batch in zip(micro_steps, batches, strict=True):
        latents, random = (batch["latents"].float() - mean) / std, run.draw(micro_step, draw)
        some = slice(-run.positions(micro_step).start % EVERY, None, EVERY)
        begin, end = (intervals.times[points] for points in intervals.choose(random["interval"][some]))
        t, r = random["times"].clone(), random["times"].clone()
        t[some] = begin + (end - begin) * ((4 * random["place"][some] - 1) / 3).clamp(min=0)
        r[some] = end
        labels, x = batch["labels"], interpolate(latents, random["noise"], t)
        target = teacher_velocity(teacher, config.teacher, x, t, labels).clone()
        target[some] = mean_velocity_target(run.model, x[some], t[some], r[some], labels[some], target[some])
        yield {"latents": x, "times": t, "next_times": r, "labels": labels, "target": target}
