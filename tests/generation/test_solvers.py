"""Solvers by name, on the golden sets and on a pipeline."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from golden import GOLDEN, LIGHTNING_DIT_SETS, load_lightning_dit, relative_error
from safetensors.torch import load_file

from vtp_diffusion import LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.generation.sampler_config import SamplerConfig
from vtp_diffusion.generation.solvers import SCHEDULERS, solve_adaptively, use_solver


def pipeline(transformer, shift=1.0):
    pipe = LightningDiTPipeline(None, transformer, FlowMatchEulerDiscreteScheduler(shift=shift))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", LIGHTNING_DIT_SETS)
def test_the_adaptive_solver_ends_where_upstreams_does(name):
    golden = load_file(GOLDEN / name / "golden.safetensors")
    calls = []
    labels, noise = golden["sample.label"].tolist(), golden["sample.noise"]
    pipe = pipeline(load_lightning_dit(name))
    found = solve_adaptively(pipe, labels, noise, on_evaluation=lambda: calls.append(1))
    assert relative_error(found, golden["sample.dopri5_5"]) < 1e-5 and 8 <= len(calls) < 200


def test_the_adaptive_solver_guides_its_last_step_beyond_the_end_too():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    golden = load_file(GOLDEN / "lightning_dit_released" / "golden.safetensors")
    pipe, labels = pipeline(load_lightning_dit("lightning_dit_released")), golden["sample.label"]
    times = []

    def velocity(t, x):
        times.append(t.item())
        return pipe._velocity(x, times[-1], labels, 4.0, 3)

    with torch.no_grad():
        expected = torchdiffeq.odeint(
            velocity, golden["sample.noise"], torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-6, method="dopri5"
        )[-1]
    found = solve_adaptively(pipe, labels.tolist(), golden["sample.noise"], guidance_scale=4.0, guidance_channels=3)
    assert max(times) > 1 and relative_error(found, expected) < 1e-6


def tiny():
    torch.manual_seed(0)
    transformer = LightningDiTTransformer2DModel(
        sample_size=4, in_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=3
    )
    return transformer.eval()


@pytest.mark.parametrize("solver", list(SCHEDULERS))
@pytest.mark.parametrize("time_shift", [None, 0.5])
def test_every_solver_ends_where_the_adaptive_one_does(solver, time_shift):
    pipe, noise = pipeline(tiny(), shift=1.5), torch.randn(2, 4, 4, 4)
    expected = solve_adaptively(pipe, [0, 2], noise, tolerance=1e-6, guidance_scale=1.5)
    use_solver(pipe, solver, time_shift)
    assert type(pipe.scheduler).__name__ == SCHEDULERS[solver][0]
    config = pipe.scheduler.config
    assert config.get("flow_shift", config.get("shift")) == (1.5 if time_shift is None else 2.0)
    found = pipe([0, 2], 60, guidance_scale=1.5, latents=noise, output_type="latent").images
    assert relative_error(found, expected) < (2e-2 if solver == "euler" else 2e-3)


def test_the_adaptive_solver_refuses_guidance_that_the_pipeline_lacks():
    for given, message in (
        ({"guidance": "autoguidance"}, "guidance is 'autoguidance', expected auto, classifier_free"),
        ({"guidance_channels": 5}, "guidance_channels is 5, expected 1 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            solve_adaptively(pipeline(tiny()), [0], torch.randn(1, 4, 4, 4), guidance_scale=2.0, **given)


def test_the_pipeline_s_own_solver_stays_and_may_be_shifted():
    pipe = pipeline(tiny(), shift=1.5)
    use_solver(pipe, "unipc")
    before = pipe.scheduler
    for solver in ("pipeline", "dopri5"):
        use_solver(pipe, solver)
        assert pipe.scheduler is before
    use_solver(pipe, "pipeline", time_shift=0.25)
    assert type(pipe.scheduler) is type(before) and pipe.scheduler.config.flow_shift == 4
    assert pipe.scheduler.config.use_flow_sigmas
    with pytest.raises(ValueError, match="solver 'rk4' is unknown; known: pipeline, euler"):
        use_solver(pipe, "rk4")
    with pytest.raises(ValueError, match="time_shift is 0.3, but solver dopri5 chooses its times"):
        SamplerConfig(solver="dopri5", time_shift=0.3)
