r"""Images a second that LightningDiT-XL/1 gives on one GPU, decoded by VTP-Large; seconds of one image alone.

    python benchmarks/sampling.py --output benchmarks/results/sampling_h100.json --images 2000

Weights are random: the rates do not depend on them. A row a way of sampling: milliseconds of an evaluation of
the network and of decoding a batch (medians), the images a second that follow from both, beside the peer's as it is
shipped (`PEER`), and seconds of one image of 50 evaluations, called as in a notebook (median). With --images,
pipelines/generate.py is started as a user starts it, for so many images into an npz, and eval/generation.py, which
samples as many and measures them with VGG16 against noise: images a second of the whole program, everything included.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from launching import ROOT, device_name, program_environment, run_to_its_end

from vtp_diffusion import AutoencoderVTP, LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.generation.fast_sampling import speed_up
from vtp_diffusion.models.transformer_lightning_dit import LIGHTNING_DIT_SIZES
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_results
from vtp_diffusion.runtime.experiments import check_names

EVALUATIONS = 249
# img/s on one H100 of the upstream sampler, 249 evaluations, batch 125: float32 with TF32, its blocks compiled
PEER = 3.11
WAYS = {"eager": None, "fast": {}, "fast, fp8": {"fp8": True}}
GENERATE, EVALUATE = "pipelines/generate.py", "eval/generation.py"
PROGRAMS = {
    "default": [GENERATE],
    "fp8": [GENERATE, "--fp8"],
    "plain": [GENERATE, "--fast=false"],
    "evaluation": [EVALUATE],
    "evaluation, fp8": [EVALUATE, "--fp8"],
}
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
TINY_VAE = {f"{p}_{k}": v for p in ("encoder", "decoder") for k, v in
            {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}.items()}  # fmt: skip


@dataclass(kw_only=True)
class BenchmarkConfig(Settings):
    output: str = setting(help="FILE.json for the results")
    ways: list[str] = setting(default_factory=lambda: list(WAYS), help=f"some of {'; '.join(WAYS)}")
    batch_size: int = setting(125, "images at once", at_least=1)
    repeats: int = setting(10, "evaluations that are timed", at_least=1)
    images: int | None = setting(None, "that pipelines/generate.py makes; none: it is not started", at_least=1)
    programs: list[str] = setting(
        default_factory=lambda: ["default"], help=f"what is started, and how: {'; '.join(PROGRAMS)}"
    )
    evaluations: int = setting(EVALUATIONS, "that a program takes for a batch", at_least=1)
    feature_network: str = setting("vgg16", "that eval/generation.py measures with")
    tiny: bool = setting(False, "tiny networks, to try the benchmark itself")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output(self.output)
        check_names("ways", self.ways, WAYS)
        check_names("programs", self.programs, PROGRAMS)


def make_pipeline(tiny: bool) -> LightningDiTPipeline:
    """XL/1 with VTP-Large, or tiny networks, with random weights in bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        torch.manual_seed(0)
        transformer = LightningDiTTransformer2DModel(**(TINY if tiny else LIGHTNING_DIT_SIZES["XL"])).eval()
        vae = AutoencoderVTP(**(TINY_VAE if tiny else {}), latents_mean=[0.0] * 64, latents_std=[1.0] * 64).eval()
    pipe = LightningDiTPipeline(vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=10))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.bfloat16)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median, each waited for, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times[1:])


@torch.inference_mode()
def measure(config: BenchmarkConfig, way: str) -> dict:
    """A row of the results."""
    pipe, count, start = make_pipeline(config.tiny), config.batch_size, time.perf_counter()
    on = speed_up(pipe, **WAYS[way]) if WAYS[way] is not None else "bfloat16"
    latents = torch.randn(count, 64, 16, 16, device=pipe.device, dtype=torch.bfloat16)
    inputs = (
        latents,
        torch.full((count,), 0.5, device=pipe.device),
        torch.zeros(count, dtype=torch.long).to(latents.device),
    )

    def evaluate():
        return pipe.transformer(*inputs, return_dict=False)

    milliseconds(evaluate, 1)
    first = time.perf_counter() - start
    evaluation = milliseconds(evaluate, config.repeats)
    decoding = milliseconds(lambda: pipe.decode_latents(latents), config.repeats)
    rate = 1000 * count / (EVALUATIONS * evaluation + decoding)
    row = {"way": way, "on": on, "seconds_to_first": first, "evaluation_ms": evaluation, "decoding_ms": decoding}
    row |= {"images_per_second": rate, "ratio_to_peer": None if config.tiny else rate / PEER}
    row["one_image_50_evaluations_seconds"] = milliseconds(lambda: pipe(0, num_inference_steps=50), 5) / 1000
    row["guided_50_evaluations_seconds"] = milliseconds(lambda: pipe(0, 50, guidance_scale=2.0), 3) / 1000
    return row


def run_program(config: BenchmarkConfig, options: str, folder: Path) -> dict:
    """Seconds and images a second of a program, from its start to its end."""
    program, *words = PROGRAMS[options]
    words += ["--num_images", config.images, "--num_inference_steps", config.evaluations]
    words += ["--batch_size", config.batch_size]
    if program == GENERATE:
        words += ["--pipeline", folder / "pipeline", "--output", folder / "samples.npz"]
    else:
        reference = folder / "noise.npz"
        noise = np.random.default_rng(0).integers(0, 256, (config.images, 256, 256, 3), dtype=np.uint8)
        np.savez(reference, arr_0=noise)
        words += ["--images", folder / "pipeline", "--reference", reference, "--output", folder / "distance.json"]
        words += ["--feature_network", config.feature_network]
    start = time.perf_counter()
    run_to_its_end([sys.executable, str(ROOT / program), *map(str, words)], program_environment())
    seconds = time.perf_counter() - start
    for path in folder.glob("*.npz"):
        path.unlink()
    rate = config.images / seconds
    row = {"options": options, "images": config.images, "evaluations": config.evaluations, "seconds": seconds}
    comparable = not config.tiny and config.evaluations == EVALUATIONS
    return row | {"images_per_second": rate, "ratio_to_peer": rate / PEER if comparable else None}


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchmarkConfig, argv, __doc__)
    results = {"device": device_name(), "torch": torch.__version__, "peer": PEER, "ways": [], "programs": []}

    def keep(kind: str, row: dict) -> None:
        results[kind].append(row)
        write_results(config.output, "sampling", config, results)
        print(json.dumps(row), flush=True)

    if torch.cuda.is_available():
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        results["product_tflops"] = 2 * 8.192**3 / milliseconds(lambda: a @ a, 20)
        del a
    for way in config.ways:
        keep("ways", measure(config, way))
        torch.cuda.empty_cache()
    if config.images is not None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_pipeline(config.tiny).save_pretrained(folder / "pipeline")
            torch.cuda.empty_cache()
            for options in config.programs:
                keep("programs", run_program(config, options, folder))
    print(f"results: {config.output}")


if __name__ == "__main__":
    main()
