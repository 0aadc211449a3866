"""What the newer methods cost at full size: guided evaluations, steps of training, steps of a few-step student.

    python benchmarks/frontier_costs.py --output benchmarks/results/frontier_costs_h100.json
    python benchmarks/frontier_costs.py --output costs.json --tiny true

Random weights and latents. Evaluations are XL/1's with bfloat16 weights and everything fast that sampling has, and one
row with compiled blocks. A step of training is forward, backward, clipping and optimiser in this process, fused and
under bfloat16 autocast, without EMA and CUDA graphs: it says what a method costs, `dit_training.py` how fast the
program is. Student steps are train_dit/distill.py's, started as a user starts it, of a teacher with classifier-free
guidance.
"""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from dit_training import make_data
from launching import ROOT, device_name, program_environment, read_log, run_to_its_end, torchrun
from sampling import TINY, TINY_VAE, milliseconds

from vtp_diffusion import AutoencoderVTP, LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.generation.fast_sampling import speed_up
from vtp_diffusion.generation.objective import FlowMatchingObjective
from vtp_diffusion.models.fused_lightning_dit import fuse_training, why_not_fused
from vtp_diffusion.models.transformer_lightning_dit import LIGHTNING_DIT_SIZES
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_results
from vtp_diffusion.runtime.experiments import check_names
from vtp_diffusion.training.compilation import compile_modules
from vtp_diffusion.training.optimisation import MuonWithAdamW, muon_groups, parameter_groups

WEAK = {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64}  # B/1, for autoguidance
GUIDANCE = ("none", "classifier_free", "autoguidance", "internal")
# Method -> changes of the network, and the optimiser
METHODS = {
    "velocity, AdamW": ({}, "adamw"),
    "data": ({"prediction": "data"}, "adamw"),
    "base head": ({"base_head_layer": 8}, "adamw"),
    "Muon": ({}, "muon"),
}
STEPS = 12  # of each stage of a student
PARTS = ("evaluations", "training", "student")


@dataclass(kw_only=True)
class BenchmarkConfig(Settings):
    output: str = setting(help="FILE.json for the results")
    batch_size: int = setting(128, "images of an evaluation, and of a step of training", at_least=1)
    student_batch_size: int = setting(64, "images of a student's step", at_least=4)
    repeats: int = setting(10, "evaluations that are timed", at_least=1)
    parts: list[str] = setting(default_factory=lambda: list(PARTS), help=f"some of {', '.join(PARTS)}")
    tiny: bool = setting(False, "tiny networks, to try the benchmark itself")

    def __post_init__(self):
        super().__post_init__()
        check_names("parts", self.parts, PARTS)
        check_output(self.output)


def make_transformer(tiny: bool, **changes) -> LightningDiTTransformer2DModel:
    """XL/1 with these changes, or a tiny network."""
    if tiny:
        kept = {"base_head_layer": 1, "student": changes.get("student")}
        return LightningDiTTransformer2DModel(**TINY | {name: kept[name] for name in kept if name in changes})
    return LightningDiTTransformer2DModel(**(LIGHTNING_DIT_SIZES["XL"] | changes))


