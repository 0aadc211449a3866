"""How much an image depends on the batch that it is sampled in, by precision: the same images alone and in batches.

    python benchmarks/batch_invariance.py --pipeline weights/openmoji-128 --num_images 16 --batch_sizes 4 16 \\
        --dtypes float32 bfloat16 --output batch_invariance.json

Noise and labels are the same bit for bit (tests/programs/test_generate_at_scale.py); only matrix products of different
shapes round differently. In float32 with a float32 rotary embedding one level of 255 is the limit; for other
precisions none is known. Several processes only change the batches. The control compares images of different noise.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import vtp_diffusion  # noqa: F401  registers the pipeline
from vtp_diffusion.generation.sampling import draw_labels, pipeline_identity, sample_numbers
from vtp_diffusion.runtime.disk import write_json


def differences(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Largest and mean difference in levels of 255, and the share of values that differ, of uint8 images."""
    levels = (a.int() - b.int()).abs()
    return {
        "largest": levels.max().item(),
        "mean": levels.double().mean().item(),
        "share_changed": (levels > 0).double().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--num_images", type=int, default=16)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    settings = {"num_inference_steps": options.num_inference_steps}
    rows = []
    for dtype in options.dtypes:
        pipe = DiffusionPipeline.from_pretrained(options.pipeline, dtype=getattr(torch, dtype)).to(options.device)
        pipe.set_progress_bar_config(disable=True)
        labels = draw_labels("random", options.num_images, pipe.transformer.config.num_classes, seed=0)

        def images(batch_size: int, seed: int = 0, pipe=pipe, labels=labels) -> torch.Tensor:
            batches = torch.arange(len(labels)).split(batch_size)
            return torch.cat([sample_numbers(pipe, labels, b.tolist(), seed, **settings) for b in batches])

        alone = images(1)
        common = {"dtype": dtype, "rope_dtype": pipe.vae.config.get("rope_dtype")}
        for batch_size in options.batch_sizes:
            rows.append(common | {"batch_size": batch_size} | differences(alone, images(batch_size)))
        rows.append(common | {"batch_size": "other noise (control)"} | differences(alone, images(1, seed=10**6)))
    print(f"{'precision':10} {'rotary':10} {'batch':>22} {'largest':>8} {'mean':>8} {'changed':>8}")
    for row in rows:
        place = f"{row['dtype']:10} {row['rope_dtype'] or '-':10} {row['batch_size']:>22}"
        print(f"{place} {row['largest']:8} {row['mean']:8.4f} {row['share_changed']:8.2%}")
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    results = {"settings": vars(options), "device_name": device, "torch": torch.__version__}
    results |= {"pipeline": pipeline_identity(pipe)["weights"], "rows": rows}
    write_json(Path(options.output), results)


if __name__ == "__main__":
    main()
