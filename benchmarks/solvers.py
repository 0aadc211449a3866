r"""How few evaluations of the network are enough: the error of every solver at several numbers of evaluations.

    python benchmarks/solvers.py --pipeline weights/openmoji-128 --num_images 8 --guidance_scale 2.5 \
        --output benchmarks/results/solvers_openmoji.json

The peer is Euler's method, the pipeline's default, with the pipeline's own shift. The exact solution is that of the
adaptive method at a tolerance of 1e-5. A row has the relative root mean square difference of an image's latents to it,
the median over images, because now and then an image ends as a quite different one. That is the error of solving, not
the quality of images, which eval/generation.py measures with the same --solver, --time_shift and
--num_inference_steps. Beside the JSON a picture has a row for every solver: two images at the flow's end, and the same
with more and more evaluations.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from launching import device_name

import vtp_diffusion  # noqa: F401 (registers the pipeline)
from vtp_diffusion.data.images import image_grid, to_pil
from vtp_diffusion.generation.sampling import draw_labels, initial_noise
from vtp_diffusion.generation.solvers import SCHEDULERS, solve_adaptively, use_solver
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_picture, write_results

TOLERANCE = 1e-5
SHOWN = 2


@dataclass(kw_only=True)
class BenchmarkConfig(Settings):
    pipeline: str = setting(help="folder of a saved pipeline")
    output: str = setting(help="FILE.json for the results; FILE.png beside it shows images")
    num_images: int = setting(8, "images, of classes in turn", at_least=1)
    evaluations: list[int] = field(default_factory=lambda: [5, 10, 15, 25, 50], metadata={"help": "of a solver"})
    time_shifts: list[float] = field(
        default_factory=lambda: [0.3, 0.6, 1.0], metadata={"help": "s, beside the pipeline's"}
    )
    solvers: list[str] = field(default_factory=lambda: list(SCHEDULERS), metadata={"help": "names"})
    guidance_scale: float = setting(1.0, "1 is no guidance", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output(self.output)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchmarkConfig, argv, __doc__)
    pipe = DiffusionPipeline.from_pretrained(config.pipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    labels = draw_labels("balanced", config.num_images, pipe.transformer.config.num_classes, seed=0)
    noise = initial_noise(pipe, range(len(labels)), seed=0)
    own, counted = pipe.scheduler, []
    end = solve_adaptively(
        pipe, labels, noise, TOLERANCE, config.guidance_scale, on_evaluation=lambda: counted.append(1)
    )
    results = {"device": device_name(), "shift": own.config.get("shift"), "end_evaluations": len(counted), "rows": []}
    solved, pictures, names = to_pil(pipe.decode_latents(end[:SHOWN])), [], []
    for shift in [None, *config.time_shifts]:
        for solver in config.solvers:
            pictures += solved
            names += ["end of the flow"] * len(solved)
            for evaluations in config.evaluations:
                steps = (evaluations + 1) // 2 if solver == "heun" else evaluations
                pipe.scheduler = own
                use_solver(pipe, solver, shift)
                options = {"guidance_scale": config.guidance_scale, "latents": noise, "output_type": "latent"}
                found = pipe(labels, steps, **options).images
                errors = ((found - end).square().mean((1, 2, 3)) / end.square().mean((1, 2, 3))).sqrt()  # (B,)
                row = {"solver": solver, "time_shift": shift, "evaluations": evaluations}
                row |= {"error": errors.quantile(0.5).item(), "errors": errors.tolist()}
                results["rows"].append(row)
                print(json.dumps(row), flush=True)
                pictures += to_pil(pipe.decode_latents(found[:SHOWN]))
                what = f"{solver}, {evaluations}" + (f", s = {shift:g}" if shift else "")
                names += [what] * len(found[:SHOWN])
    peers = {
        r["evaluations"]: r["error"] for r in results["rows"] if r["solver"] == "euler" and r["time_shift"] is None
    }
    for row in results["rows"]:
        row["ratio_to_euler"] = row["error"] / peers[row["evaluations"]] if row["evaluations"] in peers else None
    write_results(config.output, "solvers", config, results)
    write_picture(
        Path(config.output).with_suffix(".png"),
        image_grid(pictures, len(solved) * (1 + len(config.evaluations)), names),
    )
    print(f"results: {config.output}")


if __name__ == "__main__":
    main()