def make_pipeline(config: BenchmarkConfig, fast: bool, **changes) -> LightningDiTPipeline:
    """A pipeline in bfloat16 that decodes nothing; `fast`: with all that sampling has, else its blocks compiled."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        transformer = make_transformer(config.tiny, **changes).eval()
        guide = make_transformer(config.tiny, **WEAK).eval() if "student" not in changes else None
        vae = AutoencoderVTP(**TINY_VAE, latents_mean=[0.0] * 64, latents_std=[1.0] * 64)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=10)
    pipe = LightningDiTPipeline(vae=vae, transformer=transformer, guidance_transformer=guide, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device, torch.bfloat16)
    if fast and device == "cuda":
        speed_up(pipe)
    elif not fast:
        compile_modules(transformer, transformer._repeated_blocks)
    return pipe


def timed(call: Callable[[], object], config: BenchmarkConfig) -> dict[str, float]:
    """Seconds of the first call, in which passes are recorded or compiled, milliseconds of later ones, and memory."""
    cuda, start = torch.cuda.is_available(), time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    call()
    if cuda:
        torch.cuda.synchronize()
    row = {"first_seconds": time.perf_counter() - start, "ms": milliseconds(call, config.repeats)}
    return row | ({"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {})


@torch.inference_mode()
def guided_evaluations(config: BenchmarkConfig) -> dict[str, dict]:
    """Kind of guidance -> `timed` of a guided evaluation of the batch; of an unguided one with compiled blocks, and of
    all that a student takes for the batch in 4 steps."""
    rows: dict[str, dict] = {}
    for fast in (True, False):
        pipe = make_pipeline(config, fast, base_head_layer=8)
        latents = torch.randn(config.batch_size, 64, 16, 16, device=pipe.device)
        labels = torch.zeros(config.batch_size, dtype=torch.long, device=pipe.device)
        for kind in GUIDANCE if fast else GUIDANCE[:1]:
            scale, given = (1.0, "auto") if kind == "none" else (1.5, kind)
            call = partial(pipe._velocity, latents, 0.5, labels, scale, None, given)
            rows[kind if fast else "none, compiled blocks"] = timed(call, config)
        del pipe, call
        gc.collect()  # a network that is sped up refers to itself
    student = make_pipeline(config, True, student={"steps": [1, 2, 4], "shift": 10.0, "guidance": None})
    rows["student, 4 steps"] = timed(lambda: student([0] * config.batch_size, 4, output_type="latent"), config)
    return rows


def training_step(config: BenchmarkConfig, method: str) -> dict:
    """`timed` of a step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    changes, optimizer = METHODS[method]
    with device:
        model = make_transformer(config.tiny, **changes)
    if why_not_fused(model, device) is None:
        fuse_training(model)
    objective = FlowMatchingObjective(model, cosine_loss=True)
    groups = muon_groups(model, objective, 0.0) if optimizer == "muon" else parameter_groups(objective, 0.0)
    kind = MuonWithAdamW if optimizer == "muon" else torch.optim.AdamW
    optimizer = kind(groups, lr=1e-4, fused=True)
    count, shape = config.batch_size, (64, 16, 16)
    latents, noise = torch.randn(2, count, *shape, device=device)
    times, labels = torch.rand(count, device=device), torch.zeros(count, dtype=torch.long, device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective(latents, noise, times, labels)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, config)


def student_steps(config: BenchmarkConfig, folder: Path) -> dict:
    """Milliseconds of a step in both stages of train_dit/distill.py, and its memory."""
    make_data(folder, "XL/1")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        teacher = make_transformer(config.tiny)
    vae = AutoencoderVTP.from_pretrained(folder / "vae")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=10)
    LightningDiTPipeline(vae=vae, transformer=teacher.cpu(), scheduler=scheduler).save_pretrained(folder / "teacher")
    if torch.cuda.is_available():  # the program needs what this process still holds, 50 GiB and more
        gc.collect()  # a network that is sped up refers to itself
        torch.cuda.empty_cache()
    words = ["--latents", folder / "latents", "--teacher.pipeline", folder / "teacher", "--output_dir", folder / "run"]
    words += ["--teacher.guidance_scale", 1.5, "--train_batch_size", config.student_batch_size, "--log_steps", 1]
    words += ["--trajectory_steps", STEPS, "--max_train_steps", 2 * STEPS, "--report_to", "none"]
    words += ["--mixed_precision", "bf16", "--save_dtype", "bfloat16"]
    words += ["--validation.num_inference_steps", 4]
    run_to_its_end(torchrun(1, ROOT / "train_dit" / "distill.py", *words), program_environment())
    lines = [line for line in read_log(folder / "run") if "loss" in line]
    moments = [0.0] + [line["seconds"] for line in lines]
    seconds = [after - before for before, after in zip(moments, moments[1:], strict=False)]
    # in the first steps passes are recorded; of the first stage every eighth integrates the trajectories of eight
    trajectory, distillation = seconds[4:STEPS], seconds[STEPS + 3 :]
    return {
        "images": config.student_batch_size,
        "trajectory_ms": 1000 * statistics.median(trajectory),
        "integration_ms": 1000 * seconds[8],
        "distillation_ms": 1000 * statistics.median(distillation),
        "peak_memory_gib": max(line["peak_memory_gib"] for line in lines),
    }


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchmarkConfig, argv, __doc__)
    results = {"device": device_name(), "torch": torch.__version__}

    def keep(name: str, values: dict) -> None:
        results[name] = values
        print(json.dumps({name: values}), flush=True)
        write_results(config.output, "frontier_costs", config, results)

    if "evaluations" in config.parts:
        results["passes"] = "none 1, classifier_free 2, autoguidance 1 and B/1's, internal 1"
        keep("guided_evaluations", guided_evaluations(config))
    if "training" in config.parts:
        steps = {}
        for method in METHODS:
            steps[method] = training_step(config, method)
            keep("training_step", steps)
    if "student" in config.parts:
        with tempfile.TemporaryDirectory() as folder:
            keep("student_step", student_steps(config, Path(folder)))


if __name__ == "__main__":
    run(main)
